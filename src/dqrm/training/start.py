"""A run that starts from another one, or from an artifact (`dqrm train DATA -o RUN --from EARLIER`): what it takes
over, and what it draws.

The data is that of the earlier model or extends its vocabularies. Rows of known ids get the weights and the optimizer
state that they had; rows that are new, or of another id than then, keep the weights that a run of this seed begins
with, and no state. Layers likewise. Scales that follow from weights are set at the first step, as in every run; step
count, learning rate schedule, residuals of the exchange and callbacks begin anew.

Only rank 0 reads the earlier model; the others receive its tensors.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dqrm.config import Config
from dqrm.data.dataset import Dataset
from dqrm.data.lineage import RowChanges, row_changes
from dqrm.distributed.world import World
from dqrm.errors import UserError
from dqrm.models.base import ClickModel
from dqrm.quant.linear import QuantLinear
from dqrm.quant.storage import storage_of

# Fields of the architecture that have no weights.
_FREE = ("dropout",)


@dataclass
class Start(ABC):
    """The earlier model, and what a new run takes over from it.

    Attributes:
        path: the earlier run or file. columns: name and rows of each of its tables. carry: 'all', or 'mlp': all but
            the tables.
        changes: of each table's rows since then; empty for 'mlp'.
        told: what was done, as a sentence.
        table_weight: of the earlier model, where rows of it are carried: what `copy_kept` takes.
    """

    kind = ""
    """What the earlier model is in, and in run.json the key of its path."""

    path: Path
    columns: Sequence[Mapping[str, Any]]
    carry: str
    changes: list[RowChanges]
    told: str = field(default="", init=False)
    table_weight: Any = field(default=None, init=False)

    @classmethod
    @abstractmethod
    def plan(cls, earlier: str | Path, carry: str, config: Config, dataset: Dataset) -> "Start":
        """The start of a run of this configuration on this dataset.

        Raises:
            UserError: `earlier` is no finished run, or no artifact; its architecture, its columns or its vocabularies
                are others.
        """

    @classmethod
    def recorded(cls, record: Mapping[str, Any], config: Config, dataset: Dataset) -> "Start":
        """The start that run.json describes, for a run that was stopped before its first checkpoint.

        Raises:
            UserError: the earlier model is gone or is another one; as `plan`.
        """
        earlier = record[cls.kind]
        start = cls.plan(earlier, record["carry"], config, dataset)
        if start.record != dict(record):
            raise UserError(f"{earlier} is no longer the {cls.kind} that this one was started from; start it again")
        return start

    @property
    @abstractmethod
    def record(self) -> dict[str, Any]:
        """For run.json: the earlier model, and the dataset that it was trained on."""

    @abstractmethod
    def verify(self) -> None:
        """Compare its files with their checksums."""

    @abstractmethod
    def carry_weights(self, model: ClickModel, config: Config, tables: bool = True) -> None:
        """Weights of the earlier model into one as it was drawn, on the CPU: its tables are memory-mapped.

        Args:
            tables: whether the tables' too; else `table_weight` has them.

        Raises:
            UserError: its file is damaged.
        """

    @abstractmethod
    def carry_optimizers(self, model: ClickModel, optimizers: Sequence[Optimizer | None], config: Config) -> None:
        """The state of the optimizers [of the tables, of everything else], if there is one and they are of the same
        rule; None: not of the tables' (see `table_state`).

        Raises:
            UserError: the checkpoint is damaged.
        """

    def table_state(self, name: str, config: Config) -> Tensor | None:
        """A state of the tables' optimizer, by its key in checkpoints, memory-mapped; None where none is carried."""
        return None

    def copy_kept(self, source: Any, piece: Tensor, first: int, starts: Sequence[int]) -> None:
        """Copy rows of known ids of the earlier model, all tables' rows, into a piece of the new run's.

        Args:
            source: `table_weight`, or a `table_state`.
            piece: the rows from `first` on: float32, or integers as the source.
            starts: the first row of each table in the new run.
        """
        before = [0, *accumulate(column["rows"] for column in self.columns)]
        for number, (change, old, start) in enumerate(zip(self.changes, before, starts)):
            kept = torch.from_numpy(change.kept).long()
            here = kept[(kept + start >= first) & (kept + start < first + len(piece))]
            if len(here):
                rows = self._read(source, number, here, old, piece.is_floating_point())
                piece[here + start - first] = rows.view(-1, *piece.shape[1:])

    def _read(self, source: Any, number: int, rows: Tensor, first: int, floats: bool) -> Tensor:
        """Rows of table `number`, whose row 0 is row `first` of `source`; as float32 with `floats`."""
        rows = rows + first
        return storage_of(source).gather(source, rows) if floats else source[rows]

    def _describe(self, where: str, now: str, dropped: Sequence[str]) -> str:
        """`told`, of what the model was in, the storage of its tables if another one, and what is not carried."""
        text = f"Starting from {self.path}{where}: "
        if self.changes:
            counts = {
                name: sum(len(getattr(change, name)) for change in self.changes) for name in ("kept", "new", "reused")
            }
            text += ", ".join(f"{count:,} table rows {name}" for name, count in counts.items()) + now
        else:
            text += "all weights but the tables'"
        return text + (f"; dropped: {' and '.join(dropped)}" if dropped else "")


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


def require_same_architecture(path: Path, before: Mapping[str, Any], config: Config) -> None:
    """Raise UserError unless the model at `path`, whose configuration is `before`, has the layers of a new one."""
    now = asdict(config.model)
    for name, value in now.items():
        if name not in _FREE and before[name] != value:
            raise UserError(
                f"{path} has {name} {_shown(before[name])}, but this run {_shown(value)}: a run starts from one of "
                "the same architecture"
            )


def changes_since(
    path: Path, schema: Mapping[str, Any], trained_on: Mapping[str, Any], dataset: Dataset, carry: str
) -> list[RowChanges]:
    """`Start.changes` of a model at `path`.

    Args:
        schema: its dense and categorical columns. trained_on: as for `row_changes`.

    Raises:
        UserError: the dataset has other columns or vocabularies.
    """
    before = list(schema["dense"]), [(column["name"], column["multi"]) for column in schema["columns"]]
    now = list(dataset.dense), [(column.name, column.multi) for column in dataset.columns]
    if carry == "mlp":
        counts = [[len(names) for names in each] for each in (before, now)]
        if counts[0] != counts[1]:
            raise UserError(
                f"{path} has {counts[0][0]} dense and {counts[0][1]} categorical columns, but {dataset.path} has "
                f"{counts[1][0]} and {counts[1][1]}: a run starts from one with as many"
            )
    elif before != now:
        both = ((*before[0], *(name for name, _ in before[1])), (*now[0], *(name for name, _ in now[1])))
        raise UserError(
            f"{path} was trained with the columns {', '.join(both[0])}, but {dataset.path} has "
            f"{', '.join(both[1])}: a run starts from one with the same columns"
        )
    return [] if carry == "mlp" else row_changes(dataset, trained_on, path)


def _shown(value: Any) -> str:
    return "-".join(map(str, value)) if isinstance(value, tuple) else str(value)
