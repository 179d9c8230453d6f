"""Forest, padded and single packs give the same rows, on every family, for any prompts, positions and sites."""

from pathlib import Path

import numpy as np
import pytest
import torch
from folders import scratch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import DECODERS, FAMILIES, tiny_model, tiny_net, tiny_tokenizer

import reprobe as rp
from reprobe.extraction import prepare
from reprobe.model.language_model import LanguageModel
from reprobe.model.sites import LAYER_PARTS, MODEL_PARTS

PACKS = ("forest", "padded", "single")
#: Families whose blocks mix tokens by more than the mask and position_ids, or where tokens see later ones.
NO_FOREST = {"bloom", "falcon.alibi", "bert", "roberta", "modernbert"}
WORDS = ("the", " cat", " is", " on", " a", " mat", " and", " in", " the end", "!")
#: Few words, so that prompts share beginnings; up to about 40 tokens, far beyond the tiny models' windows of 5.
TEXTS = st.lists(st.lists(st.sampled_from(WORDS), min_size=1, max_size=14).map("".join), min_size=1, max_size=9)


def worst(lm, texts, *, at, sites, budget, folder):
    """The worst relative difference of a row between the packings."""
    data = rp.PromptSet.from_records({"id": str(i), "text": t} for i, t in enumerate(texts))
    stores = [rp.extract(lm, data, sites=sites, at=at, pack=p, batch_tokens=budget, to=Path(folder) / p) for p in PACKS]
    order = [
        s.index.with_columns(p=s.index["prompt"].cast(int)).sort("p", "position")["row"].to_numpy() for s in stores
    ]
    off = 0.0
    for site in stores[0].sites:
        rows = [store.read(site, o).double() for store, o in zip(stores, order, strict=True)]
        off = max(off, *(float((r - rows[2]).abs().max() / rows[2].abs().max()) for r in rows[:2]))
    return off


def every_part(lm):
    return [*MODEL_PARTS, *(f"{p}@*" for p in LAYER_PARTS if any(p in have for have in lm.parts.of_layer))]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_packing_never_changes_a_row(tiny_lm, name):
    lm = tiny_lm(name)
    sites = every_part(lm)

    @settings(deadline=None, max_examples=3, database=None)
    @given(texts=TEXTS, at=st.sampled_from(["last", "all", "mean", "index:0"]), budget=st.integers(20, 300))
    def check(texts, at, budget):
        with scratch() as folder:
            assert worst(lm, texts, at=at, sites=sites, budget=budget, folder=folder) < 1e-5

    check()


@pytest.mark.models
@pytest.mark.parametrize("name", ["smollm2-135m", "gemma3-270m"])
def test_the_packing_never_changes_a_row_of_a_real_model(real_lm, tmp_path, name):
    lm = real_lm(name)
    data = rp.PromptSet.load("cities")
    # Short texts that share beginnings, and two beyond the 512 tokens that Gemma's sliding blocks see back.
    long = " ".join(data.texts[: 51 if name.startswith("gemma") else 10])
    texts = [*data.texts[:8], long, long[:-40] + " the end."]
    window = getattr(lm.net.config, "sliding_window", 0)
    assert all(len(ids) > window for ids in lm.tokenizer(texts[-2:]).input_ids)
    sites = "resid.post@*,attn.heads@3,mlp.neurons@5,final"
    assert worst(lm, texts, at="all", sites=sites, budget=512, folder=tmp_path) < 1e-5


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "qwen2", "opt", "mixtral"])
def test_in_bfloat16_the_packings_differ_by_rounding_alone(tmp_path, name):
    lm = tiny_model(name, dtype=torch.bfloat16)
    full = tiny_model(name)
    texts = ["the cat is on the mat", "the cat is on the end", "the cat", "a cat is on the mat and in the end"]
    off = worst(lm, texts, at="all", sites="resid.post@*", budget=99, folder=tmp_path / "half")
    assert off < 2 * 2**-7 * len(lm.parts.of_layer), "a few roundings of 8 bits, one or two per block"
    data = rp.PromptSet.from_records({"id": str(i), "text": t} for i, t in enumerate(texts))
    stored = rp.ActivationStore.open(tmp_path / "half" / "forest")
    assert stored.manifest.dtype == "bfloat16"
    exact = rp.extract(full, data, at="all", batch_tokens=99, to=tmp_path / "full")
    for site in exact.sites:
        difference = (stored.read(site).float() - exact.read(site)).norm() / exact.read(site).norm()
        assert difference < 0.03


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_shares_beginnings_unless_its_row_says_that_it_cannot(tiny_lm, name):
    lm = tiny_lm(name)
    data = rp.PromptSet.from_records({"id": str(i), "text": f"the cat is on the mat {i}"} for i in range(9))
    job = prepare(lm, data, pack="forest")
    assert job.plan.packing == ("padded" if name in NO_FOREST else "forest")
    assert (job.n_computed < 0.6 * job.n_tokens) == (name not in NO_FOREST)
    assert prepare(lm, data, pack="padded").n_computed == job.n_tokens


def test_an_attention_that_takes_no_prepared_mask_falls_back(tmp_path):
    net = tiny_net("llama")
    net.config._attn_implementation = "flash_attention_2"
    lm = LanguageModel(net, tiny_tokenizer(), name="tiny")
    assert prepare(lm, rp.PromptSet.from_records([{"id": "a", "text": "a"}])).plan.packing == "padded"


@pytest.mark.parametrize("name", [n for n in DECODERS if n not in NO_FOREST])
def test_the_masks_hold_with_eager_attention_too(tmp_path, name):
    net = tiny_net(name)
    net.set_attn_implementation("eager")
    lm = LanguageModel(net, tiny_tokenizer(), name=name)
    texts = ["the cat is on the mat", "the cat is on the end", "the cat", "a cat is on the mat and in the end"]
    assert worst(lm, texts, at="all", sites="resid.post@*", budget=99, folder=tmp_path) < 1e-5


def test_rotary_frequencies_chosen_by_the_longest_position_never_meet_shorter_prompts(tmp_path):
    width = tiny_net("phi3").config.head_dim if hasattr(tiny_net("phi3").config, "head_dim") else 4
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * (width // 2),
        "long_factor": [4.0] * (width // 2),
        "original_max_position_embeddings": 12,
        "factor": 4.0,
    }
    lm = tiny_model("phi3", rope_parameters=rope)
    texts = ["the cat is on", "the cat is on the mat and in the end of it", "the cat is", "a mat"]
    lengths = [len(lm.tokenizer(t)["input_ids"]) for t in texts]
    assert min(lengths) <= 12 < max(lengths)
    assert worst(lm, texts, at="all", sites="resid.post@*", budget=300, folder=tmp_path) < 1e-5


def test_scores_of_continuations_do_not_depend_on_how_they_run(tiny_lm):
    """Steered and not, in one pass of shared beginnings or one text at a time."""
    for name in ("llama", "gemma3_text", "bloom", "opt"):
        lm = tiny_lm(name)
        prompts = ["the cat", "the cat is on", "the cat", "a"]
        continuations = [
            [" is on the mat", " is", " and"],
            [" the mat", " the end", " the end of it"],
            [" is on"],
            ["!"],
        ]
        d = rp.Direction.from_vector("resid.post@1", np.random.default_rng(0).normal(size=lm.d_model), scale=2.0)
        for tokens in (None, "all", "prompt", "generated", "last"):
            items = [] if tokens is None else [rp.Add(d, 3.0, tokens=tokens)]
            with rp.steer(lm, *items):
                together = lm.logprobs(prompts, continuations)
                apart = [
                    np.asarray([lm.logprobs(p, [c])[0][0] for c in cs])
                    for p, cs in zip(prompts, continuations, strict=True)
                ]
            for one, other in zip(together, apart, strict=True):
                assert np.allclose(one, other, rtol=1e-5, atol=1e-5), (name, tokens)
