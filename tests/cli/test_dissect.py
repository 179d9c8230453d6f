"""`reprobe dissect` as a user meets it, on a small model in a folder."""

import json
from functools import partial

import pytest
from cli.calling import called
from tiny import save_tiny

from reprobe.methods.dissected import Dissection


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("dissect")
    save_tiny(path / "model")
    (path / "text.txt").write_text("the cat is on the red mat, and seven dogs are in May of 1999. " * 60)
    rows = [
        {"text": f"the {c} cat {i}", "label": i % 2, "spans": {"subject": [4, 7]}} for i, c in enumerate(["red"] * 60)
    ]
    (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def run(folder, monkeypatch):
    monkeypatch.chdir(folder)
    return partial(called, "dissect")


def test_a_file_is_dissected_saved_tabled_and_reported(run, folder):
    told = run(
        *("model", "text.txt", "--concepts", "months, colours, kind:number", "--drop-absent", "--quantile", "0.02"),
        *("--words", "cats=cat,cats", "--regex", "the=\\bthe\\b", "--permutations", "3", "--causes"),
        *("--to", "d.safetensors", "--report", "d.html", "--to-table", "d.csv", "--json"),
    )
    found = Dissection.load(folder / "d.safetensors")
    assert {"months", "colours", "cats", "the", "digits"} <= set(found.names)
    assert "currencies" in found.dropped
    assert "69 units" in told.stderr
    shown = json.loads(told.stdout)
    assert {row["concept"] for row in shown["concepts"]} == set(found.names)
    assert {row["act"] for row in shown["causes"]} == {"stimulate", "ablate"}
    assert (folder / "d.html").read_text().startswith("<!doctype html>")
    assert len((folder / "d.csv").read_text().splitlines()) == 70
    run("model", "text.txt", "--concepts", "months", "--to", "d.safetensors", code=2)


def test_spans_and_labels_of_prompts_and_text_of_the_models_own_are_concepts_and_a_stream(run):
    common = ("--quantile", "0.02", "--permutations", "0", "--sites", "resid.post@0")
    run("model", "rows.jsonl", "--span", "subject", "--label", "1", *common, "--to", "s.safetensors")
    assert Dissection.load("s.safetensors").names == ["label 1", "subject"][::-1]
    run(
        *("model", "sample", "--tokens", "1200", "--words", "the=the,a,in", "--regex", "all=\\w", *common),
        *("--drop-absent", "--to", "own.safetensors"),
    )
    assert Dissection.load("own.safetensors").stream.name == "sampled from model"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["text.txt", "--concepts", "moths"], "there are"),
        (["text.txt"], "never occur"),
        (["text.txt", "--words", "cats"], "NAME="),
        (["text.txt", "--regex", "a=("], "regular expression"),
        (["text.txt", "--words", "cats=cat", "--quantile", "0.0001"], "at least"),
        (["text.txt", "--words", "cats=cat", "--sites", "mlp.neurons@7"], "blocks 0–2"),
        (["nothing.txt", "--words", "cats=cat"], "no such file"),
        (["text.txt", "--concepts", "none"], "no concept"),
    ],
)
def test_a_wrong_call_fails_and_says_what_to_do(run, arguments, says):
    result = run("model", *arguments, "--to", "x.safetensors", code=2)
    assert says in " ".join(result.output.split())
