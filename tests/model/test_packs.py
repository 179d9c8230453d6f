"""Plans run every prompt once within their budget, and a forest holds exactly the prompts' prefix trees."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from reprobe.errors import UsageError
from reprobe.model.packs import lay_out, plan_packs

#: Few different tokens, so that random prompts share beginnings, repeat, and are beginnings of each other.
PROMPTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), min_size=1, max_size=40)
PRIMED = st.builds(lambda n, tail: [1] * n + tail, st.integers(200, 700), st.lists(st.integers(0, 9), max_size=9))
LONG = st.lists(PRIMED, min_size=1, max_size=12)
PACKINGS = st.sampled_from(["forest", "padded", "single"])


def flat(prompts):
    tokens = np.concatenate([np.asarray(p, np.int32) for p in prompts])
    return tokens, np.concatenate([[0], np.cumsum([len(p) for p in prompts])])


def layouts(plan, tokens, starts):
    return [lay_out(plan, k, tokens, starts) for k in range(plan.n_packs)]


@settings(deadline=None, max_examples=150)
@given(prompts=PROMPTS | LONG, packing=PACKINGS, budget=st.integers(1, 600))
def test_a_plan_runs_every_prompt_once_within_its_budget(prompts, packing, budget):
    tokens, starts = flat(prompts)
    plan = plan_packs(tokens, starts, packing=packing, budget=budget)
    packs = [plan.pack(k) for k in range(plan.n_packs)]
    assert sorted(np.concatenate(packs).tolist()) == list(range(len(prompts)))
    sizes, computed = plan.size(np.diff(starts)), plan.computed(np.diff(starts))
    for layout, size, n in zip(layouts(plan, tokens, starts), sizes, computed, strict=True):
        assert layout.ids.size == size
        assert layout.real.sum() == n
        assert len(layout.ids) == 1 or layout.ids.size <= budget
    if packing == "single":
        assert all(len(p) == 1 for p in packs)
    longest = [layout.ids.shape[1] for layout in layouts(plan, tokens, starts)]
    assert longest == sorted(longest, reverse=True), "the pack that needs the most memory comes first"


@settings(deadline=None, max_examples=150)
@given(prompts=PROMPTS | LONG, packing=PACKINGS, budget=st.integers(1, 600))
def test_each_token_sees_exactly_its_own_prompts_tokens_before_it(prompts, packing, budget):
    tokens, starts = flat(prompts)
    plan = plan_packs(tokens, starts, packing=packing, budget=budget)
    for k, layout in enumerate(layouts(plan, tokens, starts)):
        columns = layout.ids.shape[1]
        query, key = np.arange(columns)[:, None], np.arange(columns)[None]
        for i, p in enumerate(plan.pack(k)):
            at = layout.at[layout.starts[i] : layout.starts[i + 1]]
            row, path = at // columns, at % columns
            assert len(set(row)) == 1
            assert layout.ids.ravel()[at].tolist() == prompts[p]
            assert layout.real.ravel()[at].all()
            if layout.ends is None:
                assert path.tolist() == list(range(len(path))), "rows of one prompt need no mask"
                continue
            assert layout.positions.ravel()[at].tolist() == list(range(len(at)))
            sees = (query >= key) & (query < layout.ends[row[0]][None])
            for j, place in enumerate(path):
                assert np.flatnonzero(sees[place]).tolist() == sorted(path[: j + 1])
        if layout.ends is not None:
            sees = (query >= key) & (query < layout.ends[:, None])
            assert sees[~layout.real].sum() == (~layout.real).sum(), "padding sees itself alone"


@settings(deadline=None, max_examples=60)
@given(prompts=PROMPTS)
def test_with_room_for_all_every_distinct_beginning_is_computed_once(prompts):
    tokens, starts = flat(prompts)
    plan = plan_packs(tokens, starts, packing="forest", budget=10_000)
    distinct = {tuple(p[: n + 1]) for p in prompts for n in range(len(p))}
    assume(len(distinct) <= 64)
    assert plan.computed(np.diff(starts)).sum() == len(distinct)


def test_beginnings_of_numbers_beyond_32_bits_are_shared_too():
    """Scoring makes a token's number of its id, its role and its prompt."""
    far = 2**32 + 5
    starts = np.array([0, 2, 4, 6])
    plan = plan_packs(np.array([far, 1, 5, 2, far, 3]), starts, packing="forest", budget=100)
    assert plan.shared.sum() == 1


def test_a_long_common_primer_is_shared_by_rows_longer_than_usual():
    rng = np.random.default_rng(0)
    prompts = [[7] * 400 + rng.integers(10, 99, 20).tolist() for _ in range(60)]
    tokens, starts = flat(prompts)
    plan = plan_packs(tokens, starts, packing="forest", budget=512)
    assert plan.computed(np.diff(starts)).sum() < 0.15 * len(tokens)


def test_prompts_without_anything_in_common_run_in_rows_of_like_length():
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 50_000, n).tolist() for n in rng.integers(300, 900, 50)]
    tokens, starts = flat(prompts)
    plan = plan_packs(tokens, starts, packing="forest", budget=4000)
    assert all(layout.ends is None for layout in layouts(plan, tokens, starts))
    assert plan.size(np.diff(starts)).sum() < 1.1 * len(tokens)


@settings(deadline=None, max_examples=60)
@given(prompts=PROMPTS, limit=st.integers(1, 9), packing=PACKINGS)
def test_long_and_short_prompts_never_meet_where_they_must_not(prompts, limit, packing):
    tokens, starts = flat(prompts)
    plan = plan_packs(tokens, starts, packing=packing, budget=300, alone_beyond=limit)
    for k in range(plan.n_packs):
        lengths = [len(prompts[p]) for p in plan.pack(k)]
        assert len(lengths) == 1 or max(lengths) <= limit


@settings(deadline=None, max_examples=30)
@given(prompts=PROMPTS)
def test_a_plan_is_a_function_of_its_arguments(prompts):
    tokens, starts = flat(prompts)
    one, other = (plan_packs(tokens, starts, packing="forest", budget=20) for _ in range(2))
    for name in ("order", "shared", "row_cuts", "pack_cuts"):
        assert np.array_equal(getattr(one, name), getattr(other, name))


def test_what_cannot_be_is_refused():
    tokens, starts = flat([[1, 2]])
    with pytest.raises(UsageError, match="holds no token"):
        plan_packs(tokens, starts, packing="forest", budget=0)
    with pytest.raises(UsageError, match="forest, padded, single"):
        plan_packs(tokens, starts, packing="woods", budget=9)
