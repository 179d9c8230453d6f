"""Which rows a reader asked for, and where they lie.

Enters: None, a slice, row numbers, a mask, a polars series, or an expression over the index. Leaves: checked
row numbers, and the runs of neighbouring chunks that hold them. Reads nothing.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray
from polars.exceptions import PolarsError

from reprobe.errors import UsageError
from reprobe.store.layout import Grid

#: What `read` takes as rows: None is all of them.
Rows = slice | Sequence[int] | NDArray[Any] | pl.Series | None
RowNumbers = NDArray[np.int64]


class Run(NamedTuple):
    """Rows `start` … `stop` − 1 of one shard, read at once, of which `take` go to the places `put`."""

    shard: int
    start: int
    stop: int
    take: RowNumbers | slice
    put: RowNumbers | slice


def row_numbers(rows: Rows, n: int) -> "range | RowNumbers":
    """The wanted rows of a store of `n`, in the order asked for, repeats kept; `UsageError` for anything
    else.

    A range stands for consecutive rows. Row numbers count from 0; negative ones are refused, because rows are
    identities here and not positions in a list.
    """
    if rows is None:
        return range(n)
    if isinstance(rows, slice):
        try:
            chosen = range(*rows.indices(n))
        except (TypeError, ValueError) as error:
            raise UsageError(f"rows={rows!r} is not a slice of row numbers: {error}") from error
        return chosen if chosen.step == 1 else np.array(chosen, dtype=np.int64)
    if isinstance(rows, pl.Series):
        if rows.null_count():
            raise UsageError("rows has nulls: fill them or filter them out, e.g. with fill_null(False)")
        rows = rows.to_numpy()
    if isinstance(rows, str | bytes | int) or not hasattr(rows, "__len__"):
        raise UsageError(f"rows={rows!r}: give a slice, a list or array of row numbers, or a mask")
    array = np.asarray(rows)
    if array.ndim != 1:
        raise UsageError(f"rows has shape {array.shape}: give one dimension")
    if array.dtype == np.bool_:
        if len(array) != n:
            raise UsageError(f"rows is a mask of {len(array)} values, but the store has {n} rows")
        return np.flatnonzero(array).astype(np.int64)
    if array.size == 0:
        return np.empty(0, dtype=np.int64)
    if array.dtype.kind not in "iu":
        raise UsageError(f"rows has dtype {array.dtype}: give row numbers (integers) or a mask (booleans)")
    if array.min() < 0 or array.max() >= n:
        bad = array[(array < 0) | (array >= n)][0]
        raise UsageError(f"there is no row {bad}: this store has rows 0–{n - 1}")
    return array.astype(np.int64)


def shards_of(wanted: "range | RowNumbers", grid: Grid) -> tuple[int, ...]:
    """Shards that hold wanted rows, ascending."""
    if isinstance(wanted, range):
        return tuple(range(wanted.start // grid.shard_rows, -(-wanted.stop // grid.shard_rows))) if wanted else ()
    return tuple(np.unique(wanted // grid.shard_rows).tolist())


def rows_where(condition: pl.Expr, index: pl.DataFrame) -> RowNumbers:
    """Row numbers, ascending, of the lines of `index` that meet `condition`; null counts as not met.

    `UsageError` if it names a column that is not there, or is not one truth value per line.
    """
    if not isinstance(condition, pl.Expr):
        raise UsageError(f"{condition!r} is not a polars expression: write e.g. pl.col('label') == 1")
    try:
        found = index.select(condition)
    except PolarsError as error:
        raise UsageError(
            f"{condition} cannot be asked of this index ({error}); its columns: "
            + ", ".join(f"{name} ({kind})" for name, kind in index.schema.items())
        ) from error
    if found.width != 1 or found.dtypes != [pl.Boolean]:
        kinds = ", ".join(f"{name} ({kind})" for name, kind in found.schema.items())
        raise UsageError(f"{condition} gives {kinds or 'nothing'}, not one truth value per row: compare with something")
    if found.height != index.height:
        raise UsageError(f"{condition} gives {found.height} values for {index.height} rows: it must give one per row")
    return np.flatnonzero(found.to_series().fill_null(False).to_numpy()).astype(np.int64)


def numbers(rows: "range | RowNumbers") -> RowNumbers:
    """The same rows as an array."""
    return np.arange(rows.start, rows.stop, rows.step, dtype=np.int64) if isinstance(rows, range) else rows


def runs(wanted: "range | RowNumbers", grid: Grid) -> Iterator[Run]:
    """How to read `wanted`: ascending, a run per stretch of neighbouring chunks, none crossing a shard."""
    if isinstance(wanted, range):
        for k in shards_of(wanted, grid):
            shard = grid.shard(k)
            start, stop = max(wanted.start, shard.start), min(wanted.stop, shard.stop)
            yield Run(k, start, stop, slice(None), slice(start - wanted.start, stop - wanted.start))
        return
    sorted_already = bool(np.all(wanted[1:] >= wanted[:-1]))
    order = np.arange(len(wanted)) if sorted_already else np.argsort(wanted, kind="stable")
    ascending = wanted[order]
    chunk, shard_number = ascending // grid.chunk_rows, ascending // grid.shard_rows
    breaks = np.flatnonzero((np.diff(chunk) > 1) | (np.diff(shard_number) > 0)) + 1
    for part in np.split(np.arange(len(wanted)), breaks) if len(wanted) else ():
        first, last = int(part[0]), int(part[-1])
        start, stop = int(ascending[first]), int(ascending[last]) + 1
        # slices where they say the same: they copy whole blocks, not row by row
        dense = stop - start == len(part) and bool(np.all(np.diff(ascending[part]) == 1))
        take = slice(None) if dense else ascending[part] - start
        put = slice(first, last + 1) if sorted_already else order[part]
        yield Run(int(shard_number[first]), start, stop, take, put)
