"""Logs for the data tests, and a plain-Python reference of what Criteo's lines become."""

import csv
import math
import random
from collections import Counter

import numpy as np

from dqrm.data.config import CRITEO_CATEGORICAL, CRITEO_DENSE, PrepareConfig
from dqrm.data.parts import merge_parts, prepare_part
from dqrm.data.prepare import prepare

KAGGLE = PrepareConfig(layout="criteo-kaggle")


def criteo_lines(count, seed=0):
    """Lines in Criteo's layout: label, 13 integers, 26 hexadecimal categories, some missing."""
    draw = random.Random(seed)
    return [
        "\t".join(
            [str(draw.randint(0, 1))]
            + ["" if draw.random() < 0.2 else str(draw.randint(-2, 500)) for _ in CRITEO_DENSE]
            + ["" if draw.random() < 0.1 else f"{draw.randint(1, 30):08x}" for _ in CRITEO_CATEGORICAL]
        )
        for _ in range(count)
    ]


def write(path, rows, ending="\n"):
    path.write_bytes("".join(row + ending for row in rows).encode())
    return path


def table(path, rows, **options):
    """A CSV file of dicts."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], **options)
        writer.writeheader()
        writer.writerows(rows)
    return path


def content(dataset):
    """Every array of every split as bytes."""
    return {
        f"{name}/{file.name}": file.read_bytes()
        for name in ("train", "validation", "test")
        for file in sorted((dataset.path / name).iterdir())
    }


def ids(dataset, split, column):
    at = [known.name for known in dataset.columns].index(column)
    return np.concatenate([batch.ids[:, at].numpy() for batch in dataset.split(split).batches(64)]).tolist()


def reference(rows, min_count=1, modulo=None, cross=()):
    """Criteo's encoding over the Kaggle split, row by row: {split: [(label, dense, ids)]} and table rows."""
    parsed = []
    for row in rows:
        fields = row.split("\t")
        dense = [math.log1p(max(0, int(field))) if field else 0.0 for field in fields[1:14]]
        keys = [int(field, 16) if field else 0 for field in fields[14:]]
        for a, b in cross:
            keys.append(keys[a] << 32 | keys[b] if keys[a] and keys[b] else 0)
        parsed.append((int(fields[0]), dense, [key % modulo for key in keys] if modulo else keys))
    parts = [list(part) for part in np.array_split(np.arange(len(rows)), 7)]
    train, last = np.concatenate(parts[:6]).tolist(), parts[6]
    half = (len(last) + 1) // 2
    tables = []
    for column in range(len(parsed[0][2])):
        counts = Counter(parsed[row][2][column] for row in train)
        kept = [key for key in counts if counts[key] >= min_count]  # a Counter keeps the order of first appearance
        tables.append({key: number for number, key in enumerate(kept, 1)})
    coded = [(label, dense, [table.get(key, 0) for table, key in zip(tables, keys)]) for label, dense, keys in parsed]
    chosen = {"train": train, "validation": last[half:], "test": last[:half]}
    return {name: [coded[row] for row in rows] for name, rows in chosen.items()}, [len(t) + 1 for t in tables]


def check_against_reference(dataset, rows, **options):
    wanted, table_rows = reference(rows, **options)
    assert list(dataset.table_rows) == table_rows
    for name, coded in wanted.items():
        arrays = dataset.split(name).arrays
        assert arrays["label.u8"].tolist() == [label for label, _, _ in coded]
        assert arrays["ids.i32"].tolist() == [ids for _, _, ids in coded]
        dense = np.array([dense for _, dense, _ in coded], np.float32).reshape(len(coded), 13)
        np.testing.assert_array_max_ulp(arrays["dense.f32"], dense, 1)
    dataset.validate()


def spoil(row, at, text):
    fields = row.split("\t")
    fields[at] = text
    return "\t".join(fields)


LOG = [
    {
        "click": n % 2,
        "user": f"u{n % 5}",
        "ad": f"a{n % 3}",
        "price": n - 2,
        "tags": "x|y" if n % 2 else "",
        "day": n // 4,
    }
    for n in range(20)
]
LOG_CONFIG = PrepareConfig(label="click", categorical=("user", "ad"), dense=("price",), split="time")


def prepare_again(files, config, folder):
    """What a killed process is called with until its folder is there."""
    if not folder.exists():
        prepare(files, folder, config)


def prepare_in_parts(files, config, folder):
    """As `prepare_again`, in two parts."""
    if not folder.exists():
        for part in ("1/2", "2/2"):
            prepare_part(files, folder, part, config)
        merge_parts(files, folder, config)
        for part in ("1/2", "2/2"):
            prepare_part(files, folder, part, config)
