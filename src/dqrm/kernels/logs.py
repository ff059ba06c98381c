"""What preparing a log does for every line or id, compiled (`logs.c`). Each function works in one thread and lets
others run meanwhile. Without the library (`available`) the callers compute the same with polars and NumPy.
"""

from ctypes import c_int64, c_void_p
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dqrm.kernels.build import library

Array = NDArray[Any]
LABEL, DENSE, HEX, SKIPPED = range(4)

# Each function's arguments: p a pointer, l a 64-bit integer. All return one.
_PROTOTYPES = {
    "count_lines": "pl",
    "parse_lines": "pllplpllppppp",
    "code_few": "pllplpp",
    "place": "plp",
    "code_placed": "plpp",
    "count_codes": "pllplpp",
    "merge_runs": "ppplppplppp",
    "find_sorted": "pplplp",
    "hash_ids": "plpllp",
    "put_column": "pllppll",
}
_functions: dict[str, Any] = {}


def available() -> bool:
    """Whether the compiled kernels are there."""
    return library() is not None


class Parsed(NamedTuple):
    """Fields of n lines, column after column; missing ones are 0.

    labels: uint8 [n]. dense: float32 [D, n]. ids: uint32 [T, n]. places: flat positions in `dense`, int64, of numbers
    that the table does not have, which are 0 there. values: those numbers, int64.
    """

    labels: NDArray[np.uint8]
    dense: NDArray[np.float32]
    ids: NDArray[np.uint32]
    places: NDArray[np.int64]
    values: NDArray[np.int64]


def parse_lines(text: bytes, roles: bytes, table: NDArray[np.float32], low: int) -> Parsed | None:
    """Lines of Criteo's logs: fields with tabs between them, a newline after each line.

    Args:
        roles: what each field is: LABEL (0 or 1), DENSE (a whole number), HEX (up to 8 hexadecimal digits) or SKIPPED.
        table: what the whole numbers from `low` on become.

    Returns:
        None if a line has another number of fields, or a field is anything else.
    """
    lines = _call("count_lines", text, len(text))
    labels = np.empty(lines, np.uint8)
    dense = np.empty((roles.count(DENSE), lines), np.float32)
    ids = np.empty((roles.count(HEX), lines), np.uint32)
    places, values = np.empty(dense.size, np.int64), np.empty(dense.size, np.int64)
    others = _call(
        "parse_lines", text, len(text), lines, roles, len(roles), table, low, len(table), labels, dense, ids, places,
        values,
    )  # fmt: skip
    return None if others < 0 else Parsed(labels, dense, ids, places[:others].copy(), values[:others].copy())


# A column with more distinct ids than this is sorted: what finds them would no longer be in the processor's cache.
_FEW, _FEW_BITS = 1 << 14, 16


def code(numbers: NDArray[np.uint32]) -> tuple[NDArray[np.uint32], NDArray[Any]]:
    """The distinct ones of some numbers, sorted, and which of them each is, in the smallest unsigned type."""
    count = len(numbers)
    keys, codes = np.empty(count, np.uint32), np.empty(count, np.uint32)
    slots = np.zeros(1 << _FEW_BITS, np.uint64)
    distinct = _call("code_few", numbers, count, _FEW, slots, _FEW_BITS, keys, codes)
    if distinct >= 0:
        order = np.argsort(keys[:distinct])
        place = np.empty(distinct, np.min_scalar_type(max(0, distinct - 1)))
        place[order] = np.arange(distinct)
        return keys[order], place[codes]
    placed = np.empty(count, np.uint64)
    _call("place", numbers, count, placed)
    placed.sort()  # with the processor's vector instructions
    distinct = _call("code_placed", placed, count, keys, codes)
    return keys[:distinct].copy(), codes.astype(np.min_scalar_type(distinct - 1), copy=False)


def count_codes(
    codes: Array, counted: NDArray[np.bool_] | None, position: int, distinct: int
) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """How often each of `distinct` codes occurs, and the position of its first occurrence; both uint32 [distinct].

    Args:
        codes: uint8, uint16 or uint32. counted: which of them count; None: all. position: that of the first one.
    """
    counts, first = np.zeros(distinct, np.uint32), np.zeros(distinct, np.uint32)
    _call("count_codes", codes, codes.itemsize, len(codes), counted, position, counts, first)
    return counts, first


Run = tuple[NDArray[np.uint32], NDArray[np.uint32], NDArray[np.uint32]]


def merge_runs(a: Run, b: Run) -> Run:
    """Two runs of keys (sorted and distinct), counts and first positions as one: counts added, the least position."""
    total = len(a[0]) + len(b[0])
    keys, counts, first = (np.empty(total, np.uint32) for _ in range(3))
    length = _call("merge_runs", *a, len(a[0]), *b, len(b[0]), keys, counts, first)
    return keys[:length], counts[:length], first[:length]


def find_sorted(
    known: NDArray[np.uint32], table_rows: NDArray[np.int32], keys: NDArray[np.uint32]
) -> NDArray[np.int32]:
    """The table row of each of the sorted keys among sorted known ones; 0 where it has none."""
    found = np.empty(len(keys), np.int32)
    _call("find_sorted", known, table_rows, len(known), keys, len(keys), found)
    return found


def hash_ids(keys: NDArray[np.uint32], seeds: NDArray[np.uint64], rows: int) -> NDArray[np.int32]:
    """Table rows of ids as `data.hashing` says, int32 [N * functions]."""
    table_rows = np.empty(len(keys) * len(seeds), np.int32)
    _call("hash_ids", keys, len(keys), seeds, len(seeds), rows, table_rows)
    return table_rows


def put_column(codes: Array, table_rows: NDArray[np.int32] | None, out: NDArray[np.int32], column: int) -> None:
    """out[:, column] = table_rows[codes], or codes, which are int32 then. out: int32 [N, T], contiguous."""
    _call("put_column", codes, codes.itemsize, len(codes), table_rows, out, column, out.shape[1])


def _call(name: str, *arguments: Any) -> int:
    function = _functions.get(name)
    if function is None:
        function = getattr(library(), f"dqrm_{name}")
        function.argtypes = [c_void_p if letter == "p" else c_int64 for letter in _PROTOTYPES[name]]
        function.restype = c_int64
        _functions[name] = function  # last: another thread may take it at once
    assert all(a.flags.c_contiguous for a in arguments if isinstance(a, np.ndarray)), name
    result: int = function(*[a.ctypes.data if isinstance(a, np.ndarray) else a for a in arguments])
    return result
