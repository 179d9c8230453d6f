"""Effect and side effect of an intervention, against sums worked out by hand."""

import numpy as np
import pytest
import torch

import reprobe as rp
from reprobe.errors import UsageError

CONTRAST = rp.Contrast(("the cat", "a dog"), (" is", " on"), (" of",))


def direction(lm, seed=0):
    v = np.random.default_rng(seed).normal(size=lm.d_model)
    return rp.Direction.from_vector("resid.post@1", v, scale=1.0)


def test_log_odds_are_the_summed_probabilities_of_either_side(tiny_lm):
    lm = tiny_lm("llama")
    for prompt, got in zip(CONTRAST.prompts, rp.log_odds(lm, CONTRAST), strict=True):
        p = [np.exp(lm.logprobs(prompt, [c])[0][0]) for c in (" is", " on", " of")]
        assert got == pytest.approx(np.log((p[0] + p[1]) / p[2]), abs=1e-5)


def test_divergence_is_the_mean_kl_per_token_and_zero_without_an_intervention(tiny_lm):
    lm = tiny_lm("llama")
    item = rp.Add(direction(lm), 3.0)
    texts = ["the cat is on the mat", "a dog"]
    assert rp.divergence(lm, texts) == 0
    terms = []
    for text in texts:
        p = torch.softmax(lm.logits(text, at="all")[0].double(), -1)
        with rp.steer(lm, item):
            q = torch.softmax(lm.logits(text, at="all")[0].double(), -1)
        terms += (p * (p / q).log()).sum(-1).tolist()
    assert rp.divergence(lm, texts, item) == pytest.approx(np.mean(terms), rel=1e-6)
    assert np.mean(terms) > 1e-3


def test_the_dose_response_table_holds_what_each_strength_does(tiny_lm):
    lm = tiny_lm("llama")
    d = direction(lm)
    table = rp.dose_response(
        lm,
        lambda s: [rp.Add(d, s)],
        (-2, 0, 2),
        scorer=CONTRAST,
        neutral=["on the mat"],
        story="the",
        max_new_tokens=3,
    )
    assert table["strength"].to_list() == [-2, 0, 2]
    zero = table.row(1, named=True)
    assert (zero["kl"], zero["log_odds_sd"]) == (0, 0)
    assert zero["text"] == lm.generate("the", max_new_tokens=3)[0]
    with rp.steer(lm, rp.Add(d, 2)):
        assert table["log_odds"][2] == pytest.approx(rp.log_odds(lm, CONTRAST).mean())
    assert min(table["kl"][0], table["kl"][2]) > 0


def test_a_contrast_without_two_sides_is_refused():
    with pytest.raises(UsageError, match="each side"):
        rp.Contrast(("a",), (), (" b",))
    with pytest.raises(UsageError, match="both sides"):
        rp.Contrast(("a",), (" b",), (" b",))
