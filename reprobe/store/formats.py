"""The seam between a store and the format of its arrays.

Enters: the name of a format. Leaves: how it encodes shards into files and reads rows back, and how large it
is. A new format is a module with the functions that `Format` lists, and a line of the table.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from reprobe.model.sites import Site
from reprobe.store import hdf5_backend, zarr_backend
from reprobe.store.layout import Grid, Shard, check_format
from reprobe.store.manifest import Manifest, StoredSite
from reprobe.store.places import Place


class Encoder(Protocol):
    """Turns rows into the bytes of files, in memory: placing them durably is for the writer."""

    @property
    def metadata(self) -> Mapping[str, bytes]:
        """Relative path → bytes of every file that belongs to no shard."""
        ...

    def shard(self, shard: Shard, values: Mapping[Site, NDArray[np.generic]]) -> Iterator[tuple[str, bytes]]:
        """Relative path and bytes of each file of a shard, one by one.

        `values` are (shard.rows, width) per site, in the stored dtype.
        """
        ...


class Decoder(Protocol):
    """Reads rows of a site's array. Only the chunks that hold wanted rows are read."""

    def read(self, start: int, stop: int, columns: slice) -> NDArray[Any]:
        """Rows `start` … `stop` − 1, all of one shard; raises `CorruptArtifact` if a checksum is wrong."""
        ...


class Format(Protocol):
    """What a module must have to be a format."""

    def encoder(self, sites: Sequence[StoredSite], dtype: str, grid: Grid, compression: str | None) -> Encoder: ...

    def decoder(self, place: Place, manifest: Manifest, stored: StoredSite) -> Decoder: ...

    def metadata_files(self, site: Site) -> tuple[str, ...]:
        """Files that must be as they were written before the site's array may be read."""
        ...

    def shard_file(self, site: Site, shard: int) -> str:
        """The file that holds the site's rows of a shard."""
        ...

    def array_bytes(self, widths: Iterable[int], grid: Grid, dtype: str, compression: str | None) -> int:
        """As `size_on_disk`."""
        ...

    def libraries(self, compression: str | None) -> tuple[str, ...]:
        """Distributions, besides those of `provenance.versions`, whose version may change the bytes."""
        ...


_TABLE: dict[str, Format] = {"zarr": zarr_backend, "hdf5": hdf5_backend}


def format_of(name: str) -> Format:
    """The format of that name, which `check_format` has passed."""
    return _TABLE[name]


def shard_files(manifest: Manifest, shard: int) -> tuple[str, ...]:
    """Relative paths of all files of a shard, its commit record aside."""
    backend = format_of(manifest.format)
    return tuple(dict.fromkeys(backend.shard_file(s.site, shard) for s in manifest.sites))


def size_on_disk(
    widths: Iterable[int],
    grid: Grid,
    dtype: str,
    *,
    format: str = "zarr",  # noqa: A002
    compression: str | None = None,
) -> int:
    """Bytes that all shard files of a store will take; index and records come on top.

    Exact for zarr without compression. Otherwise an upper bound: for HDF5 close to the truth (at most 4 kB per
    shard, 1 kB per site of it and 24 bytes per chunk are allowed for), with compression reached only by rows
    that do not compress at all.
    """
    check_format(format, compression)
    return format_of(format).array_bytes(widths, grid, dtype, compression)
