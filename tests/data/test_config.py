"""The configuration of prepare: what it refuses, and that help needs neither torch nor polars."""

import subprocess
import sys

import pytest

from dqrm.data.config import PrepareConfig
from dqrm.options import field_help, field_types


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"categorical": ("a",), "dense": ("a",)}, "column a is in both dense and categorical"),
        ({"categorical": ("a", "a")}, "categorical names a twice"),
        ({"categorical": ("label",)}, "column label is the label"),
        ({"multi": ("a",)}, "multi has a, expected a column that is also in categorical"),
        ({"cross": ("a",)}, "cross is 'a', expected two or more"),
        ({"cross": ("a*a",)}, "cross is 'a\\*a', expected two or more different"),
        ({"cross": ("a*",)}, "cross is 'a\\*', expected two"),
        ({"cross": ("a*b", "b*a")}, "cross names a\\*b twice"),
        ({"cross": ("a*label",)}, "label is the label"),
        ({"categorical": ("a", "b"), "multi": ("a",), "cross": ("a*b",)}, "a is a multi column"),
        ({"layout": "criteo-kaggle", "categorical": ("a",)}, "categorical is for layout table"),
        ({"layout": "criteo-kaggle", "label": "click"}, "label is for layout table"),
        ({"validation_fraction": 1.0}, "validation_fraction is 1.0"),
        ({"test_fraction": float("nan")}, "test_fraction is nan"),
        ({"validation_fraction": 0.5, "test_fraction": 0.5}, "leaves rows for training"),
        ({"split": "column"}, "split is column and split_column is None"),
        ({"split_column": "day"}, "split is random and split_column is day"),
        ({"split": "column", "split_column": "day"}, "needs validation_values or test_values"),
        ({"test_values": ("1",)}, "are for a split by column or file"),
        (
            {"split": "file", "test_values": ("1",), "validation_values": ("1",)},
            "'1' is in both validation_values and test_values",
        ),
        ({"min_count": 0}, "min_count is 0"),
        ({"max_rows_per_table": 0}, "max_rows_per_table is 0"),
        ({"subsample_negatives": 1.0}, "subsample_negatives is 1.0"),
        ({"seed": -1}, "seed is -1"),
        ({"chunk_rows": 0}, "chunk_rows is 0"),
        ({"delimiter": ",,"}, "delimiter is ',,'"),
        ({"delimiter": r"\t"}, r"in a shell a tab is \$'\\t'$"),
        ({"multi_separator": ""}, "multi_separator is empty"),
        ({"layout": "foo"}, "layout: got 'foo', expected one of criteo-kaggle, criteo-terabyte, table"),
        ({"split": "foo"}, "split: got 'foo', expected one of time, file, column, random"),
        ({"vocabulary": None}, "vocabulary: got None, expected one of train, all"),
        ({"on_error": "go"}, "on_error: got 'go', expected one of stop, skip"),
        ({"dense_transform": "log"}, "dense_transform: got 'log', expected one of log1p, none"),
        ({"min_count": "many"}, "min_count: got 'many', expected a whole number"),
        ({"categorical": 3}, "categorical: got 3, expected a list"),
    ],
)
def test_impossible_configurations(fields, reason):
    with pytest.raises(ValueError, match=reason):
        PrepareConfig(**fields)


def test_every_field_has_help():
    assert set(field_help(PrepareConfig)) == set(field_types(PrepareConfig))


def test_the_configuration_is_quick_to_import():
    code = "import sys, dqrm.data.config; print([m for m in ('torch', 'polars', 'numpy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_one_name_and_a_list_are_taken_as_yaml_takes_them():
    config = PrepareConfig(categorical="user", dense=["price"], min_count="3")
    assert (config.categorical, config.dense, config.min_count) == (("user",), ("price",), 3)
