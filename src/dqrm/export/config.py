"""How a model is exported or quantized after training: the fields of the command line. Imports no torch."""

from dataclasses import dataclass
from typing import Literal

from dqrm.options import check_fields
from dqrm.quant.config import BitsOfParts, rows_per_scale


@dataclass(frozen=True)
class ExportConfig:
    """What `dqrm export` and `dqrm quantize` write.

    Raises:
        ValueError: a value of the wrong type or out of range.
    """

    checkpoint: Literal["best", "last"] = "best"
    """The checkpoint that is best on validation, or the last."""
    data: str | None = None
    """The dataset folder that the run was trained on; none: the path recorded in the run."""
    vocabulary: Literal["embed", "beside", "none"] = "embed"
    """Which id has which row: in the artifact, in a second file beside it, or left out (.dqrm only)."""
    correct_subsampling: bool = True
    """Where negatives were subsampled, predict on the true base rate: p / (p + (1 - p) / kept)."""
    calibrate: Literal["none", "platt", "isotonic"] = "none"
    """Calibrate probabilities on the validation rows of the dataset: Platt scaling or isotonic regression."""
    check_rows: int = 1000
    """Rows that are scored with the exported file and with the trained model to compare them."""
    onnxruntime_web: str | None = None
    """Of a folder for browsers: npm's package onnxruntime-web 1.30.0, unpacked or as .tgz; none: npm fetches it once
    (33 MB), then it is in the user's cache."""
    verify: bool = True
    """Compare checkpoint, vocabularies and the split of those rows with their checksums first (reads them whole)."""
    triton: bool = False
    """Of an .onnx file: write config.pbtxt beside it, for Triton's ONNX Runtime backend."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.check_rows < 1:
            raise ValueError(f"check_rows is {self.check_rows}, expected 1 or more")
        if self.calibrate != "none" and not self.correct_subsampling:
            raise ValueError(
                f"calibrate is '{self.calibrate}', on the log's own click rate, but correct_subsampling is false; use "
                "one of them"
            )


@dataclass(frozen=True)
class PTQConfig(BitsOfParts):
    """Post-training quantization of a model that was trained in FP32.

    Raises:
        ValueError: an unsupported number of bits, or a value of the wrong type.
    """

    bits: Literal[2, 4, 8, 16] = 4
    """Bits of tables and MLP weights alike."""
    table_bits: Literal[2, 4, 8, 16, 32] | None = None
    """Bits of the embedding tables; none: as --bits."""
    mlp_bits: Literal[2, 4, 8, 16, 32] | None = None
    """Bits of the MLP weights (one scale per output channel); none: as --bits."""
    small_table_bits: Literal[2, 4, 8, 16, 32] | None = None
    """Bits of embedding tables with fewer than small_table_rows rows; none: as the others."""
    small_table_rows: int | None = None
    """With small_table_bits: rows from which on a table has the bits of the others; none: 10,000."""
    granularity: str = "table"
    """One scale per embedding 'table', per 'row' of it, or 'block:N' for N rows, a power of 2 (4 bytes for each)."""
    qscheme: Literal["symmetric", "affine"] = "symmetric"
    """Codes of tables on both sides of 0, or affine: with a zero point per scale, over the range of its weights (--clip
    none)."""
    clip: Literal["none", "mse"] = "mse"
    """The scale of the largest magnitude, or the one with the smallest squared error."""

    def __post_init__(self) -> None:
        check_fields(self)
        self._resolve_small_tables()
        each = rows_per_scale(self.granularity, "granularity")
        if self.qscheme == "affine" and self.clip != "none":
            raise ValueError(
                f"qscheme is 'affine', but clip is {self.clip!r}: its codes span all weights; use clip 'none'"
            )
        if self.qscheme == "affine" or each not in (None, 1):
            name = "qscheme" if self.qscheme == "affine" else "granularity"
            if self.small_table_bits is not None:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}, but small_table_bits is {self.small_table_bits}: tables of "
                    "several bit widths have a scale per table or row and no zero point; leave small_table_bits out"
                )
            if self.effective_table_bits == 32:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}, but table_bits is 32, which quantizes no table; leave it out"
                )
