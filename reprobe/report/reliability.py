"""Are probabilities what they say? A reliability diagram, before and after Platt scaling.

Enters: held-out probabilities of a comparison. Leaves: a matplotlib Figure with the exact values in `.marks`. Does not
know the report.
"""

import numpy as np
from jaxtyping import Bool, Float
from matplotlib.axes import Axes

from reprobe.probing.comparison import Calibrated
from reprobe.probing.intervals import ClusterBootstrap, share_interval
from reprobe.probing.metrics import BINS, bin_of, calibration_error
from reprobe.report.style import MUTED, PAPER, SERIES, WIDTH, Mark, Plot, dress, legend, whole_ticks

#: A bin of fewer groups has no interval: how they vary cannot be told.
_FEWEST_GROUPS = 2


def reliability(found: Calibrated, *, seed: int = 0, title: str | None = None) -> Plot:
    """The share of positive rows against the probability that was given, in `BINS` bins of equal width.

    Filled: after Platt scaling, with 95 % intervals of the shares over groups; hollow: σ(score) without it (see
    `Calibrated`). On the dashed line probabilities are what they say. Below: how many rows have which probability
    after scaling. The legend has the expected calibration errors, with the interval (`seed` draws it) after scaling.
    """
    figure = Plot(WIDTH, 5.0)
    main, counts = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    low, high = ClusterBootstrap.draw(found.groups, seed).calibration_error(found.platt, found.positive)
    scaled = f"after Platt scaling: ECE {calibration_error(found.platt, found.positive):.3f} [{low:.3f}, {high:.3f}]"
    plain = f"σ(score): ECE {calibration_error(found.plain, found.positive):.3f}"
    main.plot([0, 1], [0, 1], color=MUTED, linewidth=1.1, linestyle="--", label="as it should be")
    _draw(figure, main, found, found.plain, plain, filled=False)
    _draw(figure, main, found, found.platt, scaled, filled=True)
    rows = np.bincount(bin_of(found.platt), minlength=BINS)
    counts.stairs(rows, np.arange(BINS + 1) / BINS, fill=True, color=SERIES[0], alpha=0.3)
    counts.stairs(rows, np.arange(BINS + 1) / BINS, color=SERIES[0], linewidth=1.2)
    for i, n in enumerate(rows):
        if n:
            size = (1 / BINS, float(n))
            figure.marks.append(Mark(counts, (i + 0.5) / BINS, n / 2, f"{n} rows from {_bin(i)} after scaling", size))
    dress(main, x="", y="share that is positive", title=title)
    dress(counts, x="probability of the positive class", y="rows", grid="y")
    main.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    counts.set_ylim(bottom=0)
    whole_ticks(counts.yaxis, 2)
    figure.align_ylabels([main, counts])
    legend(figure, main)
    return figure


def _draw(
    figure: Plot, axes: Axes, found: Calibrated, probabilities: Float[np.ndarray, " n"], name: str, *, filled: bool
) -> None:
    which = bin_of(probabilities)
    used = np.unique(which)
    mean = np.array([probabilities[which == i].mean() for i in used])
    share = np.array([found.positive[which == i].mean() for i in used])
    color, marker = (SERIES[0], "o") if filled else (SERIES[1], "s")
    axes.plot(
        mean,
        share,
        color=color,
        marker=marker,
        markersize=5,
        markerfacecolor=color if filled else PAPER,
        linewidth=1.5,
        linestyle="-" if filled else ":",
        label=name,
        zorder=4,
    )
    for i, x, y in zip(used, mean, share, strict=True):
        inside = which == i
        told = ""
        bounds = _interval(found.positive[inside], found.groups[inside])
        if bounds is not None:
            told = f" [{bounds[0]:.3f}, {bounds[1]:.3f}]"
            if filled:
                axes.plot([x, x], bounds, color=color, linewidth=1.1, alpha=0.6, zorder=3)
        figure.marks.append(
            Mark(
                axes,
                x,
                y,
                f"{name.split(':')[0]}, {_bin(i)}: {x:.3f} on average; positive {y:.3f}{told} of {inside.sum()}",
            )
        )


def _interval(positive: Bool[np.ndarray, " n"], groups: np.ndarray) -> Float[np.ndarray, " 2"] | None:
    codes = np.unique(groups, return_inverse=True)[1]
    if codes.max() + 1 < _FEWEST_GROUPS:
        return None
    bounds: np.ndarray = share_interval(positive[:, None], codes)[:, 0]
    return bounds


def _bin(i: int) -> str:
    return f"{i / BINS:.2f} to {(i + 1) / BINS:.2f}"
