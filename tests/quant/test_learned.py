"""LSQ and PACT against the formulas of their papers in float64; training, checkpoints and packing with them."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import dqrm
import reference as ref
from conftest import tensors, tiny
from dqrm.config import OptimizerConfig
from dqrm.info import print_description
from dqrm.quant import learned
from dqrm.quant.activations import ActivationFakeQuantizer
from dqrm.quant.config import ACTIVATION_QUANTIZERS, QATConfig
from dqrm.quant.embedding import QuantEmbedding, QuantEmbeddingBag, QuantEmbeddingBagCollection
from dqrm.quant.learned import PACT, LearnedStep
from dqrm.quant.linear import QuantLinear
from dqrm.quant.mlp import QuantMLP
from dqrm.quant.quantizer import Groups
from dqrm.quant.uniform import code_limits
from dqrm.training.parameter_groups import parameter_groups
from dqrm.training.step import TrainStep
from kernel_helpers import PATHS, on

ROWS, DIM = (30, 1, 17), 5
BITS = pytest.mark.parametrize("bits", ref.BITS)


# ---- the papers' formulas by autograd in float64; nothing of dqrm


def passing(value, gradient):
    """`value`, whose gradient is that of `gradient`."""
    return (value - gradient).detach() + gradient


def lsq(v, s, bits, weights):
    """LSQ (arXiv 1902.08153), equations 1 to 3 and its section 2.2: values of v on the step s."""
    highest = ref.levels(bits)
    g = (weights * highest) ** -0.5
    s = passing(s, s * g)
    clipped = torch.clamp(v / s, -highest - 1, highest)
    return passing(clipped.round(), clipped) * s


def pact(x, alpha, levels):
    """PACT (arXiv 1805.06085), equations 1 to 3, for x >= 0 on so many levels above 0."""
    y = 0.5 * (x.abs() - (x - alpha).abs() + alpha)
    return passing((y * levels / alpha).round() * alpha / levels, y)


def double(tensor):
    return tensor.detach().double().requires_grad_()


def weights_on(step, bits, *shape, seed=0, beyond=1.3):
    """Float32 weights that are away from ties on the step [..., 1], some of them clamped."""
    random = torch.Generator().manual_seed(seed)
    reach = (ref.levels(bits) + 1) * beyond
    codes = ((torch.rand(shape, generator=random) * 2 - 1) * reach).round()
    return ((codes + (torch.rand(shape, generator=random) - 0.5) * 0.8) * step).float()


def check(found, expected, tolerance=1e-5):
    torch.testing.assert_close(found.double(), expected.detach(), rtol=tolerance, atol=tolerance)


# ---- LSQ


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


def far(parameter, value=-100.0):
    with torch.no_grad():
        parameter.fill_(value)


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


# ---- training


def config_of(bits=4, ranks=0, l2=0.0, **training):
    config = replace(tiny(optimizer="adagrad", **training), quantization=QATConfig(bits, quantizer="lsq"))
    return replace(
        config,
        optimizer=replace(config.optimizer, learning_rate=0.02, mlp_l2=l2, scale_rate_factor=0.5),
        exchange=dqrm.ExchangeConfig(simulate_ranks=ranks),
    )


def test_scales_are_a_group_of_the_optimizer_without_l2_at_their_own_rate():
    config = config_of(l2=0.1)
    model = dqrm.DLRM(3, [50, 40], config=config.model, qat=config.quantization)
    step = TrainStep(model.train(), config)
    mlp, scales = step.optimizers[1].param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    owned = [{names[id(parameter)] for parameter in group["params"]} for group in (mlp, scales)]
    learned_names = {name for name in names.values() if name.endswith("scale")}
    assert owned[1] == learned_names
    assert len(learned_names) == 5  # of the tables and of four layers
    assert owned[0] == set(names.values()) - learned_names - {"tables.weight"}
    assert (mlp["weight_decay"], scales["weight_decay"]) == (0.1, 0)
    batch = dqrm.Batch(torch.randn(4, 3), torch.tensor([[1, 2], [3, 2], [1, 0], [7, 9]]), (), torch.ones(4))
    step(batch, 0.25)
    assert (mlp["lr"], scales["lr"]) == (0.25, 0.125)
    before = model.tables.current_scale().clone()
    step(batch, 0.0)
    assert torch.equal(model.tables.current_scale(), before)


def test_without_learned_values_the_optimizer_is_as_before():
    model = dqrm.DLRM(3, [50], qat=QATConfig(4))
    others = [parameter for parameter in model.parameters() if parameter is not model.tables.weight]
    found = parameter_groups(model, others, OptimizerConfig())
    assert len(found) == len(others)
    assert all(one is two for one, two in zip(found, others))


def test_redrawn_tables_start_their_step_again_and_others_go_on(generated, tmp_path):
    config = config_of(epochs=2, callbacks=("redraw_tables:min_rows=30",))
    seen = {}

    class Look(dqrm.Callback):
        """After redraw_tables."""

        def on_epoch_start(self, trainer):
            tables = trainer.model.tables
            seen[trainer.state.epoch] = (
                tables.current_scale().clone(),
                trainer.optimizers[1].state[tables.weight_fake_quantizer.scale]["sum"].clone(),
                [tables.table(number).double().abs().mean() for number in range(len(tables.table_rows))],
            )

    class Before(Look):
        def on_evaluation(self, trainer, metrics):
            seen["end"] = trainer.model.tables.current_scale().clone()

    dqrm.train(generated, tmp_path / "run", config, callbacks=[Before()])
    large = torch.tensor([rows >= 30 for rows in generated.table_rows])
    assert large.any()
    assert not large.all()
    scale, sums, means = seen[1]
    expected = 2 * torch.stack(means) / 7**0.5
    torch.testing.assert_close(scale.double()[large], expected[large], rtol=1e-6, atol=0)
    assert (sums[large] == 0).all()
    assert (sums[~large] > 0).any()
    assert not torch.isclose(scale.double()[~large], expected[~large]).all()


def test_the_scales_that_go_on_are_those_of_the_last_evaluation():
    tables, steps = collection(4)
    tables(torch.zeros(1, 3, dtype=torch.int64))
    far(tables.weight_fake_quantizer.scale)
    tables.tables_redrawn([0])
    scale = tables.weight_fake_quantizer.scale.detach()
    assert torch.equal(scale[1:], steps[1:] / 2)
    expected = 2 * tables.table(0).double().abs().mean() / 7**0.5
    assert float(scale[0]) == pytest.approx(float(expected), rel=1e-6)


class Killed(Exception):
    pass


@pytest.mark.parametrize(("ranks", "bits"), [(0, 4), (2, 4), (0, 2), pytest.param(3, 8, marks=pytest.mark.slow)])
def test_resume_is_bit_for_bit_and_the_artifact_is_the_checkpoint(generated, tmp_path, ranks, bits):
    callbacks = ("redraw_tables:min_rows=30",)
    config = config_of(bits, ranks, checkpoint_every=4, epochs=2, max_steps=34, callbacks=callbacks)
    dqrm.train(generated, tmp_path / "whole", config)
    calls = iter(range(1000))

    def progress(*_):
        if next(calls) == 14:
            raise Killed

    with pytest.raises(Killed):
        dqrm.train(generated, tmp_path / "cut", config, progress=progress)
    dqrm.resume(tmp_path / "cut")
    one, two = (tensors(dqrm.Run.open(tmp_path / name).checkpoints / "step-000000034") for name in ("whole", "cut"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    model, _ = dqrm.Run.open(tmp_path / "whole").load_model("last")
    scale = model.tables.scale.detach().clone()
    found = dqrm.export_run(tmp_path / "whole", tmp_path / "model.dqrm", dqrm.ExportConfig(checkpoint="last"))
    assert found["largest_difference"] == 0
    served = dqrm.load(tmp_path / "model.dqrm")
    assert torch.equal(served.tables.scale, scale)
    figures = [dqrm.evaluate(each, generated, "test") for each in (served, model)]
    assert figures[0]["auc"] == pytest.approx(figures[1]["auc"], abs=1e-6)
    assert figures[0]["log_loss"] == pytest.approx(figures[1]["log_loss"], abs=1e-6)


def test_averages_of_scales_and_evaluations_leave_training_as_it_is(generated, tmp_path):
    """`ema` puts averages in the place of scales to evaluate and to save; the next update is held to training's."""
    plain = config_of(max_steps=20, eval_every=5)
    plain = replace(plain, optimizer=replace(plain.optimizer, scale_rate_factor=30.0))  # scales that leap
    with_average = replace(plain, training=replace(plain.training, callbacks=("ema:decay=0.9",)))
    rare = replace(with_average, training=replace(with_average.training, eval_every=0))
    found = {}

    class Last(dqrm.Callback):
        def on_step_end(self, trainer, loss):
            scales = [v.detach().clone() for n, v in trainer.model.named_parameters() if n.endswith("quantizer.scale")]
            assert all((scale > 0).all() for scale in scales)
            found[trainer.config, trainer.state.step] = torch.cat(scales)

    for name, config in (("plain", plain), ("average", with_average), ("rare", rare)):
        dqrm.train(generated, tmp_path / name, config, callbacks=[Last()])
    ends = [each for (_, step), each in found.items() if step == 20]
    assert len(ends) == 3
    assert torch.equal(ends[0], ends[1])
    assert torch.equal(ends[0], ends[2])


# ---- PACT


@BITS
@pytest.mark.parametrize("shape", [(7, 5), (1, 1), (0, 3), (4, 3, 2)])
def test_pact_has_the_papers_values_and_gradients(bits, shape):
    """For inputs of at least 0, on the levels of signed codes."""
    alpha, levels = 1.7, ref.levels(bits)
    x = weights_on(alpha / levels, bits, *shape, seed=bits).abs()
    module = PACT(bits)
    far(module.maximum, alpha)
    x.requires_grad_()
    out = module(x)
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    (out * grad).sum().backward()
    wide, a = double(x), double(torch.tensor(alpha))
    expected = pact(wide, a, levels)
    (expected * grad).sum().backward()
    check(out, expected)
    check(x.grad, wide.grad)
    if out.numel():
        check(module.maximum.grad, a.grad, 1e-4)


def test_pact_below_0_clips_at_the_lowest_code():
    module = PACT(4)
    far(module.maximum, 0.7)
    x = torch.tensor([-5.0, -0.8, -0.33, 0.7, 9.0], requires_grad=True)
    out = module(x)
    torch.testing.assert_close(out, torch.tensor([-0.8, -0.8, -0.3, 0.7, 0.7]))
    out.backward(torch.tensor([1.0, 10.0, 100.0, 1000.0, 10000.0]))
    assert x.grad.tolist() == [0, 0, 100, 0, 0]
    assert module.maximum.grad.item() == pytest.approx(11000 - 11 * 8 / 7)


def test_alpha_starts_from_the_first_batch_that_has_one_and_stays_above_0():
    module = PACT(8)
    assert torch.equal(module(torch.zeros(3, 2)), torch.zeros(3, 2))
    assert module(torch.zeros(0, 2)).shape == (0, 2)
    with pytest.raises(ValueError, match="their range is unknown before a training step"):
        module.scale()
    torch.testing.assert_close(module.eval()(torch.tensor([2.0])), torch.tensor([2.0]))  # of this batch, not kept
    assert module.maximum == 0
    module.train()(torch.tensor([-3.0, 1.0]))
    assert module.maximum == 3
    module(torch.tensor([50.0]))
    assert module.maximum == 3  # learned from here on
    far(module.maximum)
    assert module.scale() == pytest.approx(1.5 / 127)
    far(module.maximum)
    assert module.state_dict()["maximum"] == 1.5
    assert copy.deepcopy(module).double().maximum.dtype == torch.float32


def test_a_layer_with_pact_trains_saves_and_packs():
    torch.manual_seed(0)
    options = {"activation_bits": 4, "activation_quantizer": "pact", "quantizer": "lsq"}
    model = QuantMLP(QuantLinear(6, 8, **options), nn.ReLU(), QuantLinear(8, 2, **options))
    parameters = dict(model.named_parameters())
    assert {name for name in parameters if "activation" in name} == {
        "0.activation_fake_quantizer.maximum", "2.activation_fake_quantizer.maximum",
    }  # fmt: skip
    optimizer = torch.optim.SGD(parameters.values(), 0.05)
    x, y = torch.randn(40, 6), torch.randn(40, 2)
    starts = []
    for _ in range(30):
        loss = (model(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        starts.append(model[2].activation_max.item())
    assert len(set(starts)) > 10  # alpha learns
    other = QuantMLP(QuantLinear(6, 8, **options), nn.ReLU(), QuantLinear(8, 2, **options))
    other.load_state_dict(model.state_dict())
    expected = model.eval()(x)
    assert torch.equal(other.eval()(x), expected)
    assert torch.equal(dqrm.convert(model)(x), expected)
    other.load_state_dict({name: value for name, value in other.state_dict().items() if "fake" not in name})
    assert other[0].activation_max == 0  # an unquantized model's weights: the range starts again


def test_ranges_of_before_there_was_a_child_load():
    layer, other = QuantLinear(3, 2, activation_bits=8), QuantLinear(3, 2, activation_bits=8)
    layer(torch.tensor([[5.0, -1.0, 0.0]]))
    new, old = "activation_fake_quantizer.maximum", "activation_max"
    state = {name.replace(new, old): value for name, value in layer.state_dict().items()}
    assert "activation_max" in state
    other.load_state_dict(state)
    assert other.activation_max == 5


@pytest.mark.parametrize(("pact_l2", "expected"), [(None, 0.3), (0.0, 0.0), (0.7, 0.7)])
def test_clipping_values_have_the_l2_of_the_weights_or_their_own(pact_l2, expected):
    config = replace(
        tiny(), quantization=QATConfig(4, activation_bits=8, activation_quantizer="pact"),
        optimizer=OptimizerConfig(mlp_l2=0.3, pact_l2=pact_l2),
    )  # fmt: skip
    step = TrainStep(dqrm.DLRM(3, [9], config=config.model, qat=config.quantization).train(), config)
    mlp, clips = step.optimizers[1].param_groups
    assert (mlp["weight_decay"], clips["weight_decay"]) == (0.3, expected)
    assert len(clips["params"]) == 4


def test_pact_resumes_bit_for_bit_and_is_exported(generated, tmp_path):
    qat = QATConfig(4, activation_bits=8, activation_quantizer="pact")
    config = replace(tiny(max_steps=12, checkpoint_every=4), quantization=qat)
    dqrm.train(generated, tmp_path / "whole", config)
    calls = iter(range(100))

    def progress(*_):
        if next(calls) == 6:
            raise Killed

    with pytest.raises(Killed):
        dqrm.train(generated, tmp_path / "cut", config, progress=progress)
    dqrm.resume(tmp_path / "cut")
    one, two = (tensors(dqrm.Run.open(tmp_path / name).checkpoints / "step-000000012") for name in ("whole", "cut"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert dqrm.export_run(tmp_path / "whole", tmp_path / "model.dqrm")["largest_difference"] == 0


class Fixed(ActivationFakeQuantizer):
    """A range that is known from the start."""

    def __init__(self, bits):
        super().__init__(bits)
        self.register_buffer("maximum", torch.tensor(2.0))

    def forward(self, x):
        return dqrm.fake_quantize(x, self.scale(), self.bits)


def test_an_activation_quantizer_from_outside_trains_and_packs(generated, tmp_path, monkeypatch):
    monkeypatch.setitem(ACTIVATION_QUANTIZERS, "fixed", Fixed)
    qat = QATConfig(4, activation_bits=8, activation_quantizer="fixed")
    dqrm.train(generated, tmp_path / "run", replace(tiny(max_steps=3), quantization=qat))
    assert dqrm.export_run(tmp_path / "run", tmp_path / "model.dqrm")["largest_difference"] == 0
    served = dqrm.load(tmp_path / "model.dqrm")
    assert served.top[0].activation_scale == torch.tensor(2.0) / 127


def test_info_says_which_quantizers_a_run_was_trained_with(generated, tmp_path, capsys):
    for name, qat, expected in (
        ("max", QATConfig(4), "Tables 4 bits, MLP 4 bits:"),
        ("lsq", QATConfig(4, mlp_bits=8, quantizer="lsq"), "Tables 4 bits, MLP 8 bits (quantizer lsq):"),
        (
            "pact",
            QATConfig(2, activation_bits=8, activation_quantizer="pact"),
            "Tables 2 bits, MLP 2 bits (inputs of layers 8 bits, pact):",
        ),
    ):
        dqrm.train(generated, tmp_path / name, replace(tiny(max_steps=2), quantization=qat))
        print_description(str(tmp_path / name))
        assert expected in " ".join(capsys.readouterr().out.split())


def test_tables_of_several_bits_are_refused():
    qat = QATConfig(4, quantizer="lsq", small_table_bits=8, small_table_rows=20)
    with pytest.raises(ValueError, match="small_table_bits is 8, but the quantizer 'lsq' needs"):
        QuantEmbeddingBagCollection(ROWS, DIM, qat=qat)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: QATConfig(activation_quantizer="pactt"), "activation_quantizer is 'pactt', expected 'running_max' or"),
        (lambda: OptimizerConfig(scale_rate_factor=-1), "scale_rate_factor is -1.0, expected 0 or more"),
        (lambda: OptimizerConfig(pact_l2=-0.5), "pact_l2 is -0.5, expected 0 or more"),
    ],
)
def test_impossible_values_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
