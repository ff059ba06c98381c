"""What is quantized, and to how many bits. Importing this module imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

BITS = (2, 4, 8, 16, 32)
REFRESHES = ("periodic", "running_max")
PERIOD, RESCAN_PERIOD = 200, 10_000  # the first is the DQRM paper's on Kaggle
SMALL_TABLE_ROWS = 10_000
PERCENTILE, RUNNING_MAX = 99.9, "running_max"
_PERIODS = ("scale_period", "periodic", PERIOD), ("rescan_period", RUNNING_MAX, RESCAN_PERIOD)
"""(Field, value of scale_refresh that it belongs to, default.)"""
_CLIPPING = ("mse", "percentile")
QUANTIZERS: dict[str, Any] = {
    "max": "dqrm.quant.ranges.max_quantizer",
    "mse": "dqrm.quant.clipping.clipped_quantizer",
    "percentile": "dqrm.quant.clipping.clipped_quantizer",
    "naive": "dqrm.quant.clipping.naive_quantizer",
    "lsq": "dqrm.quant.learned.LearnedStep",
}
"""What a QATConfig can name as `quantizer`: a subclass of `quant.quantizer.WeightFakeQuantizer`, or where it is."""

ACTIVATION_QUANTIZERS: dict[str, Any] = {
    "running_max": "dqrm.quant.activations.RunningMax",
    "pact": "dqrm.quant.learned.PACT",
}
"""What a QATConfig can name as `activation_quantizer`: a subclass of `quant.activations.ActivationFakeQuantizer`, or
where it is."""

_OURS = frozenset(QUANTIZERS), frozenset(ACTIVATION_QUANTIZERS)
_LEARNING = frozenset({"lsq"}), frozenset({"pact"})

HOT_ROWS = 0.025
"""Of a table stored in two tiers, the share of rows in the finer one, where nothing else is said."""

STORAGES: dict[str, Any] = {
    "fp32": "dqrm.quant.storage.FP32",
    "bf16": "dqrm.quant.storage.BF16",
    "int8": "dqrm.quant.storage.INT8",
    "int4": "dqrm.quant.storage.INT4",
}
"""What a TrainingConfig can name as `table_dtype`: a subclass of `quant.storage.Storage`, or where it is."""


def check_registered(field: str, name: str, register: Mapping[str, Any]) -> None:
    """Raise ValueError, naming the field, unless the register has an entry of that name."""
    if name not in register:
        raise ValueError(f"{field} is {name!r}, expected {' or '.join(map(repr, register))}")


def registered(name: str, register: dict[str, Any]) -> Any:
    """The entry of a register; one that is given as an import path is imported here, on first use."""
    if isinstance(register[name], str):
        module, _, attribute = register[name].rpartition(".")
        register[name] = getattr(import_module(module), attribute)
    return register[name]


def unused_period(scale_refresh: str | None) -> str:
    """The period that has no effect with this rule; None: the rule of configurations from before it could be chosen."""
    return next(name for name, rule, _ in _PERIODS if rule != (scale_refresh or "periodic"))


def rows_per_scale(granularity: Any, field: str = "table_granularity") -> int | None:
    """Rows of a table that share a scale at a granularity, the value of the field; None: all.

    Raises:
        ValueError: there is no such granularity.
    """
    if granularity in ("table", "row"):
        return None if granularity == "table" else 1
    name, _, count = str(granularity).partition(":")
    rows = int(count) if name == "block" and count.isascii() and count.isdecimal() and len(count) < 10 else 0
    if rows < 2 or rows & (rows - 1):
        raise ValueError(
            f"{field} is {granularity!r}, expected 'table', 'row', or 'block:N' with a power of 2 from 2 on, "
            "as block:16"
        )
    return rows


class BitsOfParts:
    """Mixin: bits of tables and MLP weights, which default to `bits`."""

    bits: int
    table_bits: int | None
    mlp_bits: int | None
    small_table_bits: int | None
    small_table_rows: int | None

    @property
    def effective_table_bits(self) -> int:
        """Bits of the tables after `bits` is taken as the default."""
        return self.bits if self.table_bits is None else self.table_bits

    @property
    def effective_mlp_bits(self) -> int:
        """Bits of the MLP weights after `bits` is taken as the default."""
        return self.bits if self.mlp_bits is None else self.mlp_bits

    def bits_of_table(self, rows: int) -> int:
        """Bits of a table of so many rows."""
        if self.small_table_bits is None or self.small_table_rows is None or rows >= self.small_table_rows:
            return self.effective_table_bits
        return self.small_table_bits

    def _resolve_small_tables(self) -> None:
        """Resolve the default at once, so that what is stored says it; ValueError for rows without bits, or below 1."""
        rows = self.small_table_rows
        if self.small_table_bits is None:
            if rows is not None:
                raise ValueError(f"small_table_rows is {rows}, but no small_table_bits says how many bits those have")
        elif rows is None:
            object.__setattr__(self, "small_table_rows", SMALL_TABLE_ROWS)
        elif not isinstance(rows, int) or isinstance(rows, bool) or rows < 1:
            raise ValueError(f"small_table_rows is {rows!r}, expected a whole number of rows, 1 or more")


@dataclass(frozen=True)
class QATConfig(BitsOfParts):
    """Quantization-aware training: bits, granularity and where scales come from, separately for tables and MLP.

    Raises:
        ValueError: a number of bits that is not 2, 4, 8, 16 or 32 (32: not quantized), a period below 1 or of the
            other scale_refresh, or a quantizer that is not registered.
    """

    bits: int = 4
    """Bits of tables and MLP weights alike: 2, 4, 8, 16, or 32 for no quantization."""
    table_bits: int | None = None
    """Bits of the embedding tables; none: as --bits."""
    mlp_bits: int | None = None
    """Bits of the MLP weights; none: as --bits, or 8 in a training configuration without bits."""
    small_table_bits: int | None = None
    """Bits of embedding tables with fewer than small_table_rows rows; none: as the others, or 8 in a training
    configuration without bits."""
    small_table_rows: int | None = None
    """With small_table_bits: rows from which on a table has the bits of the others; none: 10,000."""
    quantizer: str = "max"
    """Where scales come from; max: largest magnitude; mse: least squared error, or percentile: of the magnitudes (both
    kept for scale_period steps, weights beyond are clamped); naive: as max, but whole tables are quantized in each step
    (DQRM's Figure 2a: slow, for comparison); lsq: learned step size (arXiv 1902.08153), which ignores scale_refresh."""
    percentile: float = PERCENTILE
    """With quantizer percentile: which one of the magnitudes |w| the highest code stands for, in percent."""
    table_granularity: str = "table"
    """One scale per 'table', per 'row', or 'block:N' for N rows of one table, a power of 2 (quantizer max only; scales
    are stored with the codes, 4 bytes each)."""
    table_qscheme: Literal["symmetric", "affine"] = "symmetric"
    """Codes of tables on both sides of 0, or affine: asymmetric, with a zero point (an integer code) per scale
    (quantizer max only; slower: plain torch)."""
    scale_refresh: Literal["periodic", "running_max"] | None = None
    """Scale of a table: raised each step by the rows just updated, or from all rows every scale_period steps (clips
    weights that grow in between); none: running_max, but periodic where a scale_period is given or the quantizer clips
    (mse, percentile)."""
    scale_period: int | None = None
    """With periodic: training steps between two refreshes of a table's scale (1: every step); none: 200."""
    rescan_period: int | None = None
    """With running_max: training steps between two exact scales from all rows; none: 10,000."""
    linear_granularity: Literal["channel", "tensor"] = "channel"
    """One scale per output channel of a linear layer, or one per weight tensor."""
    forward_rounding: Literal["nearest", "stochastic"] = "nearest"
    """Rounding of weights in training: to the nearest code, or at random to one of the two beside it with the weight as
    mean (slower: plain torch); evaluation and export round to the nearest."""
    bias_bits: int = 32
    """Bits of the MLP biases, on the scale of their weight row as in the DQRM reference; 32 keeps them FP32."""
    activation_bits: int = 32
    """Bits of the inputs of linear layers; 32 keeps them FP32."""
    activation_quantizer: str = RUNNING_MAX
    """Range of the inputs of linear layers: running_max (largest magnitude so far), or pact (learned clipping,
    arXiv 1805.06085)."""

    def __post_init__(self) -> None:
        for name in ("bits", "table_bits", "mlp_bits", "small_table_bits", "bias_bits", "activation_bits"):
            value = getattr(self, name)
            if value is not None and value not in BITS:
                raise ValueError(f"{name} is {value!r}, expected one of {', '.join(map(str, BITS))}")
        if self.bias_bits != 32 and self.effective_mlp_bits == 32:
            raise ValueError(
                f"bias_bits is {self.bias_bits}, but the MLP is not quantized, and a bias has no scale but its weight's"
            )
        self._resolve_small_tables()
        check_registered("quantizer", self.quantizer, QUANTIZERS)
        self._check_groups()
        percent = self.percentile
        if isinstance(percent, bool) or not isinstance(percent, (int, float)) or not 0 < percent <= 100:
            raise ValueError(f"percentile is {percent!r}, expected a number of percent above 0 and at most 100")
        if percent != PERCENTILE and self.quantizer in _OURS[0] - {"percentile"}:
            raise ValueError(
                f"percentile is {percent!r}, but quantizer is {self.quantizer!r}, which has none; use quantizer "
                "'percentile', or leave percentile out"
            )
        check_registered("activation_quantizer", self.activation_quantizer, ACTIVATION_QUANTIZERS)
        if self.activation_quantizer != RUNNING_MAX and self.activation_bits == 32:
            raise ValueError(
                f"activation_quantizer is {self.activation_quantizer!r}, but activation_bits is 32, which quantizes no "
                "activations; use activation_bits 8, or leave activation_quantizer out"
            )
        self._resolve_refresh()
        if self.forward_rounding not in ("nearest", "stochastic"):
            raise ValueError(f"forward_rounding is {self.forward_rounding!r}, expected 'nearest' or 'stochastic'")
        if self.linear_granularity not in ("channel", "tensor"):
            raise ValueError(f"linear_granularity is {self.linear_granularity!r}, expected 'channel' or 'tensor'")

    def _resolve_refresh(self) -> None:
        """Resolve rule and period, so that what is stored records those that applied; the other period is None.

        Raises:
            ValueError: an unknown rule, a period below 1, or the period of the other rule.
        """
        if self.scale_refresh is None:
            periodic = self.scale_period is not None or self.quantizer in _CLIPPING
            object.__setattr__(self, "scale_refresh", "periodic" if periodic else RUNNING_MAX)
        if self.scale_refresh not in REFRESHES:
            raise ValueError(f"scale_refresh is {self.scale_refresh!r}, expected {' or '.join(map(repr, REFRESHES))}")
        for name, rule, default in _PERIODS:
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"{name} is {value!r}, expected a whole number of training steps, 1 or more")
            if value is None and rule == self.scale_refresh:
                object.__setattr__(self, name, default)
            elif value is not None and rule != self.scale_refresh:
                raise ValueError(
                    f"{name} is {value}, but scale_refresh is {self.scale_refresh!r}, which has no such period; use "
                    f"scale_refresh {rule!r}, or leave {name} out"
                )

    @property
    def refresh_period(self) -> int:
        """Training steps between two scales from all rows, whatever the rule."""
        period = self.scale_period if self.scale_refresh == "periodic" else self.rescan_period
        assert period is not None  # resolved in __post_init__
        return period

    @property
    def learns_scales(self) -> bool:
        """Whether the scales of weights are learned, by one of our quantizers."""
        return self.quantizer in _LEARNING[0]

    @property
    def rows_per_scale(self) -> int | None:
        """Rows of a table that share a scale; None: all.

        Raises:
            ValueError: a table_granularity that is none.
        """
        return rows_per_scale(self.table_granularity)

    @property
    def grouped(self) -> bool:
        """Whether scales of tables are per row or block of rows, or have zero points."""
        return self.rows_per_scale is not None or self.table_qscheme != "symmetric"

    def refuse_groups(self, why: str) -> None:
        """Raise ValueError, naming the option that asks for them."""
        name = "table_qscheme" if self.rows_per_scale is None else "table_granularity"
        raise ValueError(f"{name} is {getattr(self, name)!r}, but {why}")

    def _check_groups(self) -> None:
        if self.table_qscheme not in ("symmetric", "affine"):
            raise ValueError(f"table_qscheme is {self.table_qscheme!r}, expected 'symmetric' or 'affine'")
        if not self.grouped:
            return
        if self.small_table_bits is not None:
            self.refuse_groups(
                f"small_table_bits is {self.small_table_bits}, and tables of several bit widths have one scale each "
                "and no zero point; leave small_table_bits out"
            )
        if self.effective_table_bits == 32:
            self.refuse_groups("the tables are not quantized (table_bits is 32); leave it out")
        if self.quantizer in _OURS[0] - {"max"}:
            self.refuse_groups(
                f"the quantizer {self.quantizer!r} has one scale per table and no zero point; use quantizer 'max'"
            )

    @property
    def learned_fields(self) -> set[str]:
        """Which fields of `OptimizerConfig` for what quantizers learn can act; quantizers from outside may use all."""
        weights, activations = (
            name in learning or name not in ours
            for name, learning, ours in zip((self.quantizer, self.activation_quantizer), _LEARNING, _OURS)
        )
        fields = {"scale_rate_factor"} if weights or activations else set()
        return fields | {"pact_l2"} if activations else fields


def take_qat(options: dict[str, Any]) -> QATConfig:
    """Remove `qat`, a QATConfig, or fields of one from the keyword arguments of a layer.

    Raises:
        ValueError: both are given; or as `QATConfig`.
    """
    values = {name: options.pop(name) for name in QATConfig.__dataclass_fields__ if name in options}
    qat: QATConfig | None = options.pop("qat", None)
    if qat is not None and values:
        raise ValueError(f"got qat and also {', '.join(values)}: expected one or the other")
    return qat or QATConfig(**values)
