"""The picture of the README, from what `reprobe demo` leaves: where truth is read, token by token, and what mood does.

uv run reprobe demo && uv run python experiments/picture.py reprobe-demo
"""

import argparse
from pathlib import Path

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.colors import CenteredNorm

import reprobe as rp
from reprobe.report import ScanResult, SteeringResult, probe_path, read_scan, read_steering
from reprobe.report.maps import saturation
from reprobe.report.style import DIVERGING, INK, LABEL, MARKERS, MUTED, SERIES, TICK, Plot, dress, series, whole_ticks


def layers(axes: Axes, grids: dict[str, rp.ProbeGrid]) -> None:
    """Held-out accuracy over blocks, with 95 % bands."""
    dress(axes, x="block (resid.post)", y="held-out accuracy", title="1  Probe offline: cities, true or false")
    for i, (name, grid) in enumerate(grids.items()):
        table = grid.table.filter(pl.col("part") == "resid.post").sort("layer")
        axes.fill_between(table["layer"], table["accuracy_low"], table["accuracy_high"], color=SERIES[i], alpha=0.16)
        axes.plot(table["layer"], table["accuracy"], markersize=3, linewidth=1.4, label=name, **series(i))
    axes.axhline(0.5, color=MUTED, linewidth=1, linestyle="--", label="chance")
    whole_ticks(axes.xaxis)
    axes.legend(frameon=False, fontsize=TICK, labelcolor=INK, loc="lower right")


def tokens(axes: Axes, result: ScanResult) -> None:
    """The same directions at every block and token of one text."""
    scan, limit = result.scan, saturation(result.scan)
    dress(axes, x="", y="block", title="2  Read any text (blue: true, red: false)", grid="none")
    axes.pcolormesh(scan.scores.astype(np.float64), cmap=DIVERGING, norm=CenteredNorm(0, limit), rasterized=True)
    axes.set_xticks(np.arange(len(scan.tokens)) + 0.5, [t.strip() or "·" for t in scan.tokens], rotation=90)
    axes.tick_params(axis="x", length=0)
    whole_ticks(axes.yaxis)


def steering(axes: Axes, result: SteeringResult) -> None:
    """Log-odds of happy against sad words, and the price, at every strength."""
    table = result.table.sort("strength")
    dress(axes, x="strength (standard deviations)", y="log-odds (nats)", title="3  Control: steer along happiness")
    axes.errorbar(
        table["strength"],
        table["log_odds"],
        table["log_odds_sd"],
        color=SERIES[0],
        marker=MARKERS[0],
        capsize=3,
        linewidth=1.6,
        markersize=5,
    )
    axes.axhline(0, color=MUTED, linewidth=0.9, linestyle="--")
    axes.text(0.03, 0.95, "happy against sad words", transform=axes.transAxes, color=INK, fontsize=LABEL, va="top")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("demo", type=Path, help="the folder of `reprobe demo`")
    parser.add_argument("--to", type=Path, default=Path(__file__).with_suffix(".svg"))
    args = parser.parse_args()
    figure = Plot(13.2, 3.6)
    left, middle, right = figure.subplots(1, 3, width_ratios=[1, 1.15, 1])
    readers = ("logistic", "mean-difference", "pca")
    layers(left, {name: rp.ProbeGrid.load(probe_path(args.demo, f"cities-{name}")) for name in readers})
    tokens(middle, read_scan(args.demo / "scans" / "truth.json"))
    steering(right, read_steering(args.demo / "steering" / "happiness.json"))
    figure.savefig(args.to)


if __name__ == "__main__":
    main()
