"""What a run takes over from an earlier one (`start`), of its best checkpoint: weights, what quantizers learned, and
the state of the optimizers."""

from collections.abc import Mapping, Sequence
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
from dqrm.errors import UserError
from dqrm.files import read_json
from dqrm.models.base import ClickModel
from dqrm.quant.activations import ActivationFakeQuantizer
from dqrm.quant.quantizer import WeightFakeQuantizer
from dqrm.quant.storage import copy_rows
from dqrm.training.checkpoints import OPTIMIZER, STATE, checkpoint_path, saved_tensors, verify_checkpoint
from dqrm.training.optimizers import SparseOptimizer
from dqrm.training.parameter_groups import parameter_groups
from dqrm.training.run import Run
from dqrm.training.start import Start, changes_since, require_same_architecture

# State of an optimizer that only storages which round have.
_ROUNDING = "steps"
# Rows of optimizer state copied at once.
_ROWS = 1 << 16


@dataclass
class FromRun(Start):
    """See `Start`.

    Attributes:
        run: the earlier run. step: that of its checkpoint. carried: names of the parameters that were taken over.
    """

    kind = "run"

    run: Run
    step: int
    carried: set[str] = field(default_factory=set, init=False)
    _optimized: list[str] = field(default_factory=list, init=False)  # parameters of the layers' optimizer, in order

    @classmethod
    def plan(cls, earlier: str | Path, carry: str, config: Config, dataset: Dataset) -> "FromRun":
        run = Run.open(earlier)
        summary, data = run.summary, run.info["data"]
        if summary is None:
            raise UserError(f"{earlier} is not finished; `dqrm train --resume {earlier}` continues it")
        require_same_architecture(run.path, asdict(run.config.model), config)
        changes = changes_since(run.path, data, data, dataset, carry)
        step = (summary["best"] or {}).get("step", summary["steps"])
        return cls(run.path, data["columns"], carry, changes, run, step)

    @property
    def record(self) -> dict[str, Any]:
        return {
            "run": str(self.run.path.resolve()),
            "step": self.step,
            "checksum": read_json(self._checkpoint / STATE).get(checksums.SEAL),
            "fingerprint": self.run.info["data"]["fingerprint"],
            "carry": self.carry,
        }

    @property
    def _checkpoint(self) -> Path:
        return checkpoint_path(self.run.checkpoints, self.step)

    def verify(self) -> None:
        verify_checkpoint(self._checkpoint)

    @torch.no_grad()
    def carry_weights(self, model: ClickModel, config: Config, tables: bool = True) -> None:
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
        was, now = self.run.config.training.table_dtype, config.training.table_dtype
        dropped = ["what quantizers learned"] * lost
        if not self._same_rule(config):
            dropped.append(f"the state of {self.run.config.optimizer.rule} (now {config.optimizer.rule})")
        stored = f"; stored in {now}, before in {was}" if was != now else ""
        self.told = self._describe(f", step {self.step}", stored, dropped)

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

    def _same_rule(self, config: Config) -> bool:
        return self.run.config.optimizer.rule == config.optimizer.rule

    @torch.no_grad()
    def carry_optimizers(self, model: ClickModel, optimizers: Sequence[Optimizer | None], config: Config) -> None:
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
        if not self.changes or not self._same_rule(config):
            return None
        return saved_tensors(self._checkpoint, OPTIMIZER).get(name)

    def _carry_table_state(self, model: ClickModel, optimizer: SparseOptimizer, saved: Mapping[str, Tensor]) -> None:
        weight, state = model.tables.weight, optimizer.state[model.tables.weight]
        before = [column["rows"] for column in self.columns]
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
