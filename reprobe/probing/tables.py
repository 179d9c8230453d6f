"""A table of results as a file that other programs read: CSV, Parquet or JSON.

Enters: a polars frame, a path. Leaves: one file, whole or not at all. Does not know what the columns mean.
"""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl
import polars.selectors as cs

from reprobe.errors import ArtifactExists, UsageError
from reprobe.provenance import canonical_json, write_durably

SUFFIXES = (".csv", ".parquet", ".json")


def write_table(
    frame: pl.DataFrame, path: str | Path, *, overwrite: bool = False, about: Mapping[str, Any] | None = None
) -> Path:
    """Write `frame` to a .csv, .parquet or .json file; missing values are empty fields, nulls, and null.

    JSON is a list with one object per row; with `about`, plain JSON, it is one object with those entries and the
    list under "table". It has neither NaN nor infinity: there both are null. Raises `ArtifactExists` unless
    `overwrite`, `UsageError` for another suffix, or for columns of lists in a CSV file, which cannot hold them.
    """
    path = require_new_table(path, overwrite=overwrite)
    buffer = io.BytesIO()
    if path.suffix == ".parquet":
        frame.write_parquet(buffer)
    elif path.suffix == ".csv":
        if nested := frame.select(cs.nested()).columns:
            raise UsageError(f"{path}: CSV cannot hold the columns {', '.join(nested)}: write .parquet or .json")
        frame.write_csv(buffer)
    else:
        rows = frame.with_columns(pl.when(cs.float().is_finite()).then(cs.float())).to_dicts()
        buffer.write(canonical_json(rows if about is None else {**about, "table": rows}).encode())
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, buffer.getvalue())
    return path


def require_new_table(path: str | Path, *, overwrite: bool) -> Path:
    """`path`, if `write_table` would write there: asked before long work, not after it. Raises as it does."""
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise UsageError(
            f"{path}: a table is saved as {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}, "
            f"not {path.suffix or 'without suffix'}"
        )
    if path.is_dir() or (path.exists() and not overwrite):
        raise ArtifactExists(f"{path} exists; choose another name or pass overwrite=True")
    return path
