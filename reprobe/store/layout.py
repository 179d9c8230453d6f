"""How rows lie on disk: names, shard ranges, and the bits of each dtype.

Enters: counts of rows, widths, a dtype name, tensors. Leaves: a `Grid` (which rows form which shard and
chunk), the names of a store's files, and arrays whose bits are exactly those of the tensors. Does not open
files and knows neither zarr nor HDF5.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from reprobe.errors import UsageError
from reprobe.model.sites import Site

MANIFEST = "manifest.json"
INDEX = "index.parquet"
TOKENS = "tokens.parquet"
ARRAYS = "activations.zarr"
COMMITS = "commits"
LOCK = ".lock"

#: Columns that every index has; `position` and `token` are null where a row is the mean of several tokens.
INDEX_COLUMNS = ("row", "prompt", "position", "token", "label", "group", "pair", "n_tokens")

#: Columns of the table of tokens: a prompt's id and all its token ids, in the order of the index.
TOKEN_COLUMNS = ("prompt", "tokens")

#: Aim for the size of one shard over all sites together: large enough that a commit costs little beside the
#: writing, small enough that a kill loses seconds and a buffer of one shard fits any machine.
SHARD_BYTES = 64 * 2**20
#: A very large store has larger shards, so that its files stay countable: about so many, as long as a shard is no
#: larger than this, because two of them are in memory at once.
_MANY_SHARDS = 4096
_LARGEST_SHARD_BYTES = 2**30
#: A store of more would have more files than any file system is good at; a manifest that claims them is not ours.
_MOST_SHARDS = 2**24
#: Rows in an inner chunk, the unit of random reading: at most so many, and half of it where a row is wide.
CHUNK_ROWS = 1024
_WIDE_ROW_BYTES = 4096

#: zarr and HDF5 have no bfloat16: it is stored as its 16 bits.
_STORED: dict[str, np.dtype[Any]] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),
}
_TORCH = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Shard:
    """Rows `start` … `stop` − 1, written whole and once."""

    number: int
    start: int
    stop: int

    @property
    def rows(self) -> int:
        return self.stop - self.start

    def overlapping(self, ends: NDArray[np.int64]) -> range:
        """Which of several pieces have rows of this shard; piece i has the rows `ends[i]` … `ends[i + 1]` − 1."""
        first = int(np.searchsorted(ends, self.start, side="right")) - 1
        return range(first, int(np.searchsorted(ends, self.stop, side="left")))


@dataclass(frozen=True)
class Grid:
    """`rows` rows in shards of `shard_rows`, and those in chunks of `chunk_rows`; the last may be short."""

    rows: int
    shard_rows: int
    chunk_rows: int

    def __post_init__(self) -> None:
        for name in ("rows", "shard_rows", "chunk_rows"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)!r}: it must be a whole number, at least 1")
        if self.shard_rows % self.chunk_rows:
            raise UsageError(
                f"shard_rows={self.shard_rows} is not a multiple of chunk_rows={self.chunk_rows}: "
                "a shard holds whole chunks"
            )
        if self.n_shards > _MOST_SHARDS:
            raise UsageError(
                f"{self.rows} rows in shards of {self.shard_rows} are {self.n_shards} files: take larger ones"
            )

    @classmethod
    def of(
        cls,
        rows: int,
        row_bytes: Iterable[int],
        *,
        shard_rows: int | None = None,
        chunk_rows: int | None = None,
    ) -> "Grid":
        """The grid for `rows` rows whose sites take `row_bytes` bytes per row each.

        By default shards of about `SHARD_BYTES` over all sites (up to 1 GiB in stores of more than 256
        GiB), made as equal as possible, in chunks of 256–1024 rows (fewer only if there are fewer
        rows). A given `shard_rows` is rounded up to whole chunks; a given `chunk_rows` is cut to the
        shard.
        """
        row_bytes = tuple(row_bytes)
        if not row_bytes:
            raise UsageError("no site was given: there is nothing to store")
        for name, value in (("rows", rows), ("shard_rows", shard_rows), ("chunk_rows", chunk_rows)):
            if value is not None and value < 1:
                raise UsageError(f"{name} is {value}: it must be at least 1")
        cap = CHUNK_ROWS // 2 if max(row_bytes) > _WIDE_ROW_BYTES else CHUNK_ROWS
        if shard_rows is None:
            aim = min(max(SHARD_BYTES, rows * sum(row_bytes) // _MANY_SHARDS), _LARGEST_SHARD_BYTES)
            most = max(aim // sum(row_bytes), CHUNK_ROWS // 4)
            shard_rows = math.ceil(rows / math.ceil(rows / most))
            # equal shards may fall below the smallest chunk; a shorter last shard is better than tiny chunks
            shard_rows = min(rows, max(shard_rows, CHUNK_ROWS // 4))
        shard_rows = min(rows, shard_rows)
        if chunk_rows is None:
            chunk_rows = math.ceil(shard_rows / math.ceil(shard_rows / cap))
        chunk_rows = min(chunk_rows, shard_rows)
        return cls(rows, math.ceil(shard_rows / chunk_rows) * chunk_rows, chunk_rows)

    @property
    def n_shards(self) -> int:
        return math.ceil(self.rows / self.shard_rows)

    def shard(self, number: int) -> Shard:
        if not 0 <= number < self.n_shards:
            raise UsageError(f"there is no shard {number}: this store has shards 0–{self.n_shards - 1}")
        start = number * self.shard_rows
        return Shard(number, start, min(start + self.shard_rows, self.rows))

    @property
    def shards(self) -> tuple[Shard, ...]:
        return tuple(self.shard(k) for k in range(self.n_shards))


#: How arrays may be stored. Compression is a shuffle of bytes, then zstd.
FORMATS = ("zarr", "hdf5")
COMPRESSIONS = (None, "zstd")


def check_format(name: str, compression: str | None) -> None:
    """Raise `UsageError` unless there are such a format and compression."""
    if name not in FORMATS:
        raise UsageError(f"there is no store format {name!r}; there are {', '.join(FORMATS)}")
    if compression not in COMPRESSIONS:
        raise UsageError(f"there is no compression {compression!r}; there are {', '.join(map(str, COMPRESSIONS))}")


def check_dtype(dtype: str) -> str:
    """`dtype` itself if a store can hold it; raises `UsageError` otherwise."""
    if dtype not in _STORED:
        raise UsageError(f"a store cannot hold dtype {dtype!r}; it holds {', '.join(_STORED)}")
    return dtype


def stored_dtype(dtype: str) -> np.dtype[np.generic]:
    """The numpy dtype in which `dtype` lies on disk (bfloat16 as uint16)."""
    return _STORED[check_dtype(dtype)]


def torch_dtype(dtype: str) -> torch.dtype:
    """The torch dtype of that name; raises `UsageError` if a store cannot hold it."""
    return _TORCH[check_dtype(dtype)]


def itemsize(dtype: str) -> int:
    """Bytes per number."""
    return stored_dtype(dtype).itemsize


def encode(values: "torch.Tensor | NDArray[np.generic]", dtype: str) -> NDArray[np.generic]:
    """The array that lies on disk for `values`, bit for bit; raises `UsageError` if they are not of `dtype`.

    Nothing is converted: a silent cast would make the store differ from the model. A numpy array for a
    bfloat16 store holds the 16 bits, as uint16.
    """
    want = stored_dtype(dtype)
    if isinstance(values, torch.Tensor):
        if values.dtype != torch_dtype(dtype):
            raise UsageError(f"got {values.dtype}, but this store holds {dtype}: convert before writing")
        host = values.detach().cpu().contiguous()
        array = (host.view(torch.uint16) if dtype == "bfloat16" else host).numpy()
    else:
        array = np.ascontiguousarray(values)
    if array.dtype != want:
        bits = " (the 16 bits of each bfloat16)" if dtype == "bfloat16" else ""
        raise UsageError(f"got an array of {array.dtype}, but a {dtype} store takes {want}{bits}")
    return array


def decode(array: NDArray[np.generic], dtype: str) -> torch.Tensor:
    """The tensor for an array read from disk, bit for bit, sharing its memory."""
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor


def array_name(site: Site) -> str:
    """Name of a site's array in its format; `@` is not portable in names of zarr nodes."""
    return str(site).replace("@", "-")


def commit_name(shard: int) -> str:
    """Path of a shard's commit record inside its store."""
    return f"{COMMITS}/{shard:05d}.json"


def hdf5_name(shard: int) -> str:
    """Path of a shard's HDF5 file inside its store."""
    return f"activations-{shard:05d}.h5"


_NODE = rf"{re.escape(ARRAYS)}/[a-z.]+(?:-\d+)?"
_FOLDERS = re.compile(rf"{COMMITS}|{re.escape(ARRAYS)}|{_NODE}")
_OF_SHARD = re.compile(rf"{COMMITS}/(\d{{5,}})\.json|{_NODE}/c\.(\d+)\.0|activations-(\d{{5,}})\.h5")
_OF_STORE = re.compile(
    rf"{re.escape(MANIFEST)}|{re.escape(INDEX)}|{re.escape(TOKENS)}|{re.escape(ARRAYS)}/zarr\.json|{_NODE}/zarr\.json"
)
_TEMPORARY = re.compile(r"((?:.+/)?)\.([^/]+)\.[^./]+\.tmp")


def is_store_folder(relative: str) -> bool:
    """Whether a store may have a folder of this relative path."""
    return _FOLDERS.fullmatch(relative) is not None


def is_store_file(relative: str) -> bool:
    """Whether a store may have a file of this relative path (the lock and temporary files aside)."""
    return _OF_STORE.fullmatch(relative) is not None or shard_of(relative) is not None


def shard_of(relative: str) -> int | None:
    """Number of the shard that a file of this relative path belongs to; None if it belongs to none."""
    m = _OF_SHARD.fullmatch(relative)
    return None if m is None else int(next(filter(None, m.groups())))


def written_as(relative: str) -> str | None:
    """The file of a store whose interrupted durable write leaves a file of this path; None if there is none."""
    m = _TEMPORARY.fullmatch(relative)
    return m[1] + m[2] if m is not None and is_store_file(m[1] + m[2]) else None
