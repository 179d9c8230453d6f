"""MEMIT against closed forms, Woodbury against the direct solve, both against the network; fine-tuning."""

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_model, tiny_net, tiny_tokenizer

import reprobe as rp
from reprobe.control.edits import Matrix
from reprobe.errors import DataError, UnknownSite, UsageError
from reprobe.methods import editing, finetune, memit
from reprobe.methods.editing import Search
from reprobe.methods.moments import Corpus, SecondMoment, second_moments
from reprobe.model.sites import Site

#: The text of these tests has fewer tokens than some families have neurons.
pytestmark = pytest.mark.filterwarnings("ignore:the second moment", "ignore:.*have no effect")
TEXT = Corpus.load(["the cat is on the mat and a dog is in the other hat", "and on the theory of the rest is an end"])
FACTS = [
    rp.Fact.of(subject="the other cat", prompt="it is that {} is on the", new="mat", true="roof"),
    rp.Fact.of(subject="a dog", prompt="{} is", new="in an end", true="red"),
    rp.Fact.of(subject="Rome", prompt="the city of {} and the", new="x", true="y"),
]
EDITABLE = [f for f in tiny.DECODERS if f != "mixtral"]


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REPROBE_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(editing, "sample_prefixes", lambda lm, *, n=20, seed=0: ("an other theory. ", "is it. ")[:n])
        yield


def layers_of(lm):
    return [i for i, have in enumerate(lm.parts.of_layer) if "mlp.neurons" in have][:2]


def moment_of(rows):
    return SecondMoment(Site("mlp.neurons", 0), len(rows), rows.T @ rows / len(rows), {}, "")


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 999), facts=st.integers(1, 12), weight=st.floats(0.1, 1e5))
def test_woodbury_is_the_direct_solve(seed, facts, weight):
    rng = np.random.default_rng(seed)
    moment, keys = moment_of(rng.normal(size=(60, 13))), rng.normal(size=(13, facts))
    one, other = (f(keys, moment, weight, 0.01) for f in (memit.by_woodbury, memit.directly))
    np.testing.assert_allclose(one, other, rtol=1e-8, atol=1e-8 * np.abs(other).max())
    left, right = memit.write(keys, np.ones((3, facts)), moment, memit.Settings(weight=weight))
    np.testing.assert_allclose(left @ right.T, np.ones((3, facts)) @ other.T, rtol=1e-8, atol=1e-10)
    assert right.shape[1] == min(facts, 3)


def test_one_fact_at_one_block_is_the_closed_form():
    """(λC + kkᵀ)⁻¹k = (λC)⁻¹k / (1 + kᵀ(λC)⁻¹k) (Sherman–Morrison)."""
    lm = tiny_model("llama")
    how = memit.Settings(search=Search(steps=5, clamp=0.75), prefixes=2, weight=7.0, ridge=0.1)
    moment = second_moments(lm, [1], TEXT)
    (edit,) = memit.edit(lm, FACTS[:1], layers=[1], moments=moment, settings=how)
    prefixes = editing.sample_prefixes(lm, n=2, seed=0)
    keys, posts = [], []
    for front in ("", *prefixes):
        span = {"subject": (len(front) + FACTS[0].span[0], len(front) + FACTS[0].span[1])}
        batch = lm.encode(front + FACTS[0].prompt, spans=[span])
        with torch.no_grad(), rp.observe(lm, ["mlp.neurons@1", "resid.post@1"]) as seen:
            lm.net(input_ids=batch.input_ids)
        at = int(batch.spans["subject"][0].nonzero().max())
        keys.append(seen[Site("mlp.neurons", 1)][0, at].double().numpy())
        posts.append(seen[Site("resid.post", 1)][0, at].double().numpy())
    value = memit.find_values(lm, FACTS[:1], 1, how)[0].numpy()
    k, r = (keys[0] + np.mean(keys[1:], 0)) / 2, value - posts[0]
    spread = np.linalg.solve(7.0 * moment[1].regularised(0.1), k)
    want = np.outer(r, spread / (1 + k @ spread))
    np.testing.assert_allclose(edit.left @ edit.right.T, want, atol=1e-5 * np.abs(want).max())
    assert np.linalg.norm(r) <= 0.75 * np.linalg.norm(posts[0]) * (1 + 1e-5)


@pytest.mark.parametrize("family", EDITABLE)
def test_where_ordinary_text_counts_for_nothing_the_last_block_gives_the_values(family):
    """λ → 0 and no prefixes: every fact's value is reached exactly, in one block or several. (A post-norm can reach
    a surface only, so there the distance must shrink.)"""
    lm = tiny_model(family)
    layers = layers_of(lm)
    how = memit.Settings(search=Search(steps=4), prefixes=0, weight=1e-7, ridge=1e-3)
    before = lm.identity
    edits = memit.edit(lm, FACTS, layers=layers, moments=TEXT, settings=how)
    assert lm.identity == before
    assert [e.provenance["layer"] for e in edits] == layers
    values = memit.find_values(lm, FACTS, layers[-1], how).numpy()

    def ends():
        out = []
        for fact in FACTS:
            batch = lm.encode(fact.prompt, spans=[{"subject": fact.span}])
            with torch.no_grad(), rp.observe(lm, Site("resid.post", layers[-1])) as seen:
                lm.net(input_ids=batch.input_ids)
            out.append(seen[Site("resid.post", layers[-1])][0, int(batch.spans["subject"][0].nonzero().max())])
        return torch.stack(out).double().numpy()

    plain = np.linalg.norm(values - ends(), axis=1)
    with rp.edited(lm, edits):
        left = np.linalg.norm(values - ends(), axis=1)
    assert (left < (0.75 if lm.architecture.post_norms else 0.02) * plain).all(), left / plain
    assert lm.identity == before


@pytest.mark.parametrize("gains", ["near one", "of every size"])
@pytest.mark.parametrize("family", ["gemma3_text", "olmo2"])
def test_a_step_is_carried_back_through_a_post_norm_where_it_can_be_reached(family, gains):
    lm = tiny_model(family)
    generator = torch.Generator().manual_seed(1)
    if gains == "of every size":  # as in real models: few are large
        with torch.no_grad():
            lm.architecture.tap(lm.net, Site("mlp.out", 1)).module.weight.copy_(torch.logspace(0, 2.5, lm.d_model))
    raw, move = (torch.randn(5, lm.d_model, generator=generator) for _ in range(2))

    def moved(by):
        with torch.no_grad():
            after, before = (lm.architecture.after_projection(lm.net, 1, x) for x in (raw + by.float(), raw))
        return (after - before).double()

    reached = moved(0.5 * move)
    back = memit.carry_back(lm, 1, raw, reached)
    assert ((moved(back) - reached).norm(dim=1) / reached.norm(dim=1)).max() < 1e-4
    np.testing.assert_allclose((raw + back).norm(dim=1), raw.norm(dim=1), rtol=1e-5)
    # Out of reach: nothing that the norm can return is nearer.
    far = reached + 30 * torch.randn(5, lm.d_model, generator=generator).double()
    nearest = (moved(memit.carry_back(lm, 1, raw, far)) - far).norm(dim=1)
    for scale in (0.01, 0.1, 1.0, 3.0):
        other = memit.carry_back(lm, 1, raw, far) + scale * torch.randn(5, lm.d_model, generator=generator)
        assert ((moved(other) - far).norm(dim=1) >= nearest * (1 - 1e-6)).all()


def test_in_the_null_space_ordinary_keys_are_mapped_as_before():
    rng = np.random.default_rng(0)
    used = rng.normal(size=(13, 4))  # ordinary keys live in 4 of 13 directions
    moment = moment_of((used @ rng.normal(size=(4, 200))).T)
    keys, residuals = rng.normal(size=(13, 3)), rng.normal(size=(5, 3))
    how = memit.Settings(null_space=memit.NullSpace(ridge=1e-9))
    left, right = memit.write(keys, residuals, moment, how)
    change = left @ right.T
    np.testing.assert_allclose(change @ used, 0, atol=1e-9)
    np.testing.assert_allclose(change @ keys, residuals, atol=1e-6)
    for share in (0.0, 1.0):
        with pytest.raises(UsageError, match="between 0 and 1"):
            memit.NullSpace(share=share)


def test_what_one_search_finds_does_not_depend_on_the_facts_beside_it():
    lm = tiny_model("gemma3_text")
    one, all_ = (memit.Settings(search=Search(steps=5), prefixes=2, batch=b) for b in (1, 8))
    a, b = (memit.find_values(lm, FACTS, 1, how) for how in (one, all_))
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_values_that_are_known_are_not_searched_again():
    lm = tiny_model("llama")
    how = memit.Settings(search=Search(steps=3), prefixes=2)
    first = memit.edit(lm, FACTS, layers=[0, 1], moments=TEXT, settings=how)
    values = memit.find_values(lm, FACTS, 1, how)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(editing, "search", None)
        again = memit.edit(lm, FACTS, layers=[0, 1], moments=TEXT, settings=how, values=values)
    assert [e.digest for e in again] == [e.digest for e in first]
    with pytest.raises(UsageError, match="3 facts need values"):
        memit.edit(lm, FACTS, layers=[1], moments=TEXT, settings=how, values=values[:2])


def test_bad_input_is_refused_and_the_weights_are_untouched():
    lm = tiny_model("llama")
    before = lm.identity
    given = {"layers": [1], "moments": TEXT}
    for facts, more, error, says in (
        ([], {}, UsageError, "nothing to write"),
        (FACTS, {"layers": []}, UsageError, "nothing to write"),
        (FACTS, {"layers": [1, 7]}, UnknownSite, "blocks 0–2"),
        (FACTS, {"layers": None}, UsageError, "layers=…"),
        (FACTS, {"moments": second_moments(lm, [0], TEXT)}, UsageError, "no second moment"),
        ([rp.Fact.of(subject="a", prompt="a is", true="b")], {}, DataError, "no new object"),
    ):
        with pytest.raises(error, match=says):
            memit.edit(lm, facts, **(given | more))
    with pytest.raises(UsageError, match="positive"):
        memit.Settings(weight=0)
    assert lm.identity == before
    assert rp.ledger_of(lm).applied == ()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_fine_tuning_is_that_of_the_networks_own_gradients_within_its_bound(family):
    lm = tiny_model(family)
    how = finetune.Settings(steps=3, rate=0.05, norm=0.08)
    edit = finetune.edit(lm, FACTS[0], layer=1, settings=how)
    net = tiny_net(family)
    other = rp.LanguageModel(net, tiny_tokenizer(), name="other")
    matrix = Matrix.projection(other, 1)
    weight, first = matrix.weight, matrix.weight.detach().clone()
    adam = torch.optim.Adam([weight], lr=how.rate)
    n = len(other.encode(FACTS[0].prompt).row(0))
    ids = other.encode(FACTS[0].prompt + " mat").input_ids
    for _ in range(how.steps):
        adam.zero_grad()
        logp = net(input_ids=ids).logits[0].log_softmax(-1)
        (-logp[n - 1 : -1].gather(1, ids[0, n:, None]).mean()).backward()
        adam.step()
        with torch.no_grad():
            weight.copy_(first + (weight - first).clamp(-how.norm, how.norm))
    want = (weight - first).detach().double().numpy()
    got = edit.left @ edit.right.T
    np.testing.assert_allclose(got.T if matrix.inputs_first else got, want, atol=2e-3)
    assert np.abs(got).max() <= how.norm
    assert edit.effects[0].after > edit.effects[0].before
