"""Tiny random models of every family and a tokenizer, built in memory: import with `import tiny`.

Sizes are coprime where the family lets them be, norms and biases are random, windows are short, experts are
few, and multipliers differ from 1, so that a swapped axis, a missing norm or a forgotten scale shows. Nets
are float32 on the CPU, in evaluation mode, and always the same for the same name.
"""

import copy
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PreTrainedTokenizerFast,
)

from reprobe.model.language_model import LanguageModel

VOCAB = 307  # prime, and a little more than the tokenizer uses
LAYERS = 3
CONTEXT = 64
D_FF = 23
PAD, BOS, EOS, MASK = range(4)

#: Families whose heads are slices of d_model: 5 heads of 7, or of 6 where rotary embeddings need it even.
_SLICED = {"hidden_size": 35, "num_attention_heads": 5, "intermediate_size": D_FF}
_EVEN = _SLICED | {"hidden_size": 30}
#: The same with grouped key/value heads: 15 query and 5 key/value heads of 4.
_GROUPED = _SLICED | {"hidden_size": 60, "num_attention_heads": 15, "num_key_value_heads": 5}
#: Families with a free head width: d_model 27, 9 query and 3 key/value heads of 4.
_FREE = _SLICED | {"hidden_size": 27, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 4}
#: torch's grouped matrix product wants rows of whole 16 bytes, so sizes of experts are multiples of 8.
_EXPERTS = _FREE | {"hidden_size": 72, "head_dim": 6, "moe_intermediate_size": 16, "num_experts_per_tok": 2}
_PARTLY_ROTARY = {"partial_rotary_factor": 0.6}
_ALTERNATING = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
_GEMMA = dict(_FREE, **_ALTERNATING, query_pre_attn_scalar=6)

#: name → (model_type, config). A name with a dot is a further variant of its family.
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", dict(_SLICED, n_inner=D_FF)),
    "gptj": ("gptj", dict(_SLICED, n_inner=D_FF, rotary_dim=4)),
    "gpt_neox": ("gpt_neox", dict(_SLICED, rotary_pct=0.6)),
    "gpt_neox.sequential": ("gpt_neox", dict(_SLICED, rotary_pct=0.6, use_parallel_residual=False)),
    "opt": ("opt", dict(_SLICED, ffn_dim=D_FF)),
    "bloom": ("bloom", dict(_SLICED)),
    "falcon": ("falcon", dict(_EVEN, ffn_hidden_size=D_FF, bias=True)),
    "falcon.new": (
        "falcon",
        dict(_GROUPED, num_kv_heads=5, ffn_hidden_size=D_FF, new_decoder_architecture=True),
    ),
    "falcon.alibi": (
        "falcon",
        dict(_EVEN, ffn_hidden_size=D_FF, bias=True, alibi=True, parallel_attn=False, multi_query=False),
    ),
    "llama": ("llama", dict(_FREE, attention_bias=True, mlp_bias=True)),
    "mistral": ("mistral", dict(_FREE, sliding_window=5)),
    "mixtral": ("mixtral", dict(_EXPERTS, num_local_experts=4, intermediate_size=24, sliding_window=5)),
    "qwen2": ("qwen2", dict(_GROUPED, **_ALTERNATING, use_sliding_window=True)),
    "qwen3": ("qwen3", dict(_FREE)),
    "qwen3_moe": ("qwen3_moe", dict(_EXPERTS, num_experts=4, mlp_only_layers=[1])),
    "gemma": ("gemma", dict(_FREE)),
    "gemma2": ("gemma2", dict(_GEMMA, attn_logit_softcapping=2.0, final_logit_softcapping=3.0)),
    "gemma3_text": ("gemma3_text", dict(_GEMMA)),
    "phi": ("phi", dict(_SLICED, **_PARTLY_ROTARY)),
    "phi3": ("phi3", dict(_GROUPED, sliding_window=5)),
    "olmo2": ("olmo2", dict(_GROUPED)),
    "granite": (
        "granite",
        dict(
            _GROUPED,
            residual_multiplier=0.37,
            embedding_multiplier=2.3,
            logits_scaling=3.1,
            attention_multiplier=0.41,
        ),
    ),
    "stablelm": ("stablelm", dict(_SLICED, **_PARTLY_ROTARY, num_key_value_heads=1)),
    "stablelm.parallel": (
        "stablelm",
        dict(_SLICED, **_PARTLY_ROTARY, num_key_value_heads=1, use_parallel_residual=True, qk_layernorm=True),
    ),
    "starcoder2": ("starcoder2", dict(_GROUPED, sliding_window=5, use_bias=True)),
    "cohere": ("cohere", dict(_GROUPED, logit_scale=0.29, use_qk_norm=True)),
    "deepseek_v3": (
        "deepseek_v3",
        dict(
            _SLICED,
            hidden_size=40,
            num_key_value_heads=5,
            q_lora_rank=9,
            kv_lora_rank=13,
            qk_nope_head_dim=3,
            qk_rope_head_dim=4,
            v_head_dim=7,
            first_k_dense_replace=1,
            n_routed_experts=4,
            n_shared_experts=1,
            moe_intermediate_size=16,
            num_experts_per_tok=2,
            n_group=2,
            topk_group=1,
        ),
    ),
    "bert": ("bert", dict(_SLICED)),
    "roberta": ("roberta", dict(_SLICED, max_position_embeddings=CONTEXT + PAD + 1)),
    "modernbert": (
        "modernbert",
        dict(
            _EVEN,
            layer_types=_ALTERNATING["layer_types"],
            local_attention=4,
            mlp_bias=True,
            norm_bias=True,
            attention_bias=True,
            cls_token_id=BOS,
            sep_token_id=EOS,
        ),
    ),
}

#: All names, variants included.
FAMILIES: tuple[str, ...] = tuple(_CONFIGS)
ENCODERS: tuple[str, ...] = ("bert", "roberta", "modernbert")
DECODERS: tuple[str, ...] = tuple(name for name in FAMILIES if name not in ENCODERS)


def family_of(name: str) -> str:
    """The model_type behind a name of `FAMILIES`."""
    return _CONFIGS[name][0]


def tiny_config(name: str, **overrides: Any) -> Any:
    """The transformers config of the tiny model `name`, with config values overridden."""
    model_type, own = _CONFIGS[name]
    common = {
        "vocab_size": VOCAB,
        "num_hidden_layers": LAYERS,
        "max_position_embeddings": CONTEXT,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }
    values = common | own | overrides
    if "layer_types" in values:
        pattern = values["layer_types"]
        values["layer_types"] = [pattern[i % len(pattern)] for i in range(values["num_hidden_layers"])]
    return AutoConfig.for_model(model_type, **values)


def tiny_net(name: str, *, seed: int = 0, **overrides: Any) -> Any:
    """A fresh tiny model with a language-modelling head; `overrides` are config values.

    Changing the returned net changes no other.
    """
    return copy.deepcopy(_built(name, seed, json.dumps(overrides, sort_keys=True)))


@lru_cache(maxsize=64)
def _built(name: str, seed: int, overrides: str) -> Any:
    config = tiny_config(name, **json.loads(overrides))
    auto = AutoModelForMaskedLM if name in ENCODERS else AutoModelForCausalLM
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = auto.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            for parameter in net.parameters():
                noise = torch.randn_like(parameter)
                if parameter.ndim == 1:  # norms and biases, around what they start from
                    parameter += 0.3 * noise
                else:
                    parameter.copy_(noise * parameter.shape[-1] ** -0.5)
    return net


#: The merges of the byte-level vocabulary, so that tokens are not simply bytes. "Ġ" is a blank.
_MERGES = ["t h", "th e", "Ġ the", "i n", "Ġ a", "i s", "Ġ is", "e r", "o n", "Ġ o", "Ġo f", "a n", "an d"]
_CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tiny_tokenizer(*, bos: bool = True) -> PreTrainedTokenizerFast:
    """A fresh byte-level BPE tokenizer with offsets for any text, ids below `VOCAB`, and a chat template.

    With `bos` it puts a beginning-of-text token before each text, as those of Llama and Gemma do.
    """
    return copy.deepcopy(_tokenizer(bos))


@lru_cache(maxsize=2)
def _tokenizer(bos: bool) -> PreTrainedTokenizerFast:
    merges = [tuple(m.split(" ")) for m in _MERGES]
    words = ["<pad>", "<bos>", "<eos>", "<mask>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    words += ["".join(m) for m in merges]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in words[:4]])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", BOS)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        mask_token="<mask>",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        chat_template=_CHAT,
    )


def save_tiny(folder: Path, name: str = "llama", **overrides: Any) -> Path:
    """The folder with the tiny model `name` in it and its tokenizer, as transformers saves them."""
    tiny_net(name, **overrides).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def tiny_model(
    name: str = "llama", *, dtype: torch.dtype = torch.float32, bos: bool = True, **config: Any
) -> LanguageModel:
    """A fresh tiny language model, which a test may change; `config` goes to `tiny_net`."""
    return LanguageModel(tiny_net(name, **config).to(dtype), tiny_tokenizer(bos=bos), name=f"tiny-{name}")
