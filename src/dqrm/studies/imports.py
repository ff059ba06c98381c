"""Modules that a study or a search names, so that what they register is there in each of its processes.

import: [my_metrics]        # modules on the Python path, or files beside this one (my_metrics.py)
"""

import importlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dqrm.errors import UserError


@dataclass(frozen=True)
class Imports:
    """Names of modules.

    Attributes:
        file: the YAML file that names them; its folder is searched after the Python path.
    """

    names: tuple[str, ...] = ()
    file: str = ""

    @classmethod
    def of(cls, value: Any, file: Path) -> "Imports":
        """As the key `import` of a file has them: a name or a list of names.

        Raises:
            UserError: it is something else.
        """
        names = [value] if isinstance(value, str) else [] if value is None else value
        if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
            raise UserError(f"{file}: import is {value!r}, expected names of modules, as [my_metrics]")
        return cls(tuple(names), str(file.resolve()))

    def load(self) -> None:
        """Import them, in order.

        Raises:
            UserError: there is no such module, or it raises.
        """
        folder = str(Path(self.file).parent)
        if self.names and folder not in sys.path:
            sys.path.append(folder)
        for name in self.names:
            try:
                importlib.import_module(name)
            except Exception as error:
                what = f"{type(error).__name__}: {' '.join(str(error).split())}"
                raise UserError(f"{self.file}: import: module '{name}' cannot be imported ({what[:300]})") from None


NONE = Imports()
