"""The embedding modules as drop-in replacements: bits=32 is the parent exactly, errors come where the parent's do."""

import copy
import io

import pytest
import torch
from torch import nn

from dqrm.quant.embedding import QuantEmbedding, QuantEmbeddingBag

IDS = torch.tensor([1, 3, 1, 10, 3, 3, 0, 7])
OFFSETS = torch.tensor([0, 2, 2, 7])
WEIGHTS = torch.tensor([0.5, -1.0, 2.0, 0.0, 3.0, 1e-3, -7.0, 1.0])
# name -> (constructor arguments, call arguments)
BAG_CASES = {
    "plain": ({}, (IDS, OFFSETS)),
    "sum": ({"mode": "sum"}, (IDS, OFFSETS)),
    "mean": ({"mode": "mean"}, (IDS, OFFSETS)),
    "weights": ({"mode": "sum"}, (IDS, OFFSETS, WEIGHTS)),
    "weights and padding": ({"mode": "sum", "padding_idx": 3}, (IDS, OFFSETS, WEIGHTS)),
    "padding": ({"mode": "mean", "padding_idx": 3}, (IDS, OFFSETS)),
    "padding from the end": ({"mode": "mean", "padding_idx": -1}, (IDS, OFFSETS)),
    "last offset": ({"mode": "sum", "include_last_offset": True}, (IDS, torch.tensor([0, 2, 2, 8]))),
    "two-dimensional": ({"mode": "mean"}, (IDS.view(4, 2),)),
    "two-dimensional weights": ({"mode": "sum"}, (IDS.view(4, 2), None, WEIGHTS.view(4, 2))),
    "int32": ({"mode": "sum"}, (IDS.int(), OFFSETS.int())),
    "float64": ({"mode": "sum", "dtype": torch.float64}, (IDS, OFFSETS)),
    "empty batch": ({"mode": "sum"}, (IDS[:0], OFFSETS[:0])),
}


def step(module, arguments):
    """Output, weight gradient and per-sample-weight gradient of one step."""
    arguments = [argument.clone() if argument is not None else None for argument in arguments]
    if len(arguments) == 3:
        arguments[2].requires_grad_()
    out = module(*arguments)
    (out * torch.arange(1.0, out.numel() + 1).view_as(out)).sum().backward()
    return out, module.weight.grad, arguments[2].grad if len(arguments) == 3 else None


@pytest.mark.parametrize("case", BAG_CASES)
@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_bag_with_32_bits_is_the_parent(case, sparse, training):
    options, arguments = BAG_CASES[case]
    torch.manual_seed(0)
    parent = nn.EmbeddingBag(11, 5, sparse=sparse, **options).train(training)
    ours = QuantEmbeddingBag(11, 5, sparse=sparse, bits=32, **options).train(training)
    ours.load_state_dict(parent.state_dict(), strict=False)
    out, grad, grad_weights = step(ours, arguments)
    parent_out, parent_grad, parent_grad_weights = step(parent, arguments)
    assert torch.equal(out, parent_out)
    assert out.dtype == parent_out.dtype
    assert grad.layout == parent_grad.layout
    assert torch.equal(grad.to_dense(), parent_grad.to_dense())
    if grad_weights is not None:
        torch.testing.assert_close(grad_weights, parent_grad_weights)


@pytest.mark.parametrize("options", [{}, {"padding_idx": 3}, {"sparse": True}, {"padding_idx": -1, "sparse": True}])
@pytest.mark.parametrize("shape", [(1,), (8,), (2, 4), (0,), (2, 2, 2)])
def test_embedding_with_32_bits_is_the_parent(options, shape):
    ids = IDS[: torch.Size(shape).numel()].reshape(shape)
    parent, ours = nn.Embedding(11, 5, **options), QuantEmbedding(11, 5, bits=32, **options)
    ours.load_state_dict(parent.state_dict(), strict=False)
    out, grad, _ = step(ours, (ids,))
    parent_out, parent_grad, _ = step(parent, (ids,))
    assert torch.equal(out, parent_out)
    assert grad.layout == parent_grad.layout
    assert torch.equal(grad.to_dense(), parent_grad.to_dense())


@pytest.mark.parametrize("case", BAG_CASES)
def test_16_bits_are_close_to_the_parent(case):
    options, arguments = BAG_CASES[case]
    torch.manual_seed(0)
    parent, ours = nn.EmbeddingBag(11, 5, **options), QuantEmbeddingBag(11, 5, bits=16, **options)
    ours.load_state_dict(parent.state_dict(), strict=False)
    (out, grad, _), (parent_out, parent_grad, _) = step(ours, arguments), step(parent, arguments)
    assert out.dtype == parent_out.dtype
    assert grad.dtype == parent_grad.dtype
    torch.testing.assert_close(out, parent_out, atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(grad, parent_grad)


@pytest.mark.parametrize(
    ("quantized", "parent"), [(QuantEmbeddingBag, nn.EmbeddingBag), (QuantEmbedding, nn.Embedding)]
)
def test_it_is_the_parent_with_the_same_seed(quantized, parent):
    torch.manual_seed(3)
    expected = parent(7, 2)
    torch.manual_seed(3)
    module = quantized(7, 2)
    assert isinstance(module, parent)
    assert isinstance(module.weight, nn.Parameter)
    assert [name for name, _ in module.named_parameters()] == ["weight"]
    assert torch.equal(module.weight, expected.weight)


@pytest.mark.parametrize("quantized", [QuantEmbeddingBag, QuantEmbedding])
def test_from_pretrained_freezes_and_quantizes(quantized):
    module = quantized.from_pretrained(torch.tensor([[7.0], [0.4], [2.6]]))
    assert not module.weight.requires_grad
    assert module(torch.tensor([[0], [1], [2]])).flatten().tolist() == [7.0, 0.0, 3.0]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"mode": "max"}, "max"),
        ({"max_norm": 1.0}, "max_norm"),
        ({"scale_grad_by_freq": True}, "scale_grad_by_freq"),
        ({"bits": 3}, "3"),
        ({"bits": 0}, "0"),
        ({"scale_period": 0}, "scale_period"),
        ({"scale_period": -5}, "-5"),
    ],
)
def test_bag_refuses_in_the_constructor(options, named):
    with pytest.raises(ValueError, match=named):
        QuantEmbeddingBag(5, 2, **options)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"max_norm": 1.0}, "max_norm"),
        ({"scale_grad_by_freq": True}, "scale_grad_by_freq"),
        ({"bits": 5}, "5"),
        ({"scale_period": 0}, "scale_period"),
    ],
)
def test_embedding_refuses_in_the_constructor(options, named):
    with pytest.raises(ValueError, match=named):
        QuantEmbedding(5, 2, **options)


@pytest.mark.parametrize("bits", [4, 32])
@pytest.mark.parametrize(
    "arguments",
    [
        (torch.tensor([0, 11]), torch.tensor([0])),
        (torch.tensor([0, -1]), torch.tensor([0])),
        (torch.tensor([[0, 11]]),),
        (torch.tensor([[0, -1]]),),
        (torch.tensor([0, 1]),),
        (torch.tensor([[0, 1]]), torch.tensor([0])),
        (torch.tensor([0, 1]), torch.tensor([1])),
        (torch.tensor([0, 1]), torch.tensor([0, 3])),
        (torch.tensor([0, 1]), torch.tensor([[0]])),
        (torch.tensor([0, 1]), torch.tensor([0]), torch.tensor([1.0])),
        (torch.zeros(1, 1, 1, dtype=torch.long),),
    ],
    ids=[
        "id beyond the table",
        "negative id",
        "id beyond the table, two-dimensional",
        "negative id, two-dimensional",
        "no offsets",
        "offsets with two dimensions",
        "offsets that do not start at 0",
        "offsets beyond the ids",
        "two-dimensional offsets",
        "too few weights",
        "three dimensions",
    ],
)
def test_what_the_parent_refuses_is_refused(bits, arguments):
    parent, ours = nn.EmbeddingBag(11, 5, mode="sum"), QuantEmbeddingBag(11, 5, mode="sum", bits=bits)
    for module in (parent, ours):
        with pytest.raises((ValueError, IndexError, RuntimeError)):
            module(*arguments)


@pytest.mark.parametrize("bits", [4, 32])
def test_weights_need_the_sum(bits):
    for module in (nn.EmbeddingBag(11, 5, mode="mean"), QuantEmbeddingBag(11, 5, mode="mean", bits=bits)):
        with pytest.raises((NotImplementedError, ValueError)):
            module(IDS, OFFSETS, WEIGHTS)


@pytest.mark.parametrize("bits", [4, 32])
@pytest.mark.parametrize("bad", [11, -1])
def test_embedding_refuses_ids_outside_the_table(bits, bad):
    with pytest.raises((IndexError, RuntimeError)):
        QuantEmbedding(11, 5, bits=bits)(torch.tensor([0, bad]))


OPTIMIZERS = [
    lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    lambda parameters: torch.optim.Adagrad(parameters, lr=0.1),
    lambda parameters: torch.optim.SparseAdam(list(parameters), lr=0.1),
]


@pytest.mark.parametrize("make_optimizer", OPTIMIZERS, ids=["SGD", "Adagrad", "SparseAdam"])
@pytest.mark.parametrize("bits", [4, 32])
def test_sparse_optimizers_move_only_active_rows(make_optimizer, bits):
    module = QuantEmbeddingBag(11, 5, mode="sum", sparse=True, bits=bits)
    optimizer = make_optimizer(module.parameters())
    before = module.weight.detach().clone()
    module(IDS, OFFSETS).sum().backward()
    optimizer.step()
    moved = (module.weight.detach() != before).any(dim=1).nonzero().flatten().tolist()
    assert moved == sorted(set(IDS.tolist()))


def test_copies_and_saved_states_give_the_same_output():
    torch.manual_seed(0)
    module = QuantEmbeddingBag(11, 5, mode="mean", sparse=True, bits=4)
    expected = module(IDS, OFFSETS)
    twin = copy.deepcopy(module)
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    loaded = QuantEmbeddingBag(11, 5, mode="mean", sparse=True, bits=4)
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    for other in (twin, loaded):
        assert torch.equal(other.eval()(IDS, OFFSETS), expected)
        assert other.weight is not module.weight


@pytest.mark.parametrize("bits", [4, 32])
def test_inputs_in_any_memory_layout(bits):
    module = QuantEmbeddingBag(11, 5, mode="sum", bits=bits)
    ids, weights = IDS.view(4, 2), WEIGHTS.view(4, 2)
    turned = (ids.t().contiguous().t(), None, weights.t().contiguous().t())
    assert torch.equal(module(*turned), module(ids, None, weights))
    table = QuantEmbedding(11, 5, bits=bits)
    assert torch.equal(table(turned[0]), table(ids))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bits", [4, 16])
def test_the_scale_stays_float32_when_the_weights_are_cast(dtype, bits):
    """In FP16 the scale of small weights underflows to 0: every value becomes 0, and a weight of 0 becomes NaN."""
    module = QuantEmbeddingBag(11, 5, mode="sum", bits=bits)
    with torch.no_grad():
        module.weight.mul_(1e-5)
    module.to(dtype)
    out = module(IDS, OFFSETS)
    assert out.dtype == dtype
    assert torch.isfinite(out).all()
    assert module.scale.dtype == torch.float32


def test_a_frozen_table_still_looks_up():
    module = QuantEmbeddingBag(11, 5, mode="sum", sparse=True, bits=4)
    module.weight.requires_grad_(False)
    weights = WEIGHTS.clone().requires_grad_()
    module(IDS, OFFSETS, weights).sum().backward()
    assert module.weight.grad is None
    assert weights.grad.shape == WEIGHTS.shape
