"""What an intervention costs, against torch's own divergence and sums worked out by hand."""

import math
from collections import Counter

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_model

import reprobe as rp
from reprobe.errors import DataError, UsageError
from reprobe.evaluation import distinct, entropy, fluency
from reprobe.evaluation.means import mean_of

TEXTS = (
    rp.Passage("the cat is", " on the other end"),
    rp.Passage("an inn", " in the land of ants"),
    "and the ant is in",
)
FACTS = rp.PromptSet.from_records(
    [
        {"id": f"f{i}", "text": f"the ant {i} is", "group": f"g{i}", "target": "on", "target_new": "an inn"}
        for i in range(4)
    ],
    name="facts",
)


@pytest.fixture
def item(tiny_lm):
    v = np.random.default_rng(0).normal(size=tiny_lm("llama").d_model)
    return rp.Add(rp.Direction.from_vector("resid.post@1", v), 0.4)


def logits_of(lm, text):
    """Logits of the predictions that count, and the tokens they predict, from one stock forward."""
    prompt, more = (text.prompt, text.continuation) if isinstance(text, rp.Passage) else (text, "")
    coded = lm.tokenizer(prompt + more, return_offsets_mapping=True)
    ids = torch.tensor(coded["input_ids"])
    first = next((i for i, (_, end) in enumerate(coded["offset_mapping"]) if end > len(prompt)), len(ids))
    with torch.no_grad():
        logits = lm.net(ids[None]).logits[0].double()
    return (logits[first - 1 : -1], ids[first:]) if more else (logits, ids[1:])


def row(found, measure):
    return found.table.row(by_predicate=pl.col("measure") == measure, named=True)


def test_kl_is_torchs_kl_div_on_full_logits_and_loss_its_cross_entropy(tiny_lm, item):
    lm = tiny_lm("llama")
    found = rp.side_effects(lm, item, texts=TEXTS, unrelated=FACTS, max_new_tokens=3)
    plain = [logits_of(lm, t) for t in TEXTS]
    with rp.steer(lm, item):
        steered = [logits_of(lm, t) for t in TEXTS]
    p, q = (torch.cat([logits for logits, _ in side]).log_softmax(-1) for side in (plain, steered))
    kl = torch.nn.functional.kl_div(q, p, reduction="batchmean", log_target=True)
    assert kl > 0.01
    assert row(found, "kl")["change"] == row(found, "kl")["steered"] == pytest.approx(float(kl), rel=1e-4)
    assert rp.divergence(lm, TEXTS, item) == pytest.approx(float(kl), rel=1e-4)
    losses = []
    for side in (plain, steered):
        pairs = [(logits[: len(ids)], ids) for logits, ids in side]
        losses.append(
            float(torch.nn.functional.cross_entropy(torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs])))
        )
    loss, perplexity = row(found, "cross-entropy"), row(found, "perplexity")
    assert (loss["unsteered"], loss["steered"]) == pytest.approx(losses, rel=1e-5)
    assert perplexity["change"] == pytest.approx(math.exp(losses[1]) - math.exp(losses[0]), rel=1e-3)
    assert loss["low"] <= loss["change"] <= loss["high"]


def test_what_is_generated_and_known_is_compared_with_and_without(tiny_lm, item):
    lm = tiny_lm("llama")
    found = rp.side_effects(lm, item, texts=TEXTS, unrelated=FACTS, max_new_tokens=6)
    prompts = ["the cat is", "an inn", "and the ant is in"]
    plain = lm.generate(prompts, max_new_tokens=6)
    with rp.steer(lm, item):
        steered = lm.generate(prompts, max_new_tokens=6)
        known = [a > b for a, b in lm.logprobs(FACTS.texts, [[" on", " an inn"]] * 4)]
    assert found.generations.rows() == list(zip(prompts, plain, steered, strict=True))
    assert row(found, "distinct-2")["unsteered"] == pytest.approx(np.mean([distinct(t, 2) for t in plain]))
    assert row(found, "n-gram entropy")["steered"] == pytest.approx(np.mean([fluency(t) for t in steered]))
    assert row(found, "accuracy on facts")["steered"] == np.mean(known)
    assert row(found, "accuracy on facts")["n"] == 4


def test_a_steer_of_strength_zero_has_no_side_effects(tiny_lm):
    lm = tiny_lm("gemma3_text")
    zero = rp.Add(rp.Direction.from_vector("resid.post@1", np.ones(lm.d_model)), 0.0)
    found = rp.side_effects(lm, [zero], texts=TEXTS, unrelated=FACTS, max_new_tokens=4)
    assert found.table.select("change", "low", "high").rows() == [(0.0, 0.0, 0.0)] * found.table.height
    assert found.generations["unsteered"].to_list() == found.generations["steered"].to_list()


def choices():
    """Three questions with a true and a false answer each."""
    return rp.PromptSet.from_records(
        [
            {"id": f"{i}{a}", "text": "-", "label": y, "group": str(i), "question": f"what {i}?", "answer": a}
            for i in range(3)
            for a, y in (("an ant", 1), ("the end", 0))
        ],
        name="questions",
    )


def test_parts_can_be_left_out_and_multiple_choice_serves_as_knowledge(item):
    lm = tiny_model(max_position_embeddings=1000)  # the questions come after a primer of many tokens
    known = row(rp.side_effects(lm, item, texts=TEXTS, unrelated=choices(), max_new_tokens=0), "accuracy on questions")
    assert known["unsteered"] == rp.multiple_choice(lm, choices()).table["mc1"].mean()
    with rp.steer(lm, item):
        assert known["steered"] == rp.multiple_choice(lm, choices()).table["mc1"].mean()
    found = rp.side_effects(lm, item, texts=TEXTS, unrelated=None, max_new_tokens=0)
    assert found.table["measure"].to_list() == ["kl", "cross-entropy", "perplexity"]
    assert found.generations.height == 0
    with pytest.raises(DataError, match="nothing to be right or wrong about"):
        rp.side_effects(lm, item, texts=TEXTS, unrelated="cities")
    with pytest.raises(UsageError, match="no texts"):
        rp.side_effects(lm, item, texts=())


def test_a_text_of_one_token_has_a_divergence_and_nothing_to_be_surprised_by(item):
    lm = tiny_model(bos=False)
    assert len(lm.tokenizer("the").input_ids) == 1
    found = rp.side_effects(lm, item, texts=(*TEXTS, "the"), unrelated=None, max_new_tokens=0)
    without = rp.side_effects(lm, item, texts=TEXTS, unrelated=None, max_new_tokens=0)
    assert row(found, "kl")["n"] == 4
    assert row(found, "kl")["steered"] != row(without, "kl")["steered"]
    assert row(found, "cross-entropy")["steered"] == pytest.approx(row(without, "cross-entropy")["steered"])
    with pytest.raises(UsageError, match="two tokens or more"):
        rp.side_effects(lm, item, texts=("the",), unrelated=None)


def test_facts_without_a_second_object_are_refused(tiny_lm, item):
    lm = tiny_lm("llama")
    half = FACTS.frame.with_columns(target_new=pl.when(pl.col("id") != "f0").then("target_new"))
    with pytest.raises(DataError, match="1 of 4 facts lack"):
        rp.side_effects(lm, item, texts=TEXTS, unrelated=rp.PromptSet(half, "half"))


@pytest.mark.parametrize("tokens", ["all", "prompt", "generated", "last"])
def test_passages_give_every_scope_something_to_act_on(tiny_lm, tokens):
    lm = tiny_lm("llama")
    d = rp.Direction.from_vector("resid.post@1", np.ones(lm.d_model))
    assert rp.divergence(lm, TEXTS[:2], rp.Add(d, 1.0, tokens=tokens)) > 1e-3


def test_distinct_and_entropy_by_hand():
    text = "a b a b c"
    assert distinct(text, 1) == 3 / 5
    assert distinct(text, 2) == 3 / 4
    assert entropy(text, 2) == pytest.approx(1.5)
    assert fluency(text) == pytest.approx((1.5 + 2 * math.log2(3)) / 3)
    for empty in ("", "a"):
        assert (distinct(empty, 2), entropy(empty, 2), fluency(empty)) == (0.0, 0.0, 0.0)
    assert entropy("no no no no", 1) == 0.0
    assert distinct("It's it.", 1) == 1.0


@given(st.lists(st.sampled_from("abcd"), min_size=3, max_size=30), st.integers(1, 3))
def test_entropy_is_that_of_scipy_and_highest_without_repetition(words, n):
    from scipy.stats import entropy as reference

    grams = Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
    assert entropy(" ".join(words), n) == pytest.approx(reference(list(grams.values()), base=2), abs=1e-12)
    assert entropy(" ".join(words), n) <= math.log2(len(words) - n + 1) + 1e-12


def test_a_readout_is_the_directions_own_score_at_the_last_token(tiny_lm, item):
    lm = tiny_lm("llama")
    held_out = rp.Direction.from_vector(
        "resid.post@2", np.random.default_rng(5).normal(size=lm.d_model), scale=2.0, offset=0.3
    )
    readout = rp.Readout(held_out, TEXTS)
    for steering in ((), (item,)):
        with rp.steer(lm, *steering):
            got = readout(lm)
            for text, value in zip(TEXTS, got, strict=True):
                whole = text.prompt + text.continuation if isinstance(text, rp.Passage) else text
                with rp.observe(lm, "resid.post@2") as seen:
                    lm.logits(whole)
                h = seen[rp.Site.parse("resid.post@2")][0, -1].double().numpy()
                assert value == pytest.approx((h @ held_out.vector - 0.3) / 2.0, abs=1e-4)


def test_dose_response_takes_any_scorer_and_gives_intervals(tiny_lm):
    lm = tiny_lm("llama")
    d = rp.Direction.from_vector("resid.post@1", np.random.default_rng(0).normal(size=lm.d_model))
    prompts = ["the cat", "an ant", "and"]

    def length(lm):
        return lm.logits(prompts).norm(dim=-1).double().numpy()

    table = rp.dose_response(lm, lambda s: rp.Add(d, s), (0, 1), scorer=length, neutral=TEXTS)
    assert "text" not in table.columns
    with rp.steer(lm, rp.Add(d, 1)):
        steered = length(lm)
    one = table.row(1, named=True)
    assert one["effect"] == pytest.approx(steered.mean())
    assert one["change"] == pytest.approx((steered - length(lm)).mean(), rel=1e-5)
    assert one["change_low"] < one["change"] < one["change_high"]
    assert one["kl_low"] < one["kl"] < one["kl_high"]
    assert table.row(0, named=True)["change"] == table.row(0, named=True)["kl"] == 0

    single = rp.dose_response(lm, lambda s: rp.Add(d, s), (1,), scorer=lambda lm: length(lm)[:1], neutral=TEXTS[:1])
    assert single.select("effect_low", "change_high", "kl_low").row(0) == (None, None, None)
    with pytest.raises(UsageError, match="fickle gave 1 numbers without steering and 2 at strength 1"):
        rp.dose_response(lm, lambda s: rp.Add(d, s), (1,), scorer=Fickle(), neutral=TEXTS)
    with pytest.raises(UsageError, match=r"without steering the scorer .* one finite number per prompt"):
        rp.dose_response(lm, lambda s: rp.Add(d, s), (1,), scorer=lambda lm: np.array([1.0, np.nan]), neutral=TEXTS)


class Fickle:
    """A scorer that gives one number more at every call."""

    name = "fickle"

    def __init__(self):
        self.calls = 0

    def __call__(self, lm):
        self.calls += 1
        return np.zeros(self.calls)


def test_a_steer_that_overflows_has_an_endless_price_and_no_interval():
    found = mean_of(np.array([np.inf, 1.0]), weights=np.array([1.0, 3.0]))
    assert (found.mean, found.low, found.high) == (np.inf, None, None)


def test_a_choice_score_is_a_metric_per_question(tiny_lm, item):
    lm = tiny_lm("llama")
    scorer = rp.ChoiceScore(choices(), "mc2", primer="")
    table = rp.dose_response(lm, lambda s: item, (1,), scorer=scorer, neutral=TEXTS, story="the")
    with rp.steer(lm, item):
        expected = rp.multiple_choice(lm, choices(), primer="").table["mc2"].mean()
    assert table["mc2"][0] == pytest.approx(expected)
    assert isinstance(table["text"][0], str)
    with pytest.raises(UsageError, match="unknown metric"):
        rp.ChoiceScore(choices(), "mc4")
