"""What documentation tells people to type: commands and code blocks, and small stand-ins for the files they name."""

import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from dqrm.data.synthetic import generate
from dqrm.data.synthetic_config import GenerateConfig

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MARKER = re.compile(r"<!-- not run: (.+) -->")


@dataclass(frozen=True)
class Block:
    """A fenced block of code.

    Attributes:
        line: number of its first line. language: of the fence, '' for none.
        not_run: why it is only checked, from a comment `<!-- not run: ... -->` above the fence.
    """

    line: int
    language: str
    text: str
    not_run: str | None


def blocks(text: str) -> list[Block]:
    """The fenced blocks of a page of Markdown."""
    lines, fenced, start = text.splitlines(), [], None
    for number, line in enumerate(lines):
        if not line.startswith("```"):
            continue
        if start is None:
            start = number
            continue
        marker = MARKER.fullmatch(lines[start - 1].strip()) if start else None
        fenced.append(Block(start + 2, lines[start][3:], "\n".join(lines[start + 1 : number]), marker and marker[1]))
        start = None
    assert start is None, f"the block of line {start} has no end"
    return fenced


def commands(text: str) -> list[list[str]]:
    """The commands of a block of shell, as argument lists without comments."""
    lines = text.replace("\\\n", " ").splitlines()
    return [arguments for line in lines if (arguments := shlex.split(line, comments=True))]


def make_stand_ins() -> None:
    """In the current folder: small logs under the names that the documentation uses, and the configurations."""
    shutil.copytree(ROOT / "configs", "configs")
    generate("train.txt", GenerateConfig(rows=700))
    for day in range(3):
        generate(f"day_{day}", GenerateConfig(rows=300, seed=day))
        Path(f"day_{day}.truth.npy").unlink()  # 'day_*' would take it for a day
    random = np.random.default_rng(0)
    ml1m = ["user", "movie", "gender", "age", "occ", "zip", "year", "genres", "mpaa", "director", "actor1"]
    pl.DataFrame(
        {"label": random.integers(0, 2, 600)} | {name: random.integers(0, 40, 600).astype(str) for name in ml1m}
    ).write_parquet("clicks.parquet")
    mine = pl.DataFrame(
        {"clicked": random.integers(0, 2, 600)}
        | {name: random.integers(0, 40, 600).astype(str) for name in ("user", "ad", "site")}
        | {name: random.integers(0, 40, 600) for name in ("price", "age")}
    )
    mine[:300].write_parquet("clicks-1.parquet")
    mine[300:].write_parquet("clicks-2.parquet")
    for file in ("clicks.csv", "train.csv", "valid.csv", "test.csv"):
        mine.write_csv(file)
    lines = (f"{label} {ids[0]}:1 {ids[1]}:1" for label, *ids in random.integers([0, 1, 30], [2, 30, 60], (300, 3)))
    Path("clicks.svm").write_text("\n".join(lines) + "\n")
