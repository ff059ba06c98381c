"""Rows as TorchRec sends them: `quant.RowCodec` as a `QuantizedCommCodec` for the all-to-all of tables' rows.

TorchRec gives a codec the concatenated rows for all ranks and cuts what it returns by `calc_quantized_size` of each
rank's values, hence a scale beside each row. All rows pass it, those that stay on their rank too.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torchrec.distributed.types import CommOp, NoOpQuantizedCommCodec, QuantizedCommCodec, QuantizedCommCodecs

from dqrm.distributed.codecs import mix
from dqrm.quant.row_codec import RowCodec

ALL_TO_ALL = (CommOp.SEQUENCE_EMBEDDINGS_ALL_TO_ALL, CommOp.POOLED_EMBEDDINGS_ALL_TO_ALL)
"""The collectives whose messages are rows. A reduce-scatter sums encoded tensors, so it has none of ours."""


class RowCommCodec(QuantizedCommCodec[None]):
    """TorchRec's interface around a `RowCodec`.

    Args:
        codec: encodes the rows.
        seed: with stochastic rounding, decides it together with the rank and the count of messages encoded.
    """

    def __init__(self, codec: RowCodec, seed: int = 0) -> None:
        self.codec, self._seed, self._count = codec, seed, 0

    @property
    def quantized_dtype(self) -> torch.dtype:
        return torch.uint8

    def encode(self, input_tensor: Tensor, ctx: None = None) -> Tensor:
        """Rows float32 of any shape, `dim` values each, as uint8, flat."""
        self._count += 1
        seed = mix(self._seed, dist.get_rank() if dist.is_initialized() else 0, self._count)
        return self.codec.encode(input_tensor.reshape(-1, self.codec.dim), seed).view(-1)

    def decode(self, input_grad: Tensor, ctx: None = None) -> Tensor:
        """The inverse: float32, flat."""
        return self.codec.decode(input_grad.view(-1, self.codec.row_bytes)).view(-1)

    def calc_quantized_size(self, input_len: int, ctx: None = None) -> int:
        """Bytes of so many values.

        Raises:
            ValueError: they are not whole rows, so the codec's dim is not that of the tables.
        """
        rows, rest = divmod(input_len, self.codec.dim)
        if rest:
            raise ValueError(
                f"{input_len} values are not whole rows of {self.codec.dim}; is the codec's dim that of the tables?"
            )
        return rows * self.codec.row_bytes

    def create_context(self) -> None:
        return None

    def padded_size(
        self, input_tensor: Tensor, dim_per_rank: list[int], my_rank: int, qcomm_ctx: None
    ) -> tuple[int, int]:
        return dim_per_rank[my_rank], 0


class _Unchanged(NoOpQuantizedCommCodec[None]):
    """FP32, as without a codec; the planner reads the dtype as an attribute, which TorchRec's own has as a method."""

    quantized_dtype = torch.float32


def codec_registry(
    dim: int,
    forward: str | None = "int4",
    backward: str | None = "int8",
    *,
    scale: str = "fp32",
    stochastic: bool = True,
    seed: int = 0,
) -> dict[str, QuantizedCommCodecs]:
    """What a TorchRec sharder takes as `qcomm_codecs_registry`, for tables of one embedding dim.

    An `EmbeddingCollection` trained with it is INT4 QAT with a scale per row: the forward codec rounds each row that is
    looked up, and the gradient passes unchanged but for the backward codec. Pooled all-to-all
    (`EmbeddingBagCollection`, table-wise) is compressed as well, after pooling, which is no QAT.

    Args:
        dim: embedding dim of all tables.
        forward, backward: codec of rows and of their gradients, a name in `quant.row_codec.CODECS`; None: FP32.
        scale: scales of rows, 'fp32' or 'fp16'. Gradients have FP32 scales.
        stochastic: whether gradients are rounded stochastically; rows are rounded half to even.
        seed: of stochastic rounding.

    Raises:
        ValueError: dim below 1, or an unknown name or scale.
    """
    registry = {}
    for op in ALL_TO_ALL:
        rows = None if forward is None else RowCodec(dim, forward, scale)
        gradients = None if backward is None else RowCodec(dim, backward, "fp32", stochastic)
        registry[op.name] = QuantizedCommCodecs(
            forward=_Unchanged() if rows is None else RowCommCodec(rows),
            backward=_Unchanged() if gradients is None else RowCommCodec(gradients, seed),
        )
    return registry
