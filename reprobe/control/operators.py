"""What every intervention has: a site, a scope, a gate, a strength. The operators themselves derive from it.

Enters: where, on which tokens, when, how strongly. Leaves: `Operator`, a frozen value that `steer` puts into a model.
Does not know any particular operator, nor how hooks are registered.

An operator is a function `change` of one row h, the activation of one token at its site. What the model goes on with is
h + strength · (change(h) − h), on the tokens of the scope that the gate lets through; all others, pads above all, stay
bit for bit as they were.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from reprobe.control.gates import When
from reprobe.control.scopes import Scope
from reprobe.errors import UsageError
from reprobe.model.identity import ModelIdentity
from reprobe.model.passes import Tokens
from reprobe.model.sites import Site

#: One number, or one for each prompt of the batch.
Strength = float | Sequence[float] | np.ndarray | Tensor


@dataclass(frozen=True, init=False, eq=False)
class Operator(ABC):
    """Operator × site × scope × gate × strength. Derive from it for an operator of your own: `width` and `change`.

    `tokens` is the scope; `when` the gate, None for always; `strength` one number or a read-only float64 array with one
    number per prompt of the batch; with `keep_norm` each changed row gets the norm it had.
    """

    site: Site
    tokens: Scope
    when: When | None
    strength: float | np.ndarray
    keep_norm: bool

    def __init__(
        self, site: Site | str, tokens: Scope | str, when: When | None, strength: Strength, keep_norm: bool
    ) -> None:
        where = Site.parse(site) if isinstance(site, str) else site
        if when is not None and when.site.depth > where.depth:
            raise UsageError(
                f"the gate at {when.site} comes after {where}, which it should gate: what it reads is not there yet; "
                f"gate on a site up to {where}, or act later"
            )
        self._set(
            site=where,
            tokens=Scope.parse(tokens),
            when=when,
            strength=numbers(strength, "strength"),
            keep_norm=bool(keep_norm),
        )

    def _set(self, **values: Any) -> None:
        """Set fields of a frozen value while it is made; arrays become read-only."""
        for name, value in values.items():
            if isinstance(value, np.ndarray):
                value.setflags(write=False)
            object.__setattr__(self, name, value)

    # -- what an operator says ---------------------------------------------------------------------------------

    @property
    @abstractmethod
    def width(self) -> int | None:
        """The width of the rows it acts on; None if any will do."""

    @abstractmethod
    def change(self, h: Float[Tensor, "rows now width"], tokens: Tokens) -> Float[Tensor, "rows now width"]:
        """The new value of every row, at strength 1 and without regard to scope and gate; a new tensor."""

    if TYPE_CHECKING:

        @property
        def identity(self) -> ModelIdentity | None:
            """The model it was made with; None if that is not known."""

    else:
        identity = None  # no property, so that an operator may have it as a field

    @property
    def needs_prompt(self) -> bool:
        """Whether `change` asks the tokens which prompt they belong to (`per_row` does)."""
        return False

    @property
    def needs_length(self) -> bool:
        """Whether `change` asks the tokens how long their prompt is."""
        return False

    @property
    def affine(self) -> bool:
        """Whether `change` is one affine map of a row, h ↦ M h + c, the same for every token of every prompt."""
        return False

    @property
    def step(self) -> Float[np.ndarray, " width"] | None:
        """What is added to every row, strength included, where that is the same for all; None where it is not."""
        return None

    @property
    def scope_key(self) -> str:
        """A name for what `choose` chooses: operators with one name choose the same tokens of a pass."""
        return str(self.tokens)

    def choose(self, tokens: Tokens) -> Bool[Tensor, "rows now"] | bool:
        """The tokens of a pass that it is to change: those of its scope, unless it reaches fewer."""
        return self.tokens.choose(tokens)

    # -- what follows from it ----------------------------------------------------------------------------------

    @property
    def by_role(self) -> bool:
        """Whether it matters which tokens are prompt and which are generated."""
        return self.tokens.by_role or self.needs_length or self._prompt_gate

    @property
    def by_prompt(self) -> bool:
        """Whether it matters which prompt a token belongs to."""
        needs = self.needs_prompt or self.needs_length or isinstance(self.strength, np.ndarray)
        return self.tokens.by_prompt or needs or self._prompt_gate

    @property
    def _prompt_gate(self) -> bool:
        return self.when is not None and self.when.at == "prompt"

    def changed(self, h: Float[Tensor, "rows now width"], tokens: Tokens) -> Float[Tensor, "rows now width"]:
        """The new value of every row, with strength and norm; scope and gate are the caller's."""
        new = self.change(h, tokens)
        if isinstance(self.strength, np.ndarray) or self.strength != 1.0:
            wide = widened(h)
            new = (wide + self.per_row("strength", tokens, wide) * (widened(new) - wide)).to(h.dtype)
        return restored(h, new) if self.keep_norm else new

    def per_row(self, name: str, tokens: Tokens, wide: Tensor) -> Tensor | float:
        """The field `name`: a number as it is; one per prompt as (rows, 1 or now, 1), to go with the rows `wide`."""
        values: float | np.ndarray = getattr(self, name)
        if not isinstance(values, np.ndarray):
            return values
        if len(values) != tokens.n_prompts:
            raise UsageError(
                f"{type(self).__name__} at {self.site} has one {name} for each of {len(values)} prompts, and this run "
                f"has {tokens.n_prompts}"
            )
        numbers = self.copy(name, values, wide)
        return numbers[tokens.prompt.to(wide.device)].unsqueeze(-1)

    @cached_property
    def _copies(self) -> dict[tuple[str, torch.device, torch.dtype], Tensor]:
        return {}

    def copy(self, name: str, values: np.ndarray, like: Tensor) -> Tensor:
        """An array of this operator, under a name of its own, on the device and in the dtype of `like`; copied once."""
        key = (name, like.device, like.dtype)
        if key not in self._copies:
            with torch.inference_mode(False):  # it may serve a pass with gradients later
                self._copies[key] = torch.from_numpy(np.array(values)).to(device=like.device, dtype=like.dtype)
        return self._copies[key]

    def __str__(self) -> str:
        gate = "" if self.when is None else f", when {self.when}"
        return f"{type(self).__name__} at {self.site} on {self.tokens}{gate}"


def numbers(value: Strength, what: str) -> float | np.ndarray:
    """A finite number, or a row of them; raises `UsageError` otherwise."""
    raw = value.detach().cpu().numpy() if isinstance(value, Tensor) else value
    array = np.array(raw, dtype=np.float64)
    if array.ndim > 1 or array.size == 0:
        raise UsageError(f"a {what} is one number or one per prompt, not an array of shape {array.shape}")
    if not np.isfinite(array).all():
        raise UsageError(f"a {what} of {value} is no number to steer with")
    return float(array) if array.ndim == 0 else array


def widened(h: Tensor) -> Tensor:
    """Activations in the precision that operators compute in: float32, or float64 where they are that already."""
    return h if h.dtype == torch.float64 else h.float()


def restored(h: Float[Tensor, "*rows width"], new: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows width"]:
    """The rows of `new` with the norms of `h`; a row of zeros stays one."""
    wide = widened(new)
    was, now = (torch.linalg.vector_norm(x, dim=-1, keepdim=True) for x in (widened(h), wide))
    factor: Tensor = was / now.clamp(min=torch.finfo(torch.float32).tiny)
    return (wide * factor).to(h.dtype)
