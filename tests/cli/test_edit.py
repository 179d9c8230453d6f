"""`reprobe edit` as a user meets it, on a small model in a folder."""

import json
from functools import partial

import pytest
import torch
from cli.calling import called
from safetensors.torch import load_file
from tiny import save_tiny

import reprobe as rp
from reprobe.cli.edit import TOKENS
from reprobe.methods import moments
from reprobe.report.measured import read_measured

PROMPT = ("--subject", "cat", "--prompt", "the {} is on the", "--target", "mat", "--layer", 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("edit")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REPROBE_CACHE", str(path / "cache"))
        save_tiny(path / "model")
        (path / "text.txt").write_text("the cat is on the mat and a dog is in the other hat. " * 20)
        facts = [
            {"case_id": i, "prompt": f"the {s} is on the", "subject": s, "target_new": "mat", "ground_truth": "roof",
             "rephrase_prompt": f"on is a {s}", "locality_prompt": "the dog is", "locality_ground_truth": "red"}
            for i, s in enumerate(["cat", "horse", "theory"])
        ]  # fmt: skip
        (path / "facts.json").write_text(json.dumps(facts))
        yield path


@pytest.fixture
def run(folder, monkeypatch):
    monkeypatch.chdir(folder)
    return partial(called, "edit")


@pytest.mark.filterwarnings("ignore:.*have no effect")
def test_an_edit_is_made_applied_listed_and_reverted(run, folder):
    told = json.loads(run("rome", "model", *PROMPT, "--text", "text.txt", "--to", "a.safetensors", "--json").stdout)
    assert told["facts"] == "the cat is on the → mat"
    run("rome", "model", *PROMPT[:-1], 0, "--text", "text.txt", "--to", "b.safetensors", "--original")
    run("apply", "model", "a.safetensors", "--to", "once")
    run("apply", "once", "b.safetensors", "--to", "twice")
    listed = json.loads(run("list", "twice", "--json").stdout)
    assert listed[0]["digest"] == told["digest"]
    assert [e["block"] for e in listed] == [1, 0]
    assert listed[1]["provenance"]["settings"]["compat"] == "rome"
    run("revert", "twice", "--edit", told["digest"], "--to", "b-only")
    run("revert", "b-only", "--to", "none")
    plain, again, edited = (load_file(folder / name / "model.safetensors") for name in ("model", "none", "twice"))
    assert all(torch.equal(plain[k], again[k]) for k in plain)
    assert not all(torch.equal(plain[k], edited[k]) for k in plain)
    assert json.loads(run("list", "none", "--json").stdout) == []


@pytest.mark.filterwarnings("ignore:.*have no effect")
def test_many_facts_are_written_at_once(run, folder):
    told = json.loads(
        run("memit", "model", "facts.json", "--layers", "0-1", "--text", "text.txt", "--to", "edits", "--json").stdout
    )
    assert told["facts"] == 3
    assert len(list((folder / "edits").glob("*.safetensors"))) == 2
    run("apply", "model", "edits", "--to", "many")
    common = ("memit", "model", "facts.json", "--layers", "0-1", "--text", "text.txt", "--json")
    sparing = json.loads(run(*common, "--weight", 1e9, "--to", "sparing").stdout)
    assert sparing["probability after"] == pytest.approx(sparing["probability before"], rel=1e-3)
    assert told["probability after"] != pytest.approx(told["probability before"], rel=1e-2)
    assert "no such" in run("list", "nowhere", code=2).output


def test_facts_are_written_one_after_another_until_the_guard_stops(run, folder):
    (folder / "else.txt").write_text("the cat is on the dog. the horse is on the dog. the theory is on the dog. " * 5)
    common = ("sequential", "model", "facts.json", "--layer", 1, "--text", "text.txt", "--perplexity", "else.txt")
    told = json.loads(run(*common, "--at-most", 1e6, "--every", 2, "--to", "in-a-row", "--json").stdout)
    assert (told["facts"], told["written"], told["stopped"]) == (3, 3, None)
    assert [facts for facts, _ in told["perplexity"]] == [0, 2, 3]
    assert len(list((folder / "in-a-row").glob("*.safetensors"))) == 3
    run("apply", "model", "in-a-row", "--to", "with-all")
    told = json.loads(run(*common, "--at-most", 1 + 1e-9, "--every", 3, "--to", "none-kept", "--json").stdout)
    assert told["written"] == 0
    assert "3 were reverted" in told["stopped"]
    assert told["saved"] is None
    assert not (folder / "none-kept").exists()


@pytest.mark.parametrize("method", ["rome", "memit", "finetune"])
def test_edits_are_scored(run, folder, method):
    text = () if method == "finetune" else ("--text", "text.txt")
    told = run(
        *("eval", "model", "facts.json", "--method", method, "--layers", "1", *text, "--json"),
        *("--perplexity", "text.txt", "--write", "4", "--to-table", f"{method}.json"),
    )
    measures = {row["measure"]: row for row in json.loads(told.stdout)}
    assert {"efficacy", "paraphrase", "neighbourhood", "score", "perplexity", "fluency"} <= set(measures)
    saved = read_measured(folder / f"{method}.json")
    assert saved.identity == rp.LanguageModel.load(folder / "model").identity
    assert saved.editing.after.facts == 3


def test_moments_are_of_as_many_tokens_as_in_the_library():
    assert TOKENS == moments.TOKENS


def test_moments_are_shown(run):
    rows = json.loads(run("moments", "model", "--layers", "0,2", "--text", "text.txt", "--json").stdout)
    assert [row["block"] for row in rows] == [0, 2]
    assert len(json.loads(run("moments", "model", "--layers", "1", "--tokens", 200, "--json").stdout)) == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["rome", "model", *PROMPT[:-2], "--to", "x"], "say layer"),
        (["rome", "model", "--subject", "dog", *PROMPT[2:3], "a cat", "--target", "x", "--to", "x"], "does not stand"),
        (["rome", "model", *PROMPT[:-1], 9, "--to", "x"], "blocks 0–2"),
        (["rome", "model", *PROMPT, "--to", "facts.json"], "--overwrite"),
        (["memit", "model", "facts.json", "--layers", "1-0", "--to", "x"], "6-10"),
        (["apply", "model", "text.txt", "--to", "x"], "safetensors"),
        (["revert", "model", "--to", "x"], "remembers no edits"),
        (["eval", "model", "facts.json", "--layers", "0,1", "--text", "text.txt"], "one block"),
        (["eval", "model", "facts.json", "--weight", 3, "--text", "text.txt"], "MEMIT's"),
        (["eval", "model", "facts.json", "--method", "finetune", "--text", "text.txt"], "takes none"),
        (["eval", "model", "facts.json", "--method", "memit", "--original", "--text", "text.txt"], "form of ROME"),
        (["memit", "model", "facts.json", "--null-space", "--weight", 3, "--to", "x"], "null space"),
        (["moments", "model"], "say layer"),
        (["sequential", "model", "facts.json", "--at-most", 1, "--to", "x"], "above 1"),
    ],
)
def test_a_wrong_call_fails_and_says_what_to_do(run, arguments, says):
    assert says in run(*arguments, code=None).output
