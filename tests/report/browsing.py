"""A page in headless Chromium, driven over WebDriver."""

import contextlib
import json
import re
import shutil
import subprocess
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_DRIVER = shutil.which("chromedriver")
#: Whether a browser can look.
INSTALLED = bool(_BROWSER and _DRIVER)
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


@contextlib.contextmanager
def opened(page: str, folder: Path) -> Iterator[Command]:
    """`command(name, **values)` sends a WebDriver command; the page is open as report.html in `folder`."""
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
        driver.communicate(timeout=30)  # and closes the pipe


def _send(url: str, values: Any, method: str = "POST") -> Any:
    data = None if values is None else json.dumps(values).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(request, timeout=60) as answer:
        return json.load(answer)["value"]


def ask(browser: Command, expression: str) -> Any:
    """The value of a JavaScript expression on the page."""
    return browser("execute/sync", script=f"return {expression}", args=[])


def resize(browser: Command, width: int) -> None:
    """A window of that width, as a phone's below 500 pixels."""
    parameters = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser("goog/cdp/execute", cmd="Emulation.setDeviceMetricsOverride", params=parameters)


def asked_for(browser: Command) -> set[str]:
    """Everything that was loaded since the page was opened."""
    events = [json.loads(e["message"])["message"] for e in browser("se/log", type="performance")]
    return {e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"}


def loose(browser: Command) -> list[str]:
    """Elements that are wider than the page and not inside a box that scrolls."""
    inside = "e.closest('.plot, .scroll, pre') || e.getBoundingClientRect().right <= window.innerWidth + 1"
    everything = "[...document.querySelectorAll('main *:not(svg *)')]"
    found: list[str] = ask(browser, f"{everything}.filter(e => !({inside})).map(e => e.outerHTML.slice(0, 99))")
    return found


def clipped(browser: Command) -> list[str]:
    """Blocks of text that hold more than they show, and are not made to scroll."""
    blocks = "h1, h2, h3, p, li, dt, dd, th, td, figcaption, blockquote, pre, button, a"
    script = f"""
        return [...document.querySelectorAll('{blocks}')].filter(e => e.clientWidth && e.closest('.skip') === null
            && (e.scrollWidth > e.clientWidth + 1 || e.scrollHeight > e.clientHeight + 1)
            && getComputedStyle(e).display !== 'inline').map(e => e.outerHTML.slice(0, 120));
    """
    found: list[str] = browser("execute/sync", script=script, args=[])
    return found


def inks(browser: Command) -> set[tuple[str, str]]:
    """Colour and background, as CSS says them, of everything on the page that has text of its own. Of figures those
    texts whose colour is the page's."""
    script = """
        const out = new Set();
        const own = e => [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
        for (const e of document.querySelectorAll('body *:not(script):not(style):not(title)')) {
            const figure = e.closest('svg') !== null;
            if (!own(e) || (figure && !(e.getAttribute('style') || '').includes('var(--'))) continue;
            let behind = e, style = getComputedStyle(e);
            while (getComputedStyle(behind).backgroundColor === 'rgba(0, 0, 0, 0)') behind = behind.parentElement;
            out.add((figure ? style.fill : style.color) + '|' + getComputedStyle(behind).backgroundColor);
        }
        return [...out];
    """
    return {tuple(pair.split("|")) for pair in browser("execute/sync", script=script, args=[])}


def press(browser: Command, *keys: str) -> None:
    """Keys, one after the other, as a person at the keyboard presses them."""
    codes = {"Tab": "\ue004", "Enter": "\ue007", "Space": " "}
    actions = [{"type": kind, "value": codes[key]} for key in keys for kind in ("keyDown", "keyUp")]
    browser("actions", actions=[{"type": "key", "id": "keyboard", "actions": actions}])


def texts_outside(browser: Command) -> list[str]:
    """Texts of figures that do not lie inside them."""
    script = """
        return [...document.querySelectorAll('.plot svg')].flatMap(svg => {
            const box = svg.getBoundingClientRect();
            const out = r => r.left < box.left - 1 || r.right > box.right + 1
                || r.top < box.top - 1 || r.bottom > box.bottom + 1;
            return [...svg.querySelectorAll('text')].filter(t => out(t.getBoundingClientRect()))
                .map(t => t.textContent);
        })
    """
    found: list[str] = browser("execute/sync", script=script, args=[])
    return found
