"""Penalised logistic regression, solved to a certified gradient.

Enters: standardised rows and two classes. Leaves: weights, intercept, and the gradient at the solution. Does not know
readers. A reference for it is scikit-learn's `newton-cholesky` at a small tolerance.

Newton's method with two savings that leave the optimum as it is, since only the gradient decides where it ends: the
Hessian is formed in float32, and used again as long as the gradient keeps falling fast.
"""

from dataclasses import dataclass

import numpy as np
import scipy.linalg
from jaxtyping import Bool, Float
from scipy.special import expit

#: Gradient at which the solver stops.
TOLERANCE = 1e-10
#: The Hessian is formed anew when a step leaves more than this share of the gradient.
_STALE = 0.2
_MAX_STEPS = 500


@dataclass(frozen=True)
class Solution:
    """Log-odds are `Z @ weights + intercept`. `gradient` is the largest component of the gradient of the mean
    penalised loss: 0 at the exact optimum."""

    weights: Float[np.ndarray, " width"]
    intercept: float
    gradient: float


def solve(Z: Float[np.ndarray, "rows width"], positive: Bool[np.ndarray, " rows"], C: float) -> Solution:
    """Minimise Σ log(1 + exp(−y (Z w + b))) + ‖w‖² / (2C) over w and b, y = ±1; `b` is not penalised.

    Stops when the gradient is below `TOLERANCE` or no longer falls; the caller judges `gradient`.
    """
    n, width = Z.shape
    A = np.concatenate([Z, np.ones((n, 1))], axis=1)
    rough = A.astype(np.float32)
    penalty = np.append(np.full(width, 1 / C), 0.0)
    y = positive.astype(np.float64)
    theta, margins = np.zeros(width + 1), np.zeros(n)
    loss, last, factor = n * np.log(2.0), np.inf, None
    best = (np.inf, theta)
    for _ in range(_MAX_STEPS):
        p = expit(margins)
        gradient = A.T @ (p - y) + penalty * theta
        size = float(np.abs(gradient).max()) / n
        if size < best[0]:
            best = (size, theta)
        if size <= TOLERANCE:
            break
        fresh = factor is None or size > _STALE * last
        if fresh:
            factor = _factor(A, rough, p * (1 - p), penalty)
        last = size
        step = -scipy.linalg.cho_solve(factor, gradient, check_finite=False)
        slope, length = float(gradient @ step), 1.0
        along = A @ step
        while True:
            tried = theta + length * step
            reached = margins + length * along
            value = float(np.logaddexp(0, reached).sum() - y @ reached + penalty @ (tried * tried) / 2)
            # Near the optimum the loss is flat to its last digits: a step that changes nothing else is a good one.
            if value <= loss + 1e-4 * length * slope + 1e-13 * n:
                break
            length /= 2
            if length < 1e-8:
                break
        if length < 1e-8:
            if fresh:
                break
            last = 0.0  # the old Hessian misled: form it here, next time round
            continue
        theta, margins, loss = tried, reached, value
    size, theta = best
    return Solution(theta[:-1], float(theta[-1]), size)


def _factor(
    A: Float[np.ndarray, "rows width+1"],
    rough: Float[np.ndarray, "rows width+1"],
    spread: Float[np.ndarray, " rows"],
    penalty: Float[np.ndarray, " width+1"],
) -> tuple[np.ndarray, bool]:
    """Cholesky factor of the Hessian; where rounding makes it indefinite, in full precision, then with its diagonal
    raised, which shortens the step and leaves the optimum where it is."""
    for rows, raised in ((rough, 1e-12), (A, 1e-12), (A, 1e-6), (A, 1.0)):
        scaled = rows * np.sqrt(spread, dtype=np.float64).astype(rows.dtype)[:, None]
        hessian = (scaled.T @ scaled).astype(np.float64)
        hessian.flat[:: len(penalty) + 1] += penalty + raised * len(A)
        try:
            factor: tuple[np.ndarray, bool] = scipy.linalg.cho_factor(hessian, overwrite_a=True, check_finite=False)
        except scipy.linalg.LinAlgError:
            continue
        return factor
    raise FloatingPointError("a positive definite matrix has no Cholesky factor: the rows are not finite")
