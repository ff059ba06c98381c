"""Next-day AUC of models that start from yesterday's, and of models trained from scratch, on generated days with drift.

    python benchmarks/daily_drift.py -o drift

In the log (`dqrm generate --like criteo-kaggle`) popularity and ids drift from day to day. A model of day d is
evaluated on all rows of day d + 1, as `dqrm daily` does. Arms:

    warm     `train --from` the model of the day before, on the day alone; vocabularies are extended
    day      from scratch on the day alone
    last3    from scratch on the last three days
    all      from scratch on all days so far

with a suffix for tables stored otherwise (`warm/int8`). Whatever is not set is dqrm's default, INT4 QAT. Seconds are
those of the processor in `train`, so that they also mean something on a busy machine. Results are kept in a file for
each arm, seed and day: the same command goes on where it was stopped.
"""

import argparse
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import mean, stdev
from typing import Any

ARMS = ["day", "last3", "all", "warm", "warm/int8", "warm/int4"]
WINDOWS = {"day": 1, "last3": 3, "all": 10_000}
FIXED: dict[str, Any] = {
    "bottom_mlp": [64, 32, 16], "top_mlp": [64, 32, 1], "batch_size": 512, "patience": 1, "threads": 1,
    "checkpoint_minutes": 0.0, "log_every": 0,
}  # fmt: skip


@dataclass
class Seed:
    """The models of one seed, and the log and the datasets that all have in common."""

    seed: int
    folder: Path
    options: argparse.Namespace

    def log(self, day: int) -> Path:
        """The log of a day, generated with all others."""
        from dqrm.data.synthetic import generate
        from dqrm.data.synthetic_config import GenerateConfig

        logs, days = self.folder.parent / "logs", self.options.days
        if not logs.exists():
            rows = self.options.rows * days
            config = GenerateConfig(rows, like="criteo-kaggle", days=days, drift=self.options.drift)
            generate(logs, config)
        return logs / f"day_{day}"

    def dataset(self, name: str, days: Sequence[int], extend: Path | None = None) -> Path:
        """The dataset of these days, a tenth of whose rows is validation."""
        import dqrm

        path = self.folder.parent / "data" / name
        if not path.exists():
            columns = dqrm.PrepareConfig(
                layout="criteo-kaggle", split="random", validation_fraction=0.1, test_fraction=0.0,
                extend=None if extend is None else str(extend),
            )  # fmt: skip
            path.parent.mkdir(exist_ok=True)
            dqrm.prepare([self.log(day) for day in days], path, columns)
        return path

    def chained(self, day: int) -> Path:
        """The dataset of a day that extends those of all days before."""
        return self.dataset(f"chain_{day}", [day], self.chained(day - 1) if day else None)

    def result(self, arm: str, day: int) -> dict[str, Any]:
        """The model of an arm and a day: metrics on the next day, and what training it took."""
        name, _, storage = arm.partition("/")
        kept = self.folder / "results" / f"{arm.replace('/', '_')}_{day}.json"
        if name != "warm":
            first = max(0, day + 1 - WINDOWS[name])
            kept = kept.with_name(f"{first}_{day}_{storage or 'fp32'}.json")
        if kept.exists():
            return json.loads(kept.read_text())
        if name == "warm":
            found = self._warm(storage, day)
        else:
            data = self.dataset(f"{first}_{day}", range(first, day + 1))
            found = self._measured(data, self.folder / "run", storage, [], None)
            shutil.rmtree(self.folder / "run")
        kept.parent.mkdir(exist_ok=True)
        kept.write_text(json.dumps(found))
        return found

    def _warm(self, storage: str, day: int) -> dict[str, Any]:
        runs = self.folder / f"warm_{storage}"
        run, before = runs / str(day), runs / str(day - 1)
        if day and not (before / "summary.json").exists():
            raise SystemExit(f"{before} is gone; delete {self.folder / 'results'} of this arm")
        shutil.rmtree(run, ignore_errors=True)
        more, start = (self.options.warm, before) if day else ([], None)
        return self._measured(self.chained(day), run, storage, more, start)

    def _measured(self, data: Path, run: Path, storage: str, more: Sequence[str], start: Path | None) -> dict[str, Any]:
        import dqrm
        from dqrm.config import Config
        from dqrm.daily.scores import measure
        from dqrm.data.dataset import Dataset
        from dqrm.training.run import Run

        given = FIXED | {"seed": self.seed, "table_dtype": storage or "fp32"}
        config = Config.load(None, given | dict(pair.split("=", 1) for pair in more))
        shutil.rmtree(run, ignore_errors=True)
        began = time.process_time()
        summary = dqrm.train(data, run, config, start_from=start)
        seconds = time.process_time() - began
        last = int(data.name.rpartition("_")[2])
        chained = data.name.startswith("chain")
        after = self.chained(last + 1) if chained else self.dataset(f"{data.name}_{last + 1}", [last + 1], data)
        metrics = measure(Run.open(run), Dataset(after))
        return {
            "auc": metrics["auc"], "ne": metrics["ne"], "calibration": metrics["calibration"], "seconds": seconds,
            "epochs": summary["epochs"], "best_epoch": summary["best"]["epoch"],
        }  # fmt: skip


def table(found: dict[str, dict[int, list[dict[str, Any]]]]) -> list[dict[str, Any]]:
    """For each arm: mean next-day AUC of each seed, its mean and spread, NE, and seconds."""
    rows = []
    for arm, seeds in found.items():
        each = [mean(day["auc"] for day in days) for days in seeds.values()]
        every = [day for days in seeds.values() for day in days]
        rows.append(
            {
                "arm": arm,
                "auc": round(mean(each), 5),
                "stdev": round(stdev(each), 5) if len(each) > 1 else 0.0,
                "by_seed": [round(value, 5) for value in each],
                "by_day": [round(mean(days), 5) for days in zip(*([d["auc"] for d in s] for s in seeds.values()))],
                "ne": round(mean(day["ne"] for day in every), 5),
                "calibration": round(mean(day["calibration"] for day in every), 4),
                "seconds": round(sum(day["seconds"] for day in every) / len(seeds), 1),
            }
        )
    return rows


def main() -> None:
    """Train what is missing, and print the table and JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, required=True, help="Folder to make, or to go on with.")
    parser.add_argument("--rows", type=int, default=50_000, help="Lines of a day.")
    parser.add_argument("--days", type=int, default=7, help="Days; the last one is only evaluated on.")
    parser.add_argument("--drift", type=float, default=0.1, help="As of dqrm generate.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="Of training.")
    parser.add_argument("--arms", nargs="+", default=ARMS, help="See above.")
    parser.add_argument("--warm", nargs="*", default=[], metavar="FIELD=VALUE", help="Options of warm days only.")
    options = parser.parse_args()
    found: dict[str, dict[int, list[dict[str, Any]]]] = {arm: {} for arm in options.arms}
    for seed in options.seeds:
        folder = options.output / f"seed_{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        each = Seed(seed, folder, options)
        for arm in options.arms:
            found[arm][seed] = []
            for day in range(options.days - 1):
                found[arm][seed].append(each.result(arm, day))
                print(f"seed {seed}, {arm}, day {day}: {found[arm][seed][-1]}", flush=True)
    settings = {"rows": options.rows, "days": options.days, "drift": options.drift, "warm": options.warm}
    versions = {name: version(name) for name in ("dqrm", "torch")}
    result = {**settings, "versions": versions, "arms": table(found)}
    (options.output / "results.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
