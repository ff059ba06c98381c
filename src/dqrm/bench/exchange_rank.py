"""One rank of `dqrm bench exchange`: `python -m dqrm.bench.exchange_rank FOLDER INTERFACE`, started by `exchange`.

Reads FOLDER/options.json, leaves FOLDER/rank<N>.json.
"""

import json
import os
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from dqrm.bench.config import ARCHITECTURES, NUM_DENSE, BenchExchangeConfig
from dqrm.bench.data import endless, write_split
from dqrm.bench.variants import LEARNING_RATE
from dqrm.config import Config, ExchangeConfig, ModelConfig, OptimizerConfig, TrainingConfig
from dqrm.data.batches import Batch
from dqrm.distributed.exchange import RankExchange
from dqrm.distributed.processes import join
from dqrm.distributed.world import World
from dqrm.errors import UserError
from dqrm.models.base import ClickModel
from dqrm.models.registry import build_model
from dqrm.quant.config import QATConfig
from dqrm.training.step import TrainStep

# Steps of one variant before the next one's turn: enough that a barrier's bytes do not count.
_TURN = 5
_BATCHES = 256
_TITLES = {
    "dense": "dense, DDP",
    "fp32": "sparse FP32",
    "bf16": "sparse + BF16",
    "int8": "sparse + INT8 + compensation",
    "int4": "sparse + INT4 + compensation",
}


def interface_bytes(interface: str) -> tuple[int, int]:
    """(received, sent) bytes of an interface in the network namespace of this process, by the kernel's counters."""
    try:
        lines = Path("/proc/net/dev").read_text().splitlines()
    except OSError:
        raise UserError(f"bytes of {interface!r} cannot be counted without /proc/net/dev, which Linux has") from None
    counters = {name.strip(): values.split() for name, _, values in (line.rpartition(":") for line in lines[2:])}
    if interface not in counters:
        raise UserError(f"there is no interface {interface!r} here, expected one of {', '.join(sorted(counters))}")
    return int(counters[interface][0]), int(counters[interface][8])


class _Ours:
    """Our exchange with one codec for tables and MLP."""

    def __init__(self, model: ClickModel, config: Config, world: World) -> None:
        self._step = TrainStep(model, config, world)
        self._count, self._ranks = 0, world.size

    def step(self, batch: Batch) -> None:
        self._step(batch, LEARNING_RATE, len(batch) * self._ranks, self._count)
        self._count += 1

    def totals(self) -> dict[str, Any]:
        """Everything so far."""
        exchange = self._step.exchange
        assert isinstance(exchange, RankExchange)
        return {
            "payload": dict(exchange.payload), "counted": exchange.sent, "waited": exchange.waited,
        }  # fmt: skip


class _Torch:
    """What plain torch offers: DistributedDataParallel, with dense gradients of the tables.

    Sparse ones it takes from nn.EmbeddingBag only.
    """

    def __init__(self, model: ClickModel, world: World) -> None:
        self._model = model
        model.tables.sparse = False
        self._module = DistributedDataParallel(model, process_group=world.group)
        self._optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE)

    def step(self, batch: Batch) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        logits = self._module(batch.dense, batch.ids, batch.bags)
        F.binary_cross_entropy_with_logits(logits, batch.labels).backward()
        self._optimizer.step()

    def totals(self) -> dict[str, Any]:
        """Nothing is counted inside torch."""
        return {"payload": None, "counted": None, "waited": None}


def _config(options: BenchExchangeConfig, variant: str) -> Config:
    arch = ARCHITECTURES[options.arch]
    codec: Any = variant if variant in ("fp32", "bf16", "int8", "int4") else "fp32"
    return Config(
        model=ModelConfig(embedding_dim=arch.embedding_dim, bottom_mlp=arch.bottom_mlp, top_mlp=arch.top_mlp),
        quantization=QATConfig(bits=4, scale_period=options.scale_period),
        optimizer=OptimizerConfig("sgd", LEARNING_RATE),
        training=TrainingConfig(device="cpu", threads=options.threads, seed=options.seed),
        exchange=ExchangeConfig(
            table_codec=codec,
            table_codec_scale="row" if codec == "int4" else "table",
            mlp_codec=codec,
            mlp_codec_scale="bucket:512" if codec == "int4" else "channel",
            table_exchange=options.table_exchange,
        ),
    )


def _variants(options: BenchExchangeConfig, table_rows: Sequence[int], world: World) -> dict[str, Any]:
    """The variants; all train the same tables."""
    shared: Tensor | None = None
    variants: dict[str, Any] = {}
    for name in options.variants:
        config = _config(options, name)
        model = build_model(config, NUM_DENSE, table_rows, table_weight=shared).train()
        shared = model.tables.weight.detach()
        variants[name] = _Torch(model, world) if name == "dense" else _Ours(model, config, world)
    return variants


def measure(options: BenchExchangeConfig, path: Path, interface: str, world: World) -> dict[str, Any]:
    """This rank's figures of each variant."""
    table_rows = ARCHITECTURES[options.arch].scaled(options.rows_scale)
    split = write_split(
        path / f"data{world.rank}", _BATCHES * options.batch_size, NUM_DENSE, table_rows, options.seed + world.rank
    )
    batches = endless(split, options.batch_size, "block", options.seed)
    variants = _variants(options, table_rows, world)
    ms: dict[str, list[float]] = {name: [] for name in variants}
    wire, done, order = dict.fromkeys(variants, 0), dict.fromkeys(variants, 0), random.Random(options.seed)
    cpu = dict.fromkeys(variants, 0.0)
    wanted = {name: options.dense_steps if name == "dense" else options.steps for name in variants}
    for name, variant in variants.items():
        for _ in range(1 if name == "dense" else options.warmup):
            variant.step(next(batches))
    before = {name: variant.totals() for name, variant in variants.items()}
    while unfinished := [name for name in variants if done[name] < wanted[name]]:
        if world.first:
            slowest = min(unfinished, key=lambda name: done[name] / wanted[name])
            note(path, f"steps of {slowest}", done[slowest], wanted[slowest])
        for name in order.sample(unfinished, len(unfinished)):
            turn = min(1 if name == "dense" else _TURN, wanted[name] - done[name])
            items = [next(batches) for _ in range(turn)]
            dist.barrier(world.group)
            sent, used = interface_bytes(interface)[1], time.process_time()
            for item in items:
                start = time.perf_counter()
                variants[name].step(item)
                ms[name].append(1e3 * (time.perf_counter() - start))
            cpu[name] += time.process_time() - used
            dist.barrier(world.group)
            wire[name] += interface_bytes(interface)[1] - sent
            done[name] += turn
    shares = world.size if interface == "lo" else 1  # on loopback all ranks send through one interface
    figures = {}
    for name, variant in variants.items():
        after, steps = variant.totals(), done[name]
        known = after["payload"] is not None
        parts = {
            part: (after["payload"][part] - before[name]["payload"][part]) / steps for part in after["payload"] or ()
        }
        figures[name] = {
            "title": _TITLES[name],
            "steps": steps,
            "ms": ms[name],
            "payload_bytes": sum(parts.values()) if known else None,
            "payload_parts": {part: round(count, 1) for part, count in parts.items()} if known else None,
            "counted_bytes": (after["counted"] - before[name]["counted"]) / steps if known else None,
            "waited_ms": 1e3 * (after["waited"] - before[name]["waited"]) / steps if known else None,
            "cpu_ms": 1e3 * cpu[name] / steps,
            "wire_bytes": wire[name] / shares / steps,
        }
    return figures


def note(path: Path, *progress: Any) -> None:
    beside = path / "progress.partial"
    beside.write_text(json.dumps(progress))
    os.replace(beside, path / "progress.json")


def main(folder: str, interface: str) -> None:
    """Measure as one rank of several."""
    path = Path(folder)
    options = BenchExchangeConfig(**json.loads((path / "options.json").read_text()))
    torch.set_num_threads(options.threads)
    with join() as world:
        figures = measure(options, path, interface, world)
        (path / f"rank{world.rank}.json").write_text(json.dumps(figures))
        dist.barrier(world.group)


if __name__ == "__main__":
    main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)  # threads of the process group may still want the interpreter, and would abort it
