"""Before and after: what a change of the model did to several numbers of one kind.

Enters: numbers without and with the change, by name. Leaves: a matplotlib Figure with the exact values in `.marks`.
Does not know what was changed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from reprobe.errors import UsageError
from reprobe.report.style import MUTED, PAPER, SERIES, WIDTH, Mark, Plot, clipped, dress, legend

_NAME = 30


@dataclass(frozen=True)
class Shift:
    """One number before and after, and the interval of the latter where there is one."""

    name: str
    before: float
    after: float
    low: float | None = None
    high: float | None = None


def shift_lines(
    shifts: Sequence[Shift],
    *,
    x: str,
    states: tuple[str, str],
    limits: tuple[float, float] | None = None,
    title: str | None = None,
) -> Plot:
    """A line per number, from its hollow mark before to its filled one after. `x` names the numbers, `states` what
    before and after mean. Raises `UsageError` for no numbers."""
    if not shifts:
        raise UsageError("there is nothing to be shown before and after")
    names = [clipped(shift.name, _NAME) for shift in shifts]
    # Long names take room; beyond this width the page would make it scroll on a phone.
    figure = Plot(WIDTH * (1.15 if max(map(len, names)) > 16 else 1.0), 1.15 + 0.27 * len(shifts))
    axes = dress(figure.subplots(), x=x, y="", title=title, grid="x")
    for y, shift in enumerate(shifts):
        axes.plot([shift.before, shift.after], [y, y], color=MUTED, linewidth=1.2, zorder=1)
        if shift.low is not None and shift.high is not None:
            axes.plot([shift.low, shift.high], [y, y], color=SERIES[0], linewidth=3.4, alpha=0.35, zorder=2)
        axes.plot(shift.before, y, "s", color=SERIES[1], markerfacecolor=PAPER, markersize=5.5, clip_on=False, zorder=3)
        axes.plot(shift.after, y, "o", color=SERIES[0], markersize=5.5, clip_on=False, zorder=4)
        bounds = "" if shift.low is None or shift.high is None else f" [{shift.low:.3f}, {shift.high:.3f}]"
        said = f"{shift.name}: {states[0]} {shift.before:.3f}, {states[1]} {shift.after:.3f}{bounds}"
        figure.marks += [Mark(axes, value, y, said) for value in (shift.before, shift.after)]
    axes.plot([], [], "s", color=SERIES[1], markerfacecolor=PAPER, label=states[0])
    axes.plot([], [], "o", color=SERIES[0], label=states[1])
    axes.set_yticks(range(len(names)), names, parse_math=False)
    axes.set_ylim(len(names) - 0.4, -0.6)
    if limits:
        axes.set_xlim(*limits)
    axes.tick_params(axis="y", length=0)
    legend(figure, axes)
    return figure
