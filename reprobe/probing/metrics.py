"""How well scores separate two classes: AUROC, recall at a small false-positive rate, calibration error.

Enters: held-out scores (or probabilities), classes, the fold of each row. Leaves: numbers, and the same numbers as
functions of row weights, which is what `intervals` resamples. Does not know groups, sites or readers.

AUROC and recall are means over folds, not pooled: each fold's reader has its own scale and offset, so scores of two
folds do not compare. A reader that was fitted once has one fold.
"""

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from jaxtyping import Bool, Float, Integer, Num
from scipy.stats import rankdata

from reprobe.errors import UsageError

#: A metric of weighted rows: weights (rows, draws) → values (draws,), NaN where the weights leave it undefined.
Weighted: TypeAlias = Callable[[Num[np.ndarray, "rows draws"]], Float[np.ndarray, " draws"]]

#: Share of the negatives that may score above the threshold of `recall_at_fpr`.
FPR = 0.01
#: Bins of equal width, as in Guo et al. 2017.
BINS = 15


def fold_auroc(
    scores: Float[np.ndarray, " rows"], positive: Bool[np.ndarray, " rows"], folds: Integer[np.ndarray, " rows"]
) -> float:
    """The mean over folds of the AUROC within each fold; ties count half."""
    return float(fold_aurocs(scores[:, None], positive, folds)[0])


def fold_aurocs(
    scores: Float[np.ndarray, "rows probes"], positive: Bool[np.ndarray, " rows"], folds: Integer[np.ndarray, " rows"]
) -> Float[np.ndarray, " probes"]:
    """`fold_auroc` of every column. A fold without one of the classes has none and does not count.

    Raises `UsageError` if no fold holds both classes.
    """
    values = []
    for fold in np.unique(folds):
        inside = folds == fold
        high = positive[inside]
        n_high, n_low = int(high.sum()), int((~high).sum())
        if n_high and n_low:
            ranks = rankdata(scores[inside], axis=0)
            values.append((ranks[high].sum(axis=0) - n_high * (n_high + 1) / 2) / (n_high * n_low))
    if not values:
        raise UsageError("no fold holds rows of both classes: there is no AUROC")
    mean: np.ndarray = np.mean(values, axis=0)
    return mean


def recall_at_fpr(
    scores: Float[np.ndarray, " rows"],
    positive: Bool[np.ndarray, " rows"],
    folds: Integer[np.ndarray, " rows"],
    fpr: float = FPR,
) -> float:
    """The share of positives above the lowest threshold that at most `fpr` of the negatives exceed, by fold.

    With fewer than 1/fpr negatives in a fold no negative may exceed it: the threshold is their maximum.
    """
    return float(weighted_recall(scores, positive, folds, fpr)(np.ones((len(scores), 1)))[0])


def calibration_error(
    probabilities: Float[np.ndarray, " rows"], positive: Bool[np.ndarray, " rows"], bins: int = BINS
) -> float:
    """ECE: Σ over bins of (share of rows) · |mean probability − share of positives|, bins of equal width.

    Biased upward: with few rows in a bin the two differ by chance (a perfectly calibrated reader has an ECE above 0).
    """
    return float(weighted_calibration_error(probabilities, positive, bins)(np.ones((len(probabilities), 1)))[0])


def weighted_auroc(
    scores: Float[np.ndarray, " rows"], positive: Bool[np.ndarray, " rows"], folds: Integer[np.ndarray, " rows"]
) -> Weighted:
    """`fold_auroc` as a function of row weights.

    Per fold, the negatives are sorted once; what a positive beats is then a running sum of weights.
    """
    plans = []
    for fold in np.unique(folds):
        high, low = _sides(positive, folds == fold)
        low = low[np.argsort(scores[low])]
        below = np.searchsorted(scores[low], scores[high], side="left")
        not_above = np.searchsorted(scores[low], scores[high], side="right")
        plans.append((high, low, below, not_above, bool((below != not_above).any())))

    def auroc(weights: Num[np.ndarray, "rows draws"]) -> Float[np.ndarray, " draws"]:
        values = []
        for high, low, below, not_above, ties in plans:
            beaten = _running(weights[low])
            won = (beaten[below] + beaten[not_above]) / 2 if ties else beaten[below]
            w = weights[high].astype(np.float64)
            values.append((np.einsum("rb,rb->b", w, won), w.sum(axis=0) * beaten[-1]))
        return _mean_of_ratios(values)

    return auroc


def weighted_recall(
    scores: Float[np.ndarray, " rows"],
    positive: Bool[np.ndarray, " rows"],
    folds: Integer[np.ndarray, " rows"],
    fpr: float = FPR,
) -> Weighted:
    """`recall_at_fpr` as a function of row weights; the threshold moves with them."""
    if not 0 <= fpr < 1:
        raise UsageError(f"fpr={fpr!r}: a false-positive rate is at least 0 and below 1")
    plans = []
    for fold in np.unique(folds):
        high, low = _sides(positive, folds == fold)
        high, low = high[np.argsort(-scores[high])], low[np.argsort(-scores[low])]
        # above[k]: how many positives score above the k-th highest negative.
        plans.append((high, low, np.searchsorted(-scores[high], -scores[low], side="left")))

    def recall(weights: Num[np.ndarray, "rows draws"]) -> Float[np.ndarray, " draws"]:
        values = []
        for high, low, above in plans:
            exceeding = _running(weights[low])[1:]
            allowed = fpr * exceeding[-1] * (1 + 1e-12) if len(low) else np.zeros(weights.shape[1])
            # The first negative that may not be exceeded sets the threshold (those of equal score with it).
            first = (exceeding <= allowed).sum(axis=0)
            caught, columns = _running(weights[high]), np.arange(weights.shape[1])
            found = above[np.minimum(first, len(low) - 1)] if len(low) else np.zeros(len(columns), dtype=int)
            total = caught[-1] * (exceeding[-1] > 0) if len(low) else np.zeros(len(columns))
            values.append((caught[found, columns], total))
        return _mean_of_ratios(values)

    return recall


def weighted_calibration_error(
    probabilities: Float[np.ndarray, " rows"], positive: Bool[np.ndarray, " rows"], bins: int = BINS
) -> Weighted:
    """`calibration_error` as a function of row weights."""
    residual = bin_residuals(probabilities, positive, bins)

    def error(weights: Num[np.ndarray, "rows draws"]) -> Float[np.ndarray, " draws"]:
        w = weights.astype(np.float64)
        return _mean_of_ratios([(np.abs(residual @ w).sum(axis=0), w.sum(axis=0))])

    return error


def bin_residuals(
    probabilities: Float[np.ndarray, " rows"], positive: Bool[np.ndarray, " rows"], bins: int = BINS
) -> Float[np.ndarray, "bins rows"]:
    """Probability minus class of each row, in the line of its bin: an ECE is Σ over bins of |mean over rows|.

    Raises `UsageError` unless the probabilities are between 0 and 1.
    """
    if not ((probabilities >= 0) & (probabilities <= 1)).all():
        raise UsageError("a calibration error is of probabilities, between 0 and 1; these are not (see `calibration`)")
    residual = np.zeros((bins, len(probabilities)))
    residual[bin_of(probabilities, bins), np.arange(len(probabilities))] = probabilities - positive
    return residual


def bin_of(probabilities: Float[np.ndarray, " rows"], bins: int = BINS) -> Integer[np.ndarray, " rows"]:
    """The bin of each probability, 0 … bins−1, all of one width; 1 is in the last."""
    which: np.ndarray = np.minimum((probabilities * bins).astype(np.int64), bins - 1)
    return which


def _sides(positive: Bool[np.ndarray, " rows"], inside: Bool[np.ndarray, " rows"]) -> tuple[np.ndarray, np.ndarray]:
    return np.flatnonzero(inside & positive), np.flatnonzero(inside & ~positive)


def _running(weights: Num[np.ndarray, "n draws"]) -> Float[np.ndarray, "n+1 draws"]:
    """Running sums along the rows, from 0."""
    sums = np.zeros((len(weights) + 1, weights.shape[1]))
    np.cumsum(weights, axis=0, out=sums[1:])
    return sums


def _mean_of_ratios(values: list[tuple[np.ndarray, np.ndarray]]) -> Float[np.ndarray, " draws"]:
    """Per draw, the mean of part / whole over the folds whose whole is not 0; NaN if none is."""
    part, whole = (np.stack(v) for v in zip(*values, strict=True))
    ratio = np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)
    used = (whole > 0).sum(axis=0)
    mean: np.ndarray = np.divide(ratio.sum(axis=0), used, out=np.full(part.shape[1], np.nan), where=used > 0)
    return mean
