"""The logistic reader: one penalty, or the best of several by groups held out among the training rows.

Enters: checked training rows, of one site or of many at once. Leaves: boundaries with their certificates. How the
problems are solved is in `logistic`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Integer

from reprobe.errors import UsageError
from reprobe.probing.crossval import group_folds
from reprobe.probing.logistic import Fits, as_tensor, solve_many
from reprobe.probing.reader import BatchReader, Plane, TrainingRows

#: A fit is accepted if its weights are as near as this to the optimum, relative to their length, for certain …
CERTIFICATE = 1e-5
#: … or if no component of its gradient is larger: the bound on the weights is loose where the penalty is weak.
FLAT = 1e-8


@dataclass(frozen=True)
class LogisticPlane(Plane):
    """A boundary with the largest component of its gradient, and the penalty it was fitted with."""

    gradient: float
    C: float


class LogisticReader(BatchReader):
    """Logistic regression with an L2 penalty on standardised features, and a free intercept.

    Means and standard deviations are those of the training rows. `C` as in scikit-learn: the penalty is
    ‖w‖²/(2C) beside the summed loss, w in standardised units. The solution is mapped back to raw activations,
    means included: the log-odds of a row are `h @ coef_ + intercept_`; `direction_` is the same plane with
    a unit normal. The default penalty is ten times scikit-learn's: with about as many rows as features it
    reads no worse, and fits faster. `gradient_` is the largest component of the gradient of the mean penalised
    loss at the solution: the certificate that it is the optimum.

    Of several `C`, the one is taken, `C_`, whose mean log-loss is lowest on held-out training rows (of equals, the
    strongest penalty): `inner_folds` folds of whole `groups`, drawn by `seed`, standardised by their own training rows.
    Without groups every row is its own.
    """

    def __init__(self, *, C: float | Sequence[float] = 0.1, inner_folds: int = 3, seed: int = 0) -> None:
        self.C = C
        self.inner_folds = inner_folds
        self.seed = seed

    def _fit_plane(self, rows: TrainingRows) -> Plane:
        everything = np.ones((1, len(rows.X)), dtype=bool)
        ((plane,),) = self.fit_batch(rows.X[None], rows.positive, rows.groups, everything)
        self.coef_, self.intercept_ = plane.normal, -plane.level
        self.gradient_, self.C_ = plane.gradient, plane.C
        return plane

    def fit_batch(
        self,
        X: Float[np.ndarray, "sites rows width"],
        positive: Bool[np.ndarray, " rows"],
        groups: Integer[np.ndarray, " rows"] | None,
        kept: Bool[np.ndarray, "fits rows"],
    ) -> Iterator[Sequence[LogisticPlane]]:
        path = self._path()
        C = np.full((len(X), len(kept)), path[0])
        if len(path) > 1:
            own = np.arange(len(positive)) if groups is None else groups
            C = np.stack([self._chosen(X, positive, own, rows, path) for rows in kept], axis=1)
        found = solve_many(as_tensor(X), as_tensor(positive), as_tensor(C), as_tensor(kept))
        return (_planes(found, C, site) for site in range(len(X)))

    def _path(self) -> Float[np.ndarray, " penalties"]:
        """The penalties, strongest first."""
        path = np.unique(np.asarray(self.C, dtype=np.float64))
        if not path.size or not (path > 0).all() or not np.isfinite(path).all():
            raise UsageError(f"C={self.C!r}: the inverse strength of the penalty is a positive number, or several")
        return path

    def _chosen(
        self,
        X: Float[np.ndarray, "sites rows width"],
        positive: Bool[np.ndarray, " rows"],
        groups: Integer[np.ndarray, " rows"],
        kept: Bool[np.ndarray, " rows"],
        path: Float[np.ndarray, " penalties"],
    ) -> Float[np.ndarray, " sites"]:
        """For each site, the C with the lowest held-out log-loss among the rows kept."""
        fold = np.full(len(kept), -1)
        fold[kept] = group_folds(groups[kept], positive[kept], self.inner_folds, self.seed)
        folds, n = range(self.inner_folds), len(path)
        training = np.stack([kept & (fold != k) for k in folds]).repeat(n, axis=0)
        penalties = np.tile(path, self.inner_folds)
        found = solve_many(as_tensor(X), as_tensor(positive), as_tensor(penalties), as_tensor(training))
        weights, intercept = found.weights.numpy(), found.intercept.numpy()
        loss = np.zeros((len(X), n))
        for k in folds:
            held_out, at = fold == k, slice(k * n, (k + 1) * n)
            towards_wrong = np.where(positive[held_out], -1.0, 1.0)[:, None]
            for site, rows in enumerate(X):
                margins = rows[held_out] @ weights[site, at].T + intercept[site, at]
                loss[site] += np.logaddexp(0, towards_wrong * margins).sum(axis=0)
        best: np.ndarray = path[loss.argmin(axis=1)]
        return best


def logistic_plane(X: Float[np.ndarray, "rows width"], positive: Bool[np.ndarray, " rows"], C: float) -> LogisticPlane:
    """The boundary of `LogisticReader(C=C)` on these rows."""
    everything = np.ones((1, len(X)), dtype=bool)
    ((plane,),) = LogisticReader(C=C).fit_batch(X[None], positive, None, everything)
    return plane


def _planes(found: Fits, C: Float[np.ndarray, "sites fits"], site: int) -> list[LogisticPlane]:
    out = []
    parts = (found.weights, found.intercept, found.gradient, found.error, found.largest)
    for w, b, gradient, error, largest, c in zip(*(part[site] for part in parts), C[site], strict=True):
        if largest <= 1e-12:
            raise UsageError("the two classes do not differ in any feature: every weight is zero")
        if not (error <= CERTIFICATE or gradient <= FLAT):
            raise UsageError(
                f"logistic regression stopped before its optimum (gradient {float(gradient):.1e}, wanted "
                f"{FLAT:.0e}) at C={c}: choose a smaller C"
            )
        rule = "the positive class has the higher log-odds"
        out.append(LogisticPlane(w.numpy(), -float(b), rule, float(gradient), float(c)))
    return out
