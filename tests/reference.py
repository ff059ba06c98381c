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


def sequential_sums(rows, values):
    """Each row once, in rising order, with the float32 sum of its values in the order of the input."""
    unique = sorted(set(rows.tolist()))
    sums = np.zeros((len(unique), values.shape[1]), np.float32)
    for number, row in enumerate(unique):
        first, *others = np.flatnonzero(rows == row)
        sums[number] = values[first]
        for position in others:
            sums[number] += values[position]
    return np.array(unique, np.int64), sums


def interact(dense, tables, self_interaction):
    """The dense vector (or None), then the products of vector i with vectors j < i (j <= i), i rising; float64."""
    vectors = tables if dense is None else np.concatenate([dense[:, None], tables], axis=1)
    columns = [] if dense is None else list(dense.T)
    for i in range(vectors.shape[1]):
        columns += [(vectors[:, i] * vectors[:, j]).sum(1) for j in range(i + self_interaction)]
    return np.stack(columns, axis=1) if columns else np.zeros((len(tables), 0))


def interact_gradients(grad, dense, tables, self_interaction):
    """Gradients of ``interact`` to all vectors [B, V, dim], the dense one first where there is one."""
    vectors = tables if dense is None else np.concatenate([dense[:, None], tables], axis=1)
    found, at = np.zeros_like(vectors), 0
    if dense is not None:
        at = dense.shape[1]
        found[:, 0] = grad[:, :at]
    for i in range(vectors.shape[1]):
        for j in range(i + self_interaction):
            found[:, i] += grad[:, at, None] * vectors[:, j]
            found[:, j] += grad[:, at, None] * vectors[:, i]
            at += 1
    return found


def bf16_neighbours(x):
    """The bf16 numbers at or next below and above the finite float32 numbers ``x`` (towards zero and away from it)."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    inner = (bits & np.uint32(0xFFFF0000)).view(np.float32)
    outer = np.where(bits & np.uint32(0xFFFF), (bits & np.uint32(0xFFFF0000)) + np.uint32(0x10000), bits)
    return inner, outer.astype(np.uint32).view(np.float32)


def dlrm(model, dense, ids, bags, labels):
    """Logits, mean BCE loss and all gradients (by parameter name) of a DLRM that has just run this training batch.

    Written out in float64 torch; takes the table scales and activation ranges that the model used. A quantized number
    is straight-through: its value forward, its master's gradient backward.
    """
    import torch

    def quantized(x, scale, bits):
        if bits == 32:
            return x
        n = levels(bits)
        return x + ((x.detach() / scale).round().clamp(-n - 1, n) * scale - x.detach())

    weights = {name: parameter.detach().double().requires_grad_() for name, parameter in model.named_parameters()}
    tables, config, at = model.tables, model.config, 0
    vectors = []
    for number, rows in enumerate(tables.table_rows):
        table = weights["tables.weight"][at : at + rows]
        table, at = quantized(table, tables.scale[number].double(), tables.bits), at + rows
        if number < ids.shape[1]:
            vectors.append(table[ids[:, number].long()])
            continue
        values, offsets = bags[number - ids.shape[1]]
        spans = zip(offsets.tolist(), [*offsets.tolist()[1:], len(values)])
        pooled = [
            table[values[a:b].long()].sum(0) / max(1, (b - a) if config.pooling == "mean" else 1) for a, b in spans
        ]
        vectors.append(torch.stack(pooled))

    def mlp(part, x):
        layers = [(name, layer) for name, layer in getattr(model, part).named_children() if hasattr(layer, "bits")]
        for name, layer in layers:
            weight, bias = weights[f"{part}.{name}.weight"], weights[f"{part}.{name}.bias"]
            if layer.activation_bits != 32:
                x = quantized(x, float(scale_from_max(array(layer.activation_max), layer.activation_bits)),
                              layer.activation_bits)  # fmt: skip
            if layer.bits != 32:
                largest = array(weight.abs().amax(1) if layer.granularity == "channel" else weight.abs().amax().view(1))
                scale = torch.from_numpy(scale_from_max(largest, layer.bits)).double()
                weight = quantized(weight, scale[:, None], layer.bits)
                bias = quantized(bias, scale, layer.bias_bits)
            x = x @ weight.t() + bias
            if part == "bottom" or name != layers[-1][0]:
                x = x.relu()
        return x

    first = [] if model.bottom is None else [mlp("bottom", dense.double())]
    if config.interaction == "cat":
        x = torch.cat(first + vectors, 1)
    else:
        together = first + vectors
        products = [
            (together[i] * together[j]).sum(1, keepdim=True)
            for i in range(len(together))
            for j in range(i + config.self_interaction)
        ]
        x = torch.cat(first + products, 1)
    logits = mlp("top", x)[:, 0]
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels.double())
    gradients = torch.autograd.grad(loss, list(weights.values()))
    return logits.detach(), loss.detach(), dict(zip(weights, gradients))
