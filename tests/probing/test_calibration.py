import numpy as np
import pytest
from sklearn.calibration import _SigmoidCalibration
from sklearn.linear_model import LogisticRegression

from reprobe.errors import UsageError
from reprobe.probing.calibration import Platt
from reprobe.probing.metrics import calibration_error


@pytest.fixture
def scores_of():
    def make(n, seed, slope=3.0, intercept=-1.0):
        rng = np.random.default_rng(seed)
        scores = rng.standard_normal(n)
        return scores, rng.random(n) < 1 / (1 + np.exp(-(slope * scores + intercept)))

    return make


def test_platt_scaling_equals_the_published_algorithm(scores_of):
    scores, positive = scores_of(300, 0)
    reference = _SigmoidCalibration().fit(scores, positive)
    np.testing.assert_allclose(Platt.fit(scores, positive).probabilities(scores), reference.predict(scores), atol=1e-4)


def test_with_many_rows_it_is_logistic_regression_on_the_score(scores_of):
    scores, positive = scores_of(20_000, 1)
    found = Platt.fit(scores, positive)
    reference = LogisticRegression(C=1e9, tol=1e-10).fit(scores[:, None], positive)
    assert found.slope == pytest.approx(reference.coef_[0, 0], rel=1e-2)
    assert found.intercept == pytest.approx(reference.intercept_[0], abs=2e-2)


def test_probabilities_of_test_rows_are_calibrated_and_depend_on_no_other_test_row(scores_of):
    scores, positive = scores_of(2000, 2)
    test, truth = scores_of(2000, 3)
    p = Platt.fit(scores, positive).probabilities(test)
    assert calibration_error(p, truth) < 0.04 < 0.1 < calibration_error(1 / (1 + np.exp(-test)), truth)
    np.testing.assert_array_equal(Platt.fit(scores, positive).probabilities(test[:5]), p[:5])


@pytest.mark.parametrize("unit", [1e-6, 1.0, 1e6])
def test_units_and_origin_of_the_scores_do_not_matter(scores_of, unit):
    scores, positive = scores_of(200, 4)
    moved = unit * scores + 7 * unit
    np.testing.assert_allclose(
        Platt.fit(moved, positive).probabilities(moved), Platt.fit(scores, positive).probabilities(scores), rtol=1e-5
    )


def test_separable_scores_have_a_finite_slope():
    scores = np.array([-2.0, -1.0, 1.0, 2.0])
    found = Platt.fit(scores, scores > 0)
    p = found.probabilities(scores)
    assert 0 < found.slope < 100
    assert 0.5 < p[2] < p[3] < 1
    assert Platt.fit(scores, scores < 0).slope == pytest.approx(-found.slope)


def test_scores_that_determine_nothing_are_refused():
    for scores, positive, says in [
        (np.arange(3.0), np.ones(3, dtype=bool), "both classes"),
        (np.ones(4), np.arange(4) < 2, "all training scores are equal"),
        (np.array([0, np.nan, 1]), np.arange(3) < 1, "1 training scores are NaN"),
    ]:
        with pytest.raises(UsageError, match=says):
            Platt.fit(scores, positive)
