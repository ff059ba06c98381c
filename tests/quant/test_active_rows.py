"""A step with N active rows reads and writes O(N) rows: every operator that runs is recorded and counted.

Between two refreshes of the scale nothing may take a table-sized tensor except a gather (as its source) and a scatter
(as its target), nothing may produce one, and what is produced may not grow with the table.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dqrm.quant.embedding import QuantEmbedding, QuantEmbeddingBag, QuantEmbeddingBagCollection
from dqrm.quant.uniform import fake_quantize

SMALL, LARGE = 10_000, 1_000_000
DIM = 4
# operator -> which of its tensors is the source that it gathers rows from
GATHERS = {
    "index_select": 0,
    "embedding": 0,
    "index": 0,
    "gather": 0,
    "_embedding_bag": 0,
    "_embedding_bag_forward_only": 0,
    "_embedding_bag_per_sample_weights_backward": 1,
}
SCATTERS = {"index_add_", "index_copy_", "index_put_", "scatter_", "scatter_add_"}
METADATA = {"is_same_size", "sym_size", "sym_numel", "sym_stride", "is_pinned"}


def stored(tensor):
    """How many numbers a tensor really holds."""
    if tensor.layout == torch.sparse_coo:
        return tensor._values().numel() + tensor._indices().numel()
    return tensor.numel()


def tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def is_view(func):
    return any(result.alias_info is not None and not result.alias_info.is_write for result in func._schema.returns)


class Recorder(TorchDispatchMode):
    """Counts what the operators under it produce, and lists those that touch something as long as the table."""

    def __init__(self, rows):
        super().__init__()
        self.rows = rows
        self.produced = 0
        self.operators = 0
        self.offenders = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if is_view(func) or name in METADATA:
            return out
        self.operators += 1
        read, written = tensors((args, kwargs)), tensors(out)
        sparse_add = name == "add_" and len(read) > 1 and read[1].is_sparse
        if name in GATHERS:
            del read[GATHERS[name]]
        elif name in SCATTERS or sparse_add:
            read, written = read[1:], []  # the first is the target, and is what comes back
        sizes = [stored(tensor) for tensor in read + written]
        if max(sizes, default=0) >= self.rows:
            self.offenders.append(f"{func}: {sizes}")
        self.produced += sum(stored(tensor) for tensor in written)
        return out


def random_ids(*shape):
    return torch.randint(SMALL // 2, shape, generator=torch.Generator().manual_seed(0))


def embedding(rows, bits):
    return QuantEmbedding(rows, DIM, sparse=True, bits=bits), (random_ids(64),)


def bags(rows, bits):
    offsets = torch.arange(0, 320, 5)
    return QuantEmbeddingBag(rows, DIM, mode="sum", sparse=True, bits=bits), (random_ids(320), offsets)


def weighted_padded_bags(rows, bits):
    module = QuantEmbeddingBag(rows, DIM, mode="sum", padding_idx=7, sparse=True, bits=bits)
    return module, (random_ids(64, 5), None, torch.ones(64, 5, requires_grad=True))


def mean_padded_bags(rows, bits):
    return QuantEmbeddingBag(rows, DIM, mode="mean", padding_idx=7, sparse=True, bits=bits), (random_ids(64, 5),)


def collection(rows, bits):
    tables = [rows // 2, rows // 4, rows - rows // 2 - rows // 4]
    module = QuantEmbeddingBagCollection(tables, DIM, multi=[False, False, True], pooling="mean", bits=bits)
    return module, (random_ids(64, 2) // 2, [(random_ids(320) // 2, torch.arange(0, 320, 5))])


MAKERS = pytest.mark.parametrize("make", [embedding, bags, weighted_padded_bags, mean_padded_bags, collection])


def record_steps(make, rows, bits, *, training=True, steps=2):
    """The operators of ordinary steps (forward, backward, SGD), that is after the scale has been computed."""
    module, arguments = make(rows, bits)
    module.train(training)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, foreach=False)

    def step():
        optimizer.zero_grad()
        module(*arguments).square().sum().backward()
        optimizer.step()

    step()
    with Recorder(rows) as recorder:
        for _ in range(steps):
            step()
    return recorder


@MAKERS
@pytest.mark.parametrize("bits", [2, 4, 8, 16, 32])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_no_operator_touches_the_whole_table(make, bits, training):
    recorder = record_steps(make, SMALL, bits, training=training)
    assert recorder.operators > 0
    assert recorder.offenders == []


@MAKERS
def test_what_a_step_produces_does_not_grow_with_the_table(make):
    small, large = record_steps(make, SMALL, 4), record_steps(make, LARGE, 4)
    assert large.offenders == []
    assert large.operators == small.operators
    assert large.produced == small.produced > 0


def test_a_refresh_is_seen_by_the_recorder():
    module = QuantEmbeddingBag(SMALL, DIM, mode="sum", sparse=True, bits=4, scale_period=3)
    seen = []
    for _ in range(7):
        with Recorder(SMALL) as recorder:
            module(random_ids(16, 2))
        seen.append(bool(recorder.offenders))
    assert seen == [True, False, False, True, False, False, True]


def test_quantizing_the_whole_table_is_seen_by_the_recorder():
    weight, ids = torch.randn(SMALL, DIM, requires_grad=True), random_ids(64)
    with Recorder(SMALL) as recorder:
        torch.nn.functional.embedding(ids, fake_quantize(weight, torch.tensor(0.1), 4)).sum().backward()
    assert recorder.offenders
    assert recorder.produced > SMALL * DIM


def test_a_dense_gradient_is_seen_by_the_recorder():
    module = QuantEmbedding(SMALL, DIM, sparse=False, bits=4)
    module(random_ids(64))
    with Recorder(SMALL) as recorder:
        module(random_ids(64)).sum().backward()
    assert recorder.offenders
