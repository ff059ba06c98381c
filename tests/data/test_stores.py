"""Logs by URL: the same datasets as from local files, and each refusal one sentence."""

import errno
import gzip
import sys
import uuid
from pathlib import Path

import polars as pl
import pytest
import zstandard

from data_helpers import KAGGLE, content, criteo_lines, table, write
from dqrm.daily.days import list_days
from dqrm.data import formats, stores
from dqrm.data.config import PrepareConfig
from dqrm.data.formats import delta
from dqrm.data.listing import require_same_files, resolve
from dqrm.data.parquet_files import count
from dqrm.data.parts import merge_parts, prepare_part
from dqrm.data.prepare import prepare
from dqrm.data.raw import RawEncoder, RawLog
from dqrm.errors import UserError

fsspec = pytest.importorskip("fsspec", reason="the extra dqrm[stores] is not installed")

CLICKS = PrepareConfig(label="click", categorical=("user", "dt"), dense=("age",), chunk_rows=50)


@pytest.fixture
def bucket():
    """A URL under which nothing is yet, in the memory of this process."""
    name = uuid.uuid4().hex
    yield f"memory://{name}"
    memory = fsspec.filesystem("memory")
    if memory.exists(f"/{name}"):
        memory.rm(f"/{name}", recursive=True)


def upload(folder: Path, bucket: str) -> None:
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            put(f"{bucket}/{file.relative_to(folder).as_posix()}", file.read_bytes())


def put(url: str, data: bytes) -> None:
    with fsspec.open(url, "wb") as file:
        file.write(data)


def criteo(folder: Path) -> None:
    """Days of text, one plain and two compressed."""
    for day, pack in ((1, bytes), (2, gzip.compress), (10, zstandard.compress)):
        file = write(folder / f"day_{day}", criteo_lines(60 + day, seed=day))
        file.write_bytes(pack(file.read_bytes()))


def clicks(folder: Path) -> None:
    """Days of Parquet and one of CSV, as Spark writes them."""
    for day in (1, 2, 10):
        frame = pl.DataFrame({"click": [0, 1] * 60, "user": [n % (30 + day) for n in range(120)], "age": [day] * 120})
        (folder / f"dt={day}").mkdir()
        if day == 2:
            frame.write_csv(folder / f"dt={day}/part.csv")
        else:
            frame.write_parquet(folder / f"dt={day}/part.parquet", row_group_size=35)
        (folder / f"dt={day}/_SUCCESS").touch()


def whole(dataset) -> dict[str, bytes]:
    return {**content(dataset), "dataset.json": (dataset.path / "dataset.json").read_bytes()}


@pytest.mark.parametrize(
    ("make", "config", "named"),
    [
        (criteo, KAGGLE, ["day_*"]),
        (clicks, CLICKS, [""]),
        (clicks, CLICKS, ["**/*.parquet"]),
        (clicks, CLICKS, ["dt=10/", "dt=1/part.parquet"]),
    ],
)
def test_a_dataset_is_that_of_local_files(tmp_path, bucket, make, config, named):
    (tmp_path / "logs").mkdir()
    make(tmp_path / "logs")
    upload(tmp_path / "logs", bucket)
    local = prepare([f"{tmp_path}/logs/{name}" for name in named], tmp_path / "local", config)
    stored = prepare([f"{bucket}/{name}".removesuffix("/") for name in named], tmp_path / "stored", config)
    assert whole(stored) == whole(local)


def test_a_file_url_is_a_path(tmp_path):
    clicks(tmp_path)
    assert [source.path for source in resolve([f"file://{tmp_path}/dt=*/*.parquet"])] == [
        tmp_path / f"dt={day}/part.parquet" for day in (1, 10)
    ]
    assert prepare(f"file://{tmp_path}/dt=1", f"file://{tmp_path}/data", CLICKS).path == tmp_path / "data"


def test_parts_are_those_of_local_files(tmp_path, bucket):
    (tmp_path / "logs").mkdir()
    clicks(tmp_path / "logs")
    upload(tmp_path / "logs", bucket)
    local, config = prepare(f"{tmp_path}/logs", tmp_path / "local", CLICKS), CLICKS
    output = tmp_path / "stored"
    for step in range(2):
        for part in ("1/3", "2/3", "3/3"):
            told, dataset = prepare_part([bucket], output, part, config)
        if step == 0:
            merge_parts([bucket], output, config)
    assert dataset is not None
    assert whole(dataset) == whole(local), told


def test_a_stopped_preparation_resumes_unless_an_object_changed(tmp_path, bucket):
    (tmp_path / "logs").mkdir()
    clicks(tmp_path / "logs")
    upload(tmp_path / "logs", bucket)
    told = []

    def stop(stage, done, total):
        if stage == "writing":
            raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            prepare(bucket, tmp_path / "stored", CLICKS, stop, log=told.append)
    assert [line.partition(" ")[0] for line in told] == ["resuming"]
    data = (tmp_path / "logs/dt=2/part.csv").read_bytes().replace(b"\n0,7,", b"\n1,7,")
    (tmp_path / "logs/dt=2/part.csv").write_bytes(data)
    put(f"{bucket}/dt=2/part.csv", data)
    stored = prepare(bucket, tmp_path / "stored", CLICKS, log=told.append)
    assert "before dt=2/part.csv changed: it is deleted" in told[1]
    assert whole(stored) == whole(prepare(tmp_path / "logs", tmp_path / "local", CLICKS))


def test_a_log_is_scored_as_a_local_one(tmp_path, bucket):
    (tmp_path / "logs").mkdir()
    clicks(tmp_path / "logs")
    upload(tmp_path / "logs", bucket)
    dataset = prepare(tmp_path / "logs", tmp_path / "data", CLICKS)
    encoder = RawEncoder(CLICKS, dataset.info["schema"]["columns"], dataset.row_maps(), keep=["user"])
    logs = [RawLog(f"{where}/dt=1*", encoder) for where in (tmp_path / "logs", bucket)]
    local, stored = (
        [(kept.to_dict(as_series=False), batch.ids.tolist()) for kept, batch in log.blocks()] for log in logs
    )
    assert stored == local
    assert logs[0].rows == logs[1].rows == 240


def test_days_are_names_below_a_url(tmp_path, bucket):
    clicks(tmp_path)
    upload(tmp_path, bucket)
    put(f"{bucket}/_SUCCESS", b"")
    assert list_days([f"{bucket}/*"]) == {f"dt={day}": f"{bucket}/dt={day}" for day in (1, 2, 10)}
    with pytest.raises(UserError, match="no file matches"):
        list_days([f"{bucket}/day=*"])


def test_a_long_footer_is_asked_for_once_more(tmp_path, bucket, monkeypatch):
    clicks(tmp_path)
    upload(tmp_path, bucket)
    monkeypatch.setattr(stores, "_FOOTER", 16)
    (source,) = resolve([f"{bucket}/dt=1"])
    assert count(source) == 120
    assert source.copy is None


def test_what_changes_meanwhile_is_told(bucket):
    urls = [f"{bucket}/day_{day}.csv" for day in range(3)]
    for url in urls:
        put(url, b"label,user\n1,a\n")
    first, second, third = found = resolve([f"{bucket}/*.csv"])
    require_same_files([f"{bucket}/*.csv"], found)
    put(urls[0], b"label,user\n1,b\n")
    with pytest.raises(UserError, match=r"day_0\.csv changed while it was read: it was written to; start again"):
        first.require_unchanged()
    put(urls[1], b"label,user\n")
    with pytest.raises(UserError, match=r"day_1\.csv changed while it was read: it had 15 bytes and has 11"):
        second.require_unchanged()
    fsspec.filesystem("memory").rm(third.key)
    with pytest.raises(UserError, match=r"day_2\.csv changed while it was read: No such file"):
        third.require_unchanged()
    with pytest.raises(UserError, match=r"cannot read memory://\S+/day_2\.csv: No such file"):
        list(third.pieces())
    with pytest.raises(UserError, match=rf"changed while they were read: {urls[2]} is gone"):
        require_same_files([f"{bucket}/*.csv"], found)
    put(f"{bucket}/day_3.csv", b"label,user\n")
    with pytest.raises(UserError, match=r"day_2\.csv is gone"):
        require_same_files([f"{bucket}/*.csv"], found)


def test_names_that_do_not_count_are_left_out(bucket):
    for name in ("a/log.csv", "a/_SUCCESS", "a/.log.csv.crc", "_old/log.csv", "a/_x/log.csv", "_day=3/log.csv"):
        put(f"{bucket}/{name}", b"label,user\n")
    assert [source.name for source in resolve([bucket])] == ["_day=3/log.csv", "a/log.csv"]
    assert [source.name for source in resolve([f"{bucket}/*/*"])] == ["_day=3/log.csv", "a/log.csv"]
    with pytest.raises(UserError, match="is given twice"):
        resolve([bucket, f"{bucket}/a/log.csv"])


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("log/_temporary/0/log.csv", "is not complete"),
        ("log/.hoodie/x", "is a Hudi table"),
        (f"log/{delta.LOG}/0.json", "is a Delta Lake table, which is only read from a folder on this machine"),
        ("log/_x", "holds no file"),
    ],
)
def test_folders_that_are_no_log(bucket, name, said):
    put(f"{bucket}/{name}", b"x")
    if said != "holds no file":
        put(f"{bucket}/log/day.csv", b"label,user\n")
    with pytest.raises(UserError, match=rf"^{bucket}/log .*{said}|^{bucket}/log {said}"):
        resolve([f"{bucket}/log"])
    with pytest.raises(UserError, match=said):
        resolve([bucket])


def test_only_what_is_read_from_its_beginning_is_read_by_url(tmp_path, bucket):
    put(f"{bucket}/day.npz", b"PK")
    for layout in ("dlrm-kaggle", "criteo-npy", "fuxictr"):
        with pytest.raises(UserError, match=rf"{bucket}/day.npz is not on this machine; layout {layout} can only be"):
            prepare(f"{bucket}/day.npz", tmp_path / "data", PrepareConfig(layout=layout))
    record = b"\1\0\0\0" + bytes(39 * 4)
    put(f"{bucket}/day.bin", record * 5 + bytes(160) * 5)
    (tmp_path / "day.bin").write_bytes(record * 5 + bytes(160) * 5)
    config = PrepareConfig(layout="mlperf-binary")
    for where in (bucket, tmp_path):
        (source,) = formats.arrange(resolve([f"{where}/day.bin"]), config)
        assert source.format.check(source, config)["label"] == pl.Int32
        (block,) = source.format.blocks(source, ["label", "C26"], 100)
        assert block.fields["label"].to_list() == [1] * 5 + [0] * 5


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("memory://none/log.csv", r"cannot read memory://none/log\.csv: No such file or directory"),
        ("memory://none/log*", r"no file matches 'memory://none/log\*'"),
        ("nosuch://bucket/log.csv", "cannot read nosuch://bucket/log.csv: Protocol not known: nosuch"),
    ],
)
def test_what_is_not_there(tmp_path, url, said):
    with pytest.raises(UserError, match=said):
        prepare(url, tmp_path / "data", CLICKS)


def test_missing_packages_are_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ossfs", None)
    with pytest.raises(UserError, match=r"^oss://bucket/log\.csv needs the package ossfs: pip install ossfs$"):
        prepare("oss://bucket/log.csv", tmp_path / "data", CLICKS)
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(
        UserError, match=r"^s3://bucket/log\.csv needs the package fsspec: pip install 'dqrm\[stores\]'$"
    ):
        prepare("s3://bucket/log.csv", tmp_path / "data", CLICKS)


def test_the_output_is_a_folder_here(tmp_path):
    table(tmp_path / "log.csv", [{"click": 1, "user": "a", "dt": 1, "age": 2}])
    for make in (prepare, lambda *given: prepare_part(*given[:2], "1/1", given[2])):
        with pytest.raises(UserError, match="the output is s3://bucket/data, expected a folder on this machine"):
            make(tmp_path / "log.csv", "s3://bucket/data", CLICKS)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (PermissionError(errno.EACCES, "Forbidden"), "Forbidden"),
        (RuntimeError("Unable to locate\n credentials"), "Unable to locate credentials"),
        (TimeoutError(), "TimeoutError"),
    ],
)
def test_what_a_driver_raises_is_one_sentence(tmp_path, bucket, monkeypatch, error, said):
    put(f"{bucket}/log.csv", b"click,user,dt,age\n1,a,1,2\n")
    memory = type(fsspec.filesystem("memory"))

    def fail(*given, **options):
        raise error

    for method in ("_open", "cat_file", "info"):
        with monkeypatch.context() as patch:
            patch.setattr(memory, method, fail)
            with pytest.raises(UserError, match=rf"^cannot read {bucket}/log\.csv: {said}$"):
                prepare(f"{bucket}/log.csv", tmp_path / "data", CLICKS)


def test_bytes_that_do_not_arrive(bucket, monkeypatch):
    put(f"{bucket}/log.csv", b"click,user\n1,a\n")
    (source,) = resolve([f"{bucket}/log.csv"])
    monkeypatch.setattr(stores.StoredSource, "_read", lambda self: iter([b"click"]))
    with pytest.raises(UserError, match=r"log\.csv: 5 of its 15 bytes arrived; start again"):
        list(source.pieces())


def test_no_room_for_the_copy_of_a_parquet_file(tmp_path, bucket, monkeypatch):
    clicks(tmp_path)
    upload(tmp_path, bucket)

    class Full:
        def write(self, piece):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(stores.tempfile, "TemporaryFile", Full)
    with pytest.raises(UserError, match=rf"cannot copy {bucket}/dt=1/part\.parquet to \S+: the disk is full"):
        prepare(f"{bucket}/dt=1", tmp_path / "data", CLICKS)
    assert not (tmp_path / "data").exists()


def test_an_object_that_is_not_the_parquet_it_seems(tmp_path, bucket):
    put(f"{bucket}/log.parquet", b"PAR1" + b"x" * 100)
    with pytest.raises(UserError, match=rf"{bucket}/log\.parquet cannot be read as Parquet"):
        prepare(f"{bucket}/log.parquet", tmp_path / "data", CLICKS)
