"""The world of one run: its ranks, and what they must agree on.

This one has a single rank, for which everything is immediate; `processes.join` returns it, or the world of the
processes that `torchrun` started.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import Tensor, nn

from dqrm.errors import UserError
from dqrm.quant.storage import storage_of

T = TypeVar("T")


class RankLost(UserError):
    """Another rank died, hangs, or ended with an error; the message names it."""


class World:
    """The ranks of a run; by default a single one.

    Attributes:
        rank: this process's number. size: number of ranks. local_rank: its number on its machine.
        group: the process group of all communication; None for a single rank.
    """

    rank = 0
    size = 1
    local_rank = 0
    group: Any = None

    @property
    def first(self) -> bool:
        """Whether this is rank 0, the only one that writes and prints."""
        return self.rank == 0

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Around collectives: turn their failure into RankLost, which names the rank that caused it."""
        yield

    def set_timeout(self, seconds: float) -> None:
        """Set how long to wait for a rank from now on."""

    def gather(self, item: T) -> list[T]:
        """The items of all ranks, in their order, on every rank; small Python objects."""
        return [item]

    def shared(self, item: T) -> T:
        """Rank 0's item on every rank; a Python object."""
        return item

    def broadcast(self, tensor: Tensor) -> None:
        """Rank 0's content into `tensor` (contiguous) on all ranks, in place."""

    def gather_rows(self, tensor: Tensor) -> Tensor | None:
        """A tensor of each rank, [N, ...] with N of its own, on rank 0 one behind the other; others get None."""
        return tensor

    def device(self, name: str) -> str:
        """The device of this rank for a configuration's `device`: each rank on a machine has its own GPU."""
        return name

    def together(self, action: Callable[[], T]) -> T:
        """The result of `action`, unless it fails on some rank: then all ranks raise the error of the first of them.

        Raises:
            UserError: of the lowest rank that raised one.
        """
        result, error = None, None
        try:
            result = action()
        except UserError as refused:
            error = str(refused)
        except OSError as failed:
            error = f"{failed.filename or 'input or output'}: {failed.strerror or failed}"
        for rank, message in enumerate(self.gather(error)):
            if message is not None:
                raise UserError(message if self.size == 1 else f"rank {rank}: {message}")
        return result  # type: ignore[return-value]

    def on_first(self, action: Callable[[], T]) -> T:
        """The result of `action` on rank 0, on all ranks; it runs there only.

        Raises:
            UserError: of rank 0, on all ranks.
        """
        return self.shared(self.together(lambda: action() if self.first else None))  # type: ignore[return-value]

    def require_same(self, facts: Mapping[str, Any]) -> None:
        """Raise UserError on all ranks, naming the first difference, unless all ranks have equal facts."""
        everyone = self.gather(dict(facts))
        for rank, theirs in enumerate(everyone):
            for name, value in everyone[0].items():
                if theirs.get(name) != value:
                    raise UserError(
                        f"the ranks differ in {name}: rank 0 has {value!r}, rank {rank} has {theirs.get(name)!r}; "
                        "start all ranks with the same command on the same data"
                    )

    def broadcast_model(self, module: nn.Module) -> None:
        """Broadcast rank 0's parameters and persistent buffers to all ranks, without a second copy."""
        for tensor in module.state_dict(keep_vars=True).values():
            self.broadcast(storage_of(tensor).memory(tensor))
