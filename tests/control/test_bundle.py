"""A Steering knows its model, comes back from disk as it was, and adds up where the order does not matter."""

import numpy as np
import pytest
import torch

import reprobe as rp
from reprobe.control.commute import commute
from reprobe.errors import ArtifactExists, CorruptArtifact, IdentityMismatch, UsageError

PROMPTS = ["the cat", "a dog is on the mat and"]
SPANS = [{"who": (4, 7)}, {"who": (2, 5)}]
SITE = "resid.post@1"


def direction(lm, seed=0, site=SITE, **known):
    v = np.random.default_rng(seed).normal(size=lm.width(rp.Site.parse(site)))
    return rp.Direction.from_vector(site, v, scale=2.0, offset=0.1, **known)


def every_operator(lm):
    d = direction(lm, identity=lm.identity)
    gate = rp.When(direction(lm, 1, "resid.post@0"), above=-3.0, below=9.0, at="prompt", over="positions:1:")
    width, rng = lm.d_model, np.random.default_rng(0)
    return [
        rp.Add(d, [0.5, -2.0], unit="norm", tokens="span:who", when=gate),
        rp.Add(d, 0.3, unit="raw", piecewise=True, keep_norm=True, tokens="positions:-2:"),
        rp.Ablate(d, 0.5, site="resid.post@0", tokens="generated"),
        rp.Clamp(d, [0.2, 1.5], tokens="last"),
        rp.Clamp(d, low=-1.0, unit="raw", strength=0.5),
        rp.Scale(d, 2.0),
        rp.Scale("attn.heads@1.2", 0.0),
        rp.Replace(rng.normal(size=(2, 3, width)), site="mlp.out@0", align="end", identity=lm.identity),
        rp.Noise(0.2, site="embed", seed=(3, 4), unit="norm"),
        rp.Affine(0.9 * np.eye(width), rng.normal(size=width), site=SITE, tokens="prompt"),
        rp.LowRank(rng.normal(size=(width, 2)), rng.normal(size=(width, 2)), [0.1, 0.2], site=SITE, strength=0.1),
    ]


def logits(lm, *items, **options):
    with rp.steer(lm, *items, **options):
        return lm.logits(PROMPTS, spans=SPANS)


def test_a_steering_comes_back_from_disk_with_the_same_logits_and_bytes(tiny_lm, tmp_path):
    lm = tiny_lm("llama")
    made = rp.Steering(*every_operator(lm), name="all of them", provenance={"method": "by hand", "k": [1, 2]})
    path = made.save(tmp_path / "steering.safetensors")
    back = rp.Steering.load(path)
    assert torch.equal(logits(lm, back), logits(lm, made))
    assert not torch.allclose(logits(lm, back), logits(lm), atol=1e-2)
    assert (back.name, back.provenance, back.identity) == (made.name, made.provenance, lm.identity)
    assert [str(i) for i in back.interventions] == [str(i) for i in made.interventions]
    assert back.save(tmp_path / "again.safetensors").read_bytes() == path.read_bytes()
    with pytest.raises(ArtifactExists):
        made.save(path)


def test_a_file_that_is_no_steering_is_refused(tiny_lm, tmp_path):
    lm = tiny_lm("llama")
    d = direction(lm)
    with pytest.raises(UsageError, match="holds a direction, not a steering"):
        rp.Steering.load(d.save(tmp_path / "d.safetensors"))
    path = rp.Steering(rp.Add(d)).save(tmp_path / "s.safetensors")
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(CorruptArtifact):
        rp.Steering.load(path)

    class Own(rp.Add):
        pass

    with pytest.raises(UsageError, match="a Own cannot be saved"):
        rp.Steering(Own(d)).save(tmp_path / "own.safetensors")
    assert not (tmp_path / "own.safetensors").exists()


def test_a_steering_of_what_is_no_intervention_is_refused(tiny_lm):
    d = direction(tiny_lm("llama"))
    for wrong in (d, [rp.Add(d)], rp.Steering(rp.Add(d))):
        with pytest.raises(UsageError, match=f"interventions, one argument each, not a {type(wrong).__name__}"):
            rp.Steering(wrong)
    with pytest.raises(UsageError, match="not a Direction"):
        rp.Steering(rp.Add(d)).then(d)


def test_a_steering_of_another_model_is_refused(tiny_lm):
    lm, other = tiny_lm("llama"), tiny_lm("gpt2")
    with pytest.raises(IdentityMismatch):
        rp.Steering(rp.Add(direction(lm, identity=lm.identity)), rp.Add(direction(lm, 1, identity=other.identity)))
    bare = rp.Steering(rp.Add(direction(lm)), identity=other.identity)
    with pytest.raises(IdentityMismatch, match="architecture"), rp.steer(lm, bare):
        pass
    logits(lm, bare, allow_mismatch=True)


def test_a_multiple_goes_that_share_of_the_way(tiny_lm):
    lm = tiny_lm("llama")
    d = direction(lm)
    for item in every_operator(lm)[1:]:
        assert torch.allclose(logits(lm, 0.0 * rp.Steering(item)), logits(lm), atol=1e-4)
        assert torch.allclose(logits(lm, 1.0 * rp.Steering(item)), logits(lm, item), atol=1e-4)
    assert torch.allclose(logits(lm, 3 * rp.Steering(rp.Add(d, 0.5))), logits(lm, rp.Add(d, 1.5)), atol=1e-4)
    half = logits(lm, rp.Steering(rp.Ablate(d)) * 0.5)
    assert torch.allclose(half, logits(lm, rp.Scale(d, 0.5)), atol=1e-4)
    rows = rp.Steering(rp.Add(d, [1.0, 2.0])) * 2
    assert torch.allclose(logits(lm, rows), logits(lm, rp.Add(d, [2.0, 4.0])), atol=1e-4)


def pairs(lm):
    """(a, b, whether their order is without meaning)."""
    d, e = direction(lm), direction(lm, 1)
    orthogonal = rp.Direction.from_vector(SITE, e.vector - (e.vector @ d.vector) * d.vector, scale=2.0)
    A = rp.Affine(0.9 * np.eye(lm.d_model), np.ones(lm.d_model), site=SITE)
    gate = rp.When(d, above=0.0, at="token")
    return [
        (rp.Add(d, 2.0), rp.Add(e, -1.0), True),
        (rp.Add(d, 2.0), rp.Ablate(d), False),
        (rp.Add(d, 2.0), rp.Ablate(e), False),
        (rp.Add(d, 2.0), rp.Ablate(orthogonal), True),
        (rp.Ablate(d), rp.Ablate(e), False),
        (rp.Ablate(d), rp.Ablate(orthogonal), True),
        (rp.Ablate(d), rp.Scale(-1 * d, 3.0), True),
        (rp.Ablate(d), rp.Scale(SITE, 3.0), True),
        (rp.Add(d, 2.0), rp.Scale(SITE, 3.0), False),
        (rp.Clamp(d, 1.0), rp.Clamp(orthogonal, -1.0), True),
        (rp.Clamp(d, 1.0), rp.Clamp(d, 2.0), False),
        (rp.Add(d, 2.0), rp.Add(e, 0.5, unit="norm"), False),
        (rp.Add(d, 2.0), rp.Add(e, 2.0, keep_norm=True), False),
        (rp.Ablate(d), rp.Ablate(e, site="resid.post@0"), True),
        (rp.Ablate(d, tokens="prompt"), rp.Add(e, 2.0, tokens="generated"), True),
        (rp.Add(d, 2.0), A, False),
        (rp.Add(e, 2.0), rp.Add(orthogonal, 2.0, when=gate), False),
        (rp.Scale("attn.heads@1.0", 0.0), rp.Replace(np.ones(4), site="attn.heads@1.1"), True),
        (rp.Scale("attn.heads@1.0", 0.0), rp.Replace(np.ones(36), site="attn.heads@1"), False),
        (rp.Add(d, 2.0, site="embed"), rp.Ablate(e, site="resid.pre@0"), False),
    ]


def test_what_is_said_to_commute_does_and_what_does_not_is_refused_in_a_sum(tiny_lm):
    lm = tiny_lm("llama")
    for a, b, free in pairs(lm):
        assert commute(a, b) == commute(b, a) == free, (str(a), str(b))
        first, second = rp.Steering(a, name="first"), rp.Steering(b, name="second")
        one, other = (logits(lm, s) for s in (first.then(second), second.then(first)))
        assert torch.allclose(one, other, atol=1e-4) == free, (str(a), str(b))
        if free:
            assert torch.allclose(logits(lm, first + second), one, atol=1e-4)
        else:
            with pytest.raises(UsageError, match=r"a\.then\(b\)"):
                first + second


def test_a_sum_keeps_names_origins_and_the_model(tiny_lm):
    lm = tiny_lm("llama")
    a = rp.Steering(rp.Add(direction(lm, identity=lm.identity)), name="truth", provenance={"method": "caa"})
    b = rp.Steering(rp.Add(direction(lm, 1)), name="mood")
    both = 2 * a + b
    assert both.name == "2 × truth + mood"
    assert both.identity == lm.identity
    assert len(both) == 2
    assert both.provenance["parts"][0]["provenance"]["of"] == {"name": "truth", "provenance": {"method": "caa"}}
    assert len(a + rp.Add(direction(lm, 2))) == 2
