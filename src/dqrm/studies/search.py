"""What `dqrm tune` searches: a YAML file, read and checked as a whole before anything runs. Imports no torch.

title, import, base, set: as of a study
ranges:
  optimizer.learning_rate: {log: [0.001, 0.1]}       # a number, uniform in its logarithm
  optimizer.table_l2: {uniform: [0, 1.0e-5]}
  model.cross_layers: {int: [1, 4]}
  training.batch_size: {choice: [128, 512, 2048]}
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dqrm.config import SECTIONS, Config, overridden, section_of
from dqrm.errors import UserError
from dqrm.options import coerce, field_types
from dqrm.studies.plan import field_of, read_head, shown

KINDS = ("uniform", "log", "int", "choice")
_KEYS = ("title", "import", "base", "set", "ranges")


@dataclass(frozen=True)
class Range:
    """The values that a field may take: `kind` is one of KINDS, `values` are lowest and highest, or the choices."""

    kind: str
    values: tuple[Any, ...]


@dataclass(frozen=True)
class Search:
    """A configuration, and ranges of some of its fields."""

    name: str
    title: str
    sections: Mapping[str, Any]
    ranges: Mapping[str, Range]

    def config(self, values: Mapping[str, Any]) -> Config:
        """The configuration with these values of the ranges.

        Raises:
            UserError: it is impossible.
        """
        return Config.from_dict(overridden(self.sections, values, self.name), self.name)


def read_search(config: str, base: str | None = None, settings: Sequence[str] = ()) -> Search:
    """The search that a file describes; arguments as of `plan.read_plan`.

    Raises:
        UserError: the file cannot be read, or anything in it is unknown or invalid.
    """
    path = Path(config)
    if not path.is_file():
        raise UserError(f"there is no file {path}, expected the YAML file of a search")
    content, title, sections = read_head(path, _KEYS, base, settings)
    ranges = content.get("ranges")
    if not isinstance(ranges, Mapping) or not ranges:
        raise UserError(f"{path}: ranges is {ranges!r}, expected fields, each with one of {', '.join(KINDS)}")
    read: dict[str, Range] = {}
    for name, given in ranges.items():
        field = field_of(name, f"{path}, ranges")
        if field in read:
            raise UserError(f"{path}, ranges: '{name}' is given twice")
        read[field] = _range(f"{path}, ranges, {name}", field, given)
    search = Search(path.stem, title, sections, read)
    first = {field: each.values[0] for field, each in read.items()}
    for field, each in read.items():
        for value in each.values:
            search.config(first | {field: value})
    return search


def _range(where: str, field: str, given: Any) -> Range:
    if not isinstance(given, Mapping) or len(given) != 1 or next(iter(given)) not in KINDS:
        raise UserError(f"{where}: got {given!r}, expected one of {', '.join(KINDS)}, as {{log: [0.001, 0.1]}}")
    ((kind, values),) = given.items()
    if not isinstance(values, list) or not values or (kind != "choice" and len(values) != 2):
        what = "a list of values" if kind == "choice" else "the lowest and the highest value, as [1, 4]"
        raise UserError(f"{where}: {kind} is {values!r}, expected {what}")
    wanted = field_types(SECTIONS[str(section_of(field))])[field]
    if kind == "choice":
        chosen = tuple(shown(value) if isinstance(value, list) else value for value in values)
        if len(set(map(str, chosen))) < len(chosen):
            raise UserError(f"{where}: choice is {values!r}, expected different values")
        for value in chosen:
            coerce(where, value, wanted)
        return Range(kind, chosen)
    low, high = (coerce(where, coerce(where, value, int if kind == "int" else float), wanted) for value in values)
    if not (low < high and math.isfinite(low) and math.isfinite(high)) or (kind == "log" and low <= 0):
        above = " above 0" * (kind == "log")
        raise UserError(f"{where}: {kind} is {values!r}, expected two numbers{above}, the lower one first")
    return Range(kind, (low, high))
