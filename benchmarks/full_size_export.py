"""Export a run of the paper's full size: bytes of the files, seconds, and the peak of memory.

    python benchmarks/full_size_export.py --arch kaggle --rows-scale 1 -o full

Makes a run folder with random weights (`run`, 8 times the size of the artifact), then exports it in a process of its
own for each format, and prints one JSON object. Vocabularies are left out, as in the paper's figure.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

from dqrm.bench.config import ARCHITECTURES, NUM_DENSE
from dqrm.config import Config, ModelConfig, QATConfig

_EXPORT = """
import json, resource, sys
import dqrm, torch, numpy, polars, sklearn.metrics, safetensors.torch
libraries = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
from dqrm import export_run, ExportConfig
found = export_run(sys.argv[1], sys.argv[2], ExportConfig(vocabulary="none"))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"libraries_mb": libraries * 1024 / 1e6, "peak_rss_mb": peak * 1024 / 1e6, **found}))
"""


def make_run(folder: Path, arch_name: str, scale: float) -> None:
    """A run folder with one checkpoint of a model that was never trained."""
    from dqrm.models.dlrm import DLRM
    from dqrm.training.checkpoints import save_checkpoint
    from dqrm.training.run import Run, versions

    arch = ARCHITECTURES[arch_name]
    config = Config(
        model=ModelConfig(embedding_dim=arch.embedding_dim, bottom_mlp=arch.bottom_mlp, top_mlp=arch.top_mlp),
        quantization=QATConfig(bits=4),
    )
    rows = arch.scaled(scale)
    model = DLRM(NUM_DENSE, rows, config=config.model, qat=config.quantization)
    model.tables.refresh_scale()
    columns = [{"name": f"C{number}", "rows": count, "multi": False} for number, count in enumerate(rows, 1)]
    data = {
        "path": "none", "fingerprint": "0" * 64, "dense": [f"I{number}" for number in range(1, NUM_DENSE + 1)],
        "columns": columns, "rows": {}, "split": {},
    }  # fmt: skip
    info = {"format_version": 1, "versions": versions(), "config": config.to_dict(), "data": data}
    run = Run(folder, info)
    with run.started():
        save_checkpoint(run.checkpoints, 1, model, [], {"step": 1, "best": None}, set())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", choices=list(ARCHITECTURES), default="kaggle")
    parser.add_argument("--rows-scale", type=float, default=1.0)
    parser.add_argument("--formats", default="dqrm,onnx", help="joined by commas")
    parser.add_argument("-o", "--output", required=True)
    options = parser.parse_args()
    folder = Path(options.output)
    if not (folder / "run").exists():
        # In a process of its own, so that its memory is not counted.
        command = "import sys; sys.argv = sys.argv[1:]; import runpy; m = runpy.run_path(sys.argv[0]); "
        command += "from pathlib import Path; m['make_run'](Path(sys.argv[1]), sys.argv[2], float(sys.argv[3]))"
        arguments = [__file__, str(folder / "run"), options.arch, str(options.rows_scale)]
        subprocess.run([sys.executable, "-c", command, *arguments], check=True)
    arch = ARCHITECTURES[options.arch]
    tables = 4 * sum(arch.scaled(options.rows_scale)) * arch.embedding_dim
    found = {"arch": options.arch, "rows_scale": options.rows_scale, "fp32_tables_mb": tables / 1e6, "exports": []}
    for kind in options.formats.split(","):
        start = time.perf_counter()
        output = subprocess.run(
            [sys.executable, "-c", _EXPORT, str(folder / "run"), str(folder / f"model.{kind}")],
            check=True, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        found["exports"].append({"seconds": round(time.perf_counter() - start, 2), **json.loads(output.stdout)})
    found["driver_peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
