"""TTPDReader: truth told apart from the polarity of the statement (a negation).

Enters: checked training rows, with the polarity of each. Leaves: a boundary in the plane of a truth direction and a
polarity direction. Source and departures are in its docstring.
"""

import dataclasses
from typing import Any, Self

import numpy as np

from reprobe.errors import UsageError
from reprobe.probing.moments import ClassMoments
from reprobe.probing.reader import Plane, Reader, TrainingRows, above_zero, require_direction
from reprobe.probing.readers.logistic import logistic_plane


class TTPDReader(Reader):
    """Training of truth and polarity directions (Bürger et al. 2024).

    With truth τ = ±1 (the labels) and polarity p = ±1 (−1: negated), least squares of the activations on τ and τp,
    each polarity centred by its own mean, give the general truth direction t_G and the polarity-sensitive t_P. A
    logistic regression on polarity gives the polarity direction d_P; a second one reads truth from the two numbers
    h·t_G and h·d_P. That is one plane in the space of activations: `direction_` is its normal, in the span of
    `truth_` (t_G) and `polarity_` (d_P). To steer, `Direction.from_vector(site, reader.truth_)`.

    Departures: τ is centred within each polarity too, so that unequal numbers of true and false rows do not tilt
    t_G towards one polarity (with equal numbers nothing changes); both logistic regressions have an L2 penalty on
    standardised features, `C` as in `LogisticReader`, because without one there is no optimum for separable rows.
    The original centres every topic by itself; to do so, subtract the topics' means beforehand.

    `sensitive_` is t_P. All three vectors are in raw units, `polarity_` of norm 1.
    """

    def __init__(self, *, C: float = 1.0) -> None:
        self.C = C

    def fit(self, X: Any, y: Any, groups: Any = None, pairs: Any = None, polarity: Any = None) -> Self:
        """As `Reader.fit`, with `polarity` (n,), bools or numbers: above 0 is affirmative, the rest is negated.

        In scikit-learn's searches it goes along with the rows: `cross_val_score(reader, X, y, params={"polarity": p})`.
        Raises `UsageError` without it, and unless both polarities hold rows of both classes.
        """
        rows = self._checked(X, y, groups, pairs)
        if polarity is None:
            return self.fit_rows(rows)
        return self.fit_rows(dataclasses.replace(rows, side=above_zero(polarity, "polarity", len(rows.X))))

    def _fit_plane(self, rows: TrainingRows) -> Plane:
        if rows.side is None:
            raise UsageError("TTPDReader needs the polarity of each row: fit(X, y, polarity=…), above 0 if affirmative")
        names = ("negated and negative", "negated and positive", "affirmative and negative", "affirmative and positive")
        cells = ClassMoments.of_rows(rows.X, 2 * rows.side.astype(np.int64) + rows.positive, names, "diagonal")
        if not cells.n.all():
            raise UsageError(
                f"no row is {names[int(np.argmin(cells.n))]}: truth and polarity cannot be told apart; both classes "
                "are needed in both polarities"
            )
        # The least squares on [1, p, τ, τp] have one parameter per cell: their solution is differences of cell means.
        negated, affirmative = (cells.means[1] - cells.means[0]) / 2, (cells.means[3] - cells.means[2]) / 2
        self.truth_, self.sensitive_ = (affirmative + negated) / 2, (affirmative - negated) / 2
        require_direction(
            self.truth_,
            cells.total.magnitude,
            "the classes do not differ on average over the polarities: there is no general truth direction",
        )
        d = logistic_plane(rows.X, rows.side, self.C).normal
        self.polarity_ = d / np.linalg.norm(d)
        basis = np.stack([self.truth_, self.polarity_])
        found = logistic_plane(rows.X @ basis.T, rows.positive, self.C)
        return Plane(found.normal @ basis, found.level, found.sign)
