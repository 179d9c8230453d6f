"""Which tokens of a prompt are read.

Enters: text such as `last`, `mean`, `index:-2`, `span:subject:last`. Leaves: a `Position`. Does not know
tokenizers; tokens.py turns a position into token numbers.
"""

import re
from dataclasses import dataclass
from typing import Literal

from reprobe.errors import UsageError
from reprobe.prompts.columns import WHOLE

FORMS = "last, all, mean, index:N (index:-2 is the last but one), span:NAME:last|first|mean|all"

Pick = Literal["last", "first", "mean", "all"]
_PICKS: dict[str, Pick] = {"last": "last", "first": "first", "mean": "mean", "all": "all"}


@dataclass(frozen=True)
class Position:
    """Tokens of a prompt: `pick` among all its tokens, or among those of `span`; or the one at `index`.

    - `last`, `all`, `mean`: of every real token of the prompt, special ones (BOS, SEP) included; padding is
      not part of a prompt. `mean` is one row, the average over exactly the tokens of `all`.
    - `index:N`: token N from 0, from the end if negative. With truncation, of the tokens that are left.
    - `span:NAME:PICK`: the tokens that share at least one character with the span. Special tokens never do.
      Every prompt has the span `text`, its whole text, so that `span:text:mean` leaves out BOS. Of messages
      that is the rendered conversation, role names and the template's own words included.
    """

    pick: Pick | None = None
    index: int | None = None
    span: str | None = None

    def __post_init__(self) -> None:
        if (self.pick is None) == (self.index is None) or (self.index is not None and self.span is not None):
            raise UsageError(f"a position picks tokens or names an index, not both: {FORMS}")
        if self.pick not in (None, *_PICKS):
            raise UsageError(f"pick={self.pick!r}: one of {', '.join(_PICKS)}")
        if self.pick == "first" and self.span is None:
            raise UsageError(f"'first' is written index:0; positions: {FORMS}")

    @classmethod
    def parse(cls, text: str) -> "Position":
        """The position that `text` names; `UsageError` with all forms for anything else."""
        word = text.strip()
        if word in _PICKS and word != "first":
            return cls(pick=_PICKS[word])
        if index := re.fullmatch(r"index:(-?\d+)", word):
            return cls(index=int(index[1]))
        span = re.fullmatch(r"span:([^:]+):([a-z]+)", word)
        if span and span[2] in _PICKS:
            return cls(pick=_PICKS[span[2]], span=span[1])
        if word.startswith("span:"):
            name = word.split(":")[1] or WHOLE
            raise UsageError(f"not a position: {text!r}; of a span, say which tokens: span:{name}:last|first|mean|all")
        raise UsageError(f"not a position: {text!r}; positions: {FORMS}")

    @property
    def pooled(self) -> bool:
        """True if each prompt's tokens are averaged into one row."""
        return self.pick == "mean"

    def __str__(self) -> str:
        if self.index is not None:
            return f"index:{self.index}"
        return str(self.pick) if self.span is None else f"span:{self.span}:{self.pick}"
