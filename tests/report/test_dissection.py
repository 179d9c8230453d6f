"""The report of a dissection: what it says, that data are never markup, and that it is browsed in a real browser."""

import html
import json
import re

import numpy as np
import pytest
from report.browsing import INSTALLED, ask, asked_for, loose, opened, resize, texts_outside

from reprobe.errors import ArtifactExists
from reprobe.evaluation.causation import causes
from reprobe.methods.concepts import Concept
from reprobe.methods.dissection import dissect
from reprobe.report import causal_intervals, detector_bars, write_dissection

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
WORDS = ("the", "cat", "of", "red", "and", "seven", "is", "on", "blue", "an", HOSTILE)
TEXTS = [" ".join(words) for words in np.random.default_rng(0).choice(WORDS, (60, 12))]
CONCEPTS = (
    Concept.words("colours", ["red", "blue"], kind="thing"),
    Concept.words("the", ["the"], kind="language"),
    Concept.words(f"<b>{HOSTILE}</b>", ["cat", "seven"], about="<i>hostile</i>", kind="</td>"),
    Concept.regex("100% of / it", "alert", kind="form"),
)


@pytest.fixture(scope="module")
def lm(tiny_lm):
    return tiny_lm("llama")


@pytest.fixture(scope="module")
def found(lm):
    return dissect(lm, TEXTS, CONCEPTS, "mlp.neurons@*", quantile=0.02, permutations=4)


@pytest.fixture(scope="module")
def page(lm, found, tmp_path_factory):
    caused = causes(lm, found, controls=3, most=2, rows=6)
    return write_dissection(found, tmp_path_factory.mktemp("page") / "d.html", causation=caused).read_text()


def data_of(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


def test_data_are_never_markup(page):
    assert "<script>alert" not in page
    assert "<img" not in page
    assert "<b>" not in page.replace("<b>Figure", "")
    assert "<i>" not in page
    assert len(re.findall(r"<script", page)) == 3
    assert "connect-src" not in page
    assert "default-src 'none'" in html.unescape(page)
    assert len(re.findall(r"sha256-", html.unescape(page))) == 2


def test_the_page_has_every_concept_and_says_how_many_units_it_has(found, page):
    data = data_of(page)
    assert [c["n"] for c in data["concepts"]] == found.names
    assert sum(c["d"] for c in data["concepts"]) == found.units["detector"].sum()
    for concept, name in zip(data["concepts"], found.names, strict=True):
        best = found.of_concept(name, 3)
        assert [data["units"][u]["n"] for u, *_ in concept["u"][:3]] == best["unit"].to_list()
        assert concept["u"][0][1] == pytest.approx(best["iou"][0], rel=1e-3)
    unit = data["units"][0]
    snippets = found.snippets(unit["n"])
    assert ["".join(text for text, _ in pieces) for _, pieces in unit["q"]] == ["".join(s.pieces) for s in snippets][:6]
    assert f"{len(data['units']):,} of {found.n:,} units have a page" in page


def test_equal_results_are_equal_pages_and_only_reports_are_replaced(found, tmp_path):
    path = write_dissection(found, tmp_path / "d.html", units=5)
    first = path.read_bytes()
    assert write_dissection(found, path, units=5).read_bytes() == first
    other = tmp_path / "other.html"
    other.write_text("mine")
    with pytest.raises(ArtifactExists):
        write_dissection(found, other)


def test_a_dissection_that_found_nothing_and_asked_for_no_chance_has_its_page_too(lm, tmp_path):
    nothing = dissect(lm, TEXTS, CONCEPTS, "mlp.neurons@*", quantile=0.02, permutations=0, detector=0.999)
    assert not nothing.units["detector"].any()
    page = write_dissection(nothing, tmp_path / "n.html").read_text()
    assert "Detectors over layers" in page
    assert "by chance" not in page.split('id="figure-detectors"')[1].split("</figure>")[0]


def test_figures_carry_the_values_of_their_marks(lm, found):
    bars = detector_bars(found)
    counted = [int(m[1]) for mark in bars.marks if (m := re.search(r": (\d+) detect", mark.text))]
    assert sum(counted) == found.units["detector"].sum()
    caused = causes(lm, found, ["colours"], controls=2, most=1, rows=6)
    marks = causal_intervals(caused).marks
    assert len(marks) == 2 * caused.table.height


@pytest.fixture(scope="module")
def browser(page, tmp_path_factory):
    if not INSTALLED:
        pytest.skip("chromium and chromedriver are not installed, so no browser can look")
    with opened(page, tmp_path_factory.mktemp("browser")) as command:
        yield command


@pytest.mark.parametrize("width", [400, 1400])
def test_every_view_fits_the_window_and_nothing_is_loaded(browser, found, width):
    resize(browser, width)
    for name in ("concept/colours", f"unit/{found.unit_names[0]}", ""):
        ask(browser, f"location.hash = {json.dumps(name)}")
        assert ask(browser, "document.documentElement.scrollWidth") <= width
        assert loose(browser) == []
    assert texts_outside(browser) == []
    assert browser("se/log", type="browser") == []
    assert not [url for url in asked_for(browser) if url.startswith(("http:", "https:", "ws:", "wss:"))]


def test_links_of_the_tables_open_the_pages_they_name(browser, found):
    for name in found.names:
        link = f"[...document.querySelectorAll('#concepts a')].find(a => a.textContent === {json.dumps(name)})"
        ask(browser, f"{link}.click()")
        ask(browser, "dispatchEvent(new HashChangeEvent('hashchange'))")
        assert ask(browser, "document.querySelector('#view h3').textContent") == name
    unit = found.of_concept(found.names[0])["unit"][0]
    ask(browser, f"location.hash = {json.dumps('unit/' + unit)}")
    ask(browser, "dispatchEvent(new HashChangeEvent('hashchange'))")
    assert ask(browser, "document.querySelector('#view h3').textContent") == unit
    assert ask(browser, "document.querySelectorAll('#view mark.peak').length") == len(found.snippets(unit)[:6])


def test_the_search_finds_names_and_text(browser):
    def search(word):
        script = f"{{const b = document.getElementById('search'); b.value = {json.dumps(word)};"
        browser("execute/sync", script=script + "b.dispatchEvent(new Event('input'));}", args=[])
        return ask(browser, "[...document.querySelectorAll('#hits li')].map(l => l.textContent)")

    assert search("colours")[0] == "colours"
    assert any("mlp.neurons@1." in line for line in search("neurons@1."))
    assert any("seven" in line for line in search("seven"))
    assert search("zebra crossing") == []
    assert ask(browser, "document.getElementById('found').textContent") == "Nothing found."
    assert search("onerror")
    assert ask(browser, "document.querySelectorAll('#browse img').length") == 0
