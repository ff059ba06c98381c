"""`dqrm report` on the command line."""

from pathlib import Path

import click


@click.command(short_help="One page on runs or a study: figures, plots, configurations.")
@click.argument("runs", metavar="RUN...|STUDY", nargs=-1, required=True)
@click.option("-o", "--output", default="report.html", show_default=True, help="The page to write.")
@click.option("--bench", metavar="FILE", help="The output of `dqrm bench step --json`: shows the parts of a step.")
@click.option("--data", metavar="DATA", help="The dataset, for lookups by row.  [default: that of the first run]")
def report(runs: tuple[str, ...], output: str, bench: str | None, data: str | None) -> None:
    """Write one HTML page on runs, the first of them the baseline, or on the folder of a study. It needs no network."""
    from dqrm.console import bars, messages
    from dqrm.report.page import write_report

    with bars() as progress:
        notes = write_report(runs, output, bench, data, progress)
    for note in notes:
        messages.print(f"Warning: {note}.")
    messages.print(f"{output}: {Path(output).stat().st_size / 1e6:.2f} MB")
