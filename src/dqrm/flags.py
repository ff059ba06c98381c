"""Flags of the command line, made from the configuration dataclasses: one flag per field, its docstring the help."""

import shlex
import types
import typing
from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Any, Literal

import click

from dqrm.config import Config
from dqrm.errors import UserError
from dqrm.export.formats import formats
from dqrm.options import field_help, field_types


class GroupedCommand(click.Command):
    """A command whose --help lists the flags of each dataclass under a heading of its own."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, those without a heading first."""
        groups: dict[str, list[tuple[str, str]]] = {"Options": []}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx) if isinstance(parameter, click.Option) else None
            if record is not None:
                groups.setdefault(getattr(parameter, "heading", "Options"), []).append(record)
        for heading, records in groups.items():
            if records:
                with formatter.section(heading):
                    formatter.write_dl(records)


class ExportCommand(GroupedCommand):
    """A command that writes a model: its --help lists the file formats, too."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, then suffix, summary and extra of each registered format."""
        super().format_options(ctx, formatter)
        with formatter.section("Formats"):
            formatter.write_dl(
                [
                    (suffix, known.summary + (f" (needs dqrm[{known.extra}])" if known.extra else ""))
                    for suffix, known in formats().items()
                ]
            )


class FieldOption(click.Option):
    """The flag of one dataclass field; unset unless given, so that a YAML file can come in between."""

    def __init__(self, cls: type, name: str, kind: Any, default: Any, heading: str) -> None:
        flag = "--" + name.replace("_", "-")
        text = field_help(cls)[name].rstrip(".")
        if kind is bool:
            declared, shown = f"{flag}/--no-{flag[2:]}", "yes" if default else "no"
        else:
            declared, shown = flag, _shown(default)
        super().__init__(
            [declared, name],
            type=bool if kind is bool else str,
            default=None,
            multiple=kind is not bool,
            callback=None if kind is bool else _once,
            metavar=None if kind is bool else _metavar(kind),
            help=f"{text}  [default: {shown}]",
        )
        self.heading = heading


def _once(context: click.Context, option: click.Parameter, values: tuple[str, ...]) -> str | None:
    """The one value of a flag: click would take the last of several without a word."""
    if len(values) > 1:
        joined = (
            f"; join names by commas: {option.opts[0]} {shlex.quote(','.join(values))}"
            if option.metavar == "NAME,..."
            else ""
        )
        raise UserError(f"{option.opts[0]} is given {len(values)} times, expected once{joined}")
    return values[0] if values else None


def config_options(*sections: tuple[str, type]) -> Callable[[Any], Any]:
    """Decorator: one flag for each field of the dataclasses, given as (heading, dataclass)."""

    def decorate(function: Any) -> Any:
        options = []
        for heading, cls in sections:
            hints = field_types(cls)
            for field in fields(cls):
                default = field.default_factory() if field.default_factory is not MISSING else field.default
                options.append(FieldOption(cls, field.name, hints[field.name], default, heading))
        function.__click_params__ = [*reversed(options), *getattr(function, "__click_params__", [])]
        return function

    return decorate


def given(values: dict[str, Any]) -> dict[str, Any]:
    """The flags that were given, as {field name: text or bool}."""
    return {name: value for name, value in values.items() if value is not None}


def training_config(
    data: str | None,
    output: str | None,
    resumed: str | None,
    config_file: str | None,
    overrides: dict[str, Any],
    start: dict[str, Any],
) -> Config:
    """The configuration of a new run; of one that is resumed, the defaults, which are not used."""
    if resumed is not None:
        extra = [f"--{name.replace('_', '-')}" for name in (*start, *overrides)]
        extra += ["--config"] * bool(config_file) + ["-o"] * bool(output)
        if extra:
            raise UserError(f"--resume {resumed} continues the run as it was started; it takes no {', '.join(extra)}")
    elif data is None or output is None:
        raise UserError("train needs a dataset folder and a run folder: dqrm train DATA -o RUN (or --resume RUN)")
    elif "carry" in start and "from" not in start:
        raise UserError(f"--carry {start['carry']} says what is taken over from the run --from, which is not given")
    return Config.load(config_file, overrides)


def _shown(default: Any) -> str:
    if isinstance(default, tuple):
        return ("-" if all(isinstance(part, int) for part in default) else ",").join(map(str, default)) or "none"
    return "none" if default is None else str(default)


def _metavar(kind: Any) -> str:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return _metavar(next(part for part in arguments if part is not type(None)))
    if origin is Literal:
        return "[" + "|".join(map(str, arguments)) + "]"
    if origin is tuple:
        return "N-N-..." if arguments[0] is int else "NAME,..."
    return {int: "INTEGER", float: "NUMBER"}.get(kind, "TEXT")
