"""What ranks run for the tests besides `dqrm`: python launch_programs.py probe FOLDER, hold STEP ARGUMENTS..., or
full STEP FILE ARGUMENTS..."""

import errno
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch


def probe(folder: Path) -> None:
    """What `several` starts on each rank."""
    import torch.distributed as dist

    from dqrm.cli import cli
    from dqrm.distributed.processes import join
    from dqrm.errors import UserError
    from dqrm.quant.storage import storage_of
    from dqrm.training.loop import Trainer

    found: list[dict[str, Any]] = []

    def counted(call: Callable[..., Any], to_others: Callable[..., int]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **named: Any) -> Any:
            if arguments:  # TorchRec's calls name them; its bytes are counted elsewhere
                found[-1]["sent"].append(to_others(*arguments))
            return call(*arguments, **named)

        return wrapped

    def all_to_all(_: Any, given: torch.Tensor, __: Any = None, splits: Sequence[int] | None = None) -> int:
        own = given.nbytes // size if splits is None else splits[rank] * given[:1].nbytes
        return int(given.nbytes - own)

    def hashing(call: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def wrapped(trainer: Any) -> Any:
            digest = hashlib.sha256()
            for tensor in trainer.model.state_dict().values():
                held = storage_of(tensor).memory(tensor)
                digest.update(held.contiguous().view(-1).view(torch.uint8).numpy())
            found[-1]["weights"][str(trainer.state.step)] = digest.hexdigest()
            return call(trainer)

        return wrapped

    with join() as world:
        rank, size = world.rank, world.size
        dist.all_to_all_single = counted(dist.all_to_all_single, all_to_all)
        for name in ("all_gather_single", "all_gather_into_tensor"):
            if hasattr(dist, name):
                setattr(dist, name, counted(getattr(dist, name), lambda _, given: (size - 1) * given.nbytes))
        Trainer.fit, Trainer._save = hashing(Trainer.fit), hashing(Trainer._save)  # type: ignore[method-assign]
        for command in json.loads((folder / "commands.json").read_text()):
            found.append({"refused": None, "weights": {}, "sent": []})
            try:
                cli(command, prog_name="dqrm", standalone_mode=False)
            except UserError as error:
                found[-1]["refused"] = str(error)
        (folder / f"rank{rank}.json").write_text(json.dumps(found))


def hold(step: int, arguments: Sequence[str]) -> None:
    """What `held_at` starts on each rank."""
    from dqrm.__main__ import main
    from dqrm.training.loop import Trainer

    save = Trainer._save

    def held(trainer: Any) -> None:
        save(trainer)
        while trainer.world.rank == trainer.world.size - 1 and trainer.state.step >= step:
            if trainer.stopped.is_set():
                break
            time.sleep(0.01)

    Trainer._save = held  # type: ignore[method-assign]
    sys.argv = ["dqrm", *arguments]
    main()


def full(step: int, name: str, arguments: Sequence[str]) -> None:
    """What `full_at` starts on each rank."""
    from dqrm.__main__ import main
    from dqrm.training import checkpoints

    save = checkpoints.save_file

    def saved(tensors: Any, path: Path, files: Any) -> None:
        if path.name == name and f"{step:09d}" in path.parent.name:
            for tensor in tensors.values():
                if hasattr(tensor, "pieces"):
                    next(tensor.pieces())
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(tensors, path, files)

    checkpoints.save_file = saved
    sys.argv = ["dqrm", *arguments]
    main()


if __name__ == "__main__":
    if sys.argv[1] == "hold":
        hold(int(sys.argv[2]), sys.argv[3:])
    elif sys.argv[1] == "full":
        full(int(sys.argv[2]), sys.argv[3], sys.argv[4:])
    else:
        probe(Path(sys.argv[2]))
