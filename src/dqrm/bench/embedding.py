"""`dqrm bench embedding`: one table, forward and backward, quantized in the rows in use or as a whole.

No optimizer runs: what other modules leave behind is a dense gradient, whose update would cost yet more.
"""

import random
import warnings
from collections.abc import Callable
from dataclasses import asdict
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from dqrm.bench.baseline import WholeTableQAT
from dqrm.bench.config import BenchEmbeddingConfig
from dqrm.bench.measure import Clock, machine, peak_rss_mb, spread
from dqrm.kernels import native
from dqrm.quant.embedding import QuantEmbeddingBag, QuantEmbeddingBagCollection
from dqrm.training.environment import Progress, resolve_device
from dqrm.training.threads import threads_set

TITLES = {
    "ours": "active rows, ours",
    "collection": "active rows, ours, collection",
    "fp32": "nn.EmbeddingBag FP32, sparse",
    "whole_table": "whole-table QAT, plain torch",
    "torch_ao": "torch.ao.nn.qat.EmbeddingBag",
    "torchao": "torchao FakeQuantizedEmbedding",
}
_WARMUP = 3


class Unavailable(Exception):
    """A variant that cannot be measured here; the message says why."""


def run_embedding(options: BenchEmbeddingConfig, progress: Progress | None = None) -> dict[str, Any]:
    """Measure what `options` says; returns the object that --json prints."""
    progress = progress or (lambda *_: None)
    with threads_set(options.threads):
        return _run(options, resolve_device(options.device), progress)


def _run(options: BenchEmbeddingConfig, device: torch.device, progress: Progress) -> dict[str, Any]:
    torch.manual_seed(options.seed)
    modules: dict[str, nn.Module] = {}
    skipped: dict[str, str] = {}
    progress("creating the tables", 0, None)
    for name in options.variants:
        try:
            modules[name] = BUILDERS[name](options).to(device).train()
        except Unavailable as reason:
            skipped[name] = str(reason)
    clock = Clock(device)
    times = measure(modules, options, clock, progress)

    spreads = {name: spread(taken, options.batch_size) for name, taken in times.items()}
    ours = spreads["ours"]["median_ms"] if "ours" in spreads else None
    variants = [
        {
            "name": TITLES[name],
            "variant": name,
            "steps": len(times[name]),
            **figures,
            "peak_rss_mb": peak_rss_mb(),
            "ratio_to_ours": round(figures["median_ms"] / ours, 3) if ours else None,
        }
        for name, figures in spreads.items()
    ]
    return {"variants": variants, "machine": machine(device, native()), "settings": asdict(options), "skipped": skipped}


def measure(
    modules: dict[str, nn.Module], options: BenchEmbeddingConfig, clock: Clock, progress: Progress
) -> dict[str, list[float]]:
    """Milliseconds of each variant's steps, variants in random order within each round.

    Variants that touch the whole table run in a tenth of the rounds.
    """
    times: dict[str, list[float]] = {name: [] for name in modules}
    draw = torch.Generator().manual_seed(options.seed)
    shuffler, slow = random.Random(options.seed), min(options.repeats, max(10, options.repeats // 10))
    for done in range(options.repeats):
        progress("steps", done, options.repeats)
        for name in shuffler.sample(list(modules), len(modules)):
            if name not in FAST and (done * slow) // options.repeats == ((done - 1) * slow) // options.repeats:
                continue
            for _ in range(1 if times[name] else 1 + _WARMUP):
                # Drawn on the CPU for all, so that every device looks up the same rows.
                ids = torch.randint(0, options.rows, (options.batch_size, 1), generator=draw).to(clock.device)
                took = _step(modules[name], ids, clock)
            times[name].append(took)
    return times


def _step(module: nn.Module, ids: Tensor, clock: Clock) -> float:
    """Time of one forward and backward."""
    module.zero_grad(set_to_none=True)
    start = clock()
    module(ids).sum().backward()
    return clock() - start


def _torch_ao(options: BenchEmbeddingConfig) -> nn.Module:
    if options.bits not in (4, 8):
        raise Unavailable(f"it has no default configuration of {options.bits} bits")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated in favour of torchao, which is measured too
            from torch.ao.nn.qat.modules.embedding_ops import EmbeddingBag
            from torch.ao.quantization import qconfig
    except ImportError as error:
        raise Unavailable(f"this torch does not have it ({error})") from None
    config = qconfig.default_embedding_qat_qconfig_4bit if options.bits == 4 else qconfig.default_embedding_qat_qconfig
    return EmbeddingBag(options.rows, options.dim, mode="sum", qconfig=config)


def _torchao(options: BenchEmbeddingConfig) -> nn.Module:
    if options.bits not in (4, 8):
        raise Unavailable(f"it has no integer type of {options.bits} bits for weights")
    try:
        qat = import_module("torchao.quantization.qat")
        embedding = import_module("torchao.quantization.qat.embedding")
    except ImportError as error:
        raise Unavailable(f"not installed ({error})") from None
    # One scale per row: the group must divide the dim.
    dtype = torch.int4 if options.bits == 4 else torch.int8  # type: ignore[attr-defined]
    config = qat.IntxFakeQuantizeConfig(dtype, group_size=options.dim)
    made: nn.Module = embedding.FakeQuantizedEmbedding(options.rows, options.dim, weight_config=config)
    return made


BUILDERS: dict[str, Callable[[BenchEmbeddingConfig], nn.Module]] = {
    "ours": lambda given: QuantEmbeddingBag(
        given.rows, given.dim, mode="sum", sparse=True, bits=given.bits, scale_period=given.scale_period
    ),
    "collection": lambda given: QuantEmbeddingBagCollection(
        [given.rows], given.dim, bits=given.bits, scale_period=given.scale_period
    ),
    "fp32": lambda given: nn.EmbeddingBag(given.rows, given.dim, mode="sum", sparse=True),
    "whole_table": lambda given: WholeTableQAT(given.rows, given.dim, given.bits),
    "torch_ao": _torch_ao,
    "torchao": _torchao,
}
FAST = ("ours", "collection", "fp32")
