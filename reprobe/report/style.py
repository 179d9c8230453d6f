"""How figures look, and where the values under the pointer are kept.

Enters: axes. Leaves: axes in the house style, and `Plot`, a matplotlib Figure that remembers the value of
each mark. Changes no matplotlib setting: every colour and size is given to the artists. Does not know what is
drawn.
"""

from dataclasses import dataclass
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from reprobe.report.wording import printable

#: The inks of a figure. On the page, these very colours become variables that a dark theme can change.
INK, MUTED, GRID, PAPER = "#1c2127", "#59626d", "#dde2e7", "#fffffe"
#: Series in order: Okabe & Ito's palette for all kinds of colour vision, without the yellow, lost on paper.
#: Each has its marker too, so that nothing is told by colour alone.
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS = ("o", "s", "^", "D", "v", "P")
#: Series beyond the six colours go through them again, with another line and hollow markers.
LINES = ("-", "-.")
#: Negative and positive class, in that order, in every figure; the same ends as the diverging map.
NEGATIVE, POSITIVE = SERIES[1], SERIES[0]
#: Stands out from every colour of the sequential map, in any theme.
FRAME = "#cc3f00"
SEQUENTIAL, DIVERGING = "cividis", "RdBu"

#: Inches. Two such figures fill a page's width, and one is legible at a phone's.
WIDTH = 4.7
LABEL, TICK = 10.0, 9.0  # points
#: Characters that fit a figure of `WIDTH`.
_TITLE, _LEGEND = 40, 46

Grid = Literal["x", "y", "both", "none"]


@dataclass(frozen=True)
class Mark:
    """A place in `axes`, in data units, and what it says: a point, or a cell of `size` around (x, y)."""

    axes: Axes
    x: float
    y: float
    text: str
    size: tuple[float, float] | None = None


class Plot(Figure):
    """A matplotlib Figure whose `marks` hold the exact values; the page shows them under the pointer."""

    def __init__(self, width: float, height: float) -> None:
        """A white figure of `width` × `height` inches, laid out so that nothing is cut off."""
        super().__init__(figsize=(width, height), layout="constrained", facecolor="white")
        self.marks: list[Mark] = []


def series(i: int) -> dict[str, Any]:
    """How the i-th series of a figure looks: arguments of `Axes.plot`."""
    turn, color = i // len(SERIES), SERIES[i % len(SERIES)]
    return {
        "color": color,
        "marker": MARKERS[i % len(MARKERS)],
        "linestyle": LINES[turn % len(LINES)],
        "markerfacecolor": color if turn % 2 == 0 else PAPER,
    }


def dress(axes: Axes, *, x: str, y: str, title: str | None = None, grid: Grid = "both") -> Axes:
    """Name the axes and give them the house style."""
    axes.set_facecolor("none")
    for name, spine in axes.spines.items():
        spine.set(color=MUTED, linewidth=0.8, visible=name in ("left", "bottom"))
    axes.tick_params(colors=MUTED, labelcolor=INK, labelsize=TICK, width=0.8, length=3)
    write(axes.xaxis.get_label(), x)
    write(axes.yaxis.get_label(), y)
    if title:
        axes.set_title(
            clipped(title, _TITLE), loc="left", fontsize=LABEL, color=INK, fontweight="bold", parse_math=False
        )
    axes.set_axisbelow(True)
    if grid != "none":
        axes.grid(visible=True, axis=grid, color=GRID, linewidth=0.7)
    return axes


def write(label: Any, text: str) -> None:
    """Set an axis label; data are never read as mathematical markup."""
    label.set(text=printable(text), color=INK, fontsize=LABEL, parse_math=False)


def whole_ticks(axis: Any, most: int = 8) -> None:
    """Ticks at whole numbers only: blocks and heads have no halves."""
    axis.set_major_locator(MaxNLocator(nbins=most, integer=True, steps=[1, 2, 5, 10]))


def clipped(text: str, most: int) -> str:
    """`text`, or its beginning and an ellipsis: a figure has no room for more than `most` characters."""
    text = printable(text)
    return text if len(text) <= most else text[: most - 1] + "…"


def token_text(token: str, most: int) -> str:
    """A token as a tick label: without the blank before a word, never invisible, never long."""
    text = token.removeprefix(" ").replace("\n", "↵").replace("\t", "⇥").replace(" ", "␣")
    return clipped("".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text) or "␣", most)


def heading(figure: Figure, text: str, most: int = 60, weight: str = "bold") -> None:
    """A title above all panels of a figure."""
    shown = figure.suptitle(clipped(text, most), x=0.01, ha="left", fontsize=LABEL, color=INK, fontweight=weight)
    shown.set_parse_math(False)


def legend(figure: Figure, axes: Axes) -> None:
    """The legend of `axes`, below the figure, where it covers no data; none where nothing is named."""
    handles, labels = axes.get_legend_handles_labels()
    if not labels:
        return
    shown = figure.legend(
        handles,
        [clipped(label, _LEGEND) for label in labels],
        loc="outside lower left",
        ncols=2 if max(map(len, labels)) <= _LEGEND // 2 else 1,
        frameon=False,
        fontsize=TICK,
        labelcolor=INK,
        markerscale=1.3,
        borderaxespad=0.0,
        columnspacing=1.6,
    )
    for text in shown.get_texts():
        text.set_parse_math(False)


def colorbar(figure: Figure, mesh: Any, axes: Axes | list[Axes], label: str, **options: Any) -> Any:
    """A colour bar with its quantity and unit named."""
    bar = figure.colorbar(mesh, ax=axes, **options)
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=MUTED, labelcolor=INK, labelsize=TICK, width=0.8, length=3)
    bar.set_label(printable(label), color=INK, fontsize=LABEL, parse_math=False)
    return bar
