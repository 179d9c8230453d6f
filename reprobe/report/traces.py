"""Causal traces: the effect of every token at every block for one fact, and its averages by role of the token.

Enters: a `TraceGrid`. Leaves: a matplotlib Figure each, fit for a notebook or a paper, with the exact value of every
mark in `.marks`. Layers are block indices from 0. Does not know the report.
"""

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.colors import CenteredNorm
from matplotlib.patches import Rectangle

from reprobe.errors import UsageError
from reprobe.methods.tracing import ROLES, TraceGrid
from reprobe.report.style import (
    DIVERGING,
    FRAME,
    INK,
    LABEL,
    MUTED,
    PAPER,
    WIDTH,
    Mark,
    Plot,
    colorbar,
    dress,
    heading,
    legend,
    series,
    token_text,
    whole_ticks,
)

_LONG_TOKEN = 18
_WHAT = {
    "resid.post": "state restored",
    "attn.out": "attention restored",
    "mlp.out": "MLP restored",
}


def trace_map(grid: TraceGrid, fact: int = 0, *, title: str | None = None) -> Plot:
    """Indirect effect of every token (from top to bottom) and block of one fact, a panel per kind.

    The subject's tokens are framed. All panels share their colours: blue raises the probability of the object, red
    lowers it, white is the corrupted run. Raises `UsageError` if there is no such fact.
    """
    if not 0 <= fact < len(grid.traces):
        raise UsageError(f"fact={fact}: the grid has facts 0–{len(grid.traces) - 1}")
    trace, kinds, layers = grid.traces[fact], grid.settings.kinds, np.array(grid.layers)
    order = np.argsort(layers)
    values = trace.effects[:, order]
    n = len(trace.tokens)
    figure = Plot(1.5 + 2.75 * len(kinds), 1.6 + 0.2 * n)
    panels = figure.subplots(1, len(kinds), squeeze=False, sharey=True)[0]
    norm = CenteredNorm(0, max(float(np.abs(values).max()), 1e-9))
    for k, (axes, kind) in enumerate(zip(panels, kinds, strict=True)):
        dress(axes, x="block" if kind == "resid.post" else f"centre of {_blocks(grid)}", y="", grid="none")
        axes.set_title(f"{kind}: {_WHAT[kind]}", loc="left", fontsize=LABEL, color=INK)
        edges = np.arange(len(layers) + 1) - 0.5
        mesh = axes.pcolormesh(
            edges, np.arange(n + 1) - 0.5, values[k].T, cmap=DIVERGING, norm=norm, edgecolors=PAPER, linewidth=0.2
        )
        _block_ticks(axes, layers[order])
        for i, t in np.ndindex(len(layers), n):
            text = f"{kind}, block {layers[order][i]}, token {t} {trace.tokens[t]!r}: {values[k, i, t]:+.4f}"
            figure.marks.append(Mark(axes, i, t, text, (1.0, 1.0)))
        first, stop = trace.subject
        axes.add_patch(
            Rectangle(
                (-0.5, first - 0.5),
                len(layers),
                stop - first,
                fill=False,
                edgecolor=FRAME,
                linewidth=1.4,
                clip_on=False,
            )
        )
        axes.set(ylim=(n - 0.5, -0.5))
        axes.tick_params(axis="y", length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
    panels[0].set_yticks(range(n), [token_text(token, _LONG_TOKEN) for token in trace.tokens], parse_math=False)
    colorbar(
        figure, mesh, list(panels), f"p({trace.fact.true}) − {trace.corrupted:.3f}", pad=0.01, aspect=4 * (1 + 0.2 * n)
    )
    about = f"{trace.fact.prompt} → {trace.fact.true}: clean {trace.clean:.3f}, corrupted {trace.corrupted:.3f}"
    heading(figure, title or about, 96, "normal")
    return figure


def trace_curves(grid: TraceGrid, *, title: str | None = None) -> Plot:
    """Mean indirect effect over blocks, a line with its 95 % band over facts per role of the token, a panel per kind.

    In the legend, n is the number of facts that have such a token.
    """
    kinds = grid.settings.kinds
    figure = Plot(WIDTH * 1.35, 0.9 + 2.3 * len(kinds))
    panels = figure.subplots(len(kinds), 1, sharex=True, squeeze=False)[:, 0]
    for axes, kind in zip(panels, kinds, strict=True):
        for i, role in enumerate(ROLES):
            lines = grid.averages.filter((pl.col("kind") == kind) & (pl.col("role") == role)).sort("layer")
            if not len(lines):
                continue
            look = series(i)
            if lines["effect_low"].null_count() == 0:
                axes.fill_between(
                    lines["layer"],
                    lines["effect_low"],
                    lines["effect_high"],
                    color=look["color"],
                    alpha=0.16,
                    linewidth=0,
                )
            name = f"{role} (n={lines['n'][0]})"
            axes.plot(lines["layer"], lines["effect"], markersize=3.2, linewidth=1.4, label=name, **look)
            for row in lines.iter_rows(named=True):
                bounds = "" if row["effect_low"] is None else f" [{row['effect_low']:+.4f}, {row['effect_high']:+.4f}]"
                text = f"{kind}, {role} token, block {row['layer']}: {row['effect']:+.4f}{bounds}"
                figure.marks.append(Mark(axes, row["layer"], row["effect"], text))
        axes.axhline(0, color=MUTED, linewidth=0.9, linestyle="--")
        where = "" if kind == "resid.post" else f", {_blocks(grid)}"
        dress(axes, x="block" if axes is panels[-1] else "", y="indirect effect", title=f"{kind}{where}")
        axes.margins(x=0.02)
        whole_ticks(axes.xaxis)
    legend(figure, panels[0])
    if title:
        heading(figure, title)
    figure.align_ylabels(list(panels))
    return figure


def _blocks(grid: TraceGrid) -> str:
    return "1 block" if grid.settings.window == 1 else f"{grid.settings.window} blocks"


def _block_ticks(axes: Axes, layers: np.ndarray) -> None:
    step = -(-len(layers) // 7)
    axes.set_xticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
