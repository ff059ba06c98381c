"""FuxiCTR's Parquet, Delta Lake tables and datasets of Hugging Face: the rows of the same log in Parquet."""

import json

import polars as pl
import pytest

from data_helpers import LOG, LOG_CONFIG, content
from dqrm.data.config import PrepareConfig
from dqrm.data.prepare import prepare
from dqrm.data.raw import RawEncoder, RawLog
from dqrm.data.vocabulary import Vocabulary
from dqrm.errors import UserError
from dqrm.options import build

FUXI = PrepareConfig(layout="fuxictr", dense_transform="none")


def encoder(dataset, **more):
    columns = dataset.info["schema"]["columns"]
    vocabularies = [Vocabulary.read(dataset.vocabulary_path(column["name"])) for column in columns]
    return RawEncoder(build(PrepareConfig, dataset.info["options"], "options"), columns, vocabularies, **more)


def fuxictr(folder, parts=False, **features):
    """FuxiCTR's folder: ids, numbers, a sequence padded with 0, a column that is no feature; returns the frames."""
    folder.mkdir()
    frames = {}
    for number, name in enumerate(("train", "valid", "test")):
        rows = range(number * 10, number * 10 + 10)
        frame = pl.DataFrame(
            {
                "user": [1 + n % 4 for n in rows],
                "price": [n / 7 for n in rows],
                "history": [[0] * (3 - n % 4) + [n % 5 + 1] * (n % 4) for n in rows],
                "group": [n % 3 for n in rows],
                "click": [float(n % 2) for n in rows],
            }
        )
        frames[name] = frame
        path = folder / name / "part_00000.parquet" if parts else folder / f"{name}.parquet"
        path.parent.mkdir(exist_ok=True)
        frame.write_parquet(path)
    listed = {
        "user": {"source": "", "type": "categorical", "padding_idx": 0, "vocab_size": 5},
        "history": {"source": "", "type": "sequence", "padding_idx": 0, "vocab_size": 6, "max_len": 3},
        "price": {"source": "", "type": "numeric"},
        "group": {"type": "meta"},
        **features,
    }
    content = {"dataset_id": "x", "labels": ["click"], "features": [{name: spec} for name, spec in listed.items()]}
    (folder / "feature_map.json").write_text(json.dumps(content))
    (folder / "feature_processor.pkl").write_bytes(b"not to be opened")
    return frames


def numbered(values):
    """Rows in order of first appearance, from 1."""
    table = {}
    for value in values:
        table.setdefault(value, len(table) + 1)
    return table


@pytest.mark.parametrize("parts", [False, True])
def test_fuxictr_takes_columns_and_splits_from_its_folder(tmp_path, parts):
    frames = fuxictr(tmp_path / "fuxi", parts)
    dataset = prepare(tmp_path / "fuxi", tmp_path / "data", FUXI)
    assert dataset.rows == {"train": 10, "validation": 10, "test": 10}
    assert [column.name for column in dataset.columns] == ["user", "history"]
    users = numbered(frames["train"]["user"].to_list())
    visits = numbered([entry for cell in frames["train"]["history"].to_list() for entry in cell if entry])
    for split, name in (("train", "train"), ("validation", "valid"), ("test", "test")):
        arrays, frame = dataset.split(split).arrays, frames[name]
        assert arrays["ids.i32"][:, 0].tolist() == [users[user] for user in frame["user"]]
        assert arrays["dense.f32"][:, 0].tolist() == frame["price"].cast(pl.Float32).to_list()
        assert arrays["label.u8"].tolist() == frame["click"].cast(pl.Int64).to_list()
        entries = [[visits.get(entry, 0) for entry in cell if entry] for cell in frame["history"].to_list()]
        assert arrays["01.values.i32"].tolist() == [entry for cell in entries for entry in cell]
    log = RawLog(str(tmp_path / "fuxi" / ("test/*" if parts else "test.parquet")), encoder(dataset, keep=("group",)))
    ((kept, batch),) = list(log.blocks())
    assert batch.ids.tolist() == dataset.split("test").arrays["ids.i32"].tolist()
    assert kept["group"].to_list() == frames["test"]["group"].to_list()


def test_fuxictr_takes_columns_that_are_named_instead(tmp_path):
    fuxictr(tmp_path / "fuxi")
    (tmp_path / "fuxi" / "feature_map.json").unlink()
    with pytest.raises(UserError, match=r"no feature_map\.json beside .*train\.parquet; name its columns in"):
        prepare(tmp_path / "fuxi" / "train.parquet", tmp_path / "data", FUXI)
    named = PrepareConfig(layout="fuxictr", label="click", categorical=("group",), split="random")
    assert prepare(tmp_path / "fuxi" / "train.parquet", tmp_path / "data", named).columns[0].name == "group"


@pytest.mark.parametrize(
    ("features", "config", "message"),
    [
        ({}, PrepareConfig(layout="fuxictr"), r"holds dense values \(price\) that FuxiCTR may have normalized already"),
        (
            {"price": {"type": "embedding"}},
            FUXI,
            "has the feature price of type embedding, expected categorical, meta,",
        ),
        ({"price": 3}, FUXI, "has the feature price of type None"),
        ({"gone": {"type": "categorical"}}, FUXI, "no column 'gone' in"),
    ],
)
def test_what_a_feature_map_says_is_checked(tmp_path, features, config, message):
    fuxictr(tmp_path / "fuxi", **features)
    with pytest.raises(UserError, match=message) as caught:
        prepare(tmp_path / "fuxi", tmp_path / "data", config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", r"has \[\], expected an object"),
        ('{"labels": []}', "lacks 'features'"),
        ('{"labels": ["a", "b"], "features": []}', "has the labels a, b; name one with --label"),
    ],
)
def test_a_damaged_feature_map_is_refused(tmp_path, content, message):
    fuxictr(tmp_path / "fuxi")
    (tmp_path / "fuxi" / "feature_map.json").write_text(content)
    with pytest.raises(UserError, match=r"feature_map\.json " + message):
        prepare(tmp_path / "fuxi", tmp_path / "data", FUXI)


def test_a_folder_without_parquet_is_none_of_fuxictrs(tmp_path):
    (tmp_path / "log.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match=r"log\.csv is no Parquet file, expected FuxiCTR's"):
        prepare(tmp_path / "log.csv", tmp_path / "data", FUXI)


def delta(folder, frame, **more):
    package = pytest.importorskip("deltalake", reason="deltalake is not installed (pip install 'dqrm[delta]')")
    package.write_deltalake(str(folder), frame.to_arrow(), **more)
    return package.DeltaTable(str(folder))


def by_user(dataset):
    """(user, price) of all rows, sorted: Delta promises no order of files."""
    keys = {row: key for key, row, _ in pl.read_parquet(dataset.vocabulary_path("user")).rows()}
    rows = []
    for split in ("train", "validation", "test"):
        arrays = dataset.split(split).arrays
        rows += [
            (keys[row[0]], price) for row, price in zip(arrays["ids.i32"].tolist(), arrays["dense.f32"][:, 0].tolist())
        ]
    return sorted(rows)


def test_a_delta_table_is_its_newest_version(tmp_path):
    everything = PrepareConfig(label="click", categorical=("user", "ad"), dense=("price",), vocabulary="all")
    frame = pl.DataFrame(LOG)
    table = delta(tmp_path / "delta", frame, partition_by=["day"])
    table.delete("user = 'u1'")
    delta(tmp_path / "delta", frame.head(3).with_columns(user=pl.lit("u9")), mode="append")
    left = pl.concat([frame.filter(pl.col("user") != "u1"), frame.head(3).with_columns(user=pl.lit("u9"))])
    left.write_parquet(tmp_path / "left.parquet")
    dataset = prepare(tmp_path / "delta", tmp_path / "data", everything)
    assert by_user(dataset) == by_user(prepare(tmp_path / "left.parquet", tmp_path / "wanted", everything))
    by_day = PrepareConfig(label="click", categorical=("user",), split="column", split_column="day", test_values=("4",))
    assert prepare(tmp_path / "delta", tmp_path / "days", by_day).rows["test"] == left.filter(pl.col("day") == 4).height


def test_partitions_of_a_delta_table_may_need_quoting(tmp_path):
    frame = pl.DataFrame({"click": [0, 1, 1], "user": ["a", "b", "c"], "at": ["x y/z", "100%", "x y/z"]})
    delta(tmp_path / "delta", frame, partition_by=["at"])
    config = PrepareConfig(label="click", categorical=("user", "at"), split="random", vocabulary="all")
    keys = pl.read_parquet(prepare(tmp_path / "delta", tmp_path / "data", config).vocabulary_path("at"))["key"]
    assert sorted(keys) == ["100%", "x y/z"]


def test_a_delta_table_that_lacks_a_file_is_refused(tmp_path):
    delta(tmp_path / "delta", pl.DataFrame(LOG))
    (file,) = (tmp_path / "delta").glob("*.parquet")
    file.unlink()
    with pytest.raises(UserError, match="which its Delta log lists; expected all files of its newest version"):
        prepare(tmp_path / "delta", tmp_path / "data", LOG_CONFIG)


@pytest.mark.parametrize(
    ("configuration", "features", "message"),
    [
        ({"delta.columnMapping.mode": "name"}, ["columnMapping"], r"mapped columns \(name\); rewrite it without"),
        ({}, ["deletionVectors"], "with deletion vectors; rewrite it without them"),
    ],
)
def test_delta_tables_whose_files_alone_do_not_say_it_are_refused(tmp_path, configuration, features, message):
    pytest.importorskip("deltalake", reason="deltalake is not installed (pip install 'dqrm[delta]')")
    folder = tmp_path / "delta"
    (folder / "_delta_log").mkdir(parents=True)
    pl.DataFrame(LOG).write_parquet(folder / "a.parquet")
    inline = "wi5b=000010000siXQKl0rr91000f55c8Xg0@@D72lkbi5=-{L"
    vector = {"storageType": "i", "pathOrInlineDv": inline, "sizeInBytes": 40, "cardinality": 6}
    fields = [
        {"name": "click", "type": "long", "nullable": True, "metadata": {}},
        {"name": "user", "type": "string", "nullable": True, "metadata": {}},
    ]
    if configuration:
        for number, field in enumerate(fields, 1):
            field["metadata"] = {"delta.columnMapping.id": number, "delta.columnMapping.physicalName": field["name"]}
    actions = [
        {"protocol": {"minReaderVersion": 3, "minWriterVersion": 7, "readerFeatures": features,
                      "writerFeatures": features}},
        {"metaData": {"id": "a", "format": {"provider": "parquet", "options": {}}, "partitionColumns": [],
                      "schemaString": json.dumps({"type": "struct", "fields": fields}),
                      "configuration": configuration, "createdTime": 0}},
        {"add": {"path": "a.parquet", "partitionValues": {}, "size": 1, "modificationTime": 0, "dataChange": True,
                 "stats": '{"numRecords": 20}',
                 **({"deletionVector": vector} if "deletionVectors" in features else {})}},
    ]  # fmt: skip
    text = "\n".join(json.dumps(action) for action in actions)
    (folder / "_delta_log" / "00000000000000000000.json").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        prepare(folder, tmp_path / "data", LOG_CONFIG)
    assert "\n" not in str(caught.value)


def test_a_damaged_delta_log_is_refused(tmp_path):
    delta(tmp_path / "delta", pl.DataFrame(LOG))
    for file in (tmp_path / "delta" / "_delta_log").glob("*.json"):
        file.write_text("{")
    with pytest.raises(UserError, match="cannot be read as a Delta Lake table"):
        prepare(tmp_path / "delta", tmp_path / "data", LOG_CONFIG)


def test_without_deltalake_its_absence_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "deltalake", None)
    (tmp_path / "delta" / "_delta_log").mkdir(parents=True)
    with pytest.raises(UserError, match=r"is a Delta Lake table.* install deltalake: pip install 'dqrm\[delta\]'"):
        prepare(tmp_path / "delta", tmp_path / "data", LOG_CONFIG)


def hub():
    return pytest.importorskip("datasets", reason="datasets is not installed (pip install 'dqrm[datasets]')")


@pytest.fixture
def saved(tmp_path):
    """A dataset of two splits in a folder."""
    package = hub()
    splits = {"test": package.Dataset.from_list(LOG[14:]), "train": package.Dataset.from_list(LOG[:14])}
    package.DatasetDict(splits).save_to_disk(str(tmp_path / "saved"))
    return tmp_path / "saved"


def test_a_saved_dataset_gives_the_rows_of_the_same_parquet(tmp_path, saved):
    pl.DataFrame(LOG).write_parquet(tmp_path / "log.parquet")
    wanted = prepare(tmp_path / "log.parquet", tmp_path / "wanted", LOG_CONFIG)
    dataset = prepare(f"hf:{saved}", tmp_path / "data", LOG_CONFIG)
    assert content(dataset) == content(wanted)
    named = [(source["name"], source["rows"], source["in_memory"]) for source in dataset.info["sources"]]
    assert named == [("train", 14, False), ("test", 6, False)]
    by_file = PrepareConfig(label="click", categorical=("user",), split="file", test_values=("test",))
    assert prepare([f"hf:{saved}"], tmp_path / "files", by_file).rows == {"train": 14, "validation": 0, "test": 6}
    log = RawLog(f"hf:{saved}", encoder(dataset, keep=("price",)))
    kept = pl.concat([frame for frame, _ in log.blocks()])
    assert kept["price"].to_list() == [row["price"] for row in LOG]


def test_a_single_dataset_and_one_with_selected_rows(tmp_path):
    package = hub()
    part = package.Dataset.from_list(LOG).select([5, 3, 9, 1, 0, 2])
    part.save_to_disk(str(tmp_path / "one"))
    pl.DataFrame([LOG[n] for n in (5, 3, 9, 1, 0, 2)]).write_parquet(tmp_path / "log.parquet")
    wanted = prepare(tmp_path / "log.parquet", tmp_path / "wanted", LOG_CONFIG)
    assert content(prepare(f"hf:{tmp_path / 'one'}", tmp_path / "data", LOG_CONFIG)) == content(wanted)


def test_what_is_no_dataset_is_refused(tmp_path, monkeypatch):
    package = hub()
    monkeypatch.setattr(package.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for text, message in {
        f"hf:{tmp_path}": "is no dataset of save_to_disk",
        "hf:nobody/nothing": "the dataset 'nobody/nothing' cannot be read from the local cache",
        "hf:": "got 'hf:', expected a folder or a name after it, as in hf:owner/name",
    }.items():
        with pytest.raises(UserError, match=message) as caught:
            prepare(text, tmp_path / "data", LOG_CONFIG)
        assert "\n" not in str(caught.value)


def test_without_datasets_its_absence_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(UserError, match=r"hf:a/b needs the package datasets: pip install 'dqrm\[datasets\]'"):
        prepare("hf:a/b", tmp_path / "data", LOG_CONFIG)
