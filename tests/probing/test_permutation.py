import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest

from reprobe.errors import UsageError
from reprobe.probing.crossval import group_folds
from reprobe.probing.metrics import fold_aurocs
from reprobe.probing.permutation import Exchange, MeanDifferenceRefit, permutation_test
from reprobe.probing.reader import TrainingRows
from reprobe.probing.readers import MeanDifference


def grouped_rows(seed, n_groups=40, sites=6, width=8, strength=0.0):
    """Rows in groups of two, with what a group's rows share; one label per group; the last site holds the concept."""
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(n_groups), 2)
    positive = rng.permutation(n_groups)[groups] % 2 == 1
    X = [
        rng.standard_normal((n_groups, width))[groups] + rng.standard_normal((2 * n_groups, width))
        for _ in range(sites)
    ]
    X[-1] = X[-1] + strength * positive[:, None] / np.sqrt(width)
    folds = group_folds(groups, positive, 4, seed)
    return X, positive, groups, folds


def run(seed, *, permutations=99, **kinds):
    X, positive, groups, folds = grouped_rows(seed, **kinds)
    return permutation_test(
        MeanDifferenceRefit(X, folds), positive, groups, folds=folds, permutations=permutations, seed=seed
    )


@pytest.mark.parametrize("order", [0, 1])
def test_the_closed_form_gives_the_scores_of_the_reader(order):
    X, positive, groups, folds = grouped_rows(3)
    labels = positive if order == 0 else next(Exchange.of(positive, groups).draws(1, 0))
    found = MeanDifferenceRefit(X, folds)(labels)
    for j, rows in enumerate(X):
        for k in range(4):
            train, test = folds != k, folds == k
            reader = MeanDifference().fit_rows(TrainingRows(rows[train], labels[train], None))
            np.testing.assert_allclose(found[test, j], reader.direction_.score(rows[test]), atol=1e-10)


def test_p_is_uniform_and_errors_are_at_most_alpha_where_labels_mean_nothing():
    results = [run(seed) for seed in range(100)]
    p = np.array([r.p for r in results])
    # p of the search takes the values 1/100 … 1: a uniform spread over the step makes it continuous
    smooth = p - np.random.default_rng(0).random(100) / 100
    assert kstest(smooth, "uniform").pvalue > 0.01
    assert (p <= 0.05).sum() <= 10  # family-wise, over six sites: 5 expected, 11 would be at the 1 % level
    assert np.mean([r.single.min() <= 0.05 for r in results]) > 0.12, "without the maximum, the search is not paid for"


def test_a_planted_concept_is_found_at_its_site_and_only_there():
    found = [run(seed, strength=3.0) for seed in range(10)]
    assert np.mean([r.p <= 0.05 for r in found]) >= 0.9
    assert np.mean([r.adjusted[-1] == r.p for r in found]) >= 0.9
    assert np.mean([(r.adjusted[:-1] <= 0.05).any() for r in found]) <= 0.2


def test_shuffling_rows_instead_of_groups_would_find_what_is_not_there():
    by_group = by_row = 0
    for seed in range(30):
        X, positive, groups, folds = grouped_rows(seed, n_groups=30)
        rows = [np.repeat(x[::2], 4, axis=0) for x in X]  # groups of four equal rows
        folds, positive, groups = (np.repeat(v[::2], 4) for v in (folds, positive, groups))
        refit = MeanDifferenceRefit(rows, folds)
        by_group += permutation_test(refit, positive, groups, folds=folds, permutations=39, seed=seed).p <= 0.05
        alone = np.arange(len(positive))
        by_row += permutation_test(refit, positive, alone, folds=folds, permutations=39, seed=seed).p <= 0.05
    assert by_group <= 5  # 1.5 expected
    assert by_row >= 10


def test_pairs_are_swapped_and_a_true_difference_inside_pairs_is_found():
    rng = np.random.default_rng(0)
    pairs, positive = np.arange(80) // 2, np.arange(80) % 2 == 1
    shared = 5 * rng.standard_normal((40, 9))[pairs]
    X = shared + rng.standard_normal((80, 9)) + 0.8 * positive[:, None]
    folds = pairs % 4
    found = permutation_test(
        MeanDifferenceRefit([X], folds),
        positive,
        pairs,
        pairs,
        statistic=lambda s, y: np.array([((s[1::2] > s[::2]) == y[1::2, None]).mean()]),
        folds=folds,
        permutations=199,
    )
    assert found.rule == "the sides of all pairs of a group are swapped together (40 groups)"
    assert found.p <= 0.01


@st.composite
def designs(draw):
    rng = np.random.default_rng(draw(st.integers(0, 100_000)))
    n_groups = draw(st.integers(4, 12))
    groups = np.concatenate([np.arange(n_groups), rng.integers(0, n_groups, draw(st.integers(0, 40)))])
    kind = rng.integers(0, 2, n_groups)  # 0: one label for the group, 1: mixed
    positive = np.where(kind[groups] == 0, rng.integers(0, 2, n_groups)[groups], rng.integers(0, 2, len(groups))) == 1
    return groups, positive, rng.integers(0, 3, n_groups)[groups]


@given(designs(), st.integers(0, 100))
@settings(max_examples=80, deadline=None)
def test_labels_are_only_exchanged_where_the_null_allows_it(design, seed):
    groups, positive, folds = design
    try:
        exchange = Exchange.of(positive, groups, folds=folds)
    except UsageError:
        for f in np.unique(folds):  # nothing could move: one label in every group and fold
            assert len(set(positive[folds == f].tolist())) == 1
        return
    for labels in exchange.draws(5, seed):
        for g in np.unique(groups):
            inside = groups == g
            if positive[inside].all() or not positive[inside].any():
                assert len(set(labels[inside].tolist())) == 1
            else:
                assert labels[inside].sum() == positive[inside].sum()
        for f in np.unique(folds):
            whole = [g for g in np.unique(groups[folds == f]) if len(set(positive[groups == g].tolist())) == 1]
            before, after = ([bool(y[groups == g][0]) for g in whole] for y in (positive, labels))
            assert sum(before) == sum(after)


def test_every_way_to_exchange_is_used_at_once_and_told():
    #                pairs            one label    mixed without pairs
    groups = np.array([0, 0, 1, 1, 1, 1, 2, 2, 3, 3, 4, 4, 4])
    pairs = np.array([0, 0, 1, 1, 2, 2, -1, -1, -1, -1, -1, -1, -1])
    positive = np.array([0, 1, 0, 1, 1, 0, 1, 1, 0, 0, 1, 0, 0]) == 1
    exchange = Exchange.of(positive, groups, pairs)
    assert exchange.rule == (
        "the sides of all pairs of a group are swapped together (2 groups); labels of whole groups are exchanged "
        "(2 groups); labels are shuffled inside each group (1 groups)"
    )
    seen = {tuple(labels.astype(int)) for labels in exchange.draws(400, 0)}
    assert len(seen) == 2 * 2 * 2 * 3
    assert {s[2:6] for s in seen} == {(0, 1, 1, 0), (1, 0, 0, 1)}


def test_p_counts_what_is_at_least_as_good_and_is_never_zero():
    positive, groups = np.arange(8) % 2 == 1, np.arange(8)
    perfect = permutation_test(lambda y: np.stack([y, 0 * y], axis=1) * 1.0, positive, groups, permutations=19)
    assert perfect.p == 1  # a reader that fits anything is no evidence
    np.testing.assert_array_equal(perfect.observed, [1, 0.5])
    fixed = permutation_test(lambda y: positive[:, None] * 1.0, positive, groups, permutations=199)
    again = sum((labels == positive).all() for labels in Exchange.of(positive, groups).draws(199, 0))
    assert fixed.p == (1 + again) / 200 == fixed.single[0]
    assert len(fixed.rows) == 64
    assert fixed.rows != permutation_test(lambda y: y[:, None] * 1.0, ~positive, groups, permutations=1).rows


def test_what_cannot_be_permuted_is_refused():
    one = np.ones(6, dtype=bool)
    with pytest.raises(UsageError, match="nothing to permute"):
        permutation_test(lambda y: y[:, None], one, np.arange(6))
    with pytest.raises(UsageError, match="0 permutations"):
        permutation_test(lambda y: y[:, None], np.arange(6) < 3, np.arange(6), permutations=0)
    refit = MeanDifferenceRefit([np.eye(4)], np.array([0, 0, 1, 1]))
    with pytest.raises(UsageError, match="one class without a training row"):
        refit(np.array([True, True, False, False]))


def test_a_site_without_any_difference_scores_at_chance():
    labels, folds = np.arange(8) % 2 == 1, np.arange(8) // 4
    scores = MeanDifferenceRefit([np.ones((8, 3))], folds)(labels)
    assert fold_aurocs(scores, labels, folds) == 0.5
