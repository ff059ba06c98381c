"""Configuration dataclasses as flags and as YAML: the same field names, help and checks in all three places.

A field is declared once, with its help as the docstring below it:

    learning_rate: float = 0.1
    \"\"\"Step size of the optimizer.\"\"\"

`field_help` reads that text for `--help`, `coerce` turns a flag's text or a YAML value into the declared type.
"""

import ast
import difflib
import inspect
import math
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import fields
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from dqrm.errors import UserError

T = TypeVar("T")
_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


@cache
def field_help(cls: type) -> dict[str, str]:
    """The docstring below each field of the dataclass `cls`, as {field name: one line of help}."""
    tree = ast.parse(Path(inspect.getfile(cls)).read_text(encoding="utf-8"))
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == cls.__name__)
    texts = {}
    for pair in pairwise(body):
        match pair:
            case (ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text)))):
                texts[name] = " ".join(text.split())
    return texts


@cache
def field_types(cls: type) -> dict[str, Any]:
    """The resolved type of each field of the dataclass `cls`."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in fields(cls)}


def coerce(name: str, value: Any, wanted: Any) -> Any:
    """`value` (text from a flag, or what YAML gave) as the type `wanted`.

    Lists may be written as YAML lists or as text: integers joined by '-' (512-256-16), names joined by ','. In text, a
    name that holds a comma, begins or ends with a space or is empty stands in double quotes: "a,b",c.

    Raises:
        UserError: the value is not of that type; quotes the field and the value.
    """
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in (Union, types.UnionType):
        if value is None or (isinstance(value, str) and value.lower() == "none"):
            return None
        return coerce(name, value, next(part for part in arguments if part is not type(None)))
    if origin is Literal:
        for choice in arguments:
            if str(value) == str(choice) and not (isinstance(value, bool) and not isinstance(choice, bool)):
                return choice
        raise UserError(f"{name}: got {value!r}, expected one of {', '.join(str(choice) for choice in arguments)}")
    if origin is tuple:
        item = arguments[0]
        if isinstance(value, str):
            value = _listed(name, value, item)
        if not isinstance(value, (list, tuple)):
            raise UserError(f"{name}: got {value!r}, expected a list")
        return tuple(coerce(name, part, item) for part in value)
    if wanted is bool:
        if isinstance(value, bool):
            return value
        if str(value).lower() in _TRUE + _FALSE:
            return str(value).lower() in _TRUE
        raise UserError(f"{name}: got {value!r}, expected true or false")
    if wanted in (int, float):
        try:
            if isinstance(value, bool):
                raise ValueError
            if wanted is int and isinstance(value, float) and not value.is_integer():
                raise ValueError
            return wanted(value)
        except (TypeError, ValueError, OverflowError):
            raise UserError(f"{name}: got {value!r}, expected {'a whole' if wanted is int else 'a'} number") from None
    if wanted is str:
        if isinstance(value, bytes) or (type(value).__str__ is object.__str__ and not isinstance(value, (int, float))):
            raise UserError(f"{name}: got {value!r}, expected text")  # as of most objects, its text would be its repr
        return str(value)
    raise TypeError(f"options.coerce has no rule for the type {wanted} of {name}")


def _listed(name: str, text: str, item: Any) -> list[str]:
    if not text.strip():
        return []
    if item is int:
        return [part.strip() for part in text.split("-")]
    parts = [part.strip() for part in split_quoted(text, ",")]
    if not all(parts):
        raise UserError(f'{name}: got {text!r}, expected a name between commas (one that is empty is written "")')
    return [unquoted(part) for part in parts]


def split_quoted(text: str, separator: str) -> list[str]:
    """The pieces of a text between separators; not at those in double quotes that begin a name."""
    pieces, begin, inside, fresh = [], 0, False, True
    for at, letter in enumerate(text):
        if letter == '"' and (inside or fresh):
            inside = not inside
        elif letter == separator and not inside:
            pieces.append(text[begin:at])
            begin, fresh = at + 1, True
            continue
        # A second quote of two ("") opens again what the first one closed; the parts of a cross begin after a *.
        fresh = (fresh and letter.isspace()) or letter == "*" or (letter == '"' and not inside)
    return [*pieces, text[begin:]] if not inside else text.split(separator)


def unquoted(text: str) -> str:
    """What stands in double quotes, if the text is one quoted piece ("a ""b"" c" for a "b" c); else the text."""
    inner = text[1:-1]
    if len(text) >= 2 and text[0] == text[-1] == '"' and '"' not in inner.replace('""', ""):
        return inner.replace('""', '"')
    return text


def did_you_mean(got: str, known: Iterable[str]) -> str:
    """'; did you mean X?' when something close to `got` is known, else the known names, if any."""
    known = list(known)
    if not known:
        return "; there are none"
    close = difflib.get_close_matches(got, known, n=1)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; known are {', '.join(known)}" if known else ""


def registered(field: str, name: str, register: Mapping[str, T]) -> T:
    """The entry of a register that the field names.

    Raises:
        UserError: there is none of that name.
    """
    if name not in register:
        raise UserError(f"{field}: got {name!r}, expected one of {', '.join(register)}")
    return register[name]


def build(cls: type, values: Mapping[str, Any], where: str) -> Any:
    """The dataclass `cls` from `values` (field name -> value as text, as YAML gave it, or already typed).

    Raises:
        UserError: an unknown name, a value of the wrong type, or a combination that the dataclass refuses.
    """
    known = field_types(cls)
    for name in values:
        if name not in known:
            raise UserError(f"{where}: unknown field '{name}'{did_you_mean(str(name), known)}")
    try:
        return cls(**{name: coerce(name, value, known[name]) for name, value in values.items()})
    except (UserError, TypeError, ValueError) as error:
        raise UserError(f"{where}: {error}") from None


def check_fields(instance: Any) -> None:
    """For `__post_init__`: bring each field of a dataclass to its declared type, as YAML and flags do.

    Raises:
        ValueError: a value that is not of its type.
    """
    for name, wanted in field_types(type(instance)).items():  # type: ignore[arg-type]
        try:
            object.__setattr__(instance, name, coerce(name, getattr(instance, name), wanted))
        except UserError as error:
            raise ValueError(str(error)) from None


# Fields that become a dimension of tensors.
_SIZES = ("embedding_dim", "batch_size", "eval_batch_size")


def at_least(config: Any, **lowest: float) -> None:
    """For `__post_init__`: `check_fields`, and each named field finite and no less than its bound.

    Raises:
        ValueError: a value that is not; one that no tensor, counter or machine can hold.
    """
    check_fields(config)
    for name, bound in lowest.items():
        value = getattr(config, name)
        if isinstance(value, int) and value >= 2**63:  # what torch and the files' counters cannot hold
            raise ValueError(f"{name} is {value}, expected below 2^63")
        if not math.isfinite(value):
            raise ValueError(f"{name} is {value}, expected a finite number, {bound} or more")
        if value < bound:
            raise ValueError(f"{name} is {value}, expected {bound} or more")
        if name in _SIZES and value >= 2**31:
            raise ValueError(f"{name} is {value}, expected below 2^31")
        if name == "threads" and value > 1024:
            raise ValueError(f"threads is {value}, expected 1024 or fewer")


def check_device(device: str) -> None:
    """For `__post_init__`: raise ValueError unless it is the name of a device of torch's that we know, or auto."""
    if device not in ("auto", "cpu", "cuda") and not device.removeprefix("cuda:").isdigit():
        raise ValueError(f"device is {device!r}, expected 'auto', 'cpu', 'cuda' or 'cuda:<number>'")


@cache
def _unique_keys() -> type:
    """A safe loader of YAML that refuses a key that is given twice, of which yaml's own keeps the last."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
            if twice := [key for key in keys if keys.count(key) > 1]:
                raise yaml.MarkedYAMLError(problem=f"'{twice[0]}' is given twice", problem_mark=node.start_mark)
            return super().construct_mapping(node, deep)

    return Loader


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        UserError: no such file, not YAML, or not a mapping.
    """
    import yaml

    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_unique_keys())
    except OSError as error:
        raise UserError(f"cannot read the configuration {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path}: got {type(content).__name__}, expected 'name: value' lines")
    return content
