"""Writing a store: creating it, resuming it, and committing shards.

Enters: what the manifest says, the index, and each shard's rows. Leaves: a store in which every committed
shard is whole, whatever happens in between. Does not know where rows come from or in which order they were
computed.

A shard is written to a temporary name, fsynced and renamed, its folder is fsynced, and only then its commit
record is written in the same way. Resuming trusts commit records and nothing else, and since equal manifests
give equal bytes, a resumed store is byte-identical to an uninterrupted one.
"""

import errno
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from reprobe.errors import CorruptArtifact, DiskFull, UsageError
from reprobe.model.identity import ModelIdentity
from reprobe.model.sites import Site
from reprobe.provenance import digest_bytes, digest_file, sync_folder, versions, write_durably
from reprobe.store import folder
from reprobe.store.commit import Commit, FileRecord, committed
from reprobe.store.layout import (
    COMMITS,
    INDEX,
    INDEX_COLUMNS,
    MANIFEST,
    TOKEN_COLUMNS,
    TOKENS,
    Grid,
    Shard,
    commit_name,
    encode,
    itemsize,
)
from reprobe.store.manifest import Manifest, StoredSite, read_manifest
from reprobe.store.zarr_backend import Encoder, shard_file

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


class StoreWriter:
    """The one writer of a store, made by `create`; a context manager that gives the lock back on exit.

    For each of `missing()` call `write_shard`; what was not written is what is missing after a resume.
    """

    def __init__(self, path: Path, manifest: Manifest, encoder: Encoder, lock: folder.Lock) -> None:
        self.path = path
        self.manifest = manifest
        self._encoder = encoder
        self._lock = lock
        self._committed = set(committed(path, manifest))

    @classmethod
    def create(
        cls,
        path: str | Path,
        *,
        identity: ModelIdentity,
        prompts: str,
        plan: Mapping[str, Any],
        sites: Sequence[StoredSite],
        dtype: str,
        index: pl.DataFrame,
        tokens: pl.DataFrame,
        shard_rows: int | None = None,
        chunk_rows: int | None = None,
        resume: bool = False,
        overwrite: bool = False,
    ) -> "StoreWriter":
        """Begin a store at `path`, or with `resume` go on with one that is there.

        `prompts` is the digest of the prompt set; `plan` any plain JSON that decides the values (positions,
        packing, budget …); `index` has one line per row, its columns `INDEX_COLUMNS` or more, and `row`
        counts from 0. `tokens` has one line per prompt of the index: its id, and all its token ids, so that the
        rows can be computed again from the store alone. `shard_rows` and `chunk_rows` as in `Grid.of`.

        Raises `ArtifactExists` if something is at `path` and neither `resume` nor `overwrite` was asked for,
        or if it is not a store (which is never touched); `IdentityMismatch` if a store to resume was begun
        with anything else; `StoreLocked` if another process writes it; `DiskFull`; `UsageError` for malformed
        arguments.
        """
        if resume and overwrite:
            raise UsageError(
                "resume and overwrite exclude each other: resume keeps what is there, overwrite removes it"
            )
        grid = Grid.of(
            _checked(index).height,
            [s.width * itemsize(dtype) for s in sites],
            shard_rows=shard_rows,
            chunk_rows=chunk_rows,
        )
        parts: dict[str, Any] = {
            "identity": identity, "prompts": prompts, "plan": plan, "sites": tuple(sites), "dtype": dtype,
            "grid": grid, "versions": versions(),
        }  # fmt: skip
        Manifest(files={}, **parts)  # refuse malformed arguments before encoding anything
        encoder = Encoder(sites, dtype, grid)
        contents = {INDEX: _parquet(index), TOKENS: _parquet(_matching(tokens, index))} | encoder.metadata
        manifest = Manifest(files={name: digest_bytes(data) for name, data in contents.items()}, **parts)

        path = Path(path).resolve()
        with _no_room_means(f"{path} could not be begun. Free some space and run again."):
            lock = folder.claim(path, resume=resume, overwrite=overwrite)
            try:
                if resume and folder.is_store(path):
                    _resume(path, manifest, contents)
                else:
                    _begin(path, manifest, contents)
                return cls(path, manifest, encoder, lock)
            except BaseException:
                lock.release()
                folder.remove_if_empty(path)
                raise

    @property
    def shards(self) -> tuple[Shard, ...]:
        """All shards of the store, written or not."""
        return self.manifest.grid.shards

    def missing(self) -> tuple[Shard, ...]:
        """Shards that have yet to be written, in order."""
        return tuple(s for s in self.shards if s.number not in self._committed)

    @property
    def complete(self) -> bool:
        return not self.missing()

    def write_shard(self, number: int, values: "Mapping[Site, torch.Tensor | NDArray[np.generic]]") -> None:
        """Write shard `number` and commit it: one array (shard.rows, width) per site, in the store's dtype.

        Values are not looked at: NaN and infinity are data. Raises `UsageError` if a site is missing or too
        many, a shape or dtype is wrong, or the shard is committed already; `DiskFull` if there is no room,
        and then what was committed before stays.
        """
        shard = self.manifest.grid.shard(number)
        if self._lock.released:
            raise UsageError(f"this writer of {self.path} has been closed")
        if number in self._committed:
            raise UsageError(f"shard {number} of {self.path} is committed already: a shard is written once")
        arrays = self._checked(shard, values)
        kept = f"{len(self._committed)} of {len(self.shards)} shards are committed and kept"
        with _no_room_means(
            f"{self.path}: {kept}. Free some space (a shard takes {shard.rows * self.manifest.row_bytes:,} "
            "bytes), then go on with resume=True (--resume)."
        ):
            records = {}
            for site, array in arrays.items():
                data = self._encoder.shard(site, shard, array)
                write_durably(self.path / shard_file(site, number), data)
                records[str(site)] = FileRecord(digest_bytes(data), len(data))
            Commit(shard, records).write(self.path, self.manifest)
        self._committed.add(number)

    def _checked(
        self, shard: Shard, values: "Mapping[Site, torch.Tensor | NDArray[np.generic]]"
    ) -> dict[Site, NDArray[np.generic]]:
        want = {s.site: (shard.rows, s.width) for s in self.manifest.sites}
        if set(values) != set(want):
            missing = ", ".join(str(s) for s in want if s not in values) or "none"
            extra = ", ".join(str(s) for s in values if s not in want) or "none"
            raise UsageError(f"shard {shard.number} needs every site of the store; missing: {missing}; extra: {extra}")
        for site, shape in want.items():
            if tuple(values[site].shape) != shape:
                raise UsageError(f"'{site}' of shard {shard.number}: shape {tuple(values[site].shape)}, not {shape}")
        return {site: encode(values[site], self.manifest.dtype) for site in want}

    def close(self) -> None:
        """Give the lock back. What is committed stays, also if the store is not complete."""
        self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _checked(index: pl.DataFrame) -> pl.DataFrame:
    if absent := [c for c in INDEX_COLUMNS if c not in index.columns]:
        raise UsageError(f"the index lacks the columns {', '.join(absent)}; it has {', '.join(index.columns)}")
    if not index.height:
        raise UsageError("the index has no rows: there is nothing to store")
    row = index["row"]
    if not row.dtype.is_integer() or not np.array_equal(row.to_numpy(), np.arange(index.height)):
        raise UsageError("the index's column 'row' must count 0, 1, 2, …, in order")
    return index


def _matching(tokens: pl.DataFrame, index: pl.DataFrame) -> pl.DataFrame:
    """The table of tokens, if it is one and of the index's prompts."""
    if tuple(tokens.columns) != TOKEN_COLUMNS or tokens.schema["tokens"] != pl.List(pl.Int32):
        raise UsageError(
            f"the table of tokens needs the columns prompt and tokens (lists of Int32), got {tokens.schema}"
        )
    if not tokens["prompt"].equals(index["prompt"].unique(maintain_order=True)):
        raise UsageError("the table of tokens is not of the index's prompts, each once and in their order")
    return tokens


def _parquet(index: pl.DataFrame) -> bytes:
    buffer = io.BytesIO()
    index.rechunk().write_parquet(buffer)
    return buffer.getvalue()


def _begin(path: Path, manifest: Manifest, contents: Mapping[str, bytes]) -> None:
    """Write everything but the shards, the manifest last: from then on the folder is a store."""
    folder.clear(path)
    try:
        for name in sorted({COMMITS, *(str(Path(n).parent) for n in contents)}):
            (path / name).mkdir(exist_ok=True)
        for name, data in contents.items():
            write_durably(path / name, data)
        sync_folder(path)
        write_durably(path / MANIFEST, manifest.to_bytes())
    except BaseException:
        folder.clear(path)
        raise


def _resume(path: Path, manifest: Manifest, contents: Mapping[str, bytes]) -> None:
    """See that the store is the one that `manifest` describes, and make good all but its missing shards."""
    try:
        found = read_manifest(path)
    except CorruptArtifact as error:
        raise CorruptArtifact(f"{error}. To begin anew pass overwrite=True (--overwrite).") from error
    found.require_same(manifest, path)
    folder.remove_temporary(path)
    (path / COMMITS).mkdir(exist_ok=True)
    for name, data in contents.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        if not (path / name).is_file() or digest_file(path / name) != digest_bytes(data):
            write_durably(path / name, data)
    for number in committed(path, manifest):
        if not _is_whole(path, manifest, number):
            (path / commit_name(number)).unlink()  # written anew like any other missing shard


def _is_whole(path: Path, manifest: Manifest, number: int) -> bool:
    """Whether a commit record is sound and its files have their lengths (checksums are for `verify`)."""
    try:
        commit = Commit.read(path, manifest, number)
        return all(
            (path / shard_file(s.site, number)).stat().st_size == commit.files[str(s.site)].bytes
            for s in manifest.sites
        )
    except (CorruptArtifact, FileNotFoundError):
        return False


@contextmanager
def _no_room_means(consequence: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        raise DiskFull(f"no room left on the device. {consequence}") from error
