"""Scales by squared error and by percentile, their clock and their samples; whole-table QAT."""

import copy
import re

import numpy as np
import pytest
import torch

import reference as ref
from dqrm.quant.clipping import SAMPLED, LinearClipped, TableClipped, clipped_scales, sampled_rows
from dqrm.quant.config import QATConfig
from dqrm.quant.convert import convert, prepare_qat
from dqrm.quant.embedding import QuantEmbedding, QuantEmbeddingBagCollection
from dqrm.quant.linear import QuantLinear
from dqrm.quant.ptq import FRACTIONS, grid_scales
from kernel_helpers import PATHS, on

ROWS, DIM = (7, 300, 5, 1, 9), 5
CLIPPING = pytest.mark.parametrize("quantizer", ["mse", "percentile"])
KINDS = {
    "normal": lambda random, shape: random.standard_normal(shape),
    "uniform": lambda random, shape: random.uniform(-1, 1, shape),
    "heavy": lambda random, shape: random.standard_t(2, shape),
    "outlier": lambda random, shape: np.where(np.arange(shape[1]) == shape[1] // 2, 30, random.standard_normal(shape)),
    "one": lambda random, shape: np.full(shape, 0.3),
    "zero": lambda random, shape: np.zeros(shape),
    "tiny": lambda random, shape: random.standard_normal(shape) * 1e-20,
    "huge": lambda random, shape: random.standard_normal(shape) * 1e18,
}


def weights(kind, shape, seed=0):
    return KINDS[kind](np.random.default_rng(seed), shape).astype(np.float32)


def squared_error(x, scale, bits):
    return np.sum((x - ref.fake_quantize(x, scale, bits)) ** 2)


@pytest.mark.parametrize("bits", ref.BITS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 40), (5, 1000)])
def test_mse_is_at_least_as_good_as_the_whole_grid(bits, kind, shape):
    x = weights(kind, shape)
    found = grid_scales(torch.from_numpy(x), bits).numpy()
    assert found.shape == (shape[0],)
    for row, scale in zip(x.astype(np.float64), found):
        assert scale >= 1e-8 / ref.levels(bits) * 0.9999
        best = min(
            squared_error(row, ref.scale_from_max(np.abs(row).max(), bits) * fraction, bits)
            for fraction in FRACTIONS
            if np.abs(row).max() * fraction >= 1e-8 or fraction == 1
        )
        slack = 1e-5 * best + 1e-10 * np.sum(row**2) + 1e-24  # sums in float32
        assert squared_error(row, scale, bits) <= best + slack


def test_the_grid_is_what_is_documented():
    assert FRACTIONS[0] == 1
    assert len(FRACTIONS) == 40
    np.testing.assert_allclose(np.diff(np.log2(FRACTIONS)), -1 / 8)


def test_mse_clips_an_outlier_and_helps():
    x = torch.from_numpy(weights("outlier", (1, 1000)))
    clipped, whole = grid_scales(x, 4), ref.scale_from_max(30.0, 4)
    assert clipped < 0.5 * float(whole)
    row = x.numpy()[0].astype(np.float64)
    assert squared_error(row[row < 20], clipped.item(), 4) < squared_error(row[row < 20], float(whole), 4) / 3


@pytest.mark.parametrize("percentile", [50, 99.0, 99.9, 100])
@pytest.mark.parametrize("bits", ref.BITS)
def test_percentile_is_numpys_over_n(percentile, bits):
    x = weights("heavy", (4, 777))
    found = clipped_scales(torch.from_numpy(x), bits, QATConfig(quantizer="percentile", percentile=percentile))
    for row, scale in zip(x.astype(np.float64), found):
        np.testing.assert_allclose(scale, np.percentile(np.abs(row), percentile) / ref.levels(bits), rtol=1e-5)


@CLIPPING
def test_nan_is_not_hidden_and_nothing_is_the_floor(quantizer):
    qat = QATConfig(quantizer=quantizer)
    assert clipped_scales(torch.full((1, 5), float("nan")), 4, qat).isnan().all()
    assert torch.equal(clipped_scales(torch.zeros(2, 0), 4, qat), torch.full((2,), 1e-8) / 7)


def collection(quantizer, rows=ROWS, dim=DIM, dtype=torch.float32, **options):
    torch.manual_seed(0)
    weight = torch.from_numpy(weights("heavy", (sum(rows), dim))).to(dtype)
    return QuantEmbeddingBagCollection(rows, dim, quantizer=quantizer, _weight=weight, **options)


def batch(rows, samples, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randint(count, (samples,), generator=generator) for count in rows], 1)


@CLIPPING
@PATHS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "options",
    [{}, {"small_table_bits": 8, "small_table_rows": 8}, {"bits": 32, "small_table_bits": 2, "small_table_rows": 8}],
    ids=["4", "4 and 8", "32 and 2"],
)
@pytest.mark.parametrize("samples", [0, 1, 50])
def test_tables_are_on_the_scale_of_all_their_rows_and_clamped_weights_are_counted(
    path, quantizer, dtype, options, samples
):
    tables, ids = collection(quantizer, dtype=dtype, **options), batch(ROWS, samples)
    with on(path):
        out = tables(ids)
        clamped, looked_up = tables.clamps.take()
    assert type(tables.weight_fake_quantizer) is TableClipped
    expected = 0
    for number, bits in enumerate(tables.table_bits):
        table = ref.array(tables.table(number))
        if bits == 32:
            assert tables.scale[number] == 1
        elif quantizer == "percentile":
            wanted = np.percentile(np.abs(table), 99.9) / ref.levels(bits)
            np.testing.assert_allclose(tables.scale[number], wanted, rtol=1e-5)
        else:
            flat = torch.from_numpy(table.astype(np.float32)).view(1, -1)
            assert tables.scale[number] == grid_scales(flat, bits)[0]
        scale, x = tables.scale[number].item(), table[ids[:, number].numpy()]
        found = ref.array(out[:, number])
        assert (np.abs(found - ref.fake_quantize(x, scale, bits)) <= ref.slack(x, scale, bits) + 1e-6 * np.abs(x)).all()
        if bits != 32:
            codes = np.rint(x / scale)
            expected += ((codes < -ref.levels(bits) - 1) | (codes > ref.levels(bits))).sum()
    assert looked_up == samples * len(ROWS) * DIM
    assert abs(clamped - expected) <= 2  # next to a tie
    if samples == 50 and quantizer == "mse" and not options:
        assert expected > 5


@CLIPPING
@pytest.mark.parametrize("clock", [{"scale_period": 4}, {"scale_refresh": "running_max", "rescan_period": 4}])
def test_scales_are_kept_between_refreshes(quantizer, clock):
    tables, layer = collection(quantizer, **clock), QuantLinear(6, 3, quantizer=quantizer, **clock)
    assert type(layer.weight_fake_quantizer) is LinearClipped
    before = None
    for step in range(9):
        tables(batch(ROWS, 3, step))
        layer(torch.randn(2, 6))
        now = torch.cat([tables.scale, layer.current_scale()])
        if step % 4 == 0:
            assert before is None or (now > 1.2 * before).all()
        else:
            assert torch.equal(now, before)
        before = now.clone()
        with torch.no_grad():
            tables.weight.mul_(1.1)
            layer.weight.mul_(1.1)
    assert tables.scale_ticks == layer.weight_fake_quantizer.scale_ticks == 9
    frozen = torch.cat([tables.eval().current_scale(), layer.eval().current_scale()])
    assert torch.equal(frozen, before)


@CLIPPING
def test_a_large_table_is_read_in_a_sample_that_the_step_and_the_table_decide(quantizer):
    rows, dim = (20_000, 20_000, 11), 16
    tables = collection(quantizer, rows, dim, scale_period=1)
    touched = []
    for number, count in enumerate(rows):
        chosen = sampled_rows(count, dim, number, 0)
        assert len(chosen) * dim <= SAMPLED
        assert torch.equal(chosen, sampled_rows(count, dim, number, 0))
        assert 0 <= chosen.min() <= chosen.max() < count
        touched.append(chosen)
    assert torch.equal(touched[2], torch.arange(11))
    assert not torch.equal(touched[0], touched[1])
    assert not torch.equal(touched[0], sampled_rows(rows[0], dim, 0, 1))
    other = copy.deepcopy(tables)
    unseen = torch.ones(sum(rows), dtype=torch.bool)
    for start, chosen in zip((0, 20_000, 40_000), touched):
        unseen[start + chosen] = False
    with torch.no_grad():
        other.weight[unseen] = 1e6  # no scale of step 0 depends on these
    for module in (tables, other):
        module.refresh_scale()
    assert torch.equal(tables.scale, other.scale)
    assert unseen.float().mean() > 0.9


@CLIPPING
def test_a_sampled_scale_is_near_that_of_the_whole_table(quantizer):
    torch.manual_seed(0)
    table = QuantEmbedding(60_000, 16, quantizer=quantizer, _weight=torch.randn(60_000, 16))
    table(torch.zeros(1, dtype=torch.int64))
    whole = clipped_scales(table.weight.detach().view(1, -1), 4, table.qat)
    assert table.scale.item() == pytest.approx(whole.item(), rel=0.08)
    assert not torch.equal(table.scale, whole)


@CLIPPING
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_linear_layers_each_channel_on_its_own(quantizer, granularity):
    torch.manual_seed(0)
    layer = QuantLinear(50, 6, bits=4, quantizer=quantizer, granularity=granularity)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(weights("heavy", (6, 50))))
    x = torch.randn(3, 50)
    out = layer(x)
    groups = layer.weight.detach() if granularity == "channel" else layer.weight.detach().view(1, -1)
    assert torch.equal(layer.current_scale(), clipped_scales(groups, 4, layer.qat))
    weight, scale = ref.array(layer.weight), ref.array(layer.current_scale())[:, None]
    values = ref.fake_quantize(weight, scale, 4)
    np.testing.assert_allclose(ref.array(out), ref.array(x) @ values.T + ref.array(layer.bias), atol=1e-4)
    out.sum().backward()  # straight through, clamped or not
    np.testing.assert_allclose(ref.array(layer.weight.grad), ref.array(x.sum(0)) * np.ones((6, 1)), rtol=1e-5)


@CLIPPING
def test_packed_and_loaded_give_what_evaluation_gave(quantizer):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(40, 8), torch.nn.Linear(8, 3))
    prepare_qat(model, QATConfig(quantizer=quantizer, scale_period=3))
    ids = torch.arange(40)
    for _ in range(4):
        model(ids)
        with torch.no_grad():
            model[0].weight.mul_(1.5)
    fresh = prepare_qat(torch.nn.Sequential(torch.nn.Embedding(40, 8), torch.nn.Linear(8, 3)), model[0].qat)
    fresh.load_state_dict(model.state_dict())
    expected = model.eval()(ids).detach()
    assert torch.equal(fresh.eval()(ids), expected)
    assert fresh[1].weight_fake_quantizer.scale_ticks == 4
    assert torch.equal(convert(model)(ids), expected)


@CLIPPING
def test_clipping_on_purpose_warns_nobody(quantizer, recwarn):
    qat = QATConfig(quantizer=quantizer, **({"percentile": 80} if quantizer == "percentile" else {}))
    model = prepare_qat(torch.nn.Sequential(torch.nn.Embedding(40, 8)), qat)
    for _ in range(120):
        model(torch.arange(40))
    model.eval()(torch.arange(40))
    assert not [told for told in recwarn if "clamped" in str(told.message)]


def test_what_makes_no_sense_is_refused():
    for wrong in (0, -1, 100.5, float("nan"), True):
        with pytest.raises(ValueError, match=re.escape(f"percentile is {wrong!r}, expected a number of percent")):
            QATConfig(percentile=wrong)
    assert QATConfig(quantizer="mse").scale_refresh == "periodic"
    assert QATConfig(quantizer="mse", scale_refresh="running_max").scale_refresh == "running_max"


# ---- whole-table QAT


@PATHS
@pytest.mark.parametrize(
    "options", [{}, {"small_table_bits": 8, "small_table_rows": 8}, {"forward_rounding": "stochastic"}]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
def test_naive_gives_the_values_of_a_scale_period_of_1(path, options, dtype, sparse):
    with on(path):
        found = []
        for quantizer, clock in (("naive", {}), ("max", {"scale_period": 1})):
            tables, outs = collection(quantizer, dtype=dtype, sparse=sparse, **options, **clock), []
            for step in range(4):
                tables.weight.grad = None
                out = tables(batch(ROWS, 5, step))
                (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
                with torch.no_grad():
                    tables.weight.sub_(tables.weight.grad.to_dense(), alpha=5)
                outs += [out.detach(), tables.weight.grad.to_dense(), tables.scale.clone()]
            outs.append(tables.eval()(batch(ROWS, 9)).detach())
            assert tables.clamps.take() == (4 * 5 * len(ROWS) * DIM, 0)[::-1]
            found.append(outs)
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_naive_quantizes_the_whole_table_in_each_step():
    tables = collection("naive")
    tables(batch(ROWS, 2))
    whole = tables.weight_fake_quantizer._quantized
    assert whole.shape == tables.weight.shape
    starts = np.cumsum([0, *ROWS])
    for number in range(len(ROWS)):
        table = ref.array(tables.table(number))
        scale = tables.scale[number].item()
        difference = np.abs(ref.array(whole)[starts[number] : starts[number + 1]] - ref.fake_quantize(table, scale, 4))
        assert (difference <= ref.slack(table, scale, 4) + 1e-6 * np.abs(table)).all()
    assert copy.deepcopy(tables).weight_fake_quantizer._quantized is None


@pytest.mark.parametrize("percentile", [0.1, 37, 50, 99.9, 100])
@pytest.mark.parametrize("count", [1, 2, 7, 1000])
def test_a_percentile_of_more_values_than_torch_takes(monkeypatch, percentile, count):
    rows = torch.randn(3, count, generator=torch.Generator().manual_seed(count))
    monkeypatch.setattr("dqrm.quant.clipping.QUANTILE_LIMIT", 0)
    scales = clipped_scales(rows, 4, QATConfig(quantizer="percentile", percentile=percentile))
    wanted = np.percentile(rows.abs().double().numpy(), percentile, axis=1) / 7
    np.testing.assert_allclose(scales.numpy(), wanted, rtol=1e-6)
