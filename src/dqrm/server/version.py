"""One version of a served model: an open artifact, the tensors that it takes and gives, and its raw columns."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from dqrm.artifact.file import Artifact
from dqrm.data.batches import Batch
from dqrm.data.raw import RawEncoder
from dqrm.errors import UserError
from dqrm.export.check import generate, logits_of
from dqrm.identity import FileIdentity
from dqrm.models.base import ClickModel
from dqrm.server.config import ServeConfig
from dqrm.serving.loaded import encoder_of
from dqrm.serving.writer import finite_logits, sigmoid

Array = NDArray[Any]


class Port(NamedTuple):
    """An input or output of the protocol: name, datatype, and shape with -1 for what a request decides."""

    name: str
    datatype: str
    shape: tuple[int, ...]

    def describe(self) -> dict[str, Any]:
        """For the model's metadata."""
        return {"name": self.name, "datatype": self.datatype, "shape": list(self.shape)}


class Tensors(NamedTuple):
    """A valid request's tensors: dense float32 [B, D], ids int32 [B, S], and per multi-valued table values int32 [L]
    and offsets int64 [B]."""

    dense: Array
    ids: Array
    bags: tuple[tuple[Array, Array], ...] = ()

    def __len__(self) -> int:  # rows, not fields
        return int(self.dense.shape[0])


class Scores(NamedTuple):
    """What a request gets: float32 [B] each."""

    logit: Array
    probability: Array


OUTPUTS = tuple(Port(name, "FP32", (-1,)) for name in ("probability", "logit"))


@dataclass(eq=False)
class Version:
    """An artifact that is served as `name`.

    Attributes:
        id: 12 hexadecimal digits of the checksum of its header, which covers all bytes.
        identity: of the file, before it was opened. inputs: as of the ONNX file (`onnx_writer.write_onnx`), so that
            one client serves both. table_rows: of the single-valued tables, int64 [S]; bag_rows: of the others.
        encoder: what reads raw rows; or, where there are no vocabularies, why not.
        failed: why it cannot score any more; None: it can. types: of each raw column the type of its last values.
    """

    name: str
    opened: Artifact
    identity: FileIdentity
    model: ClickModel
    encoder: RawEncoder | UserError
    batch_rows: int
    failed: str | None = None
    types: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, name: str, path: Path, config: ServeConfig) -> "Version":
        """Open, verify and try an artifact.

        Raises:
            UserError: it is missing, damaged or no artifact, or does not predict finite numbers.
        """
        try:
            identity = FileIdentity.of(os.stat(path))
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from None
        if path.is_dir():
            raise UserError(f"{path} is a folder, expected a .dqrm file; `dqrm export {path} -o model.dqrm` writes one")
        opened = Artifact.open(path, config.verify)
        if config.verify:
            opened.verify_vocabularies()
        encoder: RawEncoder | UserError
        try:
            encoder = encoder_of(opened, config.data)
        except UserError as error:
            if config.data is not None or opened.content["vocabulary"]["mode"] != "none":
                raise
            encoder = error  # tensors can be scored
        version = cls(name, opened, identity, opened.model(config.in_memory), encoder, config.batch_rows)
        for rows in (1, 64):  # reads pages, and compiles kernels
            version.score(generate(opened.content["model"], rows))
        return version

    def works(self) -> bool:
        """Whether it still scores a row of ordinary values."""
        try:
            self.score(generate(self.opened.content["model"], 1))
        except UserError:
            return False
        return True

    @cached_property
    def id(self) -> str:
        """See the class."""
        return self.opened.container.checksum[:12]

    @cached_property
    def inputs(self) -> tuple[Port, ...]:
        """See the class."""
        described = self.opened.content["model"]
        single = sum(not multi for multi in described["multi"])
        ports = [Port("dense", "FP32", (-1, described["num_dense"])), Port("ids", "INT64", (-1, single))]
        ports = [port for port in ports if port.shape[1]]
        for number in range(len(described["multi"]) - single):
            ports += [Port(f"values_{number}", "INT64", (-1,)), Port(f"offsets_{number}", "INT64", (-1,))]
        return tuple(ports)

    @cached_property
    def table_rows(self) -> Array:
        """See the class."""
        described = self.opened.content["model"]
        rows = zip(described["table_rows"], described["multi"])
        return np.array([count for count, multi in rows if not multi], np.int64)

    @cached_property
    def bag_rows(self) -> tuple[int, ...]:
        """See the class."""
        described = self.opened.content["model"]
        return tuple(count for count, multi in zip(described["table_rows"], described["multi"]) if multi)

    @cached_property
    def raw_columns(self) -> dict[str, bool]:
        """The columns of the log that are read, and whether each is a number in any case; none without vocabularies."""
        if isinstance(self.encoder, UserError):
            return {}
        plan = self.encoder.plan
        parts = {part for key in plan.keys for part in key.parts}
        return {name: name in plan.dense and name not in parts for name in plan.needed}

    def column(self, number: int, multi: bool = False) -> str:
        """The name of a single-valued (or multi-valued) table's column."""
        columns = self.opened.content["schema"]["columns"]
        return str([column["name"] for column in columns if column["multi"] == multi][number])

    def score(self, batch: Batch) -> Scores:
        """Logits and probabilities of a batch.

        Raises:
            UserError: the file was changed in place, or a logit is not finite.
        """
        logits = finite_logits(partial(logits_of, self.model), batch, self.batch_rows)
        return Scores(logits, sigmoid(logits))


def joined(parts: Sequence[Tensors]) -> Batch:
    """The rows of several requests as one batch."""
    dense, ids = np.concatenate([part.dense for part in parts]), np.concatenate([part.ids for part in parts])
    bags = []
    for number in range(len(parts[0].bags)):
        counts = np.cumsum([0, *(len(part.bags[number][0]) for part in parts[:-1])])
        values = np.concatenate([part.bags[number][0] for part in parts])
        offsets = np.concatenate([part.bags[number][1] + start for part, start in zip(parts, counts)])
        bags.append((torch.from_numpy(values), torch.from_numpy(offsets)))
    return Batch(torch.from_numpy(dense), torch.from_numpy(ids), tuple(bags), torch.zeros(len(dense)))
