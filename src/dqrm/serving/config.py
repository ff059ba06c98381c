"""How `dqrm predict` reads a log and writes probabilities: the fields of the command line. Imports no torch."""

from dataclasses import dataclass
from typing import Literal

from dqrm.options import check_fields


@dataclass(frozen=True)
class PredictConfig:
    """How `dqrm predict` reads a log and writes probabilities.

    Raises:
        ValueError: a value of the wrong type or out of range.
    """

    keep: tuple[str, ...] = ()
    """Columns of the log, joined by commas, that are copied to the output."""
    data: str | None = None
    """The dataset folder to take vocabularies from: of a file without them, or of a run whose dataset was moved."""
    on_error: Literal["stop", "skip"] = "stop"
    """Malformed lines: stop with file and line number, or leave them out of the output and count them."""
    delimiter: str | None = None
    """Field separator of a text log; none: as in the log that the model was trained on."""
    multi_separator: str | None = None
    """Separator of the ids in a cell of a multi column that is text; none: as in that log."""
    batch_size: int = 8192
    """Rows scored at once; changes memory and speed."""
    threads: int = 0
    """CPU threads for arithmetic; 0: the fastest number when scoring starts, at most torch's default."""
    in_memory: bool = False
    """Read the whole model into memory first, so that later changes of its file have no effect."""
    verify: bool = True
    """Compare model and vocabularies with their checksums first, which reads all of the model."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}, expected 1 or more")
        if not 0 <= self.threads <= 1024:
            raise ValueError(f"threads is {self.threads}, expected 0 to 1024")
