"""MultiClassReader: one of several classes, by the rule that a reader of two has for more.

Enters: checked rows, or class moments, of two or more classes. Leaves: a linear score and a direction per class. Does
not know stores (see `probing.classes`).
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from jaxtyping import Float, Integer
from sklearn.base import BaseEstimator, ClassifierMixin, clone
from sklearn.utils.multiclass import check_classification_targets

from reprobe.errors import UsageError
from reprobe.probing.direction import Direction, Label
from reprobe.probing.moments import ClassMoments, Scatter
from reprobe.probing.reader import (
    Plane,
    Reader,
    TrainingRows,
    checked,
    checked_again,
    direction_of,
    group_codes,
    require_direction,
)
from reprobe.probing.readers.from_moments import pseudo_solve
from reprobe.probing.readers.lda import LDAReader
from reprobe.probing.readers.logistic import LogisticReader
from reprobe.probing.readers.means import MeanDifference
from reprobe.probing.readers.ridge import RidgeReader
from reprobe.probing.readers.sparse import KSparseReader


@dataclass(frozen=True)
class ClassPlanes:
    """Scores of a row h are `h @ coef.T + intercept`; the class with the highest is predicted."""

    coef: Float[np.ndarray, "classes width"]
    intercept: Float[np.ndarray, " classes"]


class MultiClassReader(ClassifierMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn is untyped
    """Several classes, by the rule of `reader`; all scores are linear in a row.

    - `MeanDifference`: the nearest class mean; whitened, the nearest in the metric of the pooled covariance.
    - `LDAReader`: the class of the highest posterior, Gaussian with one shrunk covariance.
    - `RidgeReader`: least squares of one indicator per class (±1), the highest prediction.
    - `LogisticReader`, `KSparseReader`: a binary reader of each class against all others, the highest log-odds.

    `scores` has a column per class. For the first two it is the log-likelihood (for LDA with its prior; for the plain
    nearest mean, with a covariance of I) less the mean over classes, so that the columns add up to 0 and, with two
    classes, the second column's boundary is that of the binary reader; for the others it is the prediction or the
    log-odds. `decision_function` is the same as scikit-learn has it: with two classes, one column, second less first.

    `directions_` are one `Direction` per class, "not joy" to "joy": where its score grows, in raw units, with the
    boundary where its score is 0. `coef_` is (classes, width) and `intercept_` (classes,). The others have two classes
    only: `ClusterMean`'s threshold, the mean projection of all rows, has no meaning for three.
    """

    classes_: np.ndarray
    directions_: Mapping[Label, Direction]
    coef_: Float[np.ndarray, "classes width"]
    intercept_: Float[np.ndarray, " classes"]
    n_features_in_: int

    def __init__(self, reader: Reader | RidgeReader) -> None:
        self.reader = reader

    def fit(self, X: Any, y: Any, groups: Any = None, pairs: Any = None) -> Self:
        """Fit on rows (n, width) with labels (n,); `groups` are for a `reader` that splits the rows further, to choose
        something; `pairs` are unused.

        Raises `UsageError` for NaN, labels that are no classes, one class, a reader that is for two classes only, or a
        class that has no direction because its mean is the mean of all.
        """
        X, y = checked(self, X, y, groups, pairs)
        try:
            check_classification_targets(y)
        except ValueError as error:
            raise UsageError(str(error)) from error
        self.classes_, codes = np.unique(y, return_inverse=True)
        if len(self.classes_) == 1:
            raise UsageError(f"y holds one class only ({self.classes_.tolist()[0]!r}); a reader needs two or more")
        return self.fit_rows(X, codes, tuple(self.classes_.tolist()), group_codes(groups))

    def fit_rows(
        self,
        X: Float[np.ndarray, "rows width"],
        codes: Integer[np.ndarray, " rows"],
        classes: tuple[Label, ...],
        groups: Integer[np.ndarray, " rows"] | None = None,
    ) -> Self:
        """Fit on rows that have been checked; `codes` says of each row which of `classes` it is, all of which occur."""
        if type(self.reader) in _ONE_VS_REST:
            planes = _one_vs_rest(self.reader, X, codes, len(classes), groups)
        else:
            planes = self._moments_rule()(self.reader, ClassMoments.of_rows(X, codes, classes, self._scatter))
        return self._keep(planes, classes, lambda unit: float(np.std(X @ unit)))

    def fit_moments(self, moments: ClassMoments) -> Self:
        """Fit on full moments of the classes, to the same result. `UsageError` for a reader that needs the rows."""
        if type(self.reader) in _ONE_VS_REST:
            raise UsageError(f"{type(self.reader).__name__} needs the rows themselves; {_names(_FROM_MOMENTS)} do not")
        if not moments.n.all():
            raise UsageError(f"no row is of class {moments.classes[int(np.argmin(moments.n))]!r}")
        moments.total.require_full("a direction's scale")
        return self._keep(self._moments_rule()(self.reader, moments), moments.classes, moments.total.std_along)

    def _moments_rule(self) -> "MomentsRule":
        if type(self.reader) not in _FROM_MOMENTS:
            several = _names([*_FROM_MOMENTS, *_ONE_VS_REST])
            raise UsageError(f"{self.reader!r} is for two classes only; for several there are {several}")
        return _FROM_MOMENTS[type(self.reader)]

    @property
    def _scatter(self) -> Scatter:
        return "diagonal" if isinstance(self.reader, MeanDifference) and not self.reader.whiten else "full"

    def _keep(
        self, planes: ClassPlanes, classes: tuple[Label, ...], spread: Callable[[Float[np.ndarray, " width"]], float]
    ) -> Self:
        self.classes_ = np.array(classes)
        self.n_features_in_ = planes.coef.shape[1]
        self.coef_, self.intercept_ = planes.coef, planes.intercept
        found = {}
        for label, normal, intercept in zip(classes, planes.coef, planes.intercept, strict=True):
            plane = Plane(normal, -float(intercept), "the score of the class grows")
            scale = spread(normal / np.linalg.norm(normal))
            found[label] = direction_of(plane, scale, self.reader, (f"not {label}", str(label)))
        self.directions_ = found
        return self

    def scores(self, X: Any) -> Float[np.ndarray, "rows classes"]:
        """The score of every class, (n, width) → (n, classes). Raises `ReaderNotFitted` before `fit`."""
        found: np.ndarray = checked_again(self, "directions_", X) @ self.coef_.T + self.intercept_
        return found

    def decision_function(self, X: Any) -> Float[np.ndarray, "rows ..."]:
        """`scores`; with two classes, the second's less the first's, (n,)."""
        scores = self.scores(X)
        return scores if scores.shape[1] > 2 else scores[:, 1] - scores[:, 0]

    def predict(self, X: Any) -> np.ndarray:
        """The label of the highest score; of equal ones the first."""
        highest = np.argmax(self.scores(X), axis=1)
        labels: np.ndarray = self.classes_[highest]
        return labels


MomentsRule = Callable[[Any, ClassMoments], ClassPlanes]


def _nearest_mean(reader: MeanDifference, moments: ClassMoments) -> ClassPlanes:
    away = _from_centre(moments)
    normals = away if not reader.whiten else pseudo_solve(moments.within / moments.total.n, away.T, reader.rtol).T
    return _gaussian(moments, away, normals, np.zeros(len(away)))


def _highest_posterior(reader: LDAReader, moments: ClassMoments) -> ClassPlanes:
    away = _from_centre(moments)
    prior = np.log(moments.n / moments.total.n)
    return _gaussian(moments, away, clone(reader).unmix(moments, away.T).T, prior)


def _from_centre(moments: ClassMoments) -> Float[np.ndarray, "classes width"]:
    """The class means, seen from their mean."""
    away: np.ndarray = moments.means - moments.means.mean(axis=0)
    for label, one in zip(moments.classes, away, strict=True):
        require_direction(
            one,
            moments.total.magnitude,
            f"class {label!r} has no direction: its mean is the mean of all classes",
        )
    return away


def _gaussian(
    moments: ClassMoments,
    away: Float[np.ndarray, "classes width"],
    normals: Float[np.ndarray, "classes width"],
    prior: Float[np.ndarray, " classes"],
) -> ClassPlanes:
    """Log-likelihoods about the centre c of the class means: (h−c)·S⁻¹a − ½a·S⁻¹a + prior, less their mean."""
    for label, normal in zip(moments.classes, normals, strict=True):
        require_direction(normal, 0.0, f"the mean of class {label!r} differs only where no class varies: use shrinkage")
    at_centre = prior - np.einsum("cw,cw->c", away, normals) / 2
    at_centre -= at_centre.mean()
    return ClassPlanes(normals, at_centre - normals @ moments.means.mean(axis=0))


def _least_squares(reader: RidgeReader, moments: ClassMoments) -> ClassPlanes:
    joint = moments.joint(2 * np.eye(len(moments.classes)) - 1)
    _from_centre(moments)  # the indicators of classes that do not differ have no direction either
    coef = reader.weights(joint).T
    return ClassPlanes(coef, joint.z.mean - coef @ joint.x.mean)


def _one_vs_rest(
    reader: Reader,
    X: Float[np.ndarray, "rows width"],
    codes: Integer[np.ndarray, " rows"],
    classes: int,
    groups: Integer[np.ndarray, " rows"] | None,
) -> ClassPlanes:
    fitted = [clone(reader).fit_rows(TrainingRows(X, codes == c, None, groups=groups)) for c in range(classes)]
    return ClassPlanes(np.stack([f.coef_ for f in fitted]), np.array([f.intercept_ for f in fitted]))


_FROM_MOMENTS: dict[type, MomentsRule] = {
    MeanDifference: _nearest_mean,
    LDAReader: _highest_posterior,
    RidgeReader: _least_squares,
}
_ONE_VS_REST: tuple[type, ...] = (LogisticReader, KSparseReader)


def _names(kinds: Iterable[type]) -> str:
    return ", ".join(kind.__name__ for kind in kinds)
