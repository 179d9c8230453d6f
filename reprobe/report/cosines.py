"""Which directions are one and the same: cosines between layers, readers, data sets.

Enters: directions by name. Leaves: a matplotlib Figure with the exact values in `.marks`. Does not know the report.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize

from reprobe.errors import UsageError
from reprobe.model.sites import Site
from reprobe.probing.direction import Direction
from reprobe.probing.probe_grid import ProbeGrid
from reprobe.report.style import DIVERGING, PAPER, WIDTH, Mark, Plot, clipped, colorbar, dress, whole_ticks, write

#: Directions up to which every cosine is written into its cell, and every name beside its row.
_WRITTEN = 12
_NAME = 30


def cosine_map(directions: Mapping[str, Direction], *, title: str | None = None) -> Plot:
    """Cosines between all pairs of directions, which must be of one width; −1 and 1 have the darkest colours.

    In a space of d dimensions the cosine of two random directions is 0 ± 1/√d. Raises `UsageError` for fewer than two
    directions, or other widths.
    """
    cosines = _cosines(directions)
    names = [clipped(name, _NAME) for name in directions]
    n = len(names)
    written = n <= _WRITTEN
    side = (0.5 if written else 0.16) * n
    longest = 0.085 * max(map(len, names))
    figure = Plot(max(WIDTH, side + longest + 1.3), max(2.6, side + 0.75 * longest + 1.0))
    axes = _draw(figure, directions, cosines, title)
    if written:
        for i, j in np.ndindex(n, n):
            ink = "#ffffff" if abs(cosines[i, j]) > 0.65 else "#1a1a1a"  # on the map's own colours, in any theme
            text = f"{round(float(cosines[i, j]), 2) + 0.0:.2f}".replace("-", "−")  # + 0.0: no −0.00
            axes.text(j, i, text, ha="center", va="center", fontsize=8.5, color=ink)
    ticks = range(n) if written else range(0, n, -(-n // 16))
    axes.set_xticks(ticks, [names[t] for t in ticks], rotation=45, ha="right", rotation_mode="anchor", parse_math=False)
    axes.set_yticks(ticks, [names[t] for t in ticks], parse_math=False)
    axes.tick_params(length=0)
    return figure


def layer_cosines(grid: ProbeGrid, part: str = "resid.post", *, title: str | None = None) -> Plot:
    """Cosines between the directions of one reader at all blocks of a part: where a direction stays the same.

    Raises `UsageError` if fewer than two blocks of `part` were probed, single heads and neurons not counted.
    """
    sites = sorted((s for s in grid.sites if s.part == part and s.unit is None), key=_layer)
    if len(sites) < 2:
        raise UsageError(f"cosines between blocks need two or more of {part}; the grid has {len(sites)}")
    directions = {str(s): grid.directions[s] for s in sites}
    figure = Plot(WIDTH, 4.0)
    axes = _draw(figure, directions, _cosines(directions), title)
    layers = [_layer(s) for s in sites]
    if layers == list(range(len(layers))):
        whole_ticks(axes.xaxis)
        whole_ticks(axes.yaxis)
    else:
        ticks = range(0, len(layers), -(-len(layers) // 10))
        axes.set_xticks(ticks, [str(layers[t]) for t in ticks])
        axes.set_yticks(ticks, [str(layers[t]) for t in ticks])
    write(axes.xaxis.get_label(), f"block ({part})")
    write(axes.yaxis.get_label(), f"block ({part})")
    axes.invert_yaxis()
    return figure


def _cosines(directions: Mapping[str, Direction]) -> np.ndarray:
    found = list(directions.values())
    if len(found) < 2:
        raise UsageError(f"cosines are between two directions or more, not {len(found)}")
    return np.array([[a.cosine(b) for b in found] for a in found])


def _draw(figure: Plot, directions: Mapping[str, Direction], cosines: np.ndarray, title: str | None) -> Axes:
    n = len(directions)
    axes = dress(figure.subplots(), x="", y="", title=title, grid="none")
    edges = np.arange(n + 1) - 0.5
    # lines between few cells; between many, edges of the cells' own colour, or the paper would shine through
    lines: dict[str, Any] = {"edgecolors": PAPER, "linewidth": 0.7} if n <= _WRITTEN else {"edgecolors": "face"}
    mesh = axes.pcolormesh(edges, edges, cosines, cmap=DIVERGING, norm=Normalize(-1, 1), **lines)
    for i, one in enumerate(directions):
        for j, other in enumerate(directions):
            figure.marks.append(Mark(axes, j, i, f"{one} and {other}: cosine {cosines[i, j]:+.3f}", (1.0, 1.0)))
    axes.set(xlim=(-0.5, n - 0.5), ylim=(n - 0.5, -0.5), aspect="equal")
    for spine in axes.spines.values():
        spine.set_visible(False)
    colorbar(figure, mesh, axes, "cosine", pad=0.03)
    return axes


def _layer(site: Site) -> int:
    return -1 if site.layer is None else site.layer
