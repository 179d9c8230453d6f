"""ActAdd: the difference of two prompts, by hand, on the first tokens of any prompt, whatever the padding."""

import pytest
import torch
from control.reference import Sequence, logits, states
from methods.plain import ids_of, same_run, sequence, steered
from tiny import BOS, tiny_net, tiny_tokenizer

import reprobe as rp
from reprobe.errors import IdentityMismatch, UnknownSite, UsageError
from reprobe.methods import actadd

PAIR = (" the end is in", " a dog")
PROMPTS = ["the cat and the old man", "on", "in the end"]


def by_hand(lm, layer):
    """A⁺ − A⁻ behind BOS, the shorter filled up with blanks, (tokens, width)."""
    coded = [[BOS, *lm.tokenizer(text, add_special_tokens=False)["input_ids"]] for text in PAIR]
    blank, length = lm.tokenizer.convert_tokens_to_ids("Ġ"), max(map(len, coded))
    padded = [ids + [blank] * (length - len(ids)) for ids in coded]
    high, low = (states(lm, Sequence(0, ids, length, {}), rp.Site("resid.pre", layer)) for ids in padded)
    assert len(coded[0]) != len(coded[1])
    assert torch.allclose(high[0], low[0], atol=1e-6)
    return high - low


def edits(lm, layer, c, shift=0):
    difference = by_hand(lm, layer)

    def change(h, s):
        out = h.clone()
        for t in range(len(difference)):
            if 0 <= t + shift < s.n_prompt:
                out[t + shift] += c * difference[t]
        return out

    return [(rp.Site("resid.pre", layer), "prompt", None, change)]


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
@pytest.mark.parametrize("layer", [0, 2])
def test_the_difference_is_added_to_the_first_tokens_under_any_padding_and_while_generating(family, layer, tiny_lm):
    lm = tiny_lm(family)
    steering, wanted = actadd.fit(lm, *PAIR, layer=layer, strength=3.0), edits(lm, layer, 3.0)
    same_run(lm, steered(lm, steering, PROMPTS, 4), PROMPTS, lambda i: wanted, 4)
    same_run(lm, steered(lm, steering, PROMPTS, 3, use_cache=False), PROMPTS, lambda i: wanted, 3)
    for side in ("left", "right"):
        with rp.steer(lm, steering) as done:
            found = lm.logits(PROMPTS, at="all", padding=side)
        for prompt, got in zip(PROMPTS, found, strict=True):
            assert torch.allclose(got.double(), logits(lm, sequence(lm, prompt), *wanted).double(), atol=1e-3)
    assert [e.rows for e in done][-1] == 1, "only one of the prompts is as long as the difference"


def test_without_a_bos_of_its_own_a_prompt_gets_the_difference_from_its_first_token_on(tiny_lm):
    lm = tiny_lm("gpt2", False)
    assert BOS not in ids_of(lm, PROMPTS[0])
    found = steered(lm, actadd.fit(lm, *PAIR, layer=1, strength=2.0), PROMPTS, 3)
    wanted = edits(lm, 1, 2.0, shift=-1)
    same_run(lm, found, PROMPTS, lambda i: wanted, 3)


def test_it_saves_scales_and_knows_its_model(tiny_lm, tmp_path):
    lm = tiny_lm("llama")
    made = actadd.fit(lm, *PAIR, layer=1, strength=2.0)
    back = rp.Steering.load(made.save(tmp_path / "actadd.safetensors"))
    assert back.provenance["prompts"] == list(PAIR)
    twice = actadd.fit(lm, *PAIR, layer=1, strength=4.0)
    turned = actadd.fit(lm, *PAIR[::-1], layer=1, strength=-2.0)
    for a, b in ((back, made), (2.0 * back, twice), (turned, made)):
        for x, y in zip(steered(lm, a, PROMPTS, 2), steered(lm, b, PROMPTS, 2), strict=True):
            assert torch.allclose(x[1], y[1], atol=1e-4)
    with pytest.raises(IdentityMismatch), rp.steer(tiny_lm("gpt2"), made):
        pass


def test_prompts_that_make_no_difference_are_refused(tiny_lm):
    lm = tiny_lm("llama")
    with pytest.raises(UsageError, match="the same tokens"):
        actadd.fit(lm, " the", " the", layer=1)
    with pytest.raises(UsageError, match="empty prompt"):
        actadd.fit(lm, "", " the", layer=1)
    with pytest.raises(UnknownSite, match="blocks 0–2"):
        actadd.fit(lm, " the", " a", layer=3)
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = None
    with pytest.raises(UsageError, match="no beginning-of-text token"):
        actadd.fit(rp.LanguageModel(tiny_net("llama"), tokenizer, name="x"), " the", " a", layer=1)


@pytest.mark.models
def test_on_a_real_model_opposite_prompts_push_the_next_word_opposite_ways(real_lm):
    lm = real_lm("smollm2-135m")
    contrast = rp.Contrast(("After the long day I felt", "My sister told me that she was"), (" happy",), (" sad",))
    plain = rp.log_odds(lm, contrast).mean()
    moved = []
    for c in (-4.0, 4.0):
        with rp.steer(lm, actadd.fit(lm, " Happy and glad", " Sad and gloomy", layer=8, strength=c)):
            moved.append(rp.log_odds(lm, contrast).mean() - plain)
    assert moved[0] < -0.1
    assert moved[1] > 0.1
