"""Tables in two tiers (INT4 rows) where a run starts from another: codes and slots that are carried over."""

import numpy as np
import pytest
import torch

import dqrm
from conftest import tiny
from daily_helpers import days, extended, started
from dqrm import Run, train
from dqrm.data.lineage import row_changes
from dqrm.kernels.rows import slots_of
from dqrm.quant.storage import INT4, copy_rows, storage_of


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    return extended(days(tmp_path_factory.mktemp("logs"), 2), tmp_path_factory.mktemp("data"))


def in_tiers(rows, dim, seed=0):
    """Rows, of which some are updated far more often than others."""
    weight = INT4.with_hot_rows(0.2).encode(torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)))
    draw = torch.Generator().manual_seed(seed + 1)
    for step in range(40):
        often = torch.rand(rows, generator=draw) < 1 / (1 + torch.arange(rows) / 4)
        at = often.nonzero()[:, 0]
        INT4.update(weight, at, torch.randn(len(at), dim, generator=draw), 0.1, step, None)
    return weight


def slots(weight):
    return slots_of(weight.operand, torch.arange(len(weight)))


def test_rows_in_tiers_keep_their_codes_and_their_tier():
    """Of a table that is a slice of all tables, into one that begins at another row."""
    for dim in (1, 3, 8):
        source = in_tiers(200, dim)
        target = INT4.with_hot_rows(0.4).empty(300, dim)
        target.zero_()
        rows = torch.randperm(100, generator=torch.Generator().manual_seed(3))[:90]
        copy_rows(target[150:250], rows + 0, source[40:140], rows)
        target.check()
        before, after = slots(source)[40:140][rows] >= 0, slots(target)[150:250][rows] >= 0
        assert before.any()
        assert not (after & ~before).any()
        assert (before & after).sum() > 0.7 * before.sum()
        values, exact = (weight.dequantize() for weight in (target, source))
        same = before == after
        assert torch.equal(values[150:250][rows[same]], exact[40:140][rows[same]])
        lost = rows[~same]
        step = exact[40:140][lost].abs().amax(1, keepdim=True) / 7 * 1.01 / 2
        assert ((values[150:250][lost] - exact[40:140][lost]).abs() <= step).all()
        for row in rows[before & after].tolist():
            there, here = slots(source)[40 + row], slots(target)[150 + row]
            assert source.operand.counts[there] == target.operand.counts[here]
        untouched = torch.ones(300, dtype=torch.bool)
        untouched[150 + rows] = False
        assert not values[untouched].any()


def test_all_rows_in_tiers_are_bit_for_bit_the_same():
    source = in_tiers(200, 8)
    target = INT4.with_hot_rows(0.2).empty(200, 8)
    target.zero_()
    everything = torch.arange(200)
    copy_rows(target, everything, source, everything)
    assert torch.equal(target.dequantize(), source.dequantize())
    assert torch.equal(slots(target) >= 0, slots(source) >= 0)
    again = target.clone()
    copy_rows(target, everything, source, everything)  # rows that have slots keep them
    assert torch.equal(target.stored, again.stored)


def test_of_a_set_without_room_the_most_often_updated_rows_have_slots():
    source = in_tiers(200, 4)
    target = INT4.with_hot_rows(0.04).empty(200, 4)  # one set
    target.zero_()
    everything = torch.arange(200)
    copy_rows(target, everything, source, everything)
    target.check()
    there, here = slots(source), slots(target)
    counts = source.operand.counts[there[there >= 0]]
    assert sorted(target.operand.counts.tolist()) == sorted(counts.tolist())[-8:]
    assert (here >= 0).sum() == 8


@pytest.mark.parametrize("before", ["fp32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("after", ["int4", "fp32"])
def test_runs_start_from_and_in_tables_in_tiers(datasets, tmp_path, before, after):
    train(datasets[0], tmp_path / "one", tiny(max_steps=20, table_dtype=before, optimizer="rowwise_adagrad"))
    first = started(
        datasets[1],
        tmp_path / "two",
        tiny(max_steps=3, table_dtype=after, optimizer="rowwise_adagrad"),
        start_from=tmp_path / "one",
    )
    weight, model = first.weights["tables.weight"], Run.open(tmp_path / "one").load_model()[0]
    earlier, at = storage_of(model.tables.weight).read(model.tables.weight), 0
    found = storage_of(weight).read(weight)
    for change, begin, rows in zip(row_changes(datasets[1], Run.open(tmp_path / "one").info["data"], tmp_path),
                                   model.tables.row_offsets.tolist(), datasets[1].table_rows):  # fmt: skip
        kept = torch.from_numpy(change.kept).long()
        exact = earlier[begin + kept]
        coarse = 1 / 14 * 1.01 if after == "int4" else 0
        assert ((found[at + kept] - exact).abs() <= exact.abs().amax(1, keepdim=True) * coarse).all()
        at += rows
    summary = Run.open(tmp_path / "two").summary
    assert np.isfinite(summary["test"]["log_loss"])


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_runs_in_fp32_with_encoded_tables_are_quantized_after_training(generated, tmp_path, dtype):
    train(generated, tmp_path / "run", tiny(32, max_steps=40, table_dtype=dtype, optimizer="rowwise_adagrad"))
    model, _ = Run.open(tmp_path / "run").load_model()
    weight = storage_of(model.tables.weight).read(model.tables.weight)
    dqrm.export_run(tmp_path / "run", tmp_path / "m.dqrm", ptq=dqrm.PTQConfig(bits=8, granularity="row", clip="none"))
    packed = dqrm.load(tmp_path / "m.dqrm").tables
    values = (packed.codes.int() - 128) * packed.scale[:, None]
    assert ((values - weight).abs() <= weight.abs().amax(1, keepdim=True) / 127 * 0.501).all()
    found = dqrm.export_run(tmp_path / "run", tmp_path / "m.dqrm", ptq=dqrm.PTQConfig(bits=4))
    assert found["largest_difference"] < 1e-5 < found["largest_difference_from_fp32"]
