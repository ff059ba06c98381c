"""Writes a log of the size and shape of Criteo's Kaggle file, to measure preparation and training at full scale.

    python benchmarks/kaggle_sized_log.py train.txt
    dqrm prepare train.txt --layout criteo-kaggle -o data/kaggle

45,840,617 lines (12 GB), 13 integers and 26 hexadecimal columns with Kaggle's table sizes and skewed ids. Labels are
coin flips: there is nothing to learn. `dqrm generate` draws logs that can be learned.
"""

import argparse
from pathlib import Path

import numpy as np
import polars as pl

TABLE_ROWS = (1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194, 27, 14992, 5461306, 10,
              5652, 2173, 4, 7046547, 18, 15, 286181, 105, 142572)  # fmt: skip
CHUNK = 500_000
HEX = pl.Series([f"{number:04x}" for number in range(1 << 16)])


def chunk(random: np.random.Generator, rows: int) -> pl.DataFrame:
    """`rows` lines of 40 columns."""
    columns = {"label": pl.Series((random.random(rows) < 0.256).astype(np.uint8))}
    for number in range(13):
        values = pl.Series(random.exponential(20, rows).astype(np.int32))
        columns[f"I{number + 1}"] = values.set(pl.Series(random.random(rows) < 0.2), None)
    for number, size in enumerate(TABLE_ROWS):
        ids = (random.random(rows) ** (1.6 if size > 1e6 else 3) * size).astype(np.uint64)
        # An odd factor permutes the 32-bit numbers, so that different ids stay different.
        keys = ((ids + np.uint64(77777 * number + 1)) * np.uint64(2654435761)) % np.uint64(1 << 32)
        high, low = (keys >> np.uint64(16)).astype(np.uint32), (keys & np.uint64(0xFFFF)).astype(np.uint32)
        columns[f"C{number + 1}"] = HEX.gather(high) + HEX.gather(low)
    return pl.DataFrame(columns)


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="The file to write.")
    parser.add_argument("--rows", type=int, default=45_840_617, help="Lines.")
    options = parser.parse_args()
    random = np.random.default_rng(0)
    with options.output.open("wb") as file:
        for start in range(0, options.rows, CHUNK):
            frame = chunk(random, min(CHUNK, options.rows - start))
            frame.write_csv(file, include_header=False, separator="\t", quote_style="never")


if __name__ == "__main__":
    main()
