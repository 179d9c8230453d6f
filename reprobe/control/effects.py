"""What steering did: how many prompts and tokens each intervention changed, and by how much.

Enters: for each pass, which tokens were chosen and how far they were moved. Leaves: `Effect`s. Nothing is read back
from the device before somebody asks: counts stay tensors, or are known from shapes. Does not know operators.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from reprobe.model.passes import Tokens
from reprobe.model.sites import Site


@dataclass(frozen=True)
class Effect:
    """What one intervention has done.

    `rows` is the number of prompts of which it changed a token, `tokens` the number of tokens it wrote (without a
    key-value cache a token is written again in every pass, and counted again; of beams and of prefixes that scored
    texts share, each computed token counts once). `displacement` is the mean over those tokens of ‖h′ − h‖, NaN if
    there is none. `why` says why nothing was touched, and is empty if something was.
    """

    what: str
    site: Site
    rows: int
    tokens: int
    displacement: float
    why: str = ""

    def __str__(self) -> str:
        if self.why:
            return f"{self.what}: touched nothing, {self.why}"
        return f"{self.what}: {self.tokens} tokens of {self.rows} prompts, moved by {self.displacement:.4g} on average"


class Done(Sequence[Effect]):
    """What steering has done so far, one `Effect` per intervention in the order given. Reading it costs a copy from
    the device; it may be read inside the context and after it."""

    def __init__(self, tallies: Sequence["Tally"]) -> None:
        self._tallies = tuple(tallies)

    def __len__(self) -> int:
        return len(self._tallies)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [t.effect() for t in self._tallies[i]]
        return self._tallies[i].effect()

    def __iter__(self) -> Iterator[Effect]:
        return (t.effect() for t in self._tallies)

    @property
    def untouched(self) -> tuple[Effect, ...]:
        """Interventions that changed no token; each says why."""
        return tuple(e for e in self if e.why)

    def __str__(self) -> str:
        return "\n".join(map(str, self)) or "no interventions"


class Chosen:
    """The tokens of one pass that a scope and a gate leave: `where` is a mask, True for all, or False for none.

    `count` is how many they are.
    """

    def __init__(self, where: Bool[Tensor, "rows now"] | bool, tokens: Tokens) -> None:
        self.where, self.tokens = where, tokens
        every = tokens.rows * tokens.now
        self.count: int | Tensor = where.sum() if isinstance(where, Tensor) else every if where else 0

    @cached_property
    def prompts(self) -> Bool[Tensor, " prompts"] | None:
        """The prompts of which there is one; None for all."""
        if self.where is True and self.tokens.all_prompts:
            return None
        return self.tokens.touched(self.where if isinstance(self.where, Tensor) else self.tokens.real)


class Tally:
    """Counts of one intervention, kept on the device. `step` is what it adds, where that is always the same.

    `later` takes passes of which every token was chosen, to be counted when some have come together: while a model
    runs, Python is cold and slow.
    """

    def __init__(self, what: str, site: Site, gated: bool, step: Float[np.ndarray, " width"] | None) -> None:
        self._what, self._site, self._gated = what, site, gated
        self._length = None if step is None else float(np.linalg.norm(step))
        self._in_scope: int | Tensor = 0
        self._tokens: int | Tensor = 0
        self._moved: float | Tensor = 0.0
        self._run: dict[Any, Any] | None = None
        self._passes = 0
        self._rows_before: int | Tensor = 0  # of earlier runs
        self._rows: Bool[Tensor, " prompts"] | int = 0  # of the present run; a number where that is all its prompts
        self.later: deque[Chosen] = deque()

    def fold(self) -> None:
        """Count what was put off."""
        for (_, whole), group in groupby(self.later, lambda c: (id(c.tokens.memory), c.tokens.all_prompts)):
            some = list(group)
            if whole:  # the passes of a run are counted at once
                self._count(some[0], some[0], len(some), sum(chosen.count for chosen in some))
            else:
                for chosen in some:
                    self._count(chosen, chosen)
        self.later.clear()

    def add(self, scope: Chosen, chosen: Chosen) -> None:
        """Count a pass: the tokens of the scope, and those of them that the gate let through."""
        self.fold()
        self._count(scope, chosen)

    def _count(self, scope: Chosen, chosen: Chosen, passes: int = 1, count: int | Tensor | None = None) -> None:
        """Count passes like this one; `count` is the number of their tokens together."""
        tokens = scope.tokens
        self._passes += passes
        self._in_scope = self._in_scope + (scope.count if count is None else count)
        if tokens.memory is not self._run:
            self._rows_before = self._rows_before + _number(self._rows)
            self._run, self._rows = tokens.memory, 0
        if chosen.where is False:
            return
        self._tokens = self._tokens + (chosen.count if count is None else count)
        if chosen.prompts is None:
            self._rows = tokens.n_prompts
        elif isinstance(self._rows, Tensor):
            self._rows = self._rows | chosen.prompts
        elif self._rows == 0:
            self._rows = chosen.prompts

    def moved(self, old: Float[Tensor, "rows now width"], new: Float[Tensor, "rows now width"]) -> None:
        """Count how far tokens were moved, where that differs; those that were not chosen stayed where they were."""
        self._moved = self._moved + torch.linalg.vector_norm((new - old).detach().float(), dim=-1).sum()

    def effect(self) -> Effect:
        """What was done so far."""
        self.fold()
        in_scope, tokens = int(self._in_scope), int(self._tokens)
        rows = int(self._rows_before) + int(_number(self._rows))
        if tokens:
            mean = self._length if self._length is not None else float(self._moved) / tokens
            return Effect(self._what, self._site, rows, tokens, mean)
        if not self._passes:
            why = "since nothing ran"
        elif self._gated and in_scope:
            why = "since its gate never opened"
        else:
            why = "since no token was in its scope"
        return Effect(self._what, self._site, 0, 0, float("nan"), why)


def _number(rows: Bool[Tensor, " prompts"] | int) -> int | Tensor:
    return rows.sum() if isinstance(rows, Tensor) else rows
