"""The configuration: one set of names for Python, YAML and flags; what is impossible is refused with a sentence."""

import json
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from dqrm import recipe
from dqrm.config import SECTIONS, Config, ExchangeConfig, ModelConfig, OptimizerConfig, TrainingConfig
from dqrm.data.config import PrepareConfig
from dqrm.data.synthetic_config import GenerateConfig
from dqrm.errors import UserError
from dqrm.options import coerce, field_help, field_types
from dqrm.quant.config import QATConfig
from dqrm.training.callbacks import EMA


@pytest.mark.parametrize("cls", [*SECTIONS.values(), PrepareConfig, GenerateConfig])
def test_every_field_has_one_sentence_of_help(cls):
    helps = field_help(cls)
    for field in fields(cls):
        assert helps.get(field.name), f"{cls.__name__}.{field.name} has no help"
        assert helps[field.name].endswith(".")


def test_field_names_are_unique_over_all_sections_so_that_flags_are():
    names = [name for cls in SECTIONS.values() for name in field_types(cls)]
    assert len(names) == len(set(names))


def test_defaults_are_the_recipe_in_int4():
    config = Config()
    assert config.model == ModelConfig(16, (512, 256, 64, 16), (512, 256, 1), "dot", False, "sum")
    bits = config.quantization
    assert (bits.effective_table_bits, bits.effective_mlp_bits) == (4, recipe.MLP_BITS)
    assert (bits.small_table_bits, bits.small_table_rows) == (recipe.SMALL_TABLE_BITS, 10_000)
    assert (config.quantization.quantizer, config.quantization.scale_refresh) == ("max", "running_max")
    assert (config.optimizer.optimizer, config.optimizer.rate) == (recipe.OPTIMIZER, 0.001)
    assert config.training.callbacks == recipe.CALLBACKS
    assert (config.training.epochs, config.training.batch_size, config.training.patience) == (0, 0, recipe.PATIENCE)


@pytest.mark.parametrize(
    ("given", "wanted"),  # wanted: bits of large tables, of small ones, of the MLP
    [
        ({}, (4, 8, 8)), ({"scale_period": 200}, (4, 8, 8)), ({"bits": 4}, (4, 4, 4)), ({"bits": 32}, (32, 32, 32)),
        ({"mlp_bits": 4}, (4, 8, 4)), ({"table_bits": 2}, (2, 2, 8)), ({"quantizer": "lsq"}, (4, 4, 8)),
        ({"small_table_bits": 16}, (4, 16, 8)), ({"bits": 2, "mlp_bits": 8}, (2, 2, 8)),
    ],
)  # fmt: skip
def test_bits_that_are_set_replace_those_of_the_recipe(given, wanted, tmp_path):
    (tmp_path / "c.yaml").write_text(json.dumps({"quantization": given}))
    for config in (
        Config.load(None, given), Config.load(tmp_path / "c.yaml"), Config.from_dict({"quantization": given}),
    ):  # fmt: skip
        bits = config.quantization
        assert (bits.bits_of_table(10_000), bits.bits_of_table(9_999), bits.effective_mlp_bits) == wanted
        assert Config.from_dict(config.to_dict()) == config


@pytest.mark.parametrize("batch", [1, 64, 255, 256, 1024, 2047, 2048, 10**6])
def test_the_learning_rate_follows_optimizer_and_batch_size(batch):
    rates = {name: recipe.learning_rate(name, batch) for name in ("sgd", "adagrad", "rowwise_adagrad", "your_own")}
    adaptive = 0.01 if batch < 256 else 0.02 if batch < 2048 else 0.03
    assert rates == {"sgd": 0.1, "adagrad": adaptive, "rowwise_adagrad": adaptive, "your_own": 0.01}
    assert recipe.learning_rate("dense_adam", batch) == (0.0003 if batch < 256 else 0.0005 if batch < 1024 else 0.001)
    for rate in (0, 0.3):
        assert OptimizerConfig("adagrad", rate).rate == rate
    assert Config.load(None, {"learning_rate": "none"}).optimizer.learning_rate is None
    assert (OptimizerConfig("sgd").rate, OptimizerConfig("adagrad").rate) == (0.1, 0.03)


def test_the_batch_size_rises_with_the_rows():
    sizes = [recipe.batch_size(rows, "adagrad") for rows in (0, 1, 8_000, 100_000, 720_000, 40_000_000)]
    assert sizes == sorted(sizes)
    assert {size for _, size in recipe.BATCH_SIZES} >= set(sizes)
    for least, size in recipe.BATCH_SIZES:
        assert recipe.batch_size(least, "adagrad") == size
        assert recipe.batch_size(least, "dense_adam") == min(size, 1024)
        assert least == 0 or recipe.batch_size(least - 1, "adagrad") < size


def test_dictionary_round_trip():
    config = Config(ModelConfig(embedding_dim=8, bottom_mlp=(8,)), QATConfig(table_bits=2), OptimizerConfig("adagrad"))
    assert Config.from_dict(config.to_dict()) == config


def test_file_then_flags(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(
        "model: {embedding_dim: 8, bottom_mlp: [32, 8]}\n"
        "quantization:\n  table_bits: 8\n"
        "optimizer:\n  learning_rate: 1e-3\n"
    )
    config = Config.load(file, {"top_mlp": "16-1", "epochs": "3"})
    assert (config.model.embedding_dim, config.model.bottom_mlp, config.model.top_mlp) == (8, (32, 8), (16, 1))
    assert config.optimizer.learning_rate == 0.001  # YAML 1.1 reads 1e-3 as text
    assert config.training.epochs == 3
    assert config.quantization.effective_table_bits == 8


def test_the_flag_bits_overrides_the_files_table_bits(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("quantization:\n  table_bits: 8\n")
    assert Config.load(file, {"bits": "2"}).quantization.effective_table_bits == 2
    assert Config.load(file, {"bits": "2", "table_bits": "16"}).quantization.effective_table_bits == 16


@pytest.mark.parametrize("callbacks", [(EMA(),), ["ema", EMA]])
def test_callbacks_of_a_configuration_are_names(callbacks):
    with pytest.raises(
        ValueError, match=r"^callbacks: got .*EMA.*, expected names; `dqrm.train\(callbacks=\[\.\.\.\]\)`"
    ):
        TrainingConfig(callbacks=callbacks)


@pytest.mark.parametrize("value", [object(), torch.optim.SGD, {}, (), None, b"sgd", lambda: 0, torch.zeros(1)])
def test_what_has_no_text_of_its_own_is_no_text(value):
    with pytest.raises(UserError, match=r"^field: got .*, expected text$"):
        coerce("field", value, str)
    assert coerce("field", torch.device("cpu"), str) == "cpu"
    assert coerce("field", Path("data"), str) == "data"


@pytest.mark.parametrize(("in_file", "overrides", "periods"), [
    ({"scale_period": 5}, {"scale_refresh": "running_max"}, (None, 10_000)),
    ({"scale_period": 5}, {"scale_refresh": "periodic"}, (5, None)),
    ({"scale_period": 5}, {"scale_refresh": "running_max", "rescan_period": "9"}, (None, 9)),
    ({"rescan_period": 9}, {"scale_refresh": "periodic", "bits": "8"}, (200, None)),
    ({"rescan_period": 9}, {"scale_refresh": "none"}, (None, 9)),
])  # fmt: skip
def test_the_flag_scale_refresh_leaves_out_the_files_period_of_the_other_rule(tmp_path, in_file, overrides, periods):
    file = tmp_path / "c.yaml"
    file.write_text(json.dumps({"quantization": in_file}))
    config = Config.load(file, overrides).quantization
    assert (config.scale_period, config.rescan_period) == periods


@pytest.mark.parametrize(("overrides", "message"), [
    ({"scale_period": "5"}, "quantization: scale_period is 5, but scale_refresh is 'running_max', which has no such"),
    ({"scale_refresh": "periodic", "rescan_period": "9"}, "rescan_period is 9, but scale_refresh is 'periodic'"),
])  # fmt: skip
def test_a_period_without_effect_is_refused(tmp_path, overrides, message):
    file = tmp_path / "c.yaml"
    file.write_text("quantization:\n  scale_refresh: running_max\n")
    with pytest.raises(UserError, match=message):
        Config.load(file, overrides)


@pytest.mark.parametrize(("overrides", "small"), [
    ({"bits": "2"}, (None, None)),
    ({"bits": "2", "small_table_bits": "16"}, (16, 50)),  # the file's rows are not lost
    ({"small_table_bits": "16"}, (16, 50)),
    ({"bits": "2", "small_table_bits": "16", "small_table_rows": "9"}, (16, 9)),
])  # fmt: skip
def test_the_flag_bits_and_the_files_small_tables(tmp_path, overrides, small):
    file = tmp_path / "c.yaml"
    file.write_text("quantization:\n  small_table_bits: 8\n  small_table_rows: 50\n")
    config = Config.load(file, overrides).quantization
    assert (config.small_table_bits, config.small_table_rows) == small


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model:\n  embeding_dim: 8\n", "unknown field 'embeding_dim'; did you mean 'embedding_dim'"),
        ("modle:\n  embedding_dim: 8\n", "unknown section 'modle'; did you mean 'model'"),
        ("model: 3\n", "section 'model' is 3"),
        ("- 1\n", "got list"),
        ("model: [\n", "is not YAML"),
        ("training:\n  batch_size: many\n", "batch_size: got 'many', expected a whole number"),
        ("training:\n  batch_size: 1.5\n", "batch_size: got 1.5, expected a whole number"),
        ("training:\n  batch_size: -1\n", "batch_size is -1, expected 0 or more"),
        ("training:\n  shuffle: random\n", "shuffle: got 'random', expected one of global, block, none"),
        ("training:\n  device: tpu\n", "device is 'tpu'"),
        ("model:\n  top_mlp: [8, 2]\n", "top_mlp ends in 2, expected 1"),
        ("model:\n  embedding_dim: 8\n  bottom_mlp: [32, 16]\n", "bottom_mlp ends in 16 but embedding_dim is 8"),
        ("model:\n  interaction: cat\n  self_interaction: true\n", "self_interaction is true"),
        ("quantization:\n  bits: 3\n", "bits is 3, expected one of 2, 4, 8, 16, 32"),
        ("optimizer:\n  learning_rate: -1\n", "learning_rate is -1.0"),
        ("optimizer:\n  learning_rate: .nan\n", "learning_rate is nan, expected a finite number, 0 or more"),
        ("optimizer:\n  plateau_factor: 0\n", "plateau_factor is 0.0"),
        ("optimizer:\n  warmup_steps: 10\n  decay_steps: 5\n", "before the end of the warm-up"),
        ("optimizer:\n  learning_rate: .inf\n", "learning_rate is inf"),
        ("training:\n  checkpoint_minutes: .inf\n", "checkpoint_minutes is inf"),
        ("training:\n  seed: 18446744073709551616\n", "expected below 2^63"),
        ("training:\n  epochs: 18446744073709551616\n", "epochs is 18446744073709551616, expected below 2^63"),
        (f"training:\n  max_steps: {10**400}\n", "expected below 2^63"),
        ("training:\n  batch_size: 4294967296\n", "batch_size is 4294967296, expected below 2^31"),
        ("model:\n  embedding_dim: 4294967296\n", "embedding_dim is 4294967296, expected below 2^31"),
        ("model:\n  top_mlp: 4294967296-1\n", "top_mlp is '4294967296-1', expected widths from 1 to below 2^31"),
        ("model:\n  bottom_mlp: [0, 16]\n", "bottom_mlp is '0-16', expected widths from 1"),
        ("training:\n  threads: 100000\n", "threads is 100000, expected 1024 or fewer"),
        ("training:\n  learning_rate: 1\n", "'learning_rate' is a field of section 'optimizer', not of 'training'"),
        ("epochs: 5\n", "'epochs' is a field of section 'training' and belongs below it"),
        ("quantization:\n  bits: 32\n  bias_bits: 8\n", "bias_bits is 8, but the MLP is not quantized"),
        ("quantization:\n  percentile: 99\n", "percentile is 99.0, but quantizer is 'max', which has none"),
        ("quantization:\n  quantizer: mse\n  percentile: 99\n", "quantizer is 'mse', which has none"),
        ("quantization:\n  activation_quantizer: pact\n", "is 'pact', but activation_bits is 32, which quantizes no"),
        ("optimizer:\n  pact_l2: 0.1\n", "pact_l2 is 0.1, but nothing is learned that it acts on; it needs activation"),
        ("optimizer:\n  pact_l2: 0.1\nquantization:\n  quantizer: lsq\n", "pact_l2 is 0.1, but nothing is learned"),
        ("optimizer:\n  scale_rate_factor: 0.5\n", "scale_rate_factor is 0.5, but nothing is learned that it acts on"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_quoted(tmp_path, text, message):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        Config.load(file)
    assert message in str(error.value)
    assert "c.yaml" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_and_an_unknown_override():
    with pytest.raises(UserError, match="cannot read the configuration no_such"):
        Config.load("no_such.yaml")
    with pytest.raises(UserError, match="did you mean 'epochs'"):
        Config.load(None, {"epoch": 3})


@pytest.mark.parametrize(
    ("value", "kind", "expected"),
    [
        ("512-256-1", tuple[int, ...], (512, 256, 1)),
        ([5, "6"], tuple[int, ...], (5, 6)),
        ("", tuple[int, ...], ()),
        ("a, b", tuple[str, ...], ("a", "b")),
        ("none", int | None, None),
        ("8", int | None, 8),
        ("on", bool, True),
        ("2", float, 2.0),
        ("9223372036854775807", int, 9223372036854775807),
        (9223372036854775807, int, 9223372036854775807),
    ],
)
def test_coerce(value, kind, expected):
    got = coerce("field", value, kind)
    assert got == expected
    assert type(got) is type(expected)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ExchangeConfig(mlp_codec="fp8"), "mlp_codec: got 'fp8', expected one of fp32"),
        (lambda: TrainingConfig(shuffle="foo"), "shuffle: got 'foo'"),
        (lambda: TrainingConfig(epochs=1.5), "epochs: got 1.5, expected a whole number"),
        (lambda: ModelConfig(embedding_dim="wide"), "embedding_dim: got 'wide'"),
    ],
)
def test_python_is_refused_as_yaml_is(make, message):
    with pytest.raises(ValueError, match=message):
        make()
    assert ModelConfig(top_mlp=[8, 1]).top_mlp == (8, 1)


def test_a_section_default_is_a_fresh_valid_object():
    for cls in SECTIONS.values():
        assert cls() == cls()


@pytest.mark.parametrize("quantization", [
    {"quantizer": "percentile", "percentile": "99"},
    {"quantizer": "lsq", "scale_rate_factor": "0.5"},
    {"activation_bits": "8", "activation_quantizer": "pact", "scale_rate_factor": "0.5", "pact_l2": "0.1"},
])  # fmt: skip
def test_options_of_quantizers_that_have_them(quantization):
    config = Config.load(None, quantization)
    assert {name: str(getattr(config.optimizer, name)) for name in quantization if hasattr(config.optimizer, name)} == {
        name: value for name, value in quantization.items() if hasattr(config.optimizer, name)
    }
