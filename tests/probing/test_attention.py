"""Pooling over the tokens of a sequence: learned, last, mean, max."""

from types import SimpleNamespace

import numpy as np
import pytest
import scipy.optimize
import sklearn
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, GroupKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

from reprobe.errors import UsageError
from reprobe.probing.readers import AttentionReader, LogisticReader


def texts(n=120, width=9, at="marked", key=4.0, strength=4.0, seed=0):
    """Sequences of 3 to 12 tokens in noise; one token carries the label: the one marked by a key, or the last one.

    Every other token carries as much along the same axis, at random, so that the axis alone tells nothing.
    """
    rng = np.random.default_rng(seed)
    axis, mark = np.linalg.qr(np.random.default_rng(99).standard_normal((width, 2)))[0].T
    lengths = rng.integers(3, 13, n)
    sequence = np.repeat(np.arange(n), lengths)
    ends = np.cumsum(lengths)
    y = rng.permutation(np.arange(n) % 2)
    X = rng.standard_normal((len(sequence), width)) * 0.7 + 2.0
    X += np.outer(strength * (rng.integers(0, 2, len(X)) - 0.5), axis)
    where = ends - 1 if at == "last" else ends - 1 - np.floor(rng.random(n) * lengths).astype(int)
    X[where] += np.outer(strength * (y - 0.5) - X[where] @ axis, axis)
    if at == "marked":
        X[where] += key * mark
    return SimpleNamespace(X=X, y=y[sequence], label=y, sequence=sequence, where=where, axis=axis, mark=mark)


def halves(data):
    return data.sequence < 60, data.sequence >= 60


def accuracy(pooling, data, **options):
    train, test = halves(data)
    reader = AttentionReader(pooling=pooling, **options)
    reader.fit(data.X[train], data.y[train], sequence=data.sequence[train])
    return reader.score(data.X[test], data.y[test], sequence=data.sequence[test])


def test_where_a_key_marks_the_token_attention_reads_what_mean_last_and_max_cannot():
    found = {p: np.mean([accuracy(p, texts(seed=s)) for s in range(3)]) for p in ("attention", "mean", "last", "max")}
    assert found["attention"] > 0.95
    for pooling in ("mean", "last", "max"):
        assert found[pooling] < found["attention"] - 0.15, pooling


def test_where_the_last_token_knows_the_last_is_as_good():
    data = texts(at="last")
    assert accuracy("last", data) > 0.95
    marked = texts(at="last")
    marked.X[marked.where] += 4.0 * marked.mark  # a last token that looks like one, as a full stop does
    assert accuracy("attention", marked) > 0.95
    assert accuracy("mean", data) < 0.9


def test_attention_finds_the_token_its_key_and_the_value():
    data = texts()
    reader = AttentionReader().fit(data.X, data.y, sequence=data.sequence)
    assert reader.direction_.vector @ data.axis > 0.9
    assert reader.query_ @ data.mark / np.linalg.norm(reader.query_) > 0.7
    weights = reader.attention(data.X, data.sequence)
    np.testing.assert_allclose(np.bincount(data.sequence, weights), 1)
    assert np.mean(weights[data.where]) > 0.8
    assert reader.gradient_ <= 1e-6
    assert reader.losses_.min() < np.log(2)


def test_the_fit_is_a_stationary_point_of_the_stated_loss():
    """Loss written out sequence by sequence, its gradient by central differences."""
    data = texts(n=30, width=4)
    reader = AttentionReader(C=0.5).fit(data.X, data.y, sequence=data.sequence)
    mean, std = data.X.mean(axis=0), data.X.std(axis=0)

    def loss(theta):
        w, q, b = theta[:4], theta[4:8], theta[8]
        total = (w @ w + q @ q) / (2 * 0.5)
        for i in range(30):
            H = (data.X[data.sequence == i] - mean) / std
            a = np.exp(H @ q)
            logit = (a / a.sum()) @ H @ w + b
            total += np.logaddexp(0, -logit if data.label[i] else logit)
        return total / 30

    theta = np.concatenate([reader.coef_ * std, reader.query_ * std, [reader.intercept_ + reader.coef_ @ mean]])
    assert loss(theta) == pytest.approx(reader.losses_.min(), abs=1e-12)
    gradient = [(loss(theta + h) - loss(theta - h)) / 2e-5 for h in 1e-5 * np.eye(9)]
    np.testing.assert_allclose(gradient, 0, atol=1e-6)
    for start in np.random.default_rng(0).standard_normal((5, 9)):
        other = scipy.optimize.minimize(loss, start).fun
        assert other > reader.losses_.min() - 1e-7, "a lower minimum that the restarts have missed"


@pytest.mark.parametrize("pooling", ["mean", "last", "max"])
@pytest.mark.parametrize("C", [0.1, 10.0])
def test_fixed_pooling_is_scikit_learns_logistic_regression_on_pooled_rows(pooling, C):
    data = texts(n=60)
    pool = {"mean": lambda H: H.mean(axis=0), "last": lambda H: H[-1], "max": lambda H: H.max(axis=0)}[pooling]
    pooled = np.stack([pool(data.X[data.sequence == i]) for i in range(60)])
    reference = make_pipeline(
        StandardScaler(), LogisticRegression(C=C, solver="newton-cholesky", tol=1e-12, max_iter=1000)
    ).fit(pooled, data.label)
    reader = AttentionReader(pooling=pooling, C=C).fit(data.X, data.y, sequence=data.sequence)
    np.testing.assert_allclose(
        pooled @ reader.coef_ + reader.intercept_, reference.decision_function(pooled), atol=1e-6
    )
    np.testing.assert_array_equal(reader.predict(data.X, data.sequence), reference.predict(pooled))
    assert reader.query_ is None


def test_a_sequence_of_one_token_is_a_row():
    data = texts(n=60)
    rows, y = data.X[data.where], data.label
    a = LogisticReader(C=1.0).fit(rows, y)
    for pooling in ("attention", "mean", "last", "max"):
        b = AttentionReader(pooling=pooling, C=1.0).fit(rows, y)
        np.testing.assert_allclose(b.direction_.vector, a.direction_.vector, atol=1e-5)
        np.testing.assert_allclose(b.decision_function(rows), a.decision_function(rows), atol=1e-4)


@pytest.mark.parametrize("pooling", ["attention", "mean", "last", "max"])
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.SkipTestWarning")
def test_scikit_learn_accepts_it_and_its_searches_carry_the_sequences(pooling):
    check_estimator(AttentionReader(pooling=pooling, restarts=1))
    data = texts(n=60)
    with sklearn.config_context(enable_metadata_routing=True):
        reader = AttentionReader(pooling=pooling, restarts=2)
        reader = reader.set_fit_request(sequence=True, groups=False, pairs=False).set_score_request(sequence=True)
        routed = {"sequence": data.sequence, "groups": data.sequence}
        scores = cross_val_score(reader, data.X, data.y, cv=GroupKFold(3), params=routed, error_score="raise")
        search = GridSearchCV(reader, {"C": [1e-3, 0.1]}, cv=GroupKFold(3), error_score="raise")
        search.fit(data.X, data.y, **routed)
    by_hand = []
    for train, test in GroupKFold(3).split(data.X, data.y, data.sequence):
        fitted = clone(reader).fit(data.X[train], data.y[train], sequence=data.sequence[train])
        found = fitted.predict(data.X[test], data.sequence[test])
        by_hand.append(np.mean(found == data.label[np.unique(data.sequence[test])]))
    np.testing.assert_allclose(scores, by_hand)
    assert search.best_estimator_.direction_.params["pooling"] == pooling


def test_shuffled_labels_are_read_at_chance():
    rates = {p: [] for p in ("attention", "mean", "last", "max")}
    for seed in range(12):
        data = texts(seed=seed)
        data.y = np.random.default_rng(seed).permutation(data.label)[data.sequence]
        for pooling, found in rates.items():
            found.append(accuracy(pooling, data, restarts=2))
    for found in rates.values():
        half = 3.5 * np.std(found, ddof=1) / np.sqrt(12)
        assert half < 0.1
        assert abs(np.mean(found) - 0.5) < half


@pytest.mark.parametrize("pooling", ["attention", "mean", "last", "max"])
def test_swapped_labels_negate_and_rows_may_come_in_any_order_of_sequences(pooling):
    data = texts(n=40)
    reader = AttentionReader(pooling=pooling)
    a = clone(reader).fit(data.X, data.y, sequence=data.sequence)
    b = clone(reader).fit(data.X, 1 - data.y, sequence=data.sequence)
    np.testing.assert_allclose(
        b.decision_function(data.X, data.sequence), -a.decision_function(data.X, data.sequence), atol=1e-5
    )
    # First the first tokens of all sequences, then the second ones, and so on.
    order = np.argsort(np.arange(len(data.X)) - np.searchsorted(data.sequence, data.sequence), kind="stable")
    c = clone(reader).fit(data.X[order], data.y[order], sequence=data.sequence[order])
    np.testing.assert_allclose(c.direction_.vector, a.direction_.vector, atol=1e-5)
    names = np.array([f"text {i}" for i in data.sequence])
    first = list(dict.fromkeys(data.sequence[order].tolist()))
    np.testing.assert_allclose(
        c.decision_function(data.X[order], names[order]), a.decision_function(data.X, names)[first], atol=1e-4
    )


def test_the_same_seed_gives_the_same_fit_and_says_what_it_is():
    data = texts(n=40)
    a, b = (AttentionReader(seed=3).fit(data.X, data.y, sequence=data.sequence) for _ in range(2))
    assert a.direction_ == b.direction_
    assert a.direction_.reader == "AttentionReader"
    assert a.direction_.params == {"pooling": "attention", "C": 0.1, "restarts": 4, "seed": 3}
    assert a.direction_.classes == (0, 1)
    weights = a.attention(data.X, data.sequence)
    pooled = np.stack([weights[data.sequence == i] @ data.X[data.sequence == i] for i in range(40)])
    assert a.direction_.scale == pytest.approx(np.std(pooled @ a.direction_.vector))
    np.testing.assert_allclose(a.direction_.score(pooled), a.decision_function(data.X, data.sequence), atol=1e-9)


def test_what_are_no_sequences_is_refused():
    data = texts(n=10)
    mixed = data.y.copy()
    mixed[1] = 1 - mixed[0]
    cases = {
        r"the sequence of row 1 has rows of both classes": {"y": mixed},
        "one class only": {"y": np.zeros(len(data.y))},
        "inconsistent numbers": {"sequence": data.sequence[:-1]},
        r"1 of \d+ rows name no sequence \(the first is row 2\)": {
            "sequence": [None if i == 2 else s for i, s in enumerate(data.sequence.tolist())]
        },
        "in 1 of": {"X": np.where(np.arange(data.X.size).reshape(data.X.shape) == 20, np.nan, data.X)},
        "do not differ": {"X": np.ones_like(data.X)},
    }
    for pooling in ("attention", "mean", "last", "max"):
        for says, change in cases.items():
            with pytest.raises(UsageError, match=says):
                AttentionReader(pooling=pooling).fit(**({"X": data.X, "y": data.y, "sequence": data.sequence} | change))
    for options, says in (
        ({"pooling": "sum"}, "one of attention"),
        ({"C": 0}, "positive"),
        ({"restarts": 0}, "least 1"),
    ):
        with pytest.raises(UsageError, match=says):
            AttentionReader(**options).fit(data.X, data.y, sequence=data.sequence)
    fitted = AttentionReader(pooling="max").fit(data.X, data.y, sequence=data.sequence)
    with pytest.raises(UsageError, match="no weights"):
        fitted.attention(data.X, data.sequence)
