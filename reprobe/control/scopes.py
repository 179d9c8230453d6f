"""Scopes: on which tokens an intervention acts.

Enters: text (`all`, `prompt`, `generated`, `last`, `span:NAME`) and, at run time, the `Tokens` of a forward pass.
Leaves: a mask. Pads are never in a scope. Does not know sites or operators.
"""

from dataclasses import dataclass

from jaxtyping import Bool
from torch import Tensor

from reprobe.errors import UnsupportedOperation, UsageError
from reprobe.model.hooks import Tokens

_KINDS = ("all", "prompt", "generated", "last", "span")


@dataclass(frozen=True)
class Scope:
    """Which tokens: `kind`, and for `span` its name.

    `all` real tokens; `prompt` those given; `generated` those after the prompt (in `lm.logprobs`: the
    continuation); `last` the prompt's last token and every generated one (with a key-value cache that is the newest
    token of each pass; without, the earlier ones stay steered, so both ways agree); `span` the prompt's tokens that
    overlap the named character range.
    """

    kind: str
    name: str = ""

    @classmethod
    def parse(cls, text: "str | Scope") -> "Scope":
        """A scope from its text; raises `UsageError` that lists what exists."""
        if isinstance(text, Scope):
            return text
        kind, _, name = text.partition(":")
        if kind not in _KINDS or (kind == "span") != bool(name):
            raise UsageError(f"unknown scope {text!r}; one of all, prompt, generated, last, span:NAME")
        return cls(kind, name)

    def __str__(self) -> str:
        return f"span:{self.name}" if self.kind == "span" else self.kind

    def mask(self, tokens: Tokens) -> Bool[Tensor, "rows columns"] | None:
        """The tokens of a pass that are in scope; None if that is every one of them."""
        match self.kind:
            case "all":
                return None if tokens.trivial else tokens.real
            case "prompt":
                return tokens.real & ~tokens.generated
            case "generated":
                return tokens.real & tokens.generated
            case "last":
                return tokens.last
        if tokens.spans is None:
            raise UnsupportedOperation(
                f"the scope {self} needs the prompts' spans, and the network was called directly; "
                "use lm.generate(prompts, spans=…) or lm.logits(prompts, spans=…)"
            )
        if self.name not in tokens.spans:
            have = ", ".join(sorted(tokens.spans)) or "none"
            raise UsageError(f"the scope {self} names a span that these prompts do not have; their spans: {have}")
        return tokens.spans[self.name] & tokens.real
