"""KSparseReader: which few features carry a concept.

Enters: checked training rows. Leaves: a boundary that depends on k features. Source in its docstring.
"""

import numpy as np

from reprobe.errors import UsageError
from reprobe.probing.moments import ClassMoments
from reprobe.probing.reader import Plane, Reader, TrainingRows
from reprobe.probing.readers.logistic import logistic_plane


class KSparseReader(Reader):
    """Logistic regression on the k features that differ most between the classes (Gurnee et al. 2023).

    Features are ranked by |μ⁺ − μ⁻|/σ with σ the standard deviation within the classes (σ of all training rows
    would give the same order); of equal ones the lower number comes first, constant features come last. All
    features where there are fewer than k. `C` as in `LogisticReader`. `features_` are the chosen ones, best first;
    `coef_`, `intercept_` and `gradient_` as in `LogisticReader`, `coef_` zero elsewhere.
    """

    def __init__(self, k: int = 16, *, C: float = 0.1) -> None:
        self.k = k
        self.C = C

    def _fit_plane(self, rows: TrainingRows) -> Plane:
        if not (isinstance(self.k, int | np.integer) and self.k >= 1):
            raise UsageError(f"k={self.k!r}: a number of features, 1 or more")
        moments = ClassMoments.of_rows(rows.X, rows.positive.astype(np.int64), (False, True), "diagonal")
        self.features_ = rank_features(moments)[: self.k]
        found = logistic_plane(rows.X[:, self.features_], rows.positive, self.C)
        self.coef_ = np.zeros(rows.X.shape[1])
        self.coef_[self.features_] = found.normal
        self.intercept_, self.gradient_ = -found.level, found.gradient
        return Plane(self.coef_, found.level, found.sign)


def rank_features(moments: ClassMoments) -> np.ndarray:
    """The numbers of all features, by |μ⁺ − μ⁻|/σ from high to low; equal ones in their order."""
    gap = np.abs(moments.means[1] - moments.means[0])
    within = moments.within if moments.within.ndim == 1 else np.diagonal(moments.within)
    spread = np.sqrt(np.maximum(within, 0) / moments.total.n)
    # A gap or spread that is rounding error of sums about a far mean counts as none.
    rounding = 16 * np.finfo(np.float64).eps * (np.abs(moments.means).max(axis=0) + spread)
    with np.errstate(divide="ignore", invalid="ignore"):
        score = np.where(gap <= rounding, 0.0, np.where(spread <= rounding, np.inf, gap / spread))
    ranked: np.ndarray = np.argsort(-score, kind="stable")
    return ranked
