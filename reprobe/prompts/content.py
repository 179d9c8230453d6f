"""What a file holds, before anyone says what it means.

Enters: the path of a .csv, .json, .jsonl or .parquet file. Leaves: its `Content`, and the `Format` contract
that turns a content into a frame. Does not know any particular format.
"""

import contextlib
import functools
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import polars as pl

from reprobe.errors import DataError, ReprobeError, UnknownData


@dataclass(frozen=True, eq=False)
class Content:
    """A parsed file: a table for .csv (all cells text, empty ones null) and .parquet, JSON for .json and
    .jsonl.
    """

    path: Path
    kind: Literal["csv", "json", "parquet"]
    value: Any

    @property
    def stem(self) -> str:
        """The file's name without its ending: the prompt set's name, and the start of ids made for it."""
        return self.path.stem

    @functools.cached_property
    def keys(self) -> frozenset[str]:
        """Columns of a table, keys of an object, or keys of a list's first object: what formats are told
        apart by.
        """
        if isinstance(self.value, pl.DataFrame):
            return frozenset(self.value.columns)
        first = self.value[0] if isinstance(self.value, list) and self.value else self.value
        return frozenset(first) if isinstance(first, dict) else frozenset()

    @functools.cached_property
    def records(self) -> list[dict[str, Any]]:
        """Its rows as mappings; `DataError` if they are none."""
        if isinstance(self.value, pl.DataFrame):
            return self.value.to_dicts()
        if not isinstance(self.value, list) or not all(isinstance(row, dict) for row in self.value):
            raise DataError(f"{self.path} must be a list of objects")
        return self.value

    def field(self, row: Any, key: str, i: int) -> Any:
        """`row[key]`; `DataError` naming the row (`i`, counted from 0) if it is absent or null."""
        if not isinstance(row, dict) or row.get(key) is None:
            raise DataError(f"{self.path}: row {i + 1} has no {key!r}")
        return row[key]

    def text(self, row: Any, key: str, i: int) -> str:
        """`field`, which must be a string."""
        value = self.field(row, key, i)
        if not isinstance(value, str):
            raise DataError(f"{self.path}: {key} of row {i + 1} must be a string, not {value!r}")
        return value

    def text_or_none(self, row: dict[str, Any], key: str, i: int) -> str | None:
        """`text`, or None if it is absent or null."""
        return None if row.get(key) is None else self.text(row, key, i)


class Format(Protocol):
    """A way to read prompts from a content. Settings, if it has any, are fields of the object."""

    @property
    def name(self) -> str: ...

    @property
    def needs(self) -> str:
        """What a content must have, for people."""
        ...

    def fits(self, content: Content) -> bool:
        """Whether `content` looks like this format; cheap, and decided by names of columns and keys alone."""
        ...

    def frame(self, content: Content) -> pl.DataFrame:
        """The prompts, in canonical columns. `DataError` for a content that only looked like this format."""
        ...


def read(path: Path, limit: int | None) -> Content:
    """The content of the file at `path`; of a line-by-line file the first `limit` rows only.

    Raises `UnknownData` if it does not exist or has another ending, `DataError` if it cannot be parsed.
    """
    if not path.is_file():
        raise UnknownData(f"there is no file {path}")
    with parsing(f"{path} is not a valid {path.suffix} file"):
        match path.suffix.lower():
            case ".csv":
                return Content(path, "csv", pl.read_csv(path, infer_schema=False))
            case ".parquet":
                return Content(path, "parquet", pl.read_parquet(path, n_rows=limit))
            case ".json" | ".jsonl" as suffix:
                value = _lines(path, limit) if suffix == ".jsonl" else json.loads(path.read_text("utf-8-sig"))
                if value in ([], {}):
                    raise DataError(f"{path} holds no prompts")
                return Content(path, "json", value)
    raise UnknownData(f"{path}: prompts are read from .jsonl, .json, .csv and .parquet files, not from {path.suffix!r}")


@contextlib.contextmanager
def parsing(what: str) -> Iterator[None]:
    """Whatever parsers and polars find wrong with a file's content in here becomes a `DataError`: `what`, and why.

    polars panics on some damaged files, and JSON may nest too deep or hold numbers and half characters that no column
    can. Failures of the device pass.
    """
    try:
        yield
    except (ReprobeError, MemoryError):
        raise
    except (Exception, pl.exceptions.PanicException) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise DataError(f"{what}: {error}") from error


def _lines(path: Path, limit: int | None) -> list[Any]:
    rows = []
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(itertools.islice((text for text in file if text.strip()), limit), 1):
            with parsing(f"{path}: row {number} is not JSON"):
                rows.append(json.loads(line))
    return rows


def typed(column: pl.Series) -> pl.Series:
    """A column of text cells as what all of them spell: booleans, integers, floats, or else text.

    Only where nothing is lost: '007' stays text.
    """
    if column.dtype != pl.String or column.null_count() == column.len():
        return column
    if column.str.to_lowercase().is_in(["true", "false"]).all():
        return column.str.to_lowercase() == "true"
    whole = column.cast(pl.Int64, strict=False)
    if (whole.cast(pl.String) == column).all() and whole.null_count() == column.null_count():
        return whole
    numbers = column.cast(pl.Float64, strict=False)
    plain = column.str.contains(r"^-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?$").all()
    return numbers if plain and numbers.null_count() == column.null_count() else column


def numbered(content: Content, n: int) -> pl.Series:
    """Ids for `n` prompts that have none of their own: STEM-0001 …"""
    width = max(4, len(str(n)))
    return pl.Series("id", [f"{content.stem}-{i:0{width}d}" for i in range(1, n + 1)])
