"""A language model gives the stock network's numbers, whatever the padding, and says plainly what it cannot do."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import CONTEXT, DECODERS, FAMILIES, tiny_net, tiny_tokenizer

import reprobe as rp
from reprobe.errors import (
    DataError,
    IdentityMismatch,
    ModelLoadFailed,
    PromptTooLong,
    SelfCheckFailed,
    UnsupportedOperation,
    UsageError,
)
from reprobe.model.hooks import board_of

TEXTS = ["the cat", "a dog is on the mat and", "in"]
CHAT = [{"role": "user", "content": "the cat"}]


@pytest.mark.parametrize("name", FAMILIES)
def test_check_passes_on_every_family(tiny_lm, name):
    assert max(tiny_lm(name).check().values()) < 1e-5


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_of_some_tokens_are_those_of_the_whole_vocabulary_whatever_the_number_of_rows(tiny_lm, name):
    lm = tiny_lm(name)
    states = torch.randn(2, 7, lm.d_model, generator=torch.Generator().manual_seed(0))
    whole, tokens = lm.unembed(states), torch.tensor([5, 0, 300])
    assert torch.allclose(lm.unembed(states, tokens), whole[..., tokens], atol=1e-5)
    for rows in (1, 3):  # few rows go another way
        assert torch.allclose(lm.unembed(states[0, :rows]), whole[0, :rows], atol=1e-5)
        assert torch.allclose(lm.unembed(states[0, :rows], tokens), whole[0, :rows, tokens], atol=1e-5)


@pytest.mark.parametrize("name", DECODERS)
def test_states_along_continuations_are_those_of_a_stock_forward_steered_in_their_role(tiny_lm, name):
    lm = tiny_lm(name)
    prompts, more = ["the cat", "a dog is on the mat and", "in"], [" is on the other end", " an ant", " the land"]
    item = rp.Add(rp.Direction.from_vector("resid.post@1", np.linspace(-1, 1, lm.d_model)), tokens="generated")
    for site in ("final", "resid.post@0"):
        for found, prompt, suffix in zip(lm.continued(prompts, more, site=site), prompts, more, strict=True):
            coded = lm.tokenizer(prompt + suffix, return_offsets_mapping=True)
            first = next(i for i, (_, end) in enumerate(coded["offset_mapping"]) if end > len(prompt))
            assert found.tokens.tolist() == coded["input_ids"][first:]
            with rp.observe(lm, site) as seen, torch.no_grad():
                lm.net(torch.tensor([coded["input_ids"]]))
            stock = next(iter(seen.values()))[0, first - 1 :]
            assert torch.allclose(found.states, stock, atol=1e-5, rtol=1e-4)
    with rp.steer(lm, item):
        scores = lm.logprobs(prompts, [[c] for c in more])
        for found, score in zip(lm.continued(prompts, more), scores, strict=True):
            logp = lm.unembed(found.states).double().log_softmax(-1)
            each = logp[torch.arange(len(found.tokens)), torch.from_numpy(found.tokens)]
            assert each.sum().item() == pytest.approx(score[0], abs=1e-4)


def test_check_fails_where_a_site_is_not_what_it_says(tiny_lm):
    lm = tiny_lm("llama")
    block = lm.architecture.blocks(lm.net)[1]
    handle = block.mlp.register_forward_hook(lambda m, a, out: out * 1.5, always_call=False)
    # The hook changes what the block adds, after the projection that mlp.neurons feeds.
    try:
        with pytest.raises(SelfCheckFailed, match=r"mlp"):
            lm.check()
    finally:
        handle.remove()
    lm.check()


@pytest.mark.parametrize("name", DECODERS)
def test_padding_never_changes_a_logit(tiny_lm, name):
    lm = tiny_lm(name)
    for side in ("left", "right"):
        together = lm.logits(TEXTS, at="all", padding=side)
        for text, rows in zip(TEXTS, together, strict=True):
            with torch.no_grad():
                stock = lm.net(**lm.tokenizer(text, return_tensors="pt")).logits[0]
            assert torch.allclose(rows, stock, atol=1e-5, rtol=1e-4)
            assert torch.allclose(lm.logits(text)[0], stock[-1], atol=1e-5, rtol=1e-4)


@settings(deadline=None, max_examples=15)
@given(
    prompt=st.text("abc the", min_size=1, max_size=12),
    continuations=st.lists(st.text("xyz and", min_size=1, max_size=9), min_size=1, max_size=4),
)
def test_logprobs_are_those_of_the_stock_logits_summed_by_hand(tiny_lm, prompt, continuations):
    lm = tiny_lm("gemma2")
    got = lm.logprobs([prompt, "the"], [continuations, [" cat"]])
    for text, value in zip([prompt + c for c in continuations], got[0], strict=True):
        coded = lm.tokenizer(text, return_tensors="pt", return_offsets_mapping=True)
        offsets = coded.pop("offset_mapping")[0]
        with torch.no_grad():
            logp = lm.net(**coded).logits[0].double().log_softmax(-1)
        ids = coded["input_ids"][0]
        want = sum(float(logp[t - 1, ids[t]]) for t in range(1, len(ids)) if offsets[t, 1] > len(prompt))
        assert value == pytest.approx(want, abs=1e-4)
    assert len(got[1]) == 1


def test_mean_log_probabilities_are_the_sums_over_the_number_of_tokens(tiny_lm):
    lm = tiny_lm("llama")
    total, mean = (lm.logprobs("the cat", [" is on the mat"], mean=m)[0][0] for m in (False, True))
    n = len(lm.tokenizer("the cat is on the mat").input_ids) - len(lm.tokenizer("the cat").input_ids)
    assert total == pytest.approx(n * mean)
    assert n > 2


def test_perplexity_is_that_of_the_stock_loss(tiny_lm):
    lm = tiny_lm("gemma3_text")
    texts = ["the cat is on the mat", "a dog and the other"]
    losses, counts = [], []
    for text in texts:
        ids = lm.tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            losses.append(float(lm.net(input_ids=ids, labels=ids).loss))
        counts.append(ids.shape[1] - 1)
    assert lm.perplexity(texts) == pytest.approx(np.exp(np.average(losses, weights=counts)), rel=1e-5)


def test_one_prompt_takes_a_flat_list_of_continuations(tiny_lm):
    lm = tiny_lm("llama")
    assert np.allclose(lm.logprobs("the", [" cat", " dog"])[0], lm.logprobs(["the"], [[" cat", " dog"]])[0])


def test_generation_is_greedy_and_equals_the_stock_networks(tiny_lm):
    lm = tiny_lm("llama")
    for text, ours in zip(TEXTS, lm.generate(TEXTS, max_new_tokens=6), strict=True):
        coded = lm.tokenizer(text, return_tensors="pt")
        tokens = lm.net.generate(**coded, max_new_tokens=6, do_sample=False, pad_token_id=0)
        assert lm.tokenizer.decode(tokens[0, coded["input_ids"].shape[1] :], skip_special_tokens=True) == ours
        assert lm.generate(text, max_new_tokens=6, return_dict_in_generate=True) == [ours]


def test_a_seed_repeats_a_sample_and_leaves_the_global_state_alone(tiny_lm):
    lm = tiny_lm("llama")
    state = torch.random.get_rng_state()
    options = {"do_sample": True, "max_new_tokens": 12, "temperature": 1.5, "top_k": 0}
    one, same, other = (lm.generate("the", seed=s, **options) for s in (1, 1, 2))
    assert one == same != other
    assert torch.equal(torch.random.get_rng_state(), state)


def test_messages_are_rendered_once_with_one_beginning(tiny_lm):
    lm = tiny_lm("llama")
    ids = lm.encode(CHAT).row(0)
    text = lm.tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert ids.tolist() == lm.tokenizer(text, add_special_tokens=False)["input_ids"]
    span = lm.encode([CHAT], spans=[{"who": (4, 7)}]).spans["who"][0]
    assert lm.tokenizer.decode(ids[span]).strip() == "cat"


def test_spans_survive_either_padding(tiny_lm):
    lm = tiny_lm("llama")
    for side in ("left", "right"):
        batch = lm.encode(TEXTS, spans=[{"who": (4, 7)}, {}, {}], padding=side)
        assert lm.tokenizer.decode(batch.input_ids[0][batch.spans["who"][0]]).strip() == "cat"
        assert not batch.spans["who"][1:].any()


def test_the_identity_tells_weights_tokenizer_dtype_and_family_apart(tiny_lm):
    lm = tiny_lm("llama")
    same = rp.LanguageModel(tiny_net("llama"), tiny_tokenizer(), name="another name")
    lm.identity.require_same(same.identity, "a store")
    others = {
        "weights": rp.LanguageModel(tiny_net("llama", seed=1), tiny_tokenizer(), name="x"),
        "tokenizer": rp.LanguageModel(tiny_net("llama"), tiny_tokenizer(bos=False), name="x"),
        "dtype": rp.LanguageModel(tiny_net("llama").bfloat16(), tiny_tokenizer(), name="x"),
        "architecture": tiny_lm("gpt2"),
    }
    for field, other in others.items():
        assert field in lm.identity.differences(other.identity)
        with pytest.raises(IdentityMismatch, match=field):
            lm.identity.require_same(other.identity, "a store")
    edited = rp.LanguageModel(tiny_net("llama"), tiny_tokenizer(), name="x")
    before = edited.identity.weights
    with torch.no_grad():  # a rank-one edit, as ROME makes
        weight = edited.architecture.blocks(edited.net)[1].mlp.down_proj.weight
        weight += 1e-3 * torch.outer(torch.randn(weight.shape[0]), torch.randn(weight.shape[1]))
    assert edited.identity.weights != before


def test_a_saved_model_is_loaded_back_as_the_same(tiny_lm, tmp_path):
    lm = tiny_lm("llama")
    lm.net.save_pretrained(tmp_path / "m")
    lm.tokenizer.save_pretrained(tmp_path / "m")
    back = rp.LanguageModel.load(tmp_path / "m")
    assert back.identity.differences(lm.identity) == {}
    assert torch.equal(back.logits("the cat"), lm.logits("the cat"))
    mapped = rp.LanguageModel.load(tmp_path / "m", device_map="cpu", attn_implementation="eager", dtype="float32")
    assert torch.allclose(mapped.logits("the cat"), lm.logits("the cat"), atol=1e-5)
    half = rp.LanguageModel.load(tmp_path / "m", dtype="bfloat16")
    assert half.dtype == torch.bfloat16
    with pytest.raises(UsageError, match="local"):
        rp.LanguageModel.load(tmp_path / "m", revision="main")
    with pytest.raises(UsageError, match="float32, bfloat16, float16"):
        rp.LanguageModel.load(tmp_path / "m", dtype="int3")


@pytest.mark.parametrize("name", ["./missing", "some-org/no-such-model", "missing.gguf", "smollm3"])
def test_a_model_that_cannot_be_found_is_said_to_be_so(name):
    with pytest.raises(ModelLoadFailed, match=name.split("/")[-1]):
        rp.LanguageModel.load(name)


def test_a_folder_that_is_no_model_is_said_to_be_so(tmp_path):
    with pytest.raises(ModelLoadFailed, match=r"config\.json"):
        rp.LanguageModel.load(tmp_path)


def test_a_misspelt_name_and_a_file_are_told_what_a_model_is(tmp_path):
    with pytest.raises(ModelLoadFailed, match="Did you mean 'smollm2-135m'"):
        rp.LanguageModel.load("smolm2-135m")
    (tmp_path / "model.safetensors").write_text("")
    with pytest.raises(ModelLoadFailed, match="is a file: a model is the folder"):
        rp.LanguageModel.load(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"device": "gpu"}, "device 'gpu' cannot be used; this machine has cpu"),
        ({"device": "cuda:99"}, "device 'cuda:99' cannot be used"),
        ({"dtype": "float99"}, "one of float32, bfloat16, float16"),
        ({"device": "cpu", "device_map": "auto"}, "device='cpu' does not go with device_map"),
        ({"device": "cpu", "quantization_config": {}}, "does not go with device_map or quantization_config"),
    ],
)
def test_a_device_or_dtype_that_cannot_be_is_refused_before_anything_is_fetched(options, match):
    with pytest.raises(UsageError, match=match):
        rp.LanguageModel.load("no-such-model", **options)


@pytest.mark.parametrize("n", [0, -1])
def test_generating_nothing_is_refused(tiny_lm, n):
    with pytest.raises(UsageError, match="1 or more"):
        tiny_lm("llama").generate("the cat", max_new_tokens=n)


def test_what_an_encoder_cannot_do_is_refused(tiny_lm):
    lm = tiny_lm("bert")
    d = rp.Direction.from_vector("resid.post@1", np.ones(lm.d_model))
    for call in (lambda: lm.generate("the"), lambda: lm.logprobs("the", [" cat"])):
        with pytest.raises(UnsupportedOperation, match="encoder"):
            call()
    with pytest.raises(UnsupportedOperation, match="read, not written"), rp.steer(lm, rp.Add(d)):
        pass


def test_bad_prompts_are_refused(tiny_lm):
    lm = tiny_lm("llama")
    for call, kind, says in (
        (lambda: lm.logits([]), UsageError, "no prompts"),
        (lambda: lm.logits(None), UsageError, "text or a list of chat messages.*not None"),
        (lambda: lm.logits([[3, 4]]), UsageError, r"text or a list of chat messages.*not \[3, 4\]"),
        (lambda: lm.logits(CHAT[0]), UsageError, "not {'role': 'user'"),
        (lambda: lm.logits(rp.PromptSet.from_records([{"text": "a"}])), UsageError, r"of a PromptSet: \.texts"),
        (lambda: lm.logits("z" * CONTEXT), PromptTooLong, "--truncate"),
        (lambda: lm.generate("z" * (CONTEXT - 4), max_new_tokens=8), PromptTooLong, f"room for {CONTEXT - 8}"),
        (lambda: lm.generate("a", max_new_tokens=CONTEXT), PromptTooLong, "no room"),
        (lambda: lm.generate("a", input_ids=1), UsageError, "pass text"),
        (lambda: lm.generate("a", max_length=9), UsageError, "say max_new_tokens"),
        (lambda: lm.logprobs(["a", "b"], [["c"]]), UsageError, "lists of continuations"),
        (lambda: lm.logprobs("a", [""]), UsageError, "empty continuation"),
        (lambda: lm.logprobs("a", []), UsageError, "no continuation"),
        (lambda: lm.logprobs(["a", "b"], [[], []]), UsageError, "no continuation"),
        (lambda: lm.logits(["a"], spans=[{}, {}]), UsageError, "one mapping per prompt"),
        (lambda: lm.logits(["a"], spans=[{"s": (0, 5)}]), DataError, "outside"),
        (lambda: lm.logits("a", at="first"), UsageError, "one of last, all"),
        (lambda: lm.encode("a", padding="both"), UsageError, "one of left, right"),
        (lambda: lm.encode("a", truncate="middle"), UsageError, "'left' or the 'right'"),
    ):
        with pytest.raises(kind, match=says):
            call()
    with pytest.raises(DataError, match="no tokens"):
        tiny_lm("llama", bos=False).logits("")


def hooks(net):
    """All forward hooks. Transformers leaves some of its own behind once output_hidden_states was asked for."""
    return [h for m in net.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]


def test_observing_leaves_no_trace_after_any_exit(tiny_lm):
    lm = tiny_lm("llama")
    before = hooks(lm.net)

    def fails():
        with rp.observe(lm, "resid.post@*"):
            lm.logits("the cat")
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError):
        fails()
    with pytest.raises(rp.ReprobeError), rp.observe(lm, ["resid.post@1", "resid.post@9"]):
        pass
    lm.check()
    rp.capture(lm, lm.inputs(lm.encode("the cat")), lm.sites("resid.post@1"))
    assert hooks(lm.net) == before
    assert not board_of(lm)._handles


def test_contexts_may_be_left_in_any_order(tiny_lm):
    lm = tiny_lm("llama")
    first, second = rp.observe(lm, "resid.post@0"), rp.observe(lm, "resid.post@1")
    one, two = first.__enter__(), second.__enter__()
    first.__exit__(None, None, None)
    lm.logits("the cat")
    assert not one
    assert list(two) == [rp.Site.parse("resid.post@1")]
    second.__exit__(None, None, None)


def test_capture_stops_after_the_last_wanted_site(tiny_lm):
    lm = tiny_lm("llama")
    ran = []
    handles = [
        b.register_forward_pre_hook(lambda *a, i=i: ran.append(i)) for i, b in enumerate(lm.architecture.blocks(lm.net))
    ]
    found = rp.capture(lm, lm.inputs(lm.encode("the cat")), "resid.post@0,attn.heads@1")
    for handle in handles:
        handle.remove()
    assert ran == [0, 1]
    assert tuple(found) == lm.sites("resid.post@0,attn.heads@1")


@pytest.mark.models
@pytest.mark.parametrize("name", ["smollm2-135m", "gemma3-270m"])
def test_the_bundled_models_hold_their_identities_and_know_where_the_eiffel_tower_is(real_lm, name):
    lm = real_lm(name)
    assert max(lm.check().values()) < 1e-5
    assert lm.generate("The Eiffel Tower is located in the city of", max_new_tokens=1) == [" Paris"]
    right, wrong = lm.logprobs("The capital of Italy is", [" Rome", " Oslo"])[0]
    assert right > wrong + 2
