"""The transfer matrix: trained on one data set, tested on another, at one site.

Enters: a `TransferGrid`. Leaves: a matplotlib Figure with the exact values in `.marks`. Does not know the report.
"""

import numpy as np
import polars as pl
from matplotlib.colors import Normalize

from reprobe.errors import UsageError
from reprobe.model.sites import Site
from reprobe.probing.transfer import TRAINING, TransferGrid
from reprobe.report.style import FRAME, PAPER, SEQUENTIAL, WIDTH, Mark, Plot, clipped, colorbar, dress

_METRICS = {"accuracy": "accuracy on the test set", "auroc": "AUROC on the test set"}
_NAME = 18


def transfer_map(
    grid: TransferGrid,
    site: Site | str | None = None,
    *,
    metric: str = "accuracy",
    centring: str = TRAINING,
    title: str | None = None,
) -> Plot:
    """`metric` ("accuracy" or "auroc") of every pair: training sets from top to bottom, test sets from left to right.

    Without `site`, the one with the best mean on the diagonal, where train and test are the same data set: it is
    chosen without a look at what transfers. The diagonal (cross-validated) is framed; × marks values whose 95 %
    interval holds chance or lies below it. Colours run from 0.5 to 1, and lower values have the darkest.
    """
    if metric not in _METRICS:
        raise UsageError(f"metric={metric!r}: a transfer map shows {' or '.join(_METRICS)}")
    place = best_on_the_diagonal(grid, metric, centring) if site is None else str(site)
    values, low = grid.matrix(place, metric, centring=centring), grid.matrix(place, f"{metric}_low", centring=centring)
    high = grid.matrix(place, f"{metric}_high", centring=centring)
    chance = grid.matrix(place, "chance", centring=centring) if metric == "accuracy" else np.full(values.shape, 0.5)
    n = len(grid.names)
    side = 0.62 * n
    longest = 0.085 * max(len(clipped(name, _NAME)) for name in grid.names)
    figure = Plot(max(WIDTH, side + longest + 1.6), side + longest + 1.1)
    axes = dress(
        figure.subplots(),
        x="tested on",
        y="trained on",
        title=title or f"{place}, centred by {'training rows' if centring == TRAINING else 'own mean'}",
        grid="none",
    )
    norm = Normalize(0.5, 1.0)
    edges = np.arange(n + 1) - 0.5
    mesh = axes.pcolormesh(edges, edges, values, cmap=SEQUENTIAL, norm=norm, edgecolors=PAPER, linewidth=0.7)
    names = [clipped(name, _NAME) for name in grid.names]
    for i, train in enumerate(grid.names):
        for j, test in enumerate(grid.names):
            unclear = low[i, j] <= chance[i, j]
            light = norm(values[i, j]) > 0.55
            axes.text(
                j,
                i,
                f"{values[i, j]:.2f}" + (" ×" if unclear else ""),
                ha="center",
                va="center",
                fontsize=9,
                color="#1a1a1a" if light else "#ffffff",  # on the map's own colours, in any theme
                fontweight="bold" if i == j else "normal",
            )
            text = (
                f"{train} → {test} at {place}: {metric} {values[i, j]:.3f} [{low[i, j]:.3f}, {high[i, j]:.3f}], "
                f"chance {chance[i, j]:.2f}"
            )
            figure.marks.append(Mark(axes, j, i, text, (1.0, 1.0)))
        x, y = np.array([-0.5, 0.5, 0.5, -0.5, -0.5]) + i, np.array([-0.5, -0.5, 0.5, 0.5, -0.5]) + i
        axes.plot(x, y, color=FRAME, linewidth=1.6, clip_on=False)
    axes.set_xticks(range(n), names, rotation=45, ha="right", rotation_mode="anchor", parse_math=False)
    axes.set_yticks(range(n), names, parse_math=False)
    axes.tick_params(length=0)
    axes.set(xlim=(-0.5, n - 0.5), ylim=(n - 0.5, -0.5), aspect="equal")
    for spine in axes.spines.values():
        spine.set_visible(False)
    colorbar(figure, mesh, axes, _METRICS[metric], pad=0.03, extend="min" if (values < 0.5).any() else "neither")
    return figure


def best_on_the_diagonal(grid: TransferGrid, metric: str = "accuracy", centring: str = TRAINING) -> str:
    """The site with the best mean where train and test are the same data set; of equals, the first."""
    lines = grid.table.filter((pl.col("train") == pl.col("test")) & (pl.col("centring") == centring))
    if not len(lines):
        raise UsageError(f"this grid has no results centred by {centring!r}")
    means = lines.group_by("site", maintain_order=True).agg(pl.col(metric).mean())
    return str(means.sort(metric, descending=True, maintain_order=True)["site"][0])
