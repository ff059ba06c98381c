"""One rank of `dqrm bench sharded`: `python -m dqrm.bench.sharded_rank FOLDER INTERFACE`, started by `sharded`.

Reads FOLDER/options.json, leaves FOLDER/rank<N>.json.
"""

import json
import logging
import random
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import Tensor, nn
from torchrec import EmbeddingCollection, EmbeddingConfig, KeyedJaggedTensor
from torchrec.distributed.shard import shard
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise, table_wise
from torchrec.distributed.types import ShardingEnv

from dqrm.bench.config import BenchShardedConfig
from dqrm.bench.exchange_rank import interface_bytes, note
from dqrm.distributed.processes import join
from dqrm.distributed.world import World
from dqrm.torchrec import EmbeddingCollectionSharder

_TURN = 5  # steps of one variant before the next one's turn
_RATE = 0.1


class _Model:
    """Sharded tables, and a small MLP on their vectors whose gradients are not exchanged."""

    def __init__(self, options: BenchShardedConfig, dim: int, variant: str, world: World) -> None:
        self.sent = {"forward": 0, "backward": 0}
        self._names, self._rank = [f"f{table}" for table in range(options.tables)], world.rank
        fused = {"optimizer": EmbOptimType.EXACT_SGD, "learning_rate": _RATE}
        rows = None if variant == "fp32" else variant
        sharder = EmbeddingCollectionSharder(rows, rows and "int8", seed=options.seed, fused_params=fused)
        collection = EmbeddingCollection(
            tables=[
                EmbeddingConfig(name=f"t{t}", embedding_dim=dim, num_embeddings=options.rows, feature_names=[name])
                for t, name in enumerate(self._names)
            ]
        )
        whole = options.sharding == "table_wise"
        plan = {
            f"t{t}": table_wise(t % world.size, compute_kernel="fused") if whole else row_wise(compute_kernel="fused")
            for t in range(options.tables)
        }
        made = construct_module_sharding_plan(collection, plan, sharder, world.size, world.size, "cpu")
        env = ShardingEnv.from_process_group(dist.group.WORLD)
        self._tables = shard(collection, made, env, torch.device("cpu"), sharder)
        self._mlp = nn.Sequential(nn.Linear(options.tables * dim, 64), nn.ReLU(), nn.Linear(64, 1))
        self._optimizer = torch.optim.SGD(self._mlp.parameters(), _RATE)

    def step(self, ids: Tensor, labels: Tensor) -> None:
        lengths = torch.ones(ids.numel(), dtype=torch.int32)
        self._optimizer.zero_grad(set_to_none=True)
        with self._counted("forward"):
            found = self._tables(KeyedJaggedTensor(self._names, ids.view(-1), lengths=lengths))
            vectors = torch.cat([found[name].values() for name in self._names], 1)
        loss = F.binary_cross_entropy_with_logits(self._mlp(vectors)[:, 0], labels)
        with self._counted("backward"):
            loss.backward()
        self._optimizer.step()

    @contextmanager
    def _counted(self, way: str) -> Iterator[None]:
        """Count the bytes of floats and codes (ids are integers) that all-to-all takes from this rank for others."""
        collective = dist.all_to_all_single

        def counting(output: Tensor, input: Tensor, *others: Any, **named: Any) -> Any:
            if input.dtype in (torch.float32, torch.uint8):
                splits = named["input_split_sizes"]
                self.sent[way] += (sum(splits) - splits[self._rank]) * input.element_size()
            return collective(output, input, *others, **named)

        dist.all_to_all_single = counting
        try:
            yield
        finally:
            dist.all_to_all_single = collective


def measure(options: BenchShardedConfig, dim: int, path: Path, interface: str, world: World) -> dict[str, Any]:
    """This rank's figures of each variant at one dim."""
    torch.manual_seed(options.seed)
    models = {name: _Model(options, dim, name, world) for name in options.variants}
    draw = torch.Generator().manual_seed(options.seed + world.rank)
    ms: dict[str, list[float]] = {name: [] for name in models}
    wire, order = dict.fromkeys(models, 0), random.Random(options.seed)

    def batch() -> tuple[Tensor, Tensor]:
        ids = torch.randint(options.rows, (options.tables, options.batch_size), generator=draw)
        return ids, (torch.rand(options.batch_size, generator=draw) < 0.3).float()

    for model in models.values():
        for _ in range(options.warmup):
            model.step(*batch())
        model.sent.update(forward=0, backward=0)
    for done in range(0, options.steps, _TURN):
        if world.first:
            note(path, f"steps at dim {dim}", done, options.steps)
        batches = [batch() for _ in range(min(_TURN, options.steps - done))]
        for name in order.sample(list(models), len(models)):  # the same order on all ranks
            dist.barrier(world.group)
            sent = interface_bytes(interface)[1]
            for each in batches:
                start = time.perf_counter()
                models[name].step(*each)
                ms[name].append(1e3 * (time.perf_counter() - start))
            dist.barrier(world.group)
            wire[name] += interface_bytes(interface)[1] - sent
    shares = world.size if interface == "lo" else 1  # on loopback all ranks send through one interface
    return {
        f"{name}/{dim}": {
            "ms": ms[name],
            "forward_bytes": model.sent["forward"] / options.steps,
            "backward_bytes": model.sent["backward"] / options.steps,
            "wire_bytes": wire[name] / shares / options.steps,
        }
        for name, model in models.items()
    }


def main(folder: str, interface: str) -> None:
    """Measure as one rank of several."""
    path = Path(folder)
    logging.disable(logging.WARNING)  # TorchRec's, about kernels
    stored = json.loads((path / "options.json").read_text())
    stored |= {name: tuple(stored[name]) for name in ("dim", "variants")}
    options = BenchShardedConfig(**stored)
    torch.set_num_threads(options.threads)
    with join() as world:
        figures: dict[str, Any] = {}
        for dim in options.dim:
            figures |= measure(options, dim, path, interface, world)
        (path / f"rank{world.rank}.json").write_text(json.dumps(figures))
        dist.barrier(world.group)


if __name__ == "__main__":
    main(*sys.argv[1:])
