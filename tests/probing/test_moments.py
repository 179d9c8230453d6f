"""Moments of parts make the moments of the whole, however they were cut, streamed or subtracted."""

import dataclasses
import itertools
from typing import ClassVar

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from probing.memory import make_index, on_disk
from sklearn.linear_model import Ridge

from reprobe.errors import UsageError
from reprobe.model.sites import Site
from reprobe.probing.crossval import group_folds
from reprobe.probing.moments import (
    ClassMoments,
    JointMoments,
    Moments,
    MomentsAccumulator,
    read_joint_moments,
    read_moments,
)
from reprobe.probing.pair_moments import read_pair_moments
from reprobe.probing.readers import ClusterMean, LDAReader, MeanDifference, PCAReader, RandomReader, RidgeReader
from reprobe.probing.rows import ProbeRows, select_numbers, select_rows
from reprobe.store.batches import Batch


def made_up(n, width=5, seed=0):
    """Rows of very unequal scales, far from zero beside their spread."""
    return np.random.default_rng(seed).standard_normal((n, width)) * np.geomspace(0.01, 100, width) + 1000.0


def same(a, b, rtol=1e-10, size_of=None):
    """a is b, up to `rtol` of the scatter of `size_of` (None: of b)."""
    assert a.n == b.n
    np.testing.assert_allclose(a.mean, b.mean, rtol=rtol)
    size = (size_of or b).scatter
    size = np.sqrt(np.outer(np.diag(size), np.diag(size))) if b.kind == "full" else size
    assert (np.abs(a.scatter - b.scatter) <= rtol * size).all()


@pytest.mark.parametrize("scatter", ["full", "diagonal"])
def test_moments_are_the_count_the_mean_and_the_centred_products(scatter):
    X = made_up(40)
    m = Moments.of(X, scatter)
    covariance = 40 * np.cov(X.T, bias=True)
    same(m, Moments(40, X.mean(axis=0), covariance if scatter == "full" else np.diag(covariance).copy()))
    np.testing.assert_allclose(m.std, X.std(axis=0))
    assert m.kind == scatter


cuts = st.lists(st.integers(0, 60), max_size=6).map(lambda c: [0, *sorted(c), 60])


@settings(max_examples=40, deadline=None)
@given(cuts, st.sampled_from(["full", "diagonal"]), st.integers(0, 100))
def test_moments_streamed_in_any_batches_are_those_of_all_rows_at_once(at, scatter, seed):
    X = made_up(60, seed=seed)
    streamed = MomentsAccumulator(5, scatter)
    for start, stop in itertools.pairwise(at):
        streamed.add(X[start:stop])
    same(streamed.result(), Moments.of(X, scatter))


@settings(max_examples=40, deadline=None)
@given(cuts, st.randoms(use_true_random=False))
def test_moments_merge_in_any_order_and_grouping(at, random):
    X = made_up(60)
    parts = [Moments.of(X[a:b]) for a, b in itertools.pairwise(at)]
    random.shuffle(parts)
    while len(parts) > 1:
        i = random.randrange(len(parts) - 1)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    same(parts[0], Moments.of(X))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 60), st.sampled_from(["full", "diagonal"]))
def test_the_whole_less_a_part_is_the_rest(cut, scatter):
    X = made_up(60)
    whole = Moments.of(X, scatter)
    # a difference is as exact as what it is taken from: the scatter of a single row left over is 0 up to that
    same(whole - Moments.of(X[:cut], scatter), Moments.of(X[cut:], scatter), rtol=1e-8, size_of=whole)


def test_a_result_is_frozen_while_its_accumulator_goes_on():
    X = made_up(20)
    sums = MomentsAccumulator(5).add(X[:12])
    early = sums.result()
    sums.add(X[12:])
    same(early, Moments.of(X[:12]))
    same(sums.result(), Moments.of(X))
    for array in (early.mean, early.scatter):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


def test_tensors_of_half_precision_are_summed_in_double():
    X = torch.tensor(made_up(30), dtype=torch.bfloat16)
    same(Moments.of(X), Moments.of(X.double().numpy()))


def test_class_moments_know_the_pooled_the_total_and_the_joint_scatter():
    X, y = made_up(50), np.arange(50) % 3
    m = ClassMoments.of_rows(X, y, ("a", "b", "c"))
    same(m.total, Moments.of(X))
    pooled = sum((X[y == c] - X[y == c].mean(0)).T @ (X[y == c] - X[y == c].mean(0)) for c in range(3))
    np.testing.assert_allclose(m.within, pooled, rtol=1e-9, atol=1e-9)
    targets = np.array([[1.0, -2.0], [0.5, 0.0], [3.0, 9.0]])
    same(m.joint(targets).joint, JointMoments.of(X, targets[y]).joint, rtol=1e-9)
    half = ClassMoments.of_rows(X[:20], y[:20], ("a", "b", "c"))
    rest = m - half
    for found, c in zip((half + rest).of, range(3), strict=True):
        same(found, Moments.of(X[y == c]), rtol=1e-9)


@pytest.mark.parametrize(
    "reader",
    [
        MeanDifference(),
        MeanDifference(whiten=True),
        ClusterMean(),
        LDAReader(),
        LDAReader(shrinkage=0.2),
        RandomReader(3),
    ],
    ids=str,
)
def test_a_reader_fitted_on_moments_is_the_reader_fitted_on_rows(reader, planted):
    data = planted(n=90)
    y = np.where(np.arange(90) < 80, data.y, 1)  # unequal classes
    moments = ClassMoments.of_rows(data.X, y, (0, 1))
    a, b = type(reader)(**reader.get_params()).fit(data.X, y), reader.fit_moments(moments)
    np.testing.assert_allclose(b.direction_.vector, a.direction_.vector, atol=1e-10)
    assert b.direction_.offset == pytest.approx(a.direction_.offset)
    assert b.direction_.scale == pytest.approx(a.direction_.scale)
    assert b.direction_.classes == a.direction_.classes == (0, 1)
    np.testing.assert_array_equal(a.predict(data.X), b.predict(data.X))


def test_moments_that_cannot_make_a_reader_are_refused():
    X = made_up(9)
    with pytest.raises(UsageError, match="3 classes"):
        MeanDifference().fit_moments(ClassMoments.of_rows(X, np.arange(9) % 3, ("a", "b", "c")))
    with pytest.raises(UsageError, match="no row is of class 'b'"):
        LDAReader().fit_moments(ClassMoments.of_rows(X, np.zeros(9, dtype=int), ("a", "b")))
    with pytest.raises(UsageError, match="scatter='full'"):
        MeanDifference().fit_moments(ClassMoments.of_rows(X, np.arange(9) % 2, ("a", "b"), "diagonal"))
    with pytest.raises(UsageError, match="2 targets"):
        RidgeReader().fit_moments(JointMoments.of(X[:, :3], X[:, 3:]))
    with pytest.raises(UsageError, match="do not mix"):
        Moments.of(X) + Moments.of(X, "diagonal")
    with pytest.raises(UsageError, match="9 rows cannot be taken away from 4"):
        Moments.of(X[:4]) - Moments.of(X)
    with pytest.raises(UsageError, match="not of one kind"):
        ClassMoments.of_rows(X, np.arange(9) % 2, (0, 1)) + ClassMoments.of_rows(X, np.arange(9) % 2, ("a", "b"))
    with pytest.raises(UsageError, match="1 of 9 rows: 4"):
        MomentsAccumulator(5).add(np.where(np.arange(45).reshape(9, 5) == 21, np.nan, X))
    with pytest.raises(UsageError, match=r"width 4, not of shape \(9, 5\)"):
        MomentsAccumulator(4).add(X)
    with pytest.raises(UsageError, match="'full', 'diagonal'"):
        MomentsAccumulator(4, "some")


# From a store.

WANTED = [Site.parse(s) for s in ("resid.post@1", "attn.heads@1.0", "attn.heads@1.3", "final")]
ROWS = 97


def values(width):
    return made_up(ROWS, width, seed=width).astype(np.float32)


def written(path, holes=(), **columns):
    """A store of made-up rows, of which each tenth has no label; `final` is infinite in the rows `holes`."""
    labels = np.random.default_rng(5).integers(2, size=ROWS)
    labels = [None if i % 10 == 9 else bool(label) for i, label in enumerate(labels)]
    index = make_index(labels, group=np.arange(ROWS) // 3, prompt=[f"p{i:03}" for i in range(ROWS)])
    arrays = {Site("resid.post", 1): values(11), Site("attn.heads", 1): values(35), Site("final"): values(11)}
    arrays[Site("final")][list(holes)] = np.inf
    return on_disk(path, arrays, index.with_columns(**columns), shard_rows=20, chunk_rows=5)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return written(tmp_path_factory.mktemp("moments") / "s.reprobe")


@pytest.mark.parametrize("memory", [2 << 30, 8 * 6 * 11 * 11], ids=["all sites at once", "one site at a time"])
def test_moments_read_from_a_store_in_batches_are_those_of_the_rows_of_each_fold_and_class(store, memory):
    rows = select_rows(store.index)
    fold = group_folds(rows.groups, rows.positive, 3, seed=0)
    found = list(read_moments(store, WANTED, rows, fold=fold, batch_rows=16, memory=memory))
    assert [f.site for f in found] == WANTED
    for site, moments in found:
        X = store.read(site, rows.rows).double().numpy()
        for k in range(3):
            for c in (0, 1):
                same(moments.folds[k].of[c], Moments.of(X[(fold == k) & (rows.positive == c)]))
                same(moments.without(k).of[c], Moments.of(X[(fold != k) & (rows.positive == c)]), rtol=1e-9)
        a = LDAReader().fit_moments(moments.without(1)).direction_
        b = LDAReader().fit(X[fold != 1], rows.positive[fold != 1]).direction_
        np.testing.assert_allclose(a.vector, b.vector, atol=1e-7)
        assert a.classes == (False, True)


def test_the_order_of_the_probed_rows_is_nothing_to_the_moments(store):
    rows = select_rows(store.index)
    order = np.random.default_rng(0).permutation(len(rows))
    mixed = dataclasses.replace(rows, rows=rows.rows[order], positive=rows.positive[order])
    a, b = (next(read_moments(store, WANTED[:1], r, scatter="diagonal")).moments for r in (rows, mixed))
    for i in (0, 1):
        same(a.total.of[i], b.total.of[i], rtol=1e-12)


#: Pairs of two rows and of four, near and far apart in the store; the last row has none.
PAIRS = [f"c{i % 29 // 2:02}" for i in range(58)] + [f"d{i // 2:02}" for i in range(58, 94)] + ["e", "e", None]
PAIRED = {
    "label": pl.Series([i < 29 if i < 58 else i % 2 == 0 for i in range(ROWS)]),
    "pair": pl.Series(PAIRS, dtype=pl.String),
    "group": pl.Series([None] * ROWS, dtype=pl.String),
}
BOTH = pl.col("pair").is_not_null()


@pytest.fixture(scope="module")
def paired(tmp_path_factory):
    return written(tmp_path_factory.mktemp("pairs") / "s.reprobe", **PAIRED)


@pytest.mark.parametrize("batch_rows", [5, 16, 1000])
@pytest.mark.parametrize("compat", [None, "repeng"])
def test_the_axis_of_pairs_streamed_from_a_store_is_that_of_the_rows(batch_rows, compat, paired):
    rows = select_rows(paired.index, where=BOTH)
    fold = group_folds(rows.groups, rows.positive, 3, seed=0)
    for site, moments in read_pair_moments(paired, WANTED, rows, fold=fold, batch_rows=batch_rows):
        X = paired.read(site, rows.rows).double().numpy()
        for kept, found in [(np.full(len(fold), True), moments.total)] + [
            (fold != k, moments.without(k)) for k in range(3)
        ]:
            codes = np.unique(rows.pairs[kept], return_inverse=True)[1]
            same(found.rows, Moments.of(X[kept]), rtol=1e-9)
            differences = np.stack(
                [
                    X[kept][(codes == c) & rows.positive[kept]].mean(axis=0)
                    - X[kept][(codes == c) & ~rows.positive[kept]].mean(axis=0)
                    for c in range(codes.max() + 1)
                ]
            )
            same(found.difference, Moments.of(differences), rtol=1e-9, size_of=Moments.of(X))
            a = PCAReader(compat=compat).fit_moments(found)
            b = PCAReader(compat=compat).fit(X[kept], rows.positive[kept], pairs=codes)
            turn = np.sign(a.direction_.vector @ b.direction_.vector)
            np.testing.assert_allclose(a.direction_.vector, turn * b.direction_.vector, atol=1e-10)
            assert a.direction_.offset == pytest.approx(turn * b.direction_.offset, rel=1e-10)
            assert a.direction_.scale == pytest.approx(b.direction_.scale, rel=1e-8)
            assert a.direction_.vector @ differences.mean(axis=0) >= 0, "its sign is that of the mean difference"
            if turn < 0:  # more pairs on one side, and a mean on the other
                assert (differences @ b.direction_.vector > 0).mean() >= 0.5
            assert a.direction_.classes == (False, True)


def test_the_axis_of_class_moments_is_that_of_all_differences(planted):
    data = planted(n=30, width=6)
    y = np.arange(30) % 3 == 0
    moments = ClassMoments.of_rows(data.X, y.astype(int), ("no", "yes"))
    every = (data.X[y][:, None] - data.X[~y][None]).reshape(-1, 6)
    for compat, spread in ((None, every), ("repeng", every - every.mean(axis=0))):
        reader = PCAReader(compat=compat).fit_moments(moments)
        d = reader.direction_
        axis = np.linalg.svd(spread)[2][0]
        np.testing.assert_allclose(d.vector, axis * np.sign(axis @ every.mean(axis=0)), atol=1e-10)
        assert d.offset == pytest.approx(data.X.mean(axis=0) @ d.vector)
        assert d.scale == pytest.approx(np.std(data.X @ d.vector))
        assert "every positive with every negative row (200 differences)" in d.sign
        assert set(reader.predict(data.X)) <= {"no", "yes"}
    clear = planted(n=200, strength=8.0)
    reader = PCAReader().fit_moments(ClassMoments.of_rows(clear.X, clear.y, (0, 1)))
    matched = PCAReader().fit(clear.X, clear.y)
    assert reader.direction_.vector @ matched.direction_.vector > 0.99
    assert reader.direction_.vector @ clear.axis > 0.99


def test_ridge_of_numbers_streamed_from_a_store_is_ridge_of_the_rows(paired, tmp_path):
    rng = np.random.default_rng(3)
    numbers = pl.Series([None if i % 10 == 9 else float(rng.normal()) for i in range(ROWS)])
    store = written(tmp_path / "s.reprobe", score=numbers)
    rows = select_numbers(store.index, label="score")
    assert len(rows) == ROWS - 9
    fold = group_folds(rows.groups, np.zeros(len(rows)), 3, seed=0)
    for memory in (2 << 30, 8 * 3 * 12 * 12):
        for site, moments in read_joint_moments(store, WANTED, rows, fold=fold, batch_rows=16, memory=memory):
            X = store.read(site, rows.rows).double().numpy()
            for kept, found in ((fold >= 0, moments.total), (fold != 1, moments.without(1))):
                a = RidgeReader(alpha=10.0).fit_moments(found)
                b = RidgeReader(alpha=10.0).fit(X[kept], rows.values[kept])
                np.testing.assert_allclose(a.direction_.vector, b.direction_.vector, atol=1e-9)
                np.testing.assert_allclose(a.predict(X), b.predict(X), rtol=1e-8, atol=1e-10)
    classes = RidgeReader(alpha=10.0).fit_moments(
        next(read_moments(paired, WANTED[:1], select_rows(paired.index))).moments.total.joint(np.array([[-1.0], [1.0]]))
    )
    X = paired.read(WANTED[0]).double().numpy()
    wanted = Ridge(alpha=10.0).fit(X, np.where(paired.index["label"], 1.0, -1.0))
    np.testing.assert_allclose(classes.coef_, wanted.coef_, atol=1e-9)


def test_pairs_and_numbers_that_are_none_are_refused(store, paired, tmp_path):
    def streamed(where=BOTH, fold=None, source=paired):
        return list(read_pair_moments(source, WANTED, select_rows(source.index, where=where), fold=fold))

    with pytest.raises(UsageError, match=r"1 rows have no pair, e.g. prompt 'p096', and PCAReader reads pairs"):
        streamed(where=pl.col("row") >= 0)
    with pytest.raises(UsageError, match="the rows have no pairs, and PCAReader reads pairs"):
        streamed(source=store, where=pl.col("row") >= 0)
    with pytest.raises(UsageError, match=r"1 pairs have rows of one label only, e.g. that of prompt 'p028'"):
        streamed(where=BOTH & (pl.col("row") != 57))
    with pytest.raises(UsageError, match="the folds part a pair"):
        streamed(fold=np.arange(96) % 2)
    holes = written(tmp_path / "s.reprobe", holes=(31,), **PAIRED)
    with pytest.raises(UsageError, match=r"final: NaN or infinity in 1 of rows 0–95: 31"):
        streamed(source=holes)
    moments = ClassMoments.of_rows(made_up(9), np.arange(9) % 2, (0, 1))
    with pytest.raises(UsageError, match="moments do not show"):
        PCAReader(compat="repe").fit_moments(moments)
    with pytest.raises(UsageError, match="scatter='full'"):
        PCAReader().fit_moments(ClassMoments.of_rows(made_up(9), np.arange(9) % 2, (0, 1), "diagonal"))
    with pytest.raises(UsageError, match="3 classes"):
        PCAReader().fit_moments(ClassMoments.of_rows(made_up(9), np.arange(9) % 3, (0, 1, 2)))
    with pytest.raises(UsageError, match="no main axis"):
        PCAReader().fit_moments(ClassMoments.of_rows(np.ones((9, 4)) / 3, np.arange(9) % 2, (0, 1)))
    with pytest.raises(UsageError, match="column 'prompt' holds String, not numbers"):
        select_numbers(store.index, label="prompt")
    spoilt = store.index.with_columns(score=pl.when(pl.col("row") == 4).then(np.inf).otherwise(1.0))
    with pytest.raises(UsageError, match=r"'score' is inf in row 4 \(prompt 'p004'\)"):
        select_numbers(spoilt, label="score")


def test_moments_hold_no_more_than_the_memory_they_may():
    class Counting:
        """Stands for a store; notes which sites are read side by side."""

        together: ClassVar[list[list[Site]]] = []

        def width(self, site):
            return 11

        def iter(self, sites, *, batch_rows, rows, shuffle=None):
            self.together.append(list(sites))
            yield Batch(rows, {s: torch.from_numpy(values(11))[rows] for s in sites})

    n = np.arange(20)
    names = tuple(map(str, n))
    rows = ProbeRows(n, n % 2 == 0, n, None, names, (False, True), names, "", "")
    sites = [Site("resid.post", i) for i in range(5)]
    one = 8 * 2 * 11 * 11
    assert len(list(read_moments(Counting(), sites, rows, memory=2 * one + 7))) == 5
    assert [len(t) for t in Counting.together] == [2, 2, 1]
    with pytest.raises(UsageError, match=r"resid\.post@0: the moments of all folds and classes take"):
        list(read_moments(Counting(), sites, rows, memory=one - 1))


def test_rows_that_are_not_finite_are_refused_by_site_and_number(tmp_path):
    store = written(tmp_path / "s.reprobe", holes=(31, 47))
    rows = select_rows(store.index)
    assert list(read_moments(store, WANTED[:1], rows))
    with pytest.raises(UsageError, match=r"final: NaN or infinity in 2 of rows 0–96: 31, 47"):
        list(read_moments(store, WANTED, rows))
