"""What every linear reader shares: checked rows in, a `Direction` out, the scikit-learn interface around it.

Enters: rows of activations (numpy, or a torch tensor of any dtype and device) and two labels. Leaves: a
fitted estimator whose `direction_` scores further rows. Does not know sites or stores; a reader says how it
fits by implementing `_fit_plane`.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import torch
from jaxtyping import Bool, Float, Integer
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.exceptions import NotFittedError
from sklearn.utils.multiclass import check_classification_targets, type_of_target
from sklearn.utils.validation import check_consistent_length, validate_data

from reprobe.errors import NotFitted, UsageError
from reprobe.probing.direction import Direction


class ReaderNotFitted(NotFitted, NotFittedError):  # type: ignore[misc]
    """A reader was used before `fit`. Also the error that scikit-learn's tools look for."""


@dataclass(frozen=True)
class TrainingRows:
    """What a reader fits on: rows, which of them are of the positive class, and the pair and the group of each (None:
    not given). `side` is a second division of the rows, for readers that need one: see their `fit`."""

    X: Float[np.ndarray, "rows width"]
    positive: Bool[np.ndarray, " rows"]
    pairs: Integer[np.ndarray, " rows"] | None
    side: Bool[np.ndarray, " rows"] | None = None
    groups: Integer[np.ndarray, " rows"] | None = None


@dataclass(frozen=True)
class Plane:
    """A fitted boundary: positive where h·normal > level. `normal` may have any length but zero.

    `sign` says how its sign was decided, as in `Direction`.
    """

    normal: Float[np.ndarray, " width"]
    level: float
    sign: str


class Reader(ClassifierMixin, BaseEstimator, ABC):  # type: ignore[misc]  # scikit-learn is untyped
    """A linear reader of two classes: `fit`, `decision_function`, `predict`, `score`, and `direction_`.

    `decision_function` is the signed distance from the boundary in units of the activations,
    `direction_.score(X)`; above 0 is `classes_[1]`, the greater label. Everything is computed in float64.
    """

    classes_: np.ndarray
    direction_: Direction
    n_features_in_: int
    #: False for readers whose `fit` ignores `pairs`.
    uses_pairs: ClassVar[bool] = False

    def fit(self, X: Any, y: Any, groups: Any = None, pairs: Any = None) -> Self:
        """Fit on rows (n, width) with labels (n,) of two kinds.

        `pairs` names the two sides of each contrast, for the readers that use pairs; `groups` is accepted so
        that all readers are called alike, and used by those alone that split the rows further, to choose
        something: which groups are in X is decided by who calls. Raises `UsageError` for NaN, one class, more
        than two, or rows in which the classes do not differ.
        """
        return self.fit_rows(self._checked(X, y, groups, pairs))

    def _checked(self, X: Any, y: Any, groups: Any, pairs: Any) -> TrainingRows:
        X, y = checked(self, X, y, groups, pairs)
        self.classes_, positive = binary_codes(y)
        return TrainingRows(
            X,
            positive,
            pair_codes(pairs) if self.uses_pairs and pairs is not None else None,
            groups=group_codes(groups),
        )

    def fit_rows(self, rows: TrainingRows) -> Self:
        """Fit on rows that have been checked: finite, float64, of both classes.

        What `fit` does once its arguments are sound; thousands of fits on the same checked rows call it directly.
        The classes are those of an earlier `fit`, or False and True.
        """
        if not hasattr(self, "classes_"):
            self.classes_ = np.array([False, True])
        self.n_features_in_ = rows.X.shape[1]
        plane = self._fit_plane(rows)
        self._keep(plane, float(np.std(rows.X @ (plane.normal / np.linalg.norm(plane.normal)))))
        return self

    def _keep(self, plane: Plane, scale: float) -> None:
        negative, positive = self.classes_.tolist()
        self.direction_ = direction_of(plane, scale, self, (negative, positive))

    @abstractmethod
    def _fit_plane(self, rows: TrainingRows) -> Plane:
        """The boundary that this reader finds; `UsageError` if the rows determine none."""

    def decision_function(self, X: Any) -> Float[np.ndarray, " rows"]:
        """Signed distances from the boundary, (n, width) → (n,). Raises `ReaderNotFitted` before `fit`."""
        X = checked_again(self, "direction_", X)
        return self.direction_.score(X)

    def predict(self, X: Any) -> np.ndarray:
        """The label of each row: `classes_[1]` where `decision_function` is above 0."""
        scores = self.decision_function(X)
        return self.classes_[(scores > 0).astype(np.intp)]

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_class = False
        return tags


class BatchReader(Reader):
    """A reader that fits several sites, on several choices of training rows, in less time than one by one."""

    @abstractmethod
    def fit_batch(
        self,
        X: Float[np.ndarray, "sites rows width"],
        positive: Bool[np.ndarray, " rows"],
        groups: Integer[np.ndarray, " rows"] | None,
        kept: Bool[np.ndarray, "fits rows"],
    ) -> Iterator[Sequence[Plane]]:
        """Site after site, the planes that `fit_rows` finds on each choice of rows, `kept[f]`, as exactly as it does.

        `UsageError`, when the turn of a site comes that has none.
        """


def as_array(X: Any) -> Any:
    """A tensor as a numpy array (bfloat16 and float16 as float32, which is exact); anything else as it is."""
    if not isinstance(X, torch.Tensor):
        return X
    X = X.detach().cpu()
    return (X.float() if X.dtype in (torch.bfloat16, torch.float16) else X).numpy()


def checked(
    estimator: Any, X: Any, y: Any, *others: Any, multi_output: bool = False
) -> tuple[Float[np.ndarray, "rows width"], np.ndarray]:
    """X in float64 and y as an array, of equal lengths, as those of `others` that are not None; X finite.

    Sets the estimator's `n_features_in_`. Raises `UsageError`, with the numbers of rows that hold NaN or infinity.
    """
    try:
        X, y = validate_data(
            estimator,
            as_array(X),
            as_array(y),
            dtype=np.float64,
            ensure_all_finite=False,
            ensure_min_samples=2,
            multi_output=multi_output,
        )
        for other in others:
            check_consistent_length(y, other)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if y.dtype == object and type_of_target(y) == "unknown":
        raise UsageError(
            f"Unknown label type: y is an array of {y.dtype} with values such as {y.flat[0]!r}; give an array of "
            "numbers, bools or strings"
        )
    require_finite(X)
    return X, y


def binary_codes(y: np.ndarray) -> tuple[np.ndarray, Bool[np.ndarray, " rows"]]:
    """The two labels in y, and which rows have the greater one. Raises `UsageError` unless there are two."""
    try:
        check_classification_targets(y)
    except ValueError as error:
        raise UsageError(str(error)) from error
    classes, codes = np.unique(y, return_inverse=True)
    if len(classes) == 1:
        raise UsageError(f"y holds one class only ({classes.tolist()[0]!r}); a reader needs two classes")
    if type_of_target(y) != "binary":
        found = ", ".join(map(repr, classes[:6].tolist()))
        raise UsageError(
            "Only binary classification is supported. "
            f"y is {type_of_target(y)}, with {len(classes)} classes: {found}"
            f"{', …' if len(classes) > 6 else ''}. Keep the rows of two of them."
        )
    return classes, codes == 1


def checked_again(estimator: Any, fitted: str, X: Any) -> Float[np.ndarray, "rows width"]:
    """X in float64, finite and as wide as in `fit`; `ReaderNotFitted` if there is no attribute `fitted` yet."""
    if not hasattr(estimator, fitted):
        raise ReaderNotFitted(f"this {type(estimator).__name__} is not fitted yet; call fit(X, y) first")
    try:
        X = validate_data(estimator, as_array(X), dtype=np.float64, ensure_all_finite=False, reset=False)
    except ValueError as error:
        raise UsageError(str(error)) from error
    require_finite(X)
    rows: np.ndarray = X
    return rows


def direction_of(plane: Plane, scale: float, reader: Any, classes: tuple[Any, Any] | None) -> Direction:
    """The direction of a plane that `reader` has found."""
    length = float(np.linalg.norm(plane.normal))
    unit = plane.normal / length
    return Direction(
        None,
        unit / np.linalg.norm(unit),  # twice: a very short normal loses digits in its norm
        offset=plane.level / length,
        scale=scale,
        sign=plane.sign,
        reader=type(reader).__name__,
        params=reader.get_params(),
        classes=classes,
    )


def without_direction(reader: str, site: object, error: UsageError) -> UsageError:
    """What to say of a site at which a reader found no direction."""
    return UsageError(f"{reader} at {site}: {error} (leave the site out with sites=)")


def require_direction(v: Float[np.ndarray, " width"], magnitude: float, why: str) -> None:
    """Raise `UsageError` with `why` if `v` is as short as the rounding error of sums of rows of this magnitude (the
    largest absolute value in them)."""
    if np.linalg.norm(v) <= 16 * np.finfo(np.float64).eps * magnitude * np.sqrt(len(v)):
        raise UsageError(why)


def require_finite(X: Float[np.ndarray, "rows width"]) -> None:
    """Raise `UsageError` with the numbers of the rows that hold NaN or infinity."""
    bad = np.flatnonzero(~np.isfinite(X).all(axis=1))
    if bad.size:
        shown = ", ".join(map(str, bad[:8])) + (", …" if bad.size > 8 else "")
        raise UsageError(f"X contains NaN or infinity (inf) in {bad.size} of {len(X)} rows: {shown}")


def above_zero(values: Any, name: str, n: int) -> Bool[np.ndarray, " rows"]:
    """Which of n rows have a value above 0. Raises `UsageError` unless the values are n finite numbers (or bools)."""
    found = np.asarray(as_array(values))
    if found.shape != (n,) or found.dtype.kind not in "biuf" or not np.isfinite(found.astype(np.float64)).all():
        raise UsageError(f"{name} must be {n} numbers or bools, one per row, not {found.dtype} of shape {found.shape}")
    return found > 0


def group_codes(groups: Any) -> Integer[np.ndarray, " rows"] | None:
    """Groups numbered from 0; None where none are given."""
    return None if groups is None else np.unique(as_array(groups), return_inverse=True)[1]


def pair_codes(pairs: Any) -> Integer[np.ndarray, " rows"]:
    """Pairs numbered from 0 in the order of their first rows; `UsageError` if a row names none."""
    return names_coded(pairs, "pair", "leave them out, or fit without pairs")


def names_coded(values: Any, name: str, way_out: str = "leave them out") -> Integer[np.ndarray, " rows"]:
    """The names numbered from 0 in the order of their first rows; `UsageError` if a row has none."""
    names = np.asarray(as_array(values), dtype=object)
    missing = np.flatnonzero([p is None or p != p for p in names])
    if missing.size:
        raise UsageError(
            f"{missing.size} of {len(names)} rows name no {name} (the first is row {missing[0]}): {way_out}"
        )
    codes: dict[Any, int] = {}
    return np.array([codes.setdefault(p, len(codes)) for p in names], dtype=np.int64)
