"""The command line as a user meets it: every verb on a small model in a folder, wrong inputs first."""

import json
import os
import shutil
import signal
import sys
import time
from typing import get_args

import polars as pl
import pytest
import torch
from cli.calling import called
from safetensors.torch import save_file
from tiny import save_tiny, tiny_net, tiny_tokenizer

import reprobe as rp
from reprobe.cli import main
from reprobe.cli.options import ReaderName
from reprobe.probing import READERS
from reprobe.report import read_results


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model in a folder, and prompts in which the first word tells the label."""
    path = tmp_path_factory.mktemp("cli")
    save_tiny(path / "model")
    rows = [
        {
            "id": f"p{i}",
            "text": f"{'the' if i % 2 else 'and'} thing number {i // 2}",
            "label": i % 2,
            "group": f"g{i // 2}",
        }
        for i in range(40)
    ]
    (path / "prompts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


@pytest.fixture
def run(folder, monkeypatch):
    monkeypatch.chdir(folder)
    return called


@pytest.fixture(scope="module")
def made(folder):
    """A store, a grid and a direction made with the verbs themselves."""
    store, grid, direction = (folder / name for name in ("s.reprobe", "g.safetensors", "d.safetensors"))
    sites = ("--sites", "resid.post@*,attn.heads@1")
    called("extract", folder / "model", folder / "prompts.jsonl", "--to", store, *sites)
    called("probe", store, "--reader", "mean-difference", "--folds", 4, "--to", grid, "--to-direction", direction)
    return folder


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["extract", "model", "no-such-data", "--to", "x"], "UnknownData"),
        (["extract", "model", "prompts.jsonl", "--to", "x", "--sites", "mlp.out@32"], "blocks 0–2"),
        (["extract", "model", "prompts.jsonl", "--to", "x", "--at", "somewhere"], "span:NAME"),
        (["extract", "model", "prompts.jsonl", "--to", "x", "--store-dtype", "int8"], "float32, float16, bfloat16"),
        (["extract", "model", "prompts.jsonl", "--to", "x", "--truncate", "middle"], "left"),
        (["extract", "model", "prompts.jsonl", "--to", "s.reprobe"], "--resume"),
        (["extract", "model", "prompts.jsonl", "--to", "x", "--world", "2"], "--rank and --world"),
        (["extract", "model", "prompts.jsonl", "--to", "x", "--rank", "0"], "--rank and --world"),
        (["extract", "model", "prompts.jsonl", "--to", "x", "--rank", "0", "--world", "2", "--overwrite"], "several"),
        (["info", "nothing.reprobe"], "nothing.reprobe"),
        (["verify", "s.reprobe", "--sample", "9"], "--model"),
        (["verify", "s.reprobe", "--model", "model", "--sample", "some"], "or all"),
        (["verify", "s.reprobe", "--model", "model", "--sample", "0"], "1 or more"),
        (["import", "vllm", "nowhere", "--layers", "0", "--model", "model", "--to", "x"], "nowhere"),
        (["probe", "s.reprobe", "--reader", "crystal-ball"], "logistic"),
        (["probe", "s.reprobe", "--label", "colour"], "colour"),
        (["probe", "s.reprobe", "--sites", "resid.pre@*"], "resid"),
        (["probe", "s.reprobe", "--to", "g.safetensors"], "--overwrite"),
        (["probe", "s.reprobe", "--to-table", "t.xlsx"], ".csv, .parquet or .json"),
        (["probe", "s.reprobe", "--reader", "logistic", "--selectivity", "--types", "lemma"], "lemma"),
        (["compare", "s.reprobe", "--readers", "lda,crystal-ball"], "cluster-mean"),
        (["compare", "s.reprobe", "--readers", "lda,lda"], "comes twice"),
        (["compare", "s.reprobe", "--folds", "2"], "three at least"),
        (["compare", "s.reprobe", "--to", "g.safetensors"], "--overwrite"),
        (["transfer", "s.reprobe", "t=s.reprobe", "--to-table", "prompts.jsonl"], ".csv, .parquet or .json"),
        (["scan", "model", "a text", "--grid", "g.safetensors", "--part", "mlp.out"], "attn.heads, resid.post"),
        (["steer", "model", "a text", "--direction", "nothing.safetensors"], "nothing.safetensors"),
        (["steer", "model", "a text", "--direction", "d.safetensors", "--tokens", "some"], "generated"),
        (["steer", "model", "--direction", "d.safetensors"], "--prompts FILE"),
        (["steer", "model", "a text", "--chat", "--direction", "d.safetensors"], "give one of these"),
        (["steer", "model", "--chat", "--json", "--direction", "d.safetensors"], "--chat"),
        (["steer", "model", "--prompts", "none.txt", "--direction", "d.safetensors"], "none.txt"),
        (["steer", "model", "a text", "--direction", "g.safetensors"], "not a direction"),
        (["export", "d.safetensors", "--to", "d.safetensors"], "choose another name"),
        (["export", "d.safetensors", "--to", "x", "--format", "pickle"], "vllm-lens"),
        (["export", "d.safetensors", "--to", "x", "--site", "resid.post@0"], "begin at block 1"),
        (["export", "d.safetensors", "--to", "x", "--site", "attn.out@1"], "outputs of blocks only"),
        (["push", "nothing.safetensors", "x"], "nothing.safetensors"),
        (["push", "d.safetensors", "hf:x"], "hf:OWNER/NAME"),
        (["push", "d.safetensors", "s.reprobe"], "choose another name"),
        (["pull", "nowhere", "--to", "x.safetensors"], "nowhere"),
        (["pull", "nowhere", "--to", "d.safetensors"], "--overwrite"),
        (["evaluate", "truthfulqa", "model"], "--data misconceptions"),
        (["evaluate", "truthfulqa", "model", "--data", "cities"], "no column question"),
        (["evaluate", "truthfulqa", "model", "--data", "misconceptions", "--strength", "4"], "--direction"),
        (["evaluate", "truthfulqa", "model", "--data", "misconceptions", "--primer", "none.txt"], "none.txt"),
        (["evaluate", "side-effects", "model", "--direction", "d.safetensors", "--data", "cities"], "target_new"),
        (["evaluate", "side-effects", "model", "--direction", "d.safetensors", "--texts", "none.txt"], "none.txt"),
        (["steer", "tune", "model", "--direction", "d.safetensors", "--target-kl", "-1"], "positive number"),
        (["report", "nowhere"], "nowhere"),
        (["data", "show", "citys"], "cities"),
        (["frobnicate"], "frobnicate"),
    ],
)
def test_a_wrong_call_exits_2_and_says_what_exists(run, made, arguments, says, monkeypatch):
    monkeypatch.delenv("REPROBE_DATA", raising=False)
    assert says in run(*arguments, code=2).output


def test_a_model_that_is_not_there_exits_1(run):
    assert "ModelLoadFailed" in run("extract", "./no-model", "prompts.jsonl", "--to", "x", code=1).output


def test_a_malformed_data_set_is_named_row_by_row(run, folder):
    (folder / "bad.jsonl").write_text('{"id": "a", "text": "x"}\n{"id": "a", "text": "y"}\n')
    assert "duplicate ids: a" in run("data", "validate", "bad.jsonl", code=2).output
    assert "sound" in run("data", "validate", "prompts.jsonl").output


def test_info_and_verify_tell_of_a_store_and_a_changed_byte_exits_1(run, made, tmp_path):
    told = json.loads(run("info", "s.reprobe", "--json").stdout)
    assert told["rows"] == 40
    assert told["complete"] is True
    run("verify", "s.reprobe")
    rp.extract(rp.LanguageModel.load(made / "model"), made / "prompts.jsonl", to=tmp_path / "t.reprobe")
    shard = next((tmp_path / "t.reprobe").rglob("c.*"))
    shard.write_bytes(bytes([shard.read_bytes()[0] ^ 1]) + shard.read_bytes()[1:])
    assert "CorruptArtifact" in run("verify", tmp_path / "t.reprobe", code=1).output


def test_info_tells_of_which_model_a_store_is_and_how_to_finish_it(run, made, tmp_path):
    told = json.loads(run("info", "s.reprobe", "--json").stdout)
    store = rp.ActivationStore.open(made / "s.reprobe")
    lengths = store.tokens["tokens"].list.len()
    assert told["counts"] == {"prompts": 40, "tokens": lengths.sum(), "longest": lengths.max()}
    assert told["identity"] == store.identity.to_json()
    shown = run("info", "s.reprobe").stdout
    for what in (
        "resid.post@0–2",
        "positions",
        store.identity.weights[:12],
        store.identity.tokenizer[:12],
        f"{lengths.sum():,}",
        "llama, 3 blocks, d_model 27",
        "pack: forest",
        "1 of 1",
        "complete",
    ):
        assert what in shown
    shutil.copytree(made / "s.reprobe", tmp_path / "part.reprobe")
    (tmp_path / "part.reprobe" / "commits" / "00000.json").unlink()
    assert "incomplete: go on with `reprobe extract … --resume`" in run("info", tmp_path / "part.reprobe").stdout


def test_verify_with_a_model_proves_the_activations_and_the_decisions(run, made):
    told = json.loads(
        run(
            "verify", "s.reprobe", "--model", "model", "--sample", "all", "--direction", "d.safetensors", "--json"
        ).stdout
    )
    assert told["ok"] is True
    assert told["prompts"] == told["of_prompts"] == 40
    assert [d["flips"] for d in told["directions"]] == [0]
    assert max(s["worst"] for s in told["sites"]) < told["tolerance"]
    said = run("verify", "s.reprobe", "--model", "model", "--direction", "d.safetensors")
    assert "the same activations" in said.stderr
    assert "0 of 40 decisions flip" in said.stdout


def test_verify_with_another_model_exits_1_with_what_differs(run, made, tmp_path):
    net = tiny_net("llama")
    net.model.layers[1].mlp.down_proj.weight.data *= 1.05
    net.save_pretrained(tmp_path / "other")
    tiny_tokenizer().save_pretrained(tmp_path / "other")
    refused = run("verify", "s.reprobe", "--model", tmp_path / "other", code=1)
    assert "identity: weights is" in refused.stdout
    told = run("verify", "s.reprobe", "--model", tmp_path / "other", "--allow-mismatch", code=1)
    lines = [line.split()[0] for line in told.stdout.splitlines() if line.startswith(("resid", "attn"))]
    assert lines == ["resid.post@1", "resid.post@2"]
    assert "NOT the same activations" in told.stderr
    assert json.loads(run("verify", "s.reprobe", "--model", tmp_path / "other", "--json", code=1).stdout)["ok"] is False


def test_what_vllm_wrote_becomes_a_store_that_verifies(run, made, tmp_path):
    lm = rp.LanguageModel.load(made / "model")
    data = rp.PromptSet.load(made / "prompts.jsonl")
    (tmp_path / "hs").mkdir()
    for id_, text in zip(data.ids, data.texts, strict=True):
        with rp.observe(lm, "embed,resid.post@2") as seen:
            lm.logits(text)
        states = torch.stack([h[0] for h in seen.values()], 1).contiguous()
        tokens = torch.tensor(lm.tokenizer(text)["input_ids"])
        save_file({"hidden_states": states, "token_ids": tokens}, tmp_path / "hs" / f"{id_}.safetensors")
    line = ["import", "vllm", tmp_path / "hs", "--layers", "0,3", "--model", "model", "--data", "prompts.jsonl"]
    assert "resid.post@2" in run(*line, "--to", tmp_path / "v.reprobe").stderr
    run("verify", tmp_path / "v.reprobe", "--model", "model")
    run("probe", tmp_path / "v.reprobe", "--sites", "resid.post@2", "--reader", "mean-difference", "--folds", 4)
    assert "--resume" in run(*line, "--to", tmp_path / "v.reprobe", code=2).output
    run(*line, "--to", tmp_path / "v.reprobe", "--resume")
    (tmp_path / "v.reprobe" / "commits" / "00000.json").unlink()
    assert "go on with `reprobe import vllm … --resume`" in run("info", tmp_path / "v.reprobe").stdout
    line[4] = "0,x"
    assert "0,8,16" in run(*line, "--to", tmp_path / "w", code=2).output


def test_probe_prints_the_best_sites_and_saves_what_it_found(run, made):
    rows = json.loads(run("probe", "s.reprobe", "--reader", "mean-difference", "--folds", 4, "--json").stdout)
    assert len(rows) == 10
    assert [r["accuracy"] for r in rows] == sorted((r["accuracy"] for r in rows), reverse=True)
    grid = rp.ProbeGrid.load(made / "g.safetensors")
    assert grid.best() == rp.Direction.load(made / "d.safetensors")
    assert grid.table["accuracy"].max() == rows[0]["accuracy"]


def test_probe_of_two_folds_says_nothing_of_a_choice_of_site(run, made):
    arguments = ["probe", "s.reprobe", "--reader", "mean-difference", "--sites", "resid.post@*", "--folds"]
    assert "chosen on the other folds" in run(*arguments, 3).stderr
    assert "chosen on the other folds" not in run(*arguments, 2).stderr


def test_probe_adds_controls_and_writes_its_table(run, made):
    arguments = ["probe", "s.reprobe", "--reader", "mean-difference", "--folds", 4, "--sites", "resid.post@*"]
    controls = ["--permutations", 19, "--selectivity", "--mdl", "--to", "c.safetensors", "--to-table", "c.csv"]
    rows = json.loads(run(*arguments, *controls, "--json").stdout)
    assert all(0.05 <= row["p"] <= 1 for row in rows)
    table = rp.ProbeGrid.load(made / "c.safetensors").table
    assert table.columns[-5:] == ["p", "control", "selectivity", "bits", "compression"]
    assert pl.read_csv(made / "c.csv", schema=table.schema).equals(table)
    assert "--overwrite" in run(*arguments, "--to", "c.safetensors", code=2).output
    assert "overwrite" in run(*arguments, "--to-table", "c.csv", code=2).output
    run(*arguments, "--to-table", "c.csv", "--overwrite")
    assert "p" not in pl.read_csv(made / "c.csv").columns


def test_compare_prints_choices_and_differences_and_makes_a_page(run, made):
    arguments = ["compare", "s.reprobe", "--readers", "mean-difference, lda", "--folds", 4, "--sites", "resid.post@*"]
    shown = run(*arguments, "--to", "r.safetensors", "--to-table", "r.parquet", "--out", "compared")
    found = rp.Comparison.load(made / "r.safetensors")
    assert f"{found.choices['accuracy'][1]:.3f}" in shown.stdout
    assert f"{found.differences['accuracy_difference_low'][0]:.3f}" in shown.stdout
    assert pl.read_parquet(made / "r.parquet").equals(found.table)
    assert (made / "compared" / "comparisons" / "s.safetensors").read_bytes() == (made / "r.safetensors").read_bytes()
    page = (made / "compared" / "report.html").read_text()
    assert "Readers compared" in page
    assert "Principal components of s" in page
    told = json.loads(run(*arguments, "--json").stdout)
    assert told["choices"] == found.choices.to_dicts()
    assert "--overwrite" in run(*arguments, "--out", "compared", code=2).output
    run("report", "compared", "--store", "s.reprobe")
    assert (made / "compared" / "report.html").read_text() == page


def test_the_readers_of_the_options_are_those_of_the_library():
    assert set(get_args(ReaderName)) == set(READERS)


def test_a_typed_label_finds_the_number_that_it_means(run, made):
    run(
        "probe", "s.reprobe", "--positive", "0", "--reader", "mean-difference", "--folds", 4, "--to", "zero.safetensors"
    )
    assert rp.ProbeGrid.load(made / "zero.safetensors").classes == (1, 0)


def test_transfer_prints_every_pair_and_saves_table_and_figure(run, made):
    arguments = ["transfer", "one=s.reprobe", "s.reprobe", "--folds", 4, "--sites", "resid.post@*", "--transductive"]
    shown = run(*arguments, "--at", "resid.post@1", "--to-table", "t.json", "--figure", "t.png").stdout
    assert "resid.post@1" in shown
    assert "resid.post@0" not in shown
    rows = json.loads(run(*arguments, "--json").stdout)
    assert {(r["train"], r["test"]) for r in rows} == {(a, b) for a in ("one", "s") for b in ("one", "s")}
    assert len(rows) == 4 * 3 * 2
    assert json.loads((made / "t.json").read_text())["table"] == rows
    assert (made / "t.png").read_bytes().startswith(b"\x89PNG")
    run(*arguments, "--to", "t.json", code=2)
    assert "NAME=PATH" in run("transfer", "s.reprobe", "s.reprobe", code=2).stderr
    assert "there are sites" in run(*arguments, "--at", "resid.post@9", code=2).stderr


def test_scan_reads_every_token_at_every_block(run, made):
    rows = json.loads(run("scan", "model", "the end of it", "--grid", "g.safetensors", "--json").stdout)
    lm = rp.LanguageModel.load(made / "model")
    assert len(rows) == lm.encode("the end of it").real.shape[1]
    assert set(rows[0]) == {"token", "resid.post@0", "resid.post@1", "resid.post@2"}
    d = rp.ProbeGrid.load(made / "g.safetensors").directions[rp.Site.parse("resid.post@1")]
    with rp.observe(lm, "resid.post@1") as seen:
        lm.logits("the end of it")
    want = d.score(seen[rp.Site.parse("resid.post@1")][0, -1].numpy()) / d.scale
    assert rows[-1]["resid.post@1"] == pytest.approx(float(want), abs=2e-3)
    run("scan", "model", "the end of it", "--grid", "g.safetensors", "--figure", "scan.svg")
    assert (made / "scan.svg").read_text().count("<svg") == 1
    run("scan", "model", "the end of it", "--grid", "g.safetensors", "--to", "kept/scan.json")
    assert (
        "--overwrite" in run("scan", "model", "it", "--grid", "g.safetensors", "--to", "kept/scan.json", code=2).output
    )
    kept = read_results(made / "kept").scans["scan"]
    assert (kept.text, kept.grid) == ("the end of it", "g")
    assert kept.identity == rp.ActivationStore.open(made / "s.reprobe").identity


def test_steer_shows_both_texts_and_the_price(run, made):
    still = json.loads(
        run("steer", "model", "the end", "--direction", "d.safetensors", "--strength", 0, "--json").stdout
    )
    assert still["unsteered"] == still["steered"]
    told = json.loads(
        run("steer", "model", "the end", "--direction", "d.safetensors", "--strength", 9, "--json").stdout
    )
    kl = next(v for k, v in told.items() if k.startswith("KL"))
    assert kl > 0
    assert told["unsteered"] == still["unsteered"]


def test_steer_scores_the_tokens_that_it_makes(run, made):
    line = ["steer", "model", "the end", "--direction", "d.safetensors", "--max-new-tokens", 5]
    told = json.loads(run(*line, "--strength", 3, "--json").stdout)
    lm, d = rp.LanguageModel.load(made / "model"), rp.Direction.load(made / "d.safetensors")
    with rp.steer(lm, rp.Add(d, 3)), lm.monitor(d) as monitor:
        text = lm.generate("the end", max_new_tokens=5)[0]
    (reading,) = monitor.readings
    assert told["steered"] == text
    want = reading.scores[0, reading.generated]
    assert [pair["score"] for pair in told["scores"]] == pytest.approx(list(want), abs=1e-3)
    assert len(want) == 4
    assert f"({want[0]:+.1f})" in run(*line, "--strength", 3).stdout


def test_a_steering_steers_from_its_file_as_it_was_saved(run, made):
    lm, d = rp.LanguageModel.load(made / "model"), rp.Direction.load(made / "d.safetensors")
    bundle = rp.Steering(rp.Add(d, 2.0, tokens="prompt"), rp.Scale("attn.heads@1.2", 0.0), identity=lm.identity)
    bundle.save(made / "bundle.safetensors", overwrite=True)
    line = ["steer", "model", "the end", "--direction", "bundle.safetensors", "--max-new-tokens", 6, "--json"]
    for arguments, item in (([], bundle), (["--strength", 0.5], 0.5 * bundle)):
        told = json.loads(run(*line, *arguments).stdout)
        with rp.steer(lm, item):
            assert told["steered"] == lm.generate("the end", max_new_tokens=6)[0]
    assert "says itself" in run(*line, "--tokens", "all", code=2).output
    assert "says itself" in run(*line, "--ablate", code=2).output
    (made / "short.txt").write_text("the thing is on the land\n")
    costs = [
        "evaluate",
        "side-effects",
        "model",
        "--texts",
        "short.txt",
        "--data",
        "none",
        "--max-new-tokens",
        0,
        "--json",
    ]
    assert json.loads(run(*costs, "--direction", "bundle.safetensors").stdout)[0]["change"] > 0


def test_a_file_of_prompts_is_steered_like_its_prompts_one_by_one(run, made, folder):
    texts = ["the end", "and a thing is in it"] * 9  # more than run together
    (folder / "some.txt").write_text("\n\n".join(texts) + "\n")
    rows = [{"id": str(i), "text": text} for i, text in enumerate(texts)]
    (folder / "some.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = ["--direction", "d.safetensors", "--strength", 5, "--max-new-tokens", 4]
    rows = json.loads(run("steer", "model", "--prompts", "some.txt", *line, "--json").stdout)
    assert [row["prompt"] for row in rows] == texts
    for row in rows[:2]:
        alone = json.loads(run("steer", "model", row["prompt"], *line, "--json").stdout)
        assert {k: row[k] for k in ("unsteered", "steered")} == {k: alone[k] for k in ("unsteered", "steered")}
        assert [s["score"] for s in row["scores"]] == pytest.approx([s["score"] for s in alone["scores"]], abs=2e-3)
    assert json.loads(run("steer", "model", "--prompts", "some.jsonl", *line, "--json").stdout) == rows
    shown = run("steer", "model", "--prompts", "some.txt", *line).stdout
    assert shown.count("\nunsteered ") == len(texts)


def test_a_chat_is_steered_as_its_commands_say(run, made, monkeypatch):
    lm, d = rp.LanguageModel.load(made / "model"), rp.Direction.load(made / "d.safetensors")
    lm.tokenizer.chat_template = "{% for m in messages %}{{ m.content }};{% endfor %}"  # the context is short
    d = rp.Direction.from_vector(d.site, d.vector, scale=d.scale, offset=d.offset)
    d.save(made / "plain.safetensors", overwrite=True)
    monkeypatch.setattr("reprobe.cli.steer.load_model", lambda model, **options: lm)
    typed = ["the end", "", "/strength 9", "/off", "is it", "/on", "of a"]
    typed += ["/strength x", "/strength inf", "/jump", "/quit"]
    line = ["steer", "model", "--chat", "--direction", "plain.safetensors", "--max-new-tokens", 5]
    result = run(*line, input="\n".join([*typed, "never read"]))
    messages, want = [], []
    for said, strength in (("the end", 4), ("is it", 0), ("of a", 9)):
        messages.append({"role": "user", "content": said})
        with rp.steer(lm, rp.Add(d, strength)), lm.monitor(d) as monitor:
            text = lm.generate([messages], max_new_tokens=5)[0].strip()
        messages.append({"role": "assistant", "content": text})
        (reading,) = monitor.readings
        scores = reading.scores[0, reading.generated]
        want.append((text, [f"({s:+.1f})" for s in scores]))
    at = 0
    for text, scores in want:
        at = result.stdout.index(text, at)
        for score in scores:
            at = result.stdout.index(score, at)
    expected = ("steering is off", "steering is on, strength 9", "give a number", "no number to steer with", "no /jump")
    for told in expected:
        assert told in result.stderr
    assert "never read" not in result.output


def test_a_chat_without_a_template_continues_each_line_and_survives_one_that_is_too_long(run, made, monkeypatch):
    lm = rp.LanguageModel.load(made / "model")
    lm.tokenizer.chat_template = None  # the template is a part of the identity
    monkeypatch.setattr("reprobe.cli.steer.load_model", lambda model, **options: lm)
    line = ["steer", "model", "--chat", "--ablate", "--direction", "d.safetensors", "--allow-mismatch"]
    result = run(*line, "--max-new-tokens", 4, input="the " * 80 + "\nthe end")
    assert "no chat template" in result.stderr
    assert "PromptTooLong" in result.stderr
    with rp.steer(lm, rp.Ablate(rp.Direction.load(made / "d.safetensors")), allow_mismatch=True):
        assert lm.generate("the end", max_new_tokens=4)[0] in result.stdout


def test_export_writes_what_a_direction_adds_and_refuses_to_write_over(run, made):
    for file in ("v.gguf", "v.json"):
        (made / file).unlink(missing_ok=True)
    line = ["export", "d.safetensors", "--site", "resid.post@1", "--strength", 3, "--to"]
    assert "v.gguf" in run(*line, "v.gguf").stdout
    d = rp.Direction.load(made / "d.safetensors")
    (add,) = rp.read_control_vector(made / "v.gguf").interventions
    assert str(add.site) == "resid.post@1"
    assert add.step == pytest.approx(3 * d.step, rel=1e-6)
    assert "choose another name" in run(*line, "v.gguf", code=2).output
    run(*line, "v.gguf", "--overwrite", "--format", "repeng")
    run(*line, "v.json", "--format", "vllm-lens")
    assert json.loads((made / "v.json").read_text())["layer_indices"] == [1]


def test_what_is_pushed_can_be_pulled_bit_for_bit(run, made, tmp_path):
    for file in ("d.safetensors", "g.safetensors"):
        assert str(tmp_path / file[0]) in run("push", file, tmp_path / file[0]).stdout
        run("pull", tmp_path / file[0], "--to", tmp_path / file)
        assert (tmp_path / file).read_bytes() == (made / file).read_bytes()
    assert "overwrite" in run("push", "d.safetensors", tmp_path / "d", code=2).output
    run("push", "d.safetensors", tmp_path / "d", "--overwrite")
    assert "FetchFailed" in run("pull", "hf:someone/thing", "--to", tmp_path / "x", code=1).output


TUNE = ["steer", "tune", "model", "--direction", "d.safetensors", "--texts", "texts.txt", "--json", "--target-kl"]


def test_steer_tune_finds_the_strength_of_a_price(run, made, folder):
    (folder / "texts.txt").write_text("the thing is on the land\n\nand the end is in it\n")
    for away in ([], ["--away"]):
        told = json.loads(run(*TUNE, 0.02, *away, "--to-table", "tried.csv", "--overwrite").stdout)
        assert told["kl"] == pytest.approx(0.02, rel=0.05)
        assert (told["strength"] < 0) == bool(away)
        tried = (folder / "tried.csv").read_text().splitlines()
        assert tried[0] == "strength,kl"
        assert len(tried) - 1 == told["evaluations"] <= 8
    assert "TargetUnreachable" in run(*TUNE, 500, code=1).output


def test_multiple_choice_is_compared_with_and_without_a_direction(run, made, folder):
    rows = [
        {"id": f"{i}{a}", "text": a, "label": y, "group": str(i), "question": f"what {i}?", "answer": a}
        for i in range(3)
        for a, y in (("an ant", 1), ("the end", 0))
    ]
    (folder / "choices.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "primer.txt").write_text("Q: is it?\nA: it is.\n")
    line = ["evaluate", "truthfulqa", "model", "--data", "choices.jsonl", "--primer", "primer.txt", "--json"]
    plain = json.loads(run(*line, "--to-table", "mc.parquet").stdout)
    assert [row["metric"] for row in plain] == ["mc1", "mc2", "mc3"]
    assert pl.read_parquet(folder / "mc.parquet").height == 3
    both = json.loads(run(*line, "--direction", "d.safetensors", "--to-table", "mc.json", "--limit", 2).stdout)
    assert both[1]["steered"] != both[1]["unsteered"]
    assert both[1]["n"] == 2
    saved = json.loads((folder / "mc.json").read_text())
    assert saved["primer"] == "Q: is it?\nA: it is.\n"
    assert saved["table"][0].keys() >= {"question", "mc2", "mc2_steered"}
    assert "choose another name" in run(*line, "--to-table", "mc.json", code=2).output
    dola = json.loads(run(*line, "--dola", "0,1", "--to-table", "dola.json").stdout)
    assert [row["unsteered"] for row in dola] == [row["mean"] for row in plain]
    assert dola[1]["steered"] != dola[1]["unsteered"]
    assert json.loads((folder / "dola.json").read_text())["dola"]["layers"] == [0, 1]
    assert "a layer's number" in run(*line, "--dola", "middle", code=2).output
    assert "no premature layer" in run(*line, "--dola", "99", code=2).output


def test_side_effects_are_shown_and_saved(run, made, folder):
    (folder / "texts.txt").write_text("the thing is on the land\nand the end is in it\n")
    line = ["evaluate", "side-effects", "model", "--direction", "d.safetensors", "--texts", "texts.txt"]
    rows = json.loads(run(*line, "--data", "none", "--max-new-tokens", 3, "--to-table", "s.json", "--json").stdout)
    assert [row["measure"] for row in rows][:3] == ["kl", "cross-entropy", "perplexity"]
    assert rows[0]["change"] > 0
    assert json.loads((folder / "s.json").read_text())["interventions"][0].endswith(", strength 4")
    assert [g["prompt"] for g in json.loads((folder / "s.json").read_text())["generations"]] == ["the", "and"]
    assert "perplexity" in run(*line, "--data", "none", "--max-new-tokens", 0).stdout


def test_a_report_is_drawn_from_a_folder_of_results(run, made, tmp_path):
    page, grid = (tmp_path / "page.html").resolve(), tmp_path / "probes" / "mine.safetensors"
    shutil.copytree(made / "s.reprobe", tmp_path / "s.reprobe")
    shutil.copy(made / "prompts.jsonl", tmp_path)
    grid.parent.mkdir()
    grid.write_bytes((made / "g.safetensors").read_bytes())
    assert str(page) in run("report", tmp_path, "--to", page).stdout
    text = page.read_text()
    assert "<svg" in text
    assert rp.ActivationStore.open(made / "s.reprobe").manifest.prompts[:8] in text
    grid.write_bytes((made / "g.safetensors").read_bytes()[:-1])
    told = run("report", tmp_path, "--to", page).stderr
    assert "probes/mine.safetensors is damaged and not in the report" in told
    assert "prompts.jsonl" in told
    assert "probes/mine.safetensors" in page.read_text()


def test_the_list_of_data_sets_names_all_eight(run):
    names = {row["name"] for row in json.loads(run("data", "list", "--json").stdout)}
    assert names == {
        "cities", "comparisons", "emotions", "facts", "honesty", "misconceptions", "negations", "translations",
    }  # fmt: skip


def test_resume_goes_on_and_overwrite_begins_anew(run, made):
    run("extract", "model", "prompts.jsonl", "--to", "again.reprobe")
    run("extract", "model", "prompts.jsonl", "--to", "again.reprobe", "--resume")
    assert (
        "IdentityMismatch"
        in run("extract", "model", "prompts.jsonl", "--to", "again.reprobe", "--resume", "--at", "mean", code=2).output
    )
    run("extract", "model", "prompts.jsonl", "--to", "again.reprobe", "--overwrite", "--at", "mean")


def as_a_user(arguments, stderr):
    """The command line as the whole of a process, whose errors go to a file."""
    os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT), 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["reprobe", *map(str, arguments)]
    main()


def test_ctrl_c_keeps_what_is_written_and_says_how_to_go_on(server, folder, tmp_path):
    rows = [{"id": f"p{i}", "text": f"thing number {i} of the lot", "label": i % 2} for i in range(200)]
    (tmp_path / "many.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    arguments = ["extract", folder / "model", tmp_path / "many.jsonl", "--to", tmp_path / "s.reprobe", "--at", "all",
                 "--shard-rows", 64, "--batch-tokens", 64]  # fmt: skip
    commits = tmp_path / "s.reprobe" / "commits"
    child = server.Process(target=as_a_user, args=(arguments, tmp_path / "stderr"))
    child.start()
    while not (commits.exists() and any(commits.glob("0*.json"))):
        assert child.is_alive()
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGINT)
    child.join(timeout=60)
    said = (tmp_path / "stderr").read_text()
    assert child.exitcode == 130, said
    assert "--resume" in said
    assert "Traceback" not in said
    store = rp.ActivationStore.open(tmp_path / "s.reprobe")
    assert len(store.committed) > 0
    assert not store.complete
    called(*arguments, "--resume")
    assert rp.ActivationStore.open(tmp_path / "s.reprobe").verify().ok
