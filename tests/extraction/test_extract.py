"""What is in a store is what the stock model computes, one prompt at a time."""

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import CONTEXT, FAMILIES

import reprobe as rp
from reprobe.errors import (
    ArtifactExists,
    DataError,
    IdentityMismatch,
    PromptTooLong,
    UnknownSite,
    UsageError,
)
from reprobe.extraction import Share, prepare
from reprobe.extraction.calibration import CANDIDATES, token_budget
from reprobe.model.packs import BUDGET

TEXTS = ["the cat is on the mat", "a dog", "in the end and on the other hand of it", "an owl is here", "the"]
SPANS = [{"who": (4, 7)}, {"who": (2, 5)}, {"who": (7, 10)}, {"who": (3, 6)}, {"who": (0, 3)}]
POSITIONS = [
    "last",
    "all",
    "mean",
    "index:0",
    "index:-1",
    "span:who:last",
    "span:who:first",
    "span:who:mean",
    "span:who:all",
    "span:text:mean",
]


def prompts(texts=TEXTS, spans=SPANS):
    rows = [
        {"id": f"p{i}", "text": t, "label": i % 2, "group": f"g{i}", "spans": s}
        for i, (t, s) in enumerate(zip(texts, spans, strict=True))
    ]
    return rp.PromptSet.from_records(rows)


def stock(lm, text, sites):
    """Activations of one unpadded prompt, by the model's own `output_hidden_states` or by a plain hook."""
    coded = lm.tokenizer(text, return_tensors="pt", return_offsets_mapping=True)
    offsets = coded.pop("offset_mapping")[0]
    found, handles = {}, []
    for site in sites:
        if site.part in ("attn.heads", "mlp.neurons"):
            tap = lm.architecture.tap(lm.net, site)

            def keep(module, args, site=site):
                found[site] = args[0]

            handles.append(tap.module.register_forward_pre_hook(keep))
    with torch.no_grad():
        ids = coded["input_ids"]
        mask = torch.ones_like(ids)
        states = lm.net.base_model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
    for handle in handles:
        handle.remove()
    for site in sites:
        if site.part == "resid.pre":
            found[site] = states[site.layer]
        elif site.part == "resid.post":
            assert site.layer < lm.n_layers - 1, "the last one is only there after the norm"
            found[site] = states[site.layer + 1]
        elif site.part == "final":
            found[site] = states[-1]
    return {s: found[s].reshape(ids.shape[1], -1).float() for s in sites}, offsets


def wanted(rows, offsets, at, spans):
    """The rows of one prompt at a position, worked out from offsets alone."""
    kind, *rest = at.split(":")
    if kind == "last":
        return rows[-1:]
    if kind == "all":
        return rows
    if kind == "mean":
        return rows.mean(0, keepdim=True)
    if kind == "index":
        return rows[int(rest[0])][None]
    begin, end = spans[rest[0]]
    inside = [i for i, (a, b) in enumerate(offsets.tolist()) if a < end and b > begin and b > a]
    chosen = rows[inside]
    return {"last": chosen[-1:], "first": chosen[:1], "mean": chosen.mean(0, keepdim=True), "all": chosen}[rest[1]]


def worst(store, lm, data, at, sites):
    """The worst relative difference between a store and the stock model."""
    off = 0.0
    for id_, text, spans in zip(data.ids, data.texts, data.frame["spans"], strict=True):
        named = {s["name"]: (s["start"], s["end"]) for s in spans} | {"text": (0, len(text))}
        values, offsets = stock(lm, text, sites)
        rows = store.index.filter(pl.col("prompt") == id_)["row"].to_numpy()
        for site in sites:
            want = wanted(values[site], offsets, at, named)
            got = store.read(site, rows).float()
            assert got.shape == want.shape
            off = max(off, float((got - want).abs().max() / want.abs().max()))
    return off


def sites_of(lm):
    last = lm.n_layers - 1
    names = ["resid.pre@0", f"resid.pre@{last}", "resid.post@0", "attn.heads@1", "final"]
    names += ["mlp.neurons@1"] if "mlp.neurons" in lm.parts.of_layer[1] else []
    return [rp.Site.parse(n) for n in names]


#: Every position on three unlike families; on each other family one kind that reads all tokens and one that pools.
CASES = [(name, at) for name in ("llama", "opt", "bert") for at in POSITIONS]
CASES += [(name, at) for name in FAMILIES if name not in ("llama", "opt", "bert") for at in ("all", "span:who:mean")]


@pytest.mark.parametrize(("name", "at"), CASES)
def test_a_store_holds_what_the_stock_model_computes(tiny_lm, tmp_path, name, at):
    lm = tiny_lm(name)
    sites = sites_of(lm)
    store = rp.extract(lm, prompts(), sites=sites, at=at, to=tmp_path / "s.reprobe", batch_tokens=40, shard_rows=3)
    assert store.complete
    assert worst(store, lm, prompts(), at, sites) < 1e-5


@pytest.mark.models
@pytest.mark.parametrize("name", ["smollm2-135m", "gemma3-270m"])
def test_a_store_of_a_real_model_holds_what_the_stock_model_computes(real_lm, tmp_path, name):
    lm = real_lm(name)
    data = prompts(
        [
            "The Eiffel Tower is in the city of Paris.",
            "Rome",
            "Nobody in the room expected the answer to be so short.",
            "Two birds sat on the wire above the old station.",
        ],
        [{"who": (4, 16)}, {"who": (0, 4)}, {"who": (0, 6)}, {"who": (4, 9)}],
    )
    sites = [rp.Site.parse(s) for s in ("resid.pre@0", "resid.post@3", "attn.heads@7", "mlp.neurons@2", "final")]
    for i, at in enumerate(("all", "span:who:mean")):  # every token, and a mean; tiny models have every position
        store = rp.extract(lm, data, sites=sites, at=at, to=tmp_path / f"{i}.reprobe", batch_tokens=40)
        assert worst(store, lm, data, at, sites) < 1e-5, at


@settings(deadline=None, max_examples=6)
@given(budget=st.integers(1, 120), shard_rows=st.integers(1, 30))
def test_packs_and_shards_never_change_a_row(tiny_lm, tmp_path_factory, budget, shard_rows):
    lm = tiny_lm("gemma3_text")
    folder = tmp_path_factory.mktemp("packs")
    options = {"sites": "resid.post@*,attn.heads@*", "at": "all"}
    a = rp.extract(lm, prompts(), to=folder / "a", batch_tokens=budget, shard_rows=shard_rows, **options)
    b = rp.extract(lm, prompts(), to=folder / "b", **options)
    order = [store.index.sort("prompt", "position")["row"].to_numpy() for store in (a, b)]
    for site in a.sites:
        one, other = a.read(site, order[0]), b.read(site, order[1])
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-5 * float(other.abs().max()))


def test_the_index_says_which_prompt_and_token_each_row_is(tiny_lm, tmp_path):
    lm = tiny_lm("llama")
    data = prompts()
    store = rp.extract(lm, data, at="all", to=tmp_path / "s")
    for row in store.index.to_dicts():
        i = data.ids.index(row["prompt"])
        ids = lm.tokenizer(TEXTS[i])["input_ids"]
        assert row["token"] == ids[row["position"]]
        assert (row["label"], row["group"], row["n_tokens"]) == (i % 2, f"g{i}", len(ids))
    assert len(store.index) == sum(len(lm.tokenizer(t)["input_ids"]) for t in TEXTS)


def test_a_store_in_bfloat16_is_the_rounding_of_the_float32_store(tiny_lm, tmp_path):
    lm = tiny_lm("llama")
    full = rp.extract(lm, prompts(), to=tmp_path / "full")
    half = rp.extract(lm, prompts(), to=tmp_path / "half", dtype="bfloat16")
    assert half.read("resid.post@1").dtype == torch.bfloat16
    assert torch.equal(half.read("resid.post@1"), full.read("resid.post@1").bfloat16())


def test_messages_are_read_through_the_template(tiny_lm, tmp_path):
    lm = tiny_lm("llama")
    chat = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "is on the mat"}]
    data = rp.PromptSet.from_records([{"id": "c", "messages": chat, "spans": {"where": (6, 13)}}])
    store = rp.extract(lm, data, at="span:where:all", to=tmp_path / "s")
    text = lm.tokenizer.apply_chat_template(chat, tokenize=False)
    ids = lm.tokenizer(text, add_special_tokens=False)["input_ids"]
    tokens = [ids[p] for p in store.index["position"]]
    assert "the mat" in lm.tokenizer.decode(tokens)
    assert store.index["n_tokens"][0] == len(ids)


def test_a_finished_store_is_left_alone_by_resume_and_replaced_by_overwrite(tiny_lm, tmp_path):
    lm = tiny_lm("llama")
    path = tmp_path / "s"
    rp.extract(lm, prompts(), to=path)
    with pytest.raises(ArtifactExists, match="--resume"):
        rp.extract(lm, prompts(), to=path)
    before = {p: p.stat().st_mtime_ns for p in path.rglob("*") if p.is_file()}
    rp.extract(lm, prompts(), to=path, resume=True)
    assert {p: p.stat().st_mtime_ns for p in path.rglob("*") if p.is_file()} == before
    rp.extract(lm, prompts(), to=path, at="mean", overwrite=True)
    assert rp.ActivationStore.open(path).manifest.plan["at"] == "mean"


@pytest.mark.parametrize(
    "change", [{"at": "mean"}, {"batch_tokens": 7}, {"dtype": "float16"}, {"sites": "resid.pre@*"}, {"shard_rows": 2}]
)
def test_a_store_of_another_plan_is_never_resumed(tiny_lm, tmp_path, change):
    lm = tiny_lm("llama")
    rp.extract(lm, prompts(), to=tmp_path / "s")
    with pytest.raises(IdentityMismatch):
        rp.extract(lm, prompts(), to=tmp_path / "s", resume=True, **change)


def test_a_store_of_another_model_is_never_resumed(tiny_lm, tmp_path):
    rp.extract(tiny_lm("llama"), prompts(), sites="resid.post@0", to=tmp_path / "s")
    with pytest.raises(IdentityMismatch, match="architecture"):
        rp.extract(tiny_lm("gemma"), prompts(), sites="resid.post@0", to=tmp_path / "s", resume=True)


def test_bad_input_is_refused_with_what_exists(tiny_lm, tmp_path):
    lm = tiny_lm("llama")
    to = tmp_path / "s"
    with pytest.raises(UnknownSite, match="blocks 0–2"):
        rp.extract(lm, prompts(), sites="mlp.out@32", to=to)
    with pytest.raises(UsageError, match=r"attn\.heads@12\.3"):
        rp.extract(lm, prompts(), sites="attn.heads@1.2", to=to)
    with pytest.raises(UsageError, match="float32, float16, bfloat16"):
        rp.extract(lm, prompts(), dtype="int8", to=to)
    with pytest.raises(UsageError, match="span:NAME"):
        rp.extract(lm, prompts(), at="somewhere", to=to)
    with pytest.raises(DataError, match="who"):
        rp.extract(lm, prompts(), at="span:whom:last", to=to)
    with pytest.raises(UsageError, match="budget"):
        rp.extract(lm, prompts(), batch_tokens=0, to=to)
    with pytest.raises(UsageError, match="forest, padded, single"):
        rp.extract(lm, prompts(), pack="woods", to=to)
    with pytest.raises(UsageError, match="shard_rows is 0"):
        rp.extract(lm, prompts(), shard_rows=0, to=to)
    with pytest.raises(UsageError, match="zarr, hdf5"):
        rp.extract(lm, prompts(), format="npz", to=to)
    with pytest.raises(UsageError, match="zstd"):
        rp.extract(lm, prompts(), compression="gzip", to=to)
    assert not to.exists()


def test_a_steered_models_activations_never_pass_for_the_plain_models(tiny_lm, tmp_path):
    lm = tiny_lm("llama")
    d = rp.Direction.from_vector("resid.post@1", np.ones(lm.d_model))
    with rp.steer(lm, rp.Add(d)), pytest.raises(UsageError, match="being steered"):
        rp.extract(lm, prompts(), to=tmp_path / "s")
    assert rp.extract(lm, prompts(), to=tmp_path / "s").complete


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_long_prompt_is_refused_unless_a_side_is_named(tiny_lm, tmp_path, side):
    lm = tiny_lm("llama")
    long = prompts(["z" * CONTEXT + "end"], [{}])
    with pytest.raises(PromptTooLong, match="--truncate"):
        rp.extract(lm, long, to=tmp_path / "s")
    store = rp.extract(lm, long, to=tmp_path / "s", truncate=side, at="all")
    tokens = store.index["token"].to_list()
    assert len(tokens) == CONTEXT
    assert tokens[0] == lm.tokenizer.bos_token_id
    assert lm.tokenizer.decode(tokens[1:]).endswith("end") == (side == "left")


def test_the_size_on_disk_is_known_before_anything_runs(tiny_lm, tmp_path):
    job = prepare(tiny_lm("llama"), prompts(), sites="resid.post@*", at="all", shard_rows=4)
    store = job.run(tmp_path / "s")
    shards = [p for p in (tmp_path / "s").rglob("*") if p.is_file() and p.name.startswith("c.")]
    assert sum(p.stat().st_size for p in shards) == job.n_bytes
    assert job.rows == store.rows


def measuring(monkeypatch, budget):
    monkeypatch.setattr("reprobe.extraction.run.token_budget", lambda lm, n_tokens: budget)


def test_resuming_takes_the_budget_that_was_measured_when_the_store_was_begun(tiny_lm, tmp_path, monkeypatch):
    lm = tiny_lm("llama")
    measuring(monkeypatch, 64)
    rp.extract(lm, prompts(), to=tmp_path / "whole", at="all", shard_rows=4)
    job = prepare(lm, prompts(), at="all", shard_rows=4)
    job.run(tmp_path / "s", own=range(2))
    measuring(monkeypatch, 32)
    store = rp.extract(lm, prompts(), to=tmp_path / "s", at="all", shard_rows=4, resume=True)
    assert store.complete
    assert store.manifest.plan["batch_tokens"] == 64
    assert store.manifest.digest == rp.ActivationStore.open(tmp_path / "whole").manifest.digest
    with pytest.raises(IdentityMismatch, match="batch_tokens"):
        rp.extract(lm, prompts(), to=tmp_path / "s", at="all", shard_rows=4, resume=True, batch_tokens=32)


def test_of_processes_that_measure_differently_all_take_the_budget_of_the_first(tiny_lm, tmp_path, monkeypatch):
    lm = tiny_lm("llama")
    jobs = []
    for budget in (64, 32):
        measuring(monkeypatch, budget)
        jobs.append(prepare(lm, prompts(), at="all", shard_rows=4))  # before either has begun the store
    for rank, job in enumerate(jobs):
        job.run(tmp_path / "s", own=job.own(Share(rank, 2)))
    store = rp.ActivationStore.open(tmp_path / "s")
    assert store.complete
    assert store.manifest.plan["batch_tokens"] == 64


def test_a_budget_is_measured_once_and_only_for_long_runs(tiny_lm):
    lm = tiny_lm("gpt2")
    passes = []
    handle = lm.net.transformer.h[0].register_forward_hook(lambda *_: passes.append(1))
    try:
        assert token_budget(lm, 1000) == BUDGET["cpu"]
        assert not passes
        found = token_budget(lm, 10**6)
        assert found in CANDIDATES["cpu"]
        n = len(passes)
        assert n > 0
        assert token_budget(lm, 10**7) == found
        assert len(passes) == n
    finally:
        handle.remove()


def test_a_dry_run_says_what_a_run_then_takes(tiny_lm, tmp_path):
    job = prepare(tiny_lm("llama"), prompts([f"the cat is on the mat {i}" for i in range(30)], [{}] * 30), at="all")
    told = job.numbers()
    store = job.run(tmp_path / "s")
    assert told["tokens"] == store.rows
    assert told["tokens_computed"] + told["tokens_saved"] == told["tokens"]
    assert told["tokens_saved"] > 0.5 * told["tokens"]
    assert told["places"] >= told["tokens_computed"]
    assert told["rows"] == store.rows
    assert told["bytes"] == sum(p.stat().st_size for p in (tmp_path / "s").rglob("c.*"))
    assert told["seconds"] > 0


@pytest.mark.parametrize(("kind", "compression"), [("hdf5", None), ("hdf5", "zstd"), ("zarr", "zstd")])
def test_every_format_holds_the_same_rows(tiny_lm, tmp_path, kind, compression):
    lm = tiny_lm("gemma3_text")
    plain = rp.extract(lm, prompts(), to=tmp_path / "plain", at="all", dtype="bfloat16")
    other = rp.extract(
        lm, prompts(), to=tmp_path / "other", at="all", dtype="bfloat16", format=kind, compression=compression
    )
    for site in plain.sites:
        assert torch.equal(plain.read(site).view(torch.int16), other.read(site).view(torch.int16))
    assert plain.index.equals(other.index)
    assert other.verify().ok


def test_the_tokens_of_a_store_are_those_of_its_prompts(tiny_lm, tmp_path):
    lm = tiny_lm("llama")
    store = rp.extract(lm, prompts(), to=tmp_path / "s")
    for prompt, tokens in store.tokens.iter_rows():
        assert tokens == lm.tokenizer(TEXTS[int(prompt[1:])])["input_ids"]
