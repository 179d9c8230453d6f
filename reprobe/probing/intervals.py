"""How sure a metric is when rows come in groups: 95 % intervals that cover.

Enters: right/wrong marks, or a metric as a function of row weights, with the group of each row. Leaves: lower and
upper bounds. Does not know sites or readers.

Groups are what varies, not rows, since the rows of one group are not independent. The plain percentile interval of a
cluster bootstrap is too narrow with few groups, by √((G−1)/G) and for want of a t quantile, and it takes no account
of skewness (measured with 12 to 40 groups: 82–94 %). Used here instead:

- for a share, Wilson's interval with the effective number of rows and the t quantile of G − 1 degrees of freedom
  (Wilson 1927; effective size as in Korn & Graubard 1998). Unlike any bootstrap it does not shrink to a point where
  every row is right;
- for a calibration error, which is far above its true value where that is small, and in resamples even more so (a
  percentile or BCa interval then lies above it altogether), bootstrap test inversion (Carpenter 1999): all true errors
  under which the one found would be no rare outcome;
- for any other metric, the BCa bootstrap over groups (Efron 1987), its levels widened for the number of groups as in
  the expanded percentile interval (Hesterberg 2015, "What teachers should know about the bootstrap").

The fitted readers stay as they are; what is uncertain is their evaluation, on groups like these.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Integer, Num
from scipy.stats import norm, t

from reprobe.errors import UsageError
from reprobe.probing.metrics import FPR, Weighted, bin_of, bin_residuals, weighted_auroc, weighted_recall

RESAMPLES = 1000
LEVEL = 0.95
#: Numbers held at once while resampling, so that memory does not grow with rows × resamples.
_BLOCK = 1 << 22
#: The jackknife leaves out groups one by one up to this many, beyond it in as many blocks of groups.
_JACKKNIFE = 200


@dataclass(frozen=True)
class ClusterBootstrap:
    """`counts[g, b]` is how often group g is in resample b; `groups` the group of each row. Serves every site
    alike."""

    counts: Integer[np.ndarray, "groups resamples"]
    groups: Integer[np.ndarray, " rows"]

    @classmethod
    def draw(cls, groups: Integer[np.ndarray, " rows"], seed: int, resamples: int = RESAMPLES) -> "ClusterBootstrap":
        """Resamples of the groups 0 … n−1 named by `groups`; `UsageError` for a single one."""
        n = _count(groups)
        rng = np.random.default_rng(seed)
        counts = np.empty((n, resamples), dtype=np.uint16)
        for b in range(resamples):
            counts[:, b] = np.bincount(rng.integers(n, size=n), minlength=n)
        return cls(counts, groups)

    def accuracy(self, correct: Bool[np.ndarray, "rows sites"]) -> Float[np.ndarray, "2 sites"]:
        """Lower and upper bound of the share of correct rows, for every column at once. Draws nothing."""
        return share_interval(correct, self.groups)

    def auroc(
        self,
        scores: Float[np.ndarray, " rows"],
        positive: Bool[np.ndarray, " rows"],
        folds: Integer[np.ndarray, " rows"],
    ) -> Float[np.ndarray, " 2"]:
        """Lower and upper bound of `fold_auroc`. A fold that a resample leaves without one class does not count
        in it."""
        return self._within_unit(weighted_auroc(scores, positive, folds), positive)

    def macro_auroc(
        self,
        scores: Float[np.ndarray, "rows classes"],
        codes: Integer[np.ndarray, " rows"],
        folds: Integer[np.ndarray, " rows"],
    ) -> Float[np.ndarray, " 2"]:
        """Lower and upper bound of the mean over classes of the `fold_auroc` of each class against the others."""
        sides = [codes == c for c in range(scores.shape[1])]
        each = [weighted_auroc(scores[:, c], side, folds) for c, side in enumerate(sides)]
        rarest = min(sides, key=lambda side: len(np.unique(self.groups[side])))

        def mean(weights: Num[np.ndarray, "rows draws"]) -> Float[np.ndarray, " draws"]:
            found: np.ndarray = np.mean([auroc(weights) for auroc in each], axis=0)
            return found

        return self._within_unit(mean, rarest)

    def recall_at_fpr(
        self,
        scores: Float[np.ndarray, " rows"],
        positive: Bool[np.ndarray, " rows"],
        folds: Integer[np.ndarray, " rows"],
        fpr: float = FPR,
    ) -> Float[np.ndarray, " 2"]:
        """Lower and upper bound of `recall_at_fpr`, the threshold drawn anew in every resample."""
        return self._within_unit(weighted_recall(scores, positive, folds, fpr), positive)

    def calibration_error(
        self, probabilities: Float[np.ndarray, " rows"], positive: Bool[np.ndarray, " rows"]
    ) -> Float[np.ndarray, " 2"]:
        """Lower and upper bound of the true `calibration_error`; 0 is the lower one where the error found is what
        perfectly calibrated probabilities would show.

        The true errors tried are spread over the rows evenly, to the side found in each bin. Spread unevenly, a smaller
        one would have the same outcome, since noise adds most where there is no gap. Resampling gives the noise.
        """
        n = len(self.counts)
        residuals = bin_residuals(probabilities, positive)
        sums = np.stack([np.bincount(self.groups, weights=r, minlength=n) for r in residuals])
        sizes, counts = np.bincount(self.groups, minlength=n), self.counts.astype(np.float64)
        found = sums.sum(axis=1, keepdims=True) / len(probabilities)
        noise = (sums @ counts) / (sizes @ counts) - found
        rows = np.bincount(bin_of(probabilities), minlength=len(found))[:, None]
        spread = np.where(found < 0, -1, 1) * rows / len(probabilities)
        error = float(np.abs(found).sum())
        rare, common = norm.cdf(np.sqrt(n / (n - 1)) * _quantile(n) * np.array([-1.0, 1.0]))

        def outcome(true: float, level: float) -> float:
            return float(np.quantile(np.abs(true * spread + noise).sum(axis=0), level))

        low = _crossing(lambda true: outcome(true, common) - error)
        high = _crossing(lambda true: outcome(true, rare) - error)
        # No true error is likely to look so good: then the one found is the bound.
        return np.array([low, high or error])

    def bounds(self, metric: Weighted) -> Float[np.ndarray, " 2"]:
        """Lower and upper bound of any metric of weighted rows: BCa with expanded levels."""
        n, blocks = len(self.counts), min(len(self.counts), _JACKKNIFE)
        block = np.arange(n) * blocks // n
        estimate = float(metric(np.ones((len(self.groups), 1)))[0])
        left_out = self._values(metric, (block[:, None] != np.arange(blocks)).astype(np.uint16))
        return _bca(estimate, self._values(metric, self.counts), left_out, n)

    def _within_unit(self, metric: Weighted, positive: Bool[np.ndarray, " rows"]) -> Float[np.ndarray, " 2"]:
        """`bounds` of a metric between 0 and 1. At an end, where resamples do not vary, Wilson's bound for as many
        successes in a row as the rarer class has groups."""
        low, high = self.bounds(metric)
        if low == high and low in (0.0, 1.0):
            n = min(len(np.unique(self.groups[side])) for side in (positive, ~positive))
            reach = _quantile(len(self.counts)) ** 2
            reach = reach / (n + reach)
            low, high = (0.0, reach) if high == 0 else (1 - reach, 1.0)
        return np.array([low, high])

    def _values(self, metric: Weighted, counts: Integer[np.ndarray, "groups draws"]) -> Float[np.ndarray, " defined"]:
        """The metric in every draw in which it is defined."""
        values: np.ndarray = np.concatenate(
            [metric(counts[self.groups, part]) for part in self._parts(counts.shape[1])]
        )
        defined: np.ndarray = values[~np.isnan(values)]
        return defined

    def _parts(self, draws: int) -> Iterator[slice]:
        """Slices of the draws, few enough at a time for arrays with a line per row."""
        step = max(1, _BLOCK // len(self.groups))
        return (slice(a, a + step) for a in range(0, draws, step))


def share_interval(
    correct: Bool[np.ndarray, "rows columns"], groups: Integer[np.ndarray, " rows"]
) -> Float[np.ndarray, "2 columns"]:
    """Wilson's interval of the share of True in each column, for rows in groups 0 … n−1.

    The effective number of rows is what would give independent rows the variance between groups (linearised, with
    G/(G−1)); it is at most the number of rows, and the number of groups where all rows are alike.
    """
    n, rows = _count(groups), len(groups)
    right = np.stack([np.bincount(groups, weights=c, minlength=n) for c in correct.T], axis=1)
    share = right.sum(axis=0) / rows
    spread = right - share * np.bincount(groups, minlength=n)[:, None]
    variance = n / (n - 1) * (spread**2).sum(axis=0) / rows**2
    alike = (share == 0) | (share == 1)
    # The cap also serves groups that hold as many right as wrong rows each, which have no variance between them.
    effective = np.where(
        alike, n, share * (1 - share) / np.maximum(variance, np.where(alike, 1.0, share * (1 - share) / rows))
    )
    k2 = _quantile(n) ** 2
    centre = (share + k2 / (2 * effective)) / (1 + k2 / effective)
    half = np.sqrt(k2 * (share * (1 - share) / effective + k2 / (4 * effective**2))) / (1 + k2 / effective)
    bounds: np.ndarray = np.clip([centre - half, centre + half], 0, 1)
    return bounds


def _bca(
    estimate: float, samples: Float[np.ndarray, " draws"], left_out: Float[np.ndarray, " blocks"], n_groups: int
) -> Float[np.ndarray, " 2"]:
    """Bias-corrected and accelerated bounds at levels widened for the number of groups; NaN without any sample."""
    if not samples.size:
        return np.full(2, np.nan)
    # Half of the ties count as below: with few distinct values the bias would otherwise be that of the ties.
    below = (np.mean(samples < estimate) + np.mean(samples <= estimate)) / 2
    bias = norm.ppf(np.clip(below, 0.5 / len(samples), 1 - 0.5 / len(samples)))
    skew = left_out.mean() - left_out if left_out.size else np.zeros(1)
    scale = float((skew**2).sum()) ** 1.5
    acceleration = float((skew**3).sum()) / (6 * scale) if scale > 0 else 0.0
    z = np.sqrt(n_groups / (n_groups - 1)) * _quantile(n_groups) * np.array([-1.0, 1.0])
    levels = norm.cdf(bias + (bias + z) / np.maximum(1 - acceleration * (bias + z), 1e-3))
    bounds: np.ndarray = np.quantile(samples, levels)
    return bounds


def _crossing(rising: Callable[[float], float]) -> float:
    """The number from 0 at which a function becomes positive; 0 if it is so there."""
    low, high = 0.0, 0.1
    if rising(low) >= 0:
        return low
    while rising(high) < 0:
        low, high = high, 2 * high
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < 0 else (low, middle)
    return (low + high) / 2


def _quantile(n_groups: int) -> float:
    return float(t.ppf(1 - (1 - LEVEL) / 2, n_groups - 1))


def _count(groups: Integer[np.ndarray, " rows"]) -> int:
    n = int(groups.max()) + 1
    if n < 2:
        raise UsageError("all rows are of one group: how results vary between groups cannot be told from it")
    return n
