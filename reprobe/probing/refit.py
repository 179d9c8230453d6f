"""A reader fitted again and again on the same rows: on some of them, on other labels, or without further folds.

Enters: rows of activations, their classes, pairs, groups and folds, a reader. Leaves: fitted copies, held-out scores.
Does not know stores or sites.
"""

from itertools import combinations

import numpy as np
from jaxtyping import Bool, Float, Integer
from sklearn.base import clone

from reprobe.probing.permutation import MeanDifferenceRefit, Refit
from reprobe.probing.reader import Reader, TrainingRows
from reprobe.probing.readers import MeanDifference


def fit_on(reader: Reader, rows: TrainingRows, kept: Bool[np.ndarray, " n"] | Integer[np.ndarray, " kept"]) -> Reader:
    """A copy of `reader` fitted on the rows `kept`, a mask or places; if it reads pairs, theirs are numbered anew."""
    pairs = None
    if reader.uses_pairs and rows.pairs is not None:
        pairs = np.unique(rows.pairs[kept], return_inverse=True)[1]
    groups = None if rows.groups is None else rows.groups[kept]
    fitted: Reader = clone(reader).fit_rows(TrainingRows(rows.X[kept], rows.positive[kept], pairs, groups=groups))
    return fitted


def refit_of(
    reader: Reader,
    X: Float[np.ndarray, "n width"],
    pairs: Integer[np.ndarray, " n"] | None,
    fold: Integer[np.ndarray, " n"],
    groups: Integer[np.ndarray, " n"] | None = None,
) -> Refit:
    """Held-out scores (n, 1) of `reader` for any labels (n,): one fit per fold, or a closed form where there is one.

    `groups` are for readers that split the rows further, to choose something.
    """
    if type(reader) is MeanDifference and not reader.whiten:
        return MeanDifferenceRefit([X], fold)

    def refit(labels: Bool[np.ndarray, " n"]) -> Float[np.ndarray, "n 1"]:
        scores, rows = np.empty((len(X), 1)), TrainingRows(X, labels, pairs, groups=groups)
        for k in np.unique(fold):
            held_out = fold == k
            scores[held_out, 0] = fit_on(reader, rows, ~held_out).direction_.score(X[held_out])
        return scores

    return refit


def scores_inside(reader: Reader, rows: TrainingRows, fold: Integer[np.ndarray, " n"]) -> Float[np.ndarray, "folds n"]:
    """Row k: scores of the rows outside fold k by readers that saw neither fold k nor the row's own; NaN in fold k.

    What is fitted on them (a scale, a calibration) can be judged on fold k: no label of it is in them.
    """
    folds = int(fold.max()) + 1
    inside = np.full((folds, len(fold)), np.nan)
    for j, k in combinations(range(folds), 2):
        direction = fit_on(reader, rows, (fold != j) & (fold != k)).direction_
        for tested, judged in ((j, k), (k, j)):
            held_out = fold == tested
            inside[judged, held_out] = direction.score(rows.X[held_out])
    return inside
