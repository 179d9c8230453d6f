"""What a section of the page is made of: paragraphs, facts, tables, figures, commands.

Enters: text and figures. Leaves: frozen values that the template knows how to show. All text is escaped
there; only the SVG of a figure is markup. Does not know what is reported.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from markupsafe import Markup
from matplotlib.figure import Figure

from reprobe.report.svg import inline_svg

#: A figure broader than this (inches) gets the whole width of the page, and scrolls where that is too narrow.
_BROAD = 5.5


@dataclass(frozen=True)
class Digest:
    """A sha256, shown by its first digits and in full under the pointer (or in full, where there is room)."""

    full: str
    whole: bool = False

    @property
    def short(self) -> str:
        return self.full if self.whole else self.full[:12]


@dataclass(frozen=True)
class Link:
    """A text that leads to another place on the page."""

    text: str
    to: str


Cell = str | Digest | Link


@dataclass(frozen=True)
class Prose:
    text: str
    kind: ClassVar[str] = "prose"


@dataclass(frozen=True)
class Quote:
    """A text that was given to the model or came from it."""

    text: str
    kind: ClassVar[str] = "quote"


@dataclass(frozen=True)
class Card:
    """Named facts about one thing."""

    title: str
    facts: Sequence[tuple[str, Cell]]


@dataclass(frozen=True)
class Cards:
    cards: Sequence[Card]
    kind: ClassVar[str] = "cards"


@dataclass(frozen=True)
class Table:
    """Columns whose heading ends in `#` hold numbers; `total` is a last line apart from the rows."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    total: Sequence[Cell] = ()
    kind: ClassVar[str] = "table"

    @property
    def columns(self) -> list[tuple[str, bool]]:
        """Heading and whether it is a column of numbers."""
        return [(h.removesuffix("#"), h.endswith("#")) for h in self.head]


@dataclass(frozen=True)
class Commands:
    lines: Sequence[str]
    kind: ClassVar[str] = "commands"


@dataclass(frozen=True)
class Panel:
    """A figure with its caption; the page numbers it."""

    name: str
    svg: Markup
    caption: str
    broad: bool


@dataclass(frozen=True)
class Panels:
    """Figures side by side where there is room, one below the other where there is not."""

    panels: Sequence[Panel]
    kind: ClassVar[str] = "panels"


@dataclass(frozen=True)
class Beside:
    """A figure and the table that spells it out, side by side where there is room."""

    panel: Panel
    table: Table
    kind: ClassVar[str] = "beside"


Block = Prose | Quote | Cards | Table | Commands | Panels | Beside


@dataclass(frozen=True)
class Section:
    name: str
    title: str
    blocks: Sequence[Block]


def panel(figure: Figure, name: str, label: str, caption: str) -> Panel:
    """`name` is unique on the page; `label` is what a screen reader says in place of the figure."""
    broad = bool(figure.get_figwidth() > _BROAD)
    return Panel(name, Markup(inline_svg(figure, name, label)), caption, broad)
