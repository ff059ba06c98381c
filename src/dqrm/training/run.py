"""The run folder: the files of a training run, and how to open it again.

run.json        configuration, data fingerprint, columns, versions (written first)
metrics.jsonl   one line per evaluation and per `log_every` steps
summary.json    the result (written last: a run without it is not finished)
checkpoints/    see `checkpoints`
"""

import platform
import shlex
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dqrm import __version__
from dqrm.config import Config
from dqrm.data.dataset import Dataset
from dqrm.data.lineage import as_seen_by
from dqrm.errors import UserError
from dqrm.files import COUNT, FLAG, NUMBER, OBJECT, POSITIVE, TEXT, exclusive, read_json, require, write_json
from dqrm.models.base import ClickModel
from dqrm.models.registry import MODELS, build_model, table_storage
from dqrm.quant.config import unused_period
from dqrm.training.checkpoints import (
    BEST,
    METRICS,
    OPTIMIZER,
    WEIGHTS,
    checkpoint_path,
    latest_step,
    load_optimizers,
    load_weights,
    mapped_tensor,
    read_state,
    saved_table_bytes,
    steps_pending,
    verify_checkpoint,
)
from dqrm.training.footprint import TableBytes
from dqrm.training.optimizers import build_optimizers
from dqrm.training.parameter_groups import parameter_groups

FORMAT_VERSION = 1
# Fields of configurations of older runs.
_REMOVED = {"table_compensation_rows"}
# Values of fields that runs of before these fields lack, where today's defaults differ.
_BEFORE: dict[str, dict[str, Any]] = {"training": {"patience": 0, "callbacks": []}}
_INFO, _SUMMARY, _LOCK = "run.json", "summary.json", ".lock"
_SHAPE = {
    "config": {"*": OBJECT},
    "data": {
        "path": TEXT,
        "fingerprint": TEXT,
        "vocabulary_digest?": (TEXT, None),
        "dense": [TEXT],
        "columns": [{"name": TEXT, "rows": POSITIVE, "multi": FLAG}],
        "rows?": {"*": COUNT},
    },
}
_SUMMARY_SHAPE = {
    "best": (BEST, None),
    "test": (METRICS, None),
    "selection": TEXT,
    "config": {"quantization": OBJECT},
    "stored_bytes": {"total": COUNT},
    "table_bytes?": {"weights": COUNT, "optimizer": COUNT},
    "steps": COUNT,
    "samples_per_second": NUMBER,
}


@dataclass(frozen=True)
class Run:
    """A run folder and what its run.json says."""

    path: Path
    info: dict[str, Any]

    @classmethod
    def plan(cls, path: Path, config: Config, dataset: Dataset) -> "Run":
        """A new run, before it is started: nothing is written yet.

        Raises:
            UserError: the folder exists and is not empty.
        """
        _require_free(path)
        columns = [{"name": column.name, "rows": column.rows, "multi": column.multi} for column in dataset.columns]
        data = {
            "path": str(dataset.path.resolve()),
            "fingerprint": dataset.fingerprint,
            "vocabulary_digest": dataset.vocabulary_digest,
            "dense": list(dataset.dense),
            "columns": columns,
            "rows": dataset.rows,
            "split": dataset.info["split"],
            "subsample_negatives": dataset.subsample_negatives,
        }
        info = {"format_version": FORMAT_VERSION, "versions": versions(), "config": config.to_dict(), "data": data}
        return cls(path, info)

    @contextmanager
    def started(self) -> Iterator[None]:
        """Make the folder, lock it and write run.json; inside, no other process trains there.

        Raises:
            UserError: the folder cannot be written; another process holds the lock, or has started a run in it.
        """
        with ExitStack() as held:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                held.enter_context(self.exclusive())
                _require_free(self.path)  # between check and lock, another process may have trained
                self.checkpoints.mkdir(exist_ok=True)
                write_json(self.path / _INFO, self.info)
            except OSError as error:
                raise UserError(f"cannot write the run folder {self.path}: {error.strerror or error}") from None
            yield

    @contextmanager
    def continued(self) -> Iterator[None]:
        """Inside, no other process trains into this folder.

        Raises:
            UserError: another process trains there, or has replaced the run since this one was opened.
        """
        with self.exclusive():
            if Run.open(self.path).info != self.info:
                raise UserError(f"{self.path} was replaced by another run while it was being opened; try again")
            yield

    def exclusive(self) -> AbstractContextManager[None]:
        """The lock on the folder; raises UserError where another process holds it."""
        return exclusive(self.path / _LOCK, f"another process is training into {self.path}; wait for it or stop it")

    @classmethod
    def open(cls, path: str | Path) -> "Run":
        """Open a run folder.

        Raises:
            UserError: no such folder, not a run, or a different format version.
        """
        path = Path(path)
        if not (path / _INFO).is_file():
            what = f"holds no {_INFO}, expected a run folder made by `dqrm train`"
            if (path / _LOCK).exists() and not _contents(path):
                what = f"holds no {_INFO}: its run was stopped before it began; `dqrm train DATA -o {path}` starts it"
            if not path.is_dir():
                what = f"{'is not a folder' if path.exists() else 'does not exist'}, expected a run folder"
            raise UserError(f"{path} {what}")
        info = read_json(path / _INFO)
        version = info.get("format_version") if isinstance(info, dict) else None
        if version != FORMAT_VERSION:
            raise UserError(f"{path} is a run of format version {version}, this dqrm reads version {FORMAT_VERSION}")
        require(path / _INFO, info, _SHAPE)
        return cls(path, info)

    @property
    def config(self) -> Config:
        """The configuration that the run was started with, without fields that no longer exist or had no effect."""
        sections = {
            section: _BEFORE.get(section, {}) | {name: v for name, v in values.items() if name not in _REMOVED}
            for section, values in self.info["config"].items()
        }
        if scales := sections.get("quantization"):  # runs of 0.1.0 stored both periods
            scales.pop(unused_period(scales.get("scale_refresh")), None)
        return Config.from_dict(sections, str(self.path / _INFO))

    @property
    def dropped(self) -> str | None:
        """Settings of the run that this dqrm no longer supports, as a sentence."""
        used = {n: v for values in self.info["config"].values() for n, v in values.items() if n in _REMOVED and v}
        return "; ".join(f"{self.path}: {n} was {v}; it is no longer supported and dropped" for n, v in used.items())

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def summary(self) -> dict[str, Any] | None:
        """The result, or None while the run is not finished."""
        file = self.path / _SUMMARY
        if not file.exists():
            return None
        summary: dict[str, Any] = read_json(file)
        require(file, summary, _SUMMARY_SHAPE)
        return summary

    def finish(self, summary: dict[str, Any]) -> None:
        """Write summary.json, the last file."""
        write_json(self.path / _SUMMARY, summary)

    def keep_best(self) -> None:
        """Of a finished run, remove the checkpoints but the best one: it is not resumed, and evaluated there."""
        summary = self.summary
        if summary is None or summary["best"] is None:
            return
        best = checkpoint_path(self.checkpoints, summary["best"]["step"])
        for path in self.checkpoints.iterdir():
            if best.is_dir() and path != best:
                gone = path.rename(path.with_name(f"{path.name}.partial"))  # what has its name is whole
                shutil.rmtree(gone, ignore_errors=True)

    def verify(self) -> bool:
        """Compare all checkpoints with their checksums.

        Returns:
            False if one was written without checksums, or there is none.

        Raises:
            UserError: a file is missing or damaged; names it.
        """
        checkpoints = sorted(self.checkpoints.glob("step-*"))
        compared = [verify_checkpoint(path) for path in checkpoints if path.name.removeprefix("step-").isdecimal()]
        return bool(compared) and all(compared)

    def table_bytes(self) -> TableBytes | None:
        """What the tables take in training, as the summary says, or the newest checkpoint; None before the first.

        Raises:
            UserError: one of them is damaged.
        """
        if found := (self.summary or {}).get("table_bytes"):
            return {"weights": found["weights"], "optimizer": found["optimizer"]}
        last = latest_step(self.checkpoints)
        return None if last is None else saved_table_bytes(checkpoint_path(self.checkpoints, last))

    @property
    def table_weights(self) -> int:
        """Weights of all tables."""
        return sum(column["rows"] for column in self.info["data"]["columns"]) * self.config.model.embedding_dim

    def require_same_data(self, dataset: Dataset) -> None:
        """Raise UserError unless `dataset` is the one that the run was trained on, which it is continued on."""
        wanted = self.info["data"]["fingerprint"]
        if dataset.fingerprint != wanted:
            raise UserError(
                f"{dataset.path} is not the dataset that {self.path} was trained on: fingerprint "
                f"{dataset.fingerprint[:16]}, expected {wanted[:16]}"
            )

    def require_vocabularies(self, dataset: Dataset) -> Dataset:
        """The dataset as the model reads it: with its vocabularies, or with ones that extend them (`lineage`).

        Raises:
            UserError: it has other vocabularies, which map ids to other rows.
        """
        return as_seen_by(dataset, self.info["data"], self.path)

    def new_model(self, table_weight: torch.Tensor | None = None, drawn: bool = True) -> ClickModel:
        """The run's model with its initial weights; the tables' are `table_weight` itself where that is given, and
        uninitialized with `drawn` False, for those who then load them."""
        data, config = self.info["data"], self.config
        try:
            tables = [column["rows"] for column in data["columns"]]
            multi = [column["multi"] for column in data["columns"]]
            if not drawn:
                table_weight = table_storage(config).empty(sum(tables), config.model.embedding_dim)
            return build_model(config, len(data["dense"]), tables, multi, table_weight)
        except ValueError as error:
            raise UserError(f"{self.info['data']['path']}: {error}") from None
        except (RuntimeError, MemoryError) as error:
            if isinstance(error, RuntimeError) and "allocate" not in str(error):
                raise
            rows = sum(column["rows"] for column in data["columns"])
            need = table_storage(config).memory_bytes(rows, config.model.embedding_dim) / 1e9
            raise UserError(
                f"the model does not fit in memory: its {rows:,} table rows need {need:,.1f} GB, and its other layers "
                f"come on top ({MODELS[config.model.model].describe(config.model)})"
            ) from None

    def load_model(
        self, which: str = "best", mapped: bool = False, verify: bool = True
    ) -> tuple[ClickModel, dict[str, Any]]:
        """The trained model in eval mode, and the state.json of its checkpoint.

        Args:
            which: 'best' on validation, or 'last'.
            mapped: leave the tables in the checkpoint's file, memory-mapped: for reading a few rows, or all once; not
                where rows have updates pending, which are made here.
            verify: compare the weights with their checksum first, which reads all of them.

        Raises:
            UserError: there is no checkpoint yet, or it is damaged; the last one was not kept.
        """
        last = latest_step(self.checkpoints)
        if last is None:
            again = f"`dqrm train --resume {shlex.quote(str(self.path))}`"
            raise UserError(f"{self.path} has no checkpoint yet; {again} continues the run")
        if which == "last" and last != (steps := (self.summary or {}).get("steps", last)):
            raise UserError(f"{self.path} has no checkpoint of its last step {steps}: only the best was kept")
        state = read_state(checkpoint_path(self.checkpoints, last))
        best = (state["best"] or {}).get("step", last)
        checkpoint = checkpoint_path(self.checkpoints, best if which == "best" else last)
        if which == "best" and best != last:
            state = read_state(checkpoint)
        if verify:
            verify_checkpoint(checkpoint, WEIGHTS)
        pending = steps_pending(checkpoint)
        if pending and verify:
            verify_checkpoint(checkpoint, OPTIMIZER)
        if pending or not mapped:
            model = self.new_model(drawn=False)
            load_weights(checkpoint, model)
            if pending:
                self._catch_up(model, checkpoint)
            return model.eval(), state
        memory, data = mapped_tensor(checkpoint, "tables.weight"), self.info["data"]
        dim, storage = self.config.model.embedding_dim, table_storage(self.config)
        rows = sum(column["rows"] for column in data["columns"])
        expected, dtype = storage.layout(rows, dim)
        if (memory.shape, memory.dtype) != (expected, dtype):
            raise UserError(
                f"{checkpoint}: the tables are {list(memory.shape)} {memory.dtype}, but the run's are {list(expected)} "
                f"{dtype}"
            )
        try:
            table_weight = storage.of_memory(memory, rows, dim)
        except ValueError as error:
            raise UserError(f"{checkpoint} is damaged: {error}") from None
        model = self.new_model(table_weight)
        load_weights(checkpoint, model, skip=("tables.weight",))
        return model.eval(), state

    def _catch_up(self, model: ClickModel, checkpoint: Path) -> None:
        """Bring all rows of the tables up to the checkpoint's step, as the run does before it evaluates."""
        table, config = model.tables.weight, self.config
        others = [parameter for parameter in model.parameters() if parameter is not table]
        groups = parameter_groups(model, others, config.optimizer)
        optimizers = build_optimizers([table], groups, config.optimizer, config.training.seed)
        optimizers[0].tables = model.tables
        load_optimizers(checkpoint, optimizers)
        optimizers[0].catch_up_all()


def _require_free(path: Path) -> None:
    """Raise UserError unless a run may start in the folder `path`; a folder that a run left before it began counts
    as empty."""
    if not path.exists() or (path.is_dir() and not _contents(path)):
        return
    hint = f"`dqrm train --resume {shlex.quote(str(path))}` continues it, or" if (path / _INFO).exists() else "please"
    raise UserError(f"{path} exists and is not empty; {hint} name another folder with -o")


def _contents(path: Path) -> set[str]:
    """The names in a folder that a new run must not overwrite."""
    names = {entry.name for entry in path.iterdir()} - {_LOCK, f"{_INFO}.partial"}
    metrics, checkpoints = path / "metrics.jsonl", path / "checkpoints"
    if metrics.is_file() and not metrics.stat().st_size:
        names.discard(metrics.name)
    return names - ({checkpoints.name} if checkpoints.is_dir() and not any(checkpoints.iterdir()) else set())


def versions() -> dict[str, str]:
    """The versions that the run was made with."""
    import numpy

    return {
        "dqrm": __version__,
        "torch": str(torch.__version__),
        "numpy": numpy.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }
