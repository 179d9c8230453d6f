"""`reprobe trace` as a user meets it, on a small model in a folder."""

import json
from functools import partial

import pytest
from cli.calling import called
from tiny import save_tiny

from reprobe.methods.tracing import TraceGrid

ONE = ("--subject", "the cat", "--prompt", "it is {} on the", "--target", "mat")
QUICK = ("--samples", 2, "--window", 3, "--unknown", "keep")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("trace")
    save_tiny(path / "model")
    facts = [
        {"known_id": i, "subject": s, "attribute": "mat", "template": "{} is on the", "prompt": f"{s} is on the",
         "prediction": " mat", "relation_id": "P1"}
        for i, s in enumerate(["a cat", "the other horse", "an end"])
    ]  # fmt: skip
    (path / "known.json").write_text(json.dumps(facts))
    return path


@pytest.fixture
def run(folder, monkeypatch):
    monkeypatch.chdir(folder)
    return partial(called, "trace")


def test_one_fact_is_traced_and_told_as_json(run):
    told = json.loads(run("model", *ONE, *QUICK, "--json").stdout)
    assert told["facts"][0]["object"] == "mat"
    assert {p["kind"] for p in told["peaks"]} == {"resid.post", "attn.out", "mlp.out"}
    assert told["totals"]["total_effect"]["mean"] == pytest.approx(told["facts"][0]["total_effect"])


def test_known_facts_are_traced_into_a_file_a_table_and_figures(run, folder):
    out = ("--to", "a.trace", "--to-table", "a.parquet", "--figures", "drawn", "--maps", 2)
    shown = run("model", "known.json", "--limit", 2, *QUICK, "--layers", "0-1", "--kinds", "mlp.out", *out)
    assert "2 facts: p(object)" in shown.stderr
    assert "last subject" in shown.stdout
    assert [t.fact.subject for t in TraceGrid.load(folder / "a.trace").traces] == ["a cat", "the other horse"]
    assert sorted(p.name for p in (folder / "drawn").iterdir()) == ["curves.svg", "fact-0.svg", "fact-1.svg"]
    assert "a.trace exists" in run("model", "known.json", *QUICK, "--to", "a.trace", code=2).stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "give a data set of facts, or one fact"),
        (("known.json", *ONE), "give a data set of facts, or one fact"),
        (ONE[:-2], "give a data set of facts, or one fact"),
        ((*ONE, "--window", 0), "window=0"),
        ((*ONE, "--layers", "7"), "blocks 0–2"),
        ((*ONE, "--kinds", "mlp"), "unknown kind 'mlp'"),
        (("--subject", "dog", *ONE[2:-2], "--target", ""), "object is empty"),
        (("--subject", "dog", "--prompt", "the cat is", "--target", "mat"), "does not stand in its prompt"),
        (ONE, "does not know 1 of 1 facts"),
        (("known.json", "--unknown", "drop"), "knows none of these facts"),
        (("nothing.json",), "there is no data set"),
    ],
)
def test_what_cannot_be_traced_is_said(run, arguments, says):
    assert says in run("model", *arguments, code=2).stderr.replace("\n", " ")
