"""A folder for browsers: the ONNX model with its tables beside it, vocabularies, onnxruntime-web, and a page that
scores rows offline. The page's own files are in `dqrm/export/web`."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dqrm.errors import UserError
from dqrm.export.formats.base import FOLDER, Format

if TYPE_CHECKING:
    from dqrm.artifact.file import Artifact
    from dqrm.export.config import ExportConfig
    from dqrm.export.formats.base import Score
    from dqrm.models.base import ClickModel
    from dqrm.training.environment import Progress

GRAPH, TABLES, IDS, SPEC = "model.onnx", "model.onnx.data", "ids.bin", "model.json"
PAGE = Path(__file__).parent.parent / "web"
MOST_BYTES = 2**31 - 1
"""Of the tables, and of the vocabularies: WebAssembly addresses 4 GB, and a table is there twice while it is loaded."""
_FORMAT = "dqrm-web"
# Measured (docs/guides/web.md): the browser's memory beside what it has for an empty page.
_RUNTIME_MEMORY, _TIMES = 130_000_000, 3.2


class WebFormat(Format):
    """A static folder, named by a path that ends in a slash."""

    suffix = FOLDER
    summary = "a folder for browsers: the model, vocabularies, onnxruntime-web and a page that scores rows offline"
    extra = "onnx"
    not_evaluated = "a folder for browsers is scored there"
    is_folder = True
    has_vocabularies = True

    def write(self, model: ClickModel, path: Path, metadata: Mapping[str, str]) -> None:
        raise UserError(f"{path}: a folder for browsers holds vocabularies, expected an artifact or a run to export")

    def export(
        self,
        opened: Artifact,
        model: ClickModel,
        path: Path,
        metadata: Mapping[str, str],
        config: ExportConfig,
        progress: Progress,
    ) -> None:
        from dqrm.export.formats import web_spec
        from dqrm.export.formats.onnx_writer import write_onnx
        from dqrm.export.formats.web_runtime import FILES, copy_runtime

        plan = web_spec.require_pages(opened)
        path.mkdir()
        progress("writing the graph and the tables", 0, None)
        write_onnx(model, path / GRAPH, metadata, inline_limit=0)
        progress("writing vocabularies", 0, None)
        columns, examples = web_spec.write_ids(opened, plan, path / IDS)
        for name in (TABLES, IDS):
            _require_room(path / name)
        copy_runtime(config.onnxruntime_web, path, progress)
        for file in PAGE.iterdir():
            if file.is_file():
                shutil.copyfile(file, path / file.name)
        described = web_spec.about(opened, plan, _told(model, opened)) | web_spec.reading(plan, columns, examples)
        names = [name for name in (GRAPH, TABLES, IDS, *FILES) if (path / name).exists()]
        files: dict[str, dict[str, Any]] = {
            name: {"bytes": (path / name).stat().st_size, "sha256": _digest(path / name)} for name in names
        }
        tables, ids = (files[name]["bytes"] if name in files else 0 for name in (TABLES, IDS))
        sizes: dict[str, int] = {
            "download_bytes": sum(file.stat().st_size for file in path.iterdir()),
            "memory_bytes": int(_RUNTIME_MEMORY + _TIMES * (tables + ids)),
        }
        written = {"format": _FORMAT, "version": 1, **sizes, **described, "files": files}
        (path / SPEC).write_text(json.dumps(written, indent=1, allow_nan=False) + "\n", encoding="utf-8")

    def open(self, path: Path, threads: int = 0) -> Score:
        from dqrm.export.formats.onnx import OnnxFormat

        return OnnxFormat().open(path / GRAPH, threads)

    def require_replaceable(self, output: Path) -> None:
        if not output.exists():
            return
        if not output.is_dir():
            raise UserError(f"{output} is a file, expected the name of a folder")
        names = {file.name for file in output.iterdir()}
        if names and not (SPEC in names and _is_ours(output / SPEC)):
            raise UserError(
                f"{output} holds files that dqrm export did not write; name another folder, or an empty one"
            )
        from dqrm.export.formats.web_runtime import FILES

        known = {GRAPH, TABLES, IDS, SPEC, *FILES, *(file.name for file in PAGE.iterdir())}
        if others := sorted(names - known):
            raise UserError(f"{output / others[0]} is no file of dqrm export and would be deleted; move it")

    def sizes(self, opened: Artifact, path: Path) -> dict[str, int]:
        from dqrm.export.formats.web_runtime import FILES

        bytes_of = {file.name: file.stat().st_size for file in path.iterdir()}
        model = {"tables": bytes_of.get(TABLES, 0), "graph and MLP": bytes_of[GRAPH]}
        rest = {"vocabularies": bytes_of.get(IDS, 0), "onnxruntime-web": sum(bytes_of[name] for name in FILES)}
        total = sum(bytes_of.values())
        return {**model, **rest, "page": total - sum((*model.values(), *rest.values())), "file": total}

    def notes(self, path: Path) -> list[str]:
        spec = json.loads((path / SPEC).read_text(encoding="utf-8"))
        return [
            f"A browser takes up to about {spec['memory_bytes'] / 1e6:,.0f} MB of memory for it. Serve the folder from "
            f"any static server (python -m http.server -d {path}); from disk (file://) a page may not read it.",
            *(["Whoever opens the page can read its vocabularies."] if IDS in spec["files"] else []),
        ]


def _require_room(path: Path) -> None:
    size = path.stat().st_size if path.exists() else 0
    if size > MOST_BYTES:
        what = "tables take" if path.name == TABLES else "vocabularies take"
        raise UserError(
            f"the {what} {size} bytes, more than a browser can hold ({MOST_BYTES}): nothing was written; use a .dqrm "
            "or an .onnx file on a server"
        )


def _told(model: ClickModel, opened: Artifact) -> list[str]:
    from dqrm.artifact.base_rate import BaseRate

    share = opened.base_rate.subsample_negatives
    rate = BaseRate(share, bool(share and model.logit_offset))
    told = (rate.tell(), None if model.calibration is None else model.calibration.tell())
    return [sentence for sentence in told if sentence is not None]


def _is_ours(path: Path) -> bool:
    try:
        return bool(json.loads(path.read_text(encoding="utf-8")).get("format") == _FORMAT)
    except (OSError, ValueError, AttributeError):
        return False


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
