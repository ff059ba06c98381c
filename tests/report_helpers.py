"""Run folders as training leaves them, written in a millisecond, and what a page holds."""

import base64
import gzip
import json
import math
import re
from pathlib import Path
from typing import Any

HOSTILE = "</script><script>document.title='broken'</script><img src=x onerror=alert(1)>\"'&{{7*7}}"


def run_json(name: str = "int4", columns: tuple[str, ...] = ("C1", "C2")) -> dict[str, Any]:
    return {
        "format_version": 1,
        "versions": {"dqrm": "0.1.0"},
        "config": {"quantization": {"bits": 4}, "training": {"seed": 1, "callbacks": [name]}},
        "data": {
            "path": "/nowhere",
            "fingerprint": "f" * 64,
            "dense": [],
            "columns": [{"name": column, "rows": 9, "multi": False} for column in columns],
            "rows": {"train": 900},
        },
    }


def evaluation(step: int, auc: Any = 0.7, **more: Any) -> dict[str, Any]:
    figures = {"train_loss": 0.5, "auc": auc, "log_loss": 0.4, "ne": 0.9}
    return {"kind": "evaluation", "step": step, "epoch": 1 + step // 100, **figures, **more}


def histogram(step: int, table: str = "C1") -> dict[str, Any]:
    bars = [round(100 * math.exp(-(((at - 32) / 9) ** 2))) for at in range(64)]
    codes = {"values": [code / 10 for code in range(-8, 8)], "counts": [9 - abs(code) for code in range(-8, 8)]}
    return {"kind": "histogram", "table": table, "step": step, "epoch": 1 + step // 100, "bits": 4, "rows": 9,
            "master": {"low": -1.0, "high": 1.0, "counts": bars}, "quantized": codes}  # fmt: skip


def summary(auc: float = 0.7, epochs: int = 3) -> dict[str, Any]:
    curve = {"rows": [50.0, 50.0], "predicted": [0.1, 0.4], "clicked": [0.12, 0.37]}
    return {
        "best": {"step": 100, "epoch": 2, "train_loss": 0.5, "metrics": {"rows": 100, "auc": auc}},
        "test": {"rows": 100, "auc": auc, "log_loss": 0.4, "accuracy": 0.8, "ne": 0.9, "calibration": 1.0},
        "test_calibration": curve,
        "selection": "best validation auc",
        "steps": 300,
        "epochs": epochs,
        "stored_bytes": {"total": 2_400_000},
        "table_bytes": {"weights": 17_000_000, "optimizer": 17_000_000},
        "train_seconds": 3.5,
        "samples_per_second": 12_345.6,
        "device": "cpu",
        "config": {"quantization": {"bits": 4}},
    }


def write_run(
    folder: Path, auc: float = 0.7, evaluations: int = 6, tables: tuple[str, ...] = ("C1",), **more: Any
) -> Path:
    """A finished run. `more`: in run.json."""
    folder.mkdir(parents=True)
    lines: list[dict[str, Any]] = []
    for at in range(1, evaluations + 1):
        step = 300 * at // evaluations
        lines += [{"kind": "train", "step": step, "epoch": 1, "loss": 0.5 / at}, evaluation(step, auc - 0.1 / at)]
        lines += [histogram(step, table) for table in tables]
    (folder / "run.json").write_text(json.dumps(run_json(folder.name) | more))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "summary.json").write_text(json.dumps(summary(auc)))
    return folder


def write_study(folder: Path, aucs: dict[str, list[float]], **more: Any) -> Path:
    """A study of variants, an AUC per seed."""
    for name, values in aucs.items():
        for seed, auc in enumerate(values, 1):
            write_run(folder / "runs" / name / f"seed-{seed}", auc)
    seeds = max(map(len, aucs.values()))
    content = {
        "format_version": 1, "name": "bits", "title": "Bit widths", "baseline": next(iter(aucs)),
        "seeds": list(range(1, seeds + 1)), "variants": [{"name": name} for name in sorted(aucs)], "failures": [],
    }  # fmt: skip
    (folder / "study.json").write_text(json.dumps(content | more))
    return folder


def plots(page: Path) -> dict[str, dict[str, Any]]:
    """The specifications of a page's plots, by the id of their place."""
    (packed,) = re.findall(r'id="plots">([^<]*)<', page.read_text())
    return {plot["id"]: plot["spec"] for plot in json.loads(gzip.decompress(base64.b64decode(packed)))}


def rows(text: str, caption: str) -> list[list[str]]:
    """The cells of the table with a caption, its header first."""
    (body,) = re.findall(rf"<caption>{re.escape(caption)}</caption>(.*?)</table>", text, re.DOTALL)
    return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", line) for line in re.findall(r"<tr>(.*?)</tr>", body)]
