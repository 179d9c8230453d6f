"""Interventions do precisely what they say, wherever tokens stand."""

import contextlib
import gc
import itertools

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import DECODERS, tiny_model

import reprobe as rp
from reprobe.control.values import _GOLDEN, _hashed, _mixed, normals
from reprobe.errors import IdentityMismatch, UnknownSite, UnsupportedOperation, UsageError
from reprobe.model.hooks import board_of, observe

PROMPTS = ["the cat", "a dog is on the mat and", "in"]
SPANS = [{"who": (4, 7)}, {"who": (2, 5)}, {"who": (0, 2)}]
SCOPES = ["all", "prompt", "generated", "last", "span:who"]
TOLERANCE = 1e-4


def direction(lm, part="resid.post", layer=1, seed=3, **known):
    site = lm.sites(f"{part}@{layer}")[0]
    v = np.random.default_rng(seed).normal(size=lm.width(site))
    return rp.Direction.from_vector(site, v, scale=2.0, **known)


def steps(lm, prompts, spans, *, use_cache=True, n=3, **options):
    """Logits of each generation step, (steps, rows, vocab)."""
    seen = []

    def record(ids, scores):
        seen.append(scores.clamp(min=-1e4))  # the end token is forbidden with −inf, and inf − inf is nan
        return scores

    lm.generate(
        prompts,
        spans=spans,
        max_new_tokens=n,
        min_new_tokens=n,
        use_cache=use_cache,
        logits_processor=[record],
        **options,
    )
    return torch.stack(seen)


def affine(d):
    """A matrix and a row that change every vector: a quarter turned, shrunk, and moved."""
    rng = np.random.default_rng(4)
    A = 0.7 * np.eye(d.width) + 0.3 * rng.normal(size=(d.width, d.width)) / np.sqrt(d.width)
    return A, rng.normal(size=d.width)


def close(a, b):
    a, b = a.detach(), b.detach()
    return float((a - b).abs().max()) <= TOLERANCE * max(1.0, float(b.abs().max()))


@pytest.mark.parametrize("scope", SCOPES)
def test_each_scope_changes_its_own_tokens_and_no_other(tiny_lm, scope):
    lm = tiny_lm("llama")
    d = direction(lm)
    site = rp.Site.parse("resid.post@1")

    def states(*items):
        with rp.steer(lm, *items), observe(lm, site) as seen:
            out = []
            for at in range(3):  # the prompt, then two generated tokens, one pass each
                steps(lm, PROMPTS, SPANS, n=at + 1)
                out.append(seen[site])
            return out

    batch = lm.encode(PROMPTS, spans=SPANS)
    moved = [
        ((a - b).abs().amax(-1) > 1e-6) for a, b in zip(states(rp.Add(d, 5.0, tokens=scope)), states(), strict=True)
    ]
    columns = torch.arange(batch.real.shape[1])
    last = columns == (columns * batch.real).amax(1, keepdim=True)
    in_prompt = {
        "all": batch.real,
        "prompt": batch.real,
        "generated": torch.zeros_like(batch.real),
        "last": last,
        "span:who": batch.spans["who"],
    }[scope]
    assert torch.equal(moved[0], in_prompt)
    if scope in ("all", "generated", "last"):  # the others leave generated tokens alone: see the next test
        assert all(bool(later.all()) for later in moved[1:])


@pytest.mark.parametrize("use_cache", [True, False])
def test_prompt_scopes_leave_generated_tokens_alone(tiny_lm, use_cache):
    lm = tiny_lm("llama")
    batch = lm.encode(PROMPTS, spans=SPANS)
    for scope, mask in (("prompt", batch.real), ("span:who", batch.spans["who"])):
        with rp.steer(lm, rp.Add(direction(lm), 3.0, tokens=scope)) as done:
            lm.generate(PROMPTS, spans=SPANS, max_new_tokens=4, min_new_tokens=4, use_cache=use_cache)
        assert done[0].tokens == int(mask.sum()) * (1 if use_cache else 4)
        assert done[0].rows == len(PROMPTS)


def test_add_equals_a_plain_hook_that_adds_the_vector(tiny_lm):
    lm = tiny_lm("gemma3_text")
    d = direction(lm)
    step = torch.tensor(1.5 * d.scale * d.vector, dtype=torch.float32)
    handle = lm.architecture.blocks(lm.net)[1].register_forward_hook(lambda m, a, out: out + step)
    want = lm.logits(PROMPTS[1])
    handle.remove()
    with rp.steer(lm, rp.Add(d, 1.5)):
        got = lm.logits(PROMPTS[1])
    assert torch.allclose(got, want, atol=1e-5)


@pytest.mark.parametrize(
    "part", ["resid.pre", "attn.heads", "attn.out", "resid.mid", "mlp.neurons", "mlp.out", "resid.post"]
)
@pytest.mark.parametrize("name", ["gpt2", "opt", "granite", "gemma2", "olmo2", "bloom", "gptj"])
def test_what_is_written_at_a_site_is_what_is_then_read_there(tiny_lm, name, part):
    lm = tiny_lm(name)
    if part not in lm.parts.of_layer[1]:
        with (
            pytest.raises(UnknownSite),
            rp.steer(lm, rp.Add(rp.Direction.from_vector(f"{part}@1", np.ones(lm.d_model)))),
        ):
            pass
        return
    d = direction(lm, part)
    with observe(lm, d.site) as seen:
        lm.logits(PROMPTS[1])
        before = seen[d.site]
        with rp.steer(lm, rp.Add(d, 1.5)):
            lm.logits(PROMPTS[1])
            after = seen[d.site]
        with rp.steer(lm, rp.Ablate(d)):
            lm.logits(PROMPTS[1])
            ablated = seen[d.site]
    step = torch.tensor(1.5 * d.scale * d.vector, dtype=torch.float32)
    assert torch.allclose(after, before + step, atol=1e-5)
    assert float(d.project(ablated).abs().max()) < 1e-5 * float(before.abs().max())
    assert float((ablated - before).abs().max()) > 1e-3


def test_resid_mid_is_written_into_the_stream_and_not_only_into_the_mlp(tiny_lm):
    lm = tiny_lm("llama")
    d = direction(lm, "resid.mid")
    parts = ["resid.mid@1", "mlp.out@1", "resid.post@1"]
    with rp.steer(lm, rp.Add(d, 2.0)), observe(lm, parts) as seen:
        lm.logits(PROMPTS[1])
    mid, out, post = (seen[rp.Site.parse(p)] for p in parts)
    assert torch.allclose(mid + out, post, atol=1e-5)


@pytest.mark.parametrize("name", DECODERS)
def test_one_row_for_every_token_goes_through_networks_that_add_in_place(tiny_lm, name):
    lm = tiny_lm(name)
    site, row = rp.Site("mlp.out", 1), np.linspace(-1, 1, lm.d_model)
    with observe(lm, site) as seen, rp.steer(lm, rp.Replace(row, site=site)):
        lm.logits(PROMPTS[1])
    assert torch.allclose(seen[site], torch.tensor(row, dtype=torch.float32), atol=1e-6)


def test_a_head_is_steered_without_touching_the_others(tiny_lm):
    lm = tiny_lm("llama")
    width = lm.width(rp.Site("attn.heads", 1, 4))
    d = rp.Direction.from_vector("attn.heads@1.4", np.ones(width), scale=3.0)
    with observe(lm, "attn.heads@1") as seen:
        lm.logits(PROMPTS[1])
        before = seen[rp.Site.parse("attn.heads@1")]
        with rp.steer(lm, rp.Add(d)):
            lm.logits(PROMPTS[1])
        moved = (seen[rp.Site.parse("attn.heads@1")] - before).abs().amax((0, 1)) > 1e-6
    assert moved.nonzero().flatten().tolist() == list(range(4 * width, 5 * width))


@settings(deadline=None, max_examples=20)
@given(a=st.floats(-3, 3), b=st.floats(-3, 3))
def test_strengths_add_up_and_nested_contexts_compose(tiny_lm, a, b):
    lm = tiny_lm("gpt2")
    d = direction(lm)
    with rp.steer(lm, rp.Add(d, a)), rp.steer(lm, rp.Add(d, b)):
        nested = lm.logits(PROMPTS)
    with rp.steer(lm, rp.Add(d, a), rp.Add(d, b)):
        listed = lm.logits(PROMPTS)
    with rp.steer(lm, rp.Add(d, a + b)):
        summed = lm.logits(PROMPTS)
    assert torch.equal(nested, listed)
    assert close(listed, summed)


def test_ablation_is_idempotent_and_undoes_what_was_added(tiny_lm):
    lm = tiny_lm("llama")
    d = direction(lm)
    with rp.steer(lm, rp.Ablate(d)):
        once = lm.logits(PROMPTS)
        with rp.steer(lm, rp.Ablate(d)):
            assert close(lm.logits(PROMPTS), once)
    with rp.steer(lm, rp.Add(d, 7.0), rp.Ablate(d)):
        assert close(lm.logits(PROMPTS), once)
    with rp.steer(lm, rp.Ablate(d), rp.Add(d, 7.0)):  # order counts
        assert not close(lm.logits(PROMPTS), once)


def test_an_affine_map_is_applied_to_each_row_and_ablation_is_one_of_them(tiny_lm):
    lm = tiny_lm("llama")
    d = direction(lm)
    A, b = affine(d)
    with observe(lm, d.site) as seen:
        lm.logits(PROMPTS[1])
        before = seen[d.site].double()
        with rp.steer(lm, rp.Affine(A, b, site=d.site)):
            lm.logits(PROMPTS[1])
            after = seen[d.site]
    assert torch.allclose(after.double(), before @ torch.from_numpy(A).T + torch.from_numpy(b), atol=1e-5)
    projection = rp.Affine(np.eye(d.width) - np.outer(d.vector, d.vector), np.zeros(d.width), site=d.site)
    with rp.steer(lm, projection):
        projected = lm.logits(PROMPTS[1])
    with rp.steer(lm, rp.Ablate(d)):
        assert torch.allclose(projected, lm.logits(PROMPTS[1]), atol=1e-5)


def test_an_eraser_in_the_model_leaves_the_class_means_equal(tiny_lm):
    lm = tiny_lm("llama")
    site = direction(lm).site
    rng = np.random.default_rng(0)
    texts = [
        " ".join(rng.choice(["the", "cat", "dog", "is", "on"], 5)) + (" in" if i % 3 else " mat") for i in range(60)
    ]
    y = np.arange(60) % 3 > 0

    def rows():
        with observe(lm, site) as seen:
            found = []
            for text in texts:
                lm.logits(text)
                found.append(seen[site][0, -1].double().numpy())
        return np.stack(found)

    plain = rows()
    eraser = rp.LEACE().fit(plain, y)
    with rp.steer(lm, rp.Affine(*eraser.affine(), site=site, identity=lm.identity)):
        erased = rows()
    np.testing.assert_allclose(erased, eraser.transform(plain), atol=1e-4 * np.abs(plain).max())
    gap, was = (np.linalg.norm(X[y].mean(axis=0) - X[~y].mean(axis=0)) for X in (erased, plain))
    assert gap < 1e-4 * was


def test_an_affine_map_that_does_not_fit_is_refused(tiny_lm):
    lm = tiny_lm("llama")
    for A, b, says in (
        (np.eye(3), np.zeros(4), "not \\(3, 3\\) and \\(4,\\)"),
        (np.full((3, 3), np.inf), np.zeros(3), "NaN or infinity"),
    ):
        with pytest.raises(UsageError, match=says):
            rp.Affine(A, b, site="resid.post@1")
    with (
        pytest.raises(UsageError, match=r"Affine of width 3 does not fit resid\.post@1"),
        rp.steer(lm, rp.Affine(np.eye(3), np.zeros(3), site="resid.post@1")),
    ):
        pass


def test_zero_strength_is_the_identity_and_nothing_stays_behind(tiny_lm):
    lm = tiny_lm("gemma2")
    hooks = [(m, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in lm.net.modules()]
    before = lm.logits(PROMPTS)
    with rp.steer(lm, rp.Add(direction(lm), 0.0)):
        assert torch.equal(lm.logits(PROMPTS), before)

    def fails():
        with rp.steer(lm, rp.Add(direction(lm), 3.0)):
            lm.logits(PROMPTS)
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        fails()
    assert torch.equal(lm.logits(PROMPTS), before)
    assert [(m, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in lm.net.modules()] == hooks
    assert not board_of(lm)._handles


def test_beams_and_returned_sequences_follow_their_own_prompt(tiny_lm):
    lm = tiny_lm("llama")
    item = rp.Add(direction(lm), 4.0, tokens="span:who")
    with rp.steer(lm, item):
        options = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 5}
        together = lm.generate(PROMPTS, spans=SPANS, **options)
        alone = [t for p, s in zip(PROMPTS, SPANS, strict=True) for t in lm.generate(p, spans=[s], **options)]
    assert together == alone


@pytest.mark.parametrize("tokens", ["last", "positions:1,-2,8:12"])
def test_a_direct_call_of_the_network_is_steered_with_its_own_mask(tiny_lm, tokens):
    lm = tiny_lm("llama")
    item = rp.Add(direction(lm), 2.0, tokens=tokens)
    batch = lm.encode(PROMPTS)
    with rp.steer(lm, item):
        want = lm.logits(PROMPTS)
        got = lm.net(**lm.inputs(batch)).logits[:, -1]
        text = lm.net.generate(
            input_ids=batch.input_ids,
            attention_mask=batch.real.long(),
            max_new_tokens=5,
            do_sample=False,
            pad_token_id=0,
        )
        ours = lm.generate(PROMPTS, max_new_tokens=5)
    assert close(got, want)
    assert lm.tokenizer.batch_decode(text[:, batch.real.shape[1] :], skip_special_tokens=True) == ours


def test_stock_hidden_states_show_what_was_steered_even_if_they_were_asked_for_before(tiny_lm):
    lm = tiny_lm("qwen2")
    batch = lm.inputs(lm.encode(PROMPTS[1]))

    def states():
        with torch.no_grad():
            return lm.net(**batch, output_hidden_states=True).hidden_states

    plain = states()  # transformers installs its recording hooks here, and leaves them
    d = direction(lm)
    with rp.steer(lm, rp.Add(d, 2.0)), observe(lm, "resid.post@1") as seen:
        steered = states()
    step = torch.tensor(2.0 * d.scale * d.vector, dtype=torch.float32)
    assert torch.allclose(steered[2], plain[2] + step, atol=1e-5)
    assert torch.equal(steered[2], seen[rp.Site.parse("resid.post@1")])


def test_what_a_direct_call_generates_counts_as_generated_also_if_it_is_observed_on_the_way(tiny_lm):
    lm = tiny_lm("llama")
    ids = lm.encode(PROMPTS[1]).input_ids

    def second_step(item, watch):
        with torch.no_grad(), rp.steer(lm, item):
            first = lm.net(ids[:, :-1], use_cache=True)
            with observe(lm, "resid.post@0") if watch else contextlib.nullcontext():
                return lm.net(ids[:, -1:], past_key_values=first.past_key_values).logits

    for tokens in ("generated", "prompt"):
        item = rp.Add(direction(lm), 4.0, tokens=tokens)
        assert torch.equal(second_step(item, True), second_step(item, False))
    assert not close(second_step(rp.Add(direction(lm), 4.0, tokens="generated"), True), lm.logits(PROMPTS[1])[:, None])


def test_a_direct_call_that_cannot_be_steered_rightly_is_refused(tiny_lm):
    lm = tiny_lm("llama")
    batch = lm.encode(PROMPTS)
    d = direction(lm)
    with rp.steer(lm, rp.Add(d, tokens="generated")), pytest.raises(UnsupportedOperation, match=r"lm\.generate"):
        lm.net(**lm.inputs(batch), use_cache=False)
    with rp.steer(lm, rp.Add(d, tokens="span:who")), pytest.raises(UnsupportedOperation, match="spans"):
        lm.net(**lm.inputs(batch))
    n = batch.real.shape[1]
    with rp.steer(lm, rp.Add(d)), pytest.raises(UnsupportedOperation, match="2-D mask"):
        lm.net(input_ids=batch.input_ids, attention_mask=torch.zeros(len(PROMPTS), 1, n, n))


def test_bad_input_is_refused_with_what_exists(tiny_lm):
    lm = tiny_lm("llama")
    d = direction(lm)
    with pytest.raises(UsageError, match="all, prompt, generated, last, span:NAME, positions"):
        rp.Add(d, tokens="everything")
    with pytest.raises(UsageError, match="scale, norm, raw"):
        rp.Add(d, unit="norm-ish")
    with pytest.raises(UsageError, match="no number"):
        rp.Add(d, float("nan"))
    with pytest.raises(UsageError, match=r"at attn\.heads@1\.2 or the one at resid\.post@1\? Name one"):
        rp.Scale("attn.heads@1.2", 0.0, site="resid.post@1")
    with pytest.raises(UnknownSite, match="blocks 0–2"), rp.steer(lm, rp.Add(d, site="resid.post@9")):
        pass
    with pytest.raises(UsageError, match="wide"), rp.steer(lm, rp.Add(d, site="attn.heads@1")):
        pass
    with rp.steer(lm, rp.Add(d, tokens="span:whom")), pytest.raises(UsageError, match="their spans: who"):
        lm.logits(PROMPTS, spans=SPANS)
    foreign = direction(lm, identity=tiny_lm("gpt2").identity)
    with pytest.raises(IdentityMismatch, match="architecture: gpt2 there, llama here"), rp.steer(lm, rp.Add(foreign)):
        pass
    with rp.steer(lm, rp.Add(foreign), allow_mismatch=True):
        lm.logits(PROMPTS)
    with (
        rp.steer(lm, rp.Add(d, tokens="span:who")),
        pytest.raises(UsageError, match=r"span:who names a span that prompt 1 does not have \(1 of 3"),
    ):
        lm.logits(PROMPTS, spans=[SPANS[0], {}, SPANS[2]])
    with rp.steer(lm, rp.Add(d, [1.0, 2.0])), pytest.raises(UsageError, match="of 2 prompts, and this run has 3"):
        lm.logits(PROMPTS)
    with pytest.raises(UsageError, match=r"not a list; of a list write"), rp.steer(lm, [rp.Add(d)]):
        pass
    for bad in ([1.0, float("inf")], [[1.0, 2.0]], []):
        with pytest.raises(UsageError, match="strength"):
            rp.Add(d, bad)
    for text in ("positions:", "positions:a", "positions:1:2:3", "span", "last:3", "prompt:", "prompt:b", "promptly"):
        with pytest.raises(UsageError, match=r"positions:0,3,5:9|neither a position"):
            rp.Add(d, tokens=text)


def trace_of(lm):
    """All that steering may leave behind in a network: hooks, modules, weights."""
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in lm.net.modules()]
    return hooks, [id(m) for m in lm.net.modules()], {k: v.clone() for k, v in lm.net.state_dict().items()}


def unchanged(lm, before):
    now = trace_of(lm)
    same = all(torch.equal(v, before[2][k]) for k, v in now[2].items())
    return now[:2] == before[:2] and same and not board_of(lm)._handles and not board_of(lm).changed


def test_no_exit_leaves_a_trace(tiny_lm):
    lm = tiny_lm("gemma3_text")
    before = trace_of(lm)
    d = direction(lm)
    gated = rp.Add(d, 2.0, when=rp.When(direction(lm, layer=0), above=0.0), site="resid.mid@1")

    class Fails(rp.Add):
        def change(self, h, tokens):
            raise RuntimeError("in the forward pass")

        changed = change

    with rp.steer(lm, gated, rp.Ablate(d)):
        lm.generate(PROMPTS, max_new_tokens=3)
        assert not unchanged(lm, before)
    assert unchanged(lm, before)
    with pytest.raises(RuntimeError, match="in the forward pass"), rp.steer(lm, gated, Fails(d)):
        lm.generate(PROMPTS, max_new_tokens=3)
    assert unchanged(lm, before)
    for bad in (rp.Add(d, site="resid.post@9"), rp.Add(d, site="attn.heads@1")):  # found after the good ones
        with pytest.raises(UsageError), rp.steer(lm, gated, bad):
            pass
        assert unchanged(lm, before)
    outer = rp.steer(lm, gated)
    outer.__enter__()
    with rp.steer(lm, rp.Ablate(d)):
        outer.__exit__(None, None, None)  # left in the wrong order
        ablated = lm.logits(PROMPTS)
    assert unchanged(lm, before)
    with rp.steer(lm, rp.Ablate(d)):
        assert torch.equal(lm.logits(PROMPTS), ablated)


def test_an_exception_half_way_through_registration_leaves_what_was_there(tiny_lm, monkeypatch):
    lm = tiny_lm("llama")
    before, d = trace_of(lm), direction(lm)
    block = lm.architecture.blocks(lm.net)[2]

    def refuses(*args, **kwargs):
        raise RuntimeError("no hook here")

    with rp.steer(lm, rp.Add(d, 3.0)):
        outer = lm.logits(PROMPTS)
        with monkeypatch.context() as patch:
            patch.setattr(block, "register_forward_hook", refuses)
            with (
                pytest.raises(RuntimeError, match="no hook here"),
                rp.steer(lm, rp.Ablate(direction(lm, layer=0)), rp.Ablate(direction(lm, layer=2))),
            ):
                pass
        assert torch.equal(lm.logits(PROMPTS), outer)
    assert unchanged(lm, before)


def test_thousands_of_entries_and_exits_leave_no_trace_and_no_memory(tiny_lm):
    lm = tiny_lm("gpt2")
    before, d = trace_of(lm), direction(lm)
    items = [rp.Add(d, 2.0, tokens="last"), rp.Ablate(d, when=rp.When(direction(lm, layer=0), above=0.0))]

    def cycles(n):
        for i in range(n):
            with rp.steer(lm, *items):
                if i % 100 == 0:
                    lm.logits(PROMPTS[0])

    cycles(100)
    gc.collect()
    objects = len(gc.get_objects())
    cycles(3000)
    gc.collect()
    assert len(gc.get_objects()) - objects < 100
    assert unchanged(lm, before)


def test_samples_and_static_caches_are_steered_like_any_other(tiny_lm):
    lm = tiny_lm("llama")
    item = rp.Add(direction(lm), [1.0, -4.0, 4.0], tokens="last")
    with rp.steer(lm, item):
        dynamic = lm.generate(PROMPTS, max_new_tokens=6)
        assert lm.generate(PROMPTS, max_new_tokens=6, cache_implementation="static") == dynamic
        options = {"max_new_tokens": 6, "do_sample": True, "seed": 5, "num_return_sequences": 2}
        sampled = lm.generate(PROMPTS, **options)
        assert lm.generate(PROMPTS, use_cache=False, **options) == sampled
    assert lm.generate(PROMPTS, max_new_tokens=6) != dynamic


def test_noise_is_normal_and_independent_between_seeds_sites_prompts_and_positions():
    drawn = {}
    for seed, site, prompt in itertools.product((0, 1), ("resid.post@1", "embed"), (0, 1)):
        keys = _mixed(torch.tensor([_hashed(rp.Site.parse(site), seed, prompt)]) + torch.arange(300) * _GOLDEN)
        drawn[seed, site, prompt] = normals(keys, 64)
    for x in drawn.values():
        assert abs(float(x.mean())) < 4 / x.numel() ** 0.5
        assert abs(float(x.std()) - 1) < 4 / (2 * x.numel()) ** 0.5
        assert scipy.stats.kstest(x.flatten().numpy(), "norm").pvalue > 1e-4
        between = np.corrcoef(x[:60].numpy())
        assert np.abs(between[~np.eye(60, dtype=bool)]).max() < 6 / 64**0.5
    for a, b in itertools.combinations(drawn.values(), 2):
        assert abs(float((a * b).mean())) < 5 / a.numel() ** 0.5


def test_one_seed_gives_each_prompt_its_own_noise_and_a_list_gives_a_prompt_its_own_wherever_it_is(tiny_lm):
    lm = tiny_lm("llama")
    same = ["the cat", "the cat"]
    with rp.steer(lm, rp.Noise(0.5, site="embed", seed=1)):
        first, second = lm.logits(same)
        assert torch.allclose(lm.logits(same[0])[0], first, atol=1e-5)
    assert not torch.allclose(first, second, atol=1e-2)
    with rp.steer(lm, rp.Noise(0.5, site="embed", seed=[7, 8])):
        both = lm.logits(same)
    with rp.steer(lm, rp.Noise(0.5, site="embed", seed=[8])):
        assert torch.allclose(lm.logits(same[1])[0], both[1], atol=1e-5)


def test_a_compiled_network_is_steered_while_it_should_be_and_not_after():
    """Compiled code knows nothing of hooks: networks run without it as long as they are steered or read."""
    lm = tiny_model()
    runs = []

    def counting(graph, inputs):
        def run(*args):
            runs.append(1)
            return graph(*args)

        return run

    item, batch = rp.Add(direction(lm), 2.0, tokens="last"), lm.inputs(lm.encode(PROMPTS))

    def logits():
        with torch.no_grad():
            return lm.net(**batch).logits[:, -1]

    plain = logits()
    with rp.steer(lm, item):
        steered = logits()
        lm.net.compile(backend=counting)
        assert close(logits(), steered)
        assert not runs  # nor is steering compiled into it
    assert close(logits(), plain)
    assert runs
    with rp.steer(lm, item):
        assert close(logits(), steered)
    with observe(lm, "resid.post@1") as seen:
        logits()
        assert seen
    runs.clear()
    assert close(logits(), plain)
    assert runs
