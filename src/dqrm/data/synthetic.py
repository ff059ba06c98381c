"""A click log in the layout of Criteo's Kaggle file, drawn from a known model.

Real logs may not be redistributed, so the demo and the tests draw theirs. Every line comes from a few hidden things
(who, which ad, where, when: `ENTITIES`); the 26 categorical columns are groups and crosses of those (`COLUMNS`). A
click is drawn with probability

    sigmoid(bias + sum_j w_j log(1 + max(x_j, 0)) + sum_c s_c e_c(id) + sum_ab t_ab <f_a(id), f_b(id)>)

over the 13 dense columns j, the 26 categorical columns c and the pairs (a, b) of `PAIRS`. e_c(id) is about standard
normal; f_c(id) is a vector of four numbers of variance 1/2, so that <f_a, f_b> has variance 1. Where a field is missing
the terms that need it are 0, but for a column's own, which is its `blank`. So the probability is a function of what
the line shows, and the AUC of the probabilities is the ceiling for any trained model.

As in ad logs, crosses have nearly as many ids as there are lines, most of them seen once: memorizing those is how an
FP32 model overfits. Their missing fields are informative, so row 'missing' grows large and sets the scale of its
table; at 4 bits the rare ids beside it then stay 0 until many updates agree.

Nothing is kept per id: e and f are hashes of (seed, column, id). Lines are drawn in blocks of `BLOCK`, each with a
random state of its own, so memory is bounded and the chunk size does not change a byte.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from dqrm.data import synthetic_files
from dqrm.data.lookalike import Lookalike, bias_for, finalize, sigmoid
from dqrm.data.synthetic_config import GenerateConfig
from dqrm.data.synthetic_files import Generated, Piece, Progress, Told, truth_path
from dqrm.errors import UserError

__all__ = ["Generated", "generate", "truth_path"]

BLOCK = 1 << 14
DAYS = 7
RANK = 4

Keys = NDArray[np.uint64]
Floats = NDArray[np.float32]
Drawn = tuple[NDArray[Any], NDArray[np.bool_]]


@dataclass(frozen=True)
class Entity:
    """Something hidden behind a line. Its number is `floor(size * u^skew)`, u uniform: larger skew, heavier head."""

    size: float  # how many there are; below 1: times the number of lines
    skew: float


@dataclass(frozen=True)
class Column:
    """A categorical column: a group of, or a cross of, entities."""

    of: tuple[str, ...]
    groups: int  # number of groups that ids are put into; 0: each its own
    effect: float  # s_c
    missing: float = 0.0  # share of fields
    blank: float = 0.0  # what a missing field adds to the logit


@dataclass(frozen=True)
class Dense:
    """A dense column: `floor(exp(mean + spread * z)) + shift`; z is standard normal, 36 % of it a trait of `tied`."""

    mean: float
    spread: float
    shift: int
    tied: str
    effect: float  # w_j
    missing: float


ENTITIES = {
    "user": Entity(0.015, 2.0),
    "page": Entity(0.01, 2.0),
    "ad": Entity(1000, 2.0),
    "site": Entity(500, 2.0),
    "place": Entity(200, 2.0),
    "device": Entity(40, 2.0),
    "hour": Entity(24 * DAYS, 1.0),  # in a log: the line's place in time
}

COLUMNS = (
    Column(("site",), 0, 0.50),
    Column(("ad",), 300, 0.40),
    Column(("user", "ad"), 0, 0.15, 0.08, -1.0),
    Column(("user", "site"), 0, 0.15, 0.08, 1.0),
    Column(("place",), 0, 0.30),
    Column(("device",), 12, 0.30, 0.12),
    Column(("ad",), 0, 0.50),
    Column(("site",), 200, 0.15),
    Column(("device",), 3, 0.15),
    Column(("user",), 0, 0.40),
    Column(("page",), 1000, 0.30),
    Column(("user", "place"), 0, 0.15, 0.08, 1.0),
    Column(("ad",), 1000, 0.15),
    Column(("hour",), 24, 0.15),
    Column(("page",), 0, 0.30),
    Column(("page", "ad"), 0, 0.15, 0.08, 1.0),
    Column(("device",), 10, 0.10),
    Column(("site", "device"), 3000, 0.25),
    Column(("ad",), 700, 0.15, 0.44),
    Column(("hour",), 4, 0.10, 0.44),
    Column(("page", "site"), 0, 0.15, 0.08, -1.0),
    Column(("device", "place"), 18, 0.10, 0.76),
    Column(("place",), 15, 0.10),
    Column(("user", "page"), 0, 0.15, 0.08, 1.0),
    Column(("ad", "place"), 100, 0.10, 0.44),
    Column(("site", "ad"), 0, 0.15, 0.44, 0.3),
)

# (a, b, t_ab), columns counted from 0
PAIRS = ((0, 1, 0.30), (4, 1, 0.25), (7, 4, 0.20))

DENSE = (
    Dense(0.5, 1.2, 0, "ad", 0.20, 0.45),
    Dense(2.0, 2.0, -3, "site", -0.06, 0.0),
    Dense(2.0, 1.4, 0, "page", 0.08, 0.21),
    Dense(1.7, 1.0, 0, "site", 0.10, 0.22),
    Dense(7.5, 2.2, 0, "user", -0.08, 0.03),
    Dense(3.7, 1.5, 0, "user", -0.10, 0.22),
    Dense(1.6, 1.5, -1, "ad", 0.12, 0.04),
    Dense(2.2, 1.0, 0, "place", 0.00, 0.0),
    Dense(3.6, 1.5, -1, "page", 0.00, 0.04),
    Dense(-0.6, 0.8, 0, "ad", 0.35, 0.45),
    Dense(0.7, 1.1, 0, "user", 0.18, 0.04),
    Dense(-1.5, 1.2, 0, "device", 0.10, 0.76),
    Dense(1.7, 1.1, 0, "site", -0.12, 0.22),
)

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def generate(
    path: str | Path,
    config: GenerateConfig | None = None,
    *,
    chunk_rows: int = 4 * BLOCK,
    progress: Progress | None = None,
) -> Generated:
    """Write a log of `config.rows` lines to `path` and the true probabilities to `truth_path(path)`.

    A line is the label, 13 integers, 26 categories of 8 hexadecimal digits, tab separated, an empty field where a value
    is missing, lines in order of time. Both files appear whole or not at all.

    With `config.days` the path is that of a new folder, with a log `day_0`, `day_1`, ... and a file
    `_day_0.truth.npy`, ... for each day; with `config.like` the model is that of `dqrm.data.lookalike`.

    Args:
        chunk_rows: about how many lines to hold in memory; does not change the result.
        progress: called as progress(stage, lines written, lines in all).

    Raises:
        UserError: `path` cannot be written, or `chunk_rows` is below 1.
    """
    config = config or GenerateConfig()
    if chunk_rows < 1:
        raise UserError(f"chunk_rows: got {chunk_rows}, expected at least 1")
    told = Told(progress, config.rows)
    if config.like is not None:
        return synthetic_files.write_days(Path(path), Lookalike(config), chunk_rows, told)
    return synthetic_files.write_log(Path(path), config.rows, _pieces_of(config, chunk_rows), told)


def _pieces_of(config: GenerateConfig, chunk_rows: int) -> Iterator[Piece]:
    model = _Model(config)
    blocks = -(-config.rows // BLOCK)
    step = max(1, chunk_rows // BLOCK)
    for first in range(0, blocks, step):
        drawn = [model.block(number) for number in range(first, min(first + step, blocks))]
        frame = pl.concat([part for part, _ in drawn])
        write = partial(frame.write_csv, include_header=False, separator="\t", quote_style="never")
        yield Piece(write, np.concatenate([part for _, part in drawn]), int(frame["label"].sum()))


class _Model:
    """The known model of one configuration: draws lines and says how likely each is clicked."""

    def __init__(self, config: GenerateConfig) -> None:
        self.config = config
        self.bias = bias_for(self.draw(-1)[-1], config.click_rate)  # of a block that no log contains

    def block(self, number: int) -> tuple[pl.DataFrame, Floats]:
        """The lines of block `number` as a frame of 40 columns, and their probabilities float32 [lines]."""
        rng, dense, categories, logits = self.draw(number)
        probabilities = sigmoid(logits + self.bias)
        label = (rng.random(BLOCK, dtype=np.float32) < probabilities).astype(np.uint8)
        columns = [pl.Series("label", label)]
        for index, (values, absent) in enumerate(dense):
            columns.append(_with_nulls(pl.Series(f"I{index + 1}", values), absent))
        for index, (keys, absent) in enumerate(categories):
            columns.append(_with_nulls(_hexadecimal(f"C{index + 1}", keys), absent))
        left = min(BLOCK, self.config.rows - number * BLOCK)
        return pl.DataFrame(columns).head(left), probabilities[:left]

    def draw(self, number: int) -> tuple[np.random.Generator, list[Drawn], list[Drawn], Floats]:
        """Block `number` of `BLOCK` lines, without labels.

        Returns:
            the block's random state (to go on with); the dense columns (values int64 [BLOCK], absent bool [BLOCK]); the
            categorical ones (32-bit ids as uint64 [BLOCK], absent); the logits without bias, float32 [BLOCK].
        """
        rows, factor = self.config.rows, self.config.missing
        rng = np.random.default_rng([self.config.seed, number + 1])
        entities = {name: self._entity(entity, rng) for name, entity in ENTITIES.items()}
        if number >= 0:
            line = np.arange(number * BLOCK, (number + 1) * BLOCK)
            entities["hour"] = (line * (24.0 * DAYS / rows)).astype(np.uint64)

        logits = np.zeros(BLOCK, dtype=np.float32)
        dense = []
        for index, spec in enumerate(DENSE):
            trait = _normal(self._hash(100 + index, entities[spec.tied]))
            z = np.float32(0.8) * rng.standard_normal(BLOCK, dtype=np.float32) + np.float32(0.6) * trait
            values = np.floor(np.exp(np.float32(spec.mean) + np.float32(spec.spread) * z)).astype(np.int64) + spec.shift
            absent = rng.random(BLOCK, dtype=np.float32) < spec.missing * factor
            shown = np.where(absent, 0, np.maximum(values, 0)).astype(np.float32)
            logits += np.float32(spec.effect) * np.log1p(shown)
            dense.append((values, absent))

        categories = []
        paired = {column for a, b, _ in PAIRS for column in (a, b)}
        vectors = {}
        for index, column in enumerate(COLUMNS):
            # The column is in the hash, so two columns of one entity group it differently and share no ids.
            keys = self._hash(200 + index, *(entities[name] for name in column.of))
            if column.groups:
                keys = self._hash(300 + index, keys % np.uint64(column.groups))
            keys &= np.uint64(0xFFFFFFFF)
            absent = rng.random(BLOCK, dtype=np.float32) < column.missing * factor
            effect = _normal(self._hash(400 + index, keys))
            logits += np.where(absent, np.float32(column.blank), np.float32(column.effect) * effect)
            if index in paired:
                vectors[index] = np.where(absent[:, None], np.float32(0), _vector(self._hash(500 + index, keys)))
            categories.append((keys, absent))
        for a, b, weight in PAIRS:
            logits += np.float32(weight) * np.einsum("nr,nr->n", vectors[a], vectors[b])
        return rng, dense, categories, logits

    def _entity(self, entity: Entity, rng: np.random.Generator) -> Keys:
        size = max(2.0, entity.size * self.config.rows if entity.size < 1 else entity.size)
        return (size * rng.random(BLOCK) ** entity.skew).astype(np.uint64)

    def _hash(self, salt: int, *keys: Keys) -> Keys:
        """One well mixed 64-bit number per line from (seed, salt, keys...): splitmix64's steps."""
        mixed = np.full(len(keys[0]), (self.config.seed * 1_000_003 + salt) % (1 << 64), dtype=np.uint64)
        for key in keys:
            mixed = finalize((mixed ^ key) * _GOLDEN)
        return mixed


def _pieces(hashed: Keys) -> Floats:
    """Four uniform numbers in [0, 1) from each 64-bit one: float32 [N, 4]."""
    return hashed.astype("<u8", copy=False).view("<u2").reshape(-1, RANK).astype(np.float32) * np.float32(2**-16)


def _normal(hashed: Keys) -> Floats:
    """About standard normal numbers, float32 [N]: the sum of four uniform ones, of variance 4/12."""
    a, b, c, d = _pieces(hashed).T
    normal: Floats = (a + b + c + d - np.float32(2)) * np.float32(3**0.5)
    return normal


def _vector(hashed: Keys) -> Floats:
    """Vectors float32 [N, RANK] with entries of mean 0 and variance 1/2, so that a product of two has variance 1."""
    return (_pieces(hashed) - np.float32(0.5)) * np.float32(6**0.5)


@cache
def _four_digits() -> pl.Series:
    """The numbers below 65536 in hexadecimal: looking halves up is 3 times faster than making text of each id."""
    return pl.Series([f"{number:04x}" for number in range(1 << 16)])


def _hexadecimal(name: str, keys: Keys) -> pl.Series:
    """32-bit ids uint64 [N] as 8 lower-case hexadecimal digits each."""
    high = pl.Series(name, (keys >> np.uint64(16)).astype(np.uint32))
    low = pl.Series((keys & np.uint64(0xFFFF)).astype(np.uint32))
    return _four_digits().gather(high).alias(name) + _four_digits().gather(low)


def _with_nulls(values: pl.Series, absent: NDArray[np.bool_]) -> pl.Series:
    return values.set(pl.Series(absent), None) if absent.any() else values
