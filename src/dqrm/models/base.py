"""The interface of click models, which training, exchange and export use.

A click model is its tables, stacks of linear layers by name, and a function from dense columns and table vectors to the
logit. A subclass lists its layers (`plan`) and computes the logit from them (`logits`); layers are built,
initialized, packed and loaded by their module paths.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise, repeat
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dqrm.models.calibration import Calibration
from dqrm.models.config import ModelConfig
from dqrm.models.inputs import checked
from dqrm.quant.config import QATConfig
from dqrm.quant.embedding import QuantEmbeddingBagCollection
from dqrm.quant.linear import QuantLinear
from dqrm.quant.mlp import QuantMLP
from dqrm.quant.storage import FP32, Storage, storage_for, storage_of

# Table values drawn at a time; a piece stays in the processor's cache for all three passes over it.
_PIECE = 1 << 18


class Layer(NamedTuple):
    """A linear layer of a stack, and what follows it in this order."""

    inputs: int
    outputs: int
    bias: bool = True
    batch_norm: bool = False
    relu: bool = True
    dropout: float = 0.0


Plan = dict[str, tuple[Layer, ...]]
"""The stacks of a model by module path; the path 'cross.0' is entry 0 of the `nn.ModuleList` 'cross'."""


def mlp(widths: Sequence[int], last_relu: bool, batch_norm: bool = False, dropout: float = 0.0) -> tuple[Layer, ...]:
    """Linear layers widths[0] -> widths[1] -> ..., each but possibly the last followed by ReLU."""
    count = len(widths) - 1
    return tuple(
        Layer(inputs, outputs, True, batch_norm, number < count or last_relu, dropout)
        for number, (inputs, outputs) in enumerate(pairwise(widths), start=1)
    )


class BatchNorm(nn.BatchNorm1d):
    """`nn.BatchNorm1d` that also trains on batches of one sample, normalized as in evaluation: the last batch of an
    epoch may have one."""

    def forward(self, input: Tensor) -> Tensor:
        if len(input) > 1:
            return super().forward(input)
        return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


def build_stack(layers: Sequence[Layer], qat: QATConfig) -> QuantMLP:
    """A stack to be trained; its weights are drawn later."""
    modules: list[nn.Module] = []
    for layer in layers:
        modules.append(QuantLinear(layer.inputs, layer.outputs, layer.bias, qat=qat))
        if layer.batch_norm:
            modules.append(BatchNorm(layer.outputs))
        if layer.relu:
            modules.append(nn.ReLU())
        if layer.dropout:
            modules.append(nn.Dropout(layer.dropout))
    return QuantMLP(*modules)


def build_tables(
    table_rows: Sequence[int],
    config: ModelConfig,
    qat: QATConfig,
    multi: Sequence[bool] | None = None,
    dtype: torch.dtype | type[Storage] = torch.float32,
    weight: Tensor | None = None,
) -> QuantEmbeddingBagCollection:
    """Tables to be trained.

    Args:
        table_rows: rows of each table, single-valued columns first.
        multi: for each table, whether its column is multi-valued (a bag of ids per sample); default: none is.
        dtype: of the master weights: torch.float32; torch.bfloat16 for half the memory, torch.int8 for a quarter
            (`Int8Rows`), torch.int4 for a sixth (`TieredRows`); or a `Storage`.
        weight: the initial weights [sum(table_rows), embedding_dim], not copied; default: drawn later.
    """
    return QuantEmbeddingBagCollection(
        table_rows,
        config.embedding_dim,
        multi=multi,
        pooling=config.pooling,
        qat=qat,
        _weight=storage_for(dtype).empty(sum(table_rows), config.embedding_dim) if weight is None else weight,
    )


def draw_rows(rows: Tensor, key: Sequence[int], first: int, width: float) -> None:
    """Draw rows [N, dim] of a table, from row `first` on, uniform in +-width/2: in place and in pieces, since a second
    copy may not fit. A row's values follow from the key, its number and the dim, not from where the pieces begin."""
    random = np.random.default_rng(list(key))
    skipped = first * rows.shape[1]
    random.bit_generator.advance(skipped // 2)  # type: ignore[attr-defined]  # PCG64 gives two FP32 values a step
    random.random(skipped % 2, dtype=np.float32)
    for piece in rows.split(max(1, _PIECE // rows.shape[1])):
        in_place = piece.device.type == "cpu" and storage_of(piece) is FP32
        values = piece.numpy() if in_place else np.empty(piece.shape, np.float32)
        random.random(dtype=np.float32, out=values)
        values -= 0.5
        values *= width
        if not in_place:
            piece.copy_(torch.from_numpy(values))


class ClickModel(nn.Module, ABC):
    """A click model for any number of dense columns (none included) and any tables.

    Args:
        num_dense: dense columns.
        tables: the tables, which keep their weights; or the rows of each table, single-valued columns first, which are
            then built and drawn here.
        multi: with rows: for each table, whether its column is multi-valued (a bag of ids per sample); default: none.
        config: architecture.
        qat: what is quantized, and to how many bits.
        seed: determines all initial weights, which are the same on every machine and device.
        precision: 'bf16' multiplies in bf16 in training; evaluation is always FP32, like exported models.
        table_dtype: with rows: of the tables' master weights, as of `build_tables`.

    Raises:
        ValueError: neither dense columns nor tables, or an architecture that is not valid for them.
    """

    logit_offset: float | None = None
    """Added to each logit, so that probabilities are on the log's click rate where negatives were subsampled. None: of
    a model in training, whose logits are on the click rate of the rows that it is trained on."""
    calibration: Calibration | None = None
    """Of each logit, after `logit_offset`; None: none."""
    config: ModelConfig
    num_dense: int
    tables: Any

    def __init__(
        self,
        num_dense: int,
        tables: nn.Module | Sequence[int],
        *,
        multi: Sequence[bool] | None = None,
        config: ModelConfig | None = None,
        qat: QATConfig | None = None,
        seed: int = 0,
        precision: str = "fp32",
        table_dtype: torch.dtype | type[Storage] = torch.float32,
    ) -> None:
        super().__init__()
        config, qat = config or self.default_config(), qat or QATConfig()
        draw = not isinstance(tables, nn.Module)
        if not isinstance(tables, nn.Module):
            tables = build_tables(tables, config, qat, multi, table_dtype)
        plan = self.plan(config, num_dense, len(tables.table_rows))  # type: ignore[arg-type]
        self._assemble(config, num_dense, tables, {path: build_stack(layers, qat) for path, layers in plan.items()})
        for stack in self.stacks().values():
            stack.bf16 = precision == "bf16"  # type: ignore[assignment]
        self.reset_parameters(seed, tables=draw)

    @classmethod
    def default_config(cls) -> ModelConfig:
        """The default architecture."""
        return ModelConfig()

    @classmethod
    @abstractmethod
    def plan(cls, config: ModelConfig, num_dense: int, tables: int) -> Plan:
        """The stacks of a model for a number of dense columns and tables.

        Raises:
            ValueError: an architecture that is not valid for them.
        """

    @abstractmethod
    def logits(self, dense: Tensor, vectors: Tensor) -> Tensor:
        """The logits [B] of dense columns [B, num_dense] and one vector per table [B, T, embedding_dim]."""

    @classmethod
    def describe(cls, config: ModelConfig) -> str:
        """The architecture in a few words, for messages."""
        return f"{cls.__name__} of embedding dim {config.embedding_dim}"

    @classmethod
    def from_parts(
        cls, config: ModelConfig, num_dense: int, tables: nn.Module, stacks: Mapping[str, nn.Module]
    ) -> "ClickModel":
        """A model of existing parts, in eval mode; no weights are drawn."""
        model = cls.__new__(cls)
        nn.Module.__init__(model)
        model._assemble(config, num_dense, tables, stacks)
        return model.eval()

    def _assemble(
        self, config: ModelConfig, num_dense: int, tables: nn.Module, stacks: Mapping[str, nn.Module]
    ) -> None:
        self.config, self.num_dense, self.tables = config, num_dense, tables
        for path, stack in stacks.items():
            owner, _, name = path.rpartition(".")
            if owner and owner not in self._modules:
                self.add_module(owner, nn.ModuleList())
            self.get_submodule(owner).add_module(name, stack)
        self._paths = tuple(stacks)

    def stacks(self) -> dict[str, nn.Module]:
        """The stacks of linear layers by module path."""
        return {path: self.get_submodule(path) for path in self._paths}

    @torch.no_grad()
    def reset_parameters(self, seed: int, tables: bool = True) -> None:
        """Initial weights of the DLRM paper's code: tables uniform(+-sqrt(1/rows)), weights of linear layers
        normal(0, sqrt(2/(in+out))), biases normal(0, sqrt(1/out)).

        Drawn by numpy on the CPU, one stream per table and layer: the same on CPU and CUDA, and a table's values do not
        depend on which other tables there are. `tables` False leaves the tables as they are.
        """
        if tables:
            self._draw_tables(range(len(self.tables.table_rows)), seed)
        modules = [module for stack in self.stacks().values() for module in stack.children()]
        for number, layer in enumerate(module for module in modules if isinstance(module, nn.Linear)):
            random = np.random.default_rng([seed, 1, number])
            outputs, inputs = layer.weight.shape
            weight = random.standard_normal((outputs, inputs), np.float32) * np.float32(np.sqrt(2 / (inputs + outputs)))
            layer.weight.copy_(torch.from_numpy(weight))
            if layer.bias is not None:
                bias = random.standard_normal(outputs, np.float32) * np.float32(outputs**-0.5)
                layer.bias.copy_(torch.from_numpy(bias))
        for module in modules:
            if isinstance(module, BatchNorm):
                module.reset_parameters()

    @torch.no_grad()
    def redraw_tables(self, seed: int, epoch: int = 0, tables: Sequence[int] | None = None) -> None:
        """Draw these tables (default: all) as `reset_parameters` does, with new values in epochs above 0, and set their
        scales. The caller resets optimizer state."""
        tables = range(len(self.tables.table_rows)) if tables is None else tables
        self._draw_tables(tables, seed, epoch)
        self.tables.tables_redrawn(tables)

    def _draw_tables(self, numbers: Sequence[int], seed: int, epoch: int = 0) -> None:
        # The generator releases the GIL, so tables are drawn side by side.
        with ThreadPoolExecutor(max_workers=torch.get_num_threads()) as threads:
            list(threads.map(self._draw_table, numbers, repeat(seed), repeat(epoch)))

    def _draw_table(self, number: int, seed: int, epoch: int) -> None:
        """In place: the rows that are in this process."""
        key = [seed, 0, number, epoch] if epoch else [seed, 0, number]
        for first, rows in self.tables.local_rows(number):
            draw_rows(rows, key, first, 2 / np.sqrt(self.tables.table_rows[number]))

    def forward(self, dense: Tensor, ids: Tensor, bags: Sequence[tuple[Tensor, Tensor]] = ()) -> Tensor:
        """The logit of a click for each sample: float32 [B].

        Args:
            dense: float32 [B, num_dense]; other floating types are converted, integers refused. NaN gives NaN. None
                where the model has no dense columns.
            ids: integers [B, S], one per sample and single-valued table.
            bags: (values [L], offsets [B]) for each multi-valued table.

        Raises:
            IndexError: an id outside its table (on CPU).
            InputError, which is a UserError and a ValueError: not tensors (a numpy array: use torch.from_numpy), or a
                mismatch of dtype, shape, number of rows or device.
        """
        logits = self.sampled_logits(dense, ids, bags)
        logits = logits + self.logit_offset if self.logit_offset else logits
        return self.calibration(logits) if self.calibration else logits

    def sampled_logits(self, dense: Tensor, ids: Tensor, bags: Sequence[tuple[Tensor, Tensor]] = ()) -> Tensor:
        """The same without `logit_offset` and calibration: on the click rate of the rows that were trained on."""
        tables = self.tables
        dense, ids, bags = checked(dense, ids, bags, self, tables)
        return self.logits(dense, tables(ids, bags))
