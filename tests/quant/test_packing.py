"""Packed codes: bytes against a reference in plain Python, packed layers against the trained ones."""

import copy
import math
import random
import subprocess
import sys

import pytest
import torch

from dqrm import QuantEmbedding, QuantEmbeddingBag, QuantEmbeddingBagCollection, QuantLinear, convert
from dqrm.quant.packed import PackedEmbedding, PackedEmbeddingBag, PackedEmbeddingBagCollection, PackedLinear
from dqrm.quant.packing import decode, encode, pack, packed_width, storage, unpack

DIMS = (*range(1, 18), 64)
BITS = (2, 4, 8, 16, 32)


def packed_bytes(row, bits):
    """One row of codes as bytes, as docs and issue have it: byte j holds codes j, j + w, j + 2w, ..., lowest first."""
    width = math.ceil(len(row) * bits / 8)
    found = []
    for j in range(width):
        byte = 0
        for part in range(8 // bits):
            at = j + part * width
            code = row[at] if at < len(row) else 0
            byte += (code + 2 ** (bits - 1)) << (bits * part)
        found.append(byte)
    return bytes(found)


def codes_for(rows, dim, bits, seed=0):
    draw = random.Random(seed)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    found = [[draw.randint(low, high) for _ in range(dim)] for _ in range(rows)]
    for row, value in zip(found, (low, high, 0)):
        row[:] = [value] * dim
    return found


def tensor(rows, dim):
    return torch.tensor(rows, dtype=torch.int8).reshape(len(rows), dim)


def trained(module, step, times=2):
    """A module whose scales have been set in training and whose weights have left their range since."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    module.train()
    for _ in range(times):
        step(module)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1.3)  # some codes saturate at both ends now
    return module.eval()


def same(one, other):
    assert one.dtype == other.dtype
    assert one.shape == other.shape
    assert torch.equal(one, other), f"differ by up to {(one - other).abs().max()}"


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("rows", [0, 1, 7])
def test_the_bytes_of_packed_codes(bits, rows):
    for dim in DIMS:
        codes = codes_for(rows, dim, bits)
        found = pack(tensor(codes, dim), bits)
        assert found.dtype == torch.uint8
        assert tuple(found.shape) == (rows, math.ceil(dim * bits / 8)) == (rows, packed_width(dim, bits))
        assert found.numpy().tobytes() == b"".join(packed_bytes(row, bits) for row in codes), (dim, rows)
        back = unpack(found, bits, dim)
        assert back.dtype == torch.float32
        assert back.int().tolist() == codes


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_every_byte_and_every_code_survives(bits):
    every = torch.arange(256, dtype=torch.uint8).view(-1, 1)
    dim = 8 // bits
    codes = unpack(every, bits, dim)
    assert codes.min() == -(2 ** (bits - 1))
    assert codes.max() == 2 ** (bits - 1) - 1
    assert torch.equal(pack(codes.to(torch.int8), bits), every)
    assert torch.equal(unpack(every.view(4, 64, 1), bits, dim), codes.view(4, 64, dim))


@pytest.mark.parametrize("bits", [0, 1, 3, 16, 32, "4", None])
def test_other_bits_are_refused(bits):
    with pytest.raises(ValueError, match=r"bits is .*expected 2, 4 or 8"):
        pack(torch.zeros(1, 4, dtype=torch.int8), bits)


def test_packing_leaves_its_argument_alone_and_takes_views():
    codes = tensor(codes_for(7, 16, 4), 16)
    kept = codes.clone()
    assert torch.equal(pack(codes[:, ::2], 4), pack(codes[:, ::2].contiguous(), 4))
    assert torch.equal(codes, kept)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dim", [1, 3, 16])
def test_storage_is_what_encode_makes_and_decode_reads(bits, dim):
    weight = torch.randn(7, dim, generator=torch.Generator().manual_seed(1))
    scale = weight.abs().amax(1, keepdim=True) / max(1, 2 ** (bits - 1) - 1)
    stored = encode(weight, scale, bits)
    dtype, width = storage(dim, bits)
    assert (stored.dtype, tuple(stored.shape)) == (dtype, (7, width))
    assert stored.numel() * stored.element_size() == 7 * math.ceil(dim * bits / 8)
    values = decode(stored, scale, bits, dim)
    if bits == 32:
        same(values, weight)
    else:
        n = 2 ** (bits - 1) - 1
        same(values, (weight / scale).round().clamp(-n - 1, n) * scale)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dim", [1, 2, 3, 5, 7, 9, 16, 17, 64])
def test_a_packed_embedding(bits, dim, path):
    layer = QuantEmbedding(11, dim, bits=bits, padding_idx=2)
    trained(layer, lambda module: module(torch.arange(11)))
    for dtype in (torch.int32, torch.int64):
        for ids in (torch.randint(0, 11, (5,)), torch.randint(0, 11, (3, 4)), torch.tensor(10), torch.empty(0, 3)):
            expected = layer(ids.to(dtype))
            found = convert(copy.deepcopy(layer))(ids.to(dtype))
            same(found, expected)
    if bits != 32:
        assert type(convert(layer)) is PackedEmbedding
        for wrong in (-1, 11, 2**31 - 1):
            with pytest.raises(IndexError, match=str(wrong)):
                layer(torch.tensor([0, wrong]))
        with pytest.raises(ValueError, match="integer"):
            layer(torch.tensor([0.0]))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("padding_idx", [None, 3])
@pytest.mark.parametrize("last", [False, True])
def test_a_packed_embedding_bag(bits, mode, padding_idx, last, path):
    layer = QuantEmbeddingBag(9, 5, bits=bits, mode=mode, padding_idx=padding_idx, include_last_offset=last)
    trained(layer, lambda module: module(torch.arange(9).view(1, 9)))
    packed = convert(copy.deepcopy(layer))
    assert type(packed) is (PackedEmbeddingBag if bits != 32 else QuantEmbeddingBag)
    values, offsets = torch.tensor([0, 3, 3, 8, 1, 3, 0]), torch.tensor([0, 0, 3, 5, 6, 7] if last else [0, 0, 3, 5, 6])
    for dtype in (torch.int32, torch.int64):
        same(packed(values.to(dtype), offsets.to(dtype)), layer(values.to(dtype), offsets.to(dtype)))
        same(packed(values.to(dtype)[:6].view(2, 3)), layer(values.to(dtype)[:6].view(2, 3)))
    nothing = (values[:0], torch.zeros(3 + last, dtype=torch.int64))
    same(packed(*nothing), layer(*nothing))
    assert not packed(*nothing).any()
    if mode == "sum":
        weights = torch.randn(7, generator=torch.Generator().manual_seed(2))
        same(packed(values, offsets, weights), layer(values, offsets, weights))
        same(packed(values[:6].view(2, 3), per_sample_weights=weights[:6].view(2, 3)),
             layer(values[:6].view(2, 3), per_sample_weights=weights[:6].view(2, 3)))  # fmt: skip
    if bits != 32:
        with pytest.raises(IndexError, match="9"):
            packed(torch.tensor([[0, 9]]))


def collection(bits, dim=4, pooling="sum", rows=(7, 1, 40, 9, 3), bags=2, **options):
    layer = QuantEmbeddingBagCollection(
        rows, dim, multi=[n >= len(rows) - bags for n in range(len(rows))], pooling=pooling, bits=bits, **options
    )
    return trained(layer, lambda module: module(*inputs(rows, bags)))


def inputs(rows, bags, samples=6, seed=0, dtype=torch.int64):
    generator = torch.Generator().manual_seed(seed)
    single = rows[: len(rows) - bags]
    drawn = [torch.randint(0, count, (samples, 1), generator=generator) for count in single]
    ids = torch.cat(drawn, 1) if drawn else torch.empty(samples, 0, dtype=torch.int64)
    found = []
    for count in rows[len(rows) - bags :]:
        lengths = torch.randint(0, 4, (samples,), generator=generator)
        lengths[:1] = 0
        values = torch.randint(0, count, (int(lengths.sum()),), generator=generator)
        found.append((values.to(dtype), lengths.cumsum(0) - lengths))
    return ids.to(dtype), found


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("pooling", ["sum", "mean"])
@pytest.mark.parametrize("dim", [3, 4, 16])
def test_a_packed_collection(bits, pooling, dim, path):
    rows, bags = (7, 1, 40, 9, 3), 2
    layer = collection(bits, dim, pooling)
    packed = convert(copy.deepcopy(layer))
    for samples in (0, 1, 6, 300):
        for dtype in (torch.int32, torch.int64):
            batch = inputs(rows, bags, samples, samples, dtype)
            same(packed(*batch), layer(*batch))
    if bits == 32:
        return
    assert type(packed) is PackedEmbeddingBagCollection
    assert packed.codes.nbytes == sum(rows) * math.ceil(dim * bits / 8)
    assert packed.scale.shape == (5,)
    assert not list(packed.parameters())
    ids, found = inputs(rows, bags)
    for column, wrong in ((0, 7), (1, 1), (2, -1), (2, 2**31 - 1)):
        outside = ids.clone()
        outside[3, column] = wrong
        with pytest.raises(IndexError, match=str(wrong)):
            packed(outside, found)
    with pytest.raises(IndexError, match="9"):
        packed(ids, [(torch.tensor([9]), torch.zeros(6, dtype=torch.int64)), found[1]])
    for wrong in ((ids[:, :2], found), (ids, found[:1]), (ids, [*found, found[0]])):
        with pytest.raises(ValueError):
            packed(*wrong)


def test_tables_with_bags_alone_and_without_any(path):
    for rows, bags in (((5, 8), 2), ((5,), 0), ((5, 8, 2), 0)):
        layer = collection(4, rows=rows, bags=bags)
        batch = inputs(rows, bags)
        same(convert(copy.deepcopy(layer))(*batch), layer(*batch))


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
@pytest.mark.parametrize("dim", [1, 5, 16, 17])
def test_one_scale_per_row(bits, dim, path):
    rows = (7, 1, 40, 9, 3)
    generator = torch.Generator().manual_seed(3)
    weight, scale = torch.randn(60, dim, generator=generator), torch.rand(60, generator=generator) + 0.1
    codes = encode(weight, scale[:, None], bits)
    packed = PackedEmbeddingBagCollection(rows, dim, bits=bits, codes=codes, scale=scale)
    assert packed.codes.data_ptr() == codes.data_ptr(), "codes are used as they are"
    ids, _ = inputs(rows, 0)
    n = 2 ** (bits - 1) - 1
    values = (weight / scale[:, None]).round().clamp(-n - 1, n) * scale[:, None]
    starts = torch.tensor([0, 7, 8, 48, 57])
    same(packed(ids), values[ids + starts])


def test_codes_and_scales_of_another_shape_are_refused():
    good = {"bits": 4, "codes": torch.zeros(8, 2, dtype=torch.uint8), "scale": torch.ones(2)}
    PackedEmbeddingBagCollection((3, 5), 4, **good)
    for wrong in (
        {"codes": torch.zeros(8, 4, dtype=torch.uint8)}, {"codes": torch.zeros(7, 2, dtype=torch.uint8)},
        {"codes": torch.zeros(8, 2, dtype=torch.int8)}, {"scale": torch.ones(3)}, {"scale": torch.ones(2).double()},
        {"scale": torch.ones(2, 1)}, {"bits": 8}, {"bits": 3},
    ):  # fmt: skip
        with pytest.raises(ValueError):
            PackedEmbeddingBagCollection((3, 5), 4, **good | wrong)


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"bias_bits": 8}, {"activation_bits": 8}])
def test_a_packed_linear(bits, granularity, options, path):
    layer = QuantLinear(13, 6, bits=bits, granularity=granularity, **options)
    trained(layer, lambda module: module(torch.randn(5, 13)))
    for shape in ((13,), (5, 13), (2, 3, 13), (0, 13)):
        x = torch.randn(shape)
        packed = convert(copy.deepcopy(layer))
        with torch.no_grad():
            same(packed(x), layer(x))
            same(packed(x), layer(x))  # and from what the first forward kept
    assert type(packed) is PackedLinear
    assert packed.codes.nbytes == 6 * math.ceil(13 * bits / 8)
    assert packed.scale.numel() == (6 if granularity == "channel" else 1)


@pytest.mark.parametrize("more", [0, 1, 5])
def test_a_table_that_is_packed_in_pieces(more):
    rows = (1 << 18) + more  # tables are read in pieces of so many rows
    layer = collection(4, 2, rows=(3, rows, 2), bags=1)
    ids = torch.stack([torch.arange(rows) % 3, torch.arange(rows)], 1)
    bags = [(torch.empty(0, dtype=torch.int64), torch.zeros(rows, dtype=torch.int64))]
    expected = layer(ids, bags)
    same(convert(layer)(ids, bags), expected)
    assert layer.codes.shape == (rows + 5, 1)


def test_threads_do_not_change_a_bit(path):
    layer = convert(collection(4, 16, rows=(5000, 9, 300), bags=1))
    batch = inputs((5000, 9, 300), 1, 4000)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(layer(*batch))
    finally:
        torch.set_num_threads(before)
    same(*found)


def test_the_compiled_lookup_is_the_plain_one_bit_for_bit(monkeypatch):
    layer = convert(collection(4, 16))
    batch = inputs((7, 1, 40, 9, 3), 2, 500)
    found = layer(*batch)
    monkeypatch.setattr("dqrm.kernels.BACKENDS", [])
    same(layer(*batch), found)


def test_without_native_code_in_another_process(tmp_path):
    layer = convert(collection(4, 16))
    batch = inputs((7, 1, 40, 9, 3), 2)
    torch.save((layer, batch), tmp_path / "saved.pt")
    code = (
        f"import torch; layer, batch = torch.load({str(tmp_path / 'saved.pt')!r}, weights_only=False); "
        f"torch.save(layer(*batch), {str(tmp_path / 'out.pt')!r})"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"DQRM_NATIVE": "0", "OMP_NUM_THREADS": "1"})
    same(torch.load(tmp_path / "out.pt"), layer(*batch))
