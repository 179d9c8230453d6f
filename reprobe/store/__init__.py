"""Activations on disk: written once, read in any order, provably unchanged.

    manifest · what a store holds and where it came from
    layout   · names, shards, sizes, the bits of each dtype
    places   · where the bytes live: folders   object_store · and prefixes of object stores
    claim    · may this writer use this place  locks        · and who else is writing there
    formats  · how arrays become files         zarr_backend, hdf5_backend
    commit   · which shards are there, whole   writer       · create, resume, commit
    reader   · rows of sites, bit for bit      rows         · which rows, in which order
    order    · in which order epochs come      batches      · walking over rows in bounded memory
    torch_batches · for torch's DataLoader     hugging_face · as a datasets.Dataset
    verification  · is every byte as it was written?

Of a store's path come `StoreWriter.create`, `ActivationStore.open` and `verify`; the rest is for those who
look closer.
"""

from reprobe.store.batches import Batch
from reprobe.store.formats import size_on_disk
from reprobe.store.layout import INDEX_COLUMNS, Grid, Shard
from reprobe.store.manifest import Manifest, StoredSite
from reprobe.store.reader import ActivationStore, StoreInfo
from reprobe.store.torch_batches import TorchBatches
from reprobe.store.verification import VerifyReport, verify
from reprobe.store.writer import StoreWriter

__all__ = [
    "ActivationStore",
    "Batch",
    "Grid",
    "INDEX_COLUMNS",
    "Manifest",
    "Shard",
    "StoreInfo",
    "StoreWriter",
    "StoredSite",
    "TorchBatches",
    "VerifyReport",
    "size_on_disk",
    "verify",
]
