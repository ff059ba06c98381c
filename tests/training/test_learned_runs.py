"""Training with learned quantizers: their groups of the optimizer, redrawn tables, averages, resuming, packing."""

from dataclasses import replace

import pytest
import torch

import dqrm
from conftest import tiny
from dqrm.config import OptimizerConfig
from dqrm.info import print_description
from dqrm.quant.activations import ActivationFakeQuantizer
from dqrm.quant.config import ACTIVATION_QUANTIZERS, QATConfig
from dqrm.training.parameter_groups import parameter_groups
from dqrm.training.step import TrainStep
from run_helpers import assert_resumes


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


@pytest.mark.parametrize(("ranks", "bits"), [(0, 4), (2, 4), (0, 2), pytest.param(3, 8, marks=pytest.mark.slow)])
def test_resume_is_bit_for_bit_and_the_artifact_is_the_checkpoint(generated, tmp_path, ranks, bits):
    callbacks = ("redraw_tables:min_rows=30",)
    config = config_of(bits, ranks, checkpoint_every=4, epochs=2, max_steps=34, callbacks=callbacks)
    assert_resumes(generated, tmp_path, config, 15)
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
    assert_resumes(generated, tmp_path, config, 7)
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
