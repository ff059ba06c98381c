"""ONNX: a graph of standard operators on packed codes (`onnx_writer`), streamed into a file (`onnx_file`)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dqrm.export.formats.base import Format, beside, damaged

if TYPE_CHECKING:
    from torch import Tensor

    from dqrm.data.batches import Batch
    from dqrm.export.formats.base import Score
    from dqrm.models.base import ClickModel


class OnnxFormat(Format):
    """`.onnx`: inputs and outputs as `onnx_writer.write_onnx` says; metadata as metadata properties."""

    suffix = ".onnx"
    summary = "an ONNX graph, for ONNX Runtime and others"
    extra = "onnx"

    def write(self, model: ClickModel, path: Path, metadata: Mapping[str, str]) -> None:
        from dqrm.export.formats.onnx_writer import write_onnx

        write_onnx(model, path, metadata)

    def open(self, path: Path, threads: int = 0) -> Score:
        import numpy as np
        import torch

        session = self._session(path, threads)
        known = {given.name for given in session.get_inputs()}

        def score(batch: Batch) -> Tensor:
            # In numpy: torch's threads, once started, would spin beside the runtime's own.
            feeds = {"dense": batch.dense.numpy(), "ids": batch.ids.numpy().astype(np.int64)}
            for number, (values, offsets) in enumerate(batch.bags):
                feeds[f"values_{number}"] = values.numpy().astype(np.int64)
                feeds[f"offsets_{number}"] = offsets.numpy().astype(np.int64)
            (logits,) = session.run(["logit"], {name: given for name, given in feeds.items() if name in known})
            return torch.from_numpy(logits)

        return score

    def content(self, path: Path) -> dict[str, Any]:
        from dqrm.artifact.base_rate import BaseRate
        from dqrm.models.calibration import Calibration

        try:
            content: dict[str, Any] = json.loads(self._session(path, 1).get_modelmeta().custom_metadata_map["dqrm"])
            _ = content["provenance"]["data"]["fingerprint"][:16], BaseRate.of(content), Calibration.of(content)
        except (KeyError, TypeError, ValueError):
            return super().content(path)
        return content

    def companions(self, path: Path) -> list[Path]:
        """Tables of 2 GB and more, in a second file."""
        return beside(path, r"(\.[0-9a-f]{8})?\.data")

    def _session(self, path: Path, threads: int) -> Any:
        try:
            import onnxruntime
        except ImportError:
            raise self.missing("running") from None
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        try:
            return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception:  # its own classes of errors, which differ between versions
            raise damaged(path) from None
