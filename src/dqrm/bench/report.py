"""The tables that `dqrm bench` prints without --json."""

from collections.abc import Sequence
from typing import Any

from dqrm.bench.step import PARTS
from dqrm.console import figure, print_table, results, size


def print_step(result: dict[str, Any]) -> None:
    """What `run_step` measured."""
    settings, memory = result["settings"], result["memory"]
    columns = _times(3) | {
        "without data": ("median_excl_data_ms", 3), "cost": ("cost_ms", 3), "samples/s": ("per_second", None),
        "x baseline": ("ratio_to_baseline", 3), "x fp32": ("ratio_to_fp32", 3),
    }  # fmt: skip
    for batch_size in settings["batch_size"]:
        variants = [variant for variant in result["variants"] if variant["batch_size"] == batch_size]
        title = f"{settings['arch']}, {settings['table_rows']:,} table rows, batch {batch_size}: ms per training step"
        _print_variants(title, columns, variants)
        parts = [{"name": variant["name"], **variant["parts"]} for variant in variants]
        _print_variants(f"batch {batch_size}: ms of each part", {part: (part, 3) for part in PARTS}, parts)
    results.print(
        "Cost: median without data, plus the time of a batch when a whole epoch is read. Ratios compare costs; x fp32: "
        "to fp32 or\nfp32_bf16, whichever computes alike. Refreshes of periodic scales are in the mean (--json), "
        "hardly in the median."
    )
    results.print(
        f"Memory: {figure(memory['before_model_mb'], 0)} MB before the model, tables {figure(memory['tables_mb'], 0)} "
        f"MB, steady {figure(memory['steady_mb'], 0)} MB; model made in {memory['create_seconds']:.2f} s."
    )
    _print_machine(result["machine"])


def print_embedding(result: dict[str, Any]) -> None:
    """What `run_embedding` measured."""
    settings = result["settings"]
    title = f"{settings['rows']:,} x {settings['dim']} table, {settings['batch_size']} lookups"
    columns = {"steps": ("steps", None), **_times(4), "x ours": ("ratio_to_ours", 2)}
    _print_variants(f"{title}: ms per forward and backward", columns, result["variants"])
    _print_skipped(result)
    results.print("x ours: ratio of the medians. The refresh of our scale is in the mean (--json).")
    _print_machine(result["machine"])


def print_inference(result: dict[str, Any]) -> None:
    """What `run_inference` measured."""
    settings = result["settings"]
    title = f"{settings['arch']}, {settings['table_rows']:,} table rows, INT{settings['bits']}: ms per call"
    columns = {
        "batch": ("batch_size", None), "threads": ("threads", None), "calls": ("calls", None), **_times(3),
        "p99": ("p99_ms", 3), "rows/s": ("per_second", None), "x fp32": ("ratio_to_fp32", 2),
    }  # fmt: skip
    _print_variants(title, columns, result["variants"])
    _print_skipped(result)
    results.print("x fp32: rows per second, by the medians, over those of our FP32 model.")
    processes = [{"name": name.replace("_", ", "), **memory} for name, memory in result["memory"]["processes"].items()]
    columns = {
        "load": ("load_seconds", 4), "libraries": ("libraries_mb", 0), "loaded": ("loaded_mb", 0),
        f"{settings['scored_rows']:,} rows scored": ("scored_mb", 0), "own": ("anonymous_mb", 0),
    }  # fmt: skip
    _print_variants("a fresh process: seconds to load, resident MB", columns, processes, "variant, page cache")
    sizes = [f"artifact {size(result['artifact_bytes'])}"]
    if result["onnx_bytes"] is not None:
        sizes.append(f"ONNX {size(result['onnx_bytes'])}")
    results.print(
        "Resident memory that is not the process's own is pages of files, which the system takes back at need.\n"
        f"Files: {', '.join(sizes)}. "
        f"The same tables in FP32: {figure(result['memory']['fp32_tables_mb'], 0)} MB."
    )
    _print_machine({**result["machine"], "threads": " and ".join(map(str, settings["threads"]))})


def print_exchange(result: dict[str, Any]) -> None:
    """What `run_exchange` measured."""
    settings = result["settings"]
    title = (
        f"{settings['arch']}, {settings['table_rows']:,} table rows, {settings['ranks']} ranks x batch "
        f"{settings['batch_size']}, {settings['links']}: ms per step, bytes per step and rank"
    )
    columns = _times(1) | {
        "waited": ("waited_ms", 1), "cpu": ("cpu_ms", 1), "payload": ("payload_bytes", None),
        "counted": ("counted_bytes", None), "kernel's": ("wire_bytes", None), "x fp32": ("ratio_to_fp32", 3),
    }  # fmt: skip
    _print_variants(title, columns, result["variants"])
    results.print(
        "Payload: a rank's encoded gradients, counted once. Counted, kernel's: bytes sent to all other ranks, by our "
        "count and by the\nkernel's of the interface. x fp32: the median of the rounds' ratios."
    )
    _print_machine(result["machine"])


def print_sharded(result: dict[str, Any]) -> None:
    """What `run_sharded` measured."""
    settings = result["settings"]
    title = (
        f"{settings['tables']} tables of {settings['rows']:,} rows, {settings['sharding']}, {settings['ranks']} ranks "
        f"x batch {settings['batch_size']}, {settings['links']}: ms per step, bytes per step and rank"
    )
    columns = _times(1) | {
        "forward": ("forward_bytes", None), "backward": ("backward_bytes", None), "kernel's": ("wire_bytes", None),
        "fp32 / forward": ("forward_ratio", 2), "fp32 / backward": ("backward_ratio", 2),
        "x fp32": ("ratio_to_fp32", 3),
    }  # fmt: skip
    _print_variants(title, columns, result["variants"])
    results.print(
        "Forward, backward: bytes of rows and of their gradients that a rank gives to all-to-all for other ranks. "
        "Kernel's: all bytes\nsent, ids included, by the interface's counter. x fp32: the median of the rounds' ratios."
    )
    _print_machine(result["machine"])


Columns = dict[str, tuple[str, int | None]]


def _times(digits: int) -> Columns:
    return {"median": ("median_ms", digits), "p10": ("p10_ms", digits), "p90": ("p90_ms", digits)}


def _print_variants(title: str, columns: Columns, rows: Sequence[dict[str, Any]], first: str = "variant") -> None:
    """A table with the name of each row, then its figures: heading -> key and decimals; None: whole numbers."""

    def cell(value: float | None, digits: int | None) -> str:
        return figure(round(value)) if digits is None and value is not None else figure(value, digits or 0)

    cells = [[row["name"], *(cell(row[key], digits) for key, digits in columns.values())] for row in rows]
    print_table(title, [first, *columns], cells)


def _print_skipped(result: dict[str, Any]) -> None:
    for name, reason in result["skipped"].items():
        results.print(f"{name} skipped: {reason}")


def _print_machine(machine: dict[str, Any]) -> None:
    results.print(
        f"{machine['processor']}, {machine['threads']} threads, {machine['device']}, torch {machine['torch']}, "
        f"{machine['cpu_capability']}, native kernels: {'yes' if machine['native_kernels'] else 'no'}"
    )
