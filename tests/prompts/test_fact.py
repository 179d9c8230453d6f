"""Facts: what makes one, and the files they are read from."""

import json

import pytest

import reprobe as rp
from reprobe.errors import DataError
from reprobe.prompts import Neighbour, facts_of


@pytest.mark.parametrize(
    ("subject", "prompt", "objects", "says"),
    [
        ("Rome", "Paris is in", {"new": "Italy"}, "does not stand in its prompt"),
        ("Paris", "Paris is in", {"new": " "}, "new object is empty"),
        ("Paris", "{} is in", {"true": " "}, "true object is empty"),
        ("", "Paris is in", {"new": "Italy"}, "subject is empty"),
    ],
)
def test_a_fact_that_is_none_is_refused(subject, prompt, objects, says):
    with pytest.raises(DataError, match=says):
        rp.Fact.of(subject=subject, prompt=prompt, **objects)


def test_our_facts_and_both_layouts_of_counterfact_are_read_alike(tmp_path):
    nested = {
        "case_id": 7,
        "requested_rewrite": {
            "prompt": "{} is in",
            "subject": "Paris",
            "target_new": {"str": "Rome"},
            "target_true": {"str": "France"},
            "relation_id": "P1",
        },
        "paraphrase_prompts": ["One finds Paris in"],
        "neighborhood_prompts": ["Lyon is in"],
        "generation_prompts": ["Paris is known for"],
    }
    flat = {
        "prompt": "Paris is in",
        "subject": "Paris",
        "target_new": "Rome",
        "ground_truth": "France",
        "rephrase_prompt": "One finds Paris in",
        "locality_prompt": "Lyon is in",
        "locality_ground_truth": "France",
    }
    (tmp_path / "nested.json").write_text(json.dumps([nested]))
    (tmp_path / "flat.json").write_text(json.dumps([flat]))
    (one,), (two,) = facts_of(tmp_path / "nested.json"), facts_of(tmp_path / "flat.json")
    for name in ("prompt", "subject", "span", "new", "true", "paraphrases", "neighbours"):
        assert getattr(one, name) == getattr(two, name)
    assert one.generation_prompts == ("Paris is known for",)
    ours = facts_of("facts", limit=3)[0]
    assert (ours.subject, ours.true, ours.new) == ("Eiffel Tower", "Paris", "Seattle")
    assert ours.neighbours[0] == Neighbour("The Moulin Rouge is located in the city of", "Paris")
    assert rp.Fact.from_json(ours.to_json()) == ours
