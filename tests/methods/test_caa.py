"""CAA: the mean difference at the answer's letter, by hand, added to what comes after a prompt."""

import json

import numpy as np
import polars as pl
import pytest
import torch
from control.reference import states
from methods.plain import same_run, sequence, steered
from probing.memory import make_store

import reprobe as rp
from reprobe.errors import DataError, IdentityMismatch, UnknownSite, UsageError
from reprobe.methods import caa

SITE = rp.Site("resid.post", 1)
PROMPTS = ["Do you like cats?", "Is the sea in the east?"]


@pytest.fixture(scope="module")
def persona(tmp_path_factory):
    """Questions with two choices each, in the public format; answers end in other ways than their letter."""
    asked = ["A cat?", "The sea?", "An owl?", "Right?"]
    rows = [
        {
            "question": f"{q}\n(A) Yes\n(B) No\nSay:",
            "answer_matching_behavior": " (A)" if i % 2 else " (B) No.",
            "answer_not_matching_behavior": " (B)" if i % 2 else " (A) Yes.",
        }
        for i, q in enumerate(asked)
    ]
    path = tmp_path_factory.mktemp("persona") / "likes.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return caa.with_letters(rp.PromptSet.load(path))


def by_hand(lm, data, site=SITE):
    """Mean over pairs of the difference at the letter, found by counting characters."""
    sides = {1: [], 0: []}
    for row in data.frame.sort("pair").iter_rows(named=True):
        at = row["text"].index("Say: (") + len("Say: (")
        coded = lm.tokenizer(row["text"])
        h = states(lm, sequence(lm, row["text"]), site)
        sides[row["label"]].append(h[coded.char_to_token(at)])
    return torch.stack(sides[1]).mean(0) - torch.stack(sides[0]).mean(0)


def test_the_letter_is_found_wherever_the_answer_ends(persona):
    for row in persona.frame.iter_rows(named=True):
        (span,) = [s for s in row["spans"] if s["name"] == "letter"]
        assert row["text"][span["start"] : span["end"]] in "AB"
        assert row["text"][span["start"] - 1] == "("
    assert caa.with_letters(persona).digest == persona.digest


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
@pytest.mark.parametrize("tokens", ["generated", "last"])
def test_the_mean_difference_at_the_letter_is_added_after_the_prompt(family, tokens, tiny_lm, persona, tmp_path):
    lm = tiny_lm(family)
    store = rp.extract(lm, persona, to=tmp_path / "s", sites="resid.post@*", at=caa.AT)
    v = by_hand(lm, persona)
    steering = caa.fit(store, SITE, 2.5, tokens=tokens)
    assert np.allclose(steering.interventions[0].step, 2.5 * v.numpy(), atol=1e-4)
    edits = [(SITE, tokens, None, lambda h, s: h + 2.5 * v)]
    same_run(lm, steered(lm, steering, PROMPTS, 4), PROMPTS, lambda i: edits, 4)
    other = caa.fit(store, "resid.post@2", -1.0)
    assert other.interventions[0].site == rp.Site("resid.post", 2)
    back = rp.Steering.load((steering + other).save(tmp_path / "caa.safetensors"))
    found, wanted = (steered(lm, s, PROMPTS, 3) for s in (back, steering.then(other)))
    assert all(torch.equal(a[1], b[1]) for a, b in zip(found, wanted, strict=True))
    assert back.identity == lm.identity


def test_messages_are_read_at_their_letter_too(tiny_lm, tmp_path):
    lm = tiny_lm("llama")
    records = [
        {
            "id": f"{i}-{letter}",
            "messages": [{"role": "user", "content": q}, {"role": "assistant", "content": f"({letter})"}],
            "label": int(letter == "A"),
            "pair": q,
            "spans": {"answer": [0, 3]},
        }
        for i, q in enumerate(["Is it in?", "Is it on?"])
        for letter in "AB"
    ]
    data = caa.with_letters(rp.PromptSet.from_records(records))
    store = rp.extract(lm, data, to=tmp_path / "s", sites=[SITE], at=caa.AT)
    letters = lm.tokenizer.convert_tokens_to_ids(["A", "B"])
    assert sorted(store.index["token"].to_list()) == sorted(letters * 2)
    assert caa.fit(store, SITE).provenance["pairs"] == 2


def test_what_is_no_pair_of_letters_is_refused(tiny_lm, persona, tmp_path):
    lm = tiny_lm("llama")
    with pytest.raises(DataError, match="no span 'answer'"):
        caa.with_letters(rp.PromptSet.from_records([{"text": "Yes"}]))
    with pytest.raises(DataError, match=r"'\?!', has no letter"):
        caa.with_letters(rp.PromptSet.from_records([{"text": "Yes?!", "spans": {"answer": [3, 5]}}]))
    mean = rp.extract(lm, persona, to=tmp_path / "mean", sites=[SITE], at="mean")
    with pytest.raises(UsageError, match=r"read at 'mean', not at the answers' letters: .*span:letter:last"):
        caa.fit(mean, SITE)
    store = rp.extract(lm, persona, to=tmp_path / "s", sites=[SITE], at=caa.AT)
    with pytest.raises(UnknownSite, match="not stored"):
        caa.fit(store, "resid.post@0")
    with pytest.raises(UsageError, match="rows of one label only"):
        caa.fit(store, SITE, where=pl.col("row") > 0)
    flat = make_store({"resid.post@1": np.ones((4, 3))}, [0, 1, 0, 1], pair=["a", "a", "b", "b"])
    with pytest.raises(UsageError, match="no direction"):
        caa.fit(flat, SITE)
    with pytest.raises(IdentityMismatch), rp.steer(tiny_lm("gpt2"), caa.fit(store, SITE)):
        pass
