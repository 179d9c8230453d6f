"""Messages become text.

Enters: one conversation and a tokenizer with a chat template. Leaves: the text the model is given, and where
in it the last message stands. Does not encode: the text brings its own BOS and special tokens, so it is
encoded with `add_special_tokens=False`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from reprobe.errors import DataError, UnsupportedOperation

Messages = Sequence[Mapping[str, str]]

#: Stands for the last message while its place is found; a template has no reason to change it.
_MARK = "LAST-MESSAGE-MARK-7Q2"


def render(messages: Messages, tokenizer: Any) -> str:
    """The conversation as text, by the tokenizer's chat template, the assistant's turn opened unless it spoke last.

    Raises `UnsupportedOperation` if there is no template, `DataError` if the template refuses the conversation
    (many refuse a system message, or roles that do not alternate).
    """
    if not getattr(tokenizer, "chat_template", None):
        raise UnsupportedOperation(
            "these prompts are messages, and the tokenizer has no chat template: use an instruction-tuned "
            "model, set tokenizer.chat_template, or give the prompts as text"
        )
    opened = messages[-1]["role"] != "assistant"
    try:
        text = tokenizer.apply_chat_template([dict(m) for m in messages], tokenize=False, add_generation_prompt=opened)
    except jinja2.TemplateError as error:
        raise DataError(f"the chat template refuses the conversation: {error}") from error
    return str(text)


def last_content_start(messages: Messages, tokenizer: Any, rendered: str) -> int:
    """The character of `rendered` at which the last message's content begins.

    Found by rendering once more with a mark in its place, so that equal words elsewhere cannot be mistaken
    for it. `DataError` if the template does not copy the content verbatim, exactly once (some strip blanks at
    its ends).
    """
    marked = [*messages[:-1], {**messages[-1], "content": _MARK}]
    frame = render(marked, tokenizer)
    before, *after = frame.split(_MARK)
    if len(after) != 1 or before + messages[-1]["content"] + after[0] != rendered:
        raise DataError(
            "spans of messages are characters of the last message, and the chat template does not copy that "
            "message verbatim, once: remove blanks at its ends, or mark spans in plain text"
        )
    return len(before)
