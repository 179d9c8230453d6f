import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score, roc_curve

from reprobe.errors import UsageError
from reprobe.probing.intervals import ClusterBootstrap
from reprobe.probing.metrics import (
    calibration_error,
    fold_auroc,
    fold_aurocs,
    recall_at_fpr,
    weighted_auroc,
    weighted_calibration_error,
    weighted_recall,
)


@st.composite
def scored_rows(draw):
    """Scores with many ties, both classes in each of two folds, and whole-number weights."""
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    n = draw(st.integers(8, 40))
    positive = rng.random(n) < 0.5
    positive[:4] = [True, False, True, False]
    folds = rng.integers(0, 2, n)
    folds[:4] = [0, 0, 1, 1]
    return rng.integers(0, 6, n).astype(float), positive, folds, rng.integers(0, 4, n)


@given(scored_rows())
@settings(max_examples=60, deadline=None)
def test_a_weight_of_k_is_k_copies_of_the_row(case):
    scores, positive, folds, weights = case
    weights[:4] += 1
    copies = np.repeat(np.arange(len(scores)), weights)
    p = scores / 6
    s, y, k = scores[copies], positive[copies], folds[copies]
    pairs = [
        (weighted_auroc(scores, positive, folds), fold_auroc(s, y, k)),
        (weighted_recall(scores, positive, folds, 0.3), recall_at_fpr(s, y, k, 0.3)),
        (weighted_calibration_error(p, positive), calibration_error(p[copies], y)),
    ]
    for weighted, expected in pairs:
        assert weighted(weights[:, None])[0] == pytest.approx(expected)


@given(scored_rows())
@settings(max_examples=60, deadline=None)
def test_auroc_and_recall_are_those_of_scikit_learn_fold_by_fold(case):
    scores, positive, folds, _ = case
    aurocs, recalls = [], []
    for k in (0, 1):
        inside = folds == k
        aurocs.append(roc_auc_score(positive[inside], scores[inside]))
        fpr, tpr, _ = roc_curve(positive[inside], scores[inside], drop_intermediate=False)
        recalls.append(tpr[fpr <= 0.25].max())
    assert fold_auroc(scores, positive, folds) == pytest.approx(np.mean(aurocs))
    assert recall_at_fpr(scores, positive, folds, 0.25) == pytest.approx(np.mean(recalls))
    both = fold_aurocs(np.stack([scores, -scores], axis=1), positive, folds)
    np.testing.assert_allclose(both, [np.mean(aurocs), 1 - np.mean(aurocs)])


def test_at_one_percent_few_negatives_mean_the_threshold_is_their_maximum():
    scores = np.array([3.0, 1.0, 2.0, 2.0, 0.0])
    positive = np.array([True, True, True, False, False])
    assert recall_at_fpr(scores, positive, np.zeros(5, dtype=int)) == pytest.approx(1 / 3)
    assert recall_at_fpr(scores, positive, np.zeros(5, dtype=int), 0.5) == 1
    with pytest.raises(UsageError, match="fpr=1"):
        recall_at_fpr(scores, positive, np.zeros(5, dtype=int), 1)


def test_a_fold_of_one_class_does_not_count_and_without_any_there_is_no_auroc():
    scores, positive = np.array([0.0, 1.0, 5.0]), np.array([False, True, True])
    assert fold_auroc(scores, positive, np.array([0, 0, 1])) == 1
    with pytest.raises(UsageError, match="no fold holds rows of both classes"):
        fold_auroc(scores, positive, np.array([0, 1, 2]))


def test_the_calibration_error_by_hand():
    p, y = np.array([0.1, 0.1, 0.9, 0.9]), np.array([False, True, True, True])
    assert calibration_error(p, y) == pytest.approx(0.5 * 0.4 + 0.5 * 0.1)
    assert calibration_error(p, y, bins=1) == pytest.approx(0.25)
    with pytest.raises(UsageError, match="between 0 and 1"):
        calibration_error(p * 2, y)


def test_intervals_of_recall_and_calibration_error_cover_in_a_simulation():
    rng, groups, one_fold = np.random.default_rng(0), np.arange(400) // 4, np.zeros(400, dtype=int)
    recall_hits = error_hits = 0
    for b in range(120):
        positive = (groups % 2) == 1
        shared = 0.5 * rng.standard_normal(100)[groups]
        scores = 1.5 * positive + shared + rng.standard_normal(400)
        low, high = ClusterBootstrap.draw(groups, b, 300).recall_at_fpr(scores, positive, one_fold, 0.2)
        # positives above the 80 % point of the negatives: Φ((1.5 − σ z) / σ), σ² = 1.25
        recall_hits += bool(low <= 0.6914 <= high)
        p = rng.random(400)
        right = rng.random(400) < np.clip(p + 0.15, 0, 1)
        low, high = ClusterBootstrap.draw(groups, b, 300).bounds(weighted_calibration_error(p, right))
        error_hits += bool(low <= 0.15 - 0.15**2 / 2 <= high)
    assert 0.89 <= recall_hits / 120 <= 0.99
    assert error_hits / 120 >= 0.85  # the estimate itself is biased upward
