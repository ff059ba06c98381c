"""QuantEmbeddingBag and QuantEmbedding against the float64 reference: forward, scale, gradients."""

import pytest
import torch

import reference as ref
from dqrm.quant.embedding import QuantEmbedding, QuantEmbeddingBag

ALL_BITS = [*ref.BITS, 32]
ROWS, DIM = 11, 5
# name -> (ids, offsets, include_last_offset); id 3 is the padding where there is one
LAYOUTS = {
    "bags": ([1, 3, 1, 10, 3, 3, 0], [0, 2, 2, 6], False),
    "empty at both ends": ([4, 3, 4], [0, 0, 2, 3], False),
    "last offset": ([1, 3, 1, 10, 3, 3, 0], [0, 2, 2, 6, 7], True),
    "last offset, empty at the end": ([5, 3], [0, 2, 2], True),
    "one row many times": ([7] * 9, [0, 4], False),
    "only padding": ([3, 3, 3], [0, 1], False),
    "all empty": ([], [0, 0, 0], False),
    "no bags": ([], [], False),
    "no bags, last offset": ([], [0], True),
    "two-dimensional": ([[1, 3, 1], [3, 3, 3], [10, 0, 2]], None, False),
    "two-dimensional, last offset": ([[1, 3, 1], [3, 3, 3], [10, 0, 2]], None, True),
    "two-dimensional, one column": ([[2], [3], [2]], None, False),
}


def make_bag(rows=ROWS, dim=DIM, seed=0, factor=1.0, **options):
    module = QuantEmbeddingBag(rows, dim, **options)
    with torch.no_grad():
        module.weight.copy_(torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)) * factor)
    return module


def make_input(layout, dtype=torch.long):
    ids, offsets, include_last_offset = LAYOUTS[layout]
    offsets = None if offsets is None else torch.tensor(offsets, dtype=dtype)
    return torch.tensor(ids, dtype=dtype), offsets, include_last_offset


def check(module, bits, ids, offsets=None, per_sample_weights=None):
    """One training step's forward and backward of the module equal the reference's."""
    torch.manual_seed(1)
    out = module(ids, offsets, per_sample_weights)
    assert out.dtype == torch.float32
    scale = module.scale.numpy() if bits < 32 else None
    if bits < 32:
        ref.assert_scale(scale, module.weight.detach().abs().max().numpy(), bits)
        assert scale.shape == (1,)

    table, flat = ref.array(module.weight), ids.numpy()
    weights = None if per_sample_weights is None else ref.array(per_sample_weights)
    bags = ref.bag_positions(flat, offsets, module.include_last_offset, module.padding_idx)
    pooling = {"mode": module.mode, "per_sample_weights": weights}
    ref.assert_pooled(ref.array(out), table, scale=scale, bits=bits, ids=flat, bags=bags, **pooling)

    grad_out = torch.randn(out.shape)
    out.backward(grad_out)
    values = ref.fake_quantize(table, scale, bits)
    grad_table, grad_weights = ref.pool_gradients(ref.array(grad_out), values, flat, bags, **pooling)
    assert module.weight.grad.is_sparse == module.sparse
    ref.assert_within(ref.array(module.weight.grad), grad_table, 1e-5)
    if per_sample_weights is not None:
        tie = abs(ref.array(grad_out)).sum() * ref.slack(table, scale, bits).max()
        ref.assert_within(ref.array(per_sample_weights.grad), grad_weights, 1e-5 * abs(table).max() + tie)


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
@pytest.mark.parametrize("padding_idx", [None, 3], ids=["", "padding"])
def test_step_equals_the_reference(bits, layout, mode, sparse, padding_idx):
    ids, offsets, last = make_input(layout)
    module = make_bag(mode=mode, sparse=sparse, padding_idx=padding_idx, include_last_offset=last, bits=bits)
    check(module, bits, ids, offsets)


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
@pytest.mark.parametrize("padding_idx", [None, 3, -8], ids=["", "padding", "padding from the end"])
def test_per_sample_weights_equal_the_reference(bits, layout, sparse, padding_idx):
    ids, offsets, last = make_input(layout)
    module = make_bag(mode="sum", sparse=sparse, padding_idx=padding_idx, include_last_offset=last, bits=bits)
    weights = torch.randn(ids.shape, generator=torch.Generator().manual_seed(2)).requires_grad_()
    check(module, bits, ids, offsets, weights)


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize(("rows", "dim"), [(1, 1), (1, 7), (13, 1), (257, 3), (1001, 17)])
@pytest.mark.parametrize("seed", [0, 1])
def test_odd_sizes(bits, rows, dim, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(rows, (61,), generator=generator)
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), torch.randint(62, (18,), generator=generator).sort().values])
    check(make_bag(rows, dim, seed, mode="mean", sparse=True, bits=bits), bits, ids, offsets)


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("layout", ["bags", "two-dimensional"])
def test_int32_ids(bits, layout):
    ids, offsets, _ = make_input(layout, torch.int32)
    check(make_bag(mode="sum", sparse=True, bits=bits), bits, ids, offsets)


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_an_empty_rectangle(bits, mode):
    check(make_bag(mode=mode, sparse=True, bits=bits), bits, torch.zeros(0, 3, dtype=torch.long))


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("factor", [1e-41, 1e-30, 1e-6, 1e6, 1e30])
def test_extreme_weights(bits, factor):
    ids, offsets, _ = make_input("bags")
    check(make_bag(factor=factor, mode="sum", sparse=True, bits=bits), bits, ids, offsets)


@pytest.mark.parametrize("bits", ref.BITS)
def test_one_huge_outlier_sets_the_scale_even_if_it_is_not_looked_up(bits):
    module = make_bag(mode="sum", sparse=True, bits=bits)
    with torch.no_grad():
        module.weight[9, 4] = -1e30
    check(module, bits, torch.tensor([[0, 1], [2, 3]]))
    assert module(torch.tensor([[0, 1], [2, 3]])).count_nonzero() == 0


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_an_all_zero_table_gives_zeros_and_still_learns(bits, mode):
    module = make_bag(factor=0.0, mode=mode, sparse=True, bits=bits)
    ids, offsets, _ = make_input("bags")
    assert torch.equal(module(ids, offsets), torch.zeros(4, DIM))
    check(module, bits, ids, offsets)
    assert module.weight.grad.coalesce().values().count_nonzero() > 0


@pytest.mark.parametrize("bits", ALL_BITS)
def test_the_sparse_gradient_holds_only_active_rows(bits):
    module = make_bag(mode="sum", sparse=True, padding_idx=3, bits=bits)
    module(torch.tensor([5, 3, 5, 8]), torch.tensor([0, 1])).sum().backward()
    grad = module.weight.grad.coalesce()
    assert grad.shape == (ROWS, DIM)
    assert set(grad.indices().flatten().tolist()) - {3} == {5, 8}
    assert torch.equal(grad.to_dense()[5], torch.full((DIM,), 2.0))
    assert torch.equal(grad.to_dense()[3], torch.zeros(DIM))


@pytest.mark.parametrize("bits", ref.BITS)
@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
def test_a_stale_scale_clamps_and_the_gradient_still_passes(bits, sparse):
    module = make_bag(mode="sum", sparse=sparse, bits=bits, scale_refresh="periodic")
    ids = torch.arange(ROWS).view(-1, 1)
    module(ids)
    scale = module.scale.clone()
    with torch.no_grad():
        module.weight.mul_(10)
    out = module(ids)
    n = ref.levels(bits)
    assert torch.equal(module.scale, scale)
    codes = out.detach() / scale
    assert codes.min().round() == -n - 1
    assert codes.max().round() == n
    bags = ref.bag_positions(ids.numpy())
    table = ref.array(module.weight)
    ref.assert_pooled(ref.array(out), table, scale=scale.numpy(), bits=bits, ids=ids.numpy(), bags=bags)
    grad_out = torch.randn(ROWS, DIM)
    out.backward(grad_out)
    torch.testing.assert_close(ref.array(module.weight.grad), ref.array(grad_out))


@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
def test_rows_are_quantized_before_they_are_pooled(sparse):
    """Scale 1: each 0.4 rounds to 0, and so does the pair; their sum 0.8, quantized afterwards, would be 1."""
    module = QuantEmbeddingBag(3, 1, mode="sum", sparse=sparse, bits=4, _weight=torch.tensor([[0.4], [0.4], [7.0]]))
    out = module(torch.tensor([[0, 1]]))
    assert module.scale.item() == 1.0
    assert out.item() == 0.0


def test_the_mean_need_not_be_a_code():
    module = QuantEmbeddingBag(3, 1, mode="mean", bits=4, _weight=torch.tensor([[1.0], [2.0], [7.0]]))
    assert module(torch.tensor([[0, 1]])).item() == 1.5


def test_gradients_of_two_calls_add_up():
    ids = torch.tensor([[1, 2], [2, 2]])
    for sparse in (True, False):
        module = make_bag(mode="sum", sparse=sparse, bits=4)
        (module(ids).sum() + module(ids).sum()).backward()
        module(ids[:1]).sum().backward()
        expected = torch.zeros(ROWS, DIM)
        expected[1], expected[2] = 3, 7
        assert torch.equal(torch.from_numpy(ref.array(module.weight.grad)).float(), expected)


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("shape", [(1,), (6,), (0,), (3, 4), (2, 0, 3)])
@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
@pytest.mark.parametrize("padding_idx", [None, 3], ids=["", "padding"])
def test_embedding_equals_the_reference(bits, shape, sparse, padding_idx):
    generator = torch.Generator().manual_seed(5)
    module = QuantEmbedding(ROWS, DIM, padding_idx=padding_idx, sparse=sparse, bits=bits)
    with torch.no_grad():
        module.weight.copy_(torch.randn(ROWS, DIM, generator=generator))
    ids = torch.randint(5, shape, generator=generator)
    out = module(ids)
    assert out.shape == (*shape, DIM)

    table, flat = ref.array(module.weight), ids.numpy().reshape(-1, 1)
    scale = module.scale.numpy() if bits < 32 else None
    if bits < 32:
        ref.assert_scale(scale, abs(table).max(), bits)
        assert scale.shape == (1,)
    bags, rows = ref.bag_positions(flat), ref.array(out).reshape(-1, DIM)
    ref.assert_pooled(rows, table, scale=scale, bits=bits, ids=flat, bags=bags)

    grad_out = torch.randn(out.shape, generator=generator)
    out.backward(grad_out)
    active = ref.bag_positions(flat, padding_idx=padding_idx)
    expected, _ = ref.pool_gradients(ref.array(grad_out).reshape(-1, DIM), table, flat, active)
    assert module.weight.grad.is_sparse == sparse
    ref.assert_within(ref.array(module.weight.grad), expected, 1e-5)


def test_embedding_of_a_single_id():
    module = QuantEmbedding(3, 2, sparse=True, bits=4, _weight=torch.tensor([[7.0, -7.0], [0.4, 0.6], [2.5, 3.5]]))
    out = module(torch.tensor(2))
    assert out.tolist() == [2.0, 4.0]
    out.sum().backward()
    assert module.weight.grad.to_dense().tolist() == [[0.0, 0.0], [0.0, 0.0], [1.0, 1.0]]
