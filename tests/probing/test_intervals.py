import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from reprobe.probing import intervals
from reprobe.probing.intervals import ClusterBootstrap, fold_auroc


@pytest.fixture
def scored():
    """Held-out scores with ties, groups of unequal size, three folds."""
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 23, 130)
    groups[:23] = np.arange(23)
    positive = rng.random(130) < 0.4
    scores = np.round(rng.standard_normal(130) + positive, 1).astype(np.float32)
    return scores, positive, groups, groups % 3


def drawn_rows(groups, counts):
    """Row numbers of a resample, with repeats: each drawn group brings all its rows."""
    return np.concatenate(
        [np.repeat(np.flatnonzero(groups == g)[None], c, axis=0).ravel() for g, c in enumerate(counts)]
    )


def test_auroc_is_the_mean_of_the_folds_own(scored):
    scores, positive, _, folds = scored
    expected = np.mean([roc_auc_score(positive[folds == k], scores[folds == k]) for k in range(3)])
    assert fold_auroc(scores, positive, folds) == pytest.approx(expected)
    moved = scores + 100 * folds  # each fold's reader has its own offset
    assert fold_auroc(moved, positive, folds) == pytest.approx(expected)


@pytest.mark.parametrize("block", [1 << 22, 700])
def test_intervals_equal_those_of_a_plain_loop_over_the_same_draws(scored, block, monkeypatch):
    scores, positive, groups, folds = scored
    monkeypatch.setattr(intervals, "_BLOCK", block)  # also when the resamples do not fit in memory at once
    boot = ClusterBootstrap.draw(groups, seed=3, resamples=200)
    correct = (scores > 0.5) == positive
    shares, aurocs = [], []
    for b in range(200):
        rows = drawn_rows(groups, boot.counts[:, b])
        shares.append(correct[rows].mean())
        per_fold = []
        for k in range(3):
            inside = rows[folds[rows] == k]
            if len(set(positive[inside])) == 2:
                per_fold.append(roc_auc_score(positive[inside], scores[inside]))
        aurocs.append(np.mean(per_fold))
    found = boot.accuracy(np.stack([correct, ~correct], axis=1))
    np.testing.assert_allclose(found[:, 0], np.quantile(shares, [0.025, 0.975]))
    np.testing.assert_allclose(found[:, 1], 1 - np.quantile(shares, [0.975, 0.025]))
    np.testing.assert_allclose(boot.auroc(scores, positive, folds), np.quantile(aurocs, [0.025, 0.975]))


def test_resamples_draw_as_many_groups_as_there_are_and_repeat_by_seed(scored):
    _, _, groups, _ = scored
    a, b, c = (ClusterBootstrap.draw(groups, seed=s, resamples=500).counts for s in (1, 1, 2))
    np.testing.assert_array_equal(a, b)
    assert (a != c).any()
    assert set(a.sum(axis=0)) == {23}
    np.testing.assert_allclose(a.mean(axis=1), 1, atol=0.2)


def test_rows_that_share_a_group_widen_the_interval():
    rng = np.random.default_rng(0)
    right = rng.random(40) < 0.7
    alone = ClusterBootstrap.draw(np.arange(400), 0).accuracy(rng.permutation(np.repeat(right, 10))[:, None])
    grouped = ClusterBootstrap.draw(np.repeat(np.arange(40), 10), 0).accuracy(np.repeat(right, 10)[:, None])
    assert np.diff(grouped, axis=0) > 2.5 * np.diff(alone, axis=0)


def test_the_accuracy_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(60), 4)
    hits = 0
    for _ in range(200):
        rate = rng.beta(6, 3, size=60)  # groups differ in difficulty; two thirds on average
        correct = rng.random(240) < np.repeat(rate, 4)
        low, high = ClusterBootstrap.draw(groups, int(rng.integers(1 << 30)), resamples=300).accuracy(correct[:, None])
        hits += bool(low[0] <= 2 / 3 <= high[0])
    assert 0.90 <= hits / 200 <= 0.985
