"""The report in a real browser: no errors, nothing beside the page, both themes."""

import json
import re
import shutil
import subprocess
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import pytest

_BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (_BROWSER and _DRIVER), reason="chromium and chromedriver are not installed, so no browser can look"
)
_FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
]

Command = Callable[..., Any]


@pytest.fixture(scope="module")
def browser(page: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Command]:
    """`browser(name, **values)` sends a WebDriver command; the report of the full folder is open."""
    folder = tmp_path_factory.mktemp("browser")
    report = folder / "report.html"
    report.write_text(page)
    driver = subprocess.Popen([str(_DRIVER), "--port=0"], stdout=subprocess.PIPE, text=True)
    try:
        assert driver.stdout is not None
        port = next(m[1] for line in driver.stdout if (m := re.search(r"successfully on port (\d+)", line)))
        options = {"binary": _BROWSER, "args": [*_FLAGS, f"--user-data-dir={folder / 'profile'}"]}
        wanted = {
            "goog:chromeOptions": options,
            "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
        }
        answer = _send(f"http://127.0.0.1:{port}/session", {"capabilities": {"alwaysMatch": wanted}})
        base = f"http://127.0.0.1:{port}/session/{answer['sessionId']}/"

        def command(name: str, **values: Any) -> Any:
            return _send(base + name, values)

        command("url", url=report.as_uri())
        yield command
        _send(base.rstrip("/"), None, method="DELETE")
    finally:
        driver.terminate()
        driver.wait(timeout=30)


def _send(url: str, values: Any, method: str = "POST") -> Any:
    data = None if values is None else json.dumps(values).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(request, timeout=60) as answer:
        return json.load(answer)["value"]


def _ask(browser: Command, expression: str) -> Any:
    return browser("execute/sync", script=f"return {expression}", args=[])


def test_the_console_stays_empty_and_only_the_page_itself_is_loaded(browser: Command):
    assert browser("se/log", type="browser") == []
    events = [json.loads(e["message"])["message"] for e in browser("se/log", type="performance")]
    asked = {e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"}
    assert any(url.endswith("report.html") for url in asked)
    assert not [url for url in asked if url.startswith(("http:", "https:", "ws:", "wss:"))]


@pytest.mark.parametrize("width", [400, 1400])
def test_nothing_stands_out_beside_the_page(browser: Command, width: int):
    parameters = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser("goog/cdp/execute", cmd="Emulation.setDeviceMetricsOverride", params=parameters)
    assert _ask(browser, "window.innerWidth") == width
    assert _ask(browser, "document.documentElement.scrollWidth") <= width
    # What is wider than the page must be inside a box that scrolls.
    inside = "e.closest('.plot, .scroll, pre') || e.getBoundingClientRect().right <= window.innerWidth + 1"
    everything = "[...document.querySelectorAll('main *:not(svg *)')]"
    loose = _ask(browser, f"{everything}.filter(e => !({inside})).map(e => e.outerHTML.slice(0, 99))")
    assert loose == []


def test_every_text_of_a_figure_lies_inside_it(browser: Command):
    script = """
        return [...document.querySelectorAll('.plot svg')].flatMap(svg => {
            const box = svg.getBoundingClientRect();
            const out = r => r.left < box.left - 1 || r.right > box.right + 1
                || r.top < box.top - 1 || r.bottom > box.bottom + 1;
            return [...svg.querySelectorAll('text')].filter(t => out(t.getBoundingClientRect()))
                .map(t => t.textContent);
        })
    """
    assert browser("execute/sync", script=script, args=[]) == []


def test_the_button_changes_the_theme_of_page_and_figures(browser: Command):
    def colors() -> tuple[str, str]:
        return (
            _ask(browser, "getComputedStyle(document.body).backgroundColor"),
            _ask(browser, "getComputedStyle(document.querySelector('.plot text')).fill"),
        )

    before = colors()
    _ask(browser, "document.getElementById('theme').click()")
    after = colors()
    assert before[0] != after[0]
    assert before[1] != after[1]
    _ask(browser, "document.getElementById('theme').click()")
    assert colors() == before
