"""Criteo's lines as other programs process them, row by row in plain Python."""

import math
import struct

import numpy as np


def dlrm(rows):
    """DLRM's arrays of lines: y, X_int, X_cat and counts; ids in order of first appearance, missing as an id."""
    tables = [{} for _ in range(26)]
    labels, dense, ids = [], [], []
    for row in rows:
        fields = row.split("\t")
        labels.append(int(fields[0]))
        dense.append([max(0, int(field)) if field else 0 for field in fields[1:14]])
        keys = [int(field, 16) if field else 0 for field in fields[14:]]
        ids.append([table.setdefault(key, len(table)) for table, key in zip(tables, keys)])
    counts = [len(table) for table in tables]
    return {
        "X_cat": np.array(ids, np.float64).reshape(len(rows), 26),
        "X_int": np.array(dense, np.int32).reshape(len(rows), 13),
        "y": np.array(labels, np.int32),
        "counts": np.array(counts, np.int32),
    }


def records(arrays):
    """MLPerf's binary of such arrays."""
    lines = zip(arrays["y"].tolist(), arrays["X_int"].tolist(), arrays["X_cat"].tolist())
    return b"".join(struct.pack("<40i", y, *dense, *map(int, ids)) for y, dense, ids in lines)


def torchrec(folder, day, rows):
    """TorchRec's three files of a day: log(x + 3), the categories' 32 bits as int32, labels [N, 1]."""
    fields = [row.split("\t") for row in rows]
    dense = [[math.log((int(field) if field else 0) + 3) for field in line[1:14]] for line in fields]
    sparse = [[(int(field, 16) + 2**31) % 2**32 - 2**31 if field else 0 for field in line[14:]] for line in fields]
    np.save(folder / f"day_{day}_dense.npy", np.array(dense, np.float32))
    np.save(folder / f"day_{day}_sparse.npy", np.array(sparse, np.int32))
    np.save(folder / f"day_{day}_labels.npy", np.array([[int(line[0])] for line in fields], np.int32))


def hexadecimal(rows):
    """Criteo lines with ids over all of 32 bits."""
    changed = []
    for row in rows:
        fields = row.split("\t")
        fields[14:] = [f"{int(field, 16) * 2654435761 % 2**32:08x}" if field else "" for field in fields[14:]]
        changed.append("\t".join(fields))
    return changed
