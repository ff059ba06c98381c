"""The generated click log: its layout, its determinism, and that its probabilities are those of its clicks."""

import re
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from dqrm.data.synthetic import BLOCK, COLUMNS, DENSE, ENTITIES, PAIRS, generate, truth_path
from dqrm.data.synthetic_config import GenerateConfig
from dqrm.errors import UserError
from dqrm.options import field_help


def read(path: Path) -> list[list[str]]:
    lines = path.read_text(encoding="ascii").split("\n")
    assert lines.pop() == "", "the last line must end"
    return [line.split("\t") for line in lines]


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory):
    """A log of two blocks and a bit, its fields by column, its labels and its true probabilities."""
    result = generate(tmp_path_factory.mktemp("log") / "clicks.txt", GenerateConfig(rows=2 * BLOCK + 100, seed=3))
    fields = list(zip(*read(result.path)))
    return result, fields, np.array(fields[0], dtype=np.int64), np.load(result.truth)


def test_layout(log):
    result, fields, labels, _ = log
    assert len(fields) == 40
    assert len(labels) == result.rows == 2 * BLOCK + 100
    assert set(fields[0]) == {"0", "1"}
    integer, category = re.compile(r"|0|-?[1-9][0-9]*"), re.compile(r"|[0-9a-f]{8}")
    for number in range(1, 14):
        assert all(integer.fullmatch(field) for field in fields[number]), number
    for number in range(14, 40):
        assert all(category.fullmatch(field) for field in fields[number]), number


def test_clicks_and_truth(log):
    result, _, labels, truth = log
    assert truth.dtype == np.float32
    assert truth.shape == (result.rows,)
    assert result.clicks == labels.sum()
    assert labels.mean() == pytest.approx(0.25, abs=0.015)
    assert truth.mean() == pytest.approx(labels.mean(), abs=0.01)
    assert roc_auc_score(labels, truth) > 0.75
    # Calibrated where it is low as where it is high, so the lines of both files are the same ones.
    order = np.argsort(truth)
    for tenth in np.array_split(order, 10):
        assert labels[tenth].mean() == pytest.approx(truth[tenth].mean(), abs=0.035)


def test_missing_and_negative_values(log):
    _, fields, _, _ = log
    missing = [np.mean([field == "" for field in column]) for column in fields[1:]]
    declared = [column.missing for column in (*DENSE, *COLUMNS)]
    np.testing.assert_allclose(missing, declared, atol=0.02)
    assert max(missing) < 1
    assert any(field.startswith("-") for column in fields[1:14] for field in column)


def test_cardinalities_go_from_a_handful_to_a_good_fraction_of_the_lines(log):
    result, fields, _, _ = log
    distinct = sorted(len(set(column)) for column in fields[14:])
    assert distinct[0] < 10
    assert sum(number > 0.2 * result.rows for number in distinct) >= 4
    # A heavy head: the most frequent id of a very large column is far above the mean, and most ids are rare.
    largest = max(fields[14:], key=lambda column: len(set(column)))
    counts = np.unique([field for field in largest if field], return_counts=True)[1]
    assert counts.max() > 20 * counts.mean()
    assert np.median(counts) <= 2


def test_the_seed_decides_every_byte(tmp_path):
    def written(name: str, seed: int) -> tuple[bytes, bytes]:
        result = generate(tmp_path / name, GenerateConfig(rows=500, seed=seed))
        return result.path.read_bytes(), result.truth.read_bytes()

    first = written("a.txt", 5)
    assert written("b.txt", 5) == first
    other = written("c.txt", 6)
    assert other[0] != first[0]
    assert other[1] != first[1]


def test_the_chunk_size_does_not_change_the_result(tmp_path):
    config = GenerateConfig(rows=2 * BLOCK + 7, seed=2)
    told: list[tuple] = []
    small = generate(tmp_path / "small.txt", config, chunk_rows=1, progress=lambda *step: told.append(step))
    large = generate(tmp_path / "large.txt", config, chunk_rows=10**9)
    assert small.path.read_bytes() == large.path.read_bytes()
    assert small.truth.read_bytes() == large.truth.read_bytes()
    assert small.clicks == large.clicks
    assert [done for _, done, _ in told] == [BLOCK, 2 * BLOCK, config.rows]
    assert {(stage, total) for stage, _, total in told} == {("generating", config.rows)}


@pytest.mark.parametrize("rows", [1, 2, 200])
def test_few_rows(tmp_path, rows):
    result = generate(tmp_path / "few.txt", GenerateConfig(rows=rows))
    assert len(read(result.path)) == rows
    assert np.load(truth_path(result.path)).shape == (rows,)


def test_options_are_obeyed(tmp_path):
    result = generate(tmp_path / "log.txt", GenerateConfig(rows=5000, click_rate=0.05, missing=0))
    assert result.clicks / result.rows == pytest.approx(0.05, abs=0.015)
    assert all(field for line in read(result.path) for field in line)


def test_nothing_partial_is_left(tmp_path):
    def interrupt(*_) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(tmp_path / "log.txt", GenerateConfig(rows=300), progress=interrupt)
    assert list(tmp_path.iterdir()) == []
    generate(tmp_path / "log.txt", GenerateConfig(rows=300))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["log.truth.npy", "log.txt"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rows": 0}, "rows: got 0"),
        ({"seed": -1}, "seed: got -1"),
        ({"click_rate": 0.0}, "click_rate: got 0.0"),
        ({"click_rate": float("nan")}, "click_rate: got nan"),
        ({"missing": 2.0}, "missing: got 2.0"),
    ],
)
def test_a_bad_configuration_is_refused(values, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        GenerateConfig(**values)


def test_a_path_that_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot write"):
        generate(tmp_path / "absent" / "log.txt", GenerateConfig(rows=10))
    with pytest.raises(UserError, match="is a folder, expected"):
        generate(tmp_path, GenerateConfig(rows=10))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"):
        generate(tmp_path / "file" / "log.txt", GenerateConfig(rows=10))
    with pytest.raises(UserError, match="chunk_rows: got 0"):
        generate(tmp_path / "log.txt", GenerateConfig(rows=10), chunk_rows=0)


def test_every_option_has_help_and_the_tables_are_whole():
    assert set(field_help(GenerateConfig)) == set(GenerateConfig.__dataclass_fields__)
    assert len(COLUMNS) == 26
    assert len(DENSE) == 13
    assert {name for column in COLUMNS for name in column.of} <= set(ENTITIES)
    assert all(0 <= index < 26 for a, b, _ in PAIRS for index in (a, b))
