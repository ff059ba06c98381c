"""The default recipe of `dqrm train DATA -o RUN`: optimizer, learning rate, batch size, epochs and callbacks.

Measured figures are in docs/guides/choosing.md, the papers' settings in configs/. Importing this module imports no
torch.
"""

OPTIMIZER = "adagrad"
CALLBACKS = ("redraw_tables:min_rows=1000",)
EPOCHS, PATIENCE = 10, 2
"""The largest number of epochs, and the number of epochs without improvement before training stops."""
BATCH_SIZES = ((0, 64), (50_000, 128), (500_000, 1024), (2_000_000, 2048))
"""(least rows of the training split, batch size), ascending."""
LEARNING_RATES = {
    "sgd": ((0, 0.1),),
    "adagrad": ((0, 0.01), (256, 0.02)),
    "rowwise_adagrad": ((0, 0.01), (256, 0.02)),
    "adam": ((0, 0.001),),
    "rowwise_adam": ((0, 0.001),),
}
"""By optimizer, (least batch size, learning rate), ascending; the rate of sgd is DLRM's on Kaggle."""
OTHER_LEARNING_RATE = 0.01
"""Of optimizers that are not listed."""


def batch_size(rows: int) -> int:
    """The batch size for a training split of this number of rows."""
    return max(size for least, size in BATCH_SIZES if rows >= least)


def learning_rate(optimizer: str, batch_size: int) -> float:
    """The learning rate of an optimizer at this batch size."""
    rates = LEARNING_RATES.get(optimizer, ((0, OTHER_LEARNING_RATE),))
    return [rate for least, rate in rates if batch_size >= least][-1]
