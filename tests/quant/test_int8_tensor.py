"""A weight stored as INT8 rows as a tensor and a parameter: what works, and that whatever else is refused."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dqrm.quant.embedding import QuantEmbedding, QuantEmbeddingBag, QuantEmbeddingBagCollection
from dqrm.quant.int8_rows import Int8Rows, row_width
from dqrm.quant.storage import storage_of

ROWS, DIM = 10, 3


def values(seed=0, rows=ROWS):
    return torch.randn(rows, DIM, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def weight():
    return nn.Parameter(Int8Rows.encode(values()))


def same_parameter(found, weight):
    assert type(found) is Int8Rows
    assert isinstance(found, nn.Parameter)
    assert found.requires_grad == weight.requires_grad
    assert found.shape == weight.shape
    assert found.dtype == torch.float32
    assert torch.equal(found.stored, weight.stored)
    assert found.stored.data_ptr() != weight.stored.data_ptr()


# ---- copies and files


def test_it_is_a_float32_parameter_of_a_quarter_of_the_bytes(weight):
    assert isinstance(weight, nn.Parameter)
    assert (weight.dtype, weight.shape, weight.device.type) == (torch.float32, (ROWS, DIM), "cpu")
    assert weight.requires_grad
    assert weight.is_leaf
    assert weight.stored.nbytes == ROWS * row_width(DIM)
    assert [row_width(dim) for dim in (1, 2, 3, 16, 64)] == [4, 4, 6, 18, 66]
    assert "Int8Rows([10, 3]" in f"{weight} {weight!r}"


@pytest.mark.parametrize("frozen", [False, True])
def test_copies_and_pickles_are_the_same_parameter(weight, frozen):
    weight.requires_grad_(not frozen)
    same_parameter(copy.deepcopy(weight), weight)
    same_parameter(pickle.loads(pickle.dumps(weight)), weight)
    twice = copy.deepcopy([weight, weight])
    assert twice[0] is twice[1]
    clone = weight.detach().clone()
    clone.zero_()
    assert weight.dequantize().any()


@pytest.mark.parametrize("weights_only", [True, False])
def test_torch_saves_and_loads_it(weight, weights_only):
    file = io.BytesIO()
    torch.save({"weight": weight, "slice": weight.detach()[2:4]}, file)
    assert len(file.getvalue()) < 10_000
    file.seek(0)
    loaded = torch.load(file, weights_only=weights_only)
    same_parameter(loaded["weight"], weight)
    assert torch.equal(loaded["slice"].dequantize(), weight.dequantize()[2:4])


@pytest.mark.parametrize("shape", [(ROWS - 1, 6), (ROWS, 5), (ROWS, 8), (60,)])
def test_stored_rows_of_another_size_are_refused(weight, shape):
    """Also from a file: the kernels would read other memory."""
    with pytest.raises(ValueError, match=r"stored rows are torch.int8 .*, expected torch.int8 \[10, 6\]"):
        weight.stored = torch.zeros(shape, dtype=torch.int8)
    weight.__dict__["stored"] = torch.zeros(shape, dtype=torch.int8)
    file = io.BytesIO()
    torch.save(weight, file)
    file.seek(0)
    with pytest.raises(ValueError, match="stored rows are"):
        torch.load(file, weights_only=True)


def test_only_contiguous_int8_rows_are_stored():
    with pytest.raises(ValueError, match=r"stored rows are torch.uint8 \[2, 6\], expected torch.int8 \[2, 6\]"):
        Int8Rows(torch.zeros(2, 6, dtype=torch.uint8), 3)
    with pytest.raises(ValueError, match="not contiguous"):
        Int8Rows(torch.zeros(6, 2, dtype=torch.int8).t(), 3)
    with pytest.raises(ValueError, match=r"stored rows are torch.int8 \[2, 6\], expected torch.int8 \[2, 8\]"):
        Int8Rows(torch.zeros(2, 6, dtype=torch.int8), 5)


MODULES = {
    "embedding": lambda dtype: QuantEmbedding(ROWS, DIM, dtype=dtype),
    "bag": lambda dtype: QuantEmbeddingBag(ROWS, DIM, dtype=dtype),
    "collection": lambda dtype: QuantEmbeddingBagCollection([6, 4], DIM, dtype=dtype),
}


@pytest.mark.parametrize("name", MODULES)
def test_state_dicts_pass_between_storages(name):
    """Of FP32 and INT8 modules, into one another and by a file; from INT8 to INT8 not a bit changes."""
    whole, small, other = (MODULES[name](dtype) for dtype in (torch.float32, torch.int8, torch.int8))
    small.load_state_dict(whole.state_dict())
    assert torch.equal(small.weight.stored, Int8Rows.encode(whole.weight.detach()).stored)
    other.load_state_dict(small.state_dict())
    assert torch.equal(other.weight.stored, small.weight.stored)
    whole.load_state_dict(small.state_dict())
    assert type(whole.weight) is nn.Parameter
    assert torch.equal(whole.weight, small.weight.dequantize())
    file = io.BytesIO()
    torch.save(small.state_dict(), file)
    file.seek(0)
    another = MODULES[name](torch.int8)
    another.load_state_dict(torch.load(file))
    assert torch.equal(another.weight.stored, small.weight.stored)
    ids = torch.tensor([[1, 2]])
    assert torch.equal(another.eval()(ids), small.eval()(ids))
    wrong = small.state_dict() | {"weight": torch.zeros(ROWS - 1, DIM)}
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        another.load_state_dict(wrong)


@pytest.mark.parametrize("name", MODULES)
def test_modules_are_copied_and_moved_whole(name):
    module = MODULES[name](torch.int8)
    ids = torch.tensor([[1, 2]])
    expected = module(ids).detach()
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), copy.deepcopy(module).float().cpu()):
        assert isinstance(other.weight, nn.Parameter)
        assert torch.equal(other.weight.stored, module.weight.stored)
        assert torch.equal(other(ids), expected)
        other(ids).sum().backward()
        assert other.weight.grad is not None
    assert module.weight.grad is None
    assert module.to("meta").weight.stored.device.type == "meta"


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
def test_casts_of_a_module_are_refused_and_change_nothing(name, cast):
    module = MODULES[name](torch.int8)
    before, ids = module.weight.stored.clone(), torch.tensor([[1, 2]])
    expected = module(ids)
    with pytest.raises(NotImplementedError, match="a table stored as INT8 rows cannot become torch"):
        getattr(module, cast)()
    assert torch.equal(module.weight.stored, before)
    assert torch.equal(module(ids), expected)


def test_a_shared_table_is_shared(weight):
    assert not weight.is_shared()
    assert weight.share_memory_() is weight
    assert weight.is_shared()
    assert weight.stored.is_shared()
    module = MODULES["bag"](torch.int8).share_memory()
    assert module.weight.stored.is_shared()


def test_other_tensors_do_not_replace_its_data(weight):
    before = weight.stored.clone()
    for other in (torch.zeros(ROWS, DIM), Int8Rows.encode(values(rows=3))):
        with pytest.raises(ValueError, match=r"INT8 rows|stored rows are"):
            weight.data = other
    with pytest.raises(ValueError, match="INT8 rows"):
        nn.utils.vector_to_parameters(torch.zeros(ROWS * DIM), [weight])
    assert torch.equal(weight.stored, before)
    other = Int8Rows.encode(values(1))
    weight.data = other
    assert weight.stored is other.stored
    weight.data.zero_()
    assert not weight.dequantize().any()


@pytest.mark.parametrize("how", ["numpy", "tolist", "__dlpack__"])
def test_no_memory_of_it_is_given_away_as_floats(weight, how):
    with pytest.raises((RuntimeError, NotImplementedError)):
        getattr(weight.detach(), how)()


def test_codes_that_are_no_table_have_a_storage_that_reads_them():
    """A buffer of int8 in a model, for its checkpoint."""
    codes = torch.arange(4, dtype=torch.int8)
    assert torch.equal(storage_of(codes).memory(codes), codes)


# ---- rows


INDICES = [
    torch.tensor([3]), torch.tensor([9, 0, 9]), torch.tensor([-1, -10, 0]), torch.tensor([[1, 2], [3, -4]]),
    torch.tensor([], dtype=torch.int64), torch.tensor([1, 2], dtype=torch.int32),
]  # fmt: skip


@pytest.mark.parametrize("index", INDICES, ids=str)
def test_rows_are_read_as_torch_reads_them(path, weight, index):
    exact = weight.detach().dequantize()
    assert torch.equal(weight.detach()[index], exact[index])
    if not (index < 0).any():
        assert torch.equal(F.embedding(index, weight.detach()), exact[index])
        assert index.dim() > 1 or torch.equal(weight.detach().index_select(0, index), exact[index.long()])


@pytest.mark.parametrize("row", [-11, 10, 2**40])
def test_rows_out_of_range_are_refused(path, weight, row):
    for read in (lambda r: weight[r], lambda r: weight.index_select(0, r), lambda r: F.embedding(r, weight)):
        with pytest.raises(IndexError, match=rf"row {row} is out of range for a weight of 10 rows"):
            read(torch.tensor([1, row]))
    for read in (lambda r: weight.index_select(0, r), lambda r: F.embedding(r, weight)):
        with pytest.raises(IndexError, match=r"row -1 is out of range"):
            read(torch.tensor([-1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.bool, torch.int8])
def test_row_numbers_are_integers(weight, dtype):
    index = torch.ones(ROWS).to(dtype)
    with pytest.raises(NotImplementedError, match=r"by row numbers \(int64 or int32\) only"):
        weight[index]
    for read in (lambda: weight.index_select(0, index), lambda: F.embedding(index, weight)):
        with pytest.raises((ValueError, RuntimeError), match=str(dtype)):
            read()


@pytest.mark.parametrize(
    "part", [slice(2, 5), slice(-3, None), slice(5, 2), slice(20, None), slice(None), slice(0, 99)]
)
def test_slices_share_memory_and_version(weight, part):
    exact, weight = weight.detach().dequantize(), weight.detach()
    piece = weight[part]
    assert torch.equal(piece.dequantize(), exact[part])
    version = weight._version
    piece.zero_()
    exact[part] = 0
    assert torch.equal(weight.dequantize(), exact)
    assert weight._version == piece._version > version


def test_parts_share_memory_and_version(weight):
    expected = weight.detach().dequantize()
    for parts in (weight.detach().split(4), weight.detach().split([3, 7]), weight.detach().chunk(3)):
        assert torch.equal(torch.cat([part.dequantize() for part in parts]), expected)
    version, parts = weight._version, weight.detach().split([3, 7])
    parts[1].copy_(torch.zeros(7, DIM))
    assert not weight.dequantize()[3:].any()
    assert torch.equal(weight.detach().dequantize()[:3], expected[:3])
    assert weight._version > version
    with torch.no_grad():
        version = weight._version
        weight[2:4] = torch.ones(2, DIM)
        assert weight._version > version
        weight[...] = values(3)
    assert torch.equal(weight.stored, Int8Rows.encode(values(3)).stored)


def test_scales_follow_what_is_written_to_a_table():
    """The version counter of the weight is what tells running_max."""
    module = QuantEmbeddingBagCollection([ROWS], DIM, dtype=torch.int8, scale_refresh="running_max")
    before = module.weight._version
    module.table(0).uniform_(-1, 1)
    assert module.weight._version > before
    module.eval()
    with torch.no_grad():
        module(torch.zeros(1, 1, dtype=torch.int64))
        module.table(0)[3:4].copy_(torch.full((1, DIM), 9.0))
        module(torch.zeros(1, 1, dtype=torch.int64))
    assert module.scale[0] == module.weight.detach().dequantize().abs().max() / 7


def test_gradients_are_those_of_a_float32_weight(weight):
    plain = nn.Parameter(weight.detach().dequantize())
    ids, factor = torch.tensor([[1, 4], [4, 9]]), torch.arange(12.0).view(2, 2, 3)
    for sparse in (False, True):
        for one in (weight, plain):
            one.grad = None
            (F.embedding(ids, one, padding_idx=9, sparse=sparse) * factor).sum().backward()
        assert weight.grad.layout == plain.grad.layout
        assert weight.grad.dtype == torch.float32
        assert torch.equal(weight.grad.to_dense(), plain.grad.to_dense())
    for one in (weight, plain):
        one.grad = None
        (one.index_select(0, ids.view(-1)).view(2, 2, 3) * factor).sum().backward()
    assert torch.equal(weight.grad, plain.grad)
    with pytest.raises(RuntimeError, match="dequantize"):  # not a gradient of 0
        weight.dequantize().sum().backward()
