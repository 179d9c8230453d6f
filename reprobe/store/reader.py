"""Reading a store: rows of sites, bit for bit as they were written.

Enters: the path or URL of a store. Leaves: tensors in the stored dtype, the index, and what the manifest says.
Memory grows with what is asked for, not with the store. Does not know models: which model a store belongs to
is in `identity`, and the stations that put it to use compare it.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from reprobe.errors import CorruptArtifact, IncompleteStore, UnknownSite, UsageError
from reprobe.model.identity import ModelIdentity
from reprobe.model.sites import Parts, Site, expand
from reprobe.provenance import digest, digest_bytes
from reprobe.store.batches import Arrays, Batch, Source, batches, mixed
from reprobe.store.commit import Commit, committed
from reprobe.store.formats import Decoder, format_of, size_on_disk
from reprobe.store.layout import INDEX, INDEX_COLUMNS, TOKEN_COLUMNS, TOKENS, Grid, decode, stored_dtype
from reprobe.store.manifest import Manifest, StoredSite, read_manifest
from reprobe.store.order import Order, check_batch_rows, in_order, mixed_pieces, piece_rows, shuffled
from reprobe.store.places import Place, place_of, reading
from reprobe.store.rows import RowNumbers, Rows, row_numbers, rows_where, runs, shards_of
from reprobe.store.torch_batches import TorchBatches
from reprobe.store.verification import VerifyReport, verify

if TYPE_CHECKING:
    from datasets import Dataset


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

        Raises `ArtifactMissing`, `CorruptArtifact`, `SchemaMismatch` if another version wrote it, and
        `StoreUnreachable` if an object store cannot be used.
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
        """Rows of the whole store, written or not."""
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

    def width(self, site: str | Site) -> int:
        """Numbers in a row of `site`, a stored site or a unit of one. Raises `UnknownSite`."""
        columns = self._place(site)[1]
        return int(columns.stop - columns.start)

    @cached_property
    def index(self) -> pl.DataFrame:
        """One line per row, with the columns `INDEX_COLUMNS` or more; `CorruptArtifact` if it was changed."""
        table = self._table(INDEX, INDEX_COLUMNS)
        if table.height != self.rows:
            raise CorruptArtifact(f"{self.place.at(INDEX)} has {table.height} lines, and the store {self.rows} rows")
        return table

    @cached_property
    def tokens(self) -> pl.DataFrame:
        """One line per prompt, in the order of the index: `prompt` (its id) and `tokens`, all its token ids."""
        return self._table(TOKENS, TOKEN_COLUMNS)

    def _table(self, name: str, columns: Sequence[str]) -> pl.DataFrame:
        data = self._untouched(name)
        with reading(self.place, f"{self.place.at(name)} cannot be read"):
            table = pl.read_parquet(BytesIO(data))
        if absent := [c for c in columns if c not in table.columns]:
            raise CorruptArtifact(f"{self.place.at(name)} lacks the columns {', '.join(absent)}")
        return table

    def read(self, site: str | Site, rows: Rows = None) -> torch.Tensor:
        """Rows of a site, (n, width), in the stored dtype and bit-exact.

        `site` may be a unit of a stored site, such as `attn.heads@3.2`. `rows`: None for all, a slice, row
        numbers in any order with repeats, a mask over all rows, or a polars series of either
        (`store.index["label"] == 1`). Only the chunks that hold wanted rows are read. Raises `UnknownSite`,
        `UsageError`, `IncompleteStore` if a wanted row has not been committed, `CorruptArtifact`.
        """
        wanted = row_numbers(rows, self.rows)
        return decode(self._read(*self._place(site), wanted), self.manifest.dtype)

    def where(self, condition: pl.Expr) -> RowNumbers:
        """Numbers of the rows, int64 and ascending, whose line of the index meets `condition`.

        `store.where(pl.col("label") == 1)` may be given as `rows` wherever rows are asked for. A null counts as
        not met. Raises `UsageError` for a column that the index lacks (and lists those it has), and for an
        expression that does not give one truth value per row.
        """
        return rows_where(condition, self.index)

    def _read(self, stored: StoredSite, columns: slice, wanted: "range | RowNumbers") -> NDArray[Any]:
        out = self._room(len(wanted), columns.stop - columns.start)
        self._fill(stored, columns, wanted, out)
        return out

    def _room(self, rows: int, width: int) -> NDArray[Any]:
        """An array for so many rows; `UsageError` if memory has no room for them."""
        dtype = stored_dtype(self.manifest.dtype)
        try:
            return np.empty((rows, width), dtype=dtype)
        except (MemoryError, ValueError) as error:
            raise UsageError(
                f"{rows} rows of {width} numbers take {rows * width * dtype.itemsize / 1e9:,.0f} GB, and there is no "
                f"room for them: read fewer of {self.place} at once, or in batches (iter)"
            ) from error

    def _fill(self, stored: StoredSite, columns: slice, wanted: "range | RowNumbers", out: NDArray[Any]) -> None:
        self._require_committed(shards := shards_of(wanted, self._grid))
        self._require_files(shards, stored)
        for run in runs(wanted, self._grid):
            out[run.put] = self._decoder(stored.site).read(run.start, run.stop, columns)[run.take]

    @overload
    def iter(  # type: ignore[overload-overlap]  # a str is an Iterable[str] too: the first signature wins
        self, sites: str | Site, *, batch_rows: int = ..., shuffle: int | None = ..., rows: Rows = ...
    ) -> Iterator[Batch[torch.Tensor]]: ...

    @overload
    def iter(
        self, sites: Iterable[str | Site], *, batch_rows: int = ..., shuffle: int | None = ..., rows: Rows = ...
    ) -> Iterator[Batch[dict[Site, torch.Tensor]]]: ...

    def iter(
        self,
        sites: str | Site | Iterable[str | Site],
        *,
        batch_rows: int = 1024,
        shuffle: int | None = None,
        rows: Rows = None,
    ) -> Iterator[Batch[torch.Tensor]] | Iterator[Batch[dict[Site, torch.Tensor]]]:
        """The wanted rows, each as often as `rows` names it, in batches of `batch_rows`: (row numbers, values).

        `sites` is one site, and the values are a tensor; or several, as an iterable of sites and patterns, and
        the values are a dict of tensors. `rows` as in `read`; None for all. The last batch may be shorter.

        Without `shuffle` the rows come in the order asked for (ascending is fastest). With `shuffle`, a seed,
        pieces of neighbouring chunks (about 8 MiB of the widest stored site, at least a chunk, at most a shard)
        come in random order from all shards, and rows are mixed with those of the other pieces in memory: as
        many as make up a shard, and at least four. The order is the same for the same seed and rows, whatever
        the sites and `batch_rows`.

        A thread reads ahead. In memory, of the read sites, are two pieces and a batch; shuffled, a shard or four
        pieces, whichever is more, and two pieces and a batch. A batch is a view of a block of about a piece: to
        keep a few rows for long, copy them. Errors as in `read`, before the first batch where they can be known.
        """
        wanted = row_numbers(rows, self.rows)
        order = Order(None if shuffle is None else (shuffle,))
        found = self.walk(self._expand(sites), wanted, order, batch_rows)
        if isinstance(sites, str | Site):
            return (Batch(b.rows, next(iter(b.values.values()))) for b in found)
        return found

    def walk(
        self, sites: tuple[Site, ...], wanted: "range | RowNumbers", order: Order, batch_rows: int
    ) -> Iterator[Batch[dict[Site, torch.Tensor]]]:
        """As `iter`, for checked row numbers and any `Order`: what `iter` and the data sets are made of."""
        check_batch_rows(batch_rows)
        bounds = order.bounds(len(wanted), batch_rows)
        places = {site: self._place(site) for site in sites}
        self._require_committed(shards_of(wanted, self._grid))
        # units of one stored site lie in the same chunks: what is between the first and the last is read once
        read: dict[Site, tuple[StoredSite, slice]] = {}
        for stored, columns in places.values():
            hull = read.get(stored.site, (stored, columns))[1]
            read[stored.site] = stored, slice(min(hull.start, columns.start), max(hull.stop, columns.stop))
        dtype = stored_dtype(self.manifest.dtype)
        piece = piece_rows(self._grid, max(s.width for s in self.manifest.sites) * dtype.itemsize)

        def empty(n: int) -> Arrays:
            # in one piece: from some MB on, memory comes in large pages, which costs far less
            widths = [c.stop - c.start for _, c in read.values()]
            parts = np.split(self._room(1, n * sum(widths))[0], n * np.cumsum(widths)[:-1])
            return {name: part.reshape(n, w) for name, part, w in zip(read, parts, widths, strict=True)}

        def fill(rows: "range | RowNumbers", room: Arrays) -> None:
            for name, (stored, columns) in read.items():
                self._fill(stored, columns, rows, room[name])

        source, n = Source(empty, fill), bounds[1] - bounds[0]
        if order.seed is None:
            found = batches(in_order(wanted, piece, bounds), source, batch_rows, rows=n)
        else:
            found = mixed(
                shuffled(wanted, self._grid, piece, order.seed, bounds),
                source,
                batch_rows,
                rows=n,
                piece=piece,
                held=mixed_pieces(self._grid, piece),
                rng=order.generator(),
            )

        def values(arrays: Arrays) -> dict[Site, torch.Tensor]:
            tensors = {name: decode(array, self.manifest.dtype) for name, array in arrays.items()}
            of = {site: (stored.site, columns, read[stored.site][1]) for site, (stored, columns) in places.items()}
            return {
                s: tensors[name][:, c.start - hull.start : c.stop - hull.start] for s, (name, c, hull) in of.items()
            }

        return (Batch(b.rows, values(b.values)) for b in found)

    def to_torch(
        self,
        sites: str | Site | Iterable[str | Site],
        *,
        batch_rows: int = 1024,
        shuffle: int | None = None,
        columns: Sequence[str] = ("label",),
        rows: Rows = None,
        share: tuple[int, int] = (0, 1),
        drop_last: bool = False,
    ) -> TorchBatches:
        """The wanted rows as an `IterableDataset`: give it to `DataLoader(…, batch_size=None, num_workers=…)`.

        It gives dicts: `row` (row numbers, int64), each of `columns` of the index (a tensor, or a list where it
        has text or nulls), and per site, under its name such as `resid.post@12`, a tensor (n, width) in the
        stored dtype. `sites`, `rows`, `batch_rows` and `shuffle` as in `iter`, and so is memory, per worker.

        Workers divide each epoch without overlap or loss; the last batch of each may be shorter. `share` is
        (rank, world): with it, so do the ranks of distributed training, equally to within a row. With
        `drop_last` every worker of every rank gets the same number of whole batches, and the few rows over are
        left out (others in each shuffled epoch). Shuffled, call `set_epoch(n)` before each epoch: the order
        depends on seed and n. Workers may be forked or spawned (spawned only for a store at a URL), and kept or
        not. The columns are held in memory, and copied to each worker that is spawned.

        Raises `UnknownSite`, `UsageError`, `IncompleteStore`; `CorruptArtifact` where rows are read.
        """
        if isinstance(columns, str):
            raise UsageError(f"columns is {columns!r}: give a list of names, such as [{columns!r}]")
        wanted = row_numbers(rows, self.rows)
        self._require_committed(shards_of(wanted, self._grid))
        return TorchBatches(
            self,
            self._expand(sites),
            wanted,
            columns,
            batch_rows=batch_rows,
            shuffle=shuffle,
            share=share,
            drop_last=drop_last,
        )

    def to_dataset(self, sites: str | Site | Iterable[str | Site] | None = None, rows: Rows = None) -> "Dataset":
        """The wanted rows, in the order asked for, as a memory-mapped `datasets.Dataset` of Hugging Face.

        It has the columns of the index, and per site (None for all that are stored), under its name, a list of
        float32 of fixed length, exact for every dtype. It is written in batches, once, to the cache folder of
        `datasets` (HF_DATASETS_CACHE, below `reprobe`), where it stays: it takes the size of the chosen rows
        in float32. Errors as in `read`.
        """
        from reprobe.store.hugging_face import to_dataset  # imports pyarrow and datasets, which nothing else needs

        chosen = self.sites if sites is None else self._expand(sites)
        return to_dataset(self, chosen, row_numbers(rows, self.rows))

    def content_digest(self, wanted: "range | RowNumbers") -> str:
        """sha256 (hex) over the manifest and the committed checksums of all shards that hold wanted rows."""
        self._require_committed(shards := shards_of(wanted, self._grid))
        files = {str(k): {name: f.sha256 for name, f in self._commit(k).files.items()} for k in shards}
        return digest({"manifest": self.manifest.digest, "files": files})

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

    def _commit(self, shard: int) -> Commit:
        if shard not in self._commits:
            self._commits[shard] = Commit.read(self.place, self.manifest, shard)
        return self._commits[shard]

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

    def _expand(self, sites: str | Site | Iterable[str | Site]) -> tuple[Site, ...]:
        """One site by its name (a pattern is none), or what the patterns of several match; all of them stored."""
        if isinstance(sites, str):
            found: tuple[Site, ...] = (Site.parse(sites),)
        else:
            found = (sites,) if isinstance(sites, Site) else expand(sites, self.parts)
        for site in found:
            self._place(site)
        return found

    def __getstate__(self) -> dict[str, Any]:
        """What `open` found, without the files that were opened since: they stay in their process."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

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
            name = format_of(self.manifest.format).shard_file(stored.site, k)
            want, have = self._commit(k).files[name].bytes, self.place.size(name)
            if have != want:
                found = "is missing" if have is None else f"has {have} bytes"
                raise CorruptArtifact(f"{self.place.at(name)} {found}, though {want} bytes were committed")
