"""Rows of one site: where they lie on their principal components, and how a reader scores them.

Enters: a store, a grid. Leaves: a matplotlib Figure each, fit for a notebook or a paper, with every row or
bar in `.marks`. Does not know the report.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import polars as pl
from jaxtyping import Bool, Float, Integer
from matplotlib.axes import Axes

from reprobe.errors import UsageError
from reprobe.model.sites import Site
from reprobe.probing.direction import Direction, Label
from reprobe.probing.probe_grid import ProbeGrid
from reprobe.report.study import class_name, listing
from reprobe.report.style import INK, NEGATIVE, PAPER, POSITIVE, WIDTH, Mark, Plot, dress, legend, whole_ticks
from reprobe.store.reader import ActivationStore

#: Rows that a scatter draws and fits its components on, at most.
SCATTER_ROWS = 1000
#: A direction nearer to a right angle with the plane than this has no arrow: its shadow there would mislead.
LEAST_COSINE = 0.1


def scatter(
    store: ActivationStore,
    site: str | Site,
    *,
    grid: ProbeGrid | None = None,
    plane: Literal["components", "direction"] = "components",
    label: str = "label",
    seed: int = 0,
    title: str | None = None,
) -> Plot:
    """Rows of a site on their first two principal components, coloured by label.

    With `plane="direction"`, which needs a grid, from left to right along its direction, and upwards on the first
    principal component of what is left; there the boundary is where it is drawn, for every row.

    With a `grid`, its rows and classes are shown, and an arrow along its direction at the site, as it falls
    in this plane; dashed across it, where the plane meets the decision boundary (a row off the plane may lie on
    its other side). That direction was fitted on all these rows: what it reads when it has not seen a row is told
    by the hollow marks, of rows that were misread while held out. Without a grid, the store's rows that have a `label`
    are shown. At most `SCATTER_ROWS` rows, drawn at random
    from `seed`, are shown, and the components are fitted on these very rows (centred, not scaled). Raises
    `UsageError` unless there are two classes and at least three rows, or if the grid is of another store or, where
    its direction is needed, without the site.
    """
    where = Site.parse(site) if isinstance(site, str) else site
    points = _points(store, where, grid, label, seed)
    direction = None if grid is None else grid.directions.get(where)
    along = None
    if plane == "direction":
        if grid is None or direction is None:
            raise UsageError(f"plane='direction' needs a grid with a direction at '{where}'")
        along = direction.vector
    drawn = _plane(store.read(where, points.rows).double().numpy(), along)
    figure = Plot(WIDTH, 3.8 if direction is None else 4.4)  # the legend has up to three lines more
    x, y = (f"{100 * share:.2g} %" for share in drawn.share)
    axes = dress(
        figure.subplots(),
        x=f"component 1 ({x} of variance)" if along is None else f"along the direction ({x} of variance)",
        y=f"component 2 ({y} of variance)" if along is None else f"main axis of the rest ({y})",
        title=title,
    )
    told = [f"{p}: {class_name(points.classes[int(y)])}" for p, y in zip(points.prompts, points.positive, strict=True)]
    misread = np.zeros(len(points.rows), dtype=bool)
    if grid is not None and direction is not None:
        scores = grid.oof[points.kept, grid.sites.index(where)]
        misread = (scores > 0) != points.positive
        for i, (score, wrong) in enumerate(zip(scores / direction.scale, misread, strict=True)):
            told[i] += f", held-out score {score:+.2f}{' (misread)' if wrong else ''}"
    _rows(axes, points, drawn, misread)
    if direction is not None:
        _direction(axes, drawn, direction)
    for (px, py), text in zip(drawn.at, told, strict=True):
        figure.marks.append(Mark(axes, px, py, text))
    legend(figure, axes)
    return figure


def projections(grid: ProbeGrid, site: str | Site, *, title: str | None = None) -> Plot:
    """How the two classes score at a site: histograms of held-out scores.

    Each row is scored by the reader of the fold that held it out; the unit is the standard deviation of the
    projections on the direction. Dotted: 0, where the decision changes. Raises `UsageError` if the grid has
    no such site.
    """
    where = Site.parse(site) if isinstance(site, str) else site
    if where not in grid.directions:
        raise UsageError(f"'{where}' was not probed; the grid has {listing(grid.sites)}")
    scores = grid.oof[:, grid.sites.index(where)].astype(np.float64) / grid.directions[where].scale
    bins = np.histogram_bin_edges(scores, bins=min(40, max(10, len(scores) // 12)))
    figure = Plot(WIDTH, 3.8)
    x = "held-out score (standard deviations of the projections)"
    axes = dress(figure.subplots(), x=x, y="rows", title=title, grid="y")
    for name, side, color in (
        (grid.classes[0], ~grid.positive, NEGATIVE),
        (grid.classes[1], grid.positive, POSITIVE),
    ):
        counts, _ = np.histogram(scores[side], bins)
        axes.stairs(counts, bins, fill=True, color=color, alpha=0.3)
        axes.stairs(counts, bins, color=color, linewidth=1.4, label=_with_count(name, side))
        for count, a, b in zip(counts, bins[:-1], bins[1:], strict=True):
            if count:
                text = f"{class_name(name)}: {count} rows from {a:.2f} to {b:.2f}"
                figure.marks.append(Mark(axes, (a + b) / 2, count, text))
    axes.axvline(0, color=INK, linewidth=1.2, linestyle=":")
    whole_ticks(axes.yaxis)
    legend(figure, axes)
    return figure


@dataclass(frozen=True)
class _Points:
    """Which rows of a store are drawn, and what they are; `kept` are their places among the grid's rows."""

    kept: Integer[np.ndarray, " n"]
    rows: Integer[np.ndarray, " n"]
    positive: Bool[np.ndarray, " n"]
    classes: tuple[Label, Label]
    prompts: list[str]


@dataclass(frozen=True)
class _Plane:
    """Two principal axes through the rows' mean, the rows' coordinates on them, and each axis' share of the
    variance."""

    mean: Float[np.ndarray, " width"]
    axes: Float[np.ndarray, "2 width"]
    at: Float[np.ndarray, "n 2"]
    share: Float[np.ndarray, " 2"]


def _points(store: ActivationStore, site: Site, grid: ProbeGrid | None, label: str, seed: int) -> _Points:
    index = store.index
    if grid is not None:
        if (of := grid.provenance.get("store")) not in (None, store.manifest.digest):
            raise UsageError(f"the grid was made from another store ({of}), not from {store.name}")
        rows, positive, classes = grid.rows, grid.positive, grid.classes
    else:
        if label not in index.columns:
            raise UsageError(f"no column {label!r} in the index; it has {', '.join(index.columns)}")
        found = index.filter(pl.col(label).is_not_null())
        values = found[label].unique().sort().to_list()
        if len(values) != 2:
            raise UsageError(f"column {label!r} has {len(values)} labels; a scatter shows two classes")
        rows, positive = found["row"].to_numpy(), (found[label] == values[1]).to_numpy()
        classes = (values[0], values[1])
    if len(rows) < 3:
        raise UsageError(f"two principal components need at least three rows; '{site}' has {len(rows)}")
    # Not every n-th row: labels often alternate, and then only one class would be left.
    kept = np.arange(len(rows))
    if len(rows) > SCATTER_ROWS:
        kept = np.sort(np.random.default_rng(seed).choice(len(rows), SCATTER_ROWS, replace=False))
    prompts = index["prompt"].cast(pl.String)[rows[kept]].to_list()
    return _Points(kept, np.asarray(rows)[kept], np.asarray(positive)[kept], classes, prompts)


def _plane(X: Float[np.ndarray, "n width"], along: Float[np.ndarray, " width"] | None = None) -> _Plane:
    """The first two principal axes, each turned so that its largest component is positive; with a unit vector
    `along`, that vector, and the first principal axis at right angles to it."""
    if X.shape[1] < 2:
        raise UsageError("two principal components need a site at least two wide")
    mean = X.mean(axis=0)
    centred = X - mean
    rest = centred if along is None else centred - np.outer(centred @ along, along)
    components = np.linalg.svd(rest, full_matrices=False)[2][:2]
    total = float((centred**2).sum())
    if total == 0:
        raise UsageError("all rows are equal: they have no principal components")
    components = components * np.sign(components[[0, 1], np.abs(components).argmax(axis=1)])[:, None]
    axes = components if along is None else np.stack([along, components[0]])
    at = centred @ axes.T
    return _Plane(mean, axes, at, (at**2).sum(axis=0) / total)


def _rows(axes: Axes, points: _Points, plane: _Plane, misread: Bool[np.ndarray, " n"]) -> None:
    """A mark per row, of its class; hollow if it was misread."""
    for name, side, color, marker in (
        (points.classes[0], ~points.positive, NEGATIVE, "s"),
        (points.classes[1], points.positive, POSITIVE, "o"),
    ):
        x, y = plane.at[side].T
        fill = [PAPER if wrong else color for wrong in misread[side]]
        axes.scatter(x, y, s=13, facecolors=fill, edgecolors=color, marker=marker, alpha=0.6, linewidths=0.8)
        axes.scatter([], [], s=13, c=color, marker=marker, label=_with_count(name, side))
    if misread.any():
        name = f"hollow: misread when held out (n = {int(misread.sum()):,})"
        axes.scatter([], [], s=16, facecolors="none", edgecolors=INK, linewidths=0.8, label=name)


def _direction(axes: Axes, plane: _Plane, direction: Direction) -> None:
    """An arrow from the mean along the direction's shadow in the plane, the longer the more of it lies in the plane,
    and the line in which the plane meets the decision boundary."""
    shadow = plane.axes @ direction.vector
    share = float(np.linalg.norm(shadow))
    if share < LEAST_COSINE:
        name = f"{direction.reader}: not in this plane, cosine {share:.2f}"
        axes.plot([], [], linestyle="none", label=name)
        return
    spans = np.ptp(plane.at, axis=0)
    tip = shadow * 0.5 * share / float(np.abs(shadow / spans).max())
    for color, width, z in ((PAPER, 5.0, 5), (INK, 1.8, 6)):  # a halo first, to stand out from the points
        shape = {"arrowstyle": "-|>,head_width=0.3,head_length=0.6", "color": color, "linewidth": width}
        ends = {"shrinkA": 0, "shrinkB": 0}
        axes.annotate("", xy=(tip[0], tip[1]), xytext=(0, 0), zorder=z, arrowprops=shape | ends)
    axes.plot([], [], color=INK, linewidth=2, label=f"{direction.reader}: cosine {share:.2f}")
    # (mean + a·axis₁ + b·axis₂)·vector = offset is a line across the shadow, this far from the mean along it:
    foot = shadow / share * (-direction.score(plane.mean) / share)
    low, high = plane.at.min(axis=0) - 0.05 * spans, plane.at.max(axis=0) + 0.05 * spans
    axes.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]))
    corners = (np.array([(x, y) for x in (low[0], high[0]) for y in (low[1], high[1])]) - foot) @ shadow
    if corners.min() < 0 < corners.max():
        axes.axline(
            (foot[0], foot[1]),
            (foot[0] - shadow[1], foot[1] + shadow[0]),
            color=INK,
            linewidth=1.3,
            linestyle=(0, (5, 3)),
            label="decision boundary",
        )
    else:
        axes.plot([], [], linestyle="none", label="decision boundary: outside the figure")


def _with_count(label: Label, side: Bool[np.ndarray, " n"]) -> str:
    return f"{class_name(label)} (n = {int(side.sum()):,})"
