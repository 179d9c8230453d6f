"""Edits as values, and the ledger that takes them out again in any order."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_model

import reprobe as rp
from reprobe.control import EditEffect, edits_in
from reprobe.control.edits import Matrix
from reprobe.control.ledger import unedited
from reprobe.errors import (
    ArtifactExists,
    ArtifactMissing,
    CorruptArtifact,
    IdentityMismatch,
    UnsupportedOperation,
    UsageError,
)

FACT = rp.Fact.of(subject="the cat", prompt="{} is on the", new="mat", true="roof")


def random_edit(lm, layer=1, rank=2, seed=0, **more):
    matrix = Matrix.projection(lm, layer)
    rng = np.random.default_rng(seed)
    outputs, inputs = matrix.values.shape
    return rp.WeightEdit(
        matrix.name, rng.normal(size=(outputs, rank)), rng.normal(size=(inputs, rank)), lm.identity, **more
    )


def weights(lm):
    return {name: p.detach().clone() for name, p in lm.net.named_parameters()}


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_an_edit_adds_the_product_of_its_factors_to_what_the_layer_maps(family):
    lm = tiny_model(family)
    before = weights(lm)
    edit = random_edit(lm)
    layer = lm.architecture.projection(lm.net, 1)
    k = torch.randn(lm.width(rp.Site("mlp.neurons", 1)), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = layer(k)
        with rp.edited(lm, edit):
            changed = layer(k)
    want = torch.from_numpy(edit.left @ (edit.right.T @ k.double().numpy())).float()
    torch.testing.assert_close(changed - plain, want, atol=1e-4, rtol=1e-4)
    assert want.abs().max() > 1
    assert same(before, weights(lm))


def test_an_edit_touches_its_own_matrix_alone_and_tied_embeddings_stay_tied():
    lm = tiny_model("gemma3_text")
    before, edit = weights(lm), random_edit(lm)
    with rp.edited(lm, edit):
        now = weights(lm)
        assert [n for n in now if not torch.equal(now[n], before[n])] == [edit.parameter]
        assert lm.net.lm_head.weight is lm.net.get_input_embeddings().weight


#: Which of five edits to apply and revert, in which order: a number toggles its edit.
TOGGLES = st.lists(st.integers(0, 4), max_size=14)


@pytest.mark.parametrize("keep", [True, False])
@settings(deadline=None, max_examples=40)
@given(toggles=TOGGLES)
def test_whatever_the_order_of_reverting_the_weights_are_those_with_the_remaining_edits(keep, toggles):
    lm = tiny_model()
    before = weights(lm)
    edits = [random_edit(lm, layer=i % 2, rank=1 + i % 3, seed=i) for i in range(5)]
    ledger = rp.ledger_of(lm, keep_originals=keep)
    for i in toggles:
        if edits[i].digest in ledger.digests:
            ledger.revert([edits[i]])
        else:
            ledger.apply([edits[i]])
    names = {e.parameter for e in edits}
    want = {n: before[n].double() for n in names}
    for edit in ledger.applied:
        want[edit.parameter] = want[edit.parameter] + torch.from_numpy(edit.left @ edit.right.T)
    for name in names:
        torch.testing.assert_close(weights(lm)[name].double(), want[name], atol=4e-6, rtol=1e-6)
    ledger.revert()
    assert ledger.applied == ()
    if keep:
        assert same(before, weights(lm))
    for name, original in before.items():
        torch.testing.assert_close(weights(lm)[name], original, atol=4e-6, rtol=1e-6)


def test_with_originals_the_weights_depend_on_what_is_applied_and_not_on_what_was():
    lm, other = tiny_model(), tiny_model()
    a, b, c = (random_edit(lm, seed=i) for i in range(3))
    rp.apply_edits(lm, [a, b, c])
    rp.ledger_of(lm).revert([b])
    rp.apply_edits(other, [a, c])
    assert same(weights(lm), weights(other))


def test_contexts_nest_and_any_exit_gives_the_weights_back():
    lm = tiny_model()
    before = weights(lm)
    a, b = random_edit(lm, seed=1), random_edit(lm, seed=2)
    with pytest.raises(RuntimeError, match="half-way"), rp.edited(lm, a), rp.edited(lm, [b]):
        raise RuntimeError("half-way")
    assert same(before, weights(lm))
    with rp.edited(lm, a) as ledger:
        ledger.revert([a])
    assert same(before, weights(lm))


def test_an_edit_of_another_model_is_refused_and_nothing_changes():
    lm, other = tiny_model(), tiny_model(seed=1)
    before = weights(lm)
    mine, theirs = random_edit(lm), random_edit(other, seed=1)
    with pytest.raises(IdentityMismatch, match="weights"):
        rp.apply_edits(lm, [mine, theirs])
    assert same(before, weights(lm))
    assert rp.ledger_of(lm).applied == ()
    with rp.edited(lm, theirs, allow_mismatch=True):
        assert not same(before, weights(lm))


def test_edits_of_the_plain_model_go_into_it_one_after_another():
    """The digest of the weights sees the first edit; the base's identity does not."""
    lm = tiny_model()
    a, b = random_edit(lm, seed=1), random_edit(lm, seed=2)
    with rp.edited(lm, a):
        assert lm.identity.differences(a.base).keys() == {"weights"}
        with rp.edited(lm, b) as ledger:
            assert ledger.digests == (a.digest, b.digest)
            assert ledger.base == a.base


def test_an_edit_made_after_others_needs_them():
    lm = tiny_model()
    first = random_edit(lm, seed=1)
    later = random_edit(lm, seed=2, after=(first.digest,))
    with pytest.raises(IdentityMismatch, match="after 1 edits"):
        rp.apply_edits(lm, later)
    rp.apply_edits(lm, [first, later])
    rp.ledger_of(lm).revert([first])
    assert rp.ledger_of(lm).digests == (later.digest,)


def test_what_is_taken_out_for_a_while_comes_back_although_it_was_made_after_a_reverted_edit():
    lm = tiny_model()
    plain, first = weights(lm), random_edit(lm)
    second = random_edit(lm, 0, seed=1, after=(first.digest,))
    ledger = rp.apply_edits(lm, [first, second])
    ledger.revert([first])
    before = weights(lm)
    with unedited(lm):
        assert same(weights(lm), plain)
    assert same(weights(lm), before)
    assert ledger.digests == (second.digest,)


def test_weights_that_something_else_changed_are_noticed():
    lm = tiny_model()
    edit = random_edit(lm)
    rp.apply_edits(lm, edit)
    with torch.no_grad():
        next(lm.net.parameters()).add_(1.0)
    with pytest.raises(IdentityMismatch, match="outside the ledger"):
        rp.ledger_of(lm).revert()


def test_what_cannot_be_edited_is_refused():
    lm = tiny_model("gpt2")
    edit = random_edit(lm)
    one = np.ones((1, 1))
    for parameter, error, says in (
        ("transformer.wte.weight", UnsupportedOperation, "lm_head.weight"),
        ("transformer.ln_f.weight", UsageError, "matrix"),
        ("nothing.weight", UsageError, "no parameter"),
        (edit.parameter, UsageError, "does not fit"),
    ):
        with pytest.raises(error, match=says):
            rp.apply_edits(lm, rp.WeightEdit(parameter, one, one, lm.identity))
    with pytest.raises(UsageError, match="already"):
        rp.apply_edits(lm, [edit, edit])
    with pytest.raises(UsageError, match="no edit with"):
        rp.ledger_of(lm).revert([edit])
    for left, right in ((np.ones(3), np.ones((3, 1))), (np.ones((3, 2)), np.ones((3, 1))), (one * np.nan, one)):
        with pytest.raises(UsageError):
            rp.WeightEdit("w", left, right, lm.identity)
    assert rp.ledger_of(lm).applied == ()


def test_keeping_originals_is_settled_before_the_first_edit():
    lm = tiny_model()
    rp.apply_edits(lm, random_edit(lm))
    with pytest.raises(UsageError, match="before the first"):
        rp.ledger_of(lm, keep_originals=False)


def test_an_edit_saves_and_loads_whole(tmp_path):
    lm = tiny_model()
    edit = random_edit(
        lm, facts=(FACT,), effects=(EditEffect(0.001, 0.9),), after=("ab" * 32,), provenance={"method": "by hand"}
    )
    edit.save(tmp_path / "e.safetensors")
    again = rp.WeightEdit.load(tmp_path / "e.safetensors")
    for name in ("parameter", "base", "after", "facts", "effects", "provenance", "digest"):
        assert getattr(again, name) == getattr(edit, name)
    assert np.array_equal(again.left, edit.left)
    assert np.array_equal(again.right, edit.right)
    with pytest.raises(ArtifactExists):
        edit.save(tmp_path / "e.safetensors")
    data = bytearray((tmp_path / "e.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "bad.safetensors").write_bytes(data)
    with pytest.raises(CorruptArtifact):
        rp.WeightEdit.load(tmp_path / "bad.safetensors")
    assert edit.norm == pytest.approx(np.linalg.norm(edit.left @ edit.right.T))


def test_an_exported_model_is_an_ordinary_folder_and_gives_its_edits_back(tmp_path):
    lm = tiny_model("gpt2")
    before = weights(lm)
    a, b = random_edit(lm, seed=1), random_edit(lm, layer=2, seed=2)
    rp.apply_edits(lm, [a, b])
    rp.export_edited(lm, tmp_path / "m")
    plain = rp.LanguageModel.load(tmp_path / "m")
    assert torch.allclose(plain.logits("the cat"), lm.logits("the cat"))
    again = rp.load_edited(tmp_path / "m")
    assert rp.ledger_of(again).digests == (a.digest, b.digest)
    assert [e.digest for e in edits_in(tmp_path / "m")] == [a.digest, b.digest]
    rp.ledger_of(again).revert([a.digest[:12]])
    rp.ledger_of(again).revert()
    assert same(before, weights(again))
    assert again.identity.differences(a.base) == {}
    with pytest.raises(ArtifactExists):
        rp.export_edited(lm, tmp_path / "m")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]


def test_without_originals_an_exported_model_still_gives_its_edits_back_to_rounding(tmp_path):
    lm = tiny_model()
    before, edit = weights(lm), random_edit(lm)
    rp.apply_edits(lm, edit)
    rp.export_edited(lm, tmp_path / "m", originals=False)
    again = rp.load_edited(tmp_path / "m")
    rp.ledger_of(again).revert()
    for name, original in before.items():
        torch.testing.assert_close(weights(again)[name], original, atol=2e-6, rtol=1e-6)
    with pytest.raises(IdentityMismatch, match="another dtype"):
        rp.load_edited(tmp_path / "m", dtype="bfloat16")


def test_folders_without_edits_say_so(tmp_path):
    with pytest.raises(ArtifactMissing, match="remembers no edits"):
        rp.load_edited(tmp_path)
    with pytest.raises(ArtifactMissing, match="without edits"):
        edits_in(tmp_path)


def test_half_precision_is_edited_in_double_and_reverted_exactly():
    lm = tiny_model()
    half = rp.LanguageModel(copy.deepcopy(lm.net).to(torch.bfloat16), lm.tokenizer, name="half")
    before, edit = weights(half), random_edit(half)
    with rp.edited(half, edit):
        now = weights(half)[edit.parameter]
        want = (before[edit.parameter].double() + torch.from_numpy(edit.left @ edit.right.T)).bfloat16()
        assert torch.equal(now, want)
    assert same(before, weights(half))
