"""No group of a tested row is ever in what was fitted: folds, nested choices, scaling, transfer."""

import numpy as np
import polars as pl
import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from reprobe.errors import UsageError
from reprobe.model.sites import Site
from reprobe.probing.classes import probe_classes
from reprobe.probing.comparison import compare
from reprobe.probing.controlled import with_controls
from reprobe.probing.grid import probe
from reprobe.probing.reader import Plane, Reader
from reprobe.probing.readers import AttentionReader, LogisticReader, MeanDifference, MultiClassReader, PCAReader
from reprobe.probing.sequences import probe_sequences
from reprobe.probing.transfer import transfer


class Remembers(Reader):
    """Scores a row above 0 if, and only if, its group was among the rows it was fitted on.

    Rows are one-hot codes of their groups (see `coded`), so a normal with a component per group seen does that.
    """

    def _fit_plane(self, rows):
        return Plane((rows.X > 0.5).any(axis=0).astype(float), 1e-3, "remembers")


def coded(groups, width):
    """One-hot codes, every second row a little longer: a direction needs rows that differ along it."""
    return np.eye(width)[groups] * (1 + 0.1 * (np.arange(len(groups)) % 2))[:, None]


@st.composite
def datasets(draw):
    """Groups of unequal size, some joined by pairs; labels as they come."""
    rng = np.random.default_rng(draw(st.integers(0, 100_000)))
    n_groups = draw(st.integers(12, 30))
    groups = np.concatenate([np.repeat(np.arange(n_groups), 2), rng.integers(0, n_groups, draw(st.integers(0, 60)))])
    labels = np.concatenate([np.tile([0, 1], n_groups), rng.integers(0, 2, len(groups) - 2 * n_groups)])
    paired = draw(st.booleans())
    pairs = [f"c{p}" if p < n_groups else None for p in rng.integers(0, 4 * n_groups, len(groups))] if paired else None
    order = rng.permutation(len(groups))
    pairs = pairs and [pairs[i] for i in order]
    return groups[order], labels[order], pairs, int(rng.integers(2**31))


@given(datasets(), st.integers(2, 5))
@settings(max_examples=25, deadline=None)
def test_a_reader_that_remembers_groups_recognises_none_in_a_grid(store_of, case, folds):
    groups, labels, pairs, seed = case
    store = store_of({"resid.post@0": coded(groups, 30)}, labels, group=groups, pair=pairs)
    try:
        grid = probe(store, Remembers(), folds=folds, seed=seed, n_jobs=1)
    except UsageError as error:
        # Pairs joined too many groups, or what is remembered of a fold's rows is alike for all of them.
        if "fold" not in str(error) and "positive scale" not in str(error):
            raise
        reject()
    assert (grid.oof < 0).all()
    # Every inner prediction is "negative" as well, so the inner accuracy is the share of negative rows outside.
    for k in range(folds if folds > 2 else 0):
        assert grid.inner[k, 0] == pytest.approx(1 - grid.positive[grid.fold != k].mean())
    assert grid.directions[Site("resid.post", 0)].score(coded(groups, 30)).min() > 0, "it does remember"


@given(datasets(), datasets(), st.integers(2, 3), st.booleans())
@settings(max_examples=25, deadline=None)
def test_a_reader_that_remembers_groups_recognises_none_after_transfer(store_of, one, other, folds, shared):
    stores = {}
    for name, (groups, labels, pairs, _), offset in (("a", one, 0), ("b", other, 0 if shared else 30)):
        named = groups + offset
        store = store_of({"resid.post@0": coded(named, 60)}, labels, group=named, pair=pairs)
        store.index = store.index.with_columns(prompt=pl.lit(name) + pl.col("prompt"))
        stores[name] = store
    try:
        grid = transfer(stores, Remembers(), folds=folds, seed=one[3], n_jobs=1)
    except UsageError as error:
        if "fold" not in str(error) and "share so many groups" not in str(error):
            raise
        reject()
    for line in grid.table.iter_rows(named=True):
        negative = 1 - stores[line["test"]].index["label"].mean()
        assert line["accuracy"] == pytest.approx(negative)  # it recognised no row
        if line["train"] != line["test"]:
            assert (line["left_out"] > 0) == shared


@pytest.mark.parametrize("reader", [MeanDifference(), PCAReader(), LogisticReader()], ids=str)
def test_no_statistic_of_a_held_out_row_reaches_what_judges_its_fold(reader, store_of, planted):
    data, other = planted(n=80, width=9), planted(n=80, width=9, seed=5)
    groups = np.arange(80) // 2
    before = probe(store_of({"resid.post@0": data.X, "resid.post@1": other.X}, data.y, group=groups), reader)
    k = 2
    held_out = np.flatnonzero(before.fold == k)
    moved = data.X.copy()
    changed = held_out[:2]
    assert (before.rows == np.arange(80)).all()
    moved[changed] = 1e3 * moved[changed] - 70  # would change any mean, scale or choice that it enters
    after = probe(store_of({"resid.post@0": moved, "resid.post@1": other.X}, data.y, group=groups), reader)
    np.testing.assert_array_equal(after.oof[held_out[2:]], before.oof[held_out[2:]])
    np.testing.assert_array_equal(after.inner[k], before.inner[k])
    assert after.selected.sites[k] == before.selected.sites[k]
    elsewhere = before.fold != k
    assert (after.oof[elsewhere, 0] != before.oof[elsewhere, 0]).any(), "where it may be used, it is"


class NeedsGroups(MeanDifference):
    """Refuses rows that do not say their groups: whatever it splits further would part them."""

    def _fit_plane(self, rows):
        if rows.groups is None or len(rows.groups) != len(rows.X):
            raise UsageError("rows without groups")
        return super()._fit_plane(rows)


def test_readers_that_split_their_rows_further_are_told_the_groups_wherever_they_are_fitted(store_of, planted):
    data, other = planted(n=80, width=9), planted(n=80, width=9, seed=5)
    one, two = (
        store_of({"resid.post@0": d.X}, d.y, group=np.arange(80) // 4, prompt=[f"{name}{i:02}" for i in range(80)])
        for name, d in (("a", data), ("b", other))
    )
    reader = NeedsGroups()
    compare(one, [reader], folds=3, n_jobs=1)
    transfer({"one": one, "two": two}, reader, folds=3, n_jobs=1)
    grid = probe(one, reader, folds=3, n_jobs=1)
    with_controls(grid, one, reader, permutations=3, mdl=True, n_jobs=1)
    with pytest.raises(UsageError, match="rows without groups"):
        reader.fit(data.X, data.y)


def unseen(fit):
    """What `fit` gives; another example where it rightly refuses: pairs have joined too many groups for the folds, or
    every group of the training rows holds as many of one class as of the other, so that nothing tells them apart."""
    try:
        return fit()
    except UsageError as error:
        if "fold" not in str(error) and "do not differ" not in str(error):
            raise
        reject()


@given(datasets(), st.integers(2, 4))
@settings(max_examples=15, deadline=None)
def test_a_feature_that_marks_one_group_is_worth_nothing_to_several_classes(store_of, case, folds):
    """In one-hot codes of groups, a held-out row is zero wherever training rows vary: all score alike."""
    groups, labels, pairs, seed = case
    labels = labels + (np.random.default_rng(seed).random(len(labels)) < 0.4)
    store = store_of({"resid.post@0": coded(groups, 30)}, labels, group=groups, pair=pairs)
    reader = MultiClassReader(MeanDifference())
    grid = unseen(lambda: probe_classes(store, reader, folds=folds, seed=seed, n_jobs=1))
    for k in range(folds):
        scores = grid.scores[grid.fold == k, 0]
        np.testing.assert_allclose(scores, np.broadcast_to(scores[0], scores.shape), atol=1e-5)


@given(datasets(), st.integers(2, 4), st.sampled_from(["mean", "last", "max"]))
@settings(max_examples=15, deadline=None)
def test_a_feature_that_marks_one_group_is_worth_nothing_to_sequences(store_of, case, folds, pooling):
    groups, labels, _, seed = case
    tokens = np.repeat(np.arange(len(groups)), 3)
    store = store_of(
        {"resid.post@0": coded(groups, 30)[tokens]},
        labels[tokens],
        group=groups[tokens],
        prompt=[f"p{t:04}" for t in tokens],
    )
    reader = AttentionReader(pooling=pooling)
    grid = unseen(lambda: probe_sequences(store, reader, folds=folds, seed=seed, n_jobs=1))
    for k in range(folds):
        scores = grid.oof[grid.fold == k, 0]
        np.testing.assert_allclose(scores, np.broadcast_to(scores[0], scores.shape), atol=1e-4)


def test_on_null_data_the_nested_choice_is_unbiased_and_the_best_site_is_not(store_of):
    """Over 24 data sets of 20 sites: bias within what 24 data sets can show, the maximum far above."""
    nested, naive = _null_results(store_of, range(24))
    assert abs(nested.mean() - 0.5) < 0.005 + 2.6 * nested.std() / np.sqrt(24)
    assert naive.mean() - 0.5 > 0.08


@pytest.mark.slow
def test_the_nested_choice_is_unbiased_to_half_a_point(store_of):
    nested, naive = _null_results(store_of, range(1000, 3000))
    assert nested.std() / np.sqrt(len(nested)) < 0.0017
    assert abs(nested.mean() - 0.5) < 0.005
    assert naive.mean() - 0.5 > 0.08


def _null_results(store_of, seeds):
    nested, naive = [], []
    for seed in seeds:
        rng = np.random.default_rng(seed)
        arrays = {f"resid.post@{i}": rng.standard_normal((80, 6)) for i in range(20)}
        labels = rng.permutation(np.arange(80) % 2)
        grid = probe(store_of(arrays, labels, group=np.arange(80) // 2), MeanDifference(), seed=seed, n_jobs=1)
        nested.append(grid.selected.accuracy)
        naive.append(grid.best().metrics["accuracy"])
    return np.array(nested), np.array(naive)
