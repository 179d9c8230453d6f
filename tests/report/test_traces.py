"""Figures of traces show the effects that they were given."""

import numpy as np
import pytest
from matplotlib.collections import QuadMesh
from matplotlib.patches import Rectangle
from methods.test_tracing import grid_of

from reprobe.errors import UsageError
from reprobe.methods.tracing import KINDS
from reprobe.report import trace_curves, trace_map
from reprobe.report.svg import inline_svg


def test_a_map_has_every_token_and_block_in_order_of_blocks_and_frames_the_subject():
    grid = grid_of(layers=(5, 0, 2))
    figure, trace = trace_map(grid, 1), grid.traces[1]
    panels = figure.axes[:3]
    for k, axes in enumerate(panels):
        (mesh,) = (c for c in axes.collections if isinstance(c, QuadMesh))
        np.testing.assert_allclose(mesh.get_array(), trace.effects[k][[1, 2, 0]].T)
        (frame,) = (p for p in axes.patches if isinstance(p, Rectangle))
        assert (frame.get_y() + 0.5, frame.get_height()) == (2, 3)
        assert [t.get_text() for t in axes.get_xticklabels()] == ["0", "2", "5"]
    assert [t.get_text() for t in panels[0].get_yticklabels()] == list(trace.tokens)
    assert panels[0].get_ylim() == (len(trace.tokens) - 0.5, -0.5), "the text runs downwards"
    assert len(figure.marks) == trace.effects.size
    assert f"mlp.out, block 5, token 3 'd': {trace.effects[2, 0, 3]:+.4f}" in [m.text for m in figure.marks]
    with pytest.raises(UsageError, match="facts 0–3"):
        trace_map(grid, 4)


def test_curves_have_a_line_per_role_and_a_band_where_there_is_an_interval():
    grid = grid_of(lengths=((1, 3, 3), (2, 3, 3), (0, 1, 2)))
    figure = trace_curves(grid, title="three facts")
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "resid.post",
        "attn.out, 10 blocks",
        "mlp.out, 10 blocks",
    ]
    assert len(figure.marks) == grid.averages.height
    for kind, axes in zip(KINDS, figure.axes, strict=True):
        lines = {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}
        assert set(lines) >= {"last subject (n=3)", "middle subject (n=2)"}
        want = grid.averages.filter(kind=kind, role="last subject").sort("layer")
        np.testing.assert_allclose(lines["last subject (n=3)"].get_ydata(), want["effect"])
        assert len(axes.collections) == 6


def test_one_fact_alone_has_curves_without_bands():
    figure = trace_curves(grid_of(lengths=((1, 2, 3),), kinds=("mlp.out",)))
    assert not figure.axes[0].collections


def test_figures_are_parts_of_a_page_whatever_the_tokens():
    grid = grid_of()
    object.__setattr__(grid.traces[0], "tokens", ("<b>", "$x", " & ", "\n", '"'))
    for figure in (trace_map(grid), trace_curves(grid)):
        assert "<b>" not in inline_svg(figure, "trace", "a trace")
