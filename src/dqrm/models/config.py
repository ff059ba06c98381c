"""The configuration of a model: part of that of a training run (`dqrm.config`). Importing it imports no torch."""

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from dqrm.options import at_least

_OWNERS = {
    "bottom_mlp": "dlrm", "top_mlp": "dlrm", "interaction": "dlrm", "self_interaction": "dlrm",
    "cross_layers": "dcn", "cross_rank": "dcn", "deep_mlp": "dcn", "structure": "dcn", "dropout": "dcn",
    "batch_norm": "dcn",
}  # fmt: skip
"""Fields of `ModelConfig` that belong to one of our models; models from outside may read any."""
MOST_CROSS_LAYERS = 100
"""An artifact's header could ask for more layers than there is memory for."""


@dataclass(frozen=True)
class ModelConfig:
    """The architecture of the model. Table sizes and column counts are not here: they come with the dataset."""

    embedding_dim: int = 16
    """Values per table row."""
    bottom_mlp: tuple[int, ...] | None = None
    """dlrm: widths of the MLP on the dense columns; with 'dot' interaction it ends in the embedding dim; none:
    512-256-64 and then embedding_dim ('dot') or 16 ('cat')."""
    top_mlp: tuple[int, ...] = (512, 256, 1)
    """dlrm: widths of the MLP that predicts; it ends in 1."""
    interaction: Literal["dot", "cat"] = "dot"
    """dlrm: interaction of dense and embedding vectors: all pairwise dot products, or concatenation."""
    self_interaction: bool = False
    """dlrm: include each vector's dot product with itself."""
    pooling: Literal["sum", "mean"] = "sum"
    """How the rows of a multi-valued column are pooled."""
    model: str = "dlrm"
    """The architecture: dlrm (arXiv 1906.00091) or dcn (DCNv2, arXiv 2008.13535)."""
    cross_layers: int = 3
    """dcn: layers of the cross network."""
    cross_rank: int = 0
    """dcn: rank of the cross layers' weights, each then a product of two matrices; 0: full matrices."""
    deep_mlp: tuple[int, ...] = (512, 256)
    """dcn: widths of the deep network, with ReLU after each layer."""
    structure: Literal["parallel", "stacked"] = "parallel"
    """dcn: the deep network runs beside the cross network, or on its output."""
    dropout: float = 0.0
    """dcn: probability with which training zeroes an activation of the deep network."""
    batch_norm: bool = False
    """dcn: batch normalization in the deep network, before each ReLU; export folds it into the linear layers."""

    def __post_init__(self) -> None:
        at_least(self, embedding_dim=1, cross_layers=1, cross_rank=0, dropout=0)
        defaults = {field.name: field.default for field in fields(self)}
        for name in self._fields_of_others():
            value = getattr(self, name)
            if value != defaults[name]:
                shown = "-".join(map(str, value)) if isinstance(value, tuple) else value
                raise ValueError(f"{name} is {shown}: a field of model '{_OWNERS[name]}', but model is '{self.model}'")
        if self.cross_layers > MOST_CROSS_LAYERS:
            raise ValueError(f"cross_layers is {self.cross_layers}, expected at most {MOST_CROSS_LAYERS}")
        if self.dropout >= 1:
            raise ValueError(f"dropout is {self.dropout}, expected at least 0 and below 1")
        _check_widths("deep_mlp", self.deep_mlp)
        if self.model == "dlrm":
            self._check_dlrm()

    def _fields_of_others(self) -> list[str]:
        return [name for name, owner in _OWNERS.items() if owner != self.model and self.model in _OWNERS.values()]

    def _check_dlrm(self) -> None:
        if self.bottom_mlp is None:  # the resolved widths are what is stored with a run
            last = self.embedding_dim if self.interaction == "dot" else 16
            object.__setattr__(self, "bottom_mlp", (512, 256, 64, last))
        _check_widths("bottom_mlp", self.bottom_widths, least=1)
        _check_widths("top_mlp", self.top_mlp, least=1)
        if self.top_mlp[-1] != 1:
            raise ValueError(f"top_mlp ends in {self.top_mlp[-1]}, expected 1 (one probability per sample)")
        if self.interaction == "dot" and self.bottom_widths[-1] != self.embedding_dim:
            raise ValueError(
                f"bottom_mlp ends in {self.bottom_widths[-1]} but embedding_dim is {self.embedding_dim}: "
                "with interaction 'dot' they must be equal"
            )
        if self.interaction == "cat" and self.self_interaction:
            raise ValueError("self_interaction is true but interaction is 'cat', which has no dot products")

    @property
    def bottom_widths(self) -> tuple[int, ...]:
        """`bottom_mlp` as it was given or resolved."""
        assert self.bottom_mlp is not None
        return self.bottom_mlp

    def header(self) -> dict[str, Any]:
        """What an artifact says of it: the fields of its model. Without `model` it is DLRM's, as all once were."""
        left_out = {*self._fields_of_others(), *(["model"] if self.model == "dlrm" else [])}
        values = {name: value for name, value in asdict(self).items() if name not in left_out}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _check_widths(name: str, widths: tuple[int, ...], least: int = 0) -> None:
    if len(widths) < least or any(not 1 <= width < 2**31 for width in widths):
        shown = "-".join(map(str, widths))
        raise ValueError(f"{name} is {shown!r}, expected widths from 1 to below 2^31, as 512-256-16")
