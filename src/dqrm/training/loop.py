"""The training loop: the only place that knows the order of a step.

    batch -> loss -> gradients -> optimizers        evaluate, save and log when the configuration says so

Start with `train(dataset, "runs/a", config)`, continue with `resume("runs/a")`. A run that was killed at any moment and
resumed ends with the same weights as one that was not, bit for bit on CPU: the checkpoint holds weights, scales and
their clock, optimizer state, random state and the position in the data.
"""

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dqrm.config import Config
from dqrm.data.dataset import Batch, Dataset
from dqrm.errors import UserError
from dqrm.files import require_keys, write_json
from dqrm.models.dlrm import DLRM
from dqrm.quant.convert import stored_bytes
from dqrm.training.checkpoints import (
    checkpoint_path,
    latest_step,
    load_state,
    load_weights,
    save_checkpoint,
)
from dqrm.training.environment import Progress, check_environment, resolve_device, stop_signals
from dqrm.training.evaluation import evaluate
from dqrm.training.optimizers import learning_rate
from dqrm.training.run import Run, versions
from dqrm.training.step import TrainStep

Log = Callable[[str], None]


class Interrupted(Exception):
    """Ctrl-C or SIGTERM arrived; a checkpoint was saved."""


@dataclass
class State:
    """Where a run stands; with the weights and optimizers, all that resuming needs."""

    step: int = 0
    epoch: int = 0
    batch: int = 0
    loss_sum: float = 0.0
    loss_rows: int = 0
    best: dict[str, Any] | None = None
    without_better: int = 0
    rate_factor: float = 1.0
    finished: bool = False
    metrics_bytes: int = 0
    train_seconds: float = 0.0
    train_rows: int = 0


def train(
    dataset: Dataset | str | Path,
    output: str | Path,
    config: Config | None = None,
    progress: Progress | None = None,
    log: Log | None = None,
) -> dict[str, Any]:
    """Train a DLRM on `dataset` and leave a run folder at `output`.

    Args:
        dataset: a prepared dataset folder.
        output: the run folder to make.
        config: what to train and how; default INT4 with the paper's Kaggle settings.
        progress: called as progress(stage, done, total).
        log: called with one line of text per evaluation.

    Returns:
        The content of summary.json.

    Raises:
        UserError: the configuration cannot be run here or on this data, or the loss is no number any more.
        Interrupted: Ctrl-C or SIGTERM; the run can be resumed.
    """
    config = config or Config()
    dataset = dataset if isinstance(dataset, Dataset) else Dataset(dataset)
    check_environment(config.training)
    run = Run.plan(Path(output), config, dataset)
    if not dataset.rows["train"]:
        raise UserError(f"{dataset.path} has no training rows: nothing to train on")
    dataset.validate(*dataset.rows)
    model = run.new_model()  # before the folder is made: an impossible model must not leave one
    run.start()
    with run.exclusive():
        return Trainer(run, model, dataset, progress, log).fit()


def resume(
    output: str | Path,
    dataset: Dataset | str | Path | None = None,
    progress: Progress | None = None,
    log: Log | None = None,
) -> dict[str, Any]:
    """Continue the run at `output` exactly where its newest checkpoint stands; returns its summary.

    Args:
        output: a run folder.
        dataset: its data, where the folder has moved since; the fingerprint must be the same.

    Raises:
        UserError: no run there, other data, a damaged checkpoint, or as `train`.
    """
    run = Run.open(output)
    if dataset is None:
        try:
            dataset = Dataset(run.info["data"]["path"])
        except UserError as error:
            raise UserError(
                f"{error}; where the data has moved, `dqrm train --resume {output} DATA` names it"
            ) from None
    dataset = dataset if isinstance(dataset, Dataset) else Dataset(dataset)
    run.require_same_data(dataset)
    if (done := run.summary) is not None:
        if log:
            log(f"{output} is finished; nothing to continue.")
        return done
    check_environment(run.config.training)
    dataset.validate(*dataset.rows)
    with run.exclusive():
        return Trainer(run, run.new_model(), dataset, progress, log).fit()


class Trainer:
    """One run in progress: model, optimizers, state, and the folder they are saved in."""

    def __init__(
        self, run: Run, model: DLRM, dataset: Dataset, progress: Progress | None = None, log: Log | None = None
    ) -> None:
        self.run, self.model, self.dataset, self.config = run, model, dataset, run.config
        self.options = self.config.training
        self.progress, self.log = progress or (lambda *_: None), log or (lambda _: None)
        self.device = resolve_device(self.options.device)
        if self.options.threads:
            torch.set_num_threads(self.options.threads)
        torch.manual_seed(self.options.seed)
        self.state = State()
        last = latest_step(run.checkpoints)
        if last is not None:
            load_weights(checkpoint_path(run.checkpoints, last), self.model)
        self.model.to(self.device).train()
        self.step = TrainStep(self.model, self.config)
        self.optimizers = self.step.optimizers
        if last is not None:
            folder = checkpoint_path(run.checkpoints, last)
            state = load_state(folder, self.optimizers)
            require_keys(folder / "state.json", state, *(field.name for field in fields(State)))
            self.state = State(**state)
        self.metrics = open(run.path / "metrics.jsonl", "ab")  # noqa: SIM115 (open as long as the run)
        self.metrics.truncate(self.state.metrics_bytes)  # lines after the checkpoint are written again
        self.metrics.seek(0, os.SEEK_END)
        self.writer = _tensorboard(run.path, self.state.step) if self.options.tensorboard else None
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        self.saved_at = self.clock = time.monotonic()

    def fit(self) -> dict[str, Any]:
        """Train to the end; returns the summary."""
        try:
            with stop_signals() as stopped:
                for _ in self._steps():
                    if stopped.is_set():
                        self._count_time()
                        self._save()
                        raise Interrupted
            return self._finish()
        finally:
            self.metrics.close()
            if self.writer:
                self.writer.close()

    def _steps(self) -> Iterator[None]:
        """One yield per training step, evaluations and checkpoints done."""
        state, options = self.state, self.options
        part = self.dataset.split("train")
        batches = part.num_batches(options.batch_size)
        self.loss_sum.fill_(state.loss_sum)
        while not state.finished:
            label = f"epoch {state.epoch + 1}/{options.epochs}"
            self.clock = time.monotonic()
            for batch in part.batches(
                options.batch_size,
                shuffle=options.shuffle,
                seed=options.seed,
                epoch=state.epoch,
                start_batch=state.batch,
            ):
                self.train_step(batch)
                self.progress(label, state.batch * options.batch_size, part.rows)
                end = state.batch == batches
                state.finished = 0 < options.max_steps <= state.step or (end and state.epoch + 1 == options.epochs)
                log_due = options.log_every > 0 and state.step % options.log_every == 0
                if end or state.finished or log_due or self._due():
                    self._count_time()
                    self._report(log_due, end)
                    self.clock = time.monotonic()
                yield
                if state.finished:
                    return

    def train_step(self, batch: Batch) -> None:
        """Forward, backward and update on one batch."""
        state = self.state
        rate = learning_rate(state.step, self.config.optimizer) * state.rate_factor
        loss = self.step(batch.to(self.device), rate)
        self.loss_sum += loss.double() * len(batch)
        state.step += 1
        state.batch += 1
        state.loss_rows += len(batch)
        state.train_rows += len(batch)

    def _count_time(self) -> None:
        now = time.monotonic()
        self.state.train_seconds += now - self.clock
        self.clock = now

    def _sum_loss(self) -> None:
        """Bring the epoch's loss into the state, unless it is no number: that must never reach a checkpoint."""
        state = self.state
        state.loss_sum = float(self.loss_sum)
        if not np.isfinite(state.loss_sum):
            raise UserError(
                f"training diverged: the loss is {state.loss_sum} at step {state.step}; lower learning_rate "
                f"(now {self.config.optimizer.learning_rate})"
            )

    def _due(self) -> bool:
        every, saves, step = self.options.eval_every, self.options.checkpoint_every, self.state.step
        return bool((every and step % every == 0) or (saves and step % saves == 0)) or self._old()

    def _old(self) -> bool:
        minutes = self.options.checkpoint_minutes
        return minutes > 0 and time.monotonic() - self.saved_at >= 60 * minutes

    def _report(self, log_due: bool, epoch_ends: bool) -> None:
        """Everything that may be due after a step: log, evaluation, end of the epoch, checkpoint."""
        state, options = self.state, self.options
        self._sum_loss()
        train_loss = state.loss_sum / state.loss_rows
        if log_due:
            self._write({"kind": "train", "epoch": state.epoch + 1, "loss": train_loss, **self._position()})
        evaluate_now = epoch_ends or state.finished or (options.eval_every and state.step % options.eval_every == 0)
        if evaluate_now:
            self._evaluate(train_loss)
        if epoch_ends:
            state.epoch += 1
            state.batch, state.loss_sum, state.loss_rows = 0, 0.0, 0
            self.loss_sum.zero_()
        if evaluate_now or (options.checkpoint_every and state.step % options.checkpoint_every == 0) or self._old():
            self._save()

    def _evaluate(self, train_loss: float) -> None:
        state, options, position = self.state, self.options, self._position()
        metrics = evaluate(self.model, self.dataset, "validation", options.eval_batch_size, self.progress)
        value = metrics[options.select_by]
        sign = -1 if options.select_by == "log_loss" else 1
        better = value is not None and (
            state.best is None or state.best["metrics"][options.select_by] is None
            or sign * value > sign * state.best["metrics"][options.select_by]
        )  # fmt: skip
        # Without validation rows there is nothing to choose by: the last state is the result.
        if better or value is None:
            state.best = {
                "step": state.step,
                "epoch": state.epoch + 1,
                "train_loss": train_loss,
                "metrics": metrics,
            }
            state.without_better = 0
        else:
            state.without_better += 1
            if state.without_better % self.config.optimizer.plateau_patience == 0:
                state.rate_factor *= self.config.optimizer.plateau_factor
            if options.early_stopping and state.without_better >= options.early_stopping:
                state.finished = True
        self._write(
            {
                "kind": "evaluation",
                "split": "validation",
                "epoch": state.epoch + 1,
                "train_loss": train_loss,
                "best": better,
                **metrics,
                **position,
            }
        )
        figures = [f"{name} {metrics[name]:.4f}" for name in ("auc", "log_loss", "ne") if metrics[name] is not None]
        self.log(
            f"epoch {state.epoch + 1}, step {state.step}: training loss {train_loss:.4f}; validation "
            + (", ".join(figures) or "has no rows")
            + (" (best so far)" if better else "")
        )

    def _position(self) -> dict[str, Any]:
        rate = learning_rate(self.state.step - 1, self.config.optimizer) * self.state.rate_factor
        return {"step": self.state.step, "learning_rate": rate, "train_seconds": round(self.state.train_seconds, 3)}

    def _write(self, line: dict[str, Any]) -> None:
        self.metrics.write(json.dumps(line, allow_nan=False).encode() + b"\n")
        self.metrics.flush()
        if self.writer:
            for name, value in line.items():
                if isinstance(value, float):
                    self.writer.add_scalar(f"{line['kind']}/{name}", value, line["step"])

    def _save(self) -> None:
        state = self.state
        self._sum_loss()
        os.fsync(self.metrics.fileno())
        state.metrics_bytes = self.metrics.tell()
        keep = {state.best["step"]} if state.best else set()
        save_checkpoint(self.run.checkpoints, state.step, self.model, self.optimizers, asdict(state), keep)
        self.saved_at = time.monotonic()

    def _finish(self) -> dict[str, Any]:
        """Evaluate the chosen checkpoint on test and write the summary."""
        state = self.state
        model = self.model
        if state.best and state.best["step"] != state.step:
            load_weights(checkpoint_path(self.run.checkpoints, state.best["step"]), model)
        chosen = state.best is not None and state.best["metrics"][self.options.select_by] is not None
        test = None
        if self.dataset.rows.get("test"):
            test = evaluate(model, self.dataset, "test", self.options.eval_batch_size, self.progress)
        seconds = max(state.train_seconds, 1e-9)
        summary = {
            "best": state.best,
            "test": test,
            "selection": f"best validation {self.options.select_by}" if chosen else "last state (no validation figure)",
            "steps": state.step,
            "epochs": state.epoch,
            "stored_bytes": stored_bytes(model),
            "train_seconds": round(state.train_seconds, 3),
            "samples_per_second": round(state.train_rows / seconds, 1),
            "config": self.config.to_dict(),
            "seed": self.options.seed,
            "data": self.run.info["data"],
            "versions": versions(),
            "device": str(self.device),
        }
        write_json(self.run.path / "summary.json", summary)
        return summary


def _tensorboard(path: Path, step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    # What an interrupted run wrote after the checkpoint is written again.
    return SummaryWriter(str(path / "tensorboard"), purge_step=step + 1 if step else None)
