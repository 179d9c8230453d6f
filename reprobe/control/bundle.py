"""A `Steering`: a named bundle of interventions that knows its model, is saved, loaded and put together.

Enters: operators, where they come from. Leaves: one safetensors file with a JSON header; sums and multiples of bundles.
Does not know how a model is steered.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from reprobe.control.along import Ablate, Add, Clamp, Scale
from reprobe.control.commute import commute
from reprobe.control.gates import When
from reprobe.control.maps import Affine, LowRank
from reprobe.control.operators import Operator
from reprobe.control.scopes import Scope
from reprobe.control.streams import AddContrast
from reprobe.control.values import Noise, Replace
from reprobe.errors import UsageError
from reprobe.model.identity import ModelIdentity
from reprobe.model.sites import Site
from reprobe.probing.artifact import Artifact, read, write
from reprobe.probing.direction import Direction
from reprobe.provenance import rebuilding, text

KIND = "steering"
#: The operators that a file may name.
_OPERATORS = {c.__name__: c for c in (Ablate, Add, AddContrast, Affine, Clamp, LowRank, Noise, Replace, Scale)}


@dataclass(frozen=True, init=False, eq=False)
class Steering:
    """Interventions that belong together, in the order in which they act at one site.

    `name` is for people; `provenance` plain JSON about where it comes from (a method, its parameters, data);
    `identity` the model it belongs to: given, or that of its interventions. Raises `IdentityMismatch` if those are of
    different models, `UsageError` for what is no intervention.
    """

    interventions: tuple[Operator, ...]
    name: str
    provenance: Mapping[str, Any]
    identity: ModelIdentity | None

    def __init__(
        self,
        *interventions: Operator,
        name: str = "steering",
        provenance: Mapping[str, Any] | None = None,
        identity: ModelIdentity | None = None,
    ) -> None:
        if wrong := [x for x in interventions if not isinstance(x, Operator)]:
            raise UsageError(
                f"a Steering holds interventions, one argument each, not a {type(wrong[0]).__name__}: of a direction "
                "make one, such as Add(direction); of a list write Steering(*items); Steerings go together by a.then(b)"
            )
        known = [i for i in (identity, *(i for item in interventions for i in _identities(item))) if i is not None]
        for other in known[1:]:
            known[0].require_same(other, f"one part of the steering {name!r}")
        values = {
            "interventions": tuple(interventions),
            "name": name,
            "provenance": dict(provenance or {}),
            "identity": known[0] if known else None,
        }
        for field, value in values.items():
            object.__setattr__(self, field, value)

    def __len__(self) -> int:
        return len(self.interventions)

    def __str__(self) -> str:
        return f"{self.name} ({len(self)} interventions)"

    __repr__ = __str__

    # -- together ----------------------------------------------------------------------------------------------

    def then(self, other: "Steering | Operator") -> "Steering":
        """Both, where they meet at a site this one first."""
        after = other if isinstance(other, Steering) else Steering(other, name=type(other).__name__)
        return Steering(
            *self.interventions,
            *after.interventions,
            name=f"{self.name} then {after.name}",
            provenance={"parts": [self._origin(), after._origin()]},
            identity=self.identity or after.identity,
        )

    def __add__(self, other: "Steering | Operator") -> "Steering":
        """Both, in whatever order: raises `UsageError` where that would matter, and says how to state it."""
        if not isinstance(other, Steering | Operator):
            return NotImplemented
        theirs = other.interventions if isinstance(other, Steering) else (other,)
        for a in self.interventions:
            for b in theirs:
                if not commute(a, b):
                    raise UsageError(
                        f"the order of '{a}' (of {self.name!r}) and '{b}' matters, and a sum states none; write "
                        "a.then(b), where a acts first, or list them in one Steering"
                    )
        joined = self.then(other)
        return Steering(
            *joined.interventions,
            name=joined.name.replace(" then ", " + "),
            provenance=joined.provenance,
            identity=joined.identity,
        )

    def __mul__(self, factor: float) -> "Steering":
        """Every intervention's strength times `factor`: how far it goes from h to what it would make of it."""
        if not isinstance(factor, int | float | np.number):
            return NotImplemented
        items = [dataclasses.replace(i, strength=i.strength * float(factor)) for i in self.interventions]
        return Steering(
            *items,
            name=f"{float(factor):g} × {self.name}",
            provenance={"factor": float(factor), "of": self._origin()},
            identity=self.identity,
        )

    __rmul__ = __mul__

    def _origin(self) -> dict[str, Any]:
        return {"name": self.name, "provenance": dict(self.provenance)}

    # -- on disk -----------------------------------------------------------------------------------------------

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write one safetensors file, whole or not at all; `ArtifactExists` unless `overwrite`.

        Raises `UsageError` for an operator that is not one of reprobe's own: a file cannot bring its code along.
        """
        arrays: dict[str, np.ndarray] = {}
        items = []
        for item in self.interventions:
            kind = type(item).__name__
            if _OPERATORS.get(kind) is not type(item):
                raise UsageError(f"a {kind} cannot be saved: only {', '.join(_OPERATORS)} can be read back")
            fields = {f.name: getattr(item, f.name) for f in dataclasses.fields(item)}
            items.append({"operator": kind, **{name: _coded(value, arrays) for name, value in fields.items()}})
        header = {
            "name": self.name,
            "provenance": self.provenance,
            "identity": None if self.identity is None else self.identity.to_json(),
            "interventions": items,
        }
        path = Path(path)
        write(path, KIND, Artifact(header, arrays), overwrite=overwrite)
        return path

    @classmethod
    def load(cls, path: str | Path) -> "Steering":
        """What `save` wrote. Raises `ArtifactMissing`, `CorruptArtifact`, or `UsageError` for something else."""
        artifact = read(Path(path), KIND)
        with rebuilding(f"{path}: not a steering"):
            header = dict(artifact.header)
            items = []
            for coded in header["interventions"]:
                fields = {name: _decoded(value, artifact.arrays) for name, value in coded.items()}
                items.append(_OPERATORS[fields.pop("operator")](**fields))
            identity = header["identity"]
            return cls(
                *items,
                name=text(header["name"]),
                provenance=header["provenance"],
                identity=None if identity is None else ModelIdentity.from_json(identity),
            )


def _identities(item: Operator) -> list[ModelIdentity | None]:
    return [item.identity, None if item.when is None else item.when.identity]


def _coded(value: Any, arrays: dict[str, np.ndarray]) -> Any:
    """A field as JSON; arrays go to `arrays` and leave their name."""

    def kept(array: np.ndarray) -> str:
        name = f"{len(arrays):04d}"
        arrays[name] = array
        return name

    if isinstance(value, np.ndarray):
        return {"array": kept(value)}
    if isinstance(value, Direction):
        return {"direction": value.to_json(), "vector": kept(value.vector)}
    if isinstance(value, When):
        return {"when": {f.name: _coded(getattr(value, f.name), arrays) for f in dataclasses.fields(value)}}
    if isinstance(value, ModelIdentity):
        return {"identity": value.to_json()}
    if isinstance(value, Site):
        return {"site": str(value)}
    if isinstance(value, Scope):
        return {"scope": str(value)}
    return list(value) if isinstance(value, tuple) else value


def _decoded(value: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    match value:
        case {"array": name}:
            return arrays[name]
        case {"direction": known, "vector": name}:
            return Direction.from_json(known, arrays[name])
        case {"when": fields}:
            return When(**{name: _decoded(field, arrays) for name, field in fields.items()})
        case {"identity": known}:
            return ModelIdentity.from_json(known)
        case {"site": text}:
            return Site.parse(text)
        case {"scope": text}:
            return Scope.parse(text)
    return value
