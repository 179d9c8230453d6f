"""Walking over a store in batches, within bounded memory.

Enters: pieces of row numbers in the order in which to read them, a way to read them, a batch size. Leaves:
batches of exactly that size (the last may be shorter). While one piece is used, a thread reads the next. Reads
through the functions it is given; which rows are in which piece is `order`'s to say.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from reprobe.model.sites import Site
from reprobe.store.rows import RowNumbers, numbers

Item = TypeVar("Item")
Values = TypeVar("Values")
Arrays = dict[Site, NDArray[Any]]


class Batch(NamedTuple, Generic[Values]):
    """Row numbers, int64 (n,), and their `values`: a tensor (n, width), or a dict of one per site."""

    rows: RowNumbers
    values: Values


class Source(NamedTuple):
    """How to read: `empty(n)` makes room for n rows, `fill(rows, room)` reads rows into it."""

    empty: Callable[[int], Arrays]
    fill: Callable[["range | RowNumbers", Arrays], None]


def batches(
    pieces: Iterable["range | RowNumbers"], source: Source, batch_rows: int, *, rows: int
) -> Iterator[Batch[Arrays]]:
    """All `rows` rows of all `pieces`, in their order: each batch a view of one piece, or a copy where it spans
    several.

    In memory are two pieces (one is being read) and less than one batch.
    """

    def read() -> Iterator[Batch[Arrays]]:
        for found in pieces:
            source.fill(found, room := source.empty(len(found)))
            yield Batch(np.array(numbers(found)), room)  # a batch shares no memory with what is wanted

    begun: Batch[Arrays] | None = None  # a batch of which the first `filled` rows are there
    left, filled = rows, 0
    for piece in _ahead(read()):
        start, n = 0, len(piece.rows)
        while start < n:
            size = min(batch_rows, left)
            if begun is None and size <= n - start:
                yield _cut(piece, start, start + size)
                start, left = start + size, left - size
                continue
            if begun is None:
                begun, filled = Batch(np.empty(size, dtype=np.int64), source.empty(size)), 0
            stop = min(start + len(begun.rows) - filled, n)
            _copy(_cut(piece, start, stop), _cut(begun, filled, filled + stop - start))
            start, filled = stop, filled + stop - start
            if filled == len(begun.rows):
                yield begun
                begun, left = None, left - filled
        del piece  # before the one after the next is read


def mixed(
    pieces: Iterable[RowNumbers],
    source: Source,
    batch_rows: int,
    *,
    rows: int,
    piece: int,
    held: int,
    rng: np.random.Generator,
) -> Iterator[Batch[Arrays]]:
    """All `rows` rows of all `pieces` (of at most `piece` rows each), mixed with those of the pieces beside them.

    The rows of a piece are dealt evenly over as many turns as pieces are `held`; with each piece that is read
    comes a turn, which is the rows dealt to it in random order. So at any time rows of `held` pieces are mixed,
    and a piece may leave when its last turn is over. Batches are views of blocks of about a piece, because
    large blocks come cheaper from the system than many small ones. In memory are `held` + 1 pieces (one is
    being read) and one block.
    """
    piece, slots = min(piece, rows), held + 1
    memory = source.empty(piece * slots)

    def read() -> Iterator[tuple[int, RowNumbers]]:
        for i, found in enumerate(pieces):
            # the place of the piece `slots` before it, whose last turn was the one before the last
            first = i % slots * piece
            source.fill(found, {site: m[first : first + len(found)] for site, m in memory.items()})
            yield first, found

    left, filled = rows, 0
    block: Batch[Arrays] | None = None
    for places, found in _turns(_ahead(read()), held, rng):
        start = 0
        while start < len(places):
            if block is None:
                size = min(-(-piece // batch_rows) * batch_rows, left)
                block, filled = Batch(np.empty(size, dtype=np.int64), source.empty(size)), 0
            n = min(len(block.rows) - filled, len(places) - start)
            block.rows[filled : filled + n] = found[start : start + n]
            for site, m in memory.items():
                # clip: the only mode that does not buffer
                np.take(m, places[start : start + n], axis=0, out=block.values[site][filled : filled + n], mode="clip")
            start, filled, left = start + n, filled + n, left - n
            if filled == len(block.rows):
                for i in range(0, filled, batch_rows):
                    yield _cut(block, i, i + batch_rows)
                block = None


def _turns(
    pieces: Iterable[tuple[int, RowNumbers]], held: int, rng: np.random.Generator
) -> Iterator[tuple[NDArray[np.int64], RowNumbers]]:
    """Deal pieces, each (place of its first row in memory, row numbers), to turns: places and row numbers, shuffled.

    The first turn waits until `held` pieces are there, so that it is as mixed as the others.
    """
    hands: deque[list[tuple[NDArray[np.int64], RowNumbers]]] = deque([] for _ in range(held))
    waiting = held - 1
    for first, rows in pieces:
        for hand, dealt in zip(hands, np.array_split(rng.permutation(len(rows)), held), strict=True):
            hand.append((first + dealt, rows[dealt]))
        if waiting:
            waiting -= 1
            hands[1].extend(hands.popleft())
        else:
            yield _shuffled(hands.popleft(), rng)
        hands.append([])
    yield _shuffled([part for hand in hands for part in hand], rng)


def _shuffled(
    parts: list[tuple[NDArray[np.int64], RowNumbers]], rng: np.random.Generator
) -> tuple[NDArray[np.int64], RowNumbers]:
    if not parts:
        return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    places, rows = (np.concatenate(p) for p in zip(*parts, strict=True))
    order = rng.permutation(len(rows))
    return places[order], rows[order]


def _ahead(items: Iterator[Item]) -> Iterator[Item]:
    """The same items, each made in a thread while the one before it is used."""
    end = object()
    with ThreadPoolExecutor(1, thread_name_prefix="reprobe-read") as thread:
        coming = thread.submit(next, items, end)
        while (item := coming.result()) is not end:
            coming = thread.submit(next, items, end)
            yield item  # type: ignore[misc]
            del item


def _cut(batch: Batch[Arrays], start: int, stop: int) -> Batch[Arrays]:
    return Batch(batch.rows[start:stop], {site: v[start:stop] for site, v in batch.values.items()})


def _copy(values: Batch[Arrays], room: Batch[Arrays]) -> None:
    room.rows[:] = values.rows
    for site, array in values.values.items():
        room.values[site][:] = array
