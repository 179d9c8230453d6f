import dataclasses

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reprobe.errors import ArtifactExists, DataError, UnknownData, UsageError
from reprobe.prompts import PromptSet, concat
from reprobe.prompts.columns import SPANS

ROWS = [
    {
        "id": "a",
        "text": "Iron sinks.",
        "label": 1,
        "group": "iron",
        "pair": "p",
        "spans": {"subject": [0, 4]},
    },
    {
        "id": "b",
        "text": "Iron floats.",
        "label": 0,
        "group": "iron",
        "pair": "p",
        "spans": {"subject": [0, 4]},
    },
    {
        "id": "c",
        "text": "Cork floats.",
        "label": 1,
        "group": "cork",
        "pair": None,
        "spans": {"verb": [5, 11]},
    },
]


def changed(i: int, **fields: object) -> list[dict[str, object]]:
    rows = [dict(row) for row in ROWS]
    rows[i] |= fields
    return rows


def test_a_prompt_set_has_the_canonical_columns_in_order_and_then_the_others() -> None:
    prompts = PromptSet.from_records([{"material": "iron", "text": "Iron sinks.", "id": "a"}])
    assert prompts.frame.columns == ["id", "text", "messages", "label", "group", "pair", "spans", "material"]
    assert prompts.frame.schema["spans"] == pl.List(pl.Struct({"name": pl.String, "start": pl.Int64, "end": pl.Int64}))
    assert prompts.texts == ["Iron sinks."]


def test_a_prompt_set_cannot_be_changed() -> None:
    prompts = PromptSet.from_records(ROWS)
    with pytest.raises(dataclasses.FrozenInstanceError):
        prompts.name = "other"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (changed(1, id=""), "empty id in rows 1"),
        (changed(1, id=None), "empty id in rows 1"),
        (changed(1, id="a"), "duplicate ids: a"),
        (changed(1, text=""), "empty text in b"),
        (changed(1, text=None), "no text (null) in b"),
        (changed(1, messages=[{"role": "user", "content": "Hi."}]), "both text and messages in b"),
        (changed(1, text=None, messages=[]), "empty list in b"),
        (changed(1, text=None, messages=[{"role": "user", "content": None}]), "without role or content in b"),
        (
            changed(1, text=None, messages=[{"role": "user", "content": "Hi.", "tool": "x"}]),
            "field 'tool' that is not supported: b",
        ),
        (changed(1, text=None, messages=[{"who": "user"}]), "{role, content}"),
        (changed(1, group=None), "no group in b"),
        (changed(1, group="cork"), "different groups: p"),
        (changed(1, spans={"subject": [0, 13]}), "outside its text in b (subject [0, 13) of 12 characters)"),
        (changed(1, spans={"subject": [-1, 4]}), "outside its text in b"),
        (changed(1, spans={"subject": [4, 4]}), "empty or inverted span in b"),
        (changed(1, spans={"subject": [4, 2]}), "empty or inverted span in b"),
        (changed(1, spans={"text": [0, 4]}), "a span named 'text'"),
        (changed(1, spans={"a:b": [0, 4]}), "':' in its name in b"),
        (changed(1, spans={"subject": [0]}), "span 'subject' of prompt 'b'"),
        (changed(1, spans={"subject": [0.0, 4.0]}), "two integers"),
        (changed(1, label="yes"), "column 'label' mixes kinds of values (int, str)"),
        (changed(1, label=[1]), "column 'label'"),
        (changed(1, label=float("nan")), "not a finite number in b"),
        (changed(1, text=3), "column 'text' mixes kinds"),
        ([], "has no prompts"),
    ],
)
def test_malformed_data_is_refused_by_name(rows: list[dict[str, object]], says: str) -> None:
    with pytest.raises(DataError) as caught:
        PromptSet(PromptSet.from_records(rows).frame) if rows else PromptSet(pl.DataFrame({"text": []}))
    assert says in str(caught.value)


def test_a_missing_span_in_a_list_of_spans_is_none() -> None:
    spans = pl.Series("spans", [[None, {"name": "word", "start": 0, "end": 2}]], SPANS)
    prompts = PromptSet(pl.DataFrame({"text": ["abc"], "spans": spans}))
    assert prompts.digest == PromptSet.from_records([{"text": "abc", "spans": {"word": [0, 2]}}]).digest


def test_two_spans_of_one_name_are_refused() -> None:
    spans = [{"name": "x", "start": 0, "end": 1}, {"name": "x", "start": 1, "end": 2}]
    with pytest.raises(DataError, match="two spans of one name"):
        PromptSet.from_records([{"id": "a", "text": "Iron", "spans": spans}])


def test_a_table_without_a_text_column_says_which_columns_it_has() -> None:
    with pytest.raises(UnknownData, match=r"columns: sentence.*text='statement'"):
        PromptSet.from_records([{"sentence": "Iron sinks."}])


def test_a_long_list_of_culprits_is_cut() -> None:
    with pytest.raises(DataError, match=r"p0, p1, p2, p3, p4 and 7 more"):
        PromptSet.from_records([{"id": f"p{i}", "text": ""} for i in range(12)])


def test_rows_without_ids_are_numbered() -> None:
    assert PromptSet.from_records([{"text": "a"}, {"text": "b"}]).ids == ["0", "1"]


def test_without_groups_each_prompt_is_its_own_and_the_set_says_so() -> None:
    prompts = PromptSet.from_records([{"id": "a", "text": "x"}, {"id": "b", "text": "y"}])
    assert prompts.frame["group"].to_list() == ["a", "b"]
    assert not prompts.has_groups
    assert PromptSet.from_records(ROWS).has_groups


def test_without_groups_a_pair_is_a_group() -> None:
    rows = [{"id": i, "text": i, "pair": p} for i, p in [("a", "1"), ("b", "1"), ("c", None)]]
    prompts = PromptSet.from_records(rows)
    assert prompts.frame["group"].to_list() == ["1", "1", "c"]
    assert prompts.has_groups


def test_labels_are_integers_floats_or_strings_and_booleans_are_0_and_1() -> None:
    for given_labels, kind in [([True, False], pl.Int64), ([1, 0.5], pl.Float64), (["x", None], pl.String)]:
        prompts = PromptSet.from_records([{"text": "t", "label": label} for label in given_labels])
        assert prompts.labels.dtype == kind
        assert prompts.labels.to_list() == [*given_labels]


def test_messages_are_prompts_and_have_no_text_of_their_own() -> None:
    prompts = PromptSet.from_records([{"id": "m", "messages": [{"role": "user", "content": "Is it cold?"}]}])
    assert prompts.frame["messages"][0].to_list() == [{"role": "user", "content": "Is it cold?"}]
    with pytest.raises(DataError, match=r"messages, not text, in m"):
        _ = prompts.texts


def test_spans_of_messages_are_measured_in_the_last_message() -> None:
    messages = [{"role": "system", "content": "A long instruction."}, {"role": "user", "content": "Cold?"}]
    PromptSet.from_records([{"messages": messages, "spans": {"word": [0, 5]}}])
    with pytest.raises(DataError, match="of 5 characters"):
        PromptSet.from_records([{"messages": messages, "spans": {"word": [0, 6]}}])


def test_spans_count_characters_not_bytes() -> None:
    assert PromptSet.from_records([{"text": "é🙂漢", "spans": {"last": [2, 3]}}]).span_names == ["last"]
    with pytest.raises(DataError):
        PromptSet.from_records([{"text": "é🙂漢", "spans": {"last": [2, 4]}}])


def test_where_and_filter_choose_prompts_and_name_what_does_not_exist() -> None:
    prompts = PromptSet.from_records(ROWS)
    assert prompts.where(label=1).ids == ["a", "c"]
    assert prompts.where(group=["iron", "tin"], label=0).ids == ["b"]
    assert prompts.filter(pl.col("label") == 0).ids == ["b"]
    assert prompts.head(2).ids == ["a", "b"]
    some = PromptSet.from_records([{"id": i, "text": i, "label": y} for i, y in (("a", 1), ("b", None), ("c", 0))])
    assert some.where(label=None).ids == ["b"]
    assert some.where(label=[None, 0]).ids == ["b", "c"]
    assert some.where(label=[1, 0]).ids == ["a", "c"]
    with pytest.raises(UnknownData, match=r"no column 'lable'. Did you mean 'label'\?"):
        prompts.where(lable=1)
    with pytest.raises(UnknownData, match=r"no column 'lable'. Did you mean 'label'\?"):
        prompts.filter(pl.col("lable") == 1)
    with pytest.raises(DataError, match="no prompt passes"):
        prompts.where(label=7)
    with pytest.raises(UsageError, match="cannot be asked that"):
        prompts.where(label="one")
    with pytest.raises(UsageError, match="Boolean"):
        prompts.filter(pl.col("text"))
    with pytest.raises(UsageError):
        prompts.head(0)


groups_of = st.lists(st.integers(0, 12), min_size=2, max_size=40).filter(lambda g: len(set(g)) > 1)


@settings(deadline=None, max_examples=25)
@given(groups=groups_of, test=st.floats(0.05, 0.95), seed=st.integers(0, 5))
def test_a_split_never_cuts_a_group_and_loses_no_prompt(groups: list[int], test: float, seed: int) -> None:
    prompts = PromptSet.from_records({"text": "t", "group": f"g{g}"} for g in groups)
    split = prompts.split(test=test, seed=seed)
    assert not set(split.train.frame["group"]) & set(split.test.frame["group"])
    assert sorted(split.train.ids + split.test.ids) == sorted(prompts.ids)
    assert len(split.train)
    assert len(split.test)
    largest = max(groups.count(g) for g in set(groups))
    assert abs(len(split.test) - test * len(prompts)) <= largest


def test_a_split_depends_on_the_seed_and_not_on_the_order_of_rows() -> None:
    rows = [{"id": str(i), "text": "t", "group": f"g{i // 2}"} for i in range(40)]
    first, again = (
        PromptSet.from_records(rows).split(seed=1),
        PromptSet.from_records(rows[::-1]).split(seed=1),
    )
    assert set(first.test.ids) == set(again.test.ids)
    assert set(first.test.ids) != set(PromptSet.from_records(rows).split(seed=2).test.ids)
    assert len(first.test) == 8
    assert (first.train.name, first.test.name) == ("prompts/train", "prompts/test")


def test_a_split_by_another_column_may_not_cut_groups() -> None:
    rows = [{"text": "t", "group": f"g{i // 2}", "topic": f"t{i // 4}", "odd": i % 2} for i in range(8)]
    prompts = PromptSet.from_records(rows)
    train, test = (set(part.frame["topic"]) for part in prompts.split("topic", test=0.5))
    assert train.isdisjoint(test)
    assert len(train | test) == 2
    with pytest.raises(DataError, match=r"would cut groups, e.g. g0, g1"):
        prompts.split("odd")
    with pytest.raises(UnknownData, match="no column 'topics'"):
        prompts.split("topics")
    with pytest.raises(UsageError, match="share of prompts"):
        prompts.split(test=1.0)
    with pytest.raises(DataError, match="nothing to hold out"):
        PromptSet.from_records([{"text": "t", "group": "g"}] * 2).split()


def test_the_digest_is_of_the_content_not_of_the_name_or_the_order_of_columns() -> None:
    prompts = PromptSet.from_records(ROWS, name="one")
    reordered = PromptSet.from_records([dict(reversed(row.items())) for row in ROWS], name="two")
    assert prompts.digest == reordered.digest
    assert prompts.digest == PromptSet.from_records([row | {"remark": None} for row in ROWS]).digest
    others = [
        ROWS[::-1],
        changed(0, text="Iron sank."),
        changed(0, label=0),
        changed(0, spans={"subject": [0, 3]}),
    ]
    assert len({prompts.digest, *(PromptSet.from_records(rows).digest for rows in others)}) == 5


def test_spans_have_no_order() -> None:
    one = PromptSet.from_records([{"text": "Iron sinks.", "spans": {"a": [0, 4], "b": [5, 10]}}])
    two = PromptSet.from_records([{"text": "Iron sinks.", "spans": {"b": [5, 10], "a": [0, 4]}}])
    assert one.digest == two.digest


def test_describe_counts_what_there_is() -> None:
    told = PromptSet.from_records(ROWS).describe()
    assert (told.prompts, told.groups, told.pairs, told.chats) == (3, 2, 1, 0)
    assert told.labels == {0: 1, 1: 2}
    assert told.spans == {"subject": 2, "verb": 1}


def test_writing_over_a_file_must_be_asked_for(tmp_path) -> None:
    prompts = PromptSet.from_records(ROWS)
    prompts.to_jsonl(tmp_path / "a.jsonl")
    with pytest.raises(ArtifactExists):
        prompts.to_jsonl(tmp_path / "a.jsonl")
    prompts.to_jsonl(tmp_path / "new" / "folder" / "a.jsonl")
    prompts.head(1).to_jsonl(tmp_path / "a.jsonl", overwrite=True)
    assert len(PromptSet.load(tmp_path / "a.jsonl")) == 1


def test_sets_are_joined_if_their_ids_differ() -> None:
    one = PromptSet.from_records(ROWS)
    two = PromptSet.from_records([{"id": "d", "text": "Tin melts.", "label": 1, "group": "tin", "metal": "tin"}])
    both = concat([one, two], name="materials")
    assert both.ids == ["a", "b", "c", "d"]
    assert both.frame["metal"].to_list() == [None, None, None, "tin"]
    with pytest.raises(DataError, match="duplicate ids"):
        concat([one, one], name="twice")
    with pytest.raises(DataError, match="different types"):
        concat([one, PromptSet.from_records([{"id": "e", "text": "x", "label": "yes"}])], name="mixed")
