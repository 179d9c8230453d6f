"""Reading a store: rows of sites, bit for bit as they were written.

Enters: the path or URL of a store. Leaves: tensors in the stored dtype, the index, and what the manifest says.
Memory grows with what is asked for, not with the store. Does not know models: which model a store belongs to
is in `identity`, and the stations that put it to use compare it.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any, overload

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from reprobe.errors import CorruptArtifact, IncompleteStore, UnknownSite, UsageError
from reprobe.model.identity import ModelIdentity
from reprobe.model.sites import Parts, Site, expand
from reprobe.provenance import digest_bytes
from reprobe.store.batches import Batch, batches
from reprobe.store.commit import Commit, committed
from reprobe.store.formats import Decoder, format_of, size_on_disk
from reprobe.store.layout import INDEX, TOKENS, Grid, decode, stored_dtype
from reprobe.store.manifest import Manifest, StoredSite, read_manifest
from reprobe.store.places import Place, place_of
from reprobe.store.rows import RowNumbers, Rows, row_numbers, runs, shards_of, windows
from reprobe.store.verification import VerifyReport, verify


@dataclass(frozen=True)
class StoreInfo:
    """What a person wants to know of a store. Sizes are in bytes; that of the complete arrays is exact for zarr
    without compression, and an upper bound otherwise (see `size_on_disk`)."""

    path: Path | str
    model: str
    revision: str | None
    dtype: str
    format: str
    compression: str | None
    sites: tuple[Site, ...]
    rows: int
    shards: int
    committed: int
    complete: bool
    bytes_on_disk: int
    bytes_of_arrays_when_complete: int
    prompts: str
    plan: dict[str, Any]
    versions: dict[str, str]


@dataclass(frozen=True, eq=False)
class ActivationStore:
    """A store on disk, as it was when opened.

    `committed` are the numbers of its shards that were written by then; open it again to see more. Shard
    files are checked as they are read (a checksum per chunk); `verify` checks all of them.
    """

    place: Place
    manifest: Manifest
    committed: frozenset[int]

    @classmethod
    def open(cls, path: str | Path) -> "ActivationStore":
        """The store at `path`, a folder or a URL such as s3://bucket/prefix, complete or not.

        Raises `ArtifactMissing`, `CorruptArtifact`, and `StoreUnreachable` if an object store cannot be used.
        """
        place = place_of(path)
        manifest = read_manifest(place)
        return cls(place, manifest, committed(place, manifest))

    @property
    def path(self) -> Path | str:
        """The store's folder (absolute), or its URL: what `open` takes."""
        return self.place.path

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.place.name

    @property
    def sites(self) -> tuple[Site, ...]:
        """The stored sites, in the order in which they were asked for."""
        return tuple(s.site for s in self.manifest.sites)

    @property
    def identity(self) -> ModelIdentity:
        """The model the activations are of."""
        return self.manifest.identity

    @property
    def rows(self) -> int:
        return self.manifest.grid.rows

    @property
    def complete(self) -> bool:
        """Whether every shard has been committed."""
        return len(self.committed) == self._grid.n_shards

    @property
    def parts(self) -> Parts:
        """What is stored, in the form that `expand` takes: patterns match stored sites only."""
        of_layer: list[set[str]] = [set() for _ in range(self.manifest.n_layers)]
        for site in self.sites:
            if site.layer is not None:
                of_layer[site.layer].add(site.part)
        return Parts(
            model=f"{self.name} ({self.identity.name})",
            of_layer=tuple(frozenset(p) for p in of_layer),
            units=self.manifest.units,
            why_absent="not stored",
        )

    def unit_width(self, part: str) -> int:
        """Numbers per unit of `part`: head_dim for `attn.heads`, 1 for `mlp.neurons`."""
        for stored in self.manifest.sites:
            if stored.site.part == part and stored.unit_width is not None:
                return stored.unit_width
        raise UnknownSite(f"{self.name} stores no {part!r} with units; it has {self._listing()}")

    @cached_property
    def index(self) -> pl.DataFrame:
        """One line per row, with the columns `INDEX_COLUMNS` or more; `CorruptArtifact` if it was changed."""
        return pl.read_parquet(BytesIO(self._untouched(INDEX)))

    @cached_property
    def tokens(self) -> pl.DataFrame:
        """One line per prompt, in the order of the index: `prompt` (its id) and `tokens`, all its token ids."""
        return pl.read_parquet(BytesIO(self._untouched(TOKENS)))

    def read(self, site: str | Site, rows: Rows = None) -> torch.Tensor:
        """Rows of a site, (n, width), in the stored dtype and bit-exact.

        `site` may be a unit of a stored site, such as `attn.heads@3.2`. `rows`: None for all, a slice, row
        numbers in any order with repeats, a mask over all rows, or a polars series of either
        (`store.index["label"] == 1`). Only the chunks that hold wanted rows are read. Raises `UnknownSite`,
        `UsageError`, `IncompleteStore` if a wanted row has not been committed, `CorruptArtifact`.
        """
        return decode(self._read(site, row_numbers(rows, self.rows)), self.manifest.dtype)

    def _read(self, site: str | Site, wanted: "range | RowNumbers") -> NDArray[Any]:
        stored, columns = self._place(site)
        self._require_committed(shards := shards_of(wanted, self._grid))
        self._require_files(shards, stored)
        width = columns.stop - columns.start
        out = np.empty((len(wanted), width), dtype=stored_dtype(self.manifest.dtype))
        for run in runs(wanted, self._grid):
            out[run.put] = self._decoder(stored.site).read(run.start, run.stop, columns)[run.take]
        return out

    @overload
    def iter(  # type: ignore[overload-overlap]  # a str is an Iterable[str] too: the first signature wins
        self, sites: str | Site, *, batch_rows: int = ..., shuffle: int | None = ...
    ) -> Iterator[Batch[torch.Tensor]]: ...

    @overload
    def iter(
        self, sites: Iterable[str | Site], *, batch_rows: int = ..., shuffle: int | None = ...
    ) -> Iterator[Batch[dict[Site, torch.Tensor]]]: ...

    def iter(
        self, sites: str | Site | Iterable[str | Site], *, batch_rows: int = 1024, shuffle: int | None = None
    ) -> Iterator[Batch[torch.Tensor]] | Iterator[Batch[dict[Site, torch.Tensor]]]:
        """All rows once, in batches of `batch_rows` (the last may be shorter): (row numbers, values).

        `sites` is one site, and the values are a tensor; or several, as an iterable of sites and patterns,
        and the values are a dict of tensors. `shuffle` is a seed: chunks come in random order and rows are
        mixed in a buffer of about one shard, in the same order for the same seed and `batch_rows` whatever
        the sites. In memory are about two shards of the read sites (or batches, if those are larger).
        Errors as in `read`, before the first batch where they can be known.
        """
        if type(batch_rows) is not int or batch_rows < 1:
            raise UsageError(f"batch_rows is {batch_rows!r}: it must be a whole number, at least 1")
        if isinstance(shuffle, bool):
            raise UsageError("shuffle takes a seed (a whole number), or None for the stored order")
        if isinstance(sites, str | Site):
            site = Site.parse(sites) if isinstance(sites, str) else sites
            batches = self._batches((site,), batch_rows, shuffle)
            return (Batch(b.rows, b.values[site]) for b in batches)
        return self._batches(expand(sites, self.parts), batch_rows, shuffle)

    def verify(self) -> VerifyReport:
        """Recompute every checksum of the store; see `verification.verify`."""
        return verify(self.path)

    def info(self) -> StoreInfo:
        """A summary for people; does not read any rows."""
        m = self.manifest
        return StoreInfo(
            path=self.path,
            model=m.identity.name,
            revision=m.identity.revision,
            dtype=m.dtype,
            format=m.format,
            compression=m.compression,
            sites=self.sites,
            rows=self.rows,
            shards=self._grid.n_shards,
            committed=len(self.committed),
            complete=self.complete,
            bytes_on_disk=sum(self.place.survey().files.values()),
            bytes_of_arrays_when_complete=size_on_disk(
                [s.width for s in m.sites], self._grid, m.dtype, format=m.format, compression=m.compression
            ),
            prompts=m.prompts,
            plan=dict(m.plan),
            versions=dict(m.versions),
        )

    @property
    def _grid(self) -> Grid:
        return self.manifest.grid

    @cached_property
    def _decoders(self) -> dict[Site, Decoder]:
        return {}

    @cached_property
    def _commits(self) -> dict[int, Commit]:
        return {}

    def _decoder(self, site: Site) -> Decoder:
        if site not in self._decoders:
            backend = format_of(self.manifest.format)
            for name in backend.metadata_files(site):
                self._untouched(name)
            self._decoders[site] = backend.decoder(self.place, self.manifest, self._place(site)[0])
        return self._decoders[site]

    def _untouched(self, name: str) -> bytes:
        """Bytes of a file whose digest the manifest holds; `CorruptArtifact` unless they agree."""
        try:
            data = self.place.read(name)
        except FileNotFoundError as error:
            raise CorruptArtifact(f"{self.place.at(name)} is missing from the store") from error
        if digest_bytes(data) != self.manifest.files.get(name):
            raise CorruptArtifact(f"{self.place.at(name)} is not as it was written: its checksum is wrong")
        return data

    def _place(self, site: str | Site) -> tuple[StoredSite, slice]:
        """The stored site that holds `site`, and its columns there."""
        site = Site.parse(site) if isinstance(site, str) else site
        for stored in self.manifest.sites:
            if stored.site == site.whole:
                if site.unit is None or stored.unit_width is None:
                    return stored, slice(0, stored.width)
                if site.unit >= stored.units:
                    raise UnknownSite(f"'{site}': {site.whole} has units 0–{stored.units - 1}")
                return stored, slice(site.unit * stored.unit_width, (site.unit + 1) * stored.unit_width)
        raise UnknownSite(f"'{site}' is not in {self.place}; it has {self._listing()}")

    def _listing(self) -> str:
        names = [str(s) for s in self.sites]
        return ", ".join(names if len(names) <= 8 else [*names[:4], "…", *names[-3:]])

    def _require_committed(self, shards: Sequence[int]) -> None:
        if absent := [k for k in shards if k not in self.committed]:
            first, last = self._grid.shard(absent[0]), self._grid.shard(absent[-1])
            raise IncompleteStore(
                f"{self.place} is incomplete: {len(absent)} of the shards that hold the wanted rows are not "
                f"written (the first: rows {first.start}–{first.stop - 1}, the last: rows {last.start}–"
                f"{last.stop - 1}). Finish it with reprobe extract … --resume, or read other rows."
            )

    def _require_files(self, shards: Sequence[int], stored: StoredSite) -> None:
        """Raise unless each shard's file of the site is whole: zarr takes a missing one for zeros."""
        for k in shards:
            if k not in self._commits:
                self._commits[k] = Commit.read(self.place, self.manifest, k)
            name = format_of(self.manifest.format).shard_file(stored.site, k)
            want, have = self._commits[k].files[name].bytes, self.place.size(name)
            if have != want:
                found = "is missing" if have is None else f"has {have} bytes"
                raise CorruptArtifact(f"{self.place.at(name)} {found}, though {want} bytes were committed")

    def _batches(
        self, sites: tuple[Site, ...], batch_rows: int, seed: int | None
    ) -> Iterator[Batch[dict[Site, torch.Tensor]]]:
        for site in sites:
            self._place(site)
        self._require_committed(range(self._grid.n_shards))
        found = batches(
            windows(self._grid, at_least=batch_rows, seed=seed),
            lambda window: {site: self._read(site, window) for site in sites},
            batch_rows,
        )
        return (Batch(b.rows, {site: decode(v, self.manifest.dtype) for site, v in b.values.items()}) for b in found)
