"""The dataset folder on disk: names, types and shapes of its files, the same for who writes and who reads.

dataset.json                    schema, table sizes, rows per split, sources, fingerprint
vocabulary/<nn>_<name>.parquet  key, row, count of each table; also since, last where it extends another dataset
rare/<nn>_<name>.parquet        key, count, last of the ids without a row, where there are any
train/ validation/ test/        flat little-endian arrays, below
"""

import re
from typing import Any, Literal, get_args

import numpy as np

# Written unless the content needs a newer reader, so that an older dqrm opens what it can.
FORMAT_VERSION = 1
# Ids that are hashed, or vocabularies of several days, which may have vacant rows.
GROWING_VERSION = 2
KNOWN_VERSIONS = (FORMAT_VERSION, GROWING_VERSION)
INFO = "dataset.json"
SplitName = Literal["train", "validation", "test"]
SPLITS: tuple[str, ...] = get_args(SplitName)

DENSE, IDS, LABEL = "dense.f32", "ids.i32", "label.u8"
# Only where the schema names a column for them.
WEIGHT, GROUP = "weight.f32", "group.i32"


def values_file(column: int) -> str:
    """Name of the file of the ids of the multi-valued column number `column` (in schema order)."""
    return f"{column:02d}.values.i32"


def offsets_file(column: int) -> str:
    """Name of the file of each row's first position in the values; one more entry than rows."""
    return f"{column:02d}.offsets.i64"


def vocabulary_file(column: int, name: str) -> str:
    """Path inside the folder of a column's vocabulary; any name gives a valid file name."""
    return f"vocabulary/{column:02d}_{re.sub(r'[^A-Za-z0-9_.-]', '_', name)[:60]}.parquet"


def rare_file(vocabulary: str) -> str:
    """Path inside the folder of the ids without a row, from that of the vocabulary."""
    return vocabulary.replace("vocabulary/", "rare/", 1)


def arrays(info: dict[str, Any], split: str) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
    """The arrays of one split as {file name: (dtype, shape)}."""
    rows, schema = info["rows"][split], info["schema"]
    single = sum(not column["multi"] for column in schema["columns"])
    described: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {
        DENSE: (np.dtype("<f4"), (rows, len(schema["dense"]))),
        IDS: (np.dtype("<i4"), (rows, single)),
        LABEL: (np.dtype("u1"), (rows,)),
    }
    if schema.get("weight") is not None:
        described[WEIGHT] = (np.dtype("<f4"), (rows,))
    if schema.get("group") is not None:
        described[GROUP] = (np.dtype("<i4"), (rows,))
    for number, column in enumerate(schema["columns"]):
        if column["multi"]:
            described[values_file(number)] = (np.dtype("<i4"), (info["values"][split][column["name"]],))
            described[offsets_file(number)] = (np.dtype("<i8"), (rows + 1,))
    return described
