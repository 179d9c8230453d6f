"""Maps: the accuracy of every head, and the score of every token at every block.

Enters: a grid, a scan. Leaves: a matplotlib Figure each, fit for a notebook or a paper, with the exact value
of every cell in `.marks`. Layers are block indices from 0. Does not know the report.
"""

import math
from typing import Any

import numpy as np
import polars as pl
from jaxtyping import Float
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import CenteredNorm, Normalize
from matplotlib.patches import Rectangle

from reprobe.errors import UsageError
from reprobe.methods.repe import Scan
from reprobe.model.sites import Site
from reprobe.probing.probe_grid import ProbeGrid
from reprobe.report.study import listing, spelled
from reprobe.report.style import (
    DIVERGING,
    FRAME,
    PAPER,
    SEQUENTIAL,
    WIDTH,
    Mark,
    Plot,
    colorbar,
    dress,
    token_text,
    whole_ticks,
    write,
)

#: A scan's colours reach as far as this share of its magnitudes. A few tokens and early blocks have scores many
#: times those of all others, which would be pale if the colours reached that far.
SATURATION = 0.9
#: Cells beyond which a map is drawn as one image, without values under the pointer.
_MANY_CELLS = 10_000
_LONG_TOKEN = 24


def head_map(grid: ProbeGrid, *, limits: tuple[float, float] | None = None, title: str | None = None) -> Plot:
    """Held-out accuracy of every head: blocks from left to right, heads from bottom to top.

    × marks heads whose 95 % interval holds the chance level or lies below it; a frame, the highest accuracy.
    `limits` of the colours default to the grid's own range. Raises `UsageError` if no heads were probed.
    """
    table = _heads(grid)
    layers, heads = table["layer"].to_numpy(), table["head"].to_numpy()
    values = np.full((int(heads.max()) + 1, int(layers.max()) + 1), np.nan)
    values[heads, layers] = table["accuracy"].to_numpy()
    low, high = limits or (float(np.nanmin(values)), float(np.nanmax(values)))
    norm = Normalize(low, high if high > low else low + 1e-9)
    rows, columns = values.shape
    height = max(2.3, 0.9 + 0.16 * rows)
    figure = Plot(max(WIDTH, 1.4 + 0.125 * columns), height)
    axes = dress(figure.subplots(), x="block", y="head", title=title, grid="none")
    mesh = _cells(axes, values, cmap=SEQUENTIAL, norm=norm)
    if values.size <= _MANY_CELLS:
        for row in table.iter_rows(named=True):
            figure.marks.append(Mark(axes, row["layer"], row["head"], spelled(row), (1.0, 1.0)))
    unclear = table.filter(pl.col("accuracy_low") <= pl.col("chance"))
    _crosses(axes, unclear, norm, side=min(1.0, 36 / max(rows, columns)))
    best = table.sort(["accuracy", "layer", "head"], descending=[True, False, False]).row(0, named=True)
    corner = (best["layer"] - 0.5, best["head"] - 0.5)
    frame = Rectangle(corner, 1, 1, fill=False, edgecolor=FRAME, linewidth=1.8, zorder=4, clip_on=False)
    axes.add_patch(frame)
    whole_ticks(axes.xaxis)
    whole_ticks(axes.yaxis, 6)
    colorbar(figure, mesh, axes, "held-out accuracy", pad=0.02, aspect=7 * height)
    return figure


def scan_map(scan: Scan, *, title: str | None = None) -> Plot:
    """Score of every token at every site of a scan: tokens from left to right, blocks from bottom to top.

    Blue is the direction's positive class, red the other, white the decision boundary. Colours saturate at
    `saturation(scan)`, and the colour bar is pointed where scores lie beyond.
    """
    n_sites, n_tokens = scan.scores.shape
    limit = saturation(scan)
    width = max(WIDTH, 1.0 + 0.225 * n_tokens)
    tokens = [token_text(t, _LONG_TOKEN) for t in scan.tokens]
    figure = Plot(width, max(1.2, 0.115 * n_sites) + 1.3 + 0.075 * max(map(len, tokens)))
    axes = dress(figure.subplots(), x="token", y="block", title=title, grid="none")
    mesh = _cells(axes, scan.scores.astype(np.float64), cmap=DIVERGING, norm=CenteredNorm(0, limit))
    axes.set_xticks(range(n_tokens), tokens, rotation=90, parse_math=False)
    axes.tick_params(axis="x", length=0)
    _site_ticks(axes, scan.sites)
    if scan.scores.size <= _MANY_CELLS:
        for i, site in enumerate(scan.sites):
            for t, token in enumerate(scan.tokens):
                text = f"token {t} {token!r} at {site}: {scan.scores[i, t]:+.2f}"
                figure.marks.append(Mark(axes, t, i, text, (1.0, 1.0)))
    below, above = bool((scan.scores < -limit).any()), bool((scan.scores > limit).any())
    colorbar(
        figure,
        mesh,
        axes,
        "score (standard deviations\nof the training projections)",
        location="top",
        extend="both" if below and above else "min" if below else "max" if above else "neither",
        anchor=(0.0, 0.5),  # at the left, where it is seen first when the map scrolls
        shrink=min(1.0, 3.6 / (width - 0.8)),
        aspect=26,
        pad=0.02,
    )
    return figure


def saturation(scan: Scan) -> float:
    """The magnitude at which the colours of `scan_map` saturate.

    The first token is left out where there are others: it has read nothing, and its activations are often so
    large that all others would look white beside it.
    """
    later = scan.scores[:, 1:] if scan.scores.shape[1] > 1 else scan.scores
    return max(float(np.quantile(np.abs(later), SATURATION)), 1e-9)


def _heads(grid: ProbeGrid) -> pl.DataFrame:
    table = grid.table.filter((pl.col("part") == "attn.heads") & pl.col("head").is_not_null())
    if not len(table):
        raise UsageError(f"head_map needs single heads (attn.heads@*.*); the grid has {listing(grid.sites)}")
    return table


def _cells(axes: Axes, values: Float[np.ndarray, "rows columns"], **colors: Any) -> Any:
    """One cell per value, centred on its indices."""
    rows, columns = values.shape
    if values.size > _MANY_CELLS:
        colors["rasterized"] = True
    else:
        colors |= {"edgecolors": PAPER, "linewidth": 0.35 if values.size < 2000 else 0.1}
    mesh = axes.pcolormesh(np.arange(columns + 1) - 0.5, np.arange(rows + 1) - 0.5, values, **colors)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return mesh


def _crosses(axes: Axes, table: pl.DataFrame, norm: Normalize, side: float) -> None:
    if not len(table):
        return
    fills = colormaps[SEQUENTIAL](norm(table["accuracy"].to_numpy()))
    bright = fills[:, :3] @ np.array([0.2126, 0.7152, 0.0722]) > 0.45
    for shade, mask in (("#ffffff", ~bright), ("#000000", bright)):
        part = table.filter(pl.Series(mask))
        size = 18 * side**2
        axes.scatter(part["layer"], part["head"], marker="x", s=size, linewidths=0.8, c=shade, zorder=3)


def _site_ticks(axes: Axes, sites: tuple[Site, ...]) -> None:
    layers = [s.layer for s in sites]
    if len({s.part for s in sites}) == 1 and all(s.unit is None and s.layer is not None for s in sites):
        if layers == list(range(len(layers))):
            whole_ticks(axes.yaxis)
        else:
            step = math.ceil(len(layers) / 12)
            axes.set_yticks(range(0, len(layers), step), [str(n) for n in layers[::step]])
        write(axes.yaxis.get_label(), f"block ({sites[0].part})")
    else:
        step = math.ceil(len(sites) / 24)
        axes.set_yticks(range(0, len(sites), step), [str(s) for s in sites[::step]])
        write(axes.yaxis.get_label(), "site")
