"""Means over groups, with 95 % intervals.

Enters: one number per question, prompt or text, and the group of each. Leaves: the mean and its bounds. What varies
are the groups (a question, a subject); see `reprobe.probing.intervals`, whose bootstrap this is.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from reprobe.probing.intervals import ClusterBootstrap, share_interval
from reprobe.probing.metrics import Weighted


@dataclass(frozen=True)
class Mean:
    """A mean and the bounds of its interval, which are None where there is one group only, or no finite mean."""

    mean: float
    low: float | None
    high: float | None


def mean_of(
    values: Float[np.ndarray, " rows"],
    groups: Sequence[Hashable] | None = None,
    *,
    weights: Float[np.ndarray, " rows"] | None = None,
    seed: int = 0,
) -> Mean:
    """Weighted mean of the rows, Σwv / Σw, with a cluster-bootstrap interval over `groups` (None: each row is one).

    Weights are what a row counts for, e.g. its tokens; the bootstrap draws groups, with all that they weigh.
    """
    values = np.asarray(values, np.float64)
    w = np.ones(len(values)) if weights is None else np.asarray(weights, np.float64)
    mean = float((w * values).sum() / w.sum())
    if not np.isfinite(mean):
        return Mean(mean, None, None)
    low, high = interval_of(
        # Groups that no draw has, and a weight of 0, would divide by 0.
        lambda drawn: ((w * values) @ drawn) / np.maximum(w @ drawn, np.finfo(float).tiny),
        range(len(values)) if groups is None else groups,
        seed=seed,
    )
    return Mean(mean, low, high)


def share_of(right: Float[np.ndarray, " rows"], groups: Sequence[Hashable]) -> Mean:
    """The share of ones among zeros and ones, with Wilson's interval for grouped rows, which does not shrink to a point
    where all are alike."""
    codes, share = _codes(groups), float(np.mean(right))
    if codes.max() == 0:
        return Mean(share, None, None)
    low, high = share_interval(np.asarray(right, bool)[:, None], codes)[:, 0]
    return Mean(share, float(low), float(high))


def interval_of(metric: Weighted, groups: Sequence[Hashable], *, seed: int = 0) -> tuple[float | None, float | None]:
    """Bounds of any metric of weighted rows, given the group of each row; None for a single group."""
    codes = _codes(groups)
    if codes.max() == 0:
        return None, None
    low, high = ClusterBootstrap.draw(codes, seed).bounds(metric)
    return float(low), float(high)


def _codes(groups: Sequence[Hashable]) -> np.ndarray:
    number = {group: i for i, group in enumerate(dict.fromkeys(groups))}
    return np.fromiter((number[group] for group in groups), np.int64, len(groups))
