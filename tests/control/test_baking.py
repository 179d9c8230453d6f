"""Baked is steered is reloaded: the same logits on every family, or a refusal that says why, and no trace after it."""

import dataclasses
import re

import numpy as np
import pytest
import torch
from tiny import DECODERS, tiny_model
from transformers import AutoModelForCausalLM

import reprobe as rp
from reprobe.errors import IdentityMismatch, UnsupportedOperation, UsageError

PROMPTS = ["the cat", "a dog is on the mat and"]
TOLERANCE = 1e-4
#: Families in which a norm stands between a projection and the stream.
POST_NORMS = ("gemma2", "gemma3_text", "olmo2")
#: Families that transformers builds without a bias of the attention output, or of the MLP, whatever the config says.
NO_ATTN_BIAS = ("gptj", "mistral", "mixtral", "qwen2", "phi3", "stablelm", "stablelm.parallel")
NO_MLP_BIAS = (
    *("mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma", "phi3", "stablelm", "stablelm.parallel", "cohere"),
    "deepseek_v3",
)
NORM_BIAS = (
    *("gpt2", "gptj", "gpt_neox", "gpt_neox.sequential", "opt", "bloom", "falcon", "falcon.new", "falcon.alibi"),
    *("phi", "stablelm", "stablelm.parallel", "starcoder2"),
)
EXPERTS = {"mixtral": (0, 1, 2), "qwen3_moe": (0, 2), "deepseek_v3": (1, 2)}


def direction(lm, site, seed=0, scale=1.5):
    v = np.random.default_rng(seed).normal(size=lm.width(rp.Site.parse(site)))
    return rp.Direction.from_vector(site, v, scale=scale)


def ablated_everywhere(lm, seed=0):
    """Directional ablation at every write site, as in the paper."""
    d = direction(lm, "embed", seed)
    return [rp.Ablate(d, site=site) for site in lm.sites("embed, attn.out@*, mlp.out@*")]


def state(net):
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def settings(net):
    """The config, but for what saving fills in."""
    return {name: value for name, value in net.config.to_dict().items() if name != "architectures"}


def require_same_state(net, before):
    after = net.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def require_exact(lm, items, folder, *, untie=False):
    """The logits under hooks = of baked weights = of the saved checkpoint in stock transformers; then all is undone."""
    before, config = state(lm.net), settings(lm.net)
    plain = lm.logits(PROMPTS, at="all")
    with rp.steer(lm, *items):
        want = lm.logits(PROMPTS, at="all")
    with rp.bake(lm, *items, untie=untie):
        got = lm.logits(PROMPTS, at="all")
        lm.net.save_pretrained(folder)
        identity = lm.identity
    net, loading = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(loading.values()), "keys are missing, or are not expected"
    other = rp.LanguageModel(net, lm.tokenizer, name="reloaded")
    assert other.identity.weights == identity.weights
    reloaded = other.logits(PROMPTS, at="all")
    for a, b, c, p in zip(want, got, reloaded, plain, strict=True):
        assert (a - b).abs().max() < TOLERANCE
        assert (a - c).abs().max() < TOLERANCE
        assert (a - p).abs().max() > 100 * TOLERANCE
    require_same_state(lm.net, before)
    assert settings(lm.net) == config
    assert all(torch.equal(a, b) for a, b in zip(plain, lm.logits(PROMPTS, at="all"), strict=True))


def refusal(lm, *items, **options):
    """What `bake` says when it refuses, having changed nothing."""
    before, config = state(lm.net), settings(lm.net)
    with pytest.raises(UsageError) as caught:
        rp.bake(lm, *items, **options)
    require_same_state(lm.net, before)
    assert settings(lm.net) == config
    return str(caught.value)


@pytest.mark.parametrize("name", DECODERS)
def test_an_add_at_every_output_site_is_a_bias_wherever_the_family_can_have_one(name, tmp_path):
    lm = tiny_model(name)
    experts = EXPERTS.get(name, ())
    sites = {f"{part}@1": part for part in ("attn.heads", "attn.out", "resid.mid", "mlp.neurons", "mlp.out")}
    sites |= {"attn.heads@2.1": "attn.heads", "mlp.neurons@2.3": "mlp.neurons", "resid.post@0": "mlp.out"}
    sites |= {"resid.pre@2": "mlp.out", "embed": "embed", "resid.pre@0": "embed", "final": "final"}
    baked, refused = [], {}
    for number, (site, kind) in enumerate(sites.items()):
        where = rp.Site.parse(site)
        try:
            lm.sites(where)
        except rp.ReprobeError:
            continue
        item = rp.Add(direction(lm, site, number), [1.0, -0.7][number % 2] * (3 if kind == "mlp.neurons" else 1))
        written = where.layer if where.part != "resid.pre" else (where.layer or 0) - 1
        if kind == "final":
            why = None if name in NORM_BIAS else "no bias"
        elif kind == "embed":
            why = "norm stands between the embedding" if name == "bloom" else None
        elif name in POST_NORMS and kind in ("attn.out", "resid.mid", "mlp.out"):
            why = "a norm stands between the projection"
        elif kind == "mlp.out" and written in experts:
            why = "mixture of experts"
        elif kind in ("attn.heads", "attn.out", "resid.mid"):
            why = "without such a bias" if name in NO_ATTN_BIAS else None
        else:
            why = "without such a bias" if name in (*NO_MLP_BIAS, *POST_NORMS) else None
        if why is None:
            baked.append(item)
        else:
            refused[site] = why
            assert re.search(why, refusal(lm, item, untie=True)), site
    assert baked
    require_exact(lm, baked, tmp_path / "model", untie=True)


@pytest.mark.parametrize("name", [n for n in DECODERS if n not in (*POST_NORMS, "bloom")])
def test_ablation_at_every_write_site_is_a_product_of_weights(name, tmp_path):
    lm = tiny_model(name)
    items = ablated_everywhere(lm)
    require_exact(lm, items, tmp_path / "model", untie=True)
    # The formula of the paper, written out.
    r = torch.tensor(items[0].direction.vector)
    P = torch.eye(len(r), dtype=torch.float64) - torch.outer(r, r)
    module = lm.architecture.tap(lm.net, rp.Site("attn.heads", 0)).module
    W = module.weight.detach().double()
    want = W @ P if hasattr(module, "nx") else P @ W
    with rp.bake(lm, *items, untie=True):
        assert torch.allclose(module.weight.detach().double(), want, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "qwen3_moe"])
def test_ablating_the_whole_stream_is_the_same_product_and_half_of_it_is_refused(name, tmp_path):
    lm = tiny_model(name)
    d = direction(lm, "embed", 3)
    stream = "embed, resid.post@*" if lm.architecture.parallel(lm.net.config) else "embed, resid.mid@*, resid.post@*"
    everywhere = [rp.Ablate(d, site=site) for site in lm.sites(stream)]
    require_exact(lm, everywhere, tmp_path / "stream", untie=True)
    both = [rp.Ablate(d, site=site) for site in lm.sites("resid.pre@*, attn.out@*, mlp.out@*")]
    require_exact(lm, both, tmp_path / "both", untie=True)
    for lacking in (0, 2):
        some = [*everywhere[:lacking], *everywhere[lacking + 1 :]]
        assert "what earlier blocks wrote" in refusal(lm, *some, untie=True)
    # Ablating part of a direction leaves some of it, so that later blocks cannot rely on its absence.
    half = [rp.Ablate(d, 0.5, site="embed"), *everywhere[1:]]
    assert "what earlier blocks wrote" in refusal(lm, *half, untie=True)


@pytest.mark.parametrize("name", ["llama", "granite", "falcon.new"])
def test_several_operators_act_in_their_order(name, tmp_path):
    lm = tiny_model(name)
    width, rng = lm.d_model, np.random.default_rng(2)
    d, e = direction(lm, "attn.out@1"), direction(lm, "attn.out@1", 1)
    heads = direction(lm, "attn.heads@1.2", 4)
    A = 0.7 * np.eye(width) + 0.3 * rng.normal(size=(width, width)) / np.sqrt(width)
    items = [
        rp.Ablate(d),
        rp.Add(e, 0.8),
        rp.Ablate(e, 0.5),
        rp.Clamp(d, 1.3),
        rp.Scale(heads, 2.0),
        rp.Scale("attn.heads@1.2", 0.5),
        rp.Scale("mlp.neurons@1.4", 0.0),
        rp.Affine(A, rng.normal(size=width), site="mlp.out@1", strength=0.6),
        rp.LowRank(rng.normal(size=(width, 2)), rng.normal(size=(width, 2)) / width, [0.1, 0.2], site="embed"),
        rp.Replace(rng.normal(size=width), site="attn.out@2", strength=0.5),
        rp.Add(direction(lm, "resid.post@1", 7), 0.5),
    ]
    if name == "falcon.new":  # its parallel blocks have no resid.mid, and this config no biases: they are added
        assert not lm.net.config.bias
    require_exact(lm, items, tmp_path / "model", untie=True)


def test_generation_with_a_cache_is_that_of_the_steered_model():
    lm = tiny_model("llama")
    items = [rp.Add(direction(lm, "resid.post@1"), 2.0), *ablated_everywhere(lm, 5)]
    with rp.steer(lm, *items):
        want = lm.generate(PROMPTS, max_new_tokens=9)
    with rp.bake(lm, *items, untie=True):
        assert lm.generate(PROMPTS, max_new_tokens=9) == want
    assert lm.generate(PROMPTS, max_new_tokens=9) != want


REASONS = {
    "it has a gate": lambda lm, d, g: rp.Add(d, when=rp.When(g, above=0.0)),
    "the scope generated": lambda lm, d, g: rp.Add(d, tokens="generated"),
    "a strength for each": lambda lm, d, g: rp.Add(d, [1.0, 2.0]),
    "its norm back": lambda lm, d, g: rp.Add(d, unit="norm", keep_norm=True),
    "no fixed matrix": lambda lm, d, g: rp.Add(d, unit="norm"),
    "fixed matrix and": lambda lm, d, g: rp.Add(d, piecewise=True),
    "a limit": lambda lm, d, g: rp.Clamp(d, low=0.0),
    "cannot be baked": lambda lm, d, g: rp.Noise(0.1, site="attn.out@1"),
    "position": lambda lm, d, g: rp.Replace(np.ones((2, lm.d_model)), site="attn.out@1"),
    "only an Add": lambda lm, d, g: rp.Ablate(d, site="final"),
    "two matrices": lambda lm, d, g: rp.Ablate(d, site="embed"),
    "one argument each": lambda lm, d, g: [rp.Add(d)],
}


@pytest.mark.parametrize("reason", REASONS)
def test_what_no_weight_does_is_refused_with_the_reason(reason):
    lm = tiny_model("llama", tie_word_embeddings=True)
    item = REASONS[reason](lm, direction(lm, "attn.out@1"), direction(lm, "resid.post@0", 1))
    assert reason in refusal(lm, item)


def test_a_refusal_changes_nothing_though_an_earlier_item_could_be_baked():
    lm = tiny_model("qwen3")
    fits, not_fitting = (rp.Add(direction(lm, site)) for site in ("attn.out@0", "mlp.out@2"))
    assert "mlp.down_proj.bias" in refusal(lm, fits, not_fitting)


def test_tied_embeddings_become_two_and_one_again(tmp_path):
    lm = tiny_model("llama", tie_word_embeddings=True)
    embedding, head = lm.net.get_input_embeddings(), lm.net.get_output_embeddings()
    assert head.weight is embedding.weight
    require_exact(lm, ablated_everywhere(lm), tmp_path / "model", untie=True)
    assert head.weight is embedding.weight
    with rp.bake(lm, *ablated_everywhere(lm), untie=True):
        assert head.weight is not embedding.weight
        assert not lm.net.config.tie_word_embeddings


def test_a_baked_model_is_another_model_until_it_is_taken_out_again_newest_first():
    lm = tiny_model("llama")
    identity = lm.identity
    d = rp.Direction.from_vector("attn.out@1", np.ones(lm.d_model), identity=identity)
    first = rp.bake(lm, rp.Add(d))
    assert identity.differences(lm.identity).keys() == {"weights"}
    with pytest.raises(IdentityMismatch):
        rp.bake(lm, rp.Add(d))
    second = rp.bake(lm, rp.Add(d, 2.0), allow_mismatch=True)
    with pytest.raises(UsageError, match="later"):
        first.revert()
    second.revert()
    second.revert()
    first.revert()
    assert lm.identity == identity


def test_no_pass_adds_a_bias_that_nothing_was_baked_into(tmp_path):
    lm = tiny_model("llama", attention_bias=False, mlp_bias=False)
    names = {name for name, _ in lm.net.named_parameters()}
    with rp.bake(lm, rp.Add(direction(lm, "resid.post@0"))):
        require_exact(lm, [rp.Add(direction(lm, "mlp.neurons@1")), rp.Add(direction(lm, "attn.out@2"))], tmp_path / "m")
        assert {name for name, _ in lm.net.named_parameters()} - names == {"model.layers.0.mlp.down_proj.bias"}
        kept = {name for name in lm.net.state_dict() if name.endswith(".bias")}
    assert kept == {f"model.layers.{k}.mlp.{part}_proj.bias" for k in range(3) for part in ("gate", "up", "down")}
    assert not any(name.endswith(".bias") for name in lm.net.state_dict())


def test_an_error_inside_the_context_takes_it_out():
    lm = tiny_model("gpt2")
    before = state(lm.net)

    def fail():
        with rp.bake(lm, rp.Add(direction(lm, "attn.out@1"))):
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    require_same_state(lm.net, before)


def test_half_precision_is_baked_up_to_its_rounding():
    lm = tiny_model("llama")
    lm.net.to(torch.bfloat16)
    items = ablated_everywhere(lm)
    with rp.steer(lm, *items):
        want = lm.logits(PROMPTS).float()
    plain = lm.logits(PROMPTS).float()
    with rp.bake(lm, *items, untie=True):
        got = lm.logits(PROMPTS).float()
    assert (got - want).abs().max() < 0.2 * (plain - want).abs().max()


def test_encoders_and_quantised_weights_are_refused():
    lm = tiny_model("llama")
    item = rp.Add(direction(lm, "attn.out@1"))
    lm.net.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(UnsupportedOperation, match="quantised"):
        rp.bake(lm, item)
    encoder = tiny_model("bert")
    with pytest.raises(UnsupportedOperation, match="encoder"):
        rp.bake(encoder, rp.Add(direction(encoder, "attn.out@1")))
    away = tiny_model("llama")
    away.net.model.layers[1].to("meta")
    with pytest.raises(UnsupportedOperation, match="in memory"):
        rp.bake(away, dataclasses.replace(item, strength=2.0), allow_mismatch=True)


@pytest.mark.models
def test_a_real_model_bakes_and_its_post_norms_refuse(real_lm):
    lm = real_lm("smollm2-135m")
    items = [rp.Add(direction(lm, "resid.post@12", scale=3.0)), *ablated_everywhere(lm)]
    prompts = ["The city of Paris is in", "She opened the letter and"]
    plain = lm.logits(prompts)
    with rp.steer(lm, *items):
        want = lm.logits(prompts)
    baked = rp.bake(lm, *items, untie=True)
    got = lm.logits(prompts)
    baked.revert()
    assert (got - want).abs().max() < TOLERANCE * want.abs().max()
    assert torch.equal(lm.logits(prompts), plain)
    gemma = real_lm("gemma3-270m")
    assert "norm stands between" in refusal(gemma, rp.Add(direction(gemma, "resid.post@3")))
