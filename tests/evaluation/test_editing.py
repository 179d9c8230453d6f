"""Scores of edits against sums by hand, on our facts and on CounterFact's layouts; the guard of sequential editing."""

import dataclasses

import numpy as np
import polars as pl
import pytest
from tiny import tiny_model

import reprobe as rp
from reprobe.control.edits import Matrix
from reprobe.errors import DataError, UsageError
from reprobe.evaluation import editing, fluency
from reprobe.methods.sequential import Guard, sequential
from reprobe.prompts import Neighbour

FACTS = [
    rp.Fact(
        "the cat is on the",
        "cat",
        (4, 7),
        new="mat and",
        true="roof",
        paraphrases=("a cat is in the", "it is the cat on the"),
        neighbours=(Neighbour("the dog is on the", "hat"), Neighbour("a horse is on the", "other")),
        id="f0",
        group="cat",
    ),
    rp.Fact(
        "the end is in", "end", (4, 7), new="a", true="the rest", paraphrases=("an end is in",), id="f1", group="e"
    ),
]


def random_edit(lm, seed=0, size=1.0):
    matrix = Matrix.projection(lm, 1)
    rng = np.random.default_rng(seed)
    outputs, inputs = matrix.values.shape
    ledger = rp.ledger_of(lm)
    left, right = size * rng.normal(size=(outputs, 1)), rng.normal(size=(inputs, 1))
    return rp.WeightEdit(matrix.name, left, right, ledger.base, after=ledger.digests)


def probability(lm, prompt, object_):
    n = len(lm.tokenizer(prompt + " " + object_).input_ids) - len(lm.tokenizer(prompt).input_ids)
    return float(np.exp(lm.logprobs(prompt, [" " + object_])[0][0] / n))


def test_every_prompt_is_scored_by_the_mean_probability_of_the_objects_tokens():
    lm = tiny_model()
    lines = editing.score_facts(lm, FACTS)
    assert lines["kind"].to_list() == [
        "efficacy",
        *["paraphrase"] * 2,
        *["neighbourhood"] * 2,
        "efficacy",
        "paraphrase",
    ]
    third = lines.row(3, named=True)
    assert third["p_new"] == pytest.approx(probability(lm, "the dog is on the", "mat and"), rel=1e-5)
    assert third["p_true"] == pytest.approx(probability(lm, "the dog is on the", "hat"), rel=1e-5)
    for row in lines.iter_rows(named=True):
        new_wins = row["p_new"] > row["p_true"]
        assert row["success"] == (not new_wins if row["kind"] == "neighbourhood" else new_wins)


def lines_of(rows):
    return pl.DataFrame(
        [
            {"fact": f, "group": g, "kind": k, "prompt": "", "p_new": new, "p_true": true, "success": ok}
            for f, g, k, new, true, ok in rows
        ]
    )


def test_a_fact_counts_once_and_the_score_is_the_harmonic_mean():
    rows = [
        ("a", "A", "efficacy", 0.9, 0.1, True),
        ("a", "A", "paraphrase", 0.6, 0.1, True),
        ("a", "A", "paraphrase", 0.1, 0.2, False),
        ("a", "A", "neighbourhood", 0.1, 0.5, True),
        ("b", "B", "efficacy", 0.2, 0.3, False),
        ("b", "B", "paraphrase", 0.8, 0.1, True),
        ("b", "B", "neighbourhood", 0.3, 0.4, True),
    ]
    found = editing.summarise(lines_of(rows))
    shares = {k: m.mean for k, m in found.shares.items()}
    assert shares == pytest.approx({"efficacy": 0.5, "paraphrase": 0.75, "neighbourhood": 1.0})
    assert found.magnitudes["paraphrase"].mean == pytest.approx(((0.5 - 0.1) / 2 + 0.7) / 2)
    assert found.magnitudes["neighbourhood"].mean == pytest.approx((0.4 + 0.1) / 2)
    assert found.score.mean == pytest.approx(3 / (1 / 0.5 + 1 / 0.75 + 1 / 1.0))
    assert found.facts == 2


def test_intervals_hold_the_value_and_shrink_with_the_number_of_subjects():
    rng = np.random.default_rng(0)

    def width(n):
        rows = []
        for i in range(n):
            for kind, p in (("efficacy", 0.8), ("paraphrase", 0.6), ("neighbourhood", 0.7)):
                ok = bool(rng.random() < p)
                rows.append((f"f{i}", f"g{i}", kind, 0.4 + ok * 0.1, 0.45, ok))
        found = editing.summarise(lines_of(rows))
        for measure in (*found.shares.values(), *found.magnitudes.values(), found.score):
            assert measure.low <= measure.mean <= measure.high
        return found.score.high - found.score.low

    assert width(160) < 0.6 * width(20)


def test_one_subject_has_no_interval_and_a_share_of_zero_scores_zero():
    found = editing.summarise(
        lines_of([("a", "A", "efficacy", 0.1, 0.9, False), ("a", "A", "paraphrase", 0.9, 0.1, True)])
    )
    assert found.score.mean == 0
    assert (found.score.low, found.score.high) == (None, None)


def test_edits_one_at_a_time_are_scored_alone_and_leave_nothing():
    lm = tiny_model()
    before = lm.identity
    texts = ["the cat is on the mat", "a dog is in the other hat"]
    edits = {f.id: random_edit(lm, seed=i) for i, f in enumerate(FACTS)}
    result = editing.evaluate(lm, FACTS, lambda fact: edits[fact.id], texts=texts)
    assert lm.identity == before
    assert result.before.prompts.equals(editing.score_facts(lm, FACTS))
    perplexities = []
    for fact in FACTS:
        with rp.edited(lm, edits[fact.id]):
            want = editing.score_facts(lm, [fact])
            perplexities.append(lm.perplexity(texts))
        got = result.after.prompts.filter(pl.col("fact") == fact.id)
        np.testing.assert_allclose(got["p_new"], want["p_new"])
    assert result.perplexity_after == pytest.approx(np.mean(perplexities))
    assert result.perplexity_before == pytest.approx(lm.perplexity(texts))
    assert result.table["measure"].to_list()[-1] == "score"


def test_edits_together_are_scored_together():
    lm = tiny_model()
    edits = [random_edit(lm, seed=0), random_edit(lm, seed=1)]
    result = editing.evaluate_together(lm, FACTS, edits)
    with rp.edited(lm, edits):
        want = editing.score_facts(lm, FACTS)
    np.testing.assert_allclose(result.after.prompts["p_new"], want["p_new"])
    assert result.perplexity_after is None


def test_what_is_written_about_is_no_neighbour():
    lm = tiny_model()
    dog = rp.Fact.of(subject="dog", prompt="the dog is on the", new="roof", true="hat")
    left = editing.spared(FACTS, [FACTS[0], dog])
    assert [n.prompt for n in left[0].neighbours] == ["a horse is on the"]
    part = rp.Fact.of(subject="hors", prompt="the hors is", new="a")  # in words, not in parts of them
    assert editing.spared(FACTS, [part]) == editing.spared(FACTS, []) == FACTS
    edit = dataclasses.replace(random_edit(lm), facts=(FACTS[0], dog))
    for scored in (editing.evaluate_together(lm, FACTS, edit).after, editing.evaluate_together(lm, FACTS, edit).before):
        kept = scored.prompts.filter(pl.col("kind") == "neighbourhood")["prompt"].to_list()
        assert kept == ["a horse is on the"]


def test_facts_without_both_objects_are_named():
    with pytest.raises(UsageError, match="no facts were given"):
        editing.score_facts(tiny_model(), [])
    with pytest.raises(DataError, match=r"of 1 facts lack.*the a is"):
        editing.score_facts(tiny_model(), [rp.Fact.of(subject="a", prompt="the a is", new="b")])


def test_the_fluency_is_that_of_a_text_about_each_subject():
    lm = tiny_model()
    edit = random_edit(lm)
    result = editing.evaluate_together(lm, FACTS, edit, write=5)
    written = editing.generate_about(lm, FACTS, max_new_tokens=5)
    assert result.fluency_before == pytest.approx(np.mean([fluency(text) for text in written]))
    with rp.edited(lm, edit):
        written = editing.generate_about(lm, FACTS, max_new_tokens=5)
    assert result.fluency_after == pytest.approx(np.mean([fluency(text) for text in written]))


def test_consistency_is_one_for_the_reference_itself_and_zero_for_other_words():
    references = [["the moon is far"], ["a whale swims deep"]]
    assert editing.consistency(["the moon is far", "a whale swims deep"], references) == pytest.approx(1.0)
    assert editing.consistency(["dog cat", "dog cat"], references) == 0
    assert 0 < editing.consistency(["the moon swims", "a whale"], references) < 1
    with pytest.raises(UsageError, match="as many sets"):
        editing.consistency(["a"], references)


def test_texts_about_a_subject_begin_with_its_own_prompt():
    texts = editing.generate_about(tiny_model(), FACTS, max_new_tokens=4)
    assert [t.startswith(f.prompt) for t, f in zip(texts, FACTS, strict=True)] == [True, True]


TEXTS = ("the cat is on the mat and the dog", "it is in the end a theory of the rest")


def test_edits_one_after_another_stay_until_the_guard_is_passed_and_the_last_ones_are_reverted():
    lm = tiny_model()
    plain = lm.perplexity(TEXTS)
    sizes = iter([0.001, 0.001, 0.001, 9.0, 0.001, 0.001])
    make = lambda lm, fact: random_edit(lm, seed=len(rp.ledger_of(lm).applied), size=next(sizes))  # noqa: E731
    run = sequential(lm, [FACTS[0]] * 6, make, Guard(TEXTS, limit=1.5, every=2))
    assert len(run.edits) == 2
    assert rp.ledger_of(lm).digests == tuple(e.digest for edits in run.edits for e in edits)
    assert [c.facts for c in run.checked] == [0, 2, 4]
    assert run.checked[-1].perplexity > 1.5 * run.checked[0].perplexity
    assert "after 4 of 6 facts" in run.stopped
    assert "last 2 were reverted" in run.stopped
    assert lm.perplexity(TEXTS) == pytest.approx(plain, rel=0.1)
    rp.ledger_of(lm).revert()
    assert lm.perplexity(TEXTS) == plain


def test_within_its_limit_the_guard_lets_all_pass():
    lm = tiny_model()
    make = lambda lm, fact: [random_edit(lm, seed=len(rp.ledger_of(lm).applied), size=0.001)]  # noqa: E731
    run = sequential(lm, FACTS, make, Guard(TEXTS, every=10))
    assert run.stopped is None
    assert len(run.edits) == 2
    assert [c.facts for c in run.checked] == [0, 2]
    for bad in ({"limit": 1.0}, {"every": 0}, {"texts": ()}):
        with pytest.raises(UsageError, match="a guard needs"):
            Guard(**({"texts": TEXTS} | bad))
