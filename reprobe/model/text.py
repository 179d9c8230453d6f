"""From text to token ids, with the tokens of named character ranges.

Enters: a tokenizer and prompts (plain text or chat messages). Leaves: token ids without padding, and for each span
the indices of its tokens. Spans become tokens through the tokenizer's offsets, never by tokenising pieces apart: a
beginning-of-text token or a blank would shift everything. Does not know models, data sets or padding.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Int

from reprobe.errors import DataError, PromptTooLong, UsageError

Message = Mapping[str, str]
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
    prompts: Sequence[str | Sequence[Message]],
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
    span outside its text, or one that was cut away.
    """
    texts, special = [], []
    for prompt in prompts:
        text, adds = render(tokenizer, prompt)
        texts.append(text)
        special.append(adds)
    ends = [len(t) for t in texts]
    if suffixes is not None:
        texts = [t + s for t, s in zip(texts, suffixes, strict=True)]
    offsets_needed = suffixes is not None or any(spans or ())
    out: list[TokenisedText | None] = [None] * len(texts)
    for adds in set(special):
        chosen = [i for i, a in enumerate(special) if a == adds]
        coded = encode_batch(tokenizer, [texts[i] for i in chosen], special=adds, offsets=offsets_needed)
        for i, (ids, offsets, extra) in zip(chosen, coded, strict=True):
            kept = cut(len(ids), extra, context, truncate, f"prompt {i}")
            named = {} if spans is None else _placed(prompts[i], texts[i][: ends[i]], spans[i])
            out[i] = TokenisedText(
                ids[kept],
                {name: _span_tokens(offsets[kept], extra[kept], span, name, i) for name, span in named.items()},
                len(kept) if suffixes is None else _first_after(offsets[kept], extra[kept], ends[i]),
            )
    return [row for row in out if row is not None]


def render(tokenizer: Any, prompt: str | Sequence[Message]) -> tuple[str, bool]:
    """The text of a prompt, and whether the tokenizer should add its special tokens (a template adds its own).

    A generation prompt is appended unless the assistant has spoken last.
    """
    if isinstance(prompt, str):
        return prompt, True
    if getattr(tokenizer, "chat_template", None) is None:
        raise UsageError(
            "this tokenizer has no chat template, so messages cannot be rendered: give plain text, or set "
            "tokenizer.chat_template to the template that the model was trained with"
        )
    ask = prompt[-1]["role"] != "assistant"
    text: str = tokenizer.apply_chat_template(list(prompt), tokenize=False, add_generation_prompt=ask)
    return text, False


#: Token ids, character ranges (tokens, 2), and which tokens are special ones that the tokenizer added.
Coded = tuple[Int[np.ndarray, " tokens"], Int[np.ndarray, "tokens 2"], Bool[np.ndarray, " tokens"]]


def encode_batch(tokenizer: Any, texts: Sequence[str], *, special: bool, offsets: bool) -> list[Coded]:
    """Token ids of many texts at once, without padding or truncation."""
    if offsets and not tokenizer.is_fast:
        raise UsageError("this tokenizer gives no character offsets (it is not a fast one), so spans have no tokens")
    found = tokenizer(
        list(texts),
        add_special_tokens=special,
        return_offsets_mapping=offsets,
        return_special_tokens_mask=True,
        return_attention_mask=False,
        padding=False,
        truncation=False,
        verbose=False,
    )
    out = []
    for i, ids in enumerate(found["input_ids"]):
        where = found["offset_mapping"][i] if offsets else np.zeros((len(ids), 2))
        out.append(
            (
                np.asarray(ids, dtype=np.int32),
                np.asarray(where, dtype=np.int64).reshape(-1, 2),
                np.asarray(found["special_tokens_mask"][i], dtype=bool),
            )
        )
    return out


def cut(
    n: int, special: Bool[np.ndarray, " tokens"], context: int | None, truncate: Truncate | None, who: str
) -> Int[np.ndarray, " kept"]:
    """Indices of the tokens that are kept of `n`; the leading special tokens survive a cut on the left."""
    if n == 0:
        raise DataError(f"{who} has no tokens: an empty text, and a tokenizer that adds none")
    if context is None or n <= context:
        return np.arange(n)
    if truncate is None:
        raise PromptTooLong(
            f"{who} has {n} tokens, the context is {context}; shorten it, or pass truncate='left' or 'right' "
            "(--truncate) to cut it"
        )
    if truncate == "right":
        return np.arange(context)
    lead = int(np.argmin(special)) if not special.all() else 0  # the first token of the text itself
    lead = min(lead, context - 1)
    return np.concatenate([np.arange(lead), np.arange(n - context + lead, n)])


def in_span(
    offsets: Int[np.ndarray, "tokens 2"], special: Bool[np.ndarray, " tokens"], span: Span
) -> Int[np.ndarray, " in_span"]:
    """Indices of the tokens that share at least one character with a span.

    A character whose bytes are several tokens belongs to all of them.
    """
    start, end = span
    found: np.ndarray = np.flatnonzero((offsets[:, 0] < end) & (offsets[:, 1] > start) & ~special)
    return found


def _span_tokens(offsets: np.ndarray, special: np.ndarray, span: Span, name: str, i: int) -> np.ndarray:
    tokens = in_span(offsets, special, span)
    if not len(tokens):
        raise DataError(f"the span {name!r} of prompt {i}, characters {span[0]}–{span[1]}, holds no token (cut away?)")
    return tokens


def _first_after(offsets: np.ndarray, special: np.ndarray, end: int) -> int:
    """The first token that holds a character from `end` on."""
    found = np.flatnonzero((offsets[:, 1] > end) & ~special)
    if not len(found):
        raise DataError("a continuation has no token of its own")
    return int(found[0])


def _placed(prompt: str | Sequence[Message], text: str, spans: Mapping[str, Span]) -> dict[str, Span]:
    """Spans as characters of the rendered text; of messages they are characters of the last one's content."""
    within = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    for name, (start, end) in spans.items():
        if not 0 <= start < end <= len(within):
            raise DataError(f"the span {name!r} ({start}–{end}) is outside its text of {len(within)} characters")
    if isinstance(prompt, str):
        return dict(spans)
    at = text.rfind(within)
    if at < 0:
        raise DataError("the template changes the content of the last message, so its spans cannot be placed")
    return {name: (at + start, at + end) for name, (start, end) in spans.items()}
