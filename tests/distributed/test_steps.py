"""Training by simulated ranks, step by step: against one rank, and against an exchange written out slowly."""

import copy
import functools
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import reference as ref
from distributed.test_codecs import BITS_OF
from distributed.test_dense import arrives, blocks_of, slow_exchange
from dqrm.config import Config, ExchangeConfig, ModelConfig, OptimizerConfig, TrainingConfig
from dqrm.data.batches import Batch
from dqrm.models.dlrm import DLRM
from dqrm.quant.config import QATConfig
from dqrm.training.step import TrainStep
from kernel_helpers import PATHS, on

ROWS, MULTI, DIM = (50, 400, 7, 121, 65), (False, False, False, True, True), 8
STARTS = np.cumsum([0, *ROWS])
# Full batches, and short ones that leave some of four ranks without samples.
SIZES = [24, 24, 3, 24, 1, 17, 2, 24, 24, 5, 3, 24, 1, 1, 24, 7, 24, 2, 24, 24]
FP32 = {"table_codec": "fp32", "mlp_codec": "fp32"}
RANKS = pytest.mark.parametrize("ranks", [2, 3, 4])


def make_batch(number, samples, bags):
    random = np.random.default_rng(number)
    ids = np.stack([random.integers(0, rows, samples) for rows in ROWS[:3]], 1).astype(np.int32)
    columns = []
    for rows in ROWS[3:] if bags else ():
        lengths = random.integers(0, 4, samples)
        values = random.integers(0, rows, lengths.sum()).astype(np.int32)
        columns.append((torch.from_numpy(values), torch.from_numpy(np.cumsum(lengths) - lengths)))
    labels = torch.from_numpy((random.random(samples) < 0.4).astype("f4"))
    dense = torch.from_numpy(random.random((samples, 5)).astype("f4"))
    return Batch(dense, torch.from_numpy(ids), tuple(columns), labels)


PERIODS = {"periodic": {"scale_period": 5}, "running_max": {"rescan_period": 8}}


def make(exchange=None, bags=True, rule="sgd", refresh="periodic", bits=4, seed=3):
    config = Config(
        model=ModelConfig(embedding_dim=DIM, bottom_mlp=(16, DIM), top_mlp=(12, 1)),
        quantization=QATConfig(bits=bits, **PERIODS[refresh]),
        optimizer=OptimizerConfig(rule, 0.1),
        training=TrainingConfig(batch_size=24, seed=seed),
        exchange=ExchangeConfig(**(exchange or {})),
    )
    rows, multi = (ROWS, MULTI) if bags else (ROWS[:3], MULTI[:3])
    model = DLRM(5, rows, multi=multi, config=config.model, qat=config.quantization, seed=1).train()
    return model, TrainStep(model, config)


def train(step, sizes=SIZES, rate=0.05, bags=True):
    """The loss of each step: the mean over its samples."""
    losses = []
    for number, samples in enumerate(sizes):
        batch = make_batch(number, samples, bags)
        each = step(batch, rate, samples, number)
        losses.append(float(each.sum()) / (samples if step.exchange.size > 1 else 1))
    return losses


def mlp_of(model):
    return [parameter for parameter in model.parameters() if parameter is not model.tables.weight]


def flat(parameters):
    return np.concatenate([ref.array(parameter).ravel() for parameter in parameters])


@functools.cache
def one_rank(path="native", **options):
    """Weights before, and model and losses after training by one rank with the whole batches."""
    with on(path) if path == "plain" else nullcontext():
        model, step = make(**options)
        before = flat(model.parameters())
        return before, model, train(step, bags=options.get("bags", True))


def assert_same_model(one, two, tolerance):
    for (name, a), b in zip(one.named_parameters(), two.parameters()):
        error = float((a - b).detach().abs().max()) / float(b.detach().abs().max())
        assert error <= tolerance, f"{name}: {error}"
    assert one.tables.scale_ticks == two.tables.scale_ticks
    if one.tables.bits != 32:
        np.testing.assert_allclose(one.tables.current_scale(), two.tables.current_scale(), rtol=tolerance)


# ---- several ranks and one


@RANKS
@pytest.mark.parametrize(
    ("rule", "refresh", "bags", "way"),
    [("sgd", "periodic", True, "all_gather"), ("sgd", "running_max", False, "all_to_all"),
     ("rowwise_adagrad", "periodic", False, "all_gather"), ("rowwise_adagrad", "running_max", True, "all_to_all")],
)  # fmt: skip
def test_ranks_that_lose_nothing_train_what_one_rank_trains(ranks, rule, refresh, bags, way):
    _, one, expected = one_rank(rule=rule, refresh=refresh, bags=bags)
    several, step = make({"simulate_ranks": ranks, "table_exchange": way, **FP32}, bags, rule, refresh)
    np.testing.assert_allclose(train(step, bags=bags), expected, rtol=1e-5)
    assert_same_model(several, one, 1e-5)


@PATHS
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("bits", [8, 32])
def test_ranks_that_lose_nothing_on_either_path_and_for_other_bits(path, ranks, bits):
    _, one, expected = one_rank(path, bits=bits)
    with on(path):
        several, step = make({"simulate_ranks": ranks, **FP32}, bits=bits)
        np.testing.assert_allclose(train(step), expected, rtol=1e-5)
    assert_same_model(several, one, 1e-5)


@RANKS
@pytest.mark.parametrize("refresh", ["periodic", "running_max"])
def test_scales_are_exact_at_the_steps_of_a_refresh(ranks, refresh):
    model, step = make({"simulate_ranks": ranks, "mlp_codec": "int4", "table_codec": "int4"}, refresh=refresh)
    period, expected = (5 if refresh == "periodic" else 8), None
    for number, samples in enumerate(SIZES):
        before = np.split(ref.array(model.tables.weight), STARTS[1:-1])
        if number % period == 0:
            expected = np.array([np.abs(table).max() for table in before])
        step(make_batch(number, samples, True), 0.5, samples, number)
        if refresh == "running_max":
            after = np.split(ref.array(model.tables.weight), STARTS[1:-1])
            changed = [np.abs(new[(new != old).any(1)]).max(initial=0) for new, old in zip(after, before)]
            expected = np.maximum(expected, changed)
        ref.assert_scale(model.tables.scale, expected, 4)


# How far from fp32's weights the codecs may bring a model of 32 bits in 20 steps, as a part of the way that fp32 went.
# A rounding is off by up to 2**-9 of a value in bf16, by half of largest / n in int8 (n = 127) and int4 (n = 7). The
# largest of a block is 2 to 4 times its root mean square, roundings are spread evenly (1 / sqrt(12) of a scale) and
# there are two of them: a step is off by up to 4 / n * 0.29 * sqrt(2) = 1.6 / n of its length. The errors of 20 steps
# are independent, or compensated: they add up to sqrt(20) of one, the steps to 20. (With weights of 4 bits, one next to
# a tie may get another code: then nothing is bounded.)
BOUNDS = {"bf16": 2.0**-10, "int8": 0.4 / 127, "int4": 0.4 / 7}


@pytest.mark.parametrize(("ranks", "way"), [(2, "all_gather"), (4, "all_to_all")])
@pytest.mark.parametrize("codec", BOUNDS)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_codecs_stay_close_to_fp32(ranks, way, codec, rounding):
    start, exact, _ = one_rank(bits=32)
    options = {"simulate_ranks": ranks, "table_codec": codec, "mlp_codec": codec, "codec_rounding": rounding}
    model, step = make({**options, "table_exchange": way}, bits=32)
    train(step)
    end = flat(exact.parameters())
    off = np.linalg.norm(flat(model.parameters()) - end) / np.linalg.norm(end - start)
    assert 0 < off <= BOUNDS[codec] * (2 if rounding == "stochastic" else 1)  # errors up to a whole scale


VARIANTS = {
    "defaults": {},
    "int4 stochastic": {"mlp_codec": "int4", "table_codec": "int4", "codec_rounding": "stochastic"},
    "owners": {"table_exchange": "all_to_all"},
    "shared": {"shared_scales": True, "mlp_codec_scale": "bucket:32"},
    "rows": {"table_codec_scale": "row", "codec_rounding": "stochastic"},
    "bf16": {"mlp_codec": "bf16", "table_codec": "bf16", "codec_rounding": "stochastic"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_is_the_same_bit_for_bit(variant):
    runs = []
    for seed in (3, 3, 4):
        model, step = make({"simulate_ranks": 3, **VARIANTS[variant]}, rule="rowwise_adagrad", seed=seed)
        runs.append((train(step, SIZES[:8]), flat(model.parameters()), step.exchange.state()))
    (losses, weights, state), other, third = runs
    assert losses == other[0]
    np.testing.assert_array_equal(weights, other[1])
    assert state.keys() == other[2].keys()
    assert all(torch.equal(value, other[2][name]) for name, value in state.items())
    stochastic = VARIANTS[variant].get("codec_rounding") == "stochastic"
    assert stochastic == (weights != third[1]).any()  # of the training seed nothing else depends here


# ---- one step after the other, written out


def encoded(rows, values, name, per_row, scales=None):
    """What arrives of a message, float32."""
    out = values.copy()
    for number in range(len(ROWS)):
        inside = np.flatnonzero((rows >= STARTS[number]) & (rows < STARTS[number + 1]))
        for together in inside[:, None] if per_row else [inside] * bool(len(inside)):
            scale = None if scales is None else scales[number]
            out[together] = arrives(name, values[together].ravel(), 0, None, scale).reshape(-1, DIM)
    return out


def summed(parts):
    """Float32 sums of (rows, values), in their order."""
    return ref.sequential_sums(*(np.concatenate(column) for column in zip(*parts)))


def slow_rows(gradients, name, per_row, owners, scales):
    """(rows, sum of the ranks)."""
    shares = [[(rows[rows % owners == owner], values[rows % owners == owner]) for owner in range(owners)]
              for rows, values in gradients]  # fmt: skip
    sent = [[(rows, encoded(rows, values, name, per_row, scales)) for rows, values in share] for share in shares]
    totals = [summed([share[owner] for share in sent]) for owner in range(owners)]
    if owners > 1:
        totals = [(rows, encoded(rows, values, name, per_row)) for rows, values in totals]
    return summed(totals)


def rank_gradients(model, batch, ranks):
    """Each rank's gradients of its part of the batch's mean loss: of the tables by row, and of the MLP, flat."""
    tables, mlp = [], []
    for rank in range(ranks):
        begin, end = len(batch) * rank // ranks, len(batch) * (rank + 1) // ranks
        bags = []
        for values, offsets in batch.bags:
            bounds = [*offsets.tolist(), len(values)]
            bags.append((values[bounds[begin] : bounds[end]], offsets[begin:end] - bounds[begin]))
        mine = copy.deepcopy(model)
        logits = mine(batch.dense[begin:end], batch.ids[begin:end], bags)
        loss = F.binary_cross_entropy_with_logits(logits, batch.labels[begin:end], reduction="sum")
        (loss / len(batch)).backward()
        grad = mine.tables.weight.grad
        tables.append(ref.sequential_sums(grad._indices()[0].numpy(), grad._values().numpy()))
        mlp.append(torch.cat([parameter.grad.flatten() for parameter in mlp_of(mine)]).numpy())
    return tables, np.stack(mlp)


OPTIONS = {
    "defaults": {},
    "owners": {"table_exchange": "all_to_all", "mlp_codec_scale": "bucket:20"},
    "shared": {"shared_scales": True},
    "rows": {"table_codec_scale": "row", "mlp_compensation": False},
    "all": {"table_exchange": "all_to_all", "shared_scales": True},
}


@PATHS
@pytest.mark.parametrize(
    ("name", "ranks", "chosen"),
    [("fp32", 2, "all"), ("fp32", 4, "rows"), ("bf16", 3, "owners"), 
     ("int4", 2, "defaults"), ("int4", 4, "owners"), ("int4", 3, "all"), *(("int8", 3, chosen) for chosen in OPTIONS)],
)  # fmt: skip
def test_each_step_is_the_exchange_written_out(path, name, ranks, chosen):
    options, rate = OPTIONS[chosen], 0.5
    shared, per_row = "shared_scales" in options and BITS_OF[name] <= 8, "table_codec_scale" in options
    owners = ranks if "table_exchange" in options else 1
    with on(path):
        model, step = make({"simulate_ranks": ranks, "mlp_codec": name, "table_codec": name, **options})
    blocks = blocks_of(20 if "mlp_codec_scale" in options else 0, [parameter.shape for parameter in mlp_of(model)])
    lost = owned = None
    if "mlp_compensation" not in options:
        owned = np.zeros(len(flat(mlp_of(model))), "f4")
        lost = np.stack([owned] * ranks)
    for number, samples in enumerate([24, 2, 11]):
        batch = make_batch(number, samples, True)
        expected, mlp = model.tables.weight.detach().numpy().copy(), flat(mlp_of(model))
        with on(path):
            tables, dense = rank_gradients(model, batch, ranks)
            step(batch, rate, samples, number)
        total = slow_exchange(name, False, blocks, dense, lost, owned, number, shared)
        np.testing.assert_allclose(flat(mlp_of(model)), mlp - rate * total, rtol=1e-6, atol=1e-7)
        scales = None
        if shared:
            maxima = [[np.abs(values[(rows >= begin) & (rows < begin + count)]).max(initial=0)
                       for begin, count in zip(STARTS, ROWS)] for rows, values in tables]  # fmt: skip
            scales = ref.scale_from_max(np.max(maxima, 0), BITS_OF[name])
        rows, values = slow_rows(tables, name, per_row, owners, scales)
        expected[rows] -= np.float32(rate) * values
        np.testing.assert_allclose(model.tables.weight.detach(), expected, rtol=1e-6, atol=1e-7)


def test_the_report_counts_the_bytes_of_one_rank():
    batch = make_batch(0, 24, True)
    model, step = make({"simulate_ranks": 2, "mlp_codec": "int4", "table_codec": "int8"})
    (rows, _), _ = rank_gradients(model, batch, 2)[0]
    for _ in range(3):
        step(batch, 0.1, 24, 0)
    report, counts = step.exchange.report(), np.histogram(rows, STARTS)[0]
    ids = 4 + 2 * len(ROWS) + (counts * [1, 2, 1, 1, 1]).sum()
    assert report["ranks"] == 2
    assert report["payload_parts"] == {
        "ids": -(-ids // 4) * 4,
        "table_scales": 4 * (counts > 0).sum(),
        "table_values": -(-len(rows) * DIM // 4) * 4,
        "mlp_scales": 4 * len(blocks_of(0, [parameter.shape for parameter in mlp_of(model)])),
        "mlp_values": len(flat(mlp_of(model))) / 2,
    }
    assert report["payload_bytes"] == sum(report["payload_parts"].values())
    assert report["sent_bytes"] == report["waited_ms"] == 0
