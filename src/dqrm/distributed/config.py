"""What ranks send each other, as fields. Importing this module imports no torch."""

from dataclasses import dataclass
from typing import Literal

from dqrm.options import at_least


@dataclass(frozen=True)
class ExchangeConfig:
    """What ranks send each other; without `torchrun` or --simulate-ranks nothing is sent."""

    simulate_ranks: int = 0
    """Data-parallel ranks to simulate in one process, bit-identical to a torchrun launch; 0: off."""
    table_codec: Literal["fp32", "bf16", "int8", "int4"] = "int8"
    """How the tables' gradients are encoded."""
    table_codec_scale: Literal["table", "row"] = "table"
    """Granularity of the scales of the tables' gradients (int8 and int4); with int4, 'table' costs accuracy."""
    table_exchange: Literal["auto", "all_gather", "all_to_all"] = "auto"
    """Every rank gets all gradients, or each row's owner sums them first; auto: by the number of ranks."""
    mlp_codec: Literal["fp32", "bf16", "int8", "int4"] = "int8"
    """How the MLP's gradients are encoded."""
    mlp_codec_scale: str = "channel"
    """Granularity of the scales of the MLP's gradients (int8 and int4): 'channel', or 'bucket:K' for K values."""
    mlp_compensation: bool = True
    """Error compensation: add the encoding error (residual) to the MLP's next gradient."""
    codec_rounding: Literal["nearest", "stochastic"] = "nearest"
    """Rounding of encoded gradients; stochastic is unbiased."""
    shared_scales: bool = False
    """Encode on the largest scale of all ranks, as in the DQRM paper; otherwise each rank uses its own."""
    exchange_timeout: float = 300.0
    """Timeout in seconds for a rank that does not start or answer; longer than saving a checkpoint, which rank 0 does
    alone."""

    def __post_init__(self) -> None:
        at_least(self, simulate_ranks=0, exchange_timeout=1)
        self.bucket_values  # noqa: B018 (refuses what it cannot read)
        if self.simulate_ranks > 4096:
            raise ValueError(f"simulate_ranks is {self.simulate_ranks}, expected 4096 or fewer")
        if self.shared_scales and self.table_codec_scale == "row" and self.table_codec in ("int8", "int4"):
            raise ValueError(
                "shared_scales is true but table_codec_scale is 'row': ranks send different rows; use 'table'"
            )

    @property
    def bucket_values(self) -> int:
        """The K of 'bucket:K'; 0 for 'channel'."""
        if self.mlp_codec_scale == "channel":
            return 0
        name, _, count = self.mlp_codec_scale.partition(":")
        if name != "bucket" or not count.isdecimal() or not 1 <= int(count) < 2**31:
            raise ValueError(
                f"mlp_codec_scale is {self.mlp_codec_scale!r}, expected 'channel' or 'bucket:K', as bucket:512"
            )
        return int(count)
