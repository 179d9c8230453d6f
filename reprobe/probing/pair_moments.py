"""Moments of pair differences, streamed from a store larger than memory.

Enters: a store, rows with their pairs. Leaves: `PairMoments`, which `PCAReader.fit_moments` takes. Does not know
readers.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Integer

from reprobe.errors import UsageError
from reprobe.model.sites import Site
from reprobe.probing.moments import (
    Batches,
    FoldMoments,
    MomentsAccumulator,
    PairMoments,
    SiteMoments,
    finite_batches,
    packs,
)
from reprobe.probing.readers.pairing import sides
from reprobe.probing.rows import ProbeRows, require_pairs


def read_pair_moments(
    store: Batches,
    sites: Sequence[Site],
    rows: ProbeRows,
    *,
    fold: Integer[np.ndarray, " n"] | None = None,
    batch_rows: int = 1024,
    memory: int = 2 << 30,
) -> Iterator[SiteMoments[PairMoments]]:
    """The pair moments of each site, per fold, each site read once, pair by pair.

    Rows come in the order of their pairs, so that only the rows of a pair that a batch cuts are held back; where pairs
    lie far apart in the store, its chunks are read again. `fold`, which must not part a pair, `memory` (16 · width² ·
    folds for each site) and the rest as in `read_moments`. Raises `UsageError` for rows without a pair, pairs of one
    label, NaN and infinity.
    """
    pairs = require_pairs(rows, "PCAReader")
    folds = np.zeros(len(rows), dtype=np.int64) if fold is None else np.asarray(fold)
    n_folds = int(folds.max()) + 1
    first = np.full(int(pairs.max()) + 1, rows.rows.max())
    np.minimum.at(first, pairs, rows.rows)
    order = np.lexsort((rows.rows, pairs, first[pairs]))
    wanted, positive, folds, pairs = rows.rows[order], rows.positive[order], folds[order], pairs[order]
    if (folds[1:] != folds[:-1])[pairs[1:] == pairs[:-1]].any():
        raise UsageError("the folds part a pair: make them with the groups of these rows, which join pairs")
    ends = np.flatnonzero(np.append(pairs[1:] != pairs[:-1], True)) + 1
    widths = {site: store.width(site) for site in sites}
    for pack in packs({site: 16 * n_folds * width**2 for site, width in widths.items()}, memory):
        sums = {
            site: [(MomentsAccumulator(widths[site]), MomentsAccumulator(widths[site])) for _ in range(n_folds)]
            for site in pack
        }
        held = {site: np.empty((0, widths[site])) for site in pack}  # rows of a pair whose end is yet to come
        for site, place, X in finite_batches(store, pack, wanted, batch_rows):
            start = place.start - len(held[site])
            X = np.concatenate([held[site], X])
            whole = max(int(ends[ends <= place.stop].max(initial=0)), start)
            held[site] = X[whole - start :].copy()
            for k in np.unique(folds[start:whole]):
                here = np.flatnonzero(folds[start:whole] == k)
                codes = np.unique(pairs[start + here], return_inverse=True)[1]
                high, low, _ = sides(X[here], positive[start + here], codes, seed=0)
                difference, both = sums[site][k]
                difference.add(high - low)
                both.add(X[here])
        for site in pack:
            by_fold = (PairMoments(rows.classes, d.result(), r.result()) for d, r in sums.pop(site))
            yield SiteMoments(site, FoldMoments(tuple(by_fold)))
