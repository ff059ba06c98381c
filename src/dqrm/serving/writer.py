"""Scoring of raw logs: batches of a `RawLog` go through a model, probabilities to a file, one block at a time.

    log = RawLog(["log.txt"], RawEncoder(options, columns, vocabularies, keep=["I1"]))
    predict(lambda batch: model(batch.dense, batch.ids, batch.bags), log, Path("predictions.parquet"))

Memory does not grow with the log: the parts of a Parquet file are kept on disk.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from dqrm.data.ahead import ahead
from dqrm.data.batches import Batch
from dqrm.data.raw import PROBABILITY, RawLog
from dqrm.errors import UserError
from dqrm.files import partial_path, replacing, require_replaceable, why_not_written
from dqrm.training.threads import scoring_threads

Score = Callable[[Batch], torch.Tensor]
Progress = Callable[[str, int, int | None], None]
_SEPARATORS = {".csv": ",", ".tsv": "\t"}
KINDS = (".parquet", *_SEPARATORS)
# Rows and bytes held before they are written as a part: few enough for memory, enough that there are few parts.
_PART_ROWS, _PART_BYTES = 1 << 20, 1 << 26
# Rows of a block below which it is taken to be the only one.
_SHORT_BLOCK = 1 << 15


def predict(
    score: Score,
    log: RawLog,
    output: Path,
    batch_size: int = 8192,
    progress: Progress | None = None,
    threads: int = 0,
) -> dict[str, Any]:
    """Writes the kept columns of every row of the log and its `probability`, float32, in the order of the log.

    score: the logits [B] of a batch on the CPU. output: .parquet, .csv or .tsv; an existing file is replaced once the
    new one is complete. progress: called with the stage, bytes of the log done, and their total. threads: CPU threads;
    0: the fastest number for the first block, at most as many as before.

    Returns:
        rows, skipped (malformed lines), damaged (files that ended early, in words), unseen (for each column the share
        of ids that the model does not know), seconds, rows_per_second and threads (None without rows).

    Raises:
        UserError: an output that cannot be written, a log that cannot be read, or a logit that is not finite.
    """
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}, should be at least 1")
    check_output(output, log)
    began, done, rows = time.perf_counter(), 0, 0
    number: int | None = None

    def advance(count: int) -> None:
        nonlocal done
        done += count

    schema = pl.Schema({**log.schema, PROBABILITY: pl.Float32()})
    busy = f"another dqrm predict is writing to {output}; wait for it, or name another output"
    with ExitStack() as held, replacing(output, busy) as partial:
        if (text := log.means(partial)) is not None:
            raise UserError(f"{output} would be in the log itself, '{text}'; name an output outside of it")
        sink: _Parquet | _Text = _Parquet(partial, schema)
        if output.suffix.lower() in _SEPARATORS:
            sink = _Text(partial, schema, _SEPARATORS[output.suffix.lower()])
        try:
            with _writing(output):
                sink.begin()
            for kept, batch in ahead(log.blocks(advance)):
                if number is None:
                    number = held.enter_context(_fastest(score, batch, batch_size, threads))
                scored = probabilities(score, batch, batch_size, rows)
                with _writing(output):
                    probability = pl.Series(PROBABILITY, scored)
                    sink.add(kept.hstack([probability]) if kept.width else probability.to_frame())
                rows += len(scored)
                if progress:
                    progress("scoring", done, log.size)
            with _writing(output):
                sink.finish()
        finally:
            sink.close()
    if progress:
        progress("scoring", log.size or done, log.size or done)
    return _outcome(log, rows, time.perf_counter() - began, number)


def _outcome(log: RawLog, rows: int, seconds: float, threads: int | None) -> dict[str, Any]:
    """The result of `predict`."""
    return {
        "rows": rows,
        "skipped": log.skipped,
        "damaged": list(log.damaged),
        "unseen": {name: round(share, 6) for name, share in log.unseen.items()},
        "seconds": seconds,
        "rows_per_second": rows / seconds,
        "threads": threads,
    }


def _fastest(score: Score, block: Batch, size: int, threads: int) -> AbstractContextManager[int]:
    """Inside, torch uses the number of threads that scores the first block of a log fastest."""
    part = _slice(block, 0, min(size, len(block)))

    def call() -> None:
        with torch.inference_mode():
            score(part)

    # A short block is the whole log, or all that a pipe delivers at once.
    return scoring_threads(call, -(-len(block) // size) if len(block) < _SHORT_BLOCK else None, threads)


def check_output(output: Path, log: RawLog) -> None:
    """Check that predictions for a log can be written to `output`.

    Raises:
        UserError: an unsupported suffix, a file of the log, a folder, or a kind of file that cannot hold a kept column.
    """
    suffix = output.suffix.lower()
    if suffix not in KINDS:
        raise UserError(f"predictions cannot be written as {output}, expected a name that ends in {', '.join(KINDS)}")
    require_replaceable(output)
    for path in log.paths:
        for mine in (output, partial_path(output)):
            with suppress(OSError):
                if mine.exists() and mine.samefile(path):
                    raise UserError(f"{mine} is a file of the log and would be overwritten, expected another output")
    if suffix in _SEPARATORS:
        for name, kind in log.schema.items():
            try:
                pl.DataFrame({name: [None]}, schema={name: kind}).write_csv()
            except pl.exceptions.PolarsError:
                raise UserError(
                    f"column {name} is of type {kind}, which {suffix} cannot hold; write .parquet, or do not keep it"
                ) from None


def probabilities(score: Score, batch: Batch, size: int, before: int = 0) -> NDArray[np.float32]:
    """The probability of a click for each row of a batch, scored in parts of `size` rows: float32 [B].

    before: rows of the log that came before, for the message.

    Raises:
        UserError: a logit that is not finite.
    """
    return sigmoid(finite_logits(score, batch, size, before))


def sigmoid(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """The probabilities of logits: float32 [B]."""
    result: NDArray[np.float32] = torch.from_numpy(logits).sigmoid().numpy()
    return result


def finite_logits(score: Score, batch: Batch, size: int, before: int = 0) -> NDArray[np.float32]:
    """The logit of each row of a batch, scored in parts of `size` rows: float32 [B]; before and Raises as above."""
    logits = np.empty(len(batch), np.float32)
    with torch.inference_mode():
        for at in range(0, len(batch), size):
            part = _slice(batch, at, min(at + size, len(batch)))
            # No broadcasting: [B, 1] would silently become something else.
            logits[at : at + size] = score(part).detach().float().cpu().reshape(len(part)).numpy()
    if not np.isfinite(logits).all():
        at = int(np.argmin(np.isfinite(logits)))
        raise UserError(
            f"the model predicts {logits[at]} for row {before + at + 1} of the log, expected a finite number; its "
            "training diverged"
        )
    return logits


def _slice(batch: Batch, start: int, stop: int) -> Batch:
    """Rows `start` to `stop` as views."""
    if start == 0 and stop == len(batch):
        return batch
    bags = []
    for values, offsets in batch.bags:
        first = int(offsets[start])
        last = int(offsets[stop]) if stop < len(batch) else len(values)
        bags.append((values[first:last], offsets[start:stop] - first))
    return Batch(batch.dense[start:stop], batch.ids[start:stop], tuple(bags), batch.labels[start:stop])


@contextmanager
def _writing(output: Path) -> Iterator[None]:
    """Inside, errors are about the disk, and raised as one sentence."""
    try:
        yield
    except (OSError, pl.exceptions.PolarsError) as error:
        why = why_not_written(error, partial_path(output).parent)
        raise UserError(f"cannot write to {output}: {why}; no output was kept") from None


class _Text:
    """Appends rows to a CSV or TSV file."""

    def __init__(self, path: Path, schema: pl.Schema, separator: str) -> None:
        self._path, self._schema, self._separator = path, schema, separator
        self._file: IO[bytes] | None = None

    def begin(self) -> None:
        self._file = self._path.open("wb")
        pl.DataFrame(schema=self._schema).write_csv(self._file, separator=self._separator)

    def add(self, frame: pl.DataFrame) -> None:
        assert self._file is not None
        frame.write_csv(self._file, separator=self._separator, include_header=False)

    def finish(self) -> None:
        assert self._file is not None
        self._file.close()

    def close(self) -> None:
        if self._file is not None:
            with suppress(OSError):  # its buffered content is discarded
                self._file.close()


class _Parquet:
    """Rows are written to one Parquet file by way of parts beside it: polars cannot append, but can stream many."""

    def __init__(self, path: Path, schema: pl.Schema) -> None:
        self._path, self._folder = path, path.with_name(path.name + ".parts")
        self._held, self._count, self._bytes = [pl.DataFrame(schema=schema)], 0, 0
        self._parts: list[Path] = []

    def begin(self) -> None:
        _remove_parts(self._folder)

    def add(self, frame: pl.DataFrame) -> None:
        self._held.append(frame)
        self._count += frame.height
        self._bytes += int(frame.estimated_size())
        if self._count >= _PART_ROWS or self._bytes >= _PART_BYTES:
            self._folder.mkdir(exist_ok=True)
            self._write_part()

    def finish(self) -> None:
        if not self._parts:
            self._write(self._path)
            return
        if self._count:
            self._write_part()
        pl.scan_parquet(self._parts, glob=False).sink_parquet(self._path, maintain_order=True)

    def close(self) -> None:
        _remove_parts(self._folder)

    def _write_part(self) -> None:
        self._parts.append(self._folder / f"part-{len(self._parts):06d}.parquet")
        self._write(self._parts[-1])

    def _write(self, path: Path) -> None:
        pl.concat(self._held).write_parquet(path)
        self._held, self._count, self._bytes = self._held[:1], 0, 0


def _remove_parts(folder: Path) -> None:
    """Remove only files with the name of a part, whoever made the folder."""
    with suppress(OSError):
        for part in folder.glob("part-*.parquet"):
            part.unlink()
        folder.rmdir()
