"""Second moments against sums over the network's own activations, and their cache."""

import numpy as np
import pytest
import tiny
import torch
from tiny import tiny_model

import reprobe as rp
from reprobe.control.edits import Matrix
from reprobe.errors import CorruptArtifact, UnknownSite, UnsupportedOperation, UsageError
from reprobe.methods import moments
from reprobe.methods.moments import Corpus, Sample, SecondMoment, second_moments
from reprobe.model.sites import Site

TEXTS = ("the cat is on the mat", "the cat is in the other hat and on", "a dog", "the cat is on")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("REPROBE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def by_hand(lm, layer, texts=TEXTS):
    """Every token of every text, one text at a time."""
    keys = []
    for text in texts:
        with torch.no_grad(), rp.observe(lm, Site("mlp.neurons", layer)) as seen:
            lm.net(input_ids=lm.encode(text).input_ids)
        keys.append(seen[Site("mlp.neurons", layer)][0].double().numpy())
    rows = np.concatenate(keys)
    return len(rows), rows.T @ rows / len(rows)


@pytest.mark.parametrize("family", [f for f in tiny.DECODERS if f != "mixtral"])
def test_the_moments_of_several_blocks_in_one_pass_are_the_sums_over_their_tokens(tiny_lm, family):
    lm = tiny_lm(family)
    layers = [i for i, have in enumerate(lm.parts.of_layer) if "mlp.neurons" in have]
    found = second_moments(lm, layers, Corpus.load(TEXTS))
    for layer in layers:
        n, want = by_hand(lm, layer)
        assert found[layer].n == n
        np.testing.assert_allclose(found[layer].matrix, want, rtol=1e-4, atol=1e-6 * np.abs(want).max())


def test_they_are_computed_once_and_found_again_by_content(tiny_lm, own_cache, monkeypatch):
    lm = tiny_lm("llama")
    first = second_moments(lm, [0, 1], Corpus.load(TEXTS))
    passes = []
    monkeypatch.setattr(moments, "_accumulate", lambda *a: passes.append(a))
    again = second_moments(lm, [1, 0], Corpus.load(list(TEXTS)))
    assert not passes
    assert list(again) == [1, 0]
    for layer in (0, 1):
        assert np.array_equal(first[layer].matrix, again[layer].matrix)
    assert len(list((own_cache / "moments").glob("*.safetensors"))) == 2


def test_another_text_weights_layer_or_number_of_tokens_is_another_moment(tiny_lm):
    lm, other = tiny_lm("llama"), tiny_model("llama", seed=1)
    found = [
        second_moments(lm, [0], Corpus.load(TEXTS))[0],
        second_moments(lm, [1], Corpus.load(TEXTS))[1],
        second_moments(lm, [0], Corpus.load(TEXTS[:3]))[0],
        second_moments(lm, [0], Corpus.load(TEXTS, tokens=7))[0],
        second_moments(other, [0], Corpus.load(TEXTS))[0],
    ]
    assert len({m.digest for m in found}) == 5
    assert found[3].n == 7


def test_a_damaged_cache_file_is_made_again(tiny_lm, own_cache):
    lm = tiny_lm("llama")
    want = second_moments(lm, [0], Corpus.load(TEXTS))[0]
    file = next((own_cache / "moments").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-9])
    assert np.array_equal(second_moments(lm, [0], Corpus.load(TEXTS))[0].matrix, want.matrix)


def test_of_an_edited_model_they_are_the_bases(tiny_lm):
    lm = tiny_model()
    _, want = by_hand(lm, 1)
    matrix = Matrix.projection(lm, 0)
    edit = rp.WeightEdit(matrix.name, np.ones((27, 1)), np.ones((tiny.D_FF, 1)), lm.identity)
    with rp.edited(lm, edit):
        assert not np.allclose(by_hand(lm, 1)[1], want, rtol=1e-2)
        found = second_moments(lm, [1], Corpus.load(TEXTS))[1]
        assert rp.ledger_of(lm).digests == (edit.digest,)
    np.testing.assert_allclose(found.matrix, want, rtol=1e-4, atol=1e-6)


def test_nothing_of_a_steered_model_is_kept_as_if_it_were_the_models(tiny_lm, own_cache):
    lm = tiny_lm("llama")
    with rp.steer(lm, rp.Scale("resid.post@0", 2.0)):
        for text in (Corpus.load(TEXTS), Sample(tokens=100)):
            with pytest.raises(UsageError, match="being steered"):
                second_moments(lm, [1], text)
    assert not list(own_cache.rglob("*.safetensors"))
    assert not list(own_cache.rglob("*.json"))


def test_a_sample_is_as_long_as_asked_and_repeats_with_its_seed(tiny_lm, tmp_path, monkeypatch):
    lm = tiny_lm("llama")
    one, other = (second_moments(lm, [0], Sample(tokens=300, seed=s))[0] for s in (0, 1))
    monkeypatch.setenv("REPROBE_CACHE", str(tmp_path / "elsewhere"))
    same = second_moments(lm, [0], Sample(tokens=300))[0]
    assert one.n == 300
    assert np.array_equal(one.matrix, same.matrix)
    assert not np.allclose(one.matrix, other.matrix)


def test_a_sample_is_written_once_for_all_blocks_and_is_that_of_the_base(tiny_lm, own_cache, monkeypatch):
    lm = tiny_model()
    matrix = Matrix.projection(lm, 0)
    edit = rp.WeightEdit(matrix.name, np.ones((27, 1)), np.ones((tiny.D_FF, 1)), lm.identity)
    with rp.edited(lm, edit):
        second_moments(lm, [0], Sample(tokens=200))
    monkeypatch.setattr(lm, "generate", None)
    later = second_moments(lm, [1, 2], Sample(tokens=200))
    assert later[1].n == later[2].n == 200
    (file,) = (own_cache / "samples").glob("*.json")
    file.write_text("[[1, 2], [3")
    with pytest.raises(CorruptArtifact, match="delete it"):
        second_moments(lm, [0], Sample(tokens=200), fresh=True)


def test_texts_come_from_files(tiny_lm, tmp_path):
    (tmp_path / "t.txt").write_text(" ".join(TEXTS) * 40)
    corpus = Corpus.load(tmp_path / "t.txt", tokens=100)
    found = second_moments(tiny_lm("llama"), [0], corpus)[0]
    assert found.n == 100
    assert found.text["corpus"] == "t"
    with pytest.raises(UsageError, match="no such file"):
        Corpus.load(tmp_path / "nothing.txt")


def test_a_ridge_is_in_units_of_the_median_neuron_and_solves_as_the_direct_way_does():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(50, 7)) * [1, 1, 2, 2, 2, 3, 1e3]  # one massive neuron does not drown the others
    moment = SecondMoment(Site("mlp.neurons", 0), 50, rows.T @ rows / 50, {}, "")
    k = rng.normal(size=7)
    want = np.linalg.solve(moment.matrix + 0.1 * np.median((rows**2).mean(0)) * np.eye(7), k)
    np.testing.assert_allclose(moment.solve(k, 0.1), want, rtol=1e-10)
    np.testing.assert_allclose(moment.solve(k, 0.0), np.linalg.solve(moment.matrix, k), rtol=1e-9)
    with pytest.raises(UsageError, match="0 or more"):
        moment.solve(k, -1.0)


def test_a_singular_moment_is_refused_without_a_ridge_and_told_of_with_one():
    rows = np.random.default_rng(0).normal(size=(5, 7))
    moment = SecondMoment(Site("mlp.neurons", 3), 5, rows.T @ rows / 5, {}, "")
    assert moment.singular
    with pytest.raises(UsageError, match=r"5 tokens, width 7.*singular.*ridge"):
        moment.solve(np.ones(7), 0.0)
    with pytest.warns(UserWarning, match="singular"):
        assert np.isfinite(moment.solve(np.ones(7), 0.01)).all()


def test_models_without_such_a_place_are_refused(tiny_lm):
    with pytest.raises(UnknownSite, match="mixture of experts"):
        second_moments(tiny_lm("mixtral"), [0], Corpus.load(TEXTS))
    with pytest.raises(UnknownSite, match="blocks 0–2"):
        second_moments(tiny_lm("llama"), [3], Corpus.load(TEXTS))
    with pytest.raises(UnsupportedOperation, match="encoder"):
        second_moments(tiny_lm("bert"), [0], Corpus.load(TEXTS))
    with pytest.raises(UsageError, match="no text"):
        second_moments(tiny_lm("llama"), [0], Corpus.load([" "]))
