"""What preparing a log does for every line or id, compiled (`logs.c`); each function works in one thread and lets others
run meanwhile. Without the library (`available`) the callers compute the same with polars and NumPy.
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
    "parse_lines": "pllplpllppppp",
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
    lines = text.count(b"\n")
    labels = np.empty(lines, np.uint8)
    dense = np.empty((roles.count(DENSE), lines), np.float32)
    ids = np.empty((roles.count(HEX), lines), np.uint32)
    places, values = np.empty(dense.size, np.int64), np.empty(dense.size, np.int64)
    others = _call(
        "parse_lines", text, len(text), lines, roles, len(roles), table, low, len(table), labels, dense, ids, places,
        values,
    )  # fmt: skip
    return None if others < 0 else Parsed(labels, dense, ids, places[:others].copy(), values[:others].copy())


def _call(name: str, *arguments: Any) -> int:
    function = _functions.get(name)
    if function is None:
        function = getattr(library(), f"dqrm_{name}")
        function.argtypes = [c_void_p if letter == "p" else c_int64 for letter in _PROTOTYPES[name]]
        function.restype = c_int64
        _functions[name] = function  # last: another thread may take it at once
    result: int = function(*[a.ctypes.data if isinstance(a, np.ndarray) else a for a in arguments])
    return result
