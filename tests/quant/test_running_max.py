"""Scales between exact refreshes (running_max), and exact refreshes that read only what changed."""

import copy
from unittest.mock import patch

import numpy as np
import pytest
import torch

import reference as ref
from dqrm.quant.embedding import QuantEmbedding, QuantEmbeddingBag, QuantEmbeddingBagCollection
from dqrm.training.optimizers import SparseAdagrad, SparseSGD

ROWS, MULTI, DIM = (33, 1, 16, 47), (False, False, False, True), 3


def make(dtype=torch.float32, **options):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(sum(ROWS), DIM, generator=generator).to(dtype)
    return QuantEmbeddingBagCollection(ROWS, DIM, multi=MULTI, _weight=weight, **options)


def make_batch(step, batch=5):
    """Ids of few rows, and bags of which some are empty; `rows` per table, as they are read."""
    random = np.random.default_rng(step)
    ids = np.stack([random.integers(0, rows, batch) for rows in ROWS[:3]], 1)
    lengths = random.integers(0, 3, batch)
    values = random.integers(0, ROWS[3], lengths.sum())
    bag = (torch.from_numpy(values), torch.from_numpy(lengths.cumsum() - lengths))
    return (torch.from_numpy(ids), [bag]), [*ids.T, values]


def optimizer_of(module, rule):
    if rule == "sgd":
        return SparseSGD(module.parameters(), 0.5)
    if rule == "l2":
        return SparseSGD(module.parameters(), 0.5, l2=0.9)
    return SparseAdagrad(module.parameters(), 0.5, rowwise=rule == "rowwise")


def update(optimizer, out, step):
    """A step that makes rows grow or shrink by turns."""
    optimizer.zero_grad()
    random = torch.Generator().manual_seed(step)
    (out * torch.randn(out.shape, generator=random) * 10.0 ** (step % 3 - 1)).sum().backward()
    optimizer.step()


def tables_of(module):
    return module.weight_fake_quantizer.groups.tables(module.weight)


def table_maxima(module):
    return np.array([np.abs(ref.array(table)).max() for table in tables_of(module)])


def row_maxima(module, looked_up):
    """Of each table, the largest magnitude in the rows that were looked up."""
    tables = [ref.array(table) for table in tables_of(module)]
    return np.array([np.abs(table[rows]).max(initial=0) for table, rows in zip(tables, looked_up)])


# ---- running_max


@pytest.mark.parametrize("rule", ["sgd", "l2", "adagrad", "rowwise"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("rescan", "bits", "blocks"), [(7, 4, True), (7, 16, False), (10_000, 2, False)], ids=["blocks", "scan", "never"]
)
def test_the_scale_is_the_last_exact_one_raised_by_every_updated_row(path, rule, dtype, rescan, bits, blocks):
    module = make(dtype, bits=bits, scale_refresh="running_max", rescan_period=rescan)
    optimizer, largest = optimizer_of(module, rule), None
    if blocks:
        module.only_looked_up_rows_change()
    for step in range(17):
        batch, looked_up = make_batch(step)
        if step % rescan == 0:
            largest = table_maxima(module)
        out = module(*batch)
        ref.assert_scale(module.scale, largest, bits)
        update(optimizer, out, step)
        largest = np.maximum(largest, row_maxima(module, looked_up))
    module.eval()
    module(*make_batch(0)[0])
    ref.assert_scale(module.scale, largest, bits)


@pytest.mark.parametrize("module", [QuantEmbedding, QuantEmbeddingBag])
@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
@pytest.mark.parametrize("padding", [None, 0])
def test_single_tables_follow_their_rows_too(path, module, sparse, padding):
    options = {"mode": "sum"} if module is QuantEmbeddingBag else {}
    table = module(40, 4, sparse=sparse, padding_idx=padding, scale_refresh="running_max", **options)
    optimizer = SparseSGD(table.parameters(), 0.5) if sparse else torch.optim.SGD(table.parameters(), 0.5)
    largest = np.abs(ref.array(table.weight)).max()
    for step in range(12):
        ids = torch.randint(40, (3, 2), generator=torch.Generator().manual_seed(step))
        out = table(ids)
        ref.assert_scale(table.scale, largest, 4)
        update(optimizer, out, step)
        largest = max(largest, np.abs(ref.array(table.weight))[ids.unique()].max())


def grown(**options):
    """A collection that a step has just changed, and what its scales must be."""
    module = make(scale_refresh="running_max", **options)
    batch, looked_up = make_batch(1)
    before = table_maxima(module)
    out = module(*batch)
    optimizer_of(module, "sgd").zero_grad()
    (out * 40).sum().backward()
    optimizer_of(module, "sgd").step()
    return module, np.maximum(before, row_maxima(module, looked_up))


def test_a_state_dict_holds_the_raised_scale(path):
    module, largest = grown()
    ref.assert_scale(module.state_dict()["weight_fake_quantizer.scale"], largest, 4)


def evaluated(module):
    with torch.inference_mode():
        module.eval()(*make_batch(5)[0])
    return module.scale


def test_evaluation_uses_the_raised_scale(path):
    module, largest = grown()
    ref.assert_scale(evaluated(module), largest, 4)


def test_moving_a_module_keeps_the_raise(path):
    module, largest = grown()
    ref.assert_scale(evaluated(module.to("cpu")), largest, 4)


def test_a_copy_keeps_the_raise(path):
    module, largest = grown()
    ref.assert_scale(evaluated(copy.deepcopy(module)), largest, 4)


def test_an_evaluation_between_forward_and_step_loses_nothing(path):
    module = make(scale_refresh="running_max")
    optimizer, (batch, looked_up) = optimizer_of(module, "sgd"), make_batch(1)
    out, before = module(*batch), table_maxima(module)
    evaluated(module)
    module.state_dict()
    module.train()
    update(optimizer, 40 * out, 2)
    ref.assert_scale(evaluated(module), np.maximum(before, row_maxima(module, looked_up)), 4)


def test_gradients_accumulated_over_two_forwards_raise_for_both(path):
    module = make(scale_refresh="running_max")
    optimizer, before = optimizer_of(module, "sgd"), table_maxima(module)
    looked_up = []
    for step in (3, 4, 5):
        batch, rows = make_batch(step, batch=3)
        (module(*batch) * 30).sum().backward()
        looked_up.append(rows)
    ref.assert_scale(module.scale, before, 4)
    optimizer.step()
    raised = [row_maxima(module, rows) for rows in looked_up]
    assert (np.max(raised, axis=0) > before).any()
    ref.assert_scale(evaluated(module), np.maximum(before, np.max(raised, axis=0)), 4)


def test_an_ordinary_step_reads_no_row_but_its_own(path):
    """A larger value written elsewhere goes unseen until the exact scan."""
    module = make(scale_refresh="running_max", rescan_period=3)
    ids, bags = torch.zeros(1, 3, dtype=torch.int64), [(torch.tensor([0]), torch.tensor([0]))]
    module(ids, bags)
    before = module.scale.clone()
    with torch.no_grad():
        module.table(0)[32] = module.table(3)[46] = 99
    for _ in range(2):
        module(ids, bags)
        assert torch.equal(module.scale, before)
    module(ids, bags)
    ref.assert_scale(module.scale[[0, 3]], [99, 99], 4)


def test_an_exact_scan_lowers_the_scale_again(path):
    module = make(scale_refresh="running_max", rescan_period=3)
    ids, bags = torch.zeros(1, 3, dtype=torch.int64), [(torch.tensor([0]), torch.tensor([0]))]
    module(ids, bags)
    with torch.no_grad():
        module.weight.mul_(0.1)
    for exact in (False, False, True):
        before = module.scale.clone()
        module(ids, bags)
        if not exact:
            assert torch.equal(module.scale, before)
    ref.assert_scale(module.scale, table_maxima(module), 4)


@pytest.mark.parametrize("cut", [1, 3, 6, 7, 8])
def test_a_restored_state_continues_with_the_same_scales(path, cut):
    def run(module, steps):
        optimizer, scales = optimizer_of(module, "sgd"), []
        for step in steps:
            update(optimizer, module(*make_batch(step)[0]), step)
            scales.append(module.state_dict()["weight_fake_quantizer.scale"].clone())
        return scales

    options = {"scale_refresh": "running_max", "rescan_period": 7}
    whole = run(make(**options), range(10))
    first, second = make(**options), make(**options)
    found = run(first, range(cut))
    with torch.no_grad():
        second.weight.zero_()
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    found += run(second, range(cut, 10))
    for step in range(10):
        assert torch.equal(whole[step], found[step]), step


def test_forwards_without_updates_do_not_pile_up(path):
    """Tables that no optimizer changes: nothing to remember, however many forwards there are."""
    module = make(scale_refresh="running_max").requires_grad_(False)
    for step in range(200):
        module(*make_batch(step, batch=50)[0])
    held = sum(rows.numel() for rows, *_ in module.weight_fake_quantizer._looked_up)
    assert held <= 2 * sum(ROWS) + 4 * 200, f"{held} row numbers are kept"


# ---- exact refreshes through blocks


@pytest.mark.parametrize("rule", ["sgd", "l2", "adagrad", "rowwise"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("period", [1, 4])
def test_a_refresh_of_what_changed_is_exact(path, rule, dtype, period):
    module = make(dtype, scale_period=period)
    module.only_looked_up_rows_change()
    optimizer = optimizer_of(module, rule)
    largest = None
    for step in range(41):
        if step == 9:
            module.to("cpu")
        if step == 18:
            state = copy.deepcopy(module.state_dict())
            state["weight"] = state["weight"].flip(0) * 3
            module.load_state_dict(state)
        if step == 27:
            module.eval()
            module(*make_batch(99)[0])
            module.train()
        if step % period == 0:
            largest = table_maxima(module)
        out = module(*make_batch(step)[0])
        ref.assert_scale(module.scale, largest, 4)
        update(optimizer, out, step)


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 31, 33, 4097])
def test_a_largest_row_that_shrinks_is_noticed(path, rows):
    module = QuantEmbeddingBagCollection([rows, 5], 2, scale_period=1)
    module.only_looked_up_rows_change()
    with torch.no_grad():
        module.weight.fill_(0.25)
        module.table(0)[rows - 1] = 8
    module.refresh_scale()
    ids = torch.tensor([[rows - 1, 0]])
    optimizer = SparseSGD(module.parameters(), 1.0)
    for expected in (8, 4, 2, 1):
        out = module(ids)
        ref.assert_scale(module.scale[0], expected, 4)
        optimizer.zero_grad()
        (out[:, 0] * expected / 2).sum().backward()
        optimizer.step()


def test_an_explicit_refresh_reads_everything(path):
    module = make(scale_period=1000)
    module.only_looked_up_rows_change()
    module(*make_batch(0)[0])
    with torch.no_grad():
        module.weight.mul_(3)
    module.refresh_scale()
    ref.assert_scale(module.scale, table_maxima(module), 4)


@pytest.mark.parametrize(
    "build",
    [
        lambda: QuantEmbeddingBagCollection([40], 4, sparse=False, scale_period=1),
        lambda: QuantEmbedding(40, 4, sparse=True, scale_period=1),
        lambda: QuantEmbedding(40, 4, scale_period=1),
        lambda: QuantEmbedding(40, 4, sparse=True, padding_idx=0, scale_period=1),
        lambda: QuantEmbedding(40, 4, sparse=True, scale_period=1, dtype=torch.bfloat16),
        lambda: QuantEmbeddingBag(40, 4, mode="mean", scale_period=1),
    ],
    ids=["dense collection", "embedding", "dense embedding", "padding", "bf16 embedding", "dense bag"],
)
def test_every_way_of_looking_up_counts_as_a_change(path, build):
    """Whatever path a lookup takes, the rows it read are read again at the next refresh."""
    module = build()
    module.only_looked_up_rows_change()
    for value in (3.0, 1.5, 6.0):
        module(torch.tensor([[7]]))
        with torch.no_grad():
            module.weight[7] = value
        module(torch.tensor([[8]]))
        ref.assert_scale(module.scale[0], np.abs(ref.array(module.weight)).max(), 4)


def test_a_machine_path_that_changes_midway_counts_too():
    """Tracing takes the plain path while the module has its blocks."""
    module = QuantEmbeddingBagCollection([40], 4, scale_period=1)
    module.only_looked_up_rows_change()
    module(torch.tensor([[7]]))
    with patch("torch.compiler.is_compiling", lambda: True):
        module(torch.tensor([[7]]))
    with torch.no_grad():
        module.weight[7] = 5
    module(torch.tensor([[8]]))
    ref.assert_scale(module.scale[0], 5, 4)
