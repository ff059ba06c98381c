"""`dqrm bench step`: whole training steps of several variants, alternating in one process.

Variants without scales, or with periodic ones, train the same FP32 tables, so that the full Kaggle model fits once and
its pages are warm for all; each reads its own batches, so that none finds rows in the caches that another just looked
up. With running_max, and with tables in BF16 or INT8, each has tables of its own.
"""

import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dqrm.bench.config import ARCHITECTURES, BASELINE, NUM_DENSE, SCHEMES, BenchStepConfig, Scheme
from dqrm.bench.data import endless, write_split
from dqrm.bench.measure import Clock, machine, median, peak_rss_mb, require_memory, rss_mb, spread
from dqrm.bench.variants import LEARNING_RATE, Ours, Plain, Variant, training_config
from dqrm.data.batches import Split
from dqrm.errors import UserError
from dqrm.kernels import native
from dqrm.models.registry import build_model
from dqrm.quant.config import STORAGES, registered
from dqrm.quant.storage import storage_of
from dqrm.training.environment import Progress, resolve_device
from dqrm.training.threads import threads_set

PARTS = ("data", "lookup", "forward", "backward", "update")
_TOUCHED_ROWS = 4096
# Bytes of optimizer state per weight and per row of the tables, for the check of memory; others: as adam.
_STATE_BYTES = {
    "sgd": (0, 0), "adagrad": (4, 0), "rowwise_adagrad": (0, 4), "counter_adagrad": (0, 12),
    "frequency_adagrad": (0, 8), "rowwise_adam": (4, 8), "adam": (8, 4),
}  # fmt: skip


@dataclass
class Times:
    """Milliseconds of the measured steps of one variant at one batch size."""

    data: list[float] = field(default_factory=list)
    step: list[float] = field(default_factory=list)
    parts: dict[str, list[float]] = field(default_factory=lambda: {part: [] for part in PARTS})


def run_step(options: BenchStepConfig, progress: Progress | None = None) -> dict[str, Any]:
    """Measure what `options` says; returns the object that --json prints.

    Raises:
        UserError: the tables do not fit in memory, or a variant's loss is not finite.
    """
    progress = progress or (lambda *_: None)
    device = resolve_device(options.device)
    with threads_set(options.threads), tempfile.TemporaryDirectory(prefix="dqrm-bench-") as path:
        return _run(options, device, Path(path), progress)


def _run(options: BenchStepConfig, device: torch.device, path: Path, progress: Progress) -> dict[str, Any]:
    arch = ARCHITECTURES[options.arch]
    table_rows = arch.scaled(options.rows_scale)
    values = sum(table_rows) * arch.embedding_dim
    own = [SCHEMES[name] for name in options.variants if name in SCHEMES and SCHEMES[name].own_tables]
    storages = [registered(scheme.table_dtype, STORAGES) for scheme in own]
    tables = sum(storage.memory_bytes(sum(table_rows), arch.embedding_dim) for storage in storages)
    needed = tables + 4 * values * (len(own) < len(options.variants))
    ours = sum(name != BASELINE for name in options.variants)
    per_weight, per_row = _STATE_BYTES.get(options.optimizer, _STATE_BYTES["adam"])
    require_memory(needed + ours * (values * per_weight + sum(table_rows) * per_row), device)
    rows = max(options.samples, 16 * max(options.batch_size))
    progress("generating data", 0, None)
    split = write_split(path / "data", rows, NUM_DENSE, table_rows, options.seed)

    # Costs that belong to no variant: compiling the kernels, and torch's import of its compiler by the first optimizer
    # (80 MB).
    about = machine(device, native())
    torch.optim.SGD([nn.Parameter(torch.zeros(1))], LEARNING_RATE)
    clock, memory = Clock(device), {"before_model_mb": rss_mb(), "tables_mb": round(needed / 1e6, 1)}
    progress("creating the model", 0, None)
    variants = _variants(options, table_rows, clock, memory)
    memory["after_model_mb"] = rss_mb()
    if device.type == "cpu":
        _touch(split, [variant.tables for variant in variants if isinstance(variant, Ours)])

    results: list[dict[str, Any]] = []
    for batch_size in options.batch_size:
        times = measure(variants, split, batch_size, options, clock, progress)
        memory["steady_mb"] = rss_mb()
        results += _results(variants, times, split, batch_size, options, clock)
    settings = {
        **asdict(options),
        "learning_rate": training_config(options, Scheme(bits=32)).optimizer.rate,
        "table_rows": sum(table_rows),
        "data_rows": rows,
        "cost_ms": "median without data + the time of a batch when a whole epoch is read; the ratios compare it",
    }
    return {"variants": results, "machine": about, "settings": settings, "memory": memory}


def _variants(
    options: BenchStepConfig, table_rows: Sequence[int], clock: Clock, memory: dict[str, Any]
) -> list[Variant]:
    """The variants in the order of `options`; all that can share the tables of the first."""
    shared: Tensor | None = None
    variants: list[Variant] = []
    for name in options.variants:
        scheme = SCHEMES.get(name, Scheme(bits=32))
        if name != BASELINE or shared is None:
            start, config = clock(), training_config(options, scheme)
            model = build_model(config, NUM_DENSE, table_rows, table_weight=None if scheme.own_tables else shared)
            model.to(clock.device)
            memory.setdefault("create_seconds", round((clock() - start) / 1e3, 3))
            if shared is None and not scheme.own_tables:
                shared = model.tables.weight.detach()
        if name == BASELINE:
            assert shared is not None
            variants.append(
                Plain(name, ARCHITECTURES[options.arch], torch.split(shared, list(table_rows)), clock.device)
            )
        else:
            variants.append(Ours(name, config, model, clock.device))
    return variants


@torch.no_grad()
def _touch(split: Split, collections: Sequence[Any]) -> None:
    """Read every row that the steps will read once, so that no measured step is the first to touch a page."""
    memory = {storage_of(tables.weight).memory(tables.weight).data_ptr(): tables for tables in collections}
    for collection in memory.values():
        for batch in split.batches(_TOUCHED_ROWS):
            collection.weight.index_select(0, (batch.ids + collection.row_offsets).reshape(-1))


def measure(
    variants: Sequence[Variant],
    split: Split,
    batch_size: int,
    options: BenchStepConfig,
    clock: Callable[[], float],
    progress: Progress,
) -> list[Times]:
    """Times of each variant: warm-up, measured steps, then steps part by part; in random order within each round."""
    times = [Times() for _ in variants]
    order, shuffler = list(zip(variants, times)), random.Random(options.seed)
    for number, variant in enumerate(variants):
        variant.batches = endless(split, batch_size, options.shuffle, options.seed + 1 + number)
    label = f"batch {batch_size}"
    for done in range(options.warmup):
        progress(f"{label}: warm-up", done, options.warmup)
        for variant, _ in order:
            variant.step(variant.prepare(next(variant.batches)))
    for done in range(options.steps):
        progress(f"{label}: steps", done, options.steps)
        for variant, taken in shuffler.sample(order, len(order)):
            start = clock()
            batch = variant.prepare(next(variant.batches))
            read = clock()
            variant.step(batch)
            taken.data.append(read - start)
            taken.step.append(clock() - read)
    rounds = max(5, min(30, options.steps // 3))
    for done in range(rounds):
        progress(f"{label}: parts of a step", done, rounds)
        for variant, taken in shuffler.sample(order, len(order)):
            _step_in_parts(variant, taken.parts, clock)
    for variant in variants:
        if not torch.isfinite(variant.loss):
            raise UserError(f"the loss of {variant.name} is {float(variant.loss)} at batch size {batch_size}")
    return times


def _step_in_parts(variant: Variant, parts: dict[str, list[float]], clock: Callable[[], float]) -> None:
    """One step, with the clock read between its parts."""
    marks = [clock()]
    inside: list[float] = []
    hooks = [
        variant.tables.register_forward_pre_hook(lambda *_: inside.append(clock())),
        variant.tables.register_forward_hook(lambda *_: inside.append(clock())),
    ]
    batch = variant.prepare(next(variant.batches))
    marks.append(clock())
    loss = variant.forward(batch)
    marks.append(clock())
    variant.backward(loss)
    marks.append(clock())
    variant.update()
    marks.append(clock())
    for hook in hooks:
        hook.remove()
    data, forward, backward, update = (after - before for before, after in pairwise(marks))
    lookup = inside[1] - inside[0]
    for part, took in zip(PARTS, (data, lookup, forward - lookup, backward, update)):
        parts[part].append(took)


def _data_ms(variant: Variant, split: Split, batch_size: int, options: BenchStepConfig, clock: Clock) -> float:
    """Time to read one batch, over a whole epoch: the reader gathers many batches at once, which a median misses."""
    variant.batches = split.batches(batch_size, shuffle=options.shuffle, seed=options.seed, drop_last=True)
    start = clock()
    for batch in variant.batches:
        variant.prepare(batch)
    return (clock() - start) / split.num_batches(batch_size, drop_last=True)


def _results(
    variants: Sequence[Variant],
    times: Sequence[Times],
    split: Split,
    batch_size: int,
    options: BenchStepConfig,
    clock: Clock,
) -> list[dict[str, Any]]:
    """One object per variant, ratios included."""
    results: dict[str, dict[str, Any]] = {}
    for variant, taken in zip(variants, times):
        data = _data_ms(variant, split, batch_size, options, clock)
        parts = {part: median(taken.parts[part]) for part in PARTS} | {"data": data}
        results[variant.name] = {
            "name": variant.title or variant.name,
            "variant": variant.name,
            "batch_size": batch_size,
            "steps": len(taken.step),
            **spread([sum(pair) for pair in zip(taken.data, taken.step)], batch_size),
            "median_excl_data_ms": round(median(taken.step), 4),
            "cost_ms": round(median(taken.step) + data, 4),
            "parts": {part: round(value, 4) for part, value in parts.items()},
            "loss": float(variant.loss),
            "table_bytes": variant.table_bytes,
            "peak_rss_mb": peak_rss_mb(),
        }
        if clock.device.type == "cuda":
            results[variant.name]["peak_device_mb"] = round(torch.cuda.max_memory_allocated(clock.device) / 1e6, 1)
    for name, result in results.items():
        reference = SCHEMES[name].reference if name in SCHEMES else "fp32"
        result["ratio_to_baseline"] = _ratio(result, results.get(BASELINE))
        result["ratio_to_fp32"] = _ratio(result, results.get(reference))
    return list(results.values())


def _ratio(result: dict[str, Any], other: dict[str, Any] | None) -> float | None:
    return round(result["cost_ms"] / other["cost_ms"], 4) if other and other["cost_ms"] else None
