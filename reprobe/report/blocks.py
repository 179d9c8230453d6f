"""What a section of the page is made of: paragraphs, facts, tables, figures, commands.

Enters: text and figures. Leaves: frozen values that the template knows how to show. All text is escaped
there; only the SVG of a figure is markup. Does not know what is reported.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from markupsafe import Markup
from matplotlib.figure import Figure

from reprobe.model.identity import ModelIdentity
from reprobe.report.svg import inline_svg

#: A figure broader than this (inches) gets the whole width of the page, and scrolls where that is too narrow.
_BROAD = 5.5
#: A table with more rows scrolls in a box of its own.
_LONG = 24


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
    """A text that leads to another place: `#id` on the page, or a file, relative to it."""

    text: str
    to: str


Cell = str | Digest | Link
#: What a figure or a table is of: named facts, in a line under it.
Source = Sequence[tuple[str, Cell]]


def source(identity: ModelIdentity | None, digests: Mapping[str, str | None], *, at: str = "", by: str = "") -> Source:
    """The model, the digests of the data by what they are of, the sites and tokens, and what was done, in words.

    What an artifact did not record, it cannot say: a missing digest is left out, a missing model is said to be.
    """
    model: list[tuple[str, Cell]] = [("model", "not recorded")]
    if identity is not None:
        model = [("model", identity.name), ("weights", Digest(identity.weights))]
    data: list[tuple[str, Cell]] = [(what, Digest(digest)) for what, digest in digests.items() if digest]
    said: list[tuple[str, Cell]] = [(how, text) for how, text in (("at", at), ("steered by", by)) if text]
    return (*model, *data, *said)


@dataclass(frozen=True)
class Prose:
    """A paragraph, and where it leads at its end."""

    text: str
    link: Link | None = None
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
    source: Source = ()
    kind: ClassVar[str] = "table"

    @property
    def long(self) -> bool:
        """Whether it has more rows than a reader would scroll past."""
        return len(self.rows) > _LONG

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
    """A figure with its caption and what it is of; the page numbers it."""

    name: str
    svg: Markup
    caption: str
    broad: bool
    source: Source


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


@dataclass(frozen=True)
class Heading:
    """What the next blocks are about, inside a section."""

    text: str
    kind: ClassVar[str] = "heading"


Block = Prose | Quote | Cards | Table | Commands | Panels | Beside | Heading


@dataclass(frozen=True)
class Section:
    name: str
    title: str
    blocks: Sequence[Block]


def panel(figure: Figure, name: str, label: str, caption: str, of: Source) -> Panel:
    """`name` is unique on the page; `label` is what a screen reader says in place of the figure."""
    broad = bool(figure.get_figwidth() > _BROAD)
    return Panel(name, Markup(inline_svg(figure, name, label)), caption, broad, of)
