"""Walking over a store in batches, within bounded memory.

Enters: windows of row numbers, a way to read them, a batch size. Leaves: batches of exactly that size (the
last may be shorter), each a view of one window, or a copy where it spans two. Reads through the function it
is given.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from reprobe.model.sites import Site
from reprobe.store.rows import RowNumbers

Values = TypeVar("Values")
Arrays = dict[Site, NDArray[Any]]


class Batch(NamedTuple, Generic[Values]):
    """Row numbers, int64 (n,), and their `values`: a tensor (n, width), or a dict of one per site."""

    rows: RowNumbers
    values: Values


def batches(
    windows: Iterable["range | RowNumbers"], read: Callable[["range | RowNumbers"], Arrays], batch_rows: int
) -> Iterator[Batch[Arrays]]:
    """All rows of all `windows`, in their order; in memory are one window and less than one batch."""
    rest: Batch[Arrays] | None = None  # the end of the last window, always less than a batch
    for window in windows:
        new = Batch(np.asarray(window, dtype=np.int64), read(window))
        start = 0
        if rest is not None:
            start = batch_rows - len(rest.rows)
            rest = _joined(rest, _cut(new, 0, start))
            if len(rest.rows) < batch_rows:
                continue
            yield rest
        stop = start + (len(new.rows) - start) // batch_rows * batch_rows
        for i in range(start, stop, batch_rows):
            yield _cut(new, i, i + batch_rows)
        rest = _copied(_cut(new, stop, len(new.rows))) if stop < len(new.rows) else None
        del new  # before the next window is read
    if rest is not None:
        yield rest


def _cut(batch: Batch[Arrays], start: int, stop: int) -> Batch[Arrays]:
    return Batch(batch.rows[start:stop], {site: v[start:stop] for site, v in batch.values.items()})


def _joined(a: Batch[Arrays], b: Batch[Arrays]) -> Batch[Arrays]:
    return Batch(np.concatenate([a.rows, b.rows]), {s: np.concatenate([v, b.values[s]]) for s, v in a.values.items()})


def _copied(batch: Batch[Arrays]) -> Batch[Arrays]:
    """The same values in memory of their own: a view would keep its whole window alive."""
    return Batch(batch.rows.copy(), {site: v.copy() for site, v in batch.values.items()})
