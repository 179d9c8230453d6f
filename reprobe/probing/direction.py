"""A direction: one unit vector at one site, with everything needed to use it rightly.

Enters: a vector with its offset and scale, from a reader or from the caller. Leaves: scores, sums of
directions, one safetensors file. Does not know how readers find directions, nor how interventions use them.

Conventions. `vector` has norm 1 and points to the positive class. `score(h) = h·vector − offset` is the
signed distance from the decision boundary, in units of the activations. `scale` is the standard deviation of
h·vector over the training rows. `step = scale · vector` is the displacement of strength 1.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float

from reprobe.errors import CorruptArtifact, IdentityMismatch, UsageError
from reprobe.model.identity import ModelIdentity
from reprobe.model.sites import Site
from reprobe.probing.artifact import Artifact, read, to_bytes, write
from reprobe.provenance import digest_bytes, rebuilding, text

if TYPE_CHECKING:
    from reprobe.store import ActivationStore

Label = bool | int | float | str
Array = TypeVar("Array", np.ndarray, torch.Tensor)

KIND = "direction"
#: How far ‖vector‖ may be from 1.
NORM_TOLERANCE = 1e-9


@dataclass(frozen=True, eq=False)
class Direction:
    """A unit vector at a site. Two directions are equal if the files they would be saved to are.

    `site` is None only for a reader that was fitted on a bare array; `at` says where the array came from.
    `vector` is float64 and read-only. `sign` tells how the sign was decided, relative to `classes` =
    (negative, positive label); `metrics` holds held-out results; `provenance` says what it was fitted on (key
    `identity`: the model). Raises `UsageError` if the vector is not one finite unit row, or if `scale` is not
    positive.
    """

    site: Site | None
    vector: Float[np.ndarray, " width"]
    offset: float = 0.0
    scale: float = 1.0
    sign: str = "not decided from labels"
    reader: str = "none"
    params: Mapping[str, Any] = field(default_factory=dict)
    classes: tuple[Label, Label] | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        vector = np.array(self.vector, dtype=np.float64)
        if vector.ndim != 1 or vector.size == 0:
            raise UsageError(f"a direction is one row of numbers, not an array of shape {vector.shape}")
        norm = float(np.linalg.norm(vector))
        if not abs(norm - 1) <= NORM_TOLERANCE:
            raise UsageError(f"the vector's norm is {norm}, not 1: use Direction.from_vector, which normalises")
        offset, scale = float(self.offset), float(self.scale)
        if not np.isfinite(offset) or not 0 < scale < np.inf:
            raise UsageError(f"a direction needs a finite offset and a positive scale, not {offset} and {scale}")
        vector.setflags(write=False)
        fixed = {"vector": vector, "offset": offset, "scale": scale}
        fixed |= {name: _plain(getattr(self, name), name) for name in ("params", "metrics", "provenance")}
        if self.classes is not None:
            negative, positive = _plain(list(self.classes), "classes")
            fixed["classes"] = (negative, positive)
        for name, value in fixed.items():
            object.__setattr__(self, name, value)

    @classmethod
    def from_vector(
        cls,
        site: Site | str,
        v: Any,
        *,
        scale: float | None = None,
        offset: float = 0.0,
        identity: ModelIdentity | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> "Direction":
        """The direction of `v`, (width,), of any length but zero.

        Without `scale` it is ‖v‖, so that strength 1 adds exactly `v`. `offset` is in units of h·v/‖v‖.
        """
        v = np.asarray(v.detach().double().cpu() if isinstance(v, torch.Tensor) else v, dtype=np.float64)
        norm = float(np.linalg.norm(v))
        if not 0 < norm < np.inf:
            raise UsageError(f"a vector of norm {norm} has no direction")
        where = Site.parse(site) if isinstance(site, str) else site
        said = dict(provenance or {}) | ({} if identity is None else {"identity": identity.to_json()})
        return cls(where, v / norm, offset=offset, scale=norm if scale is None else scale, provenance=said)

    def at(self, site: Site | str, provenance: Mapping[str, Any] | None = None) -> "Direction":
        """The same direction, said to be at `site`; `provenance` is added to what is known."""
        where = Site.parse(site) if isinstance(site, str) else site
        return dataclasses.replace(self, site=where, provenance=dict(self.provenance) | dict(provenance or {}))

    @property
    def width(self) -> int:
        """Components of the vector."""
        return int(self.vector.size)

    @property
    def step(self) -> Float[np.ndarray, " width"]:
        """scale · vector: what strength 1 adds to a row."""
        return self.scale * self.vector

    @property
    def identity(self) -> ModelIdentity | None:
        """The model it belongs to; None if that is not known."""
        value = self.provenance.get("identity")
        return None if value is None else ModelIdentity.from_json(value)

    @property
    def digest(self) -> str:
        """sha256 of the file that `save` would write."""
        return digest_bytes(self._bytes())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Direction) and self._bytes() == other._bytes()

    def __hash__(self) -> int:
        return hash((self.site, self.vector.tobytes()))

    def __repr__(self) -> str:
        return f"Direction({self.site or 'no site'}, width {self.width}, {self.reader}, scale {self.scale:.4g})"

    def project(self, h: Array) -> Array:
        """h·vector: (…, width) → (…); of a single row, a scalar.

        NumPy rows are computed in float64. Tensors are computed in float32, float64 ones in float64, on their
        device and in their graph.
        """
        if h.shape[-1:] != (self.width,):
            raise UsageError(
                f"{self!r} reads rows of width {self.width}, not an array of shape {tuple(h.shape)}: are they of "
                f"{self.site or 'its site'}?"
            )
        if isinstance(h, torch.Tensor):
            rows = h if h.dtype == torch.float64 else h.float()
            return rows @ torch.tensor(self.vector, dtype=rows.dtype, device=rows.device)
        projected: np.ndarray = np.asarray(h, dtype=np.float64) @ self.vector
        return projected

    def score(self, h: Array) -> Array:
        """h·vector − offset: (…, width) → (…). Above 0 is the positive class; precision as in `project`."""
        return self.project(h) - self.offset

    def score_rows(
        self, store: "ActivationStore", rows: Any = None, *, allow_mismatch: bool = False
    ) -> Float[np.ndarray, " rows"]:
        """Scores of a store's rows at this direction's own site, in float64; `rows` as in `store.read`.

        An array does not say where it was read; a store does. Reads in batches. Raises `UnknownSite` if the store
        lacks the site, `IdentityMismatch` if it is of another model (unless `allow_mismatch`), `UsageError` if the
        direction has no site, and what `store.iter` does.
        """
        if self.site is None:
            raise UsageError(
                "the direction has no site of its own: say where it is read with direction.at('resid.post@…')"
            )
        if (mine := self.identity) is not None:
            mine.require_same(store.identity, f"the direction at {self.site}", allow_mismatch=allow_mismatch)
        found = [self.score(batch.values.double().numpy()) for batch in store.iter(self.site, rows=rows)]
        return np.concatenate(found) if found else np.empty(0)

    def cosine(self, other: "Direction") -> float:
        """The cosine between two directions of equal width; their sites may differ."""
        if self.width != other.width:
            raise UsageError(f"no cosine between widths {self.width} ({self.site}) and {other.width} ({other.site})")
        return float(np.clip(self.vector @ other.vector, -1.0, 1.0))

    # Algebra. A direction stands for its step and for the function scale · score(h); both are linear in what
    # follows, so that steering by a + b is steering by a and by b.

    def __add__(self, other: "Direction") -> "Direction":
        """The direction whose step is the sum of the steps, and whose scale · score is the sum of the terms'.

        Its scale is therefore the length of the summed step, no longer a measured standard deviation. Raises
        `UsageError` if the sites differ or the steps cancel, `IdentityMismatch` if the models differ.
        """
        if not isinstance(other, Direction):
            return NotImplemented
        _require_one_site(self, other)
        return _combined((self, other), (1.0, 1.0), self.site, reader="sum", sign="the sum of the terms' steps")

    def __sub__(self, other: "Direction") -> "Direction":
        return self + (-other) if isinstance(other, Direction) else NotImplemented

    def __mul__(self, factor: float) -> "Direction":
        """`factor` times the step: the scale is multiplied; a negative factor turns the direction round."""
        if not isinstance(factor, int | float | np.number):
            return NotImplemented
        if not 0 < abs(factor) < np.inf:
            raise UsageError(f"a direction times {factor} points nowhere")
        scaled = dataclasses.replace(self, scale=self.scale * abs(float(factor)))
        return scaled if factor > 0 else -scaled

    __rmul__ = __mul__
    __array_ufunc__ = None  # numpy scalars leave `2.0 * direction` to __rmul__

    def __neg__(self) -> "Direction":
        """The direction to the other class: score and vector change sign, held-out metrics stay true."""
        classes = None if self.classes is None else (self.classes[1], self.classes[0])
        return dataclasses.replace(self, vector=-self.vector, offset=-self.offset, classes=classes)

    def orthogonalise(self, *against: "Direction") -> "Direction":
        """What is left of this direction at a right angle to all of `against` (Gram–Schmidt), at the same site.

        The vector is v − Pv, normalised, with P the projection onto the span of theirs (float64; the cosine with each
        is below 1e-12). Pv = Σ cᵢ wᵢ, and what is subtracted from the vector is subtracted from the function: with
        n = ‖v − Pv‖, score = (score of this − Σ cᵢ · score of the i-th) / n. So the offset keeps its meaning: a row
        on all boundaries stays on the new one. The scale is n times this one's, so that strength 1 adds what is left
        of the step; it is no measured standard deviation. If some of `against` depend on each other, the c of least
        norm are taken. Raises `UsageError` if the sites differ or nothing is left (n < 1e-9), `IdentityMismatch` if
        the models differ.
        """
        if not against:
            raise UsageError("orthogonalise against what? give one direction or several")
        _require_one_site(self, *against)
        W = np.stack([d.vector for d in against])
        U, sizes, Vt = np.linalg.svd(W, full_matrices=False)
        kept = sizes > 1e-12 * sizes[0] * max(W.shape)
        span = Vt[kept]
        left = self.vector - span.T @ (span @ self.vector)
        n = float(np.linalg.norm(left))
        if n < 1e-9:
            raise UsageError(f"{self!r} lies in the span of what it should be at a right angle to: nothing is left")
        left = left / n
        left -= span.T @ (span @ left)  # once more: of a small remainder, rounding is a large part
        c = U[:, kept] @ ((span @ self.vector) / sizes[kept])
        weights = (1.0, *(-float(c_i) * self.scale / d.scale for c_i, d in zip(c, against, strict=True)))
        return _combined(
            (self, *against),
            weights,
            self.site,
            reader="orthogonalise",
            sign=self.sign,
            classes=self.classes,
            step=self.scale * n * left / np.linalg.norm(left),
        )

    @classmethod
    def mean(cls, directions: "Iterable[Direction]", *, site: Site | str | None = None) -> "Direction":
        """The direction whose step is the mean of the steps, and whose scale · score is the mean of the terms'.

        Terms of the same two classes are first turned to the same positive one, that of the first term. They may be of
        several sites of equal width, such as a stream's blocks; then `site` says of which site the mean is (it was
        measured at none). Terms count by their scales: give them one scale, `dataclasses.replace(d, scale=1)`, to
        count alike. Raises `UsageError` if there are none, if widths or classes differ or the steps cancel,
        `IdentityMismatch` if the models differ.
        """
        terms = tuple(directions)
        if not terms:
            raise UsageError("a mean needs at least one direction")
        _require_one_model(*terms)
        sites = {d.site for d in terms}
        if site is None and len(sites) > 1:
            names = ", ".join(dict.fromkeys(str(d.site) for d in terms))
            raise UsageError(f"directions of several sites ({names}): say of which their mean is with site=")
        first = terms[0]
        where = first.site if site is None else Site.parse(site) if isinstance(site, str) else site
        aligned = tuple(_turned_to(first, d) for d in terms)
        sign = "the mean of the terms' steps" + ("" if first.classes is None else ", turned to one positive class")
        return _combined(aligned, (1 / len(terms),) * len(terms), where, reader="mean", sign=sign)

    def to_json(self) -> dict[str, Any]:
        """Everything but the vector, as plain JSON."""
        out: dict[str, Any] = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "vector"}
        out["site"] = None if self.site is None else str(self.site)
        out["classes"] = None if self.classes is None else list(self.classes)
        return out

    @classmethod
    def from_json(cls, value: Mapping[str, Any], vector: Float[np.ndarray, " width"]) -> "Direction":
        """The inverse of `to_json`; `CorruptArtifact` if anything is missing, unknown or impossible."""
        with rebuilding("not a direction"):
            known = dict(value)
            site, classes = known.pop("site"), known.pop("classes")
            for name in ("sign", "reader"):
                text(known.get(name, ""))
            out = cls(
                site=None if site is None else Site.parse(site),
                vector=vector,
                classes=None if classes is None else tuple(classes),
                **known,
            )
            _ = out.identity
        return out

    def _bytes(self) -> bytes:
        return to_bytes(KIND, Artifact(self.to_json(), {"vector": self.vector}))

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write one safetensors file, whole or not at all; `ArtifactExists` unless `overwrite`."""
        path = Path(path)
        write(path, KIND, Artifact(self.to_json(), {"vector": self.vector}), overwrite=overwrite)
        return path

    @classmethod
    def load(cls, path: str | Path) -> "Direction":
        """What `save` wrote, bit for bit. Raises `ArtifactMissing`, `CorruptArtifact`, or `UsageError`."""
        path = Path(path)
        artifact = read(path, KIND)
        if set(artifact.arrays) != {"vector"}:
            raise CorruptArtifact(f"{path}: a direction holds one array named 'vector'")
        return cls.from_json(artifact.header, artifact.arrays["vector"])


def _require_one_model(*directions: Direction) -> None:
    """Raise `UsageError` unless all are equally wide, `IdentityMismatch` unless all are of one model, or of none."""
    first, mine = directions[0], directions[0].identity
    for other in directions[1:]:
        if other.width != first.width:
            raise UsageError(f"directions of different widths: {first!r} and {other!r}")
        theirs = other.identity
        if (mine is None) != (theirs is None):
            raise IdentityMismatch(f"one of {first!r} and {other!r} does not say of which model it is")
        if mine is not None and theirs is not None:
            mine.require_same(theirs, f"{first!r}")


def _require_one_site(*directions: Direction) -> None:
    """Raise `UsageError` unless all are of one site, and as `_require_one_model` does."""
    first = directions[0]
    for other in directions[1:]:
        if other.site != first.site or other.width != first.width:
            raise UsageError(f"directions add up at one site only, not {first!r} and {other!r}")
    _require_one_model(*directions)


def _turned_to(first: Direction, other: Direction) -> Direction:
    """`other` with the classes of `first`, turned round if need be."""
    if other.classes == first.classes:
        return other
    if first.classes is None or other.classes is None or set(first.classes) != set(other.classes):
        raise UsageError(
            f"{first!r} tells {first.classes} apart and {other!r} {other.classes}: a mean is over the same two classes"
        )
    return -other


def _combined(
    terms: Sequence[Direction],
    weights: Sequence[float],
    site: Site | None,
    *,
    reader: str,
    sign: str,
    classes: tuple[Label, Label] | None = None,
    step: Float[np.ndarray, " width"] | None = None,
) -> Direction:
    """The direction of Σ wᵢ · stepᵢ (or `step`, if it is known better), with the offset that goes with it.

    `classes` are by default those of the terms, if they agree. Raises `UsageError` if the steps cancel.
    """
    if step is None:
        step = np.sum([w * d.step for w, d in zip(weights, terms, strict=True)], axis=0)
    norm = float(np.linalg.norm(step))
    if norm <= 1e-12 * sum(abs(w) * d.scale for w, d in zip(weights, terms, strict=True)):
        raise UsageError(f"the steps of {' and '.join(map(repr, terms))} cancel: nothing is left to point anywhere")
    agreed = terms[0].classes if all(d.classes == terms[0].classes for d in terms) else None
    mine = terms[0].identity
    return Direction(
        site,
        step / norm,
        offset=sum(w * d.scale * d.offset for w, d in zip(weights, terms, strict=True)) / norm,
        scale=norm,
        sign=sign,
        reader=reader,
        classes=classes or agreed,
        provenance={"terms": [d.to_json() for d in terms]} | ({} if mine is None else {"identity": mine.to_json()}),
    )


def _plain(value: Any, what: str) -> Any:
    """A JSON copy of `value`, numpy scalars included, so that it equals itself after a round trip through a
    file."""

    def item(x: Any) -> Any:
        if isinstance(x, np.generic):
            return x.item()
        raise TypeError(f"{type(x).__name__} {x!r} is not plain JSON")

    try:
        return json.loads(json.dumps(value, default=item, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise UsageError(f"a direction's {what} must be plain JSON without NaN: {error}") from error
