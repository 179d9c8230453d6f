"""How often labels that mean nothing would look as good, over everything that was searched.

Enters: classes, groups and pairs of rows; a way to refit on other labels. Leaves: p-values. Does not know stores or
sites; what a "probe" is, is the caller's.

The labels are exchanged only where the null hypothesis allows it (Winkler et al. 2014, exchangeability blocks), each
time the probes are fitted anew, and the best of all probes under permuted labels is what the best one under the true
labels is compared with (max-statistic: Westfall & Young 1993; Nichols & Holmes 2002). So p includes the search, and
the adjusted p-values hold for all probes together.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Integer

from reprobe.errors import UsageError
from reprobe.probing.metrics import fold_aurocs
from reprobe.provenance import digest_bytes

#: Fits every probe on these labels and returns held-out scores: (n,) bool → (n, probes).
Refit = Callable[[Bool[np.ndarray, " n"]], Float[np.ndarray, "n probes"]]
#: Scores (n, probes) and labels (n,) → one number per probe, the greater the better.
Statistic = Callable[[Float[np.ndarray, "n probes"], Bool[np.ndarray, " n"]], Float[np.ndarray, " probes"]]

PERMUTATIONS = 999


@dataclass(frozen=True, eq=False)
class Exchange:
    """How labels may be exchanged if they mean nothing.

    `rule` says it in words. `flipped`: whole groups, all of whose rows are in pairs with as many rows of either
    class: the sides of all its pairs are swapped together. `constant`: groups of one class: their labels are
    exchanged among those of the same stratum. In all other groups labels are shuffled inside the group.
    """

    positive: Bool[np.ndarray, " n"]
    groups: Integer[np.ndarray, " n"]
    strata: Integer[np.ndarray, " groups"]
    flipped: Bool[np.ndarray, " groups"]
    constant: Bool[np.ndarray, " groups"]
    rule: str

    @classmethod
    def of(
        cls,
        positive: Bool[np.ndarray, " n"],
        groups: Integer[np.ndarray, " n"],
        pairs: Integer[np.ndarray, " n"] | None = None,
        folds: Integer[np.ndarray, " n"] | None = None,
    ) -> "Exchange":
        """What `groups` 0 … G−1 and `pairs` (−1: none) allow; whole groups are exchanged within `folds`.

        Folds spread the classes evenly, so they depend on the labels: exchanged across folds, the labels would
        lose that balance, and the true ones would stand out by it alone. Raises `UsageError` if nothing is left to
        exchange.
        """
        n = int(groups.max()) + 1
        strata = np.zeros(n, dtype=np.int64)
        if folds is not None:
            strata[groups] = folds
        size, high = np.bincount(groups, minlength=n), np.bincount(groups, weights=positive, minlength=n)
        flipped = np.zeros(n, dtype=bool)
        if pairs is not None:
            paired = pairs >= 0
            balance = np.bincount(pairs[paired], weights=np.where(positive[paired], 1.0, -1.0))
            even = paired.copy()
            even[paired] = balance[pairs[paired]] == 0
            flipped = (np.bincount(groups, weights=~even, minlength=n) == 0) & (size > 0)
        constant = ((high == 0) | (high == size)) & ~flipped
        mixed = ~constant & ~flipped
        parts = [
            (flipped, "the sides of all pairs of a group are swapped together"),
            (constant, "labels of whole groups are exchanged" + ("" if folds is None else " within folds")),
            (mixed, "labels are shuffled inside each group"),
        ]
        told = [f"{text} ({int(which.sum())} groups)" for which, text in parts if which.any()]
        movable = any(len(np.unique(high[constant & (strata == s)] > 0)) == 2 for s in np.unique(strata))
        if not (movable or flipped.any() or mixed.any()):
            raise UsageError("every group that could be exchanged has the same label: there is nothing to permute")
        return cls(positive, groups, strata, flipped, constant, "; ".join(told))

    def draws(self, n: int, seed: int) -> Iterator[Bool[np.ndarray, " n"]]:
        """`n` random exchanges of the labels."""
        rng = np.random.default_rng(seed)
        by_group = np.zeros(len(self.constant), dtype=bool)
        by_group[self.groups[self.positive]] = True
        blocks = [np.flatnonzero(self.constant & (self.strata == s)) for s in np.unique(self.strata)]
        mixed = np.flatnonzero(~(self.constant | self.flipped)[self.groups])
        inside = mixed[np.argsort(self.groups[mixed], kind="stable")]
        for _ in range(n):
            labels = self.positive.copy()
            turned = self.flipped & (rng.random(len(self.flipped)) < 0.5)
            labels ^= turned[self.groups]
            exchanged = by_group.copy()
            for block in blocks:
                exchanged[block] = rng.permutation(by_group[block])
            whole = self.constant[self.groups]
            labels[whole] = exchanged[self.groups][whole]
            labels[inside] = self.positive[inside[np.lexsort((rng.random(len(inside)), self.groups[inside]))]]
            yield labels


@dataclass(frozen=True, eq=False)
class Permutations:
    """What permuted labels gave.

    `observed` is the statistic of each probe with the true labels, `maxima` the best probe's under each permutation.
    `p` is of the best probe with the search included; `adjusted` of each probe, family-wise; `single` of each probe
    as if it had been the only one. All are (1 + number at least as good) / (1 + permutations), hence never 0.
    `rule` says how labels were exchanged, `rows` is the digest of labels, groups and pairs.
    """

    observed: Float[np.ndarray, " probes"]
    maxima: Float[np.ndarray, " permutations"]
    single: Float[np.ndarray, " probes"]
    rule: str
    seed: int
    rows: str

    @classmethod
    def of_all(cls, parts: Sequence["Permutations"]) -> "Permutations":
        """The result for all probes of several tests that drew the same labels: the search is over all of them.

        So probes need not be in memory together. Raises `UsageError` for tests of other rows, seeds or numbers.
        """
        first = parts[0]
        same = [(one.rule, one.seed, one.rows, len(one.maxima)) for one in parts]
        if len(set(same)) > 1:
            raise UsageError(
                "permutation tests go together if their rows, folds, seed and number of permutations agree"
            )
        return cls(
            observed=np.concatenate([one.observed for one in parts]),
            maxima=np.max([one.maxima for one in parts], axis=0),
            single=np.concatenate([one.single for one in parts]),
            rule=first.rule,
            seed=first.seed,
            rows=first.rows,
        )

    @property
    def adjusted(self) -> Float[np.ndarray, " probes"]:
        at_least = len(self.maxima) - np.searchsorted(np.sort(self.maxima), self.observed - _TIE, side="left")
        p: np.ndarray = (1 + at_least) / (1 + len(self.maxima))
        return p

    @property
    def p(self) -> float:
        return float(self.adjusted.min())


#: Statistics closer than this are equal: the same value, summed in another order, must count as "at least as good".
_TIE = 1e-12


def permutation_test(
    refit: Refit,
    positive: Bool[np.ndarray, " n"],
    groups: Integer[np.ndarray, " n"],
    pairs: Integer[np.ndarray, " n"] | None = None,
    *,
    folds: Integer[np.ndarray, " n"] | None = None,
    statistic: Statistic | None = None,
    permutations: int = PERMUTATIONS,
    seed: int = 0,
) -> Permutations:
    """Fit on `permutations` exchanges of the labels and compare with the true ones.

    `refit` must do with any labels all that was done with the true ones (scaling, folds, choices); its scores are
    judged by `statistic`, by default the AUROC against the labels it was given, as a mean over `folds` (None: the
    scores of all rows compare). `folds` also bound where labels of whole groups are exchanged. If the choice of one
    site is part of what is reported, let `refit` return the scores of that choice alone.
    """
    if permutations < 1:
        raise UsageError(f"{permutations} permutations: at least 1 is needed, and 999 give p-values down to 0.001")
    inside = np.zeros(len(positive), dtype=np.int64) if folds is None else folds
    judge: Statistic = statistic or (lambda scores, labels: fold_aurocs(scores, labels, inside))
    exchange = Exchange.of(positive, groups, pairs, folds)
    observed = judge(refit(positive), positive)
    maxima, at_least = np.empty(permutations), np.zeros(len(observed), dtype=np.int64)
    for b, labels in enumerate(exchange.draws(permutations, seed)):
        values = judge(refit(labels), labels)
        maxima[b] = values.max()
        at_least += values >= observed - _TIE
    parts = (positive, groups) if pairs is None else (positive, groups, pairs)
    return Permutations(
        observed=observed,
        maxima=maxima,
        single=(1 + at_least) / (1 + permutations),
        rule=exchange.rule,
        seed=seed,
        rows=digest_arrays(*parts),
    )


def digest_arrays(*arrays: np.ndarray) -> str:
    """sha256 (hex) of labels, groups and the like, as 64-bit integers: says on which rows a result rests."""
    return digest_bytes(b"".join(np.ascontiguousarray(a, dtype=np.int64).tobytes() for a in arrays))


class MeanDifferenceRefit:
    """Held-out scores of `MeanDifference` at many sites for any labels, without fitting reader by reader.

    `sites` are the rows of each, (n, width); `folds` those of the cross-validation. A call reads each site twice:
    once for the class sums of every fold, of which those of the training rows are differences, once for the scores.
    """

    def __init__(self, sites: Sequence[Float[np.ndarray, "n width"]], folds: Integer[np.ndarray, " n"]) -> None:
        self.folds = folds
        self._within = np.eye(int(folds.max()) + 1)[folds]
        # A mean difference does not depend on where the origin is; sums near it lose fewer digits.
        self._sites = [X - X.mean(axis=0) for X in sites]
        self._sums = [X.T @ self._within for X in self._sites]

    def __call__(self, labels: Bool[np.ndarray, " n"]) -> Float[np.ndarray, "n sites"]:
        """(n,) labels → (n, sites); above 0 is the positive class. `UsageError` if a fold leaves one class only."""
        high = self._within * labels[:, None]
        counts, n_high = self._within.sum(axis=0), high.sum(axis=0)
        n_train_high = n_high.sum() - n_high
        n_train_low = (counts.sum() - counts) - n_train_high
        if (n_train_high == 0).any() or (n_train_low == 0).any():
            raise UsageError("these labels leave one class without a training row: use fewer folds")
        scores = np.empty((len(labels), len(self._sites)))
        rows = np.arange(len(labels))
        for j, (X, sums) in enumerate(zip(self._sites, self._sums, strict=True)):
            of_high = X.T @ high
            of_low = sums - of_high
            mean_high = (of_high.sum(axis=1, keepdims=True) - of_high) / n_train_high
            mean_low = (of_low.sum(axis=1, keepdims=True) - of_low) / n_train_low
            theta = mean_high - mean_low
            middle = ((mean_high + mean_low) * theta).sum(axis=0) / 2
            length = np.maximum(np.linalg.norm(theta, axis=0), np.finfo(np.float64).tiny)
            scores[:, j] = (((X @ theta) - middle) / length)[rows, self.folds]
        return scores
