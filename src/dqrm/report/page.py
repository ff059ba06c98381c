"""The page: sections, plots and the library that draws them, in one HTML file that needs no network.

Vega-Lite comes from vl-convert, once, compressed; the browser inflates it. Scripts are named by their digests in the
page's content security policy, so that nothing else runs, whatever names and files contain.
"""

import base64
import gzip
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from dqrm import __version__
from dqrm.errors import UserError
from dqrm.files import replacing, require_replaceable
from dqrm.report import costs, curves, finals, provenance, weights
from dqrm.report.content import Section
from dqrm.report.records import Subject, read

_HERE = Path(__file__).parent
Progress = Callable[[str, int, int | None], None]


@dataclass(frozen=True)
class Sources:
    """What a page is made from.

    Attributes:
        bench: the output of `dqrm bench step --json`. data: the dataset; by default that of the first run.
    """

    subject: Subject
    bench: str | None = None
    data: str | None = None
    progress: Progress = lambda *_: None


SECTIONS: dict[str, Callable[[Sources], Section]] = {
    "figures": lambda sources: finals.final_figures(sources.subject),
    "steps": lambda sources: curves.over_steps(sources.subject),
    "calibration": lambda sources: curves.calibration(sources.subject),
    "weights": lambda sources: weights.histograms(sources.subject),
    "parts": lambda sources: costs.step_parts(sources.bench),
    "lookups": lambda sources: costs.lookups(sources.subject, sources.data, sources.progress),
    "sizes": lambda sources: finals.sizes(sources.subject),
    "configuration": lambda sources: provenance.configuration(sources.subject),
}
"""The page's sections by anchor, in order."""


def write_report(
    paths: Sequence[str | Path],
    output: str | Path,
    bench: str | None = None,
    data: str | None = None,
    progress: Progress = lambda *_: None,
) -> list[str]:
    """Write a page on runs, the first of them the baseline, or on a study.

    Args:
        paths: run folders, or the folder of one study.
        bench, data: see `Sources`.

    Returns:
        What could not be read, a line each; the page says it, too.

    Raises:
        UserError: there is no such run, the page cannot be written, or the extra dqrm[report] is not installed.
    """
    require_replaceable(Path(output))
    _require_extra()
    subject = read(paths)
    if not subject.series:
        raise UserError(f"{paths[0]} has no runs yet: nothing to report")
    sources = Sources(subject, bench, data, progress)
    page = render(subject, {anchor: make(sources) for anchor, make in SECTIONS.items()})
    with replacing(Path(output), f"another process writes {output}") as partial:
        partial.write_text(page, encoding="utf-8")
    return subject.notes()


def render(subject: Subject, sections: dict[str, Section]) -> str:
    """The page as HTML."""
    from jinja2 import Environment, StrictUndefined

    bundle, script = _bundle(), (_HERE / "page.js").read_text(encoding="utf-8")
    plots = [
        {"id": f"{anchor}-{at}", "title": plot.title, "spec": plot.spec}
        for anchor, section in sections.items()
        for at, plot in enumerate(section.plots)
    ]
    templates = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    templates.filters["code"] = _with_code
    return templates.from_string((_HERE / "page.html.j2").read_text(encoding="utf-8")).render(
        subject=subject,
        sections=sections,
        notes=subject.notes(),
        version=__version__,
        style=(_HERE / "page.css").read_text(encoding="utf-8"),
        script=script,
        policy=f"script-src {_digest(script)} {_digest(bundle)}",
        library=_packed(bundle),
        plots=_packed(json.dumps(plots, allow_nan=False)),
    )


def _with_code(text: str) -> str:
    """A sentence as HTML: what is between backticks is code."""
    from markupsafe import Markup, escape

    pieces = [escape(piece) for piece in text.split("`")]
    if len(pieces) % 2 == 0:  # one is left over: no pairs
        return escape(text)
    return Markup("").join(Markup(f"<code>{piece}</code>") if at % 2 else piece for at, piece in enumerate(pieces))


def _require_extra() -> None:
    try:
        import jinja2  # noqa: F401
        import vl_convert  # noqa: F401
    except ImportError:
        raise UserError("dqrm report needs packages that are missing; `pip install 'dqrm[report]'` adds them") from None


@cache
def _bundle() -> str:
    """Vega-Embed, Vega-Lite and Vega as one script, which sets `vegaEmbed`."""
    import vl_convert

    text: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    return text


def _packed(text: str) -> str:
    """Compressed, as base64: no text of it can end a script element."""
    return base64.b64encode(gzip.compress(text.encode("utf-8"), 9, mtime=0)).decode("ascii")


def _digest(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode('utf-8')).digest()).decode('ascii')}'"
