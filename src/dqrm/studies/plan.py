"""What a study is to run: its YAML file, read and checked as a whole before anything runs. No torch.

title: what the tables say above them        # all but variants or grid may be left out
base: paper                                  # a shipped base, a file beside this one, or the sections themselves
baseline: FP32                               # the variant that the others are compared with: the first
seeds: [1, 2, 3]
import: [my_metrics]                         # modules that register metrics, quantizers and so on; see `imports`
variants:
  FP32: {quantization.bits: 32}
  INT4: {quantization.bits: 4}
  PTQ INT4: {ptq: {of: FP32, bits: 4}}                   # fields of `dqrm quantize`
  INT4 pretrained: {from: FP32, quantization.bits: 4}    # as `dqrm train --from`
grid:                                        # each variant with each combination of these values
  training.batch_size: [128, 2048]
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from dqrm.config import SECTIONS, Config, overridden, section_of
from dqrm.errors import UserError
from dqrm.export.config import PTQConfig
from dqrm.options import build, coerce, did_you_mean, field_types, read_yaml
from dqrm.studies.imports import NONE, Imports

SHIPPED = Path(__file__).parent / "shipped"
BASES = SHIPPED / "bases"
DEFAULT = "default"
"""The base without a field: the recipe of `dqrm.recipe`."""
SEEDS = (1, 2, 3)
MOST_VARIANTS = 1000
_KEYS = ("title", "import", "base", "set", "baseline", "seeds", "variants", "grid")
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9 ._+=()%-]{0,98}[A-Za-z0-9_+=()%-])?")
_NAMES = "1 to 100 letters, digits, spaces and . _ + = ( ) % -, beginning with a letter or a digit"


@dataclass(frozen=True)
class Variant:
    """One line of the tables: a configuration to train, or a post-training quantization (PTQ) of such runs.

    Attributes:
        config: what is trained, with any seed; None for PTQ.
        source: the variant whose run of the same seed this one starts from, or quantizes; None: neither.
    """

    name: str
    config: Config | None
    source: str | None = None
    ptq: PTQConfig | None = None


@dataclass(frozen=True)
class Plan:
    """The runs of a study: each variant with each seed."""

    name: str
    title: str
    baseline: str
    seeds: tuple[int, ...]
    variants: tuple[Variant, ...]
    imports: Imports = NONE

    def runs(self) -> list[tuple[Variant, int]]:
        """In the order in which they start: all variants of the first seed first, each after its source."""
        ordered: list[Variant] = []
        while len(ordered) < len(self.variants):
            names = {None, *(each.name for each in ordered)}
            ordered.append(next(each for each in self.variants if each.name not in names and each.source in names))
        return [(variant, seed) for seed in self.seeds for variant in ordered]

    def only(self, names: Sequence[str]) -> "Plan":
        """The plan with these variants alone.

        Raises:
            UserError: there is none of a name, or one needs another that is left out.
        """
        known = [each.name for each in self.variants]
        for name in names:
            if name not in known:
                raise UserError(f"--only: there is no variant '{name}'{did_you_mean(name, known)}")
        kept = tuple(each for each in self.variants if each.name in names)
        for each in kept:
            if each.source and each.source not in names:
                raise UserError(f"--only: '{each.name}' starts from '{each.source}', which is left out")
        return replace(self, variants=kept, baseline=self.baseline if self.baseline in names else kept[0].name)


def shipped(folder: Path = SHIPPED) -> list[str]:
    """Names of the shipped studies (or bases)."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def find(name: str, folder: Path = SHIPPED, kind: str = "study", beside: Path = Path()) -> Path:
    """The YAML file that a path (relative to `beside`) or the name of a shipped study or base means.

    Raises:
        UserError: there is neither.
    """
    if (beside / name).is_file():
        return beside / name
    if name in shipped(folder):
        return folder / f"{name}.yaml"
    known = ", ".join(shipped(folder) + [DEFAULT] * (kind == "base"))
    raise UserError(f"there is no file {beside / name}, and no shipped {kind} '{name}'; shipped are {known}")


def read_plan(config: str, base: str | None = None, settings: Sequence[str] = (), seeds: str | None = None) -> Plan:
    """The study that a file or the name of a shipped one describes.

    Args:
        base: a configuration file or the name of a shipped base, instead of the file's.
        settings: 'section.field=value', changes of the base. seeds: joined by commas, instead of the file's.

    Raises:
        UserError: the file cannot be read, or anything in it is unknown or invalid.
    """
    path = find(config)
    content, title, sections = read_head(path, _KEYS, base, settings)
    variants = _variants(path, content, sections)
    names = [each.name for each in variants]
    baseline = str(content.get("baseline", names[0]))
    if baseline not in names:
        raise UserError(f"{path}: baseline is '{baseline}', expected a variant{did_you_mean(baseline, names)}")
    chosen = _seeds("--seeds", seeds.split(",")) if seeds else _seeds(f"{path}: seeds", content.get("seeds", SEEDS))
    imports = Imports.of(content.get("import"), path)
    return Plan(path.stem, title, baseline, chosen, tuple(variants), imports)


def read_head(
    path: Path, keys: Sequence[str], base: str | None, settings: Sequence[str]
) -> tuple[dict[str, Any], str, dict[str, Any]]:
    """What studies and searches have in common: the file's content, title, and the sections of its base; imports the
    modules that it names.

    Raises:
        UserError: a key that is not one of `keys`; as `read_plan`.
    """
    content = read_yaml(path)
    for key in content:
        if key not in keys:
            raise UserError(f"{path}: unknown key '{key}'{did_you_mean(str(key), keys)}")
    Imports.of(content.get("import"), path).load()
    title = content.get("title", path.stem)
    if not isinstance(title, str) or not title.isprintable() or len(title) > 200:
        raise UserError(f"{path}: title is {title!r:.60}, expected one line of text, at most 200 characters")
    sections = _base(content.get("base", DEFAULT), path) if base is None else _base(base, Path("--base"))
    sections = overridden(sections, changes_in(content.get("set"), f"{path}, set"), f"{path}, set")
    return content, title, overridden(sections, _settings(settings), "--set")


def _base(value: Any, where: Path) -> dict[str, Any]:
    """The sections of a base: itself, those of a file beside `where` or of a shipped one."""
    if isinstance(value, Mapping):
        return dict(value)
    if not isinstance(value, str):
        raise UserError(f"{where}: base is {value!r}, expected a file, a name or the sections of a configuration")
    if value == DEFAULT and not (where.parent / value).is_file():
        return {}
    return read_yaml(find(value, BASES, "base", where.parent))


def field_of(name: Any, where: str) -> str:
    """The field that a dotted name means, as `training.batch_size`.

    Raises:
        UserError: there is none, or it may not be set here.
    """
    section, _, field = str(name).partition(".")
    if section in SECTIONS and field in field_types(SECTIONS[section]):
        if field == "seed":
            raise UserError(f"{where}: training.seed is set by seeds (--seeds); leave it out")
        return field
    if home := section_of(field or section):
        raise UserError(f"{where}: unknown field '{name}'; did you mean '{home}.{field or section}'?")
    known = [f"{section}.{field}" for section, kind in SECTIONS.items() for field in field_types(kind)]
    raise UserError(f"{where}: unknown field '{name}'{did_you_mean(str(name), known)}")


def _settings(settings: Iterable[str]) -> dict[str, Any]:
    """'section.field=value' texts of --set as {field: value}."""
    changes = {}
    for text in settings:
        name, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--set {text}: expected SECTION.FIELD=VALUE, as training.batch_size=128")
        changes[field_of(name, "--set")] = value
    return changes


def changes_in(fields: Any, where: str) -> dict[str, Any]:
    """{field: value} of a mapping with dotted names, or with the sections of a configuration."""
    if not isinstance(fields, Mapping) and fields is not None:
        raise UserError(f"{where}: got {fields!r}, expected fields, as {{quantization.bits: 4}}")
    flat: dict[str, Any] = {}
    for key, value in (fields or {}).items():
        parts = {f"{key}.{field}": v for field, v in value.items()} if isinstance(value, Mapping) else {key: value}
        for name, each in parts.items():
            if field_of(name, where) in flat:
                raise UserError(f"{where}: '{name}' is given twice")
            flat[field_of(name, where)] = each
    return flat


def _seeds(where: str, values: Any) -> tuple[int, ...]:
    if not isinstance(values, (list, tuple)) or not values:
        raise UserError(f"{where}: got {values!r}, expected one or more whole numbers, as 1,2,3")
    seeds = tuple(coerce(where, value, int) for value in values)
    if len(set(seeds)) < len(seeds) or not all(0 <= seed < 2**63 for seed in seeds):
        raise UserError(f"{where}: got {', '.join(map(str, seeds))}, expected different whole numbers, 0 or more")
    return seeds


def _variants(path: Path, content: Mapping[str, Any], base: Mapping[str, Any]) -> list[Variant]:
    named = content.get("variants") or ({} if content.get("grid") else None)
    if not isinstance(named, Mapping):
        raise UserError(f"{path}: variants is {content.get('variants')!r}, expected named variants, or a grid")
    points = _points(path, content.get("grid"))
    if max(1, len(named)) * len(points) > MOST_VARIANTS:
        raise UserError(
            f"{path}: {max(1, len(named))} variants with {len(points)} points of the grid each, expected at most "
            f"{MOST_VARIANTS} together"
        )
    variants: dict[str, Variant] = {}
    for name, fields in (named or {"": None}).items():
        if isinstance(name, bool) or not isinstance(name, (str, int)):
            raise UserError(f"{path}: a variant is named {name!r}, expected text; put it in quotes")
        for point, more in points.items():
            full = f"{name} {point}".strip()
            check_name(full, str(path))
            if full.casefold() in variants:
                raise UserError(f"{path}: two variants are named '{full}', up to case; rename one")
            variants[full.casefold()] = _variant(path, full, point, fields, more, base)
    _check_sources(path, list(variants.values()))
    return list(variants.values())


def check_name(name: str, where: str) -> None:
    """Raise UserError unless a folder may have the name, and a table and a page show it as it is."""
    if not _NAME.fullmatch(name):
        raise UserError(f"{where}: a variant is named {name!r:.120}, expected {_NAMES}")


def _points(path: Path, grid: Any) -> dict[str, dict[str, Any]]:
    """The combinations of a grid's values, {name: {field: value}}; without a grid a single empty one."""
    if grid is None:
        return {"": {}}
    if not isinstance(grid, Mapping):
        raise UserError(f"{path}: grid is {grid!r}, expected fields, each with a list of values")
    for name, values in grid.items():
        if not isinstance(values, list) or not values:
            raise UserError(f"{path}: grid, {name} is {values!r}, expected a list of values")
    fields = {name: field_of(name, f"{path}, grid") for name in grid}
    points: dict[str, dict[str, Any]] = {}
    for values in product(*grid.values()):
        name = " ".join(f"{field}={shown(value)}" for field, value in zip(fields.values(), values))
        if name in points:
            raise UserError(f"{path}: grid has two points named '{name}'; give each value once")
        points[name] = dict(zip(fields.values(), values))
        if len(points) > MOST_VARIANTS:
            raise UserError(f"{path}: grid has over {MOST_VARIANTS} points, expected at most {MOST_VARIANTS} variants")
    return points


def shown(value: Any) -> str:
    """A value as a part of a variant's name."""
    text = "-".join(map(str, value)) if isinstance(value, list) else str(value)
    return re.sub(r"[^A-Za-z0-9._+-]", "-", text) or "none"


def _variant(
    path: Path, name: str, point: str, fields: Any, more: Mapping[str, Any], base: Mapping[str, Any]
) -> Variant:
    where = f"{path}, variant '{name}'"
    source = None
    if isinstance(fields, Mapping):
        if "ptq" in fields:
            return _ptq(where, name, point, fields)
        fields = dict(fields)
        source = fields.pop("from", None)
    flat = changes_in(fields, where)
    if twice := set(flat) & set(more):
        raise UserError(f"{where}: {twice.pop()} is set by the variant and by the grid; leave one out")
    config = Config.from_dict(overridden(base, flat | dict(more), where), where)
    return Variant(name, config, None if source is None else f"{source} {point}".strip())


def _ptq(where: str, name: str, point: str, fields: Mapping[str, Any]) -> Variant:
    values = fields["ptq"]
    if len(fields) > 1 or not isinstance(values, Mapping) or "of" not in values:
        raise UserError(
            f"{where}: expected ptq alone, with the variant that it quantizes, as ptq: {{of: FP32, bits: 4}}"
        )
    config = build(PTQConfig, {key: value for key, value in values.items() if key != "of"}, f"{where}, ptq")
    return Variant(name, None, f"{values['of']} {point}".strip(), config)


def _check_sources(path: Path, variants: Sequence[Variant]) -> None:
    """Raise UserError unless each variant's source is trained, in a way that allows it, and no two wait for each
    other."""
    known = {each.name: each for each in variants}
    for each in variants:
        if each.source is None:
            continue
        where = f"{path}, variant '{each.name}'"
        source = known.get(each.source)
        if source is None or source.config is None:
            what = "is not a variant" if source is None else "is a quantization after training"
            raise UserError(f"{where} starts from '{each.source}', which {what}; expected one that is trained")
        bits = source.config.quantization
        if each.ptq and (bits.effective_table_bits, bits.effective_mlp_bits) != (32, 32):
            raise UserError(f"{where} quantizes '{each.source}', which is not trained in FP32 (quantization.bits: 32)")
        seen, at = {each.name}, source
        while at.source:
            if at.name in seen:
                raise UserError(f"{path}: variant '{at.name}' starts from itself, directly or by way of others")
            seen.add(at.name)
            at = known.get(at.source, Variant("", None))
