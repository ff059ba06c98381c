"""Datasets that extend those of earlier days, against vocabularies that are kept in plain dicts."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from itertools import cycle

import numpy as np
import polars as pl
import pytest

from cli_helpers import command
from data_helpers import criteo_lines, table, write
from dqrm import Dataset, PrepareConfig, UserError
from dqrm.checksums import seal
from dqrm.data import growth
from dqrm.data.lineage import as_seen_by, row_changes
from dqrm.data.prepare import prepare
from dqrm.errors import NotVerified
from extension_helpers import CONFIG, Reference, ids_of, keys_of, log

POLICIES = [
    {},
    {"min_count": 3},
    {"min_count": 2, "count_decay": 0.75},
    {"evict_after": 1},
    {"min_count": 2, "count_decay": 0.5, "evict_after": 2},
    {"min_count": 40},
]


@pytest.mark.parametrize(("policy", "chunk_rows"), zip(POLICIES, cycle([7, 1000])), ids=str)
def test_days_against_dicts(tmp_path, policy, chunk_rows):
    config = dataclasses.replace(CONFIG, chunk_rows=chunk_rows, **policy)
    names = ("user", "user*site", "tags")
    given = {"min_count": 1, "evict_after": None, **policy}
    given["decay"] = given.pop("count_decay", 1.0)
    references = {name: Reference(**given) for name in names}
    before = None
    for day in range(7):
        rows = log(day)
        file, folder = table(tmp_path / f"day{day}.csv", rows), tmp_path / f"data{day}"
        if before is None:
            dataset = prepare([file], folder, config)
        elif day % 2:
            dataset = prepare([file], folder, extend=before.path)
        else:
            dataset = prepare([file], folder, dataclasses.replace(config, extend=str(before.path)))
        train = rows[: dataset.rows["train"]]
        for name in names:
            references[name].next([key for row in train for key in keys_of(row, name)])
        for number, name in enumerate(names):
            vocabulary = dataset.vocabulary(number)
            rare = dataset.path / "rare" / dataset.vocabulary_path(name).name
            empty = growth.rare_frame(vocabulary.keys[:0], np.empty(0, int), None)
            references[name].check(vocabulary, pl.read_parquet(rare) if rare.is_file() else empty)
            assert dataset.table_rows[number] == references[name].size
        wanted = [[[references[n].row.get(key, 0) for key in keys_of(row, n)] for n in names] for row in rows]
        assert ids_of(dataset, "train") + ids_of(dataset, "validation") + ids_of(dataset, "test") == wanted
        dataset.validate()
        assert dataset.verify()
        assert dataset.day == day
        if before is not None:
            assert [a["fingerprint"] for a in dataset.ancestors][-1] == before.fingerprint
            assert dataset.ancestors[-1]["table_rows"] == list(before.table_rows)
            assert len(dataset.ancestors) == day
        before = dataset


def test_known_ids_keep_their_rows_and_their_bytes(tmp_path):
    """Without eviction the rows of one day are those of the next, and the same log gives the same bytes."""
    first = prepare([table(tmp_path / "a.csv", log(0))], tmp_path / "a", CONFIG)
    again = prepare([tmp_path / "a.csv"], tmp_path / "again", extend=first.path)
    for name in ("train", "validation", "test"):
        for file in (first.path / name).iterdir():
            assert file.read_bytes() == (again.path / name / file.name).read_bytes()
    assert again.vocabulary_digest == first.vocabulary_digest
    assert again.fingerprint != first.fingerprint
    second = prepare([table(tmp_path / "b.csv", log(1))], tmp_path / "b", extend=again.path)
    for number in range(3):
        old, new = (pl.DataFrame({"key": v.keys, "row": v.table_rows}) for v in
                    (first.vocabulary(number), second.vocabulary(number)))  # fmt: skip
        assert new.height > old.height
        assert new.sort("row").head(old.height).equals(old.sort("row"))


def test_criteo_and_the_cap(tmp_path):
    lines = [criteo_lines(140, seed) for seed in range(2)]
    for number, cap in enumerate((None, 7)):
        config = PrepareConfig(layout="criteo-kaggle", max_rows_per_table=cap, cross=("C1*C2",), min_count=2)
        first = prepare([write(tmp_path / "a.txt", lines[0])], tmp_path / f"a{number}", config)
        second = prepare([write(tmp_path / "b.txt", lines[1])], tmp_path / f"b{number}", extend=first.path)
        for at in (0, 26):
            counter = Reference(min_count=2)
            for day in lines:
                cells = [row.split("\t")[14:] for row in day[:120]]
                keys = [[int(cell, 16) if cell else 0 for cell in row] for row in cells]
                if at == 26:
                    counted = [row[0] << 32 | row[1] if row[0] and row[1] else 0 for row in keys]
                    if cap:
                        counted = [splitmix64(key) % cap for key in counted]
                else:
                    counted = [row[0] % cap if cap else row[0] for row in keys]
                counter.next(counted)
            vocabulary = second.vocabulary(at)
            assert dict(zip(vocabulary.keys, vocabulary.table_rows.tolist())) == counter.row
            assert vocabulary.rows == counter.size


def splitmix64(number):
    mixed = (number + 0x9E3779B97F4A7C15) % 2**64
    mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB % 2**64
    return mixed ^ mixed >> 31


def test_which_rows_changed(tmp_path):
    """Each row's key on both days decides what became of it."""
    config, days = dataclasses.replace(CONFIG, evict_after=2), []
    for day in range(6):
        file, folder = table(tmp_path / f"{day}.csv", log(day)), tmp_path / f"d{day}"
        days.append(prepare([file], folder, extend=days[-1].path) if days else prepare([file], folder, config))
    seen = 0
    for old in range(6):
        trained = {"fingerprint": days[old].fingerprint, "vocabulary_digest": days[old].vocabulary_digest}
        for new in range(old, 6):
            for number, changes in enumerate(row_changes(days[new], trained, tmp_path / "run")):
                before, now = (days[day].vocabulary(number) for day in (old, new))
                key_then = dict(zip(before.table_rows.tolist(), before.keys))
                key_now = dict(zip(now.table_rows.tolist(), now.keys))
                history = [dict(zip(v.table_rows.tolist(), v.keys)) for v in
                           (days[day].vocabulary(number) for day in range(old, new + 1))]  # fmt: skip
                every = [changes.kept, changes.new, changes.reused, changes.vacant]
                assert sorted(np.concatenate(every).tolist()) == list(range(now.rows))
                assert changes.new.tolist() == list(range(before.rows, now.rows))
                for row in range(1, before.rows):
                    stayed = row in key_now and all(keys.get(row) == key_then.get(row) for keys in history)
                    wanted = "kept" if stayed else "reused" if row in key_now else "vacant"
                    assert row in getattr(changes, wanted).tolist()
                seen += len(changes.reused) * len(changes.vacant)
    assert seen


def test_models_of_earlier_days_see_their_ids_alone(tmp_path):
    config, days = dataclasses.replace(CONFIG, evict_after=2), []
    for day in range(4):
        file, folder = table(tmp_path / f"{day}.csv", log(day)), tmp_path / f"d{day}"
        days.append(prepare([file], folder, extend=days[-1].path) if days else prepare([file], folder, config))
    last = days[3]
    for old in range(3):
        view = as_seen_by(last, {"fingerprint": days[old].fingerprint}, tmp_path / "run")
        assert view.table_rows == days[old].table_rows
        assert view.narrowed
        view.validate()
        known = []
        for number in range(3):
            vocabulary, then = view.vocabulary(number), days[old].vocabulary(number)
            rows = dict(zip(then.keys, then.table_rows.tolist()))
            assert all(rows[key] == row for key, row in zip(vocabulary.keys, vocabulary.table_rows.tolist()))
            assert vocabulary.rows == then.rows
            known.append({0, *vocabulary.table_rows.tolist()})
            # Those that are left are all that kept a row since.
            now = last.vocabulary(number)
            both = {key for key, row in zip(now.keys, now.table_rows.tolist()) if rows.get(key) == row}
            assert set(vocabulary.keys) <= both
        newer = total = 0
        for name in ("train", "validation", "test"):
            stored, seen = ids_of(last, name), ids_of(view, name)
            born = [dict(zip(v.table_rows.tolist(), v.since.tolist())) for v in map(last.vocabulary, range(3))]
            wanted = [
                [[i if born[n].get(i, 0) <= old else 0 for i in cell] for n, cell in enumerate(row)] for row in stored
            ]
            assert seen == wanted
            shuffled = [batch.ids for batch in view.split(name).batches(7, shuffle="global", seed=1)]
            assert all(set(ids[:, n].tolist()) <= known[n] for ids in shuffled for n in range(2))
            got = view.split(name).newer_ids()
            newer, total = newer + got[0], total + got[1]
            changed = sum(a != b for old_row, new_row in zip(stored, seen) for c, d in zip(old_row, new_row)
                          for a, b in zip(c, d))  # fmt: skip
            assert got == (changed, sum(len(cell) for row in stored for cell in row))
        assert 0 < newer < total
    same = {"fingerprint": "another", "vocabulary_digest": last.vocabulary_digest}
    assert as_seen_by(last, same, tmp_path / "run") is last
    for trained in ({"fingerprint": "0" * 64}, {"fingerprint": "0" * 64, "vocabulary_digest": None}):
        with pytest.raises(
            UserError, match=r"is not the dataset that .*run was trained on, nor does it have or extend"
        ):
            as_seen_by(last, trained, tmp_path / "run")
    with pytest.raises(UserError, match="is not the dataset that"):  # an earlier day is no extension
        as_seen_by(days[0], {"fingerprint": last.fingerprint}, tmp_path / "run")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dense": ()}, r"dense is '', but .*a, which is to be extended, was prepared with 'price'"),
        ({"cross": ()}, "cross is ''"),
        ({"categorical": ("tags", "user")}, "categorical is 'tags,user', but .* with 'user,tags'"),
        ({"max_rows_per_table": 9}, "max_rows_per_table is '9', but .* with 'None'"),
        ({"vocabulary": "all"}, "vocabulary is 'all', but .* with 'train'"),
        ({"null_values": ("NULL",)}, "null_values is 'NULL'"),
        ({"dense_transform": "none"}, "dense_transform is 'none'"),
        ({"subsample_negatives": 0.5}, "subsample_negatives is '0.5', but .* with '0.0'"),
    ],
)
def test_other_columns_and_options_are_refused(tmp_path, fields, message):
    first = prepare([table(tmp_path / "a.csv", log(0))], tmp_path / "a", CONFIG)
    config = dataclasses.replace(CONFIG, extend=str(first.path), **fields)
    with pytest.raises(UserError, match=message):
        prepare([tmp_path / "a.csv"], tmp_path / "b", config)
    assert not (tmp_path / "b").exists()
    assert not (tmp_path / "b.partial").exists()


def test_what_cannot_be_extended(tmp_path):
    first = prepare([table(tmp_path / "a.csv", log(0))], tmp_path / "a", CONFIG)
    with pytest.raises(UserError, match="is not a folder, expected a dataset folder"):
        prepare([tmp_path / "a.csv"], tmp_path / "b", extend=tmp_path / "none")
    with pytest.raises(UserError, match=r"extend is '.*none', but the configuration's is 'x'"):
        prepare([tmp_path / "a.csv"], tmp_path / "b", PrepareConfig(extend="x"), extend=tmp_path / "none")
    for fields, message in (
        ({"count_decay": 1.5}, "count_decay is 1.5, expected 0 to 1"),
        ({"count_decay": float("nan")}, "count_decay is nan, expected 0 to 1"),
        ({"evict_after": 0}, "evict_after is 0, expected 1 day or more"),
    ):
        with pytest.raises(ValueError, match=message):
            PrepareConfig(**fields)
    path = first.vocabulary_path("user")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"user.parquet is damaged: its SHA-256"):
        prepare([tmp_path / "a.csv"], tmp_path / "b", extend=first.path)
    assert not (tmp_path / "b").exists()


def as_older(dataset):
    """Make the folder one that a dqrm before extension wrote."""
    info = {name: value for name, value in dataset.info.items() if name != "vocabulary_digest"}
    info["files"] = {name: value for name, value in info["files"].items() if not name.startswith("rare/")}
    (dataset.path / "dataset.json").write_text(json.dumps(seal({k: v for k, v in info.items() if k != "sha256"})))


def test_a_dataset_of_an_older_version(tmp_path):
    for number, min_count in enumerate((1, 2)):
        first = prepare([table(tmp_path / "a.csv", log(0))], tmp_path / f"a{number}",
                        dataclasses.replace(CONFIG, min_count=min_count))  # fmt: skip
        as_older(first)
        first = Dataset(first.path)
        if min_count == 1:
            second = prepare([tmp_path / "a.csv"], tmp_path / "b", extend=first.path)
        else:
            with pytest.warns(NotVerified, match=r"did not keep the counts .* min_count \(2\)"):
                second = prepare([tmp_path / "a.csv"], tmp_path / "c", extend=first.path)
        assert second.ancestors[0]["vocabulary_digest"] is None
        assert as_seen_by(second, {"fingerprint": first.fingerprint}, tmp_path / "run").narrowed


def test_on_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    table(tmp_path / "1.csv", log(0))
    table(tmp_path / "2.csv", log(1))
    (tmp_path / "day.yaml").write_text("extend: one\nevict_after: 3\n")
    flags = ("--label", "click", "--categorical", "user", "--dense", "price", "--split", "time", "--min-count", "2")
    assert command(capsys, "prepare", "1.csv", "-o", "one", *flags)[0] == 0
    more = ("--config", "day.yaml", "--validation-fraction", "0.3", "--json")
    status, out, _ = command(capsys, "prepare", "2.csv", "-o", "two", *more)
    found = json.loads(out)
    assert status == 0
    assert found["day"] == 1
    assert found["extends"] == Dataset("one").fingerprint
    assert found["changes"]["new"] == Dataset("two").table_rows[0] - Dataset("one").table_rows[0]
    options = Dataset("two").info["options"]
    assert options["min_count"] == 2
    assert options["evict_after"] == 3
    assert "extend" not in options
    # A rule of the split is taken over as a whole, or not at all.
    assert (options["split"], options["validation_fraction"]) == (None, 0.3)
    status, out, _ = command(capsys, "prepare", "2.csv", "-o", "three", "--extend", "two")
    assert status == 0
    assert "Day 2" in out
    assert command(capsys, "info", "three")[0] == 0
    status, _, told = command(capsys, "prepare", "2.csv", "-o", "four", "--extend", "two", "--dense", "user")
    assert status == 2
    assert "column user is in both dense and categorical" in told
    status, _, told = command(capsys, "prepare", "2.csv", "-o", "four", "--extend", "two", "--categorical", "site")
    assert status == 2
    assert "categorical is 'site', but two, which is to be extended, was prepared with 'user'" in " ".join(told.split())


@pytest.mark.parametrize("stage", ["reading", "counting ids", "writing", "computing checksums"])
def test_a_kill_leaves_nothing_that_looks_finished(tmp_path, stage):
    first = prepare([table(tmp_path / "a.csv", log(0))], tmp_path / "a", CONFIG)
    before = {file: file.read_bytes() for file in first.path.rglob("*") if file.is_file()}
    table(tmp_path / "b.csv", log(1))
    code = (
        "import os, signal; from dqrm import checksums; from dqrm.data.prepare import prepare\n"
        "def kill(what, *_): what == STAGE and os.kill(os.getpid(), signal.SIGKILL)\n"
        "list_files = checksums.list_files\n"
        "checksums.list_files = lambda *given: (kill('computing checksums'), list_files(*given))[1]\n"
        "prepare(['b.csv'], 'b', progress=kill, extend='a')"
    ).replace("STAGE", repr(stage))
    ended = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False)
    assert ended.returncode == -signal.SIGKILL
    assert not (tmp_path / "b").exists()
    assert (tmp_path / "b.partial").is_dir()
    with pytest.raises(UserError, match=r"holds no dataset.json"):
        Dataset(tmp_path / "b.partial")
    with pytest.raises(UserError, match=r"holds no dataset.json"):
        prepare([tmp_path / "b.csv"], tmp_path / "c", extend=tmp_path / "b.partial")
    assert before == {file: file.read_bytes() for file in first.path.rglob("*") if file.is_file()}
    again = prepare([tmp_path / "b.csv"], tmp_path / "b", extend=first.path)
    whole = prepare([tmp_path / "b.csv"], tmp_path / "whole", extend=first.path)
    assert again.info == whole.info
    assert not (tmp_path / "b.partial").exists()
    assert os.listdir(again.path / "train") == os.listdir(whole.path / "train")
