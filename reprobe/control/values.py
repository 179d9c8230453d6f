"""Operators that bring values of their own: given activations, or noise.

Enters: arrays of activations, or a standard deviation and a seed. Leaves: frozen interventions for `steer`. Does not
know where activations were captured, nor scopes, gates or hooks.
"""

import hashlib
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from reprobe.control.gates import When
from reprobe.control.maps import finite
from reprobe.control.operators import Operator, Strength, widened
from reprobe.control.scopes import Scope
from reprobe.errors import UsageError
from reprobe.model.identity import ModelIdentity
from reprobe.model.passes import Tokens
from reprobe.model.sites import Site

Align = Literal["start", "end"]
NoiseUnit = Literal["raw", "norm"]


@dataclass(frozen=True, init=False, eq=False)
class Replace(Operator):
    """h ↦ a given activation.

    `values` is one row (width,) for every token; or (positions, width), one row per token; or (prompts, positions,
    width), such rows for each prompt of the batch. With `align="start"` row k goes to the token at position k, counted
    from the prompt's first real token and on into what is generated; with `align="end"` the last row goes to the
    prompt's last token, and the rows before it to those before. Tokens without a row keep their own.
    """

    values: Float[np.ndarray, "*positions width"]
    align: Align
    identity: ModelIdentity | None

    def __init__(
        self,
        values: Any,
        *,
        site: Site | str,
        align: Align = "start",
        tokens: Scope | str = "all",
        when: When | None = None,
        strength: Strength = 1.0,
        keep_norm: bool = False,
        identity: ModelIdentity | None = None,
    ) -> None:
        super().__init__(site, tokens, when, strength, keep_norm)
        values = finite(values, "replacement")
        if values.ndim not in (1, 2, 3) or values.size == 0:
            raise UsageError(
                f"a replacement is (width,), (positions, width) or (prompts, positions, width), not {values.shape}"
            )
        if align not in get_args(Align):
            raise UsageError(f"unknown align={align!r}; one of {', '.join(get_args(Align))}")
        self._set(values=values, align=align, identity=identity)

    @property
    def width(self) -> int:
        return int(self.values.shape[-1])

    @property
    def needs_prompt(self) -> bool:
        return self.values.ndim == 3

    @property
    def affine(self) -> bool:
        return self.values.ndim == 1

    @property
    def needs_length(self) -> bool:
        return self.values.ndim > 1 and self.align == "end"

    @property
    def scope_key(self) -> str:
        return (
            super().scope_key if self.values.ndim == 1 else f"{self.tokens}, {self.values.shape[-2]} from {self.align}"
        )

    def choose(self, tokens: Tokens) -> Bool[Tensor, "rows now"] | bool:
        chosen = super().choose(tokens)
        if self.values.ndim == 1 or chosen is False:
            return chosen
        k = self._row(tokens)
        found: Tensor = (k >= 0) & (k < self.values.shape[-2]) & (tokens.real if chosen is True else chosen)
        return found

    def _row(self, tokens: Tokens) -> Int[Tensor, "rows now"]:
        """The number of the row that goes to each token; beyond them, it has none."""
        before: Tensor | int = 0 if self.align == "start" else tokens.prompt_lengths - int(self.values.shape[-2])
        return tokens.positions - before

    def change(self, h: Float[Tensor, "rows now width"], tokens: Tokens) -> Float[Tensor, "rows now width"]:
        values = self.copy("values", self.values, h)
        if values.ndim == 1:
            # Rows of their own: some networks (falcon) add to a block's output in place.
            return values.expand_as(h).clone()
        n, k = values.shape[-2], self._row(tokens).to(h.device)
        at = k.clamp(0, n - 1)
        if values.ndim == 2:
            rows = values[at]
        elif len(values) == tokens.n_prompts:
            rows = values[tokens.prompt.to(h.device), at]
        else:
            raise UsageError(
                f"Replace at {self.site} has activations of {len(values)} prompts, and this run has {tokens.n_prompts}"
            )
        return torch.where(((k >= 0) & (k < n))[..., None], rows, h)


@dataclass(frozen=True, init=False, eq=False)
class Noise(Operator):
    """h + std · ε with ε ~ N(0, I), the same for the same seed whatever the batch, the padding and the cache.

    ε is a function of seed, site, number of the prompt in its batch, position of the token, and component. With one
    seed per prompt it does not depend on the prompt's number, so that a prompt alone gets the noise that it has in a
    batch. In `unit="norm"` the standard deviation is `std` times ‖h‖/√width, so that noise of `std=1` is about as long
    as the token's own activation; in "raw" it is `std`.
    """

    std: float
    seed: int | tuple[int, ...]
    unit: NoiseUnit

    def __init__(
        self,
        std: float,
        *,
        site: Site | str,
        seed: int | tuple[int, ...] | list[int] = 0,
        unit: NoiseUnit = "raw",
        tokens: Scope | str = "all",
        when: When | None = None,
        strength: Strength = 1.0,
        keep_norm: bool = False,
    ) -> None:
        super().__init__(site, tokens, when, strength, keep_norm)
        if not 0 <= std < np.inf:
            raise UsageError(f"a standard deviation of {std} is no number to make noise with")
        if unit not in get_args(NoiseUnit):
            raise UsageError(f"unknown unit {unit!r}; one of {', '.join(get_args(NoiseUnit))}")
        seeds = int(seed) if isinstance(seed, int | np.integer) else tuple(int(s) for s in seed)
        self._set(std=float(std), seed=seeds, unit=unit)

    @property
    def width(self) -> None:
        return None

    @property
    def needs_prompt(self) -> bool:
        return True

    def change(self, h: Float[Tensor, "rows now width"], tokens: Tokens) -> Float[Tensor, "rows now width"]:
        wide = widened(h)
        noise = normals(self._keys(tokens).to(h.device), h.shape[-1]).to(wide.dtype)
        size: Tensor | float = self.std
        if self.unit == "norm":
            size = self.std * torch.linalg.vector_norm(wide, dim=-1, keepdim=True) / h.shape[-1] ** 0.5
        return (wide + size * noise).to(h.dtype)

    def _keys(self, tokens: Tokens) -> Int[Tensor, "rows now"]:
        """One number per token that nothing but seed, site, prompt and position decides."""
        if isinstance(self.seed, int):
            seeds = [(self.seed, i) for i in range(tokens.n_prompts)]
        elif len(self.seed) == tokens.n_prompts:
            seeds = [(s, 0) for s in self.seed]
        else:
            raise UsageError(
                f"Noise at {self.site} has seeds for {len(self.seed)} prompts, and this run has {tokens.n_prompts}"
            )
        of_prompt = torch.tensor([_hashed(self.site, *s) for s in seeds], device=tokens.prompt.device)
        return _mixed(of_prompt[tokens.prompt] + tokens.positions * _GOLDEN)


#: 2⁶⁴ divided by the golden ratio, and the multipliers of splitmix64 (Steele et al. 2014), as signed numbers.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_FIRST, _SECOND = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64


def _hashed(site: Site, seed: int, prompt: int) -> int:
    text = f"{site} {seed} {prompt}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little", signed=True)


def _mixed(x: Int[Tensor, "*any"]) -> Int[Tensor, "*any"]:
    """splitmix64's finaliser: 64 bits in, 64 well-mixed bits out. Products wrap around."""
    x = (x ^ _shifted(x, 30)) * _FIRST
    x = (x ^ _shifted(x, 27)) * _SECOND
    return x ^ _shifted(x, 31)


def _shifted(x: Int[Tensor, "*any"], bits: int) -> Int[Tensor, "*any"]:
    """x >> bits of unsigned numbers: torch's shift of signed ones copies the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def normals(keys: Int[Tensor, "*rows"], width: int) -> Float[Tensor, "*rows width"]:
    """`width` standard normal numbers per key, float32, by Box and Muller from two 24-bit uniforms each.

    A generator with a state would have to be reseeded for every token; this is a function of the key, and runs on the
    keys' device.
    """
    columns = torch.arange(1, 2 * width + 1, device=keys.device) * _GOLDEN
    bits = _mixed(keys[..., None] + columns)
    uniform = (_shifted(bits, 40).float() + 0.5) * 2.0**-24
    radius, angle = (-2.0 * uniform[..., :width].log()).sqrt(), 2.0 * np.pi * uniform[..., width:]
    return radius * angle.cos()
