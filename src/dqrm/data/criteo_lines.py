"""Criteo's lines -> typed rows by compiled code, block by block.

`Plan.typed` is the reference, and parses each block in which anything is not as usual, so that rows and messages are
the same either way.
"""

from collections.abc import Callable, Sequence

import numpy as np
import polars as pl

from dqrm.data.columns import Plan
from dqrm.data.config import CRITEO_CATEGORICAL
from dqrm.kernels import logs

# Numbers whose transformation is looked up: most of Criteo's.
_LOW, _END = -256, 1 << 16


def decoder(plan: Plan, names: Sequence[str]) -> Callable[[bytes], pl.DataFrame | None] | None:
    """What makes rows as `Plan.typed` does of whole lines with the columns `names`, or returns None where it cannot.

    None: this plan asks for more than compiled code does, or there is none.
    """
    alone = all(key.kind == "hex" and len(key.parts) == 1 for key in plan.keys)
    usual = plan.criteo and alone and not (plan.markers or plan.copied or plan.unmodelled or plan.weight)
    known = [key.name for key in plan.keys] == list(CRITEO_CATEGORICAL)
    if not (usual and known and names[-39:] == [*plan.dense, *CRITEO_CATEGORICAL] and logs.available()):
        return None
    label = [] if len(names) == 39 else [logs.SKIPPED if plan.label is None else logs.LABEL]
    roles = bytes([*label, *[logs.DENSE] * len(plan.dense), *[logs.HEX] * len(plan.keys)])
    table = transformed(plan, np.arange(_LOW, _END))

    def decode(lines: bytes) -> pl.DataFrame | None:
        parsed = logs.parse_lines(lines, roles, table, _LOW)
        if parsed is None:
            return None
        if len(parsed.places):
            parsed.dense.reshape(-1)[parsed.places] = transformed(plan, parsed.values)
        columns = [] if plan.label is None else [pl.Series("label", parsed.labels)]
        columns += [pl.Series(f"d{n}", column) for n, column in enumerate(parsed.dense)]
        columns += [pl.Series(f"k{n}", column) for n, column in enumerate(parsed.ids)]
        return pl.DataFrame(columns)

    return decode


def transformed(
    plan: Plan, numbers: np.ndarray[tuple[int], np.dtype[np.int64]]
) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    """Numbers of dense columns as `Plan.typed` transforms them, float32."""
    frame = pl.DataFrame({"number": numbers})
    return frame.select(plan.transform(pl.col("number"))).to_series().to_numpy()
