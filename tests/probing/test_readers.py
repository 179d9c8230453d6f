"""What single readers promise: mean difference, LAT, logistic. Promises that all make: test_every_reader.py."""

import itertools

import numpy as np
import polars as pl
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from reprobe.errors import UsageError
from reprobe.probing.readers import (
    ClusterMean,
    KSparseReader,
    LDAReader,
    LogisticReader,
    MeanDifference,
    PCAReader,
)


def test_logistic_predictions_do_not_depend_on_the_units_of_a_feature(planted):
    data = planted()
    units = np.geomspace(1e-4, 1e4, data.X.shape[1])
    a, b = LogisticReader().fit(data.X, data.y), LogisticReader().fit(data.X * units - 3 * units, data.y)
    np.testing.assert_allclose(
        (data.X * units - 3 * units) @ b.coef_ + b.intercept_, data.X @ a.coef_ + a.intercept_, atol=1e-5
    )


def test_the_mean_difference_is_the_difference_of_the_means_with_its_midpoint():
    X = np.array([[0.0, 0.0], [2.0, 0.0], [3.0, 4.0], [5.0, 8.0]])
    reader = MeanDifference().fit(X, [0, 0, 1, 1])
    np.testing.assert_allclose(reader.direction_.vector, np.array([3.0, 6.0]) / np.sqrt(45))
    np.testing.assert_allclose(reader.decision_function([[2.5, 3.0]]), 0, atol=1e-12)


# LAT on a case small enough to see: differences (4, 1), (4, −1), (4, 1), (4, −1). Their mean is along the
# first axis, all their spread about it along the second.
DELTA = np.array([[4.0, 1.0], [4.0, -1.0], [4.0, 1.0], [4.0, -1.0]])
LOW = np.array([[1.0, 2.0], [0.0, 5.0], [7.0, 1.0], [2.0, 2.0]])
LAT_X, LAT_Y = np.concatenate([LOW + DELTA, LOW]), np.repeat([1, 0], 4)
LAT_PAIRS = np.tile(["a", "b", "c", "d"], 2)


def test_lat_by_hand_finds_the_mean_difference_and_centring_loses_it():
    default = PCAReader().fit(LAT_X, LAT_Y, pairs=LAT_PAIRS).direction_
    np.testing.assert_allclose(default.vector, [1, 0], atol=1e-12)
    assert default.offset == pytest.approx(LAT_X[:, 0].mean())
    assert "4 of 4 pairs; pairs given" in default.sign
    centred = PCAReader(compat="repeng").fit(LAT_X, LAT_Y, pairs=LAT_PAIRS).direction_
    np.testing.assert_allclose(centred.vector, [0, 1], atol=1e-12)
    assert "tie" in centred.sign


def test_repe_is_centred_pca_of_differences_turned_round_at_random():
    rng = np.random.default_rng(3)
    low = rng.standard_normal((6, 4))
    delta = rng.standard_normal((6, 4)) + np.array([3, 1, 0, 0])
    X, y, pairs = np.concatenate([low, low + delta]), np.repeat([0, 1], 6), np.tile(np.arange(6), 2)
    candidates = []
    for signs in itertools.product([-1, 1], repeat=6):
        D = delta * np.array(signs)[:, None]
        v = np.linalg.svd(D - D.mean(0))[2][0]
        candidates.append(v * np.sign(np.sign(delta @ v).sum() or 1))
    found = {seed: PCAReader(compat="repe", seed=seed).fit(X, y, pairs=pairs).direction_ for seed in range(4)}
    for d in found.values():
        assert np.abs(np.array(candidates) - d.vector).max(axis=1).min() < 1e-9
        assert (delta @ d.vector > 0).sum() >= 3
    assert found[0] == PCAReader(compat="repe", seed=0).fit(X, y, pairs=pairs).direction_
    assert len({d.vector.tobytes() for d in found.values()}) > 1


@pytest.mark.parametrize(("n", "width"), [(40, 7), (14, 30)])
def test_uncentred_lat_is_the_first_right_singular_vector(n, width):
    rng = np.random.default_rng(n)
    X, y = rng.standard_normal((n, width)) + 1, np.arange(n) % 2
    d = PCAReader().fit(X, y, pairs=np.arange(n) // 2).direction_
    expected = np.linalg.svd(X[1::2] - X[::2])[2][0]
    assert abs(expected @ d.vector) == pytest.approx(1, abs=1e-12)


def test_a_side_of_a_pair_with_several_rows_enters_by_its_mean_and_row_order_is_nothing():
    away = np.array([9.0, -2.0])
    X = np.concatenate([LAT_X, LAT_X[:4] + away, LAT_X[:4] - away])  # the means stay
    y, pairs = np.concatenate([LAT_Y, np.ones(8)]), np.concatenate([LAT_PAIRS, LAT_PAIRS])
    order = np.random.default_rng(0).permutation(len(X))
    for kept in (np.arange(len(X)), order):
        d = PCAReader().fit(X[kept], y[kept], pairs=pairs[kept]).direction_
        np.testing.assert_allclose(d.vector, [1, 0], atol=1e-12)


def test_without_pairs_rows_are_matched_at_random_and_the_direction_says_so(planted):
    data = planted(n=200, strength=8.0)
    keep = np.flatnonzero((data.y == 1) | (np.arange(200) % 3 > 0))  # unequal classes
    reader = PCAReader(seed=5).fit(data.X[keep], data.y[keep])
    assert "matched at random across the classes (seed 5)" in reader.direction_.sign
    assert "given" not in reader.pairing_
    assert reader.direction_.vector @ data.axis > 0.9
    assert reader.direction_ == PCAReader(seed=5).fit(data.X[keep], data.y[keep]).direction_


@pytest.mark.parametrize(("width", "C"), [(30, 1.0), (30, 0.01), (200, 1.0), (200, 0.01)])
def test_logistic_equals_a_scikit_learn_pipeline_at_its_optimum(width, C, planted):
    data = planted(n=160, width=width, strength=1.0)
    data.X *= np.geomspace(0.01, 100, width)
    data.X[:, 3] = 2.5  # a constant feature carries nothing
    pipeline = make_pipeline(
        StandardScaler(), LogisticRegression(C=C, solver="newton-cholesky", tol=1e-10, max_iter=1000)
    ).fit(data.X, data.y)
    reader = LogisticReader(C=C).fit(data.X, data.y)
    reference = pipeline.decision_function(data.X)
    np.testing.assert_allclose(
        data.X @ reader.coef_ + reader.intercept_, reference, atol=1e-5 * np.abs(reference).max()
    )
    w = pipeline[1].coef_[0] / pipeline[0].scale_
    assert np.linalg.norm(reader.coef_ - w) <= 1e-5 * np.linalg.norm(w)
    np.testing.assert_allclose(reader.decision_function(data.X), reference / np.linalg.norm(w), rtol=1e-4, atol=1e-6)
    assert reader.coef_[3] == 0
    assert reader.gradient_ < 1e-7


def test_equal_classes_have_no_direction_up_to_rounding(planted):
    data = planted(n=40)
    X = np.repeat(data.X[::2], 2, axis=0)  # both sides of each pair are the same row
    order = np.concatenate([np.arange(1, 40, 2), np.arange(0, 40, 2)[::-1]])  # summed in another order
    for reader in (MeanDifference(), ClusterMean(), LDAReader(), PCAReader(), LogisticReader(), KSparseReader()):
        with pytest.raises(UsageError):
            reader.fit(X[order], data.y[order], pairs=data.pairs[order])


def test_broken_pairs_are_refused(planted):
    data = planted(n=8)
    with pytest.raises(UsageError, match=r"1 of 8 rows name no pair \(the first is row 5\)"):
        PCAReader().fit(data.X, data.y, pairs=[0, 0, 1, 1, 2, np.nan, 3, 3])
    with pytest.raises(UsageError, match="all are equal"):
        PCAReader(compat="repe").fit(data.X[:2], data.y[:2], pairs=data.pairs[:2])
    with pytest.raises(UsageError, match="'repe' and 'repeng'"):
        PCAReader(compat="other").fit(data.X, data.y)
    with pytest.raises(UsageError, match="positive number"):
        LogisticReader(C=0).fit(data.X, data.y)
    MeanDifference().fit(data.X, data.y, pairs=pl.Series([None] * 8))  # reads no pairs
