"""The recipe of `dqrm train DATA -o RUN`: every number that holds where nothing else is said, and was measured for it
(docs/guides/choosing.md). The papers' settings are in configs/. Importing this module imports no torch.
"""

OPTIMIZER = "adagrad"
CALLBACKS = ("redraw_tables",)
EPOCHS, PATIENCE = 10, 2
"""At most so many epochs, and so many without a better one before training stops."""
BATCH_SIZES = ((0, 64), (50_000, 128), (500_000, 1024), (2_000_000, 2048))
"""(rows of the training split from which on it holds, batch size), ascending."""
LEARNING_RATES = {
    "sgd": ((0, 0.1),),
    "adagrad": ((0, 0.01), (256, 0.02)),
    "rowwise_adagrad": ((0, 0.01), (256, 0.02)),
}
"""By optimizer, (batch size from which on it holds, learning rate), ascending; sgd's is DLRM's on Kaggle."""
OTHER_LEARNING_RATE = 0.01
"""Of optimizers that are not listed."""


def batch_size(rows: int) -> int:
    """Samples per step for a training split of so many rows."""
    return max(size for least, size in BATCH_SIZES if rows >= least)


def learning_rate(optimizer: str, batch_size: int) -> float:
    """The learning rate of an optimizer for batches of this size."""
    rates = LEARNING_RATES.get(optimizer, ((0, OTHER_LEARNING_RATE),))
    return [rate for least, rate in rates if batch_size >= least][-1]
