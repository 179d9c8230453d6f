import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reprobe.errors import UsageError
from reprobe.probing.controls import SCHEDULE, online_code, reader_probabilities, selectivity
from reprobe.probing.permutation import MeanDifferenceRefit
from reprobe.probing.readers import LogisticReader, MeanDifference


def test_a_probe_that_learns_types_by_heart_has_no_selectivity_and_one_that_reads_a_concept_has():
    rng = np.random.default_rng(0)
    types = np.tile(np.arange(30), 8)  # thirty words, each in eight sentences
    folds = np.repeat(np.arange(8), 30) % 4
    by_word = (np.arange(30) % 2 == 1)[types]
    identity = np.eye(30)[types] + 0.01 * rng.standard_normal((240, 30))  # says which word it is
    concept = by_word[:, None] * 4.0 + rng.standard_normal((240, 1))  # says which class it is
    found = selectivity(MeanDifferenceRefit([identity, concept], folds), by_word, types, folds)
    assert found.accuracy[0] > 0.99
    assert found.control[0] > 0.9
    assert found.accuracy[1] > 0.95
    assert found.control[1] < 0.65
    assert found.selectivity[1] > 0.3 > 0.1 > found.selectivity[0]
    np.testing.assert_array_equal(found.selectivity, found.accuracy - found.control)
    again = selectivity(MeanDifferenceRefit([identity, concept], folds), by_word, types.astype(str), folds)
    assert again.control_spread.shape == (2,)
    np.testing.assert_array_equal(again.accuracy, found.accuracy)


def test_types_that_never_recur_are_no_control():
    groups = np.repeat(np.arange(20), 3)
    refit = MeanDifferenceRefit([np.zeros((60, 2))], groups % 4)
    with pytest.raises(UsageError, match="only 0% of the rows have their type in another fold"):
        selectivity(refit, groups % 2 == 1, groups, groups % 4)


@given(st.integers(0, 10_000), st.integers(3, 40))
@settings(max_examples=60, deadline=None)
def test_no_group_is_coded_by_a_probe_fitted_on_part_of_it_and_every_row_is_coded_once(seed, n_groups):
    rng = np.random.default_rng(seed)
    groups = np.concatenate([np.arange(n_groups), rng.integers(0, n_groups, 60)])
    positive = rng.random(len(groups)) < 0.5
    coded = []

    def probabilities(train, test):
        assert not set(groups[train]) & set(groups[test])
        coded.append(test)
        return np.full(len(test), 0.5)

    code = online_code(probabilities, positive, groups, seed=seed)
    rows = np.concatenate([*coded, []])
    assert len(rows) == len(set(rows)) == len(groups) - code.ends[0]
    assert code.ends[-1] == len(groups) == code.bits == code.uniform_bits
    assert code.compression == 1


def test_the_code_by_hand():
    groups, positive = np.arange(8), np.arange(8) % 2 == 1
    code = online_code(lambda _, test: np.where(positive[test], 0.75, 0.25), positive, groups, schedule=(0.25, 0.5, 1))
    assert code.ends == (2, 4, 8)
    np.testing.assert_allclose(code.block_bits, [2, -2 * np.log2(0.75), -4 * np.log2(0.75)])
    assert code.compression == pytest.approx(8 / (2 - 6 * np.log2(0.75)))


@pytest.mark.parametrize("reader", [MeanDifference(), LogisticReader()], ids=str)
def test_what_is_easy_to_read_compresses_and_noise_does_not(reader, planted):
    easy, hard = planted(n=400, strength=8.0), planted(n=400, strength=0.0)
    codes = [online_code(reader_probabilities(reader, d.X, d.y == 1, d.pairs), d.y == 1, d.pairs) for d in (easy, hard)]
    assert codes[0].compression > 2.5
    assert 0.85 < codes[1].compression < 1.03
    assert len(codes[0].ends) > 5
    assert codes[0].rows == codes[1].rows


def test_before_anything_can_be_held_out_the_share_of_the_classes_is_the_code():
    X, positive, groups = np.arange(6.0)[:, None], np.array([1, 1, 1, 0, 1, 0]) == 1, np.arange(6)
    p = reader_probabilities(MeanDifference(), X, positive, groups)(np.arange(4), np.arange(4, 6))
    np.testing.assert_allclose(p, [4 / 6, 4 / 6])


def test_impossible_codes_are_refused():
    groups, positive = np.arange(8), np.arange(8) % 2 == 1
    for schedule in ((), (0.5, 0.5, 1), (0.1, 0.9), (0, 1)):
        with pytest.raises(UsageError, match="rising to 1"):
            online_code(lambda a, b: np.full(len(b), 0.5), positive, groups, schedule=schedule)
    with pytest.raises(UsageError, match="probability 0"):
        online_code(lambda a, b: np.zeros(len(b)), positive, groups, schedule=(0.5, 1))
    assert SCHEDULE[-1] == 1
