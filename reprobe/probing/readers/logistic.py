"""LogisticReader: penalised logistic regression on raw activations.

Enters: checked training rows. Leaves: log-odds as a function of rows, and their boundary. The solver is in
`reprobe.probing.logistic`.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float
from sklearn.preprocessing import StandardScaler

from reprobe.errors import UsageError
from reprobe.probing.logistic import solve
from reprobe.probing.reader import Plane, Reader, TrainingRows

#: Largest gradient with which a logistic fit is accepted.
CERTIFICATE = 1e-6


@dataclass(frozen=True)
class LogOdds:
    """Log-odds of the positive class are `h @ coef + intercept`, h raw. `gradient` is the largest component of the
    gradient of the mean penalised loss at the solution."""

    coef: Float[np.ndarray, " width"]
    intercept: float
    gradient: float


def fit_log_odds(X: Float[np.ndarray, "rows width"], positive: Bool[np.ndarray, " rows"], C: float) -> LogOdds:
    """Logistic regression on X, standardised by its own means and deviations, mapped back to raw X.

    The penalty is ‖w‖²/(2C) beside the summed loss, w in standardised units; the intercept is free. Raises
    `UsageError` unless C is positive, the classes differ, and the optimum was reached.
    """
    if not C > 0:
        raise UsageError(f"C={C!r}: the inverse strength of the penalty is a positive number")
    scaler = StandardScaler().fit(X)  # gives constant features the scale 1, and with it weight 0
    found = solve(scaler.transform(X), positive, C)
    if np.abs(found.weights).max() <= 1e-12:
        raise UsageError("the two classes do not differ in any feature: every weight is zero")
    if found.gradient > CERTIFICATE:
        raise UsageError(
            f"logistic regression stopped before its optimum (gradient {found.gradient:.1e}, wanted "
            f"{CERTIFICATE:.0e}) at C={C}: choose a smaller C"
        )
    coef = found.weights / scaler.scale_
    return LogOdds(coef, found.intercept - float(coef @ scaler.mean_), found.gradient)


class LogisticReader(Reader):
    """Logistic regression with an L2 penalty on standardised features, and a free intercept.

    Means and standard deviations are those of the training rows. `C` as in scikit-learn: the penalty is
    ‖w‖²/(2C) beside the summed loss, w in standardised units. The solution is mapped back to raw activations,
    means included: the log-odds of a row are `h @ coef_ + intercept_`; `direction_` is the same plane with
    a unit normal. The default penalty is ten times scikit-learn's: with about as many rows as features it
    reads no worse, and fits faster. `gradient_` is the largest component of the gradient of the mean penalised
    loss at the solution: the certificate that it is the optimum.
    """

    def __init__(self, *, C: float = 0.1) -> None:
        self.C = C

    def _fit_plane(self, rows: TrainingRows) -> Plane:
        found = fit_log_odds(rows.X, rows.positive, self.C)
        self.coef_, self.intercept_, self.gradient_ = found.coef, found.intercept, found.gradient
        return Plane(self.coef_, -self.intercept_, "the positive class has the higher log-odds")
