"""PCAReader: the main axis of pair differences, as in representation reading.

Enters: checked training rows with their pairs, or moments. Leaves: a boundary. Source and departures are in its
docstring.
"""

from typing import Literal, Self

import numpy as np
import scipy.linalg
from jaxtyping import Float

from reprobe.errors import UsageError
from reprobe.probing.moments import ClassMoments, PairMoments
from reprobe.probing.reader import Plane, Reader, TrainingRows, require_direction
from reprobe.probing.readers.from_moments import require_two
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

    def fit_moments(self, moments: PairMoments | ClassMoments) -> Self:
        """Fit on moments instead of rows, in one pass over rows that do not fit into memory.

        `PairMoments` give the axis that `fit` finds with `pairs`. Class moments, which know no pairs, give that of all
        n⁺·n⁻ differences between a positive and a negative row: the mean over all ways in which `fit` could match rows
        at random. Either way the sign is that of the mean difference, since moments hold no votes.

        Raises `UsageError` for compat="repe" (whose random turns are of single pairs), moments of more or fewer than
        two classes, with a diagonal only, or that have no main axis.
        """
        self._check()
        if self.compat == "repe":
            raise UsageError("compat='repe' turns single pairs round at random, which moments do not show: fit on rows")
        if isinstance(moments, PairMoments):
            spread, mean, rows = moments.difference.scatter, moments.difference.mean, moments.rows
            n, self.pairing_ = moments.difference.n, "given"
        else:
            require_two(moments)
            low, high = moments.of
            rows, n = moments.total, high.n * low.n
            rows.require_full("the axis of differences")
            spread, mean = low.n * high.scatter + high.n * low.scatter, high.mean - low.mean
            self.pairing_ = f"every positive with every negative row ({n} differences)"
        rows.require_full("a direction's scale")
        if self.compat is None:
            spread = spread + n * np.outer(mean, mean)
        require_direction(
            np.sqrt(np.maximum(np.diagonal(spread), 0) / n), rows.magnitude, "the differences have no main axis"
        )
        axis = _turned(_top_axis(spread))
        if axis @ mean < 0:
            axis = -axis
        self.classes_ = np.array(moments.classes)
        self.n_features_in_ = rows.width
        rule = f"the positive side projects higher on average; pairs {self.pairing_}"
        self._keep(Plane(axis, float(rows.mean @ axis), rule), rows.std_along(axis))
        return self

    def _check(self) -> None:
        if self.compat not in (None, "repe", "repeng"):
            raise UsageError(f"compat={self.compat!r}: PCAReader has None, 'repe' and 'repeng'")

    def _fit_plane(self, rows: TrainingRows) -> Plane:
        self._check()
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
    return _turned(rows.T @ _top_axis(rows @ rows.T) if n < width else _top_axis(rows.T @ rows))


def _top_axis(gram: Float[np.ndarray, "n n"]) -> Float[np.ndarray, " n"]:
    """The eigenvector of the largest eigenvalue."""
    last = len(gram) - 1
    vector: np.ndarray = scipy.linalg.eigh(gram, subset_by_index=[last, last])[1][:, 0]
    return vector


def _turned(axis: Float[np.ndarray, " width"]) -> Float[np.ndarray, " width"]:
    """The unit vector along an axis whose largest component is positive."""
    axis = axis / np.linalg.norm(axis)
    turned: np.ndarray = axis * np.sign(axis[np.argmax(np.abs(axis))])
    return turned
