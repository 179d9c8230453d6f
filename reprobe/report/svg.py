"""A figure as SVG that belongs to a page: it takes its colours and fonts, and shows values under the pointer.

Enters: a matplotlib figure. Leaves: one `<svg>` element as text, valid as XML and inside HTML, equal for
equal figures. Does not know what the figure shows.

The inks of `style` become CSS variables (`var(--ink)` …), so a theme changes them; ids are made unique to the
figure; every mark becomes a transparent shape with a `<title>`.
"""

import io
import re
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from reprobe.report.style import GRID, INK, MUTED, PAPER, SERIES, Mark, Plot
from reprobe.report.wording import printable

#: Colour in the figure → CSS variable on the page.
VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--grid", PAPER: "--paper"} | {
    color: f"--series-{i}" for i, color in enumerate(SERIES)
}
#: Settings of the figures on the page, whatever the user's own are.
RC: Any = {"svg.fonttype": "none", "svg.hashsalt": "reprobe", "font.family": ["sans-serif"]}

_SVG = "http://www.w3.org/2000/svg"
_COLOR = re.compile("|".join(VARIABLES), re.IGNORECASE)
_REFERENCE = re.compile(r"url\(#([^)]+)\)|^#(.+)$")
_DECIMALS = re.compile(r"(\.\d\d)\d+")
_SPACE = re.compile(r"\s+")
_POINTER = 5.0  # radius, in points, within which a point answers


def inline_svg(figure: Figure, name: str, label: str) -> str:
    """The figure as one `<svg>`; `name` makes its ids unique on the page, `label` is for screen readers."""
    root = ET.fromstring(_draw(figure))
    for element in root.iter():
        element.tag = element.tag.removeprefix(f"{{{_SVG}}}")
        element.text, element.tail = _text(element.text), _text(element.tail)
        element.attrib = {_attribute(k): _value(k, v) for k, v in element.attrib.items()}
    _drop(root, ("metadata", "style"))
    _own_ids(root, name)
    size = [float(v) for v in root.attrib["viewBox"].split()[2:]]
    root.attrib = {
        "xmlns": _SVG,
        "viewBox": root.attrib["viewBox"],
        "role": "img",
        "aria-label": label,
        # CSS pixels are 3/4 of a point
        "style": f"--natural:{size[0] * 4 / 3:.0f}px",
    }
    if isinstance(figure, Plot) and figure.marks:
        root.append(_pointers(figure, size[0], size[1]))
    return printable(ET.tostring(root, encoding="unicode"))


def _draw(figure: Figure) -> str:
    buffer = io.StringIO()
    with matplotlib.rc_context(RC), warnings.catch_warnings():
        # Only sizes are computed with matplotlib's font: the browser brings the glyphs.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(buffer, format="svg", facecolor="none", edgecolor="none", metadata={"Date": None})
    return printable(buffer.getvalue())


def _text(text: str | None) -> str | None:
    return None if text is None or not text.strip() else text


def _attribute(key: str) -> str:
    """SVG 2 has no xlink; what is left of namespaces is xml:…"""
    key = key.removeprefix("{http://www.w3.org/1999/xlink}")
    return key.replace("{http://www.w3.org/XML/1998/namespace}", "xml:")


def _value(key: str, value: str) -> str:
    if key in ("d", "x", "y", "transform"):
        # a hundredth of a point is finer than any screen; matrices scale images and keep their digits
        value = value if value.startswith("matrix") else _DECIMALS.sub(r"\1", value)
        return _SPACE.sub(" ", value).strip()
    if key == "style":
        return _COLOR.sub(lambda m: f"var({VARIABLES[m[0].lower()]})", value)
    return value


def _drop(root: ET.Element, tags: tuple[str, ...]) -> None:
    for parent in list(root.iter()):
        for child in [c for c in parent if c.tag in tags]:
            parent.remove(child)
        for child in [c for c in parent if c.tag == "defs" and not len(c)]:
            parent.remove(child)


def _own_ids(root: ET.Element, name: str) -> None:
    """Keep the ids that are referred to, and make them the figure's own."""
    new: dict[str, str] = {}
    for element in root.iter():
        for key, value in element.attrib.items():
            if key != "id" and (m := _REFERENCE.search(value)):
                new.setdefault(m[1] or m[2], f"{name}-{len(new)}")
    for element in root.iter():
        for key, value in list(element.attrib.items()):
            if key == "id":
                del element.attrib[key]
                if value in new:
                    element.attrib[key] = new[value]
            elif m := _REFERENCE.search(value):
                element.attrib[key] = value.replace(f"#{m[1] or m[2]}", f"#{new[m[1] or m[2]]}")


def _pointers(figure: Plot, width: float, height: float) -> ET.Element:
    """Transparent shapes over the marks, in the order of `marks`, each with its value as title."""
    group = ET.Element("g", {"class": "marks"})
    for mark, (x, y), (right, top) in _places(figure):
        if mark.size is None:
            shape = {"cx": f"{x * width:.1f}", "cy": f"{(1 - y) * height:.1f}", "r": f"{_POINTER:g}"}
            element = ET.SubElement(group, "circle", shape)
        else:
            shape = {
                "x": f"{x * width:.1f}",
                "y": f"{(1 - top) * height:.1f}",
                "width": f"{(right - x) * width:.1f}",
                "height": f"{(top - y) * height:.1f}",
            }
            element = ET.SubElement(group, "rect", shape)
        ET.SubElement(element, "title").text = mark.text
    return group


def _places(figure: Plot) -> Iterator[tuple[Mark, tuple[float, float], tuple[float, float]]]:
    """Lower left and upper right corner of each mark, as shares of the figure (equal for a point)."""
    to_share = figure.transFigure.inverted()
    for mark in figure.marks:
        w, h = mark.size or (0.0, 0.0)
        corners = np.array([(mark.x - w / 2, mark.y - h / 2), (mark.x + w / 2, mark.y + h / 2)])
        found = to_share.transform(mark.axes.transData.transform(corners))
        low, high = found.min(axis=0), found.max(axis=0)  # an axis may run downwards
        yield mark, (float(low[0]), float(low[1])), (float(high[0]), float(high[1]))
