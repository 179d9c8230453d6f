import numpy as np
import polars as pl
import pytest
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from reprobe.errors import ArtifactExists, CorruptArtifact, UsageError
from reprobe.probing import probe
from reprobe.probing.calibration import Platt
from reprobe.probing.comparison import CHOICES, COLUMNS, Comparison, compare
from reprobe.probing.metrics import calibration_error, recall_at_fpr
from reprobe.probing.reader import TrainingRows
from reprobe.probing.readers import LDAReader, MeanDifference, PCAReader, RandomReader
from reprobe.probing.refit import scores_inside


@pytest.fixture(scope="module")
def store(store_of):
    """Two sites: one with the concept in correlated noise, where whitening pays, and one without it."""
    rng = np.random.default_rng(0)
    n, width = 240, 8
    labels, groups = np.arange(n) % 2, np.arange(n) // 4
    noise = rng.standard_normal((n, width)) @ np.diag([6.0, 3, 1, 1, 1, 1, 1, 1])
    concept = noise + np.outer(labels - 0.5, [1.6, 1.2, 1.2, 0, 0, 0, 0, 0])
    return store_of(
        {"resid.post@0": rng.standard_normal((n, width)), "resid.post@1": concept},
        labels,
        group=groups,
        pair=[f"c{i // 2}" for i in range(n)],
    )


READERS = {"plain": MeanDifference(), "lda": LDAReader(), "random": RandomReader()}


@pytest.fixture(scope="module")
def found(store):
    return compare(store, READERS, folds=4, seed=3)


def test_every_reader_is_probed_on_the_same_rows_in_the_same_folds(found, store):
    for name, grid in found.grids.items():
        alone = probe(store, READERS[name], folds=4, seed=3)
        np.testing.assert_array_equal(grid.oof, alone.oof)
        np.testing.assert_array_equal(grid.fold, found.first.fold)
        lines = found.table.filter(pl.col("reader") == name)
        shared = [c for c in alone.table.columns if c in lines.columns]
        assert lines.select(shared).equals(alone.table.select(shared))
        assert lines["chosen"].sum() == 4
        assert dict(zip(lines["site"], lines["chosen"], strict=True)) == {
            str(site): grid.selected.sites.count(site) for site in grid.sites
        }
    assert found.table.columns == list(COLUMNS)
    assert found.readers == ("plain", "lda", "random")


def test_the_further_metrics_are_those_of_the_held_out_scores(found):
    for name, grid in found.grids.items():
        for j, line in enumerate(found.table.filter(pl.col("reader") == name).iter_rows(named=True)):
            assert line["recall"] == recall_at_fpr(grid.oof[:, j], grid.positive, grid.fold)
            assert line["ece"] == calibration_error(found.platt[name][:, j], grid.positive)
            assert line["recall_low"] <= line["recall"] <= line["recall_high"]
            assert 0 <= line["ece_low"] <= line["ece_high"]


def test_the_choice_of_site_is_in_what_is_told_of_a_reader(found):
    for line in found.choices.iter_rows(named=True):
        grid = found.grids[line["reader"]]
        selected = grid.selected
        assert (line["accuracy"], line["accuracy_low"], line["accuracy_high"], line["auroc"]) == (
            selected.accuracy,
            selected.accuracy_low,
            selected.accuracy_high,
            selected.auroc,
        )
        assert line["ece"] == calibration_error(found.calibrated(line["reader"]).platt, grid.positive)
    assert found.choices.columns == list(CHOICES)
    assert found.choices["sites"][1] == "resid.post@1 ×4"


def test_scores_inside_are_of_readers_that_saw_neither_fold(store):
    X = store.arrays[next(s for s in store.sites if s.layer == 1)].double().numpy()
    positive, fold = np.arange(240) % 2 == 1, (np.arange(240) // 4) % 4
    inside = scores_inside(MeanDifference(), TrainingRows(X, positive, None), fold)
    for k in range(4):
        assert np.isnan(inside[k, fold == k]).all()
        for j in set(range(4)) - {k}:
            kept = (fold != j) & (fold != k)
            reader = MeanDifference().fit(X[kept], positive[kept])
            np.testing.assert_allclose(inside[k, fold == j], reader.decision_function(X[fold == j]), rtol=1e-12)


def test_probabilities_are_scaled_by_rows_outside_the_fold_alone(found, store):
    X = store.arrays[found.first.sites[1]].double().numpy()
    grid = found.grids["lda"]
    inside = scores_inside(LDAReader(), TrainingRows(X, grid.positive, None), grid.fold)
    for k in range(4):
        here = grid.fold == k
        platt = Platt.fit(inside[k, ~here], grid.positive[~here])
        np.testing.assert_allclose(found.platt["lda"][here, 1], platt.probabilities(grid.oof[here, 1]), rtol=1e-6)
        spread = inside[k, ~here].std()
        np.testing.assert_allclose(found.plain["lda"][here, 1], expit(grid.oof[here, 1] / spread), rtol=1e-6)
        # against a stock logistic regression without a penalty (Platt's smoothed targets change little)
        stock = LogisticRegression(C=1e9, tol=1e-10).fit(inside[k, ~here, None], grid.positive[~here])
        np.testing.assert_allclose(
            found.platt["lda"][here, 1], stock.predict_proba(grid.oof[here, 1][:, None])[:, 1], atol=0.02
        )


def test_labels_of_a_held_out_fold_do_not_reach_its_probabilities(store_of):
    rng = np.random.default_rng(5)
    X, labels, groups = rng.standard_normal((120, 6)), np.arange(120) % 2, np.arange(120) // 2

    def probabilities(y):
        made = compare(store_of({"resid.post@0": X}, y, group=groups), [LDAReader()], folds=3, n_jobs=1)
        return made.platt["LDAReader"][:, 0], made.first.fold

    before, fold = probabilities(labels)
    turned = np.isin(groups, groups[fold == 1]) & (groups % 2 == 0)
    after, again = probabilities(np.where(turned, 1 - labels, labels))
    np.testing.assert_array_equal(fold, again)  # a group still has a row of each class
    np.testing.assert_array_equal(before[fold == 1], after[fold == 1])
    assert (before[fold != 1] != after[fold != 1]).all()


def test_differences_are_paired(found):
    line = found.differences.row(by_predicate=(pl.col("reader") == "plain") & (pl.col("other") == "lda"), named=True)
    a, b = (found.grids[name].nested[0] for name in ("plain", "lda"))
    y, fold = found.first.positive, found.first.fold
    assert line["accuracy_difference"] == pytest.approx(((a > 0) == y).mean() - ((b > 0) == y).mean())
    by_fold = [roc_auc_score(y[fold == k], a[fold == k]) - roc_auc_score(y[fold == k], b[fold == k]) for k in range(4)]
    assert line["auroc_difference"] == pytest.approx(np.mean(by_fold))
    assert line["accuracy_difference_high"] < 0, "whitening pays on this store"
    assert len(found.differences) == 3


def test_readers_that_answer_alike_differ_by_nothing_but_not_for_sure(store):
    line = compare(store, {"a": MeanDifference(), "b": MeanDifference()}, sites="resid.post@1").differences.row(
        0, named=True
    )
    assert line["accuracy_difference"] == 0
    assert -0.1 < line["accuracy_difference_low"] < 0 < line["accuracy_difference_high"] < 0.1


def test_differences_of_equal_readers_cover_zero_as_often_as_promised():
    """Two readers that are right equally often, each in its own rows: 95 % of intervals hold 0."""
    from reprobe.probing.comparison import _mean_of
    from reprobe.probing.intervals import ClusterBootstrap

    rng, hits = np.random.default_rng(0), 0
    for b in range(300):
        groups = np.repeat(np.arange(50), 3)
        difficulty = rng.beta(4, 2, 50)[groups]
        right = (rng.random(150) < difficulty).astype(int) - (rng.random(150) < difficulty)
        low, high = ClusterBootstrap.draw(groups, 10_000 + b, 400).bounds(_mean_of(right))
        hits += low <= 0 <= high
    assert 0.915 <= hits / 300 <= 0.985


def test_a_comparison_is_saved_and_read_back(found, tmp_path):
    path = found.save(tmp_path / "c.safetensors")
    again = Comparison.load(path)
    for name in ("table", "choices", "differences"):
        assert getattr(again, name).equals(getattr(found, name))
    for name in found.readers:
        assert again.grids[name].directions == found.grids[name].directions
        np.testing.assert_array_equal(again.platt[name], found.platt[name])
    with pytest.raises(ArtifactExists):
        found.save(path)
    assert found.save(path, overwrite=True).read_bytes() == again.save(tmp_path / "d.safetensors").read_bytes()
    found.first.save(tmp_path / "grid.safetensors")
    with pytest.raises(UsageError, match="holds a probe grid, not a comparison"):
        Comparison.load(tmp_path / "grid.safetensors")
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(CorruptArtifact):
        Comparison.load(path)


def test_the_plot_has_a_line_per_reader(found):
    (axes,) = found.plot().axes
    assert [line.get_label() for line in axes.get_lines()] == ["plain", "lda", "random", "majority class"]
    np.testing.assert_array_equal(axes.get_lines()[1].get_ydata(), found.grids["lda"].table["accuracy"])


def test_readers_are_named_by_their_class_or_by_the_caller(store, found):
    made = compare(store, [MeanDifference(), PCAReader()], sites=["resid.post@1"], folds=3)
    assert made.readers == ("MeanDifference", "PCAReader")
    with pytest.raises(UsageError, match="several readers are a MeanDifference"):
        compare(store, [MeanDifference(), MeanDifference(whiten=True)])
    with pytest.raises(UsageError, match="at least one reader"):
        compare(store, [])
    with pytest.raises(UsageError, match="three at least"):
        compare(store, READERS, folds=2)
    with pytest.raises(UsageError, match="no reader 'pca' was compared; there are plain, lda, random"):
        found.calibrated("pca")
