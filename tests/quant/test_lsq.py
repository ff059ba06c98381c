"""LSQ against the formulas of its paper in float64: values, gradients, where the step starts and how it moves."""

import copy
from dataclasses import replace

import pytest
import torch

import dqrm
import reference as ref
from conftest import tiny
from dqrm.quant import learned
from dqrm.quant.config import QATConfig
from dqrm.quant.embedding import QuantEmbedding, QuantEmbeddingBag, QuantEmbeddingBagCollection
from dqrm.quant.learned import LearnedStep
from dqrm.quant.linear import QuantLinear
from dqrm.quant.quantizer import Groups
from dqrm.quant.uniform import code_limits
from dqrm.training.step import TrainStep
from kernel_helpers import PATHS, on
from learned_helpers import check, double, far, passing, weights_on

ROWS, DIM = (30, 1, 17), 5
BITS = pytest.mark.parametrize("bits", ref.BITS)


def lsq(v, s, bits, weights):
    """LSQ (arXiv 1902.08153), equations 1 to 3 and its section 2.2: values of v on the step s."""
    highest = ref.levels(bits)
    g = (weights * highest) ** -0.5
    s = passing(s, s * g)
    clipped = torch.clamp(v / s, -highest - 1, highest)
    return passing(clipped.round(), clipped) * s


@BITS
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize(("outputs", "inputs"), [(5, 7), (1, 1), (3, 1), (1, 9)])
def test_a_linear_layer_has_the_papers_values_and_gradients(bits, granularity, outputs, inputs):
    step = torch.linspace(0.03, 0.2, outputs)[:, None] if granularity == "channel" else torch.full((1, 1), 0.07)
    layer = QuantLinear(inputs, outputs, bits=bits, quantizer="lsq", granularity=granularity, bias=False)
    with torch.no_grad():
        layer.weight.copy_(weights_on(step, bits, outputs, inputs))
        assert (layer.current_scale() > 0).all()  # sets the step
        layer.weight_fake_quantizer.scale.copy_(step[:, 0])
    grad = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(1))
    out = layer(torch.eye(inputs)).t()
    (out * grad).sum().backward()
    v, s = double(layer.weight), double(step)
    expected = lsq(v, s, bits, inputs if granularity == "channel" else inputs * outputs)
    (expected * grad).sum().backward()
    check(out, expected)
    check(layer.weight.grad, v.grad)
    check(layer.weight_fake_quantizer.scale.grad, s.grad[:, 0], 1e-4)


def collection(bits, sparse=True, dtype=torch.float32, multi=None):
    steps = torch.tensor([0.02, 0.3, 0.11])
    each = [weights_on(step, bits, rows, DIM, seed=number) for number, (step, rows) in enumerate(zip(steps, ROWS))]
    tables = QuantEmbeddingBagCollection(
        ROWS, DIM, bits=bits, quantizer="lsq", sparse=sparse, multi=multi, _weight=torch.cat(each).to(dtype)
    )
    assert (tables.current_scale() > 0).all()
    with torch.no_grad():
        tables.weight_fake_quantizer.scale.copy_(steps)
    return tables, steps


@PATHS
@BITS
@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
@pytest.mark.parametrize("samples", [0, 1, 40])
def test_tables_have_the_papers_values_and_gradients(path, bits, sparse, samples):
    tables, steps = collection(bits, sparse)
    random = torch.Generator().manual_seed(samples)
    ids = torch.stack([torch.randint(rows, (samples,), generator=random) for rows in ROWS], 1)
    grad = torch.randn(samples, len(ROWS), DIM, generator=random)
    with on(path):
        out = tables(ids)
        (out * grad).sum().backward()
    v, s = double(tables.weight), double(steps)
    starts = torch.tensor([0, *ROWS[:-1]]).cumsum(0)
    each = [lsq(v[ids[:, t] + starts[t]], s[t], bits, rows * DIM) for t, rows in enumerate(ROWS)]
    expected = torch.stack(each, 1)
    (expected * grad).sum().backward()
    check(out, expected)
    check(tables.weight.grad.to_dense(), v.grad)
    check(tables.weight_fake_quantizer.scale.grad, s.grad, 1e-4)
    assert samples < 40 or (s.grad != 0).all()


@pytest.mark.parametrize("kind", [QuantEmbedding, QuantEmbeddingBag])
def test_drop_in_tables_with_padding(kind):
    module = kind(9, DIM, bits=4, quantizer="lsq", padding_idx=2, sparse=True)
    if kind is QuantEmbeddingBag:
        module.mode = "sum"
    module(torch.tensor([[0]]))
    with torch.no_grad():
        module.weight_fake_quantizer.scale.mul_(0.4)
    ids = torch.tensor([[0, 2, 8], [8, 8, 2]])
    grad = torch.randn(2, DIM, generator=torch.Generator().manual_seed(0))
    out = module(ids)
    out = out.sum(1) if kind is QuantEmbedding else out
    (out * grad).sum().backward()
    v, s = double(module.weight), double(module.weight_fake_quantizer.scale)
    rows = lsq(v[ids], s, 4, 9 * DIM)
    keep = torch.where(ids == 2, 0.0, 1.0)[..., None] if kind is QuantEmbeddingBag else torch.ones(2, 3, 1)
    (rows * keep).sum(1).mul(grad).sum().backward()
    check(out, (rows * keep).sum(1))
    unpadded = v.grad.clone()
    unpadded[2] = 0
    check(module.weight.grad.to_dense(), unpadded)
    check(module.weight_fake_quantizer.scale.grad, s.grad, 1e-4)


def test_bags_of_a_collection_have_the_gradient_of_their_own_step():
    tables, steps = collection(4, multi=[False, True, True])
    bags = [(torch.tensor([0, 0, 0]), torch.tensor([0, 1])), (torch.tensor([3, 16, 3, 1]), torch.tensor([0, 0]))]
    tables(torch.tensor([[5], [29]]), bags).square().sum().backward()
    v, s = double(tables.weight), double(steps)
    single = lsq(v[torch.tensor([5, 29])], s[0], 4, 30 * DIM)
    one = lsq(v[torch.tensor([30, 30, 30])], s[1], 4, DIM)
    many = lsq(v[torch.tensor([3, 16, 3, 1]) + 31], s[2], 4, 17 * DIM)
    pooled = [*single, one[0], one[1:].sum(0), many.sum(0)]
    sum(vector.square().sum() for vector in pooled).backward()
    check(tables.weight.grad.to_dense(), v.grad, 1e-4)
    check(tables.weight_fake_quantizer.scale.grad, s.grad, 1e-4)


@BITS
def test_at_the_limits_themselves_the_step_gets_the_limit_and_the_weight_nothing(bits):
    """Equation 3 counts |v / s| equal to a limit as outside."""
    low, high = code_limits(bits)
    quantizer = LearnedStep(QATConfig(quantizer="lsq"), bits, Groups(1))
    weight = torch.tensor([[low * 0.5, high * 0.5, (high - 1) * 0.5, 0.1]], requires_grad=True)
    quantizer.before_forward(weight)
    with torch.no_grad():
        quantizer.scale.fill_(0.5)
    for number, by_step in enumerate((low, high, 0.0, -0.2)):
        weight.grad = quantizer.scale.grad = None
        quantizer.fake_quantize(weight)[0, number].backward()
        assert weight.grad[0, number] == (number > 1)
        factor = (4 * high) ** -0.5
        assert quantizer.scale.grad.item() == pytest.approx(by_step * factor, rel=1e-5, abs=1e-9)


def test_max_passes_gradients_where_lsq_stops_them():
    grads = {}
    for name in ("max", "lsq"):
        layer = QuantLinear(4, 1, bits=2, quantizer=name, bias=False)
        with torch.no_grad():
            layer.weight.copy_(torch.tensor([[4.0, 1.0, -1.0, 0.1]]))
        layer(torch.ones(1, 4)).sum().backward()
        grads[name] = layer.weight.grad[0].tolist()
    assert grads == {"max": [1, 1, 1, 1], "lsq": [0, 1, 1, 1]}


# ---- where the step starts


@BITS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_step_starts_at_the_papers_value(bits, dtype, monkeypatch):
    monkeypatch.setattr("dqrm.quant.packing._CHUNK", 4 * DIM)  # in pieces
    torch.manual_seed(bits)
    weight = torch.randn(sum(ROWS), DIM).to(dtype)
    tables = QuantEmbeddingBagCollection(ROWS, DIM, bits=bits, quantizer="lsq", _weight=weight)
    expected = [2 * table.double().abs().mean() / ref.levels(bits) ** 0.5 for table in weight.split(ROWS)]
    torch.testing.assert_close(tables.current_scale().double(), torch.stack(expected), rtol=1e-6, atol=0)
    for granularity, dims in (("channel", 1), ("tensor", (0, 1))):
        layer = QuantLinear(DIM, 6, bits=bits, quantizer="lsq", granularity=granularity)
        expected = 2 * layer.weight.detach().double().abs().mean(dims) / ref.levels(bits) ** 0.5
        torch.testing.assert_close(layer.current_scale().double(), expected.view(-1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("value", [0.0, 1e-30, 3e38])
def test_weights_of_extreme_size(value):
    tables = QuantEmbeddingBagCollection(ROWS, DIM, quantizer="lsq", _weight=torch.full((sum(ROWS), DIM), value))
    out = tables(torch.zeros(2, 3, dtype=torch.int64))
    scale = tables.weight_fake_quantizer.scale.detach()
    assert scale.isfinite().all()
    assert (scale >= 1e-8 / 7 * 0.999).all()
    assert (out.detach() == 0).all() == (value < 1)
    out.sum().backward()
    assert tables.weight_fake_quantizer.scale.grad.isfinite().all()


# ---- N in the gradient's factor


def relative_updates(table, looked_up, seed):
    """The paper's ratio R (equation 4) of the updates of s and of the weights, each relative to its own size."""
    torch.manual_seed(seed)
    tables = QuantEmbeddingBagCollection([table], 16, quantizer="lsq", _weight=torch.randn(table, 16))
    ids = torch.randperm(table)[:looked_up, None]
    out = tables(ids)
    (out * torch.randn(out.shape)).sum().backward()
    scale = tables.weight_fake_quantizer.scale
    by_weight = tables.weight.grad.to_dense().norm() / tables.weight.detach().norm()
    return float(scale.grad.abs() / scale.detach() / by_weight)


def test_with_the_whole_tables_weights_the_balance_does_not_depend_on_the_rows_in_use():
    """With the rows in use, N would be 1/25 of it in the second case and R five times larger."""
    whole, few = (sum(relative_updates(500, count, seed) for seed in range(300)) / 300 for count in (500, 20))
    assert 0.8 < few / whole < 1.25
    assert 0.05 < whole < 5  # "close to 1"


def test_the_gradients_of_parts_of_a_batch_add_up_to_that_of_the_batch():
    tables, _ = collection(4)
    ids = torch.stack([torch.randint(rows, (12,)) for rows in ROWS], 1)
    grads = []
    for parts in ([ids], ids.split(5)):
        tables.zero_grad()
        for part in parts:
            tables(part).square().sum().backward()
        grads.append(tables.weight_fake_quantizer.scale.grad.clone())
    torch.testing.assert_close(*grads)


# ---- above 0, whatever an optimizer does


def test_an_update_halves_a_step_at_most():
    tables, steps = collection(4)
    scale, ids = tables.weight_fake_quantizer.scale, torch.zeros(1, 3, dtype=torch.int64)
    tables(ids)
    far(scale)
    for _ in range(2):  # whoever asks, and however often
        assert torch.equal(tables.state_dict()["weight_fake_quantizer.scale"], steps / 2)
        assert torch.equal(tables.eval().current_scale(), steps / 2)
        assert torch.equal(copy.deepcopy(tables).weight_fake_quantizer.scale, steps / 2)
    tables.train()(ids)
    far(scale)
    tables(ids)
    assert torch.equal(scale.detach(), steps / 4)
    for _ in range(200):
        far(scale)
        tables(ids)
    assert (scale.detach() > 0).all()
    other, _ = collection(4)
    other.load_state_dict(tables.state_dict())
    far(other.weight_fake_quantizer.scale, 0.25)
    assert torch.equal(other.current_scale(), torch.full((3,), 0.25))  # what was loaded is no update


def test_a_forward_twice_before_the_backward_pass():
    tables, _ = collection(4)
    ids = torch.tensor([[3, 0, 5]])
    (tables(ids).sum() + tables(ids).sum()).backward()
    twice = tables.weight_fake_quantizer.scale.grad.clone()
    tables.zero_grad()
    tables(ids).sum().backward()
    torch.testing.assert_close(twice, 2 * tables.weight_fake_quantizer.scale.grad)


# ---- only the rows in use


def test_a_step_touches_no_row_but_those_in_use(monkeypatch):
    """All other rows are NaN once the first forward has set the steps."""
    config = replace(tiny(optimizer="adagrad"), quantization=QATConfig(quantizer="lsq"))
    model = dqrm.DLRM(0, [50, 40], config=config.model, qat=config.quantization)
    step = TrainStep(model.train(), config)
    ids, labels = torch.tensor([[1, 2], [3, 2], [1, 0], [7, 9]]), torch.tensor([0.0, 1, 0, 1])
    batch = dqrm.Batch(torch.empty(4, 0), ids, (), labels)
    step(batch, 0.1)
    used = torch.zeros(90, dtype=torch.bool)
    used[[1, 3, 7, 52, 50, 59]] = True
    with torch.no_grad():
        model.tables.weight[~used] = torch.nan
    monkeypatch.setattr(learned, "pieces", None)
    before = model.tables.current_scale().clone()
    for _ in range(3):
        assert step(batch, 0.1).isfinite()
    assert (model.tables.current_scale() != before).all()
    assert model.eval()(batch.dense, batch.ids).isfinite().all()
    assert model.state_dict()["tables.weight"][used].isfinite().all()


def test_the_scales_that_go_on_are_those_of_the_last_evaluation():
    tables, steps = collection(4)
    tables(torch.zeros(1, 3, dtype=torch.int64))
    far(tables.weight_fake_quantizer.scale)
    tables.tables_redrawn([0])
    scale = tables.weight_fake_quantizer.scale.detach()
    assert torch.equal(scale[1:], steps[1:] / 2)
    expected = 2 * tables.table(0).double().abs().mean() / 7**0.5
    assert float(scale[0]) == pytest.approx(float(expected), rel=1e-6)


def test_tables_of_several_bits_are_refused():
    qat = QATConfig(4, quantizer="lsq", small_table_bits=8, small_table_rows=20)
    with pytest.raises(ValueError, match="small_table_bits is 8, but the quantizer 'lsq' needs"):
        QuantEmbeddingBagCollection(ROWS, DIM, qat=qat)
