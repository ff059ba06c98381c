"""The exchange of the MLP's gradients, as bytes: encode for each owner, sum at the owner, encode the sum, decode.

The values are cut into blocks that share a scale, and each block has an owner rank. A rank encodes its gradient and
sends each owner its blocks (all-to-all); the owner decodes the ranks' messages, sums them in FP32 in the order of the
ranks, encodes the sum, and all ranks get it (all-gather). So codes are sent twice, as in a ring all-reduce, and no sum
of codes can overflow. This module does not communicate: `real` does, and `simulated` calls the same functions.

The choice of owners does not change the result.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from dqrm.distributed.codecs import Codec
from dqrm.kernels import Blocks


class MLPLayout:
    """Parameters in one flat order, each cut into blocks.

    Args:
        shapes: of the parameters.
        bucket: values per block; 0: a row of a weight (an output channel), or a whole bias.

    Attributes:
        total: values of all parameters. starts: where each parameter begins.
    """

    def __init__(self, shapes: Sequence[torch.Size], bucket: int = 0) -> None:
        sizes = [shape.numel() for shape in shapes]
        self.starts = [0, *accumulate(sizes)][:-1]
        self.total = sum(sizes)
        self._blocks = []
        for shape, size in zip(shapes, sizes):
            channels = shape[0] if len(shape) > 1 else 1
            length = max(bucket or size // max(channels, 1), 1)
            begins = torch.arange(0, size, length)
            self._blocks.append((begins, (size - begins).clamp(max=length)))

    def owned(self, number: int, owners: int) -> list[tuple[Tensor, Tensor]]:
        """The blocks of parameter `number`, as (starts in it, lengths), for each owner: equal shards."""
        begins, lengths = self._blocks[number]
        owner = torch.arange(len(begins)) * owners // max(len(begins), 1)
        # A parameter of few blocks must not always go to the first ranks.
        owner = (owner + number) % owners
        return [(begins[owner == rank], lengths[owner == rank]) for rank in range(owners)]


class Bucket:
    """The parameters' gradients in one flat tensor, as messages to the owners of its blocks.

    Args:
        layout: of the parameters.
        owners: number of ranks that share the summation.
        codec: how values are encoded.
        device: where the gradients are.

    Attributes:
        sizes: bytes of the message for each owner. scale_bytes, value_bytes: of all messages of a rank, padding not
            counted.
    """

    def __init__(self, layout: MLPLayout, owners: int, codec: Codec, device: torch.device) -> None:
        self.codec = codec
        owned = [layout.owned(number, owners) for number in range(len(layout.starts))]
        nothing = torch.zeros(0, dtype=torch.int64)
        each = [
            (
                torch.cat([nothing, *(start + part[owner][0] for start, part in zip(layout.starts, owned))]).to(device),
                torch.cat([nothing, *(part[owner][1] for part in owned)]).to(device),
            )
            for owner in range(owners)
        ]
        self._blocks = [Blocks(starts, lengths) for starts, lengths in each]
        self._all = Blocks(*(torch.cat(parts) for parts in zip(*each)))  # encoded in one call
        self._values: Tensor | None = None
        self._total: Tensor | None = None
        self._packed = [blocks.packed() for blocks in self._blocks]
        counted = [codec.sizes(len(blocks), blocks.total) for blocks in self._blocks]
        self.scale_bytes = sum(scales for scales, _ in counted)
        self.value_bytes = sum(blocks.total for blocks in self._blocks) * codec.value_bits / 8
        self.sizes = [sum(pair) for pair in counted]

    def scales(self, gradient: Tensor, residual: Tensor | None) -> Tensor | None:
        """The scales of a rank's gradient: float32 [blocks]; None where the codec has none."""
        return self.codec.scales(gradient, self._all, residual)

    def encode(self, gradient: Tensor, residual: Tensor | None, seed: int, scales: Tensor | None = None) -> Tensor:
        """A rank's gradient (float32, flat) as one message for each owner, one after the other: uint8 [sum(sizes)]."""
        out = gradient.new_zeros(sum(self.sizes), dtype=torch.uint8)
        self.encode_into(out.split(self.sizes), gradient, residual, seed, scales)
        return out

    def encode_into(
        self,
        messages: Sequence[Tensor],
        gradient: Tensor,
        residual: Tensor | None,
        seed: int,
        scales: Tensor | None = None,
    ) -> None:
        """The same, into tensors of these sizes."""
        if self._values is None:  # kept: allocating costs more than encoding
            self._values = torch.empty(self._all.total, dtype=self.codec.dtype, device=gradient.device)
        values, scales = self.codec.quantize(gradient, self._all, residual, seed, scales, self._values)
        counts = [blocks.total for blocks in self._blocks]
        each = [None] * len(counts) if scales is None else scales.split([len(blocks) for blocks in self._blocks])
        for message, part, own in zip(messages, values.split(counts), each):
            self.codec.write(message, part, own)

    def reduce(self, owner: int, messages: Sequence[Tensor], residual: Tensor | None, seed: int) -> Tensor:
        """The sum of the ranks' messages to this owner, encoded: uint8 [sizes[owner]]."""
        blocks, total = self._packed[owner], self._total
        if total is None or len(total) != blocks.total:
            total = self._total = torch.zeros(blocks.total, device=messages[0].device)
        for rank, message in enumerate(messages):
            self.codec.decode(message, blocks, total, add=rank > 0)
        return self.codec.encode(total, blocks, residual, seed)

    def decode(self, messages: Sequence[Tensor], gradient: Tensor) -> None:
        """Decode the owners' messages, in their order, into the flat gradient."""
        for blocks, message in zip(self._blocks, messages):
            self.codec.decode(message, blocks, gradient)
