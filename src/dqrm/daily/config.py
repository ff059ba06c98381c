"""The configuration of `dqrm daily`: its own fields, and the file that has those of prepare and train. No torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dqrm.config import SECTIONS, Config
from dqrm.data.config import PrepareConfig
from dqrm.errors import UserError
from dqrm.options import at_least, build, check_fields, read_yaml


@dataclass(frozen=True)
class DailyConfig:
    """What is kept and what is published.

    Raises:
        ValueError: a value of the wrong type or out of range.
    """

    keep: int = 3
    """Days whose dataset, run and artifact are kept, besides those of the published model."""
    gate_metric: str = "auc"
    """Metric by which a new model is compared with the published one, on rows of the newest day that neither has
    trained on: its test split, or validation where that has no rows."""
    calibrate: Literal["none", "platt", "isotonic"] = "none"
    """Calibrate each model on the validation rows of its day: Platt scaling or isotonic regression."""
    gate_margin: float | None = 0.005
    """The new model is published unless it is worse than the published one by more than this; none: it always is."""

    def __post_init__(self) -> None:
        check_fields(self)
        at_least(self, keep=1)
        if self.gate_margin is not None:
            at_least(self, gate_margin=0)


@dataclass(frozen=True)
class Recipe:
    """How each day is prepared and trained: the fields of both as the file has them, and where it is."""

    file: str
    fields: Mapping[str, Any]
    train: Config

    @classmethod
    def read(cls, path: str | Path) -> "Recipe":
        """A YAML file with the fields of `dqrm prepare` and the sections of `dqrm train`.

        Raises:
            UserError: it cannot be read, or a field of it is unknown or invalid.
        """
        content = read_yaml(path)
        sections = {name: value for name, value in content.items() if name in SECTIONS}
        fields = {name: value for name, value in content.items() if name not in SECTIONS}
        if fields.get("extend") is not None:
            raise UserError(
                f"{path}: extend is '{fields['extend']}', but each day extends the one before; leave it out"
            )
        recipe = cls(str(path), fields, Config.from_dict(sections, str(path)))
        recipe.prepare(None)
        return recipe

    def prepare(self, extend: str | None) -> PrepareConfig:
        """How a day is prepared; `extend`: the dataset of the day before, of no use where ids are hashed."""
        more = {} if extend is None or self.fields.get("vocabulary") == "hash" else {"extend": extend}
        return build(PrepareConfig, {**self.fields, **more}, self.file)
