"""Operators that are maps of a row: a matrix and an offset, or a product of few dimensions.

Enters: arrays. Leaves: frozen interventions for `steer`. Does not know where the arrays come from (an eraser, a fit),
nor scopes, gates or hooks.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from reprobe.control.gates import When
from reprobe.control.operators import Operator, Strength, widened
from reprobe.control.scopes import Scope
from reprobe.errors import UsageError
from reprobe.model.identity import ModelIdentity
from reprobe.model.passes import Tokens
from reprobe.model.sites import Site


@dataclass(frozen=True, init=False, eq=False)
class Affine(Operator):
    """h ↦ A h + b: an affine map of single rows, such as an eraser's, `Affine(*eraser.affine(), site=…)`.

    `A` (width, width) and `b` (width,), in units of the activations, are float64 and read-only; computed in float32.
    `identity` is the model they were made with, if known. Raises `UsageError` unless both are finite and fit.
    """

    A: Float[np.ndarray, "width width"]
    b: Float[np.ndarray, " width"]
    identity: ModelIdentity | None

    def __init__(
        self,
        A: Any,
        b: Any,
        *,
        site: Site | str,
        tokens: Scope | str = "all",
        when: When | None = None,
        strength: Strength = 1.0,
        keep_norm: bool = False,
        identity: ModelIdentity | None = None,
    ) -> None:
        super().__init__(site, tokens, when, strength, keep_norm)
        A, b = finite(A, "affine map"), finite(b, "affine map")
        if b.ndim != 1 or A.shape != (len(b), len(b)):
            raise UsageError(
                f"an affine map is a matrix (width, width) and a row (width,), not {A.shape} and {b.shape}"
            )
        self._set(A=A, b=b, identity=identity)

    @property
    def width(self) -> int:
        return len(self.b)

    @property
    def affine(self) -> bool:
        return True

    def change(self, h: Float[Tensor, "rows now width"], tokens: Tokens) -> Float[Tensor, "rows now width"]:
        wide = widened(h)
        return (wide @ self.copy("A", self.A, wide).T + self.copy("b", self.b, wide)).to(h.dtype)


@dataclass(frozen=True, init=False, eq=False)
class LowRank(Operator):
    """h ↦ h + U (Vᵀh + b): a change within few dimensions, `U` and `V` (width, rank), `b` (rank,), by default 0.

    With U = Rᵀ, V = (W − R)ᵀ and rows of R orthonormal it is the LoReFT of Wu et al. 2024.
    """

    U: Float[np.ndarray, "width rank"]
    V: Float[np.ndarray, "width rank"]
    b: Float[np.ndarray, " rank"]
    identity: ModelIdentity | None

    def __init__(
        self,
        U: Any,
        V: Any,
        b: Any = None,
        *,
        site: Site | str,
        tokens: Scope | str = "all",
        when: When | None = None,
        strength: Strength = 1.0,
        keep_norm: bool = False,
        identity: ModelIdentity | None = None,
    ) -> None:
        super().__init__(site, tokens, when, strength, keep_norm)
        U, V = finite(U, "low-rank map"), finite(V, "low-rank map")
        if U.ndim != 2 or U.shape != V.shape or U.size == 0:
            raise UsageError(f"a low-rank map is two matrices (width, rank), not {U.shape} and {V.shape}")
        b = np.zeros(U.shape[1]) if b is None else finite(b, "low-rank map")
        if b.shape != (U.shape[1],):
            raise UsageError(f"the offset of a map of rank {U.shape[1]} is a row ({U.shape[1]},), not {b.shape}")
        self._set(U=U, V=V, b=b, identity=identity)

    @property
    def width(self) -> int:
        return len(self.U)

    @property
    def affine(self) -> bool:
        return True

    def change(self, h: Float[Tensor, "rows now width"], tokens: Tokens) -> Float[Tensor, "rows now width"]:
        wide = widened(h)
        U, V, b = (self.copy(name, getattr(self, name), wide) for name in ("U", "V", "b"))
        return (wide + (wide @ V + b) @ U.T).to(h.dtype)


def finite(values: Any, what: str) -> np.ndarray:
    """A float64 copy of an array or tensor; raises `UsageError` for NaN or infinity."""
    raw = values.detach().double().cpu().numpy() if isinstance(values, Tensor) else values
    array = np.array(raw, dtype=np.float64)
    if not np.isfinite(array).all():
        raise UsageError(f"the {what} contains NaN or infinity")
    return array
