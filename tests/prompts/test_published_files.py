"""The published files themselves, where REPROBE_DATA names a folder that holds them."""

import os
from pathlib import Path

import pytest

from reprobe.prompts import PromptSet, facts_of

FOLDER = os.environ.get("REPROBE_DATA")
pytestmark = pytest.mark.skipif(FOLDER is None, reason="REPROBE_DATA does not name a folder with the published files")


def load(name: str) -> PromptSet:
    return PromptSet.load(Path(FOLDER or "") / name)


def test_truthfulqa_has_its_817_questions_and_6204_answers_in_both_files() -> None:
    table, choices = load("truthfulqa/TruthfulQA.csv"), load("truthfulqa/mc_task.json")
    for prompts in (table, choices):
        assert prompts.describe().groups == 817
        assert prompts.frame["best"].sum() == 817
    assert len(choices) == 6204
    assert len(table) == 6206  # the CSV lists the answer "Unknown" on both sides of two questions
    listed = set(table.frame.select("text", "label").rows()) - set(choices.frame.select("text", "label").rows())
    assert {text.split(" A: ")[1] for text, _ in listed} == {"Unknown."}
    assert set(table.texts) == set(choices.texts)


@pytest.mark.parametrize(
    ("name", "prompts", "groups", "pairs"),
    [
        ("cities", 1496, 748, 748),
        ("neg_cities", 1496, 748, 748),
        ("larger_than", 1980, 990, 990),
        ("sp_en_trans", 354, 344, 5),
    ],
)
def test_geometry_of_truth(name: str, prompts: int, groups: int, pairs: int) -> None:
    told = load(f"geometry_of_truth/{name}.csv").describe()
    assert (told.prompts, told.groups, told.pairs) == (prompts, groups, pairs)
    assert told.labels == {0: prompts // 2, 1: prompts // 2}


def test_repe() -> None:
    facts = load("repe/facts_true_false.csv")
    assert (len(facts), facts.frame["group"].n_unique()) == (612, 598)
    for emotion, count in (("happiness", 203), ("sadness", 228)):
        assert load(f"repe/{emotion}.json").describe().labels == {emotion: count}


@pytest.mark.parametrize(
    ("name", "count"), [("counterfact/known_1000", 1209), ("counterfact/counterfact-edit-2000", 2000)]
)
def test_facts_all_have_their_subject_marked(name: str, count: int) -> None:
    prompts = load(f"{name}.json")
    assert len(prompts) == count
    for text, spans, subject in prompts.frame.select("text", "spans", "subject").iter_rows():
        assert text[spans[0]["start"] : spans[0]["end"]] == subject


@pytest.mark.parametrize("name", ["adj_antonym", "company_hq", "country_currency", "landmark_in_country"])
def test_relations(name: str) -> None:
    prompts = load(f"relations/{name}.json")
    assert "{}" not in "".join(prompts.texts)
    assert prompts.describe().spans == {"subject": len(prompts)}


def test_persona() -> None:
    told = load("persona/agreeableness.jsonl").describe()
    assert (told.prompts, told.pairs, told.labels) == (2000, 1000, {0: 1000, 1: 1000})
    assert told.spans["statement"] == 2000


def test_counterfact_and_the_known_facts_are_facts_to_edit_and_to_trace() -> None:
    edits = facts_of(load("counterfact/counterfact-edit-2000.json"))
    assert len(edits) == 2000
    assert all(f.new and f.true and f.paraphrases and f.neighbours for f in edits)
    known = facts_of(load("counterfact/known_1000.json"))
    assert len(known) == 1209
    assert all(f.true and f.new is None for f in known)
