"""Readers that need more than labels: contrast pairs (CCS), the polarity of statements (TTPD)."""

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from reprobe.errors import UsageError
from reprobe.probing.readers import CCSReader, MeanDifference, TTPDReader

CCS = CCSReader(restarts=4, steps=200)


class Contrasts:
    """Questions asked twice, "… yes" and "… no"; one of the two is true. The answer word shifts rows much more than
    truth does."""

    def __init__(self, n=150, width=12, truth=3.0, seed=0):
        rng = np.random.default_rng(seed)
        self.axis, self.word = np.linalg.qr(rng.standard_normal((width, 2)))[0].T
        self.pairs = np.repeat(np.arange(n), 2)
        self.yes = np.tile([True, False], n)
        self.y = np.repeat(rng.integers(0, 2, n), 2) == self.yes
        self.X = (
            np.repeat(rng.standard_normal((n, width)), 2, axis=0) * 0.3
            + 0.3 * rng.standard_normal((2 * n, width))
            + truth * np.outer(self.y - 0.5, self.axis)
            + 10.0 * np.outer(self.yes, self.word)
            + 4.0
        )


def fit(reader, data, y=None, **more):
    return clone(reader).fit(data.X, data.y if y is None else y, pairs=data.pairs, sides=data.yes, **more)


def test_ccs_finds_truth_under_a_larger_difference_between_the_two_answers():
    data = Contrasts()
    reader = fit(CCS, data)
    d = reader.direction_
    # Any direction that separates the pairs has a low loss, so a part of the start stays: over eight seeds the cosine
    # with the axis is 0.83 to 0.96, that with the answer word 0.03 to 0.27.
    assert d.vector @ data.axis > 0.75
    assert abs(d.vector @ data.word) < 0.4
    first, second = data.X[~data.yes], data.X[data.yes]
    probability = reader.pair_probability(first, second)
    assert ((probability > 0.5) == data.y[data.yes]).mean() > 0.98
    assert reader.loss_ == reader.losses_.min() < 0.1
    assert len(reader.losses_) == 4
    assert "labels" in d.sign
    assert "pairs given" in d.sign


def test_the_loss_and_the_probability_are_those_of_the_paper():
    data = Contrasts(n=30)
    reader = fit(CCS, data)
    x0, x1 = data.X[~data.yes], data.X[data.yes]
    np.testing.assert_allclose(reader.side_means_, [x0.mean(axis=0), x1.mean(axis=0)])
    p0, p1 = (
        1 / (1 + np.exp(-((x - x.mean(axis=0)) @ reader.coef_ + reader.bias_))) for x in (x0, x1)
    )  # a sign turned by the labels leaves consistency as it is, and min(p0, p1) becomes min(1 − p0, 1 − p1)
    losses = [np.mean((a + b - 1) ** 2 + np.minimum(a, b) ** 2) for a, b in ((p0, p1), (1 - p0, 1 - p1))]
    assert min(abs(value - reader.loss_) for value in losses) < 1e-9
    np.testing.assert_allclose(reader.pair_probability(x0, x1), (p1 + 1 - p0) / 2)


def test_its_search_is_adamw_from_seeded_starts_written_out_by_hand():
    data, steps, restarts = Contrasts(n=30), 7, 2
    reader = fit(CCSReader(restarts=restarts, steps=steps, seed=3), data)
    x0, x1 = data.X[~data.yes], data.X[data.yes]
    centred = [x - x.mean(axis=0) for x in (x0, x1)]
    std = np.sqrt(np.mean(np.stack(centred) ** 2, axis=(0, 1)))
    z0, z1 = ((c / std) for c in centred)
    width = z0.shape[1]
    start = torch.rand(width + 1, restarts, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    ends = []
    for theta in ((start * 2 - 1) / width**0.5).numpy().T:
        first, second = np.zeros(width + 1), np.zeros(width + 1)

        def loss_and_gradient(theta):
            p0, p1 = (1 / (1 + np.exp(-(z @ theta[:-1] + theta[-1]))) for z in (z0, z1))
            gradient = np.zeros(width + 1)
            for z, p, other in ((z0, p0, p1), (z1, p1, p0)):
                by_p = 2 * (p0 + p1 - 1) + 2 * np.minimum(p0, p1) * (p < other)
                gradient += np.append(z, np.ones((len(z), 1)), axis=1).T @ (by_p * p * (1 - p)) / len(z)
            return np.mean((p0 + p1 - 1) ** 2 + np.minimum(p0, p1) ** 2), gradient

        for k in range(1, steps + 1):
            _, g = loss_and_gradient(theta)
            first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g**2
            theta = theta * (1 - 0.01 * 0.01)
            theta = theta - 0.01 * (first / (1 - 0.9**k)) / (np.sqrt(second / (1 - 0.999**k)) + 1e-8)
        ends.append((loss_and_gradient(theta)[0], theta))
    np.testing.assert_allclose(reader.losses_, [loss for loss, _ in ends], rtol=1e-10)
    best = min(ends, key=lambda end: end[0])[1]
    coef = best[:-1] / std
    cosine = reader.coef_ @ coef / np.linalg.norm(reader.coef_) / np.linalg.norm(coef)
    assert abs(cosine) == pytest.approx(1, abs=1e-12)


def test_the_same_seed_ends_at_the_same_lower_than_it_began_and_no_global_random_state_is_used():
    data = Contrasts(truth=0.7)
    state = torch.random.get_rng_state()
    a, b = fit(CCS, data), fit(CCS, data)
    assert torch.equal(state, torch.random.get_rng_state())
    assert a.direction_ == b.direction_
    assert fit(clone(CCS).set_params(steps=1), data).loss_ > a.loss_


def test_shuffled_truth_is_read_at_chance_by_ccs():
    rates = []
    for seed in range(6):
        train, test = Contrasts(truth=0.0, seed=seed), Contrasts(truth=0.0, seed=seed + 100)
        rates.append(fit(CCS, train).score(test.X, test.y))
    assert np.mean(rates) == pytest.approx(0.5, abs=0.05)


def test_labels_only_turn_ccs_round_and_a_prior_needs_none():
    data = Contrasts()
    a, b = fit(CCS, data), fit(CCS, data, ~data.y)
    np.testing.assert_allclose(b.direction_.vector, -a.direction_.vector, atol=1e-12)
    prior = (data.axis + 0.1).tolist()
    c, d = (fit(clone(CCS).set_params(prior=prior), data, y) for y in (data.y, ~data.y))
    np.testing.assert_array_equal(c.direction_.vector, d.direction_.vector)
    np.testing.assert_allclose(c.direction_.vector, a.direction_.vector, atol=1e-12)
    assert "prior" in c.direction_.sign
    assert c.direction_.params["prior"] == prior
    with pytest.raises(UsageError, match=r"shape \(3,\), the rows have width 12"):
        fit(clone(CCS).set_params(prior=[1.0, 0.0, 0.0]), data)


def test_sides_that_follow_the_labels_have_the_truth_taken_away():
    data = Contrasts()
    told = clone(CCS).fit(data.X, data.y, pairs=data.pairs, sides=data.y)
    assert abs(told.direction_.vector @ data.axis) < 0.7
    assert fit(CCS, data).direction_.vector @ data.axis > 0.75


def test_ccs_refuses_pairs_and_sides_that_are_none():
    data = Contrasts(n=6)
    with pytest.raises(UsageError, match="sides without pairs"):
        clone(CCS).fit(data.X, data.y, sides=data.yes)
    with pytest.raises(UsageError, match="sides must be 12 numbers or bools"):
        clone(CCS).fit(data.X, data.y, pairs=data.pairs, sides=data.yes[:-1])
    with pytest.raises(UsageError, match="1 of 6 pairs have rows of one side only"):
        clone(CCS).fit(data.X, data.y, pairs=data.pairs, sides=np.where(np.arange(12) == 3, True, data.yes))
    with pytest.raises(UsageError, match="restarts=0"):
        fit(CCSReader(restarts=0), data)


# TTPD.


class Statements:
    """True and false statements, affirmative and negated, with a general and a polarity-sensitive truth direction."""

    def __init__(self, n=400, width=15, seed=0):
        rng = np.random.default_rng(seed)
        self.general, self.sensitive, self.polar = np.linalg.qr(np.random.default_rng(9).standard_normal((width, 3)))[
            0
        ].T
        tau, self.p = np.array([1, 1, -1, -1])[np.arange(n) % 4], np.array([1, -1])[np.arange(n) % 2]
        self.y = tau > 0
        self.X = (
            0.5 * rng.standard_normal((n, width))
            + np.outer(tau, self.general)
            + np.outer(tau * self.p, 2.5 * self.sensitive)
            + np.outer(self.p, 2 * self.polar)
            + 7.0
        )


def test_ttpd_tells_the_general_truth_direction_from_the_polarity_sensitive_one():
    data, test = Statements(), Statements(seed=1)
    reader = TTPDReader().fit(data.X, data.y, polarity=data.p)
    for found, planted in (
        (reader.truth_, data.general),
        (reader.sensitive_ / 2.5, data.sensitive),
    ):
        np.testing.assert_allclose(found, planted, atol=0.15)
    assert reader.polarity_ @ data.polar > 0.85  # of a logistic regression: 0.90 to 0.94 over six seeds
    assert reader.score(test.X, test.y) > 0.95
    affirmative = data.p > 0
    plain = MeanDifference().fit(data.X[affirmative], data.y[affirmative])
    assert (
        plain.score(test.X[test.p < 0], test.y[test.p < 0]) < 0.3
    )  # what TTPD is for: this one reads negations wrongly


def test_its_two_directions_are_the_least_squares_of_the_paper():
    data = Statements(n=80)
    tau = np.where(data.y, 1.0, -1.0)
    centred = data.X.copy()
    for p in (-1, 1):
        centred[data.p == p] -= data.X[data.p == p].mean(axis=0)
    solution = np.linalg.lstsq(np.stack([tau, tau * data.p], axis=1), centred, rcond=None)[0]
    reader = TTPDReader().fit(data.X, data.y, polarity=data.p)
    np.testing.assert_allclose([reader.truth_, reader.sensitive_], solution, atol=1e-12)


def test_ttpd_reads_in_the_plane_of_truth_and_polarity():
    data = Statements(n=80)
    reader = TTPDReader().fit(data.X, data.y, polarity=data.p > 0)
    basis = np.stack([reader.truth_, reader.polarity_])
    inside = np.linalg.lstsq(basis.T, reader.direction_.vector, rcond=None)[0] @ basis
    np.testing.assert_allclose(inside, reader.direction_.vector, atol=1e-10)
    swapped = TTPDReader().fit(data.X, ~data.y, polarity=data.p)
    np.testing.assert_allclose(swapped.direction_.vector, -reader.direction_.vector, atol=1e-6)
    np.testing.assert_allclose(swapped.truth_, -reader.truth_, atol=1e-12)


def test_its_two_logistic_regressions_are_those_of_scikit_learn():
    data = Statements(n=80)
    reader = TTPDReader(C=0.5).fit(data.X, data.y, polarity=data.p)

    def logistic():
        return make_pipeline(StandardScaler(), LogisticRegression(C=0.5, solver="newton-cholesky", tol=1e-10))

    polar = logistic().fit(data.X, data.p)
    d = polar[1].coef_[0] / polar[0].scale_
    np.testing.assert_allclose(reader.polarity_, d / np.linalg.norm(d), atol=1e-6)
    plane = np.stack([data.X @ reader.truth_, data.X @ reader.polarity_], axis=1)
    scores = logistic().fit(plane, data.y).decision_function(plane)
    found = reader.decision_function(data.X)
    np.testing.assert_allclose(found / np.std(found), scores / np.std(scores), atol=1e-5)


def test_unequal_numbers_do_not_tilt_the_truth_direction_to_one_polarity():
    data = Statements(n=2000)
    keep = (data.p > 0) | ~data.y | (np.arange(2000) % 8 == 1)  # true negations are rare
    reader = TTPDReader().fit(data.X[keep], data.y[keep], polarity=data.p[keep])
    np.testing.assert_allclose(reader.truth_, data.general, atol=0.12)


def test_truth_and_polarity_that_cannot_be_told_apart_are_refused():
    data = Statements(n=40)
    with pytest.raises(UsageError, match="needs the polarity of each row"):
        TTPDReader().fit(data.X, data.y)
    with pytest.raises(UsageError, match="no row is negated and negative"):
        TTPDReader().fit(data.X, data.y, polarity=np.ones(40))
    with pytest.raises(UsageError, match="no row is negated and positive"):
        TTPDReader().fit(data.X, data.y, polarity=data.y)
    for wrong in (np.array(["yes"] * 40), np.full(40, np.nan), data.p[:-1]):
        with pytest.raises(UsageError, match="polarity must be 40 numbers or bools"):
            TTPDReader().fit(data.X, data.y, polarity=wrong)
