"""Writing generated logs: lines and their true probabilities, in one file each or one of each for every day."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from dqrm.data.lookalike import BLOCK, Lookalike
from dqrm.errors import UserError
from dqrm.files import replacing, require_replaceable

Progress = Callable[[str, int, int], None]


def truth_path(path: str | Path) -> Path:
    """Where `generate` puts the true probabilities of a log: `clicks.truth.npy` beside `clicks.txt`."""
    path = Path(path)
    return path.with_name(path.stem + ".truth.npy")


def day_paths(folder: Path, day: int) -> tuple[Path, Path]:
    """The log of a day and its true probabilities, whose name begins with _ so that readers of the folder skip it."""
    return folder / f"day_{day}", folder / f"_day_{day}.truth.npy"


@dataclass(frozen=True)
class Generated:
    """What `generate` wrote: the log, the true probabilities (float32 [rows]), how many lines and clicks.

    Of a log in days, both paths are the folder.
    """

    path: Path
    truth: Path
    rows: int
    clicks: int


@dataclass(frozen=True)
class Piece:
    """Some lines: what writes them, and their true probabilities, float32."""

    write: Callable[[IO[bytes]], Any]
    probabilities: NDArray[np.float32]
    clicks: int


class Told:
    """Lines written so far, for a progress callback."""

    def __init__(self, progress: Progress | None, rows: int) -> None:
        self._progress, self._rows, self._written = progress, rows, 0

    def __call__(self, lines: int) -> None:
        self._written += lines
        if self._progress:
            self._progress("generating", self._written, self._rows)


def write_log(path: Path, rows: int, pieces: Iterator[Piece], told: Told) -> Generated:
    """Write a log of so many lines and, beside it, their true probabilities; both appear whole or not at all.

    Raises:
        UserError: they cannot be written.
    """
    truth = truth_path(path)
    if truth == path:
        raise UserError(f"{path} is the name that the true probabilities get; name the log otherwise, such as log.txt")
    require_replaceable(path)
    if not path.parent.is_dir():
        raise UserError(f"cannot write {path}: there is no folder {path.parent}")
    return Generated(path, truth, rows, _write(path, truth, rows, pieces, told))


def write_days(path: Path, model: Lookalike, chunk_rows: int, told: Told) -> Generated:
    """Write the lines of a model, to one file or, where its configuration says how many days, to a folder of them.

    Raises:
        UserError: they cannot be written; the folder exists and is not empty.
    """
    config = model.config
    if config.days is None:
        pieces = (piece for day in range(config.day_count) for piece in _of_day(model, day, chunk_rows))
        return write_log(path, config.rows, pieces, told)
    made = _make_folder(path)
    written: list[Path] = []
    clicks = 0
    try:
        for day in range(config.day_count):
            log, truth = day_paths(path, day)
            clicks += _write(log, truth, config.day_rows(day), _of_day(model, day, chunk_rows), told)
            written += [log, truth]
    except BaseException:
        with suppress(OSError):
            for file in written:
                file.unlink()
            if made:
                path.rmdir()
        raise
    return Generated(path, path, config.rows, clicks)


def _make_folder(path: Path) -> bool:
    """Whether the folder had to be made."""
    try:
        if path.exists() and not path.is_dir():
            raise UserError(f"{path} exists and is a file, expected the name of a new folder for the days")
        if path.is_dir() and any(path.iterdir()):
            raise UserError(f"{path} exists and is not empty, expected the name of a new folder for the days")
        made = not path.is_dir()
        path.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    return made


def _of_day(model: Lookalike, day: int, chunk_rows: int) -> Iterator[Piece]:
    rows, step = model.config.day_rows(day), max(1, chunk_rows // BLOCK)
    model.set_day(day)
    starts = range(0, rows, BLOCK)
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as threads:
        for first in range(0, len(starts), step):
            some = starts[first : first + step]
            drawn = list(threads.map(lambda at: model.block(at // BLOCK, min(BLOCK, rows - at)), some))
            yield Piece(
                partial(_write_texts, [text for text, _, _ in drawn]),
                np.concatenate([probabilities for _, probabilities, _ in drawn]),
                sum(clicks for _, _, clicks in drawn),
            )


def _write_texts(texts: list[bytearray], file: IO[bytes]) -> None:
    file.writelines(texts)


def _write(path: Path, truth: Path, rows: int, pieces: Iterator[Piece], told: Told) -> int:
    """The number of clicks."""
    clicks = 0
    busy = f"another dqrm generate is writing to {path}; wait for it, or name another output"
    try:
        # The truth takes its place first: a log that is there has its truth.
        with (
            replacing(path, busy) as unfinished,
            replacing(truth, busy) as unfinished_truth,
            open(unfinished, "wb") as lines,
            open(unfinished_truth, "wb") as probabilities,
        ):
            header = {"descr": "<f4", "fortran_order": False, "shape": (rows,)}
            np.lib.format.write_array_header_1_0(probabilities, header)
            for piece in pieces:
                piece.write(lines)
                probabilities.write(piece.probabilities.astype("<f4").tobytes())
                clicks += piece.clicks
                told(len(piece.probabilities))
    except (OSError, pl.exceptions.PolarsError) as error:
        raise UserError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from None
    return clicks
