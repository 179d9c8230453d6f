import numpy as np
import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from reprobe.errors import UsageError
from reprobe.probing.crossval import group_folds

rows = st.lists(st.tuples(st.sampled_from("abcdefghijklm"), st.booleans()), min_size=8, max_size=60)


@settings(deadline=None, max_examples=80)
@given(rows=rows, n_folds=st.integers(2, 4), seed=st.integers(0, 5), order=st.randoms(use_true_random=False))
def test_no_group_is_split_and_every_side_has_both_classes(rows, n_folds, seed, order):
    groups, labels = np.array([g for g, _ in rows]), np.array([y for _, y in rows])
    try:
        folds = group_folds(groups, labels, n_folds, seed)
    except UsageError:
        reject()
    assert set(folds) == set(range(n_folds))
    for g in set(groups):
        assert len(set(folds[groups == g])) == 1
    for k in range(n_folds):
        assert set(labels[folds == k]) == set(labels[folds != k]) == set(labels)
    shuffled = np.array(order.sample(range(len(rows)), len(rows)))
    np.testing.assert_array_equal(group_folds(groups[shuffled], labels[shuffled], n_folds, seed), folds[shuffled])


def test_folds_are_even_and_drawn_by_the_seed():
    groups, labels = np.arange(300) // 3, np.tile([0, 0, 1], 100)
    a, b, c = (group_folds(groups, labels, 5, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(a, b)
    assert (a != c).any()
    for k in range(5):
        assert (a == k).sum() == 60
        assert labels[a == k].sum() == 20
    uneven = np.random.default_rng(0).integers(0, 40, 300)
    folds = group_folds(uneven, labels, 5, 0)
    assert max(abs(labels[folds == k].mean() - 1 / 3) for k in range(5)) < 0.07


@pytest.mark.parametrize(
    ("groups", "labels", "n_folds", "says"),
    [
        ("aabbcc", [0, 1] * 3, 4, "3 groups cannot make 4 folds"),
        ("abcdef", [0, 0, 0, 0, 0, 1], 2, "only 1 groups hold label 1"),
        ("abcdef", [0, 1] * 3, 1, "at least 2"),
    ],
)
def test_folds_that_cannot_be_are_refused(groups, labels, n_folds, says):
    with pytest.raises(UsageError, match=says):
        group_folds(list(groups), labels, n_folds, 0)
