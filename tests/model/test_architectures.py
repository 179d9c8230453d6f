"""The table of families, proved on a tiny random model of each.

Hooks here are plain ones on the modules that the taps name, so that the table is tested by itself.
"""

import contextlib
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForSequenceClassification, T5Config

from reprobe.errors import UnknownSite, UnsupportedModel, UnsupportedOperation, UsageError
from reprobe.model.architectures import Architecture, Tap, architecture_of, kind_of
from reprobe.model.checks import residuals
from reprobe.model.families import FAMILIES
from reprobe.model.sites import LAYER_PARTS, MODEL_PARTS, Site

PARALLEL = {"gptj", "gpt_neox", "falcon", "falcon.new", "phi", "stablelm.parallel", "cohere"}
POST_NORMS = {"gemma2", "gemma3_text", "olmo2"}
SUM_NORMS = {"bert", "roberta"}
EXPERT_BLOCKS = {"mixtral": {0, 1, 2}, "qwen3_moe": {0, 2}, "deepseek_v3": {1, 2}}
NO_FOREST = {"bloom", "falcon.alibi", *tiny.ENCODERS}

#: d_model, heads, width of a head, neurons; written out, so that no config attribute is trusted twice.
_SLICED, _EVEN, _GROUPED, _FREE = (35, 5, 7, 23), (30, 5, 6, 23), (60, 15, 4, 23), (27, 9, 4, 23)
_SPECIAL = {
    "bloom": (35, 5, 7, 140),
    "mixtral": (72, 9, 6, None),
    "qwen3_moe": (72, 9, 6, 23),
    "deepseek_v3": (40, 5, 7, 23),
}
SIZES = (
    dict.fromkeys(["gpt2", "gptj", "gpt_neox", "gpt_neox.sequential", "opt", "phi", "stablelm"], _SLICED)
    | dict.fromkeys(["stablelm.parallel", "bert", "roberta"], _SLICED)
    | dict.fromkeys(["falcon", "falcon.alibi", "modernbert"], _EVEN)
    | dict.fromkeys(["falcon.new", "qwen2", "phi3", "olmo2", "granite", "starcoder2", "cohere"], _GROUPED)
    | dict.fromkeys(["llama", "mistral", "qwen3", "gemma", "gemma2", "gemma3_text"], _FREE)
    | _SPECIAL
)


@dataclass(frozen=True)
class Run:
    """One forward pass of a tiny net with every site captured."""

    net: Any
    architecture: Architecture
    seen: dict[Site, Tensor]
    out: Any


def every_site(architecture: Architecture, net: Any) -> list[Site]:
    parts = architecture.parts(net, "tiny")
    inner = [Site(p, i) for i, have in enumerate(parts.of_layer) for p in LAYER_PARTS if p in have]
    return [Site(p) for p in MODEL_PARTS] + inner


@contextlib.contextmanager
def hooked(tap: Tap, change: Any) -> Any:
    """Show the tap's tensor to `change`, which may return another to put in its place."""

    def before(_: Any, args: tuple[Any, ...]) -> Any:
        new = change(args[0])
        return None if new is None else (new, *args[1:])

    def after(_: Any, __: Any, output: Any) -> Any:
        new = change(output if isinstance(output, Tensor) else output[0])
        return None if new is None else new if isinstance(output, Tensor) else (new, *output[1:])

    if tap.side == "in":
        handle = tap.module.register_forward_pre_hook(before)
    else:
        handle = tap.module.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def capture(architecture: Architecture, net: Any, module: Any, **inputs: Any) -> tuple[dict[Site, Tensor], Any]:
    """Run `module` (the net or its trunk) and return every site, (batch, seq, width)."""
    batch, seq = inputs["input_ids"].shape
    seen: dict[Site, Tensor] = {}

    def keep(site: Site, tap: Tap, x: Tensor) -> None:
        assert x.ndim == (2 if tap.flat else 3)
        seen[site] = (x.unflatten(0, (batch, seq)) if tap.flat else x).clone() * tap.scale

    with contextlib.ExitStack() as stack:
        for site in every_site(architecture, net):
            tap = architecture.tap(net, site)
            stack.enter_context(hooked(tap, lambda x, site=site, tap=tap: keep(site, tap, x)))
        out = module(**inputs)
    return seen, out


def tokens(batch: int = 2, seq: int = 11, seed: int = 1) -> Tensor:
    """Random token ids, no special ones."""
    return torch.randint(4, tiny.VOCAB, (batch, seq), generator=torch.Generator().manual_seed(seed))


@cache
def run(name: str) -> Run:
    net = tiny.tiny_net(name)
    architecture = architecture_of(net)
    seen, out = capture(architecture, net, net, input_ids=tokens(), output_hidden_states=True)
    return Run(net, architecture, seen, out)


@torch.no_grad()
def gap(a: Tensor, b: Tensor) -> float:
    """Largest deviation, relative to the largest value."""
    return float((a - b).abs().max() / b.abs().max())


# -- sites are where they say --------------------------------------------------------------------------------


def test_every_family_of_the_table_has_a_tiny_model() -> None:
    assert {tiny.family_of(name) for name in tiny.FAMILIES} == set(FAMILIES)
    assert set(SIZES) == set(tiny.FAMILIES)


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_all_identities_between_sites_hold(name: str) -> None:
    r = run(name)
    worst = residuals(r.architecture, r.net, r.seen, r.out.logits)
    end = "last resid.post = final" if name in SUM_NORMS else "norm(last resid.post) = final"
    expected = {"embed = resid.pre@0", "resid.post = next resid.pre", end, "unembed(final) = logits"}
    if name in PARALLEL:
        expected |= {"resid.pre + attn.out + mlp.out = resid.post"}
    elif name in SUM_NORMS:
        expected |= {"norm(resid.pre + attn.out) = resid.mid", "norm(resid.mid + mlp.out) = resid.post"}
    else:
        expected |= {"resid.pre + attn.out = resid.mid", "resid.mid + mlp.out = resid.post"}
    for inner, outer in (("attn.heads", "attn.out"), ("mlp.neurons", "mlp.out")):
        if any(site.part == inner for site in r.seen):
            left = f"projection({inner})"
            expected.add(f"norm({left}) = {outer}" if name in POST_NORMS else f"{left} = {outer}")
    assert set(worst) == expected
    assert max(worst.values()) <= 1e-5, worst


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_block_inputs_and_the_final_state_equal_the_hidden_states_of_transformers(name: str) -> None:
    r = run(name)
    ours = [r.seen[Site("resid.pre", layer)] for layer in range(tiny.LAYERS)] + [r.seen[Site("final")]]
    assert len(r.out.hidden_states) == len(ours)
    for mine, stock in zip(ours, r.out.hidden_states, strict=True):
        torch.testing.assert_close(mine, stock, rtol=0, atol=0)


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_each_block_has_the_parts_of_its_family_with_their_widths(name: str) -> None:
    r = run(name)
    d_model, heads, head_width, neurons = SIZES[name]
    parts = r.architecture.parts(r.net, "tiny")
    assert parts.n_layers == tiny.LAYERS
    for layer, have in enumerate(parts.of_layer):
        absent = {"resid.mid"} if name in PARALLEL else set()
        absent |= {"mlp.neurons"} if layer in EXPERT_BLOCKS.get(name, set()) else set()
        assert have == set(LAYER_PARTS) - absent
    assert parts.units == {"attn.heads": heads} | ({"mlp.neurons": neurons} if neurons else {})
    wide = {"attn.heads": heads * head_width, "mlp.neurons": neurons}
    for site, value in r.seen.items():
        assert value.shape == (2, 11, wide.get(site.part, d_model)), site
        assert r.architecture.width(r.net, site) == value.shape[-1], site
        if site.part in parts.units:
            narrow = Site(site.part, site.layer, parts.units[site.part] - 1)
            assert r.architecture.width(r.net, narrow) == (head_width if site.part == "attn.heads" else 1)


def test_heads_lie_side_by_side_in_the_order_of_the_query_heads() -> None:
    r = run("llama")
    changed = tiny.tiny_net("llama")
    with torch.no_grad():
        changed.model.layers[0].self_attn.q_proj.weight[5 * 4 : 6 * 4] *= -2  # head 5
    seen, _ = capture(r.architecture, changed, changed, input_ids=tokens())
    before, after = (s[Site("attn.heads", 0)].unflatten(-1, (9, 4)) for s in (r.seen, seen))
    moved = (before - after).abs().amax((0, 1, 3)) > 1e-4
    assert moved.nonzero().flatten().tolist() == [5]


def test_a_wrong_row_of_the_table_fails_the_identities() -> None:
    r = run("gemma2")
    places = r.architecture.row.places
    before_norms = {"attn.out": replace(places["attn.out"], path="self_attn")}
    before_norms["mlp.out"] = replace(places["mlp.out"], path="mlp")
    row = replace(r.architecture.row, places={**places, **before_norms}, post_norms=False)
    wrong = replace(r.architecture, row=row)
    seen, out = capture(wrong, r.net, r.net, input_ids=tokens())
    worst = residuals(wrong, r.net, seen, out.logits)
    assert worst["resid.pre + attn.out = resid.mid"] > 0.1
    assert worst["resid.mid + mlp.out = resid.post"] > 0.1
    assert worst["projection(attn.heads) = attn.out"] < 1e-5


# -- what a net takes and gives ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", tiny.FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_site_when_positions_are_given_as_the_row_says(name: str, side: str) -> None:
    r = run(name)
    pads = 3
    pad = torch.full((2, pads), tiny.PAD)
    joined = [pad, tokens()] if side == "left" else [tokens(), pad]
    ids = torch.cat(joined, 1)
    real = ids != tiny.PAD
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": real.long()}
    if r.architecture.takes_positions:
        inputs["position_ids"] = (real.long().cumsum(1) - 1).clamp(min=0)
    if r.architecture.kind == "decoder":
        inputs["use_cache"] = False
    seen, out = capture(r.architecture, r.net, r.architecture.trunk(r.net), **inputs)
    torch.testing.assert_close(out.last_hidden_state, seen[Site("final")], rtol=0, atol=0)
    for site, alone in r.seen.items():
        assert gap(seen[site][real].view(alone.shape), alone) < 1e-4, site


@pytest.mark.parametrize("name", [name for name in tiny.DECODERS if name not in NO_FOREST])
def test_prompts_that_share_a_prefix_in_one_row_give_the_same_states_where_forest_says_so(name: str) -> None:
    r = run(name)
    assert r.architecture.forest
    assert forest_gap(r) < 1e-4


@pytest.mark.parametrize("name", sorted(NO_FOREST & set(tiny.DECODERS)))
@torch.no_grad()
def test_alibi_models_share_no_prefix_since_they_count_columns_and_not_position_ids(name: str) -> None:
    r = run(name)
    backwards = torch.arange(11).flip(0)[None].expand(2, -1)
    out = r.architecture.trunk(r.net)(input_ids=tokens(), position_ids=backwards)
    assert torch.equal(out.last_hidden_state, r.seen[Site("final")])
    assert not r.architecture.forest


@pytest.mark.parametrize("name", tiny.ENCODERS)
def test_encoders_share_no_prefix_since_their_tokens_see_later_ones(name: str) -> None:
    r = run(name)
    ids = tokens()
    ids[:, -1] = 5 + ids[:, -1] % 7
    seen, _ = capture(r.architecture, r.net, r.net, input_ids=ids)
    assert gap(seen[Site("final")][:, 8], r.seen[Site("final")][:, 8]) > 1e-3
    assert not r.architecture.forest


@torch.no_grad()
def forest_gap(r: Run) -> float:
    """Two prompts with 4 common tokens in one row of prefix and two branches, against each by itself."""
    prompts = tokens(2, 10)
    prompts[1, :4] = prompts[0, :4]
    row = torch.cat([prompts[0], prompts[1, 4:]])[None]
    depth = torch.cat([torch.arange(10), torch.arange(4, 10)])[None]
    parent = [-1, *range(9), 3, *range(10, 15)]
    sees = torch.zeros(16, 16, dtype=torch.bool)
    for i, p in enumerate(parent):
        sees[i] = sees[p] if p >= 0 else False
        sees[i, i] = True
    window = getattr(r.net.config, "sliding_window", None) or 99
    near = depth[0, :, None] - depth[0, None, :] < window
    never = torch.finfo(torch.float32).min
    full, sliding = (torch.where(m, 0.0, never)[None, None] for m in (sees, sees & near))
    mixed = getattr(r.net.config, "layer_types", None) is not None
    mask = {"full_attention": full, "sliding_attention": sliding} if mixed else sliding
    trunk = r.architecture.trunk(r.net)
    alone = trunk(input_ids=prompts, use_cache=False).last_hidden_state
    packed = trunk(input_ids=row, attention_mask=mask, position_ids=depth, use_cache=False).last_hidden_state
    first, second = packed[0, :10], packed[0, [0, 1, 2, 3, *range(10, 16)]]
    return max(gap(first, alone[0]), gap(second, alone[1]))


@pytest.mark.parametrize("name", tiny.DECODERS)
def test_what_is_written_to_attn_out_and_mlp_out_is_what_the_stream_gets(name: str) -> None:
    """With both set to zero everywhere, blocks are the identity."""
    r = run(name)
    outs = [Site(part, layer) for layer in range(tiny.LAYERS) for part in ("attn.out", "mlp.out")]
    with contextlib.ExitStack() as stack, torch.no_grad():
        for site in outs:
            stack.enter_context(hooked(r.architecture.tap(r.net, site), torch.zeros_like))
        logits = r.net(input_ids=tokens()).logits
        norm = r.architecture.final_norm(r.net)
        assert norm is not None
        expected = r.architecture.unembed(r.net, norm(r.seen[Site("embed")]))
    assert gap(logits, expected) < 1e-5


@pytest.mark.parametrize("name", tiny.FAMILIES)
@torch.no_grad()
def test_the_stack_runs_in_every_pass_with_the_head_and_without(name: str) -> None:
    r = run(name)
    passes: list[str] = []
    handle = r.architecture.stack(r.net).register_forward_hook(lambda *_: passes.append("stack"))
    try:
        r.net(input_ids=tokens())
        r.architecture.trunk(r.net)(input_ids=tokens())
    finally:
        handle.remove()
    assert passes == ["stack", "stack"]


def test_only_falcon_changes_a_tapped_tensor_after_the_hook_has_seen_it() -> None:
    changed = set()
    for name in tiny.FAMILIES:
        r = run(name)
        held: dict[Site, tuple[Tensor, Tensor]] = {}
        with contextlib.ExitStack() as stack, torch.no_grad():
            for site in r.seen:
                keep = partial(lambda held, site, x: held.update({site: (x, x.clone())}), held, site)
                stack.enter_context(hooked(r.architecture.tap(r.net, site), keep))
            r.net(input_ids=tokens())
        changed |= {(name, site.part) for site, (now, then) in held.items() if not torch.equal(now, then)}
    assert changed == {("falcon", "mlp.out"), ("falcon.new", "mlp.out")}


@pytest.mark.parametrize("name", ["llama", "granite", "cohere", "gemma2", "roberta"])
def test_unembed_takes_rows_of_any_shape_and_dtype(name: str) -> None:
    r = run(name)
    rows, logits = r.seen[Site("final")][1, 3:7].double(), r.out.logits[1, 3:7]
    assert gap(r.architecture.unembed(r.net, rows), logits) < 1e-5
    assert gap(r.architecture.unembed(r.net, rows[0]), logits[0]) < 1e-5


@pytest.mark.parametrize("name", [*tiny.ENCODERS, "llama", "opt"])
def test_a_network_without_its_head_has_the_same_sites_and_no_logits(name: str) -> None:
    r = run(name)
    body = r.net.base_model
    architecture = architecture_of(body)
    seen, _ = capture(architecture, body, body, input_ids=tokens())
    assert set(seen) == set(r.seen)
    assert all(torch.equal(seen[site], r.seen[site]) for site in seen)
    auto = "AutoModelForMaskedLM" if name in tiny.ENCODERS else "AutoModelForCausalLM"
    with pytest.raises(UnsupportedOperation, match=f"no language-modelling head.*{auto}"):
        architecture.unembed(body, seen[Site("final")])


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForSequenceClassification])
def test_networks_made_with_other_heads_are_read_alike(auto: Any) -> None:
    net = auto.from_config(tiny.tiny_config("llama")).eval()
    seen, _ = capture(architecture_of(net), net, net, input_ids=tokens(1))
    assert len(seen) == 2 + tiny.LAYERS * len(LAYER_PARTS)


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_context_is_the_longest_prompt_and_alibi_sets_no_limit(name: str) -> None:
    r = run(name)
    expected = None if name in ("bloom", "falcon.alibi") else tiny.CONTEXT
    assert r.architecture.context(r.net.config) == expected


@pytest.mark.parametrize("name", ["roberta", "gpt2", "bert"])
@torch.no_grad()
def test_learned_positions_reach_exactly_as_far_as_the_context(name: str) -> None:
    r = run(name)
    longest = r.architecture.context(r.net.config)
    assert longest is not None
    r.net(input_ids=tokens(1, longest))
    with pytest.raises((IndexError, RuntimeError)):
        r.net(input_ids=tokens(1, longest + 1))


def test_a_config_says_whether_it_is_a_decoder() -> None:
    encoders = {name for name in tiny.FAMILIES if kind_of(tiny.tiny_config(name)) == "encoder"}
    assert encoders == set(tiny.ENCODERS)


# -- errors --------------------------------------------------------------------------------------------------


def test_a_family_without_a_row_is_refused_and_the_families_are_listed() -> None:
    with pytest.raises(UnsupportedModel, match=r"'t5'.*gpt2.*llama.*modernbert"):
        kind_of(T5Config())
    with pytest.raises(UnsupportedModel, match="'none'"):
        architecture_of(torch.nn.Linear(2, 3))


@pytest.mark.parametrize(
    ("name", "overrides", "reason"),
    [
        ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before"),
        ("opt", {"word_embed_proj_dim": 14}, "word_embed_proj_dim"),
        ("opt", {"_remove_final_layer_norm": True}, "_remove_final_layer_norm"),
        ("bloom", {"apply_residual_connection_post_layernorm": True}, "post_layernorm"),
        ("bloom", {"slow_but_exact": True, "pretraining_tp": 5}, "slow_but_exact"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention"),
        ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("bert", {"is_decoder": True}, "is_decoder"),
        ("roberta", {"is_decoder": True}, "is_decoder"),
        ("bert", {"chunk_size_feed_forward": 4}, "chunk_size_feed_forward"),
    ],
)
def test_a_variant_that_the_row_does_not_cover_is_refused_with_the_reason(
    name: str, overrides: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UnsupportedModel, match=reason):
        architecture_of(tiny.tiny_net(name, **overrides))


def test_a_network_that_is_built_differently_is_refused() -> None:
    net = tiny.tiny_net("llama")
    net.model.layers[1].mlp.down = net.model.layers[1].mlp.down_proj
    del net.model.layers[1].mlp.down_proj
    with pytest.raises(UnsupportedModel, match=r"no module 'mlp\.down_proj'"):
        architecture_of(net).parts(net, "tiny")


@pytest.mark.parametrize(
    ("name", "site", "message"),
    [
        ("phi", "resid.mid@1", "parallel block"),
        ("falcon", "resid.mid@0", "parallel block"),
        ("mixtral", "mlp.neurons@2", "blocks 0–2"),
        ("qwen3_moe", "mlp.neurons@2", "blocks 0, 2"),
        ("deepseek_v3", "mlp.neurons@1", "blocks 1–2"),
        ("llama", "mlp.out@3", r"blocks 0–2.*Did you mean 'mlp\.out@2'"),
    ],
)
def test_a_site_that_a_network_lacks_is_an_error_that_says_why(name: str, site: str, message: str) -> None:
    r = run(name)
    with pytest.raises(UnknownSite, match=message):
        r.architecture.tap(r.net, Site.parse(site))
    with pytest.raises(UnknownSite, match=message):
        r.architecture.parts(r.net, "tiny").require(Site.parse(site))


def test_experts_do_not_hide_the_neurons_of_dense_blocks_of_the_same_model() -> None:
    r = run("deepseek_v3")
    assert r.seen[Site("mlp.neurons", 0)].shape[-1] == 23
    assert Site("mlp.neurons", 1) not in r.seen


# -- residuals -----------------------------------------------------------------------------------------------


def test_a_nan_anywhere_is_not_lost_among_good_blocks() -> None:
    r = run("llama")
    for layer in range(tiny.LAYERS):
        broken = dict(r.seen)
        broken[Site("resid.mid", layer)] = torch.full_like(broken[Site("resid.mid", layer)], float("nan"))
        worst = residuals(r.architecture, r.net, broken, None)
        assert worst["resid.pre + attn.out = resid.mid"] != worst["resid.pre + attn.out = resid.mid"]


def test_a_shifted_layer_is_found() -> None:
    r = run("llama")
    shifted = dict(r.seen)
    shifted[Site("resid.post", 0)] = r.seen[Site("resid.post", 1)]
    worst = residuals(r.architecture, r.net, shifted, None)
    assert worst["resid.post = next resid.pre"] > 1e-2
    assert worst["resid.mid + mlp.out = resid.post"] > 1e-2
    assert worst["resid.pre + attn.out = resid.mid"] < 1e-5


def test_recording_hooks_that_are_still_active_cannot_hide_a_wrong_value() -> None:
    r = run("llama")
    seen = dict(r.seen)
    seen[Site("final")] = 2 * seen[Site("final")]
    tap = r.architecture.tap(r.net, Site("final"))
    with hooked(tap, lambda x: seen.__setitem__(Site("final"), x)), torch.no_grad():
        worst = residuals(r.architecture, r.net, seen, None)
    assert worst["norm(last resid.post) = final"] > 0.4


def test_nothing_to_compare_is_an_error_and_not_a_pass() -> None:
    r = run("llama")
    with pytest.raises(UsageError, match="not enough"):
        residuals(r.architecture, r.net, {Site("resid.mid", 0): r.seen[Site("resid.mid", 0)]}, None)


# -- the tiny models themselves ------------------------------------------------------------------------------


def test_tiny_nets_are_repeatable_and_independent_of_each_other() -> None:
    first, second = tiny.tiny_net("llama"), tiny.tiny_net("llama")
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    with torch.no_grad():
        first.lm_head.weight.zero_()
    assert tiny.tiny_net("llama").lm_head.weight.abs().max() > 0
    assert not torch.equal(tiny.tiny_net("llama", seed=1).lm_head.weight, second.lm_head.weight)
    assert len(tiny.tiny_net("gemma3_text", num_hidden_layers=5).model.layers) == 5


def test_the_tiny_tokenizer_gives_offsets_for_any_text_and_comes_back() -> None:
    tokenizer = tiny.tiny_tokenizer()
    text = "the naïve théorie 東京 is on — and\nthen 🙂"
    encoded = tokenizer(text, return_offsets_mapping=True)
    assert encoded.input_ids[0] == tiny.BOS
    assert encoded.input_ids[1:] == tiny.tiny_tokenizer(bos=False)(text).input_ids
    assert tokenizer.decode(encoded.input_ids, skip_special_tokens=True) == text
    assert encoded.offset_mapping[-1][1] == len(text)
    assert len(encoded.input_ids) < len(text.encode())  # merges: tokens are not simply bytes
    assert max(tokenizer.get_vocab().values()) < tiny.VOCAB
    special = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert special == (tiny.PAD, tiny.BOS, tiny.EOS)
    chat = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "<|user|>hi\n"
