"""Compiled coding, counting, merging, looking up and hashing of ids against NumPy."""

import numpy as np
import polars as pl
import pytest

from dqrm.data.hashing import HashedRows
from dqrm.kernels import logs

pytestmark = pytest.mark.skipif(not logs.available(), reason="needs the compiled kernels")

DRAW = np.random.default_rng(0)
NUMBERS = [
    np.array([7], np.uint32),
    np.array([0, 0, 2**32 - 1, 1, 0], np.uint32),
    DRAW.integers(0, 256, 3000, dtype=np.uint32),
    DRAW.integers(0, 257, 3000, dtype=np.uint32),
    DRAW.integers(0, 1 << 14, 200_000, dtype=np.uint32) << np.uint32(18),
    np.arange(1 << 14, dtype=np.uint32)[::-1].copy(),
    np.arange((1 << 14) + 1, dtype=np.uint32)[::-1].copy(),
    DRAW.integers(0, 2**32, 100_000, dtype=np.uint32),
]


@pytest.mark.parametrize("numbers", NUMBERS)
def test_code(numbers):
    keys, codes = logs.code(numbers)
    wanted, inverse = np.unique(numbers, return_inverse=True)
    assert np.array_equal(keys, wanted)
    assert np.array_equal(codes, inverse)
    assert codes.dtype == np.min_scalar_type(len(wanted) - 1)


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.uint32])
@pytest.mark.parametrize("some", [False, True])
def test_count_codes(some, kind):
    codes = DRAW.integers(0, 200, 5000).astype(kind)
    counted = DRAW.random(5000) < 0.1 if some else None
    counts, first = logs.count_codes(codes, counted, 2**32 - 5000, 201)
    chosen = np.ones(5000, bool) if counted is None else counted
    for code in range(201):
        places = np.flatnonzero((codes == code) & chosen)
        assert counts[code] == len(places)
        assert first[code] == (places[0] + 2**32 - 5000 if len(places) else 0)


@pytest.mark.parametrize("sizes", [(0, 0), (0, 5), (5, 0), (1, 1), (300, 300), (1000, 7)])
@pytest.mark.parametrize("below", [1001, 2**32])
def test_merge_runs(sizes, below):
    runs = []
    for size in sizes:
        keys = np.sort(DRAW.choice(1001, size, replace=False)).astype(np.uint32)
        keys += np.uint32(below - 1001)  # up to the largest there is
        runs.append((keys, *DRAW.integers(0, 2**31, (2, size)).astype(np.uint32)))
    wanted = {}
    for run in runs:
        for key, count, first in zip(*(column.tolist() for column in run)):
            known = wanted.get(key, (0, 2**32))
            wanted[key] = (known[0] + count, min(known[1], first))
    merged = [column.tolist() for column in logs.merge_runs(*runs)]
    assert list(zip(*merged)) == [(key, *wanted[key]) for key in sorted(wanted)]


@pytest.mark.parametrize(("known", "asked"), [(0, 5), (1, 1), (1, 100), (1000, 7), (1000, 1000), (7, 1000), (5, 0)])
def test_find_sorted(known, asked):
    for largest in (1500, 2**32):
        keys = np.unique(np.append(DRAW.integers(0, largest, known), [0, largest - 1][: min(2, known)])).astype(
            np.uint32
        )
        rows = DRAW.permutation(len(keys)).astype(np.int32) + 1
        looked_for = np.concatenate([DRAW.integers(0, largest, asked), DRAW.choice(keys, asked) if len(keys) else []])
        looked_for = np.unique(looked_for).astype(np.uint32)
        table = dict(zip(keys.tolist(), rows.tolist()))
        found = logs.find_sorted(keys, rows, looked_for)
        assert found.tolist() == [table.get(key, 0) for key in looked_for.tolist()]


@pytest.mark.parametrize("rows", [2, 3, 4, 1000, 1 << 20, (1 << 20) + 1, 2**31 - 1])
@pytest.mark.parametrize("hashes", [1, 3])
def test_hash_ids(hashes, rows, monkeypatch):
    keys = np.concatenate([[0, 1, 2**32 - 1], DRAW.integers(0, 2**32, 2000)]).astype(np.uint32)
    hashed, column = HashedRows(rows, 25, hashes), pl.Series(keys)
    compiled = hashed.lookup(column)
    monkeypatch.setattr(logs, "available", lambda: False)
    plain = hashed.lookup(column)
    assert np.array_equal(compiled, plain)
    assert compiled.dtype == plain.dtype == np.int32


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.uint32, None])
def test_put_column(kind):
    codes = DRAW.integers(0, 200, 1000).astype(kind or np.int32)
    table_rows = None if kind is None else DRAW.permutation(200).astype(np.int32)
    out = np.full((1000, 3), -1, np.int32)
    logs.put_column(codes, table_rows, out, 1)
    assert np.array_equal(out[:, 1], codes if table_rows is None else table_rows[codes])
    assert (out[:, [0, 2]] == -1).all()


@pytest.mark.parametrize("size", [0, 1, 254, 255, 256, 511, 5000])
def test_lines_are_counted(size):
    """Through `parse_lines` of lines of one label."""
    text = b"1\n" * size
    parsed = logs.parse_lines(text, bytes([logs.LABEL]), np.zeros(1, np.float32), 0)
    assert parsed is not None
    assert parsed.labels.tolist() == [1] * size
