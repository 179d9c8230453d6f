"""HDF5 as the format of the arrays: one file per shard, in it one dataset per site.

Enters: what a manifest says of the arrays, and rows as numpy arrays in their stored dtype. Leaves: the bytes
of each shard's file, and rows back. A file is made in memory and placed whole by the caller, because a killed
HDF5 writer leaves a file that cannot be opened. Does not know commits, checksums of files, or torch.

The bytes depend on the rows alone: no timestamps, one version of the file format. That version has checksums
in all its metadata, and each chunk has one of its own, so reading notices damage.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from reprobe.errors import CorruptArtifact
from reprobe.model.sites import Site
from reprobe.store.layout import Grid, Shard, array_name, hdf5_name, itemsize, stored_dtype
from reprobe.store.manifest import Manifest, StoredSite
from reprobe.store.places import Place, reading

_SHUFFLE, _FLETCHER32, _ZSTD = 2, 3, 32015  # numbers under which HDF5 knows its filters
_FILE_BYTES, _DATASET_BYTES, _CHUNK_BYTES = 4096, 1024, 24  # at most, besides the chunks themselves


def shard_file(site: Site, shard: int) -> str:
    """Path of the shard's file inside its store; it holds every site."""
    return hdf5_name(shard)


def metadata_files(site: Site) -> tuple[str, ...]:
    return ()


def libraries(compression: str | None) -> tuple[str, ...]:
    return ("h5py",) if compression is None else ("h5py", "hdf5plugin")


def array_bytes(widths: Iterable[int], grid: Grid, dtype: str, compression: str | None) -> int:
    total = 0
    for shard in grid.shards:
        total += _FILE_BYTES
        rows = _chunk_rows(shard, grid)
        chunks = -(-shard.rows // rows)
        for width in widths:
            chunk = rows * width * itemsize(dtype) + _CHUNK_BYTES
            # zstd's own bound on what it adds to data that it cannot compress
            chunk += 0 if compression is None else chunk // 256 + 64
            total += _DATASET_BYTES + chunks * chunk
    return total


def _chunk_rows(shard: Shard, grid: Grid) -> int:
    """HDF5 has no chunk larger than its dataset."""
    return min(grid.chunk_rows, shard.rows)


class Hdf5Encoder:
    """Turns rows into the bytes of HDF5 files, in memory."""

    metadata: Mapping[str, bytes] = {}

    def __init__(self, sites: Sequence[StoredSite], dtype: str, grid: Grid, compression: str | None) -> None:
        self._dtype = dtype
        self._grid = grid
        self._filters = {} if compression is None else {"shuffle": True, **_zstd()}

    def shard(self, shard: Shard, values: Mapping[Site, NDArray[np.generic]]) -> Iterator[tuple[str, bytes]]:
        file = _in_memory()
        try:
            for site, array in values.items():
                dataset = file.create_dataset(
                    array_name(site),
                    data=array,
                    chunks=(_chunk_rows(shard, self._grid), array.shape[1]),
                    fletcher32=True,
                    track_times=False,
                    **self._filters,
                )
                # of fixed length, so that they lie in the dataset's header, which has a checksum
                dataset.attrs["site"] = np.bytes_(str(site))
                dataset.attrs["dtype"] = np.bytes_(self._dtype)
            file.flush()
            data = file.id.get_file_image()
        finally:
            file.close()
        yield hdf5_name(shard.number), data


def _zstd() -> Any:
    import hdf5plugin  # makes the filter known to HDF5

    return hdf5plugin.Zstd(clevel=3)


def _in_memory() -> Any:
    """A new file that is never on disk, without timestamps, in the format of HDF5 1.10."""
    creation = h5py.h5p.create(h5py.h5p.FILE_CREATE)
    creation.set_obj_track_times(False)  # of the root group
    access = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
    access.set_fapl_core(2**20, False)
    access.set_libver_bounds(h5py.h5f.LIBVER_V110, h5py.h5f.LIBVER_V110)
    return h5py.File(h5py.h5f.create(b"shard", h5py.h5f.ACC_TRUNC, creation, access))


class Hdf5Decoder:
    def __init__(self, place: Place, manifest: Manifest, stored: StoredSite) -> None:
        self._place = place
        self._grid = manifest.grid
        self._stored = stored
        self._dtype = manifest.dtype
        self._filters = [_FLETCHER32] if manifest.compression is None else [_SHUFFLE, _ZSTD, _FLETCHER32]
        if manifest.compression is not None:
            _zstd()

    def read(self, start: int, stop: int, columns: slice) -> NDArray[Any]:
        shard = self._grid.shard(start // self._grid.shard_rows)
        name = hdf5_name(shard.number)
        with (
            reading(self._place, f"{self._place.at(name)}: rows {start}–{stop - 1} are damaged"),
            self._place.open(name) as bytes_of_shard,
            h5py.File(bytes_of_shard, "r") as file,
        ):
            dataset = self._dataset(file, shard)
            return np.asarray(dataset[start - shard.start : stop - shard.start, columns])

    def _dataset(self, file: Any, shard: Shard) -> Any:
        """The site's dataset, if it is what was written: HDF5 would follow links to other files, run other
        filters, and convert other dtypes (from int16 to uint16 by clipping)."""
        name, want = array_name(self._stored.site), stored_dtype(self._dtype)
        if not isinstance(file.get(name, getlink=True), h5py.HardLink):
            raise CorruptArtifact(f"{self._place.at(hdf5_name(shard.number))} has no dataset {name}")
        dataset = file[name]
        creation = dataset.id.get_create_plist()
        filters = [creation.get_filter(i)[0] for i in range(creation.get_nfilters())]
        exact = dataset.id.get_type().equal(h5py.h5t.py_create(want))
        shape, layout = (shard.rows, self._stored.width), creation.get_layout()
        if not exact or dataset.shape != shape or filters != self._filters or layout != h5py.h5d.CHUNKED:
            raise CorruptArtifact(
                f"{self._place.at(hdf5_name(shard.number))}: dataset {name} is {dataset.dtype} of shape "
                f"{dataset.shape} with filters {filters}, not {want} of shape {shape} with {self._filters}"
            )
        return dataset


encoder, decoder = Hdf5Encoder, Hdf5Decoder
