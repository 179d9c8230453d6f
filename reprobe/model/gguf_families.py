"""What llama.cpp's converter did to each family of models, and how to undo it.

Enters: a GGUF file's hyperparameters and tensors. Leaves: the transformers config that says the same, the
tensor of every parameter, and values in transformers' layout. What has no place on the other side is refused.
Does not know files or vocabularies. A new family is a row of `FAMILIES`.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import gguf
import numpy as np
from transformers import CONFIG_MAPPING

from reprobe.errors import ModelLoadFailed

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Family:
    """How one GGUF architecture becomes a transformers model.

    `model_type` is transformers' name. `names` says which hyperparameter is which config attribute, beyond
    `_HYPERPARAMETERS`. `undo(config, gguf tensor name, values)` reverses what llama.cpp did to the values.
    """

    model_type: str
    names: Mapping[str, str]
    undo: Callable[[Any, str, Array], Array]


class Match(NamedTuple):
    """A parameter of the transformers model, its shape, and the GGUF tensor that holds its values."""

    parameter: str
    shape: tuple[int, ...]
    tensor: Any


def _as_is(config: Any, name: str, values: Array) -> Array:
    return values


def _rotary_halves(config: Any, name: str, values: Array) -> Array:
    """llama.cpp rotates neighbouring rows of each head, transformers rows half a head apart."""
    heads = {".attn_q.": config.num_attention_heads, ".attn_k.": config.num_key_value_heads}
    for part, n in heads.items():
        if part in name:
            return values.reshape(n, -1, 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
    return values


def _norms_minus_one(config: Any, name: str, values: Array) -> Array:
    """Gemma multiplies by 1 + w; llama.cpp stores the sum."""
    return values - 1 if name.endswith("norm.weight") else values


def _conv1d(config: Any, name: str, values: Array) -> Array:
    """GPT-2's blocks keep their matrices as (in, out)."""
    return values.T if name.startswith("blk.") and values.ndim == 2 else values


_LAYER_NORM = "attention.layer_norm_epsilon"

#: Architecture as the file names it → what to do with it.
FAMILIES: Mapping[str, Family] = {
    "gemma2": Family("gemma2", {}, _norms_minus_one),
    "gemma3": Family("gemma3_text", {"rope.freq_base_swa": "rope_local_base_freq"}, _norms_minus_one),
    "gpt2": Family("gpt2", {"feed_forward_length": "n_inner", _LAYER_NORM: "layer_norm_epsilon"}, _conv1d),
    "llama": Family("llama", {}, _rotary_halves),
    "phi3": Family("phi3", {}, _as_is),
    "qwen2": Family("qwen2", {}, _as_is),
    "qwen3": Family("qwen3", {}, _as_is),
    "starcoder2": Family("starcoder2", {_LAYER_NORM: "norm_epsilon"}, _as_is),
}

_HYPERPARAMETERS = {
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "final_logit_softcapping": "final_logit_softcapping",
    "rope.freq_base": "rope_theta",
}
#: The constants of every Llama 3.x; the file has no place for them.
_LLAMA3: Mapping[str, Any] = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_NEEDED = ("attention.head_count", "block_count", "context_length", "embedding_length")
#: Attributes that config classes take without naming them as parameters.
_TAKEN_UNNAMED = {"head_dim", "rope_local_base_freq", "rope_theta"}
#: Decided by the shapes of the tensors, or dealt with in `_scale_rope`.
_ELSEWHERE = {
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.type",
    "tensor_data_layout",
    "vocab_size",
}


def config_of(
    name: str,
    family: Family,
    stated: Mapping[str, Any],
    tokens: Mapping[str, Any],
    tensors: Mapping[str, Any],
) -> Any:
    """The transformers config that says what the file says; raises if that cannot be said."""
    lacking = [key for key in _NEEDED if not isinstance(stated.get(key), int)]
    if not any(key.endswith(("norm_epsilon", "norm_rms_epsilon")) for key in stated):
        lacking.append("attention.layer_norm_rms_epsilon")
    if lacking or "token_embd.weight" not in tensors:
        raise ModelLoadFailed(f"it lacks {', '.join(lacking) or 'a token embedding'}")
    if stated["block_count"] > len(tensors):
        raise ModelLoadFailed(f"it states {stated['block_count']} blocks and holds {len(tensors)} tensors")
    vocab_size = int(tensors["token_embd.weight"].shape[1])
    absent = [f"{k} = {v}" for k, v in tokens.items() if v is not None and v >= vocab_size]
    if absent:
        raise ModelLoadFailed(f"it states {_some(absent)} and embeds {vocab_size} tokens")
    heads, width = stated["attention.head_count"], stated["embedding_length"]
    head_dim = stated.get("attention.key_length", width // heads)

    config_class = CONFIG_MAPPING[family.model_type]
    takes = {*inspect.signature(config_class).parameters, *_TAKEN_UNNAMED}
    names = {
        key: attribute
        for key, attribute in (_HYPERPARAMETERS | dict(family.names)).items()
        if config_class.attribute_map.get(attribute, attribute) in takes
    }
    implied = {"attention.value_length": head_dim, "rope.dimension_count": head_dim, "expert_count": 0}
    rest = sorted(stated.keys() - names.keys() - _ELSEWHERE)
    homeless = [f"{key} = {stated[key]}" for key in rest if implied.get(key) != stated[key]]
    if homeless:
        raise ModelLoadFailed(f"{config_class.__name__} has no place for {_some(homeless)}")

    values = {attribute: stated[key] for key, attribute in names.items() if key in stated}
    values["vocab_size"] = vocab_size
    values["tie_word_embeddings"] = "output.weight" not in tensors
    if values.get("sliding_window") == 0:
        values["sliding_window"] = None
    if "rope_parameters" in takes:
        values.setdefault("rope_theta", 10000.0)  # what llama.cpp takes where nothing is stated
    if "num_key_value_heads" in takes:
        values.setdefault("num_key_value_heads", heads)
    if "query_pre_attn_scalar" in takes:
        # in no file: like llama.cpp, tell Gemma's two 27B models, which differ, by their number of blocks
        big = (name, stated["block_count"]) in (("gemma2", 46), ("gemma3", 62))
        values["query_pre_attn_scalar"] = width // heads if big else head_dim
    config = config_class(**values, **tokens)
    named = values.keys() - _TAKEN_UNNAMED
    ignored = [f"{k} = {values[k]}" for k in sorted(named) if getattr(config, k) != values[k]]
    if ignored:
        raise ModelLoadFailed(f"{config_class.__name__} does not take {', '.join(ignored)}")
    _scale_rope(config, stated, tensors, head_dim)
    return config


def _scale_rope(config: Any, stated: Mapping[str, Any], tensors: Mapping[str, Any], head_dim: int) -> None:
    """Scaled rotary frequencies: linear ones by metadata, Llama 3's by the tensor of factors."""
    unnamed = "linear" if stated.get("rope.scaling.factor") else "none"  # what llama.cpp takes it for
    kind, factors = stated.get("rope.scaling.type", unnamed), tensors.get("rope_freqs.weight")
    if kind == "none" and factors is None:
        return
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    if kind == "linear" and factors is None and "rope.scaling.factor" in stated:
        rope.update(rope_type="linear", factor=stated["rope.scaling.factor"])
        return
    if kind == "none" and factors is not None:
        values = np.asarray(factors.data, dtype=np.float64).ravel()
        factor = float(values.max())
        expected = _llama3_factors(rope["rope_theta"], head_dim, factor, **_LLAMA3)
        if values.shape == expected.shape and np.allclose(values, expected, rtol=1e-4):
            rope.update(rope_type="llama3", factor=factor, **_LLAMA3)
            return
    raise ModelLoadFailed(f"its rotary frequencies are scaled in a way that is not known here (type {kind!r})")


def _llama3_factors(
    theta: float,
    dim: int,
    factor: float,
    *,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_position_embeddings: float,
) -> Array:
    """By how much each rotary frequency is divided: 1 for short waves, `factor` for long ones."""
    turns = original_max_position_embeddings / (2 * np.pi * theta ** (np.arange(0, dim, 2) / dim))
    smooth = np.clip((turns - low_freq_factor) / (high_freq_factor - low_freq_factor), 0, 1)
    return np.asarray(1 / ((1 - smooth) / factor + smooth))


def match(name: str, net: Any, tensors: Mapping[str, Any]) -> list[Match]:
    """Every parameter of `net` (a tied one once) with its tensor; raises unless they are one to one."""
    arch = next(a for a, text in gguf.MODEL_ARCH_NAMES.items() if text == name)
    table = gguf.get_tensor_name_map(arch, net.config.num_hidden_layers)
    found, missing = [], []
    for parameter, value in net.named_parameters():
        tensor = tensors.get(table.get_name(parameter, try_suffixes=(".weight", ".bias")) or "")
        if tensor is None:
            missing.append(f"{parameter} {tuple(value.shape)}")
        else:
            found.append(Match(parameter, tuple(value.shape), tensor))
    used = {m.tensor.name for m in found} | {"rope_freqs.weight"}
    spare = [f"{t} {tuple(reversed(tensors[t].shape.tolist()))}" for t in tensors if t not in used]
    if missing or spare:
        raise ModelLoadFailed(f"{type(net).__name__} would lack {_some(missing)}, and has no place for {_some(spare)}")
    return found


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more if names else "nothing"
