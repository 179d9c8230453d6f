"""zarr as the format of the arrays: one array per site, one file per shard.

Enters: what a manifest says of the arrays, and rows as numpy arrays in their stored dtype. Leaves: the bytes
of each metadata and shard file, and rows back. zarr encodes into memory and its files are placed on disk by
the caller, because zarr's own `LocalStore` neither fsyncs a file nor its folder. Does not know commits,
checksums of files, or torch.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec
from zarr.core.buffer import Buffer
from zarr.storage import LocalStore, MemoryStore

from reprobe.errors import CorruptArtifact
from reprobe.model.sites import Site
from reprobe.store.layout import ARRAYS, Grid, Shard, array_name, stored_dtype
from reprobe.store.manifest import StoredSite


def shard_file(site: Site, shard: int) -> str:
    """Path of a site's shard file inside its store."""
    return f"{ARRAYS}/{array_name(site)}/c.{shard}.0"


def metadata_file(site: Site) -> str:
    """Path of a site's array metadata inside its store."""
    return f"{ARRAYS}/{array_name(site)}/zarr.json"


class Encoder:
    """Turns rows into the bytes of zarr's files, in memory."""

    def __init__(self, sites: Sequence[StoredSite], dtype: str, grid: Grid) -> None:
        self._files: dict[str, Buffer] = {}
        memory = MemoryStore(self._files)
        zarr.create_group(memory, zarr_format=3)
        self._arrays = {s.site: _create(memory, s, dtype, grid) for s in sites}
        #: Relative path → bytes of every metadata file: the group's and each array's `zarr.json`.
        self.metadata = {f"{ARRAYS}/{name}": data.to_bytes() for name, data in self._files.items()}

    def shard(self, site: Site, shard: Shard, values: NDArray[np.generic]) -> bytes:
        """Bytes of the shard file that holds `values`, shaped (shard.rows, width), in the stored dtype."""
        self._arrays[site][shard.start : shard.stop] = values
        return self._files.pop(f"{array_name(site)}/c.{shard.number}.0").to_bytes()


def _create(memory: MemoryStore, stored: StoredSite, dtype: str, grid: Grid) -> "zarr.Array[Any]":
    return zarr.create_array(
        memory,
        name=array_name(stored.site),
        shape=(grid.rows, stored.width),
        dtype=stored_dtype(dtype),
        shards=(grid.shard_rows, stored.width),
        chunks=(grid.chunk_rows, stored.width),
        filters=None,
        # not a compressor: a checksum per chunk, so that reading a few rows notices damage too
        compressors=[Crc32cCodec()],
        fill_value=0,
        attributes={"site": str(stored.site), "dtype": dtype},
        chunk_key_encoding={"name": "default", "separator": "."},
        config={"write_empty_chunks": True},  # or zeros and holes look alike
    )


class Decoder:
    """Reads rows of a site's array from a store's folder. Only the chunks that hold wanted rows are read."""

    def __init__(self, folder: Path, site: Site) -> None:
        self._what = folder / ARRAYS / array_name(site)
        try:
            self._array = zarr.open_array(
                LocalStore(folder / ARRAYS, read_only=True), path=array_name(site), mode="r", zarr_format=3
            )
        except (OSError, MemoryError):
            raise
        except Exception as error:  # damaged metadata can fail anywhere inside zarr
            raise CorruptArtifact(f"{self._what} cannot be opened ({type(error).__name__}: {error})") from error

    def read(self, start: int, stop: int, columns: slice) -> NDArray[np.generic]:
        """Rows `start` … `stop` − 1 of the columns; raises `CorruptArtifact` if a checksum is wrong."""
        try:
            return np.asarray(self._array[start:stop, columns])
        except (OSError, MemoryError):
            raise
        except Exception as error:  # damaged bytes can fail anywhere inside zarr
            raise CorruptArtifact(
                f"{self._what}: rows {start}–{stop - 1} are damaged ({type(error).__name__}: {error}). "
                "verify() lists all that is."
            ) from error
