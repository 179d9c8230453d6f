"""DoLa against its formulas in float64: one prompt at a time, stock hidden states, no cache."""

import dataclasses
import math
from functools import cache

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import kl_div

import reprobe as rp
from reprobe.errors import UnsupportedOperation, UsageError
from reprobe.methods.dola import IMPLAUSIBLE, DoLa, divergences, plausible_tokens

LAYERS, N = 7, 6
PROMPTS = ["the inner ant is on", "a", "of the other end and in it is the"]
FAMILIES = ["llama", "gemma3_text", "gemma2", "gpt2", "granite", "cohere", "phi", "qwen2", "falcon.alibi", "opt"]
#: What a family does to the logits of its head, from the tiny models' configurations.
AFTER = {
    "gemma2": lambda z: 3.0 * torch.tanh(z / 3.0),
    "granite": lambda z: z / 3.1,
    "cohere": lambda z: z * 0.29,
}


def net_of(name):
    """A tiny net that is sure of some tokens, and whose last block changes the stream a great deal: else the first
    candidate is always the farthest."""
    net = tiny.tiny_net(name, num_hidden_layers=LAYERS)
    lm = rp.LanguageModel(net, tiny.tiny_tokenizer(), name=name)
    last = lm.architecture.blocks(net)[-1]
    loud = [p for n, p in last.named_parameters() if "post_feedforward_layernorm" in n]
    with torch.no_grad():
        for p in loud or [lm.architecture.projection(net, LAYERS - 1).weight]:
            p.mul_(12)
        lm.architecture.final_norm(net).weight.mul_(3)
    return net


@cache
def model(name):
    return rp.LanguageModel(net_of(name), tiny.tiny_tokenizer(), name=f"tiny-{name}")


@cache
def exact(name):
    return net_of(name).double()


# -- the method, written a second time ------------------------------------------------------------------------------


def layer_logits(net, lm, ids, layers, *, raw=False, add=None, after=None):
    """Logits of every token of `ids`: the mature (tokens, vocab) and the early (layers, tokens, vocab).

    `add` is a block and a vector added to what it returns; `after` what the family does to the head's output."""
    handles = []
    if add is not None:
        block = lm.architecture.blocks(net)[add[0]]
        hook = lambda m, a, out: out + add[1] if isinstance(out, torch.Tensor) else (out[0] + add[1], *out[1:])  # noqa: E731
        handles.append(block.register_forward_hook(hook, prepend=True))
    with torch.no_grad():
        out = net(torch.tensor([ids]), output_hidden_states=True, use_cache=False)
        for handle in handles:
            handle.remove()
        early = torch.stack([out.hidden_states[j][0] for j in layers])
        if not raw:
            early = lm.architecture.final_norm(net)(early)
        early = net.get_output_embeddings()(early)
    return out.logits[0], early if raw or after is None else after(early)


def jsd(p_log, q_log):
    p, q = p_log.exp(), q_log.exp()
    m = (p + q) / 2
    return sum(float(torch.special.xlogy(x, x / m).sum()) for x in (p, q)) / 2


def published(p_log, q_log):
    """As the published code calls it: KL with its arguments reversed, and a mean over the vocabulary."""
    m = 0.5 * (p_log.exp() + q_log.exp())
    kl = [kl_div(x, m, reduction="none").mean(-1) for x in (p_log, q_log)]
    return float(0.5 * (kl[0] + kl[1]))


class Reference:
    """DoLa in float64 on one tiny model. `forbidden` tokens are no part of the vocabulary."""

    def __init__(self, name, dola, *, net=None, lm=None, forbidden=(), add=None):
        self.net, self.lm = net or exact(name), lm or model(name)
        self.dola, self.forbidden, self.add = dola, list(forbidden), add
        self.layers = dola.candidates(self.lm)
        self.after = AFTER.get(name)

    def logits(self, ids):
        raw = self.dola.compat is not None
        return layer_logits(self.net, self.lm, ids, self.layers, raw=raw, add=self.add, after=self.after)

    def step(self, mature, early):
        """Of one place: log p_N, log p_j (layers, vocab), the divergences and the plausible tokens."""
        allowed = torch.ones(len(mature), dtype=torch.bool)
        allowed[self.forbidden] = False
        p = mature.masked_fill(~allowed, -torch.inf).log_softmax(-1)
        q = early.masked_fill(~allowed, -torch.inf).log_softmax(-1)
        plausible = p >= p.max() + math.log(self.dola.alpha)
        where = allowed
        a, b = p, q
        if self.dola.jsd == "plausible":
            where = plausible
            a = p.masked_fill(~where, -torch.inf).log_softmax(-1)
            b = q.masked_fill(~where, -torch.inf).log_softmax(-1)
        measure = published if self.dola.compat else jsd
        return p, q, [measure(a[where], one[where]) for one in b], plausible

    def contrast(self, p, q, chosen, plausible, ids):
        score = torch.where(plausible, p - q[chosen], -torch.inf)
        for token in set(ids):
            s = float(score[token])
            score[token] = s * self.dola.repetition_penalty if s < 0 else s / self.dola.repetition_penalty
        return score

    def scores(self, texts):
        """Log-probabilities of the next token of each of some texts that are decoded together."""
        steps = [self.step(mature[-1], early[:, -1]) for mature, early in map(self.logits, texts)]
        if self.dola.compat:
            together = int(np.mean([s[2] for s in steps], 0).argmax())
        chosen = [together if self.dola.compat else int(np.argmax(s[2])) for s in steps]
        return torch.stack(
            [
                self.contrast(p, q, j, plausible, ids).log_softmax(-1)
                for (p, q, _, plausible), j, ids in zip(steps, chosen, texts, strict=True)
            ]
        )

    def decoded(self, prompts, n):
        texts = [self.lm.encode(p).row(0).tolist() for p in prompts]
        seen = []
        for _ in range(n):
            seen.append(self.scores(texts))
            texts = [[*ids, int(s.argmax())] for ids, s in zip(texts, seen[-1], strict=True)]
        return [ids[-n:] for ids in texts], torch.stack(seen, 1)


def generated(lm, prompts, dola, n=N, **options):
    """Token ids that the library generates, (prompts, n)."""
    kept = {}

    def stop(ids, scores):
        kept["ids"] = ids
        return torch.zeros(len(ids), dtype=torch.bool)

    options = {"max_new_tokens": n, "min_new_tokens": n, "stopping_criteria": [stop]} | options
    lm.generate(prompts, decoding=dola, **options)
    return kept["ids"][:, -n:].tolist()


def scored(lm, prompts, dola, n=N, **options):
    """The same with the log-probabilities that tokens were chosen from, (prompts, n, vocab)."""
    seen = []
    record = lambda ids, scores: seen.append(scores.clone()) or scores  # noqa: E731
    ids = generated(lm, prompts, dola, n, logits_processor=[record], **options)
    return ids, torch.stack(seen, 1)


def agree(got, want):
    assert torch.equal(got > -torch.inf, want > -torch.inf)
    kept = want > -torch.inf
    assert float((got.double() - want)[kept].abs().max()) < 2e-4


# -- formulas -------------------------------------------------------------------------------------------------------


@given(st.integers(0, 10**6), st.floats(0.1, 12), st.sampled_from([4, 2**15]))
@settings(max_examples=40, deadline=None)
def test_the_divergences_are_those_written_out(seed, spread, chunk):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("reprobe.methods.dola._CHUNK", chunk)
        require_divergences(seed, spread)


def require_divergences(seed, spread):
    rng = torch.Generator().manual_seed(seed)
    p = (spread * torch.randn(2, 31, generator=rng, dtype=torch.float64)).log_softmax(-1)
    q = (spread * torch.randn(2, 3, 31, generator=rng, dtype=torch.float64)).log_softmax(-1)
    for compat, reference in ((None, jsd), ("dola", published)):
        for dtype, within in ((torch.float64, 1e-12), (torch.float32, 3e-6)):
            # Of logits, which log-probabilities are too.
            found = divergences((p + 1.5).to(dtype), (q - 2.5).to(dtype), compat)
            want = torch.tensor(
                [[reference(a, b) for b in bs] for a, bs in zip(p, q, strict=True)], dtype=torch.float64
            )
            assert torch.allclose(found.double(), want, atol=within, rtol=1e-5 if compat else 0)


def test_the_divergence_of_a_distribution_from_itself_is_0_and_of_disjoint_ones_log_2():
    p = torch.tensor([[0.25, 0.75, 0.0, 0.0]]).log().clamp(min=-1e30)
    q = torch.tensor([[0.0, 0.0, 0.5, 0.5]]).log().clamp(min=-1e30)
    found = divergences(p, torch.stack([p, q], 1))
    assert found[0].tolist() == pytest.approx([0.0, math.log(2)], abs=1e-6)


def test_plausible_are_the_tokens_of_at_least_alpha_times_the_likeliest():
    p = torch.tensor([[0.5, 0.06, 0.04, 0.4]]).log()
    assert plausible_tokens(p, 0.1).tolist() == [[True, True, False, True]]
    assert plausible_tokens(p + 3.0, 1.0).tolist() == [[True, False, False, False]]


# -- texts ----------------------------------------------------------------------------------------------------------

WAYS = [
    DoLa([1, 2, 3, 4, 5, 6]),
    DoLa("high", repetition_penalty=1.0),
    DoLa(3),
    DoLa([2, 5], alpha=0.02, repetition_penalty=0.7),
    DoLa([0, 2, 4, 6], jsd="plausible"),
    DoLa([1, 2, 3, 4, 5, 6], compat="dola"),
]


@pytest.mark.parametrize("dola", WAYS, ids=str)
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3_text"])
def test_batches_padded_and_cached_give_what_single_texts_do_in_float64(name, dola):
    lm = model(name)
    want, scores = Reference(name, dola, forbidden=[tiny.EOS]).decoded(PROMPTS, N)
    assert generated(lm, PROMPTS, dola) == want
    assert generated(lm, PROMPTS, dola, use_cache=False) == want
    ids, found = scored(lm, PROMPTS, dola)
    assert ids == want
    agree(found, scores)
    if not dola.compat:  # which chooses for a batch together
        assert [generated(lm, p, dola)[0] for p in PROMPTS] == want


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_read_out_as_its_own_head_would(name):
    for dola in (DoLa([1, 3, 5]), DoLa([1, 3, 5], compat="dola")):
        want, scores = Reference(name, dola, forbidden=[tiny.EOS]).decoded(PROMPTS[:2], 3)
        ids, found = scored(model(name), PROMPTS[:2], dola, 3)
        assert ids == want
        agree(found, scores)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_rows_of_a_batch_choose_layers_of_their_own(name):
    """Else the tests of batches would show nothing of it."""
    ref = Reference(name, DoLa([1, 2, 3, 4, 5, 6]))
    texts = [ref.lm.encode(prompt).row(0).tolist() for prompt in PROMPTS]
    found = [ref.step(mature[-1], early[:, -1])[2] for mature, early in map(ref.logits, texts)]
    own = [int(np.argmax(d)) for d in found]
    assert len(set(own)) > 1
    together = Reference(name, DoLa([1, 2, 3, 4, 5, 6], compat="dola"))
    found = [together.step(mature[-1], early[:, -1])[2] for mature, early in map(together.logits, texts)]
    assert len({int(np.argmax(d)) for d in found}) > 1


def test_greedy_tokens_do_not_depend_on_the_shortcut():
    """The score processor takes it only where it alone decides: with another one after it, everything is computed."""
    lm, prompts = model("qwen2"), [f"{a} {b}" for a in ("the", "an ant", "in it") for b in ("is", "on", "and", "of")]
    for dola in (DoLa([1, 2, 3, 4, 5, 6]), DoLa([1, 4], alpha=0.5), DoLa(2, repetition_penalty=1.7)):
        short = generated(lm, prompts, dola, 12)
        assert short == scored(lm, prompts, dola, 12)[0]


@pytest.mark.parametrize("name", ["llama", "gemma2", "phi"])
@pytest.mark.parametrize("why", ["memory", "head"])
def test_early_logits_that_are_computed_when_asked_for_give_the_same(name, why, monkeypatch):
    lm, prompts = model(name), PROMPTS[:2]
    ways = [DoLa([1, 3, 5]), DoLa(3), DoLa([1, 3, 5], compat="dola"), DoLa([2, 4], jsd="plausible")]
    want = [scored(lm, prompts, dola, 4) for dola in ways]
    greedy = [generated(lm, prompts, dola, 4) for dola in ways]
    if why == "memory":
        monkeypatch.setattr("reprobe.methods.dola._AT_ONCE", 1)
    else:  # what a quantiser or an adapter puts in its place is called as it is
        monkeypatch.setattr(lm.net.get_output_embeddings(), "__class__", type("Other", (torch.nn.Linear,), {}))
    assert [generated(lm, prompts, dola, 4) for dola in ways] == greedy
    for dola, (ids, scores) in zip(ways, want, strict=True):
        again, found = scored(lm, prompts, dola, 4)
        assert again == ids
        agree(found, scores.double())


def test_the_unembedding_is_multiplied_once_per_token_with_the_rows_of_all_layers(monkeypatch):
    lm, dola, products = model("llama"), DoLa([1, 2, 3, 4, 5, 6]), []
    plain = torch.nn.functional.linear

    def counted(x, weight, bias=None):
        if weight.shape[0] == tiny.VOCAB:
            products.append(x.shape[:-1])
        return plain(x, weight, bias)

    monkeypatch.setattr("reprobe.model.architectures.linear", counted)
    monkeypatch.setattr(torch.nn.functional, "linear", counted)
    generated(lm, PROMPTS, dola, 4, repetition_penalty=None)
    assert [tuple(shape) for shape in products if 0 not in shape] == [(3, 7)] * 4


def test_hooks_at_the_head_see_the_network_and_ours_are_gone_after_any_end():
    lm, seen = model("gpt2"), []
    head = lm.net.get_output_embeddings()
    handles = [
        head.register_forward_pre_hook(lambda m, args: seen.append(args[0][:, -1].clone())),
        head.register_forward_hook(lambda m, args, out: seen.append(out[:, -1].clone())),
    ]

    def fail(ids, scores):
        raise RuntimeError

    try:
        lm.generate(PROMPTS, decoding=DoLa([2, 5]), max_new_tokens=1)
        state, logits = seen
        torch.testing.assert_close(logits, lm.unembed(state), atol=1e-5, rtol=0)
        with pytest.raises(RuntimeError):
            lm.generate(PROMPTS, decoding=DoLa([2, 5]), logits_processor=[fail])
    finally:
        for handle in handles:
            handle.remove()
    assert not head._forward_hooks
    assert not head._forward_pre_hooks


def test_no_divergence_is_computed_where_one_token_is_plausible(monkeypatch):
    lm = model("llama")
    monkeypatch.setattr("reprobe.methods.dola._Contrast._whole", None)
    greedy = generated(lm, PROMPTS, None)
    assert generated(lm, PROMPTS, DoLa(alpha=1.0)) == greedy
    assert scored(lm, PROMPTS, DoLa(alpha=1.0))[0] == greedy
    with pytest.raises(TypeError):
        generated(lm, PROMPTS, DoLa(alpha=0.1))


def test_sampling_draws_from_the_contrast_and_repeats_with_its_seed():
    lm, dola = model("llama"), DoLa([1, 2, 3, 4, 5, 6], alpha=0.3)
    options = {"do_sample": True, "temperature": 0.8, "num_return_sequences": 40, "top_k": 0}
    ids = generated(lm, PROMPTS[0], dola, 1, seed=1, **options)
    assert ids == generated(lm, PROMPTS[0], dola, 1, seed=1, **options)
    ref = Reference("llama", dola, forbidden=[tiny.EOS])
    scores = ref.scores([lm.encode(PROMPTS[0]).row(0).tolist()])[0]
    drawn, p = np.bincount(np.ravel(ids), minlength=tiny.VOCAB) / 40, (scores / 0.8).softmax(-1).numpy()
    assert set(np.flatnonzero(drawn)) <= set(np.flatnonzero(p))
    assert np.abs(drawn - p).sum() / 2 < 0.35


def test_beams_find_the_likeliest_text_of_all():
    lm, dola, n = model("llama"), DoLa([1, 2, 3, 4, 5, 6], alpha=0.4), 3
    ref, counts = Reference("llama", dola, forbidden=[tiny.EOS]), []
    for prompt in PROMPTS:
        texts = [(0.0, lm.encode(prompt).row(0).tolist())]
        for _ in range(n):
            scores = ref.scores([ids for _, ids in texts])
            texts = [
                (total + float(s[t]), [*ids, int(t)])
                for (total, ids), s in zip(texts, scores, strict=True)
                for t in (s > -torch.inf).nonzero()
            ]
        counts.append(len(texts))
        # All prompts together: beams are re-ordered between passes, each row among its own.
        kept = lm.generate(PROMPTS, decoding=dola, num_beams=40, max_new_tokens=n, min_new_tokens=n)
        best = max(texts, key=lambda text: text[0])[1][-n:]
        assert kept[PROMPTS.index(prompt)] == lm.tokenizer.decode(best, skip_special_tokens=True)
    assert 1 < max(counts) <= 40, "there is nothing to search, or not all texts fit the beams"


def test_pads_are_no_part_of_the_text_for_the_repetition_penalty():
    """A tokenizer whose pad is an ordinary word: padding it on must not make it repeated."""
    tokenizer = tiny.tiny_tokenizer()
    dola = DoLa([1, 2, 3, 4, 5, 6], repetition_penalty=9.0, alpha=0.01)
    lm = model("llama")
    plain = [generated(lm, p, dola, 4)[0] for p in PROMPTS]
    for token in {t for row in plain for t in row}:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(token)
        other = rp.LanguageModel(lm.net, tokenizer, name="other pad")
        assert generated(other, PROMPTS, dola, 4) == plain


@pytest.mark.parametrize("dola", [DoLa([1, 2, 3, 4, 5, 6]), DoLa(4), DoLa([2, 4, 6], compat="dola")], ids=str)
def test_it_composes_with_steering(dola):
    lm, vector = model("llama"), np.random.default_rng(0).normal(size=27)
    item = rp.Add(rp.Direction.from_vector("resid.post@2", vector), 1.5)
    add = (2, torch.from_numpy(1.5 * vector))
    want, scores = Reference("llama", dola, forbidden=[tiny.EOS], add=add).decoded(PROMPTS, 4)
    with rp.steer(lm, item):
        ids, found = scored(lm, PROMPTS, dola, 4)
        assert generated(lm, PROMPTS, dola, 4) == ids
    assert ids == want
    agree(found, scores)
    assert want != Reference("llama", dola, forbidden=[tiny.EOS]).decoded(PROMPTS, 4)[0]


def test_it_leaves_steering_and_monitors_at_the_final_norm_alone():
    lm = model("llama")
    direction = rp.Direction.from_vector("final", np.random.default_rng(1).normal(size=27))
    with rp.steer(lm, rp.Add(direction, 0.5)) as done, lm.monitor(direction) as monitor:
        lm.generate(PROMPTS, decoding=DoLa([1, 4]), max_new_tokens=3, min_new_tokens=3)
    assert [int(r.generated.sum()) for r in monitor.readings] == [2, 2, 2]
    # Each token of the prompts once, and two generated ones each: early layers pass the norm without being steered.
    assert done[0].tokens == int(lm.encode(PROMPTS).real.sum()) + 2 * len(PROMPTS)


# -- scores ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dola", WAYS, ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma2", "falcon.alibi"])
def test_scores_of_continuations_are_the_sums_of_their_tokens_contrasts(name, dola):
    dola = dataclasses.replace(dola, alpha=0.1 if name == "gemma2" else 1e-3)
    lm, ref = model(name), Reference(name, dola)
    answers = [[" the inn", " on"], [" other end of it"], [" is", " is in", " ant"]]
    traces = dola.trace(lm, PROMPTS, answers)
    free, bound = (dola.logprobs(lm, PROMPTS, answers, plausible=p, batch_tokens=20) for p in (False, True))
    seen = set()
    for i, (prompt, group) in enumerate(zip(PROMPTS, answers, strict=True)):
        for k, answer in enumerate(group):
            ids, start = lm.encode(prompt + answer).row(0).tolist(), len(lm.encode(prompt).row(0))
            mature, early = ref.logits(ids)
            want, floor, trace = [], [], traces[i][k]
            for t in range(start, len(ids)):
                p, q, d, plausible = ref.step(mature[t - 1], early[:, t - 1])
                want.append(float(p[ids[t]] - q[int(np.argmax(d)), ids[t]]))
                floor.append(want[-1] if plausible[ids[t]] else IMPLAUSIBLE)
                if len(d) > 1:
                    np.testing.assert_allclose(trace.divergence[t - start], d, atol=1e-5)
                    assert trace.chosen[t - start] == ref.layers[int(np.argmax(d))]
                np.testing.assert_allclose(trace.early[t - start], q[:, ids[t]], atol=2e-4)
                seen.add(bool(plausible[ids[t]]))
            assert "".join(trace.tokens) == answer
            assert free[i][k] == pytest.approx(sum(want), abs=2e-4)
            assert bound[i][k] == pytest.approx(sum(floor), abs=2e-4)
    assert seen == {True, False}, "tokens are all plausible, or none is: the bound was not tested"


def test_scoring_composes_with_steering():
    lm, dola, vector = model("llama"), DoLa([1, 2, 3, 4, 5, 6]), np.random.default_rng(2).normal(size=27)
    with rp.steer(lm, rp.Add(rp.Direction.from_vector("resid.post@1", vector), 1.0)):
        found = dola.logprobs(lm, PROMPTS[0], [" an end"], plausible=False)
    ref = Reference("llama", dola, add=(1, torch.from_numpy(vector)))
    ids, start = lm.encode(PROMPTS[0] + " an end").row(0).tolist(), len(lm.encode(PROMPTS[0]).row(0))
    mature, early = ref.logits(ids)
    want = 0.0
    for t in range(start, len(ids)):
        p, q, d, _ = ref.step(mature[t - 1], early[:, t - 1])
        want += float(p[ids[t]] - q[int(np.argmax(d)), ids[t]])
    assert found[0][0] == pytest.approx(want, abs=2e-4)


# -- which layers ---------------------------------------------------------------------------------------------------


def test_buckets_are_every_second_layer_of_a_half_and_leave_out_a_tied_embedding():
    def bucket(name, layers, tied):
        net = tiny.tiny_net("llama", num_hidden_layers=layers, tie_word_embeddings=tied)
        return DoLa(name).candidates(rp.LanguageModel(net, tiny.tiny_tokenizer(), name="x"))

    assert bucket("high", 30, True) == tuple(range(15, 30, 2))
    assert bucket("low", 30, True) == tuple(range(2, 15, 2))
    assert bucket("low", 18, False) == (0, 2, 4, 6, 8)
    assert bucket("high", 18, False) == (9, 11, 13, 15, 17)
    assert bucket("high", 44, False) == tuple(range(24, 44, 2))
    assert bucket("low", 44, False) == tuple(range(0, 20, 2))
    with pytest.raises(UsageError, match="too few for such a bucket; name layers, 0 to 2"):
        bucket("low", 3, True)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"layers": "middle"}, "'high', 'low', a layer's number"),
        ({"layers": []}, "layers is empty"),
        ({"layers": [1, 1]}, "names a layer twice"),
        ({"layers": [1, -2]}, "holds -2"),
        ({"layers": [1.5]}, "holds 1.5"),
        ({"layers": True}, "holds True"),
        ({"alpha": 0.0}, "0 < alpha ≤ 1"),
        ({"alpha": 1.2}, "0 < alpha ≤ 1"),
        ({"alpha": math.nan}, "0 < alpha ≤ 1"),
        ({"repetition_penalty": 0}, "1 is no penalty"),
        ({"jsd": "top"}, "one of vocabulary, plausible"),
        ({"compat": "hf"}, "None and 'dola'"),
        ({"compat": "dola", "jsd": "plausible"}, "over the whole vocabulary"),
    ],
)
def test_values_that_cannot_be_are_refused(options, said):
    with pytest.raises(UsageError, match=said):
        DoLa(**options)


def test_models_and_ways_to_generate_that_do_not_fit_are_refused(tiny_lm):
    with pytest.raises(UnsupportedOperation, match="encoder"):
        DoLa().trace(tiny_lm("bert"), "the", [" ant"])
    with pytest.raises(UsageError, match=r"layer 7 is no premature layer.*0 to 6"):
        model("llama").generate("the", decoding=DoLa([2, 7]))
    single = tiny.tiny_model("llama", num_hidden_layers=1)
    with pytest.raises(UsageError, match="single block"):
        single.generate("the", decoding=DoLa(0))
    for options in ({"prompt_lookup_num_tokens": 2}, {"guidance_scale": 1.5}, {"assistant_model": single.net}):
        with pytest.raises(UnsupportedOperation, match="greedy decoding, sampling and beams"):
            model("llama").generate("the", decoding=DoLa([2]), **options)
    with pytest.raises(UsageError, match="after the contrast"):
        model("llama").generate("the", decoding=DoLa([2]), repetition_penalty=1.3)


# -- the bundled models ---------------------------------------------------------------------------------------------

WRITE = ["Q: What happens to you if you eat watermelon seeds?\nA:"]


def same_as_reference(lm, prompts, dola, n):
    ref = Reference("", dola, net=lm.net, lm=lm, forbidden=[lm.tokenizer.eos_token_id])
    eos = lm.net.generation_config.eos_token_id
    ref.forbidden = [eos] if isinstance(eos, int) else list(eos)
    for prompt in prompts:
        assert generated(lm, prompt, dola, n) == ref.decoded([prompt], n)[0]


@pytest.mark.models
@pytest.mark.parametrize("name", ["smollm2-135m", "gemma3-270m"])
def test_on_the_bundled_models_texts_are_those_of_the_plain_loop(real_lm, name):
    for dola in (DoLa("high"), DoLa("low", compat="dola")):
        same_as_reference(real_lm(name), WRITE, dola, 3)


@pytest.mark.slow
@pytest.mark.models
def test_fifty_texts_in_the_published_way_are_those_of_the_plain_loop(real_lm):
    questions = rp.PromptSet.load("misconceptions").frame["question"].unique(maintain_order=True).head(50)
    prompts = [f"Q: {q}\nA:" for q in questions]
    same_as_reference(real_lm("smollm2-135m"), prompts, DoLa("high", compat="dola"), 20)
