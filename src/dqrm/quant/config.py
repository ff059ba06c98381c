"""What is quantized, and to how many bits. Importing this module imports no torch."""

from dataclasses import dataclass
from typing import Literal

BITS = (2, 4, 8, 16, 32)
REFRESHES = ("periodic", "running_max")
PERIOD, RESCAN_PERIOD = 200, 10_000  # the first is the DQRM paper's on Kaggle


def refresh_rule(scale_refresh: str | None, scale_period: int | None, rescan_period: int) -> tuple[str, int]:
    """When scales are refreshed, and the period, after defaults: running_max, but periodic where a period is given.

    Raises:
        ValueError: an unknown rule, or a period that is not a whole number of 1 or more.
    """
    rule = scale_refresh or ("running_max" if scale_period is None else "periodic")
    period = PERIOD if scale_period is None else scale_period
    for name, value in (("scale_period", period), ("rescan_period", rescan_period)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} is {value!r}, expected a whole number of training steps, 1 or more")
    if rule not in REFRESHES:
        raise ValueError(f"scale_refresh is {scale_refresh!r}, expected {' or '.join(map(repr, REFRESHES))}")
    return rule, period


class BitsOfParts:
    """Mixin: `bits`, unless the part has bits of its own."""

    bits: int
    table_bits: int | None
    mlp_bits: int | None

    @property
    def effective_table_bits(self) -> int:
        """Bits of the tables after `bits` is taken as the default."""
        return self.bits if self.table_bits is None else self.table_bits

    @property
    def effective_mlp_bits(self) -> int:
        """Bits of the MLP weights after `bits` is taken as the default."""
        return self.bits if self.mlp_bits is None else self.mlp_bits


@dataclass(frozen=True)
class QATConfig(BitsOfParts):
    """Quantization-aware training: bits, granularity and scale period, separately for tables and MLP.

    Raises:
        ValueError: a number of bits that is not 2, 4, 8, 16 or 32 (32: not quantized), or a scale period below 1.
    """

    bits: int = 4
    """Bits of tables and MLP weights alike: 2, 4, 8, 16, or 32 for no quantization."""
    table_bits: int | None = None
    """Bits of the embedding tables; none: as --bits."""
    mlp_bits: int | None = None
    """Bits of the MLP weights; none: as --bits."""
    scale_refresh: Literal["periodic", "running_max"] | None = None
    """Scale of a table: raised each step by the rows just updated, or from all rows every scale_period steps (clips
    weights that grow in between); none: running_max, but periodic where a scale_period is given."""
    scale_period: int | None = None
    """With periodic: training steps between two refreshes of a table's scale (1: every step); none: 200."""
    rescan_period: int = RESCAN_PERIOD
    """With running_max: training steps between two exact scales from all rows."""
    linear_granularity: Literal["channel", "tensor"] = "channel"
    """One scale per output channel of a linear layer, or one per weight tensor."""
    bias_bits: int = 32
    """Bits of the MLP biases, on the scale of their weight row as in the DQRM reference; 32 keeps them FP32."""
    activation_bits: int = 32
    """Bits of the inputs of linear layers, on a running maximum; 32 keeps them FP32."""

    def __post_init__(self) -> None:
        for name in ("bits", "table_bits", "mlp_bits", "bias_bits", "activation_bits"):
            value = getattr(self, name)
            if value is not None and value not in BITS:
                raise ValueError(f"{name} is {value!r}, expected one of {', '.join(map(str, BITS))}")
        if self.bias_bits != 32 and self.effective_mlp_bits == 32:
            raise ValueError(
                f"bias_bits is {self.bias_bits}, but the MLP is not quantized, and a bias has no scale but its weight's"
            )
        # Resolved at once: what is stored says which rule it was.
        rule, period = refresh_rule(self.scale_refresh, self.scale_period, self.rescan_period)
        object.__setattr__(self, "scale_refresh", rule)
        object.__setattr__(self, "scale_period", period)
        if self.linear_granularity not in ("channel", "tensor"):
            raise ValueError(f"linear_granularity is {self.linear_granularity!r}, expected 'channel' or 'tensor'")
