"""Gates open for the prompts, or tokens, that meet their condition, and for no other."""

import numpy as np
import pytest
import torch

import reprobe as rp
from reprobe.errors import UnsupportedOperation, UsageError
from reprobe.model.hooks import observe

PROMPTS = ["the cat", "a dog is on the mat and", "in the end", "on"]
SITE, LATER = rp.Site.parse("resid.post@0"), rp.Site.parse("resid.post@1")


def gate_direction(lm, site=SITE):
    return rp.Direction.from_vector(site, np.random.default_rng(1).normal(size=lm.width(site)), scale=1.5, offset=0.3)


def push(lm, when, strength=4.0, site=LATER, **known):
    d = rp.Direction.from_vector(site, np.random.default_rng(2).normal(size=lm.width(site)), scale=2.0)
    return rp.Add(d, strength, when=when, **known)


def means(lm, site=SITE, *, last=False):
    """Of each prompt's activations, or its last ones, (prompts, width)."""
    out = []
    for prompt in PROMPTS:
        with observe(lm, site) as seen:
            lm.logits(prompt)
            out.append(seen[site][0, -1 if last else 0 :].double().mean(0).numpy())
    return np.stack(out)


def scores(lm):
    d = gate_direction(lm)
    return d.score(means(lm)) / d.scale


def threshold(values):
    """Between the second and the third of four."""
    ordered = np.sort(values)
    return float(ordered[1] + ordered[2]) / 2


@pytest.mark.parametrize("measure", ["score", "cosine", "abs_cosine"])
def test_each_prompt_of_a_batch_is_steered_or_left_by_its_own_measure(tiny_lm, measure):
    lm = tiny_lm("llama")
    d, rows = gate_direction(lm), means(lm)
    values = {
        "score": (rows @ d.vector - d.offset) / d.scale,
        "cosine": rows @ d.vector / np.linalg.norm(rows, axis=1),
        # CAST's condition: the cosine between h̄ and its own projection on the direction
        "abs_cosine": np.array(
            [h @ p / np.linalg.norm(h) / np.linalg.norm(p) for h in rows for p in [h @ d.vector * d.vector]]
        ),
    }[measure]
    gate = rp.When(d, above=threshold(values), measure=measure)
    item = push(lm, gate)
    plain = lm.logits(PROMPTS)
    with rp.steer(lm, push(lm, None)):
        always = lm.logits(PROMPTS)
    with rp.steer(lm, item) as done:
        steered = lm.logits(PROMPTS)
    for i, value in enumerate(values):
        want = always[i] if value > gate.above else plain[i]
        assert torch.allclose(steered[i], want, atol=1e-5)
    assert done[0].rows == 2
    assert done[0].tokens == sum(
        len(lm.encode(p).input_ids[0]) for p, v in zip(PROMPTS, values, strict=True) if v > gate.above
    )


def test_a_decision_about_a_prompt_holds_for_its_beams_samples_and_cached_tokens(tiny_lm):
    lm = tiny_lm("gemma3_text")
    values = scores(lm)
    item = push(lm, rp.When(gate_direction(lm), below=threshold(values)), tokens="generated")
    for options in (
        {},
        {"use_cache": False},
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2, "use_cache": False},
        {"num_beams": 2, "cache_implementation": "static"},
    ):
        with rp.steer(lm, item):
            together = lm.generate(PROMPTS, max_new_tokens=5, min_new_tokens=5, **options)
            alone = [t for p in PROMPTS for t in lm.generate(p, max_new_tokens=5, min_new_tokens=5, **options)]
        plain = lm.generate(PROMPTS, max_new_tokens=5, min_new_tokens=5, **options)
        copies = options.get("num_return_sequences", 1)
        assert together == alone
        changed = [together[i * copies : (i + 1) * copies] != plain[i * copies : (i + 1) * copies] for i in range(4)]
        assert not any(changed[i] for i in range(4) if values[i] >= item.when.below)
        assert any(changed)


def test_scores_of_continuations_are_gated_by_their_prompt_however_they_are_packed(tiny_lm):
    """Also where the last token of the prompt depends on what follows it."""
    for name in ("llama", "bloom"):
        lm = tiny_lm(name)
        d = gate_direction(lm)
        mean, last = (threshold(d.score(means(lm, last=x)) / d.scale) for x in (False, True))
        items = [
            push(lm, rp.When(d, below=mean), tokens="generated"),
            push(lm, rp.When(d, below=last, over="last"), strength=1.0),
            push(lm, None, strength=[1.0, -2.0, 3.0, 0.5], site=rp.Site.parse("resid.post@2")),
            rp.Noise(0.3, site="mlp.out@1", seed=(1, 2, 3, 4)),
            rp.Replace(np.ones((1, lm.d_model)), site="attn.out@2", align="end"),
        ]
        ends = [[" is on the mat", " is", "he"], [" the mat", " the end", " the end of it"], [" is on"], ["!", "ly"]]
        for item in items:
            with rp.steer(lm, item) as done:
                together = lm.logprobs(PROMPTS, ends)
            for i, (prompt, group) in enumerate(zip(PROMPTS, ends, strict=True)):
                one = item
                if isinstance(item.strength, np.ndarray):
                    one = push(lm, None, strength=[item.strength[i]], site=item.site)
                if isinstance(item, rp.Noise):
                    one = rp.Noise(0.3, site="mlp.out@1", seed=(item.seed[i],))
                with rp.steer(lm, one):
                    apart = [float(lm.logprobs(prompt, [end])[0][0]) for end in group]
                assert np.allclose(together[i], apart, atol=1e-4), (name, item)
            assert 0 < done[0].rows <= len(PROMPTS)


def test_a_token_gate_decides_for_each_token_before_what_it_gates_is_done(tiny_lm):
    lm = tiny_lm("gpt2")
    with observe(lm, LATER) as seen:
        lm.logits(PROMPTS[1])
        before = seen[LATER][0]
        d = gate_direction(lm, LATER)
        limit = float(np.median(d.score(before.numpy()) / d.scale)) + 1e-6
        with rp.steer(lm, push(lm, rp.When(d, above=limit, at="token"))) as done:
            lm.logits(PROMPTS[1])
        moved = (seen[LATER][0] - before).abs().amax(1) > 1e-6
    assert torch.equal(moved, d.score(before) / d.scale > limit)
    assert done[0].tokens == int(moved.sum())


def test_a_gate_reads_what_earlier_interventions_left_at_its_site(tiny_lm):
    lm = tiny_lm("llama")
    d = gate_direction(lm)
    closed = rp.When(d, above=50.0)
    far = rp.Add(d, 100.0)
    with rp.steer(lm, far, push(lm, closed)) as done:
        lm.logits(PROMPTS)
    assert [e.rows for e in done] == [4, 4]
    with rp.steer(lm, push(lm, closed)) as done:
        lm.logits(PROMPTS)
    assert done[0].rows == 0
    assert "its gate never opened" in str(done)


def test_a_gate_that_cannot_be_decided_is_refused(tiny_lm):
    lm = tiny_lm("llama")
    d = gate_direction(lm)
    gate = rp.When(d, above=0.0)
    with pytest.raises(UsageError, match=r"resid\.post@0 comes after resid\.mid@0"):
        push(lm, gate, site=rp.Site.parse("resid.mid@0"))
    with pytest.raises(UsageError, match="comes after"):
        push(lm, gate, site=rp.Site.parse("embed"))
    with pytest.raises(UsageError, match="needs a threshold"):
        rp.When(d)
    with pytest.raises(UsageError, match="finite numbers"):
        rp.When(d, above=float("nan"))
    with pytest.raises(UsageError, match="never opens"):
        rp.When(d, above=2.0, below=1.0)
    with pytest.raises(UsageError, match="not over generated"):
        rp.When(d, above=0.0, over="generated")
    with pytest.raises(UsageError, match="one of prompt, token"):
        rp.When(d, above=0.0, at="row")
    with pytest.raises(UsageError, match="one of score, cosine, abs_cosine"):
        rp.When(d, above=0.0, measure="angle")
    short = rp.When(rp.Direction.from_vector(SITE, np.ones(3)), above=0.0)
    with pytest.raises(UsageError, match="a gate of width 3"), rp.steer(lm, push(lm, short)):
        pass
    with rp.steer(lm, push(lm, gate)), pytest.raises(UnsupportedOperation, match="in one pass"):
        lm.generate(PROMPTS, max_new_tokens=2, prefill_chunk_size=2)
    with rp.steer(lm, push(lm, gate)), pytest.raises(UnsupportedOperation, match="told apart"):
        lm.net(**lm.inputs(lm.encode(PROMPTS)), use_cache=False)


def test_a_direct_call_is_gated_row_by_row_and_over_its_cache(tiny_lm):
    lm = tiny_lm("llama")
    values = scores(lm)
    item = push(lm, rp.When(gate_direction(lm), below=threshold(values)), tokens="last")
    batch = lm.encode(PROMPTS)
    with rp.steer(lm, item):
        ours = lm.generate(PROMPTS, max_new_tokens=5)
        ids = lm.net.generate(
            input_ids=batch.input_ids, attention_mask=batch.real.long(), max_new_tokens=5, do_sample=False,
            pad_token_id=0,
        )  # fmt: skip
    assert lm.tokenizer.batch_decode(ids[:, batch.real.shape[1] :], skip_special_tokens=True) == ours
