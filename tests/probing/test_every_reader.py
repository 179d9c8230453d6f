"""What holds for every reader, table by table: one line per reader, one test per promise.

What a single reader promises besides (its formula, its options) is in the file named after it.
"""

import warnings
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from probing.memory import planted_rows
from scipy.stats import ortho_group, t
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, GroupKFold, StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

from reprobe.errors import NotFitted, UsageError
from reprobe.probing.grid import probe
from reprobe.probing.readers import (
    CCSReader,
    ClusterMean,
    KSparseReader,
    LDAReader,
    LogisticReader,
    MeanDifference,
    PCAReader,
    RandomReader,
    RidgeReader,
    TTPDReader,
)


@dataclass(frozen=True)
class Case:
    """A reader and what may be expected of it.

    `grid` are values of its main parameter. `close` is the cosine with the planted axis that is surpassed at 240 rows
    of 21 features; None for readers that are not meant to find it. `swap` is the tolerance to which swapped labels
    negate, None where they do not; `rotates`, whether it commutes with rotations of the inputs.
    """

    reader: object
    grid: dict = field(default_factory=dict)
    close: float | None = 0.98
    swap: float | None = 1e-6
    rotates: bool = True

    @property
    def name(self):
        return type(self.reader).__name__

    def more(self, data, kept=slice(None)):
        """What `fit` takes beside rows and labels."""
        if isinstance(self.reader, TTPDReader):
            return {"polarity": data.polarity[kept]}
        return {"pairs": data.pairs[kept]} if getattr(self.reader, "uses_pairs", False) else {}

    def fit(self, data, y=None, X=None, kept=slice(None)):
        y, X = data.y if y is None else y, data.X if X is None else X
        return clone(self.reader).fit(X[kept], y[kept], **self.more(data, kept))


# Readers that invert a covariance or stop at any separating direction are further from the axis than differences of
# means are; with ten times the rows all are at 0.98 or more.
CASES = {
    "mean": Case(MeanDifference(), {"whiten": [False, True]}, swap=0),
    "whitened": Case(MeanDifference(whiten=True), {"rtol": [1e-10, 1e-3]}, close=0.88),
    "cluster": Case(ClusterMean()),
    "lda": Case(LDAReader(), {"shrinkage": [0.1, "oas"]}, close=0.96),
    "logistic": Case(LogisticReader(), {"C": [0.01, 1.0]}, close=0.9, rotates=False),  # standardises features
    "sparse": Case(KSparseReader(4), {"k": [1, 8]}, close=None, rotates=False),  # chooses features
    "ridge": Case(RidgeReader(), {"alpha": [1.0, 100.0]}, close=0.88),
    "pca": Case(PCAReader(), {"compat": [None, "repe"]}, swap=0),
    "repe": Case(PCAReader(compat="repe"), {"seed": [0, 1]}, swap=0),
    "repeng": Case(PCAReader(compat="repeng"), {"seed": [0, 1]}, close=None, swap=0),  # centres the difference away
    "ccs": Case(CCSReader(restarts=2, steps=120), {"steps": [5, 20]}, close=0.85, rotates=False),  # standardises
    "ttpd": Case(TTPDReader(), {"C": [0.01, 1.0]}, rotates=False),  # its polarity direction is a logistic one
    "random": Case(RandomReader(3), {"seed": [0, 1]}, close=None, swap=None, rotates=False),  # drawn in the basis
}


def of(wanted):
    names = [name for name, case in CASES.items() if wanted(case)]
    return pytest.mark.parametrize("case", [CASES[n] for n in names], ids=names)


every_reader = of(lambda case: True)
every_classifier = of(lambda case: not isinstance(case.reader, RidgeReader))
#: Readers that are told the classes apart by labels and have a boundary that does it.
reading = of(lambda case: case.close is not None or isinstance(case.reader, KSparseReader))
probed = of(lambda case: not isinstance(case.reader, RidgeReader | TTPDReader))


def rows(**options):
    """Pairs of rows with a planted axis; half of the pairs are affirmative, which shows along another one."""
    data = planted_rows(**options)
    data.polarity = np.where(data.pairs % 2 == 0, 1.0, -1.0)
    polar = np.random.default_rng(77).standard_normal(data.X.shape[1])
    polar -= (polar @ data.axis) * data.axis
    data.X += np.outer(data.polarity, polar / np.linalg.norm(polar))
    return data


# What scikit-learn's tools ask.


@every_reader
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.SkipTestWarning")
def test_scikit_learn_accepts_it_as_an_estimator(case):
    if isinstance(case.reader, TTPDReader):
        with pytest.raises(UsageError, match="needs the polarity"):  # so that the checks cannot even begin
            check_estimator(case.reader)
    else:
        check_estimator(CCSReader(restarts=1, steps=5) if isinstance(case.reader, CCSReader) else case.reader)


@every_reader
def test_a_clone_has_the_parameters_and_nothing_that_was_fitted(case):
    fitted = case.fit(rows(n=60))
    again = clone(fitted)
    assert again.get_params() == fitted.get_params() == case.reader.get_params()
    assert not [name for name in vars(again) if name.endswith("_")]
    for name, values in case.grid.items():
        for value in values:
            assert again.set_params(**{name: value}).get_params()[name] == value
    assert fitted.direction_ == case.fit(rows(n=60)).direction_, "the same rows, the same direction"


@every_reader
def test_it_works_in_pipelines_cross_validation_and_searches(case):
    data = rows(n=120)
    pipeline = make_pipeline(StandardScaler(), clone(case.reader))
    step = case.name.lower()
    more = {f"{step}__{k}": v for k, v in case.more(data).items()}
    fitted = clone(pipeline).fit(data.X, data.y, **more)
    alone = clone(case.reader).fit(StandardScaler().fit_transform(data.X), data.y, **case.more(data))
    np.testing.assert_array_equal(fitted.predict(data.X), alone.predict(StandardScaler().fit_transform(data.X)))
    folds = GroupKFold(3)
    scores = cross_val_score(pipeline, data.X, data.y, groups=data.pairs, cv=folds, params=more, error_score="raise")
    by_hand = []
    for train, test in folds.split(data.X, data.y, data.pairs):
        scaler = StandardScaler().fit(data.X[train])
        reader = clone(case.reader).fit(scaler.transform(data.X[train]), data.y[train], **case.more(data, train))
        by_hand.append(reader.score(scaler.transform(data.X[test]), data.y[test]))
    np.testing.assert_allclose(scores, by_hand)
    search = GridSearchCV(clone(case.reader), case.grid, cv=folds, error_score="raise")
    search.fit(data.X, data.y, groups=data.pairs, **case.more(data))
    assert set(search.best_params_) == set(case.grid)
    assert search.best_estimator_.direction_.params == search.best_estimator_.get_params()
    if case in (CASES["sparse"], CASES["mean"]):  # searched values that do make a difference
        assert len(set(np.round(search.cv_results_["mean_test_score"], 6))) == 2


# Chance, and more than chance.


@every_reader
def test_shuffled_labels_are_read_at_chance_and_true_ones_are_not(case):
    """The mean accuracy over seeds, with its 99.9 % interval, which is narrow enough to say something."""
    shuffled, true = [], []
    train, test = np.arange(400) < 200, np.arange(400) >= 200
    for seed in range(20):
        data = rows(n=400, seed=seed)
        turned = np.repeat(np.random.default_rng(1000 + seed).integers(0, 2, 200), 2)
        y = np.where(turned == 1, data.y, 1 - data.y)  # either side of a pair may be the positive one
        for labels, found in ((y, shuffled), (data.y, true)):
            score = case.fit(data, labels, kept=train).direction_.score(data.X[test])
            found.append(((score > 0) == labels[test]).mean())
    half = t.ppf(0.9995, 19) * np.std(shuffled, ddof=1) / np.sqrt(20)
    assert half < 0.045
    assert abs(np.mean(shuffled) - 0.5) < half
    if case.close is not None:
        assert np.min(true) > 0.8 > 0.5 + half


@of(lambda case: case.close is not None)
def test_a_planted_direction_is_recovered(case):
    for seed in range(3):
        data = rows(strength=4.0, seed=seed)
        assert case.fit(data).direction_.vector @ data.axis > case.close


def test_a_planted_direction_is_recovered_by_few_features():
    data = rows(strength=4.0)
    d = CASES["sparse"].fit(data).direction_
    assert set(np.flatnonzero(d.vector)) == set(np.argsort(-np.abs(data.axis))[:4])


# Symmetries.


@of(lambda case: case.swap is not None)
@pytest.mark.parametrize("paired", [True, False])
def test_swapped_labels_give_the_negated_score(case, paired):
    data = rows()
    more = case.more(data) if paired or isinstance(case.reader, TTPDReader) else {}
    a, b = (clone(case.reader).fit(data.X, y, **more).direction_ for y in (data.y, 1 - data.y))
    np.testing.assert_allclose(b.vector, -a.vector, atol=case.swap, rtol=0)
    np.testing.assert_allclose(b.score(data.X), -a.score(data.X), atol=case.swap * 100, rtol=0)
    assert b.scale == pytest.approx(a.scale, rel=case.swap)


def test_a_random_direction_does_not_know_which_label_is_which():
    data = rows()
    a, b = (CASES["random"].fit(data, y) for y in (data.y, 1 - data.y))
    np.testing.assert_array_equal(a.direction_.vector, b.direction_.vector)


@every_reader
def test_rotated_rows_give_the_rotated_direction_where_the_method_has_no_basis(case):
    data = rows()
    rotation = ortho_group.rvs(data.X.shape[1], random_state=1)
    a, b = case.fit(data).direction_, case.fit(data, X=data.X @ rotation).direction_
    if case.rotates:
        np.testing.assert_allclose(b.vector, a.vector @ rotation, atol=1e-8)
        np.testing.assert_allclose(b.score(data.X @ rotation), a.score(data.X), atol=1e-7)
    else:
        assert np.linalg.norm(b.vector - a.vector @ rotation) > 1e-4, "else it should be said to rotate"


@of(lambda case: case.name in ("LogisticReader", "KSparseReader", "TTPDReader", "LDAReader", "RidgeReader"))
def test_features_in_another_order_give_the_same_direction_in_that_order(case):
    data = rows()
    order = np.random.default_rng(0).permutation(data.X.shape[1])
    a, b = case.fit(data).direction_, case.fit(data, X=data.X[:, order]).direction_
    np.testing.assert_allclose(b.vector, a.vector[order], atol=1e-6)


@every_reader
def test_rows_moved_by_a_constant_give_the_same_direction_and_scores(case):
    data = rows()
    away = np.linspace(-30, 40, data.X.shape[1])
    a, b = case.fit(data).direction_, case.fit(data, X=data.X + away).direction_
    np.testing.assert_allclose(b.vector, a.vector, atol=1e-6)
    np.testing.assert_allclose(b.score(data.X + away), a.score(data.X), atol=1e-4)


# The two that are left out draw a number for each pair, in the order of the pairs' first rows.
@of(lambda case: case is not CASES["repe"] and not isinstance(case.reader, CCSReader))
def test_the_order_of_rows_is_nothing(case):
    data = rows(n=80)
    order = np.random.default_rng(2).permutation(80)
    a, b = case.fit(data).direction_, case.fit(data, kept=order).direction_
    np.testing.assert_allclose(b.vector, a.vector, atol=1e-6)


# What a fitted reader says of itself.


@every_classifier
def test_the_direction_says_what_the_reader_does(case):
    data = rows()
    fitted = case.fit(data, np.where(data.y == 1, "yes", "no"))
    d = fitted.direction_
    assert d.site is None
    assert d.classes == ("no", "yes")
    assert d.reader == case.name
    assert d.params == case.reader.get_params()
    assert d.scale == pytest.approx(np.std(data.X @ d.vector))
    np.testing.assert_allclose(fitted.decision_function(data.X), data.X @ d.vector - d.offset)
    assert list(fitted.predict(data.X)) == ["yes" if s > 0 else "no" for s in d.score(data.X)]


@every_reader
def test_tensors_of_any_dtype_are_read_like_arrays(case):
    data = rows()
    rough = torch.tensor(data.X, dtype=torch.bfloat16)
    more = {k: torch.tensor(v) for k, v in case.more(data).items()}
    a = clone(case.reader).fit(rough, torch.tensor(data.y), **more)
    b = case.fit(data, X=rough.float().numpy())
    assert a.direction_ == b.direction_
    np.testing.assert_array_equal(a.predict(rough), b.predict(rough.float().numpy()))


# Bad input.


@every_reader
def test_an_unfitted_reader_says_so(case):
    for kind in (NotFitted, NotFittedError):
        with pytest.raises(kind, match="not fitted yet"):
            clone(case.reader).predict(np.zeros((2, 3)))


def refused(case, data, says, **changes):
    with pytest.raises(UsageError, match=says):
        case.fit(data, **changes)


@every_classifier
def test_labels_of_the_wrong_kind_are_refused(case):
    data = rows(n=40)
    refused(case, data, r"one class only \(1\.0\)", y=np.ones(40))
    refused(case, data, "with 3 classes: 0, 1, 2", y=np.arange(40) % 3)
    refused(case, data, "Unknown label type: continuous", y=data.X[:, 0])
    refused(case, data, "Unknown label type: .* object", y=np.array([{"a": 1}, {"b": 2}] * 20, dtype=object))
    with pytest.raises(UsageError, match="inconsistent numbers"):
        clone(case.reader).fit(data.X, data.y[:-1], **case.more(data))


def test_a_reader_of_numbers_refuses_labels_that_are_names_or_all_equal():
    data, case = rows(n=40), CASES["ridge"]
    refused(case, data, "y holds binary labels such as 'no'", y=np.where(data.y == 1, "yes", "no"))
    refused(case, data, "all targets are equal", y=np.ones(40))


@every_reader
def test_rows_that_are_not_finite_are_refused_by_number(case):
    data = rows(n=40)
    broken = data.X.copy()
    broken[[3, 7], 2] = np.nan, np.inf
    refused(case, data, "in 2 of 40 rows: 3, 7", X=broken)
    fitted = case.fit(data)
    with pytest.raises(UsageError, match="in 2 of 40 rows: 3, 7"):
        fitted.predict(broken)
    with pytest.raises(UsageError, match="21 features"):
        fitted.predict(data.X[:, :4])


@every_reader
def test_features_that_do_not_vary_carry_nothing_and_rows_that_do_not_are_refused(case):
    data = rows(n=160, strength=4.0)
    X = data.X.copy()
    X[:, 3], X[:, 8] = 1 / 3, 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fitted = case.fit(data, X=X)
    d = fitted.direction_
    if case is not CASES["random"]:  # which does not look at rows
        np.testing.assert_allclose(d.vector[[3, 8]], 0, atol=1e-9)
    if case.close is not None:
        assert ((d.score(X) > 0) == data.y).mean() > 0.9
    refused(
        case,
        data,
        "no difference|no main axis|do not differ|no feature varies|rows do not vary",
        X=np.tile(data.X[:1] / 3, (160, 1)),
    )


@of(lambda case: getattr(case.reader, "uses_pairs", False))
def test_pairs_without_a_partner_are_refused(case):
    data = rows(n=8)
    with pytest.raises(UsageError, match=r"1 of 4 pairs have rows of one class only; both sides of a pair are needed"):
        clone(case.reader).fit(data.X, np.array([1, 1, 0, 1, 0, 1, 0, 1]), pairs=data.pairs)
    with pytest.raises(UsageError, match=r"1 of 8 rows name no pair \(the first is row 5\)"):
        clone(case.reader).fit(data.X, data.y, pairs=[0, 0, 1, 1, 2, None, 3, 3])


@every_classifier
def test_a_class_that_a_fold_lacks_is_named(case):
    data = rows(n=40)
    y = (np.arange(40) >= 20).astype(int)  # the first half of the rows is of one class
    labels = np.where(y == 1, "yes", "no")
    with pytest.raises(UsageError, match=r"one class only \('(yes|no)'\)"):
        cross_val_score(
            case.reader, data.X, labels, cv=GroupKFold(2), groups=y, params=case.more(data), error_score="raise"
        )
    assert len(cross_val_score(RidgeReader(), data.X, y, cv=StratifiedKFold(2), error_score="raise")) == 2


@probed
def test_a_store_that_cannot_be_probed_is_refused_with_the_reason(case, store_of):
    data = rows(n=40)

    def store(X=data.X, y=data.y, group=data.pairs):
        return store_of({"resid.post@0": X}, y, group=group, pair=[f"c{p:02}" for p in data.pairs])

    broken = data.X.copy()
    broken[5, 1], broken[9, 0] = np.nan, -np.inf
    one_sided = np.where(np.arange(40) < 4, 1, data.y)
    cases = [
        (r"has 1 labels in the rows kept \(1\); a probe needs two", store(y=np.ones(40, dtype=int)), {}),
        ("has 3 labels", store(y=np.arange(40) % 3), {}),
        (r"NaN or infinity in 2 of 40 rows: 5 \(prompt 'p0005'\), 9 \(prompt 'p0009'\)", store(X=broken), {}),
        ("20 groups cannot make 30 folds: a group is never split", store(), {"folds": 30}),
    ]
    if case.reader.uses_pairs:
        cases.append((r"2 pairs have rows of one label only, e.g. that of prompt 'p000[0-3]'", store(y=one_sided), {}))
    else:
        cases.append(("only 2 groups hold label True: 5 folds", store(y=(np.arange(40) < 4).astype(int)), {}))
    if case is not CASES["random"]:
        cases.append(("at resid.post@0: .*sites=", store(X=np.ones((40, 21))), {}))
    for says, source, options in cases:
        with pytest.raises(UsageError, match=says):
            probe(source, case.reader, n_jobs=1, **options)


def test_probe_takes_no_reader_of_numbers(store_of):
    data = rows(n=40)
    with pytest.raises(UsageError, match=r"such as MeanDifference\(\), not RidgeReader\(\)"):
        probe(store_of({"resid.post@0": data.X}, data.y), RidgeReader())


@every_reader
def test_a_direction_does_not_read_rows_of_another_width(case):
    d = case.fit(rows(n=40)).direction_
    with pytest.raises(UsageError, match="reads rows of width 21, not an array of shape"):
        d.score(np.zeros((2, 20)))
