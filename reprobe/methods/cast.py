"""Conditional activation steering (Lee et al. 2024, arXiv:2409.05907): steer only the prompts that meet a condition.

Enters: condition directions, a store of what prompts with and without the condition hold on average, a behaviour's
interventions. Leaves: the `Condition` that tells the prompts apart best, by F1, and a `Steering` of the behaviour
behind that gate. Everything is searched offline. Does not know models.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import polars as pl
import torch
from jaxtyping import Bool, Float

from reprobe.control import Operator, Steering, When
from reprobe.control.gates import Measure
from reprobe.errors import UsageError
from reprobe.model.sites import Site
from reprobe.probing.direction import Direction, Label
from reprobe.probing.grid import Source, site_rows
from reprobe.probing.rows import ProbeRows, select_rows

#: Which tokens a gate takes the mean of, for each place at which a store may have been read.
_OVER = {"mean": "prompt", "last": "last"}


@dataclass(frozen=True)
class Rates:
    """How often a gate opens: of prompts that meet the condition, of the others, and F1 of the two together."""

    true: float
    false: float
    f1: float


@dataclass(frozen=True, eq=False)
class Condition:
    """The best gate, and a row for each site and side in `table`: `site`, `side` ("above" or "below"), `threshold`,
    `f1`, `true_rate` and `false_rate` on the prompts it was searched on, best first."""

    when: When
    table: pl.DataFrame


def search(
    store: Source,
    directions: Mapping[Site, Direction],
    *,
    measure: Measure = "abs_cosine",
    label: str = "label",
    positive: Label | None = None,
    where: pl.Expr | None = None,
) -> Condition:
    """The layer, threshold and side whose gate tells the prompts that meet a condition from the others best, by F1.

    `store` is read at="mean" (or "last"): one row per prompt, of which the `positive` label (by default the greater)
    meets the condition; `directions` has a condition direction for each site to try, such as `grid.directions` of
    `probe(store, PCAReader())`. The measure of a prompt is |cos(h̄, v̂)|, the paper's cos(h̄, proj_v h̄), or another of
    `When`. The paper walks a grid of thresholds; here every one that divides the prompts differently is tried, and lies
    halfway between the two nearest measures. Of equal F1 the one with the wider gap wins, then the earlier site. The
    rates are of the prompts searched on: for what they are elsewhere see `rates`. Raises `UnknownSite`, `UsageError`.
    """
    over = _over(store)
    rows = select_rows(store.index, label=label, positive=positive, where=where)
    cuts: list[_Cut] = []
    for site in sorted(directions, key=lambda s: s.depth):
        when = When(directions[site], above=0.0, measure=measure, over=over, site=site)
        cuts += _cuts(when, _measured(store, rows, when), rows.positive)
    if not cuts:
        raise UsageError("no site has two prompts of different measure: no threshold parts them")
    cuts.sort(key=lambda c: (-c.rates.f1, -c.gap, c.when.site.depth))
    table = pl.DataFrame(
        {
            "site": [str(c.when.site) for c in cuts],
            "side": ["below" if c.when.above is None else "above" for c in cuts],
            "threshold": [c.when.below if c.when.above is None else c.when.above for c in cuts],
            "f1": [c.rates.f1 for c in cuts],
            "true_rate": [c.rates.true for c in cuts],
            "false_rate": [c.rates.false for c in cuts],
        }
    )
    return Condition(cuts[0].when, table)


def rates(
    store: Source,
    when: When,
    *,
    label: str = "label",
    positive: Label | None = None,
    where: pl.Expr | None = None,
) -> Rates:
    """How often the gate opens for the prompts of a store, which is read as `search` wants it. Raises as `search`."""
    if _over(store) != str(when.over):
        raise UsageError(f"the gate is decided over {when.over}, and the store was read at {_at(store)!r}")
    rows = select_rows(store.index, label=label, positive=positive, where=where)
    values = _measured(store, rows, when)
    return _rates(_opened(when, values), rows.positive)


def fit(
    store: Source,
    directions: Mapping[Site, Direction],
    behaviour: Steering | Operator | Iterable[Operator],
    *,
    measure: Measure = "abs_cosine",
    label: str = "label",
    positive: Label | None = None,
    where: pl.Expr | None = None,
) -> Steering:
    """`behaviour` on the prompts that meet the condition, and on no others; decided per prompt, while it is read.

    The condition is that of `search`, among the directions whose site comes no later than the behaviour's first: a gate
    is read before what it gates. Raises `UsageError` if none does, or if part of the behaviour has a gate already, and
    what `search` does.
    """
    items = (
        behaviour.interventions
        if isinstance(behaviour, Steering)
        else (behaviour,)
        if isinstance(behaviour, Operator)
        else tuple(behaviour)
    )
    if not items or any(item.when is not None for item in items):
        raise UsageError("a behaviour is one intervention or several, without gates of their own")
    first = min(items, key=lambda item: item.site.depth).site
    early = {site: d for site, d in directions.items() if site.depth <= first.depth}
    if not early:
        raise UsageError(
            f"the behaviour acts from {first} on, and no condition direction is read up to there; they are of "
            f"{', '.join(map(str, directions)) or 'no site'}"
        )
    found = search(store, early, measure=measure, label=label, positive=positive, where=where)
    gated = [dataclasses.replace(item, when=found.when) for item in items]
    origin = dict(behaviour.provenance) if isinstance(behaviour, Steering) else {}
    made = {"method": "cast", "condition": str(found.when), "f1": found.table["f1"][0], "behaviour": origin}
    return Steering(*gated, name=f"CAST, {found.when}", provenance=made | {"store": store.manifest.digest})


def _measured(store: Source, rows: ProbeRows, when: When) -> Float[np.ndarray, " rows"]:
    """The gate's measure of each row, in float64."""
    mine, d = when.identity, when.direction
    if mine is not None:
        mine.require_same(store.manifest.identity, f"the condition at {when.site}")
    ((_, h),) = site_rows(store, (when.site,), rows)
    if when.measure == "score":
        return (d.score(h)) / d.scale
    cosine: np.ndarray = d.project(h) / np.linalg.norm(h, axis=1)
    return cosine if when.measure == "cosine" else np.abs(cosine)


@dataclass(frozen=True, eq=False)
class _Cut:
    """A gate, its rates, and the gap between the two measures that its threshold lies between."""

    when: When
    rates: Rates
    gap: float


def _cuts(when: When, values: Float[np.ndarray, " rows"], meets: Bool[np.ndarray, " rows"]) -> list[_Cut]:
    """The best gate by F1 that opens above a threshold, and the best that opens below one; none if all are equal."""
    order = np.argsort(values, kind="stable")
    rising, hits = values[order], np.cumsum(meets[order])
    ends = np.flatnonzero(np.diff(rising) > 0)  # a threshold fits after these places
    if not len(ends):
        return []
    gaps, middle = rising[ends + 1] - rising[ends], (rising[ends + 1] + rising[ends]) / 2
    total, below = int(meets.sum()), ends + 1
    cuts = []
    for side, hit, opened in (("above", total - hits[ends], len(values) - below), ("below", hits[ends], below)):
        best = np.lexsort((-gaps, -2 * hit / (opened + total)))[0]
        limit = float(middle[best])
        gate = When(
            when.direction,
            above=limit if side == "above" else None,
            below=limit if side == "below" else None,
            over=when.over,
            measure=when.measure,
            site=when.site,
        )
        cuts.append(_Cut(gate, _rates(_opened(gate, values), meets), float(gaps[best])))
    return cuts


def _opened(when: When, values: Float[np.ndarray, " rows"]) -> Bool[np.ndarray, " rows"]:
    opened: np.ndarray = when.opens(torch.from_numpy(values)).numpy()
    return opened


def _rates(opened: Bool[np.ndarray, " rows"], meets: Bool[np.ndarray, " rows"]) -> Rates:
    hit = int((opened & meets).sum())
    f1 = 2 * hit / (int(opened.sum()) + int(meets.sum()))
    return Rates(float(opened[meets].mean()), float(opened[~meets].mean()), f1)


def _at(store: Source) -> str:
    return str(store.manifest.plan.get("at", ""))


def _over(store: Source) -> str:
    """The gate's scope whose mean the store's rows are."""
    at = _at(store)
    if at not in _OVER:
        raise UsageError(
            f"the store was read at {at!r}; a gate is decided over a prompt's mean or its last token: extract with "
            "at='mean' or at='last'"
        )
    return _OVER[at]
