"""DLRM: deep learning recommendation model (arXiv 1906.00091, figure 1).

    dense columns ---- bottom MLP ----+
                                      +-- interaction -- top MLP -- logit
    categorical ids -- embeddings ----+

Tables and MLP weights are fake-quantized as `QATConfig` says (32 bits: plain DLRM). Table sizes come from the data.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dqrm.models.base import ClickModel, Plan, mlp
from dqrm.models.config import ModelConfig
from dqrm.models.interaction import dot_interaction, pairs


class DLRM(ClickModel):
    """See `ClickModel`. Stacks: `bottom` (where there are dense columns) and `top`."""

    pairs: Tensor
    bottom: Any
    top: Any

    @classmethod
    def plan(cls, config: ModelConfig, num_dense: int, tables: int) -> Plan:
        """Bottom MLP (none without dense columns) and top MLP.

        Raises:
            ValueError: neither dense columns nor tables, or nothing to interact.
        """
        if not num_dense and not tables:
            raise ValueError("the model has neither dense columns nor tables: nothing to predict from")
        vectors, dense_width = tables + (num_dense > 0), config.bottom_widths[-1] if num_dense else 0
        if config.interaction == "dot":
            width = dense_width + vectors * (vectors - 1 + 2 * config.self_interaction) // 2
        else:
            width = dense_width + tables * config.embedding_dim
        if width == 0:
            raise ValueError(
                "one table and no dense columns make no pair of vectors for interaction 'dot'; use interaction 'cat' "
                "(--interaction cat), or self_interaction"
            )
        bottom = {"bottom": mlp((num_dense, *config.bottom_widths), last_relu=True)} if num_dense else {}
        return {**bottom, "top": mlp((width, *config.top_mlp), last_relu=False)}

    @classmethod
    def describe(cls, config: ModelConfig) -> str:
        bottom, top = ("-".join(map(str, widths)) for widths in (config.bottom_widths, config.top_mlp))
        return (
            f"DLRM of embedding dim {config.embedding_dim}, bottom MLP {bottom}, top MLP {top}, "
            f"interaction {config.interaction}"
        )

    def _assemble(
        self, config: ModelConfig, num_dense: int, tables: nn.Module, stacks: Mapping[str, nn.Module]
    ) -> None:
        super()._assemble(config, num_dense, tables, stacks)
        if "bottom" not in stacks:
            self.bottom = None
        if config.interaction == "dot":
            vectors = len(self.tables.table_rows) + (num_dense > 0)
            self.register_buffer("pairs", pairs(vectors, config.self_interaction), persistent=False)

    def logits(self, dense: Tensor, vectors: Tensor) -> Tensor:
        """The top MLP on the dense vector [B, dim] and each pair's dot product, or ('cat') on all vectors."""
        bottom, config = self.bottom, self.config
        below = None if bottom is None else bottom(dense)
        if config.interaction == "cat":
            x = torch.cat([*([] if below is None else [below]), vectors.flatten(1)], dim=1)
        else:
            x = dot_interaction(below, vectors, self.pairs, config.self_interaction)
        logits: Tensor = self.top(x).squeeze(1)
        return logits
