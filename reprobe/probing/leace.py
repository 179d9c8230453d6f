"""LEACE: takes a concept out of activations, so that no linear reader finds it, and changes as little as can be.

Enters: rows with labels or numbers, or their moments. Leaves: an affine map of rows, for activations at hand or, as an
intervention, for those in a running model. Source and departures are in its docstring.
"""

from typing import Any, NamedTuple, Self

import numpy as np
import scipy.linalg
from jaxtyping import Float
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils.multiclass import type_of_target

from reprobe.errors import UsageError
from reprobe.probing.moments import ClassMoments, JointMoments
from reprobe.probing.reader import checked, checked_again

#: Variances, as shares of the largest of standardised features, below which rows are taken not to vary.
_FLAT = 1e-12
#: Correlations with the concept below which there is nothing to erase.
_UNRELATED = 1e-8


class AffineMap(NamedTuple):
    """x ↦ A x + b."""

    A: Float[np.ndarray, "width width"]
    b: Float[np.ndarray, " width"]


class LEACE(TransformerMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn is untyped
    """Least-squares concept erasure (Belrose et al. 2023): x′ = x − W⁺ u uᵀ W (x − μ).

    W whitens the training rows and u spans what, whitened, is correlated with the concept z. After it no linear
    predictor of z from the training rows does better than a constant, for any convex loss, and no other affine map
    with that guarantee changes rows less, in any norm of the mean square kind (theorem 4.2 and its corollaries).

    Tolerances know no units: features and targets are standardised before anything is compared. Where rows do not
    vary (fewer rows than features), the map is one of several with the same effect on the training rows.

    `n_erased_` is the number of dimensions taken away: one for two classes or a number, at most classes − 1; 0 if
    nothing is correlated with z, and then rows stay as they are. A dimension goes whole, however weak its correlation:
    labels that have nothing to do with the rows cost one too. `mean_` is μ, `left_ @ right_.T` the projection.
    """

    mean_: Float[np.ndarray, " width"]
    left_: Float[np.ndarray, "width erased"]
    right_: Float[np.ndarray, "width erased"]
    n_erased_: int

    def fit(self, X: Any, y: Any, groups: Any = None, pairs: Any = None) -> Self:
        """Fit on rows (n, width) with the concept `y`: labels or numbers (n,), or numbers (n, k).

        One column of whole numbers, strings or bools is labels: all class means are made equal. To erase only what is
        linear in whole numbers, give them as a column (n, 1). `groups` and `pairs` are accepted and unused. Raises
        `UsageError` for NaN or infinity, one class, or a concept that does not vary.
        """
        X, y = checked(self, X, y, groups, pairs, multi_output=True)
        if y.ndim == 1 and type_of_target(y) in ("binary", "multiclass"):
            classes, codes = np.unique(y, return_inverse=True)
            return self.fit_moments(ClassMoments.of_rows(X, codes, classes.tolist()))
        if y.dtype.kind not in "biuf":
            raise UsageError(f"the concept is neither one label per row nor numbers, but {y.dtype} of shape {y.shape}")
        return self.fit_moments(JointMoments.of(X, y.astype(np.float64).reshape(len(y), -1)))

    def fit_moments(self, moments: ClassMoments | JointMoments) -> Self:
        """Fit on the full moments of classes, all of whose means are made equal, or on joint ones with the concept."""
        if isinstance(moments, ClassMoments):
            present = [m.n > 0 for m in moments.of]
            if sum(present) < 2:
                raise UsageError("the rows are of one class only: there is no concept to erase")
            moments = moments.joint(np.eye(len(present)))
        x, z = moments.x, moments.z
        varying = z.std > 16 * np.finfo(np.float64).eps * z.magnitude
        if not varying.any():
            raise UsageError("the concept is the same in all rows: there is nothing to erase")
        self.n_features_in_ = x.width
        self.mean_ = x.mean.copy()
        scale = np.where(x.std > 16 * np.finfo(np.float64).eps * (np.abs(x.mean) + x.std), x.std, np.inf)
        values, vectors = scipy.linalg.eigh(x.scatter / x.n / np.outer(scale, scale))
        kept = values > _FLAT * values[-1]
        root, vectors = np.sqrt(values[kept]), vectors[:, kept]
        correlation = moments.cross[:, varying] / x.n / scale[:, None] / z.std[varying]
        u, s, _ = np.linalg.svd((vectors.T @ correlation) / root[:, None], full_matrices=False)
        u = u[:, s > _UNRELATED]
        self.n_erased_ = u.shape[1]
        self.left_ = np.where(np.isinf(scale), 0.0, scale)[:, None] * (vectors @ (root[:, None] * u))
        self.right_ = (vectors @ (u / root[:, None])) / scale[:, None]
        return self

    def transform(self, X: Any) -> Float[np.ndarray, "rows width"]:
        """Rows without the concept, (n, width) → (n, width), float64. Raises `ReaderNotFitted` before `fit`."""
        X = checked_again(self, "right_", X)
        erased: np.ndarray = X - ((X - self.mean_) @ self.right_) @ self.left_.T
        return erased

    def affine(self) -> AffineMap:
        """The map as a matrix and an offset. Raises `ReaderNotFitted` before `fit`."""
        checked_again(self, "right_", self.mean_[None] if hasattr(self, "mean_") else np.zeros((1, 1)))
        projection = self.left_ @ self.right_.T
        return AffineMap(np.eye(len(projection)) - projection, projection @ self.mean_)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.required = True
        return tags
