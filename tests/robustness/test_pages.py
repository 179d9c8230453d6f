"""No text of data, models or file names becomes markup on a page, whatever it holds and wherever it stands.

The hostile text is put into every place of every artifact that takes it: each text of a header or a table, one after
the other, and kept there if the artifact can still be read.
"""

import json
import os
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from report import synthetic
from robustness import mutations as m

from reprobe.errors import ReprobeError
from reprobe.methods.dissected import Dissection
from reprobe.methods.tracing import TraceGrid
from reprobe.probing.artifact import Artifact, to_bytes
from reprobe.probing.direction import Direction
from reprobe.report import (
    Run,
    Step,
    probe_path,
    read_results,
    scan_map,
    store_path,
    trace_map,
    write_dissection,
    write_report,
    write_run,
    write_scan,
    write_steering,
)
from reprobe.report.folder import _KINDS, _kind
from reprobe.report.results import RUN_KIND, read_run
from reprobe.report.svg import inline_svg
from reprobe.report.wording import printable

#: Ends of whatever it may stand in, and what would then be obeyed.
MARKUP = (
    "</style></script></title></textarea>--><script>evil()</script><img src=x onerror=evil()>"
    "\" onload=\"evil()\" ' onload='evil()' ]]><svg onload=evil()> <!-- &lt; &#x3c; {{ 7*7 }} {% x %} $\\frac{1}$"
)
CONTROL = "a\x01\x08\x0b\x0c\x1b[31m\x7f\x85\u2028\u202e\ufeff\uffff\U0010ffff\r\nb\tc"
#: By this a text is known again.
MARK = "hostile"


class Seen(HTMLParser):
    """Tags, their attributes, and text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: dict[str, int] = {}
        self.attributes: set[str] = set()
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] = self.tags.get(tag, 0) + 1
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.text += data


def texts_in(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Places of all texts in a JSON value."""
    if isinstance(value, str):
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from texts_in(item, (*path, key))


def spoil(value: Any, text: str, accepted: Callable[[Any], bool]) -> int:
    """Put `text` after every text of `value`, in place, where `accepted` says that it may stand; how often it did."""
    n = 0
    for *way, last in list(texts_in(value)):
        at = value
        for key in way:
            at = at[key]
        before = at[last]
        at[last] = f"{before} {MARK} {text}"
        if accepted(value):
            n += 1
        else:
            at[last] = before
    return n


def spoil_file(path: Path, text: str) -> int:
    """The same for a file of a results folder."""
    kind = _kind(path)
    if kind == RUN_KIND:
        read: Callable[[Path], Any] = lambda p: read_run(p.parent)  # noqa: E731
    elif kind in _KINDS:
        read = _KINDS[kind][1]
    else:
        return 0
    data = path.read_bytes()
    if path.suffix == ".json":
        value, write = json.loads(data), lambda v: path.write_text(json.dumps(v))
    elif path.suffix in (".csv", ".parquet"):
        return 0
    else:
        raw, rest = m.opened(data)
        envelope = json.loads(raw["__metadata__"]["reprobe"])
        arrays = {n: m._array(v, rest) for n, v in raw.items() if n != "__metadata__"}
        value = envelope["header"]

        def write(v: Any) -> object:
            return path.write_bytes(to_bytes(envelope["kind"], Artifact(v, arrays)))

    def accepted(v: Any) -> bool:
        write(v)
        try:
            read(path)
        except ReprobeError:
            return False
        return _kind(path) == kind

    n = spoil(value, text, accepted)
    write(value)
    return n


def fill(folder: Path, labels: tuple[str, str]) -> Path:
    """A small results folder with everything in it that a page shows."""
    store = synthetic.make_store(store_path(folder, "moods"), rows=40, layers=2, labels=labels)
    synthetic.make_grid(store, "PCAReader").save(probe_path(folder, "moods-pca"))
    write_scan(folder, "capitals", synthetic.make_scan("Rome is in"))
    write_steering(folder, "happiness", synthetic.make_steering())
    steps = (Step("load", 3.4, "a model"),)
    write_run(folder, Run("Truth", steps, synthetic.IDENTITY, {"python": "3"}, ("reprobe demo",), ("It works.",)))
    Direction.from_vector("resid.post@1", [3.0, 4.0], identity=synthetic.IDENTITY).save(folder / "d.safetensors")
    return synthetic.fill_beyond_probes(folder)


@pytest.fixture(scope="module", params=[MARKUP, CONTROL], ids=["markup", "control characters"])
def spoiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A results folder with hostile texts everywhere, and the text."""
    folder, text = tmp_path_factory.mktemp("results"), str(request.param)
    fill(folder, (f"a {MARK} {text}", f"b {MARK} {text}"))
    counts = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and ".reprobe" not in str(p)):
        if path.suffix != ".html":
            counts[path.name] = spoil_file(path, text)
    assert sum(counts.values()) > 100, counts
    (folder / "neurons & more.html").unlink()
    name = text.replace("/", "∕")[:90]  # the longest that file systems take is 255 bytes
    pl.DataFrame({"a": [1]}).write_csv(folder / f"{name}.csv")
    (folder / f"{name}.json").write_text("{")
    (folder / os.fsdecode(b"\xff\xfe not UTF-8 <b>.txt")).write_text("mine")
    return folder, text


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """What stands on the page of a folder in which nothing is hostile."""
    folder = fill(tmp_path_factory.mktemp("plain"), ("sadness", "happiness"))
    return Seen(write_report(folder).read_text())


def require_harmless(page: str, plain: Seen) -> Seen:
    """The page has no tag and no attribute that the plain one lacks, and no more scripts and styles than it."""
    seen = Seen(page)
    assert set(seen.tags) <= set(plain.tags) | {"noscript", "article", "input", "label"}
    assert not {a for a in seen.attributes if a.startswith("on")}
    assert seen.attributes <= plain.attributes | {"for", "type", "autocomplete", "spellcheck", "hidden"}
    assert seen.tags["title"] >= 1
    for tag in ("style", "meta"):
        assert seen.tags[tag] <= plain.tags[tag] + 1, tag
    for svg in re.findall(r"<svg .*?</svg>", page, re.S):
        ET.fromstring(svg)
    return seen


def test_the_report_shows_hostile_texts_and_obeys_none(spoiled: tuple[Path, str], plain: Seen) -> None:
    folder, text = spoiled
    said: list[str] = []
    page = write_report(folder, folder / "out.html", say=said.append).read_bytes().decode()
    assert page == printable(page)
    seen = require_harmless(page, plain)
    assert seen.tags["script"] == plain.tags["script"]
    assert seen.text.count(MARK) > 20
    if text == MARKUP:
        assert "<script>evil()</script><img src=x onerror=evil()>" in seen.text
        assert "{{ 7*7 }}" in seen.text
    assert any("not UTF-8" in line for line in said)


def test_the_page_of_a_dissection_does_neither(spoiled: tuple[Path, str], plain: Seen, tmp_path: Path) -> None:
    folder, text = spoiled
    found = Dissection.load(folder / "neurons.dissection")
    assert MARK in found.names[0]
    page = write_dissection(found, tmp_path / "d.html").read_text()
    seen = require_harmless(page, plain)
    assert seen.tags["script"] == 3
    data = json.loads(re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[0])
    assert printable(data["concepts"][0]["n"]).endswith(printable(text))
    assert MARK in seen.text


@pytest.mark.filterwarnings("ignore:Glyph .* missing from font")  # sizes alone are computed with the font
def test_figures_that_are_saved_by_themselves_are_whole(spoiled: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = spoiled
    trace, scan = TraceGrid.load(folder / "facts.trace"), next(iter(read_results(folder).scans.values()))
    for name, figure in (("trace", trace_map(trace)), ("scan", scan_map(scan.scan))):
        root = ET.fromstring(inline_svg(figure, name, "a figure"))
        assert not {key for element in root.iter() for key in element.attrib if key.startswith("on")}
        figure.savefig(tmp_path / f"{name}.svg")
        ET.parse(tmp_path / f"{name}.svg")
