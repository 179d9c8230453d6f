"""zarr as the format of the arrays: one array per site, one file per site and shard.

Enters: what a manifest says of the arrays, and rows as numpy arrays in their stored dtype. Leaves: the bytes
of each metadata and shard file, and rows back. zarr encodes into memory and its files are placed by the
caller, because zarr's own `LocalStore` neither fsyncs a file nor its folder. Does not know commits, checksums
of files, or torch.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, ShardingCodec
from zarr.core.buffer import Buffer
from zarr.storage import MemoryStore

from reprobe.errors import CorruptArtifact
from reprobe.model.sites import Site
from reprobe.store.layout import ARRAYS, Grid, Shard, array_name, itemsize, stored_dtype
from reprobe.store.manifest import Manifest, StoredSite
from reprobe.store.places import Place, reading

_CHECKSUM_BYTES = 4  # crc32c of a chunk, and of a shard's index
_INDEX_ENTRY_BYTES = 16  # offset and length of a chunk in its shard
_BLOSC_BYTES = 16  # what Blosc adds to a chunk that it cannot compress


def shard_file(site: Site, shard: int) -> str:
    """Path of a site's shard file inside its store."""
    return f"{ARRAYS}/{array_name(site)}/c.{shard}.0"


def metadata_file(site: Site) -> str:
    """Path of a site's array metadata inside its store."""
    return f"{ARRAYS}/{array_name(site)}/zarr.json"


def metadata_files(site: Site) -> tuple[str, ...]:
    return (metadata_file(site),)


def libraries(compression: str | None) -> tuple[str, ...]:
    return () if compression is None else ("numcodecs",)


def array_bytes(widths: Iterable[int], grid: Grid, dtype: str, compression: str | None) -> int:
    per_chunk = _CHECKSUM_BYTES + (0 if compression is None else _BLOSC_BYTES)
    total = 0
    for width in widths:
        chunk = grid.chunk_rows * width * itemsize(dtype) + per_chunk
        index = grid.shard_rows // grid.chunk_rows * _INDEX_ENTRY_BYTES + _CHECKSUM_BYTES
        total += sum(math.ceil(s.rows / grid.chunk_rows) * chunk + index for s in grid.shards)
    return total


class ZarrEncoder:
    """Turns rows into the bytes of zarr's files, in memory."""

    def __init__(self, sites: Sequence[StoredSite], dtype: str, grid: Grid, compression: str | None) -> None:
        self._files: dict[str, Buffer] = {}
        memory = MemoryStore(self._files)
        zarr.create_group(memory, zarr_format=3)
        self._arrays = {s.site: _create(memory, s, dtype, grid, compression) for s in sites}
        #: The group's and each array's `zarr.json`.
        self.metadata = {f"{ARRAYS}/{name}": data.to_bytes() for name, data in self._files.items()}

    def shard(self, shard: Shard, values: Mapping[Site, NDArray[np.generic]]) -> Iterator[tuple[str, bytes]]:
        for site, array in values.items():
            self._arrays[site][shard.start : shard.stop] = array
            yield shard_file(site, shard.number), self._files.pop(f"{array_name(site)}/c.{shard.number}.0").to_bytes()


def _create(
    memory: MemoryStore, stored: StoredSite, dtype: str, grid: Grid, compression: str | None
) -> "zarr.Array[Any]":
    zstd = BloscCodec(cname="zstd", clevel=3, shuffle="shuffle", typesize=itemsize(dtype))
    return zarr.create_array(
        memory,
        name=array_name(stored.site),
        shape=(grid.rows, stored.width),
        dtype=stored_dtype(dtype),
        shards=(grid.shard_rows, stored.width),
        chunks=(grid.chunk_rows, stored.width),
        filters=None,
        # a checksum per chunk, so that reading a few rows notices damage too; last, so that damage is noticed
        # before it is decompressed
        compressors=[*([] if compression is None else [zstd]), Crc32cCodec()],
        fill_value=0,
        attributes={"site": str(stored.site), "dtype": dtype},
        chunk_key_encoding={"name": "default", "separator": "."},
        config={"write_empty_chunks": True},  # or zeros and holes look alike
    )


class ZarrDecoder:
    def __init__(self, place: Place, manifest: Manifest, stored: StoredSite) -> None:
        self._place = place
        self._what = place.at(f"{ARRAYS}/{array_name(stored.site)}")
        with reading(place, f"{self._what} cannot be opened"):
            self._array = zarr.open_array(
                place.zarr(), path=f"{ARRAYS}/{array_name(stored.site)}", mode="r", zarr_format=3
            )
            self._require_ours(manifest, stored)

    def _require_ours(self, manifest: Manifest, stored: StoredSite) -> None:
        """zarr would take other shapes for holes, and run whatever codecs are named."""
        grid, array = manifest.grid, self._array
        outer = getattr(array.metadata, "codecs", ())
        codecs = [type(codec) for c in outer for codec in (c, *getattr(c, "codecs", ()))]
        want = [ShardingCodec, BytesCodec, *([] if manifest.compression is None else [BloscCodec]), Crc32cCodec]
        layout = array.shape, array.shards, array.chunks, array.dtype, codecs
        width = stored.width
        if layout != (
            (grid.rows, width), (grid.shard_rows, width), (grid.chunk_rows, width), stored_dtype(manifest.dtype), want
        ):  # fmt: skip
            raise CorruptArtifact(f"{self._what} is not the array that the manifest says: {layout}")

    def read(self, start: int, stop: int, columns: slice) -> NDArray[Any]:
        with reading(self._place, f"{self._what}: rows {start}–{stop - 1} are damaged"):
            return np.asarray(self._array[start:stop, columns])


encoder, decoder = ZarrEncoder, ZarrDecoder
