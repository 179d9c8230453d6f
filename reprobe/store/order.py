"""In which order the rows of an epoch come.

Enters: the wanted rows, the grid, a seed. Leaves: pieces, which are rows that are read together, in the order
in which to read them; and for epochs that several readers share, the part of one of them. Reads nothing.

A piece is as many neighbouring chunks of one shard as make a read worth its overhead. The order depends on
the grid, the widest stored site, the wanted rows and the seed alone, not on the sites that are read.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from reprobe.errors import UsageError
from reprobe.store.layout import Grid
from reprobe.store.rows import RowNumbers, numbers

#: Bytes of a site that are read at once: below some MB the overhead of a read shows, above it the caches end.
PIECE_BYTES = 8 * 2**20
#: Pieces that are mixed with each other, at least: where shards are small, more than one shard's worth.
MIXED = 4


@dataclass(frozen=True)
class Order:
    """The order of an epoch: as asked for, or shuffled by `seed`; all of it, or part `number` of `of`.

    Parts are disjoint, together all of the epoch, and equal to within a row. With `whole_batches` they are
    exactly equal, and of whole batches: what does not fill one in every part is left out.
    """

    seed: tuple[int, ...] | None = None
    number: int = 0
    of: int = 1
    whole_batches: bool = False

    def __post_init__(self) -> None:
        for value in self.seed or ():
            if type(value) is not int or value < 0:
                raise UsageError(
                    f"{value!r} is not a seed: give a whole number that is not negative, or None for the stored order"
                )
        if type(self.number) is not int or type(self.of) is not int or not 0 <= self.number < self.of:
            raise UsageError(f"there is no part {self.number!r} of {self.of!r}: parts count from 0")

    def generator(self) -> np.random.Generator:
        """Randomness of this part's own, for mixing rows."""
        return np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(self.number,)))

    def bounds(self, rows: int, batch_rows: int) -> tuple[int, int]:
        """Where this part of an epoch of `rows` rows begins and ends."""
        if self.whole_batches:
            size = rows // self.of // batch_rows * batch_rows
            return self.number * size, (self.number + 1) * size
        return rows * self.number // self.of, rows * (self.number + 1) // self.of


def check_batch_rows(batch_rows: int) -> int:
    """`batch_rows` itself if it can be one; raises `UsageError` otherwise."""
    if type(batch_rows) is not int or batch_rows < 1:
        raise UsageError(f"batch_rows is {batch_rows!r}: it must be a whole number, at least 1")
    return batch_rows


def piece_rows(grid: Grid, row_bytes: int) -> int:
    """Rows of a piece, for rows of at most `row_bytes` bytes: whole chunks, at most a shard."""
    chunks = max(1, PIECE_BYTES // (grid.chunk_rows * row_bytes))
    return min(chunks * grid.chunk_rows, grid.shard_rows)


def mixed_pieces(grid: Grid, piece: int) -> int:
    """How many pieces of `piece` rows are mixed with each other: a shard of them, and at least `MIXED`."""
    return max(MIXED, -(-grid.shard_rows // piece))


def in_order(wanted: "range | RowNumbers", piece: int, bounds: tuple[int, int]) -> Iterator["range | RowNumbers"]:
    """The rows from `bounds[0]` to `bounds[1]` in the order asked for, in pieces of at most `piece` rows.

    Consecutive rows are cut where chunks end.
    """
    part = wanted[slice(*bounds)]
    before = part.start % piece if isinstance(part, range) and part else 0
    for start in range(-before, len(part), piece):
        yield part[max(start, 0) : start + piece]


def shuffled(
    wanted: "range | RowNumbers", grid: Grid, piece: int, seed: tuple[int, ...], bounds: tuple[int, int]
) -> Iterator[RowNumbers]:
    """The same rows with pieces in random order: those from `bounds[0]` to `bounds[1]` in that order.

    What is yielded has at most `piece` rows, ascending in each piece: one whole piece, or several of which
    only few rows are wanted. Repeated rows stay repeated.
    """
    rows = wanted if isinstance(wanted, range) else np.sort(wanted)
    edges = _edges(rows, grid, piece)
    there = np.flatnonzero(np.diff(edges))
    drawn = np.random.default_rng(seed).permutation(there)
    ends = np.cumsum(edges[drawn + 1] - edges[drawn])
    low, high = bounds
    held: list[RowNumbers] = []
    for i in range(int(np.searchsorted(ends, low, side="right")), len(drawn)):
        start, stop = int(edges[drawn[i]]), int(edges[drawn[i] + 1])
        begin = int(ends[i]) - (stop - start)  # place of this piece's first row in the epoch
        if begin >= high:
            break
        found = numbers(rows[start + max(low - begin, 0) : stop - max(int(ends[i]) - high, 0)])
        while len(found):
            if held and sum(map(len, held)) + len(found) > piece:
                yield np.concatenate(held)
                held = []
            held.append(found[:piece])
            found = found[piece:]  # nothing, unless rows are repeated
    if held:
        yield np.concatenate(held)


def _edges(rows: "range | RowNumbers", grid: Grid, piece: int) -> NDArray[np.int64]:
    """Where in the ascending `rows` the pieces of the grid begin, and, last, the number of rows."""
    in_shard = np.arange(0, grid.shard_rows, piece)
    starts = (np.arange(grid.n_shards)[:, None] * grid.shard_rows + in_shard).ravel()
    if isinstance(rows, range):
        edges = np.clip(starts, rows.start, max(rows.start, rows.stop)) - rows.start
    else:
        edges = np.searchsorted(rows, starts)
    return np.append(edges, len(rows)).astype(np.int64)
