"""RepE: scans, control along reading vectors, and contrast vectors against three plain uncached runs."""

import contextlib

import numpy as np
import pytest
import torch
from control.reference import Sequence, at_site, logits
from methods.plain import ids_of, near, same_run, steered

import reprobe as rp
from reprobe.errors import IdentityMismatch, UnknownSite, UnsupportedOperation, UsageError
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


# -- reading vectors ------------------------------------------------------------------------------------------------

PROMPTS = ["the cat is on", "in"]


def blocks(lm):
    rng = np.random.default_rng(1)
    sites = lm.sites("resid.post@*")
    return {s: rp.Direction.from_vector(s, rng.normal(size=lm.d_model), scale=1.5, identity=lm.identity) for s in sites}


def kept(h, new):
    return new * h.norm(dim=1, keepdim=True) / new.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
def test_the_three_manners_of_control_are_their_formulas_at_the_control_layers(family, tiny_lm, tmp_path):
    lm = tiny_lm(family)
    formulas = {
        "linear": lambda h, v: h + 3.0 * 1.5 * v,
        "piecewise": lambda h, v: h + 3.0 * 1.5 * (h @ v).sign()[:, None] * v,
        "projection": lambda h, v: h - (h @ v)[:, None] * v,
    }
    seen = {}
    for manner, formula in formulas.items():
        for keep_norm in (False, True):
            edits = []
            for site, d in list(blocks(lm).items())[1:]:
                v = torch.tensor(d.vector)

                def change(h, s, v=v, formula=formula, keep_norm=keep_norm):
                    return kept(h, formula(h, v)) if keep_norm else formula(h, v)

                edits.append((site, "all", None, change))
            strength = 1.0 if manner == "projection" else 3.0
            made = repe.control(blocks(lm), strength, manner=manner, layers=[1, 2], keep_norm=keep_norm)
            found = seen[manner, keep_norm] = steered(lm, made, PROMPTS, 3)
            same_run(lm, found, PROMPTS, lambda i, edits=edits: edits, 3)
            back = rp.Steering.load(made.save(tmp_path / f"{manner}{keep_norm}"))
            assert near(steered(lm, back, PROMPTS, 2)[0][1], found[0][1][:2], 1e-6)
            assert back.identity == lm.identity
    first = [run[0][1] for run in seen.values()]
    assert all(not torch.allclose(a, b, atol=1e-3) for i, a in enumerate(first) for b in first[:i])
    raw, scaled = repe.control(blocks(lm), 3.0, unit="raw"), repe.control(blocks(lm), 2.0)
    assert near(steered(lm, raw, PROMPTS, 2)[0][1], steered(lm, scaled, PROMPTS, 2)[0][1])


def test_reading_vectors_that_are_not_there_are_refused(tiny_lm):
    lm = tiny_lm("llama")
    with pytest.raises(UsageError, match="no direction was given for block 7; there are directions for blocks 0–2"):
        repe.control(blocks(lm), layers=[1, 7])
    with pytest.raises(UsageError, match="linear, piecewise, projection"):
        repe.control(blocks(lm), manner="wise")
    with pytest.raises(UsageError, match="at least one direction"):
        repe.control({})


# -- contrast vectors -----------------------------------------------------------------------------------------------

STREAMS = repe.Streams(
    ["the cat is on", "a dog and"],
    ["be good and old: the cat is on", "be good: a dog and"],
    ["no: the cat is on", "be an evil one, of iron: a dog and"],
)
SITES = "resid.post@0, resid.post@1"


def state(lm, sequence, site, edits):
    """What an edited run holds at a site, before the edits of that site."""
    seen = []
    with contextlib.ExitStack() as stack, torch.no_grad():
        for other, change in edits:
            stack.enter_context(at_site(lm, other, lambda h, change=change: change(h, sequence)))
        stack.enter_context(at_site(lm, site, lambda h: seen.append(h.clone())))
        lm.net(input_ids=torch.tensor([sequence.ids]), use_cache=False)
    return seen[0]


def three_runs(lm, sequences, alpha, compounding, sites=SITES):
    """Logits of the base run, with contrasts from two other runs: three whole passes without a cache per block."""
    edits = []
    for site in lm.sites(sites):
        high, low = (state(lm, s, site, edits if compounding else []) for s in sequences[1:])
        n = [s.n_prompt for s in sequences]
        # By the distance from the prompt's end, from its last token on.
        contrast = {k: alpha * (high[n[1] + k] - low[n[2] + k]) for k in range(-1, len(sequences[0].ids) - n[0])}

        def change(h, s, contrast=contrast):
            out = h.clone()
            for k, step in contrast.items():
                out[s.n_prompt + k] += step
            return out

        edits.append((site, change))
    return logits(lm, sequences[0], *((site, "all", None, change) for site, change in edits))


def streams_of(lm, i, more=()):
    return [Sequence(0, [*ids, *more], len(ids), {}) for ids in (ids_of(lm, rows[i]) for rows in STREAMS.rows)]


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
@pytest.mark.parametrize("compat", [None, "repe"])
def test_three_cached_streams_are_three_uncached_runs(family, compat, tiny_lm):
    lm, n = tiny_lm(family), 4
    made = repe.contrast(lm, SITES, 0.7, compat=compat)
    texts = []

    def run(**options):
        texts.extend(repe.generate(lm, made, STREAMS, **options))

    found = steered(lm, None, [prompt for rows in STREAMS.rows for prompt in rows], n, run)
    for i in range(2):
        tokens = []
        for k in range(n):
            wanted = three_runs(lm, streams_of(lm, i, tokens), 0.7, compat == "repe")[-1]
            assert near(found[i][1][k], wanted)
            wanted[lm.tokenizer.eos_token_id] = -torch.inf
            tokens.append(int(wanted.argmax()))
        for row in (i, i + 2, i + 4):
            assert found[row][0] == tokens[:-1], "all three go on with the base row's tokens"
        assert texts[i] == lm.tokenizer.decode(tokens, skip_special_tokens=True)


@pytest.mark.models
@pytest.mark.parametrize("name", ["smollm2-135m", "gemma3-270m"])
def test_the_streams_of_a_real_model_are_three_uncached_runs(real_lm, name):
    lm, sites = real_lm(name), "resid.post@7, resid.post@11"
    prompts = [prompt for rows in STREAMS.rows for prompt in rows]
    found = steered(
        lm, None, prompts, 2, lambda **options: repe.generate(lm, repe.contrast(lm, sites, 0.5), STREAMS, **options)
    )
    for i in range(2):
        for k in range(2):
            wanted = three_runs(lm, streams_of(lm, i, found[i][0][:k]), 0.5, False, sites)[-1]
            assert near(found[i][1][k], wanted)


def test_the_compounding_original_differs_and_its_streams_too(tiny_lm):
    lm = tiny_lm("llama")
    prompts = [prompt for rows in STREAMS.rows for prompt in rows]
    plain = lm.logits(prompts)
    for compat, moved in ((None, [0, 1]), ("repe", range(6))):
        with rp.steer(lm, repe.contrast(lm, SITES, 0.7, compat=compat)) as done:
            found = lm.logits(prompts)
        assert [i for i in range(6) if not torch.equal(found[i], plain[i])] == list(moved)
        assert [(e.rows, e.tokens) for e in done] == [(len(moved), len(moved))] * 2
    sound, original = (
        repe.logprobs(lm, repe.contrast(lm, SITES, 0.7, compat=c), STREAMS, [[" the"]] * 2) for c in (None, "repe")
    )
    assert abs(sound[0][0] - original[0][0]) > 1e-3


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
def test_continuations_are_scored_as_three_runs_score_them(family, tiny_lm):
    lm = tiny_lm(family)
    answers = [[" the mat", " a"], [" an owl is in the sea"]]
    found = repe.logprobs(lm, repe.contrast(lm, SITES, 0.7), STREAMS, answers)
    for i, given in enumerate(answers):
        for j, answer in enumerate(given):
            more = lm.tokenizer(answer, add_special_tokens=False)["input_ids"]
            sequences = streams_of(lm, i, more)
            logp = three_runs(lm, sequences, 0.7, False).double().log_softmax(-1)
            n = sequences[0].n_prompt
            wanted = sum(float(logp[n + k - 1, t]) for k, t in enumerate(more))
            assert found[i][j] == pytest.approx(wanted, abs=1e-3)
    zero = repe.logprobs(lm, 0.0 * repe.contrast(lm, SITES, 0.7), STREAMS, answers)
    for a, b in zip(zero, lm.logprobs(list(STREAMS.base), answers), strict=True):
        assert np.allclose(a, b, atol=1e-4)


def test_sampling_is_in_step_repeatable_and_as_likely_as_it_says(tiny_lm):
    lm = tiny_lm("llama")
    made = repe.contrast(lm, SITES, 0.7)
    options = {"do_sample": True, "temperature": 1.3, "top_p": 0.9, "max_new_tokens": 6}
    before = torch.random.get_rng_state()
    texts = [repe.generate(lm, made, STREAMS, seed=seed, **options) for seed in (0, 0, 1)]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert texts[0] == texts[1] != texts[2]
    cold = repe.generate(lm, made, STREAMS, do_sample=True, temperature=1e-4, max_new_tokens=6)
    assert cold == repe.generate(lm, made, STREAMS, max_new_tokens=6)


def test_contrasts_save_and_refuse_what_are_no_streams(tiny_lm, tmp_path):
    lm = tiny_lm("llama")
    made = repe.contrast(lm, SITES, 0.7, compat="repe")
    back = rp.Steering.load(made.save(tmp_path / "contrast.safetensors"))
    assert back.identity == lm.identity
    assert repe.generate(lm, back, STREAMS, max_new_tokens=5) == repe.generate(lm, made, STREAMS, max_new_tokens=5)
    with pytest.raises(IdentityMismatch):
        repe.generate(tiny_lm("gpt2"), back, STREAMS)
    for what, error, why in (
        (lambda: lm.logits(["a", "b"]), UsageError, "this run has 2 prompts"),
        (lambda: lm.logprobs("the cat", [" is"]), UnsupportedOperation, "use repe.logprobs"),
        (lambda: lm.logits(["the cat", "the dog", "the cat"]), UsageError, "do not end alike"),
        (lambda: lm.generate(["on", "a cat is", "in"], max_new_tokens=2), UsageError, "do not end alike"),
        (lambda: lm.logits(["a cat", "the old cat", "cat"], padding="right"), UsageError, "pad on the left"),
        (
            lambda: lm.generate([p for row in STREAMS.rows for p in row], max_new_tokens=8, min_new_tokens=8),
            UsageError,
            "went on with different tokens",
        ),
    ):
        with rp.steer(lm, made), pytest.raises(error, match=why):
            what()
    with pytest.raises(UnsupportedOperation, match="num_beams=2"):
        repe.generate(lm, made, STREAMS, num_beams=2)
    with pytest.raises(UsageError, match="1 base prompts, 2 positive"):
        repe.Streams(["a"], ["b", "c"], ["d"])
    with pytest.raises(UsageError, match="None and 'repe'"):
        repe.contrast(lm, SITES, 1.0, compat="original")
    with pytest.raises(UsageError, match="lists of continuations"):
        repe.logprobs(lm, made, STREAMS, [" a", " b"])
    with pytest.raises(UsageError, match="no token can be drawn"):
        repe.generate(lm, made, STREAMS, do_sample=True, temperature=0.0)
    with pytest.raises(UnknownSite):
        repe.contrast(lm, "resid.post@9", 1.0)
