"""Two and four real ranks on TorchRec against INT4 QAT with row scales on one process: losses, tables, bytes."""

import importlib.util
import json
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dqrm import QATConfig, QuantEmbeddingBagCollection
from dqrm.quant.row_codec import RowCodec
from launch_helpers import by_hand
from sharded.rank_program import BATCH, CASES, DIM, RANKS, RATE, ROWS, STEPS, loss_of, problem

TORCHREC = pytest.mark.skipif(
    importlib.util.find_spec("torchrec") is None, reason="the extra dqrm[torchrec] and TorchRec are not installed"
)
pytestmark = [TORCHREC, pytest.mark.slow, pytest.mark.distributed]
PROGRAM = (sys.executable, str(Path(__file__).with_name("rank_program.py")))


def ran(folder, ranks, *cases):
    """What each rank found, and the folder with the tensors."""
    with by_hand(folder / "log", *[(folder, *cases)] * ranks, program=PROGRAM) as launch:
        for ended in launch.wait():
            assert ended.code == 0, ended.err[-3000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(ranks)], folder


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return ran(tmp_path_factory.mktemp("ranks"), RANKS)


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    return ran(tmp_path_factory.mktemp("four"), 4, "row_wise", "table_wise", "forward_only")


def one_process(case, ranks=RANKS):
    """Losses and tables of the same training on one process, in this package's own QAT where it has the format."""
    tables, ids, labels, weights = problem(ranks)
    options = CASES[case][1]
    backward = options["backward"] and RowCodec(DIM, options["backward"])
    starts = torch.tensor([0, *ROWS]).cumsum(0)
    own = options.get("scale", "fp32") == "fp32"
    bits = {None: 32, "int2": 2, "int4": 4}[options["forward"]]
    qat = QATConfig(bits=bits if own else 32, table_granularity="row" if own and bits < 32 else "table")
    model = QuantEmbeddingBagCollection(ROWS, DIM, _weight=torch.cat(tables), qat=qat).train()
    optimizer = torch.optim.SGD(model.parameters(), RATE)

    def sent(gradient):
        """The gradient of the mean over one rank's samples, as the other ranks receive it."""
        rows = (gradient * ranks).reshape(-1, DIM)
        return (backward.decode(backward.encode(rows)) / ranks).view_as(gradient)

    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        vectors = model(ids[step])
        if not own:
            vectors = RowCodec(DIM, options["forward"], options["scale"]).fake_quantize(vectors.view(-1, DIM))
            vectors = vectors.view(-1, len(ROWS), DIM)
        if backward:
            vectors.register_hook(sent)
        loss = loss_of(vectors, labels[step], weights)
        loss.backward()
        optimizer.step()
        if bits < 32:
            model.refresh_scale()
        losses.append(float(loss))
    return losses, [model.weight.detach()[first:last] for first, last in pairwise(starts)], model


@pytest.mark.parametrize("case", ["row_wise", "table_wise", "forward_only", "int2_fp16", "fp32"])
def test_losses_and_tables_are_those_of_one_process(found, case):
    assert_as_on_one_process(found, case)


@pytest.mark.parametrize("case", ["row_wise", "table_wise", "forward_only"])
def test_losses_and_tables_of_four_ranks(four, case):
    assert_as_on_one_process(four, case)


def assert_as_on_one_process(found, case):
    ranks, folder = found
    losses, tables, _ = one_process(case, len(ranks))
    assert all(ranks[0][case]["losses"] == rank[case]["losses"] for rank in ranks)
    assert losses[0] > losses[-1] + 0.05  # it learns, so equality says something
    assert ranks[0][case]["losses"] == pytest.approx(losses, rel=1e-5)
    stored = load_file(folder / f"{case}.safetensors")
    for number, table in enumerate(tables):
        torch.testing.assert_close(stored[f"t{number}"], table, rtol=1e-4, atol=1e-5)


def test_the_cases_differ(found):
    """INT4, INT2 and FP32 do not give the same losses, nor do the two ways to round gradients."""
    (first, _), _ = found
    ends = {case: first[case]["losses"][-1] for case in ("row_wise", "forward_only", "stochastic", "int2_fp16", "fp32")}
    assert len(set(ends.values())) == len(ends)


def test_stochastic_rounding_of_gradients_follows_the_curve(found):
    (first, _), _ = found
    exact, rounded = first["forward_only"]["losses"], first["stochastic"]["losses"]
    assert rounded == pytest.approx(exact, abs=0.02)


@pytest.mark.parametrize("case", ["row_wise", "table_wise"])
def test_evaluation_and_one_machine_use_the_scales_of_training(found, case):
    """Rows that ranks receive in evaluation are bit for bit those of a collection of the gathered tables."""
    _, folder = found
    stored = load_file(folder / f"{case}.safetensors")
    ids = problem()[1][0, :BATCH]
    weight = torch.cat([stored[f"t{number}"] for number in range(len(ROWS))])
    qat = QATConfig(bits=4, table_granularity="row")
    model = QuantEmbeddingBagCollection(ROWS, DIM, _weight=weight, qat=qat).eval()
    with torch.no_grad():
        assert torch.equal(model(ids), stored["evaluated"])
    assert torch.equal(model.scale, RowCodec(DIM).scales(weight))


def test_tables_are_gathered_on_the_first_rank_only(found):
    (first, second), _ = found
    assert first["row_wise"]["names"] == second["row_wise"]["names"] == ["t0", "t1", "t2"]
    assert (first["row_wise"]["kept"], second["row_wise"]["kept"]) == ([True] * 3, [False] * 3)


@pytest.mark.parametrize("plan", ["row_wise", "table_wise"])
def test_bytes_at_the_collective(found, plan):
    """Of all ranks: each looked-up row once in each direction, as many bytes as `row_bytes` says."""
    ranks, _ = found
    rows = STEPS * RANKS * BATCH * len(ROWS)
    sent = {way: sum(rank[plan]["sent"][way] for rank in ranks) for way in ("forward", "backward")}
    assert sent == {
        "forward": rows * RowCodec(DIM, "int4").row_bytes, "backward": rows * RowCodec(DIM, "int8").row_bytes,
    }  # fmt: skip
    plain = {way: sum(rank["fp32"]["sent"][way] for rank in ranks) for way in ("forward", "backward")}
    assert plain == {"forward": rows * 4 * DIM, "backward": rows * 4 * DIM}


def test_pooled_all_to_all_is_compressed_as_well(found):
    assert [rank["pooled"] for rank in found[0]] == [0.0, 0.0]


def test_a_column_wise_plan_has_scales_of_parts_of_rows(found):
    """Why it is refused: no other part of this package could give a row the scale that it trains with."""
    for rank in found[0]:
        assert rank["columns"]["halves"] == 0
        assert rank["columns"]["rows"] > 1e-3


def test_fbgemm_has_no_adam_on_the_cpu():
    """Why Adam of sharded tables is ours; once this fails, `dqrm.torchrec.lookups` may be compared with FBGEMM's."""
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
        ComputeDevice,
        SplitTableBatchedEmbeddingBagsCodegen,
    )

    table = (10, 8, EmbeddingLocation.HOST, ComputeDevice.CPU)
    for rule in (EmbOptimType.ADAM, EmbOptimType.PARTIAL_ROWWISE_ADAM):
        with pytest.raises(AssertionError, match="not supported in CPU mode"):
            SplitTableBatchedEmbeddingBagsCodegen([table], optimizer=rule)


@pytest.mark.parametrize("ranks", [2, 4])
def test_torchrec_s_planner_balances_tables_of_our_sharder(ranks):
    from torchrec import EmbeddingCollection, EmbeddingConfig
    from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology

    from dqrm.torchrec import EmbeddingCollectionSharder

    sizes = (10131227, 1460, 93145, 633, 27, 3)
    names = [f"t{number}" for number in range(len(sizes))]
    tables = [
        EmbeddingConfig(name=name, embedding_dim=16, num_embeddings=rows, feature_names=[name])
        for name, rows in zip(names, sizes)
    ]
    planner = EmbeddingShardingPlanner(topology=Topology(world_size=ranks, compute_device="cpu"), batch_size=512)
    collection = EmbeddingCollection(tables=tables, device=torch.device("meta"))
    (plan,) = planner.plan(collection, [EmbeddingCollectionSharder()]).plan.values()
    assert {each.sharding_type for each in plan.values()} == {"row_wise"}  # that of 3 rows, too
    rows = [0] * ranks
    for each in plan.values():
        for shard in each.sharding_spec.shards:
            rows[shard.placement.rank()] += shard.shard_sizes[0]
    assert max(rows) - min(rows) <= len(sizes) * ranks


def test_tables_whose_rows_would_not_pass_the_codec_are_refused(found):
    for rank in found[0]:
        assert rank["refused"] == [
            "table 't0' is sharded data_parallel, expected table_wise or row_wise: only then its rows pass the codecs, "
            "and whole",
            "table 't0' is sharded column_wise, expected table_wise or row_wise: only then its rows pass the codecs, "
            "and whole",
            "world size is 1, but TorchRec calls its codecs from 2 ranks on, so this would not be QAT; start 2 or more "
            "ranks, or train without shards (dqrm.quant.embedding)",
        ]
