"""Cases of the operations of linear layers and of the exchange: blocks of values, messages of rows."""

from itertools import product

import torch

from dqrm import kernels
from dqrm.kernels import Blocks, plain
from dqrm.models.interaction import pairs
from kernel_helpers import here, random_rows
from kernels.cases import BF16, FP32, case, odd

WEIGHTS = [(1, 1), (3, 17), (17, 3), (64, 300), (512, 64), (5, 0), (0, 5)]


@case(*product([2, 4, 8, 16], [True, False], [random_rows, odd]))
def quantize_weights(bits, per_channel, numbers):
    weights = [numbers(*shape) * 10.0 ** torch.linspace(-9, 3, shape[0])[:, None] for shape in WEIGHTS]
    highest = plain.limits(bits)[1]
    found = []
    for codes in [False] if bits == 16 else [False, True]:
        found += kernels.quantize_weights(weights, [(per_channel, highest, codes)] * len(weights))
        for few in (weights[:1], weights[-2:], []):
            found += kernels.quantize_weights(few, [(per_channel, highest, codes)] * len(few))
    return [tensor for pair in found for tensor in pair]


SHAPES = [(0, 3), (1, 1), (5, 17), (129, 64), (65, 513)]


# torch fuses the product into the sum, or not: one rounding to bf16.
@case(*product(SHAPES, [False, True], [False, True], [random_rows, odd]), rtol=2**-7, atol=1e-30)
def finish_linear(shape, per_channel, relu, numbers):
    outputs = shape[1]
    scale = random_rows(outputs if per_channel else 1, 1, seed=2).abs()[:, 0]
    return (kernels.finish_linear(numbers(*shape, dtype=BF16), scale, random_rows(outputs, 1, seed=3)[:, 0], relu),)


@case(*product(SHAPES, [FP32, BF16], ["none", "tensor", "channel"], [False, True]), rtol=1e-5, atol=1e-4)
def start_linear(shape, dtype, scales, relu):
    grad, y = random_rows(*shape, dtype=dtype), random_rows(*shape, seed=1, dtype=dtype).relu() if relu else None
    scale = None if scales == "none" else random_rows(1 if scales == "tensor" else shape[1], 1, seed=2)[:, 0]
    return kernels.start_linear(grad, y, scale)


@case(
    *product(
        [(0, 2, 3), (1, 1, 1), (5, 5, 3), (3, 26, 16), (2, 5, 64), (153, 13, 17)], [FP32, BF16, None], [False, True]
    ),
    rtol=0.05,
    atol=0.5,
)
def interact(shape, dense_dtype, self_interaction):
    batch, count, dim = shape
    tables = random_rows(batch * count, dim, seed=1).view(shape).requires_grad_()
    dense = None if dense_dtype is None else random_rows(batch, dim, seed=2, dtype=dense_dtype).requires_grad_()
    chosen = here(pairs(count + (dense is not None), self_interaction))
    out = kernels.interact(dense, tables, chosen, self_interaction)
    out.backward(random_rows(batch, out.shape[1], seed=3, dtype=out.dtype))
    return out.detach(), tables.grad, None if dense is None else dense.grad


BLOCKS = {
    "none": ([], [], []),
    "empty": ([0, 5, 5, 9, 2], [1, 0, 1, 0, 1], [8, 0, 1, 1, 30]),
    "long": ([17], [617], [60]),
    "ragged": ([20, 0, 40, 11], [7, 11, 2, 9], [60, 4, 2, 90]),
    "many": (list(range(0, 4500, 3)), [3, 1, 2] * 500, list(range(0, 4500, 3))),
}
BLOCK_CASES = (BLOCKS, [False, True], [random_rows, odd])


def blocks_and_values(name, with_residual, numbers):
    blocks = Blocks(*(torch.tensor(part, dtype=torch.int64) for part in BLOCKS[name]))
    return numbers(4500, 1)[:, 0], blocks, random_rows(4500, 1, seed=5)[:, 0] if with_residual else None


@case(*product(*BLOCK_CASES, [4, 8]))
def block_scales(name, with_residual, numbers, bits):
    x, blocks, residual = blocks_and_values(name, with_residual, numbers)
    return (kernels.block_scales(x, blocks, bits, residual),)


@case(*product(*BLOCK_CASES, [4, 8], [None, 7, 2**32 - 1], [False, True]))
def quantize_blocks(name, with_residual, numbers, bits, seed, with_out):
    x, blocks, residual = blocks_and_values(name, with_residual, numbers)
    out = torch.zeros(blocks.total, dtype=torch.int8) if with_out else None
    return kernels.quantize_blocks(x, blocks, torch.full((len(blocks),), 0.1), bits, residual, seed, out), residual


@case(*product(*BLOCK_CASES, [FP32, BF16], [None, 7, 2**32 - 1]))
def cast_blocks(name, with_residual, numbers, dtype, seed):
    x, blocks, residual = blocks_and_values(name, with_residual, numbers)
    return kernels.cast_blocks(x, blocks, dtype, residual, seed), residual


@case(*product(BLOCKS, [torch.int8, BF16, FP32], [False, True]))
def decode_blocks(name, dtype, add):
    x, blocks, _ = blocks_and_values(name, False, random_rows)
    stored = (x[: blocks.total] * 50).to(dtype)
    kernels.decode_blocks(stored, blocks, x, random_rows(len(blocks), 1)[:, 0] if dtype == torch.int8 else None, add)
    return (x,)


def nibbles(count):
    codes = torch.randint(-8, 8, (count,), generator=torch.Generator().manual_seed(count), device="cpu")
    return here(codes.to(torch.int8))


@case(*product([0, 1, 2, 17, 255, 1000]))
def pack_nibbles(count):
    return (kernels.pack_nibbles(nibbles(count)),)


@case(*product([0, 1, 2, 17, 255, 1000]))
def unpack_nibbles(count):
    return kernels.unpack_nibbles(plain.pack_nibbles(nibbles(count)), count), nibbles(count)


ROWS = [*product([(0, 3), (1, 1), (9, 5), (7, 16), (1500, 16), (300, 64)], [2, 4, 8], [False, True])]


@case(*(((*row, seed)) for row, seed in product(ROWS, [None, 7, 2**32 - 1])))
def pack_rows(shape, bits, half, seed):
    return (kernels.pack_rows(random_rows(*shape) * 10 ** (random_rows(shape[0], 1, seed=1) * 6), bits, half, seed),)


@case(*ROWS)
def unpack_rows(shape, bits, half):
    return (kernels.unpack_rows(plain.pack_rows(random_rows(*shape), bits, half, 3), shape[1], bits, half),)


FORMATS = [(torch.int8, 4), (torch.int8, 8), (BF16, 0), (FP32, 0)]
MESSAGES = [*product([0, 1, 9, 70_000], [False, True], FORMATS, [None, 7])]


def message_of(encode, count, per_row, format, seed, given=None):
    sizes = [1, 2, 255, 257, 65_537, 2**24 + 1, 2**31]
    bounds = torch.tensor([0, *sizes]).cumsum(0)
    generator = torch.Generator().manual_seed(0)
    rows = here(torch.randint(int(bounds[-1]), (count,), generator=generator, device="cpu").unique())
    widths = torch.tensor([max(1, -(-(size - 1).bit_length() // 8)) for size in sizes])
    return encode(rows, random_rows(len(rows), 3), bounds, widths, per_row, *format, given, seed), bounds, widths


@case(*MESSAGES)
def encode_rows(count, per_row, format, seed):
    given = None if per_row or seed else torch.full((7,), 0.1)
    message, sizes = message_of(kernels.encode_rows, count, per_row, format, seed, given)[0]
    return message, torch.tensor(sizes)


@case(*MESSAGES)
def decode_rows(count, per_row, format, seed):
    (message, _), bounds, widths = message_of(plain.encode_rows, count, per_row, format, seed)
    return kernels.decode_rows(message, bounds, widths, 3, per_row, *format)
