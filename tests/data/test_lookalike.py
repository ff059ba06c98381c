"""Logs with the table sizes of Criteo's: their layout, days, drift, and probabilities against a plain recomputation."""

import math
import re
from collections import Counter

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from cli_helpers import command
from dqrm.data import lookalike
from dqrm.data.config import PrepareConfig
from dqrm.data.lookalike import BLOCK, ORIGINALS, Lookalike
from dqrm.data.prepare import prepare
from dqrm.data.synthetic import generate
from dqrm.data.synthetic_config import GenerateConfig
from dqrm.errors import UserError

KAGGLE, TERABYTE = ORIGINALS


def config(**fields):
    return GenerateConfig(**{"rows": 2 * BLOCK + 100, "seed": 3, "like": KAGGLE, **fields})


def read(path):
    text = path.read_text(encoding="ascii")
    assert text.endswith("\n")
    return [line.split("\t") for line in text[:-1].split("\n")]


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    """A log of a Kaggle-like model in seven days, as lines of fields, and its probabilities."""
    result = generate(tmp_path_factory.mktemp("log") / "clicks.txt", config())
    return result, read(result.path), np.load(result.truth)


def hashed(seed, salt, number):
    """SplitMix64's finalizer on plain integers."""
    mixed = (number + (seed * 1_000_003 + salt) * 0x9E3779B97F4A7C15) % 2**64
    mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB % 2**64
    return mixed ^ mixed >> 31


def logit(fields, seed, original):
    """What a line's fields say, without the bias."""
    total = 0.0
    for field, spec in zip(fields[1:14], lookalike.DENSE):
        total += spec.effect * math.log1p(max(int(field), 0)) if field else 0
    vectors = {}
    for column, (field, rows) in enumerate(zip(fields[14:], original.table_rows)):
        vectors[column] = [0.0] * 4
        if field:
            uniform = (hashed(seed, 200 + column, int(field, 16)) >> 40) / 2**24
            total += (0.15 if rows > 1_000_000 else 0.3) * (uniform - 0.5) * math.sqrt(12)
            bits = hashed(seed, 300 + column, int(field, 16))
            vectors[column] = [((bits >> 16 * k) % 2**16 / 2**16 - 0.5) * math.sqrt(6) for k in range(4)]
    for a, b in original.pairs:
        total += 0.25 * sum(x * y for x, y in zip(vectors[a], vectors[b]))
    return total


def test_layout_clicks_and_truth(log):
    result, lines, truth = log
    labels = np.array([int(line[0]) for line in lines])
    assert {len(line) for line in lines} == {40}
    assert len(lines) == result.rows == len(truth) == 2 * BLOCK + 100
    assert result.clicks == labels.sum()
    integer, category = re.compile(r"|0|-?[1-9][0-9]*"), re.compile(r"|[0-9a-f]{8}")
    assert all(integer.fullmatch(field) for line in lines for field in line[1:14])
    assert all(category.fullmatch(field) for line in lines for field in line[14:])
    absent = np.array([[field == "" for field in line[1:]] for line in lines]).mean(axis=0)
    declared = [*(spec.missing for spec in lookalike.DENSE), *lookalike.MISSING]
    np.testing.assert_allclose(absent, declared, atol=0.02)
    assert labels.mean() == pytest.approx(0.25, abs=0.02)
    assert roc_auc_score(labels, truth) > 0.7
    for tenth in np.array_split(np.argsort(truth), 10):
        assert labels[tenth].mean() == pytest.approx(truth[tenth].mean(), abs=0.04)


@pytest.mark.parametrize("like", ORIGINALS)
def test_the_probability_is_what_the_fields_say(tmp_path, like):
    rows = 300
    result = generate(tmp_path / "log.txt", config(rows=rows, like=like, days=None))
    wanted = np.array([logit(line, 3, ORIGINALS[like]) for line in read(result.path)])
    truth = np.load(result.truth).astype(np.float64)
    bias = np.log(truth / (1 - truth)) - wanted
    np.testing.assert_allclose(bias, bias[0], atol=2e-4)
    assert np.std(wanted) > 0.5


def test_neither_chunks_nor_files_nor_threads_change_a_byte(tmp_path, monkeypatch):
    told = []
    whole = generate(tmp_path / "a.txt", config(days=None), chunk_rows=1, progress=lambda *step: told.append(step))
    monkeypatch.setattr("os.cpu_count", lambda: 5)
    again = generate(tmp_path / "b.txt", config(days=None), chunk_rows=10**9)
    assert whole.path.read_bytes() == again.path.read_bytes()
    assert whole.truth.read_bytes() == again.truth.read_bytes()
    assert told[-1] == ("generating", whole.rows, whole.rows)
    days = generate(tmp_path / "days", config(days=7))
    assert (days.clicks, days.rows) == (whole.clicks, whole.rows)
    logs = [tmp_path / "days" / f"day_{day}" for day in range(7)]
    assert b"".join(log.read_bytes() for log in logs) == whole.path.read_bytes()
    truths = [np.load(tmp_path / "days" / f"_day_{day}.truth.npy") for day in range(7)]
    assert np.array_equal(np.concatenate(truths), np.load(whole.truth))
    lengths = [len(truth) for truth in truths]
    assert lengths == [len(read(log)) for log in logs]
    assert sum(lengths) == whole.rows
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] - lengths[-1] <= 1


def test_a_day_of_more_than_one_block_does_not_depend_on_the_chunks(tmp_path):
    few = config(days=2, rows=5 * BLOCK)
    generate(tmp_path / "a", few, chunk_rows=1)
    generate(tmp_path / "b", few, chunk_rows=2 * BLOCK)
    for day in ("day_0", "day_1"):
        assert (tmp_path / "a" / day).read_bytes() == (tmp_path / "b" / day).read_bytes()


def test_the_seed_changes_every_column(tmp_path):
    first, second = (read(generate(tmp_path / f"{seed}.txt", config(seed=seed, rows=500)).path) for seed in (1, 2**70))
    for column in range(14, 40):
        assert {line[column] for line in first} & {line[column] for line in second} <= {""}, column


def ids_of(model, column, draws, day):
    """Ids of a large column on a day, or of the 16-bit draws of a small one."""
    known = model.columns[column]
    if known.rows > lookalike._TABLED:
        return known.ids(draws, day)
    known.make_table(day)
    return known.texts


@pytest.mark.parametrize("column", [0, 2, 10, 9])
def test_ids_change_hands_at_the_rate_of_the_drift(column):
    model = Lookalike(config(drift=0.2, days=10))
    draws = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint32)
    days = [ids_of(model, column, draws, day) for day in range(10)]
    for day in range(9):
        same = np.mean(days[day] == days[day + 1])
        # Of the places, 0.2 change hands; of the draws, more or less, since some places have more of them.
        assert same == pytest.approx(0.8, abs=0.1), day
    first, last = set(days[0].tolist()), set(days[9].tolist())
    share = len(last - first) / len(last)
    assert 0.2 < share < 1
    # Popularity drifts, too: some of the most frequent ids of the last day were there on the first, less frequent.
    before, after = Counter(days[0].tolist()), Counter(days[9].tolist())
    top = [key for key, _ in after.most_common(100)]
    assert any(0 < before[key] < after[key] / 2 for key in top) or column == 2


def test_without_drift_and_in_small_tables_ids_stay():
    still = Lookalike(config(drift=0))
    draws = np.arange(10_000, dtype=np.uint32) * np.uint32(400_000)
    for column in (0, 2, 5, 8):
        days = [ids_of(still, column, draws, day).tolist() for day in (0, 1, 6)]
        assert days[0] == days[1] == days[2], column
    drifting = Lookalike(config(drift=1))
    assert ids_of(drifting, 8, draws, 0).tolist() == ids_of(drifting, 8, draws, 5).tolist()
    assert not np.any(ids_of(drifting, 2, draws, 0) == ids_of(drifting, 2, draws, 1))


@pytest.mark.parametrize(("wanted", "lines", "skew"), [(3000, 5000, 4), (1000, 200_000, 3), (20_000, 30_000, 4)])
def test_a_log_of_the_originals_length_shows_the_originals_ids(wanted, lines, skew):
    places = lookalike._places(wanted, lines, skew)
    seen = len(np.unique(np.floor(places * np.random.default_rng(1).random(lines) ** skew)))
    assert seen == pytest.approx(wanted, rel=0.05)


def test_different_owners_have_different_ids():
    column = Lookalike(config()).columns[2]
    numbers = np.arange(3_000_000, dtype=np.uint64)
    assert len(np.unique(column._key(numbers))) == len(numbers)


def test_hexadecimal():
    ids = np.array([0, 1, 0x68FD1E64, 2**32 - 1], np.uint32)
    texts = lookalike.hexadecimal(ids).astype("<u8").tobytes().decode()
    assert [texts[at : at + 8] for at in range(0, 32, 8)] == ["00000000", "00000001", "68fd1e64", "ffffffff"]


def test_days_become_a_dataset_split_by_file(tmp_path, capsys):
    assert (
        command(capsys, "generate", "-o", tmp_path / "log", "--like=criteo-terabyte", "--rows=100", "--days=12")[0] == 0
    )
    dataset = prepare(tmp_path / "log", tmp_path / "data", PrepareConfig(layout="criteo-terabyte"))
    assert dataset.rows == {"train": 92, "validation": 4, "test": 4}
    assert [source["name"] for source in dataset.info["sources"]] == [f"day_{day}" for day in range(12)]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"like": None, "days": 3}, "days: got 3, expected none without like"),
        ({"like": None, "drift": 0.5}, "drift: got 0.5, expected none without like"),
        ({"days": 0}, "days: got 0, expected 1 to 10000"),
        ({"rows": 3, "days": 4}, "days: got 4, expected 1 to 3"),
        ({"drift": 1.5}, "drift: got 1.5, expected a fraction between 0 and 1"),
        ({"drift": float("nan")}, "drift: got nan"),
    ],
)
def test_a_bad_configuration_is_refused(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        config(**fields)


def test_a_folder_that_holds_something_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="exists and is not empty, expected the name of a new folder"):
        generate(tmp_path, config(days=2))
    with pytest.raises(UserError, match="is a file, expected the name of a new folder"):
        generate(tmp_path / "file", config(days=2))
    with pytest.raises(UserError, match="cannot write"):
        generate(tmp_path / "absent" / "log", config(days=2))


@pytest.mark.parametrize("exists", [False, True])
def test_nothing_of_the_days_is_left_where_one_fails(tmp_path, exists):
    def interrupt(stage, written, rows):
        if written > rows / 2:
            raise KeyboardInterrupt

    folder = tmp_path / "log"
    if exists:
        folder.mkdir()
    with pytest.raises(KeyboardInterrupt):
        generate(folder, config(days=5, rows=100), progress=interrupt)
    assert list(tmp_path.rglob("*")) == [folder] * exists


@pytest.mark.parametrize("rows", [1, 2, 200])
def test_few_rows(tmp_path, rows):
    assert len(read(generate(tmp_path / "few.txt", config(rows=rows)).path)) == rows
