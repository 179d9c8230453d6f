"""Moments of pair differences, from rows or streamed from a store larger than memory.

Enters: rows with their pairs. Leaves: `PairMoments`, which `PCAReader.fit_moments` takes. Does not know readers.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Bool, Float, Integer

from reprobe.errors import UsageError
from reprobe.model.sites import Site
from reprobe.probing.direction import Label
from reprobe.probing.moments import (
    Batches,
    FoldMoments,
    Moments,
    MomentsAccumulator,
    PairMoments,
    SiteMoments,
    finite_batches,
    packs,
)
from reprobe.probing.readers.pairing import sides
from reprobe.probing.rows import ProbeRows, require_pairs


def pair_moments(
    X: Float[np.ndarray, "rows width"],
    positive: Bool[np.ndarray, " rows"],
    pairs: Integer[np.ndarray, " rows"],
    classes: tuple[Label, Label] = (False, True),
) -> PairMoments:
    """The moments of rows (n, width); `pairs` counts from 0. `UsageError` if a pair lacks a side."""
    high, low, _ = sides(X, positive, pairs, seed=0)
    return PairMoments(classes, Moments.of(high - low), Moments.of(X))


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
    widths = {site: int(store.read(site, wanted[:1]).shape[1]) for site in sites}
    for pack in packs({site: 16 * n_folds * width**2 for site, width in widths.items()}, memory):
        sums = {
            site: [(MomentsAccumulator(widths[site]), MomentsAccumulator(widths[site])) for _ in range(n_folds)]
            for site in pack
        }
        held = {site: np.empty((0, widths[site])) for site in pack}
        done = 0
        for place, values in finite_batches(store, pack, wanted, batch_rows):
            whole = ends[np.searchsorted(ends, place.stop, side="right") - 1] if ends[0] <= place.stop else done
            inside = slice(done, whole)
            for site, X in values.items():
                X = np.concatenate([held[site], X])
                held[site] = X[whole - done :]
                for k in np.unique(folds[inside]):
                    here = folds[inside] == k
                    codes = np.unique(pairs[inside][here], return_inverse=True)[1]
                    found = pair_moments(X[: whole - done][here], positive[inside][here], codes)
                    sums[site][k][0].merge(found.difference)
                    sums[site][k][1].merge(found.rows)
            done = whole
        for site in pack:
            by_fold = (PairMoments(rows.classes, d.result(), r.result()) for d, r in sums.pop(site))
            yield SiteMoments(site, FoldMoments(tuple(by_fold)))
