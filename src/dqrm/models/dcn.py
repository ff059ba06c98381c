"""DCNv2: deep and cross network, version 2 (arXiv 2008.13535).

    x0 = dense columns and the tables' vectors, concatenated
    cross layer:    x[l+1] = x0 * (W[l] x[l] + b[l]) + x[l]             W[l] a full matrix, or U[l] V[l] of low rank

    parallel:   x0 --+-- cross layers --+-- linear -- logit             stacked:   x0 -- cross layers -- deep -- linear
                     +-- deep ----------+

The deep network is an MLP with ReLU, optionally with batch normalization before it and dropout after it.
All linear layers are quantized, those of the cross network too.
"""

from typing import Any

import torch
from torch import Tensor

from dqrm.models.base import ClickModel, Layer, Plan, mlp
from dqrm.models.config import ModelConfig


class DCN(ClickModel):
    """See `ClickModel`. Stacks: `cross.0`, `cross.1`, ...; `deep` (where it has layers); `head`."""

    cross: Any
    deep: Any
    head: Any

    @classmethod
    def default_config(cls) -> ModelConfig:
        return ModelConfig(model="dcn")

    @classmethod
    def plan(cls, config: ModelConfig, num_dense: int, tables: int) -> Plan:
        """Cross layers (two matrices each where they are of low rank: V, then U with the bias), deep network, head.

        Raises:
            ValueError: neither dense columns nor tables, or a rank that is larger than the matrix.
        """
        width, rank = num_dense + tables * config.embedding_dim, config.cross_rank
        if not width:
            raise ValueError("the model has neither dense columns nor tables: nothing to predict from")
        if rank > width:
            raise ValueError(f"cross_rank is {rank}, expected at most the {width} inputs of a cross layer (0: full)")
        full = (Layer(width, width, relu=False),)
        low = (Layer(width, rank, bias=False, relu=False), Layer(rank, width, relu=False))
        plan: Plan = {f"cross.{number}": low if rank else full for number in range(config.cross_layers)}
        ends = width
        if config.deep_mlp:
            plan["deep"] = mlp((width, *config.deep_mlp), True, config.batch_norm, config.dropout)
            ends = config.deep_mlp[-1] + (width if config.structure == "parallel" else 0)
        plan["head"] = (Layer(ends, 1, relu=False),)
        return plan

    @classmethod
    def describe(cls, config: ModelConfig) -> str:
        rank = f" of rank {config.cross_rank}" if config.cross_rank else ""
        deep = (
            f"{config.structure} deep MLP {'-'.join(map(str, config.deep_mlp))}" if config.deep_mlp else "no deep MLP"
        )
        norm = " with batch normalization" if config.batch_norm else ""
        return f"DCNv2 of embedding dim {config.embedding_dim}, {config.cross_layers} cross layers{rank}, {deep}{norm}"

    def logits(self, dense: Tensor, vectors: Tensor) -> Tensor:
        """See the formulas above."""
        config, flat = self.config, vectors.flatten(1)
        x0 = torch.cat([dense, flat], dim=1) if self.num_dense else flat
        x = x0
        for layer in self.cross:
            x = x0 * layer(x) + x
        if not config.deep_mlp:
            deep = x
        elif config.structure == "stacked":
            deep = self.deep(x)
        else:
            deep = torch.cat([x, self.deep(x0)], dim=1)
        logits: Tensor = self.head(deep).squeeze(1)
        return logits
