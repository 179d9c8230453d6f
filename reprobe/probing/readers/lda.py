"""LDAReader: the boundary between two Gaussian classes of one covariance.

Enters: checked training rows or class moments. Leaves: a boundary. Source and departures are in its docstring.
"""

from typing import Literal

import numpy as np
import scipy.linalg
from jaxtyping import Float

from reprobe.errors import UsageError
from reprobe.probing.moments import ClassMoments
from reprobe.probing.reader import Plane, require_direction
from reprobe.probing.readers.from_moments import RTOL, MomentsReader, pseudo_solve


class LDAReader(MomentsReader):
    """Linear discriminant analysis: normal Σ⁻¹(μ⁺ − μ⁻), Σ the pooled covariance within the classes over n.

    The threshold counts the classes' shares of the training rows as priors. `shrinkage` s in [0, 1] mixes:
    (1 − s)Σ + s·(tr Σ/width)·I, as scikit-learn's `LinearDiscriminantAnalysis(solver="lsqr", shrinkage=s)`. "oas"
    chooses s from the moments (Chen et al. 2010), so it needs no second look at the rows; scikit-learn's "auto"
    (Ledoit & Wolf) needs fourth moments. With shrinkage None or 0, eigenvalues up to `rtol` times the largest count
    as zero. `shrinkage_` is the s that was used. As for `LogisticReader`, `h @ coef_ + intercept_` are log-odds.
    """

    def __init__(self, *, shrinkage: float | Literal["oas"] | None = "oas", rtol: float = RTOL) -> None:
        self.shrinkage = shrinkage
        self.rtol = rtol

    def _plane(self, moments: ClassMoments) -> Plane:
        low, high = moments.means
        theta = high - low
        require_direction(
            theta, moments.total.magnitude, "the two class means are equal: there is no difference to point along"
        )
        normal = self.unmix(moments, theta)
        require_direction(normal, 0.0, "the class means differ only where no class varies: use shrinkage")
        level = float(normal @ (high + low) / 2 - np.log(moments.n[1] / moments.n[0]))
        self.coef_, self.intercept_ = normal, -level
        return Plane(normal, level, "the positive class has the higher mean")

    def unmix(self, moments: ClassMoments, v: Float[np.ndarray, "width ..."]) -> Float[np.ndarray, "width ..."]:
        """Σ⁻¹v, Σ the pooled and shrunk covariance within any number of classes. Sets `shrinkage_`."""
        n = moments.total.n
        covariance = moments.within / n
        self.shrinkage_ = self._amount(covariance, n)
        average = float(np.trace(covariance)) / len(covariance)
        if not (self.shrinkage_ > 0 and average > 0):
            return pseudo_solve(covariance, v, self.rtol)
        shrunk = (1 - self.shrinkage_) * covariance
        shrunk.flat[:: len(shrunk) + 1] += self.shrinkage_ * average
        solved: np.ndarray = scipy.linalg.solve(shrunk, v, assume_a="pos")
        return solved

    def _amount(self, covariance: Float[np.ndarray, "width width"], n: int) -> float:
        given: object = self.shrinkage  # whatever a caller passed, not only what the types allow
        if given is None:
            return 0.0
        if given == "oas":
            return oas_shrinkage(covariance, n)
        if not isinstance(given, int | float | np.number) or not 0 <= given <= 1:
            raise UsageError(f"shrinkage={given!r}; a number from 0 to 1, 'oas', or None")
        return float(given)


def oas_shrinkage(covariance: Float[np.ndarray, "width width"], n: int) -> float:
    """The oracle approximating shrinkage towards a multiple of I, for a covariance of n rows (Chen et al. 2010,
    eq. 23, in the form that scikit-learn uses)."""
    width = len(covariance)
    average = float(np.trace(covariance)) / width
    square = float(np.mean(covariance * covariance))
    numerator, denominator = square + average**2, (n + 1) * (square - average**2 / width)
    return 1.0 if denominator <= 0 else min(numerator / denominator, 1.0)
