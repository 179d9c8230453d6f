"""Gates: on which prompts, or which tokens, an intervention acts, decided by what the model itself holds there.

Enters: a `Direction`, a threshold, and at run time the activations at the direction's site. Leaves: decisions, kept
with the run. Does not know what is gated.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from reprobe.control.scopes import Scope
from reprobe.errors import UnsupportedOperation, UsageError
from reprobe.model.identity import ModelIdentity
from reprobe.model.passes import Tokens
from reprobe.model.sites import Site
from reprobe.probing.direction import Direction

Measure = Literal["score", "cosine", "abs_cosine"]
At = Literal["prompt", "token"]


@dataclass(frozen=True, init=False, eq=False)
class When:
    """Act only where a measure lies strictly above `above` and strictly below `below` (one of them, or both).

    The gate reads `direction` at `site` (by default the direction's own), which must come before what it gates, or be
    the same: it then reads what stands there before the gated intervention, but after those listed earlier.

    `at="prompt"`: one decision per prompt, taken while the prompt is read, for all its tokens and those generated from
    it. h̄ is the mean over the prompt's tokens in the scope `over` (all of them by default, a beginning-of-text token
    included; "last" is the prompt's last token; "positions:1:" leaves the first out). `at="token"`: one decision per
    token, from its own h.

    `measure`: "score" is (h·v̂ − offset) / scale, so that 0 is the boundary between the classes and a unit is the
    direction's; "cosine" is cos(h, v̂); "abs_cosine" its absolute value, which is the condition of CAST (Lee et al.
    2024), cos(h̄, proj_v h̄). A measure that is NaN (no token in `over`) opens no gate.

    Raises `UsageError` for a threshold that is no number, none at all, or a scope `over` beyond the prompt.
    """

    direction: Direction
    above: float | None
    below: float | None
    at: At
    over: Scope
    measure: Measure
    site: Site

    def __init__(
        self,
        direction: Direction,
        *,
        above: float | None = None,
        below: float | None = None,
        at: At = "prompt",
        over: Scope | str = "prompt",
        measure: Measure = "score",
        site: Site | str | None = None,
    ) -> None:
        limits = [float(x) for x in (above, below) if x is not None]
        if not limits:
            raise UsageError("a gate needs a threshold: When(direction, above=…) or When(direction, below=…)")
        if not np.isfinite(limits).all():
            raise UsageError(f"thresholds of a gate must be finite numbers, not {limits}")
        if len(limits) == 2 and limits[0] >= limits[1]:
            raise UsageError(f"no measure is above {above} and below {below}: that gate never opens")
        if at not in get_args(At):
            raise UsageError(f"unknown at={at!r} of a gate; one of {', '.join(get_args(At))}")
        if measure not in get_args(Measure):
            raise UsageError(f"unknown measure {measure!r} of a gate; one of {', '.join(get_args(Measure))}")
        scope = Scope.parse(over)
        if scope.kind in ("all", "generated"):
            raise UsageError(
                f"a gate is decided over tokens of the prompt, not over {scope}: over='prompt', 'last', 'span:NAME' or "
                "'positions:…' (or at='token' for a decision per token)"
            )
        where = site or direction.site
        if where is None:
            raise UsageError("the gate's direction has no site of its own: say where to read with site='resid.post@…'")
        values = {
            "direction": direction,
            "above": None if above is None else float(above),
            "below": None if below is None else float(below),
            "at": at,
            "over": scope,
            "measure": measure,
            "site": Site.parse(where) if isinstance(where, str) else where,
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def __str__(self) -> str:
        what = {"score": "score", "cosine": "cosine", "abs_cosine": "|cosine|"}[self.measure]
        limits = [f"{word} {x:g}" for word, x in (("above", self.above), ("below", self.below)) if x is not None]
        of = "each token" if self.at == "token" else f"the prompt ({self.over})"
        return f"{what} at {self.site} of {of} {' and '.join(limits)}"

    @property
    def identity(self) -> ModelIdentity | None:
        """The model its direction belongs to; None if that is not known."""
        return self.direction.identity

    def values(self, h: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows"]:
        """The measure of each row, in float32."""
        along = h.float() @ self._vector(h.device)
        if self.measure == "score":
            return (along - self.direction.offset) / self.direction.scale
        cosine: Tensor = along / torch.linalg.vector_norm(h.float(), dim=-1)
        return cosine if self.measure == "cosine" else cosine.abs()

    def opens(self, values: Float[Tensor, "*rows"]) -> Bool[Tensor, "*rows"]:
        """Where measured values open the gate."""
        yes = torch.ones_like(values, dtype=torch.bool) if self.above is None else values > self.above
        return yes if self.below is None else yes & (values < self.below)

    @cached_property
    def _vectors(self) -> dict[torch.device, Tensor]:
        return {}

    def _vector(self, device: torch.device) -> Float[Tensor, " width"]:
        if device not in self._vectors:
            with torch.inference_mode(False):
                self._vectors[device] = torch.tensor(self.direction.vector, dtype=torch.float32, device=device)
        return self._vectors[device]


@dataclass(frozen=True, eq=False)
class GateReader:
    """The gate as `intervene` takes it: reads at its site, changes nothing, and keeps its decision."""

    gate: When

    @property
    def site(self) -> Site:
        return self.gate.site

    @property
    def by_role(self) -> bool:
        return self.gate.at == "prompt"

    @property
    def by_prompt(self) -> bool:
        return self.gate.at == "prompt"

    def apply(self, h: Float[Tensor, "rows now width"], tokens: Tokens) -> Float[Tensor, "rows now width"]:
        if self.gate.at == "token":
            tokens.once[self] = self.gate.opens(self.gate.values(h))
        elif tokens.whole_prompts:
            chosen = self.gate.over.choose(tokens)
            mask = tokens.real if chosen is True else chosen
            if not isinstance(mask, Tensor):  # no token of the prompt
                mask = torch.zeros_like(tokens.real)
            mask = (mask & ~tokens.generated).to(h.device)
            tokens.memory[self] = self.gate.opens(self.gate.values(tokens.mean(h, mask)))
        elif not tokens.all_generated:
            raise UnsupportedOperation(
                f"a gate on the whole prompt ({self.gate}) needs the prompt in one pass, and it came in pieces: "
                "generate without prefill_chunk_size or an earlier cache, or decide per token, at='token'"
            )
        return h

    def decision(self, tokens: Tokens, device: torch.device) -> Bool[Tensor, "rows _"]:
        """For each row, or each token of it, whether the gate is open. Its site was passed before."""
        where = tokens.once if self.gate.at == "token" else tokens.memory
        if self not in where:
            raise UnsupportedOperation(
                f"the gate ({self.gate}) has not been read: steering began after the prompt, or its block was skipped; "
                "enter steer before the prompt is read"
            )
        found: Tensor = where[self]
        found = found.to(device)
        return found if self.gate.at == "token" else tokens.spread(found)
