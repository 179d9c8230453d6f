"""PCAReader: the main axis of pair differences, as in representation reading.

Enters: checked training rows with their pairs. Leaves: a boundary. Source and departures are in its docstring.
"""

from typing import Literal

import numpy as np
import scipy.linalg
from jaxtyping import Float

from reprobe.errors import UsageError
from reprobe.probing.reader import Plane, Reader, TrainingRows, require_direction
from reprobe.probing.readers.pairing import sides


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
        high, low, self.pairing_ = sides(rows.X, rows.positive, rows.pairs, self.seed)
        delta = high - low
        spread = delta
        if self.compat == "repe":
            spread = delta * np.random.default_rng(self.seed).choice([-1.0, 1.0], size=(len(delta), 1))
        if self.compat is not None:
            spread = spread - spread.mean(axis=0)
        largest = spread[np.argmax(np.abs(spread).max(axis=1))]
        require_direction(
            largest,
            float(np.abs(rows.X).max()),
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
