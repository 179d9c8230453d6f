"""A store as a data set of Hugging Face's `datasets`.

Enters: a store, sites, rows. Leaves: a memory-mapped `datasets.Dataset`: the columns of the index, and a list of
float32 of fixed length per site (exact: float32 holds every bfloat16 and float16). It is written batch by batch
to an Arrow file in the cache folder of `datasets`, under the digest of its content, so that asking again costs
nothing and a changed store never finds the file of another. Does not hold the store in memory.
"""

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import polars as pl
import pyarrow as pa

from reprobe.model.sites import Site
from reprobe.provenance import digest, digest_bytes
from reprobe.store.order import Order
from reprobe.store.rows import RowNumbers, numbers

if TYPE_CHECKING:
    from reprobe.store.reader import ActivationStore

#: Rows of a record batch, which is what is in memory at a time (besides what reading takes).
_RECORD_ROWS = 256
#: Part of the file's name: to be counted up when the same store is written in another way.
_VERSION = 1


def to_dataset(store: "ActivationStore", sites: tuple[Site, ...], wanted: "range | RowNumbers") -> datasets.Dataset:
    """See `ActivationStore.to_dataset`."""
    name = digest(
        {
            "version": _VERSION,
            "store": store.content_digest(wanted),
            "sites": [str(site) for site in sites],
            "rows": digest_bytes(np.ascontiguousarray(numbers(wanted)).data),
        }
    )
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "reprobe"
    path = folder / f"{name}.arrow"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        fd, temporary = tempfile.mkstemp(prefix=f".{name}.", suffix=".tmp", dir=folder)
        try:
            with os.fdopen(fd, "wb") as file:
                _write(store, sites, wanted, file)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)  # mkstemp makes files private
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    return datasets.Dataset.from_file(str(path))


def _write(store: "ActivationStore", sites: tuple[Site, ...], wanted: "range | RowNumbers", file: Any) -> None:
    schema = _schema(store, sites)
    with pa.ipc.new_stream(file, schema) as writer:
        for rows, values in store.walk(sites, wanted, Order(), _RECORD_ROWS):
            columns = [*_index(store, rows).columns]
            for tensor in values.values():
                flat = pa.array(tensor.float().contiguous().view(-1).numpy())
                columns.append(pa.FixedSizeListArray.from_arrays(flat, tensor.shape[1]))
            writer.write_table(pa.table(columns, names=schema.names).cast(schema))


def _schema(store: "ActivationStore", sites: tuple[Site, ...]) -> Any:
    """Names and types of the columns, with `datasets`' own description of them in the metadata."""
    index = _index(store, np.empty(0, dtype=np.int64)).schema
    # text with 64-bit offsets is what polars has; `datasets` counts on the plain kind
    fields = [(f.name, pa.string() if pa.types.is_large_string(f.type) else f.type) for f in index]
    fields += [(str(site), pa.list_(pa.float32(), store.read(site, []).shape[1])) for site in sites]
    return datasets.Features.from_arrow_schema(pa.schema(fields)).arrow_schema


def _index(store: "ActivationStore", rows: RowNumbers) -> Any:
    return store.index[rows].to_arrow(compat_level=pl.CompatLevel.oldest())
