"""The misconceptions and facts data sets hold what data/README.md says they hold."""

import re
import runpy
import shutil
from collections import Counter
from pathlib import Path

import pytest
from data.rows import DATA, Row, by, load
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, cross_val_score
from sklearn.pipeline import make_pipeline

MISCONCEPTIONS = load("misconceptions")
FACTS = load("facts")
BUILD = runpy.run_path(str(DATA / "build_facts.py"))


@pytest.mark.parametrize("rows", [MISCONCEPTIONS, FACTS], ids=["misconceptions", "facts"])
def test_every_row_has_the_same_keys_a_unique_id_and_a_unique_text(rows: list[Row]) -> None:
    assert {tuple(row) for row in rows} == {tuple(rows[0])}
    assert list(rows[0])[:5] == ["id", "text", "label", "group", "spans"]
    for key in ("id", "text"):
        assert [value for value, times in Counter(row[key] for row in rows).items() if times > 1] == []


@pytest.mark.parametrize("rows", [MISCONCEPTIONS, FACTS], ids=["misconceptions", "facts"])
def test_every_text_has_single_spaces_and_no_space_at_either_end(rows: list[Row]) -> None:
    for row in rows:
        neighbours = [neighbour["prompt"] for neighbour in row.get("neighbours", [])]
        for text in (row["text"], *row.get("paraphrases", []), *neighbours):
            assert text == " ".join(text.split())


@pytest.mark.parametrize("rows", [MISCONCEPTIONS, FACTS], ids=["misconceptions", "facts"])
def test_every_span_cuts_out_the_column_of_its_name(rows: list[Row]) -> None:
    for row in rows:
        for name, (start, end) in row["spans"].items():
            assert row["text"][start:end] == row[name]


# misconceptions


def test_misconceptions_has_164_questions_with_three_to_five_answers_of_each_label() -> None:
    questions = by(MISCONCEPTIONS, "group")
    assert len(questions) == 164
    assert len(MISCONCEPTIONS) == 990
    for rows in questions.values():
        labels = Counter(row["label"] for row in rows)
        assert set(labels) == {0, 1}
        assert all(3 <= count <= 5 for count in labels.values())


def test_a_misconceptions_group_is_one_question() -> None:
    questions = by(MISCONCEPTIONS, "group")
    assert all(len({row["question"] for row in rows}) == 1 for rows in questions.values())
    assert len({row["question"] for row in MISCONCEPTIONS}) == len(questions)


def test_each_question_has_one_best_answer_and_it_is_true() -> None:
    for rows in by(MISCONCEPTIONS, "group").values():
        assert [row["label"] for row in rows if row["best"]] == [1]


def test_a_misconceptions_text_is_the_question_and_one_full_sentence() -> None:
    for row in MISCONCEPTIONS:
        assert row["text"] == f"Q: {row['question']} A: {row['answer']}"
        assert re.fullmatch(r"[A-Z].*\.", row["answer"])


def test_an_answer_belongs_to_one_label_only() -> None:
    labels = {answer: {row["label"] for row in rows} for answer, rows in by(MISCONCEPTIONS, "answer").items()}
    assert [answer for answer, found in labels.items() if len(found) > 1] == []


def test_the_length_of_an_answer_says_nothing_about_its_label() -> None:
    lengths = {label: [len(row["answer"]) for row in MISCONCEPTIONS if row["label"] == label] for label in (0, 1)}
    means = {label: sum(values) / len(values) for label, values in lengths.items()}
    assert abs(means[1] - means[0]) < 1.0  # characters, of about 56


def test_the_words_of_an_answer_say_little_about_its_label_in_questions_not_seen() -> None:
    reader = make_pipeline(CountVectorizer(token_pattern=r"(?u)\b\w+\b"), LogisticRegression(C=0.1, max_iter=1000))
    scores = cross_val_score(
        reader,
        [row["answer"] for row in MISCONCEPTIONS],
        [row["label"] for row in MISCONCEPTIONS],
        groups=[row["group"] for row in MISCONCEPTIONS],
        cv=GroupKFold(5, shuffle=True, random_state=0),
    )
    assert scores.mean() < 0.6


# facts


def test_facts_has_546_facts_in_twenty_relations_of_nineteen_or_more() -> None:
    relations = by(FACTS, "relation")
    assert len(FACTS) == 546
    assert len(relations) == 20
    assert all(len(rows) >= 19 for rows in relations.values())


def test_a_fact_is_not_stated_twice_and_its_group_is_its_subject() -> None:
    assert max(Counter((row["relation"], row["subject"]) for row in FACTS).values()) == 1
    subjects = {group: {row["subject"] for row in rows} for group, rows in by(FACTS, "group").items()}
    assert all(len(found) == 1 for found in subjects.values())


def test_every_prompt_names_the_subject_and_stops_before_the_object() -> None:
    for row in FACTS:
        assert row["label"] is None
        assert len(set(row["paraphrases"]) - {row["text"]}) == 2
        for prompt in (row["text"], *row["paraphrases"]):
            assert prompt.count(row["subject"]) == 1
            assert prompt[-1].isalpha()
            assert not re.search(rf"\b{re.escape(row['target'])}\b", prompt, re.IGNORECASE)
            assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", f"{prompt} {row['target']}", re.IGNORECASE)


def test_the_counterfactual_is_another_object_of_the_relation_and_false() -> None:
    for relation, rows in by(FACTS, "relation").items():
        table = {fact.subject: fact for fact in BUILD["read_table"](relation, table_path(relation))}
        objects = {row["target"] for row in rows}
        for row in rows:
            assert row["target_new"] in objects
            assert not table[row["subject"]].accepts(row["target_new"])


def test_the_neighbours_are_true_facts_about_other_subjects_of_the_relation() -> None:
    for rows in by(FACTS, "relation").values():
        known = {row["text"]: row for row in rows}
        for row in rows:
            prompts = [neighbour["prompt"] for neighbour in row["neighbours"]]
            assert 3 <= len(set(prompts)) == len(prompts) <= 5
            for neighbour in row["neighbours"]:
                assert known[neighbour["prompt"]]["subject"] != row["subject"]
                assert known[neighbour["prompt"]]["target"] == neighbour["target"]
                assert neighbour["target"] != row["target_new"]


def test_neighbours_with_the_same_object_are_chosen_before_others() -> None:
    for rows in by(FACTS, "relation").values():
        shared = Counter(row["target"] for row in rows)
        for row in rows:
            same = [neighbour["target"] == row["target"] for neighbour in row["neighbours"]]
            assert same == sorted(same, reverse=True)
            # One fewer where a neighbour would have the counterfactual as a second right object.
            assert sum(same) >= min(len(same), shared[row["target"]] - 1) - 1


def table_path(relation: str) -> Path:
    return DATA / "tables" / f"facts_{relation}.tsv"


def test_facts_are_rebuilt_from_the_tables_byte_for_byte() -> None:
    assert BUILD["serialise"](BUILD["build"]()) == (DATA / "facts.jsonl").read_bytes()


def test_a_new_row_changes_no_choice_for_facts_whose_neighbours_and_objects_stay(tmp_path: Path) -> None:
    tables = copy_tables(tmp_path, "country_capital", "Chad\t-\tN'Djamena\t-\n")
    before = {(row["relation"], row["subject"]): row for row in FACTS}
    for row in BUILD["build"](tables):
        if row["relation"] != "country_capital":
            old = before[row["relation"], row["subject"]]
            assert {**row, "id": None} == {**old, "id": None}


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("Kuwait\t-\tKuwait\t-\n", "names its own object"),
        ("France\t-\tParis\t-\n", "the same subject twice"),
        ("Chad\t-\tN'Djamena\n", "wrong number of cells"),
        ("Chad\t\tN'Djamena\t-\n", "wrong number of cells"),
        ("Chad \t-\tN'Djamena\t-\n", "stray spaces"),
        ("Ivory Coast\ta\tAbidjan\t-\n", "'a' where 'an' is right"),
    ],
)
def test_a_table_row_that_would_read_wrongly_is_refused(tmp_path: Path, line: str, complaint: str) -> None:
    tables = copy_tables(tmp_path, "country_capital", line)
    with pytest.raises(BUILD["TableError"], match=complaint):
        BUILD["build"](tables)


def copy_tables(folder: Path, relation: str, line: str) -> Path:
    """Copy the tables and append one line to one of them."""
    tables = folder / "tables"
    shutil.copytree(DATA / "tables", tables)
    with (tables / f"facts_{relation}.tsv").open("a", encoding="utf-8") as file:
        file.write(line)
    return tables
