"""A figure on the page: valid, in the page's colours, its values under the pointer where they are drawn."""

import re
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from matplotlib import colormaps
from matplotlib.figure import Figure
from report import synthetic

from reprobe.probing.probe_grid import ProbeGrid
from reprobe.report import cosine_map, dose_curves, head_map, layer_curves, probe_path, scan_map
from reprobe.report.style import DIVERGING, FRAME, SEQUENTIAL
from reprobe.report.svg import VARIABLES, inline_svg

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def grid(full: Path) -> ProbeGrid:
    return ProbeGrid.load(probe_path(full, "cities-logistic"))


def circles(root: ET.Element) -> dict[str, tuple[float, float]]:
    return {
        c.findtext(f"{SVG}title", ""): (float(c.get("cx", "nan")), float(c.get("cy", "nan")))
        for c in root.iter(f"{SVG}circle")
    }


def test_every_mark_is_a_title_with_the_exact_value(grid: ProbeGrid):
    figure = head_map(grid)
    root = ET.fromstring(inline_svg(figure, "x", "y"))
    assert [t.text for t in root.iter(f"{SVG}title")] == [m.text for m in figure.marks]


def test_points_answer_where_they_are_drawn():
    table = synthetic.make_steering().table
    root = ET.fromstring(inline_svg(dose_curves(table), "x", "y"))
    markers = [(float(u.get("x", "nan")), float(u.get("y", "nan"))) for u in root.iter(f"{SVG}use")]
    places = circles(root)
    assert len(places) == 2 * len(table)
    for text, (x, y) in places.items():
        assert min(np.hypot(x - a, y - b) for a, b in markers) < 0.2, text


def test_cells_answer_where_they_are_drawn():
    scan = synthetic.make_scan("a b c").scan
    root = ET.fromstring(inline_svg(scan_map(scan), "x", "y"))
    rects = [r for r in root.iter(f"{SVG}rect") if r.find(f"{SVG}title") is not None]
    (mesh,) = [g for g in root.iter(f"{SVG}g") if len(g.findall(f"{SVG}path")) == scan.scores.size]
    for rect, path in zip(rects[:: len(scan.tokens) + 1], list(mesh)[:: len(scan.tokens) + 1], strict=True):
        numbers = np.array(re.findall(r"-?\d+(?:\.\d+)?", path.get("d", "")), dtype=float).reshape(-1, 2)
        x, y, w, h = (float(rect.get(k, "nan")) for k in ("x", "y", "width", "height"))
        np.testing.assert_allclose(numbers.min(axis=0), [x, y], atol=0.2)
        np.testing.assert_allclose(numbers.max(axis=0), [x + w, y + h], atol=0.2)


def test_cells_of_an_axis_that_runs_downwards_have_a_height(grid: ProbeGrid):
    named = {str(s): grid.directions[s] for s in grid.sites if s.part == "resid.post"}
    root = ET.fromstring(inline_svg(cosine_map(dict(list(named.items())[:4])), "x", "y"))
    rects = [r for r in root.iter(f"{SVG}rect") if r.find(f"{SVG}title") is not None]
    assert len(rects) == 16
    y = [float(r.get("y", "nan")) for r in rects]
    assert all(float(r.get("height", "nan")) > 1 for r in rects)
    assert y[0] < y[4] < y[8], "the first direction is at the top"


def test_inks_become_variables_and_data_colours_stay(grid: ProbeGrid):
    text = inline_svg(layer_curves([grid]), "x", "y").lower()
    assert "var(--ink)" in text
    assert "var(--series-0)" in text
    assert not [color for color in VARIABLES if color in text]
    assert FRAME in inline_svg(head_map(grid), "x", "y")


def test_no_colour_of_a_map_is_mistaken_for_an_ink():
    for name in (SEQUENTIAL, DIVERGING):
        used = (colormaps[name](np.arange(256), bytes=True)[:, :3]).tolist()
        assert not {"#{:02x}{:02x}{:02x}".format(*c) for c in used} & {*VARIABLES, FRAME}


def test_ids_of_two_figures_do_not_meet_and_all_references_resolve(grid: ProbeGrid):
    found = []
    for name in ("a", "b"):
        text = inline_svg(layer_curves([grid]), name, "y")
        ids = re.findall(r' id="([^"]+)"', text)
        assert len(ids) == len(set(ids)) > 0
        assert {*re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', text)} <= {
            pair for i in ids for pair in ((i, ""), ("", i))
        }
        found.append(set(ids))
    assert not found[0] & found[1]


def test_the_label_and_the_marks_cannot_break_out_of_the_markup():
    root = ET.fromstring(inline_svg(scan_map(synthetic.make_scan(synthetic.NASTY).scan), "x", synthetic.NASTY))
    assert root.get("aria-label") == synthetic.NASTY
    assert not list(root.iter(f"{SVG}script"))


def test_equal_figures_are_equal_text(grid: ProbeGrid):
    assert inline_svg(head_map(grid), "x", "y") == inline_svg(head_map(grid), "x", "y")


def test_any_matplotlib_figure_will_do():
    figure = Figure()
    figure.subplots().plot([1, 2], [3, 4])
    root = ET.fromstring(inline_svg(figure, "x", "y"))
    assert not list(root.iter(f"{SVG}title"))
