"""Several configurations, several seeds, one table: means and spreads instead of one lucky run.

    python -m dqrm.studies.seeds data/ml1m configs/ml1m_fp32.yaml configs/ml1m_int4.yaml --seeds 1,2,3 -o runs/ml1m

Each run lands in a folder of its own below the output and can be killed and continued: finished runs are not repeated,
the others are resumed. Test figures are those of the epoch that validation chose.
"""

import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import active_children, get_context
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import click

from dqrm.config import Config
from dqrm.console import figure, messages, print_json, print_table, results
from dqrm.data.dataset import Dataset
from dqrm.errors import UserError
from dqrm.process import STOPPED, run_command
from dqrm.training.loop import Interrupted
from dqrm.training.metrics import METRICS, legend


def run_one(data: str, config_file: str, seed: int, output: str, threads: int) -> dict[str, Any]:
    """Train, continue or just read the run of one configuration and seed; returns its summary."""
    from dqrm.training.launch import resolved, resume, train
    from dqrm.training.run import Run

    dataset = Dataset(data)
    config = resolved(Config.load(config_file, {"seed": seed, "threads": threads}), dataset)
    if not (Path(output) / "run.json").exists():
        return train(dataset, output, config)
    begun = Run.open(output).config
    if replace(begun, training=replace(begun.training, threads=threads)) != config:
        raise UserError(
            f"{output} was started with a different configuration than {config_file}; name another folder with -o"
        )
    return resume(output, dataset)


def summarize(summaries: list[dict[str, Any]]) -> dict[str, Any]:
    """Test figures over seeds: each metric's mean, standard deviation and values; the epochs chosen; speed; size."""
    names = [name for name in METRICS if all(summary["test"].get(name) is not None for summary in summaries)]
    values = {name: [summary["test"][name] for summary in summaries] for name in names}
    return {
        "seeds": [summary["seed"] for summary in summaries],
        "epochs": [summary["best"]["epoch"] for summary in summaries],
        "test": {
            name: {"mean": mean(metric), "stdev": stdev(metric) if len(metric) > 1 else 0.0, "values": metric}
            for name, metric in values.items()
        },
        "stored_bytes": summaries[0]["stored_bytes"]["total"],
        "samples_per_second": mean(summary["samples_per_second"] for summary in summaries),
    }


def _require_figures(dataset: Dataset) -> None:
    """Raise UserError unless the test split gives all figures of the table."""
    rows, clicks = dataset.rows["test"], dataset.info["clicks"]["test"]
    if clicks in (0, rows):
        raise UserError(
            f"the test split of {dataset.path} has {rows} rows and {clicks} clicks, expected rows of both labels"
        )


@click.command()
@click.argument("data")
@click.argument("configs", nargs=-1, required=True)
@click.option("--seeds", default="1,2,3", show_default=True, help="Seeds, joined by commas.")
@click.option("-o", "--output", required=True, help="Folder for the runs.")
@click.option("--jobs", type=click.IntRange(1), default=1, show_default=True, help="Runs at the same time.")
@click.option("--threads", type=click.IntRange(0), default=1, show_default=True, help="CPU threads of each run.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
def main(data: str, configs: tuple[str, ...], seeds: str, output: str, jobs: int, threads: int, as_json: bool) -> None:
    """Train each of CONFIGS on DATA with each seed, and print the test figures' means and spreads."""
    stems = [Path(config).stem for config in configs]
    if twice := [stem for stem in stems if stems.count(stem) > 1]:
        raise UserError(f"two configurations are named {twice[0]}, and their runs would share a folder; rename one")
    given = seeds.split(",")
    if wrong := [seed for seed in given if not seed.strip().isdecimal()]:
        raise UserError(f"--seeds {seeds} holds '{wrong[0]}', expected whole numbers joined by commas, as 1,2,3")
    _require_figures(Dataset(data))
    tasks = [(config, int(seed)) for seed in given for config in configs]
    summaries: dict[str, list[dict[str, Any]]] = {}
    # Spawned, since torch's threads do not survive a fork.
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        futures = {
            (config, seed): pool.submit(run_one, data, config, seed, f"{output}/{Path(config).stem}-{seed}", threads)
            for config, seed in tasks
        }
        try:
            for (config, seed), future in futures.items():
                summary = future.result()
                summaries.setdefault(Path(config).stem, []).append(summary)
                messages.print(
                    f"{config}, seed {seed}: test AUC {summary['test']['auc']:.5f}, epoch {summary['best']['epoch']}"
                )
        except BaseException as error:
            for future in futures.values():
                future.cancel()
            for process in active_children():  # a run that is stopped so saves a checkpoint first
                process.terminate()
            if not isinstance(error, (KeyboardInterrupt, Interrupted)):
                raise
            messages.print("Stopped; the same command continues where the runs stand.")
            sys.exit(STOPPED)
    result = {name: summarize(study) for name, study in summaries.items()}
    if as_json:
        print_json(result)
        return
    names = [name for name in METRICS if all(name in found["test"] for found in result.values())]
    header = ["", "epochs", *(name.replace("_", " ") for name in names)]
    rows = [
        [
            name,
            " ".join(map(str, study["epochs"])),
            *(f"{figure(study['test'][m]['mean'])} ± {figure(study['test'][m]['stdev'])}" for m in names),
        ]
        for name, study in result.items()
    ]
    print_table(f"Test, mean ± standard deviation over seeds {seeds}", header, rows)
    results.print(legend(names))


if __name__ == "__main__":
    run_command(main, "dqrm.studies.seeds")
