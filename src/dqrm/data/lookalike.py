"""A click log with the table sizes of Criteo's logs, day by day, from a known model; as fast as numpy writes text.

The 26 categorical columns and 13 dense ones are independent. A click is drawn with probability

    sigmoid(bias + sum_j w_j log(1 + max(x_j, 0)) + sum_c s_c e_c(id) + sum_ab t <f_a(id), f_b(id)>)

over the dense columns j, the categorical ones c, and three pairs (a, b) of small tables; e_c(id) is uniform with
variance 1, f_c(id) a vector of `RANK` numbers of variance 1/2. Both are hashes of (seed, column, id), so an id that
appears on a later day brings an effect of its own. A missing field adds 0.

Popularity: a line takes place `floor(places * u^skew)`, u uniform. The number of places is such that a log of the
original's length shows about as many ids as the original's table has rows (`_places`). Drift X: each place of a table
of `_STABLE` rows or more changes hands once in 1/X days, each at a time of its own. Half of the successors are new
ids, the other half ids that the table had from the beginning.

Line n of day d depends on the configuration, d and n only: lines are drawn in blocks, block b of day d from Philox
(Salmon et al., SC 2011) with the key (seed, d * 2^32 + b). So neither chunks nor threads change a byte, and a log in
one file is its days one after the other.
"""

import threading
from dataclasses import dataclass
from functools import cache, cached_property
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dqrm.data.synthetic_config import DRIFT, GenerateConfig

BLOCK = 1 << 13
RANK = 4

Floats = NDArray[np.float32]
Texts = NDArray[np.uint64]  # up to 8 ASCII characters each, zeros after them

# Draws are 16 bits where a table of 2^16 outcomes is fine enough.
_FINE = 1 << 16
# Rows up to which that is so: the last places of u^3 are then still apart.
_TABLED = 20_000
# Tables with fewer rows have the same ids and popularity every day, as countries and devices have.
_STABLE = 1000
# Weight of a pair of columns.
_PAIR = 0.25
_DENSE_SALT, _ID_SALT, _EFFECT_SALT, _VECTOR_SALT, _HEIR_SALT = 1, 100, 200, 300, 400


@dataclass(frozen=True)
class Original:
    """A log to imitate: rows per table (of all its lines), its lines, and pairs of columns that interact."""

    table_rows: tuple[int, ...]
    lines: int
    pairs: tuple[tuple[int, int], ...]


# Rows without row 0, of the tables in the DQRM paper's models; Terabyte's with ids modulo 10 million.
ORIGINALS = {
    "criteo-kaggle": Original(
        (1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194, 27, 14992, 5461306, 10,
         5652, 2173, 4, 7046547, 18, 15, 286181, 105, 142572),
        45_840_617,
        ((0, 1), (4, 7), (12, 18)),
    ),
    "criteo-terabyte": Original(
        (9980200, 26095, 17224, 7383, 20152, 3, 7112, 1435, 62, 9756762, 1332128, 314263, 10, 2208, 11168, 122, 4, 971,
         14, 9994101, 7267918, 9946670, 415284, 12422, 102, 36),
        4_373_472_329,
        ((7, 17), (13, 15), (3, 6)),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Dense:
    """A dense column: `floor(exp(mean + spread * z)) + shift`, z standard normal."""

    mean: float
    spread: float
    shift: int
    effect: float  # w_j
    missing: float


DENSE = (
    Dense(0.5, 1.2, 0, 0.20, 0.45),
    Dense(2.0, 2.0, -3, -0.06, 0.0),
    Dense(2.0, 1.4, 0, 0.08, 0.21),
    Dense(1.7, 1.0, 0, 0.10, 0.22),
    Dense(7.5, 2.2, 0, -0.08, 0.03),
    Dense(3.7, 1.5, 0, -0.10, 0.22),
    Dense(1.6, 1.5, -1, 0.12, 0.04),
    Dense(2.2, 1.0, 0, 0.00, 0.0),
    Dense(3.6, 1.5, -1, 0.00, 0.04),
    Dense(-0.6, 0.8, 0, 0.35, 0.45),
    Dense(0.7, 1.1, 0, 0.18, 0.04),
    Dense(-1.5, 1.2, 0, 0.10, 0.76),
    Dense(1.7, 1.1, 0, -0.12, 0.22),
)
# Share of missing fields per categorical column.
MISSING = (0, 0, 0.03, 0.03, 0, 0.12, 0, 0, 0, 0, 0, 0.03, 0, 0, 0, 0.03, 0, 0, 0.44, 0.44, 0.03, 0.76, 0, 0.03, 0.44,
           0.44)  # fmt: skip

_WIDTH = 9  # a field and its separator
LINE = np.dtype(
    [("label", "u1"), ("tab", "u1")] + [field for n in range(39) for field in ((f"f{n}", "<u8"), (f"end{n}", "u1"))]
)
_HEX = np.array([int.from_bytes(f"{number:02x}".encode(), "little") for number in range(256)], np.uint16)


class Lookalike:
    """The known model of one configuration: draws the lines of a day, block by block. Safe in several threads once the
    day has been set."""

    def __init__(self, config: GenerateConfig) -> None:
        assert config.like is not None
        self.config, self.original = config, ORIGINALS[config.like]
        self._local = threading.local()
        self.drift = DRIFT if config.drift is None else config.drift
        self.columns = [
            _Column(self, n, rows, MISSING[n] * config.missing) for n, rows in enumerate(self.original.table_rows)
        ]
        self._dense = [_dense_outcomes(spec, spec.missing * config.missing) for spec in DENSE]
        self._tabled = [column for column in self.columns if column.rows <= _TABLED]
        self._hashed = [column for column in self.columns if column.rows > _TABLED]
        self.bias = np.float32(0)
        self.day = 0
        self.set_day(0)
        # Of a block that no day has.
        self.bias = bias_for(self._draw((1 << 32) - 1, None)[1], config.click_rate)

    def set_day(self, day: int) -> None:
        """Go to a day; blocks are of that day from then on."""
        self.day = day
        for column in self._tabled:
            column.make_table(day)

    def block(self, number: int, rows: int) -> tuple[bytearray, Floats, int]:
        """The first `rows` lines (at most BLOCK) of a block of the day: text, their true probabilities float32 [rows],
        and the number of clicks."""
        buffer = self._buffer()
        lines = np.frombuffer(buffer, LINE)
        uniform, logits = self._draw(number, lines)
        probabilities = sigmoid(logits + self.bias)
        clicks = uniform < probabilities
        lines["label"] = clicks.view(np.uint8) + np.uint8(ord("0"))
        # No text holds a zero, so what is left of each field's 8 bytes are its characters.
        text = (buffer if rows == BLOCK else buffer[: rows * LINE.itemsize]).translate(None, b"\0")
        return text, probabilities[:rows], int(clicks[:rows].sum())

    def _buffer(self) -> bytearray:
        """A thread's own lines, with what ends each field in place."""
        if not hasattr(self._local, "buffer"):
            self._local.buffer = bytearray(BLOCK * LINE.itemsize)
            lines = np.frombuffer(self._local.buffer, LINE)
            for name in ("tab", *(f"end{n}" for n in range(39))):
                lines[name] = ord("\n" if name == "end38" else "\t")
        buffer: bytearray = self._local.buffer
        return buffer

    def _draw(self, number: int, lines: Any) -> tuple[Floats, Floats]:
        """Fill the fields of a block's lines, if any: uniform numbers for the labels and logits, float32 [BLOCK]."""
        key = (self.config.seed % (1 << 64) << 64) + (self.day << 32) + number
        random = np.random.Philox(key=key)
        fine = len(DENSE) + len(self._tabled) + len(self._hashed)
        # As `take` wants them: it would convert them again for each table, and without "clip" check each one.
        small = random.random_raw(BLOCK * -(-fine // 4)).view(np.uint16).reshape(-1, BLOCK)[:fine].astype(np.intp)
        large = random.random_raw(BLOCK * -(-(len(self._hashed) + 1) // 2)).view(np.uint32).reshape(-1, BLOCK)
        logits = np.zeros(BLOCK, np.float32)
        for n, (texts, effects) in enumerate(self._dense):
            logits += effects.take(small[n], mode="clip")
            if lines is not None:
                lines[f"f{n}"] = texts.take(small[n], mode="clip")
        places = {}
        for n, column in enumerate(self._tabled, len(DENSE)):
            logits += column.effects.take(small[n], mode="clip")
            places[column.number] = small[n]
            if lines is not None:
                lines[f"f{len(DENSE) + column.number}"] = column.texts.take(small[n], mode="clip")
        for n, column in enumerate(self._hashed):
            absent = small[len(DENSE) + len(self._tabled) + n] < round(column.missing * _FINE)
            ids = column.ids(large[n], self.day)
            logits += np.where(absent, np.float32(0), column.effect_of(ids))
            if lines is not None:
                lines[f"f{len(DENSE) + column.number}"] = np.where(absent, np.uint64(0), hexadecimal(ids))
        for a, b in self.original.pairs:
            first, second = (self.columns[c].vectors.take(places[c], axis=0, mode="clip") for c in (a, b))
            logits += np.float32(_PAIR) * np.einsum("nr,nr->n", first, second)
        return (large[-1] >> np.uint32(8)).astype(np.float32) * np.float32(2**-24), logits

    def mixed(self, salt: int, numbers: NDArray[Any]) -> NDArray[np.uint64]:
        """A well mixed 64-bit number from (seed, salt, number): SplitMix64's finalizer."""
        return finalize(numbers + np.uint64((self.config.seed * 1_000_003 + salt) * 0x9E3779B97F4A7C15 % (1 << 64)))


class _Column:
    """A categorical column. number: 0 to 25. rows: ids in the original's table. missing: share of fields.

    Of the day that `make_table` was given, for each 16-bit draw: texts uint64, effects float32 [65536], and vectors
    float32 [65536, RANK] where the column is in a pair.
    """

    def __init__(self, model: Lookalike, number: int, rows: int, missing: float) -> None:
        self._model, self.number, self.rows, self.missing = model, number, rows, missing
        self.effect = np.float32(0.15 if rows > 1_000_000 else 0.3)
        self.skew = 3 if rows <= _TABLED else 4
        self.drift = model.drift if rows >= _STABLE else 0.0
        self.paired = any(number in pair for pair in model.original.pairs)

    @cached_property
    def places(self) -> int:
        """Places of the popularity: new ids come on top of them."""
        original = self._model.original
        shown = original.lines * (1 - self.missing)
        places = _places(self.rows, shown, self.skew)
        return max(1, round(places / (1 + self.drift * (self._model.config.day_count - 1) / 2)))

    def make_table(self, day: int) -> None:
        """What each 16-bit draw gives on a day."""
        if day and not self.drift and hasattr(self, "texts"):
            return
        # The first draws are missing fields, the others spread over all places.
        absent = round(self.missing * _FINE)
        spread = (np.arange(_FINE - absent) + 0.5) / (_FINE - absent)
        ids = np.zeros(_FINE, np.uint32)
        ids[absent:] = self._owners((spread**self.skew * self.places).astype(np.uint64), day)
        self.texts, self.effects = hexadecimal(ids), self.effect_of(ids)
        self.texts[:absent], self.effects[:absent] = 0, 0
        if self.paired:
            pieces = self._model.mixed(_VECTOR_SALT + self.number, ids).view(np.uint16).reshape(-1, RANK)
            self.vectors = (pieces.astype(np.float32) * np.float32(2**-16) - np.float32(0.5)) * np.float32(6**0.5)
            self.vectors[:absent] = 0

    def ids(self, draws: NDArray[np.uint32], day: int) -> NDArray[np.uint32]:
        """The ids of 32-bit draws on a day; `skew` is 4."""
        spread = (draws + 0.5) * 2.0**-32
        spread *= spread
        spread *= spread
        return self._owners((spread * self.places).astype(np.uint64), day)

    def effect_of(self, ids: NDArray[np.uint32]) -> Floats:
        """s_c e_c(id)."""
        bits = (self._model.mixed(_EFFECT_SALT + self.number, ids) >> np.uint64(40)).astype(np.float32)
        return (bits * np.float32(2**-24) - np.float32(0.5)) * (self.effect * np.float32(12**0.5))

    def _owners(self, places: NDArray[np.uint64], day: int) -> NDArray[np.uint32]:
        """Whose place each one is on a day."""
        owners = places
        if day and self.drift:
            # How often the place has changed hands, which it does at a time of its own.
            phase = (places * np.uint64(0x9E3779B1)) & np.uint64(0xFFFFFFFF)
            times = (phase + np.uint64(round(day * self.drift * 2**32))) >> np.uint64(32)
            moved = times > 0
            at, times = places[moved], times[moved]
            numbers = at + times * np.uint64(self.places)  # beyond the first owners', so new
            mixed = self._model.mixed(_HEIR_SALT + self.number, numbers)
            old = ((mixed >> np.uint64(32)) * np.uint64(self.places)) >> np.uint64(32)
            owners = places.copy()
            owners[moved] = np.where(mixed & np.uint64(1), numbers, old)
        return self._key(owners)

    def _key(self, numbers: NDArray[np.uint64]) -> NDArray[np.uint32]:
        """A permutation of the 32-bit numbers, another one in each column: different owners have different ids."""
        salt = self._model.mixed(_ID_SALT + self.number, np.zeros(1, np.uint32))[0] & np.uint64(0xFFFFFFFF)
        mixed = (numbers + salt).astype(np.uint32)
        mixed ^= mixed >> np.uint32(16)
        mixed *= np.uint32(0x85EBCA6B)
        mixed ^= mixed >> np.uint32(13)
        mixed *= np.uint32(0xC2B2AE35)
        mixed ^= mixed >> np.uint32(16)
        return mixed


def _places(wanted: int, lines: float, skew: int) -> float:
    """Places of which about `wanted` occur in so many lines: place r has probability ((r + 1)^(1/skew) - r^(1/skew)) /
    places^(1/skew)."""
    low, high = float(wanted), float(wanted) * 100
    middles = (np.arange(4096) + 0.5) / 4096
    for _ in range(60):
        middle = (low * high) ** 0.5
        density = middles ** (1 / skew - 1) / skew  # of a place at this fraction of all, times places
        seen = middle * -np.expm1(-lines / middle * density).mean()
        low, high = (middle, high) if seen < wanted else (low, middle)
    return middle


def _dense_outcomes(spec: Dense, missing: float) -> tuple[Texts, Floats]:
    """Text and effect of each 16-bit draw: quantiles of the column's distribution after the missing fields."""
    absent = round(missing * _FINE)
    z = np.interp((np.arange(_FINE - absent) + 0.5) / (_FINE - absent), *_quantiles())
    values = np.minimum(np.floor(np.exp(spec.mean + spec.spread * z)), 99_999_999).astype(np.int64) + spec.shift
    texts, effects = np.zeros(_FINE, np.uint64), np.zeros(_FINE, np.float32)
    texts[absent:] = [int.from_bytes(str(value).encode(), "little") for value in values.tolist()]
    effects[absent:] = spec.effect * np.log1p(np.maximum(values, 0))
    return texts, effects


@cache
def _quantiles() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Probabilities and the quantiles of the standard normal distribution there."""
    probabilities = (np.arange(_FINE) + 0.5) / _FINE
    return probabilities, np.array([NormalDist().inv_cdf(p) for p in probabilities.tolist()])


def hexadecimal(ids: NDArray[np.uint32]) -> Texts:
    """32-bit ids as 8 lower-case hexadecimal digits each."""
    pairs = _HEX.take(ids.astype(">u4").view(np.uint8))
    return pairs.astype("<u2", copy=False).view("<u8").astype(np.uint64, copy=False)


def finalize(mixed: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finalizer, in place: well mixed 64-bit numbers from any."""
    mixed ^= mixed >> np.uint64(30)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return mixed


def sigmoid(logits: Floats) -> Floats:
    """1 / (1 + exp(-x)), float32."""
    probabilities: Floats = np.float32(1) / (np.float32(1) + np.exp(-logits))
    return probabilities


def bias_for(logits: Floats, click_rate: float) -> np.float32:
    """What to add to the logits for a mean probability of `click_rate`, by bisection."""
    low, high = -50.0, 50.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if sigmoid(logits + middle).mean() < click_rate else (low, middle)
    return np.float32(middle)
