"""The training loop: epochs, and the logs, evaluations, checkpoints and callbacks between steps; one step is in
`step`.

`launch` starts it. A run that was killed at any moment and resumed ends with the same weights as one that was not, bit
for bit on CPU: the checkpoint holds weights, scales and their step count, optimizer state, random state, the position
in the data, the residuals of the exchange between ranks and the state of callbacks.
"""

import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dqrm.data.dataset import Batch, Dataset
from dqrm.distributed.world import World
from dqrm.errors import UserError
from dqrm.models.base import ClickModel
from dqrm.training.callbacks import Callback, load_callbacks, overriding, save_callbacks
from dqrm.training.checkpoints import (
    CALLBACKS,
    STATE,
    checkpoint_path,
    latest_step,
    save_checkpoint,
)
from dqrm.training.divergence import too_wide
from dqrm.training.environment import Log, Progress, resolve_device, stop_signals
from dqrm.training.evaluation import evaluate_shared
from dqrm.training.loggers import LoggedRun, Loggers, MetricsLogger, logger_names
from dqrm.training.metrics import METRICS
from dqrm.training.optimizers import learning_rate
from dqrm.training.placement import placement_of
from dqrm.training.recording import Recorder
from dqrm.training.run import Run, versions
from dqrm.training.selection import choose, chosen_by, stops
from dqrm.training.start import Start
from dqrm.training.state import State, check_keys

# Flags that a rank sends with a step: a signal asked it to stop; the last checkpoint is old.
_STOP, _SAVE = 1, 2


class Interrupted(Exception):
    """Ctrl-C or SIGTERM arrived; a checkpoint was saved."""


class Trainer:
    """One run in progress: model, optimizers, state, and the folder they are saved in."""

    def __init__(
        self,
        run: Run,
        model: ClickModel,
        dataset: Dataset,
        progress: Progress | None = None,
        log: Log | None = None,
        world: World | None = None,
        verify: bool = True,
        callbacks: Sequence[Callback] = (),
        loggers: Sequence[MetricsLogger] = (),
        start: Start | None = None,
    ) -> None:
        """`start`: on rank 0 of a run that starts from another, whose weights `model` has."""
        self.verify, self.callbacks = verify, callbacks
        self.run, self.model, self.dataset, self.config = run, model, dataset, run.config
        self.options, self.world = self.config.training, world or World()
        self.progress, self.log = progress or (lambda *_: None), log if log and self.world.first else (lambda _: None)
        self.warn = (lambda text: self.log(f"Warning: {text}.")) if log or not self.world.first else warnings.warn
        self.device = resolve_device(self.world.device(self.options.device))
        self.placement = placement_of(self.config, self.world)
        torch.manual_seed(self.options.seed)
        self.state = State()
        last = self.world.on_first(lambda: latest_step(run.checkpoints))
        if last is not None:
            self._load_weights(last)
        self.model.to(self.device).train()
        self.step = self.placement.step(self.model)
        self.optimizers, self.exchange = self.step.optimizers, self.step.exchange
        self.model.tables.clamps.quiet = True  # the loop reports the counts
        if last is not None:
            self._load_state(last)
            for resumes in overriding(callbacks, "on_resume"):
                resumes(self)
        elif self.world.shared(start is not None):
            self._carry_state(start)
        self.stopped = threading.Event()
        self.recorder: Recorder | None = None
        if self.world.first:
            logged = LoggedRun(run.path, run.info["config"], self.state.step)
            receivers = Loggers(logger_names(self.options), loggers, logged, self.warn)
            self.recorder = Recorder(run.path, self.state.metrics_bytes, receivers, self.log)
        self.saved_at = self.clock = time.monotonic()

    def fit(self) -> dict[str, Any]:
        """Train to the end; returns the summary."""
        finished = False
        try:
            with stop_signals(quiet=self.world.size > 1) as self.stopped:
                for _ in self._steps():
                    if self.exchange.flags & _STOP:  # set on all ranks once one of them got a signal
                        if self.world.size > 1:
                            self.log("Stopping after this step and saving.")
                        self._count_time()
                        self._save()
                        raise Interrupted
            summary = self._finish()
            finished = True
            return summary
        finally:
            if self.recorder:
                self.recorder.close(finished)

    def _steps(self) -> Iterator[None]:
        """Yields after each training step, once its evaluations and checkpoints are done."""
        state, options = self.state, self.options
        part = self.dataset.split("train")
        batches = part.num_batches(options.batch_size)
        epoch_starts, step_ends = (overriding(self.callbacks, hook) for hook in ("on_epoch_start", "on_step_end"))
        while not state.finished:
            label = f"epoch {state.epoch + 1}/{options.epochs}"
            self.clock = time.monotonic()
            if state.batch == 0:
                for starts in epoch_starts:
                    starts(self)
            for batch in part.batches(
                options.batch_size,
                shuffle=options.shuffle,
                seed=options.seed,
                epoch=state.epoch,
                start_batch=state.batch,
                share=(0, 1) if self.step.whole_batches else (self.world.rank, self.world.size),
            ):
                losses = self.train_step(batch)
                for ends in step_ends:
                    ends(self, self.exchange.objective(losses.sum(), self._samples(state.batch - 1)))
                self.progress(label, state.batch * options.batch_size, part.rows)
                end = state.batch == batches
                state.finished |= 0 < options.max_steps <= state.step or (end and state.epoch + 1 == options.epochs)
                log_due = options.log_every > 0 and state.step % options.log_every == 0
                if end or state.finished or log_due or self._due():
                    self._count_time()
                    self._report(log_due, end)
                    self.clock = time.monotonic()
                yield
                if state.finished:
                    return

    def train_step(self, batch: Batch) -> Tensor:
        """Forward, backward and update on one batch, or on this rank's shard of one; returns what `TrainStep` does."""
        state = self.state
        rate = learning_rate(state.step, self.config.optimizer) * state.rate_factor
        samples = self._samples(state.batch)
        flags = _STOP * self.stopped.is_set() | _SAVE * (self.world.first and self._old())
        losses = self.step(batch.to(self.device), rate, samples, state.step, flags)
        self.exchange.add_losses(losses, samples)
        state.step += 1
        state.batch += 1
        state.loss_rows += samples
        state.train_rows += samples
        return losses

    def _samples(self, number: int) -> int:
        """Samples of batch `number` of an epoch, on all ranks together."""
        size = self.options.batch_size
        return min(size, self.dataset.rows["train"] - number * size)

    def _count_time(self) -> None:
        now = time.monotonic()
        self.state.train_seconds += now - self.clock
        self.clock = now

    def _sum_loss(self) -> None:
        """Copy the epoch's loss to `state`; raise if it is not finite, so that no checkpoint stores it."""
        state, clamped = self.state, self.model.tables.clamps.take()
        ranks = self.world.gather((self.exchange.loss_sums.tolist(), clamped))
        state.loss_sum = sum(loss for losses, _ in ranks for loss in losses)
        state.clamping.add(counts for _, counts in ranks)
        if not np.isfinite(state.loss_sum):
            raise UserError(
                f"training diverged: the loss is {state.loss_sum} at step {state.step}; "
                f"{too_wide(self.dataset)}lower learning_rate (now {self.config.optimizer.rate})"
            )

    def _due(self) -> bool:
        every, saves, step = self.options.eval_every, self.options.checkpoint_every, self.state.step
        return bool((every and step % every == 0) or (saves and step % saves == 0) or self.exchange.flags & _SAVE)

    def _old(self) -> bool:
        """Whether the last checkpoint is too old; rank 0's clock decides, and its flag is sent with the step."""
        minutes = self.options.checkpoint_minutes
        return minutes > 0 and time.monotonic() - self.saved_at >= 60 * minutes

    def _report(self, log_due: bool, epoch_ends: bool) -> None:
        """Everything that may be due after a step: log, evaluation, end of the epoch, checkpoint."""
        state, options = self.state, self.options
        self._sum_loss()
        train_loss = state.loss_sum / state.loss_rows
        if log_due:
            more: dict[str, Any] = {**state.clamping.figures()}
            if report := self.exchange.report():
                more["exchange"] = report
            self.record({"kind": "train", "epoch": state.epoch + 1, "loss": train_loss, **self._position(), **more})
        evaluate_now = epoch_ends or state.finished or (options.eval_every and state.step % options.eval_every == 0)
        if evaluate_now:
            # Not before other checkpoints: when those are made, a clock or a signal may decide.
            self.optimizers[0].catch_up_all()
            self._evaluate(train_loss, epoch_ends)
        if epoch_ends:
            state.epoch += 1
            state.batch, state.loss_sum, state.loss_rows = 0, 0.0, 0
            self.exchange.loss_sums.zero_()
        if (
            evaluate_now
            or (options.checkpoint_every and state.step % options.checkpoint_every == 0)
            or self.exchange.flags & _SAVE
        ):
            self._save()

    @contextmanager
    def _evaluated_weights(self) -> Iterator[None]:
        """Inside, the model has the weights that are evaluated and saved: those of training, unless a callback says."""
        with ExitStack() as held:
            for weights in overriding(self.callbacks, "evaluated_weights"):
                held.enter_context(weights(self))
            yield

    def _evaluate_on(self, split: str) -> tuple[dict[str, Any], dict[str, Any]]:
        size = self.options.eval_batch_size
        collective = self.placement.collective
        return evaluate_shared(self.model, self.dataset, split, size, self.world, self.progress, collective)

    def _evaluate(self, train_loss: float, epoch_ends: bool) -> None:
        state, options, position = self.state, self.options, self._position()
        with self._evaluated_weights():
            metrics, curve = self._evaluate_on("validation")
        counts = all(each(self) for each in overriding(self.callbacks, "evaluation_counts"))
        better = choose(state, metrics, train_loss, self.config, counts)
        if curve["rows"]:
            self.record({"kind": "calibration", "step": state.step, "epoch": state.epoch + 1, **curve})
        self.record({
            "kind": "evaluation",
            "split": "validation",
            "epoch": state.epoch + 1,
            "train_loss": train_loss,
            "best": better,
            **metrics,
            **state.clamping.figures(),
            **position,
        })  # fmt: skip
        shown = [name for name, metric in METRICS.items() if metric.logged or name == options.select_by]
        figures = [f"{name} {metrics[name]:.4f}" for name in shown if metrics.get(name) is not None]
        self.log(
            f"epoch {state.epoch + 1}, step {state.step}: training loss {train_loss:.4f}; validation "
            + (", ".join(figures) or "has no rows")
            + (" (best so far)" if better else "")
        )
        if not state.finished and (why := stops(state, options, epoch_ends)):
            state.finished = True
            self.log(why)
        state.clamping.evaluated(self.warn, self.model.tables.weight_fake_quantizer.clips)
        for evaluated in overriding(self.callbacks, "on_evaluation"):
            evaluated(self, metrics)

    def _position(self) -> dict[str, Any]:
        rate = learning_rate(self.state.step - 1, self.config.optimizer) * self.state.rate_factor
        return {"step": self.state.step, "learning_rate": rate, "train_seconds": round(self.state.train_seconds, 3)}

    def record(self, line: dict[str, Any]) -> None:
        """A line of metrics.jsonl: its `kind`, `step` and JSON values; floats are sent to the loggers."""
        if self.recorder:
            self.recorder.write(line)

    def _save(self) -> None:
        state = self.state
        self._sum_loss()
        with self.placement.saving(self.model, self.optimizers, self.exchange) as elsewhere:
            if self.recorder is not None:
                state.metrics_bytes = self.recorder.sync()
                keep = {state.best["step"]} if state.best else set()
                with self._evaluated_weights():
                    state.callbacks, tensors = save_callbacks(self.callbacks)
                    saved, more = asdict(state), {**elsewhere, CALLBACKS: tensors}
                    save_checkpoint(self.run.checkpoints, state.step, self.model, self.optimizers, saved, keep, more)
        self.saved_at = time.monotonic()

    def _load_weights(self, step: int) -> None:
        """The weights of a checkpoint, on all ranks."""
        self.placement.load_weights(checkpoint_path(self.run.checkpoints, step), self.model, self.verify)

    def _load_state(self, step: int) -> None:
        """Everything else of a checkpoint, likewise."""
        folder = checkpoint_path(self.run.checkpoints, step)
        values, exchange, of_callbacks = self.placement.load_state(folder, self.optimizers, self.verify)
        self.world.together(lambda: check_keys(folder / STATE, values))
        self.state = State(**values)
        self.world.together(lambda: load_callbacks(self.callbacks, self.state.callbacks, of_callbacks))
        before, now = len(exchange["counters"]) if exchange else 1, self.exchange.size
        if self.world.first:
            self.exchange.loss_sums[0] = self.state.loss_sum
        if before == now:
            self.exchange.load_state(exchange)
        else:
            self.log(
                f"{self.run.path} was saved by {before} ranks and resumes with {now}: the residuals of error "
                "compensation are reset"
            )

    def _carry_state(self, start: Start | None) -> None:
        """Optimizer state of the run that this one starts from."""
        self.placement.carry_state(start, self.model, self.optimizers)
        if start:
            self.log(start.told)
            start.changes.clear()

    def _finish(self) -> dict[str, Any]:
        """Evaluate the chosen checkpoint on test and write the summary."""
        state, model = self.state, self.model
        with self._evaluated_weights():
            if state.best and state.best["step"] != state.step:
                self._load_weights(state.best["step"])
            test, curve = self._evaluate_on("test") if self.dataset.rows.get("test") else (None, None)
        seconds = max(state.train_seconds, 1e-9)
        summary = {
            "best": state.best,
            "test": test,
            "test_calibration": curve,
            "selection": chosen_by(state, self.options.select_by),
            "steps": state.step,
            "epochs": state.epoch,
            "stored_bytes": self.placement.stored_bytes(model),
            "table_bytes": self.placement.table_bytes(model, self.optimizers),
            "train_seconds": round(state.train_seconds, 3),
            "samples_per_second": round(state.train_rows / seconds, 1),
            "clamped_weights": state.clamping.share,
            "config": self.config.to_dict(),
            "seed": self.options.seed,
            "data": self.run.info["data"],
            "versions": versions(),
            "device": str(self.device),
        }
        if report := self.exchange.report():
            summary["exchange"] = report
        self.world.on_first(lambda: self.run.finish(summary))
        if self.recorder and test:
            self.recorder.tell("test", test, state.step)
        return summary
