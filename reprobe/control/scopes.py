"""Scopes: on which tokens an intervention acts.

Enters: text (`all`, `prompt`, `generated`, `last`, `span:NAME`, `positions:0,3,5:9`, `prompt:0,3`) and, at run time,
the `Tokens` of a forward pass. Leaves: a mask. Pads are never in a scope. Does not know sites or operators.
"""

import re
from dataclasses import dataclass
from functools import cached_property

from jaxtyping import Bool
from torch import Tensor

from reprobe.errors import UsageError
from reprobe.model.passes import Tokens

_HELP = "all, prompt, generated, last, span:NAME, positions:0,3,5:9, prompt:0,3,5:9"
_FORM = re.compile(r"all|prompt|generated|last|(?:span|positions|prompt):.+")
#: Kinds that take a list of positions.
_LISTED = ("positions", "prompt")
_PIECE = re.compile(r"(?P<at>-?\d+)|(?P<start>-?\d+)?:(?P<stop>-?\d+)?")


@dataclass(frozen=True)
class Scope:
    """Which tokens: `kind`, and for `span` its name, for `positions` (or `prompt`) the list.

    `all` real tokens; `prompt` those given; `generated` those after the prompt (in `lm.logprobs`: the
    continuation); `last` the prompt's last token and every generated one (with a key-value cache that is the newest
    token of each pass; without, the earlier ones stay steered, so both ways agree); `span` the prompt's tokens that
    overlap the named character range; `positions` tokens by number, 0 the prompt's first real token (a beginning-of-
    text token counts), whatever the padding and the cache: numbers and slices as Python indexes a prompt, −1 its last
    token, `5:` from the sixth to its end. Numbers beyond the prompt are generated tokens, which `prompt:0,3,5:9` leaves
    out. What a prompt does not have is not touched.
    """

    kind: str
    name: str = ""

    @classmethod
    def parse(cls, text: "str | Scope") -> "Scope":
        """A scope from its text; raises `UsageError` that lists what exists."""
        if isinstance(text, Scope):
            return text
        kind, _, name = text.partition(":")
        if not _FORM.fullmatch(text):
            raise UsageError(f"unknown scope {text!r}; one of {_HELP}")
        if name and kind in _LISTED:
            pieces = [piece.strip() for piece in name.split(",")]
            if bad := [piece for piece in pieces if not _PIECE.fullmatch(piece)]:
                raise UsageError(
                    f"{text!r}: {bad[0]!r} is neither a position nor a slice; write e.g. {kind}:0,3,5:9 or {kind}:-1"
                )
            name = ",".join(pieces)
        return cls(kind, name)

    def __str__(self) -> str:
        return f"{self.kind}:{self.name}" if self.name else self.kind

    @property
    def by_role(self) -> bool:
        """Whether it matters which tokens are prompt and which are generated."""
        return self.kind != "all" and (self.kind != "positions" or self._relative)

    @property
    def by_prompt(self) -> bool:
        """Whether it matters which prompt a token belongs to: its length, or its spans."""
        return self.kind == "span" or (self.kind in _LISTED and bool(self.name) and self._relative)

    def choose(self, tokens: Tokens) -> Bool[Tensor, "rows now"] | bool:
        """The tokens of a pass that are in scope: a mask, or True for all and False for none of them."""
        if self.kind in ("prompt", "span") and tokens.all_generated:
            return False
        match self.kind:
            case "all":
                return tokens.trivial or tokens.real
            case "prompt" if self.name:
                found = self._positions(tokens)
                return found if tokens.none_generated else found & ~tokens.generated
            case "prompt":
                if tokens.none_generated:
                    return tokens.trivial or tokens.real
                return tokens.real & ~tokens.generated
            case "generated":
                if tokens.all_generated:
                    return tokens.trivial or tokens.real
                return False if tokens.none_generated else tokens.real & tokens.generated
            case "last":
                return (tokens.all_generated and tokens.trivial) or tokens.last
            case "span":
                return tokens.span(self.name) & tokens.real
        return self._positions(tokens)

    # -- positions ---------------------------------------------------------------------------------------------

    @cached_property
    def _pieces(self) -> list[tuple[int | None, int | None]]:
        """Start and stop of each piece; a single −1 is (−1, None), since its end is the prompt's."""
        out: list[tuple[int | None, int | None]] = []
        for piece in self.name.split(","):
            m = _PIECE.fullmatch(piece)
            assert m is not None
            if m["at"] is not None:
                at = int(m["at"])
                out.append((at, None if at == -1 else at + 1))
            else:
                out.append(tuple(None if m[k] is None else int(m[k]) for k in ("start", "stop")))  # type: ignore[arg-type]
        return out

    @cached_property
    def _relative(self) -> bool:
        """Whether any end of a piece is counted from the prompt's end."""
        return any(stop is None or stop < 0 or (start or 0) < 0 for start, stop in self._pieces)

    @cached_property
    def _beyond(self) -> int:
        """No token from this position on is in scope, unless it is of the prompt."""
        return max((stop for _, stop in self._pieces if stop is not None and stop > 0), default=0)

    def _positions(self, tokens: Tokens) -> Bool[Tensor, "rows now"] | bool:
        if tokens.all_generated and tokens.earliest >= self._beyond:
            return False
        at, found = tokens.positions, None
        for start, stop in self._pieces:
            first = 0 if start is None else start if start >= 0 else (tokens.prompt_lengths + start).clamp(min=0)
            end = stop if stop is not None and stop >= 0 else tokens.prompt_lengths + (stop or 0)
            here = (at >= first) & (at < end)
            found = here if found is None else found | here
        assert found is not None
        return found & tokens.real
