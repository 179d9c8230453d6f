"""From a name to a table of prompts.

Enters: a bundled name, a path, or an `hf:` address. Leaves: a frame and the set's name. Does not check the
frame; that is `PromptSet`'s.
"""

import difflib
from collections.abc import Mapping
from pathlib import Path

import polars as pl

from reprobe.errors import UnknownData, UsageError
from reprobe.prompts import content, hub
from reprobe.prompts.catalog import bundled, folder
from reprobe.prompts.columns import rename
from reprobe.prompts.content import Format
from reprobe.prompts.formats import choose

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


def read(
    source: str,
    columns: Mapping[str, str | None],
    *,
    format: str | Format | None,  # noqa: A002
    limit: int | None,
) -> tuple[pl.DataFrame, str]:
    """The frame that `source` names, and a name for it; `PromptSet.load` says what each argument means."""
    check_limit(limit)
    if source.startswith("hf:"):
        if format is not None:
            raise UsageError("hf: data sets are tables; format is for files. Name the columns, e.g. text='question'")
        address = source.removeprefix("hf:")
        name = Path(address.split(":")[0]).name
        return rename(hub.fetch(address, limit), columns, name), name
    path = find(source)
    found = content.read(path, limit)
    chosen = choose(found, columns, format)
    with content.parsing(f"{path} holds what no prompt can, read as {chosen.name!r}"):
        frame = chosen.frame(found)
    return (frame if limit is None else frame.head(limit)), path.stem


def find(source: str) -> Path:
    """The file of a bundled data set, or the path itself; `UnknownData` with what exists if it is neither."""
    if "/" not in source and Path(source).suffix.lower() not in SUFFIXES:
        names = bundled()
        if source in names:
            return folder() / f"{source}.jsonl"
    elif Path(source).is_file():
        return Path(source)
    near = difflib.get_close_matches(Path(source).stem, bundled(), n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise UnknownData(
        f"there is no data set {source!r}.{hint} Bundled: {', '.join(bundled())}. A file must exist and end "
        f"in {', '.join(SUFFIXES)}; a Hugging Face data set is hf:NAME[:config][:split]"
    )


def check_limit(limit: int | None) -> None:
    """Raise `UsageError` unless `limit` is a positive number or None."""
    if limit is not None and limit < 1:
        raise UsageError(f"limit={limit}: take at least one prompt, or None for all")
