"""Every steer says what it did: prompts, tokens, and how far they were moved."""

import numpy as np
import pytest
import torch

import reprobe as rp
from reprobe.model.hooks import observe

PROMPTS = ["the cat", "a dog is on the mat and", "in"]
SITE = rp.Site.parse("resid.post@1")


def direction(lm, seed=0):
    return rp.Direction.from_vector(SITE, np.random.default_rng(seed).normal(size=lm.d_model), scale=2.0)


def states(lm, *items):
    with rp.steer(lm, *items) as done, observe(lm, SITE) as seen:
        lm.logits(PROMPTS)
    return seen[SITE], done


@pytest.mark.parametrize("tokens", ["all", "last", "positions:1:3"])
def test_counts_and_displacements_are_those_of_the_activations(tiny_lm, tokens):
    lm = tiny_lm("llama")
    d = direction(lm)
    plain, _ = states(lm)
    for item in (
        rp.Add(d, 1.5, tokens=tokens),
        rp.Add(d, [1.0, -2.0, 0.5], tokens=tokens),
        rp.Add(d, 0.5, unit="norm", tokens=tokens),
        rp.Ablate(d, tokens=tokens),
        rp.Clamp(d, 3.0, tokens=tokens),
        rp.Scale(SITE, 0.5, tokens=tokens),
        rp.Noise(1.0, site=SITE, tokens=tokens),
        rp.Replace(np.ones((2, lm.d_model)), site=SITE, tokens=tokens),
        rp.Replace(np.ones((2, lm.d_model)), site=SITE, tokens=tokens, align="end"),
    ):
        steered, done = states(lm, item)
        step = (steered - plain).norm(dim=-1)
        moved = step > 1e-6
        assert done[0].tokens == int(moved.sum())
        assert done[0].rows == int(moved.any(1).sum())
        assert done[0].displacement == pytest.approx(float(step[moved].mean()), rel=1e-4)
        assert not done.untouched


def test_one_effect_per_intervention_summed_over_runs_and_read_at_any_time(tiny_lm):
    lm = tiny_lm("gpt2")
    real = int(lm.encode(PROMPTS).real.sum())
    first, second = rp.Add(direction(lm), 1.0), rp.Add(direction(lm, 1), 2.0, tokens="generated")
    with rp.steer(lm, first, rp.Steering(second)) as done:
        assert [e.why for e in done] == ["since nothing ran"] * 2
        lm.generate(PROMPTS, max_new_tokens=4, min_new_tokens=4)
        assert [e.rows for e in done] == [3, 3]
        assert [e.tokens for e in done] == [real + 3 * 3, 3 * 3]
        lm.generate(PROMPTS[:2], max_new_tokens=3, min_new_tokens=3, num_beams=2)
    assert [e.rows for e in done] == [5, 5]
    assert [e.tokens for e in done][1] == 3 * 3 + 2 * 2 * 2
    assert [e.displacement for e in done] == [2.0, 4.0]
    assert len(done) == 2
    assert str(done).count("\n") == 1


def test_an_intervention_that_touches_nothing_says_why(tiny_lm):
    lm = tiny_lm("llama")
    items = [
        rp.Add(direction(lm), tokens="generated"),
        rp.Add(direction(lm), tokens="positions:40"),
        rp.Add(direction(lm), when=rp.When(direction(lm), above=1e9)),
        rp.Replace(np.ones((2, lm.d_model)), site=SITE, tokens="positions:3:"),
        rp.Add(direction(lm)),
    ]
    with rp.steer(lm, *items) as done:
        plain = lm.logits(PROMPTS)
    assert [e.why for e in done] == [
        "since no token was in its scope",
        "since no token was in its scope",
        "since its gate never opened",
        "since no token was in its scope",
        "",
    ]
    assert [str(e) for e in done.untouched] == [str(e) for e in done[:4]]
    assert all(np.isnan(e.displacement) and e.rows == e.tokens == 0 for e in done.untouched)
    assert "touched nothing, since its gate never opened" in str(done)
    with rp.steer(lm, items[4]):
        assert torch.equal(lm.logits(PROMPTS), plain)


def test_scored_continuations_count_their_prompts_once(tiny_lm):
    lm = tiny_lm("llama")
    with rp.steer(lm, rp.Add(direction(lm), tokens="generated")) as done:
        lm.logprobs(PROMPTS, [[" is", " is on the mat"], [" on"], [" the end"]], batch_tokens=12)
    assert done[0].rows == 3
