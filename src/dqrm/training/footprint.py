"""What the tables take in training: bytes of their master weights and of their optimizer's state."""

from typing import TypedDict

from torch import Tensor, nn
from torch.optim import Optimizer

from dqrm import recipe
from dqrm.config import Config
from dqrm.quant.config import STORAGES, registered
from dqrm.quant.storage import Encoded, storage_of


class TableBytes(TypedDict):
    """Bytes of the tables' master weights, and of the state that their optimizer keeps for them."""

    weights: int
    optimizer: int


def table_bytes(weight: nn.Parameter, optimizer: Optimizer) -> TableBytes:
    """Of the tables' weight and the optimizer that updates it."""
    state = optimizer.state.get(weight, {}).values()
    return {
        "weights": storage_of(weight).memory(weight).nbytes,
        "optimizer": sum(value.nbytes for value in state if isinstance(value, Tensor)),
    }


def describe_table_bytes(found: TableBytes, config: Config, weights: int, free: int | None = None) -> str:
    """The same as a sentence, for tables of so many weights; `free`: bytes of memory that are left for the state, which
    takes none before the rows that it belongs to are updated."""
    each = max(weights, 1)
    text = (
        f"Tables in training: {config.training.table_dtype} weights {found['weights'] / 1e6:,.1f} MB "
        f"({found['weights'] / each:.3g} bytes per weight), {config.optimizer.rule} state "
        f"{found['optimizer'] / 1e6:,.1f} MB ({found['optimizer'] / each:.3g})"
    )
    training = config.training
    storage = registered(training.table_dtype, STORAGES)
    default = recipe.optimizer(training.table_dtype, training.tables)
    if issubclass(storage, Encoded) and found["optimizer"] > found["weights"] and config.optimizer.rule != default:
        text += "; rowwise_adagrad keeps 4 bytes per row, sgd none"
    if free is not None and found["optimizer"] > free:
        text += (
            f". Warning: {free / 1e6:,.1f} MB of memory are free, so the run may be killed before all rows have been "
            "updated; --optimizer adagrad keeps 4 bytes per weight, rowwise_adagrad 4 per row"
        )
    return text
