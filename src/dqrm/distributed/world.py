"""The processes of one run: who they are, what they must agree on, and which of them failed.

`torchrun` starts one process per rank and tells each its number in the environment. `join()` connects them; where
nobody started ranks, it gives a world of one, in which everything here is immediate.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dqrm.distributed import launched
from dqrm.errors import UserError

T = TypeVar("T")
START_TIMEOUT = 300.0
_BEAT = 1.0
# Without a sign of life for so long a rank counts as dead.
_SILENCE = 4.0
# How much longer to wait for the store that knows the signs of life.
_PATIENCE = 4.0
# Bytes sent at once where a whole table is sent.
_PIECE = 1 << 28
_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class RankLost(UserError):
    """Another rank died, hangs, or ended with an error; the message names it."""


class World:
    """The ranks of a run; by default one alone.

    Attributes:
        rank: this process's number. size: how many there are. local_rank: its number on its machine.
        group: the process group that everything travels in; None alone.
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
        """Around collectives: their failure becomes RankLost, which names the rank that caused it."""
        yield

    def set_timeout(self, seconds: float) -> None:
        """From now on wait so long for a rank."""

    def gather(self, item: T) -> list[T]:
        """The items of all ranks, in their order, on every rank; small Python objects."""
        return [item]

    def shared(self, item: T) -> T:
        """Rank 0's item on every rank; a Python object."""
        return item

    def broadcast(self, tensor: Tensor) -> None:
        """Rank 0's content into `tensor` (contiguous) on all ranks, in place."""

    def gather_rows(self, tensor: Tensor) -> list[Tensor]:
        """A tensor of each rank, [N, ...] with N of its own, on rank 0; others get an empty list."""
        return [tensor]

    def device(self, name: str) -> str:
        """The device of this rank for a configuration's `device`: each rank on a machine has a GPU of its own."""
        return name

    def together(self, action: Callable[[], T]) -> T:
        """What `action` gives, unless it fails on some rank: then all ranks raise what the first of them refused.

        Raises:
            UserError: of the lowest rank that raised one.
        """
        found, error = None, None
        try:
            found = action()
        except UserError as refused:
            error = str(refused)
        except OSError as failed:
            error = f"{failed.filename or 'input or output'}: {failed.strerror or failed}"
        for rank, message in enumerate(self.gather(error)):
            if message is not None:
                raise UserError(message if self.size == 1 else f"rank {rank}: {message}")
        return found  # type: ignore[return-value]

    def on_first(self, action: Callable[[], T]) -> T:
        """What `action` gives on rank 0, on all ranks; it runs there only.

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
        """Rank 0's parameters and persistent buffers into those of all ranks, without a second copy."""
        for tensor in module.state_dict(keep_vars=True).values():
            self.broadcast(tensor.detach())


class _Launched(World):
    """One of several processes."""

    def __init__(self, store: Any, rank: int, size: int, timeout: float) -> None:
        self.rank, self.size = rank, size
        self.local_rank = int(os.environ.get("LOCAL_RANK", rank))
        self._store, self._entered, self._ended, self._seconds = store, 0, threading.Event(), timeout
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        self._heard: str | None = None  # why the ranks end
        threading.Thread(target=self._beat, daemon=True, name="dqrm-heartbeat").start()
        with self.guard(), _gloo_unheard():
            dist.init_process_group(
                backend,
                store=dist.PrefixStore("group", store),
                rank=rank,
                world_size=size,
                timeout=timedelta(seconds=timeout),
            )
            self.group = dist.group.WORLD

    def close(self) -> None:
        """Leave the others; whoever keeps their store stays until all have left, or for some seconds."""
        self._ended.set()
        # In threads: where a rank is missing, the store may never answer, and the group may wait for it.
        threads = [
            threading.Thread(target=leave, daemon=True) for leave in (dist.destroy_process_group, self._sign_off)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(_PATIENCE + _SILENCE)
        self.group = None

    def _sign_off(self) -> None:
        with suppress(RuntimeError):
            self._store.set(f"left/{self.rank}", "")
            if self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
                everybody, deadline = [f"left/{rank}" for rank in range(self.size)], time.monotonic() + _SILENCE
                while time.monotonic() < deadline and not self._store.check(everybody):
                    time.sleep(0.02)

    def set_timeout(self, seconds: float) -> None:
        if seconds != self._seconds:
            with self.guard(), _gloo_unheard():
                self.group = dist.new_group(timeout=timedelta(seconds=seconds))
            self._seconds = seconds

    def gather(self, item: T) -> list[T]:
        found: list[Any] = [None] * self.size
        with self.guard():
            dist.all_gather_object(found, item, group=self.group)
        return found

    def shared(self, item: T) -> T:
        found = [item]
        with self.guard():
            dist.broadcast_object_list(found, src=0, group=self.group)
        return found[0]

    def broadcast(self, tensor: Tensor) -> None:
        for piece in tensor.view(-1).view(torch.uint8).split(_PIECE):
            with self.guard():
                dist.broadcast(piece, src=0, group=self.group)

    def gather_rows(self, tensor: Tensor) -> list[Tensor]:
        lengths = self.gather(len(tensor))
        sent = tensor.new_zeros(max(lengths), *tensor.shape[1:])
        sent[: len(tensor)] = tensor
        found = [torch.empty_like(sent) for _ in lengths] if self.first else None
        with self.guard():
            dist.gather(sent, found, dst=0, group=self.group)
        return [part[:length] for part, length in zip(found or [], lengths)]

    def device(self, name: str) -> str:
        if name == "cuda" or (name == "auto" and torch.cuda.is_available()):
            return f"cuda:{self.local_rank % max(torch.cuda.device_count(), 1)}"
        return name

    @contextmanager
    def guard(self) -> Iterator[None]:
        self._entered += 1
        try:
            yield
        except RuntimeError as error:
            # In a thread: a store whose process was stopped does not answer, and knows no time-out.
            asked: list[str] = []
            asking = threading.Thread(target=lambda failure=error: asked.append(self._cause(failure)), daemon=True)
            asking.start()
            asking.join(_SILENCE + _PATIENCE)
            cause = asked[0] if asked else "rank 0 died or was stopped: its store does not answer"
            raise RankLost(f"{cause}; the last checkpoint, if there is one, can be resumed") from error

    # Each rank writes a sign of life into the store: how often it did so, and how many exchanges it has come to.

    def _beat(self) -> None:
        count = 0
        while not self._ended.wait(_BEAT if count else 0):
            count += 1
            with suppress(RuntimeError):  # the store is gone: whoever waits for an exchange will say why
                self._store.set(f"beat/{self.rank}", f"{count} {self._entered}")
                if self._heard is None and self._store.check(["cause"]):  # before the store may be gone
                    self._heard = self._store.get("cause").decode()

    def _beats(self) -> list[tuple[int, int]]:
        found = []
        for rank in range(self.size):
            key = f"beat/{rank}"
            words = self._store.get(key).decode().split() if self._store.check([key]) else ["0", "0"]
            found.append((int(words[0]), int(words[1])))
        return found

    def report(self, message: str) -> None:
        """Leave word for the other ranks that this one ends, and why; the first word counts."""
        with suppress(RuntimeError):
            self._store.compare_set("cause", "", message)

    def _cause(self, error: Exception) -> str:
        """One sentence on what ended the exchange, the same on all ranks that can still read it."""
        try:
            if not self._store.check(["cause"]):
                found = self._suspect(error)
                if found:
                    self.report(found)
            if self._store.check(["cause"]):
                return str(self._store.get("cause").decode())
        except RuntimeError:
            return self._heard or "rank 0, or whatever started the ranks, ended: the ranks' store is gone"
        reason = str(error).splitlines()[0].removesuffix(".") if str(error) else type(error).__name__
        return f"the exchange between the ranks failed, and no rank can be blamed: {reason}"

    def _suspect(self, error: Exception) -> str | None:
        before, entered = self._beats(), self._entered
        deadline = time.monotonic() + _SILENCE
        while time.monotonic() < deadline and not self._store.check(["cause"]):
            time.sleep(0.1)
        if self._store.check(["cause"]):
            return None
        after = self._beats()
        others = [rank for rank in range(self.size) if rank != self.rank]
        for rank in others:
            if after[rank][0] == before[rank][0]:
                return f"rank {rank} died or was stopped: no sign of life for {_SILENCE:.0f} seconds"
        slowest = min(others, key=lambda rank: after[rank][1])
        if after[slowest][1] < entered:
            return f"rank {slowest} hangs: it is alive, but the others waited in vain for {self._seconds:.0f} seconds"
        return None


@contextmanager
def _gloo_unheard() -> Iterator[None]:
    """While ranks are connected: Gloo of torch 2.9 says so in a line of its own on standard output, where a summary in
    JSON goes. What fails is raised, not printed.
    """
    try:
        kept = os.dup(1)
    except OSError:  # closed: nothing can be written there
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        sys.stdout.flush()
        os.dup2(nowhere, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


_current: World | None = None


@contextmanager
def join(timeout: float = START_TIMEOUT) -> Iterator[World]:
    """The world that this process was started into, for as long as the block runs; nested calls get the same one.

    Args:
        timeout: seconds to wait for the other ranks to start.

    Raises:
        UserError: the environment names ranks but they cannot be connected.
    """
    global _current  # noqa: PLW0603 (a process has one world)
    if _current is not None or not launched():
        yield _current or World()
        return
    world = _connect(timeout)
    _current = world
    try:
        yield world
    except RankLost:
        raise
    except UserError as error:
        world.report(f"rank {world.rank} ended: {error}")
        raise
    except BaseException as error:
        world.report(f"rank {world.rank} ended: {type(error).__name__} {error}".strip())
        raise
    finally:
        _current = None
        world.close()


def _connect(timeout: float) -> _Launched:
    missing = [name for name in _VARIABLES if not os.environ.get(name)]
    if missing:
        raise UserError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']} but {missing[0]} is not set; start ranks with torchrun"
        )
    for name in ("RANK", "MASTER_PORT"):
        if not os.environ[name].isdecimal():
            raise UserError(f"{name} is {os.environ[name]!r}, expected a whole number; start ranks with torchrun")
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if rank >= size:
        raise UserError(f"RANK is {rank}, expected less than WORLD_SIZE, which is {size}; start ranks with torchrun")
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    # In a thread: what else listens at that port may never answer.
    found: list[_Launched | Exception] = []
    connecting = threading.Thread(target=lambda: found.append(_connected(rank, size, timeout)), daemon=True)
    connecting.start()
    connecting.join(timeout + _SILENCE + 2 * _PATIENCE)
    world = found[0] if found else TimeoutError(f"no answer within {timeout:.0f} seconds")
    if isinstance(world, _Launched):
        if torch.cuda.is_available():  # here, since it is the choice of a thread
            torch.cuda.set_device(world.local_rank % torch.cuda.device_count())
        return world
    reason = str(world).splitlines()[0] if str(world) else type(world).__name__
    if "EADDRINUSE" in str(world) or "address already in use" in str(world).lower():
        raise UserError(
            f"the port of {where} is in use; choose another with --master-port, or let `torchrun --standalone` find one"
        )
    raise UserError(
        f"rank {rank} of {size} cannot reach the others through {where} ({reason}); is the address rank 0's, the port "
        "free, and were all ranks started?"
    )


def _connected(rank: int, size: int, timeout: float) -> _Launched | Exception:
    from torch.distributed.rendezvous import rendezvous

    try:
        store, _, _ = next(rendezvous("env://", rank, size, timeout=timedelta(seconds=timeout)))
        return _Launched(store, rank, size, timeout)
    except (RuntimeError, ValueError, UserError) as error:
        return error
