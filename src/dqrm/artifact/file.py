"""The artifact: a trained model in one file, packed, with all that scoring raw log lines needs.

`Artifact.open` reads the header, `Artifact.model` gives the model on memory-mapped codes; `pack` writes the file.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dqrm.artifact.base_rate import BaseRate
from dqrm.artifact.container import FORMAT_VERSION, GROUPS_VERSION, MIXED_BITS_VERSION, Container, brief
from dqrm.errors import UserError
from dqrm.models.base import ClickModel
from dqrm.models.calibration import Calibration
from dqrm.models.registry import described_plan, packed_model, table_groups, weight_count
from dqrm.quant.mixed import widths
from dqrm.quant.uniform import check_bits

KIND, VOCABULARY_KIND = "dqrm-model", "dqrm-vocabulary"
_VOCABULARY = "vocabulary."
WEIGHTS = ("table codes", "table scales", "MLP codes", "MLP scales", "biases")
"""The parts of a file that are weights, as `Artifact.sizes` names them."""
_OTHER_BITS = ("mlp_bits", "activation_bits")
MOST_TABLES = 4096
"""Pairs of tables take memory: a small file could ask for more than there is."""


@dataclass(frozen=True)
class Artifact:
    """An open artifact.

    Attributes:
        path: the file.
        content: the content of its header: model, quantization, schema, options, vocabulary, provenance.
    """

    path: Path
    container: Container

    @classmethod
    def open(cls, path: str | Path, verify: bool = False) -> "Artifact":
        """Read the header; `verify` compares every tensor's bytes with its checksum too.

        Raises:
            UserError: no such file, or a file that is not an artifact, truncated, damaged, or of a different version.
        """
        artifact = cls(Path(path), Container.open(Path(path), KIND))
        try:
            _check(artifact.content)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, UserError) as error:
            what = f"lacks {brief(error)}" if isinstance(error, KeyError) else f"has {brief(error)}"
            raise UserError(f"{path} is damaged: its header {what}; export it again") from None
        if verify:
            artifact.container.verify()
        return artifact

    @property
    def content(self) -> dict[str, Any]:
        header: dict[str, Any] = self.container.content
        return header

    def model(self, in_memory: bool = False) -> ClickModel:
        """The model in eval mode, on memory-mapped tables: no row is read before it is used. The rest is in memory.

        Scoring raises UserError if the file was changed in place; a file that was renamed onto it does not matter.

        Args:
            in_memory: read the tables too; later changes of the file then have no effect.

        Raises:
            UserError: the header describes a different model than the tensors.
        """
        try:
            tensors, watch = self.container.tensors(
                lambda name: not name.startswith(_VOCABULARY),
                mapped=lambda name: not in_memory and name in self._large(),
            )
            model = packed_model(self.content["model"], tensors)
            model.logit_offset, model.tables.source = self.base_rate.offset, watch
            model.calibration = self.calibration
            return model
        except UserError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError, RuntimeError) as error:
            what = f"it lacks {brief(error)}" if isinstance(error, KeyError) else brief(error)
            raise UserError(f"{self.path} is damaged: {what}; export it again") from None

    def _large(self) -> tuple[str, ...]:
        """The names of the tensors whose size grows with the number of rows."""
        names: list[str] = []
        model = self.content["model"]
        for prefix, _, numbers in widths(model["table_bits"], len(model["table_rows"])):
            per_row = self.container.entries[f"tables.{prefix}scale"]["shape"] != [len(numbers)]
            large = ("codes", "scale", "zero_point") if per_row else ("codes",)
            names += [f"tables.{prefix}{name}" for name in large]
        return tuple(names)

    @property
    def base_rate(self) -> BaseRate:
        """The click rate that its probabilities are on."""
        return BaseRate.of(self.content)

    @property
    def calibration(self) -> Calibration | None:
        """What its logits are calibrated by."""
        return Calibration.of(self.content)

    def vocabulary(self, number: int) -> bytes:
        """The vocabulary of column `number` as a Parquet file's bytes, compared with its checksum.

        Raises:
            UserError: the artifact has none, or its file is missing, damaged, or belongs to a different artifact.
        """
        where = self._vocabularies()
        name = vocabulary_name(number)
        if name not in where.entries:
            raise UserError(f"{where.path} is damaged: it lacks '{name}'; export it again")
        return where.read(name)

    def verify_vocabularies(self) -> None:
        """Compare the vocabularies with their checksums, those in a second file too.

        Raises:
            UserError: one differs, or the second file is missing or belongs to a different export.
        """
        if self.content["vocabulary"]["mode"] == "beside":
            self._vocabularies().verify()

    def _vocabularies(self) -> Container:
        described = self.content["vocabulary"]
        mode = described["mode"]
        if mode == "embed":
            return self.container
        if mode != "beside":
            raise UserError(
                f"{self.path} was exported with --vocabulary none; name the dataset folder that it was trained on with "
                "--data, or export it with --vocabulary embed"
            )
        path = vocabulary_path(self.path, str(described.get("sha256")))
        if not path.is_file():
            raise UserError(f"{self.path} needs its vocabularies beside it: {path} is missing")
        container = Container.open(path, VOCABULARY_KIND)
        if container.checksum != described.get("sha256"):
            raise UserError(f"{path} belongs to another export than {self.path}; export both again")
        return container

    def sizes(self) -> dict[str, int]:
        """Bytes of each part of the file, and of the vocabularies beside it; 'file' is all of the file."""
        sizes = dict.fromkeys((*WEIGHTS, "vocabularies"), 0)
        for name, entry in self.container.entries.items():
            sizes[_part(name)] += entry["data_offsets"][1] - entry["data_offsets"][0]
        sizes["header"] = self.container.header_bytes
        sizes["file"] = sum(sizes.values())
        described = self.content["vocabulary"]
        if described["mode"] == "beside":
            beside = vocabulary_path(self.path, str(described.get("sha256")))
            sizes["vocabularies beside"] = beside.stat().st_size if beside.is_file() else 0
        return sizes

    def bits_per_weight(self) -> float:
        """Bits of codes, scales and biases for each trained parameter of the model."""
        sizes = self.sizes()
        return 8 * sum(sizes[part] for part in WEIGHTS) / weight_count(self.content["model"])

    def table_bits_per_weight(self) -> float:
        """Bits of the tables' codes, scales and zero points for each of their weights; 0 without tables."""
        model, sizes = self.content["model"], self.sizes()
        weights = sum(model["table_rows"]) * model["config"]["embedding_dim"]
        return 8 * (sizes["table codes"] + sizes["table scales"]) / max(weights, 1)

    def describe(self) -> dict[str, Any]:
        """What `dqrm info` prints, ready for JSON."""
        try:
            return {
                "kind": "artifact",
                "path": str(self.path),
                "format_version": self.container.version,
                "sizes": self.sizes(),
                "bits_per_weight": round(self.bits_per_weight(), 4),
                "table_bits_per_weight": round(self.table_bits_per_weight(), 4),
                **self.content,
                "subsampling": self.base_rate.header(),
            }
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{self.path} is damaged: {brief(error)}; export it again") from None


def version_of(described: dict[str, Any]) -> int:
    """The format version that a file of a described model needs, the lowest: an older dqrm opens what it can."""
    rows, zero_points = table_groups(described)
    if zero_points or rows not in (None, 1):
        return GROUPS_VERSION
    return MIXED_BITS_VERSION if isinstance(described["table_bits"], list) else FORMAT_VERSION


def _check(content: Any) -> None:
    """Raise KeyError, TypeError or ValueError unless a header has the keys and types that its readers need."""
    described, columns = content["model"], content["schema"]["columns"]
    names = [*content["schema"]["dense"], *(column["name"] for column in columns)]
    if not all(isinstance(name, str) for name in names):
        raise ValueError("column names that are not text")
    rows = [column["rows"] for column in columns]
    if rows != described["table_rows"] or [column["multi"] for column in columns] != described["multi"]:
        raise ValueError("columns that are not those of its tables")
    if len(content["schema"]["dense"]) != described["num_dense"]:
        raise ValueError("dense columns that are not those of its model")
    each = described["table_bits"] if isinstance(described["table_bits"], list) else [described["table_bits"]]
    if isinstance(described["table_bits"], list) and (len(each) != len(rows) or len({*each}) < 2):
        raise ValueError("bits that are not those of its tables")
    for key, bits in (*(("table_bits", bits) for bits in each), *((key, described[key]) for key in _OTHER_BITS)):
        check_bits(key, bits)
    numbers = [*each, *(described[key] for key in (*_OTHER_BITS, "num_dense"))]
    if not all(type(number) is int for number in [*numbers, *rows]):
        raise ValueError("a size that is not a whole number")
    if len(rows) > MOST_TABLES:
        raise ValueError(f"{len(rows)} tables, more than {MOST_TABLES}")
    described_plan(described)
    table_groups(described)
    for name, value, known in (
        ("quantization", content["quantization"]["method"], ("qat", "ptq", "none")),
        ("vocabulary", content["vocabulary"]["mode"], ("embed", "beside", "none", "hash")),
    ):
        if value not in known:
            raise ValueError(f"{name} {str(value)[:40]!r}, expected one of {', '.join(known)}")
    _ = content["options"], BaseRate.of(content), Calibration.of(content)
    origin = content["provenance"]
    texts = (origin["dqrm"], origin["data"]["fingerprint"], origin["run"]["checkpoint"])
    figures = [value for metrics in origin["run"]["metrics"].values() if metrics for value in metrics.values()]
    sound = all(isinstance(text, str) for text in texts) and type(origin["run"]["step"]) is int
    if not sound or not all(value is None or isinstance(value, (int, float)) for value in figures):
        raise ValueError("a provenance that is not of text and numbers")


def vocabulary_name(number: int) -> str:
    """The tensor that holds the vocabulary of column `number`."""
    return f"{_VOCABULARY}{number:02d}"


def vocabulary_path(path: Path, checksum: str) -> Path:
    """Path of the vocabularies that were exported beside the artifact `path`."""
    return path.with_name(f"{path.name}-vocabulary-{re.sub('[^0-9a-f]', '', checksum)[:8]}")


def _part(name: str) -> str:
    if name.startswith(_VOCABULARY):
        return "vocabularies"
    owner, _, last = name.rpartition(".")
    if last == "bias":
        return "biases"
    return f"{'table' if owner.partition('.')[0] == 'tables' else 'MLP'} {'codes' if last == 'codes' else 'scales'}"
