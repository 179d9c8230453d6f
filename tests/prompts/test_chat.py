from typing import Any

import pytest

from reprobe.errors import DataError, UnsupportedOperation
from reprobe.model.chat import render
from reprobe.prompts import Position, PromptSet, TokenTable, tokenize

USER = [{"role": "user", "content": "Is the bread old?"}]
ANSWERED = [*USER, {"role": "assistant", "content": "Yes, the bread is old."}]


def tokens_of(tokenizer: Any, messages: list[dict[str, str]], at: str, **fields: Any) -> TokenTable:
    prompts = PromptSet.from_records([{"id": "m", "messages": messages, **fields}])
    return tokenize(prompts, tokenizer, at=Position.parse(at), context=200)


def test_the_assistants_turn_is_opened_unless_it_was_the_last_to_speak(chat: Any) -> None:
    assert render(USER, chat) == "<s><|user|>Is the bread old?</s><|assistant|>"
    assert render(ANSWERED, chat).endswith("<|assistant|>Yes, the bread is old.</s>")


def test_messages_get_one_bos_and_texts_get_the_tokenizers_own(chat: Any) -> None:
    assert chat("x").input_ids[0] == chat.bos_token_id  # so encoding the rendered text naively would double it
    tokens = tokens_of(chat, USER, "all").tokens
    assert tokens.tolist() == chat(render(USER, chat), add_special_tokens=False).input_ids
    assert (tokens == chat.bos_token_id).sum() == 1


def test_texts_and_messages_may_be_mixed(chat: Any) -> None:
    rows = [{"id": "t", "text": "The bread."}, {"id": "m", "messages": USER}, {"id": "u", "text": "Old."}]
    table = tokenize(PromptSet.from_records(rows), chat, at=Position.parse("last"), context=200)
    assert table.prompt(0).tokens.tolist() == chat("The bread.").input_ids
    assert table.prompt(1).tokens.tolist() == tokens_of(chat, USER, "last").tokens.tolist()
    assert table.prompt(2).tokens.tolist() == chat("Old.").input_ids


def test_spans_of_messages_are_found_in_the_last_message_even_if_its_words_stand_elsewhere(chat: Any) -> None:
    said = {"role": "user", "content": "bread bread"}
    messages = [
        {"role": "system", "content": "bread bread"},
        said,
        {"role": "assistant", "content": "bread"},
        said,
    ]
    spans = {"second": [6, 11]}
    part = tokens_of(chat, messages, "span:second:all", spans=spans).prompt(0)
    assert chat.decode(part.tokens[part.rows]) == " bread"
    following = chat.decode(part.tokens[part.rows[-1] + 1 :])
    assert following == "</s><|assistant|>"


def test_the_words_of_a_conversation_are_read_without_its_special_tokens(chat: Any) -> None:
    part = tokens_of(chat, ANSWERED, "span:text:all").prompt(0)
    assert chat.decode(part.tokens[part.rows]) == "Is the bread old?Yes, the bread is old."


def test_a_span_is_refused_if_the_template_changes_the_message(chat: Any) -> None:
    messages = [{"role": "user", "content": " Is the bread old? "}]
    spans = {"word": [8, 13]}
    assert tokens_of(chat, messages, "span:word:last", spans=spans).n_rows.tolist() == [1]
    stripping = chat.chat_template.replace("m['content']", "m['content'] | trim")
    twice = chat.chat_template.replace("m['content']", "m['content'] + m['content']")
    dropping = "<s>{{ messages[0]['role'] }}"
    for template in (stripping, twice, dropping):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(chat, "chat_template", template)
            with pytest.raises(DataError, match=r"prompt 'm': .*does not copy that message verbatim"):
                tokens_of(chat, messages, "span:word:last", spans=spans)


def test_messages_without_a_template_say_what_to_do(with_bos: Any) -> None:
    with pytest.raises(UnsupportedOperation, match=r"no chat template: use an instruction-tuned model"):
        tokens_of(with_bos, USER, "last")


def test_a_conversation_that_the_template_refuses_is_named(chat: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat, "chat_template", "{{ raise_exception('roles must alternate') }}")
        with pytest.raises(DataError, match=r"prompt 'm': the chat template refuses .*roles must alternate"):
            tokens_of(chat, USER, "last")
