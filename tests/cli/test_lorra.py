"""`reprobe lorra` as a user meets it, on a small model in a folder."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from cli.calling import called
from tiny import save_tiny
from transformers import AutoModelForCausalLM

import reprobe as rp
from reprobe.methods import lorra

CONTRAST = ("--positive", "be glad. {}", "--negative", "be sad. {}", "--prompts", "question", "--responses", "answer")
QUICK = ("--steps", 4, "--batch", 2, "--rank", 2, "--rate", 0.01)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("lorra")
    save_tiny(path / "model")
    rows = [("the cat", "is on the mat"), ("a dog", "is in"), ("one", " of the others")]
    lines = [json.dumps({"text": f"{q} {a}", "question": q, "answer": a}) for q, a in rows]
    (path / "asked.jsonl").write_text("\n".join(lines))
    return path


@pytest.fixture
def run(folder, monkeypatch):
    monkeypatch.chdir(folder)

    return partial(called, "lorra")


def test_an_adapter_is_trained_told_and_merged_and_taken_out_again(run, folder):
    told = json.loads(run("model", "asked.jsonl", *CONTRAST, *QUICK, "--to", "glad", "--json").stdout)
    assert told["steps"] == 4
    assert told["texts"] == 3
    assert told["targets"] == "resid.post@0, resid.post@1"
    assert told["adapted"] == "self_attn.q_proj, self_attn.v_proj of blocks 0, 1"
    assert (folder / "glad" / "adapter_model.safetensors").is_file()

    called("edit", "apply", "model", "glad", "--to", "merged")
    called("edit", "revert", "merged", "--to", "again")
    listed = json.loads(called("edit", "list", "glad", "--json").stdout)
    assert {(edit["method"], edit["rank"]) for edit in listed} == {("lorra", 2)}
    ids = torch.tensor([[5, 9, 33]])
    with torch.no_grad():
        plain, merged, again = (
            AutoModelForCausalLM.from_pretrained(folder / name)(ids).logits for name in ("model", "merged", "again")
        )
    assert torch.equal(plain, again)
    assert (plain - merged).abs().max() > 0.01

    assert "name a folder that does not" in run("model", "asked.jsonl", *CONTRAST, "--to", "glad", code=2).stderr
    resumed = run("model", "asked.jsonl", *CONTRAST, *QUICK, "--to", "glad", "--resume", "--json")
    assert json.loads(resumed.stdout) == told


def test_an_interrupted_training_says_how_to_go_on(run, folder, monkeypatch):
    asked = ("model", "asked.jsonl", *CONTRAST, *QUICK, "--checkpoint", 2, "--to", "cut")
    step = lorra._Training.step

    def interrupted(training):
        if training.done == 3:
            raise KeyboardInterrupt
        return step(training)

    with monkeypatch.context() as patch:
        patch.setattr(lorra._Training, "step", interrupted)
        assert "go on with --resume" in run(*asked, code=130).stderr
    assert "go on with resume=True (--resume)" in run(*asked, code=2).stderr
    run(*asked, "--resume")
    assert not (folder / "cut.checkpoint.safetensors").exists()


def test_directions_are_trained_in_without_a_contrast(run, folder):
    d = rp.Direction.from_vector("resid.post@1", np.ones(27), scale=2.0)
    d.save(folder / "d.safetensors")
    out = ("--direction", "d.safetensors", "--beta", 1.5, "--to", "along", "--dropout", 0)
    told = run("model", "asked.jsonl", "--prompts", "question", "--responses", "answer", *QUICK, *out, "--json").stdout
    assert json.loads(told)["loss before"] == pytest.approx(3.0, rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("asked.jsonl",), "give --positive and --negative, or --direction"),
        (("asked.jsonl", "--positive", "a"), "give --positive and --negative"),
        (("asked.jsonl", *CONTRAST, "--steps", 0), "steps=0"),
        (("asked.jsonl", *CONTRAST, "--layers", "a"), "write blocks as"),
        (("asked.jsonl", *CONTRAST[:-1], "reply"), "--responses reply: asked has the columns"),
        (("asked.jsonl", *CONTRAST[:-1], "label"), "row 0 of asked has no text there"),
        (("nothing.jsonl", *CONTRAST), "nothing.jsonl"),
        (("asked.jsonl", *CONTRAST, "--direction", "no.safetensors"), "no such direction"),
    ],
)
def test_what_cannot_be_trained_is_said_before_the_model_is_loaded(run, monkeypatch, arguments, says):
    monkeypatch.setattr("reprobe.cli.lorra.load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    assert says in run("model", *arguments, "--to", "new", code=2).stderr.replace("\n", " ")


def test_without_peft_the_extra_is_named_first(run, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "reprobe-lm[train]" in run("model", "asked.jsonl", "--to", "new", code=2).stderr


def test_a_template_without_contrast_is_refused(run):
    same = ("--positive", "a {}", "--negative", "a {}", "--prompts", "question", "--responses", "answer")
    assert "no contrast" in run("model", "asked.jsonl", *same, "--to", "new", code=2).stderr
