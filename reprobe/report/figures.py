"""The figures: layer curves, head maps, scatters, scans, dose-response.

Enters: grids, stores, scans, tables. Leaves: a matplotlib Figure each, fit for a notebook or a paper, with the exact
value of every mark in `.marks`. Layers are block indices from 0. Does not know the report.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from jaxtyping import Bool, Float, Integer
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import CenteredNorm, Normalize
from matplotlib.patches import Rectangle

from reprobe.errors import UsageError
from reprobe.methods.repe import Scan
from reprobe.model.sites import Site
from reprobe.probing.direction import Direction
from reprobe.probing.probe_grid import ProbeGrid
from reprobe.report.results import require_dose_table
from reprobe.report.style import (
    DIVERGING,
    INK,
    LABEL,
    MARKERS,
    MUTED,
    NEGATIVE,
    PAPER,
    POSITIVE,
    SEQUENTIAL,
    SERIES,
    TICK,
    Mark,
    Plot,
    colorbar,
    dress,
    legend,
    whole_ticks,
    write,
)
from reprobe.store.reader import ActivationStore

#: Scores beyond this share of all cells' magnitudes saturate in a scan's colours: the first token's are often huge.
SATURATION = 0.98
#: Rows that a scatter draws and fits its axes on, at most, evenly spaced over the store.
SCATTER_ROWS = 2000
#: Cells from which on a map is drawn as one image, without values under the pointer.
_MANY_CELLS = 10_000
_BLOCK = "block"
#: Inches. Two such figures fill a page's width, and one is legible at a phone's.
WIDTH = 4.7


def reader_of(grid: ProbeGrid) -> str:
    """The reader that made a grid's directions."""
    return next(iter(grid.directions.values())).reader


def layer_curves(grids: Mapping[str, ProbeGrid] | Iterable[ProbeGrid], *, title: str | None = None) -> Plot:
    """Held-out accuracy over blocks: a line with its 95 % band per grid, a panel per part of the block.

    `grids` by name, or a list that is named by its readers. Dashed: the majority class. `embed` and `final`
    stand before the first and after the last block. Raises `UsageError` if nothing but heads or neurons was probed.
    """
    named = grids if isinstance(grids, Mapping) else _by_reader(list(grids))
    curves = [(name, _curve(grid)) for name, grid in named.items()]
    parts = sorted({p for _, table in curves for p in table["panel"]}, key=_part_order)
    if not parts:
        raise UsageError("layer_curves needs a grid with whole sites, such as resid.post@*; for heads use head_map")
    last = max(int(table["x"].max()) for _, table in curves if len(table))  # type: ignore[arg-type]
    figure = Plot(WIDTH, 0.4 + 2.7 * len(parts))
    panels = figure.subplots(len(parts), 1, sharex=True, squeeze=False)[:, 0]
    for axes, part in zip(panels, parts, strict=True):
        for i, (name, table) in enumerate(curves):
            _draw_curve(figure, axes, table.filter(pl.col("panel") == part), name, i)
        _draw_chance(axes, {name: float(t["chance"][0]) for name, t in curves if len(t)})
        heading = part if len(parts) > 1 else title
        dress(axes, x=_BLOCK if axes is panels[-1] else "", y="held-out accuracy", title=heading)
        low = min(float(t[c].min()) for _, t in curves if len(t) for c in ("accuracy_low", "chance"))  # type: ignore[arg-type]
        axes.set_ylim(max(0.0, math.floor(20 * low - 0.5) / 20), 1.0 + 0.01)
        axes.margins(x=0.02)
        whole_ticks(axes.xaxis)
    _name_ends(panels[-1], curves, last)
    legend(panels[0], loc="lower right", ncols=2)
    if title and len(parts) > 1:
        figure.suptitle(title, x=0.01, ha="left", fontsize=LABEL, color=INK, fontweight="bold", parse_math=False)
    return figure


def head_map(
    grid: ProbeGrid, *, limits: tuple[float, float] | None = None, title: str | None = None
) -> Plot:
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
    figure = Plot(max(WIDTH, 1.4 + 0.125 * columns), max(2.3, 0.9 + 0.16 * rows))
    axes = dress(figure.subplots(), x=_BLOCK, y="head", title=title, grid="none")
    mesh = _cells(axes, values, cmap=SEQUENTIAL, norm=norm)
    for row in table.iter_rows(named=True):
        text = (
            f"{row['site']}: accuracy {row['accuracy']:.3f} "
            f"[{row['accuracy_low']:.3f}, {row['accuracy_high']:.3f}], AUROC {row['auroc']:.3f}"
        )
        figure.marks.append(Mark(axes, row["layer"], row["head"], text, (1.0, 1.0)))
    unclear = table.filter(pl.col("accuracy_low") <= pl.col("chance"))
    _crosses(axes, unclear, norm, side=min(1.0, 36 / max(rows, columns)))
    best = table.sort(["accuracy", "layer", "head"], descending=[True, False, False]).row(0, named=True)
    corner = (best["layer"] - 0.5, best["head"] - 0.5)
    axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=SERIES[1], linewidth=1.8, zorder=4, clip_on=False))
    whole_ticks(axes.xaxis)
    whole_ticks(axes.yaxis, 6)
    colorbar(figure, mesh, axes, "held-out accuracy", pad=0.02, aspect=16)
    return figure


def scatter(
    store: ActivationStore,
    site: str | Site,
    *,
    grid: ProbeGrid | None = None,
    label: str = "label",
    title: str | None = None,
) -> Plot:
    """Rows of a site on their first two principal components, coloured by label.

    With a `grid`, its rows and classes are shown, and an arrow along its direction at the site, as far as that lies in
    this plane; without, the store's rows that have a `label`. At most `SCATTER_ROWS` rows, evenly spaced, are drawn
    and enter the components, which are fitted on these very rows (centred, not scaled).
    """
    where = Site.parse(site) if isinstance(site, str) else site
    points = _points(store, where, grid, label)
    plane = _plane(store.read(where, points.rows).double().numpy())
    figure = Plot(WIDTH, 3.8)
    x, y = (f"component {i + 1} ({plane.share[i]:.0%} of variance)" for i in range(2))
    axes = dress(figure.subplots(), x=x, y=y, title=title)
    for name, side, color, marker in (
        (points.classes[0], ~points.positive, NEGATIVE, "s"),
        (points.classes[1], points.positive, POSITIVE, "o"),
    ):
        axes.scatter(
            *plane.at[side].T, s=13, c=color, marker=marker, alpha=0.55, linewidths=0, label=f"{name} (n = {side.sum()})"
        )
    for (px, py), prompt, positive in zip(plane.at, points.prompts, points.positive, strict=True):
        figure.marks.append(Mark(axes, px, py, f"{prompt}: {points.classes[int(positive)]}"))
    direction = None if grid is None else grid.directions.get(where)
    if direction is not None:
        _arrow(axes, plane, direction)
    legend(axes, loc="best", markerscale=1.6)
    return figure


def projections(grid: ProbeGrid, site: str | Site, *, title: str | None = None) -> Plot:
    """How the two classes score at a site: histograms of held-out scores, in standard deviations of the projections.

    Each row is scored by the reader of the fold that held it out. Dotted: 0, where the decision changes. Raises
    `UsageError` if the grid has no such site.
    """
    where = Site.parse(site) if isinstance(site, str) else site
    if where not in grid.directions:
        raise UsageError(f"'{where}' was not probed; the grid has {_listing(grid.sites)}")
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
        axes.stairs(counts, bins, color=color, linewidth=1.4, label=f"{name} (n = {side.sum()})")
        for count, a, b in zip(counts, bins[:-1], bins[1:], strict=True):
            if count:
                text = f"{name}: {count} rows from {a:.2f} to {b:.2f}"
                figure.marks.append(Mark(axes, (a + b) / 2, count, text))
    axes.axvline(0, color=INK, linewidth=1.2, linestyle=":")
    whole_ticks(axes.yaxis)
    legend(axes, loc="best")
    return figure


def scan_map(scan: Scan, *, title: str | None = None) -> Plot:
    """Score of every token at every site of a scan: tokens from left to right, blocks from bottom to top.

    Blue is the direction's positive class, red the other, white the decision boundary. Colours saturate at the
    98th percentile of the magnitudes, and the colour bar is pointed where scores lie beyond.
    """
    n_sites, n_tokens = scan.scores.shape
    limit = saturation(scan)
    width = max(WIDTH, 1.0 + 0.225 * n_tokens)
    longest = max(len(t) for t in map(_shown, scan.tokens))
    figure = Plot(width, max(1.2, 0.115 * n_sites) + 1.15 + 0.075 * min(longest, 24))
    axes = dress(figure.subplots(), x="token", y=_BLOCK, title=title, grid="none")
    mesh = _cells(axes, scan.scores.astype(np.float64), cmap=DIVERGING, norm=CenteredNorm(0, limit))
    axes.set_xticks(range(n_tokens), [_clip(_shown(t), 24) for t in scan.tokens], rotation=90, parse_math=False)
    axes.tick_params(axis="x", length=0)
    _site_ticks(axes, scan.sites)
    for i, site in enumerate(scan.sites):
        for t, token in enumerate(scan.tokens):
            text = f"token {t} {token!r} at {site}: {scan.scores[i, t]:+.2f}"
            figure.marks.append(Mark(axes, t, i, text, (1.0, 1.0)))
    beyond = (bool((scan.scores < -limit).any()), bool((scan.scores > limit).any()))
    extend = {(False, False): "neither", (True, False): "min", (False, True): "max", (True, True): "both"}[beyond]
    colorbar(
        figure, mesh, axes, "score (standard deviations of the training projections)", location="top", extend=extend,
        anchor=(0.0, 0.5), shrink=min(1.0, 4.2 / (width - 0.8)), aspect=30, pad=0.02,
    )  # fmt: skip
    return figure


def saturation(scan: Scan) -> float:
    """The magnitude at which the colours of `scan_map` saturate."""
    return max(float(np.quantile(np.abs(scan.scores), SATURATION)), 1e-9)


def dose_curves(table: pl.DataFrame, *, title: str | None = None) -> Plot:
    """Effect of steering (above) and its price (below) against strength.

    `table` as made by `evaluation.dose_response`: log-odds in nats with error bars of one standard deviation, over
    prompts, of the change against strength 0; KL(unsteered ‖ steered) in nats per token of neutral text.
    """
    table = require_dose_table(table).sort("strength")
    figure = Plot(WIDTH, 4.4)
    effect, price = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    x, odds, kl = (table[c].to_numpy() for c in ("strength", "log_odds", "kl"))
    style = {"linewidth": 1.6, "markersize": 5.5, "clip_on": False, "zorder": 3}
    effect.errorbar(
        x, odds, yerr=table["log_odds_sd"].to_numpy(), color=SERIES[0], marker=MARKERS[0], capsize=3, elinewidth=1.1,
        **style,
    )  # fmt: skip
    price.plot(x, kl, color=SERIES[1], marker=MARKERS[1], **style)
    for row in table.iter_rows(named=True):
        at = f"strength {row['strength']:+g}"
        figure.marks.append(
            Mark(effect, row["strength"], row["log_odds"], f"{at}: log-odds {row['log_odds']:+.3f} ± {row['log_odds_sd']:.3f} nats")
        )
        figure.marks.append(Mark(price, row["strength"], row["kl"], f"{at}: KL {row['kl']:.4f} nats per token"))
    dress(effect, x="", y="log-odds (nats)", title=title)
    dress(price, x="strength (units of the direction's scale)", y="KL (nats per token)")
    effect.axhline(0, color=MUTED, linewidth=0.9, linestyle="--")
    price.set_ylim(bottom=0)
    for axes in (effect, price):
        axes.axvline(0, color=MUTED, linewidth=0.9, linestyle=":")
    figure.align_ylabels([effect, price])
    return figure


# Layer curves


def _by_reader(grids: list[ProbeGrid]) -> dict[str, ProbeGrid]:
    names = [reader_of(g) for g in grids]
    if doubled := sorted({n for n in names if names.count(n) > 1}):
        raise UsageError(f"several grids are of {', '.join(doubled)}: name them, layer_curves({{'name': grid, …}})")
    return dict(zip(names, grids, strict=True))


def _curve(grid: ProbeGrid) -> pl.DataFrame:
    """The grid's lines of whole sites, with the panel each belongs to and where it stands on the x axis."""
    table = grid.table.filter(pl.Series([s.unit is None for s in grid.sites], dtype=pl.Boolean))
    layers = table["layer"].drop_nulls()
    after = int(layers.max()) + 1 if len(layers) else 1  # type: ignore[arg-type]
    parts = table.filter(pl.col("layer").is_not_null())["part"].unique(maintain_order=True).to_list()
    home = "resid.post" if "resid.post" in parts else parts[0] if parts else "embed and final"
    return table.with_columns(
        panel=pl.when(pl.col("layer").is_null()).then(pl.lit(home)).otherwise("part"),
        x=pl.coalesce("layer", pl.when(pl.col("part") == "embed").then(-1).otherwise(after)),
    ).sort("x")


def _part_order(part: str) -> tuple[int, str]:
    order = ("resid.post", "resid.mid", "resid.pre", "attn.out", "mlp.out", "attn.heads", "mlp.neurons")
    return (order.index(part) if part in order else len(order), part)


def _draw_curve(figure: Plot, axes: Axes, table: pl.DataFrame, name: str, i: int) -> None:
    color, marker = SERIES[i % len(SERIES)], MARKERS[i % len(MARKERS)]
    inside = table.filter(pl.col("layer").is_not_null())
    axes.fill_between(
        inside["x"], inside["accuracy_low"], inside["accuracy_high"], color=color, alpha=0.16, linewidth=0
    )
    axes.plot(inside["x"], inside["accuracy"], color=color, marker=marker, markersize=3.6, linewidth=1.5, label=name)
    ends = table.filter(pl.col("layer").is_null())
    if len(ends):
        low, high = (abs(ends["accuracy"] - ends[c]) for c in ("accuracy_low", "accuracy_high"))
        axes.errorbar(
            ends["x"], ends["accuracy"], yerr=np.stack([low, high]), color=color, marker=marker, markersize=4.5,
            linestyle="none", capsize=2, label=None if len(inside) else name,
        )  # fmt: skip
    for row in table.iter_rows(named=True):
        text = (
            f"{name}, {row['site']}: accuracy {row['accuracy']:.3f} "
            f"[{row['accuracy_low']:.3f}, {row['accuracy_high']:.3f}], AUROC {row['auroc']:.3f}"
        )
        figure.marks.append(Mark(axes, row["x"], row["accuracy"], text))


def _draw_chance(axes: Axes, chance: dict[str, float]) -> None:
    levels: dict[float, list[str]] = {}
    for name, level in chance.items():
        levels.setdefault(round(level, 9), []).append(name)
    for level, names in levels.items():
        of = "" if len(levels) == 1 else f" ({', '.join(names)})"
        axes.axhline(level, color=MUTED, linewidth=1.1, linestyle="--", label=f"majority class{of}")


def _name_ends(axes: Axes, curves: list[tuple[str, pl.DataFrame]], last: int) -> None:
    """Say `embed` and `final` on the axis where they stand on it."""
    present = {p for _, table in curves for p in table["part"]}
    names = {-1: "embed"} if "embed" in present else {}
    names |= {last: "final"} if "final" in present else {}
    if names:
        step = max(1, math.ceil(last / 6 / 5) * 5 if last > 6 else 1)
        inside = [t for t in range(0, last + 1, step) if all(abs(t - e) > step / 2 for e in names)]
        axes.set_xticks(sorted([*inside, *names]), [names.get(t, str(t)) for t in sorted([*inside, *names])])


# Maps


def _heads(grid: ProbeGrid) -> pl.DataFrame:
    table = grid.table.filter((pl.col("part") == "attn.heads") & pl.col("head").is_not_null())
    if not len(table):
        raise UsageError(f"head_map needs single heads (attn.heads@*.*); the grid has {_listing(grid.sites)}")
    return table


def _cells(axes: Axes, values: Float[np.ndarray, "rows columns"], **colors: Any) -> Any:
    """One cell per value, centred on its indices."""
    rows, columns = values.shape
    many = values.size > _MANY_CELLS
    edges = {} if many else {"edgecolors": PAPER, "linewidth": 0.35}
    mesh = axes.pcolormesh(
        np.arange(columns + 1) - 0.5, np.arange(rows + 1) - 0.5, values, rasterized=many, **edges, **colors
    )
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
        axes.scatter(part["layer"], part["head"], marker="x", s=18 * side**2, linewidths=0.8, c=shade, zorder=3)


def _site_ticks(axes: Axes, sites: tuple[Site, ...]) -> None:
    layers = [s.layer for s in sites]
    if len({s.part for s in sites}) == 1 and all(s.unit is None and s.layer is not None for s in sites):
        if layers == list(range(len(layers))):
            whole_ticks(axes.yaxis)
        else:
            step = math.ceil(len(layers) / 12)
            axes.set_yticks(range(0, len(layers), step), [str(n) for n in layers[::step]])
        write(axes.yaxis.get_label(), f"{_BLOCK} ({sites[0].part})")
    else:
        step = math.ceil(len(sites) / 24)
        axes.set_yticks(range(0, len(sites), step), [str(s) for s in sites[::step]])
        write(axes.yaxis.get_label(), "site")


def _shown(token: str) -> str:
    """A token as a tick label: without the blank before a word, and never invisible."""
    text = token.removeprefix(" ").replace("\n", "↵").replace("\t", "⇥").replace(" ", "␣")
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text) or "␣"


def _clip(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


# Scatter


@dataclass(frozen=True)
class _Points:
    """Which rows of a store are drawn, and what they are."""

    rows: Integer[np.ndarray, " n"]
    positive: Bool[np.ndarray, " n"]
    classes: tuple[Any, Any]
    prompts: list[str]


@dataclass(frozen=True)
class _Plane:
    """Two principal axes: `axes` (2, width), coordinates `at` (n, 2), and each axis' `share` of the variance."""

    axes: Float[np.ndarray, "2 width"]
    at: Float[np.ndarray, "n 2"]
    share: Float[np.ndarray, " 2"]


def _points(store: ActivationStore, site: Site, grid: ProbeGrid | None, label: str) -> _Points:
    index = store.index
    if grid is not None:
        if (of := grid.provenance.get("store")) not in (None, store.manifest.digest):
            raise UsageError(f"the grid was made from another store ({of}), not from {store.path.name}")
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
    kept = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), SCATTER_ROWS)).astype(np.int64))
    prompts = index["prompt"].cast(pl.String)[rows[kept]].to_list()
    return _Points(np.asarray(rows)[kept], np.asarray(positive)[kept], classes, prompts)


def _plane(X: Float[np.ndarray, "n width"]) -> _Plane:
    """The first two principal axes, each turned so that its largest component is positive."""
    if X.shape[1] < 2:
        raise UsageError("two principal components need a site at least two wide")
    centred = X - X.mean(axis=0)
    _, sizes, axes = np.linalg.svd(centred, full_matrices=False)
    total = float((sizes**2).sum())
    if total == 0:
        raise UsageError("all rows are equal: they have no principal components")
    axes = axes[:2]
    axes = axes * np.sign(axes[[0, 1], np.abs(axes).argmax(axis=1)])[:, None]
    return _Plane(axes, centred @ axes.T, sizes[:2] ** 2 / total)


def _arrow(axes: Axes, plane: _Plane, direction: Direction) -> None:
    """From the mean along the direction's shadow in the plane; its length is the eye's, its share is in the legend."""
    shadow = plane.axes @ direction.vector
    share = float(np.linalg.norm(shadow))
    name = f"{direction.reader} (cosine {share:.2f} to this plane)"
    if share < 1e-6:
        axes.plot([], [], color=INK, linewidth=2, label=name)
        return
    spans = np.ptp(plane.at, axis=0)
    tip = shadow * 0.3 / float(np.abs(shadow / spans).max())
    for color, width, z in ((PAPER, 5.0, 5), (INK, 1.8, 6)):
        axes.annotate(
            "", xy=(tip[0], tip[1]), xytext=(0, 0), zorder=z,
            arrowprops={"arrowstyle": "-|>,head_width=0.3,head_length=0.6", "color": color, "linewidth": width,
                        "shrinkA": 0, "shrinkB": 0},
        )  # fmt: skip
    axes.plot([], [], color=INK, linewidth=2, label=name)


def _listing(sites: Iterable[Site]) -> str:
    names = [str(s) for s in sites]
    return ", ".join(names if len(names) <= 8 else [*names[:4], "…", *names[-3:]])
