"""Start a training run with `train(dataset, "runs/a", config)`, continue it with `resume("runs/a")`.

One rank or several, which `torchrun` starts: whatever can be refused is refused before the first step, on every rank
and with the same message.
"""

import shlex
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from dqrm import __version__, recipe
from dqrm.config import Config
from dqrm.data.dataset import Dataset
from dqrm.distributed.processes import join
from dqrm.distributed.world import World
from dqrm.errors import UserError
from dqrm.models.base import ClickModel
from dqrm.options import registered
from dqrm.training.callbacks import Callback, RecordHistograms, RedrawTables, build_callbacks
from dqrm.training.checkpoints import latest_step
from dqrm.training.environment import Log, Progress, check_environment, free_memory
from dqrm.training.footprint import describe_table_bytes
from dqrm.training.from_artifact import FromArtifact
from dqrm.training.from_run import FromRun
from dqrm.training.loggers import MetricsLogger
from dqrm.training.loop import Interrupted, Trainer
from dqrm.training.optimizers import OPTIMIZERS
from dqrm.training.placement import placement_of
from dqrm.training.run import Run
from dqrm.training.selection import check_selection, has_figure, selecting
from dqrm.training.start import Start
from dqrm.training.threads import choose_threads, threads_set

__all__ = ["Interrupted", "check", "check_ranks", "resume", "train"]


def train(
    dataset: Dataset | str | Path,
    output: str | Path,
    config: Config | None = None,
    progress: Progress | None = None,
    log: Log | None = None,
    verify: bool = True,
    callbacks: Sequence[Callback] = (),
    loggers: Sequence[MetricsLogger] = (),
    start_from: str | Path | None = None,
    carry: str = "all",
) -> dict[str, Any]:
    """Train a model on `dataset` and write a run folder at `output`.

    Args:
        dataset: a prepared dataset folder.
        output: the run folder to make.
        config: what to train and how; default INT4 by the recipe of `dqrm.recipe`.
        progress: called as progress(stage, done, total). log: called with one line of text per evaluation.
        verify: compare the dataset with its checksums first, which reads all of it; one rank does so on each machine.
        callbacks, loggers: objects, in addition to those that `config` names; see `training.loggers`.
        start_from: a finished run to start from, whose best checkpoint is read, or an artifact: the same architecture,
            on this dataset or one whose vocabularies it extends. Epochs that are not set are then 1; see `resolved`,
            `training.start`.
        carry: what is taken over from it: 'all', or 'mlp', all but the tables, whose ids may be others.

    Returns:
        The content of summary.json.

    Raises:
        UserError: the configuration cannot be run here or on this data, the data is damaged, another process trains
            into `output`, or the loss is not finite; or no run can start from `start_from` so.
        Interrupted: Ctrl-C or SIGTERM; the run can be resumed.
    """
    asked = config or Config()
    with join(asked.exchange.exchange_timeout) as world, ExitStack() as held:
        world.require_same({"the command": "train"})
        data = world.together(lambda: dataset if isinstance(dataset, Dataset) else Dataset(dataset))
        source = start_from if carry == "all" else None  # of tables and state, too
        config = _resolved(world, asked, data, start_from, carry)
        check_ranks(world, config, data)
        callbacks = world.together(lambda: _checked(config, data, callbacks, loggers, source))
        run = world.on_first(lambda: Run.plan(Path(output), config, data))
        _check_data(world, data, verify, progress)
        for text in world.together(lambda: check_selection(config, data)):
            if world.first:
                log(text) if log else warnings.warn(text, stacklevel=2)
        # Before the folder is made: an invalid model must not leave one.
        model, start = _begun(world, run, lambda: _planned(run, config, data, start_from, carry), verify)
        run.info["threads"] = world.on_first(lambda: choose_threads(run))
        held.enter_context(threads_set(run.info["threads"]))
        world.together(lambda: held.enter_context(run.started()) if world.first else None)
        if log and world.first:
            log(_described(config, data, callbacks))
        trainer = Trainer(run, model, data, progress, log, world, verify, callbacks, loggers, start)
        if log and world.first:
            found = trainer.placement.table_bytes(model, trainer.optimizers)
            log(describe_table_bytes(found, config, run.table_weights, free_memory(trainer.device)))
        return trainer.fit()


def resume(
    output: str | Path,
    dataset: Dataset | str | Path | None = None,
    progress: Progress | None = None,
    log: Log | None = None,
    verify: bool = True,
    callbacks: Sequence[Callback] = (),
    loggers: Sequence[MetricsLogger] = (),
) -> dict[str, Any]:
    """Resume the run at `output` from its newest checkpoint; returns its summary.

    Args:
        output: a run folder.
        dataset: its data, if the folder was moved; the fingerprint must be the same.
        verify: compare dataset and checkpoint with their checksums first.
        callbacks: those that `train` was given; one that is missing is refused.
        loggers: as for `train`; those that the configuration names continue their runs.

    Raises:
        UserError: not a run, not the same dataset, a damaged checkpoint, or as `train`.
    """
    with join() as world, ExitStack() as held:
        world.require_same({"the command": "train --resume"})
        run = world.on_first(lambda: Run.open(output))  # the others need not see the folder
        data = world.together(lambda: _data_of(run, dataset))
        world.together(lambda: run.require_same_data(data))
        done = world.on_first(lambda: run.summary)
        if done is None:
            check_ranks(world, run.config, data)
            callbacks = world.together(lambda: _registered(run.config, data, callbacks, loggers))
            world.together(lambda: held.enter_context(run.continued()) if world.first else None)
            done = world.on_first(lambda: run.summary)  # the process that held the lock may have finished it
        if done is not None:
            if log and world.first:
                log(f"{output} is finished; nothing to continue.")
            return done
        _check_data(world, data, verify, progress)
        if run.dropped and world.first:
            log(run.dropped) if log else warnings.warn(run.dropped, stacklevel=2)
        held.enter_context(threads_set(run.info.get("threads") or run.config.training.threads))
        begun = world.on_first(lambda: latest_step(run.checkpoints) is not None)  # its weights replace those drawn
        model, start = _begun(world, run, lambda: None if begun else _recorded(run, data), verify, drawn=not begun)
        return Trainer(run, model, data, progress, log, world, verify, callbacks, loggers, start).fit()


def _planned(run: Run, config: Config, data: Dataset, start_from: str | Path | None, carry: str) -> Start | None:
    if start_from is None:
        return None
    if carry not in ("all", "mlp"):
        raise UserError(f"carry: got {carry!r}, expected 'all' or 'mlp' (all but the tables)")
    start = (FromArtifact if Path(start_from).is_file() else FromRun).plan(start_from, carry, config, data)
    run.info["start"] = start.record
    return start


def _recorded(run: Run, data: Dataset) -> Start | None:
    """What a run without a checkpoint starts from."""
    record = run.info.get("start")
    kinds: tuple[type[Start], ...] = (FromRun, FromArtifact)
    return next((kind.recorded(record, run.config, data) for kind in kinds if record and kind.kind in record), None)


def _begun(
    world: World, run: Run, plan: Callable[[], Start | None], verify: bool, drawn: bool = True
) -> tuple[ClickModel, Start | None]:
    """The model as it was drawn, or on all ranks with the weights that it starts from; and rank 0's plan of that."""
    start = world.together(lambda: plan() if world.first else None)
    placement = placement_of(run.config, world)
    model = placement.new_model(run, drawn)
    if world.shared(start is not None):
        placement.carry_weights(start, model, verify)
    return model, start


def resolved(config: Config, dataset: Dataset, starts: bool = False, goes_on: bool = False) -> Config:
    """The configuration with batch size, learning rate, warm-up and epochs resolved for this dataset where not set;
    `starts`: of a run that starts from another, for 1 epoch; `goes_on`: with its optimizer state.

    Raises:
        UserError: it is impossible at this batch size.
    """
    options, optimizer, rows = config.training, config.optimizer, dataset.rows
    if not options.batch_size:
        options = replace(options, batch_size=recipe.batch_size(rows["train"], optimizer.rule))
    if not options.epochs:
        judged = has_figure(options.select_by, dataset)
        options = replace(options, epochs=recipe.EPOCHS if judged and options.patience and not starts else 1)
    if optimizer.learning_rate is None:
        rate = recipe.learning_rate(optimizer.rule, options.batch_size, goes_on)
        optimizer = replace(optimizer, learning_rate=rate)
    if optimizer.warmup_steps is None:
        steps = recipe.warmup_steps(optimizer.rule, rows["train"] // options.batch_size, goes_on)
        early = optimizer.decay_steps and optimizer.decay_start_step < steps
        optimizer = replace(optimizer, warmup_steps=0 if early else steps)
    try:
        return replace(config, training=options, optimizer=optimizer)
    except ValueError as error:  # what was asked does not go with the batch size of this dataset
        raise UserError(f"{dataset.path}: {error}") from None


def check(config: Config, dataset: Dataset, starts: bool = False) -> Config:
    """What `train` would refuse before it makes a folder, but for the model's size; returns the resolved configuration.

    Raises:
        UserError: as `train`.
    """
    config = resolved(config, dataset, starts)
    check_ranks(World(), config, dataset)
    _checked(config, dataset, (), (), "another run" if starts else None)
    check_selection(config, dataset)
    return config


def _resolved(world: World, asked: Config, data: Dataset, start_from: str | Path | None, carry: str) -> Config:
    """The same on all ranks, of which only the first needs to see the earlier run."""
    goes_on = world.on_first(lambda: _keeps_state(start_from, carry, asked))
    return world.together(lambda: resolved(asked, data, start_from is not None, goes_on))


def _keeps_state(earlier: str | Path | None, carry: str, config: Config) -> bool:
    """Whether a run of this configuration that starts so takes over the tables' optimizer state."""
    if earlier is not None and not Path(earlier).exists():
        raise UserError(f"{earlier} does not exist, expected a run folder or a .dqrm file to start from")
    if earlier is None or carry != "all" or Path(earlier).is_file():
        return False
    return Run.open(earlier).config.optimizer.rule == config.optimizer.rule


def _described(config: Config, dataset: Dataset, callbacks: Sequence[Callback]) -> str:
    """The resolved optimizer, batch size, epochs and callbacks, as a sentence."""
    options, optimizer = config.training, config.optimizer
    judged = has_figure(options.select_by, dataset)
    until = f"patience {options.patience}" if judged else f"no validation {options.select_by} that could end it earlier"
    objects = [each.name for each in callbacks[len(options.callbacks) :]]
    warmup = f" ({optimizer.warmup} steps of warm-up)" if optimizer.warmup else ""
    return (
        f"Training with {optimizer.rule}, learning rate {optimizer.rate:g}{warmup}, batch size {options.batch_size}, "
        f"at most {options.epochs} epoch{'s' * (options.epochs > 1)} ({until}); "
        f"callbacks: {', '.join([*options.callbacks, *objects]) or 'none'}"
    )


def _registered(
    config: Config, data: Dataset, callbacks: Sequence[Callback], loggers: Sequence[MetricsLogger]
) -> list[Callback]:
    """All callbacks of a run; raises UserError unless everything that its configuration names is there."""
    check_environment(config.training, loggers)
    registered("optimizer", config.optimizer.rule, OPTIMIZERS)
    selecting(config.training.select_by)
    histograms = [RecordHistograms(columns)] if (columns := config.training.record_histograms) else []
    for each in histograms:
        each.numbers(data)
    built = build_callbacks(config.training.callbacks, [*callbacks, *histograms])
    placement_of(config, World()).check_callbacks(built)
    return built


def _checked(
    config: Config,
    data: Dataset,
    given: Sequence[Callback],
    loggers: Sequence[MetricsLogger],
    start_from: str | Path | None,
) -> list[Callback]:
    """All callbacks of a new run; raises UserError where it cannot begin with one of them."""
    epochs, callbacks = config.training.epochs, _registered(config, data, given, loggers)
    for callback in callbacks:
        callback.check(config)
        if start_from is not None and epochs > 1 and isinstance(callback, RedrawTables):
            raise UserError(
                f"epochs is {epochs}, but the callback redraw_tables would redraw the rows carried over from "
                f"{start_from} at epoch 2; use epochs 1, or callbacks without it"
            )
    return callbacks


def _check_data(world: World, data: Dataset, verify: bool, progress: Progress | None) -> None:
    """Raise UserError on all ranks unless there are training rows, the data is intact (one rank per machine checks) and
    its values are valid."""
    if not data.rows["train"]:
        raise UserError(f"{data.path} has no training rows: nothing to train on")
    if verify:
        world.together(lambda: data.verify(tell=progress) if world.local_rank == 0 else None)
    world.together(lambda: data.validate(*data.rows))


def _data_of(run: Run, dataset: Dataset | str | Path | None) -> Dataset:
    """The data to resume on: as given, or as run.json says."""
    if dataset is None:
        try:
            return Dataset(run.info["data"]["path"])
        except UserError as error:
            raise UserError(
                f"{error}; where the data has moved, `dqrm train --resume {shlex.quote(str(run.path))} DATA` names it"
            ) from None
    return dataset if isinstance(dataset, Dataset) else Dataset(dataset)


def check_ranks(world: World, config: Config, dataset: Dataset) -> None:
    """Raise UserError on all ranks unless they can train this together; set the timeout of collectives."""
    facts = {name: value for values in config.to_dict().values() for name, value in values.items()}
    of_all = {"the version of dqrm": __version__, "the data's fingerprint": dataset.fingerprint}
    of_all["tables"] = config.training.tables
    world.require_same(of_all | facts)  # in this order: the data and `tables` decide some of the others
    size, simulated = world.size, config.exchange.simulate_ranks
    if size > 1 and simulated > 1:
        raise UserError(f"simulate_ranks is {simulated}, but {size} real ranks were started; use one or the other")
    if size > config.training.batch_size:
        raise UserError(
            f"{size} ranks share a batch of {config.training.batch_size} samples (batch_size): start at most "
            f"{config.training.batch_size} ranks, or raise batch_size"
        )
    if size > 1 and config.training.device.startswith("cuda:"):
        raise UserError(
            f"device is '{config.training.device}', one GPU for {size} ranks; 'cuda' gives each rank its own"
        )
    if max(size, simulated) > 1 and config.model.batch_norm:
        raise UserError(
            "batch_norm is true, but ranks do not exchange the statistics of their activations; use false with several "
            "ranks"
        )
    if max(size, simulated) > 1 and config.quantization.activation_bits != 32:
        raise UserError(
            f"activation_bits is {config.quantization.activation_bits}, but ranks do not exchange the ranges of their "
            "activations; use 32 with several ranks"
        )
    world.together(lambda: placement_of(config, world).check(dataset))
    world.set_timeout(config.exchange.exchange_timeout)
