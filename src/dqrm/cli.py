"""The command line: one command per verb, which reads the flags, calls the verb's function and prints what it returns.

Nothing heavy is imported before a verb needs it.
"""

import os
import shlex
import sys
from pathlib import Path
from typing import Any

import click

from dqrm import __version__
from dqrm.bench.config import (
    BenchEmbeddingConfig,
    BenchExchangeConfig,
    BenchInferenceConfig,
    BenchShardedConfig,
    BenchStepConfig,
)
from dqrm.cli_report import report
from dqrm.cli_serve import serve
from dqrm.cli_studies import compare, demo, stopping, study, tune
from dqrm.config import SECTIONS, Config, ExchangeConfig
from dqrm.daily.config import DailyConfig, Recipe
from dqrm.data.config import PrepareConfig
from dqrm.data.synthetic_config import GenerateConfig
from dqrm.distributed import launched
from dqrm.errors import UserError
from dqrm.export.config import ExportConfig, PTQConfig
from dqrm.flags import ExportCommand, GroupedCommand, config_options, given, training_config
from dqrm.options import build, field_types, read_yaml
from dqrm.process import STOPPED, run_command
from dqrm.serving.config import PredictConfig

_HEADINGS = {"model": "Model", "quantization": "Quantization", "optimizer": "Optimizer", "training": "Training",
             "exchange": "Exchange between ranks"}  # fmt: skip
_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
_exported = click.option(
    "-o", "--output", required=True, help="The file to write; its suffix says in which format (below)."
)
_verify = click.option(
    "--verify/--no-verify",
    default=True,
    show_default=True,
    help="Compare what is read (the dataset, the split, the model) with its checksums first.",
)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__, message="dqrm %(version)s")
def cli() -> None:
    """Train click models (DLRM, DCNv2) in INT4: prepare a log, train, evaluate, export, predict."""


@cli.command(cls=GroupedCommand)
@click.option("-o", "--output", required=True, help="The log file to write; with --days the folder.")
@config_options(("Generated data", GenerateConfig))
def generate(output: str, **flags: Any) -> None:
    """Draw a click log in Criteo's layout from a known model."""
    from dqrm.console import bars, messages
    from dqrm.data.synthetic import generate as run

    config = build(GenerateConfig, given(flags), "generate")
    with bars() as progress:
        run(output, config, progress=progress)
    messages.print(f"{output}: {config.rows:,} generated lines")


@cli.command(cls=GroupedCommand, short_help="Turn raw click logs into a dataset folder.")
@click.argument("sources", nargs=-1, required=True)
@click.option("-o", "--output", required=True, help="The dataset folder to make.")
@click.option("--config", "config_file", help="A YAML file with any of the fields below; flags override it.")
@click.option("--part", metavar="K/N", help="Work on part K of N only: read it; after --merge write it.")
@click.option("--merge", is_flag=True, help="Merge the N parts, once all are read; then run each --part again.")
@_json
@config_options(("What is in the log, and how it becomes a dataset", PrepareConfig))
def prepare(
    sources: tuple[str, ...], output: str, config_file: str | None, part: str, merge: bool, as_json: bool, **flags: Any
) -> None:
    """Turn raw click logs into a dataset folder. Stopped or killed, the same command resumes it.

    SOURCES are files, folders and globs, also by URL (s3://bucket/logs); - is standard input, a folder may be a Delta
    Lake table, and hf:NAME (or hf:FOLDER) is a Hugging Face dataset.
    """
    from dqrm.data.extension import prepare_config
    from dqrm.preparing import run_prepare

    fields = read_yaml(config_file) if config_file else {}
    config = prepare_config(fields | given(flags), config_file or "prepare")
    run_prepare(sources, output, config, part, merge, as_json)


@cli.command(cls=GroupedCommand, short_help="Train a model on a dataset folder, or resume a run.")
@click.argument("data", required=False)
@click.option("-o", "--output", help="The run folder to make.")
@click.option("--resume", "resumed", metavar="RUN", help="Continue this run where its newest checkpoint stands.")
@click.option(
    "--from",
    "start_from",
    metavar="RUN|FILE",
    help="Start from this finished run, on its data or on data that extends it (prepare --extend): its rows, layers "
    "and optimizer state; or from a .dqrm file, which has no state; 1 epoch unless --epochs says.",
)
@click.option(
    "--carry",
    type=click.Choice(["all", "mlp"]),
    help="With --from: take over all of it, or all but the tables.  [default: all]",
)
@click.option("--config", "config_file", help="A YAML file with any of the fields below; flags override it.")
@_verify
@_json
@config_options(*((_HEADINGS[name], cls) for name, cls in SECTIONS.items()))
def train(
    data: str | None,
    output: str | None,
    resumed: str | None,
    start_from: str | None,
    carry: str | None,
    config_file: str | None,
    verify: bool,
    as_json: bool,
    **flags: Any,
) -> None:
    """Train a model on the dataset folder DATA, or continue a run with --resume RUN [DATA]."""
    if launched():  # torch's C++ warns of every rank that ends, in pages
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

    def load() -> Config:
        start = given({"from": start_from, "carry": carry})
        return training_config(data, output, resumed, config_file, given(flags), start)

    try:
        wait = load().exchange.exchange_timeout
    except UserError:
        if not launched():
            raise  # before torch is imported
        wait = ExchangeConfig().exchange_timeout  # all ranks will hear of it

    from dqrm.console import bars, messages, print_json
    from dqrm.data.dataset import Dataset
    from dqrm.distributed.processes import join
    from dqrm.info import print_summary
    from dqrm.training.launch import Interrupted
    from dqrm.training.launch import resume as continue_run
    from dqrm.training.launch import train as start_run

    run = resumed or output or ""
    with join(wait) as world, bars(quiet=as_json or not world.first) as progress:
        config = world.together(load)
        dataset = world.together(lambda: Dataset(data) if data else None)
        try:
            if dataset is None or resumed:
                summary = continue_run(run, dataset, progress, progress.log, verify)
            else:
                started: Any = {"start_from": start_from, "carry": carry or "all"}
                summary = start_run(dataset, run, config, progress, progress.log, verify, **started)
        except (Interrupted, KeyboardInterrupt) as stop:
            exactly = isinstance(stop, Interrupted)  # else before the first step, after the last, or the second time
            if not exactly and not (world.first and (Path(run) / "run.json").exists()):
                raise
            if world.first:
                where = "exactly here" if exactly else "from the newest checkpoint"
                messages.print(f"Stopped; `dqrm train --resume {shlex.quote(run)}` continues {where}.")
            sys.exit(STOPPED)
    if world.first and as_json:
        print_json(summary)
    elif world.first:
        print_summary(Path(run), summary)


@cli.command(cls=ExportCommand, short_help="Write the model of a run as a packed file, and check it.")
@click.argument("source", metavar="RUN")
@_exported
@_json
@config_options(("What is written", ExportConfig))
def export(source: str, output: str, as_json: bool, **flags: Any) -> None:
    """Write the model of the run RUN (or of an artifact) as a file, packed, and check it."""
    _export(source, output, build(ExportConfig, given(flags), "export"), None, as_json)


@cli.command(cls=ExportCommand, short_help="Quantize an FP32 run after training (PTQ), and export it.")
@click.argument("source", metavar="RUN")
@_exported
@_json
@config_options(("Quantization", PTQConfig), ("What is written", ExportConfig))
def quantize(source: str, output: str, as_json: bool, **flags: Any) -> None:
    """Quantize the run RUN, which was trained in FP32, after training, and write it as `dqrm export` does."""
    values = given(flags)
    of_export = {name: values.pop(name) for name in list(values) if name in field_types(ExportConfig)}
    config = build(ExportConfig, of_export, "quantize")
    _export(source, output, config, build(PTQConfig, values, "quantize"), as_json)


def _export(source: str, output: str, config: ExportConfig, ptq: PTQConfig | None, as_json: bool) -> None:
    from dqrm.console import bars, print_json
    from dqrm.export.pipeline import export_run as run
    from dqrm.info import print_export

    with bars(quiet=as_json) as progress:
        result = run(source, output, config, ptq, progress)
    (print_json if as_json else print_export)(result)


@cli.command(cls=GroupedCommand, short_help="Score raw logs: the probability of a click for each row.")
@click.argument("model")
@click.argument("log", nargs=-1, required=True)
@click.option("-o", "--output", required=True, help="The file to write: .parquet, .csv or .tsv.")
@_json
@config_options(("How the log is scored", PredictConfig))
def predict(model: str, log: tuple[str, ...], output: str, as_json: bool, **flags: Any) -> None:
    """Score raw logs LOG (as for prepare) with MODEL, a run folder or an exported file: the probability of a click for
    each row."""
    config = build(PredictConfig, given(flags), "predict")

    from dqrm.console import bars, print_json
    from dqrm.info import print_predictions
    from dqrm.serving.predict import predict as run

    with bars(quiet=as_json) as progress:
        result = run(model, log, output, config, progress)
    if as_json:
        print_json(result)
    else:
        print_predictions(log, result)


@cli.command("eval", short_help="Metrics of a run or an exported file on a split of its dataset.")
@click.argument("run", metavar="MODEL")
@click.argument("data")
@click.option("--split", default="test", show_default=True, help="train, validation or test.")
@click.option("--checkpoint", type=click.Choice(["best", "last"]),
              help="Of a run: the best on validation, or the last.  [default: best]")  # fmt: skip
@click.option("--batch-size", type=click.IntRange(1), help="Samples per step; default: the run's eval_batch_size.")
@click.option(
    "--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, ...; auto: CUDA where there is one."
)
@click.option(
    "--threads",
    type=click.IntRange(0, 1024),
    default=0,
    help="CPU threads for arithmetic; 0: the fastest number now, at most torch's default.  [default: 0]",
)
@_verify
@click.option(
    "--correct-subsampling/--no-correct-subsampling",
    default=True,
    help="Where negatives were subsampled, measure on the true base rate; else on the rows that are left, as in "
    "training.  [default: yes]",
)
@_json
def evaluate(
    run: str,
    data: str,
    split: str,
    checkpoint: str | None,
    batch_size: int | None,
    device: str,
    threads: int,
    verify: bool,
    correct_subsampling: bool,
    as_json: bool,
) -> None:
    """Evaluate MODEL, a run folder or an exported file, on a split of its dataset DATA."""
    from dqrm.console import bars, print_json
    from dqrm.data.dataset import Dataset
    from dqrm.info import print_metrics
    from dqrm.serving.evaluation import evaluate as measure

    with bars(quiet=as_json) as progress:
        log = None if as_json else progress.log
        metrics = measure(
            run, data, split, batch_size, progress, verify, correct_subsampling, threads, log, checkpoint, device
        )
    if as_json:
        print_json(metrics)
    else:
        which = f", {checkpoint or 'best'} checkpoint," if Path(run).is_dir() else ""
        print_metrics(f"{run}{which} on {split}", metrics, Dataset(data).subsample_negatives)


@cli.command()
@click.argument("path")
@click.option("--verify", is_flag=True, help="Compare all bytes with their checksums.")
@_json
def info(path: str, verify: bool, as_json: bool) -> None:
    """Describe a dataset folder, a run folder or an artifact."""
    from dqrm.console import print_json
    from dqrm.info import describe, print_description

    if as_json:
        print_json(describe(path, verify))
    else:
        print_description(path, verify)


@cli.command(cls=GroupedCommand, short_help="Train a model per day, each from the one before, and publish it.")
@click.argument("config_file", metavar="CONFIG")
@click.argument("logs", nargs=-1, required=True)
@click.option("-o", "--output", required=True, help="The folder to create, or to continue.")
@_json
@config_options(("What is kept and published", DailyConfig))
def daily(config_file: str, logs: tuple[str, ...], output: str, as_json: bool, **flags: Any) -> None:
    """Train a model on each day of LOGS that is not done ('logs/dt=*': a file or a folder for each), in the order of
    their names: prepare (the vocabulary grows), evaluate the published model on the day, train from it, export, and
    publish as OUTPUT/current.dqrm. CONFIG is a YAML file with the fields of prepare and the sections of train."""
    config = build(DailyConfig, given(flags), "daily")

    from dqrm.console import bars, print_json
    from dqrm.daily.pipeline import run_daily
    from dqrm.daily.report import print_days

    with stopping("Stopped; run the same command again to resume."), bars(quiet=as_json) as progress:
        lines = run_daily(Recipe.read(config_file), logs, output, config, progress, progress.log)
    current = str(Path(output) / "current.dqrm")
    if as_json:
        print_json({"days": lines, "current": current})
    else:
        print_days(lines, current)


for _command in (compare, demo, report, serve, study, tune):
    cli.add_command(_command)


@cli.group()
def bench() -> None:
    """Measure speed: variants alternate in one process."""


@bench.command("step", cls=GroupedCommand, short_help="Whole training steps: FP32, INT4, plain torch.")
@_json
@config_options(("What is measured", BenchStepConfig))
def bench_step(as_json: bool, **flags: Any) -> None:
    """Whole training steps on generated data: FP32, INT4, and plain torch as the baseline."""
    _bench("step", build(BenchStepConfig, given(flags), "bench step"), as_json)


@bench.command("embedding", cls=GroupedCommand, short_help="One table, forward and backward, against torch.ao.")
@_json
@config_options(("What is measured", BenchEmbeddingConfig))
def bench_embedding(as_json: bool, **flags: Any) -> None:
    """Forward and backward of one table: our active rows, whole-table QAT, torch.ao, torchao, FP32."""
    _bench("embedding", build(BenchEmbeddingConfig, given(flags), "bench embedding"), as_json)


@bench.command("inference", cls=GroupedCommand, short_help="Scoring: the artifact, ONNX Runtime, FP32.")
@_json
@config_options(("What is measured", BenchInferenceConfig))
def bench_inference(as_json: bool, **flags: Any) -> None:
    """Scoring with random weights: the packed artifact, ONNX Runtime, our FP32; speed, load time and memory."""
    _bench("inference", build(BenchInferenceConfig, given(flags), "bench inference"), as_json)


@bench.command("exchange", cls=GroupedCommand, short_help="Steps of several ranks: bytes and time per codec.")
@_json
@config_options(("What is measured", BenchExchangeConfig))
def bench_exchange(as_json: bool, **flags: Any) -> None:
    """Training steps of several ranks: what they send each other, and how long that takes, codec by codec."""
    _bench("exchange", build(BenchExchangeConfig, given(flags), "bench exchange"), as_json)


@bench.command("sharded", cls=GroupedCommand, short_help="TorchRec's sharded tables: bytes and time per codec.")
@_json
@config_options(("What is measured", BenchShardedConfig))
def bench_sharded(as_json: bool, **flags: Any) -> None:
    """Training steps of tables that TorchRec shards: what their all-to-all sends, and how long that takes, by codec."""
    _bench("sharded", build(BenchShardedConfig, given(flags), "bench sharded"), as_json)


def _bench(kind: str, config: Any, as_json: bool) -> None:
    from importlib import import_module

    from dqrm.bench import report
    from dqrm.console import bars, print_json

    with bars(quiet=as_json) as progress:
        result = getattr(import_module(f"dqrm.bench.{kind}"), f"run_{kind}")(config, progress)
    (print_json if as_json else getattr(report, f"print_{kind}"))(result)


def main() -> None:
    """Run the command line; see `process.run_command`."""
    run_command(cli, "dqrm")
