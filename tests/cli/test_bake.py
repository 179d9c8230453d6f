"""`reprobe bake` and `reprobe steer tune` as a user meets them, on a small model in a folder."""

import json

import numpy as np
import pytest
import torch
from cli.calling import called
from tiny import save_tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

import reprobe as rp

TEXT = "the cat is on the mat"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("bake")
    for name, family in (("model", "llama"), ("post-norms", "gemma3_text")):
        save_tiny(path / name, family)
    lm = rp.LanguageModel.load(path / "model")
    v = np.random.default_rng(0).normal(size=lm.d_model)
    d = rp.Direction.from_vector("resid.post@1", v, scale=0.5, identity=lm.identity)
    d.save(path / "d.safetensors")
    rp.Steering(rp.Add(d, 2.0), rp.Ablate(d, site="attn.out@2"), name="two").save(path / "two.safetensors")
    rp.Steering(rp.Add(d, tokens="generated"), name="later").save(path / "later.safetensors")
    (path / "texts.txt").write_text("the thing is on the land\n\nand the end is in it\n")
    return path


@pytest.fixture
def run(folder, monkeypatch):
    monkeypatch.chdir(folder)
    return called


@pytest.mark.parametrize(("file", "strength"), [("d", 3.0), ("two", None), ("two", -0.5)])
def test_stock_transformers_opens_what_was_baked_and_computes_what_steering_does(run, folder, tmp_path, file, strength):
    to = tmp_path / "baked"
    line = ["bake", "model", "--direction", f"{file}.safetensors", "--to", to, "--json"]
    told = json.loads(run(*line, *([] if strength is None else ["--strength", strength])).stdout)
    assert told["parameters changed"] > 0
    net, tokenizer = AutoModelForCausalLM.from_pretrained(to), AutoTokenizer.from_pretrained(to)
    with torch.no_grad():
        baked = net.eval()(**tokenizer(TEXT, return_tensors="pt")).logits[0]
    lm = rp.LanguageModel.load(folder / "model")
    if file == "d":
        item = rp.Add(rp.Direction.load(folder / "d.safetensors"), strength)
    else:
        item = (1.0 if strength is None else strength) * rp.Steering.load(folder / "two.safetensors")
    with rp.steer(lm, item):
        steered = lm.logits(TEXT, at="all")[0]
    torch.testing.assert_close(baked, steered, atol=1e-4, rtol=1e-4)
    assert (baked - lm.logits(TEXT, at="all")[0]).abs().max() > 1e-2
    record = json.loads((to / "reprobe-baked.json").read_text())
    assert record["base"] == lm.identity.to_json()
    assert len(record["parameters"]) == told["parameters changed"]


def test_a_direction_is_taken_out_of_all_that_is_written(run, folder, tmp_path):
    line = ["bake", "model", "--direction", "d.safetensors", "--ablate", "--everywhere"]
    run(*line, "--untie", "--to", tmp_path / "without")
    lm, d = rp.LanguageModel.load(tmp_path / "without"), rp.Direction.load(folder / "d.safetensors")
    for h in rp.capture(lm, lm.inputs(lm.encode(TEXT)), lm.sites("resid.post@*")).values():
        assert np.abs(d.project(h[0].numpy())).max() < 1e-5
    assert "--ablate" in run(*line[:-2], "--everywhere", "--to", tmp_path / "x", code=2).output


@pytest.mark.parametrize(
    ("model", "file", "options", "says"),
    [
        ("post-norms", "d", ["--allow-mismatch"], "norm stands between"),
        ("post-norms", "d", [], "IdentityMismatch"),
        ("model", "later", [], "scope generated"),
        ("model", "d", ["--ablate"], "earlier"),
        ("model", "d", ["--site", "resid.post@9"], "blocks 0–2"),
    ],
)
def test_what_no_weights_can_do_is_refused_with_its_reason(run, folder, model, file, options, says):
    result = run("bake", model, "--direction", f"{file}.safetensors", *options, "--to", "refused", code=None)
    assert says in result.output
    assert not (folder / "refused").exists()


def test_a_folder_that_exists_is_not_written_over(run, folder, tmp_path):
    said = run("bake", "model", "--direction", "d.safetensors", "--to", tmp_path, code=2).output
    assert "exists" in said
    assert "--overwrite" not in said  # there is no such option here


def test_the_model_is_as_it_was_after_an_export(folder, tmp_path):
    lm = rp.LanguageModel.load(folder / "model")
    before, identity = {k: v.clone() for k, v in lm.net.state_dict().items()}, lm.identity
    rp.export_baked(lm, tmp_path / "a", rp.Add(rp.Direction.load(folder / "d.safetensors"), 4.0))
    assert lm.identity == identity
    assert all(torch.equal(v, lm.net.state_dict()[k]) for k, v in before.items())
    with pytest.raises(rp.ReprobeError, match="exists"):
        rp.export_baked(lm, tmp_path / "a", rp.Add(rp.Direction.load(folder / "d.safetensors")))


def test_the_strength_of_a_saved_steering_is_tuned_as_a_factor(run, folder):
    line = ["steer", "tune", "model", "--texts", "texts.txt", "--json", "--target-kl", 0.02, "--direction"]
    told = json.loads(run(*line, "two.safetensors").stdout)
    assert told["kl"] == pytest.approx(0.02, rel=0.05)
    lm, two = rp.LanguageModel.load(folder / "model"), rp.Steering.load(folder / "two.safetensors")
    texts = ["the thing is on the land", "and the end is in it"]
    assert rp.divergence(lm, [rp.Passage.of(t) for t in texts], told["strength"] * two) == pytest.approx(told["kl"])
    assert "says itself" in run(*line, "two.safetensors", "--site", "resid.post@1", code=2).output
