"""The run folder: what a training run leaves behind, and how to open it again.

run.json        what was asked for and on what: configuration, data fingerprint, columns, versions (written first)
metrics.jsonl   one line per evaluation and per `log_every` steps
summary.json    the result (written last: a run without it is not finished)
checkpoints/    see `checkpoints`
"""

import platform
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dqrm import __version__
from dqrm.config import Config
from dqrm.data.dataset import Dataset
from dqrm.errors import UserError
from dqrm.files import exclusive, read_json, require_keys, write_json
from dqrm.models.dlrm import DLRM
from dqrm.training.checkpoints import checkpoint_path, latest_step, load_weights, mapped_tensor

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Run:
    """A run folder and what its run.json says."""

    path: Path
    info: dict[str, Any]

    @classmethod
    def plan(cls, path: Path, config: Config, dataset: Dataset) -> "Run":
        """A run that is still to be started: nothing is written yet.

        Raises:
            UserError: the folder exists and is not empty.
        """
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            hint = f"`dqrm train --resume {path}` continues it, or" if (path / "run.json").exists() else "please"
            raise UserError(f"{path} exists and is not empty; {hint} name another folder with -o")
        columns = [{"name": column.name, "rows": column.rows, "multi": column.multi} for column in dataset.columns]
        data = {
            "path": str(dataset.path.resolve()),
            "fingerprint": dataset.fingerprint,
            "dense": list(dataset.dense),
            "columns": columns,
            "rows": dataset.rows,
            "split": dataset.info["split"],
        }
        info = {"format_version": FORMAT_VERSION, "versions": versions(), "config": config.to_dict(), "data": data}
        return cls(path, info)

    def start(self) -> None:
        """Make the folder and write run.json.

        Raises:
            UserError: the folder cannot be written.
        """
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            write_json(self.path / "run.json", self.info)
        except OSError as error:
            raise UserError(f"cannot write the run folder {self.path}: {error.strerror or error}") from None

    def exclusive(self) -> AbstractContextManager[None]:
        """While inside, no other process trains into this folder; raises UserError where one does already."""
        return exclusive(self.path / ".lock", f"another process is training into {self.path}; wait for it or stop it")

    @classmethod
    def open(cls, path: str | Path) -> "Run":
        """Open a run folder.

        Raises:
            UserError: no such folder, no run, or one of another format version.
        """
        path = Path(path)
        if not (path / "run.json").is_file():
            what = "holds no run.json, expected a run folder made by `dqrm train`"
            raise UserError(f"{path} {what if path.is_dir() else 'does not exist, expected a run folder'}")
        info = read_json(path / "run.json")
        found = info.get("format_version") if isinstance(info, dict) else None
        if found != FORMAT_VERSION:
            raise UserError(f"{path} is a run of format version {found}, this dqrm reads version {FORMAT_VERSION}")
        require_keys(path / "run.json", info, "config", "data")
        require_keys(path / "run.json", info["data"], "path", "fingerprint", "dense", "columns")
        return cls(path, info)

    @property
    def config(self) -> Config:
        """The configuration that the run was started with."""
        return Config.from_dict(self.info["config"], str(self.path / "run.json"))

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def summary(self) -> dict[str, Any] | None:
        """The result, or None while the run is not finished."""
        file = self.path / "summary.json"
        if not file.exists():
            return None
        summary: dict[str, Any] = read_json(file)
        require_keys(file, summary, "best", "test", "selection", "config", "stored_bytes")
        return summary

    def require_same_data(self, dataset: Dataset) -> None:
        """Raise UserError unless `dataset` is the one that the run was trained on: its ids mean other rows."""
        wanted = self.info["data"]["fingerprint"]
        if dataset.fingerprint != wanted:
            raise UserError(
                f"{dataset.path} is other data than {self.path} was trained on: fingerprint "
                f"{dataset.fingerprint[:16]}, expected {wanted[:16]}"
            )

    def new_model(self, table_weight: torch.Tensor | None = None) -> DLRM:
        """The run's model with its initial weights; the tables' are `table_weight` itself where that is given."""
        data, config = self.info["data"], self.config
        try:
            return DLRM(
                len(data["dense"]),
                [column["rows"] for column in data["columns"]],
                multi=[column["multi"] for column in data["columns"]],
                config=config.model,
                qat=config.quantization,
                seed=config.training.seed,
                precision=config.training.precision,
                table_dtype=torch.bfloat16 if config.training.table_dtype == "bf16" else torch.float32,
                table_weight=table_weight,
            )
        except ValueError as error:
            raise UserError(f"{self.info['data']['path']}: {error}") from None
        except (RuntimeError, MemoryError) as error:
            if isinstance(error, RuntimeError) and "allocate" not in str(error):
                raise
            rows = sum(column["rows"] for column in data["columns"])
            need = rows * config.model.embedding_dim * (2 if config.training.table_dtype == "bf16" else 4) / 1e9
            raise UserError(f"the model does not fit in memory: its {rows:,} table rows need {need:,.1f} GB") from None

    def load_model(self, which: str = "best", mapped: bool = False) -> tuple[DLRM, dict[str, Any]]:
        """The trained model in eval mode, and the state.json of its checkpoint.

        Args:
            which: 'best' on validation, or 'last'.
            mapped: leave the tables in the checkpoint's file, memory-mapped: for reading a few rows, or all once.

        Raises:
            UserError: there is no checkpoint yet, or it is damaged.
        """
        last = latest_step(self.checkpoints)
        if last is None:
            raise UserError(f"{self.path} has no checkpoint yet; `dqrm train --resume {self.path}` continues the run")
        state = self._state(last)
        best = (state["best"] or {}).get("step", last)
        if which == "best" and best != last:
            state = self._state(best)
        checkpoint = checkpoint_path(self.checkpoints, best if which == "best" else last)
        if not mapped:
            model = self.new_model()
            load_weights(checkpoint, model)
            return model.eval(), state
        weight, data = mapped_tensor(checkpoint, "tables.weight"), self.info["data"]
        expected = (sum(column["rows"] for column in data["columns"]), self.config.model.embedding_dim)
        if tuple(weight.shape) != expected:
            raise UserError(f"{checkpoint}: the tables are {list(weight.shape)}, but the run's are {list(expected)}")
        model = self.new_model(weight)
        load_weights(checkpoint, model, skip="tables.weight")
        return model.eval(), state

    def _state(self, step: int) -> dict[str, Any]:
        file = checkpoint_path(self.checkpoints, step) / "state.json"
        state: dict[str, Any] = read_json(file)
        require_keys(file, state, "step", "best")
        return state


def versions() -> dict[str, str]:
    """What the run was made with."""
    import numpy

    return {
        "dqrm": __version__,
        "torch": str(torch.__version__),
        "numpy": numpy.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }
