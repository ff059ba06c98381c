"""A slow reference of the numerics in float64 numpy: the formulas written out, with nothing of dqrm.

Scales are float32 numbers (that is what is stored); everything that uses one widens it to float64 first.
"""

import numpy as np

BITS = (2, 4, 8, 16)


def array(tensor):
    """A torch tensor as numpy: floats as float64, integers as they are; sparse ones as dense."""
    tensor = tensor.detach().cpu()
    if tensor.is_sparse:
        tensor = tensor.to_dense()
    return tensor.double().numpy() if tensor.is_floating_point() else tensor.numpy()


def levels(bits):
    return 2 ** (bits - 1) - 1


def scale_from_max(max_abs, bits):
    """max(|w|) / n, with max(|w|) at least 1e-8, as a float32."""
    max_abs = np.maximum(np.asarray(max_abs, dtype=np.float32), np.float32(1e-8)).astype(np.float64)
    return (max_abs / levels(bits)).astype(np.float32)


def codes(x, scale, bits):
    """clamp(round(x / scale), -n - 1, n); numpy's rint rounds half to even."""
    n = levels(bits)
    quotient = np.asarray(x, dtype=np.float64) / np.asarray(scale, dtype=np.float64)
    return np.clip(np.rint(quotient), -n - 1, n).astype(np.int64)


def fake_quantize(x, scale, bits):
    if bits == 32:
        return np.asarray(x, dtype=np.float64)
    return codes(x, scale, bits) * np.asarray(scale, dtype=np.float64)


def near_tie(x, scale, bits):
    """Where a division in float32 may land on the other side of a tie, so that the neighbouring code is right too.

    1e-5 covers widths up to 8 bits; a quotient of 16 bits is up to 2**15, and float32 keeps only 9 binary places of it.
    """
    quotient = np.asarray(x, dtype=np.float64) / np.asarray(scale, dtype=np.float64)
    distance = np.abs(quotient - np.floor(quotient) - 0.5)
    inside = np.abs(quotient) < levels(bits) + 2
    return inside & (distance <= np.maximum(1e-5, np.abs(quotient) * 2.0**-24))


def slack(x, scale, bits):
    """By how much a fake-quantized value may differ from the reference: one step next to a tie, else nothing."""
    x = np.asarray(x, dtype=np.float64)
    if bits == 32:
        return np.zeros_like(x)
    return np.where(near_tie(x, scale, bits), np.asarray(scale, dtype=np.float64), 0.0)


def bag_positions(ids, offsets=None, include_last_offset=False, padding_idx=None):
    """For each bag the positions in ``ids.ravel()`` that it pools; the padding is left out."""
    flat = ids.ravel()
    if ids.ndim == 2:
        width = ids.shape[1]
        spans = [(bag * width, (bag + 1) * width) for bag in range(ids.shape[0])]
    else:
        starts = [int(start) for start in offsets]
        ends = starts[1:] if include_last_offset else [*starts[1:], len(flat)]
        spans = list(zip(starts, ends))
    return [[i for i in range(start, end) if padding_idx is None or flat[i] != padding_idx] for start, end in spans]


def coefficient(bag, position, mode, per_sample_weights):
    """What a looked-up row is multiplied with before it is added into its bag."""
    if mode == "mean":
        return 1.0 / len(bag)
    return 1.0 if per_sample_weights is None else float(per_sample_weights.ravel()[position])


def pool(table, ids, bags, *, mode="sum", per_sample_weights=None):
    """The pooled rows [bags, dim] of a table; an empty bag gives zeros."""
    flat = ids.ravel()
    out = np.zeros((len(bags), table.shape[1]))
    for number, bag in enumerate(bags):
        for position in bag:
            out[number] += coefficient(bag, position, mode, per_sample_weights) * table[flat[position]]
    return out


def pool_gradients(grad_out, table, ids, bags, *, mode="sum", per_sample_weights=None):
    """Gradients of ``pool`` to the table (straight through the quantizer) and to the per-sample weights.

    ``table`` holds the values that were pooled, that is the fake-quantized ones.
    """
    flat = ids.ravel()
    grad_table = np.zeros_like(table)
    grad_weights = np.zeros(flat.shape)
    for number, bag in enumerate(bags):
        for position in bag:
            factor = coefficient(bag, position, mode, per_sample_weights)
            grad_table[flat[position]] += factor * grad_out[number]
            grad_weights[position] = grad_out[number] @ table[flat[position]]
    return grad_table, grad_weights.reshape(ids.shape)


def assert_codes(actual, x, scale, bits):
    """Integer codes equal the reference's, save one step next to a tie."""
    expected = codes(x, scale, bits)
    allowed = near_tie(x, scale, bits).astype(np.int64)
    wrong = np.abs(np.asarray(actual, dtype=np.int64) - expected) > allowed
    assert not wrong.any(), f"{wrong.sum()} codes differ, first at {np.argwhere(wrong)[0]}"


def assert_scale(actual, max_abs, bits):
    """A float32 scale within one unit in the last place of max / n."""
    np.testing.assert_allclose(np.asarray(actual, dtype=np.float64), scale_from_max(max_abs, bits), rtol=1.2e-7, atol=0)


def assert_within(actual, expected, tolerance):
    """Same shape, and every element within its own tolerance."""
    assert actual.shape == expected.shape
    error = np.abs(actual - expected)
    assert (error <= tolerance).all(), f"off by {np.max(error - tolerance)} beyond the tolerance"


def assert_pooled(actual, table, *, scale, bits, ids, bags, mode="sum", per_sample_weights=None):
    """``actual`` is the pooled fake-quantized rows, up to rounding in float32 and codes next to a tie."""
    weights = None if per_sample_weights is None else np.abs(per_sample_weights)
    values = fake_quantize(table, scale, bits)
    rounding = 1e-6 * pool(np.abs(values), ids, bags, mode=mode, per_sample_weights=weights)
    ties = pool(slack(table, scale, bits), ids, bags, mode=mode, per_sample_weights=weights)
    expected = pool(values, ids, bags, mode=mode, per_sample_weights=per_sample_weights)
    assert_within(actual, expected, rounding + ties)
