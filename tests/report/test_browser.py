"""The report in a real browser: no errors, nothing beside the page, both themes."""

import re
from collections.abc import Iterator

import pytest
from report.browsing import (
    INSTALLED,
    Command,
    ask,
    asked_for,
    clipped,
    inks,
    loose,
    opened,
    press,
    resize,
    texts_outside,
)
from report.test_page import contrast

pytestmark = pytest.mark.skipif(
    not INSTALLED, reason="chromium and chromedriver are not installed, so no browser can look"
)


@pytest.fixture(scope="module")
def browser(page: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Command]:
    """The report of the full folder is open."""
    with opened(page, tmp_path_factory.mktemp("browser")) as command:
        yield command


def test_the_console_stays_empty_and_only_the_page_itself_is_loaded(browser: Command):
    assert browser("se/log", type="browser") == []
    asked = asked_for(browser)
    assert any(url.endswith("report.html") for url in asked)
    assert not [url for url in asked if url.startswith(("http:", "https:", "ws:", "wss:"))]


@pytest.mark.parametrize("width", [400, 1400])
def test_nothing_stands_out_beside_the_page(browser: Command, width: int):
    resize(browser, width)
    assert ask(browser, "window.innerWidth") == width
    assert ask(browser, "document.documentElement.scrollWidth") <= width
    assert loose(browser) == []
    assert clipped(browser) == []


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_text_stands_out_from_what_is_behind_it(browser: Command, theme: str):
    ask(browser, f"document.documentElement.dataset.theme = '{theme}'")
    found = inks(browser)
    assert len(found) >= 5
    for pair in found:
        ink, behind = (_hex(color) for color in pair)
        assert contrast(ink, behind) >= 4.5, pair
    ask(browser, "delete document.documentElement.dataset.theme")


def _hex(color: str) -> str:
    """rgb(1, 2, 3) as #010203."""
    numbers = re.fullmatch(r"rgb\((\d+), (\d+), (\d+)\)", color)
    assert numbers is not None, color
    return "#" + "".join(f"{int(n):02x}" for n in numbers.groups())


def test_the_page_is_gone_through_with_the_keyboard_and_the_focus_is_seen(browser: Command):
    resize(browser, 1400)
    browser("refresh")  # whatever was clicked before
    # A page that is loaded again is shown where it was scrolled to, and would glide to what has the focus.
    ask(browser, "window.scrollTo({top: 0, behavior: 'instant'})")
    press(browser, "Tab")
    focused = "document.activeElement"
    assert ask(browser, f"{focused}.className") == "skip"
    assert ask(browser, f"{focused}.getBoundingClientRect().top") >= 0, "it is shown when it has the focus"
    seen = []
    for _ in range(25):
        style = f"getComputedStyle({focused})"
        assert ask(browser, f"{style}.outlineStyle") == "solid", ask(browser, f"{focused}.outerHTML.slice(0, 99)")
        assert ask(browser, f"parseFloat({style}.outlineWidth)") >= 2
        seen.append(ask(browser, f"{focused}.textContent.trim()"))
        press(browser, "Tab")
    assert "Facts written into weights" in seen, "contents come first"
    ask(browser, "document.querySelector('.skip').focus()")
    press(browser, "Enter")
    assert ask(browser, f"{focused}.id") == "results"


@pytest.mark.parametrize("width", [400, 1400])
def test_a_table_sorts_by_keyboard_and_says_by_what(browser: Command, width: int):
    resize(browser, width)
    table = "[...document.querySelectorAll('#layers table')].at(-1)"
    column = f"[...{table}.tHead.rows[0].cells].findIndex(c => c.textContent === 'AUROC')"
    head = f"{table}.tHead.rows[0].cells[{column}]"
    cells = f"[...{table}.tBodies[0].rows].map(r => parseFloat(r.cells[{column}].textContent))"
    written = ask(browser, cells)
    ask(browser, f"{head}.querySelector('button').focus()")
    assert ask(browser, "document.activeElement.offsetWidth") > 10
    for key, state, order in (
        ("Enter", "descending", sorted(written, reverse=True)),
        ("Space", "ascending", sorted(written)),
        ("Enter", "none", written),
    ):
        press(browser, key)
        assert ask(browser, f"{head}.getAttribute('aria-sort')") == state
        assert ask(browser, cells) == order
    assert ask(browser, f"[...{table}.querySelectorAll('th')].every(h => h.hasAttribute('aria-sort'))")


def test_numbers_sort_as_numbers_and_sites_by_their_blocks(browser: Command):
    table = "document.querySelector('#traces table')"
    effects = f"[...{table}.tBodies[0].rows].map(r => parseFloat(r.cells[3].textContent.replace('−', '-')))"
    ask(browser, f"{table}.querySelectorAll('button')[3].click()")
    found = ask(browser, effects)
    assert found == sorted(found, reverse=True)
    assert len(set(found)) > 3
    ask(browser, f"{table}.querySelectorAll('button')[0].click()")
    kinds = ask(browser, f"[...{table}.tBodies[0].rows].map(r => r.cells[0].textContent)")
    assert kinds == sorted(kinds)
    assert ask(browser, f"{table}.querySelectorAll('[aria-sort=ascending], [aria-sort=descending]').length") == 1


def test_every_text_of_a_figure_lies_inside_it(browser: Command):
    assert texts_outside(browser) == []


def test_the_button_changes_the_theme_of_page_and_figures(browser: Command):
    def colors() -> tuple[str, str]:
        return (
            ask(browser, "getComputedStyle(document.body).backgroundColor"),
            ask(browser, "getComputedStyle(document.querySelector('.plot text')).fill"),
        )

    before = colors()
    ask(browser, "document.getElementById('theme').click()")
    after = colors()
    assert before[0] != after[0]
    assert before[1] != after[1]
    ask(browser, "document.getElementById('theme').click()")
    assert colors() == before
