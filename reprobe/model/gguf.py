"""GGUF files: from llama.cpp's format to an ordinary transformers folder, once.

Enters: a `.gguf` file. Leaves: a folder in the cache with config, float32 safetensors and tokenizer, keyed by the
file's sha256, that transformers opens in about a second. float32, because a dequantised value is a product (and sum)
of half-precision scales and integers: half precision would round it.

Everything the file states about the model must arrive: a hyperparameter or tensor without a place in the transformers
model, and a parameter without a tensor, are refused, never dropped or invented. Does not know where the file came
from, nor vocabularies (see gguf_tokenizer).
"""

import contextlib
import errno
import inspect
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import safetensors
import safetensors.numpy
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, GenerationConfig

from reprobe.errors import ModelLoadFailed
from reprobe.model import cache, gguf_tokenizer
from reprobe.progress import Progress, silent
from reprobe.provenance import canonical_json, digest_bytes, digest_file, versions, write_durably

#: Raised by one whenever a conversion would come out differently; older folders are then not used any more.
CONVERTER = 1
#: Bytes of tensors per safetensors file: bounds the memory of a conversion, whatever the size of the model.
SHARD = 2 << 30
_RECORD = "conversion.json"

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Family:
    """How one GGUF architecture becomes a transformers model.

    `model_type` is transformers' name, `names` maps GGUF hyperparameters to config attributes where they differ from
    `_HYPERPARAMETERS`, and `undo(gguf tensor name, values, config)` reverses what llama.cpp's converter did to the
    values.
    """

    model_type: str
    names: Mapping[str, str]
    undo: Callable[[str, Array, Any], Array]


def _as_is(name: str, values: Array, config: Any) -> Array:
    return values


def _rotary_halves(name: str, values: Array, config: Any) -> Array:
    """llama.cpp rotates neighbouring rows of each head, transformers rows half a head apart."""
    heads = {".attn_q.": config.num_attention_heads, ".attn_k.": config.num_key_value_heads}
    for part, n in heads.items():
        if part in name:
            return values.reshape(n, -1, 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
    return values


def _norms_minus_one(name: str, values: Array, config: Any) -> Array:
    """Gemma multiplies by 1 + w; llama.cpp stores the sum."""
    return values - 1 if name.endswith("norm.weight") else values


def _conv1d(name: str, values: Array, config: Any) -> Array:
    """GPT-2's blocks keep their matrices as (in, out)."""
    return values.T if name.startswith("blk.") and values.ndim == 2 else values


FAMILIES: Mapping[str, Family] = {
    "gemma2": Family("gemma2", {}, _norms_minus_one),
    "gemma3": Family("gemma3_text", {"rope.freq_base_swa": "rope_local_base_freq"}, _norms_minus_one),
    "gpt2": Family(
        "gpt2", {"feed_forward_length": "n_inner", "attention.layer_norm_epsilon": "layer_norm_epsilon"}, _conv1d
    ),
    "llama": Family("llama", {}, _rotary_halves),
    "phi3": Family("phi3", {}, _as_is),
    "qwen2": Family("qwen2", {}, _as_is),
    "qwen3": Family("qwen3", {}, _as_is),
    "starcoder2": Family("starcoder2", {"attention.layer_norm_epsilon": "norm_epsilon"}, _as_is),
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
_NEEDED = ("attention.head_count", "block_count", "context_length", "embedding_length")
#: Decided by the shapes of the tensors, or dealt with in `_set_rope`.
_ELSEWHERE = ("rope.scaling.factor", "rope.scaling.type", "tensor_data_layout", "vocab_size")


def convert(path: Path, *, progress: Progress = silent) -> Path:
    """The transformers folder of a GGUF file, converted now if it is not in the cache.

    Raises `ModelLoadFailed` if the file is no whole GGUF file or cannot be converted faithfully, `DiskFull`.
    """
    path = path.expanduser().absolute()
    _require_gguf(path)
    sha256 = _digest(path)

    def make(scratch: Path) -> None:
        _convert(path, sha256, scratch / folder_of(sha256).name, progress)

    return cache.build(folder_of(sha256), make, whole=is_whole, progress=progress)


def folder_of(sha256: str) -> Path:
    """Where the conversion of the GGUF file with this digest is, or would be."""
    return cache.cache_folder() / "models" / f"{sha256}-{CONVERTER}"


def is_whole(folder: Path) -> bool:
    """Whether a conversion is there with every file in its full size (their bytes are not read again)."""
    try:
        sizes = json.loads((folder / _RECORD).read_text())["files"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _convert(path: Path, sha256: str, folder: Path, progress: Progress) -> None:
    progress(f"reading {path.name}", 0, 0)
    reader = _read(path)
    name = _scalar(reader, "general.architecture")
    pieces = _scalar(reader, "split.count") or 1
    if pieces > 1:
        raise ModelLoadFailed(f"{path} is one of {pieces} pieces of a model; join them: llama-gguf-split --merge")
    if name not in FAMILIES:
        raise ModelLoadFailed(
            f"{path} holds a model of architecture {name!r}; GGUF files of these can be converted: "
            f"{', '.join(FAMILIES)}. Load the model from its safetensors instead."
        )
    family = FAMILIES[name]
    stated = {k.removeprefix(f"{name}."): f.contents() for k, f in reader.fields.items() if k.startswith(f"{name}.")}
    tensors = {t.name: t for t in reader.tensors}
    cache.require_room(folder.parent, 4 * sum(t.n_elements for t in tensors.values()))
    folder.mkdir()
    with _about(path):
        vocabulary = gguf_tokenizer.Vocabulary.of(reader)
        config = _config(name, family, stated, vocabulary.ids, tensors)
        with torch.device("meta"):
            net = AutoModelForCausalLM.from_config(config)
        matched = _match(name, net, tensors, config)
        config.architectures = [type(net).__name__]
        config.dtype = torch.float32
        config.save_pretrained(folder)
        _generation(vocabulary, config).save_pretrained(folder)
        gguf_tokenizer.convert(path, vocabulary, config, folder)
    _write_tensors(matched, family.undo, config, folder, path.name, progress)
    record = {
        "source": sha256,
        "architecture": name,
        "license": _scalar(reader, "general.license"),
        "converter": CONVERTER,
        "versions": versions(),
        "files": {f.name: f.stat().st_size for f in sorted(folder.iterdir())},
    }
    (folder / _RECORD).write_text(canonical_json(record))


@contextlib.contextmanager
def _about(path: Path) -> Iterator[None]:
    """Name the file in what goes wrong, whichever library says it."""
    try:
        yield
    except OSError:
        raise
    except Exception as e:
        what = str(e) if isinstance(e, ModelLoadFailed) else f"{type(e).__name__}: {e}"
        raise ModelLoadFailed(f"{path} cannot be converted faithfully: {what}") from e


# -- reading --------------------------------------------------------------------------------------------------------


def _require_gguf(path: Path) -> None:
    try:
        with path.open("rb") as f:
            head = f.read(4)
    except OSError as e:
        raise ModelLoadFailed(f"{path} cannot be read: {e.strerror}") from e
    if head != b"GGUF":
        raise ModelLoadFailed(f"{path} is not a GGUF file: it begins with {head!r}, not b'GGUF'")


class _Reader(gguf.GGUFReader):
    """The package's reader on a plain array: slicing a memmap object is most of its time (3 s instead of 11 s for a
    vocabulary of 262,144)."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, np.asarray(value) if name == "data" else value)


def _read(path: Path) -> gguf.GGUFReader:
    try:
        return _Reader(path)
    except Exception as e:  # the reader indexes into what is not there in a dozen ways
        raise ModelLoadFailed(
            f"{path} begins like a GGUF file but is damaged or cut short ({type(e).__name__}: {e}). Fetch it again."
        ) from e


def _scalar(reader: gguf.GGUFReader, key: str) -> Any:
    field = reader.get_field(key)
    return None if field is None else field.contents()


def _digest(path: Path) -> str:
    """sha256 of the file, remembered in the cache for as long as nothing touched the file (inode, size, times)."""
    stat = path.stat()
    state = [str(path), stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
    memo = cache.cache_folder() / "digests" / f"{digest_bytes(os.fsencode(path))[:32]}.json"
    try:
        known = json.loads(memo.read_text())
        if known["state"] == state:
            return str(known["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # no memo, or none that can be used: the file itself is the truth
    sha256 = digest_file(path)
    with cache.explained(memo):
        memo.parent.mkdir(parents=True, exist_ok=True)
        write_durably(memo, canonical_json({"state": state, "sha256": sha256}).encode())
    return sha256


# -- config ---------------------------------------------------------------------------------------------------------


def _config(name: str, family: Family, stated: Mapping[str, Any], tokens: Mapping[str, Any], tensors: Any) -> Any:
    """The transformers config that says what the file says; raises if that cannot be said."""
    names = _HYPERPARAMETERS | dict(family.names)
    lacking = [k for k in _NEEDED if not isinstance(stated.get(k), int)]
    if lacking or "token_embd.weight" not in tensors:
        raise ModelLoadFailed(f"it lacks {', '.join(lacking) or 'a token embedding'}")
    heads, width = stated["attention.head_count"], stated["embedding_length"]
    head_dim = stated.get("attention.key_length", width // heads)
    implied = {"attention.value_length": head_dim, "rope.dimension_count": head_dim, "expert_count": 0}
    config_class = CONFIG_MAPPING[family.model_type]
    known = inspect.signature(config_class).parameters.keys() | {"rope_theta", "rope_local_base_freq", "head_dim"}
    homeless = [
        f"{k} = {v}"
        for k, v in sorted(stated.items())
        if (config_class.attribute_map.get(names[k], names[k]) not in known if k in names else implied.get(k) != v)
        and k not in _ELSEWHERE
    ]
    if homeless:
        raise ModelLoadFailed(f"it states what has no place in {config_class.__name__}: {', '.join(homeless)}")
    values = {names[k]: v for k, v in stated.items() if k in names}
    if "num_key_value_heads" in known:
        values.setdefault("num_key_value_heads", heads)
    if "query_pre_attn_scalar" in known:  # in no file; llama.cpp, too, tells Gemma's two 27B models by their blocks
        big = (name, stated["block_count"]) in (("gemma2", 46), ("gemma3", 62))
        values["query_pre_attn_scalar"] = width // heads if big else head_dim
    values["vocab_size"] = int(tensors["token_embd.weight"].shape[1])
    values["tie_word_embeddings"] = "output.weight" not in tensors
    config = config_class(**values, **tokens)
    ignored = [f"{k} = {v}" for k, v in values.items() if k in known and getattr(config, k, v) != v]
    if ignored:
        raise ModelLoadFailed(f"{config_class.__name__} does not take {', '.join(ignored)}")
    _set_rope(config, stated, tensors, head_dim)
    return config


def _set_rope(config: Any, stated: Mapping[str, Any], tensors: Mapping[str, Any], head_dim: int) -> None:
    """Scaled rotary frequencies: linear ones by metadata, Llama 3's by the tensor of factors."""
    kind = stated.get("rope.scaling.type", "none")
    freqs = tensors.get("rope_freqs.weight")
    if kind == "none" and freqs is None:
        return
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    if kind == "linear" and freqs is None and "rope.scaling.factor" in stated:
        rope.update(rope_type="linear", factor=stated["rope.scaling.factor"])
        return
    if kind == "none" and freqs is not None:
        factors = np.asarray(freqs.data, dtype=np.float64).ravel()
        llama3 = {
            "factor": float(factors.max()),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
        if np.allclose(factors, _llama3_factors(rope["rope_theta"], head_dim, **llama3), rtol=1e-4):
            rope.update(rope_type="llama3", **llama3)
            return
    raise ModelLoadFailed(f"its rotary frequencies are scaled in a way that is not known here (type {kind!r})")


def _llama3_factors(
    theta: float,
    dim: int,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_position_embeddings: int,
) -> Array:
    """By how much each rotary frequency is divided: 1 for short waves, `factor` for long ones, smooth between."""
    turns = original_max_position_embeddings / (2 * np.pi * theta ** (np.arange(0, dim, 2) / dim))
    smooth = np.clip((turns - low_freq_factor) / (high_freq_factor - low_freq_factor), 0, 1)
    return 1 / ((1 - smooth) / factor + smooth)


def _generation(vocabulary: gguf_tokenizer.Vocabulary, config: Any) -> GenerationConfig:
    """Generation stops at the end of the text and, in a chat model, at the end of a turn."""
    generation = GenerationConfig.from_model_config(config)
    ends = list(dict.fromkeys(i for i in (vocabulary.ids["eos_token_id"], vocabulary.end_of_turn) if i is not None))
    generation.eos_token_id = ends if len(ends) > 1 else ends[0] if ends else None
    return generation


# -- tensors --------------------------------------------------------------------------------------------------------


def _match(name: str, net: Any, tensors: Mapping[str, Any], config: Any) -> dict[str, Any]:
    """GGUF tensor of every parameter (a tied one once). Raises unless they correspond one to one."""
    arch = next(a for a, text in gguf.MODEL_ARCH_NAMES.items() if text == name)
    table = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    found, missing = {}, []
    for parameter, value in net.named_parameters():
        tensor = tensors.get(table.get_name(parameter, try_suffixes=(".weight", ".bias")) or "")
        if tensor is None or tensor.n_elements != value.numel():
            missing.append(f"{parameter} {tuple(value.shape)}")
        else:
            found[parameter] = tensor
    used = {t.name for t in found.values()} | {"rope_freqs.weight"}
    spare = [f"{t} {tuple(reversed(tensors[t].shape.tolist()))}" for t in tensors if t not in used]
    if missing or spare:
        raise ModelLoadFailed(
            f"as a {config.model_type} model it lacks {_some(missing)}, and it holds {_some(spare)} that such a model "
            "has no place for"
        )
    return found


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more if names else "nothing"


def _write_tensors(
    matched: Mapping[str, Any],
    undo: Callable[[str, Array, Any], Array],
    config: Any,
    folder: Path,
    label: str,
    progress: Progress,
) -> None:
    """Dequantise and write, one safetensors file at a time."""
    shards: list[list[str]] = [[]]
    size = 0
    for parameter, tensor in matched.items():
        size += 4 * tensor.n_elements
        if size > SHARD and shards[-1]:
            shards.append([])
            size = 4 * tensor.n_elements
        shards[-1].append(parameter)
    done, total = 0, sum(t.n_elements for t in matched.values())
    where = {}
    for i, shard in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{i:05}-of-{len(shards):05}.safetensors"
        values = {}
        for parameter in shard:
            tensor = matched[parameter]
            progress(f"converting {label}", done, total)
            values[parameter] = np.ascontiguousarray(undo(tensor.name, _dequantise(tensor), config))
            done += tensor.n_elements
            where[parameter] = file
        try:
            safetensors.numpy.save_file(values, folder / file, {"format": "pt"})
        except safetensors.SafetensorError as e:
            code = re.search(r"os error (\d+)", str(e))
            raise OSError(int(code[1]) if code else errno.EIO, str(e)) from e
    if len(shards) > 1:
        index = {"metadata": {"total_size": 4 * total}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(canonical_json(index))
    progress(f"converting {label}", total, total)


def _dequantise(tensor: Any) -> Array:
    try:
        return gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
    except NotImplementedError as e:
        raise ModelLoadFailed(f"{tensor.name} is quantised as {tensor.tensor_type.name}, which cannot be undone") from e
