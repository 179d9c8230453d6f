"""The formats prompts are read from, and how a file's is recognised.

Enters: a file's content, and what the caller said of it. Leaves: the one format to read it with. A new format
is a class in a file of its subject and a line in `FORMATS`. Does not read files.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import polars as pl

from reprobe.errors import DataError, UsageError
from reprobe.prompts.columns import CANONICAL, from_records, rename, unknown
from reprobe.prompts.content import Content, Format, typed
from reprobe.prompts.facts import CounterFact, CounterFactFlat, KnownFacts, Relations
from reprobe.prompts.statements import Emotions, Persona, Statements
from reprobe.prompts.truthfulqa import TruthfulQA, TruthfulQAChoices


@dataclass(frozen=True)
class Table:
    """A file in the canonical columns, or in others that `columns` maps to them (canonical name → column)."""

    columns: Mapping[str, str | None] = field(default_factory=dict)
    name = "table"
    needs = "a column text or messages; beside it id, label, group, pair, spans and any others"

    def fits(self, content: Content) -> bool:
        return bool({"text", "messages"} & content.keys)

    def frame(self, content: Content) -> pl.DataFrame:
        if content.kind == "json":
            return rename(from_records(content.records, content.stem), self.columns, content.stem)
        frame = rename(content.value, self.columns, content.stem)
        if content.kind == "parquet":
            return frame
        return frame.with_columns(typed(c) for c in frame.get_columns() if c.name == "label" or c.name not in CANONICAL)


#: Every format, by name.
FORMATS: Mapping[str, Format] = {
    f.name: f
    for f in (
        Table(),
        TruthfulQA(),
        TruthfulQAChoices(),
        Statements(),
        KnownFacts(),
        CounterFact(),
        CounterFactFlat(),
        Relations(),
        Persona(),
        Emotions(),
    )
}


def choose(content: Content, columns: Mapping[str, str | None], format_: str | Format | None) -> Format:
    """The format of `content`: the one named, a table if columns are mapped, else the only one that fits.

    Raises `UnknownData` for a name that is no format's, `DataError` if none or several fit, or the named one
    does not.
    """
    mapped = any(old is not None for old in columns.values())
    if isinstance(format_, str) and format_ not in FORMATS:
        raise unknown("format", format_, FORMATS, "reprobe")
    asked = FORMATS[format_] if isinstance(format_, str) else format_
    if mapped and asked is not None and not isinstance(asked, Table):
        raise UsageError(f"columns are mapped for tables only, and format {asked.name!r} knows its own")
    if mapped:
        return Table(columns)
    if asked is not None:
        if not asked.fits(content):
            raise DataError(f"{content.path} is not in the format {asked.name!r}, which needs {asked.needs}")
        return asked
    fitting = [f for f in FORMATS.values() if f.fits(content)]
    if len(fitting) == 1:
        return fitting[0]
    found = ", ".join(sorted(content.keys)) or "no named columns"
    listed = "\n".join(f"  {f.name}: {f.needs}" for f in fitting or FORMATS.values())
    if fitting:
        raise DataError(f"{content.path} fits several formats (it has {found}); name one with format=…:\n{listed}")
    raise DataError(
        f"{content.path} is in no known format (it has {found}); name its columns, e.g. text='statement', or "
        f"bring it into one of these:\n{listed}"
    )
