"""One-pass moments: all that mean-difference, LDA, ridge and eraser need of the rows they are fitted on.

Enters: rows of activations, at once, in batches, or from a store larger than memory. Leaves: frozen values that
add up (two halves of the rows give the whole) and subtract (the whole without a fold). Does not know readers.

Everything is float64 and centred: a scatter is Σ(x−μ)(x−μ)ᵀ about the mean of its own rows, and two are merged by
the update of Chan, Golub & LeVeque (1979). The textbook Σxxᵀ − nμμᵀ loses all its digits where a feature's mean is
large beside its spread, which residual streams have.
"""

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import Any, Generic, Literal, NamedTuple, Protocol, Self, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Integer

from reprobe.errors import UsageError
from reprobe.model.sites import Site
from reprobe.probing.direction import Label
from reprobe.probing.reader import as_array, require_finite
from reprobe.probing.rows import ClassRows, NumberRows, ProbeRows

Scatter = Literal["full", "diagonal"]


@dataclass(frozen=True, eq=False)
class Moments:
    """Number, mean and scatter of some rows. Read-only arrays.

    `scatter` is the sum of squares and products about the mean, (width, width), or its diagonal, (width,).
    """

    n: int
    mean: Float[np.ndarray, " width"]
    scatter: Float[np.ndarray, "width width"] | Float[np.ndarray, " width"]

    def __post_init__(self) -> None:
        self.mean.setflags(write=False)
        self.scatter.setflags(write=False)

    @classmethod
    def of(cls, X: Any, scatter: Scatter = "full") -> "Moments":
        """The moments of rows (n, width)."""
        return MomentsAccumulator(X.shape[1], scatter).add(X).result()

    @property
    def width(self) -> int:
        return len(self.mean)

    @property
    def kind(self) -> Scatter:
        return "full" if self.scatter.ndim == 2 else "diagonal"

    @property
    def std(self) -> Float[np.ndarray, " width"]:
        """Standard deviation of each feature, over n (not n − 1)."""
        diagonal = np.diagonal(self.scatter) if self.kind == "full" else self.scatter
        found: np.ndarray = np.sqrt(np.maximum(diagonal, 0) / max(self.n, 1))
        return found

    @property
    def magnitude(self) -> float:
        """About the largest absolute value in the rows: what their rounding errors are in proportion to."""
        return float(np.max(np.abs(self.mean) + 4 * self.std))

    def std_along(self, unit: Float[np.ndarray, " width"]) -> float:
        """Standard deviation of h·unit over the rows. Raises `UsageError` if only the diagonal is known."""
        self.require_full("the spread along a direction")
        return float(np.sqrt(max(unit @ self.scatter @ unit, 0.0) / self.n))

    def require_full(self, what: str) -> None:
        """Raise `UsageError` unless products of features are known."""
        if self.kind != "full":
            raise UsageError(f"{what} needs all products of features: collect moments with scatter='full'")

    def __add__(self, other: "Moments") -> "Moments":
        """The moments of both sets of rows together."""
        return MomentsAccumulator(self.width, self.kind).merge(self).merge(other).result()

    def __sub__(self, part: "Moments") -> "Moments":
        """The moments of the rows that are left when those of `part` are taken away.

        Rounding errors are in proportion to the whole, not to what is left. Raises `UsageError` if `part` has more
        rows.
        """
        _require_alike(self, part)
        n = self.n - part.n
        if n < 0:
            raise UsageError(f"{part.n} rows cannot be taken away from {self.n}")
        if n == 0:
            return MomentsAccumulator(self.width, self.kind).result()
        mean = (self.n * self.mean - part.n * part.mean) / n
        scatter = self.scatter - part.scatter - n * part.n / self.n * _square(mean - part.mean, self.kind)
        return Moments(n, mean, scatter)


class MomentsAccumulator:
    """Moments in the making: `add` batches of rows or `merge` moments, then take the `result`.

    Holds width² numbers (width, for the diagonal), however many rows are added.
    """

    def __init__(self, width: int, scatter: Scatter = "full") -> None:
        if scatter not in ("full", "diagonal"):
            raise UsageError(f"scatter={scatter!r}; one of 'full', 'diagonal'")
        self._kind: Scatter = scatter
        self._n = 0
        self._mean = np.zeros(width)
        self._scatter = np.zeros((width, width) if scatter == "full" else width)

    def add(self, X: Any) -> Self:
        """Add rows (n, width), numpy or torch of any dtype. Raises `UsageError` for another width, NaN, infinity."""
        rows = np.asarray(as_array(X), dtype=np.float64)
        if rows.ndim != 2 or rows.shape[1] != len(self._mean):
            raise UsageError(f"these moments are of rows of width {len(self._mean)}, not of shape {rows.shape}")
        require_finite(rows)
        if len(rows):
            mean = rows.mean(axis=0)
            centred = rows - mean
            scatter = centred.T @ centred if self._kind == "full" else np.einsum("ij,ij->j", centred, centred)
            self.merge(Moments(len(rows), mean, scatter))
        return self

    def merge(self, other: Moments) -> Self:
        """Add the rows that `other` is of."""
        _require_alike(Moments(self._n, self._mean.view(), self._scatter.view()), other)
        if other.n:
            n = self._n + other.n
            self._scatter += other.scatter
            self._scatter += self._n * other.n / n * _square(other.mean - self._mean, self._kind)
            self._mean = (self._n * self._mean + other.n * other.mean) / n
            self._n = n
        return self

    def result(self) -> Moments:
        """The moments so far; adding more does not change them."""
        return Moments(self._n, self._mean.copy(), self._scatter.copy())


@dataclass(frozen=True, eq=False)
class JointMoments:
    """Moments of rows x together with targets z: those of the rows [x | z], of which the first `width` are x."""

    joint: Moments
    width: int

    @classmethod
    def of(cls, X: Float[np.ndarray, "rows width"], Z: Float[np.ndarray, "rows targets"]) -> "JointMoments":
        return cls(Moments.of(np.concatenate([X, Z], axis=1)), X.shape[1])

    @property
    def x(self) -> Moments:
        w = self.width
        return Moments(self.joint.n, self.joint.mean[:w], self.joint.scatter[:w, :w])

    @property
    def z(self) -> Moments:
        w = self.width
        return Moments(self.joint.n, self.joint.mean[w:], self.joint.scatter[w:, w:])

    @property
    def cross(self) -> Float[np.ndarray, "width targets"]:
        """Σ(x−μ)(z−z̄)ᵀ."""
        found: np.ndarray = self.joint.scatter[: self.width, self.width :]
        return found

    def __add__(self, other: "JointMoments") -> "JointMoments":
        return JointMoments(self.joint + other.joint, self.width)

    def __sub__(self, part: "JointMoments") -> "JointMoments":
        return JointMoments(self.joint - part.joint, self.width)


@dataclass(frozen=True, eq=False)
class ClassMoments:
    """The moments of each class; `of[i]` are those of `classes[i]`. Add up and subtract class by class."""

    classes: tuple[Label, ...]
    of: tuple[Moments, ...]

    @classmethod
    def of_rows(
        cls,
        X: Float[np.ndarray, "rows width"],
        codes: Integer[np.ndarray, " rows"],
        classes: Sequence[Label],
        scatter: Scatter = "full",
    ) -> "ClassMoments":
        """`codes` says of each row which of `classes` it is."""
        return cls(tuple(classes), tuple(Moments.of(X[codes == c], scatter) for c in range(len(classes))))

    @property
    def n(self) -> Integer[np.ndarray, " classes"]:
        return np.array([m.n for m in self.of])

    @property
    def means(self) -> Float[np.ndarray, "classes width"]:
        return np.stack([m.mean for m in self.of])

    @cached_property
    def within(self) -> Float[np.ndarray, "width width"] | Float[np.ndarray, " width"]:
        """The scatter about the classes' own means, of all rows."""
        pooled: np.ndarray = sum((m.scatter for m in self.of[1:]), start=self.of[0].scatter)
        return pooled

    @cached_property
    def total(self) -> Moments:
        """The moments of all rows, classes forgotten."""
        accumulator = MomentsAccumulator(self.of[0].width, self.of[0].kind)
        for m in self.of:
            accumulator.merge(m)
        return accumulator.result()

    def joint(self, targets: Float[np.ndarray, "classes targets"]) -> JointMoments:
        """With the rows' targets, which are those of their class."""
        total, n = self.total, self.n
        total.require_full("products with targets")
        centre = n @ targets / total.n
        off = targets - centre
        cross = (self.means - total.mean).T @ (n[:, None] * off)
        scatter = np.block([[total.scatter, cross], [cross.T, off.T @ (n[:, None] * off)]])
        return JointMoments(Moments(total.n, np.concatenate([total.mean, centre]), scatter), total.width)

    def __add__(self, other: "ClassMoments") -> "ClassMoments":
        return ClassMoments(self._same(other), tuple(a + b for a, b in zip(self.of, other.of, strict=True)))

    def __sub__(self, part: "ClassMoments") -> "ClassMoments":
        return ClassMoments(self._same(part), tuple(a - b for a, b in zip(self.of, part.of, strict=True)))

    def _same(self, other: "ClassMoments") -> tuple[Label, ...]:
        if self.classes != other.classes:
            raise UsageError(f"moments of the classes {self.classes} and of {other.classes} are not of one kind")
        return self.classes


@dataclass(frozen=True, eq=False)
class PairMoments:
    """The moments of pair differences, the second class's side less the first's, and of all rows in the pairs.

    A side with several rows enters by its mean.
    """

    classes: tuple[Label, Label]
    difference: Moments
    rows: Moments

    def __add__(self, other: "PairMoments") -> "PairMoments":
        return PairMoments(self.classes, self.difference + other.difference, self.rows + other.rows)

    def __sub__(self, part: "PairMoments") -> "PairMoments":
        return PairMoments(self.classes, self.difference - part.difference, self.rows - part.rows)


AnyMoments = TypeVar("AnyMoments", ClassMoments, JointMoments, PairMoments)


@dataclass(frozen=True, eq=False)
class FoldMoments(Generic[AnyMoments]):
    """The moments of each fold."""

    folds: tuple[AnyMoments, ...]

    @cached_property
    def total(self) -> AnyMoments:
        """Of the rows of all folds."""
        return reduce(operator.add, self.folds)

    def without(self, *folds: int) -> AnyMoments:
        """Of the rows outside some folds: those that a reader judged on these is fitted on."""
        return reduce(operator.sub, (self.folds[k] for k in folds), self.total)


class SiteMoments(NamedTuple, Generic[AnyMoments]):
    """What one site of a store gave."""

    site: Site
    moments: FoldMoments[AnyMoments]


class Batches(Protocol):
    """What `read_moments` asks of a store; an `ActivationStore` does it."""

    def iter(
        self, sites: Iterable[str | Site], *, batch_rows: int = ..., shuffle: None = ..., rows: Any = ...
    ) -> Iterator[Any]: ...
    def read(self, site: Site, rows: Any = None) -> torch.Tensor: ...
    def width(self, site: Site) -> int: ...


def read_moments(
    store: Batches,
    sites: Sequence[Site],
    rows: ProbeRows | ClassRows,
    *,
    fold: Integer[np.ndarray, " n"] | None = None,
    scatter: Scatter = "full",
    batch_rows: int = 1024,
    memory: int = 2 << 30,
) -> Iterator[SiteMoments[ClassMoments]]:
    """The moments of each site, per fold and class, each site read once from beginning to end.

    `fold` is the fold of each of `rows` (None: one fold of all), `memory` in bytes bounds the sums that are held at
    once: 8 · width² · folds · classes for each site (8 · width · folds · classes for the diagonal). As many sites are
    read side by side as fit; beside them are in memory what `store.iter` says, and one batch of a site in float64,
    twice. Takes as long per row as two products with a (width, width) matrix in float64.

    Raises `UsageError` for NaN and infinity (with the rows' numbers), and if a single site does not fit.
    """
    folds = np.zeros(len(rows), dtype=np.int64) if fold is None else np.asarray(fold)
    n_folds = int(folds.max()) + 1
    order = np.argsort(rows.rows, kind="stable")
    wanted = rows.rows[order]
    n_classes = len(rows.classes)
    n_cells = n_classes * n_folds
    cells = (n_classes * folds + rows.codes)[order]
    widths = {site: store.width(site) for site in sites}
    sizes = {site: 8 * n_cells * (width * width if scatter == "full" else width) for site, width in widths.items()}
    for pack in packs(sizes, memory):
        sums = {site: [MomentsAccumulator(widths[site], scatter) for _ in range(n_cells)] for site in pack}
        for site, place, X in finite_batches(store, pack, wanted, batch_rows):
            for c in np.unique(cells[place]):
                sums[site][c].add(X[cells[place] == c])
        for site in pack:
            found = [s.result() for s in sums.pop(site)]
            by_fold = (tuple(found[n_classes * k : n_classes * (k + 1)]) for k in range(n_folds))
            yield SiteMoments(site, FoldMoments(tuple(ClassMoments(rows.classes, of) for of in by_fold)))


def read_joint_moments(
    store: Batches,
    sites: Sequence[Site],
    rows: NumberRows,
    *,
    fold: Integer[np.ndarray, " n"] | None = None,
    batch_rows: int = 1024,
    memory: int = 2 << 30,
) -> Iterator[SiteMoments[JointMoments]]:
    """The joint moments of each site's rows and their numbers, per fold: what `RidgeReader.fit_moments` takes.

    Each site is read once; arguments, memory (8 · width² · folds for each site) and errors as in `read_moments`.
    """
    folds = np.zeros(len(rows), dtype=np.int64) if fold is None else np.asarray(fold)
    n_folds = int(folds.max()) + 1
    order = np.argsort(rows.rows, kind="stable")
    wanted, folds, targets = rows.rows[order], folds[order], rows.values[order, None]
    widths = {site: store.width(site) for site in sites}
    for pack in packs({site: 8 * n_folds * (width + 1) ** 2 for site, width in widths.items()}, memory):
        sums = {site: [MomentsAccumulator(widths[site] + 1) for _ in range(n_folds)] for site in pack}
        for site, place, X in finite_batches(store, pack, wanted, batch_rows):
            both = np.concatenate([X, targets[place]], axis=1)
            for k in np.unique(folds[place]):
                sums[site][k].add(both[folds[place] == k])
        for site in pack:
            found = tuple(JointMoments(s.result(), widths[site]) for s in sums.pop(site))
            yield SiteMoments(site, FoldMoments(found))


class SiteBatch(NamedTuple):
    """Some rows of a site in float64, and their place among the rows wanted."""

    site: Site
    place: slice
    X: Float[np.ndarray, "batch width"]


def finite_batches(
    store: Batches, sites: Sequence[Site], wanted: Integer[np.ndarray, " n"], batch_rows: int
) -> Iterator[SiteBatch]:
    """The wanted rows, batch by batch, of each site in turn; `UsageError` for NaN and infinity."""
    done = 0
    for batch in store.iter(list(sites), batch_rows=batch_rows, rows=wanted):
        place = slice(done, done + len(batch.rows))
        for site, values in batch.values.items():
            X = np.asarray(as_array(values), dtype=np.float64)
            bad = np.flatnonzero(~np.isfinite(X).all(axis=1))
            if bad.size:
                shown = ", ".join(map(str, batch.rows[bad[:8]])) + (", …" if bad.size > 8 else "")
                raise UsageError(
                    f"{site}: NaN or infinity in {bad.size} of rows {batch.rows.min()}–{batch.rows.max()}: {shown}"
                )
            yield SiteBatch(site, place, X)
        done = place.stop


def packs(sizes: Mapping[Site, int], memory: int) -> Iterator[list[Site]]:
    """Sites in their order, as many together as have room for their sums, which take `sizes` bytes."""
    pack: list[Site] = []
    left = memory
    for site, size in sizes.items():
        if size > memory:
            raise UsageError(
                f"{site}: the moments of all folds and classes take {size / 2**30:.2f} GiB, more than memory={memory}: "
                "allow more, or use fewer folds (or, in `read_moments`, scatter='diagonal')"
            )
        if size > left:
            yield pack
            pack, left = [], memory
        pack.append(site)
        left -= size
    if pack:
        yield pack


def _square(delta: Float[np.ndarray, " width"], kind: Scatter) -> np.ndarray:
    return np.outer(delta, delta) if kind == "full" else delta * delta


def _require_alike(a: Moments, b: Moments) -> None:
    if a.scatter.shape != b.scatter.shape:
        raise UsageError(f"moments of width {a.width} ({a.kind}) and of width {b.width} ({b.kind}) do not mix")
