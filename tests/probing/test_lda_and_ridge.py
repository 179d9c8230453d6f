"""Readers made of moments, against scikit-learn and closed forms."""

import numpy as np
import pytest
from scipy.stats import ortho_group
from sklearn.base import clone
from sklearn.covariance import OAS, LedoitWolf
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LinearRegression, Ridge
from sklearn.model_selection import GridSearchCV, GroupKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from reprobe.errors import UsageError
from reprobe.probing.moments import JointMoments
from reprobe.probing.readers import ClusterMean, LDAReader, MeanDifference, RandomReader, RidgeReader


def correlated(n=80, width=9, seed=0):
    """Two classes of unequal size in correlated noise, in which the mean difference is not the best direction."""
    rng = np.random.default_rng(seed)
    y = (np.arange(n) % 3 == 0).astype(int)
    return rng.standard_normal((n, width)) @ rng.standard_normal((width, width)) + np.outer(y, np.ones(width)) + 3.0, y


@pytest.mark.parametrize(("shrinkage", "solver"), [(None, "lsqr"), (0.0, "eigen"), (0.3, "lsqr"), (1.0, "eigen")])
def test_lda_is_that_of_scikit_learn(shrinkage, solver):
    X, y = correlated()
    reference = LinearDiscriminantAnalysis(solver=solver, shrinkage=shrinkage).fit(X, y)
    reader = LDAReader(shrinkage=shrinkage).fit(X, y)
    np.testing.assert_allclose(reader.coef_, reference.coef_[0], rtol=1e-8)
    assert reader.intercept_ == pytest.approx(reference.intercept_[0])
    np.testing.assert_array_equal(reader.predict(X), reference.predict(X))
    np.testing.assert_allclose(
        reader.decision_function(X) * np.linalg.norm(reader.coef_), reference.decision_function(X), atol=1e-8
    )


@pytest.mark.parametrize("n", [12, 80])
def test_the_shrinkage_of_lda_is_oracle_approximating_and_works_with_fewer_rows_than_features(n):
    X, y = correlated(n=n, width=20)
    within = np.concatenate([X[y == c] - X[y == c].mean(axis=0) for c in (0, 1)])
    reference = OAS(assume_centered=True).fit(within)
    reader = LDAReader().fit(X, y)
    assert reader.shrinkage_ == pytest.approx(reference.shrinkage_)
    theta = X[y == 1].mean(axis=0) - X[y == 0].mean(axis=0)
    np.testing.assert_allclose(reader.coef_, np.linalg.solve(reference.covariance_, theta), rtol=1e-7)
    # and is of the size that Ledoit & Wolf find
    assert reader.shrinkage_ == pytest.approx(LedoitWolf(assume_centered=True).fit(within).shrinkage_, abs=0.2)


def test_the_whitened_mean_difference_is_lda_with_equal_priors():
    X, y = correlated()
    reference = LinearDiscriminantAnalysis(solver="lsqr", priors=[0.5, 0.5])
    reference.fit(X, y)
    pooled = sum(np.cov(X[y == c].T, bias=True) * (y == c).sum() for c in (0, 1)) / len(y)
    normal = np.linalg.solve(pooled, X[y == 1].mean(axis=0) - X[y == 0].mean(axis=0))
    reader = MeanDifference(whiten=True).fit(X, y)
    np.testing.assert_allclose(reader.direction_.vector, normal / np.linalg.norm(normal), atol=1e-9)
    middle = (X[y == 1].mean(axis=0) + X[y == 0].mean(axis=0)) / 2
    assert reader.decision_function(middle[None])[0] == pytest.approx(0, abs=1e-9)
    plain = MeanDifference().fit(X, y)
    assert reader.score(X, y) > plain.score(X, y) + 0.05  # the effect that whitening is for


def test_whitening_leaves_out_what_no_row_varies_in_whatever_the_units():
    X, y = correlated()
    reader = MeanDifference(whiten=True).fit(X, y)
    for unit in (1e-6, 1e6):
        doubled = np.concatenate([X, X], axis=1) * unit  # of rank 9, in 18 features
        twice = MeanDifference(whiten=True).fit(doubled, y)
        np.testing.assert_allclose(twice.direction_.vector[:9], reader.direction_.vector / np.sqrt(2), atol=1e-6)
        np.testing.assert_array_equal(twice.predict(doubled), reader.predict(X))


def test_whitened_scores_do_not_depend_on_the_basis():
    X, y = correlated()
    mix = np.random.default_rng(3).standard_normal((9, 9))
    a, b = MeanDifference(whiten=True).fit(X, y), MeanDifference(whiten=True).fit(X @ mix, y)
    scores = [r.decision_function(Z) / r.direction_.scale for r, Z in ((a, X), (b, X @ mix))]
    np.testing.assert_allclose(scores[0], scores[1], atol=1e-7)


def test_lda_refuses_a_shrinkage_that_is_none():
    X, y = correlated()
    for wrong in ("auto", -0.1, 1.5):
        with pytest.raises(UsageError, match="from 0 to 1, 'oas', or None"):
            LDAReader(shrinkage=wrong).fit(X, y)
    apart = np.array([[0.0, 1.0], [0.0, 2.0], [1.0, 1.0], [1.0, 2.0]])
    for reader in (LDAReader(shrinkage=None), MeanDifference(whiten=True)):
        with pytest.raises(UsageError, match="only where no class varies"):
            reader.fit(apart, [0, 0, 1, 1])
    np.testing.assert_allclose(LDAReader().fit(apart, [0, 0, 1, 1]).direction_.vector, [1, 0], atol=1e-12)


def test_the_cluster_mean_has_the_mean_of_all_rows_as_its_threshold():
    X, y = correlated()
    cluster, difference = ClusterMean().fit(X, y), MeanDifference().fit(X, y)
    np.testing.assert_allclose(cluster.direction_.vector, difference.direction_.vector, atol=1e-12)
    np.testing.assert_allclose(cluster.decision_function(X).mean(), 0, atol=1e-12)
    assert difference.decision_function(X).mean() < -0.1  # two thirds of the rows are negative


def test_a_random_direction_is_drawn_from_its_seed_and_reads_nothing():
    X, y = correlated()
    a = RandomReader(4).fit(X, y)
    assert a.direction_ != RandomReader(5).fit(X, y).direction_
    drawn = np.random.default_rng(4).standard_normal(9)
    np.testing.assert_allclose(a.direction_.vector, drawn / np.linalg.norm(drawn))
    assert "not decided from labels" in a.direction_.sign
    rng = np.random.default_rng(0)
    y = np.arange(400) % 2
    planted = rng.standard_normal((400, 64)) + 3 * np.outer(y - 0.5, np.eye(64)[0])
    rates = [RandomReader(s).fit(planted, y).score(planted, y) for s in range(100)]
    assert np.mean(rates) == pytest.approx(0.5, abs=0.03)
    assert MeanDifference().fit(planted, y).score(planted, y) > 0.9


# Ridge.


def numbers(n=60, width=7, seed=0):
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((n, width)) * np.geomspace(0.1, 10, width) + 5
    axis = rng.standard_normal(width)
    return X, X @ axis + 0.3 * rng.standard_normal(n) - 40, axis


@pytest.mark.parametrize("alpha", [0.0, 0.1, 100.0])
@pytest.mark.parametrize("n", [60, 5])
def test_ridge_is_that_of_scikit_learn(alpha, n):
    X, y, _ = numbers(n)
    reference = (Ridge(alpha=alpha) if alpha else LinearRegression()).fit(X, y)
    reader = RidgeReader(alpha=alpha).fit(X, y)
    np.testing.assert_allclose(reader.coef_, reference.coef_, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(reader.predict(X), reference.predict(X), rtol=1e-6)
    assert reader.score(X, y) == pytest.approx(reference.score(X, y))


def test_the_direction_of_ridge_points_where_the_number_grows():
    X, y, axis = numbers()
    reader = RidgeReader(alpha=0.01).fit(X, y)
    d = reader.direction_
    assert d.vector @ axis > 0.95 * np.linalg.norm(axis)  # 0.962 to 0.997 over ten seeds: one feature hardly varies
    assert d.classes is None
    assert d.scale == pytest.approx(np.std(X @ d.vector))
    np.testing.assert_allclose(
        d.score(X) * np.linalg.norm(reader.coef_) + y.mean(), reader.predict(X), rtol=1e-9, atol=1e-9
    )
    np.testing.assert_allclose((RidgeReader(alpha=0.01).fit(X, -y)).direction_.vector, -d.vector, atol=1e-9)
    rotation = ortho_group.rvs(7, random_state=1)
    np.testing.assert_allclose(
        RidgeReader(alpha=0.01).fit(X @ rotation, y).direction_.vector, d.vector @ rotation, atol=1e-8
    )
    moments = JointMoments.of(X[:20], y[:20, None]) + JointMoments.of(X[20:], y[20:, None])
    np.testing.assert_allclose(RidgeReader(alpha=0.01).fit_moments(moments).coef_, reader.coef_, rtol=1e-8)
    np.testing.assert_allclose(
        RidgeReader().fit_moments(moments - JointMoments.of(X[20:], y[20:, None])).coef_,
        RidgeReader().fit(X[:20], y[:20]).coef_,
        rtol=1e-6,
    )


def test_shuffled_numbers_cannot_be_predicted_and_searches_work():
    X, y, _ = numbers(n=200)
    assert cross_val_score(RidgeReader(), X, y).min() > 0.9
    shuffled = np.random.default_rng(1).permutation(y)
    assert cross_val_score(RidgeReader(), X, shuffled).mean() < 0.05
    reader, penalties = make_pipeline(StandardScaler(), RidgeReader()), {"ridgereader__alpha": [0.1, 1e6]}
    search = GridSearchCV(reader, penalties, cv=GroupKFold(4)).fit(X, y, groups=np.arange(200))
    assert search.best_params_ == {"ridgereader__alpha": 0.1}


def test_targets_that_are_no_numbers_or_do_not_vary_are_refused():
    X, y, _ = numbers()
    with pytest.raises(UsageError, match="predicts numbers, and y holds binary labels"):
        RidgeReader().fit(X, np.where(y > 0, "yes", "no"))
    with pytest.raises(UsageError, match="all targets are equal"):
        RidgeReader().fit(X, np.full(60, 0.1))
    with pytest.raises(UsageError, match="no feature varies"):
        RidgeReader().fit(np.tile(X[:1], (60, 1)), y)
    with pytest.raises(UsageError, match="number from 0"):
        RidgeReader(alpha=-1).fit(X, y)
    X[3, 2] = np.nan
    with pytest.raises(UsageError, match="1 of 60 rows: 3"):
        clone(RidgeReader()).fit(X, y)
