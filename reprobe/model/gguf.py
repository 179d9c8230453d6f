"""GGUF files: from llama.cpp's format to an ordinary transformers folder, once.

Enters: a `.gguf` file. Leaves: a folder in the cache with config, float32 safetensors and tokenizer, keyed
by the file's sha256, that transformers opens in about a second. float32, because a dequantised value is a
product (and sum) of half-precision scales and integers: half precision would round it.

Everything the file states about the model must arrive: a hyperparameter or tensor without a place in the
transformers model, and a parameter without a tensor, are refused, never dropped or invented. Does not know
where the file came from, model families (see gguf_families) or vocabularies (see gguf_tokenizer).
"""

import contextlib
import errno
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import safetensors
import safetensors.numpy
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from reprobe.errors import DiskFull, ModelLoadFailed
from reprobe.model import cache, gguf_tokenizer
from reprobe.model.gguf_families import FAMILIES, Array, Match, config_of, match
from reprobe.progress import Progress, silent
from reprobe.provenance import canonical_json, digest_bytes, digest_file, versions, write_durably

#: Raised by one whenever a conversion would come out differently; older folders are then not used any more.
CONVERTER = 1
#: Bytes of tensors per safetensors file: bounds the memory of a conversion, whatever the size of the model.
SHARD = 2 << 30
_RECORD = "conversion.json"


def convert(path: Path, *, label: str | None = None, progress: Progress = silent) -> Path:
    """The transformers folder of a GGUF file, converted now if it is not in the cache.

    `label` is what progress calls it (default: its file name); progress counts values. Raises
    `ModelLoadFailed` if it is no whole GGUF file or cannot be converted faithfully, and `DiskFull`.
    """
    path = path.expanduser().absolute()
    _require_gguf(path)
    sha256 = _digest(path)

    def make(scratch: Path) -> None:
        with _about(path):
            _convert(path, sha256, scratch / folder_of(sha256).name, label or path.name, progress)

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


def _convert(path: Path, sha256: str, folder: Path, label: str, progress: Progress) -> None:
    progress(f"reading {label}", 0, 0)
    reader = _read(path)
    name = _value(reader, "general.architecture")
    pieces = _value(reader, "split.count") or 1
    if pieces > 1:
        raise ModelLoadFailed(f"it is one of {pieces} pieces of a model; join them: llama-gguf-split --merge")
    if name not in FAMILIES:
        raise ModelLoadFailed(
            f"its architecture is {name!r}; GGUF files of these can be converted: {', '.join(FAMILIES)}. "
            "Load the model from its safetensors instead"
        )
    family = FAMILIES[name]
    own = [key for key in reader.fields if key.startswith(f"{name}.")]
    stated = {key.removeprefix(f"{name}."): _value(reader, key) for key in own}
    tensors = {t.name: t for t in reader.tensors}
    cache.require_room(folder.parent.parent, 4 * sum(t.n_elements for t in tensors.values()))
    folder.mkdir()
    vocabulary = gguf_tokenizer.Vocabulary.of(reader)
    config = config_of(name, family, stated, vocabulary.ids, tensors)
    with torch.device("meta"):
        net = AutoModelForCausalLM.from_config(config)
    matched = match(name, net, tensors)
    config.architectures = [type(net).__name__]
    config.dtype = torch.float32
    config.save_pretrained(folder)
    _generation(vocabulary, config).save_pretrained(folder)
    gguf_tokenizer.convert(path, vocabulary, config, folder)
    _write_tensors(matched, partial(family.undo, config), folder, label, progress)
    record = {
        "source": sha256,
        "architecture": name,
        "license": _value(reader, "general.license"),
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
    except DiskFull:
        raise
    except Exception as e:
        if isinstance(e, OSError) and e.errno is not None:
            raise  # the disk's doing; transformers' own are without a number
        what = str(e) if isinstance(e, ModelLoadFailed) else f"{type(e).__name__}: {e}"
        raise ModelLoadFailed(f"{path} cannot be made a transformers model: {what}") from e


def _require_gguf(path: Path) -> None:
    try:
        with path.open("rb") as f:
            head = f.read(4)
    except OSError as e:
        raise ModelLoadFailed(f"{path} cannot be read: {e.strerror}") from e
    if head != b"GGUF":
        raise ModelLoadFailed(f"{path} is not a GGUF file: it begins with {head!r}, not b'GGUF'")


class Reader(gguf.GGUFReader):  # type: ignore[misc]
    """The package's reader on a plain array: slicing a memmap object is most of its time (for a vocabulary of
    262,144 tokens 11 s, and 3 s like this). What lies beyond the file's end is an error: the package takes it for
    empty, and would go through 2^60 items of a list that says it has so many."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, np.asarray(value) if name == "data" else value)

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
        end = int(offset) + int(count) * np.dtype(dtype).itemsize
        if end > len(self.data):
            raise ValueError(f"it has {len(self.data)} bytes, and something in it should end at {end}")
        return super()._get(offset, dtype, count, override_order)


def _read(path: Path) -> gguf.GGUFReader:
    try:
        return Reader(path)
    except Exception as e:  # the reader indexes into what is not there in a dozen ways
        raise ModelLoadFailed(
            f"it begins like a GGUF file but is cut short or damaged ({type(e).__name__}: {e}); get it again"
        ) from e


def _value(reader: gguf.GGUFReader, key: str) -> Any:
    field = reader.get_field(key)
    return None if field is None else field.contents()


def _digest(path: Path) -> str:
    """sha256 of the file, remembered in the cache while nothing touches the file (inode, size, times)."""
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
    with contextlib.suppress(OSError):  # a cache that is shared read-only still serves what it holds
        memo.parent.mkdir(parents=True, exist_ok=True)
        write_durably(memo, canonical_json({"state": state, "sha256": sha256}).encode())
    return sha256


def _generation(vocabulary: gguf_tokenizer.Vocabulary, config: Any) -> GenerationConfig:
    """Generation stops at the end of the text and, in a chat model, at the end of a turn."""
    generation = GenerationConfig.from_model_config(config)
    ends = {vocabulary.ids["eos_token_id"], vocabulary.end_of_turn} - {None}
    generation.eos_token_id = sorted(ends) if len(ends) > 1 else next(iter(ends), None)
    return generation


def _write_tensors(
    matched: Sequence[Match],
    undo: Callable[[str, Array], Array],
    folder: Path,
    label: str,
    progress: Progress,
) -> None:
    """Dequantise and write, one safetensors file of at most `SHARD` bytes (or one tensor) at a time."""
    done, total = 0, sum(m.tensor.n_elements for m in matched)
    shards = _shards(matched)
    where = {}
    for i, shard in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{i:05}-of-{len(shards):05}.safetensors"
        values = {}
        for parameter, shape, tensor in shard:
            progress(f"converting {label}", done, total)
            value = np.ascontiguousarray(undo(tensor.name, _dequantise(tensor)))
            if value.shape != shape:
                raise ModelLoadFailed(f"{parameter} is {value.shape} there, and should be {shape}")
            values[parameter] = value
            where[parameter] = file
            done += tensor.n_elements
        try:
            safetensors.numpy.save_file(values, folder / file, {"format": "pt"})
        except safetensors.SafetensorError as e:
            code = re.search(r"os error (\d+)", str(e))
            raise OSError(int(code[1]) if code else errno.EIO, str(e)) from e
        (folder / file).chmod(0o644)  # safetensors makes its files private
    if len(shards) > 1:
        index = {"metadata": {"total_size": 4 * total}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(canonical_json(index))
    progress(f"converting {label}", total, total)


def _shards(matched: Sequence[Match]) -> list[list[Match]]:
    shards: list[list[Match]] = []
    size = SHARD
    for m in matched:
        size += 4 * m.tensor.n_elements
        if size > SHARD:
            shards.append([])
            size = 4 * m.tensor.n_elements
        shards[-1].append(m)
    return shards


def _dequantise(tensor: Any) -> Array:
    try:
        values: Array = gguf.dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as e:
        kind = tensor.tensor_type.name
        raise ModelLoadFailed(f"{tensor.name} is quantised as {kind}, which cannot be undone here") from e
    return values.astype(np.float32, copy=False)
