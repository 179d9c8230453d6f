"""The report in a real browser: no errors, nothing beside the page, both themes."""

from collections.abc import Iterator

import pytest
from report.browsing import INSTALLED, Command, ask, asked_for, loose, opened, resize, texts_outside

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
