"""Multiple choice: the three metrics by hand, and the scores against one plain forward per answer."""

import dataclasses
import math
import os
from fractions import Fraction
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

import reprobe as rp
from reprobe.errors import DataError, UsageError
from reprobe.evaluation.choices import PRIMER, Choices, compare_choices, first_questions, mc1, mc2, mc3
from reprobe.methods.dola import DoLa

T, F = True, False


def test_the_first_questions_keep_all_of_their_answers_wherever_they_stand():
    rows = [
        {"text": f"Q: {q}? A: {a}", "question": q, "answer": a, "label": int(a == "yes"), "group": q}
        for a in ("yes", "no")
        for q in ("p", "q", "r")
    ]
    data = rp.PromptSet.from_records(rows, name="asked")
    kept = first_questions(data, 2)
    assert kept.frame.select("question", "answer").rows() == [("p", "yes"), ("q", "yes"), ("p", "no"), ("q", "no")]
    assert first_questions(data, 9).digest == data.digest
    with pytest.raises(DataError, match="no column question"):
        first_questions(rp.PromptSet.load("cities"), 2)


def test_mc1_asks_whether_the_best_answer_is_above_every_false_one_and_a_tie_is_not():
    true = np.array([T, T, F, F])
    assert mc1(np.array([-2.0, -9.0, -3.0, -4.0]), true, 0) == 1.0
    assert mc1(np.array([-2.0, -9.0, -3.0, -4.0]), true, 1) == 0.0
    assert mc1(np.array([-3.0, -1.0, -3.0, -4.0]), true, 0) == 0.0, "a tie; and another true answer does not help"


def test_mc2_is_the_true_answers_share_of_the_probability():
    scores = np.log([0.5, 0.125, 0.25, 0.125])
    assert mc2(scores, np.array([T, T, F, F])) == pytest.approx(0.625, abs=1e-15)
    assert mc2(scores, np.array([F, T, F, F])) == pytest.approx(0.125, abs=1e-15)


def test_mc2_neither_overflows_nor_vanishes_where_every_probability_is_below_the_smallest_float():
    true = np.array([T, F, F])
    far = np.array([-5000.0, -5001.0, -5002.0])
    assert mc2(far, true) == pytest.approx(1 / (1 + math.exp(-1) + math.exp(-2)), rel=1e-12)
    assert mc2(far[::-1], true) == pytest.approx(math.exp(-2) / (1 + math.exp(-1) + math.exp(-2)), rel=1e-12)
    assert mc2(np.array([0.0, -5000.0, -5000.0]), true) == 1.0


def test_mc3_is_the_share_of_true_answers_above_every_false_one():
    true = np.array([T, T, T, F, F])
    assert mc3(np.array([-1.0, -3.0, -2.0, -2.0, -9.0]), true) == pytest.approx(1 / 3), "a tie is not above"
    assert mc3(np.array([-1.0, -1.5, -1.7, -2.0, -9.0]), true) == 1.0


@given(
    st.lists(st.tuples(st.integers(-60, 0), st.booleans()), min_size=2, max_size=9).filter(
        lambda rows: {t for _, t in rows} == {True, False}
    )
)
def test_the_metrics_are_those_of_exact_arithmetic(rows):
    scores, true = np.array([float(s) for s, _ in rows]) * math.log(2), np.array([t for _, t in rows])
    p = [Fraction(1, 2**-s) for s, _ in rows]
    good, bad = [x for x, t in zip(p, true, strict=True) if t], [x for x, t in zip(p, true, strict=True) if not t]
    assert mc2(scores, true) == pytest.approx(float(sum(good) / sum(p)), rel=1e-9)
    assert mc3(scores, true) == pytest.approx(sum(x > max(bad) for x in good) / len(good))
    best = int(np.flatnonzero(true)[0])
    assert mc1(scores, true, best) == float(p[best] > max(bad))


def questions(n=3):
    """Questions of the tiny tokenizer's words: two true and two false answers, of several lengths."""
    rows = []
    for i in range(n):
        for answer, label, best in (
            ("the inn.", 1, True),
            ("on the other end.", 1, False),
            ("the", 0, False),
            ("the inner ant.", 0, False),
        ):
            rows.append(
                {
                    "id": f"q{i}-{answer}",
                    "text": f"Q: what{i}? A: {answer}",
                    "label": label,
                    "group": f"q{i}",
                    "question": f"what{i}?",
                    "answer": answer,
                    "best": best,
                }
            )
    return rp.PromptSet.from_records(rows, name="tiny")


def one_by_one(lm, prompt, answer, write=None):
    """An answer's score from one forward of the stock network; `write` is a block and a vector added to the output of
    that block at the answer's tokens, by a hook of this test's own."""
    coded = lm.tokenizer(prompt + answer, return_offsets_mapping=True)
    ids = torch.tensor([coded["input_ids"]])
    first = next(i for i, (_, end) in enumerate(coded["offset_mapping"]) if end > len(prompt))
    handles = []
    if write is not None:
        block, vector = write

        def hook(module, args, output):
            h = output if isinstance(output, torch.Tensor) else output[0]
            h = h.clone()
            h[:, first:] += vector
            return h if isinstance(output, torch.Tensor) else (h, *output[1:])

        layers = next(m for m in lm.net.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == lm.n_layers)
        handles.append(layers[block].register_forward_hook(hook))
    with torch.no_grad():
        logits = lm.net(ids).logits[0].double()
    for handle in handles:
        handle.remove()
    logp = logits.log_softmax(-1)
    return sum(float(logp[i - 1, ids[0, i]]) for i in range(first, ids.shape[1]))


def scores_of(choices: Choices):
    return choices.answers["score"].to_numpy()


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2", "qwen2", "bloom", "mixtral"])
def test_packs_give_the_scores_of_one_forward_per_answer_steered_or_not(tiny_lm, name):
    lm, data = tiny_lm(name), questions(2)
    primer = "Q: is an ant on it?\nA: an."
    prompts = [f"{primer}\n\nQ: {q}\nA:" for q in data.frame["question"]]
    answers = [f" {a}" for a in data.frame["answer"]]
    plain = [one_by_one(lm, p, a) for p, a in zip(prompts, answers, strict=True)]
    np.testing.assert_allclose(scores_of(rp.multiple_choice(lm, data, primer=primer)), plain, atol=1e-4)

    vector = np.random.default_rng(0).normal(size=lm.d_model)
    item = rp.Add(rp.Direction.from_vector("resid.post@1", vector), 1.0, tokens="generated")
    with rp.steer(lm, item):
        steered = scores_of(rp.multiple_choice(lm, data, primer=primer))
    direct = [
        one_by_one(lm, p, a, (1, torch.from_numpy(vector).float())) for p, a in zip(prompts, answers, strict=True)
    ]
    np.testing.assert_allclose(steered, direct, atol=1e-4)
    assert np.abs(steered - plain).max() > 0.01


@pytest.mark.models
@pytest.mark.parametrize("name", ["smollm2-135m", "gemma3-270m"])
def test_on_the_bundled_models_packs_give_the_scores_of_one_forward_per_answer(real_lm, name):
    lm = real_lm(name)
    first = rp.PromptSet.load("misconceptions").frame["group"][0]
    data, primer = rp.PromptSet.load("misconceptions").where(group=first), PRIMER.partition("\n\n")[0]
    prompts = [f"{primer}\n\nQ: {q}\nA:" for q in data.frame["question"]]
    vector = np.random.default_rng(1).normal(size=lm.d_model)
    vector *= 20 / np.linalg.norm(vector)
    layer, some = lm.n_layers // 2, [0, len(prompts) - 1]
    item = rp.Add(rp.Direction.from_vector(f"resid.post@{layer}", vector), tokens="generated")
    plain = rp.multiple_choice(lm, data, primer=primer)
    with rp.steer(lm, item):
        steered = rp.multiple_choice(lm, data, primer=primer)
    for found, write in ((plain, None), (steered, (layer, torch.from_numpy(vector).float()))):
        direct = [one_by_one(lm, prompts[i], f" {data.frame['answer'][i]}", write) for i in some]
        np.testing.assert_allclose(scores_of(found)[some], direct, atol=1e-4, rtol=2e-6)


def test_the_table_is_the_metrics_of_the_scores(tiny_lm):
    found = rp.multiple_choice(tiny_lm("llama"), questions(3), primer="")
    assert found.table.columns == ["question", "group", "n_true", "n_false", "mc1", "mc2", "mc3"]
    for i, row in enumerate(found.table.iter_rows(named=True)):
        own = found.answers.filter(pl.col("question") == row["question"])
        p, true = np.exp(own["score"].to_numpy()), own["label"].to_numpy() == 1
        assert own["best"].to_list() == [True, False, False, False]
        assert (row["question"], row["group"], row["n_true"], row["n_false"]) == (f"what{i}?", f"q{i}", 2, 2)
        assert row["mc1"] == float(p[0] > p[~true].max())
        assert row["mc2"] == pytest.approx(p[true].sum() / p.sum(), rel=1e-6)
        assert row["mc3"] == pytest.approx((p[true] > p[~true].max()).mean())
    summary = found.summary()
    assert summary["metric"].to_list() == ["mc1", "mc2", "mc3"]
    assert summary["mean"].to_list() == pytest.approx([found.table[m].mean() for m in ("mc1", "mc2", "mc3")])
    assert (summary["low"] <= summary["mean"]).all()
    assert (summary["mean"] <= summary["high"]).all()


def test_dola_scores_answers_without_the_plausibility_bound(tiny_lm):
    lm, data, dola = tiny_lm("llama"), questions(2), DoLa([1, 2])
    found = rp.multiple_choice(lm, data, primer="", decoding=dola)
    for row in found.answers.iter_rows(named=True):
        (score,) = dola.logprobs(lm, f"Q: {row['question']}\nA:", [f" {row['answer']}"], plausible=False)[0]
        assert row["score"] == pytest.approx(score, abs=1e-4)
    plain = rp.multiple_choice(lm, data, primer="")
    assert np.abs(scores_of(found) - scores_of(plain)).min() > 0.1
    assert compare_choices(plain, found)["n"].to_list() == [2, 2, 2]


def test_a_single_question_has_a_mean_and_no_interval(tiny_lm):
    summary = rp.multiple_choice(tiny_lm("llama"), questions(1), primer="").summary()
    assert summary["low"].null_count() == summary["high"].null_count() == 3


def test_where_every_question_is_right_the_interval_of_mc1_is_not_a_point(tiny_lm):
    found = rp.multiple_choice(tiny_lm("llama"), questions(5), primer="")
    for value in (0.0, 1.0):
        alike = dataclasses.replace(found, table=found.table.with_columns(mc1=pl.lit(value)))
        row = alike.summary().row(0, named=True)
        assert row["mean"] == value
        assert row["high"] - row["low"] > 0.2


def test_differences_are_paired_and_zero_without_steering(tiny_lm):
    lm, data = tiny_lm("llama"), questions(6)
    plain = rp.multiple_choice(lm, data, primer="")
    zero = compare_choices(plain, rp.multiple_choice(lm, data, primer=""))
    assert zero.select("change", "low", "high").rows() == [(0, 0, 0)] * 3
    vector = np.random.default_rng(3).normal(size=lm.d_model)
    with rp.steer(lm, rp.Add(rp.Direction.from_vector("resid.post@0", vector))):
        steered = rp.multiple_choice(lm, data, primer="")
    row = compare_choices(plain, steered).row(1, named=True)
    each = steered.table["mc2"].to_numpy() - plain.table["mc2"].to_numpy()
    assert row["change"] == pytest.approx(each.mean())
    assert row["steered"] - row["unsteered"] == pytest.approx(each.mean())
    assert row["low"] < each.mean() < row["high"]
    assert row["n"] == 6
    with pytest.raises(UsageError, match="primer"):
        compare_choices(plain, rp.multiple_choice(lm, data, primer="Q: a?\nA: an."))
    with pytest.raises(UsageError, match="same questions"):
        compare_choices(plain, rp.multiple_choice(lm, questions(5), primer=""))


def test_the_benchmarks_own_sets_of_targets_are_used(tiny_lm):
    frame = questions(1).frame
    marked = frame.with_columns(mc1=pl.Series([T, F, F, T]), mc2=pl.Series([T, T, T, F]))
    found = rp.multiple_choice(tiny_lm("llama"), rp.PromptSet(marked, "marked"), primer="")
    s, row = scores_of(found), found.table.row(0, named=True)
    assert row["mc1"] == float(s[0] > s[3])
    assert row["mc2"] == pytest.approx(np.exp(s[:2]).sum() / np.exp(s[:3]).sum(), rel=1e-6)
    assert (row["n_true"], row["n_false"]) == (2, 1)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda f: f.drop("answer"), "no column answer"),
        (lambda f: f.with_columns(label=pl.lit(2)), "1 .true. or 0"),
        (lambda f: f.with_columns(label=pl.lit(1)), "true and a false answer"),
        (lambda f: f.with_columns(best=pl.lit(False)), "0 best answers"),
        (lambda f: f.drop("best"), "2 best answers"),
    ],
)
def test_questions_that_cannot_be_judged_are_refused(tiny_lm, change, said):
    with pytest.raises(DataError, match=said):
        rp.multiple_choice(tiny_lm("llama"), rp.PromptSet(change(questions(2).frame), "bad"))


def test_the_primer_is_six_questions_that_no_data_set_asks():
    asked = [line.removeprefix("Q: ") for line in PRIMER.splitlines() if line.startswith("Q: ")]
    assert len(asked) == 6
    assert not set(asked) & set(rp.PromptSet.load("misconceptions").frame["question"])


@pytest.mark.skipif("REPROBE_DATA" not in os.environ, reason="REPROBE_DATA names no folder of public benchmark files")
def test_both_files_of_truthfulqa_give_817_questions_with_one_best_answer_each():
    folder = Path(os.environ["REPROBE_DATA"]) / "truthfulqa"
    for file, expected in (("mc_task.json", 6204), ("TruthfulQA.csv", None)):
        data = rp.PromptSet.load(folder / file)
        found = data.frame.filter(pl.col("best") & (pl.col("label") == 1))
        assert found["group"].n_unique() == found.height == 817
        assert expected is None or len(data) == expected
    net = tiny.tiny_net("llama", num_hidden_layers=1, max_position_embeddings=10_000)
    lm = rp.LanguageModel(net, tiny.tiny_tokenizer(), name="tiny")
    groups = data.frame["group"].unique(maintain_order=True)[:2].to_list()
    assert rp.multiple_choice(lm, data.where(group=groups)).table.height == 2
