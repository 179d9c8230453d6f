"""The readers: each finds one direction that separates two classes.

Enters: checked training rows. Leaves: a boundary. What they share (checks, the scikit-learn interface, the
`Direction` made from the boundary) is in `reader`. Sources and departures are in each docstring.
"""

from typing import Literal

import numpy as np
import scipy.linalg
from jaxtyping import Bool, Float

from reprobe.errors import UsageError
from reprobe.probing.logistic_reader import LogisticReader
from reprobe.probing.reader import Plane, Reader, TrainingRows, require_direction

__all__ = ["LogisticReader", "MeanDifference", "PCAReader", "Reader"]


class MeanDifference(Reader):
    """θ = μ⁺ − μ⁻, threshold halfway between the projected class means (mass-mean; Marks & Tegmark 2023).

    The direction points to the positive class by construction.
    """

    def _fit_plane(self, rows: TrainingRows) -> Plane:
        high, low = rows.X[rows.positive].mean(axis=0), rows.X[~rows.positive].mean(axis=0)
        theta = high - low
        require_direction(theta, rows.X, "the two class means are equal: there is no difference to point along")
        return Plane(theta, float((high @ theta + low @ theta) / 2), "the positive class has the higher mean")


class PCAReader(Reader):
    """LAT: the main axis of the pair differences Δ = h⁺ − h⁻ (Zou et al. 2023, representation reading).

    `pairs` names each row's pair; each pair needs both labels, and a side with several rows enters by its
    mean. Without `pairs`, rows of the two classes are matched at random, from `seed`, and `pairing_` and the
    direction's sign rule say so.

    `compat` — None: uncentred PCA of the ordered differences, their first right singular vector. "repe": as
    the original, each difference is turned round at random (from `seed`), then PCA is centred. "repeng":
    ordered and centred, which takes away the mean difference, the very thing that is wanted.

    Sign: the positive side projects higher in most training pairs; a tie leaves the axis with its largest
    component positive. Score: (h − μ)·v with μ the mean of all training rows, so the threshold is their mean
    projection; with unequal classes it lies nearer to the larger one. (The original subtracts the mean of the
    differences instead, and applies no sign.)
    """

    uses_pairs = True

    def __init__(self, *, compat: Literal["repe", "repeng"] | None = None, seed: int = 0) -> None:
        self.compat = compat
        self.seed = seed

    def _fit_plane(self, rows: TrainingRows) -> Plane:
        if self.compat not in (None, "repe", "repeng"):
            raise UsageError(f"compat={self.compat!r}: PCAReader has None, 'repe' and 'repeng'")
        if rows.pairs is None:
            delta = _random_differences(rows, self.seed)
            self.pairing_ = f"matched at random across the classes (seed {self.seed})"
        else:
            delta = _pair_differences(rows.X, rows.positive, rows.pairs)
            self.pairing_ = "given"
        spread = delta
        if self.compat == "repe":
            spread = delta * np.random.default_rng(self.seed).choice([-1.0, 1.0], size=(len(delta), 1))
        if self.compat is not None:
            spread = spread - spread.mean(axis=0)
        largest = spread[np.argmax(np.abs(spread).max(axis=1))]
        require_direction(
            largest,
            rows.X,
            f"the differences of {len(delta)} pairs have no main axis: all are " + ("equal" if self.compat else "zero"),
        )
        axis = _main_axis(spread)
        votes = np.sign(delta @ axis)
        ahead, behind = int((votes > 0).sum()), int((votes < 0).sum())
        if behind > ahead:
            axis = -axis
        rule = (
            f"a tie of {len(delta)} pairs: the largest component is positive"
            if ahead == behind
            else f"the positive side projects higher in {max(ahead, behind)} of {len(delta)} pairs"
        )
        return Plane(axis, float(rows.X.mean(axis=0) @ axis), f"{rule}; pairs {self.pairing_}")


def _main_axis(rows: Float[np.ndarray, "n width"]) -> Float[np.ndarray, " width"]:
    """The first right singular vector, its largest component positive."""
    n, width = rows.shape
    gram = rows @ rows.T if n < width else rows.T @ rows
    last = len(gram) - 1
    _, vectors = scipy.linalg.eigh(gram, subset_by_index=[last, last])
    axis = rows.T @ vectors[:, 0] if n < width else vectors[:, 0]
    axis = axis / np.linalg.norm(axis)
    turned: np.ndarray = axis * np.sign(axis[np.argmax(np.abs(axis))])
    return turned


def _pair_differences(
    X: Float[np.ndarray, "rows width"], positive: Bool[np.ndarray, " rows"], codes: np.ndarray
) -> Float[np.ndarray, "pairs width"]:
    """Mean of the positive rows minus mean of the negative rows, for each pair code 0 … n−1."""
    n = int(codes.max()) + 1
    sides = []
    for side in (positive, ~positive):
        counts = np.bincount(codes[side], minlength=n)
        if not counts.all():
            alone = int((counts == 0).sum())
            raise UsageError(
                f"{alone} of {n} pairs have rows of one class only; both sides of a pair are needed: leave "
                "those rows out, or fit without pairs"
            )
        order = np.flatnonzero(side)[np.argsort(codes[side], kind="stable")]
        starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
        sides.append(np.add.reduceat(X[order], starts, axis=0) / counts[:, None])
    difference: np.ndarray = sides[0] - sides[1]
    return difference


def _random_differences(rows: TrainingRows, seed: int) -> Float[np.ndarray, "pairs width"]:
    """Differences of rows of the two classes matched in random order, as many as the smaller class has.

    The order is drawn over rows, not per class, so that swapped labels give the same pairs, turned round.
    """
    order = np.random.default_rng(seed).permutation(len(rows.X))
    high, low = order[rows.positive[order]], order[~rows.positive[order]]
    n = min(len(high), len(low))
    difference: np.ndarray = rows.X[high[:n]] - rows.X[low[:n]]
    return difference
