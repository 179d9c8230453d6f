"""GGUF files become transformers models that are the same model, or are refused.

Tiny models of every family are written as GGUF files here, with what llama.cpp's converter does to their
values, and must come back with the logits of the original.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import safetensors
import safetensors.numpy
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from reprobe.errors import DiskFull, ModelLoadFailed
from reprobe.model import bundled
from reprobe.model import gguf as converter
from reprobe.model.language_model import LanguageModel

USERS_CACHE = os.environ.get("REPROBE_CACHE")
SPECIAL = ["<|end|>", "<|start|>", "<|turn|>"]
MERGES = ["t h", "th e", "Ġ the", "1 2", "Ġ Ġ"]
BYTE_LEVEL = SPECIAL + sorted(pre_tokenizers.ByteLevel.alphabet()) + [m.replace(" ", "") for m in MERGES]
ROWS = 280  # embeddings are often padded beyond the vocabulary


@dataclass
class Tiny:
    """A tiny model and how its GGUF file says what it is."""

    arch: str
    config: Any
    stated: dict[str, Any]
    changed: Callable[[str, np.ndarray], np.ndarray] = lambda name, values: values
    vocabulary: dict[str, Any] = field(default_factory=dict)


def llama_rows(heads: int, kv: int) -> Callable[[str, np.ndarray], np.ndarray]:
    def change(name: str, values: np.ndarray) -> np.ndarray:
        for part, n in (("attn_q.", heads), ("attn_k.", kv)):
            if part in name:
                halves = values.reshape(n, 2, values.shape[0] // n // 2, *values.shape[1:])
                return np.swapaxes(halves, 1, 2).reshape(values.shape)
        return values

    return change


def plus_one(name: str, values: np.ndarray) -> np.ndarray:
    return values + 1 if name.endswith("norm.weight") else values


def transposed(name: str, values: np.ndarray) -> np.ndarray:
    return values.T if name.startswith("blk.") and values.ndim == 2 else values


def tiny(arch: str, **changes: Any) -> Tiny:
    """A tiny model of an architecture: 3 blocks, 6 heads, 2 key/value heads, head_dim 10, d_model 42."""
    common = {
        "vocab_size": ROWS,
        "hidden_size": 42,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "intermediate_size": 33,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-4,
        "rope_theta": 5000.0,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    stated: dict[str, Any] = {
        "block_count": 3,
        "context_length": 64,
        "embedding_length": 42,
        "feed_forward_length": 33,
        "attention.head_count": 6,
        "attention.head_count_kv": 2,
        "attention.key_length": 10,
        "attention.value_length": 10,
        "attention.layer_norm_rms_epsilon": 1e-4,
        "rope.freq_base": 5000.0,
        "rope.dimension_count": 10,
    }
    if arch == "llama":
        return Tiny(arch, transformers.LlamaConfig(**common | changes), stated, llama_rows(6, 2))
    if arch in ("qwen2", "qwen3", "phi3"):
        config = transformers.CONFIG_MAPPING[arch](**common | changes)
        if arch == "phi3":
            config.sliding_window = stated["attention.sliding_window"] = 5
        return Tiny(arch, config, stated)
    if arch == "starcoder2":
        stated["attention.layer_norm_epsilon"] = stated.pop("attention.layer_norm_rms_epsilon")
        return Tiny(arch, transformers.Starcoder2Config(**common | {"norm_epsilon": 1e-4} | changes), stated)
    if arch in ("gemma2", "gemma3"):
        gemma = {"sliding_window": 5, "query_pre_attn_scalar": 10, "num_hidden_layers": 7}
        stated |= {"attention.sliding_window": 5, "block_count": 7}
        if arch == "gemma2":
            gemma |= {"attn_logit_softcapping": 20.0, "final_logit_softcapping": 11.0}
            stated |= {"attn_logit_softcapping": 20.0, "final_logit_softcapping": 11.0}
            config = transformers.Gemma2Config(**common | gemma | {"tie_word_embeddings": True} | changes)
        else:
            stated["rope.freq_base_swa"] = 300.0
            gemma |= {"rope_local_base_freq": 300.0, "tie_word_embeddings": True}
            config = transformers.Gemma3TextConfig(**common | gemma | changes)
        return Tiny(arch, config, stated, plus_one)
    assert arch == "gpt2"
    config = transformers.GPT2Config(
        **{k: common[k] for k in ("vocab_size", "num_hidden_layers", "max_position_embeddings")},
        hidden_size=35,
        num_attention_heads=5,
        n_inner=33,
        layer_norm_epsilon=1e-3,
        bos_token_id=1,
        eos_token_id=0,
    )
    stated = {k: stated[k] for k in ("block_count", "context_length", "feed_forward_length")}
    stated |= {"embedding_length": 35, "attention.head_count": 5, "attention.layer_norm_epsilon": 1e-3}
    return Tiny(arch, config, stated, transposed)


def randomised(config: Any, seed: int = 0) -> Any:
    """A model no parameter of which has its initial value, where a forgotten bias or norm would not show."""
    torch.manual_seed(seed)
    net = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn_like(p) * (0.3 if p.ndim > 1 else 0.2) + (1.0 if p.ndim == 1 else 0.0))
    return net


def write(
    path: Path,
    model: Tiny,
    net: Any,
    *,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    without: str | None = None,
    extra: Mapping[str, np.ndarray] | None = None,
) -> Path:
    """`net` as a GGUF file; matrices of the blocks are quantised as `kind`."""
    out = gguf.GGUFWriter(path, model.arch)
    for key, value in model.stated.items():
        put(out, f"{model.arch}.{key}", value)
    vocabulary = {
        "model": "gpt2",
        "pre": "qwen2" if model.arch.startswith("qwen") else "gpt-2",
        "tokens": BYTE_LEVEL,
        "token_type": [3] * len(SPECIAL) + [1] * (len(BYTE_LEVEL) - len(SPECIAL)),
        "merges": MERGES,
        "bos_token_id": 1,
        "eos_token_id": 0,
    }
    for key, value in (vocabulary | model.vocabulary).items():
        if value is not None:
            put(out, "tokenizer.chat_template" if key == "chat_template" else f"tokenizer.ggml.{key}", value)
    arch = {text: a for a, text in gguf.MODEL_ARCH_NAMES.items()}[model.arch]
    names = gguf.get_tensor_name_map(arch, net.config.num_hidden_layers)
    for parameter, value in net.named_parameters():
        name = names.get_name(parameter, try_suffixes=(".weight", ".bias"))
        assert name is not None, parameter
        if name == without:
            continue
        values = np.ascontiguousarray(model.changed(name, value.detach().numpy()))
        if name.startswith("blk.") and values.ndim == 2 and kind != gguf.GGMLQuantizationType.F32:
            out.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
        else:
            out.add_tensor(name, values)
    for name, values in (extra or {}).items():
        out.add_tensor(name, values)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


def put(out: gguf.GGUFWriter, key: str, value: Any) -> None:
    kinds = {bool: out.add_bool, int: out.add_uint32, float: out.add_float32, str: out.add_string}
    kinds.get(type(value), out.add_array)(key, value)


def logits(net: Any) -> torch.Tensor:
    ids = torch.randint(0, ROWS, (2, 19), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return net.eval()(ids).logits


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("REPROBE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny("llama")
    return write(tmp_path_factory.mktemp("gguf") / "tiny.gguf", model, randomised(model.config))


def left_in(cache: Path) -> list[str]:
    """What lies in the cache beside lock files and remembered digests."""
    return sorted(p.name for p in cache.glob("models/*") if not p.name.endswith(".lock"))


# -- the same model ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", sorted(converter.FAMILIES))
def test_a_converted_model_has_the_logits_of_the_original(arch: str, tmp_path: Path) -> None:
    model = tiny(arch)
    net = randomised(model.config)
    folder = converter.convert(write(tmp_path / "m.gguf", model, net))
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert again.dtype == torch.float32
    assert type(again) is type(net)
    torch.testing.assert_close(logits(again), logits(net), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [gguf.GGMLQuantizationType.Q4_0, gguf.GGMLQuantizationType.Q8_0])
def test_quantised_values_arrive_exactly_as_the_format_defines_them(
    kind: gguf.GGMLQuantizationType, tmp_path: Path
) -> None:
    model = tiny("llama", hidden_size=96, intermediate_size=64, head_dim=16)
    model.stated |= {"embedding_length": 96, "feed_forward_length": 64, "rope.dimension_count": 16}
    model.stated |= {"attention.key_length": 16, "attention.value_length": 16}
    net = randomised(model.config)
    folder = converter.convert(write(tmp_path / "m.gguf", model, net, kind=kind))
    again = AutoModelForCausalLM.from_pretrained(folder)
    down = net.model.layers[1].mlp.down_proj.weight.detach().numpy()
    expected = gguf.dequantize(gguf.quantize(down, kind), kind)
    assert not np.array_equal(expected, down)
    assert np.array_equal(again.model.layers[1].mlp.down_proj.weight.detach().numpy(), expected)


def test_tied_embeddings_are_stored_once_and_stay_tied(tmp_path: Path) -> None:
    model = tiny("llama", tie_word_embeddings=True)
    net = randomised(model.config)
    folder = converter.convert(write(tmp_path / "m.gguf", model, net))
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    size = (folder / "model.safetensors").stat().st_size
    assert size < 4 * sum(p.numel() for p in net.parameters()) + 20_000
    torch.testing.assert_close(logits(again), logits(net))


def test_a_model_of_several_shards_is_the_same_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    net = randomised(model.config)
    monkeypatch.setattr(converter, "SHARD", 20_000)
    folder = converter.convert(write(tmp_path / "m.gguf", model, net))
    shards = [safetensors.numpy.load_file(f) for f in folder.glob("model-*-of-*.safetensors")]
    assert len(shards) > 2
    assert all(len(shard) == 1 or sum(v.nbytes for v in shard.values()) <= 20_000 for shard in shards)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(folder)), logits(net))


def test_llama_3_rotary_factors_become_its_rope_scaling(tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    model = tiny("llama", rope_parameters=rope, rope_theta=500_000.0)
    model.stated["rope.freq_base"] = 500_000.0
    net = randomised(model.config)
    plain = 500_000.0 ** -(np.arange(0, 10, 2) / 10)
    factors = (plain / net.model.rotary_emb.inv_freq.numpy()).astype(np.float32)
    assert factors.max() > 30
    path = write(tmp_path / "m.gguf", model, net, extra={"rope_freqs.weight": factors})
    again = AutoModelForCausalLM.from_pretrained(converter.convert(path))
    torch.testing.assert_close(again.model.rotary_emb.inv_freq, net.model.rotary_emb.inv_freq)

    other = write(tmp_path / "o.gguf", model, net, extra={"rope_freqs.weight": factors * 1.5})
    with pytest.raises(ModelLoadFailed, match="rotary frequencies"):
        converter.convert(other)


@pytest.mark.parametrize("stated", [{"rope.scaling.type": "linear"}, {}])
def test_linear_rope_scaling_is_carried_to_the_layers_that_have_it(tmp_path: Path, stated: dict[str, str]) -> None:
    model = tiny("gemma3")
    model.stated |= {"rope.scaling.factor": 8.0, **stated}
    model.config.rope_parameters["full_attention"] |= {"rope_type": "linear", "factor": 8.0}
    net = randomised(model.config)
    again = AutoModelForCausalLM.from_pretrained(converter.convert(write(tmp_path / "m.gguf", model, net)))
    torch.testing.assert_close(logits(again), logits(net), rtol=1e-5, atol=1e-5)


# -- the tokenizer -----------------------------------------------------------------------------------------


def tokenizer(tmp_path: Path, arch: str = "llama", **vocabulary: Any) -> Any:
    model = tiny(arch)
    model.vocabulary = vocabulary
    return AutoTokenizer.from_pretrained(converter.convert(write(tmp_path / "m.gguf", model, randomised(model.config))))


def test_text_is_split_before_merging_as_the_vocabulary_says(tmp_path: Path) -> None:
    plain = tokenizer(tmp_path, pre="gpt-2")
    assert plain.tokenize("the  12") == ["the", "Ġ", "Ġ", "12"]
    (tmp_path / "m.gguf").unlink()
    digits = tokenizer(tmp_path, pre="smollm")
    assert digits.tokenize("the  12") == ["the", "ĠĠ", "1", "2"]


@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize("arch", ["llama", "qwen2", "phi3", "gemma3"])
def test_bos_is_added_exactly_where_the_file_says_so(arch: str, adds: bool, tmp_path: Path) -> None:
    t = tokenizer(tmp_path, arch, add_bos_token=adds)
    assert t("the").input_ids == [1] * adds + t.convert_tokens_to_ids(["the"])
    assert t("the", add_special_tokens=False).input_ids == t.convert_tokens_to_ids(["the"])


def test_the_vocabulary_of_llama_3_adds_bos_where_the_file_is_silent(tmp_path: Path) -> None:
    assert tokenizer(tmp_path, pre="llama-bpe")("the").input_ids[0] == 1


def test_control_tokens_stay_whole_and_are_special(tmp_path: Path) -> None:
    t = tokenizer(tmp_path)
    ids = t("the<|turn|>the").input_ids
    assert ids[1] == 2
    assert len(ids) == 3
    assert t.decode(ids, skip_special_tokens=True) == "thethe"


def test_a_vocabulary_without_padding_pads_with_its_end(tmp_path: Path) -> None:
    t = tokenizer(tmp_path)
    assert t.pad_token_id == t.eos_token_id == 0
    assert t(["the", "the the the"], padding=True).attention_mask[0].count(0) == 2


def test_the_chat_template_and_the_end_of_a_turn_arrive(tmp_path: Path) -> None:
    template = "{% for m in messages %}<|start|>{{ m['content'] }}<|turn|>{% endfor %}"
    model = tiny("llama")
    model.vocabulary = {"chat_template": template, "eot_token_id": 2}
    folder = converter.convert(write(tmp_path / "m.gguf", model, randomised(model.config)))
    t = AutoTokenizer.from_pretrained(folder)
    assert t.apply_chat_template([{"role": "user", "content": "the"}], tokenize=False) == "<|start|>the<|turn|>"
    net = AutoModelForCausalLM.from_pretrained(folder)
    assert net.generation_config.eos_token_id == [0, 2]


@given(text=st.text(max_size=40))
@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_text_survives_a_byte_level_round_trip(text: str, byte_level: Any) -> None:
    assert byte_level.decode(byte_level(text, add_special_tokens=False).input_ids) == text


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("byte-level")
    with pytest.MonkeyPatch.context() as m:
        m.setenv("REPROBE_CACHE", str(folder))
        yield tokenizer(folder, pre="qwen2")


def sentencepiece(prefix_space: bool | None) -> dict[str, Any]:
    pieces = ["▁", *"abcdehilo", "he", "ll", "hell", "hello", "▁hello"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *pieces]
    scores = [0.0] * 259 + [-float(i) for i in reversed(range(len(pieces)))]
    return {
        "model": "llama",
        "pre": "default",
        "tokens": tokens,
        "token_type": [2, 3, 3] + [6] * 256 + [1] * len(pieces),
        "scores": scores,
        "merges": None,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        "add_space_prefix": prefix_space,
    }


@pytest.mark.parametrize(("prefix_space", "first"), [(None, "▁hello"), (True, "▁hello"), (False, "hello")])
def test_a_sentencepiece_vocabulary_prefixes_a_space_as_the_file_says(
    prefix_space: bool | None, first: str, tmp_path: Path
) -> None:
    t = tokenizer(tmp_path, **sentencepiece(prefix_space))
    assert t.convert_ids_to_tokens(t("hello hello\n").input_ids) == ["<s>", first, "▁hello", "<0x0A>"]
    assert t.decode(t("hello hello", add_special_tokens=False).input_ids) == "hello hello"


def test_tokenizer_files_that_lie_beside_the_file_are_not_taken_for_its_own(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "wrong"}')
    assert tokenizer(tmp_path).bos_token == "<|start|>"


# -- the cache ---------------------------------------------------------------------------------------------


def test_a_second_conversion_writes_and_hashes_nothing(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = converter.convert(file)
    before = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    monkeypatch.setattr(converter, "digest_file", lambda path: pytest.fail("the file was read again"))
    assert converter.convert(file) == folder
    assert {p.name: p.stat().st_mtime_ns for p in folder.iterdir()} == before


def test_a_changed_file_is_another_model_even_with_the_old_size_and_time(tmp_path: Path) -> None:
    model = tiny("llama")
    path = write(tmp_path / "m.gguf", model, randomised(model.config))
    stat = path.stat()
    first = converter.convert(path)
    data = bytearray(path.read_bytes())
    data[-40] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_size == stat.st_size
    assert converter.convert(path) != first


@pytest.mark.parametrize("damage", ["model.safetensors", "tokenizer.json", "config.json", "conversion.json"])
@pytest.mark.parametrize("how", ["missing", "cut"])
def test_a_damaged_conversion_is_made_anew(file: Path, damage: str, how: str, cache: Path) -> None:
    folder = converter.convert(file)
    whole = {p.name: p.read_bytes() for p in folder.iterdir()}
    if how == "missing":
        (folder / damage).unlink()
    else:
        (folder / damage).write_bytes(whole[damage][:-7])
    assert converter.convert(file) == folder
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == whole
    assert left_in(cache) == [folder.name]


def test_two_at_once_convert_once(file: Path, cache: Path) -> None:
    said: list[str] = []
    with ThreadPoolExecutor(2) as pool:
        jobs = [
            pool.submit(converter.convert, file, progress=lambda what, done, total: said.append(what)) for _ in "ab"
        ]
        folders = {job.result() for job in jobs}
    assert len(folders) == 1
    assert said.count("reading tiny.gguf") == 1
    assert left_in(cache) == [folders.pop().name]


def test_an_interrupt_leaves_nothing_behind(file: Path, cache: Path) -> None:
    def stop(what: str, done: float, total: float) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        converter.convert(file, progress=stop)
    assert left_in(cache) == []


def test_a_full_disk_is_reported_before_anything_is_written(
    file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(file.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(DiskFull, match="REPROBE_CACHE"):
        converter.convert(file)
    assert left_in(cache) == []


def test_a_disk_that_fills_up_while_weights_are_written_is_a_full_disk(
    file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.numpy, "save_file", full)
    with pytest.raises(DiskFull):
        converter.convert(file)
    assert left_in(cache) == []


def test_the_record_says_where_the_conversion_came_from(file: Path) -> None:
    record = json.loads((converter.convert(file) / "conversion.json").read_text())
    assert record["source"] == converter.digest_file(file)
    assert record["architecture"] == "llama"


# -- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"GG", b"PK\x03\x04 a zip file", b"\x00" * 100])
def test_what_is_no_gguf_file_is_refused_by_name(content: bytes, tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "weights.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelLoadFailed, match=r"weights\.gguf is not a GGUF file"):
        converter.convert(path)
    assert left_in(cache) == []


def test_a_file_that_is_not_there_is_a_load_failure(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadFailed, match="cannot be read"):
        converter.convert(tmp_path / "nothing.gguf")


@given(part=st.floats(0, 1))
@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_file_cut_short_anywhere_is_refused_and_leaves_nothing(
    part: float, file: Path, tmp_path: Path, cache: Path
) -> None:
    whole = file.read_bytes()
    path = tmp_path / "cut.gguf"
    path.write_bytes(whole[: 4 + int(part * (len(whole) - 4 - 64))])
    with pytest.raises(ModelLoadFailed, match="cut"):
        converter.convert(path)
    assert left_in(cache) == []


def refused(tmp_path: Path, model: Tiny, match: str, **how: Any) -> None:
    path = write(tmp_path / "m.gguf", model, randomised(model.config), **how)
    with pytest.raises(ModelLoadFailed, match=match):
        converter.convert(path)
    assert left_in(tmp_path / "cache") == []


def test_an_unknown_architecture_is_refused_and_the_known_ones_are_named(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    out = gguf.GGUFWriter(path, "mamba")
    out.add_tensor("token_embd.weight", np.zeros((3, 4), np.float32))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    with pytest.raises(ModelLoadFailed, match=r"'mamba'.*gemma3, gpt2, llama"):
        converter.convert(path)


def test_a_missing_tensor_is_refused_not_invented(tmp_path: Path) -> None:
    refused(tmp_path, tiny("llama"), "would lack model.layers.1.mlp.up_proj", without="blk.1.ffn_up.weight")


def test_a_tensor_without_a_place_is_refused_not_dropped(tmp_path: Path) -> None:
    experts = {"blk.0.ffn_gate_exps.weight": np.zeros((4, 33, 42), np.float32)}
    refused(tmp_path, tiny("llama"), "no place for blk.0.ffn_gate_exps.weight", extra=experts)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope.dimension_count", 4),
        ("expert_count", 8),
        ("attention.sliding_window", 5),
        ("residual_scale", 0.2),
    ],
)
def test_a_hyperparameter_without_a_place_is_refused_not_dropped(tmp_path: Path, key: str, value: Any) -> None:
    model = tiny("llama")
    model.stated[key] = value
    refused(tmp_path, model, key)


@pytest.mark.parametrize("key", ["block_count", "attention.head_count", "attention.layer_norm_rms_epsilon"])
def test_a_hyperparameter_that_is_missing_is_named(tmp_path: Path, key: str) -> None:
    model = tiny("llama")
    del model.stated[key]
    refused(tmp_path, model, key)


def test_a_shape_that_contradicts_the_metadata_is_refused(tmp_path: Path) -> None:
    model = tiny("llama")
    model.stated["feed_forward_length"] = 34
    refused(tmp_path, model, "mlp")


@pytest.mark.parametrize("blocks", [4, 2**31 - 1])
def test_an_absurd_number_of_blocks_is_refused_at_once(tmp_path: Path, blocks: int) -> None:
    model = tiny("llama")
    model.stated["block_count"] = blocks
    refused(tmp_path, model, "lack|blocks")


@pytest.mark.parametrize(
    ("vocabulary", "match"),
    [
        ({"pre": "somebody-elses"}, "somebody-elses"),
        ({"pre": None}, "splits text in the way None"),
        ({"model": "bert"}, "bert"),
        ({"bos_token_id": 100_000}, "100000"),
    ],
)
def test_a_vocabulary_that_is_not_known_is_refused(tmp_path: Path, vocabulary: dict[str, Any], match: str) -> None:
    model = tiny("llama")
    model.vocabulary = vocabulary
    refused(tmp_path, model, match)


def test_one_piece_of_a_split_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    out = gguf.GGUFWriter(path, "llama")
    out.add_uint16("split.count", 3)
    out.add_tensor("token_embd.weight", np.zeros((3, 4), np.float32))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    with pytest.raises(ModelLoadFailed, match="one of 3 pieces"):
        converter.convert(path)


# -- the bundled models ------------------------------------------------------------------------------------


@pytest.fixture
def real(real_lm: Callable[[str], LanguageModel], monkeypatch: pytest.MonkeyPatch) -> Callable[[str], LanguageModel]:
    """`real_lm`, in the user's cache, so that weights are fetched once."""
    if USERS_CACHE is None:
        monkeypatch.delenv("REPROBE_CACHE")
    else:
        monkeypatch.setenv("REPROBE_CACHE", USERS_CACHE)
    return real_lm


NAMES = sorted(bundled.NAMES)


#: Ids that llama.cpp gives for the same files, special tokens parsed.
LLAMA_CPP = {
    "smollm2-135m": {
        "The Eiffel Tower is located in the city of": [
            504,
            414,
            46682,
            18669,
            314,
            3807,
            281,
            260,
            2240,
            282,
        ],
        "I don't think we'll WE'LL they've": [57, 1326, 982, 1510, 392, 3060, 26587, 23, 16421, 502, 3543],
        "  two  spaces\n\n\tx  12 345": [216, 827, 216, 5600, 1116, 197, 104, 256, 33, 34, 216, 35, 36, 37],
        "a 1 b  2   3\n4\n\n5\r\n6": [81, 216, 33, 278, 256, 34, 333, 35, 198, 36, 1116, 37, 2738, 38],
        "日本語のテキスト と émoji 🙂🙃 ﷽ ñ": [
            23274,
            115,
            40993,
            179,
            120,
            248,
            26453,
            11100,
            224,
            10391,
            251,
            10391,
            134,
            11100,
            226,
            46673,
            118,
            26411,
            15771,
            10381,
            47526,
            10813,
            243,
            221,
            216,
            186,
            132,
            138,
            5549,
            126,
        ],
        "def f(x):\n    return x**2  # 3.14\n": [
            1604,
            275,
            24,
            104,
            727,
            472,
            1003,
            1792,
            828,
            34,
            216,
            907,
            216,
            35,
            30,
            33,
            36,
            198,
        ],
        "Price: $1,234.56 (approx.) — “quoted” … 50%": [
            27148,
            42,
            1885,
            33,
            28,
            34,
            35,
            36,
            30,
            37,
            38,
            365,
            22046,
            2677,
            1841,
            619,
            385,
            5036,
            573,
            5548,
            216,
            37,
            32,
            21,
        ],
        "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n": [
            1,
            4093,
            198,
            19556,
            2,
            198,
            1,
            520,
            9531,
            198,
        ],
    },
    "gemma3-270m": {
        "The Eiffel Tower is located in the city of": [2, 818, 94648, 25822, 563, 5628, 528, 506, 3207, 529],
        "I don't think we'll WE'LL they've": [
            2,
            236777,
            1537,
            236789,
            236745,
            1751,
            692,
            236789,
            859,
            19716,
            236789,
            2182,
            901,
            236789,
            560,
        ],
        "  two  spaces\n\n\tx  12 345": [
            2,
            138,
            13498,
            138,
            35220,
            108,
            255968,
            236781,
            138,
            236770,
            236778,
            236743,
            236800,
            236812,
            236810,
        ],
        "a 1 b  2   3\n4\n\n5\r\n6": [
            2,
            236746,
            236743,
            236770,
            518,
            138,
            236778,
            139,
            236800,
            107,
            236812,
            108,
            236810,
            251,
            107,
            236825,
        ],
        "日本語のテキスト と émoji 🙂🙃 ﷽ ñ": [
            2,
            94951,
            236945,
            95830,
            8888,
            1559,
            58197,
            57235,
            244499,
            236743,
            253375,
            131079,
        ],
        "def f(x):\n    return x**2  # 3.14\n": [
            2,
            2063,
            517,
            236769,
            236781,
            1473,
            107,
            140,
            2060,
            1123,
            1018,
            236778,
            138,
            236865,
            236743,
            236800,
            236761,
            236770,
            236812,
            107,
        ],
        "Price: $1,234.56 (approx.) — “quoted” … 50%": [
            2,
            11280,
            236787,
            609,
            236770,
            236764,
            236778,
            236800,
            236812,
            236761,
            236810,
            236825,
            568,
            17868,
            2907,
            2192,
            999,
            148758,
            236919,
            7881,
            236743,
            236810,
            236771,
            236908,
        ],
        "<bos>hi<eos> <start_of_turn>user\nyo<end_of_turn>": [
            2,
            2,
            2202,
            1,
            236743,
            105,
            2364,
            107,
            9671,
            106,
        ],
    },
}


@pytest.mark.models
@pytest.mark.parametrize("name", NAMES)
def test_a_bundled_tokenizer_gives_the_ids_of_llama_cpp(real: Callable[[str], LanguageModel], name: str) -> None:
    t = real(name).tokenizer
    for text, ids in LLAMA_CPP[name].items():
        assert t(text).input_ids == ids
        assert t.decode(t(text, add_special_tokens=False).input_ids) == text


@pytest.mark.models
def test_the_chat_template_of_smollm2_ends_in_the_assistants_turn(real: Callable[[str], LanguageModel]) -> None:
    t = real("smollm2-135m").tokenizer
    text = t.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True)
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert t.eos_token == "<|im_end|>"


@pytest.mark.models
@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_of_a_bundled_model_is_the_files_own(
    real: Callable[[str], LanguageModel], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(np, "memmap", lambda path, mode: np.fromfile(path, np.uint8))  # reads three times as fast
    reader = gguf.GGUFReader(bundled.weights(name))
    net = real(name).net
    arch = next(a for a, text in gguf.MODEL_ARCH_NAMES.items() if text == net.config.model_type.removesuffix("_text"))
    names = gguf.get_tensor_name_map(arch, net.config.num_hidden_layers)
    have = {names.get_name(n, try_suffixes=(".weight",)): p.detach().numpy() for n, p in net.named_parameters()}
    assert len(have) == len(reader.tensors)
    assert net.get_output_embeddings().weight is net.get_input_embeddings().weight
    change = (
        plus_one
        if name.startswith("gemma")
        else llama_rows(net.config.num_attention_heads, net.config.num_key_value_heads)
    )
    for tensor in reader.tensors:
        # Every 16th row of the embedding, which is most of the model; blocks of values are never of two rows.
        some = slice(None, None, 16 if tensor.name == "token_embd.weight" else 1)
        expected = gguf.dequantize(np.ascontiguousarray(tensor.data[some]), tensor.tensor_type)
        found = change(tensor.name, have[tensor.name])[some]
        np.testing.assert_allclose(found, expected, rtol=1e-6, err_msg=tensor.name)
