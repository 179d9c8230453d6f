"""What the readers share that need only moments of the rows: one way from rows, one from moments.

Enters: checked training rows, or class moments made of any number of them. Leaves: a boundary. A reader says how
it fits by implementing `_plane`.
"""

from abc import abstractmethod
from typing import Self

import numpy as np
import scipy.linalg
from jaxtyping import Float

from reprobe.errors import UsageError
from reprobe.probing.moments import ClassMoments, Scatter
from reprobe.probing.reader import Plane, Reader, TrainingRows

#: Eigenvalues of a covariance below this share of the largest count as zero.
RTOL = 1e-10


class MomentsReader(Reader):
    """A reader that is fitted on rows or, to the same result, on moments."""

    def fit_moments(self, moments: ClassMoments) -> Self:
        """Fit on the full moments of two classes, the negative one first.

        Raises `UsageError` for another number of classes, a class without rows, moments with a diagonal only, and as
        `fit` for classes that do not differ.
        """
        require_two(moments)
        moments.total.require_full("a direction's scale")
        self.classes_ = np.array(moments.classes)
        self.n_features_in_ = moments.total.width
        plane = self._plane(moments)
        self._keep(plane, moments.total.std_along(plane.normal / np.linalg.norm(plane.normal)))
        return self

    def _fit_plane(self, rows: TrainingRows) -> Plane:
        codes = rows.positive.astype(np.int64)
        return self._plane(ClassMoments.of_rows(rows.X, codes, (False, True), self._scatter))

    @property
    def _scatter(self) -> Scatter:
        """What `_plane` needs of the moments; the diagonal spares the products of features."""
        return "full"

    @abstractmethod
    def _plane(self, moments: ClassMoments) -> Plane:
        """The boundary between the second class and the first; `UsageError` if the moments determine none."""


def require_two(moments: ClassMoments) -> None:
    """Raise `UsageError` unless the moments are of two classes that both have rows."""
    if len(moments.classes) != 2:
        raise UsageError(f"moments of {len(moments.classes)} classes: a reader needs two, negative and positive")
    if not moments.n.all():
        lacking = moments.classes[int(np.argmin(moments.n))]
        raise UsageError(f"no row is of class {lacking!r}; a reader needs two classes")


def pseudo_solve(
    S: Float[np.ndarray, "width width"], v: Float[np.ndarray, "width ..."], rtol: float
) -> Float[np.ndarray, "width ..."]:
    """S⁺v for a symmetric S without negative eigenvalues; those up to `rtol` of the largest count as zero."""
    values, vectors = scipy.linalg.eigh(S)
    kept = values > rtol * values[-1]
    solved: np.ndarray = (vectors[:, kept] / values[kept]) @ (vectors[:, kept].T @ v)
    return solved
