"""How well scores separate two classes, and how sure that is when rows come in groups.

Enters: held-out scores or right/wrong marks, with the group and fold of each row. Leaves: AUROCs and 95 %
intervals. Does not know sites or readers.

Intervals are percentile cluster bootstraps: groups, not rows, are drawn with replacement, as often as there
are groups, since the rows of one group are not independent. The fitted readers stay as they are; what is
resampled is their evaluation.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Integer
from scipy.stats import rankdata

RESAMPLES = 1000
LEVEL = 0.95
#: Numbers held at once while resampling, so that memory does not grow with rows × resamples.
_BLOCK = 1 << 22


@dataclass(frozen=True)
class ClusterBootstrap:
    """`counts[g, b]` is how often group g is in resample b; `groups` the group of each row. Serves every site
    alike."""

    counts: Integer[np.ndarray, "groups resamples"]
    groups: Integer[np.ndarray, " rows"]

    @classmethod
    def draw(cls, groups: Integer[np.ndarray, " rows"], seed: int, resamples: int = RESAMPLES) -> "ClusterBootstrap":
        """Resamples of the groups 0 … n−1 named by `groups`."""
        n = int(groups.max()) + 1
        rng = np.random.default_rng(seed)
        counts = np.empty((n, resamples), dtype=np.uint16)
        for b in range(resamples):
            counts[:, b] = np.bincount(rng.integers(n, size=n), minlength=n)
        return cls(counts, groups)

    def accuracy(self, correct: Bool[np.ndarray, "rows sites"]) -> Float[np.ndarray, "2 sites"]:
        """Lower and upper bound of the share of correct rows, for every column at once."""
        n = len(self.counts)
        right = np.stack([np.bincount(self.groups, weights=c, minlength=n) for c in correct.T], axis=1)
        size = np.bincount(self.groups, minlength=n)
        shares = []
        for part in self._parts(n):
            times = self.counts[:, part].T.astype(np.float64)
            shares.append((times @ right) / (times @ size)[:, None])
        return _bounds(np.concatenate(shares))

    def auroc(
        self,
        scores: Float[np.ndarray, " rows"],
        positive: Bool[np.ndarray, " rows"],
        folds: Integer[np.ndarray, " rows"],
    ) -> Float[np.ndarray, " 2"]:
        """Lower and upper bound of `fold_auroc`. A fold that a resample leaves without one class does not
        count in it.

        Per fold, the negatives are sorted once; what a positive beats is then a running sum of resampled
        counts.
        """
        total, used = np.zeros(self.counts.shape[1]), np.zeros(self.counts.shape[1])
        for fold in np.unique(folds):
            high, low = (
                np.flatnonzero((folds == fold) & positive),
                np.flatnonzero((folds == fold) & ~positive),
            )
            low = low[np.argsort(scores[low])]
            below = np.searchsorted(scores[low], scores[high], side="left")
            not_above = np.searchsorted(scores[low], scores[high], side="right")
            for part in self._parts(len(high) + len(low)):
                n_high = self.counts[self.groups[high], part].astype(np.float64)
                n_low = self.counts[self.groups[low], part]
                beaten = np.zeros((len(low) + 1, n_low.shape[1]))
                np.cumsum(n_low, axis=0, out=beaten[1:])
                wins = np.einsum("rb,rb->b", n_high, beaten[below] + beaten[not_above]) / 2
                pairs = n_high.sum(axis=0) * beaten[-1]
                total[part] += np.divide(wins, pairs, out=np.zeros_like(wins), where=pairs > 0)
                used[part] += pairs > 0
        return _bounds((total[used > 0] / used[used > 0])[:, None])[:, 0]

    def _parts(self, rows: int) -> Iterator[slice]:
        """Slices of the resamples, few enough at a time for arrays of `rows` lines."""
        step = max(1, _BLOCK // rows)
        return (slice(a, a + step) for a in range(0, self.counts.shape[1], step))


def fold_auroc(
    scores: Float[np.ndarray, " rows"], positive: Bool[np.ndarray, " rows"], folds: Integer[np.ndarray, " rows"]
) -> float:
    """The mean over folds of the AUROC within each fold; ties count half.

    Not pooled over folds: each fold's reader has its own scale and offset, so scores of two folds do not
    compare.
    """
    values = []
    for fold in np.unique(folds):
        inside = folds == fold
        ranks, high = rankdata(scores[inside]), positive[inside]
        n_high, n_low = int(high.sum()), int((~high).sum())
        values.append((ranks[high].sum() - n_high * (n_high + 1) / 2) / (n_high * n_low))
    return float(np.mean(values))


def _bounds(samples: Float[np.ndarray, "resamples columns"]) -> Float[np.ndarray, "2 columns"]:
    tail = (1 - LEVEL) / 2
    bounds: np.ndarray = np.quantile(samples, [tail, 1 - tail], axis=0)
    return bounds
