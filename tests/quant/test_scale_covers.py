"""With running_max, the default, no forward uses a scale below what its rows need, whatever has changed the weights."""

import copy
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import dqrm
from dqrm.quant.embedding import QuantEmbedding, QuantEmbeddingBag, QuantEmbeddingBagCollection
from dqrm.quant.uniform import scale_from_max
from dqrm.training.optimizers import SparseAdagrad, SparseSGD
from kernel_helpers import PATHS, on

ROWS, DIM = (30, 1, 17), 4


class InPlace(torch.optim.Optimizer):
    """As old optimizers write: through `.data`, which changes no version."""

    def __init__(self, params):
        super().__init__(params, {})

    def step(self):
        for group in self.param_groups:
            for weight in group["params"]:
                grad = weight.grad.to_dense() if weight.grad.is_sparse else weight.grad
                weight.data.sub_(0.5 * grad)


SPARSE = {
    "sgd": lambda p: SparseSGD(p, 0.5),
    "adagrad": lambda p: SparseAdagrad(p, 0.5),
    "rowwise": lambda p: SparseAdagrad(p, 0.5, rowwise=True),
    "torch momentum": lambda p: torch.optim.SGD(p, 0.3, momentum=0.9, foreach=False),
    "torch sparse adam": lambda p: torch.optim.SparseAdam(p, 0.3),
    "in place": InPlace,
}
DENSE = {
    "sgd": lambda p: torch.optim.SGD(p, 0.5),
    "momentum": lambda p: torch.optim.SGD(p, 0.3, momentum=0.9, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, 0.3),
    "adamw": lambda p: torch.optim.AdamW(p, 0.3, weight_decay=0.5),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.3),
    "in place": InPlace,
}
CASES = [(True, name) for name in SPARSE] + [(False, name) for name in DENSE]


def make(kind, sparse, dtype=torch.float32):
    torch.manual_seed(0)
    if kind == "collection":
        return QuantEmbeddingBagCollection(ROWS, DIM, sparse=sparse, _weight=torch.randn(sum(ROWS), DIM).to(dtype))
    if kind == "bag":
        return QuantEmbeddingBag(ROWS[0], DIM, mode="sum", sparse=sparse)
    return QuantEmbedding(ROWS[0], DIM, sparse=sparse, padding_idx=2)


def tables(module):
    return [table.detach().float() for table in module.weight_fake_quantizer.groups.tables(module.weight)]


def needed(module, ids=None):
    """The scale of each table that these ids [N, tables] need, or all rows."""
    rows = [table if ids is None else table[ids[:, number]] for number, table in enumerate(tables(module))]
    return torch.stack([scale_from_max(part.abs().max(), module.bits) for part in rows])


def draw(module, random, count):
    return torch.from_numpy(np.stack([random.integers(0, len(table), count) for table in tables(module)], 1))


@PATHS
@pytest.mark.parametrize("kind", ["collection", "bag", "embedding"])
@pytest.mark.parametrize(("sparse", "rule"), CASES, ids=[f"{'sparse' if s else 'dense'} {name}" for s, name in CASES])
def test_every_forward_has_scales_that_its_rows_need(path, kind, sparse, rule):
    """Random training forwards, accumulated or not, evaluations, edits and copies."""
    random = np.random.default_rng(len(rule))
    with on(path):
        module = make(kind, sparse)
        optimizer = (SPARSE if sparse else DENSE)[rule](module.parameters())
        for step in range(40):
            optimizer.zero_grad()
            for _ in range(random.integers(1, 3)):
                ids = draw(module, random, 3)
                out = module(ids)
                assert (module.scale >= needed(module, ids)).all(), f"training forward {step}"
                if not sparse and rule != "in place":
                    assert (module.scale >= needed(module)).all(), f"training forward {step}, whole tables"
                (out * torch.randn(out.shape) * 3.0 ** random.integers(-2, 3)).sum().backward()
            optimizer.step()
            if random.random() < 0.3:
                module.eval()
                with torch.no_grad():
                    module(draw(module, random, 2))
                assert (module.scale >= needed(module)).all(), f"evaluation after step {step}"
                module.train()
            if random.random() < 0.1:
                with torch.no_grad():
                    module.weight[random.integers(len(module.weight))] *= 3
            if random.random() < 0.2:
                assert (module.state_dict()["weight_fake_quantizer.scale"] >= needed(module)).all()
                assert (copy.deepcopy(module).current_scale() >= needed(module)).all()


@PATHS
@pytest.mark.parametrize("kept", [1, 64, 70])
def test_any_number_of_forwards_before_an_update_counts(path, kept):
    """Also more of them than are remembered."""
    with on(path):
        module = make("collection", True)
        module.only_looked_up_rows_change()
        optimizer, random = SparseSGD(module.parameters(), 1.0), np.random.default_rng(0)
        for _ in range(kept):
            (module(draw(module, random, 2)) * 5).sum().backward()
        optimizer.step()
        module.eval()
        with torch.no_grad():
            module(draw(module, random, 1))
        assert (module.scale >= needed(module)).all()


@PATHS
def test_training_in_evaluation_mode_counts_too(path):
    """Fine-tuning with the clock stopped: updates follow forwards in evaluation mode."""
    with on(path):
        module, random = make("bag", True).eval(), np.random.default_rng(0)
        optimizer = SparseSGD(module.parameters(), 1.0)
        for _ in range(5):
            optimizer.zero_grad()
            ids = draw(module, random, 3)
            module(ids).mul(7).sum().backward()
            assert (module.scale >= needed(module, ids)).all()
            optimizer.step()


@PATHS
def test_bf16_tables_with_stochastic_rounding_are_covered(path):
    with on(path):
        module, random = make("collection", True, torch.bfloat16), np.random.default_rng(0)
        module.only_looked_up_rows_change()
        optimizer = SparseSGD(module.parameters(), 0.5)
        for step in range(30):
            optimizer.zero_grad()
            ids = draw(module, random, 4)
            out = module(ids)
            assert (module.scale >= needed(module)).all(), step
            (out * torch.randn(out.shape) * 4).sum().backward()
            optimizer.step()


def test_a_cast_that_makes_weights_larger_raises_scales():
    module = make("embedding", True)
    module(torch.tensor([1]))
    with torch.no_grad():
        module.weight.fill_(1 + 2**-8 + 2**-9)  # bf16 rounds it up
    module.bfloat16().eval()
    assert module.scale.item() >= needed(module).item()


def test_both_paths_raise_to_the_same_bits():
    found = []
    for path in ("native", "plain"):
        with on(path):
            module, scales = make("collection", True), []
            random = np.random.default_rng(1)
            for _ in range(8):
                with torch.no_grad():
                    module.weight.mul_(1.3)
                module(draw(module, random, 4))
                scales.append(module.scale.clone())
            found.append(torch.stack(scales))
    assert torch.equal(*found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("optimizer", ["sgd", "sgd with l2", "adagrad", "rowwise"])
def test_an_optimizer_that_knows_the_tables_raises_the_same_bits_itself(optimizer, dtype):
    """As `TrainStep` sets it; the other module is raised by its next forward, which reads the rows again."""
    build = {**SPARSE, "sgd with l2": lambda p: SparseSGD(p, 0.5, l2=0.3)}[optimizer]
    known, unknown = make("collection", True, dtype), make("collection", True, dtype)
    optimizers = [build([known.weight]), build([unknown.weight])]
    optimizers[0].tables = known
    grew = 0
    for seed in range(12):
        before = unknown.scale.clone()
        for module, each in zip((known, unknown), optimizers):
            each.zero_grad()
            random = np.random.default_rng(seed)
            out = module(draw(module, random, 40))
            (out * torch.from_numpy(random.normal(size=out.shape).astype(np.float32))).sum().backward()
            each.step()
        assert known.weight_fake_quantizer._looked_up == []  # nothing is left for the next forward
        assert unknown.weight_fake_quantizer._looked_up
        for table, scale in enumerate(known.scale):
            assert scale >= scale_from_max(known.table(table).abs().amax().float(), 4)
        unknown.current_scale()
        assert torch.equal(known.weight, unknown.weight)
        assert torch.equal(known.scale, unknown.scale)
        grew += int((unknown.scale > before).any()) if seed else 0
    assert grew > 2


def test_a_row_that_was_larger_in_the_middle_of_an_update_raises_nothing():
    """Row 3 goes up and down again within one gradient: what counts is what it is afterwards."""
    module = QuantEmbeddingBagCollection(ROWS, DIM, _weight=torch.ones(sum(ROWS), DIM))
    optimizer = SparseSGD([module.weight], 1.0)
    optimizer.tables = module
    before = module.current_scale().clone()
    rows = torch.tensor([3, 30, 3, 31, 3, 30])
    values = torch.tensor([-8.0, 0.25, 8.0, 0.25, 0.5, 0.25])[:, None].expand(-1, DIM).contiguous()
    optimizer.step_rows(rows, values)
    assert torch.equal(module.scale, before)
    optimizer.step_rows(torch.tensor([31]), torch.full((1, DIM), -2.0))
    expected = before.clone()
    expected[2] = scale_from_max(torch.tensor(2.75), 4)
    assert torch.equal(module.scale, expected)


@pytest.mark.parametrize("make_module", [
    lambda: QuantEmbedding(5, 3), lambda: QuantEmbeddingBag(5, 3), lambda: QuantEmbeddingBagCollection([5], 3),
    lambda: dqrm.prepare_qat(nn.Sequential(nn.Embedding(5, 3)))[0],
])  # fmt: skip
def test_it_is_the_default_everywhere(make_module):
    assert make_module().qat.scale_refresh == "running_max"


@PATHS
@pytest.mark.parametrize("kind", [QuantEmbedding, QuantEmbeddingBag])
def test_refreshing_the_scale_of_an_unquantized_table_does_nothing(path, kind):
    with on(path):
        for table in (kind(5, 3, bits=32), QuantEmbeddingBagCollection([5, 2], 3, bits=32)):
            before = {name: value.clone() for name, value in table.state_dict().items()}
            table.refresh_scale()
            table.only_looked_up_rows_change()
            table.refresh_scale()
            assert all(torch.equal(value, before[name]) for name, value in table.state_dict().items())


# ---- clamped weights are counted and told


def outgrown(path, **rule):
    """A table of which every weight that is looked up outgrows its scale after the first forward; its warnings."""
    with on(path), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        module = QuantEmbeddingBag(20, 4, mode="sum", sparse=True, **rule)
        for _ in range(250):
            module(torch.arange(20).view(-1, 1))
            with torch.no_grad():
                module.weight.fill_(100.0)
    return module, [str(warning.message) for warning in told]


@PATHS
def test_stale_scales_are_told_once_with_the_share_and_the_way_out(path):
    _, told = outgrown(path, scale_refresh="periodic", scale_period=1000)
    assert len(told) == 1
    assert "98.99%" in told[0]  # 98 of the first 99 forwards
    assert "running_max" in told[0]
    assert "scale_period" in told[0]


@PATHS
def test_fresh_scales_are_not(path):
    assert outgrown(path)[1] == []
    assert outgrown(path, scale_refresh="periodic", scale_period=1)[1] == []


@PATHS
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_what_is_counted_is_what_the_clamp_changed(path, bits):
    n = 2 ** (bits - 1) - 1
    with on(path):
        module = make("collection", True)
        module = QuantEmbeddingBagCollection(ROWS, DIM, bits=bits, scale_period=100, _weight=module.weight.detach())
        ids = draw(module, np.random.default_rng(3), 8)
        with torch.no_grad():
            module(ids)
            module.clamps.take()
            module.weight.mul_(1.8)
            module(ids)
        rows = torch.stack([table[ids[:, number]] for number, table in enumerate(tables(module))], 1)
        codes = (rows / module.scale[:, None]).round()
        expected = int(((codes > n) | (codes < -n - 1)).sum())
        assert 0 < expected < rows.numel()
        assert module.clamps.take() == (expected, rows.numel())
        assert module.clamps.take() == (0, 0)


def test_the_tables_of_one_model_warn_once():
    model = nn.ModuleList([nn.EmbeddingBag(6, 3, mode="sum", sparse=True) for _ in range(3)])
    dqrm.prepare_qat(model, dqrm.QATConfig(scale_period=1000))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(200):
            for table in model:
                table(torch.arange(6).view(-1, 1))
                with torch.no_grad():
                    table.weight.fill_(50.0)
    assert len(told) == 1


# ---- under the promise that only rows looked up change, evaluation reads no table: nothing may be forgotten


@PATHS
def test_rows_of_very_many_forwards_before_one_update_are_covered(path):
    """More than are remembered, as with gradients gathered over many batches."""
    tables = QuantEmbeddingBagCollection([200], DIM)
    tables.only_looked_up_rows_change()
    with on(path):
        for row in range(100):
            tables(torch.tensor([[row]])).sum().backward()
        with torch.no_grad():
            tables.weight[99] += 50
        tables(torch.tensor([[150]]))
        tables.eval()
        assert torch.equal(tables.current_scale(), needed(tables))


@PATHS
def test_a_cast_that_makes_weights_larger_raises_the_scale(path):
    weight = torch.full((8, DIM), 1.0)
    weight[3, 1] = 1.0 + 1.9 * 2.0**-8  # which bf16 rounds up
    tables = QuantEmbeddingBagCollection([8], DIM, _weight=weight)
    tables.only_looked_up_rows_change()
    with on(path):
        tables.refresh_scale()
        before = tables.scale.clone()
        tables.bfloat16().eval()
        assert torch.equal(tables.current_scale(), needed(tables))
        assert (tables.scale > before).all()


@PATHS
def test_a_refresh_after_loading_reads_the_loaded_rows(path):
    """Of rows that no forward looked up, too: what was remembered of their blocks is of other weights."""
    with on(path):
        tables = QuantEmbeddingBagCollection([100], DIM, scale_refresh="periodic", scale_period=2)
        tables.only_looked_up_rows_change()
        for _ in range(2):
            tables(torch.tensor([[5]]))
        state = tables.state_dict()
        state["weight"] = state["weight"].clone()
        state["weight"][70] = 40
        tables.load_state_dict(state)
        tables(torch.tensor([[5]]))  # the third forward is a refresh
        assert torch.equal(tables.scale, needed(tables))
