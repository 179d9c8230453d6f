from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tiny import tiny_tokenizer
from transformers import PreTrainedTokenizer

from reprobe.errors import DataError, PromptTooLong, UnsupportedOperation, UsageError
from reprobe.prompts import Position, PromptSet, TokenTable, index_frame, token_table, tokenize
from reprobe.prompts import tokens as tokens_module


def table_of(texts: list[str], tokenizer: Any, at: str, *, spans: Any = None, **options: Any) -> TokenTable:
    rows = [{"id": f"p{i}", "text": t} | ({} if spans is None else {"spans": spans[i]}) for i, t in enumerate(texts)]
    return tokenize(PromptSet.from_records(rows), tokenizer, at=Position.parse(at), **({"context": 1000} | options))


def read(texts: list[str], tokenizer: Any, at: str, **options: Any) -> list[list[str]]:
    """The wanted tokens of each prompt, as text."""
    table = table_of(texts, tokenizer, at, **options)
    parts = [table.prompt(i) for i in range(len(table))]
    return [[tokenizer.decode([t]) for t in part.tokens[part.rows]] for part in parts]


TEXTS = ["The baker said no.", "A comet is a lump of ice.", "Lisbon"]


def test_tokens_are_those_of_the_tokenizer_and_nothing_is_padded(with_bos: Any) -> None:
    table = table_of(TEXTS, with_bos, "last")
    for i, text in enumerate(TEXTS):
        assert table.prompt(i).tokens.tolist() == with_bos(text).input_ids
    assert table.tokens.dtype == table.rows.dtype == np.int32
    assert table.n_tokens.sum() == len(table.tokens)


def test_all_and_mean_are_every_token_special_ones_included(with_bos: Any) -> None:
    every, mean = table_of(TEXTS, with_bos, "all"), table_of(TEXTS, with_bos, "mean")
    for i in range(len(TEXTS)):
        assert every.prompt(i).rows.tolist() == list(range(every.n_tokens[i]))
        assert mean.prompt(i).rows.tolist() == every.prompt(i).rows.tolist()
    assert (every.pooled, mean.pooled) == (False, True)
    assert every.n_rows.tolist() == every.n_tokens.tolist()
    assert mean.n_rows.tolist() == [1, 1, 1]


def test_the_span_text_is_every_token_but_the_special_ones(with_bos: Any, plain: Any, bert: Any) -> None:
    for i, text in enumerate(TEXTS):
        assert table_of(TEXTS, with_bos, "span:text:mean").prompt(i).rows[0] == 1
        assert table_of(TEXTS, plain, "span:text:mean").prompt(i).rows[0] == 0
        words = table_of(TEXTS, bert, "span:text:all").prompt(i)
        assert words.rows.tolist() == list(range(1, len(bert(text).input_ids) - 1))


def test_a_word_the_tokenizer_does_not_know_is_still_text(bert: Any) -> None:
    assert read(["The zeppelin said no."], bert, "span:text:all") == [["The", "[UNK]", "said", "no", "."]]


def test_special_tokens_written_in_the_text_are_not_text(with_bos: Any) -> None:
    assert "</s>" not in read(["The baker</s> said no."], with_bos, "span:text:all")[0]


def test_last_and_index_count_special_tokens(with_bos: Any, bert: Any) -> None:
    assert read(TEXTS, with_bos, "last") == [["."], ["."], [read(["Lisbon"], with_bos, "all")[0][-1]]]
    assert read(TEXTS, bert, "last") == [["[SEP]"]] * 3
    assert read(TEXTS, with_bos, "index:0") == [["<s>"]] * 3
    assert read(TEXTS, bert, "index:-2") == [["."], ["."], ["Lisbon"]]


def test_an_index_beyond_a_prompt_names_the_prompt(bert: Any) -> None:
    assert len(table_of(TEXTS, bert, "index:2").rows) == 3
    for at in ("index:3", "index:-4"):
        with pytest.raises(DataError, match=rf"'{at}' is beyond the prompt in p2 \(3 tokens\)$"):
            table_of(TEXTS, bert, at)


def test_a_span_is_read_at_its_first_last_or_all_tokens(plain: Any) -> None:
    text = "Nobody saw xyzzy there."
    assert "".join(read([text], plain, "span:word:all", spans=[{"word": [11, 16]}])[0]).strip() == "xyzzy"
    every = table_of([text], plain, "span:word:all", spans=[{"word": [11, 16]}]).rows.tolist()
    assert len(every) > 2
    for at, rows in [("first", every[:1]), ("last", every[-1:]), ("mean", every)]:
        table = table_of([text], plain, f"span:word:{at}", spans=[{"word": [11, 16]}])
        assert table.rows.tolist() == rows
        assert table.pooled == (at == "mean")


def test_a_span_does_not_reach_into_the_neighbouring_words(with_bos: Any) -> None:
    text = "The baker said that the bread was old."
    assert read([text], with_bos, "span:word:all", spans=[{"word": [4, 9]}]) == [[" baker"]]
    both = read([text], with_bos, "span:word:all", spans=[{"word": [3, 9]}])
    assert both == [[" baker"]]  # the blank belongs to the word's own token


def test_each_prompt_is_read_at_its_own_span(with_bos: Any) -> None:
    texts = ["The baker said no.", "Nobody in Lisbon said no."]
    spans = [{"who": [4, 9], "rest": [10, 14]}, {"rest": [17, 21], "who": [0, 6]}]
    assert ["".join(r) for r in read(texts, with_bos, "span:who:all", spans=spans)] == [" baker", "Nobody"]
    assert ["".join(r) for r in read(texts, with_bos, "span:rest:all", spans=spans)] == [" said", " said"]


@pytest.mark.parametrize("name", ["plain", "with_bos", "trimmed", "pieces"])
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_the_tokens_of_a_span_are_those_that_hold_its_characters(name: str, data: st.DataObject, request) -> None:
    tokenizer = request.getfixturevalue(name)
    letters = st.one_of(st.sampled_from("the baker 🙂🙃é漢\n "), st.characters(exclude_categories=["Cs"]))
    text = data.draw(st.text(letters, min_size=1, max_size=24))
    start = data.draw(st.integers(0, len(text) - 1))
    end = data.draw(st.integers(start + 1, len(text)))
    assume("".join(text[start:end].split()))  # trimmed offsets and ▁ give blanks no token of their own
    part = table_of([text], tokenizer, "span:it:all", spans=[{"it": [start, end]}]).prompt(0)
    encoding = tokenizer(text, return_offsets_mapping=True)
    by_character = {encoding.char_to_token(c) for c in range(start, end)} - {None}
    assert by_character <= set(part.rows.tolist())
    for row in part.rows:  # and none that holds no character of it
        first, past = encoding["offset_mapping"][row]
        assert start < past
        assert first < end
        assert first < past
    decoded = tokenizer.decode(part.tokens[part.rows], clean_up_tokenization_spaces=False)
    assert "".join(text[start:end].split()) in "".join(decoded.split())
    if name in ("plain", "with_bos"):
        assert text[start:end] in decoded


def test_every_token_of_an_emoji_is_in_its_span(plain: Any, pieces: Any) -> None:
    for tokenizer in (plain, pieces):
        part = table_of(["the 🙂 bread"], tokenizer, "span:face:all", spans=[{"face": [4, 5]}]).prompt(0)
        assert len(part.rows) == 4
        assert tokenizer.decode(part.tokens[part.rows]).strip() == "🙂"


def test_a_span_that_is_missing_names_the_prompts_and_the_spans_there_are(with_bos: Any) -> None:
    spans = [{"who": [0, 3]}, {"what": [0, 1], "where": [2, 3]}, {"what": [0, 1]}]
    with pytest.raises(DataError, match=r"no span 'who' in p1, p2; spans there: text, what, where$"):
        table_of(TEXTS, with_bos, "span:who:last", spans=spans)


def test_a_span_of_blanks_or_special_tokens_is_refused(bert: Any, with_bos: Any) -> None:
    with pytest.raises(DataError, match=r"span 'gap' covers no token in p0"):
        table_of(["The  baker"], bert, "span:gap:last", spans=[{"gap": [3, 5]}])
    with pytest.raises(DataError, match=r"span 'end' covers no token in p0"):
        table_of(["no</s>"], with_bos, "span:end:last", spans=[{"end": [2, 6]}])


def test_a_prompt_without_tokens_is_refused() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    with pytest.raises(DataError, match="no token of the text of p1"):
        table_of(["a", " "], tokenizer, "last")


def test_a_prompt_beyond_the_context_is_refused_with_the_longest_first(with_bos: Any) -> None:
    texts = ["no.", "The baker said no.", "Nobody in Lisbon had seen the comet, nobody, nobody."]
    lengths = [len(with_bos(t).input_ids) for t in texts]
    with pytest.raises(PromptTooLong) as caught:
        table_of(texts, with_bos, "last", context=lengths[0])
    assert f"2 of 3 prompts of prompts are longer than the model's context of {lengths[0]} tokens" in str(caught.value)
    assert f"p2 ({lengths[2]} tokens), p1 ({lengths[1]} tokens)" in str(caught.value)
    assert "--truncate left|right" in str(caught.value)
    assert len(table_of(texts, with_bos, "last", context=lengths[2])) == 3


def test_truncation_keeps_the_special_token_at_the_side_that_is_cut(with_bos: Any, bert: Any) -> None:
    text = "Nobody in Lisbon had seen the comet."
    ids = with_bos(text).input_ids
    left = table_of([text], with_bos, "all", context=5, truncate="left")
    assert left.tokens.tolist() == [ids[0], *ids[-4:]]
    assert left.rows.tolist() == [0, 1, 2, 3, 4]
    assert table_of([text], with_bos, "all", context=5, truncate="right").tokens.tolist() == ids[:5]
    assert read([text], bert, "all", context=4, truncate="right") == [["[CLS]", "Nobody", "in", "[SEP]"]]
    assert read([text], bert, "all", context=4, truncate="left") == [["[CLS]", "comet", ".", "[SEP]"]]


def test_truncation_leaves_short_prompts_alone(with_bos: Any) -> None:
    texts = ["no.", "Nobody in Lisbon had seen the comet.", "The baker."]
    table = table_of(texts, with_bos, "last", context=6, truncate="left")
    assert table.prompt(0).tokens.tolist() == with_bos(texts[0]).input_ids
    assert table.n_tokens[1] == 6
    assert (table.rows == table.n_tokens - 1).all()


def test_a_span_is_read_after_truncation_or_refused_if_it_was_cut_away(bert: Any) -> None:
    texts = ["Nobody in Lisbon had seen the comet.", "The baker."]
    spans = [
        {"who": [0, 6], "all": [0, 16], "what": [30, 35]},
        {"who": [4, 9], "all": [4, 9], "what": [4, 9]},
    ]
    assert read(texts, bert, "span:what:last", spans=spans, context=5, truncate="left") == [
        ["comet"],
        ["baker"],
    ]
    with pytest.raises(DataError, match=r"'span:who:last' was cut away by truncation in p0;"):
        table_of(texts, bert, "span:who:last", spans=spans, context=5, truncate="left")
    assert read(texts, bert, "span:all:first", spans=spans, context=4, truncate="right")[0] == ["Nobody"]
    for at in ("last", "mean", "all"):  # the last word of the span is gone
        with pytest.raises(DataError, match="was cut away"):
            table_of(texts, bert, f"span:all:{at}", spans=spans, context=4, truncate="right")


def test_the_span_text_is_what_truncation_leaves_of_it(bert: Any) -> None:
    texts = ["Nobody in Lisbon had seen the comet.", "The baker"]
    assert read(texts, bert, "span:text:all", context=4, truncate="left") == [
        ["comet", "."],
        ["The", "baker"],
    ]
    assert read(texts, bert, "span:text:first", context=4, truncate="right") == [["Nobody"], ["The"]]


def test_an_index_counts_the_tokens_that_truncation_leaves(bert: Any) -> None:
    texts = ["Nobody in Lisbon had seen the comet.", "The baker said no."]
    assert read(texts, bert, "index:-2", context=4, truncate="right") == [["in"], ["baker"]]
    assert read(texts, bert, "index:1", context=4, truncate="left") == [["comet"], ["no"]]
    with pytest.raises(DataError, match=r"beyond the prompt in p0 \(4 tokens\), p1 \(4 tokens\)"):
        table_of(texts, bert, "index:4", context=4, truncate="left")


def test_blanks_between_words_are_not_read_where_the_tokenizer_gives_them_no_characters(trimmed: Any) -> None:
    part = table_of(["The   baker"], trimmed, "span:both:all", spans=[{"both": [0, 11]}]).prompt(0)
    assert "".join(trimmed.decode([t]) for t in part.tokens[part.rows]).split() == ["The", "baker"]
    assert len(part.rows) < len(part.tokens) - 1


def test_a_context_without_room_beside_the_special_tokens_is_refused(with_bos: Any) -> None:
    with pytest.raises(PromptTooLong, match=r"'p0' has .* cannot be cut to 1: its 1 special"):
        table_of(["The baker."], with_bos, "last", context=1, truncate="left")
    with pytest.raises(UsageError, match="truncate='middle'"):
        table_of(["The baker."], with_bos, "last", truncate="middle")


@pytest.mark.parametrize("at", ["last", "all", "mean", "index:1", "span:text:first", "span:word:all"])
@pytest.mark.parametrize("truncate", [None, "left", "right"])
def test_the_table_does_not_depend_on_the_chunks_it_is_made_in(at: str, truncate: str | None, with_bos: Any) -> None:
    texts = [f"The baker said {'no ' * (i % 5)}word." for i in range(23)]
    spans = [{"word": [t.index("word"), t.index("word") + 4]} for t in texts]
    options = {"spans": spans, "truncate": truncate, "context": 1000 if truncate is None else 12}
    if truncate == "right" and at == "span:word:all":
        options["context"] = 40
    whole = table_of(texts, with_bos, at, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens_module, "CHUNK", 4)
        parts = table_of(texts, with_bos, at, **options)
    for field in ("tokens", "starts", "rows", "row_starts"):
        assert np.array_equal(getattr(whole, field), getattr(parts, field))
    assert whole.ids == parts.ids


class Characters(PreTrainedTokenizer):
    """A tokenizer in Python: it has no offsets."""

    def __init__(self, **options: Any) -> None:
        self.table = {c: i for i, c in enumerate(["<s>", *map(chr, range(32, 127))])}
        super().__init__(bos_token="<s>", **options)

    @property
    def vocab_size(self) -> int:
        return len(self.table)

    def get_vocab(self) -> dict[str, int]:
        return self.table

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        return list(text)

    def _convert_token_to_id(self, token: str) -> int:
        return self.table[token]

    def _convert_id_to_token(self, index: int) -> str:
        return list(self.table)[index]


def test_a_slow_tokenizer_is_refused_only_where_spans_are_wanted() -> None:
    slow = Characters()
    assert table_of(["abc", "de"], slow, "all").n_tokens.tolist() == [3, 2]
    assert table_of(["abc", "de"], slow, "index:-2").rows.tolist() == [1, 0]
    with pytest.raises(UnsupportedOperation, match=r"'span:text:last' needs a fast tokenizer: a Characters"):
        table_of(["abc"], slow, "span:text:last")


ROWS = [
    {"id": "a", "text": "The baker said no.", "label": 1, "group": "x", "pair": "p"},
    {"id": "b", "text": "Lisbon", "label": 0, "group": "x", "pair": "p"},
    {"id": "c", "text": "A comet is a lump of ice.", "label": 1, "group": "y", "pair": None},
]


@pytest.mark.parametrize("at", ["last", "all", "mean", "index:0", "span:text:all"])
def test_the_index_has_one_line_per_row_in_the_order_of_prompts(at: str, with_bos: Any) -> None:
    prompts = PromptSet.from_records(ROWS)
    table = tokenize(prompts, with_bos, at=Position.parse(at), context=100)
    expected = []
    for i in (2, 0, 1):
        part, row = table.prompt(i), ROWS[i]
        for position in [None] if table.pooled else part.rows.tolist():
            token = None if position is None else int(part.tokens[position])
            fixed = {k: row[k] for k in ("label", "group", "pair")}
            expected.append(
                {
                    "prompt": row["id"],
                    "position": position,
                    "token": token,
                    **fixed,
                    "n_tokens": len(part.tokens),
                }
            )
    frame = index_frame(prompts, table, np.array([2, 0, 1]))
    assert frame.drop("row").rows(named=True) == expected
    assert frame["row"].to_list() == list(range(len(expected)))
    assert frame.schema == {
        "row": pl.Int64, "prompt": pl.String, "position": pl.Int32, "token": pl.Int32, "label": pl.Int64,
        "group": pl.String, "pair": pl.String, "n_tokens": pl.Int32,
    }  # fmt: skip


def test_an_index_is_refused_for_other_prompts_or_an_order_that_repeats_them(with_bos: Any) -> None:
    prompts = PromptSet.from_records(ROWS)
    table = tokenize(prompts, with_bos, at=Position.parse("last"), context=100)
    assert index_frame(prompts, table)["prompt"].to_list() == ["a", "b", "c"]
    with pytest.raises(DataError, match="ids differ"):
        index_frame(prompts.head(2), table)
    for order in ([0, 0, 1], [0, 3], [-1, 0]):
        with pytest.raises(UsageError, match="each once"):
            index_frame(prompts, table, np.array(order))


@pytest.mark.parametrize("at", ["last", "all", "mean", "index:1", "index:-2"])
def test_tokens_from_elsewhere_are_marked_as_those_of_texts_are(at):
    position = Position.parse(at)
    prompts = PromptSet.from_records([{"id": i, "text": t} for i, t in (("a", "the cat"), ("b", "an owl is"))])
    want = tokenize(prompts, tiny_tokenizer(), at=position, context=None)
    got = token_table(want.ids, [want.prompt(i).tokens for i in range(2)], at=position)
    assert got.pooled == want.pooled
    assert got.ids == want.ids
    for name in ("tokens", "starts", "rows", "row_starts"):
        assert np.array_equal(getattr(got, name), getattr(want, name))


def test_of_nothing_but_tokens_a_store_knows_no_labels_and_each_prompt_is_its_own_group():
    table = token_table(["a", "b"], [np.arange(3, dtype=np.int32), np.arange(2, dtype=np.int32)], at=Position("all"))
    frame = index_frame(None, table)
    assert frame["group"].to_list() == ["a", "a", "a", "b", "b"]
    assert frame["label"].null_count() == frame["pair"].null_count() == 5


def test_tokens_alone_have_no_spans_and_no_prompt_is_without_tokens():
    tokens = [np.arange(3, dtype=np.int32), np.zeros(0, np.int32)]
    with pytest.raises(UsageError, match="texts"):
        token_table(["a", "b"], tokens, at=Position.parse("span:who:last"))
    with pytest.raises(DataError, match="no tokens of b"):
        token_table(["a", "b"], tokens, at=Position("last"))
