"""The default recipe of `dqrm train DATA -o RUN`: optimizer, learning rate, batch size, epochs and callbacks.

Measured figures are in docs/guides/choosing.md, the papers' settings in configs/. Importing this module imports no
torch.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from dqrm.quant.config import REFRESHES, unused_period

OPTIMIZER = "dense_adam"
OPTIMIZER_OF = {"bf16": "adagrad", "int8": "rowwise_adagrad", "int4": "rowwise_adagrad"}
"""By table_dtype, where it differs: Adam's 8 bytes per weight would undo what smaller master weights save. Of INT8 rows
a value per row takes 6 % at dim 64 and 22 % at dim 16."""
SHARDED_OPTIMIZER = "adagrad"
"""Of tables that are sharded: FBGEMM's, which has no Adam on the CPU, and rows that nobody looks up do not move."""
CALLBACKS = ("redraw_tables:min_rows=1000", "ema:decay=0.999")
EPOCHS, PATIENCE = 20, 5
"""The largest number of epochs, and the number of epochs without improvement before training stops."""
BATCH_SIZES = ((0, 64), (50_000, 128), (500_000, 2048))
"""(least rows of the training split, batch size), ascending."""
LARGEST_BATCH_SIZES = {"dense_adam": 1024}
"""By optimizer, the largest of them that it takes by default."""
LEARNING_RATES = {
    "sgd": ((0, 0.1),),
    "adagrad": ((0, 0.01), (256, 0.02), (2048, 0.03)),
    "rowwise_adagrad": ((0, 0.01), (256, 0.02), (2048, 0.03)),
    "counter_adagrad": ((0, 0.01), (256, 0.02), (2048, 0.03)),
    "frequency_adagrad": ((0, 0.01), (256, 0.02), (2048, 0.03)),
    "adam": ((0, 0.001),),
    "rowwise_adam": ((0, 0.001),),
    "dense_adam": ((0, 0.0003), (256, 0.0005), (1024, 0.001)),
}
"""By optimizer, (least batch size, learning rate), ascending; the rate of sgd is DLRM's on Kaggle."""
WARM_FACTORS = {"adagrad": 1.5, "rowwise_adagrad": 1.5, "dense_adam": 2.0}
"""By optimizer, the factor on the learning rate of a run that goes on with the optimizer state of another: it has one
epoch, and Adagrad's state makes steps smaller and smaller (docs/guides/daily.md)."""
OTHER_LEARNING_RATE = 0.01
"""Of optimizers that are not listed."""
WARMUP_STEPS = {name: 100 for name in LEARNING_RATES if name.endswith("adagrad")}
"""By optimizer, steps of linear warm-up where the first epoch has at least WARMUP_PARTS times as many; 0 for others.
Adagrad's first steps are as large as the learning rate whatever the gradient, which can leave units of the MLP dead."""
WARMUP_PARTS = 3
"""The first epoch's steps over the most steps of warm-up."""
MLP_BITS = SMALL_TABLE_BITS = 8
"""Where no bits are set: of the MLP and of tables below `quant.config.SMALL_TABLE_ROWS` rows, about 1 % of the weights
together; the other tables have 4."""


def left_open(section: str, given: Mapping[str, Any], tables: str | None) -> dict[str, Any]:
    """The fields of a configuration's section that depend on others and that `given` leaves open; `tables`: where the
    tables are. Sharded ones have a scale per row, in the forward pass and of their gradients."""
    rows = tables == "sharded"
    if section == "exchange":
        return {"table_codec_scale": "row"} if rows else {}
    if section != "quantization":
        return {}
    bits = given.get("table_bits", given.get("bits"))
    by_row = {"table_granularity": "row"} if rows and str(bits) != "32" else {}  # a flag's value is a string
    return quantization(by_row | dict(given)) | by_row


def quantization(given: Mapping[str, Any]) -> dict[str, Any]:
    """The bits of a configuration's section `quantization` that its fields `given` leave open.

    With `bits`, everything has those bits. Only the quantizer 'max' with a scale per table and no zero point takes
    tables of several bit widths.
    """
    one_width = (
        ("table_bits", None),
        ("quantizer", "max"),
        ("table_granularity", "table"),
        ("table_qscheme", "symmetric"),
    )
    open_fields: dict[str, Any] = {}
    if given.get("bits") is None:
        open_fields["mlp_bits"] = MLP_BITS
        if all(given.get(name) in (None, value) for name, value in one_width):
            open_fields["small_table_bits"] = SMALL_TABLE_BITS
    return open_fields


def callbacks(given: Sequence[str], base: Sequence[str] = CALLBACKS) -> Sequence[str]:
    """The callbacks that `given` names: themselves or, each with a '+' before it, those of `base` and these, which
    replace any of the same name.

    Raises:
        ValueError: only some have a '+'.
    """
    added = [each.removeprefix("+") for each in given if each.startswith("+")]
    if not added:
        return given
    if len(added) < len(given):
        raise ValueError(
            f"callbacks is {','.join(given)!r}, expected '+' before each name (in addition to the callbacks of the "
            "configuration file, by default the recipe's) or before none (instead of them)"
        )
    names = {each.partition(":")[0] for each in added}
    return (*(each for each in base if each.partition(":")[0] not in names), *added)


def optimizer(table_dtype: str, tables: str = "replicated") -> str:
    """The update rule for tables whose master weights are stored so; `tables`: where they are."""
    return SHARDED_OPTIMIZER if tables == "sharded" else OPTIMIZER_OF.get(table_dtype, OPTIMIZER)


def overridden(given: Mapping[str, Any]) -> tuple[str, ...]:
    """Fields of the section `quantization` of a file that the values given beside it override without naming them."""
    periods = (unused_period(given["scale_refresh"]),) if given.get("scale_refresh") in REFRESHES else ()
    if "bits" not in given:
        return periods
    names = ("table_bits", "mlp_bits", "small_table_bits", "small_table_rows")
    scales = ("table_granularity", "table_qscheme") if given["bits"] == 32 else ()
    return (*(names[:3] if "small_table_bits" in given else names), *scales, *periods)


def batch_size(rows: int, optimizer: str) -> int:
    """The batch size for a training split of this number of rows with this optimizer."""
    size = max(size for least, size in BATCH_SIZES if rows >= least)
    return min(size, LARGEST_BATCH_SIZES.get(optimizer, size))


def warmup_steps(optimizer: str, epoch_steps: int, goes_on: bool = False) -> int:
    """Steps of linear warm-up; `epoch_steps`: steps of an epoch; `goes_on`: with the state that the optimizer has from
    another run, which needs none."""
    return 0 if goes_on else min(WARMUP_STEPS.get(optimizer, 0), epoch_steps // WARMUP_PARTS)


def learning_rate(optimizer: str, batch_size: int, goes_on: bool = False) -> float:
    """The learning rate of an optimizer at this batch size; `goes_on`: with the state that it has from another run."""
    rates = LEARNING_RATES.get(optimizer, ((0, OTHER_LEARNING_RATE),))
    rate = [rate for least, rate in rates if batch_size >= least][-1]
    return rate * WARM_FACTORS.get(optimizer, 1.0) if goes_on else rate
