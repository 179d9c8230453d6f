"""A live probe reads what a stored one would, of every token and of no pad."""

import numpy as np
import pytest
import torch
from tiny import DECODERS, ENCODERS, FAMILIES, tiny_model, tiny_net, tiny_tokenizer

import reprobe as rp
from reprobe.errors import IdentityMismatch, UnknownSite, UnsupportedOperation, UsageError
from reprobe.model.hooks import board_of, capture

PROMPTS = ["the cat", "a dog is on the mat and", "in"]
SITES = "resid.post@*,attn.heads@1.2,attn.heads@1.0,mlp.out@0,embed,final"


def directions(lm, sites=SITES, **known):
    rng = np.random.default_rng(0)
    made = []
    for site in lm.sites(sites):
        v = rng.normal(size=lm.width(site))
        made.append(rp.Direction.from_vector(site, v, scale=rng.uniform(0.5, 3), offset=rng.normal(), **known))
    return made


def captured(lm, ids, found):
    """Scores of one text, from what `capture` stores of its tokens alone."""
    seen = capture(lm, {"input_ids": torch.tensor([ids])}, [d.site for d in found])
    return np.stack([d.score(seen[d.site][0].double().numpy()) / d.scale for d in found])


def ids_of(lm, reading):
    vocabulary = {lm.tokenizer.decode([i]): i for i in range(lm.tokenizer.vocab_size)}
    return [vocabulary[piece] for piece in reading.tokens]


def close(a, b):
    assert a.shape == b.shape
    np.testing.assert_allclose(a, b, atol=2e-4 * max(1.0, np.abs(b).max()))


@pytest.mark.parametrize("name", FAMILIES)
def test_scores_are_those_of_stored_activations_whatever_the_padding(tiny_lm, name):
    lm = tiny_lm(name)
    found = directions(lm)
    for padding in ("left", "right"):
        with lm.monitor(found) as monitor:
            lm.logits(PROMPTS, padding=padding)
        assert monitor.sites == tuple(d.site for d in found)
        for prompt, reading in zip(PROMPTS, monitor.readings, strict=True):
            ids = lm.encode(prompt).row(0).tolist()
            assert reading.tokens == tuple(lm.tokenizer.decode([i]) for i in ids)
            assert not reading.generated.any()
            close(reading.scores, captured(lm, ids, found))


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("name", DECODERS)
def test_generated_tokens_are_scored_as_a_pass_over_the_finished_text_scores_them(tiny_lm, name, use_cache):
    lm = tiny_lm(name)
    found = directions(lm)
    out = []
    keep = lambda ids, scores: out.append(ids.clone()) or scores  # noqa: E731
    with lm.monitor(found) as monitor:
        lm.generate(PROMPTS, max_new_tokens=4, min_new_tokens=4, use_cache=use_cache, logits_processor=[keep])
    assert len(out) == 4
    width = lm.encode(PROMPTS).real.shape[1]
    for row, (prompt, reading) in enumerate(zip(PROMPTS, monitor.readings, strict=True)):
        ids = lm.encode(prompt).row(0).tolist() + out[-1][row, width:].tolist()
        assert reading.generated.tolist() == [False] * (len(ids) - 3) + [True] * 3
        assert reading.tokens == tuple(lm.tokenizer.decode([i]) for i in ids)
        close(reading.scores, captured(lm, ids, found))
    assert not board_of(lm).followed


def test_a_monitor_sees_what_a_steering_leaves(tiny_lm):
    lm = tiny_lm("llama")
    found = directions(lm, "resid.post@*")
    push = rp.Add(found[1], 3.0)
    with lm.monitor(found) as before:
        lm.logits(PROMPTS)
    with lm.monitor(found) as outside, rp.steer(lm, push), lm.monitor(found) as inside:
        lm.logits(PROMPTS)
    for plain, a, b in zip(before.readings, outside.readings, inside.readings, strict=True):
        np.testing.assert_array_equal(a.scores, b.scores)
        np.testing.assert_allclose(a.scores[0], plain.scores[0], atol=1e-5)
        np.testing.assert_allclose(a.scores[1], plain.scores[1] + 3.0, atol=1e-4)
    with rp.steer(lm, push), rp.observe(lm, "resid.post@2") as seen, lm.monitor(found) as monitor:
        lm.logits(PROMPTS[0])
    want = found[2].score(seen[found[2].site][0].double().numpy()) / found[2].scale
    np.testing.assert_allclose(monitor.readings[0].scores[2], want, atol=1e-5)


def finishing(lm, after, end):
    """A processor of logits that makes row i end with token `end` after `after[i]` tokens, and never before."""
    step = 0

    def force(ids, scores):
        nonlocal step
        scores[:, [0, 1, 2, 3, end]] = -1e4
        scores[:, 50] += 1e3
        for row, n in enumerate(after):
            if step == n:
                scores[row, end] = 1e5
        step += 1
        return scores

    return force


@pytest.mark.parametrize("shared", [False, True], ids=["a pad of its own", "the end token is the pad"])
def test_what_fills_up_rows_that_are_done_is_left_out(shared):
    tokenizer = tiny_tokenizer()
    if shared:
        tokenizer.pad_token = tokenizer.eos_token
    lm = rp.LanguageModel(tiny_net("llama"), tokenizer, name="tiny")
    found = directions(lm, "resid.post@1")
    with lm.monitor(found) as monitor:
        lm.generate(PROMPTS, max_new_tokens=9, logits_processor=[finishing(lm, [2, 5, 1], lm.tokenizer.eos_token_id)])
    # Two tokens and the end token, all of which were read; of the row that ends last, the end token was not.
    assert [int(r.generated.sum()) for r in monitor.readings] == [3, 5, 2]
    for reading in monitor.readings:
        close(reading.scores, captured(lm, ids_of(lm, reading), found))


def test_rows_that_end_by_another_rule_are_cut_there(tiny_lm):
    lm = tiny_lm("llama")
    found = directions(lm, "resid.post@1")
    counts = torch.tensor([2, 4, 3])
    width = lm.encode(PROMPTS).real.shape[1]
    with lm.monitor(found) as monitor:
        lm.generate(
            PROMPTS,
            max_new_tokens=9,
            logits_processor=[finishing(lm, [], 2)],
            stopping_criteria=[lambda ids, scores: ids.shape[1] - width >= counts],
        )
    assert [int(r.generated.sum()) for r in monitor.readings] == [2, 3, 3]


def test_sampled_texts_have_a_reading_each_in_their_order(tiny_lm):
    lm = tiny_lm("qwen2")
    found = directions(lm, "resid.post@*")
    out = []
    keep = lambda ids, scores: out.append(ids.clone()) or scores  # noqa: E731
    options = {"do_sample": True, "num_return_sequences": 2, "seed": 0, "logits_processor": [keep]}
    with lm.monitor(found) as monitor:
        lm.generate(PROMPTS[:2], max_new_tokens=3, min_new_tokens=3, **options)
    assert len(monitor.readings) == 4
    for i, reading in enumerate(monitor.readings):
        prompt = lm.encode(PROMPTS[i // 2]).row(0).tolist()
        close(reading.scores, captured(lm, [*prompt, *out[-1][i, -2:].tolist()], found))
    assert not torch.equal(out[-1][0], out[-1][1])


def test_readings_of_several_calls_follow_one_another(tiny_lm):
    lm = tiny_lm("llama")
    with lm.monitor(directions(lm, "resid.post@1")) as monitor:
        assert monitor.readings == []
        lm.logits(PROMPTS[:2])
        lm.generate(PROMPTS[2], max_new_tokens=2)
        lm.logits(PROMPTS[0])
    lm.logits(PROMPTS)
    texts = ["".join(r.tokens[1:]) for r in monitor.readings]
    assert [text.startswith(p) for text, p in zip(texts, [*PROMPTS, PROMPTS[0]], strict=True)] == [True] * 4
    assert [bool(r.generated.any()) for r in monitor.readings] == [False, False, True, False]


def test_a_network_called_directly_is_read_with_its_mask_and_its_cache(tiny_lm):
    lm = tiny_lm("llama")
    found = directions(lm, "resid.post@*")
    batch = lm.encode(PROMPTS)
    mask = batch.real.long()
    new = torch.full((3, 1), 40)
    with torch.no_grad():
        with lm.monitor(found) as monitor:
            out = lm.net(input_ids=batch.input_ids, attention_mask=mask, use_cache=True)
            mask = torch.cat([mask, torch.ones_like(new)], 1)
            lm.net(input_ids=new, attention_mask=mask, past_key_values=out.past_key_values)
        assert len(monitor.readings) == 3
        for prompt, reading in zip(PROMPTS, monitor.readings, strict=True):
            ids = [*lm.encode(prompt).row(0).tolist(), 40]
            assert reading.generated.tolist() == [False] * (len(ids) - 1) + [True]
            # Positions are the caller's; llama's attention knows only differences of them.
            close(reading.scores, captured(lm, ids, found))
        with lm.monitor(found) as monitor:  # begun in the middle: what went before was not seen
            mask = torch.cat([mask, torch.ones_like(new)], 1)
            lm.net(input_ids=new, attention_mask=mask, past_key_values=out.past_key_values)
        assert [r.scores.shape for r in monitor.readings] == [(3, 1)] * 3
        embedded = lm.net.get_input_embeddings()(batch.input_ids[1:2])
        with lm.monitor(found) as monitor:
            lm.net(inputs_embeds=embedded)
        assert set(monitor.readings[0].tokens) == {""}
        close(monitor.readings[0].scores, captured(lm, batch.row(1).tolist(), found))
        with lm.monitor(found), pytest.raises(UnsupportedOperation, match="without a cache"):
            lm.net(input_ids=batch.input_ids, use_cache=False)


def test_a_token_that_is_computed_again_counts_once(tiny_lm):
    lm = tiny_lm("llama")
    found = directions(lm, "resid.post@1")
    ids = lm.encode(PROMPTS[1]).input_ids
    with torch.no_grad(), lm.monitor(found) as monitor:
        cache = lm.net(input_ids=ids, use_cache=True).past_key_values
        cache.crop(-2)
        lm.net(input_ids=torch.tensor([[40, 41, 42]]), past_key_values=cache)
    (reading,) = monitor.readings
    close(reading.scores, captured(lm, [*ids[0, :-2].tolist(), 40, 41, 42], found))


def test_the_latest_scores_can_stop_a_generation(tiny_lm):
    lm = tiny_lm("llama")
    found = directions(lm, "resid.post@1,resid.post@0")
    with lm.monitor(found) as monitor:
        with pytest.raises(UsageError, match="nothing was read"):
            monitor.latest  # noqa: B018
        lm.generate(PROMPTS[0], max_new_tokens=8, min_new_tokens=8)
        everything = monitor.readings[0]
        np.testing.assert_allclose(monitor.latest[:, 0].numpy(), everything.scores[:, -1], atol=1e-5)
    first = int((~everything.generated).sum()) - 1  # the prompt's last token is the first that can stop
    newest = everything.scores[0, first:]
    limit = float(newest.max()) - 1e-4
    stop = int(np.argmax(newest))
    assert 0 < stop < len(newest) - 1
    with lm.monitor(found) as monitor:
        lm.generate(
            PROMPTS[0],
            max_new_tokens=8,
            min_new_tokens=8,
            stopping_criteria=[lambda ids, scores: monitor.latest[0] > limit],
        )
    stopped = monitor.readings[0].scores
    np.testing.assert_allclose(stopped, everything.scores[:, : first + stop + 1], atol=1e-5)


def test_a_pass_that_ends_early_leaves_nan_where_it_did_not_come(tiny_lm):
    lm = tiny_lm("llama")
    found = directions(lm, "resid.post@0,resid.post@2")
    batch = lm.encode(PROMPTS[0])
    with lm.monitor(found) as monitor:
        capture(lm, lm.inputs(batch), (found[0].site,))
    scores = monitor.readings[0].scores
    assert np.isfinite(scores[0]).all()
    assert np.isnan(scores[1]).all()


def test_a_half_precision_network_is_scored_in_single_precision():
    lm = tiny_model("llama", dtype=torch.bfloat16)
    found = directions(lm, "resid.post@*")
    with rp.observe(lm, "resid.post@*") as seen, lm.monitor(found) as monitor:
        lm.logits(PROMPTS[1])
    for i, d in enumerate(found):
        want = d.score(seen[d.site][0].double().numpy()) / d.scale
        np.testing.assert_allclose(monitor.readings[0].scores[i], want, rtol=1e-4, atol=1e-5)


def test_a_forward_pass_with_gradients_is_read_and_its_gradients_stay(tiny_lm):
    lm = tiny_model()
    found = directions(lm, "resid.post@*")
    ids = lm.encode(PROMPTS[1]).input_ids
    gradients = []
    for watched in (False, True):
        lm.net.zero_grad()
        if watched:
            with lm.monitor(found) as monitor:
                lm.net(input_ids=ids).logits.sum().backward()
            assert not monitor.latest.requires_grad
        else:
            lm.net(input_ids=ids).logits.sum().backward()
        gradients.append(lm.net.model.layers[1].mlp.down_proj.weight.grad.clone())
    assert torch.equal(*gradients)
    close(monitor.readings[0].scores, captured(lm, ids[0].tolist(), found))


@pytest.mark.parametrize("option", [{"num_beams": 2}, {"prompt_lookup_num_tokens": 2}])
def test_decoding_that_reorders_rows_is_refused_only_while_monitored(tiny_lm, option):
    lm = tiny_lm("llama")
    with lm.monitor(directions(lm, "resid.post@1")), pytest.raises(UnsupportedOperation, match=next(iter(option))):
        lm.generate(PROMPTS[0], max_new_tokens=3, **option)
    assert lm.generate(PROMPTS[0], max_new_tokens=3, **option)


def test_logprobs_are_refused_while_monitored(tiny_lm):
    lm = tiny_lm("llama")
    with lm.monitor(directions(lm, "resid.post@1")), pytest.raises(UnsupportedOperation, match=r"lm\.logits"):
        lm.logprobs("the cat", [" is", " and"])
    assert len(lm.logprobs("the cat", [" is", " and"])[0]) == 2


def test_directions_that_do_not_belong_here_are_refused(tiny_lm):
    lm = tiny_lm("llama")
    (d,) = directions(lm, "resid.post@1")
    wrong = [
        ([], UsageError, "at least one"),
        ("truth.safetensors", UsageError, "directions, not with 'truth.safetensors'"),
        (rp.Direction.from_vector("resid.post@1", [1.0, 2.0]), UsageError, r"width 2 does not fit resid\.post@1"),
        (d.at("resid.post@9"), UnknownSite, "blocks 0–2"),
        ({rp.Site("resid.post", 2): d}, UsageError, r"direction\.at\('resid.post@2'\)"),
        (rp.Direction(None, d.vector), UsageError, "no site of its own"),
        (directions(lm, "resid.post@1", identity=tiny_lm("gpt2").identity), IdentityMismatch, "architecture"),
    ]
    for given, error, says in wrong:
        with pytest.raises(error, match=says), lm.monitor(given):
            pass
    with lm.monitor(wrong[-1][0], allow_mismatch=True), lm.monitor({d.site: d}), lm.monitor({"resid.post@1": d}):
        pass
    own = directions(lm, "resid.post@1", identity=lm.identity)
    with lm.monitor(own) as monitor:
        lm.logits(PROMPTS)
    assert len(monitor.readings) == 3


@pytest.mark.parametrize("name", [DECODERS[0], ENCODERS[0]])
def test_a_monitor_leaves_no_hook_behind(tiny_lm, name):
    lm = tiny_lm(name)

    def hooks():
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in lm.net.modules())

    before = hooks()
    with lm.monitor(directions(lm)):
        assert hooks() > before
    assert hooks() == before
    with pytest.raises(RuntimeError, match="stop"), lm.monitor(directions(lm)):
        raise RuntimeError("stop")
    assert hooks() == before


@pytest.mark.models
@pytest.mark.parametrize("name", ["smollm2-135m", "gemma3-270m"])
def test_a_real_model_is_scored_as_its_stored_activations_are(real_lm, name):
    lm = real_lm(name)
    prompts = ["The city of Paris is in", "Rome"]
    found = directions(lm, "resid.post@*")
    out = []
    keep = lambda ids, scores: out.append(ids.clone()) or scores  # noqa: E731
    with lm.monitor(found) as monitor:
        lm.generate(prompts, max_new_tokens=4, min_new_tokens=4, logits_processor=[keep])
    for row, (prompt, reading) in enumerate(zip(prompts, monitor.readings, strict=True)):
        ids = lm.encode(prompt).row(0).tolist() + out[-1][row, -3:].tolist()
        want = captured(lm, ids, found)
        # A stream's own size is the measure: early blocks of small states, late ones of large ones.
        assert (np.abs(reading.scores - want) <= 1e-3 * np.abs(want).max(1, keepdims=True)).all()
