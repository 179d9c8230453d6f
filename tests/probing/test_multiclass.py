"""More than two classes: the readers' rules against scikit-learn, and the table of sites."""

from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
from scipy.stats import ortho_group
from sklearn.base import clone
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.metrics import confusion_matrix, roc_auc_score
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.multiclass import OneVsRestClassifier
from sklearn.neighbors import NearestCentroid
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

from reprobe.errors import UnknownData, UnknownSite, UsageError
from reprobe.model.sites import Site
from reprobe.probing.classes import probe_classes
from reprobe.probing.moments import ClassMoments, read_moments
from reprobe.probing.readers import (
    AttentionReader,
    ClusterMean,
    KSparseReader,
    LDAReader,
    LogisticReader,
    MeanDifference,
    MultiClassReader,
    PCAReader,
    RidgeReader,
    TTPDReader,
)
from reprobe.probing.rows import select_classes

NAMES = np.array(["anger", "fear", "joy", "sadness"])


def emotions(n=160, width=9, strength=3.0, seed=0, classes=4):
    """Unequal classes with means of their own, in correlated noise far from 0."""
    rng = np.random.default_rng(seed)
    means = np.random.default_rng(50).standard_normal((classes, width))
    y = np.sort(np.concatenate([np.arange(n - n // 4) % classes, np.zeros(n // 4, dtype=int)]))
    y = rng.permutation(y)
    noise = rng.standard_normal((n, width)) @ np.random.default_rng(51).standard_normal((width, width)) * 0.5
    return SimpleNamespace(X=noise + strength * means[y] + 20.0, y=y, means=means)


READERS = {
    "nearest": MeanDifference(),
    "whitened": MeanDifference(whiten=True),
    "lda": LDAReader(),
    "ridge": RidgeReader(),
    "logistic": LogisticReader(C=1.0),
    "sparse": KSparseReader(3),
}
every_rule = pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
by_moments = pytest.mark.parametrize(
    "reader", [READERS[k] for k in ("nearest", "whitened", "lda", "ridge")], ids=["nearest", "whitened", "lda", "ridge"]
)


@pytest.mark.parametrize(
    ("reader", "reference"),
    [
        (MeanDifference(), NearestCentroid()),
        (MeanDifference(whiten=True), LinearDiscriminantAnalysis(solver="lsqr", priors=[0.25] * 4)),
        (LDAReader(shrinkage=None), LinearDiscriminantAnalysis(solver="lsqr")),
        (LDAReader(shrinkage=0.3), LinearDiscriminantAnalysis(solver="eigen", shrinkage=0.3)),
        (RidgeReader(alpha=1.0), RidgeClassifier(alpha=1.0)),
        (RidgeReader(alpha=300.0), RidgeClassifier(alpha=300.0)),
        (
            LogisticReader(C=1.0),
            make_pipeline(
                StandardScaler(), OneVsRestClassifier(LogisticRegression(C=1.0, solver="newton-cholesky", tol=1e-10))
            ),
        ),
    ],
    ids=str,
)
def test_predictions_are_those_of_scikit_learn(reader, reference):
    data, test = emotions(strength=1.0), emotions(seed=1, strength=1.0)
    ours, theirs = MultiClassReader(reader).fit(data.X, NAMES[data.y]), reference.fit(data.X, NAMES[data.y])
    found = ours.predict(test.X)
    np.testing.assert_array_equal(found, theirs.predict(test.X))
    assert len(set(found)) == 4
    if isinstance(reader, RidgeReader | LogisticReader):
        np.testing.assert_allclose(ours.scores(test.X), theirs.decision_function(test.X), atol=1e-5)
    elif isinstance(reader, LDAReader):
        wanted = theirs.decision_function(test.X)
        np.testing.assert_allclose(ours.scores(test.X), wanted - wanted.mean(axis=1, keepdims=True), atol=1e-7)


def test_the_scores_of_the_nearest_mean_are_squared_distances():
    data = emotions()
    reader = MultiClassReader(MeanDifference()).fit(data.X, data.y)
    means = np.stack([data.X[data.y == c].mean(axis=0) for c in range(4)])
    likelihood = -((data.X[:, None] - means) ** 2).sum(axis=2) / 2
    np.testing.assert_allclose(reader.scores(data.X), likelihood - likelihood.mean(axis=1, keepdims=True), atol=1e-9)


@every_rule
def test_with_two_classes_it_is_the_binary_reader(reader):
    data = emotions(classes=2)
    many, two = MultiClassReader(reader).fit(data.X, data.y), clone(reader).fit(data.X, data.y)
    np.testing.assert_allclose(many.directions_[1].vector, two.direction_.vector, atol=1e-7)
    if not isinstance(reader, RidgeReader):
        np.testing.assert_array_equal(many.predict(data.X), two.predict(data.X))
        np.testing.assert_allclose(many.directions_[1].score(data.X), two.decision_function(data.X), atol=1e-5)
    np.testing.assert_allclose(many.scores(data.X)[:, 0], -many.scores(data.X)[:, 1], atol=1e-4)
    assert many.decision_function(data.X).shape == (160,)


@every_rule
def test_directions_point_where_the_score_of_their_class_grows(reader):
    data = emotions()
    fitted = MultiClassReader(reader).fit(data.X, NAMES[data.y])
    assert list(fitted.directions_) == NAMES.tolist()
    scores = fitted.scores(data.X)
    for c, (name, d) in enumerate(fitted.directions_.items()):
        np.testing.assert_allclose(d.score(data.X) * np.linalg.norm(fitted.coef_[c]), scores[:, c], atol=1e-7)
        assert d.classes == (f"not {name}", name)
        assert d.reader == type(reader).__name__
        assert d.params == reader.get_params()
        assert d.scale == pytest.approx(np.std(data.X @ d.vector))
        assert scores[data.y == c, c].mean() > scores[data.y != c, c].mean()


@every_rule
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.SkipTestWarning")
def test_scikit_learn_accepts_it(reader):
    check_estimator(MultiClassReader(reader))


def test_searches_and_pipelines_reach_the_reader_inside():
    data = emotions()
    search = GridSearchCV(MultiClassReader(LogisticReader()), {"reader__C": [1e-5, 1.0]}, cv=4, error_score="raise")
    assert search.fit(data.X, data.y).best_params_ == {"reader__C": 1.0}
    pipeline = make_pipeline(StandardScaler(), MultiClassReader(LDAReader()))
    assert cross_val_score(pipeline, data.X, data.y, cv=4, error_score="raise").min() > 0.8


@every_rule
def test_planted_classes_are_read_and_shuffled_labels_are_not(reader):
    true, shuffled = [], []
    for seed in range(12):
        data, test = emotions(seed=seed), emotions(seed=100 + seed)
        true.append(MultiClassReader(reader).fit(data.X, data.y).score(test.X, test.y))
        rng = np.random.default_rng(seed)
        balanced, other = (rng.permutation(np.arange(160) % 4) for _ in range(2))
        shuffled.append(MultiClassReader(reader).fit(data.X, balanced).score(test.X, other))
    half = 4.4 * np.std(shuffled, ddof=1) / np.sqrt(12)  # t of 11 degrees of freedom, 99.9 %
    assert half < 0.06
    assert abs(np.mean(shuffled) - 0.25) < half
    assert min(true) > 0.5


@by_moments
def test_it_is_equivariant_and_moments_in_parts_give_the_same_reader(reader):
    data = emotions()
    a = MultiClassReader(reader).fit(data.X, data.y)
    rotation = ortho_group.rvs(9, random_state=3)
    b = MultiClassReader(reader).fit(data.X @ rotation, data.y)
    np.testing.assert_allclose(b.coef_, a.coef_ @ rotation, atol=1e-8)
    np.testing.assert_allclose(b.scores(data.X @ rotation), a.scores(data.X), atol=1e-7)
    renamed = MultiClassReader(reader).fit(data.X, np.array([2, 0, 3, 1])[data.y])
    np.testing.assert_allclose(renamed.scores(data.X)[:, [2, 0, 3, 1]], a.scores(data.X), atol=1e-9)
    parts = [ClassMoments.of_rows(data.X[s], data.y[s], range(4)) for s in (slice(0, 50), slice(50, 160))]
    c = MultiClassReader(reader).fit_moments(parts[0] + parts[1])
    np.testing.assert_allclose(c.coef_, a.coef_, atol=1e-10)
    np.testing.assert_allclose(c.intercept_, a.intercept_, atol=1e-8)
    assert c.directions_[2].scale == pytest.approx(a.directions_[2].scale)


def test_penalties_are_chosen_across_groups_and_not_by_recognising_them():
    """Many rows of each group, and labels that mean nothing: within groups weak penalties look good."""
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(60), 6)
    y = rng.permutation(np.arange(60) % 3)[groups]
    X = rng.standard_normal((60, 40))[groups] + 0.1 * rng.standard_normal((360, 40))
    reader = LogisticReader(C=[1e-5, 10.0])
    told, untold = (MultiClassReader(reader).fit(X, y, groups=g).coef_ for g in (groups, None))
    for c in range(3):
        np.testing.assert_allclose(told[c], clone(reader).fit(X, y == c, groups=groups).coef_, rtol=1e-6, atol=1e-12)
    assert np.abs(told).max() < 1e-2 * np.abs(untold).max()


def test_what_is_for_two_classes_only_is_refused():
    data = emotions()
    for reader in (ClusterMean(), PCAReader(), TTPDReader(), AttentionReader()):
        with pytest.raises(UsageError, match=r"two classes only; for several there are MeanDifference, LDAReader"):
            MultiClassReader(reader).fit(data.X, data.y)
    reader = MultiClassReader(MeanDifference())
    cases = {
        "one class only": (data.X, np.zeros(160)),
        "Unknown label type: continuous": (data.X, data.X[:, 0]),
        "in 1 of 160 rows: 2": (np.where(np.arange(160)[:, None] == 2, np.inf, data.X), data.y),
        "class 0 has no direction": (np.ones((160, 9)), data.y),
        "class 1 has no direction: its mean is the mean of all": (
            np.array([[-1.0, 0], [0, 0], [1, 0]]).repeat(2, axis=0),
            [0, 0, 1, 1, 2, 2],
        ),
    }
    for says, (X, y) in cases.items():
        with pytest.raises(UsageError, match=says):
            clone(reader).fit(X, y)
    moments = ClassMoments.of_rows(data.X, data.y, range(5))
    with pytest.raises(UsageError, match="no row is of class 4"):
        reader.fit_moments(moments)
    with pytest.raises(UsageError, match="LogisticReader needs the rows"):
        MultiClassReader(LogisticReader()).fit_moments(moments)


# From a store.


def store_with(store_of, data, **arrays):
    sites = {"resid.post@0": np.random.default_rng(3).standard_normal(data.X.shape), "resid.post@1": data.X}
    return store_of(sites | arrays, NAMES[data.y], group=np.arange(len(data.y)) // 2)


@pytest.mark.parametrize("reader", [READERS["nearest"], READERS["lda"], READERS["logistic"]], ids=str)
def test_the_table_of_sites_holds_held_out_accuracy_and_macro_auroc(reader, store_of):
    data = emotions(strength=1.0)
    grid = probe_classes(store_with(store_of, data), MultiClassReader(reader))
    assert grid.classes == tuple(NAMES)
    aurocs = []
    for k in range(5):
        held_out = grid.fold == k
        assert not set(grid.groups[held_out]) & set(grid.groups[~held_out])
        again = MultiClassReader(reader).fit(data.X[~held_out], data.y[~held_out])
        np.testing.assert_allclose(grid.scores[held_out, 1], again.scores(data.X[held_out]), rtol=1e-3, atol=1e-3)
        aurocs.append([roc_auc_score(data.y[held_out] == c, grid.scores[held_out, 1, c]) for c in range(4)])
    noise, line = grid.table.to_dicts()
    assert line["accuracy"] == np.mean(grid.predicted[:, 1] == data.y)
    assert line["auroc"] == pytest.approx(np.mean(aurocs))
    assert line["accuracy_low"] < line["accuracy"] < line["accuracy_high"]
    assert line["auroc_low"] < line["auroc"] <= line["auroc_high"]
    assert line["chance"] == np.bincount(data.y).max() / 160
    assert line["accuracy_low"] > line["chance"]
    assert noise["auroc_low"] < 0.5 < noise["auroc_high"]
    assert (line["n"], line["n_groups"], line["layer"], line["width"]) == (160, 80, 1, 9)
    counts = grid.confusion("resid.post@1")
    np.testing.assert_array_equal(counts.drop("label").to_numpy(), confusion_matrix(data.y, grid.predicted[:, 1]))
    assert counts["label"].to_list() == NAMES.tolist()
    joy = grid.directions[Site("resid.post", 1)]["joy"]
    assert joy.site == Site("resid.post", 1)
    assert joy.metrics["accuracy"] == line["accuracy"]
    assert joy.provenance["rows"] == grid.provenance["rows"]
    full = MultiClassReader(reader).fit(data.X, NAMES[data.y])
    np.testing.assert_allclose(joy.vector, full.directions_["joy"].vector, atol=1e-5)


def test_intervals_of_the_macro_auroc_cover_chance_on_shuffled_labels(store_of):
    covered = 0
    for seed in range(20):
        data = emotions(n=120, seed=seed, strength=0.0)
        line = probe_classes(
            store_with(store_of, data), MultiClassReader(MeanDifference()), sites="resid.post@1", seed=seed, n_jobs=1
        ).table.row(0, named=True)
        covered += line["auroc_low"] <= 0.5 <= line["auroc_high"]
    assert covered >= 17


def test_moments_of_several_classes_are_read_from_a_store_fold_by_fold(store_of):
    class Iterable(type(store_with(store_of, emotions()))):
        """The store in memory, read in batches."""

        def iter(self, sites, *, batch_rows, shuffle=None, rows=None):
            for at in range(0, len(rows), batch_rows):
                part = rows[at : at + batch_rows]
                yield SimpleNamespace(rows=part, values={s: self.read(s, part) for s in sites})

    data = emotions()
    store = store_with(store_of, data)
    store = Iterable(store.arrays, store.index)
    rows = select_classes(store.index)
    fold = np.arange(160) // 2 % 5
    ((_, moments),) = read_moments(store, [Site("resid.post", 1)], rows, fold=fold, batch_rows=50)
    X = data.X.astype(np.float32).astype(np.float64)[rows.rows]
    a = MultiClassReader(LDAReader()).fit_moments(moments.without(2))
    b = MultiClassReader(LDAReader()).fit(X[fold != 2], NAMES[rows.codes][fold != 2])
    np.testing.assert_allclose(a.coef_, b.coef_, atol=1e-9)
    assert list(a.directions_) == NAMES.tolist()


def test_what_cannot_be_probed_is_refused(store_of):
    data = emotions(n=80)
    store = store_with(store_of, data)
    rare = store_of({"resid.post@0": data.X}, ["rare" if i < 2 else NAMES[c] for i, c in enumerate(data.y)])
    reader = MultiClassReader(MeanDifference())
    cases = [
        (UsageError, r"such as MultiClassReader\(MeanDifference\(\)\)", store, MeanDifference(), {}),
        (UsageError, r"has 1 labels in the rows kept \('joy'\)", store, reader, {"where": pl.col("label") == "joy"}),
        (UnknownData, "no column 'mood'", store, reader, {"label": "mood"}),
        (UsageError, "only 2 groups hold label 'rare'", rare, reader, {}),
        (UsageError, "at resid.post@0: .*two classes only", store, MultiClassReader(ClusterMean()), {}),
        (UsageError, "NaN or infinity in 80", store_with(store_of, data, final=data.X * np.nan), reader, {}),
    ]
    for kind, says, source, one, options in cases:
        with pytest.raises(kind, match=says):
            probe_classes(source, one, n_jobs=1, **options)
    with pytest.raises(UnknownSite, match=r"mlp.out@1 was not probed; probed were resid.post@0, resid.post@1"):
        probe_classes(store, reader, n_jobs=1).confusion("mlp.out@1")
