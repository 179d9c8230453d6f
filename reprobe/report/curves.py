"""Curves: accuracy over blocks, effect over strength.

Enters: grids, a dose-response table. Leaves: a matplotlib Figure each, fit for a notebook or a paper, with
the exact value of every mark in `.marks`. Layers are block indices from 0. Does not know the report.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import polars as pl
from matplotlib.axes import Axes

from reprobe.errors import UsageError
from reprobe.probing.probe_grid import ProbeGrid
from reprobe.report.results import effect_of, require_dose_table
from reprobe.report.study import reader_of, spelled
from reprobe.report.style import (
    MARKERS,
    MUTED,
    SERIES,
    WIDTH,
    Mark,
    Plot,
    dress,
    heading,
    legend,
    series,
    whole_ticks,
)


def layer_curves(grids: Mapping[str, ProbeGrid] | Iterable[ProbeGrid], *, title: str | None = None) -> Plot:
    """Held-out accuracy over blocks: a line with its 95 % band per grid, a panel per part of the block.

    `grids` by name, or a list that is named by its readers. Dashed: the majority class. `embed` and `final`
    stand before the first and after the last block. Raises `UsageError` if only heads or neurons were probed.
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
        x = "" if axes is not panels[-1] else "block" if len(parts) > 1 else f"block ({part})"
        dress(axes, x=x, y="held-out accuracy", title=part if len(parts) > 1 else title)
        low = min(float(t[c].min()) for _, t in curves if len(t) for c in ("accuracy_low", "chance"))  # type: ignore[arg-type]
        axes.set_ylim(max(0.0, math.floor(20 * low - 0.5) / 20), 1.0 + 0.01)
        axes.margins(x=0.02)
        whole_ticks(axes.xaxis)
    _name_ends(panels[-1], curves, last)
    legend(figure, panels[0])
    if title and len(parts) > 1:
        heading(figure, title, 40)
    return figure


def dose_curves(table: pl.DataFrame, *, title: str | None = None) -> Plot:
    """Effect of steering (above) and its price (below) against strength.

    `table` as made by `evaluation.dose_response`: the scorer's numbers (log-odds in nats), with error bars of one
    standard deviation, over prompts, of the change against strength 0; KL(unsteered ‖ steered) in nats per token of
    neutral text. Raises `UsageError` for a table that is not one.
    """
    table = require_dose_table(table).sort("strength")
    name = effect_of(table)
    shown, unit = ("log-odds", " nats") if name == "log_odds" else (name.replace("_", " "), "")
    figure = Plot(WIDTH, 4.4)
    effect, price = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    x, odds, kl = (table[c].to_numpy() for c in ("strength", name, "kl"))
    style: dict[str, Any] = {"linewidth": 1.6, "markersize": 5.5, "clip_on": False, "zorder": 3}
    spread = table[f"{name}_sd"].to_numpy()
    effect.errorbar(x, odds, spread, color=SERIES[0], marker=MARKERS[0], capsize=3, elinewidth=1.1, **style)
    price.plot(x, kl, color=SERIES[1], marker=MARKERS[1], **style)
    for strength, value, sd, cost in zip(x, odds, spread, kl, strict=True):
        at = f"strength {strength:+g}"
        figure.marks.append(Mark(effect, strength, value, f"{at}: {shown} {value:+.3f} ± {sd:.3f}{unit}"))
        figure.marks.append(Mark(price, strength, cost, f"{at}: KL {cost:.4f} nats per token"))
    dress(effect, x="", y=shown + (f" ({unit.strip()})" if unit else ""), title=title)
    dress(price, x="strength (units of the direction's scale)", y="KL (nats per token)")
    effect.axhline(0, color=MUTED, linewidth=0.9, linestyle="--")
    price.set_ylim(bottom=0)
    for axes in (effect, price):
        axes.axvline(0, color=MUTED, linewidth=0.9, linestyle=":")
    figure.align_ylabels([effect, price])
    return figure


def _by_reader(grids: list[ProbeGrid]) -> dict[str, ProbeGrid]:
    names = [reader_of(g) for g in grids]
    if doubled := sorted({n for n in names if names.count(n) > 1}):
        raise UsageError(f"several grids are of {', '.join(doubled)}: name them, layer_curves({{name: grid, …}})")
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
    look = series(i)
    inside = table.filter(pl.col("layer").is_not_null())
    band = (inside["x"], inside["accuracy_low"], inside["accuracy_high"])
    axes.fill_between(*band, color=look["color"], alpha=0.16, linewidth=0)
    axes.plot(inside["x"], inside["accuracy"], markersize=3.6, linewidth=1.5, label=name, **look)
    ends = table.filter(pl.col("layer").is_null())
    if len(ends):
        reach = np.stack([(ends["accuracy"] - ends[c]).abs() for c in ("accuracy_low", "accuracy_high")])
        axes.errorbar(ends["x"], ends["accuracy"], reach, markersize=4.5, capsize=2, **look | {"linestyle": "none"})
    for row in table.iter_rows(named=True):
        figure.marks.append(Mark(axes, row["x"], row["accuracy"], f"{name}, {spelled(row)}"))


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
