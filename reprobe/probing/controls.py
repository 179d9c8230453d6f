"""Is it the representation or the probe? Selectivity against a control task, and the online code.

Enters: classes, types and groups of rows; a way to fit on other labels or on some rows. Leaves: selectivities, code
lengths in bits. Does not know stores or sites.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Integer

from reprobe.errors import UsageError
from reprobe.probing.calibration import Platt
from reprobe.probing.crossval import group_folds
from reprobe.probing.permutation import Refit, digest_arrays
from reprobe.probing.reader import Reader, TrainingRows
from reprobe.probing.refit import fit_on

#: Control tasks drawn; their mean accuracy is what is subtracted.
CONTROLS = 10
#: Shares of the rows at which the online code's blocks end (Voita & Titov 2020).
SCHEDULE = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.0625, 0.125, 0.25, 0.5, 1.0)


@dataclass(frozen=True, eq=False)
class Selectivity:
    """Accuracy on the task minus accuracy on control tasks, for each probe.

    `control` is the mean over the control tasks, `control_spread` their standard deviation. A high accuracy with low
    selectivity says that the probe could have learnt any labelling of the types.
    """

    accuracy: Float[np.ndarray, " probes"]
    control: Float[np.ndarray, " probes"]
    control_spread: Float[np.ndarray, " probes"]
    rows: str

    @property
    def selectivity(self) -> Float[np.ndarray, " probes"]:
        above: np.ndarray = self.accuracy - self.control
        return above


def selectivity(
    refit: Refit,
    positive: Bool[np.ndarray, " n"],
    types: Sequence[Any] | np.ndarray,
    folds: Integer[np.ndarray, " n"],
    *,
    controls: int = CONTROLS,
    seed: int = 0,
) -> Selectivity:
    """Hewitt & Liang 2019: the control task gives each *type* (a token, a city) one label, drawn at random.

    `types` names the type of each row; `refit` maps labels to held-out scores in `folds`, the same for task and
    control. A type must recur in several folds, or its random label cannot be learnt from other rows and the control
    is a coin: with types as groups that is always so, hence the split must then be by rows, and the accuracy is one
    of known types. Raises `UsageError` if fewer than half of the rows have their type in another fold. Labels of
    control tasks are drawn with the share of positive rows; a draw that gives all types one label, again at even odds.
    """
    names, which = np.unique(np.asarray(types), return_inverse=True)
    if len(names) < 2:
        raise UsageError(f"all rows are of one type ({names[0]!r}): a control task needs types to label at random")
    seen = np.zeros((len(names), int(folds.max()) + 1), dtype=bool)
    seen[which, folds] = True
    recurring = float((seen.sum(axis=1) > 1)[which].mean())
    if recurring < 0.5:
        raise UsageError(
            f"only {recurring:.0%} of the rows have their type in another fold, so a control task cannot be learnt: "
            "name types that recur across groups (the token, the template), or split types over the folds"
        )
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(controls):
        drawn = rng.random(len(names)) < positive.mean()
        while drawn[which].all() or not drawn[which].any():
            drawn = rng.random(len(names)) < 0.5
        labels = drawn[which]
        values.append(((refit(labels) > 0) == labels[:, None]).mean(axis=0))
    return Selectivity(
        accuracy=((refit(positive) > 0) == positive[:, None]).mean(axis=0),
        control=np.mean(values, axis=0),
        control_spread=np.std(values, axis=0),
        rows=digest_arrays(positive, which, folds),
    )


@dataclass(frozen=True, eq=False)
class OnlineCode:
    """The length of the labels' code when each block is coded by a probe fitted on the blocks before it.

    `ends[i]` is the number of rows coded after block i, `block_bits[i]` what block i cost. The first block is coded
    uniformly: one bit a row. `rows` is the digest of labels and groups.
    """

    ends: tuple[int, ...]
    block_bits: tuple[float, ...]
    rows: str

    @property
    def bits(self) -> float:
        return float(sum(self.block_bits))

    @property
    def uniform_bits(self) -> float:
        """One bit a row: what two classes cost without any probe."""
        return float(self.ends[-1])

    @property
    def compression(self) -> float:
        """uniform_bits / bits: 1 for a probe that knows nothing, the greater the easier the labels are read."""
        return self.uniform_bits / self.bits


def online_code(
    probabilities: Callable[[Integer[np.ndarray, " train"], Integer[np.ndarray, " test"]], Float[np.ndarray, " test"]],
    positive: Bool[np.ndarray, " n"],
    groups: Integer[np.ndarray, " n"],
    *,
    schedule: Sequence[float] = SCHEDULE,
    seed: int = 0,
) -> OnlineCode:
    """Voita & Titov 2020, with whole groups: minimum description length of the labels given the activations.

    `probabilities(train, test)` fits on the rows `train` and returns P(positive) of the rows `test` (see
    `reader_probabilities`). Groups come in an order drawn from `seed`; a block ends with the group in which its share
    of `schedule` is reached, so no group is coded by a probe that was fitted on part of it. Raises `UsageError` for a
    schedule that does not rise to 1, or a probability that rules out the label that is there.
    """
    shares = np.asarray(schedule, dtype=np.float64)
    if not len(shares) or shares[-1] != 1 or (np.diff(shares) <= 0).any() or shares[0] <= 0:
        raise UsageError(f"schedule={tuple(schedule)}: shares of the rows, rising to 1")
    n = int(groups.max()) + 1
    order = np.random.default_rng(seed).permutation(n)
    place = np.empty(n, dtype=np.int64)
    place[order] = np.arange(n)
    rows = np.argsort(place[groups], kind="stable")
    reached = np.cumsum(np.bincount(groups, minlength=n)[order])
    wanted = np.ceil(shares * len(rows))
    ends = np.unique(reached[np.searchsorted(reached, wanted)]).tolist()
    bits = [float(ends[0])]
    for start, end in pairwise(ends):
        block = rows[start:end]
        p = np.asarray(probabilities(rows[:start], block), dtype=np.float64)
        given = np.where(positive[block], p, 1 - p)
        if not (given > 0).all():
            raise UsageError(f"{int((~(given > 0)).sum())} rows have probability 0 (or NaN) for the label they have")
        bits.append(float(-np.log2(given).sum()))
    return OnlineCode(tuple(map(int, ends)), tuple(bits), digest_arrays(positive, groups))


def reader_probabilities(
    reader: Reader,
    X: Float[np.ndarray, "n width"],
    positive: Bool[np.ndarray, " n"],
    groups: Integer[np.ndarray, " n"],
    *,
    folds: int = 5,
    seed: int = 0,
) -> Callable[[Integer[np.ndarray, " train"], Integer[np.ndarray, " test"]], Float[np.ndarray, " test"]]:
    """How `online_code` asks any reader for probabilities: fitted on all training rows, scaled after Platt by scores
    held out inside the training rows, in `folds` that keep groups whole (as many as the groups of either class allow).

    Where the groups do not allow two folds with both classes, as before two groups of each class are there, nothing
    can be held out: the rows are then coded with the share of the classes so far, (n⁺+1)/(n+2). Pairs are not used.
    """

    everything = TrainingRows(X, positive, None, groups=groups)

    def probabilities(
        train: Integer[np.ndarray, " train"], test: Integer[np.ndarray, " test"]
    ) -> Float[np.ndarray, " test"]:
        y, fold = positive[train], _most_folds(positive[train], groups[train], folds, seed)
        if fold is None:
            return np.full(len(test), (y.sum() + 1) / (len(y) + 2))
        scores = np.empty(len(train))
        for k in np.unique(fold):
            held_out = fold == k
            scores[held_out] = fit_on(reader, everything, train[~held_out]).direction_.score(X[train[held_out]])
        return Platt.fit(scores, y).probabilities(fit_on(reader, everything, train).direction_.score(X[test]))

    return probabilities


def _most_folds(
    positive: Bool[np.ndarray, " n"], groups: Integer[np.ndarray, " n"], most: int, seed: int
) -> Integer[np.ndarray, " n"] | None:
    """Group-safe folds with both classes in each, as many as can be made up to `most`; None if not even two."""
    holding = min(len(np.unique(groups[positive])), len(np.unique(groups[~positive])))
    for n in range(min(most, holding), 1, -1):
        try:
            return group_folds(groups, positive, n, seed)
        except UsageError:  # the groups are too uneven for so many
            continue
    return None
