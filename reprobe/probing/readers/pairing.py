"""The two sides of each pair, for readers of differences.

Enters: rows, which of them are on the first side, their pairs. Leaves: one row per pair and side. Does not know
which side is meant by which label.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Integer

from reprobe.errors import UsageError


class Sides(NamedTuple):
    """Row i of `high` and of `low` are the two sides of pair i, each the mean of its rows; `how` the rows were
    paired, in words."""

    high: Float[np.ndarray, "pairs width"]
    low: Float[np.ndarray, "pairs width"]
    how: str


def sides(
    X: Float[np.ndarray, "rows width"],
    on_high: Bool[np.ndarray, " rows"],
    pairs: Integer[np.ndarray, " rows"] | None,
    seed: int,
    *,
    name: str = "class",
) -> Sides:
    """Each pair's rows where `on_high` and where not; pairs are numbered 0 … n−1.

    Without pairs, rows of the two sides are matched in random order, as many as the smaller side has. The order is
    drawn over rows, not per side, so that swapped sides give the same pairs, turned round. Raises `UsageError` for
    a pair with one side only; `name` is what it calls a side.
    """
    if pairs is None:
        order = np.random.default_rng(seed).permutation(len(X))
        high, low = order[on_high[order]], order[~on_high[order]]
        n = min(len(high), len(low))
        return Sides(X[high[:n]], X[low[:n]], f"matched at random across the classes (seed {seed})")
    n = int(pairs.max()) + 1
    means = []
    for side in (on_high, ~on_high):
        counts = np.bincount(pairs[side], minlength=n)
        if not counts.all():
            alone = int((counts == 0).sum())
            raise UsageError(
                f"{alone} of {n} pairs have rows of one {name} only; both sides of a pair are needed: leave "
                "those rows out, or fit without pairs"
            )
        order = np.flatnonzero(side)[np.argsort(pairs[side], kind="stable")]
        starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
        means.append(np.add.reduceat(X[order], starts, axis=0) / counts[:, None])
    return Sides(means[0], means[1], "given")
