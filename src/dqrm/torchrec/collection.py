"""The tables of a click model, whose rows TorchRec shards over the ranks: row-wise where they are large."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec import EmbeddingCollection, EmbeddingConfig, KeyedJaggedTensor
from torchrec.distributed.shard import shard
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise, table_wise
from torchrec.distributed.types import ShardingEnv

from dqrm.distributed.rows import Shard, ShardedRows
from dqrm.distributed.world import World
from dqrm.errors import UserError
from dqrm.quant.clamping import Clamps
from dqrm.quant.config import QATConfig
from dqrm.quant.groups import Groups
from dqrm.quant.quantizer import new_quantizer
from dqrm.quant.row_codec import RowCodec
from dqrm.quant.tables import TableLayout, integers
from dqrm.torchrec.sharder import EmbeddingCollectionSharder

ROW_WISE_ROWS = 1000
"""Tables from this number of rows on are split over all ranks; each smaller one is on one rank."""


class _Times(torch.autograd.Function):
    """The identity; its gradient is multiplied, since TorchRec divides those of tables by the world size."""

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, factor: int) -> Tensor:
        ctx.factor = factor
        return vectors.view_as(vectors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.factor, None


class ShardedTables(TableLayout):
    """What `QuantEmbeddingBagCollection` is to a model, but no rank has all rows. Call it on all ranks.

    The forward codec fake-quantizes rows on a scale each; bags are pooled afterwards. FBGEMM updates the rows in the
    backward pass, so `weight` here has none: it, and the quantizer's scales, stand for rows that are elsewhere.

    Args:
        table_rows, embedding_dim, multi, pooling: as of `QuantEmbeddingBagCollection`.
        qat: bits of the tables: 2, 4, 8, or 32 for FP32 rows.
        world: two or more ranks.
        backward: codec of gradients, a name in `quant.row_codec.CODECS`; None: FP32.
        stochastic: whether gradients are rounded stochastically. seed: of that.
        fused: parameters of FBGEMM's fused optimizer.
    """

    def __init__(
        self,
        table_rows: Sequence[int],
        embedding_dim: int,
        *,
        multi: Sequence[bool] | None,
        pooling: str,
        qat: QATConfig,
        world: World,
        backward: str | None,
        stochastic: bool,
        seed: int,
        fused: Mapping[str, Any],
    ) -> None:
        super().__init__()
        self._init_layout(table_rows, embedding_dim, multi, pooling)
        bits = qat.effective_table_bits
        self.bits, self.training_bits, self._world = bits, None, world
        self.weight = nn.Parameter(torch.empty(0, embedding_dim))
        here = self.table_rows if bits == 32 else ()  # of tables that are not quantized a state dict has unset scales
        groups = Groups.of_tables(qat, here, tuple(bits for _ in here))
        self.weight_fake_quantizer = new_quantizer(qat, bits, groups)
        forward = None if bits == 32 else f"int{bits}"
        sharder = EmbeddingCollectionSharder(
            forward, backward, stochastic=stochastic, seed=seed, fused_params=dict(fused)
        )
        self._keys = [f"t{number}" for number in range(len(table_rows))]
        # In a list, so that FBGEMM's parameters are not the model's: nothing but FBGEMM may update or copy them.
        self._collection = [self._shard(sharder, world)]
        weights = {name.rpartition(".")[0].rpartition(".")[2]: each for name, each in self.sharded.state_dict().items()}
        shards = _shards_of([weights[key] for key in self._keys], self._starts)
        self.rows_of = partial(ShardedRows, shards, world=world)
        self.weights = self.rows_of((embedding_dim,))
        codec = None if bits == 32 else RowCodec(embedding_dim, f"int{bits}")
        self.scales = None if codec is None else self.rows_of((), encode=codec.scales, width=embedding_dim)

    def _shard(self, sharder: EmbeddingCollectionSharder, world: World) -> Any:
        configs = [
            EmbeddingConfig(name=key, embedding_dim=self.embedding_dim, num_embeddings=rows, feature_names=[key])
            for key, rows in zip(self._keys, self.table_rows)
        ]
        collection = EmbeddingCollection(tables=configs, device=torch.device("meta"))
        kind: Callable[..., Any]
        plan, small = {}, 0
        for key, rows in zip(self._keys, self.table_rows):
            if rows >= max(ROW_WISE_ROWS, world.size):
                kind = row_wise
            else:
                kind, small = partial(table_wise, small % world.size), small + 1
            plan[key] = kind(compute_kernel="fused")
        made = construct_module_sharding_plan(collection, plan, sharder, world.size, world.size, "cpu")
        with world.guard():
            env = ShardingEnv.from_process_group(world.group)
            return shard(collection, made, env, torch.device("cpu"), sharder)

    @property
    def sharded(self) -> Any:
        """TorchRec's module."""
        return self._collection[0]

    def table(self, number: int) -> Tensor:
        """Raises UserError: no rank has it."""
        raise UserError("the tables are sharded (tables is 'sharded'): no rank has a whole one")

    def local_rows(self, number: int) -> list[tuple[int, Tensor]]:
        """See `QuantEmbeddingBagCollection.local_rows`."""
        start = self._starts[number]
        return [(first - start, rows) for first, rows in self.weights.local(start, self._starts[number + 1])]

    def forward(self, ids: Tensor, bags: Sequence[tuple[Tensor, Tensor]] = ()) -> Tensor:
        """See `QuantEmbeddingBagCollection.forward`; on all ranks equally often, with any number of samples each."""
        groups, samples = self._groups(ids, bags), len(ids)
        for part, first, tables in groups:
            self._refuse_outside(part, first, tables)
        if self.training:
            self.weight_fake_quantizer.scale_ticks += 1
        # TorchRec refuses an empty batch, and FBGEMM inference mode.
        lengths, values = self._features(groups, bags, samples)
        features = KeyedJaggedTensor(self._keys, torch.cat(values), lengths=torch.cat(lengths))
        with torch.inference_mode(False), torch.set_grad_enabled(self.training and torch.is_grad_enabled()):
            with self._world.guard():
                found = self.sharded(features)
                rows = [found[key].values() for key in self._keys]
            looked_up = [torch.stack(rows[: self.num_single], 1).flatten(0, 1)] if self.num_single else []
            looked_up += rows[self.num_single :]
            if not samples:  # the gradient still passes to the row that stands in
                looked_up = [part[:0] for part in looked_up]
            return _Times.apply(self._pooled(looked_up, samples, bags), self._world.size)

    def _features(
        self, groups: Sequence[tuple[Tensor, int, int]], bags: Sequence[tuple[Tensor, Tensor]], samples: int
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Lengths and ids of each table; without samples those of one that looks row 0 up everywhere."""
        if not samples:
            tables = len(self.table_rows)
            return [torch.ones(tables, dtype=torch.int32)], [torch.zeros(tables, dtype=torch.int64)]
        lengths, values = [torch.ones(self.num_single * samples, dtype=torch.int32)], []
        for part, _, tables in groups:
            values.append(part.view(-1, tables).T.reshape(-1).long())
        for given, offsets in bags:
            ends = torch.cat([integers(offsets).long()[1:], torch.tensor([len(given)])])
            lengths.append((ends - integers(offsets).long()).int())
        return lengths, values

    # What training tells its tables. The rows' scales follow from the rows.

    @property
    def clamps(self) -> Clamps:
        """No weight is clamped: each row has its own scale."""
        return self.weight_fake_quantizer.clamps

    @property
    def scale_ticks(self) -> int:
        """How many training steps there were."""
        return self.weight_fake_quantizer.scale_ticks

    def weights_replaced(self, ticks: int) -> None:
        """`ticks` is the new step count."""
        self.weight_fake_quantizer.scale_ticks = ticks

    def only_looked_up_rows_change(self) -> None:
        """Nothing follows from it."""

    def rows_changed(self, rows: Tensor) -> None:
        """Nothing follows from it."""

    def tables_redrawn(self, numbers: Sequence[int]) -> None:
        """Nothing follows from it."""


def _shards_of(tensors: Sequence[ShardedTensor], starts: Sequence[int]) -> list[Shard]:
    """The shards of tables whose first rows have the numbers `starts`."""
    found = []
    for tensor, start in zip(tensors, starts):
        local = {each.metadata.shard_offsets[0]: each.tensor.detach() for each in tensor.local_shards()}
        for each in tensor.metadata().shards_metadata:
            first, length = each.shard_offsets[0], each.shard_sizes[0]
            if length:
                rank: Any = each.placement
                found.append(Shard(start + first, length, rank.rank(), local.get(first)))
    return found
