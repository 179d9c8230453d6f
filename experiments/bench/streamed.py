"""Read a store once within a limit of memory, and fit readers and an eraser at every site.

    python experiments/bench/streamed.py STORE BYTES

The limit is the kernel's, RLIMIT_DATA: beyond it allocations fail. Prints one JSON object: the peak of resident bytes
(VmHWM, which also counts libraries), how often the store was read, seconds, and what was fitted. Linux only.
"""

import json
import re
import resource
import sys
import time
from pathlib import Path

import numpy as np

import reprobe as rp
from reprobe.probing import read_moments
from reprobe.probing.crossval import group_folds
from reprobe.probing.rows import select_rows


class Counted:
    """A store, counting the values that go through `iter`."""

    def __init__(self, store: rp.ActivationStore) -> None:
        self._store = store
        self.values = 0

    def width(self, site):
        return self._store.width(site)

    def iter(self, *args, **options):
        for batch in self._store.iter(*args, **options):
            self.values += sum(v.numel() for v in batch.values.values())
            yield batch


def main(path: str, limit: str) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (int(limit), int(limit)))
    store = rp.ActivationStore.open(path)
    rows = select_rows(store.index)
    fold = group_folds(rows.groups, rows.positive, 2, seed=0)
    counted, found = Counted(store), 0
    start = time.perf_counter()
    for _site, folds in read_moments(counted, store.sites, rows, fold=fold, memory=int(limit) // 16):
        for moments in (folds.total, folds.without(0), folds.without(1)):
            for reader in (rp.MeanDifference(), rp.LDAReader(), rp.PCAReader(), rp.LEACE()):
                reader.fit_moments(moments)
                found += 1
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert peak is not None
    told = {
        "peak": int(peak[1]) * 1024,
        "reads": counted.values / (store.rows * sum(store.width(s) for s in store.sites)),
        "seconds": time.perf_counter() - start,
        "fits": found,
        "rows": int(np.asarray(rows.rows).size),
    }
    print(json.dumps(told))


if __name__ == "__main__":
    main(*sys.argv[1:])
