"""AttentionReader: one score for a whole sequence of tokens, by pooling that is learned or fixed.

Enters: rows of tokens with the sequence of each. Leaves: a boundary between pooled rows, and for learned pooling the
query that chooses tokens. Does not know stores (see `probing.sequences`).
"""

from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import scipy.optimize
from jaxtyping import Bool, Float, Integer
from scipy.special import expit
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.metrics import accuracy_score
from sklearn.preprocessing import StandardScaler

from reprobe.errors import UsageError
from reprobe.probing.direction import Direction, Label
from reprobe.probing.reader import (
    Plane,
    binary_codes,
    checked,
    checked_again,
    direction_of,
    names_coded,
    require_direction,
)
from reprobe.probing.readers.logistic import CERTIFICATE, logistic_plane

Pooling = Literal["attention", "mean", "last", "max"]
POOLINGS: tuple[Pooling, ...] = ("attention", "mean", "last", "max")
_SIGN = "the positive class has the higher log-odds"


@dataclass(frozen=True)
class TokenRows:
    """Checked rows of tokens, those of one sequence side by side and in their order.

    `starts` are the places of the first token of each sequence; `positive` is of each sequence.
    """

    X: Float[np.ndarray, "tokens width"]
    starts: Integer[np.ndarray, " sequences"]
    positive: Bool[np.ndarray, " sequences"]

    def only(self, kept: Bool[np.ndarray, " sequences"]) -> "TokenRows":
        """The rows of some of the sequences."""
        lengths = np.diff(self.starts, append=len(self.X))
        return TokenRows(self.X[np.repeat(kept, lengths)], _starts(lengths[kept]), self.positive[kept])


class AttentionReader(ClassifierMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn is untyped
    """Logistic regression on a pooled row per sequence; with `pooling="attention"` the pooling is learned with it.

    "attention": a sequence h₁ … h_T is pooled to Σ aₜhₜ with a = softmax(hₜ·q), one learned query q. "last", "mean" and
    "max" (feature by feature) learn nothing. The log-odds of a sequence are `pooled @ coef_ + intercept_`.

    The loss is Σ log(1 + exp(−y·log-odds)) + (‖w‖² + ‖q‖²)/(2C) over sequences, in standardised features. The fixed
    poolings standardise the pooled training rows, and so are `LogisticReader` on them. "attention" standardises the
    training tokens, which vary more than their means do, so its penalty at one C is the stronger: a C for each pooling
    is found by search. Its loss has several minima: L-BFGS runs in float64 from `restarts` starts, the first at q = 0
    (mean pooling), the others with a query drawn from `seed`, and the lowest loss is kept. `gradient_` is the largest
    component of the gradient of the mean penalised loss there, `losses_` the mean penalised losses of all restarts.

    `direction_` is the value direction: the plane in the space of pooled rows, in raw units; its scale is the standard
    deviation of the pooled training rows along it. `query_` is q in raw units (None for the fixed poolings).

    A row is a token. `sequence` names the sequence of each row, whose rows are in the order of the tokens; without it
    each row is a sequence of its own. `y` has a value per row, the same for all rows of a sequence; what is returned
    has one value per sequence, in the order in which they first appear. In scikit-learn's searches `sequence` is
    metadata, and sequences are the groups of the split:
    `reader.set_fit_request(sequence=True, groups=False, pairs=False).set_score_request(sequence=True)`.
    """

    classes_: np.ndarray
    direction_: Direction
    query_: Float[np.ndarray, " width"] | None
    n_features_in_: int

    def __init__(self, *, pooling: Pooling = "attention", C: float = 0.1, restarts: int = 4, seed: int = 0) -> None:
        self.pooling = pooling
        self.C = C
        self.restarts = restarts
        self.seed = seed

    def fit(self, X: Any, y: Any, groups: Any = None, pairs: Any = None, sequence: Any = None) -> Self:
        """Fit on rows of tokens (n, width) with labels (n,) of two kinds; `groups` and `pairs` are unused.

        Raises `UsageError` as the other readers, for a sequence with two labels, and for rows that name none.
        """
        X, y = checked(self, X, y, groups, pairs, sequence)
        self.classes_, positive = binary_codes(y)
        order, starts = _in_sequences(sequence, len(X))
        X, positive = X[order], positive[order]
        lengths = np.diff(starts, append=len(X))
        mixed = np.flatnonzero(np.repeat(positive[starts], lengths) != positive)
        if mixed.size:
            raise UsageError(f"the sequence of row {order[mixed[0]]} has rows of both classes; it has one label")
        return self.fit_tokens(TokenRows(X, starts, positive[starts]))

    def fit_tokens(self, rows: TokenRows) -> Self:
        """Fit on rows that have been checked. The classes are those of an earlier `fit`, or False and True."""
        if self.pooling not in POOLINGS:
            raise UsageError(f"pooling={self.pooling!r}: one of {', '.join(POOLINGS)}")
        if not hasattr(self, "classes_"):
            self.classes_ = np.array([False, True])
        self.n_features_in_ = rows.X.shape[1]
        self.query_ = None
        if self.pooling == "attention":
            self._learn(rows)
        else:
            found = logistic_plane(self._pooled(rows.X, rows.starts), rows.positive, self.C)
            self.coef_, self.intercept_, self.gradient_ = found.normal, -found.level, found.gradient
        pooled = self._pooled(rows.X, rows.starts)
        scale = float(np.std(pooled @ (self.coef_ / np.linalg.norm(self.coef_))))
        negative, positive = self.classes_.tolist()
        classes: tuple[Label, Label] = (negative, positive)
        self.direction_ = direction_of(Plane(self.coef_, -self.intercept_, _SIGN), scale, self, classes)
        return self

    def _learn(self, rows: TokenRows) -> None:
        if not self.C > 0:
            raise UsageError(f"C={self.C!r}: the inverse strength of the penalty is a positive number")
        if not self.restarts >= 1:
            raise UsageError(f"restarts={self.restarts!r}; at least 1")
        scaler = StandardScaler().fit(rows.X)
        Z, width = scaler.transform(rows.X), rows.X.shape[1]
        lengths = np.diff(rows.starts, append=len(Z))
        n, y = len(lengths), rows.positive.astype(np.float64)

        def loss(theta: Float[np.ndarray, " parameters"]) -> tuple[float, Float[np.ndarray, " parameters"]]:
            """The mean penalised loss at (w, q, b), and its gradient."""
            w, q, b = theta[:width], theta[width:-1], theta[-1]
            value, logits = (Z @ np.stack([w, q], axis=1)).T
            a = _softmax(logits, rows.starts, lengths)
            pooled = np.add.reduceat(a * value, rows.starts)
            logit = pooled + b
            off = expit(logit) - y
            by_token = np.repeat(off, lengths) * a
            by_query = by_token * (value - np.repeat(pooled, lengths))
            gradient = (np.stack([by_token, by_query]) @ Z + np.stack([w, q]) / self.C).ravel()
            total = np.logaddexp(0, logit).sum() - y @ logit + (w @ w + q @ q) / (2 * self.C)
            return float(total) / n, np.append(gradient, off.sum()) / n

        rng = np.random.default_rng(self.seed)
        ends = []
        for restart in range(self.restarts):
            start = np.zeros(2 * width + 1)
            if restart:
                start[width:-1] = rng.standard_normal(width) / np.sqrt(width)
            options = {"maxiter": 5000, "maxfun": 20000, "maxcor": 20, "ftol": 0.0, "gtol": CERTIFICATE / 100}
            ends.append(scipy.optimize.minimize(loss, start, jac=True, method="L-BFGS-B", options=options))
        self.losses_ = np.array([end.fun for end in ends])
        best = ends[int(np.argmin(self.losses_))].x
        self.gradient_ = float(np.abs(loss(best)[1]).max())
        w, q = best[:width], best[width:-1]
        require_direction(w, 1e-3, "the two classes do not differ in any pooled feature: every weight is zero")
        if self.gradient_ > CERTIFICATE:
            raise UsageError(
                f"attention pooling stopped before its optimum (gradient {self.gradient_:.1e}, wanted "
                f"{CERTIFICATE:.0e}) at C={self.C}: choose a smaller C"
            )
        self.coef_, self.query_ = w / scaler.scale_, q / scaler.scale_
        self.intercept_ = float(best[-1] - self.coef_ @ scaler.mean_)

    def _pooled(
        self, X: Float[np.ndarray, "tokens width"], starts: Integer[np.ndarray, " sequences"]
    ) -> Float[np.ndarray, "sequences width"]:
        ends = np.append(starts[1:], len(X))
        if self.pooling == "last":
            latest: np.ndarray = X[ends - 1]
            return latest
        if self.pooling == "max":
            highest: np.ndarray = np.maximum.reduceat(X, starts, axis=0)
            return highest
        lengths = ends - starts
        weights = np.repeat(1 / lengths, lengths) if self.query_ is None else _softmax(X @ self.query_, starts, lengths)
        mean: np.ndarray = np.add.reduceat(weights[:, None] * X, starts, axis=0)
        return mean

    def score_tokens(
        self, X: Float[np.ndarray, "tokens width"], starts: Integer[np.ndarray, " sequences"]
    ) -> Float[np.ndarray, " sequences"]:
        """`decision_function` of rows that have been checked, of sequences side by side."""
        return self.direction_.score(self._pooled(X, starts))

    def decision_function(self, X: Any, sequence: Any = None) -> Float[np.ndarray, " sequences"]:
        """Signed distance of each sequence's pooled row from the boundary. Raises `ReaderNotFitted` before `fit`."""
        X = checked_again(self, "direction_", X)
        order, starts = _in_sequences(sequence, len(X))
        return self.score_tokens(X[order], starts)

    def predict(self, X: Any, sequence: Any = None) -> np.ndarray:
        """The label of each sequence."""
        scores = self.decision_function(X, sequence)
        return self.classes_[(scores > 0).astype(np.intp)]

    def score(self, X: Any, y: Any, sequence: Any = None) -> float:
        """The share of sequences that are read rightly; `y` has a value per row."""
        order, starts = _in_sequences(sequence, len(y))
        return float(accuracy_score(np.asarray(y)[order[starts]], self.predict(X, sequence)))

    def attention(self, X: Any, sequence: Any = None) -> Float[np.ndarray, " rows"]:
        """The weight of each row in its sequence, in the order of the rows; they add up to 1 in each sequence.

        Raises `UsageError` for "max", which takes every feature from a token of its own.
        """
        X = checked_again(self, "direction_", X)
        if self.pooling == "max":
            raise UsageError("pooling='max' gives tokens no weights")
        order, starts = _in_sequences(sequence, len(X))
        lengths = np.diff(starts, append=len(X))
        weights = np.empty(len(X))
        if self.pooling == "last":
            weights[order] = np.isin(np.arange(len(X)), starts + lengths - 1)
        else:
            logits = np.zeros(len(X)) if self.query_ is None else X[order] @ self.query_
            weights[order] = _softmax(logits, starts, lengths)
        return weights

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_class = False
        return tags


def _in_sequences(sequence: Any, n: int) -> tuple[Integer[np.ndarray, " rows"], Integer[np.ndarray, " sequences"]]:
    """The order that puts the rows of each sequence side by side, and where in it each sequence starts."""
    if sequence is None:
        return np.arange(n), np.arange(n)
    codes = names_coded(sequence, "sequence")
    return np.argsort(codes, kind="stable"), _starts(np.bincount(codes))


def _starts(lengths: Integer[np.ndarray, " sequences"]) -> Integer[np.ndarray, " sequences"]:
    starts: np.ndarray = np.cumsum(lengths) - lengths
    return starts


def _softmax(
    logits: Float[np.ndarray, " tokens"],
    starts: Integer[np.ndarray, " sequences"],
    lengths: Integer[np.ndarray, " sequences"],
) -> Float[np.ndarray, " tokens"]:
    """The softmax within each sequence."""
    e = np.exp(logits - np.repeat(np.maximum.reduceat(logits, starts), lengths))
    share: np.ndarray = e / np.repeat(np.add.reduceat(e, starts), lengths)
    return share
