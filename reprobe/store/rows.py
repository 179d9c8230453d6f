"""Which rows a reader asked for, and in which order to read them.

Enters: None, a slice, row numbers, a mask or a polars series. Leaves: checked row numbers, and the runs of
neighbouring chunks that hold them; and for epochs, a seeded order in windows of bounded size. Reads nothing.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

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


def runs(wanted: "range | RowNumbers", grid: Grid) -> Iterator[Run]:
    """How to read `wanted`: ascending, a run per stretch of neighbouring chunks, none crossing a shard."""
    if isinstance(wanted, range):
        for k in shards_of(wanted, grid):
            shard = grid.shard(k)
            start, stop = max(wanted.start, shard.start), min(wanted.stop, shard.stop)
            yield Run(k, start, stop, slice(None), slice(start - wanted.start, stop - wanted.start))
        return
    order = np.argsort(wanted, kind="stable")
    ascending = wanted[order]
    chunk, shard_number = ascending // grid.chunk_rows, ascending // grid.shard_rows
    breaks = np.flatnonzero((np.diff(chunk) > 1) | (np.diff(shard_number) > 0)) + 1
    for part in np.split(np.arange(len(wanted)), breaks) if len(wanted) else ():
        start, stop = int(ascending[part[0]]), int(ascending[part[-1]]) + 1
        yield Run(int(shard_number[part[0]]), start, stop, ascending[part] - start, order[part])


def windows(grid: Grid, *, at_least: int, seed: int | None) -> Iterator["range | RowNumbers"]:
    """All rows once, in windows of about one shard (or `at_least` rows), each window in memory at a time.

    Without a seed in order. With one, chunks are drawn at random from the whole store and the rows of a
    window are shuffled among themselves: close to a full shuffle, though each chunk is read once. The order
    depends on the grid, `at_least` and the seed alone, not on the sites that are read.
    """
    per_window = -(-max(grid.shard_rows, at_least) // grid.chunk_rows)
    if seed is None:
        step = per_window * grid.chunk_rows
        for start in range(0, grid.rows, step):
            yield range(start, min(start + step, grid.rows))
        return
    rng = np.random.default_rng(seed)
    chunks = rng.permutation(-(-grid.rows // grid.chunk_rows))
    for i in range(0, len(chunks), per_window):
        starts = chunks[i : i + per_window] * grid.chunk_rows
        rows = (starts[:, None] + np.arange(grid.chunk_rows)).ravel()
        yield rng.permutation(rows[rows < grid.rows]).astype(np.int64)
