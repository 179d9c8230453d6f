"""A reader fitted again on the same rows: on other labels, or without further folds.

Enters: rows of activations, their classes, pairs and folds, a reader. Leaves: held-out scores. Does not know stores
or sites.
"""

from itertools import combinations

import numpy as np
from jaxtyping import Bool, Float, Integer
from sklearn.base import clone

from reprobe.probing.permutation import MeanDifferenceRefit, Refit
from reprobe.probing.reader import Reader, TrainingRows
from reprobe.probing.readers import MeanDifference


def fit_on(
    reader: Reader,
    X: Float[np.ndarray, "n width"],
    positive: Bool[np.ndarray, " n"],
    pairs: Integer[np.ndarray, " n"] | None,
    kept: Bool[np.ndarray, " n"],
) -> Reader:
    """A copy of `reader` fitted on the rows `kept`; their pairs are numbered anew."""
    codes = None if pairs is None or not reader.uses_pairs else np.unique(pairs[kept], return_inverse=True)[1]
    fitted: Reader = clone(reader).fit_rows(TrainingRows(X[kept], positive[kept], codes))
    return fitted


def refit_of(
    reader: Reader,
    X: Float[np.ndarray, "n width"],
    pairs: Integer[np.ndarray, " n"] | None,
    fold: Integer[np.ndarray, " n"],
) -> Refit:
    """Held-out scores (n, 1) of `reader` for any labels (n,): one fit per fold, or a closed form where there is one."""
    if type(reader) is MeanDifference and not reader.whiten:
        return MeanDifferenceRefit([X], fold)

    def refit(labels: Bool[np.ndarray, " n"]) -> Float[np.ndarray, "n 1"]:
        scores = np.empty((len(X), 1))
        for k in np.unique(fold):
            held_out = fold == k
            scores[held_out, 0] = fit_on(reader, X, labels, pairs, ~held_out).direction_.score(X[held_out])
        return scores

    return refit


def scores_inside(
    reader: Reader,
    X: Float[np.ndarray, "n width"],
    positive: Bool[np.ndarray, " n"],
    pairs: Integer[np.ndarray, " n"] | None,
    fold: Integer[np.ndarray, " n"],
) -> Float[np.ndarray, "folds n"]:
    """Row k: scores of the rows outside fold k by readers that saw neither fold k nor the row's own; NaN in fold k.

    What is fitted on them (a scale, a calibration) can be judged on fold k: no label of it is in them.
    """
    folds = int(fold.max()) + 1
    inside = np.full((folds, len(X)), np.nan)
    for j, k in combinations(range(folds), 2):
        direction = fit_on(reader, X, positive, pairs, (fold != j) & (fold != k)).direction_
        for tested, judged in ((j, k), (k, j)):
            held_out = fold == tested
            inside[judged, held_out] = direction.score(X[held_out])
    return inside
