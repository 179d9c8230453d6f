"""Putting interventions into a model.

Enters: a language model, operators and bundles of them. Leaves: a context in which the model is steered, what that did,
and no trace after it.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from reprobe.control.bundle import Steering
from reprobe.control.effects import Chosen, Done, Tally
from reprobe.control.gates import GateReader, When
from reprobe.control.operators import Operator
from reprobe.errors import UsageError
from reprobe.model.hooks import Intervention, intervene
from reprobe.model.language_model import LanguageModel
from reprobe.model.passes import Tokens

#: Passes that are counted together.
_AT_ONCE = 64


@contextlib.contextmanager
def steer(lm: LanguageModel, *interventions: Operator | Steering, allow_mismatch: bool = False) -> Iterator[Done]:
    """Steer whatever the model does inside the context: `lm.generate`, `lm.logits`, `lm.logprobs`, or a direct call.

    Interventions at one site act in the order given; nested contexts compose, the outer first. Cached and uncached,
    padded and unpadded runs agree; a compiled network runs its own modules meanwhile, at their speed. Yields a `Done`,
    which says of each intervention how many prompts and tokens it changed and by how much, and of one that touched
    nothing why.

    Raises `UnknownSite`, `IdentityMismatch` if an operator was made with another model (unless `allow_mismatch`),
    `UsageError` if its width does not fit the site. The model is then as it was.
    """
    items = fitting(lm, interventions, allow_mismatch=allow_mismatch)
    tallies = [Tally(str(item), item.site, item.when is not None, item.step) for item in items]
    readers: dict[When, GateReader] = {}
    steps: list[Intervention] = []
    for item, tally in zip(items, tallies, strict=True):
        if item.when is not None and item.when not in readers:
            # Read just before the first intervention that asks; an earlier site is read earlier anyhow.
            readers[item.when] = GateReader(item.when)
            steps.append(readers[item.when])
        steps.append(_Active(item, None if item.when is None else readers[item.when], tally))
    with intervene(lm, steps):
        yield Done(tallies)


class _Active:
    """An operator while it steers: with its gate's reader, and the tally of what it did."""

    def __init__(self, item: Operator, gate: GateReader | None, tally: Tally) -> None:
        self.item, self.gate, self.tally = item, gate, tally
        self.site, self.by_role, self.by_prompt = item.site, item.by_role, item.by_prompt
        self._scope = item.scope_key  # as a key: what a scope chooses is the same for all interventions of a pass
        self._step = item.step
        self._added: Callable[[Tensor, Tokens], Tensor] | None = None
        if self._step is not None and gate is None:
            self._added = self._adding(self._step)

    @property
    def apply(self) -> Callable[[Tensor, Tokens], Tensor]:
        """The new value of an activation (rows, now, width)."""
        return self._changing if self._added is None else self._added

    def _changing(self, h: Float[Tensor, "rows now width"], tokens: Tokens) -> Float[Tensor, "rows now width"]:
        return self._chosen(h, tokens, tokens.once.get(self._scope) or self._scoped(tokens))

    def _adding(self, step: Float[np.ndarray, " width"]) -> Callable[[Tensor, Tokens], Tensor]:
        """`apply` where nothing but a sum is left to do for passes of which every token is chosen, as a rule while
        generating: with the fewest look-ups, for all that is looked up has left the caches since the last token."""
        scope_key, scoped, later, fold = self._scope, self._scoped, self.tally.later, self.tally.fold
        added = torch.empty(0, dtype=torch.bool)  # which no activation is

        def apply(h: Float[Tensor, "rows now width"], tokens: Tokens) -> Float[Tensor, "rows now width"]:
            nonlocal added
            scope = tokens.once.get(scope_key) or scoped(tokens)
            if scope.where is not True:
                return self._chosen(h, tokens, scope)
            later.append(scope)
            if len(later) > _AT_ONCE:
                fold()
            if added.dtype is not h.dtype or added.device != h.device:
                # Of as many axes as h: sums of unlike shapes take longer.
                added = self.item.copy("step", step, h)[None, None]
            return h + added

        return apply

    def _scoped(self, tokens: Tokens) -> Chosen:
        scope = tokens.once[self._scope] = Chosen(self.item.choose(tokens), tokens)
        return scope

    def _chosen(self, h: Tensor, tokens: Tokens, scope: Chosen) -> Tensor:
        chosen = scope if self.gate is None else self._let_through(self.gate, scope, tokens, h.device)
        self.tally.add(scope, chosen)
        where = chosen.where
        if where is False:
            return h
        new = self.item.changed(h, tokens)
        if where is not True:
            new = torch.where(where.to(h.device)[..., None], new, h)
        if self._step is None:
            self.tally.moved(h, new)
        return new

    def _let_through(self, gate: GateReader, scope: Chosen, tokens: Tokens, device: torch.device) -> Chosen:
        if scope.where is False:
            return scope
        key = (self._scope, gate)
        found: Chosen | None = tokens.once.get(key)
        if found is None:
            opened = gate.decision(tokens, device).expand(tokens.rows, tokens.now)
            where = opened if scope.where is True else opened & scope.where.to(device)
            found = tokens.once[key] = Chosen(where, tokens)
        return found


def fitting(lm: LanguageModel, given: Sequence[Operator | Steering], *, allow_mismatch: bool = False) -> list[Operator]:
    """The interventions of what was given, in their order; raises as `steer` does if one does not fit the model."""
    if wrong := [x for x in given if not isinstance(x, Operator | Steering)]:
        raise UsageError(
            f"interventions and Steerings come one argument each, not a {type(wrong[0]).__name__}; of a list write "
            "steer(lm, *items)"
        )
    items = [x for item in given for x in (item.interventions if isinstance(item, Steering) else (item,))]
    here = None
    gates = [item.when for item in items if item.when is not None]
    for one in (*given, *gates):
        identity = one.identity
        if identity is not None:
            here = here or lm.identity
            what = f"the gate ({one})" if isinstance(one, When) else f"the steering '{one}'"
            identity.require_same(here, what, allow_mismatch=allow_mismatch)
    for item in items:
        if (width := lm.width(item.site)) != item.width and item.width is not None:
            raise UsageError(
                f"{type(item).__name__} of width {item.width} does not fit {item.site} of {lm.name}, which is "
                f"{width} wide"
            )
    for gate in gates:
        if (width := lm.width(gate.site)) != gate.direction.width:
            raise UsageError(
                f"a gate of width {gate.direction.width} does not fit {gate.site} of {lm.name}, which is {width} wide"
            )
    return items
