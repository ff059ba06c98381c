"""The tables that `dqrm bench` prints without --json."""

from typing import Any

from dqrm.bench.step import PARTS
from dqrm.console import figure, print_table, results, size


def print_step(result: dict[str, Any]) -> None:
    """What `run_step` measured."""
    settings, memory = result["settings"], result["memory"]
    for batch_size in settings["batch_size"]:
        variants = [variant for variant in result["variants"] if variant["batch_size"] == batch_size]
        print_table(
            f"{settings['arch']}, {settings['table_rows']:,} table rows, batch {batch_size}: ms per training step",
            ["variant", "median", "p10", "p90", "without data", "cost", "samples/s", "x baseline", "x fp32"],
            [
                [
                    variant["name"],
                    *(figure(variant[name], 3) for name in ("median_ms", "p10_ms", "p90_ms", "median_excl_data_ms")),
                    figure(variant["cost_ms"], 3),
                    f"{variant['per_second']:,.0f}",
                    *(figure(variant[name], 3) for name in ("ratio_to_baseline", "ratio_to_fp32")),
                ]
                for variant in variants
            ],
        )
        print_table(
            f"batch {batch_size}: ms of each part",
            ["variant", *PARTS],
            [[variant["name"], *(figure(variant["parts"][part], 3) for part in PARTS)] for variant in variants],
        )
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
    print_table(
        f"{settings['rows']:,} x {settings['dim']} table, {settings['batch_size']} lookups: "
        "ms per forward and backward",
        ["variant", "steps", "median", "p10", "p90", "x ours"],
        [
            [
                variant["name"],
                figure(variant["steps"]),
                *(figure(variant[name], 4) for name in ("median_ms", "p10_ms", "p90_ms")),
                figure(variant["ratio_to_ours"], 2),
            ]
            for variant in result["variants"]
        ],
    )
    for name, reason in result["skipped"].items():
        results.print(f"{name} skipped: {reason}")
    results.print("x ours: ratio of the medians. The refresh of our scale is in the mean (--json).")
    _print_machine(result["machine"])


def print_inference(result: dict[str, Any]) -> None:
    """What `run_inference` measured."""
    settings = result["settings"]
    print_table(
        f"{settings['arch']}, {settings['table_rows']:,} table rows, INT{settings['bits']}: ms per call",
        ["variant", "batch", "threads", "calls", "median", "p10", "p90", "p99", "rows/s", "x fp32"],
        [
            [
                variant["name"],
                *(figure(variant[name]) for name in ("batch_size", "threads", "calls")),
                *(figure(variant[name], 3) for name in ("median_ms", "p10_ms", "p90_ms", "p99_ms")),
                f"{variant['per_second']:,.0f}",
                figure(variant["ratio_to_fp32"], 2),
            ]
            for variant in result["variants"]
        ],
    )
    for name, reason in result["skipped"].items():
        results.print(f"{name} skipped: {reason}")
    results.print("x fp32: rows per second, by the medians, over those of our FP32 model.")
    print_table(
        "a fresh process: seconds to load, resident MB",
        ["variant, page cache", "load", "libraries", "loaded", f"{settings['scored_rows']:,} rows scored", "own"],
        [
            [
                name.replace("_", ", "),
                figure(memory["load_seconds"]),
                *(figure(memory[key], 0) for key in ("libraries_mb", "loaded_mb", "scored_mb", "anonymous_mb")),
            ]
            for name, memory in result["memory"]["processes"].items()
        ],
    )
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
    print_table(
        f"{settings['arch']}, {settings['table_rows']:,} table rows, {settings['ranks']} ranks x batch "
        f"{settings['batch_size']}, {settings['links']}: ms per step, bytes per step and rank",
        [
            "variant",
            "median",
            "p10",
            "p90",
            "waited",
            "cpu",
            "payload",
            "counted",
            "kernel's",
            "x fp32",
        ],
        [
            [
                variant["name"],
                *(figure(variant[name], 1) for name in ("median_ms", "p10_ms", "p90_ms", "waited_ms", "cpu_ms")),
                *(
                    "-" if variant[name] is None else f"{variant[name]:,.0f}"
                    for name in ("payload_bytes", "counted_bytes", "wire_bytes")
                ),
                figure(variant["ratio_to_fp32"], 3),
            ]
            for variant in result["variants"]
        ],
    )
    results.print(
        "Payload: a rank's encoded gradients, counted once. Counted, kernel's: bytes sent to all other ranks, by our "
        "count and by the\nkernel's of the interface. x fp32: the median of the rounds' ratios."
    )
    _print_machine(result["machine"])


def _print_machine(machine: dict[str, Any]) -> None:
    results.print(
        f"{machine['processor']}, {machine['threads']} threads, {machine['device']}, torch {machine['torch']}, "
        f"{machine['cpu_capability']}, native kernels: {'yes' if machine['native_kernels'] else 'no'}"
    )
