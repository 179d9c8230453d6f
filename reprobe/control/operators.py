"""Operators: what an intervention does to a vector.

Enters: a `Direction` and a strength, or a matrix; a site and a scope. Leaves: frozen interventions that `steer` puts
into a model. All return new tensors and leave tokens outside their scope, pads above all, bit for bit as they were.
Does not know how hooks are registered.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from reprobe.control.scopes import Scope
from reprobe.errors import UsageError
from reprobe.model.hooks import Tokens
from reprobe.model.identity import ModelIdentity
from reprobe.model.sites import Site
from reprobe.probing.direction import Direction

Unit = Literal["scale", "raw"]


@dataclass(frozen=True, init=False, eq=False)
class _Operator:
    """What acts at a site, on a scope of tokens."""

    site: Site
    tokens: Scope

    def __init__(self, site: Site | str, tokens: Scope | str) -> None:
        object.__setattr__(self, "site", Site.parse(site) if isinstance(site, str) else site)
        object.__setattr__(self, "tokens", Scope.parse(tokens))

    @property
    def by_role(self) -> bool:
        """Whether it matters which tokens are prompt and which are generated."""
        return self.tokens.kind != "all"

    @cached_property
    def _copies(self) -> dict[tuple[str, torch.device, torch.dtype], Tensor]:
        return {}

    def _copy(self, name: str, values: np.ndarray, device: torch.device, dtype: torch.dtype) -> Tensor:
        """An array of this operator where it is needed; copied there once."""
        key = (name, device, dtype)
        if key not in self._copies:
            self._copies[key] = torch.from_numpy(np.array(values)).to(device=device, dtype=dtype)
        return self._copies[key]

    def _in_scope(self, tokens: Tokens, new: Tensor, old: Tensor) -> Tensor:
        mask = self.tokens.mask(tokens)
        return new if mask is None else torch.where(mask.to(old.device)[..., None], new, old)


@dataclass(frozen=True, init=False, eq=False)
class _OnDirection(_Operator):
    """An operator along one direction, by default where the direction was read."""

    direction: Direction

    def __init__(self, direction: Direction, *, site: Site | str | None = None, tokens: Scope | str = "all") -> None:
        where = site or direction.site
        if where is None:
            raise UsageError("the direction has no site of its own: say where to act with site='resid.post@…'")
        super().__init__(where, tokens)
        object.__setattr__(self, "direction", direction)

    @property
    def width(self) -> int:
        """The width of the rows it acts on."""
        return self.direction.width

    @property
    def identity(self) -> ModelIdentity | None:
        """The model it was made with; None if that is not known."""
        return self.direction.identity

    def _vector(self, device: torch.device, dtype: torch.dtype) -> Float[Tensor, " width"]:
        return self._copy("vector", self.direction.vector, device, dtype)


@dataclass(frozen=True, init=False, eq=False)
class Add(_OnDirection):
    """h + strength · scale · v̂: push along a direction.

    `strength` is in units of `direction.scale` (the standard deviation of the training rows' projections), so that
    one number means the same at every site; with `unit="raw"` it is the length of what is added. `tokens` is a
    scope: all, prompt, generated, last, span:NAME.
    """

    strength: float
    unit: Unit

    def __init__(
        self,
        direction: Direction,
        strength: float = 1.0,
        *,
        site: Site | str | None = None,
        tokens: Scope | str = "all",
        unit: Unit = "scale",
    ) -> None:
        super().__init__(direction, site=site, tokens=tokens)
        if unit not in ("scale", "raw"):
            raise UsageError(f"unknown unit {unit!r}; one of scale, raw")
        if not np.isfinite(strength):
            raise UsageError(f"a strength of {strength} is no number to steer with")
        object.__setattr__(self, "strength", float(strength))
        object.__setattr__(self, "unit", unit)

    def apply(self, h: Float[Tensor, "rows columns width"], tokens: Tokens) -> Float[Tensor, "rows columns width"]:
        length = self.strength * (self.direction.scale if self.unit == "scale" else 1.0)
        return self._in_scope(tokens, h + length * self._vector(h.device, h.dtype), h)


@dataclass(frozen=True, init=False, eq=False)
class Ablate(_OnDirection):
    """h − (h·v̂)v̂: remove what lies along a direction (Arditi et al. 2024, eq. 4). Idempotent.

    Computed in float32, so that as little as possible is left over in half precision.
    """

    def apply(self, h: Float[Tensor, "rows columns width"], tokens: Tokens) -> Float[Tensor, "rows columns width"]:
        v = self._vector(h.device, torch.float32)
        wide = h.float()
        return self._in_scope(tokens, (wide - (wide @ v)[..., None] * v).to(h.dtype), h)


@dataclass(frozen=True, init=False, eq=False)
class Affine(_Operator):
    """h ↦ A h + b: an affine map of single rows, such as an eraser's, `Affine(*eraser.affine(), site=…)`.

    `A` (width, width) and `b` (width,), in units of the activations, are float64 and read-only; computed in float32.
    `identity` is the model they were made with, if known. Raises `UsageError` unless both are finite and fit.
    """

    A: Float[np.ndarray, "width width"]
    b: Float[np.ndarray, " width"]
    identity: ModelIdentity | None

    def __init__(
        self,
        A: Float[np.ndarray, "width width"],
        b: Float[np.ndarray, " width"],
        *,
        site: Site | str,
        tokens: Scope | str = "all",
        identity: ModelIdentity | None = None,
    ) -> None:
        super().__init__(site, tokens)
        A, b = np.array(A, dtype=np.float64), np.array(b, dtype=np.float64)
        if b.ndim != 1 or A.shape != (len(b), len(b)):
            raise UsageError(
                f"an affine map is a matrix (width, width) and a row (width,), not {A.shape} and {b.shape}"
            )
        if not (np.isfinite(A).all() and np.isfinite(b).all()):
            raise UsageError("the affine map contains NaN or infinity")
        for name, value in {"A": A, "b": b, "identity": identity}.items():
            if isinstance(value, np.ndarray):
                value.setflags(write=False)
            object.__setattr__(self, name, value)

    @property
    def width(self) -> int:
        """The width of the rows it acts on."""
        return len(self.b)

    def apply(self, h: Float[Tensor, "rows columns width"], tokens: Tokens) -> Float[Tensor, "rows columns width"]:
        A, b = (self._copy(name, getattr(self, name), h.device, torch.float32) for name in ("A", "b"))
        return self._in_scope(tokens, (h.float() @ A.T + b).to(h.dtype), h)


Operator = Add | Ablate | Affine
