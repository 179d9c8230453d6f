"""The top of many streams at once: of each unit, the largest values so far and at which tokens they were.

Enters: values with the unit and the number of the token that they are of, in any order and in any pieces. Leaves: of
each unit the `keep` largest, which is all that a top quantile needs when the stream's length is known beforehand: the
threshold is exact, where a quantile sketch would be off by some share of the stream, and the tokens above it are known
without a second pass. Does not know what units, tokens or concepts are.

Memory: `keep` × 8 bytes a unit for what is kept, half as much again for what was added and not yet sorted in.
"""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Float, Int, UInt64
from numpy.typing import NDArray

from reprobe.errors import UsageError

#: What a key of 0 stands for: nothing. No float has the key 0, not even −∞.
_NOTHING = np.uint64(0)
_LOW = np.uint32(0xFFFFFFFF)
#: Keys sorted in at a time: they should fit a core's cache.
_AT_ONCE = 2**17
#: Bytes of memory for each value that is kept.
BYTES = 14


class TopValues:
    """Of each of `units` streams the `keep` largest values. Equal ones: those of the smallest token numbers.

    `floor` is the smallest of a unit's kept values as of the last fold (−∞ until there are `keep`): what does not
    exceed it need not be added. Values are float32, token numbers below 2³²; NaN is not a value.
    """

    def __init__(self, units: int, keep: int) -> None:
        if units < 1 or keep < 1:
            raise UsageError(f"{units} units with {keep} values each: both are 1 or more")
        self.units, self.keep = units, keep
        self.floor = np.full(units, -np.inf, np.float32)
        # Value and token in one number that sorts by value: one partition serves both.
        self._keys = np.zeros((units, keep), np.uint64)
        self._pending: list[tuple[np.ndarray, np.ndarray]] = []
        self._waiting, self._room = 0, max(units * keep // 2, 1)

    def add(self, unit: Int[np.ndarray, " n"], token: Int[np.ndarray, " n"], value: Float[np.ndarray, " n"]) -> None:
        """Add values to the streams that they are of."""
        # Numbers of 16 bits are sorted by radix.
        small = np.uint16 if self.units <= 2**16 else np.uint32
        self._pending.append((unit.astype(small), _keys(np.asarray(value, np.float32), np.asarray(token))))
        self._waiting += len(unit)
        if self._waiting > self._room:
            self.fold()

    def largest(self) -> tuple[Float[np.ndarray, "units keep"], Int[np.ndarray, "units keep"]]:
        """Values, falling, and their tokens; where there were fewer than `keep`, −∞ and −1."""
        self.fold()
        keys = np.sort(self._keys, axis=1)[:, ::-1]
        values = np.where(keys == _NOTHING, np.float32(-np.inf), _values(keys))
        tokens = (_LOW - keys.astype(np.uint32)).astype(np.int64)
        return values, np.where(keys == _NOTHING, -1, tokens)

    def fold(self) -> None:
        """Sort in what was added: afterwards `floor` is up to date."""
        if not self._pending:
            return
        unit, key = (np.concatenate(parts) for parts in zip(*self._pending, strict=True))
        self._pending, self._waiting = [], 0
        order = np.argsort(unit, kind="stable")
        key, counts = key[order], np.bincount(unit, minlength=self.units)
        starts = np.cumsum(counts) - counts
        for rows in self._blocks(counts):
            n = counts[rows]
            most = int(n.max())
            both = np.zeros((len(rows), self.keep + most), np.uint64)
            both[:, : self.keep] = self._keys[rows]
            within = np.arange(int(n.sum())) - np.repeat(np.cumsum(n) - n, n)
            both[np.repeat(np.arange(len(rows)), n), self.keep + within] = key[np.repeat(starts[rows], n) + within]
            both.partition(most, axis=1)
            self._keys[rows] = both[:, most:]
            least = both[:, most]
            self.floor[rows] = np.where(least == _NOTHING, np.float32(-np.inf), _values(least))

    def _blocks(self, counts: Int[np.ndarray, " units"]) -> Iterator[Int[np.ndarray, " block"]]:
        """Units that got something, in blocks of like counts: one that got much does not make the others' rows long."""
        order = np.argsort(counts, kind="stable")
        order = order[counts[order] > 0]
        first = 0
        while first < len(order):
            # Counts rise, so that a block as long as its first unit allows is cut where it gets too large.
            last = min(len(order), first + max(1, _AT_ONCE // (self.keep + int(counts[order[first]]))))
            while last > first + 1 and (last - first) * (self.keep + int(counts[order[last - 1]])) > 2 * _AT_ONCE:
                last = first + (last - first) // 2
            yield order[first:last]
            first = last


def _keys(value: Float[np.ndarray, " n"], token: NDArray[np.integer]) -> UInt64[np.ndarray, " n"]:
    """Numbers that sort by value, and among equal values backwards by token."""
    value = value + np.float32(0.0)  # −0 becomes 0: they are equal
    bits = value.view(np.uint32)
    negative: Bool[np.ndarray, " n"] = bits >> np.uint32(31) == 1
    rising = np.where(negative, ~bits, bits | np.uint32(0x80000000))
    keys: np.ndarray = (rising.astype(np.uint64) << np.uint64(32)) | (_LOW - token.astype(np.uint32))
    return keys


def _values(keys: UInt64[np.ndarray, "*any"]) -> Float[np.ndarray, "*any"]:
    rising = (keys >> np.uint64(32)).astype(np.uint32)
    negative = rising >> np.uint32(31) == 0
    values: np.ndarray = np.where(negative, ~rising, rising & np.uint32(0x7FFFFFFF)).view(np.float32)
    return values
