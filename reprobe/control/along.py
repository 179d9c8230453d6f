"""Operators along one direction: add to it, take it away, set it, multiply it.

Enters: a `Direction`. Leaves: frozen interventions for `steer`. Products are computed in float32, so that as little as
possible is lost in half precision. Does not know scopes, gates or hooks; `operators` does.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from reprobe.control.gates import When
from reprobe.control.operators import Operator, Strength, numbers, restored, widened
from reprobe.control.scopes import Scope
from reprobe.errors import UsageError
from reprobe.model.identity import ModelIdentity
from reprobe.model.passes import Tokens
from reprobe.model.sites import Site
from reprobe.probing.direction import Direction

AddUnit = Literal["scale", "norm", "raw"]
ClampUnit = Literal["scale", "raw"]


def _where(direction: Direction, site: Site | str | None) -> Site | str:
    """The site that was named, or the direction's own; raises `UsageError` without either."""
    where = site or direction.site
    if where is None:
        raise UsageError("the direction has no site of its own: say where to act with site='resid.post@…'")
    return where


def _known(unit: str, units: object) -> None:
    if unit not in get_args(units):
        raise UsageError(f"unknown unit {unit!r}; one of {', '.join(get_args(units))}")


@dataclass(frozen=True, init=False, eq=False)
class AlongDirection(Operator):
    """An operator along one direction, by default where the direction was read."""

    direction: Direction

    def __init__(
        self,
        direction: Direction,
        *,
        strength: Strength,
        site: Site | str | None,
        tokens: Scope | str,
        when: When | None,
        keep_norm: bool,
    ) -> None:
        super().__init__(_where(direction, site), tokens, when, strength, keep_norm)
        self._set(direction=direction)

    @property
    def width(self) -> int:
        return self.direction.width

    @property
    def identity(self) -> ModelIdentity | None:
        """The model that the direction was read from."""
        return self.direction.identity

    def _vector(self, wide: Tensor) -> Float[Tensor, " width"]:
        return self.copy("vector", self.direction.vector, wide)


@dataclass(frozen=True, init=False, eq=False)
class Add(AlongDirection):
    """h + strength · length · v̂: push along a direction.

    `unit` says what `length` is: "scale" the direction's scale (the standard deviation of the training rows'
    projections), so that one number means the same at every site; "norm" ‖h‖, the norm of the token's own activation
    at this site before the push (of the head or neuron, where the site is one); "raw" 1. `strength` is one number, or
    one per prompt of the batch. With `piecewise` the push goes to the side of v̂ on which h is, by sign(h·v̂)
    (RepE's piece-wise operator, Zou et al. 2023). `keep_norm` gives the row its norm back afterwards.
    """

    unit: AddUnit
    piecewise: bool

    def __init__(
        self,
        direction: Direction,
        strength: Strength = 1.0,
        *,
        site: Site | str | None = None,
        tokens: Scope | str = "all",
        when: When | None = None,
        unit: AddUnit = "scale",
        piecewise: bool = False,
        keep_norm: bool = False,
    ) -> None:
        super().__init__(direction, strength=strength, site=site, tokens=tokens, when=when, keep_norm=keep_norm)
        _known(unit, AddUnit)
        self._set(unit=unit, piecewise=bool(piecewise))

    @property
    def constant(self) -> bool:
        """Whether it adds the same to every row of a prompt."""
        return self.unit != "norm" and not self.piecewise and not self.keep_norm

    @property
    def affine(self) -> bool:
        return self.constant

    @property
    def _unit_length(self) -> float:
        return self.direction.scale if self.unit == "scale" else 1.0

    @cached_property
    def step(self) -> Float[np.ndarray, " width"] | None:
        """What is added to every vector, where that is one and the same; None otherwise."""
        fixed = self.constant and not isinstance(self.strength, np.ndarray)
        return self.strength * self._unit_length * self.direction.vector if fixed else None

    def change(self, h: Float[Tensor, "rows now width"], tokens: Tokens) -> Float[Tensor, "rows now width"]:
        return self._pushed(h, 1.0)

    def changed(self, h: Float[Tensor, "rows now width"], tokens: Tokens) -> Float[Tensor, "rows now width"]:
        # The strength is a part of what is added: one rounding, and one operation where nothing depends on the row.
        if self.step is not None:
            return h + self.copy("step", self.step, h)
        new = self._pushed(h, self.per_row("strength", tokens, widened(h)))
        return restored(h, new) if self.keep_norm else new

    def _pushed(self, h: Tensor, strength: Tensor | float) -> Tensor:
        wide = widened(h)
        v = self._vector(wide)
        length: Tensor | float = strength * self._unit_length
        if self.unit == "norm":
            length = length * torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        if self.piecewise:
            length = length * (wide @ v).sign()[..., None]
        return (wide + length * v).to(h.dtype)


@dataclass(frozen=True, init=False, eq=False)
class Ablate(AlongDirection):
    """h − (h·v̂)v̂: remove what lies along a direction (Arditi et al. 2024, eq. 4). Idempotent.

    `strength` is the share that is removed.
    """

    def __init__(
        self,
        direction: Direction,
        strength: Strength = 1.0,
        *,
        site: Site | str | None = None,
        tokens: Scope | str = "all",
        when: When | None = None,
        keep_norm: bool = False,
    ) -> None:
        super().__init__(direction, strength=strength, site=site, tokens=tokens, when=when, keep_norm=keep_norm)

    @property
    def affine(self) -> bool:
        return True

    def change(self, h: Float[Tensor, "rows now width"], tokens: Tokens) -> Float[Tensor, "rows now width"]:
        wide = widened(h)
        v = self._vector(wide)
        return (wide - (wide @ v)[..., None] * v).to(h.dtype)


@dataclass(frozen=True, init=False, eq=False)
class Clamp(AlongDirection):
    """Set what lies along a direction: to `value`, or into the interval from `low` to `high` (either may be None).

    In `unit="scale"` these are scores in units of the direction's scale, (h·v̂ − offset) / scale, as a scan or a gate
    shows them: 0 is the boundary between the classes. In `unit="raw"` they are projections h·v̂. `value` is one number
    or one per prompt. `strength` is how much of the way there is gone.
    """

    value: float | np.ndarray | None
    low: float | None
    high: float | None
    unit: ClampUnit

    def __init__(
        self,
        direction: Direction,
        value: Strength | None = None,
        *,
        low: float | None = None,
        high: float | None = None,
        unit: ClampUnit = "scale",
        strength: Strength = 1.0,
        site: Site | str | None = None,
        tokens: Scope | str = "all",
        when: When | None = None,
        keep_norm: bool = False,
    ) -> None:
        super().__init__(direction, strength=strength, site=site, tokens=tokens, when=when, keep_norm=keep_norm)
        _known(unit, ClampUnit)
        if (value is None) == (low is None and high is None):
            raise UsageError("a clamp needs either one value, or low=… and/or high=…")
        for name, limit in (("low", low), ("high", high)):
            if limit is not None and not np.isfinite(limit):
                raise UsageError(f"{name}={limit} of a clamp is no number")
        if low is not None and high is not None and low > high:
            raise UsageError(f"nothing lies between low={low} and high={high}")
        self._set(
            value=None if value is None else numbers(value, "value of a clamp"),
            low=None if low is None else float(low),
            high=None if high is None else float(high),
            unit=unit,
        )

    @property
    def needs_prompt(self) -> bool:
        return isinstance(self.value, np.ndarray)

    @property
    def affine(self) -> bool:
        return isinstance(self.value, float)

    def change(self, h: Float[Tensor, "rows now width"], tokens: Tokens) -> Float[Tensor, "rows now width"]:
        wide = widened(h)
        v = self._vector(wide)
        zero, one = (self.direction.offset, self.direction.scale) if self.unit == "scale" else (0.0, 1.0)
        is_now = (wide @ v)[..., None]
        if self.value is not None:
            wanted = zero + one * self.per_row("value", tokens, wide)
        else:
            limits = [None if x is None else zero + one * x for x in (self.low, self.high)]
            wanted = is_now.clamp(min=limits[0], max=limits[1])
        return (wide + (wanted - is_now) * v).to(h.dtype)


@dataclass(frozen=True, init=False, eq=False)
class Scale(Operator):
    """Multiply by `factor` what lies along a direction, h + (factor − 1)(h·v̂)v̂, or given a site the whole vector there.

    `Scale("attn.heads@3.1", 0.0)` silences a head, `Scale(direction, 2.0)` doubles a concept. `factor` is one number or
    one per prompt.
    """

    target: Direction | Site
    factor: float | np.ndarray

    def __init__(
        self,
        target: Direction | Site | str,
        factor: Strength,
        *,
        strength: Strength = 1.0,
        site: Site | str | None = None,
        tokens: Scope | str = "all",
        when: When | None = None,
        keep_norm: bool = False,
    ) -> None:
        on = Site.parse(target) if isinstance(target, str) else target
        if isinstance(on, Site) and site is not None and str(site) != str(on):
            raise UsageError(f"scale the vector at {on} or the one at {site}? Name one site")
        where = on if isinstance(on, Site) else _where(on, site)
        super().__init__(where, tokens, when, strength, keep_norm)
        self._set(target=on, factor=numbers(factor, "factor"))

    @property
    def width(self) -> int | None:
        return self.target.width if isinstance(self.target, Direction) else None

    @property
    def identity(self) -> ModelIdentity | None:
        """The model that the target direction was read from; None without one."""
        return self.target.identity if isinstance(self.target, Direction) else None

    @property
    def needs_prompt(self) -> bool:
        return isinstance(self.factor, np.ndarray)

    @property
    def affine(self) -> bool:
        return not self.needs_prompt

    def change(self, h: Float[Tensor, "rows now width"], tokens: Tokens) -> Float[Tensor, "rows now width"]:
        wide = widened(h)
        factor = self.per_row("factor", tokens, wide)
        if not isinstance(self.target, Direction):
            return (wide * factor).to(h.dtype)
        v = self.copy("vector", self.target.vector, wide)
        return (wide + (factor - 1.0) * (wide @ v)[..., None] * v).to(h.dtype)
