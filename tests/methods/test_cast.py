"""CAST: the best gate by trying every threshold, and a behaviour on the prompts that open it alone."""

import numpy as np
import polars as pl
import pytest
import torch
from control.reference import states
from methods.plain import same_run, sequence, steered
from probing.memory import make_store

import reprobe as rp
from reprobe.errors import IdentityMismatch, UsageError
from reprobe.methods import cast

MEETING = ["the cat is in the end", "the sea is on the mat", "the owl is in the sea", "the old man"]
OTHERS = ["a dog and a fox", "an owl of iron", "on and on", "in a mat", "cold or old"]
PROMPTS = [*MEETING, *OTHERS]


def directions(lm, seed=0):
    rng = np.random.default_rng(seed)
    return {s: rp.Direction.from_vector(s, rng.normal(size=lm.d_model)) for s in lm.sites("resid.post@0, resid.post@1")}


def extracted(lm, path, at="mean"):
    records = [{"text": text, "label": int(i < len(MEETING))} for i, text in enumerate(PROMPTS)]
    return rp.extract(lm, rp.PromptSet.from_records(records), to=path, sites="resid.post@*", at=at)


def measures(lm, site, v, at="mean"):
    """cos(h̄, proj_v h̄) of each prompt, written out."""
    out = []
    for prompt in PROMPTS:
        h = states(lm, sequence(lm, prompt), site).numpy()
        mean = h.mean(0) if at == "mean" else h[-1]
        projected = np.outer(v, v) @ mean / (v @ v)
        out.append(mean @ projected / np.linalg.norm(mean) / np.linalg.norm(projected))
    return np.array(out)


def f1(opened):
    meets = np.arange(len(PROMPTS)) < len(MEETING)
    return 2 * (opened & meets).sum() / (opened.sum() + meets.sum())


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
@pytest.mark.parametrize("at", ["mean", "last"])
def test_no_layer_threshold_or_side_has_a_higher_f1(family, at, tiny_lm, tmp_path):
    lm = tiny_lm(family)
    found = cast.search(extracted(lm, tmp_path / "s", at), directions(lm))
    tried = {}
    for site, d in directions(lm).items():
        values = measures(lm, site, d.vector, at)
        for limit in np.linspace(0, 1, 2001):
            for side, opened in (("above", values > limit), ("below", values < limit)):
                if 0 < opened.sum() < len(PROMPTS):  # one that is always open is no condition
                    tried[str(site), side] = max(tried.get((str(site), side), 0), f1(opened))
    for row in found.table.iter_rows(named=True):
        values = measures(lm, rp.Site.parse(row["site"]), directions(lm)[rp.Site.parse(row["site"])].vector, at)
        opened = values > row["threshold"] if row["side"] == "above" else values < row["threshold"]
        assert row["f1"] == pytest.approx(f1(opened))
        assert row["f1"] >= tried[row["site"], row["side"]] - 1e-9
        assert row["true_rate"] == pytest.approx(opened[: len(MEETING)].mean())
        assert row["false_rate"] == pytest.approx(opened[len(MEETING) :].mean())
    assert found.table["f1"].is_sorted(descending=True)
    assert (str(found.when.site), str(found.when.over)) == (found.table["site"][0], {"mean": "prompt"}.get(at, at))


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
def test_only_prompts_that_open_the_gate_are_steered_for_all_of_their_run(family, tiny_lm, tmp_path):
    lm, behaviour_site = tiny_lm(family), rp.Site("resid.post", 2)
    store = extracted(lm, tmp_path / "s")
    v = np.random.default_rng(5).normal(size=lm.d_model)
    behaviour = rp.Steering(rp.Add(rp.Direction.from_vector(behaviour_site, v), 2.0), provenance={"by": "hand"})
    made = cast.fit(store, directions(lm), behaviour)
    when = made.interventions[0].when
    values = measures(lm, when.site, when.direction.vector)
    opened = values > when.above if when.above is not None else values < when.below
    assert 0 < opened.sum() < len(PROMPTS)
    edit = [(behaviour_site, "all", None, lambda h, s: h + 2.0 * torch.tensor(v))]
    same_run(lm, steered(lm, made, PROMPTS, 3), PROMPTS, lambda i: edit if opened[i] else [], 3)
    with rp.steer(lm, made) as done:
        lm.logits(PROMPTS)
    assert done[0].rows == opened.sum()
    rates = cast.rates(store, when)
    assert (rates.true, rates.false) == (opened[: len(MEETING)].mean(), opened[len(MEETING) :].mean())
    assert rates.f1 == pytest.approx(made.provenance["f1"])
    back = rp.Steering.load(made.save(tmp_path / "cast.safetensors"))
    assert torch.equal(steered(lm, back, PROMPTS, 2)[0][1], steered(lm, made, PROMPTS, 2)[0][1])
    assert back.provenance["behaviour"] == {"by": "hand"}


def test_a_planted_condition_is_found_with_its_side_and_holds_on_other_prompts():
    rng = np.random.default_rng(0)
    y = np.arange(80) % 2
    rows = {f"resid.post@{k}": rng.normal(size=(80, 12)) for k in range(3)}
    rows["resid.post@1"][:, 2] += np.where(y == 1, 0.0, 15.0)  # those that meet it are away from the direction
    store = make_store(rows, y)
    each = {s: rp.Direction.from_vector(s, np.eye(12)[2]) for s in store.sites}
    found = cast.search(store, each, where=pl.col("row") < 40)
    assert found.when.above is None
    assert str(found.when.site) == "resid.post@1"
    assert found.table["f1"][0] > 0.95
    assert cast.rates(store, found.when, where=pl.col("row") >= 40).f1 > 0.9
    turned = cast.search(store, each, positive=0, where=pl.col("row") < 40)
    assert turned.when.below is None
    assert turned.when.above == found.when.below
    for measure in ("score", "cosine"):
        assert str(cast.search(store, each, measure=measure).when.site) == "resid.post@1"


def test_conditions_that_cannot_be_are_refused(tiny_lm, tmp_path):
    lm = tiny_lm("llama")
    store = extracted(lm, tmp_path / "s")
    act = rp.Add(rp.Direction.from_vector("attn.out@0", np.ones(lm.d_model)))
    with pytest.raises(UsageError, match=r"acts from attn.out@0 on, and no condition direction"):
        cast.fit(store, directions(lm), act)
    with pytest.raises(UsageError, match="without gates of their own"):
        cast.fit(store, directions(lm), [])
    every = extracted(lm, tmp_path / "all", "all")
    with pytest.raises(UsageError, match=r"read at 'all'; .*at='mean'"):
        cast.search(every, directions(lm))
    with pytest.raises(UsageError, match="read at 'mean'"):
        cast.rates(store, rp.When(directions(lm)[rp.Site.parse("resid.post@0")], above=0.1, over="last"))
    other = tiny_lm("qwen3").identity
    with pytest.raises(IdentityMismatch):
        cast.search(store, {s: d.at(s, {"identity": other.to_json()}) for s, d in directions(lm).items()})
    flat = make_store({"resid.post@1": np.ones((4, 3))}, [0, 1, 0, 1])
    with pytest.raises(UsageError, match="no threshold parts them"):
        cast.search(flat, {rp.Site.parse("resid.post@1"): rp.Direction.from_vector("resid.post@1", np.ones(3))})
