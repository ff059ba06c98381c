"""QATConfig: defaults, frozen, and every wrong value refused with its name."""

import dataclasses

import pytest

from dqrm.quant.config import QATConfig

DEFAULTS = {
    "bits": 4,
    "quantizer": "max",
    "scale_period": None,
    "scale_refresh": "running_max",
    "rescan_period": 10_000,
    "linear_granularity": "channel",
    "bias_bits": 32,
    "activation_bits": 32,
    "activation_quantizer": "running_max",
    "table_granularity": "table",
    "table_qscheme": "symmetric",
}
BITS_FIELDS = ["bits", "table_bits", "mlp_bits", "small_table_bits", "bias_bits", "activation_bits"]


def test_defaults():
    config = QATConfig()
    assert {name: getattr(config, name) for name in DEFAULTS} == DEFAULTS


def test_the_fields_are_these_and_no_others():
    assert {field.name for field in dataclasses.fields(QATConfig)} == {
        *DEFAULTS, "table_bits", "mlp_bits", "small_table_bits", "small_table_rows", "forward_rounding", "percentile",
    }  # fmt: skip


@pytest.mark.parametrize("name", BITS_FIELDS)
@pytest.mark.parametrize("bits", [2, 4, 8, 16, 32])
def test_every_width_is_accepted(name, bits):
    assert getattr(QATConfig(**{name: bits}), name) == bits


def test_it_is_frozen():
    config = QATConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.bits = 8


def test_equal_values_are_equal_and_hash_alike():
    assert QATConfig(bits=8) == QATConfig(bits=8)
    assert hash(QATConfig(bits=8)) == hash(QATConfig(bits=8))
    assert QATConfig(bits=8) != QATConfig(bits=4)


def test_a_period_alone_says_periodic():
    """As in a configuration of before running_max was the default."""
    assert QATConfig(scale_period=200) == QATConfig(scale_refresh="periodic")
    assert QATConfig(scale_period=200).rescan_period is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"scale_refresh": "running_max", "scale_period": 7}, "scale_period is 7, but scale_refresh is 'running_max'"),
        ({"scale_refresh": "periodic", "rescan_period": 9}, "rescan_period is 9, but scale_refresh is 'periodic'"),
        ({"scale_period": 7, "rescan_period": 9}, "rescan_period is 9, but scale_refresh is 'periodic'"),
        ({"quantizer": "mse", "rescan_period": 9}, "use scale_refresh 'running_max', or leave rescan_period out"),
    ],
)
def test_a_period_of_the_other_rule_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        QATConfig(**given)


@pytest.mark.parametrize(
    ("given", "period"),
    [
        ({}, 10_000), ({"rescan_period": 9}, 9), ({"scale_period": 7}, 7), ({"scale_refresh": "periodic"}, 200),
        ({"quantizer": "mse"}, 200), ({"quantizer": "mse", "scale_refresh": "running_max"}, 10_000),
    ],
)  # fmt: skip
def test_what_is_resolved_can_be_replaced_and_given_again(given, period):
    config = QATConfig(**given)
    assert config.refresh_period == period
    assert dataclasses.replace(config, bits=8).refresh_period == period
    assert QATConfig(**dataclasses.asdict(config)) == config


def test_replace_works():
    assert dataclasses.replace(QATConfig(bits=8, scale_period=3), scale_period=7).scale_period == 7
    with pytest.raises(ValueError, match="scale_period is 7, but scale_refresh is 'running_max'"):
        dataclasses.replace(QATConfig(bits=8), scale_period=7)


@pytest.mark.parametrize("name", BITS_FIELDS)
@pytest.mark.parametrize("value", [0, 1, 3, 6, 64, -4])
def test_wrong_bits_are_refused_by_name_and_value(name, value):
    with pytest.raises(ValueError, match=rf"{name}.*(?<!\d){value}(?!\d)|(?<!\d){value}(?!\d).*{name}"):
        QATConfig(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("bits", "four"),
        ("scale_period", 0),
        ("scale_period", -1),
        ("scale_period", 2.5),
        ("rescan_period", True),
        ("linear_granularity", "row"),
        ("linear_granularity", ""),
        ("linear_granularity", None),
    ],
)
def test_wrong_values_are_refused_by_name_and_value(name, value):
    with pytest.raises(ValueError, match=name) as error:
        QATConfig(**{name: value})
    assert str(value) in str(error.value)


@pytest.mark.parametrize("mlp", [{"mlp_bits": 32}, {"bits": 32}])
def test_quantized_biases_need_quantized_weights(mlp):
    """A bias is quantized on its weight row's scale: refused here, before any layer is touched."""
    with pytest.raises(ValueError, match="bias_bits"):
        QATConfig(bias_bits=8, **mlp)
