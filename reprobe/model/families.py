"""The table of model families: one row says where every part of a family's blocks is.

Enters: nothing; this is data. Leaves: `FAMILIES`, from `config.model_type` to a row. A new family is a new
row; nothing else in the library asks for a family by name. The rows were read from the transformers sources;
`tests/model/test_architectures.py` proves them. Does not know networks: `architectures` resolves the paths.

What the words of a row mean in the forward pass of a block (x is the stream; norms in a branch are left out):

- sequential: mid = x + attn.out; post = mid + mlp.out.
- parallel: post = x + attn.out + mlp.out; there is no mid.
- `post_norms`: attn.out and mlp.out are the outputs of norms that follow the output projections.
- `sum_norms` (the original post-norm Transformer): mid = norm(x + attn.out); post = norm(mid + mlp.out).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor

Side = Literal["in", "out"]
Kind = Literal["decoder", "encoder"]
#: A question about a transformers config.
When = Callable[[Any], bool]


@dataclass(frozen=True)
class Place:
    """The input or the output of the module at `path` inside a block ("" is the block itself).

    `flat`: the module sees all tokens in one row, (batch × seq, width).
    """

    path: str
    side: Side
    flat: bool = False


def _in(path: str, *, flat: bool = False) -> Place:
    return Place(path, "in", flat)


def _out(path: str, *, flat: bool = False) -> Place:
    return Place(path, "out", flat)


def _never(config: Any) -> bool:
    return False


def _always(config: Any) -> bool:
    return True


def _one(config: Any) -> float:
    return 1.0


def _embeddings_normed(config: Any) -> float | None:
    return None


def _root_of_width(config: Any) -> float:
    return math.sqrt(config.hidden_size)


def _max_positions(config: Any) -> int | None:
    return int(config.max_position_embeddings)


def _no_window(config: Any) -> int | None:
    return None


def _sliding_window(config: Any) -> int | None:
    return None if config.sliding_window is None else int(config.sliding_window)


def _separate(config: Any) -> tuple[str, ...]:
    return ("self_attn.q_proj", "self_attn.v_proj")


def _raw_logits(logits: Tensor, config: Any) -> Tensor:
    return logits


def _soft_capped(logits: Tensor, config: Any) -> Tensor:
    cap = config.final_logit_softcapping
    return logits if cap is None else (logits / cap).tanh() * cap


@dataclass(frozen=True, eq=False)
class Family:
    """One row. Paths start at a block (`places`, `experts`, `sum_norms`), at the stack of blocks (`blocks`,
    `final`), at the trunk, which is the network without its head (`stack`), or at the network (`head`)."""

    #: attn.heads, attn.out, resid.mid, mlp.neurons, mlp.out → place in a block. Other parts need no entry.
    places: Mapping[str, Place]
    kind: Kind = "decoder"
    stack: str = ""
    blocks: str = "layers"
    #: The final norm; None if the stack ends with the last block.
    final: str | None = "norm"
    #: Modules from `final` to logits, in order.
    head: tuple[str, ...] = ("lm_head",)
    #: What the model does to the head's output.
    logits: Callable[[Tensor, Any], Tensor] = _raw_logits
    parallel: When = _never
    #: attn.out and mlp.out are this many times what the modules at their places return.
    residual_scale: Callable[[Any], float] = _one
    post_norms: bool = False
    sum_norms: tuple[str, str] | None = None
    #: `embed` is this many times the token's row of the embedding (plus that of its position); None where a norm
    #: stands between.
    embedding_scale: Callable[[Any], float | None] = _one
    #: Learned embeddings of positions, from the stack.
    positions: str | None = None
    #: A block with a module at this path is a mixture of experts, whose fused weights are no modules.
    experts: str | None = None
    #: The parameters of such a block that write mlp.out, from the block: (…, d_model, inputs).
    expert_outputs: tuple[str, ...] = ()
    #: The linear layers that make queries and values, from the block, in decoders; where one makes keys too, that one.
    queries_values: Callable[[Any], tuple[str, ...]] = _separate
    #: Tokens mix through the attention mask and position_ids alone, and none sees a later one.
    forest: When = _always
    #: A token sees this many tokens back, itself included; None for all.
    window: Callable[[Any], int | None] = _no_window
    #: Only blocks of the layer type "sliding_attention" have the window: the trunk takes one mask per layer type.
    mask_per_layer_type: bool = False
    #: The trunk takes position_ids, counted from 0.
    takes_positions: bool = True
    #: Longest prompt in tokens; None where nothing limits it.
    context: Callable[[Any], int | None] = _max_positions
    #: Variants of the family that the row does not describe: what is different → how to tell.
    not_covered: Mapping[str, When] = field(default_factory=dict)


def _sequential(*, heads: str, attn: str, mid: str, neurons: str, mlp: str) -> dict[str, Place]:
    """The usual places: mid is what the norm before the MLP reads."""
    return {
        "attn.heads": _in(heads),
        "attn.out": _out(attn),
        "resid.mid": _in(mid),
        "mlp.neurons": _in(neurons),
        "mlp.out": _out(mlp),
    }


_BIDIRECTIONAL: Mapping[str, When] = {
    "it attends to later tokens (use_bidirectional_attention)": lambda c: bool(c.use_bidirectional_attention),
}

_LLAMA = Family(
    _sequential(
        heads="self_attn.o_proj",
        attn="self_attn",
        mid="post_attention_layernorm",
        neurons="mlp.down_proj",
        mlp="mlp",
    )
)
_MOE = replace(_LLAMA, experts="mlp.experts", expert_outputs=("mlp.experts.down_proj",))
_WINDOWED = replace(_LLAMA, window=_sliding_window)
_MIXED = replace(_LLAMA, window=_sliding_window, mask_per_layer_type=True)
_GEMMA2 = Family(
    _sequential(
        heads="self_attn.o_proj",
        attn="post_attention_layernorm",
        mid="pre_feedforward_layernorm",
        neurons="mlp.down_proj",
        mlp="post_feedforward_layernorm",
    ),
    post_norms=True,
    embedding_scale=_root_of_width,
    logits=_soft_capped,
    window=_sliding_window,
    mask_per_layer_type=True,
    not_covered=_BIDIRECTIONAL,
)
_BERT = Family(
    {
        "attn.heads": _in("attention.output.dense"),
        "attn.out": _out("attention.output.dense"),
        "resid.mid": _out("attention.output.LayerNorm"),
        "mlp.neurons": _in("output.dense"),
        "mlp.out": _out("output.dense"),
    },
    kind="encoder",
    blocks="encoder.layer",
    final=None,
    head=("cls.predictions",),
    sum_norms=("attention.output.LayerNorm", "output.LayerNorm"),
    forest=_never,
    not_covered={
        "it is set up as a decoder (is_decoder)": lambda c: bool(c.is_decoder),
        "its MLP runs on pieces of the sequence (chunk_size_feed_forward)": lambda c: c.chunk_size_feed_forward > 0,
    },
)

FAMILIES: Mapping[str, Family] = {
    "gpt2": Family(
        _sequential(heads="attn.c_proj", attn="attn", mid="ln_2", neurons="mlp.c_proj", mlp="mlp"),
        blocks="h",
        final="ln_f",
        positions="wpe",
        queries_values=lambda c: ("attn.c_attn",),
        not_covered={"it has cross-attention (add_cross_attention)": lambda c: bool(c.add_cross_attention)},
    ),
    "gptj": Family(
        {
            "attn.heads": _in("attn.out_proj"),
            "attn.out": _out("attn"),
            "mlp.neurons": _in("mlp.fc_out"),
            "mlp.out": _out("mlp"),
        },
        blocks="h",
        final="ln_f",
        queries_values=lambda c: ("attn.q_proj", "attn.v_proj"),
        parallel=_always,
    ),
    "gpt_neox": Family(
        _sequential(
            heads="attention.dense",
            attn="attention",
            mid="post_attention_layernorm",
            neurons="mlp.dense_4h_to_h",
            mlp="mlp",
        ),
        final="final_layer_norm",
        queries_values=lambda c: ("attention.query_key_value",),
        parallel=lambda c: bool(c.use_parallel_residual),
    ),
    "opt": Family(
        {
            "attn.heads": _in("self_attn.out_proj"),
            "attn.out": _out("self_attn"),
            "resid.mid": _in("final_layer_norm", flat=True),
            "mlp.neurons": _in("fc2", flat=True),
            "mlp.out": _out("fc2", flat=True),
        },
        stack="decoder",
        final="final_layer_norm",
        positions="embed_positions",
        not_covered={
            "its norms follow the residual sums (do_layer_norm_before=False)": lambda c: not c.do_layer_norm_before,
            "its embeddings are projected to another width (word_embed_proj_dim)": lambda c: (
                c.word_embed_proj_dim != c.hidden_size
            ),
            "it has no final norm (_remove_final_layer_norm)": lambda c: bool(c._remove_final_layer_norm),
        },
    ),
    # Attention and MLP of BLOOM add the stream themselves: what they add is what their projections return.
    "bloom": Family(
        _sequential(
            heads="self_attention.dense",
            attn="self_attention.dense",
            mid="post_attention_layernorm",
            neurons="mlp.dense_4h_to_h",
            mlp="mlp.dense_4h_to_h",
        ),
        blocks="h",
        final="ln_f",
        embedding_scale=_embeddings_normed,
        queries_values=lambda c: ("self_attention.query_key_value",),
        forest=_never,  # ALiBi counts columns, not position_ids
        takes_positions=False,
        context=lambda c: None,
        not_covered={
            "its residual stream is normed (apply_residual_connection_post_layernorm)": lambda c: bool(
                c.apply_residual_connection_post_layernorm
            ),
            "its projections are cut into slices (slow_but_exact with pretraining_tp > 1)": lambda c: (
                c.slow_but_exact and c.pretraining_tp > 1
            ),
        },
    ),
    "falcon": Family(
        _sequential(
            heads="self_attention.dense",
            attn="self_attention",
            mid="post_attention_layernorm",
            neurons="mlp.dense_4h_to_h",
            mlp="mlp",
        ),
        blocks="h",
        final="ln_f",
        queries_values=lambda c: ("self_attention.query_key_value",),
        parallel=lambda c: bool(c.parallel_attn or c.new_decoder_architecture),
        forest=lambda c: not c.alibi,
        context=lambda c: None if c.alibi else _max_positions(c),
    ),
    "llama": _LLAMA,
    "mistral": _WINDOWED,
    "mixtral": replace(_MOE, window=_sliding_window),
    "qwen2": _MIXED,
    "qwen3": _MIXED,
    "qwen3_moe": replace(_MOE, window=_sliding_window),
    "gemma": replace(_LLAMA, embedding_scale=_root_of_width, not_covered=_BIDIRECTIONAL),
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA2,
    "phi": Family(
        {
            "attn.heads": _in("self_attn.dense"),
            "attn.out": _out("self_attn"),
            "mlp.neurons": _in("mlp.fc2"),
            "mlp.out": _out("mlp"),
        },
        final="final_layernorm",
        parallel=_always,
    ),
    "phi3": replace(_WINDOWED, queries_values=lambda c: ("self_attn.qkv_proj",)),
    "olmo2": Family(
        _sequential(
            heads="self_attn.o_proj",
            attn="post_attention_layernorm",
            mid="mlp",  # no norm before the MLP
            neurons="mlp.down_proj",
            mlp="post_feedforward_layernorm",
        ),
        post_norms=True,
    ),
    "granite": replace(
        _LLAMA,
        residual_scale=lambda c: float(c.residual_multiplier),
        embedding_scale=lambda c: float(c.embedding_multiplier),
        logits=lambda logits, c: logits / c.logits_scaling,
    ),
    "stablelm": replace(_LLAMA, parallel=lambda c: bool(c.use_parallel_residual)),
    "starcoder2": Family(
        _sequential(
            heads="self_attn.o_proj",
            attn="self_attn",
            mid="post_attention_layernorm",
            neurons="mlp.c_proj",
            mlp="mlp",
        ),
        window=_sliding_window,
    ),
    "cohere": replace(
        _LLAMA,
        parallel=_always,
        logits=lambda logits, c: logits * c.logit_scale,
    ),
    "deepseek_v3": replace(
        _MOE,
        expert_outputs=(*_MOE.expert_outputs, "mlp.shared_experts.down_proj.weight"),
        queries_values=lambda c: (
            "self_attn.q_proj" if c.q_lora_rank is None else "self_attn.q_b_proj",
            "self_attn.kv_b_proj",
        ),
    ),
    "bert": _BERT,
    "roberta": replace(
        _BERT,
        head=("lm_head",),
        takes_positions=False,  # its positions start after the pad id; it counts them from input_ids itself
        context=lambda c: int(c.max_position_embeddings) - int(c.pad_token_id) - 1,
    ),
    "modernbert": Family(
        _sequential(heads="attn.Wo", attn="attn", mid="mlp_norm", neurons="mlp.Wo", mlp="mlp"),
        kind="encoder",
        final="final_norm",
        head=("head", "decoder"),
        forest=_never,
    ),
}
