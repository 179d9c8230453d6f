"""Writing a store: creating it, resuming it, and committing shards.

Enters: what the manifest says, the index, and each shard's rows. Leaves: a store in which every committed
shard is whole, whatever happens in between. Does not know where rows come from or in which order they were
computed, nor the format in which they are stored.

A shard's files are written durably, and only then its commit record. Resuming trusts commit records and
nothing else, and since equal manifests give equal bytes, a resumed store is byte-identical to an uninterrupted
one, and one of several writers to that of a single one.
"""

import importlib.metadata
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from reprobe.errors import ArtifactExists, CorruptArtifact, DiskFull, StoreLocked, UsageError
from reprobe.model.identity import ModelIdentity
from reprobe.model.sites import Site
from reprobe.provenance import NO_ROOM, digest_bytes, versions
from reprobe.store.claim import Claim, claim, clear, is_store, remove_temporary
from reprobe.store.commit import Commit, FileRecord, committed
from reprobe.store.formats import Encoder, format_of
from reprobe.store.layout import (
    INDEX,
    INDEX_COLUMNS,
    LOCK,
    MANIFEST,
    TOKEN_COLUMNS,
    TOKENS,
    Grid,
    Shard,
    check_format,
    commit_name,
    encode,
    itemsize,
)
from reprobe.store.locks import LOCK_TEXT
from reprobe.store.manifest import Manifest, StoredSite, read_manifest
from reprobe.store.places import LocalFolder, Place, place_of


class StoreWriter:
    """A writer of a store, or of some of its shards, made by `create`; a context manager that gives its right
    to write back on exit.

    For each of `missing()` call `write_shard`; what was not written is what is missing after a resume.
    """

    def __init__(self, place: Place, manifest: Manifest, encoder: Encoder, claim: Claim, own: range) -> None:
        self.manifest = manifest
        self.own = own
        self._place = place
        self._encoder = encoder
        self._claim = claim
        self._written = set(committed(place, manifest))

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
        format: str = "zarr",  # noqa: A002
        compression: str | None = None,
        own: range | None = None,
        resume: bool = False,
        overwrite: bool = False,
    ) -> "StoreWriter":
        """Begin a store at `path` (a folder, or a URL such as s3://bucket/prefix), or go on with one.

        `prompts` is the digest of the prompt set; `plan` any plain JSON that decides the values (positions,
        packing, budget …); `index` has one line per row, its columns `INDEX_COLUMNS` or more, and `row`
        counts from 0. `tokens` has one line per prompt of the index: its id, and all its token ids, so that the
        rows can be computed again from the store alone. `shard_rows` and `chunk_rows` as in `Grid.of`.
        `format` is "zarr" or "hdf5"; `compression` None or "zstd", which shuffles bytes first.

        `own` are the numbers of the shards that this writer may write, if it is one of several: whichever
        comes first begins the store, and the others join it, as they do a store that is there from before.
        An object store has no locks: there a shard that two write is that of the first to commit it, and the
        other gets `StoreLocked`; their bytes are equal, so nothing is harmed.

        Raises `ArtifactExists` if something is at `path` and none of `resume`, `overwrite` and `own` was given,
        or if it is not a store (which is never touched); `IdentityMismatch` if a store to go on with was begun
        with anything else; `StoreLocked` if another process writes it, or writes a shard of `own`;
        `StoreUnreachable` if an object store cannot be used; `DiskFull`; `UsageError` for malformed arguments.
        """
        if resume and overwrite:
            raise UsageError(
                "resume and overwrite exclude each other: resume keeps what is there, overwrite removes it"
            )
        if overwrite and own is not None:
            raise UsageError(
                "one of several writers cannot overwrite: it would remove what the others have just written. "
                "Remove the store, or let a single writer overwrite it, before they start."
            )
        check_format(format, compression)
        grid = Grid.of(
            _checked(index).height,
            [s.width * itemsize(dtype) for s in sites],
            shard_rows=shard_rows,
            chunk_rows=chunk_rows,
        )
        shards = _checked_own(own, grid)
        backend = format_of(format)
        used = {name: importlib.metadata.version(name) for name in backend.libraries(compression)}
        parts: dict[str, Any] = {
            "identity": identity, "prompts": prompts, "plan": plan, "sites": tuple(sites), "dtype": dtype,
            "grid": grid, "format": format, "compression": compression, "versions": versions() | used,
        }  # fmt: skip
        Manifest(files={}, **parts)  # refuse malformed arguments before encoding anything
        encoder = backend.encoder(sites, dtype, grid, compression)
        contents = {INDEX: _parquet(index), TOKENS: _parquet(_matching(tokens, index)), **encoder.metadata}
        manifest = Manifest(files={name: digest_bytes(data) for name, data in contents.items()}, **parts)

        place = place_of(path)
        with _no_room_means(f"{place} could not be begun. Free some space and run again."):
            held = claim(place, resume=resume, overwrite=overwrite, join=own is not None)
            try:
                held.own(shards)
                if not overwrite and is_store(place):
                    _resume(place, manifest, contents, shards, alone=held.alone)
                elif isinstance(place, LocalFolder):
                    _begin(place, manifest, contents)
                else:
                    _begin_unlocked(place, manifest, contents, overwrite=overwrite, single=own is None)
                held.share()
                return cls(place, manifest, encoder, held, shards)
            except BaseException:
                held.release()
                raise

    def of(self, own: range) -> "StoreWriter":
        """A writer of shards `own` of this store, which joins it as one of several.

        Cheaper than `create`, since nothing is encoded again; this writer may be closed. Raises as `create` does.
        """
        shards = _checked_own(own, self.manifest.grid)
        held = claim(self._place, resume=False, overwrite=False, join=True)
        try:
            held.own(shards)
            _resume(self._place, self.manifest, {}, shards, alone=False)
            held.share()
            return StoreWriter(self._place, self.manifest, self._encoder, held, shards)
        except BaseException:
            held.release()
            raise

    @property
    def path(self) -> Path | str:
        """The store's folder, or its URL."""
        return self._place.path

    @property
    def shards(self) -> tuple[Shard, ...]:
        """All shards of the store, written or not, this writer's or not."""
        return self.manifest.grid.shards

    def missing(self) -> tuple[Shard, ...]:
        """This writer's shards that have yet to be written, in order. Looks what has been committed by now."""
        self._written |= committed(self._place, self.manifest)
        return tuple(self.manifest.grid.shard(k) for k in self.own if k not in self._written)

    @property
    def complete(self) -> bool:
        """Whether all shards of this writer are committed."""
        return not self.missing()

    def write_shard(self, number: int, values: "Mapping[Site, torch.Tensor | NDArray[np.generic]]") -> None:
        """Write shard `number` and commit it: one array (shard.rows, width) per site, in the store's dtype.

        Values are not looked at: NaN and infinity are data. Raises `UsageError` if a site is missing or too
        many, a shape or dtype is wrong, or the shard is committed already or another writer's; `StoreLocked`
        if another writer has committed it in the meantime; `DiskFull` if there is no room, and then what was
        committed before stays.
        """
        shard = self.manifest.grid.shard(number)
        if self._claim.released:
            raise UsageError(f"this writer of {self._place} has been closed")
        if number not in self.own:
            raise UsageError(f"shard {number} of {self._place} is another writer's: this one has {_named(self.own)}")
        if number in self._written:
            raise UsageError(f"shard {number} of {self._place} is committed already: a shard is written once")
        arrays = self._checked(shard, values)
        kept = f"{len(self._written)} of {len(self.shards)} shards are committed and kept"
        with _no_room_means(
            f"{self._place}: {kept}. Free some space (a shard takes {shard.rows * self.manifest.row_bytes:,} "
            "bytes), then go on with resume=True (--resume)."
        ):
            try:
                if self._place.size(commit_name(number)) is not None:
                    raise FileExistsError(commit_name(number))
                records = {}
                for name, data in self._encoder.shard(shard, arrays):
                    self._place.write(name, data)
                    records[name] = FileRecord(digest_bytes(data), len(data))
                Commit(shard, records).write(self._place, self.manifest)
            except FileExistsError as error:
                raise StoreLocked(
                    f"shard {number} of {self._place} was committed by another writer in the meantime, so two "
                    "write the same shards. Their bytes are equal and nothing is harmed; give each writer its own."
                ) from error
        self._written.add(number)

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
        """Give the right to write back. What is committed stays, also if the store is not complete."""
        self._claim.release()

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


def _checked_own(own: range | None, grid: Grid) -> range:
    """The shards of this writer: all of the store's unless `own` says otherwise."""
    if own is None:
        return range(grid.n_shards)
    if not isinstance(own, range) or own.step != 1 or (own and not 0 <= own.start < own.stop <= grid.n_shards):
        raise UsageError(f"own={own!r}: give neighbouring shards of 0–{grid.n_shards - 1} as a range with step 1")
    return own


def _named(shards: range) -> str:
    return f"shards {shards.start}–{shards.stop - 1}" if shards else "none"


def _begin(place: LocalFolder, manifest: Manifest, contents: Mapping[str, bytes]) -> None:
    """Write everything but the shards, the manifest last: from then on it is a store."""
    clear(place)
    try:
        place.prepare({commit_name(0), *contents})
        for name, data in contents.items():
            place.write(name, data)
        place.write(MANIFEST, manifest.to_bytes())
    except BaseException:
        clear(place)
        raise


def _begin_unlocked(
    place: Place, manifest: Manifest, contents: Mapping[str, bytes], *, overwrite: bool, single: bool
) -> None:
    """As `_begin`, where nobody can be locked out: others may be beginning the store at this moment.

    Nothing of theirs is replaced or removed (unless a `single` writer is to overwrite it): every object is put
    only if it is not there, and whose manifest is there first has begun the store.
    """
    place.write(LOCK, LOCK_TEXT)  # until there is a manifest it says that what lies here is ours
    there = place.survey().files
    if overwrite or MANIFEST not in there:
        if single:
            clear(place)
        elif left := sorted(there.keys() - contents.keys()):
            raise _left_over(place, left[0])
        for name, data in contents.items():
            try:
                place.write_new(name, data)
            except FileExistsError as error:
                if place.read(name) != data and not is_store(place):
                    raise _left_over(place, name) from error
        with suppress(FileExistsError):
            place.write_new(MANIFEST, manifest.to_bytes())
    try:
        read_manifest(place).require_same(manifest, place)
    finally:
        with suppress(FileNotFoundError):
            place.remove(LOCK)


def _left_over(place: Place, name: str) -> ArtifactExists:
    return ArtifactExists(
        f"{place.at(name)} was left by a writer that was killed while it began another store. One of several writers "
        "does not remove it: let a single one begin the store with overwrite=True (--overwrite) first."
    )


def _resume(place: Place, manifest: Manifest, contents: Mapping[str, bytes], own: range, *, alone: bool) -> None:
    """See that the store is the one that `manifest` describes, and make good all but its missing shards.

    Unless `alone`, others write there, one of whom has seen to what is not of a shard.
    """
    try:
        found = read_manifest(place)
    except CorruptArtifact as error:
        raise CorruptArtifact(f"{error}. To begin anew pass overwrite=True (--overwrite).") from error
    found.require_same(manifest, place)
    remove_temporary(place, None if alone else own)
    if alone:
        place.prepare({commit_name(0), *contents})
        for name, data in contents.items():
            if place.size(name) is None or place.digest(name) != digest_bytes(data):
                place.write(name, data)
    if not isinstance(place, LocalFolder):
        with suppress(FileNotFoundError):
            place.remove(LOCK)  # whoever began the store may have been killed just before
    for number in committed(place, manifest):
        if number in own and not _is_whole(place, manifest, number):
            place.remove(commit_name(number))  # written anew like any other missing shard


def _is_whole(place: Place, manifest: Manifest, number: int) -> bool:
    """Whether a commit record is sound and its files have their lengths (checksums are for `verify`)."""
    try:
        commit = Commit.read(place, manifest, number)
    except CorruptArtifact:
        return False
    return all(place.size(name) == record.bytes for name, record in commit.files.items())


@contextmanager
def _no_room_means(consequence: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise DiskFull(f"no room left on the device. {consequence}") from error
