"""MeanDifference and ClusterMean: directions from class to class mean. RandomReader: what they must beat.

Enters: checked training rows or class moments. Leaves: a boundary. Sources and departures are in each docstring.
"""

import numpy as np
from jaxtyping import Float

from reprobe.probing.moments import ClassMoments, Scatter
from reprobe.probing.reader import Plane, require_direction
from reprobe.probing.readers.from_moments import RTOL, MomentsReader, pseudo_solve

_SIGN = "the positive class has the higher mean"


class MeanDifference(MomentsReader):
    """θ = μ⁺ − μ⁻, threshold halfway between the projected class means (mass-mean; Marks & Tegmark 2023).

    The direction points to the positive class by construction. With `whiten` it is Σ⁺θ, Σ the pooled covariance
    within the classes (the paper's "iid" variant): LDA without shrinkage and with equal priors. Eigenvalues of Σ up
    to `rtol` times the largest count as zero (the original's tolerance is absolute). The original centres
    each data set by its own mean, test set included; here nothing of a test set is used.
    """

    def __init__(self, *, whiten: bool = False, rtol: float = RTOL) -> None:
        self.whiten = whiten
        self.rtol = rtol

    @property
    def _scatter(self) -> Scatter:
        return "full" if self.whiten else "diagonal"

    def _plane(self, moments: ClassMoments) -> Plane:
        theta = _difference(moments)
        if self.whiten:
            theta = pseudo_solve(moments.within / moments.total.n, theta, self.rtol)
            require_direction(
                theta, 0.0, "the class means differ only where no class varies: whitening leaves no direction"
            )
        low, high = moments.means @ theta
        return Plane(theta, float((high + low) / 2), _SIGN)


class ClusterMean(MomentsReader):
    """θ = μ⁺ − μ⁻ with the threshold of representation reading: the mean projection of all training rows (Zou et
    al. 2023). With classes of one size it is `MeanDifference`; else the threshold is nearer to the larger class.
    """

    @property
    def _scatter(self) -> Scatter:
        return "diagonal"

    def _plane(self, moments: ClassMoments) -> Plane:
        theta = _difference(moments)
        return Plane(theta, float(moments.total.mean @ theta), _SIGN)


class RandomReader(MomentsReader):
    """A direction drawn from N(0, I) with `seed`, threshold at the mean projection: the null control.

    It looks at the labels' names and at no row's label, so its accuracy is chance up to luck; many seeds show how
    much luck there is.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    @property
    def _scatter(self) -> Scatter:
        return "diagonal"

    def _plane(self, moments: ClassMoments) -> Plane:
        total = moments.total
        require_direction(total.std, total.magnitude, "the rows do not vary: along no direction is there a scale")
        v = np.random.default_rng(self.seed).standard_normal(moments.total.width)
        return Plane(v, float(moments.total.mean @ v), f"drawn (seed {self.seed}), not decided from labels")

    def __sklearn_tags__(self) -> object:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.poor_score = True
        return tags


def _difference(moments: ClassMoments) -> Float[np.ndarray, " width"]:
    low, high = moments.means
    theta: np.ndarray = high - low
    require_direction(
        theta, moments.total.magnitude, "the two class means are equal: there is no difference to point along"
    )
    return theta
