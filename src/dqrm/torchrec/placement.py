"""`dqrm train --tables sharded`: the tables sharded by TorchRec, and how they come into and out of a run's checkpoints,
which are those of one machine.

Rank 0 writes and reads them, and passes rows on to their ranks and from them in pieces; so the number of ranks may
change, their machines need no common file system, and one process without TorchRec evaluates and exports the run.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import Tensor

from dqrm.data.dataset import Dataset
from dqrm.distributed.rows import ShardedRows
from dqrm.errors import UserError
from dqrm.models.base import ClickModel
from dqrm.models.registry import model_class
from dqrm.quant.row_codec import CODECS
from dqrm.torchrec.collection import ShardedTables
from dqrm.torchrec.refusals import refusals
from dqrm.torchrec.step import FUSED, ShardedStep
from dqrm.training.callbacks import Callback
from dqrm.training.checkpoints import OPTIMIZER, WEIGHTS, load_weights, verify_checkpoint
from dqrm.training.environment import resolve_device
from dqrm.training.footprint import TableBytes
from dqrm.training.placement import Placement, Saved
from dqrm.training.run import Run
from dqrm.training.start import Start, share_state, share_weights
from dqrm.training.step import TrainStep
from dqrm.training.tensor_files import read_tensor, tensors_of

# TorchRec asks torch.fx whether it is traced, for which each rank would print a warning to whoever traces.
logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
_WEIGHT, _SCALE = "tables.weight", "tables.weight_fake_quantizer.scale"


class Sharded(Placement):
    """Tables that TorchRec shards."""

    collective = True

    def check(self, dataset: Dataset) -> None:
        if self.world.size < 2:
            raise UserError(
                "tables is 'sharded', but there is one rank; start two or more with `torchrun --nproc-per-node 2 -m "
                "dqrm train ...`, or use tables 'replicated'"
            )
        if resolve_device(self.config.training.device).type != "cpu":
            raise UserError(
                f"tables is 'sharded', but device is {self.config.training.device!r} and there is a GPU; sharded "
                "tables train on the CPU: use device 'cpu'"
            )
        if not dataset.columns:
            raise UserError(f"tables is 'sharded', but {dataset.path} has no categorical columns, so no tables")
        for field, value, expected in refusals(self.config):
            raise UserError(f"{field} is {value!r}, but tables is 'sharded'; expected {expected}")

    def check_callbacks(self, callbacks: Sequence[Callback]) -> None:
        for callback in callbacks:
            if callback.whole_tables:
                raise UserError(
                    f"tables is 'sharded', but the callback {callback.name} works on whole tables, which no rank has; "
                    "leave it out"
                )

    def new_model(self, run: Run, drawn: bool = True) -> ClickModel:
        config, data, optimizer = self.config, run.info["data"], self.config.optimizer
        codec, rule = config.exchange.table_codec, optimizer.rule

        def build() -> ClickModel:
            try:
                tables = ShardedTables(
                    [column["rows"] for column in data["columns"]],
                    config.model.embedding_dim,
                    multi=[column["multi"] for column in data["columns"]],
                    pooling=config.model.pooling,
                    qat=config.quantization,
                    world=self.world,
                    backward=codec if codec in CODECS else None,
                    stochastic=config.exchange.codec_rounding == "stochastic",
                    seed=config.training.seed,
                    fused={"optimizer": EmbOptimType[FUSED.get(rule, FUSED["sgd"])], "eps": optimizer.adagrad_eps},
                )
                model = model_class(config.model)(
                    len(data["dense"]), tables, config=config.model, qat=config.quantization, seed=config.training.seed,
                    precision=config.training.precision,
                )  # fmt: skip
            except ValueError as error:
                raise UserError(f"{data['path']}: {error}") from None
            if drawn:
                model.redraw_tables(config.training.seed)
            return model

        return self.world.together(build)

    def step(self, model: ClickModel) -> TrainStep:
        return ShardedStep(model, self.config, self.world)

    # Checkpoints.

    def _columns(self, model: ClickModel, optimizers: Sequence[Any] = ()) -> dict[tuple[str, str], ShardedRows]:
        columns = {(WEIGHTS, _WEIGHT): model.tables.weights}
        if model.tables.scales is not None:
            columns[WEIGHTS, _SCALE] = model.tables.scales
        if optimizers:
            columns |= {(OPTIMIZER, name): rows for name, rows in _state(optimizers).items()}
        return columns

    def load_weights(self, checkpoint: Path, model: ClickModel, verify: bool) -> None:
        def load() -> None:
            if verify:
                verify_checkpoint(checkpoint, WEIGHTS)
            load_weights(checkpoint, model, skip=[name for file, name in self._columns(model) if file == WEIGHTS])

        self.world.together(lambda: load() if self.world.first else None)
        share_weights(self.world, model)
        self._read(checkpoint / WEIGHTS, _WEIGHT, model.tables.weights)

    def load_state(self, checkpoint: Path, optimizers: Sequence[Any], verify: bool) -> Saved:
        saved = self._read_state(checkpoint, [None, *optimizers[1:]], verify)
        share_state(self.world, optimizers[1:])
        for name, rows in _state(optimizers).items():
            self._read(checkpoint / OPTIMIZER, name, rows)
        return saved

    def _read(self, file: Path, name: str, rows: ShardedRows) -> None:
        """One tensor of a file, which rank 0 reads, into the rows of all ranks."""

        def check() -> None:
            for _, tensor in tensors_of(file, name):
                if (tuple(tensor.shape), tensor.dtype) == (rows.shape, rows.dtype):
                    return
                raise UserError(
                    f"{file}: '{name}' is {list(tensor.shape)} {tensor.dtype}, but the model has {list(rows.shape)} "
                    f"{rows.dtype} there"
                )
            raise UserError(f"{file} lacks the key '{name}': it does not match the model, or is damaged")

        self.world.on_first(check)
        for first, last in rows.pieces():
            piece = None
            if self.world.first:
                piece = torch.empty(last - first, *rows.row_shape, dtype=rows.dtype)
                read_tensor(file, name, piece, skip=first * piece[0].nbytes)
            rows.scatter(first, last, piece)

    # A run that starts from another.

    def carry_weights(self, start: Start | None, model: ClickModel, verify: bool) -> None:
        def carry() -> None:
            if start is not None:
                if verify:
                    start.verify()
                start.carry_weights(model, self.config, tables=False)

        self.world.together(carry)
        share_weights(self.world, model)
        self._carry(start, model, start.table_weight if start else None, model.tables.weights)

    def carry_state(self, start: Start | None, model: ClickModel, optimizers: Sequence[Any]) -> None:
        self.world.together(lambda: start and start.carry_optimizers(model, [None, *optimizers[1:]], self.config))
        share_state(self.world, optimizers[1:])
        for name, rows in _state(optimizers).items():
            self._carry(start, model, start.table_state(name, self.config) if start else None, rows)

    def _carry(self, start: Start | None, model: ClickModel, source: Tensor | None, rows: ShardedRows) -> None:
        """Rows of known ids from a tensor of the earlier run, memory-mapped on rank 0."""
        if not self.world.shared(source is not None):
            return
        for first, last in rows.pieces():
            piece = rows.gather(first, last)
            if piece is not None:
                assert start is not None
                assert source is not None
                start.copy_kept(source, piece, first, model.tables.row_offsets.tolist())
            rows.scatter(first, last, piece)

    # Sizes.

    def table_bytes(self, model: ClickModel, optimizers: Sequence[Any]) -> TableBytes:
        def size(*columns: ShardedRows) -> int:
            return sum(4 * torch.Size(each.shape).numel() for each in columns)

        return {"weights": size(model.tables.weights), "optimizer": size(*_state(optimizers).values())}

    def stored_bytes(self, model: ClickModel) -> dict[str, int]:
        sizes, (count, dim), bits = super().stored_bytes(model), model.tables.weights.shape, model.tables.bits
        sizes["tables"] = -(-count * dim * bits // 8) + (4 * count if bits != 32 else 0)
        return {**sizes, "total": sizes["tables"] + sizes["mlp"]}


def _state(optimizers: Sequence[Any]) -> dict[str, ShardedRows]:
    """The state of the tables' optimizer by its key in checkpoints."""
    return {f"0/0/{name}": rows for name, rows in optimizers[0].columns.items()}
