"""What a run takes over from an artifact (`start`): the values of its codes as weights. It has no optimizer state, what
training knew beyond the codes is lost, and quantizers learn anew."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dqrm.artifact.file import Artifact
from dqrm.config import Config
from dqrm.data.dataset import Dataset
from dqrm.errors import UserError
from dqrm.models.base import ClickModel
from dqrm.models.registry import described_config
from dqrm.quant.linear import QuantLinear
from dqrm.quant.packed import PackedLinear
from dqrm.quant.storage import copy_rows
from dqrm.training.start import Start, changes_since, require_same_architecture

# Values of rows unpacked at once.
_VALUES = 1 << 22


@dataclass
class FromArtifact(Start):
    """See `Start`. `table_weight` is the artifact's packed tables."""

    kind = "artifact"

    artifact: Artifact

    @classmethod
    def plan(cls, earlier: str | Path, carry: str, config: Config, dataset: Dataset) -> "FromArtifact":
        artifact = Artifact.open(earlier)
        content = artifact.content
        require_same_architecture(artifact.path, asdict(described_config(content["model"])), config)
        if config.model.batch_norm:
            raise UserError(
                f"{earlier} has its batch normalization folded into its layers, so no run with batch_norm starts from "
                "it; start from the run that it was exported from"
            )
        changes = changes_since(artifact.path, content["schema"], content["provenance"]["data"], dataset, carry)
        return cls(artifact.path, content["schema"]["columns"], carry, changes, artifact)

    @property
    def record(self) -> dict[str, Any]:
        return {
            "artifact": str(self.path.resolve()),
            "checksum": self.artifact.container.checksum,
            "fingerprint": self.artifact.content["provenance"]["data"]["fingerprint"],
            "carry": self.carry,
        }

    def verify(self) -> None:
        self.artifact.container.verify()

    @torch.no_grad()
    def carry_weights(self, model: ClickModel, config: Config, tables: bool = True) -> None:
        theirs = self.artifact.model()
        for path, stack in model.stacks().items():
            layers = [layer for layer in stack.children() if isinstance(layer, QuantLinear)]
            packed = [layer for layer in theirs.stacks()[path].children() if isinstance(layer, PackedLinear)]
            for layer, source in zip(layers, packed, strict=True):
                layer.weight.copy_(source.weight())
                if layer.bias is not None and source.bias is not None:
                    layer.bias.copy_(source.bias)
        self.table_weight = theirs.tables if self.changes else None
        for number, change in enumerate(self.changes if tables else ()):
            for kept in torch.from_numpy(change.kept).long().split(max(1, _VALUES // theirs.tables.embedding_dim)):
                values = theirs.tables.table_values(number, kept)
                copy_rows(model.tables.table(number), kept, values, torch.arange(len(kept)))
        model.tables.weights_replaced(0)
        described = self.artifact.content["model"]
        bits = described["table_bits"]
        shown = ", ".join(map(str, sorted({*bits}))) if isinstance(bits, list) else str(bits)
        dropped = ["ranges of activations"] * (described["activation_bits"] != 32)
        dropped += ["its calibration"] * (self.artifact.calibration is not None)
        self.told = self._describe(
            "", f"; with the values of their codes of {shown} bits, and no optimizer state", dropped
        )

    def carry_optimizers(self, model: ClickModel, optimizers: Sequence[Optimizer | None], config: Config) -> None:
        """There is no state."""

    def _read(self, source: Any, number: int, rows: Tensor, first: int, floats: bool) -> Tensor:
        values: Tensor = source.table_values(number, rows)
        return values
