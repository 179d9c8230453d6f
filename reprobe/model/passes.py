"""Which tokens one forward pass holds: what interventions need to know to act on the right ones.

Enters: the padded prompts of a run (or the prefix trees of a scoring pass), and how many tokens a cache already holds.
Leaves: `Tokens`, masks and positions of one pass, computed when they are asked for. Does not know hooks, sites or what
is done with a token.

A *run* is one set of prompts with everything generated from them: one pass, or many with a key-value cache, or many
without. What an intervention decides about a prompt it keeps in the run's `memory`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from reprobe.errors import UnsupportedOperation, UsageError


def positions_of(real: Bool[Tensor, "rows columns"]) -> Int[Tensor, "rows columns"]:
    """Position of each token among its row's real tokens; on pads, that of the token before them, or 0."""
    return (real.long().cumsum(1) - 1).clamp(min=0)


@dataclass(frozen=True, eq=False)
class Prompts:
    """The padded prompts of a run.

    The first `width` columns are the prompts, any further ones given continuations, which count as generated. `real`
    marks real tokens (columns beyond it are real: they come from generation), `spans[name]` those of a named span;
    None where spans are not known, because the network was called directly. `ids` are their tokens, if known. A
    generated row is at its end with one of the tokens `ends`, and is then filled up; `filler` fills a row that ended in
    another way (None where all rows end together). Where these are a part of the prompts that were given, `numbers` are
    theirs among the `given`.
    """

    real: Bool[Tensor, "prompts columns"]
    width: int
    spans: Mapping[str, Bool[Tensor, "prompts width"]] | None
    ids: Int[Tensor, "prompts columns"] | None = None
    ends: frozenset[int] = frozenset()
    filler: int | None = None
    numbers: Int[Tensor, " prompts"] | None = None
    given: int | None = None

    @property
    def n(self) -> int:
        """How many prompts there are here."""
        return int(self.real.shape[0])

    @cached_property
    def unpadded(self) -> bool:
        """Whether every token is real."""
        return bool(self.real.all())

    @cached_property
    def index(self) -> Int[Tensor, "prompts columns"]:
        """The number of each real token, counted from 0 in its row."""
        return self.real.long().cumsum(1) - 1

    @cached_property
    def lengths(self) -> Int[Tensor, " prompts"]:
        """Real tokens of each prompt."""
        return self.real[:, : self.width].sum(1)

    @cached_property
    def shortest(self) -> int:
        """The least number of real tokens of a prompt."""
        return int(self.lengths.min())

    def span(self, name: str) -> Bool[Tensor, "prompts width"]:
        """The tokens of a span; raises `UsageError` if a prompt lacks it."""
        if self.spans is None:
            raise UnsupportedOperation(
                f"the scope span:{name} needs the prompts' spans, and the network was called directly; "
                "use lm.generate(prompts, spans=…) or lm.logits(prompts, spans=…)"
            )
        if name not in self.spans:
            have = ", ".join(sorted(self.spans)) or "none"
            raise UsageError(f"the scope span:{name} names a span that these prompts do not have; their spans: {have}")
        if name not in self._whole:
            lacking = (~self.spans[name].any(1)).nonzero().flatten().tolist()
            if lacking:
                raise UsageError(
                    f"the scope span:{name} names a span that prompt {lacking[0]} does not have "
                    f"({len(lacking)} of {self.n} prompts lack it); give every prompt that span, or run them apart"
                )
            self._whole.add(name)
        return self.spans[name]

    @cached_property
    def _whole(self) -> set[str]:
        """Spans that were found in every prompt."""
        return set()


@dataclass(frozen=True, eq=False)
class Run:
    """Prompts with all that is generated from them. `memory` is for what interventions decide about the prompts."""

    prompts: Prompts
    memory: dict[Any, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Pass:
    """A forward pass that begins: which tokens it holds, for who follows it.

    `ids` are its own tokens (None if it was given vectors), the first of them in column `start`; `prompts` describes
    all columns so far. `fresh` marks the first pass of other prompts.
    """

    prompts: Prompts
    fresh: bool
    start: int
    rows: int
    columns: int
    ids: Int[Tensor, "rows columns"] | None


class Tokens:
    """The tokens of one forward pass of `rows` × `now` columns, of which the cache holds `past` earlier ones.

    Masks are (rows, now). Several rows may belong to one prompt (beams, returned sequences): row i belongs to prompt
    i // copies. `memory` lasts for the run, `once` for the pass.
    """

    def __init__(self, run: Run, rows: int, past: int, now: int, ids: Int[Tensor, "rows now"] | None = None) -> None:
        prompts = run.prompts
        if rows % prompts.n:
            raise UnsupportedOperation(
                f"a pass of {rows} rows does not fit {prompts.n} prompts: generate through lm.generate"
            )
        self._prompts, self._past = prompts, past
        #: The tokens themselves; None where they are not known.
        self.ids = ids
        self.rows, self.now = rows, now
        #: Of how many prompts, as given, this is a pass, or a part of the passes.
        self.n_prompts = prompts.n if prompts.given is None else prompts.given
        self._copies = rows // prompts.n
        self.memory = run.memory
        self.once: dict[Any, Any] = {}
        #: Whether every token is real, which lets a caller skip a mask.
        self.trivial = past >= prompts.real.shape[1] or prompts.unpadded
        #: Whether all, or none, of the tokens come after the prompt.
        self.all_generated, self.none_generated = past >= prompts.width, past + now <= prompts.width
        #: Whether the pass holds the prompts from their first to their last token.
        self.whole_prompts = past == 0 and now >= prompts.width
        #: Whether every prompt of those given has tokens in the pass.
        self.all_prompts = prompts.numbers is None

    @cached_property
    def _columns(self) -> Int[Tensor, " now"]:
        return torch.arange(self._past, self._past + self.now, device=self._prompts.real.device)

    def _window(self, columns: Tensor, beyond: bool | int) -> Tensor:
        """The columns of this pass, one row per row; columns that are lacking are `beyond`."""
        held = columns[:, self._past : self._past + self.now].repeat_interleave(self._copies, 0)
        return nn.functional.pad(held, (0, self.now - held.shape[1]), value=beyond)

    @cached_property
    def real(self) -> Bool[Tensor, "rows now"]:
        """False on pads."""
        return self._window(self._prompts.real, True)

    @cached_property
    def generated(self) -> Bool[Tensor, "rows now"]:
        """True on tokens after the prompt."""
        return (self._columns >= self._prompts.width).expand(self.rows, self.now)

    @cached_property
    def last(self) -> Bool[Tensor, "rows now"]:
        """True from the prompt's last real token on: with a cache each new token is "last" once; without a cache the
        earlier ones must stay so."""
        width, real = self._prompts.width, self._prompts.real
        last_real = (torch.arange(width, device=real.device) * real[:, :width]).amax(1)
        return self.real & (self._columns[None, :] >= last_real.repeat_interleave(self._copies)[:, None])

    @cached_property
    def positions(self) -> Int[Tensor, "rows now"]:
        """The number of each real token in its row, prompt and what follows, counted from 0; of no use on pads."""
        given = self._prompts.index
        held = given[:, self._past : self._past + self.now]
        beyond = torch.arange(
            max(self._past, given.shape[1]), max(self._past + self.now, given.shape[1]), device=given.device
        )
        new = given[:, -1:] + 1 + (beyond - given.shape[1])[None, :]
        return torch.cat([held, new], 1).repeat_interleave(self._copies, 0)

    @property
    def earliest(self) -> int:
        """No generated token of this pass has a smaller position."""
        return self._prompts.shortest + max(0, self._past - self._prompts.width)

    @cached_property
    def prompt(self) -> Int[Tensor, "rows _"]:
        """Which prompt, as given, each token belongs to."""
        here = torch.arange(self.rows, device=self._prompts.real.device)[:, None] // self._copies
        return here if self._prompts.numbers is None else self._prompts.numbers[here]

    @cached_property
    def prompt_lengths(self) -> Int[Tensor, "rows _"]:
        """Real tokens of the prompt that each token belongs to."""
        return self._prompts.lengths.repeat_interleave(self._copies)[:, None]

    def span(self, name: str) -> Bool[Tensor, "rows now"]:
        """The prompts' tokens of a span; raises `UsageError` if a prompt lacks it."""
        return self._window(self._prompts.span(name), False)

    # -- sequences: rows, or in packs what has one prompt -----------------------------------------------------

    def mean(
        self, h: Float[Tensor, "rows now width"], mask: Bool[Tensor, "rows now"]
    ) -> Float[Tensor, "sequences width"]:
        """The mean over the masked tokens of each sequence, in float32; NaN where there is none."""
        kept = torch.where(mask[..., None], h.float(), 0.0)
        return kept.sum(1) / mask.sum(1, keepdim=True)

    def spread(self, values: Tensor) -> Tensor:
        """One value per sequence → (rows, 1) or (rows, now), the value of each token's sequence."""
        return values[:, None]

    def touched(self, mask: Bool[Tensor, "rows now"]) -> Bool[Tensor, " prompts"]:
        """The prompts of which a token is in the mask."""
        here = mask.any(1).view(self._prompts.n, self._copies).any(1)
        if self._prompts.numbers is None:
            return here
        numbers = self._prompts.numbers.to(here.device)
        return torch.zeros(self.n_prompts, dtype=torch.bool, device=here.device).scatter(0, numbers, here)


class PackedTokens(Tokens):
    """The tokens of a scoring pass, whose rows may hold several prefix trees.

    The pack's texts have their tokens at the places `at` of the flattened rows, of the prompts `of`. `sequence` says of
    each token which beginning (a prompt's tokens) it stands in or follows, `prompt` of which prompt that is, `lengths`
    how many tokens it has: left out where trees are shared between prompts, which no intervention may then tell apart.
    `spans` are those that every prompt of the run has.
    """

    def __init__(
        self,
        *,
        real: Bool[Tensor, "rows now"],
        generated: Bool[Tensor, "rows now"],
        last: Bool[Tensor, "rows now"],
        positions: Int[Tensor, "rows now"],
        trivial: bool,
        at: Int[Tensor, " tokens"],
        of: Int[Tensor, " tokens"],
        n_prompts: int,
        memory: dict[Any, Any],
        sequence: Int[Tensor, "rows now"] | None = None,
        prompt: Int[Tensor, "rows now"] | None = None,
        lengths: Int[Tensor, "rows now"] | None = None,
        spans: Mapping[str, Bool[Tensor, "rows now"]] | None = None,
    ) -> None:
        self.rows, self.now = (int(n) for n in real.shape)
        self.real, self.generated, self.last, self.positions = real, generated, last, positions
        self.trivial, self.n_prompts = trivial, n_prompts
        self.memory, self.once = memory, {}
        self.all_generated = self.none_generated = False
        self.whole_prompts, self.all_prompts = True, False
        self.ids = None
        self._at, self._of, self._sequence = at, of, sequence
        self._spans = spans or {}
        if prompt is not None:
            self.prompt = prompt
        if lengths is not None:
            self.prompt_lengths = lengths

    @property
    def earliest(self) -> int:
        return 0

    def span(self, name: str) -> Bool[Tensor, "rows now"]:
        if name not in self._spans:
            have = ", ".join(sorted(self._spans)) or "none"
            raise UsageError(
                f"the scope span:{name} names a span that not every one of these prompts has; their spans: {have} "
                "(give lm.logprobs spans=…)"
            )
        return self._spans[name]

    def mean(
        self, h: Float[Tensor, "rows now width"], mask: Bool[Tensor, "rows now"]
    ) -> Float[Tensor, "sequences width"]:
        assert self._sequence is not None
        chosen = mask.flatten()
        of, n = self._sequence.to(h.device).flatten()[chosen], int(self._sequence.max()) + 1
        total = torch.zeros(n, h.shape[-1], device=h.device).index_add(0, of, h.flatten(0, 1)[chosen].float())
        return total / torch.bincount(of, minlength=n)[:, None]

    def spread(self, values: Tensor) -> Tensor:
        assert self._sequence is not None
        return values[self._sequence.to(values.device)]

    def touched(self, mask: Bool[Tensor, "rows now"]) -> Bool[Tensor, " prompts"]:
        return torch.bincount(self._of[mask.flatten().to(self._at.device)[self._at]], minlength=self.n_prompts) > 0
