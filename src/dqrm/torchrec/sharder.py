"""TorchRec's sharder of an `EmbeddingCollection`, with codecs of its embedding dim that see all rows."""

from typing import Any

import torch
from torchrec.distributed import embedding as theirs
from torchrec.distributed.types import ParameterSharding, ShardingEnv, ShardingType
from torchrec.modules.embedding_modules import EmbeddingCollection

from dqrm.errors import UserError
from dqrm.torchrec.codecs import codec_registry

SHARDING_TYPES = (ShardingType.TABLE_WISE.value, ShardingType.ROW_WISE.value)
"""How tables may be sharded: all of their rows pass the codec, and whole."""


class EmbeddingCollectionSharder(theirs.EmbeddingCollectionSharder):
    """Shards an `EmbeddingCollection` table-wise or row-wise and puts QAT and its codecs on its all-to-all.

    Args:
        forward, backward, scale, stochastic, seed: as of `codec_registry`.
        fused_params, use_index_dedup: as of TorchRec's sharder.

    Raises:
        ValueError: an unknown codec or scale.
    """

    def __init__(
        self,
        forward: str | None = "int4",
        backward: str | None = "int8",
        *,
        scale: str = "fp32",
        stochastic: bool = True,
        seed: int = 0,
        fused_params: dict[str, Any] | None = None,
        use_index_dedup: bool = False,
    ) -> None:
        self._codecs: dict[str, Any] = {
            "forward": forward, "backward": backward, "scale": scale, "stochastic": stochastic, "seed": seed,
        }  # fmt: skip
        # The planner reads the dtype on the wire only, and the dim is known once there is a module.
        registry = codec_registry(1, **self._codecs)
        super().__init__(fused_params, registry, use_index_dedup)

    def sharding_types(self, compute_device_type: str) -> list[str]:
        return list(SHARDING_TYPES)

    def shard(
        self,
        module: EmbeddingCollection,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> theirs.ShardedEmbeddingCollection:
        """The module on the ranks.

        Raises:
            UserError: one rank, on which TorchRec calls no codec; or another sharding than those of `sharding_types`.
        """
        if env.world_size < 2:
            raise UserError(
                f"world size is {env.world_size}, but TorchRec calls its codecs from 2 ranks on, so this would not be "
                "QAT; start 2 or more ranks, or train without shards (dqrm.quant.embedding)"
            )
        for name, table in params.items():
            if table.sharding_type not in SHARDING_TYPES:
                raise UserError(
                    f"table {name!r} is sharded {table.sharding_type}, expected {' or '.join(SHARDING_TYPES)}: only "
                    "then its rows pass the codecs, and whole"
                )
        return theirs.ShardedEmbeddingCollection(
            module,
            params,
            env,
            self.fused_params,
            device,
            qcomm_codecs_registry=codec_registry(module.embedding_dim(), **self._codecs),
            use_index_dedup=self._use_index_dedup,
            module_fqn=module_fqn,
        )
