"""Scoring rows of raw values in Python: whatever holds them, the probabilities are those of `dqrm predict`."""

import copy
import datetime
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch

import dqrm
from conftest import tiny
from data_helpers import criteo_lines, write
from dqrm.data import ingest
from dqrm.data.config import CRITEO_CATEGORICAL, CRITEO_DENSE, PrepareConfig
from dqrm.data.prepare import prepare
from dqrm.data.raw import RawEncoder
from dqrm.data.tables import rows_source
from dqrm.data.vocabulary import Vocabulary
from dqrm.errors import UserError
from dqrm.export.pipeline import export_run
from dqrm.options import build
from dqrm.serving.predict import predict
from dqrm.training.launch import train

CONFIG = PrepareConfig(
    categorical=("user", "ad", "tags", "flag"), dense=("price", "age"), multi=("tags",), cross=("user*ad",),
    weight="w", group="user", split="time",
)  # fmt: skip


def log(rows=300, seed=0):
    random = np.random.default_rng(seed)
    users = [None if n == 7 else int(n) for n in random.integers(0, 12, rows)]
    return pl.DataFrame(
        {
            "label": random.integers(0, 2, rows),
            "user": users,
            "ad": [["a", "b", "", None, "é"][n] for n in random.integers(0, 5, rows)],
            "tags": [None if n == 3 else [f"t{k}" for k in range(n)] for n in random.integers(0, 4, rows)],
            "flag": [[True, False, None][n] for n in random.integers(0, 3, rows)],
            "price": [None if n == 0 else n / 4 for n in random.integers(0, 9, rows)],
            "age": random.integers(-3, 90, rows),
            "w": random.random(rows),
        }
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model, its log without label and weight, and what `dqrm predict` gives for it."""
    folder = tmp_path_factory.mktemp("score")
    log().write_parquet(folder / "log.parquet")
    data = prepare(folder / "log.parquet", folder / "data", CONFIG)
    train(data, folder / "run", tiny(max_steps=30))
    export_run(folder / "run", folder / "model.dqrm")
    export_run(folder / "run", folder / "bare.dqrm", replace(dqrm.ExportConfig(), vocabulary="none"))
    rows = log(100, 1).drop("label", "w")
    rows.write_parquet(folder / "rows.parquet")
    predict(folder / "model.dqrm", folder / "rows.parquet", folder / "out.parquet")
    return folder, rows, pl.read_parquet(folder / "out.parquet")["probability"].to_numpy()


@pytest.fixture(scope="module")
def model(made):
    return dqrm.load(made[0] / "model.dqrm")


class Arrow:
    """Any library's table, by Arrow's own protocol."""

    def __init__(self, frame):
        self._frame = frame

    def __arrow_c_stream__(self, schema=None):
        return self._frame.__arrow_c_stream__(schema)


def pandas_frame(rows):
    pandas = pytest.importorskip("pandas")
    return pandas.DataFrame({name: rows[name].to_list() for name in rows.columns})


def arrow_table(rows):
    pytest.importorskip("pyarrow")
    return rows.to_arrow()


def arrow_dataset(rows):
    pytest.importorskip("pyarrow")
    import pyarrow.dataset

    return pyarrow.dataset.dataset(rows.to_arrow())


HOLDERS = {
    "dicts": lambda rows: rows.to_dicts(),
    "generator": lambda rows: iter(rows.to_dicts()),
    "polars": lambda rows: rows,
    "lazy": lambda rows: rows.lazy(),
    "other columns, another order": lambda rows: rows.select(pl.lit("?").alias("more"), *reversed(rows.columns)),
    "chunked": lambda rows: pl.concat([rows[:17], rows[17:]], rechunk=False),
    "arrow protocol": Arrow,
    "categories": lambda rows: rows.with_columns(pl.col("ad").cast(pl.Categorical)),
    "pandas": pandas_frame,
    "pyarrow": arrow_table,
    "record batch": lambda rows: arrow_table(rows).combine_chunks().to_batches()[0],
    "dataset": arrow_dataset,
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_as_predict_gives(made, model, holder):
    _, rows, wanted = made
    found = model.score(HOLDERS[holder](rows))
    assert (found.dtype, found.shape) == (np.float32, (100,))
    assert np.array_equal(found, wanted)
    assert len(set(wanted.tolist())) > 50


def test_one_row_and_none(made, model):
    _, rows, wanted = made
    for number, row in enumerate(rows[:5].to_dicts()):
        for given in (row, [row], rows[number]):
            np.testing.assert_allclose(model.score(given), wanted[number : number + 1], rtol=1e-6)
    for nothing in ([], (), rows[:0], rows[:0].lazy(), pl.DataFrame(), iter(())):
        found = model.score(nothing)
        assert (found.dtype, found.shape) == (np.float32, (0,))
    assert np.array_equal(model.score(rows, batch_size=7).round(5), wanted.round(5))


@pytest.mark.parametrize("cap", [None, 5])
def test_few_rows_are_looked_up_as_many_are(tmp_path, cap):
    rows = log()
    data = prepare(rows, tmp_path / "data", replace(CONFIG, max_rows_per_table=cap))
    columns = data.info["schema"]["columns"]
    vocabularies = [Vocabulary.read(data.vocabulary_path(column["name"])) for column in columns]
    encoder = RawEncoder(build(PrepareConfig, data.info["options"], "options"), columns, vocabularies)

    def encoded(some):
        source = rows_source(some)
        ingest.check([source], encoder.plan)
        return [block.batch for block in encoder.blocks(source)]

    (whole,) = encoded(rows)
    for at in range(0, 300, 9):
        (few,) = encoded(rows[at : at + 3])
        assert torch.equal(few.ids, whole.ids[at : at + 3])
        (values, _), (every, offsets) = few.bags[0], whole.bags[0]
        ends = [*offsets.tolist(), len(every)]
        assert torch.equal(values, every[ends[at] : ends[at + 3]])
    assert whole.ids.count_nonzero() > 600


@pytest.mark.parametrize(
    ("column", "same"),
    [
        ("user", [3, "3", 3.0, np.int64(3), np.float32(3), "3"]),
        ("user", [None, "", None, np.nan, float("nan"), ""]),
        ("ad", ["a", np.str_("a")]),
        ("flag", [True, "true", np.True_]),
        ("price", [1.5, "1.5", np.float32(1.5), "1.50"]),
        ("price", [None, "", float("nan"), 0]),
        ("age", [7, 7.0, "7", np.int8(7), "7.0"]),
        ("tags", [["t1", "t2"], ("t1", "t2"), np.array(["t1", "t2"])]),
        ("tags", [[], None, ()]),
    ],
)
def test_values_that_mean_the_same_score_the_same_alone_and_mixed(made, model, column, same):
    row = made[1].row(3, named=True)
    rows = [{**row, column: value} for value in same]
    wanted = model.score(rows[0])
    for one in rows[1:]:
        assert np.array_equal(model.score(one), wanted), one[column]
    np.testing.assert_allclose(model.score(rows), np.full(len(rows), wanted[0]), rtol=1e-6)


def test_what_is_wrong_is_named(made, model):
    rows = made[1].to_dicts()
    lacks = {name: value for name, value in rows[2].items() if name != "ad"}
    for given, message in [
        ([*rows[:2], lacks], r"row 3 has no 'ad'; a value that is missing is given as None"),
        (made[1].drop("ad"), r"no column 'ad' in the table"),
        (made[1].drop("ad", "price"), r"no columns 'price', 'ad' in the table"),
        (made[1].rename({"price": "prize"}), r"did you mean 'prize'"),
        ([*rows[:4], {**rows[4], "price": "cheap"}], r"the rows, row 5: column price holds 'cheap', expected a finite"),
        ([{**rows[0], "age": float("inf")}], r"row 1: column age holds inf"),
        ([{**rows[0], "ad": {"a": 1}}], r"column ad holds \{'a': 1\} of type dict, expected a number, text"),
        ([{**rows[0], "ad": ["a"]}], r"column ad of the rows holds lists, expected one number"),
        ([rows[0], {**rows[1], "ad": ["a"]}], r"column ad holds lists and '.*', expected lists in all rows or in none"),
        (made[0] / "log.parquet", r"log.parquet'.* expected rows of raw values: .*dqrm.predict scores files"),
        ([1, 2], r"got an object of type list that holds one of type int, expected rows of raw values"),
        (pl.Series(["7", "a"]), r"got an object of type Series that holds one of type str, expected rows .*datasets?$"),
        ({1: 2}, r"no columns .* in the rows; there are none"),
        ({}, r"no columns .* in the rows; there are none"),
        (np.zeros((2, 3)), r"got an object of type ndarray, expected rows"),
        (None, r"type NoneType, expected rows"),
    ]:
        with pytest.raises(UserError, match=message) as error:
            model.score(given)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="batch_size is 0"):
        model.score(rows, batch_size=0)


def test_without_vocabularies_the_dataset_is_named(made):
    folder, rows, wanted = made
    with pytest.raises(UserError, match="was exported with --vocabulary none"):
        dqrm.load(folder / "bare.dqrm").score(rows)
    assert np.array_equal(dqrm.load(folder / "bare.dqrm", data=folder / "data").score(rows), wanted)


def test_it_is_the_same_model_still(made, model):
    opened = dqrm.Artifact.open(made[0] / "model.dqrm").model()
    ids = torch.zeros(4, opened.tables.num_single, dtype=torch.int32)
    bags = [(torch.empty(0, dtype=torch.int32), torch.zeros(4, dtype=torch.int64))]
    with torch.no_grad():
        assert torch.equal(model(torch.ones(4, 2), ids, bags), opened(torch.ones(4, 2), ids, bags))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert np.array_equal(twin.score(made[1]), made[2])


def test_threads_may_share_a_model(made):
    folder, rows, wanted = made
    fresh = dqrm.load(folder / "model.dqrm")
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(fresh.score, [rows, rows.to_dicts()] * 16))
    assert all(np.array_equal(one, wanted) for one in found)


def test_criteo_s_columns(tmp_path):
    lines = criteo_lines(140)
    data = prepare(write(tmp_path / "log.txt", lines), tmp_path / "data", PrepareConfig(layout="criteo-kaggle"))
    train(data, tmp_path / "run", tiny(max_steps=3))
    export_run(tmp_path / "run", tmp_path / "model.dqrm")
    predict(tmp_path / "model.dqrm", tmp_path / "log.txt", tmp_path / "out.parquet")
    wanted = pl.read_parquet(tmp_path / "out.parquet")["probability"].to_numpy()
    names = ("label", *CRITEO_DENSE, *CRITEO_CATEGORICAL)
    texts = [dict(zip(names, line.split("\t"))) for line in lines]
    typed = [
        {name: (int(text) if text else None) if name in CRITEO_DENSE else text for name, text in row.items()}
        for row in texts
    ]
    model = dqrm.load(tmp_path / "model.dqrm")
    for rows in (texts, typed, pl.DataFrame(typed), pl.DataFrame(typed).with_columns(pl.col("I1").cast(pl.Float64))):
        assert np.array_equal(model.score(rows), wanted)
    with pytest.raises(UserError, match="column C3 of the rows is of type Int64, but layout criteo-kaggle has hexadec"):
        model.score([{**row, "C3": 5} for row in texts])
    with pytest.raises(UserError, match=r"the rows, row 2: column I4 holds '1.5', expected a whole number"):
        model.score([typed[0], {**typed[1], "I4": 1.5}])


def test_dates_in_dicts_are_those_of_a_table(tmp_path):
    days = [datetime.date(2026, 1, 1 + n % 3) for n in range(60)]
    frame = pl.DataFrame({"label": [0, 1] * 30, "day": days, "n": list(range(60))})
    data = prepare(frame, tmp_path / "data", PrepareConfig(categorical=("day", "n"), dense=()))
    train(data, tmp_path / "run", tiny(max_steps=3))
    export_run(tmp_path / "run", tmp_path / "model.dqrm")
    model = dqrm.load(tmp_path / "model.dqrm")
    assert np.array_equal(model.score(frame.to_dicts()), model.score(frame))
