"""Steering networks whose weights are elsewhere (`device_map`) or are not numbers of the usual kind (int8)."""

import copy

import numpy as np
import pytest
import torch
from tiny import tiny_net, tiny_tokenizer
from torch import nn
from transformers import AutoModelForCausalLM

import reprobe as rp
from reprobe.errors import UnsupportedOperation

PROMPTS = ["the cat", "a dog is on the mat and"]
SITES = ["embed", "resid.pre@1", "attn.heads@1", "attn.heads@1.2", "attn.out@1", "resid.mid@1", "mlp.neurons@1"]
SITES += ["mlp.out@1", "resid.post@1", "final"]


def item(lm, site):
    where = rp.Site.parse(site)
    v = np.random.default_rng(4).normal(size=lm.width(where))
    return rp.Add(rp.Direction.from_vector(where, v, scale=2.0))


@pytest.fixture(scope="module")
def offloaded(tmp_path_factory):
    """A network of which block 1 lies on disk and is fetched by accelerate's hooks for each pass."""
    folder = tmp_path_factory.mktemp("placed")
    tiny_net("llama").save_pretrained(folder / "model")
    parts = ["model.embed_tokens", "model.layers.0", "model.layers.2", "model.norm", "model.rotary_emb", "lm_head"]
    net = AutoModelForCausalLM.from_pretrained(
        folder / "model",
        device_map=dict.fromkeys(parts, "cpu") | {"model.layers.1": "disk"},
        offload_folder=folder / "offload",
    )
    assert net.model.layers[1].mlp.down_proj.weight.device.type == "meta"
    return rp.LanguageModel(net, tiny_tokenizer(), name="offloaded")


@pytest.mark.parametrize("site", SITES)
def test_an_offloaded_block_is_read_and_steered_as_one_in_memory(offloaded, tiny_lm, site):
    lm = tiny_lm("llama")
    (where,) = lm.sites(site)
    seen = [rp.capture(m, m.inputs(m.encode(PROMPTS)), [where])[where] for m in (lm, offloaded)]
    assert torch.equal(*seen)
    add = item(lm, site)
    found = []
    for m in (lm, offloaded):
        plain = m.logits(PROMPTS)
        with rp.steer(m, add):
            found.append((m.logits(PROMPTS), m.generate(PROMPTS, max_new_tokens=3)))
        assert torch.equal(m.logits(PROMPTS), plain)
        assert (found[-1][0] - plain).abs().max() > 1e-2
    torch.testing.assert_close(found[1][0], found[0][0], atol=1e-5, rtol=1e-5)
    assert found[1][1] == found[0][1]


def test_what_is_not_in_memory_is_not_baked(offloaded):
    with pytest.raises(UnsupportedOperation, match="in memory"):
        rp.bake(offloaded, item(offloaded, "attn.out@1"))


def test_a_device_map_of_auto_steers_alike(tiny_lm, tmp_path):
    lm = tiny_lm("llama")
    lm.net.save_pretrained(tmp_path / "model")
    lm.tokenizer.save_pretrained(tmp_path / "model")
    mapped = rp.LanguageModel.load(tmp_path / "model", device_map="auto")
    with rp.steer(lm, item(lm, "resid.post@1")):
        want = lm.logits(PROMPTS)
    with rp.steer(mapped, item(mapped, "resid.post@1")):
        torch.testing.assert_close(mapped.logits(PROMPTS).cpu(), want, atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def int8():
    """A network whose linear layers are int8, with scales of activations chosen in each pass."""
    net = torch.ao.quantization.quantize_dynamic(copy.deepcopy(tiny_net("llama")), {nn.Linear}, dtype=torch.qint8)
    assert not isinstance(net.model.layers[1].mlp.down_proj, nn.Linear)
    return rp.LanguageModel(net, tiny_tokenizer(), name="int8")


@pytest.mark.filterwarnings("ignore:.*deprecated and will be removed")
@pytest.mark.parametrize("site", SITES)
def test_a_quantised_network_is_read_and_steered_at_every_site(int8, site):
    (where,) = int8.sites(site)
    add, inputs = item(int8, site), int8.inputs(int8.encode(PROMPTS[1]))
    before, plain = rp.capture(int8, inputs, [where])[where], int8.logits(PROMPTS[1])
    with rp.steer(int8, add) as done:
        after = rp.capture(int8, inputs, [where])[where]
        steered = int8.logits(PROMPTS[1])
    torch.testing.assert_close(after - before, torch.from_numpy(add.step).float().expand_as(after), atol=1e-5, rtol=0)
    assert done[0].tokens == 2 * after.shape[1]
    assert (steered - plain).abs().max() > 1e-2
    assert torch.equal(int8.logits(PROMPTS[1]), plain)


def test_the_identities_of_sites_hold_where_layers_are_quantised(int8):
    assert max(int8.check().values()) < 1e-4


def test_quantised_weights_are_not_baked(int8):
    with pytest.raises(UnsupportedOperation, match="quantiser"):
        rp.bake(int8, item(int8, "attn.out@1"))
