"""Steering given continuations (`lm.logprobs`, `lm.continued`): what belongs to a prompt stays with its prompt."""

import numpy as np
import pytest
import torch

import reprobe as rp
from reprobe.errors import UsageError
from reprobe.methods import repe

#: The longest prompt is neither first nor last: passes take texts by length.
PROMPTS = ["the cat", "a dog is on the mat and in the end", "in the end is", "an ant"]
ENDS = [[" is on the mat", " on"], [" is", " the end and more"], [" on the"], [" in a hat", " is on"]]
SPANS = [{"who": (4, 7)}, {"who": (2, 5)}, {"who": (0, 6)}, {"who": (3, 6)}]
FAMILIES = ["llama", "gemma3_text", "gpt2", "falcon.alibi"]
STRENGTHS = [1.5, -2.0, 0.0, 3.0]


def direction(lm, site="resid.post@1"):
    v = np.random.default_rng(3).normal(size=lm.d_model)
    return rp.Direction.from_vector(site, v, scale=0.8)


@pytest.mark.parametrize("budget", [None, 14])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_strength_per_prompt_is_that_of_its_own_continuation(tiny_lm, name, budget):
    lm = tiny_lm(name)
    d, ends = direction(lm), [group[0] for group in ENDS]
    with rp.steer(lm, rp.Add(d, STRENGTHS)) as done:
        together = lm.continued(PROMPTS, ends, batch_tokens=budget)
    assert done[0].rows == len(PROMPTS)
    for found, prompt, end, strength in zip(together, PROMPTS, ends, STRENGTHS, strict=True):
        with rp.steer(lm, rp.Add(d, strength)):
            (alone,) = lm.continued(prompt, end)
        torch.testing.assert_close(found.states, alone.states, atol=1e-5, rtol=1e-4)


def test_activations_and_noise_per_prompt_are_those_of_its_own_continuation(tiny_lm):
    lm = tiny_lm("llama")
    given = np.random.default_rng(1).normal(size=(len(PROMPTS), 2, lm.d_model))
    ends = [group[0] for group in ENDS]
    for many, one in (
        (rp.Replace(given, site="resid.post@0"), lambda i: rp.Replace(given[i], site="resid.post@0")),
        (
            rp.Noise(0.5, site="resid.post@0", seed=[7, 8, 9, 10]),
            lambda i: rp.Noise(0.5, site="resid.post@0", seed=[7 + i]),
        ),
    ):
        with rp.steer(lm, many):
            together = lm.continued(PROMPTS, ends)
        for i, found in enumerate(together):
            with rp.steer(lm, one(i)):
                (alone,) = lm.continued(PROMPTS[i], ends[i])
            torch.testing.assert_close(found.states, alone.states, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("budget", [None, 14])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_span_is_steered_in_scored_continuations_as_in_a_prompt(tiny_lm, name, budget):
    lm = tiny_lm(name)
    item = rp.Add(direction(lm), 2.0, tokens="span:who")
    with rp.steer(lm, item) as done:
        scores = lm.logprobs(PROMPTS, ENDS, spans=SPANS, batch_tokens=budget)
    assert done[0].rows == len(PROMPTS)
    for prompt, spans, ends, own in zip(PROMPTS, SPANS, ENDS, scores, strict=True):
        n = lm.encode(prompt).input_ids.shape[1]
        for end, score in zip(ends, own, strict=True):
            with rp.steer(lm, item):
                logp = lm.logits(prompt + end, at="all", spans=[spans])[0].double().log_softmax(-1)
            ids = lm.encode(prompt + end).input_ids[0]
            assert score == pytest.approx(float(logp[n - 1 : -1].gather(1, ids[n:, None]).sum()), abs=1e-4)


def test_a_span_that_some_scored_prompts_lack_is_refused(tiny_lm):
    lm = tiny_lm("llama")
    with rp.steer(lm, rp.Add(direction(lm), tokens="span:who")):
        with pytest.raises(UsageError, match="their spans: none"):
            lm.logprobs(PROMPTS, ENDS)
        with pytest.raises(UsageError, match="not every one"):
            lm.logprobs(PROMPTS, ENDS, spans=[*SPANS[:3], {"other": (0, 2)}])
        with pytest.raises(UsageError, match="3 span mappings"):
            lm.logprobs(PROMPTS, ENDS, spans=SPANS[:3])


def test_contrast_streams_that_do_not_run_together_are_refused(tiny_lm):
    lm = tiny_lm("llama")
    with rp.steer(lm, repe.contrast(lm, "resid.post@1", 1.0)), pytest.raises(UsageError, match="one pass"):
        lm.continued([f"{who} cat is" for who in ("the", "a", "an")], [" on"] * 3)
