"""Scores as probabilities: Platt scaling, fitted on training rows alone.

Enters: scores of training rows with their classes, scores of test rows. Leaves: probabilities of the positive class.
Does not know readers or groups; how well the probabilities hold is `metrics.calibration_error`.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float
from scipy.special import expit, xlogy

from reprobe.errors import UsageError


@dataclass(frozen=True)
class Platt:
    """p(positive | score) = σ(slope · score + intercept); `slope` is per unit of the scores it was fitted on."""

    slope: float
    intercept: float

    def probabilities(self, scores: Float[np.ndarray, "*any"]) -> Float[np.ndarray, "*any"]:
        """The probability of the positive class for each score."""
        p: np.ndarray = expit(self.slope * np.asarray(scores, dtype=np.float64) + self.intercept)
        return p

    @classmethod
    def fit(cls, scores: Float[np.ndarray, " rows"], positive: Bool[np.ndarray, " rows"]) -> "Platt":
        """Maximum likelihood with Platt's smoothed targets, by Newton's method (Platt 1999; Lin, Lin & Weng 2007).

        The targets are (n⁺+1)/(n⁺+2) and 1/(n⁻+2), so that separable scores still have a finite slope. A reader's
        scores of the rows it was fitted on are too far apart, and give a slope too steep: better are scores of
        training rows that were held out inside the training set. Raises `UsageError` for one class, scores that are
        not finite, or scores that are all equal.
        """
        scores, positive = np.asarray(scores, dtype=np.float64), np.asarray(positive, dtype=bool)
        n_high, n_low = int(positive.sum()), int((~positive).sum())
        if not (n_high and n_low):
            raise UsageError("Platt scaling needs training rows of both classes")
        if not np.isfinite(scores).all():
            raise UsageError(f"{int((~np.isfinite(scores)).sum())} training scores are NaN or infinite")
        centre, spread = float(scores.mean()), float(scores.std())
        if spread <= 1e-12 * max(1.0, abs(centre)):
            raise UsageError("all training scores are equal: they tell nothing of the classes")
        target = np.where(positive, (n_high + 1) / (n_high + 2), 1 / (n_low + 2))
        A = np.stack([(scores - centre) / spread, np.ones(len(scores))], axis=1)
        theta, loss = np.array([0.0, np.log((n_high + 1) / (n_low + 1))]), np.inf
        step = np.zeros(2)
        for _ in range(200):
            tried, p = theta - step, expit(A @ (theta - step))
            value = float(-(xlogy(target, p) + xlogy(1 - target, 1 - p)).sum())
            if value > loss + 1e-12 * len(scores):
                step = step / 2
                continue
            theta, loss = tried, value
            gradient = A.T @ (p - target)
            if np.abs(gradient).max() <= 1e-10 * len(scores):
                break
            hessian = (A * (p * (1 - p))[:, None]).T @ A + 1e-12 * len(scores) * np.eye(2)
            step = np.linalg.solve(hessian, gradient)
        slope = float(theta[0]) / spread
        return cls(slope, float(theta[1]) - slope * centre)
