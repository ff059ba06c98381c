"""The commands of the command line that train more than one run and compare them; see `cli`."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from dqrm.flags import GroupedCommand
from dqrm.process import STOPPED
from dqrm.studies.plan import BASES, DEFAULT, read_plan, shipped
from dqrm.studies.search import read_search

_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")


@contextmanager
def stopping(told: str) -> Iterator[None]:
    """End the process with a sentence where Ctrl-C or SIGTERM stopped what is inside."""
    from dqrm.console import messages
    from dqrm.training.launch import Interrupted

    try:
        yield
    except (Interrupted, KeyboardInterrupt):
        messages.print(told)
        sys.exit(STOPPED)


@click.command(cls=GroupedCommand, short_help="Generate a log, train in INT4 and in FP32, and compare.")
@click.option("-o", "--output", default="demo", show_default=True, help="Folder for the log, the dataset and the runs.")
@_json
def demo(output: str, as_json: bool) -> None:
    """Generate a click log, train a DLRM by the default recipe in INT4 and FP32 and by the DQRM paper's in FP32, and
    compare them."""
    from dqrm.studies.demo import run_demo

    with stopping("Stopped; the next `dqrm demo` starts again."):
        run_demo(Path(output), as_json)


_bases = ", ".join([DEFAULT, *shipped(BASES)])


@click.command(short_help="Train variants of a configuration with several seeds, and compare them.",
               epilog=f"Shipped studies: {', '.join(shipped())}.")  # fmt: skip
@click.argument("config")
@click.argument("data")
@click.option("-o", "--output", required=True, help="The folder to create: runs, results.csv and results.md.")
@click.option("--resume", is_flag=True, help="Continue a study that was stopped or has failed runs; seeds and "
              "variants may be added.")  # fmt: skip
@click.option("--seeds", help="Seeds, joined by commas.  [default: those of CONFIG, else 1,2,3]")
@click.option("--jobs", type=click.IntRange(1, 1024), default=1, show_default=True, help="Runs at the same time, each "
              "a process; each has one thread unless training.threads is set.")  # fmt: skip
@click.option("--base", help=f"Configuration file, or one of {_bases}, that the variants change, instead of CONFIG's.")
@click.option("--set", "settings", multiple=True, metavar="SECTION.FIELD=VALUE", help="Change a field of the base, as "
              "training.max_steps=100; can be given several times.")  # fmt: skip
@click.option("--keep", type=click.Choice(["best", "all"]), default="best", show_default=True,
              help="Which checkpoints of finished runs.")  # fmt: skip
@click.option("--only", metavar="VARIANT,...", help="Only these variants.")
@_json
def study(
    config: str,
    data: str,
    output: str,
    resume: bool,
    seeds: str | None,
    jobs: int,
    base: str | None,
    settings: tuple[str, ...],
    keep: str,
    only: str | None,
    as_json: bool,
) -> None:
    """Train the variants of a study on the dataset folder DATA with several seeds, and compare their test figures:
    means, standard deviations, and paired differences to a baseline. CONFIG is a YAML file or the name of a shipped
    study. Exit code 1: some runs failed."""
    plan = read_plan(config, base, settings, seeds)
    if only is not None:
        plan = plan.only([name.strip() for name in only.split(",")])

    from dqrm.console import bars, messages, print_json
    from dqrm.studies.compare import compare as compared
    from dqrm.studies.study import run_study
    from dqrm.studies.tables import show

    told = "Stopped; run the same command with --resume to continue."
    with stopping(told), bars(quiet=as_json) as progress:
        folder = run_study(plan, data, output, progress, jobs, resume, keep)
    if as_json:
        print_json(compared([output]))
    else:
        show(compared([output]))
        messages.print(f"{output}: results.md, results.csv and the runs")
    if folder.failures:
        failed = f"{len(folder.failures)} run{'s' * (len(folder.failures) > 1)} failed"
        messages.print(f"{failed}, see {Path(output) / 'log.txt'}; the same command with --resume tries again")
        sys.exit(1)


@click.command(short_help="The figures of runs, or of a study, side by side.")
@click.argument("paths", metavar="RUN...|STUDY", nargs=-1, required=True)
@_json
def compare(paths: tuple[str, ...], as_json: bool) -> None:
    """Compare runs with the first of them, or the variants of a study (of `dqrm study` or `dqrm tune`) with its
    baseline: test figures, differences, and validation AUC by evaluation as a sparkline."""
    from dqrm.console import print_json
    from dqrm.studies.compare import compare as compared
    from dqrm.studies.tables import show

    comparison = compared(list(dict.fromkeys(paths)))
    (print_json if as_json else show)(comparison)


@click.command(short_help="Search for the best values of fields with Optuna.")
@click.argument("config")
@click.argument("data")
@click.option("-o", "--output", required=True, help="The folder to create: that of a study, with best.yaml.")
@click.option("--trials", type=click.IntRange(1), required=True, help="Total number of trials, those of earlier calls "
              "included.")  # fmt: skip
@click.option("--resume", is_flag=True, help="Continue a search that was stopped, or add trials.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=1, show_default=True, help="Seed of the runs.")
@click.option("--base", help=f"Configuration file, or one of {_bases}, instead of CONFIG's.")
@click.option("--set", "settings", multiple=True, metavar="SECTION.FIELD=VALUE", help="Change a field of the base.")
@_json
def tune(
    config: str,
    data: str,
    output: str,
    trials: int,
    resume: bool,
    seed: int,
    base: str | None,
    settings: tuple[str, ...],
    as_json: bool,
) -> None:
    """Search within the ranges of the YAML file CONFIG for the values of fields with the best validation metric
    (training.select_by) on the dataset folder DATA. Needs the extra dqrm[tune]. Runs that are below the median of
    earlier ones at the same point are ended early."""
    search = read_search(config, base, settings)

    from dqrm.console import bars, messages, print_json
    from dqrm.studies.compare import compare as compared
    from dqrm.studies.tables import show
    from dqrm.studies.tune import BEST, run_tune

    told = "Stopped; run the same command with --resume to continue."
    with stopping(told), bars(quiet=as_json) as progress:
        best = run_tune(search, data, output, trials, progress, seed, resume)
    comparison = {**compared([output]), "best": best}
    if as_json:
        print_json(comparison)
        return
    show(comparison)
    if best:
        messages.print(f"Best on validation: {best['variant']}; its configuration is {Path(output) / BEST}")
