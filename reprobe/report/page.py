"""The report: one HTML file with everything in it.

Enters: a results folder. Leaves: a page that needs no network, adapts to light, dark, paper and phone, and is
equal, byte for byte, for equal results. Does not know what the sections say.
"""

import base64
import hashlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from matplotlib import style

from reprobe.errors import ArtifactExists
from reprobe.provenance import write_durably
from reprobe.report.blocks import Section
from reprobe.report.folder import REPORT_MARK, Results, read_results
from reprobe.report.sections import sections
from reprobe.report.wording import printable
from reprobe.store.reader import ActivationStore

REPORT = "report.html"
#: Files without results that `say` is told by name.
_TOLD = 5
_HERE = Path(__file__).parent


def write_report(
    folder: str | Path,
    to: str | Path | None = None,
    *,
    stores: Mapping[str, ActivationStore] | None = None,
    say: Callable[[str], None] = warnings.warn,
) -> Path:
    """Draw the report of a results folder into `to` (default: report.html there), replacing an older report.

    Whatever verbs and functions saved in the folder, or in folders inside it, is found by what it is and joined. What
    is not in the folder is not in the report, but for `stores` that lie elsewhere: where they are those that results
    in the folder were made from, their rows are drawn. Files that are damaged, and files that are no results, are
    named on the page and told to `say`. Raises `ArtifactMissing` if there is no result at all, `CorruptArtifact` if
    all are damaged, `ArtifactExists` if `to` is something else than a report.
    """
    path = writable(Path(folder) / REPORT if to is None else Path(to))
    results = read_results(folder, stores)
    for damaged in results.damaged:
        say(f"{damaged.path} is damaged and not in the report: {damaged.why}")
    if results.unknown:
        n, told = len(results.unknown), ", ".join(results.unknown[:_TOLD])
        say(f"not in the report, because they are no results: {told}{f', and {n - _TOLD} more' if n > _TOLD else ''}")
    text = render(results, path.parent, say)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, text.encode())
    return path


def writable(path: Path) -> Path:
    """`path`, where there is nothing yet or an older report; raises `ArtifactExists` otherwise."""
    if path.is_dir():
        raise ArtifactExists(f"{path} is a folder; name a file, e.g. {path / REPORT}")
    if path.exists() and REPORT_MARK not in path.read_bytes()[:1024]:
        raise ArtifactExists(f"{path} exists and is not a report; choose another name")
    return path


def render(results: Results, base: Path, say: Callable[[str], None]) -> str:
    """The page of a results folder as text, which will lie in the folder `base`; `say` as in `write_report`."""
    # A user's matplotlibrc must not change the page. `style.context` leaves the backend alone.
    with style.context("default"):
        shown = sections(results, base, say)
    title = results.run.title if results.run else f"Results in {results.folder.absolute().name}"
    return page("page.html", title, results.run.summary if results.run else (), shown)


def page(
    template: str,
    title: str,
    summary: Sequence[str],
    shown: Sequence[Section],
    *,
    scripts: Mapping[str, str] | None = None,
    **more: Any,
) -> str:
    """A page from its template. `scripts` are further ones by the name that the template has for them: with the page's
    own, they are all that a browser may run. `more` goes to the template."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    css, script = ((_HERE / name).read_text().strip() for name in ("page.css", "page.js"))
    own = scripts or {}
    allowed = " ".join(f"'sha256-{_digest(text)}'" for text in (script, *own.values()))
    text = environment.get_template(template).render(
        title=title,
        summary=summary,
        sections=shown,
        css=Markup(css),
        script=Markup(script),
        policy=f"default-src 'none'; style-src 'unsafe-inline'; script-src {allowed}; img-src data:",
        **{name: Markup(text) for name, text in own.items()},
        **more,
    )
    return printable(text)


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
