"""Operators over streams: prompts that run three times in one batch, in step, and control one another.

Enters: which tokens, how strongly. Leaves: a frozen intervention for `steer`. Does not know where the three prompts of
a text come from, nor how their continuations are kept the same; `reprobe.methods.repe` does.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from reprobe.control.gates import When
from reprobe.control.operators import Operator, Strength, widened
from reprobe.control.scopes import Scope
from reprobe.errors import UnsupportedOperation, UsageError
from reprobe.model.identity import ModelIdentity
from reprobe.model.passes import PackedTokens, Tokens
from reprobe.model.sites import Site

Into = Literal["base", "all"]


@dataclass(frozen=True, init=False, eq=False)
class AddContrast(Operator):
    """h + strength · (h⁺ − h⁻), the contrast vector of RepE (Zou et al. 2023), from two other rows of the same batch.

    A batch of 3n prompts holds n texts three times: first all with their own prompt, then all with the positive, then
    all with the negative one. h⁺ and h⁻ are of the tokens at the same distance from the prompt's end, which must be the
    same tokens wherever the scope reaches into the prompt. `into="base"` changes the first n rows only; "all" adds
    the same to the three, as the original does, so that each block's contrast contains those added before.

    Raises `UsageError` for another number of prompts, for other tokens, and for rows whose prompts do not end in one
    column (left padding does); `UnsupportedOperation` in `lm.logprobs`, whose rows are no prompts.
    """

    into: Into
    identity: ModelIdentity | None

    def __init__(
        self,
        *,
        site: Site | str,
        strength: Strength = 1.0,
        into: Into = "base",
        tokens: Scope | str = "last",
        when: When | None = None,
        keep_norm: bool = False,
        identity: ModelIdentity | None = None,
    ) -> None:
        super().__init__(site, tokens, when, strength, keep_norm)
        if into not in get_args(Into):
            raise UsageError(f"unknown into={into!r}; one of {', '.join(get_args(Into))}")
        self._set(into=into, identity=identity)

    @property
    def width(self) -> None:
        return None

    @property
    def needs_prompt(self) -> bool:
        return True

    @property
    def needs_length(self) -> bool:
        return True

    @property
    def scope_key(self) -> str:
        return f"{self.tokens} of streams, into {self.into}"

    def choose(self, tokens: Tokens) -> Bool[Tensor, "rows now"] | bool:
        if isinstance(tokens, PackedTokens):
            raise UnsupportedOperation(
                "lm.logprobs computes beginnings that texts share once, so its rows are not prompts and no contrast "
                "can be taken between them: use repe.logprobs"
            )
        if tokens.n_prompts % 3 or not tokens.all_prompts:
            raise UsageError(
                f"{type(self).__name__} at {self.site} takes texts three times, with their own, the positive and the "
                f"negative prompt, all in one pass, and this run has {tokens.n_prompts} prompts, {tokens.rows} rows in "
                "this pass: use repe.generate or repe.logprobs"
            )
        chosen = self.tokens.choose(tokens)
        if chosen is False:
            return False
        where = tokens.real if chosen is True else chosen
        base = where[: tokens.rows // 3]
        self._require_same_tokens(base, tokens)
        return base.repeat(3, 1) if self.into == "all" else torch.cat([base, torch.zeros_like(base).repeat(2, 1)])

    def change(self, h: Float[Tensor, "rows now width"], tokens: Tokens) -> Float[Tensor, "rows now width"]:
        own, positive, negative = widened(h).chunk(3)
        contrast = positive - negative
        if self.into == "all":
            return torch.cat([own + contrast, positive + contrast, negative + contrast]).to(h.dtype)
        return torch.cat([own + contrast, positive, negative]).to(h.dtype)

    def _require_same_tokens(self, base: Bool[Tensor, "texts now"], tokens: Tokens) -> None:
        """Raise `UsageError` unless the three rows of each text hold the same token, as far from the prompt's end."""
        from_end = (tokens.positions - tokens.prompt_lengths).chunk(3)
        known = tokens.ids
        ids = (from_end[0],) * 3 if known is None else known.chunk(3)
        real = tokens.real.chunk(3)
        same = real[1] & real[2]
        for mine, other in ((x[0], y) for x in (from_end, ids) for y in x[1:]):
            same &= mine == other
        if bool((base & ~same).any()):
            if tokens.all_generated:
                raise UsageError(
                    f"the three rows of a text went on with different tokens, and {type(self).__name__} at {self.site} "
                    "takes the difference at one and the same: repe.generate keeps them in step"
                )
            raise UsageError(
                f"the three prompts of a text do not end alike: {type(self).__name__} at {self.site} on {self.tokens} "
                "reaches tokens that differ between them. Let the prompts differ earlier, pad on the left, or act on "
                "tokens='generated' alone"
            )
