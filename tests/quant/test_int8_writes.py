"""Writes to a weight stored as INT8 rows: those that encode, and that all others are refused; optimizers of torch."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dqrm.quant.int8_rows import Int8Rows

ROWS, DIM = 10, 3


def values(seed=0, rows=ROWS):
    return torch.randn(rows, DIM, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def weight():
    return nn.Parameter(Int8Rows.encode(values()))


# ---- writes


WRITES = {
    "copy_": lambda w: w.copy_(values(1)),
    "of doubles": lambda w: w.copy_(values(1).double()),
    "of a table": lambda w: w.copy_(Int8Rows.encode(values(1))),
    "of columns": lambda w: w.copy_(values(1).t().contiguous().t()),
    "slice": lambda w: w.__setitem__(slice(None), values(1)),
}


@pytest.mark.parametrize("name", WRITES)
def test_values_are_encoded_where_they_are_copied(path, weight, name):
    with torch.no_grad():
        WRITES[name](weight)
    assert torch.equal(weight.stored, Int8Rows.encode(values(1)).stored)


def test_random_draws_are_those_of_torch_encoded(weight):
    for draw in (lambda w: w.uniform_(-0.3, 0.2), lambda w: w.normal_(0, 2), nn.init.xavier_uniform_):
        with torch.no_grad():
            torch.manual_seed(4)
            draw(weight)
            torch.manual_seed(4)
            assert torch.equal(weight.stored, Int8Rows.encode(draw(torch.empty(ROWS, DIM))).stored)
    generator = torch.Generator().manual_seed(1)
    weight.detach().uniform_(0, 1, generator=generator)
    torch.manual_seed(9)
    before = weight.stored.clone()
    weight.detach().uniform_(0, 1, generator=torch.Generator().manual_seed(1))
    assert torch.equal(weight.stored, before)


@pytest.mark.parametrize("shape", [(), (DIM,), (1, DIM), (ROWS - 1, DIM), (ROWS, DIM + 1)])
def test_values_of_another_shape_are_refused_in_both_directions(weight, shape):
    before = weight.stored.clone()
    with pytest.raises(ValueError, match="cannot copy"), torch.no_grad():
        weight.copy_(torch.zeros(shape))
    with pytest.raises(ValueError, match="cannot copy"), torch.no_grad():
        torch.zeros(shape).copy_(weight)
    assert torch.equal(weight.stored, before)


def test_it_is_copied_into_other_tensors(weight):
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        found = torch.zeros(ROWS, DIM, dtype=dtype).copy_(weight.detach())
        assert torch.equal(found, weight.detach().dequantize().to(dtype))


def at(index, value):
    return lambda w: w.__setitem__(index, value)


REFUSED = {
    "element": at((1, 2), 3.0),
    "row": at(3, 0.0),
    "rows": at(torch.tensor([1]), torch.ones(1, DIM)),
    "mask": at(torch.ones(ROWS, dtype=torch.bool), 0.0),
    "column": at((slice(None), 1), 0.0),
    "number": at(slice(3, 5), 1.0),
    "every other": at(slice(None, None, 2), torch.ones(5, DIM)),
    "row in place": lambda w: w[3].zero_(),
    "select": lambda w: w.select(0, 3).fill_(1),
    "+=": lambda w: w.__iadd__(1),
    "*=": lambda w: w.__imul__(0.5),
    "sub_": lambda w: w.sub_(torch.ones(ROWS, DIM)),
    "lerp_": lambda w: w.lerp_(torch.ones(ROWS, DIM), 0.5),
    "clamp_": lambda w: w.clamp_(0, 1),
    "renorm_": lambda w: w.renorm_(2, 0, 1),
    "fill_": lambda w: w.fill_(1),
    "ones_": nn.init.ones_,
    "index_add_": lambda w: w.index_add_(0, torch.tensor([1]), torch.ones(1, DIM)),
    "index_copy_": lambda w: w.index_copy_(0, torch.tensor([1]), torch.ones(1, DIM)),
    "index_fill_": lambda w: w.index_fill_(0, torch.tensor([1]), 0.0),
    "scatter_add_": lambda w: w.scatter_add_(0, torch.tensor([[1]]), torch.ones(1, DIM)),
    "masked_fill_": lambda w: w.masked_fill_(torch.ones(ROWS, DIM, dtype=torch.bool), 0.0),
    "data": lambda w: w.data.mul_(2),
    "out": lambda w: torch.add(torch.ones(ROWS, DIM), 1, out=w),
    "_foreach_mul_": lambda w: torch._foreach_mul_([w], 2),
    "_foreach_copy_": lambda w: torch._foreach_copy_([w], [torch.ones(ROWS, DIM)]),
    "_foreach_zero_": lambda w: torch._foreach_zero_([w]),
    "max_norm": lambda w: F.embedding(torch.tensor([1]), w, max_norm=1.0),
    "view": lambda w: w.view(-1).zero_(),
    "view of bits": lambda w: w.view(torch.int32).zero_(),
    "as_strided": lambda w: w.as_strided((2,), (1,)).zero_(),
    "reshape": lambda w: w.reshape(-1).zero_(),
    "t": lambda w: w.t().zero_(),
    "flatten": lambda w: w.flatten().zero_(),
    "columns": lambda w: w[:, 1:].zero_(),
    "unbind": lambda w: [row.zero_() for row in w],
    "expand": lambda w: w.expand(1, ROWS, DIM).zero_(),
    "sum": lambda w: w.sum(),
    "abs": lambda w: w.abs().max(),
    "isfinite": lambda w: w.isfinite().all(),
    "matmul": lambda w: torch.ones(2, ROWS) @ w,
    "cat": lambda w: torch.cat([w, w]),
    "zeros_like": torch.zeros_like,
    "==": lambda w: w == w,  # noqa: PLR0124
    "gather": lambda w: w.gather(0, torch.zeros(1, DIM, dtype=torch.int64)),
    "embedding_bag": lambda w: F.embedding_bag(torch.tensor([[1]]), w),
    "half": lambda w: w.half(),
    "double": lambda w: w.double(),
    "to int": lambda w: w.to(torch.int8),
    "equal": lambda w: torch.equal(w, torch.zeros(ROWS, DIM)),
    "norm": lambda w: w.norm(),
}


@pytest.mark.parametrize("name", REFUSED)
def test_all_else_is_refused_in_a_sentence_and_changes_nothing(weight, name):
    """A write to a view that is a copy would be lost without a word."""
    before, version = weight.stored.clone(), weight._version
    with torch.no_grad(), pytest.raises(NotImplementedError, match="table stored as INT8 rows") as error:
        REFUSED[name](weight)
    assert "\n" not in str(error.value)
    assert torch.equal(weight.stored, before)
    assert name == "max_norm" or weight._version - version <= 1


# ---- optimizers


OPTIMIZERS = [name for name, kind in vars(torch.optim).items() if isinstance(kind, type) and name != "Optimizer"]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("foreach", [None, False, True])
def test_optimizers_of_torch_are_refused(weight, name, sparse, foreach):
    """They would round to the nearest code, which loses updates below half a step; nothing is changed."""
    before, gradient = weight.stored.clone(), torch.ones(ROWS, DIM)
    weight.grad = gradient.to_sparse(1) if sparse else gradient
    options = {} if foreach is None else {"foreach": foreach}
    with pytest.raises((NotImplementedError, RuntimeError, ValueError, TypeError)):
        getattr(torch.optim, name)([weight], **options).step(lambda: torch.tensor(1.0))
    assert torch.equal(weight.stored, before)
