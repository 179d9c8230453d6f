"""k-sparse reading: the right few features, chosen the same way every time."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from reprobe.probing.readers import KSparseReader, LogisticReader


def neurons(n=300, width=40, carry=(7, 31, 3), seed=0):
    """Noise of very unequal scales; the features `carry` tell the classes apart, in falling order."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % 2
    X = rng.standard_normal((n, width))
    for i, feature in enumerate(carry):
        X[:, feature] += y * (3 - 0.7 * i)
    return X * np.geomspace(1e-3, 1e3, width) + 9, y


def test_the_features_that_carry_the_concept_are_chosen_best_first_whatever_their_scale():
    X, y = neurons()
    reader = KSparseReader(3).fit(X, y)
    assert reader.features_.tolist() == [7, 31, 3]
    assert set(np.flatnonzero(reader.direction_.vector)) == {3, 7, 31}
    fresh = neurons(seed=1)
    assert reader.score(*fresh) > 0.95
    assert KSparseReader(1).fit(X, y).score(*fresh) < reader.score(*fresh)


@pytest.mark.parametrize("k", [1, 2, 8])
def test_it_is_logistic_regression_on_the_ranked_features(k):
    X, y = neurons()
    gap = X[y == 1].mean(axis=0) - X[y == 0].mean(axis=0)
    chosen = np.argsort(-np.abs(gap) / X.std(axis=0))[:k]
    reader = KSparseReader(k, C=1.0).fit(X, y)
    assert reader.features_.tolist() == chosen.tolist()
    reference = make_pipeline(StandardScaler(), LogisticRegression(C=1.0, tol=1e-10, solver="newton-cholesky"))
    reference.fit(X[:, chosen], y)
    np.testing.assert_allclose(
        X @ reader.coef_ + reader.intercept_, reference.decision_function(X[:, chosen]), atol=1e-5
    )


def test_all_features_are_a_logistic_reader():
    X, y = neurons()
    a, b = KSparseReader(1000).fit(X, y), LogisticReader().fit(X, y)
    np.testing.assert_allclose(a.direction_.vector, b.direction_.vector, atol=1e-7)


def test_of_equal_features_the_first_is_chosen_and_constant_ones_come_last():
    X, y = neurons(width=6, carry=(4,))
    X[:, 2] = X[:, 4] * 2  # the same feature twice
    X[:, 0] = 1 / 3
    reader = KSparseReader(1).fit(X, y)
    assert reader.features_.tolist() == [2]
    ranked = KSparseReader(6).fit(X, y).features_.tolist()
    assert ranked[:2] == [2, 4]
    assert ranked[-1] == 0
    X[:, 5] = y  # no class varies here
    assert KSparseReader(1).fit(X, y).features_.tolist() == [5]
