"""QuantEmbeddingBagCollection: many tables in one parameter, against the float64 reference."""

import re

import pytest
import torch

import reference as ref
from dqrm.quant.embedding import QuantEmbeddingBagCollection

ALL_BITS = [*ref.BITS, 32]
# name -> (rows of each table, which are multi-valued, embedding dim)
SHAPES = {
    "one table": ([7], [False], 4),
    "one row": ([1], [False], 3),
    "one bag": ([7], [True], 4),
    "dim 1": ([5, 1, 9], [False, False, True], 1),
    "all single": ([3, 11, 2, 29], [False] * 4, 5),
    "all multi": ([3, 11], [True] * 2, 5),
    "mixed": ([13, 1, 6, 101, 4], [False, False, False, True, True], 7),
}


def make(shape, seed=0, **options):
    rows, multi, dim = SHAPES[shape]
    module = QuantEmbeddingBagCollection(rows, dim, multi=multi, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for table in range(len(rows)):
            module.table(table).copy_(torch.randn(rows[table], dim, generator=generator) * 10.0 ** (table - 1))
    return module


def make_batch(shape, batch_size, seed=0):
    """Ids of the single-valued tables and (values, offsets) of the others, with empty bags in between."""
    rows, multi, _ = SHAPES[shape]
    generator = torch.Generator().manual_seed(seed)
    single = [torch.randint(r, (batch_size, 1), generator=generator) for r, m in zip(rows, multi) if not m]
    ids = torch.cat(single, dim=1) if single else torch.zeros(batch_size, 0, dtype=torch.long)
    bags = []
    for r in [r for r, m in zip(rows, multi) if m]:
        lengths = torch.randint(4, (batch_size,), generator=generator)
        values = torch.randint(r, (int(lengths.sum()),), generator=generator)
        bags.append((values, lengths.cumsum(0) - lengths))
    return ids, bags


def per_table(ids, bags):
    """The ids and bags of every table as the reference wants them."""
    for column in ids.t():
        flat = column.numpy().reshape(-1, 1)
        yield flat, ref.bag_positions(flat)
    for values, offsets in bags:
        yield values.numpy(), ref.bag_positions(values.numpy(), offsets)


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("pooling", ["sum", "mean"])
@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
@pytest.mark.parametrize("batch_size", [0, 1, 17])
def test_step_equals_the_reference(bits, shape, pooling, sparse, batch_size):
    rows, _, dim = SHAPES[shape]
    module = make(shape, pooling=pooling, bits=bits, sparse=sparse)
    ids, bags = make_batch(shape, batch_size)
    out = module(ids, bags)
    assert out.shape == (batch_size, len(rows), dim)
    assert out.dtype == torch.float32
    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(9))
    out.backward(grad_out)
    assert module.weight.grad.is_sparse == sparse
    grads = torch.from_numpy(ref.array(module.weight.grad)).split(rows)

    for number, (flat, positions) in enumerate(per_table(ids, bags)):
        table = ref.array(module.table(number))
        scale = module.scale[number].numpy() if bits < 32 else None
        if bits < 32:
            ref.assert_scale(scale, abs(table).max(), bits)
        rows_out = ref.array(out[:, number])
        ref.assert_pooled(rows_out, table, scale=scale, bits=bits, ids=flat, bags=positions, mode=pooling)
        grad, _ = ref.pool_gradients(ref.array(grad_out[:, number]), table, flat, positions, mode=pooling)
        ref.assert_within(grads[number].numpy(), grad, 1e-5)


def test_all_tables_are_one_contiguous_parameter():
    module = make("mixed")
    rows, _, dim = SHAPES["mixed"]
    assert [name for name, _ in module.named_parameters()] == ["weight"]
    assert module.weight.shape == (sum(rows), dim)
    assert module.weight.is_contiguous()
    assert module.scale.shape == (len(rows),)
    assert module.scale.dtype == torch.float32
    assert "weight_fake_quantizer.scale" in dict(module.named_buffers())


def test_table_is_a_view():
    module = make("mixed")
    rows, _, dim = SHAPES["mixed"]
    start = 0
    for number, count in enumerate(rows):
        table = module.table(number)
        assert table.shape == (count, dim)
        with torch.no_grad():
            table.fill_(number + 0.5)
        assert (module.weight[start : start + count] == number + 0.5).all()
        start += count


def test_a_large_table_does_not_coarsen_a_small_one():
    module = QuantEmbeddingBagCollection([2, 2], 1, bits=4)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[7.0], [3.0], [7e-6], [3e-6]]))
    out = module(torch.tensor([[0, 0], [1, 1]]), [])
    torch.testing.assert_close(out.flatten(), torch.tensor([7.0, 7e-6, 3.0, 3e-6]))


def test_rows_are_quantized_before_they_are_pooled():
    module = QuantEmbeddingBagCollection([3], 1, multi=[True], pooling="sum", bits=4)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[0.4], [0.4], [7.0]]))
    out = module(torch.zeros(2, 0, dtype=torch.long), [(torch.tensor([0, 1, 2]), torch.tensor([0, 2]))])
    assert out.flatten().tolist() == [0.0, 7.0]


@pytest.mark.parametrize("bits", ALL_BITS)
def test_all_zero_tables_give_zeros(bits):
    module = make("mixed", bits=bits)
    with torch.no_grad():
        module.weight.zero_()
    ids, bags = make_batch("mixed", 9)
    out = module(ids, bags)
    assert torch.equal(out, torch.zeros(9, 5, 7))
    out.sum().backward()
    assert torch.isfinite(module.weight.grad.coalesce().values()).all()


@pytest.mark.parametrize("bits", ALL_BITS)
def test_empty_bags_everywhere(bits):
    module = make("all multi", bits=bits)
    empty = (torch.zeros(0, dtype=torch.long), torch.zeros(6, dtype=torch.long))
    out = module(torch.zeros(6, 0, dtype=torch.long), [empty, empty])
    assert torch.equal(out, torch.zeros(6, 2, 5))
    out.sum().backward()


@pytest.mark.parametrize("bits", ALL_BITS)
def test_duplicates_of_a_row_are_summed(bits):
    module = QuantEmbeddingBagCollection([4, 4], 2, multi=[False, True], pooling="sum", bits=bits)
    ids = torch.tensor([[2], [2], [1]])
    module(ids, [(torch.tensor([2, 2, 2]), torch.tensor([0, 1, 3]))]).sum().backward()
    grad = module.weight.grad.coalesce()
    assert grad.indices().flatten().tolist() == [1, 2, 6]
    assert grad.values()[:, 0].tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ids_of_either_width(dtype):
    module = make("mixed")
    ids, bags = make_batch("mixed", 8)
    expected = module(ids, bags)
    cast = [(values.to(dtype), offsets.to(dtype)) for values, offsets in bags]
    assert torch.equal(module(ids.to(dtype), cast), expected)


def test_ids_in_any_memory_layout():
    module = make("all single")
    ids, _ = make_batch("all single", 8)
    expected = module(ids, [])
    assert torch.equal(module(ids.t().contiguous().t(), []), expected)
    assert torch.equal(module(ids.repeat_interleave(2, dim=1)[:, ::2], []), expected)


@pytest.mark.parametrize("bits", [4, 32])
@pytest.mark.parametrize("bad", [977, 53, -6])
@pytest.mark.parametrize("where", ["single", "bag"])
def test_an_id_outside_its_table_is_named(bits, bad, where):
    """The tables behind and before would have room for it: it must not read another table's row."""
    rows = [1000, 60, 2000, 53] if where == "bag" else [1000, 60, 2000, 53, 1000]
    multi = [False] * 3 + [True] if where == "bag" else [False] * 5
    module = QuantEmbeddingBagCollection(rows, 2, multi=multi, bits=bits)
    ids = torch.zeros(4, multi.count(False), dtype=torch.long)
    bags = []
    if where == "bag":
        bags = [(torch.tensor([0, 52, bad, 1]), torch.tensor([0, 1, 1, 4]))]
    else:
        ids[2, 3] = bad
    with pytest.raises(IndexError) as error:
        module(ids, bags)
    numbers = re.findall(r"-?\d+", str(error.value))
    assert {"3", str(bad), "53"} <= set(numbers), str(error.value)


@pytest.mark.parametrize(
    "options",
    [{"bits": 3}, {"bits": 0}, {"pooling": "max"}, {"scale_period": 0}, {"multi": [True]}],
    ids=lambda options: next(iter(options)),
)
def test_impossible_arguments_are_refused(options):
    with pytest.raises(ValueError):
        QuantEmbeddingBagCollection([3, 4], 2, **options)


@pytest.mark.parametrize("bits", ALL_BITS)
def test_an_sgd_step_moves_only_active_rows(bits):
    module = make("mixed", bits=bits)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    ids, bags = make_batch("mixed", 3)
    before = module.weight.detach().clone()
    module(ids, bags).sum().backward()
    active, start = set(), 0
    for (flat, _), rows in zip(per_table(ids, bags), SHAPES["mixed"][0]):
        active |= {start + int(row) for row in flat.ravel()}
        start += rows
    optimizer.step()
    assert set((module.weight.detach() != before).any(dim=1).nonzero().flatten().tolist()) == active


def test_a_saved_state_loads():
    module, other = make("mixed"), make("mixed", seed=1)
    ids, bags = make_batch("mixed", 8)
    expected = module(ids, bags)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other.eval()(ids, bags), expected)
