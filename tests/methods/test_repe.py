"""A scan reads every token at every direction's site."""

import numpy as np
import pytest
import torch

import reprobe as rp
from reprobe.errors import IdentityMismatch, UnknownSite, UsageError
from reprobe.methods import repe


def directions(lm, **known):
    rng = np.random.default_rng(0)
    sites = lm.sites("resid.post@*,attn.heads@1.2")
    return {s: rp.Direction.from_vector(s, rng.normal(size=lm.width(s)), scale=2.0, offset=0.3, **known) for s in sites}


def test_a_scan_is_the_score_of_each_token_in_units_of_the_scale(tiny_lm):
    lm = tiny_lm("gemma3_text")
    found = directions(lm)
    result = repe.scan(lm, "the cat is", found)
    assert [s.layer for s in result.sites] == sorted(s.layer for s in result.sites)
    assert result.scores.shape == (len(found), len(result.tokens))
    assert "".join(result.tokens[1:]) == "the cat is"
    with torch.no_grad():
        states = lm.net.model(
            **lm.tokenizer("the cat is", return_tensors="pt"), output_hidden_states=True
        ).hidden_states
    site = rp.Site.parse("resid.post@0")
    want = (states[1][0].double().numpy() @ found[site].vector - 0.3) / 2.0
    assert np.allclose(result.scores[result.sites.index(site)], want, atol=1e-5)


def test_directions_of_another_model_are_refused(tiny_lm):
    lm = tiny_lm("llama")
    with pytest.raises(IdentityMismatch):
        repe.scan(lm, "the cat", directions(lm, identity=tiny_lm("gpt2").identity))
    with pytest.raises(UsageError, match="at least one"):
        repe.scan(lm, "the cat", {})


def test_directions_of_another_site_are_refused(tiny_lm):
    lm = tiny_lm("llama")
    site, other = lm.sites("resid.post@1, resid.post@2")
    d = rp.Direction.from_vector(site, np.ones(lm.width(site)))
    with pytest.raises(UsageError, match=r"direction\.at\('resid.post@2'\)"):
        repe.scan(lm, "the cat", {other: d})
    assert repe.scan(lm, "the cat", {other: d.at(other)}).sites == (other,)
    with pytest.raises(UsageError, match=r"width 3 does not fit resid\.post@1"):
        repe.scan(lm, "the cat", {site: rp.Direction.from_vector(site, np.ones(3))})
    with pytest.raises(UnknownSite, match="blocks 0–2"):
        repe.scan(lm, "the cat", {rp.Site("resid.post", 5): d.at("resid.post@5")})
