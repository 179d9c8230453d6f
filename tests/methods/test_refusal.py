"""Directional ablation: candidates, their trial and the rule, worked out once more by plain hooks."""

import numpy as np
import polars as pl
import pytest
import torch
from control.reference import logits, states
from methods.plain import near, same_run, sequence, steered

import reprobe as rp
from reprobe.errors import IdentityMismatch, UsageError
from reprobe.methods import refusal

CALLING = ["the cat is in", "the end is on", "the old man is in", "the sea is", "the owl is the"]
OTHERS = ["a dog and", "an owl of", "on a mat and a", "in a sea of a", "on and on a"]
SHOWN = refusal.NextToken((" the", "a"))


def ablated(lm, r):
    """Edits that take r out at every block's input, attention output and MLP output."""
    return [
        (rp.Site(part, layer), "all", None, lambda h, s: h - (h @ r)[:, None] * r)
        for layer in range(lm.n_layers)
        for part in ("resid.pre", "attn.out", "mlp.out")
    ]


def last(lm, prompt, edits=()):
    return logits(lm, sequence(lm, prompt), *edits)[-1].double().log_softmax(-1)


def shown(lm, logp):
    p = logp.exp()[SHOWN.ids(lm)].sum()
    return float(p.log() - (1 - p).log())


def trial(prompts, seed=0):
    """Numbers of the prompts that are held out: a fifth."""
    return set(np.random.default_rng(seed).permutation(len(prompts))[: round(0.2 * len(prompts))].tolist())


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_neox"])
def test_every_candidate_is_the_mean_difference_and_is_tried_on_what_was_held_out(family, tiny_lm):
    lm = tiny_lm(family)
    found = refusal.search(lm, CALLING, OTHERS, SHOWN, positions=(-2, -1), layers=range(3), batch=3)
    assert found.table.select("layer", "position").rows() == [(k, p) for k in range(3) for p in (-2, -1)]
    kept, held = (
        [[p for i, p in enumerate(side) if (i in trial(side)) is out] for side in (CALLING, OTHERS)]
        for out in (False, True)
    )
    for row in found.table.iter_rows(named=True):
        site, at = rp.Site("resid.pre", row["layer"]), row["position"]
        high, low = (torch.stack([states(lm, sequence(lm, p), site)[at] for p in side]).mean(0) for side in kept)
        d = found.directions[at, row["layer"]]
        assert np.allclose(d.step, (high - low).numpy(), atol=1e-5)
        r = (high - low) / (high - low).norm()
        edits = ablated(lm, r)
        bypass = np.mean([shown(lm, last(lm, p, edits)) for p in held[0]])
        pushed = [(site, "all", None, lambda h, s, v=high - low: h + v)]
        induce = np.mean([shown(lm, last(lm, p, pushed)) for p in held[1]])
        plain, changed = (torch.stack([last(lm, p, e) for p in held[1]]) for e in ((), edits))
        kl = float((plain.exp() * (plain - changed)).sum(-1).mean())
        for name, value in (("bypass", bypass), ("induce", induce), ("kl", kl)):
            assert row[name] == pytest.approx(value, abs=2e-4), name
        assert row["allowed"] == (row["kl"] < 0.1 and row["layer"] < 0.8 * 3)
    base = [np.mean([shown(lm, last(lm, p)) for p in side]) for side in held]
    assert found.base == pytest.approx(base, abs=1e-4)


def test_the_best_is_the_lowest_bypass_that_the_rule_allows(tiny_lm):
    lm = tiny_lm("llama")
    options = {"positions": (-2, -1), "layers": range(3)}
    free = refusal.search(lm, CALLING, OTHERS, SHOWN, rule=refusal.Rule(max_kl=np.inf, max_depth=1.0), **options)
    assert free.table["allowed"].all()

    def chosen(rule):
        found = refusal.search(lm, CALLING, OTHERS, SHOWN, rule=rule, **options)
        return next(key for key, d in found.directions.items() if d == found.best())

    lowest = free.table.sort("bypass").row(0, named=True)
    assert chosen(refusal.Rule(np.inf, 1.0)) == (lowest["position"], lowest["layer"])
    for rule, condition in (
        (refusal.Rule(float(free.table["kl"].median()), 1.0), pl.col("kl") < free.table["kl"].median()),
        (refusal.Rule(np.inf, 0.34), pl.col("layer") < 2),
        (
            refusal.Rule(np.inf, 1.0, float(free.table["induce"].median())),
            pl.col("induce") > free.table["induce"].median(),
        ),
    ):
        best = free.table.filter(condition).sort("bypass").row(0, named=True)
        assert chosen(rule) == (best["position"], best["layer"])
    none = refusal.search(lm, CALLING, OTHERS, SHOWN, rule=refusal.Rule(max_kl=0.0), **options)
    with pytest.raises(UsageError, match="none of 6 candidates is allowed"):
        none.best()


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_neox"])
def test_after_ablation_nothing_lies_along_the_direction_anywhere(family, tiny_lm, tmp_path):
    lm = tiny_lm(family)
    rule = refusal.Rule(max_kl=np.inf)
    steering = refusal.fit(lm, CALLING, OTHERS, SHOWN, rule=rule)
    r = refusal.search(lm, CALLING, OTHERS, SHOWN, rule=rule).best()
    with rp.steer(lm, steering), rp.observe(lm, "resid.pre@*, resid.post@*") as seen:
        lm.logits(CALLING[0])
    for h in seen.values():
        assert np.abs(r.project(h.double().numpy())).max() < 1e-5 * float(h.norm(dim=-1).max())
    same_run(lm, steered(lm, steering, OTHERS, 3), OTHERS, lambda i: ablated(lm, torch.tensor(r.vector)), 3)
    back = rp.Steering.load(steering.save(tmp_path / "r.safetensors"))
    assert near(steered(lm, back, OTHERS, 2)[0][1], steered(lm, steering, OTHERS, 2)[0][1], 0.0)
    assert (len(back), back.identity) == (3 * lm.n_layers, lm.identity)
    assert back.provenance["direction"]["metrics"] == r.metrics
    with pytest.raises(IdentityMismatch), rp.steer(tiny_lm("gpt2"), back):
        pass


def test_candidates_of_messages_are_all_tokens_that_the_template_puts_behind_them(tiny_lm):
    lm = tiny_lm("llama")
    sides = [[[{"role": "user", "content": text}] for text in side[:3]] for side in (CALLING, OTHERS)]
    found = refusal.search(lm, *sides, lambda lm, prompts: np.zeros(len(prompts)), layers=[1], held_out=0.4)
    behind = len(lm.tokenizer("\n<|assistant|>", add_special_tokens=False)["input_ids"])
    assert found.table["position"].to_list() == list(range(-behind, 0))
    # At the input of block 0 these tokens hold the same on both sides, up to the rounding of means of 2 and 4.
    more = [[{"role": "user", "content": text}] for text in OTHERS]
    with pytest.raises(UsageError, match="do not differ"):
        refusal.search(lm, sides[0], more, lambda lm, prompts: np.zeros(len(prompts)), layers=[0])


def test_a_candidate_whose_trial_gives_no_number_is_not_allowed_and_does_not_end_the_search(tiny_lm):
    lm = tiny_lm("llama")

    def broken(lm, prompts):
        return np.full(len(prompts), np.nan)

    found = refusal.search(lm, CALLING, OTHERS, broken, layers=[1], rule=refusal.Rule(max_kl=1e9))
    assert not found.table["allowed"].any()
    assert [list(d.metrics) for d in found.directions.values()] == [["kl"]]
    with pytest.raises(UsageError, match="none of 1 candidates is allowed"):
        found.best()


def test_a_behaviour_may_be_any_function_and_bad_input_is_refused(tiny_lm):
    lm = tiny_lm("llama")
    found = refusal.search(lm, CALLING, OTHERS, lambda lm, prompts: np.array([len(p) for p in prompts]), layers=[1])
    (held,) = trial(CALLING)
    assert found.table["bypass"].to_list() == [len(CALLING[held])]
    with pytest.raises(UsageError, match="name single tokens"):
        refusal.search(lm, CALLING, OTHERS, refusal.NextToken((" cat",)))
    with pytest.raises(UsageError, match="before the first token"):
        refusal.search(lm, CALLING, OTHERS, SHOWN, positions=[-30])
    with pytest.raises(UsageError, match="−1 the last token"):
        refusal.search(lm, CALLING, OTHERS, SHOWN, positions=[0])
    with pytest.raises(UsageError, match="1 prompts cannot be parted"):
        refusal.search(lm, CALLING[:1], OTHERS, SHOWN)
    with pytest.raises(UsageError, match="do not differ"):
        refusal.search(lm, CALLING, CALLING, SHOWN)
    with pytest.raises(UsageError, match="not of the stream"):
        refusal.ablation(lm, rp.Direction.from_vector("attn.heads@1.2", np.ones(4)))
