"""Detectors as figures: how many at which block, and what they cause.

Enters: a `Dissection`, a `Causation`. Leaves: a matplotlib Figure each, with the exact value of every mark in `.marks`.
Does not know the page.
"""

import numpy as np
import polars as pl

from reprobe.errors import UsageError
from reprobe.evaluation.causation import Causation
from reprobe.methods.dissected import Dissection
from reprobe.report.style import (
    INK,
    MUTED,
    PAPER,
    SERIES,
    WIDTH,
    Mark,
    Plot,
    clipped,
    dress,
    heading,
    legend,
    whole_ticks,
)

#: Kinds of concepts that have a colour of their own; the rarest share the last.
_KINDS = len(SERIES) - 1
_OTHER = "other kinds"
_TITLES = {"stimulate": "stimulated, neutral text", "ablate": "ablated, where it occurs"}


def detector_bars(dissection: Dissection, *, title: str | None = None) -> Plot:
    """Detectors at each block by the kind of their concept, and how many there would be by chance (hollow).

    One panel for each part of a block. Raises `UsageError` if no unit lies in a block.
    """
    layers = dissection.layers.with_columns(part=pl.col("site").str.extract(r"^([a-z.]+)")).drop_nulls("layer")
    parts = layers["part"].unique(maintain_order=True).to_list()
    if not parts:
        raise UsageError("no unit of this dissection lies in a block")
    found = dissection.units.filter(pl.col("detector")).with_columns(part=pl.col("site").str.extract(r"^([a-z.]+)"))
    order = found["kind"].value_counts(sort=True)["kind"].to_list()
    kinds = order if len(order) <= len(SERIES) else [*order[:_KINDS], _OTHER]
    found = found.with_columns(kind=pl.when(pl.col("kind").is_in(kinds)).then(pl.col("kind")).otherwise(pl.lit(_OTHER)))
    figure = Plot(1.5 * WIDTH, 0.6 + 2.7 * len(parts))
    for axes, part in zip(figure.subplots(len(parts), 1, squeeze=False)[:, 0], parts, strict=True):
        here = layers.filter(pl.col("part") == part).group_by("layer").agg(pl.col("expected").sum()).sort("layer")
        x = here["layer"].to_numpy()
        below = np.zeros(len(x))
        for kind, color in zip(kinds, SERIES, strict=False):
            of = found.filter((pl.col("part") == part) & (pl.col("kind") == kind))["layer"].to_numpy()
            n = np.array([(of == layer).sum() for layer in x])
            axes.bar(x, n, bottom=below, width=0.8, color=color, label=kind)
            for layer, count, low in zip(x, n, below, strict=True):
                if count:
                    place = (float(layer), float(low + count / 2))
                    figure.marks.append(
                        Mark(axes, *place, f"block {layer}: {count} detect {kind}", (0.8, float(count)))
                    )
            below += n
        expected = here["expected"].to_numpy()
        if len(dissection.null):
            axes.plot(x, expected, "o", color=INK, markerfacecolor=PAPER, markersize=4, label="by chance")
            for layer, value in zip(x, expected, strict=True):
                figure.marks.append(Mark(axes, float(layer), float(value), f"block {layer}: {value:.1f} by chance"))
        dress(axes, x="block", y="detectors", title=part if len(parts) > 1 else title, grid="y")
        whole_ticks(axes.xaxis, 12)
    legend(figure, axes)
    return figure


def causal_intervals(causation: Causation, *, title: str | None = None) -> Plot:
    """For each concept what its detectors change (filled, with the interval of the difference from random units laid
    around it) and what random units do (hollow), in nats; one panel per act. `UsageError` if nothing was measured."""
    table = causation.table
    acts = [act for act in _TITLES if act in set(table["act"])]
    if not acts:
        raise UsageError("nothing was stimulated or ablated")
    first = table.filter(pl.col("act") == acts[0]).sort("difference", descending=acts[0] == "stimulate")
    names = list(dict.fromkeys([*first["concept"], *table["concept"].sort()]))
    figure = Plot(2 * WIDTH, 1.0 + 0.19 * len(names))
    for axes, act in zip(figure.subplots(1, len(acts), sharey=True, squeeze=False)[0], acts, strict=True):
        for line in table.filter(pl.col("act") == act).iter_rows(named=True):
            y = names.index(line["concept"])
            if line["difference_low"] is not None:
                ends = [line["control"] + line["difference_low"], line["control"] + line["difference_high"]]
                axes.plot(ends, [y, y], color=SERIES[0], linewidth=1.6, solid_capstyle="butt")
            axes.plot(line["effect"], y, "o", color=SERIES[0], markersize=4.5)
            axes.plot(line["control"], y, "s", color=SERIES[1], markerfacecolor=PAPER, markersize=4)
            said = f"{line['concept']}: detectors {line['effect']:+.3f}, random units {line['control']:+.3f} nats"
            figure.marks.append(Mark(axes, float(line["effect"]), float(y), said))
            figure.marks.append(Mark(axes, float(line["control"]), float(y), said))
        axes.axvline(0, color=MUTED, linewidth=0.8)
        axes.set_yticks(range(len(names)), [clipped(name, 26) for name in names], parse_math=False)
        axes.set_ylim(len(names) - 0.4, -0.6)
        dress(axes, x="change of log p, nats", y="", title=_TITLES[act], grid="both")
        axes.tick_params(axis="y", labelsize=7.5, length=0)
    for style, label in (
        ({"color": SERIES[0], "marker": "o"}, "detectors"),
        ({"color": SERIES[1], "marker": "s", "markerfacecolor": PAPER}, "random units, as active"),
    ):
        axes.plot([], [], linestyle="none", label=label, **style)
    legend(figure, axes)
    if title:
        heading(figure, title)
    return figure
