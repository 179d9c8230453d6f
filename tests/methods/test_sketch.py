"""The top of many streams: exact, whatever the order and the pieces."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from reprobe.errors import UsageError
from reprobe.methods.sketch import TopValues

UNITS = 5
#: Few values, so that many are equal, and the signs of zero and infinities among them.
VALUES = st.sampled_from([-np.inf, -3.5, -1.0, -0.0, 0.0, 1e-30, 0.25, 1.0, 1.0000001, 7.0, np.inf])
STREAMS = arrays.arrays(np.float32, st.tuples(st.integers(1, 40), st.just(UNITS)), elements=VALUES)


def filled(values, keep, cuts=(), order=None):
    """The sketch of the rows of `values`, (tokens, units), added in pieces."""
    top = TopValues(UNITS, keep)
    order = np.arange(len(values)) if order is None else order
    for rows in np.split(order, sorted(cuts)):
        token, unit = np.divmod(np.arange(len(rows) * UNITS), UNITS)
        above = values[rows].ravel() > top.floor[unit]
        top.add(unit[above], rows[token[above]], values[rows].ravel()[above])
    return top


def reference(values, keep):
    """Largest values, falling, and their tokens, smaller ones first among equals."""
    out, at = np.full((UNITS, keep), -np.inf, np.float32), np.full((UNITS, keep), -1)
    for u in range(UNITS):
        order = np.lexsort((np.arange(len(values)), -values[:, u]))
        order = order[values[order, u] > -np.inf][:keep]
        out[u, : len(order)], at[u, : len(order)] = values[order, u], order
    return out, at


@given(STREAMS, st.integers(1, 12), st.lists(st.integers(0, 40), max_size=4), st.randoms())
@settings(max_examples=60, deadline=None)
def test_the_largest_are_those_of_sorting_in_any_order_and_any_pieces(values, keep, cuts, random):
    order = np.arange(len(values))
    random.shuffle(order)
    found, tokens = filled(values, keep, cuts, order).largest()
    expected, at = reference(values, keep)
    assert np.array_equal(found, expected)
    # Which of equal values are kept depends on the floor, below which they need not be added; the values do not.
    whole, whole_at = filled(values, keep).largest()
    assert np.array_equal(whole, expected)
    strictly = whole > whole[:, -1:]
    assert np.array_equal(tokens[strictly], at[strictly])
    assert np.array_equal(whole_at[strictly], at[strictly])


def test_the_threshold_is_exactly_the_quantile_of_many_values():
    rng = np.random.default_rng(0)
    values = rng.standard_t(2, size=(4000, UNITS)).astype(np.float32)
    top = filled(values, 21, cuts=range(100, 4000, 100))
    assert np.array_equal(top.largest()[0][:, -1], np.sort(values, axis=0)[-21])
    assert ((values > top.largest()[0][:, -1]).sum(0) == 20).all()


def test_memory_does_not_grow_with_the_stream():
    rng = np.random.default_rng(0)
    top = TopValues(UNITS, 8)
    for first in range(0, 3000, 100):
        # Rising values: every one is a new largest, the worst that can come.
        values = first + rng.random((100, UNITS)).astype(np.float32)
        token, unit = np.divmod(np.arange(100 * UNITS), UNITS)
        top.add(unit, token + first, values.ravel())
        assert sum(len(key) for _, key in top._pending) <= UNITS * 8 // 2
    assert np.array_equal(np.sort(top.largest()[1], axis=1)[:, 0] >= 2900, np.ones(UNITS, bool))


def test_one_unit_that_gets_all_does_not_disturb_the_others():
    top = TopValues(300, 4)
    top.add(np.arange(300), np.arange(300), np.ones(300, np.float32))
    top.add(np.full(5000, 7), np.arange(5000), np.arange(5000, dtype=np.float32))
    values, tokens = top.largest()
    assert values[7].tolist() == [4999, 4998, 4997, 4996]
    assert tokens[8].tolist() == [8, -1, -1, -1]
    assert top.floor[8] == -np.inf
    assert top.floor[7] == 4996


def test_nan_is_no_value_and_there_is_something_to_keep():
    values = np.array([[np.nan] * UNITS, [1.0] * UNITS], np.float32)
    assert filled(values, 2).largest()[0].tolist() == [[1.0, -np.inf]] * UNITS
    with pytest.raises(UsageError, match="1 or more"):
        TopValues(0, 4)
