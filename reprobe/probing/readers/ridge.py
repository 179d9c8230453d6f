"""RidgeReader: a direction along which a number grows (a count, a probability, a sentiment score).

Enters: rows with numbers as targets, or their joint moments. Leaves: predictions and a direction. Two classes are
for the other readers.
"""

from typing import Any, Self

import numpy as np
import scipy.linalg
from jaxtyping import Float
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.utils.multiclass import type_of_target

from reprobe.errors import UsageError
from reprobe.probing.direction import Direction
from reprobe.probing.moments import JointMoments
from reprobe.probing.reader import Plane, checked, checked_again, direction_of, require_direction
from reprobe.probing.readers.from_moments import RTOL, pseudo_solve


class RidgeReader(RegressorMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn is untyped
    """Least squares with an L2 penalty: minimise Σ(y − h·w − b)² + alpha ‖w‖² over w and b, as scikit-learn's Ridge.

    Predictions are `h @ coef_ + intercept_`. `direction_` points to higher targets; its score is 0 where the
    prediction is the mean target. With `alpha` 0, eigenvalues up to 1e-10 times the largest count as zero: the
    shortest solution.
    """

    coef_: Float[np.ndarray, " width"]
    intercept_: float
    direction_: Direction

    def __init__(self, *, alpha: float = 1.0) -> None:
        self.alpha = alpha

    def fit(self, X: Any, y: Any, groups: Any = None, pairs: Any = None) -> Self:
        """Fit on rows (n, width) with numbers (n,); `groups` and `pairs` are accepted, as by every reader, and unused.

        Raises `UsageError` for NaN or infinity, targets that are not numbers or all equal, or rows that do not vary
        with them.
        """
        X, y = checked(self, X, y, groups, pairs)
        if y.dtype.kind not in "biuf":
            raise UsageError(
                f"RidgeReader predicts numbers, and y holds {type_of_target(y)} labels such as {y.tolist()[0]!r}: give "
                "numbers, or use a reader of classes"
            )
        return self.fit_moments(JointMoments.of(X, y.astype(np.float64)[:, None]))

    def fit_moments(self, moments: JointMoments) -> Self:
        """Fit on the moments of rows with one target."""
        x, z = moments.x, moments.z
        if z.width != 1:
            raise UsageError(f"moments with {z.width} targets: a ridge reader has one")
        if z.std[0] <= 16 * np.finfo(np.float64).eps * z.magnitude:
            raise UsageError(f"all targets are equal ({z.mean[0]}): there is nothing to read")
        self.n_features_in_ = x.width
        cross = moments.cross[:, 0]
        require_direction(
            cross / (z.std[0] * x.n), x.magnitude, "no feature varies with the targets: every weight is zero"
        )
        self.coef_ = self.weights(moments)[:, 0]
        level = float(self.coef_ @ x.mean)
        self.intercept_ = float(z.mean[0]) - level
        plane = Plane(self.coef_, level, "higher targets project higher")
        self.direction_ = direction_of(plane, x.std_along(self.coef_ / np.linalg.norm(self.coef_)), self, None)
        return self

    def weights(self, moments: JointMoments) -> Float[np.ndarray, "width targets"]:
        """The penalised least squares of any number of targets at once."""
        if not 0 <= self.alpha < np.inf:
            raise UsageError(f"alpha={self.alpha!r}: the strength of the penalty is a number from 0")
        scatter = moments.x.scatter
        if not self.alpha > 0:
            return pseudo_solve(scatter, moments.cross, RTOL)
        penalised = scatter.copy()
        penalised.flat[:: len(scatter) + 1] += self.alpha
        solved: np.ndarray = scipy.linalg.solve(penalised, moments.cross, assume_a="pos")
        return solved

    def predict(self, X: Any) -> Float[np.ndarray, " rows"]:
        """Predicted targets, (n, width) → (n,). Raises `ReaderNotFitted` before `fit`."""
        predicted: np.ndarray = checked_again(self, "direction_", X) @ self.coef_ + self.intercept_
        return predicted
