"""`dqrm compare`: the table of a study, or of runs, in the terminal."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dqrm.errors import UserError
from dqrm.studies.folder import STUDY, Folder, Result
from dqrm.studies.tables import summarize
from dqrm.training.run import Run


def compare(paths: Sequence[str]) -> dict[str, Any]:
    """What is compared: the variants of one study, or runs with the first of them.

    Returns:
        {'title', 'baseline', 'variants': see `tables.summarize`, 'failures' (of a study), 'same_data'}.

    Raises:
        UserError: a path is neither a run nor a study, or a study is not alone; a file is damaged.
    """
    studies = [path for path in paths if (Path(path) / STUDY).is_file()]
    if studies and len(paths) > 1:
        raise UserError(f"{studies[0]} is a study, which is compared alone; expected one study, or runs")
    if studies:
        folder = Folder.open(studies[0])
        variants = summarize(folder.results(), folder.baseline)
        common = {"title": folder.title, "baseline": folder.baseline, "failures": folder.failures, "same_data": True}
        return {**common, "variants": variants}
    runs = {path: _origin(Path(path)) for path in paths}
    # Whatever their seeds, each is compared with the first.
    variants = summarize({path: {0: Result.read(Path(path))} for path in runs}, paths[0])
    for path, (seed, _) in runs.items():
        variants[path]["seeds"] = [seed]
    same = len({fingerprint for _, fingerprint in runs.values()}) == 1
    return {"title": "Runs", "baseline": paths[0], "failures": [], "same_data": same, "variants": variants}


def _origin(path: Path) -> tuple[int, str]:
    """Seed and data of a run, or of the quantization of one."""
    if not (path / "run.json").exists() and (summary := Result.read(path).summary) and "ptq" in summary:
        return summary["seed"], summary["data"]["fingerprint"]
    run = Run.open(path)
    return run.config.training.seed, run.info["data"]["fingerprint"]
