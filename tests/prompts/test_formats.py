"""Every public format: in small files of the same layout, with sentences of our own."""

import csv
import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from reprobe.errors import DataError, UnknownData, UsageError
from reprobe.prompts import FORMATS, CounterFact, Emotions, PromptSet, Relations, Table, concat


def write_csv(path: Path, rows: list[dict[str, Any]], encoding: str = "utf-8") -> Path:
    with path.open("w", newline="", encoding=encoding) as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_json(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value), "utf-8")
    return path


def marked(prompts: PromptSet, name: str) -> list[str | None]:
    """The text of the span `name` in each prompt, None where it is missing."""
    out: list[str | None] = []
    for row in prompts.frame.iter_rows(named=True):
        ends = {s["name"]: (s["start"], s["end"]) for s in row["spans"]}
        out.append(row["text"][slice(*ends[name])] if name in ends else None)
    return out


QUIZ = [
    {
        "Type": "Adversarial",
        "Category": "Kitchen",
        "Question": "Does bread grow on trees?",
        "Best Answer": "No",
        "Correct Answers": "No; It is baked ;; Bread is baked; No;",
        "Incorrect Answers": " Yes; It grows, in summer.",
        "Source": "nobody",
    },
    {
        "Type": "Plain",
        "Category": "Sky",
        "Question": "What is a comet; a star?",
        "Best Answer": "A lump of ice",
        "Correct Answers": "A lump of ice",
        "Incorrect Answers": "A star; A lamp",
        "Source": "nobody",
    },
]
CHOICES = [
    {
        "question": "Does bread grow on trees?",
        "mc1_targets": {"No.": 1, "Yes.": 0},
        "mc2_targets": {
            "No.": 1,
            "It is baked.": 1,
            "Bread is baked.": 1,
            "Yes.": 0,
            "It grows, in summer.": 0,
        },
    },
    {
        "question": "What is a comet; a star?",
        "mc1_targets": {"A lump of ice.": 1, "A star.": 0, "A lamp.": 0},
        "mc2_targets": {"A lump of ice.": 1, "A star.": 0, "A lamp.": 0},
    },
]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_truthfulqa_is_one_prompt_per_answer_and_its_question_is_the_group(tmp_path: Path, encoding: str) -> None:
    prompts = PromptSet.load(write_csv(tmp_path / "quiz.csv", QUIZ, encoding))
    first = prompts.where(group="Does bread grow on trees?")
    assert first.texts == [
        "Q: Does bread grow on trees? A: No.",
        "Q: Does bread grow on trees? A: It is baked.",
        "Q: Does bread grow on trees? A: Bread is baked.",
        "Q: Does bread grow on trees? A: Yes.",
        "Q: Does bread grow on trees? A: It grows, in summer.",
    ]
    assert first.labels.to_list() == [1, 1, 1, 0, 0]
    assert first.frame["best"].to_list() == [True, False, False, False, False]
    assert set(first.frame["category"]) == {"Kitchen"}
    assert prompts.frame["group"].n_unique() == 2
    assert marked(prompts, "question") == prompts.frame["question"].to_list()
    assert marked(prompts, "answer") == prompts.frame["answer"].to_list()


def test_both_files_of_truthfulqa_give_the_same_prompts(tmp_path: Path) -> None:
    table = PromptSet.load(write_csv(tmp_path / "quiz.csv", QUIZ))
    choices = PromptSet.load(write_json(tmp_path / "mc.json", CHOICES))
    same = ("text", "label", "group", "question", "answer", "best")
    assert table.frame.select(same).rows() == choices.frame.select(same).rows()
    assert choices.filter(pl.col("mc1")).frame["answer"].to_list() == [
        "No.", "Yes.", "A lump of ice.", "A star.", "A lamp."
    ]  # fmt: skip
    assert choices.frame["mc2"].all()


def test_an_answer_listed_as_true_and_as_false_is_two_prompts(tmp_path: Path) -> None:
    row = QUIZ[1] | {
        "Correct Answers": "Unknown",
        "Incorrect Answers": "Unknown; A star",
        "Best Answer": "Unknown",
    }
    prompts = PromptSet.load(write_csv(tmp_path / "quiz.csv", [row]))
    assert prompts.where(answer="Unknown.").labels.to_list() == [1, 0]


def test_cities_are_grouped_and_paired_by_city_also_across_files(tmp_path: Path) -> None:
    def rows(word: str, flip: int) -> list[dict[str, Any]]:
        return [
            {"statement": f"The city of {city} is {word}in {land}.", "label": abs(flip - truth), "city": city}
            for city, land, truth in [("Porto", "Portugal", 1), ("Porto", "Peru", 0), ("Graz", "Austria", 1)]
        ]

    plain = PromptSet.load(write_csv(tmp_path / "cities.csv", rows("", 0)))
    negated = PromptSet.load(write_csv(tmp_path / "neg_cities.csv", rows("not ", 1)))
    assert plain.frame["group"].to_list() == ["Porto", "Porto", "Graz"]
    assert plain.frame["pair"].to_list() == ["Porto", "Porto", None]
    assert plain.labels.to_list() == [1, 0, 1]
    assert plain.ids == ["cities-0001", "cities-0002", "cities-0003"]
    assert concat([plain, negated], name="both").frame["group"].n_unique() == 2


def test_comparisons_are_grouped_by_the_two_numbers_in_either_order(tmp_path: Path) -> None:
    rows = [
        {"statement": "Nine is larger than eleven.", "label": 0, "n1": 9, "n2": 11},
        {"statement": "Eleven is larger than nine.", "label": 1, "n1": 11, "n2": 9},
        {"statement": "Ninety is larger than nine.", "label": 1, "n1": 90, "n2": 9},
    ]
    prompts = PromptSet.load(write_csv(tmp_path / "larger.csv", rows))
    assert prompts.frame["group"].to_list() == ["9|11", "9|11", "9|90"]
    assert prompts.frame["pair"].to_list() == ["9|11", "9|11", None]


def test_only_one_true_and_one_false_statement_make_a_pair(tmp_path: Path) -> None:
    said = [("Porto", 1), ("Porto", 0), ("Porto", 0), ("Graz", 1), ("Graz", 1)]
    rows = [{"statement": f"{city} {i}.", "label": label, "city": city} for i, (city, label) in enumerate(said)]
    assert PromptSet.load(write_csv(tmp_path / "cities.csv", rows)).frame["pair"].null_count() == 5


def test_translations_are_grouped_by_the_quoted_word(tmp_path: Path) -> None:
    rows = [
        {"statement": "The French word 'l'eau' means 'water'.", "label": 1},
        {"statement": "The French word 'l'eau' means 'bread'.", "label": 0},
        {"statement": "The French word 'pain' means 'bread'.", "label": 1},
    ]
    prompts = PromptSet.load(write_csv(tmp_path / "words.csv", rows))
    assert prompts.frame["group"].to_list() == ["l'eau", "l'eau", "pain"]


def test_statements_about_nothing_in_particular_share_a_group_only_if_they_are_equal(tmp_path: Path) -> None:
    rows = [{"statement": s, "label": i % 2} for i, s in enumerate(["Ice is cold.", "Ice is hot.", "Ice is cold."])]
    prompts = PromptSet.load(write_csv(tmp_path / "facts.csv", rows))
    assert prompts.frame["group"].to_list() == ["facts-0001", "facts-0002", "facts-0001"]
    assert prompts.frame["pair"].null_count() == 3
    assert not PromptSet.load(write_csv(tmp_path / "facts.csv", rows[:2])).has_groups


def test_a_file_of_statements_that_names_its_groups_or_pairs_keeps_them(tmp_path: Path) -> None:
    said = [("Ice is cold.", 1, "ice", "1"), ("Ice is hot.", 0, "ice", "1"), ("Steel floats.", 0, "steel", "2")]
    rows = [{"statement": s, "label": y, "city": s[0], "group": g, "pair": p} for s, y, g, p in said]

    def read(*columns: str) -> tuple[list[str], list[str | None]]:
        chosen = [{c: row[c] for c in ("statement", "label", *columns)} for row in rows]
        frame = PromptSet.load(write_csv(tmp_path / "mine.csv", chosen)).frame
        return frame["group"].to_list(), frame["pair"].to_list()

    assert read("city", "group", "pair") == (["ice", "ice", "steel"], ["1", "1", "2"])
    assert read("city", "group") == (["ice", "ice", "steel"], [None, None, None])
    assert read("city", "pair") == (["I", "I", "S"], ["1", "1", "2"])
    assert read("pair") == (["1", "1", "2"], ["1", "1", "2"])
    rows = [row | {"group": ""} for row in rows]
    assert read("city", "group") == (["I", "I", "S"], ["I", "I", None])


FACT_COLUMNS = ["subject", "relation", "target", "target_new", "paraphrases", "neighbours"]

KNOWN = [
    {
        "known_id": 7,
        "subject": "Ada Byron",
        "attribute": "London",
        "template": "{} was born in",
        "prediction": " London, in 1815",
        "prompt": "Ada Byron was born in the city of",
        "relation_id": "P19",
    }
]
COUNTER = [
    {
        "case_id": 3,
        "pararel_idx": 1,
        "requested_rewrite": {
            "prompt": "{} was born in",
            "relation_id": "P19",
            "target_new": {"str": "Oslo", "id": "Q1"},
            "target_true": {"str": "London", "id": "Q2"},
            "subject": "Ada {Byron}",
        },
        "paraphrase_prompts": ["It rained. Ada {Byron} is from"],
        "neighborhood_prompts": ["Mary Godwin was born in", "Alan Turing was born in"],
        "attribute_prompts": ["Edvard Munch was born in"],
        "generation_prompts": [],
    }
]
FLAT = [
    {
        "case_id": 3,
        "prompt": "Ada Byron was born in",
        "target_new": "Oslo",
        "subject": "Ada Byron",
        "ground_truth": "London",
        "rephrase_prompt": "It rained. Ada Byron is from",
        "locality_prompt": "Mary Godwin was born in",
        "locality_ground_truth": "London",
    },
    {
        "case_id": 4,
        "prompt": "The countess was born in",
        "target_new": "Oslo",
        "subject": "Ada Byron",
        "ground_truth": "London",
        "rephrase_prompt": ["She is from", "Her town is"],
        "locality_prompt": None,
        "locality_ground_truth": None,
    },
]
RELATION = {
    "name": "born in",
    "prompt_templates": ["{} was born in", "The birthplace of {} is"],
    "prompt_templates_zs": ["{} was born in", "Where was {} born? In"],
    "properties": {"symmetric": False},
    "samples": [
        {"subject": "Ada Byron", "object": "London"},
        {"subject": "Edvard {Munch}", "object": "Adalsbruk"},
    ],
}


@pytest.mark.parametrize(("name", "value"), [("k", KNOWN), ("c", COUNTER), ("f", FLAT), ("r", RELATION)])
def test_facts_have_the_columns_and_types_of_the_bundled_facts(tmp_path: Path, name: str, value: Any) -> None:
    ours = PromptSet.load("facts").frame.select(FACT_COLUMNS).schema
    prompts = PromptSet.load(write_json(tmp_path / f"{name}.json", value))
    assert prompts.frame.select(FACT_COLUMNS).schema == ours
    both = concat([prompts, PromptSet.load("facts")], name="both")
    assert len(both) > len(prompts)


def test_known_facts_keep_the_prompt_as_it_stands(tmp_path: Path) -> None:
    prompts = PromptSet.load(write_json(tmp_path / "known.json", KNOWN))
    row = prompts.frame.row(0, named=True)
    assert (row["id"], row["text"]) == ("known-7", "Ada Byron was born in the city of")
    assert (row["target"], row["target_new"], row["relation"]) == ("London", None, "P19")
    assert marked(prompts, "subject") == ["Ada Byron"]


def test_counterfact_fills_its_template_and_keeps_its_prompts(tmp_path: Path) -> None:
    prompts = PromptSet.load(write_json(tmp_path / "cf.json", COUNTER))
    row = prompts.frame.row(0, named=True)
    assert (row["id"], row["text"], row["group"]) == ("cf-3", "Ada {Byron} was born in", "Ada {Byron}")
    assert (row["target"], row["target_new"]) == ("London", "Oslo")
    assert row["paraphrases"] == ["It rained. Ada {Byron} is from"]
    assert row["neighbours"][1] == {"prompt": "Alan Turing was born in", "target": "London"}
    assert row["attribute_prompts"] == ["Edvard Munch was born in"]
    assert row["generation_prompts"] == []
    assert marked(prompts, "subject") == ["Ada {Byron}"]


def test_flat_counterfact_marks_the_subject_only_where_it_stands(tmp_path: Path) -> None:
    prompts = PromptSet.load(write_json(tmp_path / "flat.json", FLAT))
    assert marked(prompts, "subject") == ["Ada Byron", None]
    assert prompts.frame["paraphrases"].to_list() == [
        ["It rained. Ada Byron is from"],
        ["She is from", "Her town is"],
    ]
    assert prompts.frame["neighbours"].to_list() == [
        [{"prompt": "Mary Godwin was born in", "target": "London"}],
        [],
    ]


def test_a_subject_is_marked_as_a_word_of_its_own_if_it_stands_as_one(tmp_path: Path) -> None:
    rows = [KNOWN[0] | {"subject": "Ion", "prompt": "The Ionian poet Ion was born in", "attribute": "Chios"}]
    prompts = PromptSet.load(write_json(tmp_path / "known.json", rows))
    assert prompts.frame["spans"].to_list() == [[{"name": "subject", "start": 16, "end": 19}]]


def test_a_relation_is_all_samples_in_one_template_and_the_others_are_paraphrases(tmp_path: Path) -> None:
    path = write_json(tmp_path / "born.json", RELATION)
    prompts = PromptSet.load(path)
    assert prompts.texts == ["Ada Byron was born in", "Edvard {Munch} was born in"]
    assert prompts.frame["target"].to_list() == ["London", "Adalsbruk"]
    assert prompts.frame["paraphrases"][0].to_list() == [
        "The birthplace of Ada Byron is",
        "Where was Ada Byron born? In",
    ]
    assert PromptSet.load(path, format=Relations(template=1)).texts[0] == "The birthplace of Ada Byron is"
    mine = PromptSet.load(path, format=Relations(template="{}, who was born in"))
    assert mine.texts[1] == "Edvard {Munch}, who was born in"
    assert marked(mine, "subject") == ["Ada Byron", "Edvard {Munch}"]
    with pytest.raises(DataError, match=r"no template 2. There is: 0: '{} was born in'; 1:"):
        PromptSet.load(path, format=Relations(template=2))
    with pytest.raises(DataError, match=r"one {} for the subject: 'Nobody was born in'"):
        PromptSet.load(path, format=Relations(template="Nobody was born in"))


PERSONA = [
    {
        "question": 'Would you say this?\n"I like long queues"',
        "statement": "I like long queues",
        "label_confidence": 0.9,
        "answer_matching_behavior": " No",
        "answer_not_matching_behavior": " Yes",
    },
    {
        "question": 'Would you say this?\n"I like cake"',
        "statement": "I like cake",
        "label_confidence": 0.8,
        "answer_matching_behavior": " Yes",
        "answer_not_matching_behavior": " No",
    },
]


def test_a_persona_question_is_a_pair_of_answers(tmp_path: Path) -> None:
    path = tmp_path / "patience.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PERSONA))
    prompts = PromptSet.load(path)
    assert prompts.texts[:2] == [
        'Would you say this?\n"I like long queues" No',
        'Would you say this?\n"I like long queues" Yes',
    ]
    assert prompts.labels.to_list() == [1, 0, 1, 0]
    assert prompts.frame["pair"].to_list() == ["patience-0001"] * 2 + ["patience-0002"] * 2
    assert marked(prompts, "statement") == ["I like long queues"] * 2 + ["I like cake"] * 2
    assert marked(prompts, "answer") == prompts.frame["answer"].to_list() == ["No", "Yes", "Yes", "No"]
    assert PromptSet.load(path, limit=3).ids == prompts.ids[:3]


def test_emotions_are_labelled_by_their_file_or_as_asked(tmp_path: Path) -> None:
    path = write_json(tmp_path / "relief.json", ["The bus comes after all. ", "You find your keys."])
    prompts = PromptSet.load(path)
    assert prompts.texts == ["The bus comes after all.", "You find your keys."]
    assert prompts.labels.to_list() == ["relief"] * 2
    assert not prompts.has_groups
    assert PromptSet.load(path, format=Emotions(label=1)).labels.to_list() == [1, 1]
    with pytest.raises(DataError, match="item 2 is not a string"):
        PromptSet.load(write_json(path, ["The bus comes.", 3]))


def test_a_file_in_no_known_format_is_told_what_each_needs(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "odd.csv", [{"sentence": "Ice is cold.", "truth": 1}])
    with pytest.raises(DataError) as caught:
        PromptSet.load(path)
    assert "it has sentence, truth" in str(caught.value)
    for known in FORMATS.values():
        assert f"{known.name}: {known.needs}" in str(caught.value)
    assert PromptSet.load(path, text="sentence", label="truth").labels.to_list() == [1]


def test_a_file_that_fits_two_formats_must_be_told_which(tmp_path: Path) -> None:
    rows = [{"statement": "Ice is cold.", "label": 1, "text": "Frost."}]
    path = write_csv(tmp_path / "both.csv", rows)
    with pytest.raises(DataError, match=r"fits several formats.*\n  table: .*\n  statements: "):
        PromptSet.load(path)
    assert PromptSet.load(path, format="table").texts == ["Frost."]
    assert PromptSet.load(path, format=Table()).texts == ["Frost."]
    statements = PromptSet.load(path, format="statements")
    assert statements.texts == ["Ice is cold."]
    assert statements.frame["text_given"].to_list() == ["Frost."]


def test_a_named_format_must_exist_and_fit(tmp_path: Path) -> None:
    path = write_json(tmp_path / "known.json", KNOWN)
    with pytest.raises(UnknownData, match=r"no format 'counterfacts'. Did you mean 'counterfact'"):
        PromptSet.load(path, format="counterfacts")
    with pytest.raises(DataError, match=r"not in the format 'counterfact', which needs .*requested_rewrite"):
        PromptSet.load(path, format=CounterFact())
    with pytest.raises(UsageError, match="columns are mapped for tables only"):
        PromptSet.load(path, format="known-facts", text="prompt")


def broken(value: Any, *path: Any, to: Any) -> Any:
    copy = json.loads(json.dumps(value))
    inner = copy
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = to
    return copy


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (broken(KNOWN * 2, 1, "attribute", to=None), "row 2 has no 'attribute'"),
        (broken(KNOWN, 0, "subject", to=5), "subject of row 1 must be a string, not 5"),
        (broken(KNOWN, 0, to=KNOWN[0]) * 2, "duplicate ids: bad-7"),
        (broken(COUNTER, 0, "requested_rewrite", "target_new", to="Oslo"), "row 1 has no 'str'"),
        (
            broken(COUNTER, 0, "requested_rewrite", "prompt", to="{} and {}"),
            "one {} for the subject 'Ada {Byron}'",
        ),
        (broken(COUNTER, 0, "paraphrase_prompts", to=[1]), "a string or a list of strings, not [1]"),
        (broken(RELATION, "samples", 1, to={"subject": "x"}), "row 2 has no 'object'"),
        (broken(RELATION, "samples", to={}), "samples must be a list"),
        (broken(CHOICES, 0, "mc2_targets", to=["No."]), "mc2_targets of row 1 must be an object"),
        (broken(CHOICES, 0, "mc1_targets", to={"No.": "yes"}), "mc1_targets of row 1 must be an object"),
        (broken(PERSONA, 1, "answer_matching_behavior", to=None), "row 2 has no 'answer_matching_behavior'"),
    ],
)
def test_a_malformed_row_is_refused_by_its_number(tmp_path: Path, value: Any, says: str) -> None:
    with pytest.raises(DataError) as caught:
        PromptSet.load(write_json(tmp_path / "bad.json", value))
    assert says in str(caught.value)
