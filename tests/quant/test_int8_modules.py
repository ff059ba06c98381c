"""Modules on tables stored as INT8 rows: those on a float32 weight of the same values, bit for bit."""

import copy

import pytest
import torch
from torch import nn

from dqrm.quant.config import QATConfig
from dqrm.quant.convert import convert, prepare_qat, stored_bytes
from dqrm.quant.embedding import QuantEmbedding, QuantEmbeddingBag, QuantEmbeddingBagCollection
from dqrm.quant.int8_rows import Int8Rows
from dqrm.training.optimizers import SparseSGD

BITS = [2, 4, 8, 16, 32]
ROWS, DIM = 11, 5
IDS = torch.tensor([1, 3, 1, 10, 3, 3, 0, 7])
OFFSETS = torch.tensor([0, 2, 2, 7])
WEIGHTS = torch.tensor([0.5, -1.0, 2.0, 0.0, 3.0, 1e-3, -7.0, 1.0])
BAGS = {
    "sum": ({"mode": "sum"}, (IDS, OFFSETS)),
    "mean": ({"mode": "mean"}, (IDS, OFFSETS)),
    "weights": ({"mode": "sum"}, (IDS, OFFSETS, WEIGHTS)),
    "weights and padding": ({"mode": "sum", "padding_idx": 3}, (IDS, OFFSETS, WEIGHTS)),
    "padding": ({"mode": "mean", "padding_idx": 3}, (IDS, OFFSETS)),
    "padding from the end": ({"mode": "mean", "padding_idx": -1}, (IDS, OFFSETS)),
    "last offset": ({"mode": "sum", "include_last_offset": True}, (IDS, torch.tensor([0, 2, 2, 8]))),
    "last offset, two-dimensional": ({"mode": "sum", "include_last_offset": True}, (IDS.view(4, 2),)),
    "two-dimensional": ({"mode": "mean"}, (IDS.view(4, 2),)),
    "one id per bag": ({"mode": "mean"}, (IDS.view(8, 1),)),
    "two-dimensional weights": ({"mode": "sum"}, (IDS.view(4, 2), None, WEIGHTS.view(4, 2))),
    "int32": ({"mode": "sum"}, (IDS.int(), OFFSETS.int())),
    "empty batch": ({"mode": "sum"}, (IDS[:0], OFFSETS[:0])),
    "empty bags": ({"mode": "mean"}, (IDS[:0], torch.tensor([0, 0, 0]))),
}
QUANTIZERS = [
    {},
    {"scale_refresh": "running_max", "rescan_period": 3},
    {"scale_refresh": "periodic", "scale_period": 2},
    {"forward_rounding": "stochastic"},
    {"quantizer": "mse", "scale_period": 2},
    {"quantizer": "percentile", "percentile": 90.0, "scale_refresh": "periodic", "scale_period": 2},
    {"quantizer": "lsq"},
    {"quantizer": "naive"},
]


def values(rows, dim=DIM, seed=0):
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed))


def pair(make):
    """A module on INT8 rows, and one on the float32 values that they stand for."""
    small, whole = make(torch.int8), make(torch.float32)
    small.weight.detach().copy_(values(*small.weight.shape))
    assert type(small.weight) is Int8Rows
    with torch.no_grad():
        whole.weight.copy_(small.weight)
    return small, whole


def step(module, arguments):
    """Output, gradient of the weight, and that of the per-sample weights."""
    module.weight.grad = None
    arguments = [argument.clone() if argument is not None else None for argument in arguments]
    if len(arguments) == 3:
        arguments[2].requires_grad_()
    out = module(*arguments)
    if torch.is_grad_enabled():
        (out * torch.arange(1.0, out.numel() + 1).view_as(out)).sum().backward()
    return out.detach(), module.weight.grad, arguments[2].grad if len(arguments) == 3 else None


def same_steps(small, whole, arguments, exact=True):
    """Two training steps and an evaluation, with scales and counts."""
    for training in (True, True, False):
        small.train(training)
        whole.train(training)
        (out, grad, others), (expected, expected_grad, expected_others) = step(small, arguments), step(whole, arguments)
        assert out.dtype == torch.float32
        assert grad.layout == expected_grad.layout
        if exact:
            assert torch.equal(out, expected)
            assert torch.equal(grad.to_dense(), expected_grad.to_dense())
            assert others is None or torch.equal(others, expected_others)
        else:
            torch.testing.assert_close(out, expected)
            torch.testing.assert_close(grad.to_dense(), expected_grad.to_dense())
            assert others is None or torch.testing.assert_close(others, expected_others) is None
        assert torch.equal(small.scale, whole.scale)
        assert small.scale_ticks == whole.scale_ticks


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("case", BAGS)
@pytest.mark.parametrize("sparse", [True, False])
def test_a_bag_is_that_of_the_same_values(path, bits, case, sparse):
    """At 32 bits torch pools float32 weights in a kernel of its own, whose sums have another order."""
    options, arguments = BAGS[case]
    small, whole = pair(lambda dtype: QuantEmbeddingBag(ROWS, DIM, bits=bits, sparse=sparse, dtype=dtype, **options))
    same_steps(small, whole, arguments, exact=bits != 32)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("options", [{}, {"padding_idx": 3}, {"padding_idx": -1}], ids=str)
@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("shape", [(8,), (2, 4), (0,), (2, 2, 2), (1,), ()])
def test_an_embedding_is_that_of_the_same_values(path, bits, options, sparse, shape):
    small, whole = pair(lambda dtype: QuantEmbedding(ROWS, DIM, bits=bits, sparse=sparse, dtype=dtype, **options))
    same_steps(small, whole, (IDS[: torch.Size(shape).numel()].reshape(shape),))


TABLES = {
    "single": ([3, 11, 1, 29], [False] * 4, 5),
    "bags": ([3, 11], [True] * 2, 16),
    "both": ([13, 1, 6, 101, 4], [False, False, False, True, True], 7),
    "dim 1": ([5, 1, 9], [False, False, True], 1),
}


def batch_of(name, size):
    rows, multi, _ = TABLES[name]
    generator = torch.Generator().manual_seed(1)
    single = [torch.randint(r, (size, 1), generator=generator) for r, m in zip(rows, multi) if not m]
    bags = []
    for r in [r for r, m in zip(rows, multi) if m]:
        lengths = torch.randint(4, (size,), generator=generator)
        bags.append((torch.randint(r, (int(lengths.sum()),), generator=generator), lengths.cumsum(0) - lengths))
    return (torch.cat(single, 1) if single else torch.zeros(size, 0, dtype=torch.int64)), bags


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("pooling", ["sum", "mean"])
@pytest.mark.parametrize("size", [0, 1, 40])
def test_a_collection_is_that_of_the_same_values(path, bits, name, sparse, pooling, size):
    rows, multi, dim = TABLES[name]
    small, whole = pair(
        lambda dtype: QuantEmbeddingBagCollection(
            rows, dim, multi=multi, pooling=pooling, sparse=sparse, bits=bits, dtype=dtype
        )
    )
    ids, bags = batch_of(name, size)
    for training in (True, True, False):
        outs = []
        for module in (small, whole):
            module.train(training).weight.grad = None
            outs.append(module(ids, bags))
            (outs[-1] * torch.arange(outs[-1].numel()).view_as(outs[-1])).sum().backward()
        assert torch.equal(*outs)
        assert torch.equal(small.weight.grad.to_dense(), whole.weight.grad.to_dense())
        assert torch.equal(small.scale, whole.scale)


KINDS = {
    "embedding": (lambda **options: QuantEmbedding(ROWS, DIM, sparse=True, **options), (IDS.view(4, 2),)),
    "padding": (lambda **options: QuantEmbedding(ROWS, DIM, padding_idx=3, sparse=True, **options), (IDS,)),
    "bag": (lambda **options: QuantEmbeddingBag(ROWS, DIM, sparse=True, **options), (IDS, OFFSETS)),
    "collection": (
        lambda **options: QuantEmbeddingBagCollection([6, 5], DIM, multi=[False, True], **options),
        (torch.tensor([[1], [5], [1]]), [(torch.tensor([0, 4, 4, 2]), torch.tensor([0, 1, 1]))]),
    ),
}


@pytest.mark.filterwarnings("ignore:.*outgrown the scale")
@pytest.mark.parametrize("options", QUANTIZERS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_scales_and_values_stay_those_of_the_same_values_in_training(path, options, kind, bits):
    """Before each step, the float32 weight is set to what the INT8 rows are; scales and the clock are their own."""
    make, arguments = KINDS[kind]
    small, whole = pair(lambda dtype: make(bits=bits, dtype=dtype, **options))
    optimizer = SparseSGD([small.weight], 0.05, seed=3)
    for module in (small, whole):
        module.only_looked_up_rows_change()
    for number in range(7):
        training = number % 3 != 2
        outs = []
        for module in (small, whole):
            module.train(training).weight.grad = None
            outs.append(module(*arguments))
            (outs[-1] * torch.arange(1.0, outs[-1].numel() + 1).view_as(outs[-1])).sum().backward()
        assert torch.equal(*outs), number
        assert torch.equal(small.scale, whole.scale), number
        assert torch.equal(small.weight.grad.to_dense(), whole.weight.grad.to_dense())
        rows = small.weight.grad._indices()[0].unique()
        if training:
            optimizer.step()
            with torch.no_grad():
                whole.weight.copy_(small.weight)
            for module in (small, whole):
                module.rows_changed(rows)
        assert torch.equal(small.current_scale(), whole.current_scale()), number
    assert small.scale_ticks == whole.scale_ticks


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("promised", [False, True])
def test_no_weight_is_clamped_by_running_max(path, bits, promised):
    """Rounding up may take a row beyond what its update alone needs."""
    module = QuantEmbeddingBagCollection([6, 50], 16, dtype=torch.int8, bits=bits, scale_refresh="running_max")
    optimizer = SparseSGD([module.weight], 5.0, seed=1)
    if promised:
        module.only_looked_up_rows_change()
        optimizer.tables = module
    for number in range(30):
        ids = torch.stack([torch.arange(9) * number % 6, torch.arange(9) * (number + 1) % 50], 1)
        module.weight.grad = None
        (module(ids) * values(9, 32, seed=number).view(9, 2, 16)).sum().backward()
        optimizer.step()
    largest = torch.stack([module.table(number).dequantize().abs().max() for number in range(2)])
    assert (module.current_scale() * (2 ** (bits - 1) - 1) >= largest * (1 - 1e-6)).all()
    assert largest.min() > 1  # they have grown


def test_tables_of_several_bit_widths_are_those_of_the_same_values(path):
    qat = {"bits": 4, "small_table_bits": 32, "small_table_rows": 5}
    small, whole = pair(lambda dtype: QuantEmbeddingBagCollection([3, 11, 4, 29], 6, dtype=dtype, **qat))
    ids = torch.stack([torch.arange(8) % rows for rows in (3, 11, 4, 29)], 1)
    assert set(small.table_bits) == {4, 32}
    for training in (True, False):
        assert torch.equal(small.train(training)(ids), whole.train(training)(ids))
        assert torch.equal(small.scale, whole.scale)
    unquantized = small.table(0).dequantize()[ids[:, 0]]
    assert torch.equal(small(ids)[:, 0], unquantized)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_converted_modules_give_the_same_values(path, kind, bits):
    make, arguments = KINDS[kind]
    small, whole = pair(lambda dtype: make(bits=bits, dtype=dtype))
    expected = small.eval()(*arguments).detach()
    assert stored_bytes(nn.ModuleList([small])) == stored_bytes(nn.ModuleList([whole]))
    for module in (small, whole):
        assert torch.equal(convert(nn.ModuleList([module]))[0](*arguments), expected)
    assert torch.equal(small.codes, whole.codes)
    assert torch.equal(small.scale, whole.scale)


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_a_layer_that_holds_int8_rows_is_prepared(path, kind):
    layer = kind(ROWS, DIM, sparse=True)
    layer.weight = nn.Parameter(Int8Rows.encode(values(ROWS)))
    model = prepare_qat(nn.Sequential(layer), QATConfig(bits=4))
    out = model(IDS.view(4, 2))
    out.sum().backward()
    assert type(model[0].weight) is Int8Rows
    assert model[0].weight.grad.is_sparse


@pytest.mark.parametrize("kind", [QuantEmbedding, QuantEmbeddingBag])
def test_pretrained_values_are_encoded_where_int8_is_asked_for(kind):
    given = values(ROWS)
    module = kind(ROWS, DIM, _weight=given, dtype=torch.int8)
    assert torch.equal(module.weight.stored, Int8Rows.encode(given).stored)
    frozen = kind.from_pretrained(Int8Rows.encode(given))
    assert torch.equal(frozen.weight.stored, module.weight.stored)
    assert not frozen.weight.requires_grad
    with pytest.raises((ValueError, AssertionError)):
        kind(ROWS + 1, DIM, _weight=given, dtype=torch.int8)


@pytest.mark.parametrize(("kind", "parent"), [(QuantEmbedding, nn.Embedding), (QuantEmbeddingBag, nn.EmbeddingBag)])
@pytest.mark.parametrize("padding", [None, 2, -1])
def test_it_starts_as_torchs_module_of_the_same_seed(kind, parent, padding):
    torch.manual_seed(3)
    expected = parent(ROWS, DIM, padding_idx=padding)
    torch.manual_seed(3)
    module = kind(ROWS, DIM, padding_idx=padding, dtype=torch.int8)
    assert isinstance(module, parent)
    assert [name for name, _ in module.named_parameters()] == ["weight"]
    assert torch.equal(module.weight.stored, Int8Rows.encode(expected.weight.detach()).stored)
    if padding is not None:
        assert not module.weight.detach()[torch.tensor([padding])].any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("id", [-1, 11])
@pytest.mark.parametrize("bits", [4, 32])
def test_ids_out_of_range_are_refused(path, kind, id, bits):
    module = KINDS[kind][0](bits=bits, dtype=torch.int8)
    before = module.weight.stored.clone()
    arguments = copy.deepcopy(KINDS[kind][1])
    arguments[0].view(-1)[1] = id
    with pytest.raises(IndexError, match=r"out of range|outside"):
        module(*arguments)
    assert torch.equal(module.weight.stored, before)


@pytest.mark.parametrize("bits", [2, 4, 32])
def test_a_row_that_diverged_shows(path, bits):
    module = QuantEmbeddingBagCollection([4, 5], 3, dtype=torch.int8, bits=bits)
    SparseSGD([module.weight], 1.0).step_rows(torch.tensor([6]), torch.full((1, 3), float("inf")))
    assert module(torch.tensor([[0, 2]]))[0, 1].isnan().all()


def test_other_modes_are_refused_as_ever():
    with pytest.raises(ValueError, match=r"max_norm is 1\.0"):
        QuantEmbedding(ROWS, DIM, max_norm=1.0, dtype=torch.int8)
    with pytest.raises(ValueError, match="mode is 'max'"):
        QuantEmbeddingBag(ROWS, DIM, mode="max", dtype=torch.int8)


# ---- what is refused


@pytest.mark.parametrize("dtype", [torch.int16, torch.uint8, torch.bool, "int8", int], ids=str)
@pytest.mark.parametrize("kind", [QuantEmbedding, QuantEmbeddingBag])
def test_a_table_of_other_integers_is_refused(kind, dtype):
    with pytest.raises(
        ValueError, match=f"^dtype is {dtype!r}, expected a floating-point dtype, or torch.int8 or torch.int4$"
    ):
        kind(ROWS, DIM, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_a_given_weight_keeps_its_dtype(dtype):
    table = QuantEmbeddingBag.from_pretrained(torch.ones(ROWS, DIM, dtype=dtype), mode="sum")
    assert table.weight.dtype == table(torch.tensor([[1, 2]])).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int32], ids=str)
def test_a_collection_of_a_dtype_without_a_storage_is_refused(dtype):
    with pytest.raises(ValueError, match=f"^dtype is {dtype}, expected torch.float32 or torch.bfloat16 or torch.int8"):
        QuantEmbeddingBagCollection([ROWS], DIM, dtype=dtype)


@pytest.mark.parametrize(
    ("kind", "bits"),
    [(QuantEmbedding, 4), (QuantEmbeddingBag, 4), (QuantEmbeddingBagCollection, 4), (QuantEmbeddingBag, 32)],
)
@pytest.mark.parametrize("trace", ["compile", "export", "jit"])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_tracing_is_refused_by_what_to_trace_instead(trace, kind, bits):
    shape, ids = ([ROWS],) if kind is QuantEmbeddingBagCollection else (ROWS,), IDS.view(8, 1)
    model, whole = (nn.Sequential(kind(*shape, DIM, dtype=dtype, bits=bits)) for dtype in (torch.int8, torch.float32))
    how = {
        "compile": lambda model: torch.compile(model, backend="eager")(ids),
        "export": lambda model: torch.export.export(model, (ids,)).module()(ids),
        "jit": lambda model: torch.jit.trace(model, (ids,))(ids),
    }[trace]
    with pytest.raises(NotImplementedError, match=r"INT8 rows cannot be traced .* after dqrm.convert, or with 32 bits"):
        how(model.eval())
    expected = model(ids)
    if bits == 32:
        whole.load_state_dict(model.state_dict())
    else:
        whole = convert(model)
    torch._dynamo.reset()
    assert torch.equal(how(whole.eval()), expected)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adagrad, torch.optim.SparseAdam])
def test_optimizers_of_torch_are_refused_with_ours_named(kind):
    module = QuantEmbeddingBag(ROWS, DIM, mode="sum", sparse=True, dtype=torch.int8)
    before = module.weight.stored.clone()

    def train():
        optimizer = kind(module.parameters(), lr=0.1)
        module(IDS, OFFSETS).sum().backward()
        optimizer.step()

    with pytest.raises(NotImplementedError, match="an optimizer of dqrm, as SparseSGD or SparseAdagrad"):
        train()
    assert torch.equal(module.weight.stored, before)
