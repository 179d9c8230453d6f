"""What LEACE promises: no linear reader finds the concept, and rows change no more than that takes."""

import numpy as np
import pytest
from scipy.special import expit
from scipy.stats import ortho_group
from sklearn.base import clone
from sklearn.linear_model import LinearRegression, LogisticRegression, RidgeClassifier
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

from reprobe.errors import NotFitted, UsageError
from reprobe.probing.leace import LEACE
from reprobe.probing.moments import ClassMoments, JointMoments
from reprobe.probing.readers import LDAReader, LogisticReader, MeanDifference


def rows(n=300, width=8, classes=2, seed=0, share=0.6):
    """Classes of unequal size, well apart, in correlated noise of very unequal scales."""
    rng = np.random.default_rng(seed)
    y = np.where(rng.random(n) < share, 0, rng.integers(1, classes, n))
    centres = 2 * rng.standard_normal((classes, width))
    mixed = (rng.standard_normal((n, width)) + centres[y]) @ rng.standard_normal((width, width))
    return mixed * np.geomspace(1e-3, 1e3, width) + 50, y


def best_probe(X, y):
    return make_pipeline(StandardScaler(), LogisticRegression(C=1e6, max_iter=5000, tol=1e-8)).fit(X, y)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.SkipTestWarning")
def test_scikit_learn_accepts_leace_as_a_transformer():
    check_estimator(LEACE())


@pytest.mark.parametrize("classes", [2, 4])
def test_after_erasure_the_best_linear_probe_is_at_the_majority_rate(classes):
    X, y = rows(classes=classes)
    majority = np.bincount(y).max() / len(y)
    assert best_probe(X, y).score(X, y) > majority + 0.2  # there was something to erase
    eraser = LEACE().fit(X, y)
    erased = eraser.transform(X)
    assert eraser.n_erased_ == classes - 1
    probe = best_probe(erased, y)
    assert probe.score(erased, y) == majority
    assert np.abs(probe[1].coef_).max() < 1e-4
    assert (
        RidgeClassifier(alpha=1e-8).fit(erased / erased.std(axis=0), y).score(erased / erased.std(axis=0), y)
        == majority
    )
    spread = X.std(axis=0)
    means = np.stack([erased[y == c].mean(axis=0) for c in range(classes)])
    assert (np.abs(means - X.mean(axis=0)) < 1e-8 * spread).all()


def test_the_names_and_the_scale_of_labels_are_nothing_to_it():
    X, y = rows()
    reference = LEACE().fit(X, y).transform(X)
    size = np.abs(reference - X.mean(axis=0)).max(axis=0)
    for z in (np.where(y == 1, "b", "a"), y == 1, 1e6 * y - 3e5, 1e-9 * y, y[:, None], (1 - y)[:, None] * 1e-12):
        assert (np.abs(LEACE().fit(X, z).transform(X) - reference) < 1e-7 * size).all()


def test_for_two_classes_it_is_the_closed_form():
    X, y = rows()
    covariance = np.cov(X.T, bias=True)
    centred = X - X.mean(axis=0)
    sigma = centred.T @ (y - y.mean()) / len(y)
    weights = np.linalg.solve(covariance, sigma)
    expected = X - np.outer(centred @ weights, sigma) / (sigma @ weights)
    np.testing.assert_allclose(
        LEACE().fit(X, y).transform(X), expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max(0).min()
    )


@pytest.mark.parametrize("seed", range(3))
def test_no_other_affine_eraser_changes_rows_less(seed):
    X, y = rows(width=5, seed=seed)
    difference = X[y == 1].mean(axis=0) - X[y == 0].mean(axis=0)
    erased = LEACE().fit(X, y).transform(X)
    rng = np.random.default_rng(seed)
    for _ in range(20):
        normal = rng.standard_normal(5) / X.std(axis=0)  # any other projection along the difference of the means
        other = X - np.outer((X - X.mean(axis=0)) @ normal, difference) / (normal @ difference)
        assert np.allclose(other[y == 1].mean(axis=0), other[y == 0].mean(axis=0))
        assert (((other - X) ** 2).mean(axis=0) >= ((erased - X) ** 2).mean(axis=0) - 1e-9).all()


@pytest.mark.parametrize("shape", ["one", "column", "many"])
def test_numbers_are_erased_so_that_least_squares_predicts_their_mean(shape):
    X, _ = rows()
    rng = np.random.default_rng(1)
    A = rng.standard_normal((8, 2)) / X.std(axis=0)[:, None]
    z = X @ A + 0.5 * rng.standard_normal((300, 2)) * [1, 30] * np.array([1, 1e5])
    z = {"one": z[:, 0], "column": z[:, :1], "many": z}[shape]
    assert LinearRegression().fit(X, z).score(X, z) > 0.2
    eraser = LEACE().fit(X, z)
    erased = StandardScaler().fit_transform(eraser.transform(X))
    assert eraser.n_erased_ == (2 if shape == "many" else 1)
    assert LinearRegression().fit(erased, z).score(erased, z) < 1e-9


def test_erasing_is_idempotent_and_erasing_again_finds_nothing():
    X, y = rows(classes=3)
    eraser = LEACE().fit(X, y)
    once = eraser.transform(X)
    np.testing.assert_allclose(eraser.transform(once), once, rtol=1e-8)
    again = LEACE().fit(once, y)
    assert again.n_erased_ == 0
    np.testing.assert_array_equal(again.transform(X), X)


def test_the_affine_map_does_what_transform_does():
    X, y = rows()
    eraser = LEACE().fit(X, y)
    A, b = eraser.affine()
    fresh = rows(seed=7)[0]
    np.testing.assert_allclose(fresh @ A.T + b, eraser.transform(fresh), rtol=1e-7, atol=1e-7)
    np.testing.assert_allclose(A @ A, A, atol=1e-7 * np.abs(A).max())
    with pytest.raises(NotFitted):
        LEACE().affine()


def test_a_rotation_of_the_rows_rotates_what_is_left():
    X, y = rows()
    X = StandardScaler().fit_transform(X)
    rotation = ortho_group.rvs(8, random_state=1)
    np.testing.assert_allclose(
        LEACE().fit(X @ rotation, y).transform(X @ rotation), LEACE().fit(X, y).transform(X) @ rotation, atol=1e-8
    )


def test_fewer_rows_than_features_and_constant_features_are_erased_too():
    X, y = rows(n=20, width=30)
    X[:, 4] = 1 / 3
    erased = LEACE().fit(X, y).transform(X)
    np.testing.assert_array_equal(erased[:, 4], X[:, 4])
    gap = erased[y == 1].mean(axis=0) - erased[y == 0].mean(axis=0)
    assert (np.abs(gap) <= 1e-7 * X.std(axis=0)).all()


def test_moments_streamed_make_the_same_eraser():
    X, y = rows(classes=3)
    parts = [ClassMoments.of_rows(X[a:b], y[a:b], (0, 1, 2)) for a, b in ((0, 90), (90, 300))]
    expected = LEACE().fit(X, y).transform(X)
    np.testing.assert_allclose(LEACE().fit_moments(parts[0] + parts[1]).transform(X), expected, rtol=1e-6)
    Z = expit(StandardScaler().fit_transform(X))[:, :2]
    streamed = JointMoments.of(X[:77], Z[:77]) + JointMoments.of(X[77:], Z[77:])
    np.testing.assert_allclose(LEACE().fit_moments(streamed).transform(X), LEACE().fit(X, Z).transform(X), rtol=1e-6)


def test_in_a_pipeline_it_blinds_readers_to_the_concept_on_held_out_rows():
    X, y = rows(n=600, share=0.5)
    train, test = slice(0, 300), slice(300, 600)
    erase = make_pipeline(StandardScaler(), LEACE()).fit(X[:150], y[:150])
    for reader in (MeanDifference(), LDAReader(), LogisticReader()):
        assert cross_val_score(make_pipeline(StandardScaler(), reader), X, y).mean() > 0.85
        # on the rows that the eraser was fitted on, there is nothing that a reader could fit
        with pytest.raises(UsageError, match=r"class means are equal|do not differ"):
            make_pipeline(StandardScaler(), LEACE(), clone(reader)).fit(X[train], y[train])
        # and what it leaves on others is next to nothing
        blind = clone(reader).fit(erase.transform(X[train]), y[train])
        assert blind.score(erase.transform(X[test]), y[test]) < 0.62


def test_shuffled_labels_take_away_one_dimension_and_leave_the_concept():
    X, y = rows(n=2000)
    X = StandardScaler().fit_transform(X)
    shuffled = LEACE().fit(X, np.random.default_rng(0).permutation(y))
    changed = [np.mean((e.transform(X) - X) ** 2) for e in (shuffled, LEACE().fit(X, y))]
    assert shuffled.n_erased_ == 1  # however weak the chance correlation, all of its direction goes
    assert changed[0] < changed[1] / 2
    kept = shuffled.transform(X)
    assert best_probe(kept, y).score(kept, y) > 0.9


def test_concepts_that_cannot_be_erased_are_refused():
    X, y = rows(n=40)
    with pytest.raises(UsageError, match="one class only"):
        clone(LEACE()).fit(X, np.ones(40, dtype=int))
    with pytest.raises(UsageError, match="same in all rows"):
        LEACE().fit(X, np.full((40, 2), 0.1))
    with pytest.raises(UsageError, match="neither one label per row nor numbers"):
        LEACE().fit(X, np.array([["a", "b"]] * 40))
    with pytest.raises(UsageError, match="inconsistent numbers"):
        LEACE().fit(X, y[:-1])
    holes = X.copy()
    holes[[2, 9]] = np.inf
    with pytest.raises(UsageError, match="in 2 of 40 rows: 2, 9"):
        LEACE().fit(holes, y)
    with pytest.raises(UsageError, match="in 1 of 40 rows: 5"):
        LEACE().fit(X, y).transform(np.where(np.arange(320).reshape(40, 8) == 40, np.nan, X))
    with pytest.raises(UsageError, match="NaN"):
        LEACE().fit(X, np.where(np.arange(40) == 5, np.nan, X[:, 0]))
