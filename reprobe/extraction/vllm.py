"""Hidden states that vLLM wrote become a store.

Enters: a folder as vLLM's hidden-states connector leaves it (speculative method `extract_hidden_states`), and the
model as a `LanguageModel`, since the files do not say of which they are. Leaves: an `ActivationStore`. Does not run
the model: `replay` does, and says whether they are its activations.

The connector writes one safetensors file per request, with the tensors `hidden_states` (tokens, layers, d_model), in
the dtype that vLLM computes in, and `token_ids` (tokens,), int64. Which layers they are is not in the files: they are
those of `eagle_aux_hidden_state_layer_ids`, in that order. Layer i is what enters block i: 0 is `embed`, i is
`resid.post@i-1`, and the number of blocks L is `resid.post@L-1`, **before** the final norm. In transformers, where
hidden_states[i] are numbered likewise, the last one is after the norm.
"""

import fcntl
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from reprobe.errors import ArtifactMissing, CorruptArtifact, DataError, UnsupportedOperation, UsageError
from reprobe.model.language_model import LanguageModel
from reprobe.model.sites import Site
from reprobe.progress import Progress, silent
from reprobe.prompts import Position, PromptSet, TokenTable, index_frame, token_frame, token_table
from reprobe.prompts.columns import some
from reprobe.provenance import digest_lines
from reprobe.store import ActivationStore, StoredSite, StoreWriter
from reprobe.store.layout import torch_dtype

_STATES, _TOKENS = "hidden_states", "token_ids"
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_TOKEN_DTYPES = ("I64", "I32")
#: Tokens of a request that are averaged at a time.
_TOKENS_AT_ONCE = 1024


@dataclass(frozen=True, eq=False)
class VllmFiles:
    """What the headers of a folder's files say, and their tokens; activations stay on disk.

    File i is `paths[i]`, its prompt `ids[i]` (the file's name without its ending), its token ids `tokens[i]`. All
    have `n_layers` layers of `width` components in `dtype`. They are in the natural order of their names.
    """

    folder: Path
    paths: tuple[Path, ...]
    ids: tuple[str, ...]
    tokens: tuple[NDArray[np.int32], ...]
    n_layers: int
    width: int
    dtype: str

    @classmethod
    def scan(cls, folder: str | Path, progress: Progress = silent) -> "VllmFiles":
        """Read the headers and tokens of every .safetensors file at and below `folder`.

        Raises `ArtifactMissing` if there is none; `CorruptArtifact` for files that are cut off, `UsageError` while
        vLLM is writing; `DataError` for files of another kind, two of one name, or of different shapes. The message
        names the files.
        """
        root = Path(folder)
        paths = sorted(root.rglob("*.safetensors"), key=lambda p: (_natural(p.stem), str(p)))
        if packed := sorted(root.rglob("*.safetensors.zst")):
            raise DataError(f"{_names(root, packed)} in {root} are compressed: decompress them first (zstd -d --rm)")
        if not paths:
            what = "has no .safetensors file" if root.is_dir() else "is not a folder"
            raise ArtifactMissing(
                f"{root} {what}: give the shared_storage_path of vLLM's hidden-states connector, which holds one "
                "file per request"
            )
        if busy := [lock for lock in sorted(root.rglob("*.safetensors.lock")) if _locked(lock)]:
            raise UsageError(f"vLLM is still writing {_names(root, busy)} in {root}: wait until it is done")
        twice = [name for name, n in Counter(p.stem for p in paths).items() if n > 1]
        if twice:
            raise DataError(f"several files below {root} have the name {some(twice)}: a prompt's id is its file's name")
        found = list(_headers(root, paths, progress))
        for what, values in (
            ("layers", [h.n_layers for h in found]),
            ("components", [h.width for h in found]),
            ("dtype", [h.dtype for h in found]),
        ):
            usual = Counter(values).most_common(1)[0][0]
            if other := [(p, v) for p, v in zip(paths, values, strict=True) if v != usual]:
                raise DataError(
                    f"the files in {root} are of several runs: most have {what} {usual}, but "
                    f"{_names(root, [p for p, _ in other])} {'has' if len(other) == 1 else 'have'} {other[0][1]}"
                )
        one = found[0]
        tokens = tuple(h.tokens for h in found)
        return cls(root, tuple(paths), tuple(p.stem for p in paths), tokens, one.n_layers, one.width, one.dtype)


def import_vllm(
    files: VllmFiles | str | Path,
    lm: LanguageModel,
    *,
    layers: Sequence[int],
    to: str | Path,
    at: Position | str = "last",
    data: PromptSet | str | Path | None = None,
    dtype: str | None = None,
    shard_rows: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress = silent,
) -> ActivationStore:
    """Write what vLLM computed into a store at `to`.

    `files` are a folder or its scan. `layers` are the connector's layer ids, in its order: 0 is `embed`, i is
    `resid.post@i-1`, also for i = number of blocks (before the final norm). `lm` is the model that vLLM ran, loaded
    in the dtype that it ran in: the store takes its identity, and takes it on your word; `replay` proves it. `at` is
    `last`, `all`, `mean` or `index:N` of the files' tokens. `data` brings label, group and pair of the prompts,
    whose ids must be the names of the files. `dtype` is that of the store (default: the files'). Rows are in the
    order of the files. In memory are all token ids, and the activations of one shard and one file.

    Raises what `VllmFiles.scan` and `StoreWriter.create` raise, `UsageError` for layers, dtypes or a width that are
    not the model's, `DataError` for tokens outside its vocabulary, or prompts and files that do not belong together.
    """
    found = files if isinstance(files, VllmFiles) else VllmFiles.scan(files, progress)
    sites = _sites(found, lm, layers)
    position = at if isinstance(at, Position) else Position.parse(at)
    _require_fitting(found, lm)
    table = token_table(found.ids, found.tokens, at=position)
    prompts = None if data is None else _of_files(data if isinstance(data, PromptSet) else PromptSet.load(data), found)
    order = np.arange(len(found.ids))
    index = index_frame(prompts, table, order)
    store_dtype = dtype if dtype is not None else found.dtype
    writer = StoreWriter.create(
        to,
        identity=lm.identity,
        prompts=digest_lines(f"{i} {t.tolist()}" for i, t in zip(found.ids, found.tokens, strict=True)),
        plan={"source": "vllm", "at": str(position), "layers": list(layers), "order": "files"},
        sites=[StoredSite(site, found.width) for site in sites],
        dtype=store_dtype,
        index=index,
        tokens=token_frame(table, order),
        shard_rows=shard_rows,
        resume=resume,
        overwrite=overwrite,
    )
    ends = np.concatenate([[0], np.cumsum(table.n_rows)])
    with writer:
        progress("import", 0, index.height)
        for shard in writer.missing():
            values = {site: torch.empty(shard.rows, found.width, dtype=torch_dtype(store_dtype)) for site in sites}
            for i in shard.overlapping(ends):
                first, last = max(shard.start, int(ends[i])), min(shard.stop, int(ends[i + 1]))
                rows = _rows(found, table, i, first - int(ends[i]), last - int(ends[i]))
                for k, site in enumerate(sites):
                    values[site][first - shard.start : last - shard.start] = rows[:, k].to(torch_dtype(store_dtype))
                progress("import", last, index.height)
            writer.write_shard(shard.number, values)
    return ActivationStore.open(to)


@dataclass(frozen=True, eq=False)
class _Header:
    tokens: NDArray[np.int32]
    n_layers: int
    width: int
    dtype: str


def _headers(root: Path, paths: Sequence[Path], progress: Progress) -> Iterator[_Header]:
    """One header per file; raises at the end, with the names of all, if files are cut off."""
    cut: list[Path] = []
    for i, path in enumerate(paths):
        try:
            yield _header(path)
        except SafetensorError:
            cut.append(path)
        progress("scan", i + 1, len(paths))
    if cut:
        raise CorruptArtifact(
            f"{_names(root, cut)} in {root} cannot be read as safetensors: cut off while they "
            "were written, or damaged. Run those requests again, or remove the files"
        )


def _header(path: Path) -> _Header:
    with safe_open(path, framework="pt") as f:
        if absent := {_STATES, _TOKENS} - set(f.keys()):
            have = ", ".join(sorted(f.keys())) or "nothing"
            raise DataError(
                f"{path} holds {have}, but no {' and no '.join(sorted(absent))}: it is not from vLLM's hidden-states "
                "connector"
            )
        states, tokens = f.get_slice(_STATES), f.get_slice(_TOKENS)
        shape, n = states.get_shape(), tokens.get_shape()
        if len(shape) != 3 or len(n) != 1 or shape[0] != n[0]:
            raise DataError(
                f"{path}: {_STATES} has the shape {tuple(shape)} and {_TOKENS} {tuple(n)}; expected (tokens, layers, "
                "d_model) and (tokens,)"
            )
        if not n[0]:
            raise DataError(f"{path} has no tokens: requests made of embeddings have none, and cannot be imported")
        if states.get_dtype() not in _DTYPES or tokens.get_dtype() not in _TOKEN_DTYPES:
            raise DataError(
                f"{path}: {_STATES} is {states.get_dtype()} and {_TOKENS} {tokens.get_dtype()}; expected "
                f"{', '.join(_DTYPES)} and {' or '.join(_TOKEN_DTYPES)}"
            )
        ids: NDArray[Any] = f.get_tensor(_TOKENS).numpy()
        if ids.min() < 0 or ids.max() > np.iinfo(np.int32).max:
            raise DataError(f"{path}: {ids.min()}–{ids.max()} are no token ids")
        return _Header(ids.astype(np.int32), shape[1], shape[2], _DTYPES[states.get_dtype()])


def _sites(files: VllmFiles, lm: LanguageModel, layers: Sequence[int]) -> tuple[Site, ...]:
    """Where the files' layers are in the model."""
    if lm.architecture.kind != "decoder":
        raise UnsupportedOperation(f"{lm.name} is an encoder: vLLM's connector writes hidden states of decoders")
    if wrong := [i for i in layers if not 0 <= i <= lm.n_layers]:
        raise UsageError(
            f"layers={list(layers)}: {lm.name} has the layer ids 0 (embed) to {lm.n_layers} (output of the last "
            f"block), not {wrong[0]}"
        )
    if len(set(layers)) < len(layers):
        raise UsageError(f"layers={list(layers)}: each layer once, in the order of vLLM's configuration")
    if len(layers) != files.n_layers:
        raise UsageError(
            f"layers={list(layers)} names {len(layers)} layers, but the files in {files.folder} have {files.n_layers}: "
            "give the connector's eagle_aux_hidden_state_layer_ids, all of them in their order"
        )
    return tuple(Site("embed") if i == 0 else Site("resid.post", i - 1) for i in layers)


def _require_fitting(files: VllmFiles, lm: LanguageModel) -> None:
    if files.width != lm.d_model:
        raise UsageError(
            f"the files in {files.folder} have {files.width} components, {lm.name} has d_model {lm.d_model}: they are "
            "of another model"
        )
    if files.dtype != (mine := str(lm.dtype).removeprefix("torch.")):
        raise UsageError(
            f"vLLM computed {files.dtype} here, but {lm.name} is loaded in {mine}, and a store says in what its rows "
            f"were computed: load it with dtype={files.dtype!r}"
        )
    size = lm.vocab_size
    beyond = [(i, int(t.max())) for i, t in zip(files.ids, files.tokens, strict=True) if t.max() >= size]
    if beyond:
        raise DataError(
            f"token {beyond[0][1]} of {some(i for i, _ in beyond)} is not in the vocabulary of {lm.name}, which has "
            f"{size}: the files are of another model"
        )


def _of_files(data: PromptSet, files: VllmFiles) -> PromptSet:
    """The prompts in the order of the files."""
    known, wanted = set(data.ids), set(files.ids)
    if unknown := [i for i in files.ids if i not in known]:
        raise DataError(
            f"{data.name} has no prompt with the id {some(unknown)}: the files of {files.folder} are found by name, so "
            "call each by the id of its prompt"
        )
    if lacking := [i for i in data.ids if i not in wanted]:
        raise DataError(f"there is no file for the prompts {some(lacking)} of {data.name} in {files.folder}")
    frame = pl.DataFrame({"id": files.ids}).join(data.frame, on="id", how="left", maintain_order="left")
    return PromptSet(frame, data.name)


def _rows(files: VllmFiles, table: TokenTable, i: int, first: int, last: int) -> Tensor:
    """Rows `first` … `last` − 1 of file i, (rows, layers, width), with no more of the file read than they need."""
    with safe_open(files.paths[i], framework="pt") as f:
        states = f.get_slice(_STATES)
        if not table.pooled:
            wanted = table.prompt(i).rows[first:last]  # neighbours: last, all and index:N have no gaps
            rows: Tensor = states[int(wanted[0]) : int(wanted[-1]) + 1]
            return rows
        n = len(files.tokens[i])
        # Sums in float32, as in extraction: a mean in half precision loses its last bits.
        total = torch.zeros(files.n_layers, files.width)
        for start in range(0, n, _TOKENS_AT_ONCE):
            total += states[start : min(start + _TOKENS_AT_ONCE, n)].float().sum(0)
        return (total / n)[None]


def _locked(lock: Path) -> bool:
    """Whether the connector holds this lock: it does from a request's arrival until its file is written."""
    fd = os.open(lock, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def _natural(name: str) -> list[tuple[int, int, str]]:
    """A key by which request 10 comes after request 9."""
    return [(0, int(piece), "") if piece.isdecimal() else (1, 0, piece) for piece in re.split(r"(\d+)", name) if piece]


def _names(root: Path, paths: Iterable[Path]) -> str:
    return some(str(p.relative_to(root)) for p in paths)
