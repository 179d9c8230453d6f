"""From text to token ids, with the tokens of named character ranges.

Enters: a tokenizer and prompts (plain text or chat messages). Leaves: token ids without padding, and for each span
the indices of its tokens. Spans become tokens through the tokenizer's offsets, never by tokenising pieces apart: a
beginning-of-text token or a blank would shift everything. Does not know models, data sets or padding.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Int

from reprobe.errors import DataError, PromptTooLong, UnsupportedOperation, UsageError
from reprobe.model.chat import Messages, last_content_start, render

#: Characters start … end − 1.
Span = tuple[int, int]
Truncate = Literal["left", "right"]


@dataclass(frozen=True)
class TokenisedText:
    """Token ids of one prompt; `spans[name]` are indices into them; `suffix` is the first token of the suffix."""

    ids: Int[np.ndarray, " tokens"]
    spans: Mapping[str, Int[np.ndarray, " in_span"]]
    suffix: int


def tokenise(
    tokenizer: Any,
    prompts: Sequence[str | Messages],
    *,
    spans: Sequence[Mapping[str, Span]] | None = None,
    suffixes: Sequence[str] | None = None,
    context: int | None = None,
    truncate: Truncate | None = None,
) -> list[TokenisedText]:
    """Tokens of each prompt.

    Messages are rendered with the tokenizer's template, which brings its own special tokens; plain text gets the
    tokenizer's. `suffixes` are tokenised together with their prompts. More than `context` tokens raise
    `PromptTooLong` unless `truncate` says on which side to cut. Raises `DataError` for a prompt without tokens, a
    span outside its text, or one that was cut away; `UnsupportedOperation` if offsets are needed and not there.
    """
    check_truncate(truncate)
    offsets_needed = suffixes is not None or any(spans or ())
    if offsets_needed and not getattr(tokenizer, "is_fast", False):
        raise UnsupportedOperation(
            f"a {type(tokenizer).__name__} does not say which characters its tokens come from, so spans and "
            "continuations have no tokens; load the fast tokenizer"
        )
    special = special_ids(tokenizer)
    out = []
    for i, prompt in enumerate(prompts):
        text = prompt if isinstance(prompt, str) else render(prompt, tokenizer)
        coded = tokenizer(
            text + (suffixes[i] if suffixes is not None else ""),
            add_special_tokens=isinstance(prompt, str),
            return_offsets_mapping=offsets_needed,
            return_attention_mask=False,
            verbose=False,
        )
        ids = np.asarray(coded["input_ids"], dtype=np.int64)
        if not len(ids):
            raise DataError(f"prompt {i} has no tokens: an empty text, and a tokenizer that adds none")
        kept = kept_tokens(ids, special, context, truncate, f"prompt {i}")
        ids = ids[kept]
        offsets = np.asarray(coded["offset_mapping"] if offsets_needed else [], dtype=np.int64).reshape(-1, 2)
        # Special tokens stand for no text, wherever they come from.
        if offsets_needed:
            offsets = np.where(np.isin(ids, special)[:, None], -1, offsets[kept])
        begin, end = offsets.T
        named = {} if spans is None else _placed(tokenizer, prompt, text, spans[i])
        out.append(
            TokenisedText(
                ids,
                {name: _in_span(begin, end, span, name, i) for name, span in named.items()},
                len(ids) if suffixes is None else _first_after(end, len(text)),
            )
        )
    return out


def check_truncate(truncate: str | None) -> None:
    """Raise `UsageError` unless a prompt may be cut so."""
    if truncate not in (None, *get_args(Truncate)):
        raise UsageError(f"truncate={truncate!r}: cut on the 'left' or the 'right', or None to refuse long prompts")


def special_ids(tokenizer: Any) -> Int[np.ndarray, " ids"]:
    """Ids of tokens that stand for no text.

    The unknown token stands for text, unless it doubles as another special token (as in GPT-2).
    """
    ids = set(tokenizer.all_special_ids)
    roles = [getattr(tokenizer, f"{r}_token_id", None) for r in ("bos", "eos", "sep", "cls", "pad")]
    unknown = getattr(tokenizer, "unk_token_id", None)
    added = getattr(tokenizer, "added_tokens_decoder", {})
    ids |= {i for i, token in added.items() if token.special}
    if unknown is not None and unknown not in roles:
        ids.discard(unknown)
    return np.array(sorted(ids), np.int64)


def kept_tokens(
    ids: Int[np.ndarray, " tokens"],
    special: Int[np.ndarray, " ids"],
    context: int | None,
    truncate: Truncate | None,
    who: str,
) -> Int[np.ndarray, " kept"]:
    """Indices of the tokens of a prompt that stay. A cut on the left keeps the leading special tokens (BOS), one on
    the right the trailing ones (SEP). Raises `PromptTooLong` if nothing may be cut, or those alone do not fit."""
    n = len(ids)
    if context is None or n <= context:
        return np.arange(n)
    if truncate is None:
        raise PromptTooLong(
            f"{who} has {n} tokens, and the context has room for {context}; shorten it, or where prompts may be cut, "
            "say on which side: truncate='left' or 'right' (--truncate)"
        )
    ordinary = np.flatnonzero(~np.isin(ids, special))
    head, tail = (int(ordinary[0]), n - 1 - int(ordinary[-1])) if len(ordinary) else (n, 0)
    fixed = head if truncate == "left" else tail
    if fixed >= context:
        raise PromptTooLong(
            f"{who} has {n} tokens and cannot be cut to {context}: its {fixed} special tokens alone leave no room"
        )
    if truncate == "left":
        return np.concatenate([np.arange(head), np.arange(n - (context - head), n)])
    return np.concatenate([np.arange(context - tail), np.arange(n - tail, n)])


def _in_span(begin: np.ndarray, end: np.ndarray, span: Span, name: str, i: int) -> np.ndarray:
    """Tokens that share at least one character with a span; one of several tokens of a character shares it too."""
    tokens = np.flatnonzero((begin < span[1]) & (end > span[0]) & (end > begin))
    if not len(tokens):
        raise DataError(f"the span {name!r} of prompt {i}, characters {span[0]}–{span[1]}, holds no token (cut away?)")
    return tokens


def _first_after(end: np.ndarray, characters: int) -> int:
    """The first token that holds a character beyond the first `characters`."""
    found = np.flatnonzero(end > characters)
    if not len(found):
        raise DataError("a continuation has no token of its own")
    return int(found[0])


def _placed(tokenizer: Any, prompt: str | Messages, text: str, spans: Mapping[str, Span]) -> dict[str, Span]:
    """Spans as characters of the rendered text; of messages they are characters of the last one's content."""
    within = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    for name, (start, end) in spans.items():
        if not 0 <= start < end <= len(within):
            raise DataError(f"the span {name!r} ({start}–{end}) is outside its text of {len(within)} characters")
    shift = 0 if isinstance(prompt, str) or not spans else last_content_start(prompt, tokenizer, text)
    return {name: (start + shift, end + shift) for name, (start, end) in spans.items()}
