"""Payload and step time of 2 to 1024 ranks, computed from pieces that are measured here: the tables of
docs/distributed.md.

    python benchmarks/exchange_scaling.py             tables in Markdown
    python benchmarks/exchange_scaling.py --json      everything as JSON

Measured: rows that ranks look up and rows that all of them look up together (ids are drawn as `dqrm bench` draws
them), sizes of real messages, one rank's computation, encoding, summing and decoding, all on one thread. Computed:
bytes that a rank sends in a step, and

    step = computation + codecs + collectives * (ranks - 1) * message + bytes sent * 8 / rate

without overlap of computation and transfer. `message` is what a small message costs, measured between two processes on
loopback.
"""

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from dqrm.bench.config import ARCHITECTURES, NUM_DENSE, Architecture
from dqrm.bench.data import draw_ids
from dqrm.config import Config, ModelConfig
from dqrm.data.batches import Batch
from dqrm.distributed.codecs import Codec
from dqrm.distributed.dense import Bucket, MLPLayout
from dqrm.distributed.sparse import RowCodec, add_up, join, split
from dqrm.models.dlrm import DLRM
from dqrm.quant import row_codec
from dqrm.training.step import TrainStep

RANKS = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
RATES = {"1 Gbit/s": 1e9, "10 Gbit/s": 1e10, "100 Gbit/s": 1e11}
CODECS = ("fp32", "int8", "int4")
STRATEGIES = ("all_gather", "all_to_all", "sharded")
COLLECTIVES = {"all_gather": 2, "all_to_all": 4, "sharded": 6}
"""Of a step, two of them the MLP's. Sharded tables: lengths, ids, rows and their gradients."""


def seconds(action: Callable[[], Any], repeats: int = 7) -> float:
    """Median time of a call, after one that is not counted."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return float(np.median(times[1:]))


def rows_of(ids: np.ndarray, table_rows: tuple[int, ...]) -> torch.Tensor:
    """The rows that ids [B, T] look up, each once, rising: int64 [U]."""
    starts = np.concatenate([[0], np.cumsum(table_rows)[:-1]])
    return torch.from_numpy(np.unique(ids.astype(np.int64) + starts))


def gradient(rows: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    return rows, torch.randn(len(rows), dim)


def computation(arch: Architecture, table_rows: tuple[int, ...], batch: int, random: np.random.Generator) -> float:
    """Seconds of one rank's step without any exchange, on tables of this size."""
    config = Config(model=ModelConfig(arch.embedding_dim, arch.bottom_mlp, arch.top_mlp))
    step = TrainStep(DLRM(NUM_DENSE, table_rows, config=config.model, qat=config.quantization).train(), config)
    batches = [
        Batch(
            torch.from_numpy(random.random((batch, NUM_DENSE), np.float32)),
            torch.from_numpy(draw_ids(random, batch, table_rows)),
            (),
            torch.from_numpy((random.random(batch) < 0.25).astype(np.float32)),
        )
        for _ in range(60)
    ]
    return seconds(lambda: step(batches.pop(), 0.1), 50)


def dense(arch: Architecture, codec: Codec, ranks: int) -> dict[str, float]:
    """The MLP's part: payload, bytes sent, and seconds of a rank's encoding, summing and decoding."""
    model = DLRM(
        NUM_DENSE, [1] * len(arch.table_rows), config=ModelConfig(arch.embedding_dim, arch.bottom_mlp, arch.top_mlp)
    )
    parameters = [p for name, p in model.named_parameters() if not name.startswith("tables")]
    layout = MLPLayout([p.shape for p in parameters], 512 if codec.name == "int4" else 0)
    bucket = Bucket(layout, ranks, codec, torch.device("cpu"))
    flat, residual = torch.randn(layout.total), None if codec.lossless else torch.zeros(layout.total)
    sent = bucket.encode(flat, residual, 0)
    mine = sent[: bucket.sizes[0]]
    total = bucket.reduce(0, [mine] * ranks, residual, 0)
    # All owners' answers are alike; this one's stands for them.
    answers = list(sent.split(bucket.sizes))
    used = (
        seconds(lambda: bucket.encode(flat, residual, 0))
        + seconds(lambda: bucket.reduce(0, [mine] * ranks, residual, 0))
        + seconds(lambda: bucket.decode(answers, flat))
    )
    return {
        "payload": bucket.scale_bytes + bucket.value_bytes,
        "sent": sum(bucket.sizes[1:]) + (ranks - 1) * len(total),
        "seconds": used,
    }


def sparse(
    codec: RowCodec, strategy: str, ranks: int, own: list[torch.Tensor], union: torch.Tensor, dim: int
) -> dict[str, float]:
    """The tables' part, likewise. `own`: rows of a few of the ranks; `union`: of all of them."""
    gradients = [gradient(rows, dim) for rows in own]
    if strategy == "all_gather":
        messages = [codec.encode(*each)[0] for each in gradients]
        received = [messages[rank % len(messages)] for rank in range(ranks)]
        size = float(np.mean([len(message) for message in messages]))
        used = seconds(lambda: codec.encode(*gradients[0]), 5) + seconds(lambda: add_up(codec, received), 3)
        return {"payload": size, "sent": (ranks - 1) * (size + 8), "seconds": used}
    shares = [split(*each, ranks) for each in gradients]
    sizes = [sum(len(codec.encode(*part)[0]) for part in share) for share in shares]
    to_first = [codec.encode(*share[0])[0] for share in shares]
    received = [to_first[rank % len(to_first)] for rank in range(ranks)]
    totals = [codec.encode(*part)[0] for part in split(*gradient(union, dim), ranks)]
    first = gradient(union[union % ranks == 0], dim)
    used = (
        seconds(lambda: [codec.encode(*part) for part in split(*gradients[0], ranks)], 3)
        + seconds(lambda: add_up(codec, received), 3)
        + seconds(lambda: codec.encode(*first), 3)
        + seconds(lambda: join(codec, totals), 3)
    )
    payload = float(np.mean(sizes))
    sent = payload * (ranks - 1) / ranks + (ranks - 1) * (float(np.mean([len(total) for total in totals])) + 16)
    return {"payload": payload, "sent": sent, "seconds": used}


def sharded(name: str, ranks: int, lookups: int, dim: int) -> dict[str, float]:
    """Likewise, of tables that TorchRec shards row-wise: a rank looks up `lookups` rows, each anywhere, and as many are
    looked up in its shard. Rows have the codec, gradients INT8; FP32 has none. Ids take 8 bytes, lengths 4."""
    vectors, used, per_row = torch.randn(lookups, dim), 0.0, 0
    for direction in (name, "fp32" if name == "fp32" else "int8"):
        if direction == "fp32":
            per_row += 4 * dim
            continue
        codec = row_codec.RowCodec(dim, direction, stochastic=direction == "int8")
        message = codec.encode(vectors)
        used += seconds(lambda codec=codec: codec.encode(vectors)) + seconds(
            lambda codec=codec, message=message: codec.decode(message)
        )
        per_row += codec.row_bytes
    away = (ranks - 1) / ranks
    return {"payload": lookups * per_row, "sent": away * lookups * (per_row + 12), "seconds": used}


def _hop(rank: int, ranks: int, port: int, found: Any) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    sent, received = torch.zeros(8 * ranks, dtype=torch.uint8), torch.zeros(8 * ranks, dtype=torch.uint8)
    took = seconds(lambda: dist.all_to_all_single(received, sent), 300)
    if rank == 0:
        found.put(took / (ranks - 1))
    dist.barrier()
    dist.destroy_process_group()


def latency() -> float:
    """Seconds that a message between two processes of this machine takes: an all-to-all of 8 bytes."""
    import socket

    context = torch.multiprocessing.get_context("spawn")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    found = context.Queue()
    processes = [context.Process(target=_hop, args=(rank, 2, port, found)) for rank in range(2)]
    for process in processes:
        process.start()
    took = float(found.get())
    for process in processes:
        process.join()
    return took


def measure(arch: Architecture, batch: int, seed: int) -> dict[str, Any]:
    """All pieces, and what follows from them."""
    random, table_rows, dim = np.random.default_rng(seed), arch.table_rows, arch.embedding_dim
    weights = sum(table_rows) * dim
    compute, hop = computation(arch, arch.scaled(0.1), batch, random), latency()
    found: list[dict[str, Any]] = []
    for ranks in RANKS:
        ids = [draw_ids(random, batch, table_rows) for _ in range(ranks)]
        own, union = [rows_of(part, table_rows) for part in ids[:4]], rows_of(np.concatenate(ids), table_rows)
        # A dense all-reduce in FP32, in a ring: its payload is the whole model.
        mlp = dense(arch, Codec("fp32"), ranks)
        whole = 4 * weights + mlp["payload"]
        found.append(
            {"ranks": ranks, "codec": "fp32", "strategy": "dense", "payload": whole,
             "sent": 2 * (ranks - 1) / ranks * whole, "seconds": 0.0, "collectives": 2}
        )  # fmt: skip
        for name in CODECS:
            of_mlp = dense(arch, Codec(name), ranks)
            rows = RowCodec(table_rows, dim, Codec(name), per_row=name == "int4")
            for strategy in STRATEGIES:
                if strategy == "sharded":
                    of_tables = sharded(name, ranks, batch * len(table_rows), dim)
                else:
                    of_tables = sparse(rows, strategy, ranks, own, union, dim)
                both = {key: of_mlp[key] + of_tables[key] for key in of_mlp}
                found.append(
                    {"ranks": ranks, "codec": name, "strategy": strategy, **both, "collectives": COLLECTIVES[strategy]}
                )
        for each in found:
            if each["ranks"] == ranks:
                each["rows"], each["union"] = float(np.mean([len(part) for part in own])), len(union)
                fixed = compute + each["seconds"] + each["collectives"] * (ranks - 1) * hop
                each["step"] = {rate: fixed + each["sent"] * 8 / bits for rate, bits in RATES.items()}
    return {"batch": batch, "compute": compute, "hop": hop, "results": found}


def print_tables(found: dict[str, Any], name: str) -> None:
    """Markdown."""
    print(
        f"{name}, batch {found['batch']} per rank: computation {1e3 * found['compute']:.2f} ms, a "
        f"message {1e6 * found['hop']:.0f} us.\n"
    )
    at = {(each["ranks"], each["codec"], each["strategy"]): each for each in found["results"]}
    print(
        "| ranks | rows of a rank | rows of all | "
        + " | ".join(f"{codec} {s}" for codec in CODECS for s in STRATEGIES)
        + " |"
    )
    print("|---" * (3 + len(CODECS) * len(STRATEGIES)) + "|")
    for ranks in RANKS:
        one = at[ranks, "fp32", "all_gather"]
        cells = [f"{at[ranks, codec, s]['sent'] / 1e6:,.2f}" for codec in CODECS for s in STRATEGIES]
        print(f"| {ranks} | {one['rows']:,.0f} | {one['union']:,} | " + " | ".join(cells) + " |")
    titles = [f"{codec} {strategy}" for codec in CODECS for strategy in STRATEGIES]
    print("\nMB of payload: of a rank's encoded gradients, counted once\n")
    print(f"| ranks | {' | '.join(titles)} |")
    print("|---" * (1 + len(titles)) + "|")
    for ranks in RANKS:
        cells = [f"{at[ranks, codec, s]['payload'] / 1e6:.3f}" for codec in CODECS for s in STRATEGIES]
        print(f"| {ranks} | {' | '.join(cells)} |")
    for rate in RATES:
        print(f"\n{rate}: ms per step (thousand samples per second of all ranks)\n")
        columns = [("fp32", "dense"), *((codec, s) for codec in CODECS for s in STRATEGIES)]
        print("| ranks | " + " | ".join(f"{codec} {s}" for codec, s in columns) + " |")
        print("|---" * (1 + len(columns)) + "|")
        for ranks in RANKS:
            cells = []
            for codec, strategy in columns:
                step = at[ranks, codec, strategy]["step"][rate]
                cells.append(f"{1e3 * step:,.1f} ({found['batch'] * ranks / step / 1e3:,.0f})")
            print(f"| {ranks} | " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--arch", choices=ARCHITECTURES, default="kaggle")
    parser.add_argument("--batch-size", type=int, default=128, help="samples per rank")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = measure(ARCHITECTURES[options.arch], options.batch_size, options.seed)
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        print_tables(found, options.arch)


if __name__ == "__main__":
    main()
