"""ROME against its own theorem, the network's activations, and a plain loop, on every family that can be edited."""

import numpy as np
import pytest
import tiny
import torch
from tiny import tiny_model

import reprobe as rp
from reprobe.control.edits import Matrix
from reprobe.errors import DataError, UnknownSite, UnsupportedOperation, UsageError
from reprobe.methods import editing, rome
from reprobe.methods.editing import Search
from reprobe.methods.moments import Corpus, SecondMoment, second_moments
from reprobe.model.sites import Site

#: The text of these tests has fewer tokens than some families have neurons.
pytestmark = pytest.mark.filterwarnings("ignore:the second moment", "ignore:1 of 1 edits have no effect")
TEXT = Corpus.load(["the cat is on the mat and a dog is in the other hat", "and on the theory of the rest is an end"])
FACT = rp.Fact.of(subject="the other cat", prompt="it is that {} is on the", new="mat", true="roof")
QUICK = rome.Settings(search=Search(steps=3), prefixes=3, ridge=0.1)
SAMPLE_PREFIXES = editing.sample_prefixes
EDITABLE = [f for f in tiny.DECODERS if f != "mixtral"]


PREFIXES = ("an other theory. ", "is it. ", "The the. ", "Rome and the rest of it. ")


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    """An empty cache, and prefixes that need no sampling."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REPROBE_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(editing, "sample_prefixes", lambda lm, *, n=20, seed=0: PREFIXES[:n])
        yield


def test_prefixes_are_sampled_once_end_a_sentence_and_repeat_with_their_seed(tiny_lm):
    lm = tiny_lm("llama")
    first = SAMPLE_PREFIXES(lm, n=6, seed=3)
    assert len(first) == 6
    assert all(p.endswith(". ") and "\n" not in p for p in first)
    assert all(p.startswith(o) for p, o in zip(first, ("The", "In", "A", "It", "He", "She"), strict=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm, "generate", None)
        assert SAMPLE_PREFIXES(lm, n=6, seed=3) == first
        with pytest.raises(TypeError):  # another seed is another sample
            SAMPLE_PREFIXES(lm, n=6, seed=4)


def layer_of(lm):
    """A block in the middle that has neurons."""
    return next(i for i in (1, 0, 2) if "mlp.neurons" in lm.parts.of_layer[i])


def double(family, *, bos=True):
    """In float64, but for families whose stock code cannot: float32 inside attention (pads give NaN), fused experts."""
    if family in ("bloom", "gemma2", "qwen3_moe", "deepseek_v3"):
        return tiny_model(family, bos=bos)
    return tiny_model(family, dtype=torch.float64, bos=bos)


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("family", EDITABLE)
def test_after_the_edit_the_layer_maps_the_captured_key_to_the_value_exactly(family, bos):
    lm = double(family, bos=bos)
    layer = layer_of(lm)
    site = Site("mlp.neurons", layer)
    close = 1e-9 if lm.dtype == torch.float64 else 2e-5
    moment = second_moments(lm, [layer], TEXT)[layer]
    prefixes = editing.sample_prefixes(lm, n=QUICK.prefixes, seed=QUICK.seed)
    keys = []
    for front in ("", *prefixes):
        start, stop = FACT.span[0] + len(front), FACT.span[1] + len(front)
        batch = lm.encode(front + FACT.prompt, spans=[{"subject": (start, stop)}])
        with torch.no_grad(), rp.observe(lm, site) as seen:
            lm.net(input_ids=batch.input_ids)
        keys.append(seen[site][0][batch.spans["subject"][0]][-1])
    key = 0.5 * keys[0] + 0.5 * torch.stack(keys[1:]).mean(0)
    found = rome.associate(lm, FACT, layer, QUICK)
    np.testing.assert_allclose(found.key, key.numpy(), atol=close)
    np.testing.assert_allclose(found.bare_key, keys[0].numpy(), atol=close)

    edit = rome.edit(lm, FACT, layer=layer, moment=moment, settings=QUICK)
    tied = lm.net.get_output_embeddings().weight is lm.net.get_input_embeddings().weight
    with torch.no_grad(), rp.edited(lm, edit):
        got = lm.architecture.projection(lm.net, layer)(key)
        now_tied = lm.net.get_output_embeddings().weight is lm.net.get_input_embeddings().weight
    np.testing.assert_allclose(got.numpy(), found.value, atol=close)
    assert tied == now_tied
    assert edit.rank == 1
    # The direction is C⁻¹k*: what is orthogonal to it in the keys is mapped as before.
    c = moment.regularised(QUICK.ridge)
    cosine = edit.right[:, 0] @ np.linalg.solve(c, found.key)
    cosine /= np.linalg.norm(edit.right) * np.linalg.norm(np.linalg.solve(c, found.key))
    assert abs(cosine) == pytest.approx(1.0, abs=close)


@pytest.mark.parametrize("family", EDITABLE)
def test_the_search_raises_the_probability_and_the_edit_says_what_the_edited_network_does(family):
    lm = double(family)
    layer = layer_of(lm)
    fact = rp.Fact.of(subject="the other cat", prompt="it is that {}", new="mat")
    settings = rome.Settings(search=Search(steps=9, stride=2.0, clamp=99.0, kl=0.0, decay=0.0), prefixes=0, ridge=0.1)

    def stock():
        ids = lm.encode(fact.prompt + " mat").input_ids
        n = len(lm.encode(fact.prompt).row(0))
        with torch.no_grad():
            logp = lm.net(input_ids=ids).logits[0].log_softmax(-1)
        return float(logp[n - 1 : -1].gather(1, ids[0, n:, None]).mean().exp())

    before = stock()
    edit = rome.edit(lm, fact, layer=layer, moment=TEXT, settings=settings)
    assert stock() == before, "the model is as it was"
    with rp.edited(lm, edit):
        after = stock()
    (effect,) = edit.effects
    assert (effect.before, effect.after) == pytest.approx((before, after), rel=1e-4)
    assert edit.provenance["search"]["probability"] > 1.3 * before


def plain_search(lm, fact, layer, prefixes, settings):
    """The same search with whole forward passes and a hook, one prompt at a time, as the paper describes it."""
    projection = lm.architecture.projection(lm.net, layer)
    end = " " + fact.new
    rows = []
    for front in ("", *prefixes):
        n_prompt = len(lm.encode(front + fact.prompt).row(0))
        span = {"subject": (len(front) + fact.span[0], len(front) + fact.span[1])}
        batch = lm.encode(front + fact.prompt + end, spans=[span])
        rows.append((batch.input_ids, int(batch.spans["subject"][0].nonzero().max()), n_prompt))
    essence = lm.encode(f"{fact.subject} is a", spans=[{"subject": (0, len(fact.subject))}])
    at = int(essence.spans["subject"][0].nonzero().max())
    delta = torch.zeros(lm.d_model, dtype=torch.float64, requires_grad=True)

    def run(ids, place):
        seen = []

        def add(module, args, out):
            seen.append(out.detach().reshape(ids.shape[1], -1)[place])
            mask = torch.zeros(ids.shape[1], 1, dtype=out.dtype)
            mask[place] = 1
            return out + (mask * delta).reshape(out.shape)

        handle = projection.register_forward_hook(add)
        try:
            return lm.net(input_ids=ids).logits[0].log_softmax(-1), seen[0]
        finally:
            handle.remove()

    adam, first = torch.optim.Adam([delta], lr=settings.rate or 1.0), None
    losses = []
    for step in range(settings.steps):
        nll, starts = 0, []
        for ids, place, n in rows:
            logp, raw = run(ids, place)
            starts.append(raw)
            nll = nll - logp[n - 1 : -1].gather(1, ids[0, n:, None]).mean() / len(rows)
        start, now = starts[0], run(essence.input_ids, at)[0][at]
        first = now.detach() if first is None else first
        kl = (now.exp() * (now - first)).sum()
        loss = nll + settings.kl * kl + settings.decay * (delta.square().sum() + 1e-30).sqrt() / start.square().sum()
        losses.append(float(loss.detach()))
        if float(nll.detach()) < settings.stop or step == settings.steps - 1:
            break
        adam.zero_grad()
        loss.backward()
        with torch.no_grad():
            if settings.rate is not None:
                adam.step()
            else:  # as far as the tangent is above 0, or half of the vector's own length
                length = min(loss / delta.grad.norm(), settings.stride * start.norm())
                delta -= length * delta.grad / delta.grad.norm()
            limit = settings.clamp * start.norm()
            if delta.norm() > limit:
                delta *= limit / delta.norm()
    return losses, (start + delta).detach().numpy()


@pytest.mark.parametrize("rate", [None, 0.5])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "opt", "falcon.new"])
def test_the_search_is_that_of_whole_forward_passes(family, rate):
    lm = double(family)
    layer = layer_of(lm)
    settings = Search(steps=4, clamp=2.0, rate=rate)
    prefixes = editing.sample_prefixes(lm, n=3, seed=0)
    fact = rp.Fact.of(subject="the cat", prompt="it is {} on the", new="theory of mats")
    losses, value = plain_search(lm, fact, layer, prefixes, settings)
    found = rome.associate(lm, fact, layer, rome.Settings(search=settings, prefixes=3))
    assert found.loss == pytest.approx(losses[-1], rel=1e-4)
    assert found.steps == len(losses)
    np.testing.assert_allclose(found.value, value, atol=1e-4, rtol=1e-3)


def test_the_published_form_uses_the_bare_key_in_the_residual_and_the_division():
    lm = double("llama")
    settings = rome.Settings(search=QUICK.search, prefixes=3, ridge=0.1, compat="rome")
    found, moment = rome.associate(lm, FACT, 1, settings), second_moments(lm, [1], TEXT)[1]
    edit = rome.edit(lm, FACT, layer=1, moment=moment, settings=settings)
    W = Matrix.projection(lm, 1).values.numpy()
    bias = lm.architecture.projection(lm.net, 1).bias.detach().numpy()
    alike = rome.associate(lm, FACT, 1, rome.Settings(search=QUICK.search, prefixes=3, bare=None))
    np.testing.assert_allclose(found.key, alike.key)
    with pytest.raises(UsageError, match="weight above 0"):
        rome.Settings(bare=0.0)
    u = np.linalg.solve(moment.regularised(0.1), found.key)
    want = np.outer(found.value - bias - W @ found.bare_key, u) / (found.bare_key @ u)
    np.testing.assert_allclose(edit.left @ edit.right.T, want, atol=1e-10)
    ours = rome.edit(lm, FACT, layer=1, moment=moment, settings=QUICK)
    assert not np.allclose(ours.left @ ours.right.T, want, rtol=1e-3)
    with pytest.raises(UsageError, match="published form"):
        rome.Settings(compat="EasyEdit")
    with pytest.raises(UsageError, match="0 or more"):
        rome.Settings(prefixes=-1)


def test_an_edit_records_the_unedited_model_and_the_edits_before_it():
    lm = double("llama")
    plain = lm.identity
    first = rome.edit(lm, FACT, layer=1, moment=TEXT, settings=QUICK)
    rp.apply_edits(lm, first)
    second = rome.edit(lm, rp.Fact.of(subject="a dog", prompt="{} is", new="red"), layer=1, moment=TEXT, settings=QUICK)
    assert (first.base, first.after) == (plain, ())
    assert (second.base, second.after) == (plain, (first.digest,))
    rp.apply_edits(lm, second)
    rp.ledger_of(lm).revert([first])
    rp.ledger_of(lm).revert()
    assert lm.identity == plain


def test_the_same_call_gives_the_same_edit():
    lm = double("gemma3_text")
    one, two = (rome.edit(lm, FACT, layer=1, moment=TEXT, settings=QUICK) for _ in range(2))
    assert one.digest == two.digest


@pytest.mark.filterwarnings("default:1 of 1 edits have no effect")
def test_an_edit_without_effect_is_warned_of():
    lm = double("llama")
    with pytest.warns(UserWarning, match="no effect.*mat"):
        rome.edit(lm, FACT, layer=1, moment=TEXT, settings=rome.Settings(search=Search(steps=1), prefixes=0))


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ({"subject": "the dog", "prompt": "the cat is on", "target": "mat"}, DataError, "does not stand in its prompt"),
        ({"subject": "the cat", "prompt": "{} is on", "target": ""}, DataError, "empty"),
        ({"subject": "the cat", "prompt": "{} is on", "target": "mat", "layer": 3}, UnknownSite, "blocks 0–2"),
        ({"subject": "the cat", "prompt": "{} is on", "target": "mat", "layer": -1}, UsageError, "count from 0"),
        ({"subject": "the cat", "prompt": "{} is on", "target": "mat", "layer": None}, UsageError, "say layer"),
        ({}, UsageError, "give a fact"),
    ],
)
def test_bad_input_is_refused_and_the_weights_are_untouched(given, error, says):
    lm = double("llama")
    before = lm.identity
    with pytest.raises(error, match=says):
        rome.edit(lm, **({"layer": 1, "moment": TEXT, "settings": QUICK} | given))
    assert lm.identity == before


def test_what_cannot_be_edited_is_refused(tiny_lm):
    for family, error, says in (
        ("mixtral", UnknownSite, "mixture of experts"),
        ("bert", UnsupportedOperation, "encoder"),
    ):
        with pytest.raises(error, match=says):
            rome.edit(tiny_lm(family), FACT, layer=0, moment=TEXT)
    lm = tiny_lm("llama")
    step = rp.Add(rp.Direction.from_vector("resid.post@1", np.ones(lm.d_model), scale=1.0))
    with rp.steer(lm, step), pytest.raises(UsageError, match="steered"):
        rome.edit(lm, FACT, layer=1, moment=TEXT)
    singular = SecondMoment(Site("mlp.neurons", 1), 2, np.zeros((tiny.D_FF, tiny.D_FF)), {}, "")
    with pytest.raises(UsageError, match="singular"):
        rome.edit(
            lm, FACT, layer=1, moment=singular, settings=rome.Settings(search=Search(steps=1), prefixes=0, ridge=0)
        )
    narrow = SecondMoment(Site("mlp.neurons", 1), 9, np.eye(5), {}, "")
    with pytest.raises(UsageError, match="width 5"):
        rome.edit(lm, FACT, layer=1, moment=narrow, settings=QUICK)
    with pytest.raises(UsageError, match=r"for block 0 is of mlp\.neurons@1"):
        rome.edit(lm, FACT, layer=0, moment=second_moments(lm, [1], TEXT)[1], settings=QUICK)
    with rp.steer(lm, step), pytest.raises(UsageError, match="steered"):
        SAMPLE_PREFIXES(lm, n=3, seed=77)
