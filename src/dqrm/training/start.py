"""A run that starts from another one (`dqrm train DATA -o RUN --from EARLIER`): what it takes over, and what it draws.

The data is that of the earlier run or extends its vocabularies. Rows of known ids get the weights and the optimizer
state that they had, in the earlier run's best checkpoint; rows that are new, or of another id than then, keep the
weights that a run of this seed begins with, and no state. Layers likewise, with their optimizer's state and what their
quantizers learned. Scales that follow from weights are set at the first step, as in every run; step count, learning
rate schedule, residuals of the exchange and callbacks begin anew.

Only rank 0 reads the earlier run; the others receive its tensors.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dqrm import checksums
from dqrm.config import Config
from dqrm.data.dataset import Dataset
from dqrm.data.lineage import RowChanges, row_changes
from dqrm.distributed.world import World
from dqrm.errors import UserError
from dqrm.files import read_json
from dqrm.models.base import ClickModel
from dqrm.quant.activations import ActivationFakeQuantizer
from dqrm.quant.linear import QuantLinear
from dqrm.quant.quantizer import WeightFakeQuantizer
from dqrm.quant.storage import copy_rows, storage_of
from dqrm.training.checkpoints import OPTIMIZER, STATE, checkpoint_path, saved_tensors, verify_checkpoint
from dqrm.training.optimizers import SparseOptimizer
from dqrm.training.parameter_groups import parameter_groups
from dqrm.training.run import Run

# Fields of the architecture that have no weights.
_FREE = ("dropout",)
# State of an optimizer that only storages which round have.
_ROUNDING = "steps"
# Rows of optimizer state copied at once.
_ROWS = 1 << 16


@dataclass
class Start:
    """The earlier run, and what a new one takes over from it.

    Attributes:
        run: the earlier run. step: that of its checkpoint. carry: 'all', or 'mlp': all but the tables.
        changes: of each table's rows since then; empty for 'mlp'.
        carried: names of the parameters that were taken over. told: what was done, as a sentence.
    """

    run: Run
    step: int
    carry: str
    changes: list[RowChanges]
    carried: set[str] = field(default_factory=set)
    told: str = ""
    table_weight: Tensor | None = None  # of the earlier run, where rows of it are carried
    _optimized: list[str] = field(default_factory=list)  # parameters of its optimizer for the layers, in that order

    @classmethod
    def plan(cls, earlier: str | Path, carry: str, config: Config, dataset: Dataset) -> "Start":
        """The start of a run of this configuration on this dataset.

        Raises:
            UserError: `earlier` is no finished run; its architecture, its columns or its vocabularies are others.
        """
        if carry not in ("all", "mlp"):
            raise UserError(f"carry: got {carry!r}, expected 'all' or 'mlp' (all but the tables)")
        run = Run.open(earlier)
        summary = run.summary
        if summary is None:
            raise UserError(f"{earlier} is not finished; `dqrm train --resume {earlier}` continues it")
        _require_same_architecture(run, config)
        _require_same_columns(run, dataset, carry)
        step = (summary["best"] or {}).get("step", summary["steps"])
        changes = [] if carry == "mlp" else row_changes(dataset, run.info["data"], run.path)
        return cls(run, step, carry, changes)

    @property
    def record(self) -> dict[str, Any]:
        """For run.json: the earlier run, its checkpoint and the dataset that it was trained on."""
        return {
            "run": str(self.run.path.resolve()),
            "step": self.step,
            "checksum": read_json(self._checkpoint / STATE).get(checksums.SEAL),
            "fingerprint": self.run.info["data"]["fingerprint"],
            "carry": self.carry,
        }

    @classmethod
    def recorded(cls, record: Mapping[str, Any], config: Config, dataset: Dataset) -> "Start":
        """The start that run.json describes, for a run that was stopped before its first checkpoint.

        Raises:
            UserError: the earlier run is gone or is another one; as `plan`.
        """
        start = cls.plan(record["run"], record["carry"], config, dataset)
        if start.record != dict(record):
            raise UserError(f"{record['run']} is no longer the run that this one was started from; start it again")
        return start

    @property
    def _checkpoint(self) -> Path:
        return checkpoint_path(self.run.checkpoints, self.step)

    def verify(self) -> None:
        """Compare the files of the checkpoint with their checksums."""
        verify_checkpoint(self._checkpoint)

    @torch.no_grad()
    def carry_weights(self, model: ClickModel, config: Config, tables: bool = True) -> None:
        """Weights of the earlier run into a model as it was drawn, on the CPU: its tables are memory-mapped.

        Args:
            tables: whether the tables' too; else `table_weight` has them.

        Raises:
            UserError: the checkpoint is damaged.
        """
        theirs, _ = self.run.load_model(mapped=True, verify=False)
        parameters = dict(theirs.named_parameters())
        quantizers = _quantizers(model)
        owned = {f"{path}.{name}" for path, each in quantizers.items() for name in each.state_dict()}
        for name, weight in model.state_dict(keep_vars=True).items():
            if name in owned or name == "tables.weight":
                continue
            weight.copy_(theirs.get_parameter(name) if name in parameters else theirs.get_buffer(name))
            self.carried.add(name)
        self.table_weight = theirs.tables.weight if self.changes else None
        for number, change in enumerate(self.changes if tables else ()):
            kept = torch.from_numpy(change.kept).long()
            copy_rows(model.tables.table(number), kept, theirs.tables.table(number), kept)
        lost = self._carry_learned(quantizers, _quantizers(theirs))
        names = _names(theirs)
        others = [each for each in theirs.parameters() if each is not theirs.tables.weight]
        groups = parameter_groups(theirs, others, self.run.config.optimizer)
        ordered = (each for group in groups for each in (group["params"] if isinstance(group, dict) else [group]))
        self._optimized = [names[id(parameter)] for parameter in ordered]
        model.tables.weights_replaced(0)
        self.told = self._describe(lost, config)

    def _carry_learned(self, mine: dict[str, Any], theirs: dict[str, Any]) -> bool:
        """What quantizers learned, or saw of activations; whether anything of it was dropped."""
        lost = False
        for path, other in theirs.items():
            if not _learns(other) or (path.startswith("tables.") and self.carry == "mlp"):
                continue
            own, state = mine.get(path), other.state_dict()
            if (
                own is None
                or type(own) is not type(other)
                or own.bits != other.bits
                or not _alike(own.state_dict(), state)
            ):
                lost = True
                continue
            own.load_state_dict(state)
            self.carried |= {f"{path}.{name}" for name in state}
        return lost

    def _describe(self, lost: bool, config: Config) -> str:
        before = self.run.config
        text = f"Starting from {self.run.path}, step {self.step}: "
        if self.changes:
            counts = {
                name: sum(len(getattr(change, name)) for change in self.changes) for name in ("kept", "new", "reused")
            }
            text += ", ".join(f"{count:,} table rows {name}" for name, count in counts.items())
        else:
            text += "all weights but the tables'"
        was, now = before.training.table_dtype, config.training.table_dtype
        if self.changes and was != now:
            text += f"; stored in {now}, before in {was}"
        dropped = ["what quantizers learned"] * lost
        if not self._same_rule(config):
            dropped.append(f"the state of {before.optimizer.rule} (now {config.optimizer.rule})")
        return text + (f"; dropped: {' and '.join(dropped)}" if dropped else "")

    def _same_rule(self, config: Config) -> bool:
        return self.run.config.optimizer.rule == config.optimizer.rule

    @torch.no_grad()
    def carry_optimizers(self, model: ClickModel, optimizers: Sequence[Optimizer | None], config: Config) -> None:
        """The state of the optimizers [of the tables, of everything else], if they are of the same rule; None: not of
        the tables' (see `table_state`).

        Raises:
            UserError: the checkpoint is damaged.
        """
        if not self._same_rule(config):
            return
        tensors = saved_tensors(self._checkpoint, OPTIMIZER)
        if self.changes and optimizers[0] is not None:
            self._carry_table_state(model, optimizers[0], _of_parameter(tensors, "0/0/"))  # type: ignore[arg-type]
        names, numbers = _names(model), {name: number for number, name in enumerate(self._optimized)}
        assert optimizers[1] is not None
        for parameter in (each for group in optimizers[1].param_groups for each in group["params"]):
            name = names[id(parameter)]
            if name in self.carried and name in numbers:
                state = optimizers[1].state[parameter]
                for key, value in _of_parameter(tensors, f"1/{numbers[name]}/").items():
                    state[key] = value.clone().to(state[key].device if key in state else parameter.device)

    def table_state(self, name: str, config: Config) -> Tensor | None:
        """A state of the tables' optimizer, by its key in checkpoints, memory-mapped; None where none is carried."""
        if not self.changes or not self._same_rule(config):
            return None
        return saved_tensors(self._checkpoint, OPTIMIZER).get(name)

    def copy_kept(self, source: Tensor, piece: Tensor, first: int, starts: Sequence[int]) -> None:
        """Copy rows of known ids from a tensor of the earlier run, all tables' rows, into a piece of the new run's.

        Args:
            source: `table_weight`, or a `table_state`.
            piece: the rows from `first` on: float32, or integers as the source.
            starts: the first row of each table in the new run.
        """
        before = [0, *accumulate(column["rows"] for column in self.run.info["data"]["columns"])]
        for change, old, start in zip(self.changes, before, starts):
            kept = torch.from_numpy(change.kept).long()
            here = kept[(kept + start >= first) & (kept + start < first + len(piece))]
            if len(here):
                floats = piece.is_floating_point()
                rows = storage_of(source).gather(source, here + old) if floats else source[here + old]
                piece[here + start - first] = rows.view(-1, *piece.shape[1:])

    def _carry_table_state(self, model: ClickModel, optimizer: SparseOptimizer, saved: Mapping[str, Tensor]) -> None:
        weight, state = model.tables.weight, optimizer.state[model.tables.weight]
        before = [column["rows"] for column in self.run.info["data"]["columns"]]
        starts, offsets = [0, *accumulate(before)], model.tables.row_offsets.tolist()
        for name, value in saved.items():
            if value.dim() == 0 or len(value) != sum(before):
                if name in state or name != _ROUNDING:
                    state[name] = value.clone().to(weight.device if value.dim() else "cpu")
                continue
            if name not in state:
                state[name] = torch.zeros((len(weight), *value.shape[1:]), dtype=value.dtype, device=weight.device)
            for change, start, offset in zip(self.changes, starts, offsets):
                for rows in torch.from_numpy(change.kept).split(_ROWS):
                    part = value.index_select(0, rows.long() + start).to(weight.device)
                    state[name].index_copy_(0, rows.long().to(weight.device) + offset, part)
        for change, offset in zip(self.changes, offsets):
            for drawn in (change.new, change.reused, change.vacant):
                optimizer.reset_rows(torch.from_numpy(drawn).long().to(weight.device) + offset)


def keeps_state(earlier: str | Path | None, carry: str, config: Config) -> bool:
    """Whether a run of this configuration that starts so takes over the tables' optimizer state.

    Raises:
        UserError: `earlier` is no run.
    """
    if earlier is None or carry != "all":
        return False
    return Run.open(earlier).config.optimizer.rule == config.optimizer.rule


def share_weights(world: World, model: ClickModel) -> None:
    """Rank 0's weights on all ranks."""
    if world.size > 1:
        world.broadcast_model(model)
        model.tables.weights_replaced(world.shared(model.tables.scale_ticks))
        for module in model.modules():
            if isinstance(module, QuantLinear):
                module.weight_fake_quantizer.weights_replaced(module.weight, 0)


def share_state(world: World, optimizers: Sequence[Optimizer]) -> None:
    """The state of rank 0's optimizers on all ranks, which have tensors of the same names and shapes."""
    for optimizer in optimizers:
        for parameters in (group["params"] for group in optimizer.param_groups):
            for values in (optimizer.state.get(parameter, {}) for parameter in parameters):
                for value in (values[name] for name in sorted(values)):
                    world.broadcast(value)


def share_tensors(world: World, load: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors (on the CPU) that `load` returns on rank 0, on all ranks: one by one, as a Python object with all of
    them would be in memory several times.

    Raises:
        UserError: of `load`, on all ranks.
    """
    found = world.together(lambda: load() if world.first else {})
    for name, shape, dtype in world.shared([(name, each.shape, each.dtype) for name, each in found.items()]):
        if not world.first:
            found[name] = torch.empty(shape, dtype=dtype)
        if found[name].numel():
            world.broadcast(found[name])
    return found


def _require_same_architecture(run: Run, config: Config) -> None:
    before, now = asdict(run.config.model), asdict(config.model)
    for name, value in now.items():
        if name not in _FREE and before[name] != value:
            raise UserError(
                f"{run.path} has {name} {_shown(before[name])}, but this run {_shown(value)}: a run starts from one of "
                "the same architecture"
            )


def _require_same_columns(run: Run, dataset: Dataset, carry: str) -> None:
    data = run.info["data"]
    before = list(data["dense"]), [(column["name"], column["multi"]) for column in data["columns"]]
    now = list(dataset.dense), [(column.name, column.multi) for column in dataset.columns]
    if carry == "mlp":
        counts = [[len(names) for names in each] for each in (before, now)]
        if counts[0] != counts[1]:
            raise UserError(
                f"{run.path} has {counts[0][0]} dense and {counts[0][1]} categorical columns, but {dataset.path} has "
                f"{counts[1][0]} and {counts[1][1]}: a run starts from one with as many"
            )
    elif before != now:
        both = ((*before[0], *(name for name, _ in before[1])), (*now[0], *(name for name, _ in now[1])))
        raise UserError(
            f"{run.path} was trained with the columns {', '.join(both[0])}, but {dataset.path} has "
            f"{', '.join(both[1])}: a run starts from one with the same columns"
        )


def _shown(value: Any) -> str:
    return "-".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _quantizers(model: nn.Module) -> dict[str, Any]:
    kinds = WeightFakeQuantizer, ActivationFakeQuantizer
    return {path: module for path, module in model.named_modules() if isinstance(module, kinds)}


def _learns(quantizer: nn.Module) -> bool:
    """Whether what it holds does not follow from the weight alone."""
    return isinstance(quantizer, ActivationFakeQuantizer) or any(True for _ in quantizer.parameters())


def _alike(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return {name: value.shape for name, value in one.items()} == {name: value.shape for name, value in other.items()}


def _names(model: nn.Module) -> dict[int, str]:
    return {id(parameter): name for name, parameter in model.named_parameters()}


def _of_parameter(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
