"""A store as a data set of torch, for a `DataLoader`.

Enters: a store, sites, rows, columns of the index. Leaves: batches as dicts of tensors, each row once per epoch
whatever the number of workers and ranks. Does not know models or losses.

Every reader (each worker of each rank) has its own part of the epoch and opens the store itself: neither open
files nor threads are carried from one process to another, and polars, which does not survive a fork, is used
in the first process only. Neither does the client of object stores: their workers must be spawned.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch.utils.data import IterableDataset, get_worker_info

from reprobe.errors import UsageError
from reprobe.model.sites import Site
from reprobe.store.order import Order, check_batch_rows
from reprobe.store.rows import RowNumbers

if TYPE_CHECKING:
    from reprobe.store.reader import ActivationStore


class TorchBatches(IterableDataset[dict[str, Any]]):
    """What `ActivationStore.to_torch` gives; see there.

    Part of a reader: worker w of k on rank r of n reads part r·k + w of n·k, equal to the others within a row.
    """

    def __init__(
        self,
        store: "ActivationStore",
        sites: tuple[Site, ...],
        wanted: "range | RowNumbers",
        columns: Sequence[str],
        *,
        batch_rows: int,
        shuffle: int | None,
        share: tuple[int, int],
        drop_last: bool,
    ) -> None:
        self._store = store
        self._sites = sites
        self._wanted = wanted
        self._columns = {name: _column(store.index, name) for name in columns if name != "row"}
        self._batch_rows = check_batch_rows(batch_rows)
        self._shuffle = shuffle
        self._share = share
        self._drop_last = drop_last
        self._order(0, share)  # refuse malformed arguments here, not in a worker
        self._process = os.getpid()
        # in shared memory, so that workers that are kept from epoch to epoch see it change
        self._epoch = _shared(torch.zeros((), dtype=torch.int64))

    def set_epoch(self, epoch: int) -> None:
        """The number of the epoch that comes next, as for torch's `DistributedSampler`: another one, another
        order. It counts for every iteration that begins afterwards, in workers too."""
        if type(epoch) is not int or epoch < 0:
            raise UsageError(f"epoch is {epoch!r}: it must be a whole number, at least 0")
        self._epoch.fill_(epoch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if isinstance(self._store.path, str) and os.getpid() != self._process:
            raise UsageError(
                f"a forked worker cannot read {self._store.path}, because the client of object stores does not survive "
                "a fork: give the DataLoader multiprocessing_context='spawn'"
            )
        rank, world = self._share
        worker = get_worker_info()
        number, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        order = self._order(int(self._epoch), (rank * workers + number, world * workers))
        store = replace(self._store)  # without what another process may have opened
        for batch in store.walk(self._sites, self._wanted, order, self._batch_rows):
            out: dict[str, Any] = {"row": torch.from_numpy(batch.rows)}
            for name, column in self._columns.items():
                of_rows = column[batch.rows]
                out[name] = of_rows.tolist() if of_rows.dtype == object else torch.from_numpy(of_rows)
            yield out | {str(site): values for site, values in batch.values.items()}

    def _order(self, epoch: int, share: tuple[int, int]) -> Order:
        seed = None if self._shuffle is None else (self._shuffle, epoch)
        return Order(seed, *share, whole_batches=self._drop_last)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._process = os.getpid()
        self._epoch = _shared(self._epoch)


def _shared(tensor: torch.Tensor) -> torch.Tensor:
    shared: torch.Tensor = tensor.share_memory_()  # type: ignore[no-untyped-call]
    return shared


def _column(index: pl.DataFrame, name: str) -> NDArray[Any]:
    """A column by row: numbers and truth values as they are; texts, and anything with nulls, as Python objects."""
    if name not in index.columns:
        raise UsageError(f"the index has no column {name!r}; it has {', '.join(index.columns)}")
    column = index[name]
    if (column.dtype.is_numeric() or column.dtype == pl.Boolean) and not column.null_count():
        return np.array(column.to_numpy())
    out = np.empty(len(column), dtype=object)
    out[:] = column.to_list()
    return out
