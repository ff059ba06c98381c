"""dqrm.quant.ptq: scales after training, against a brute-force search in float64 over a very fine grid."""

from itertools import product

import numpy as np
import pytest
import torch

import reference as ref
from dqrm.quant.ptq import CLIPS, block_scales, row_scales, table_scale
from dqrm.quant.uniform import dequantize, quantize, scale_from_max
from selection import slow, some_quick

pytestmark = pytest.mark.long
FLOOR = 1e-8


def weights(kind, *shape, seed=0):
    rng = np.random.default_rng(seed)
    if kind == "normal":
        w = rng.standard_normal(shape)
    elif kind == "uniform":
        w = rng.uniform(-1, 1, shape)
    elif kind == "heavy":
        w = rng.standard_t(2, shape)
    else:  # outliers
        w = rng.standard_normal(shape)
        w[rng.random(shape) < 0.002] *= 60
    return torch.from_numpy(w.astype(np.float32))


KINDS = ("normal", "uniform", "heavy", "outliers")


def squared_error(w, scale, bits):
    """Of the codes and values that the package makes, summed in float64 over the last dimension."""
    values = dequantize(quantize(w, scale, bits), scale)
    return ((ref.array(w) - ref.array(values)) ** 2).sum(-1)


def brute_force(w, bits, candidates=6000):
    """The least squared error of each row [rows, dim], in float64: scales from 1/candidates to 1.5 of the maximum's."""
    w = ref.array(w)
    unclipped = np.maximum(np.abs(w).max(1, keepdims=True), FLOOR) / ref.levels(bits)
    found = np.full(len(w), np.inf)
    for ratio in np.concatenate([[1.0], np.arange(1, candidates + 1) * (1.5 / candidates)]):
        scale = np.maximum(unclipped * ratio, FLOOR / ref.levels(bits))
        found = np.minimum(found, ((w - ref.fake_quantize(w, scale, bits)) ** 2).sum(1))
    return found


def table_error(w, scale, bits):
    return squared_error(w.reshape(-1), scale, bits)


# --- clip 'none'


@pytest.mark.parametrize("bits", ref.BITS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (1009, 3), (40, 130)])
def test_without_clipping_the_scale_is_the_maximums(shape, bits):
    w = weights("heavy", *shape)
    scale = table_scale([w], bits, "none")
    assert scale.shape == ()
    assert scale.dtype == torch.float32
    assert torch.equal(scale, scale_from_max(w.abs().amax(), bits))
    assert torch.equal(row_scales(w, bits, "none"), scale_from_max(w.abs().amax(1), bits))


# --- clip 'mse' against brute force


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dim", [5, 16, 64, pytest.param(333, marks=pytest.mark.slow)])
def test_rows_are_as_good_as_brute_force(kind, dim, bits):
    w = weights(kind, 50, dim, seed=dim)
    scales = row_scales(w, bits, "mse")
    assert scales.shape == (50,)
    assert scales.dtype == torch.float32
    found, best = squared_error(w, scales[:, None], bits), brute_force(w, bits)
    # The fewer the weights and the more the codes, the more local minima: one row may miss the best of them.
    assert found.sum() <= best.sum() * (1.05 if dim < 16 else 1.01)
    assert np.median(found / best) <= 1.001
    if bits < 8 and dim >= 16:
        assert (found <= best * 1.05).all()


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "dim"), [(331, 3), (5000, 16)])  # searched as one row; on a histogram
def test_a_table_is_as_good_as_brute_force(rows, dim, kind, bits):
    w = weights(kind, rows, dim, seed=rows)
    best = brute_force(w.reshape(1, -1), bits, candidates=1000)[0]
    assert table_error(w, table_scale([w], bits, "mse"), bits) <= best * 1.005


@pytest.mark.parametrize(
    ("rows", "magnitude", "bits"),
    some_quick(
        (3000, 20.0, 4), (5000, 20.0, 8), (3000, 1e5, 8), (5000, 300.0, 4),
        of=product([3000, 5000], [20.0, 300.0, 1e5], [4, 8]),
    ),
)  # fmt: skip
def test_one_far_outlier(rows, magnitude, bits):
    w = weights("normal", rows, 16)
    w[7, 3] = -magnitude
    best = brute_force(w.reshape(1, -1), bits, candidates=1500)[0]
    assert table_error(w, table_scale([w], bits, "mse"), bits) <= best * 1.005


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize(("rows", "dim", "each"), [(33, 4, 16), (32, 3, 2), (5, 4, 8), (40, 4096, 32), (3, 1, 1)])
def test_blocks_of_rows_have_the_scales_of_tables_of_them(rows, dim, each, clip, monkeypatch):
    table = weights("heavy", rows, dim)
    expected = torch.stack([table_scale([part], 4, clip) for part in table.split(each)])
    for chunk in (1 << 22, 64):
        monkeypatch.setattr("dqrm.quant.packing._CHUNK", chunk)
        torch.testing.assert_close(block_scales(table, each, 4, clip), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("shape", [(200, 16), (9000, 8)])
def test_weights_that_are_values_already_are_kept(shape, bits):
    n = ref.levels(bits)
    codes = torch.from_numpy(np.random.default_rng(1).integers(-n - 1, n + 1, shape))
    codes[:, 0] = -n - 1  # the scale of the maximum is (n + 1) / n of the right one
    w = dequantize(codes, torch.tensor(0.0371))
    scale = table_scale([w], bits, "mse")
    assert torch.equal(quantize(w, scale, bits), codes)
    if bits < 8:  # a row of even codes fits on twice the scale too, so compare the values
        scales = row_scales(w, bits, "mse")[:, None]
        torch.testing.assert_close(dequantize(quantize(w, scales, bits), scales), w, rtol=1e-6, atol=0)


def test_clipping_helps_heavy_tails_much():
    w = weights("heavy", 9000, 16)
    assert table_error(w, table_scale([w], 4, "mse"), 4) < 0.7 * table_error(w, table_scale([w], 4), 4)
    row_errors = [squared_error(w, row_scales(w, 4, clip)[:, None], 4).sum() for clip in CLIPS]
    assert row_errors[1] < 0.95 * row_errors[0]


# --- never worse


@pytest.mark.parametrize("bits", ref.BITS)
@pytest.mark.parametrize("factor", [1e-38, 1e-8, 3e-8, 1e36, *slow(1e-30, 1e-9, 1e-3, 1e30)])
@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (3, 1), (67, 3), (1, 501), (7001, 11)])
def test_never_worse_than_without_clipping(shape, factor, bits):
    w = weights("outliers", *shape, seed=shape[0]) * factor
    for found, unclipped in (
        (row_scales(w, bits, "mse")[:, None], row_scales(w, bits)[:, None]),
        (table_scale([w], bits, "mse"), table_scale([w], bits)),
    ):
        assert torch.isfinite(found).all()
        assert (ref.array(found) >= ref.array(scale_from_max(torch.tensor(0.0), bits))).all()
        flat = w if found.ndim else w.reshape(-1)
        assert (squared_error(flat, found, bits) <= squared_error(flat, unclipped, bits)).all()


@pytest.mark.parametrize("bits", ref.BITS)
def test_the_largest_float32_numbers(bits):
    w = weights("uniform", 300, 7) * torch.finfo(torch.float32).max
    scales = row_scales(w, bits, "mse")
    assert torch.isfinite(dequantize(quantize(w, scales[:, None], bits), scales[:, None])).all()
    assert torch.isfinite(table_scale([w] * 40, bits, "mse"))


@pytest.mark.parametrize("bits", ref.BITS)
def test_a_magnitude_scales_the_result(bits):
    w = weights("normal", 60, 16)
    assert torch.equal(row_scales(w * 2.0**90, bits, "mse"), row_scales(w, bits, "mse") * 2.0**90)
    tall = weights("normal", 5000, 16)
    torch.testing.assert_close(
        table_scale([tall * 2.0**90], bits, "mse"), table_scale([tall], bits, "mse") * 2.0**90, rtol=1e-6, atol=0
    )


# --- special tables


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("bits", ref.BITS)
@pytest.mark.parametrize("shape", [(5, 3), (1, 1), (70_000, 1)])
def test_all_zeros(shape, bits, clip):
    w = torch.zeros(shape)
    floor = scale_from_max(torch.tensor(0.0), bits)
    assert torch.equal(table_scale([w], bits, clip), floor)
    assert torch.equal(row_scales(w, bits, clip), floor.expand(shape[0]))


@pytest.mark.parametrize("clip", CLIPS)
def test_rows_of_zeros_among_others(clip):
    w = weights("normal", 9, 4)
    alone = row_scales(w, 4, clip)
    w[3] = 0
    scales = row_scales(w, 4, clip)
    alone[3] = scale_from_max(torch.tensor(0.0), 4)
    assert torch.equal(scales, alone)


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("shape", [(0, 16), (4, 0), (0, 0)])
def test_nothing(shape, clip):
    floor = scale_from_max(torch.tensor(0.0), 4)
    assert torch.equal(row_scales(torch.zeros(shape), 4, clip), floor.expand(shape[0]))
    assert torch.equal(table_scale([torch.zeros(shape)], 4, clip), floor)
    assert torch.equal(table_scale([], 4, clip), floor)


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_computed_in_float32(dtype, clip):
    w = weights("heavy", 5000, 16).to(dtype)
    assert torch.equal(table_scale([w], 4, clip), table_scale([w.float()], 4, clip))
    assert torch.equal(row_scales(w[:99], 4, clip), row_scales(w[:99].float(), 4, clip))


@pytest.mark.parametrize("clip", CLIPS)
def test_parameters_and_strided_weights(clip):
    w = weights("normal", 16, 5000).t()[::2]
    assert torch.equal(table_scale([torch.nn.Parameter(w)], 4, clip), table_scale([w.contiguous()], 4, clip))
    found = row_scales(torch.nn.Parameter(w), 4, clip)
    assert not found.requires_grad
    assert torch.equal(found, row_scales(w.contiguous(), 4, clip))


# --- pieces, order, threads


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("bits", ref.BITS)
@pytest.mark.parametrize("sizes", [[1, 4999], [1667, 1666, 0, 1667], [77] * 64 + [72]])
def test_pieces_change_nothing(sizes, bits, clip):
    w = weights("outliers", 5000, 31)
    pieces = list(w.split(sizes))
    whole = table_scale([w], bits, clip)
    assert torch.equal(table_scale(pieces, bits, clip), whole)
    assert torch.equal(table_scale(lambda: iter(pieces), bits, clip), whole)
    assert torch.equal(table_scale(lambda: (piece for piece in pieces), bits, clip), whole)
    if bits == 4:
        rows = torch.cat([row_scales(piece, bits, clip) for piece in pieces])
        assert torch.equal(rows, row_scales(w, bits, clip))


def test_pieces_larger_than_what_is_read_at_once():
    w = weights("normal", 70_001, 31)
    whole = table_scale([w], 4, "mse")
    assert torch.equal(table_scale(w.split(33_333), 4, "mse"), whole)
    assert torch.equal(table_scale([w.view(1, -1)], 4, "mse"), whole)


@pytest.mark.parametrize("bits", ref.BITS)
def test_a_rows_scale_does_not_depend_on_its_place(bits):
    w = weights("heavy", 19, 23)
    order = torch.from_numpy(np.random.default_rng(0).permutation(19))
    scales = row_scales(w, bits, "mse")
    assert torch.equal(row_scales(w[order], bits, "mse"), scales[order])
    assert torch.equal(torch.cat([row_scales(row[None], bits, "mse") for row in w]), scales)


def test_the_same_again_also_on_several_threads():
    w = weights("heavy", 10_000, 16)
    threads = torch.get_num_threads()
    found = []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            found.append(torch.cat([table_scale([w], 8, "mse")[None], row_scales(w[:5001], 8, "mse")]))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(scales, found[0]) for scales in found)


def test_the_weights_are_left_alone():
    w = weights("heavy", 5000, 16)
    before = w.clone()
    for clip in CLIPS:
        table_scale([w], 4, clip)
        row_scales(w, 4, clip)
    assert torch.equal(w, before)


# --- refusals


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("shape", [(9, 3), (40_000, 2)])
def test_nan_and_infinity_are_refused(shape, value, clip):
    w = weights("normal", *shape)
    w[shape[0] // 2, 1] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        table_scale([w], 4, clip)
    with pytest.raises(ValueError, match="NaN or infinite"):
        row_scales(w, 4, clip)


@pytest.mark.parametrize("bits", [0, 1, 3, 32])
def test_other_widths_are_refused(bits):
    for call in (lambda: table_scale([torch.ones(2, 2)], bits), lambda: row_scales(torch.ones(2, 2), bits)):
        with pytest.raises(ValueError, match=rf"bits is {bits}\b"):
            call()


def test_other_arguments_are_refused():
    w = torch.ones(4, 2)
    for call in (lambda: table_scale([w], 4, "kl"), lambda: row_scales(w, 4, "kl")):
        with pytest.raises(ValueError, match="clip is 'kl', expected 'none' or 'mse'"):
            call()
    with pytest.raises(ValueError, match=r"\(8,\), expected \[rows, dim\]"):
        row_scales(w.view(-1), 4)
    with pytest.raises(ValueError, match="iterator"):
        table_scale(iter([w]), 4)
