"""The processes that `torchrun` started, one per rank, as described by the environment. `join` connects them."""

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dqrm.distributed import launched
from dqrm.distributed.liveness import SILENCE, Liveness
from dqrm.distributed.world import RankLost, World
from dqrm.errors import UserError

T = TypeVar("T")
START_TIMEOUT = 300.0
# How much longer to wait for the store that holds the heartbeats.
_PATIENCE = 4.0
# Bytes sent at a time when a whole table is sent.
_PIECE = 1 << 28
_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Processes(World):
    """The world of one process among several."""

    def __init__(self, store: Any, rank: int, size: int, timeout: float) -> None:
        self.rank, self.size = rank, size
        self.local_rank = int(os.environ.get("LOCAL_RANK", rank))
        self._store, self._seconds, self._liveness = store, timeout, Liveness(store, rank, size)
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
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
        """Leave the group; the rank that hosts the store waits until all have left, or for some seconds."""
        self._liveness.stop()
        # In threads: if a rank is missing, the store may never answer, and the group may wait for it.
        threads = [
            threading.Thread(target=leave, daemon=True) for leave in (dist.destroy_process_group, self._sign_off)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(_PATIENCE + SILENCE)
        self.group = None

    def _sign_off(self) -> None:
        with suppress(RuntimeError):
            self._store.set(f"left/{self.rank}", "")
            if self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
                everybody, deadline = [f"left/{rank}" for rank in range(self.size)], time.monotonic() + SILENCE
                while time.monotonic() < deadline and not self._store.check(everybody):
                    time.sleep(0.02)

    def set_timeout(self, seconds: float) -> None:
        if seconds != self._seconds:
            with self.guard(), _gloo_unheard():
                self.group = dist.new_group(timeout=timedelta(seconds=seconds))
            self._seconds = seconds

    def gather(self, item: T) -> list[T]:
        items: list[Any] = [None] * self.size
        with self.guard():
            dist.all_gather_object(items, item, group=self.group)
        return items

    def shared(self, item: T) -> T:
        items = [item]
        with self.guard():
            dist.broadcast_object_list(items, src=0, group=self.group)
        return items[0]

    def broadcast(self, tensor: Tensor) -> None:
        for piece in tensor.view(-1).view(torch.uint8).split(_PIECE):
            with self.guard():
                dist.broadcast(piece, src=0, group=self.group)

    def gather_rows(self, tensor: Tensor) -> Tensor | None:
        lengths = self.gather(len(tensor))
        # By rank, as a gather would need a tensor of each rank beside the whole.
        whole = tensor.new_empty(sum(lengths), *tensor.shape[1:]) if self.first else None
        with self.guard():
            for rank, part in enumerate(whole.split(lengths) if whole is not None else ()):
                if rank == 0:
                    part.copy_(tensor)
                elif len(part):
                    dist.recv(part, rank, group=self.group)
            if whole is None and len(tensor):
                dist.send(tensor.contiguous(), 0, group=self.group)
        return whole

    def device(self, name: str) -> str:
        if name == "cuda" or (name == "auto" and torch.cuda.is_available()):
            return f"cuda:{self.local_rank % max(torch.cuda.device_count(), 1)}"
        return name

    @contextmanager
    def guard(self) -> Iterator[None]:
        self._liveness.entered += 1
        try:
            yield
        except RuntimeError as error:
            # In a thread: a store whose process was stopped does not answer, and has no timeout.
            asked: list[str] = []
            asking = threading.Thread(
                target=lambda failure=error: asked.append(self._liveness.cause(failure, self._seconds)), daemon=True
            )
            asking.start()
            asking.join(SILENCE + _PATIENCE)
            cause = asked[0] if asked else "rank 0 died or was stopped: its store does not answer"
            raise RankLost(f"{cause}; the last checkpoint, if there is one, can be resumed") from error

    def report(self, message: str) -> None:
        """Store the cause of this rank's end for the other ranks; the first one is kept."""
        self._liveness.report(message)


@contextmanager
def _gloo_unheard() -> Iterator[None]:
    """While ranks are connected: Gloo of torch 2.9 prints a line on standard output, which is for a summary in JSON.
    Failures are raised, not printed.
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
    """The world of this process, for as long as the block runs; nested calls get the same one.

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


def _connect(timeout: float) -> Processes:
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
    # In a thread: another program at that port may never answer.
    outcome: list[Processes | Exception] = []
    connecting = threading.Thread(target=lambda: outcome.append(_connected(rank, size, timeout)), daemon=True)
    connecting.start()
    connecting.join(timeout + SILENCE + 2 * _PATIENCE)
    world = outcome[0] if outcome else TimeoutError(f"no answer within {timeout:.0f} seconds")
    if isinstance(world, Processes):
        if torch.cuda.is_available():  # here, since the setting is per thread
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


def _connected(rank: int, size: int, timeout: float) -> Processes | Exception:
    from torch.distributed.rendezvous import rendezvous

    try:
        store, _, _ = next(rendezvous("env://", rank, size, timeout=timedelta(seconds=timeout)))
        return Processes(store, rank, size, timeout)
    except (RuntimeError, ValueError, UserError) as error:
        return error
