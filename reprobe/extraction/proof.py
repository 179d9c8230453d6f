"""Replaying a store: does this model give the activations that are stored?

Enters: a store, a language model, and how many prompts to run again. Leaves: a `Replay`, which says at every site
how far the stored rows are from those that the model gives now, and where they are too far, what they match instead.
It runs the stored token ids, never text, in batches of its own. Does not know checksums (`store.verify` looks at
bytes) nor how directions are found.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray

from reprobe.errors import IdentityMismatch, IncompleteStore, UsageError
from reprobe.extraction.diagnosis import diagnose
from reprobe.extraction.difference import row_differences, tolerance_of
from reprobe.extraction.ledger import Ints, Ledger
from reprobe.model.hooks import board_of
from reprobe.model.identity import ModelIdentity, short
from reprobe.model.language_model import LanguageModel
from reprobe.model.packs import plan_packs
from reprobe.model.sites import Site, expand
from reprobe.progress import Progress, silent
from reprobe.store import ActivationStore

#: Prompts that are run again unless the caller says otherwise.
SAMPLE = 64
#: Padded tokens of one pass: other than an extraction's, so that a row is computed in other company.
BATCH_TOKENS = 384


class Scorer(Protocol):
    """What replaying needs to know of a `Direction`."""

    @property
    def site(self) -> Site | None: ...
    @property
    def scale(self) -> float: ...
    @property
    def identity(self) -> ModelIdentity | None: ...
    def score(self, h: Float[np.ndarray, "rows width"], /) -> Float[np.ndarray, " rows"]: ...


@dataclass(frozen=True)
class Where:
    """A row of the store: its number, its prompt's id, and its token's position (None: the mean of all)."""

    row: int
    prompt: str
    position: int | None


@dataclass(frozen=True)
class SiteReplay:
    """One site. `worst` and `median` are row differences (`difference.row_differences`); `at` is the worst row.

    `beyond` rows of `rows` are farther than the tolerance. `not_finite` rows hold NaN or infinity in the store,
    which count as equal if the model gives the same. `diagnosis` says what the rows beyond look like.
    """

    site: Site
    rows: int
    worst: float
    median: float
    at: Where
    beyond: int
    not_finite: int
    diagnosis: str | None

    @property
    def ok(self) -> bool:
        return self.beyond == 0


@dataclass(frozen=True)
class DirectionReplay:
    """One direction on stored and replayed rows.

    `drift` is the greatest change of a score, in scales of the direction, and `at` its row. `flips` rows change
    sides; `margin` is the greatest distance from the boundary, in scales, from or to which one of them goes.
    """

    site: Site
    rows: int
    drift: float
    at: Where
    flips: int
    margin: float
    tolerance: float

    @property
    def ok(self) -> bool:
        """Whether no row changes sides, but those that are within the tolerance of the boundary before and after."""
        return self.margin <= self.tolerance


@dataclass(frozen=True)
class Replay:
    """Whether a store is of a model. `sites` and `directions` are empty if `problems` left nothing to compare.

    `identity` holds the fields that differ, as (the store's, the model's); they are among the `problems` unless a
    mismatch was allowed.
    """

    path: Path | str
    model: str
    tolerance: float
    identity: Mapping[str, tuple[Any, Any]]
    problems: tuple[str, ...]
    prompts: int
    of_prompts: int
    sites: tuple[SiteReplay, ...]
    directions: tuple[DirectionReplay, ...]

    @property
    def ok(self) -> bool:
        """Whether the store holds this model's activations: no problem, and all within the tolerance."""
        return not self.problems and all(s.ok for s in self.sites) and all(d.ok for d in self.directions)

    @property
    def unlike(self) -> tuple[str, ...]:
        """A sentence for each field in which the identities differ, allowed or not."""
        return tuple(_unlike(name, there, here) for name, (there, here) in self.identity.items())

    @property
    def worst(self) -> SiteReplay | None:
        """The site whose worst row is the farthest off; None if nothing was compared."""
        return max(self.sites, key=lambda s: s.worst, default=None)

    @property
    def failed(self) -> tuple[SiteReplay, ...]:
        """The sites that are beyond the tolerance."""
        return tuple(s for s in self.sites if not s.ok)

    def to_json(self) -> dict[str, Any]:
        """Everything as plain JSON; numbers that are not finite become text."""

        def where(at: Where) -> dict[str, Any]:
            return {"row": at.row, "prompt": at.prompt, "position": at.position}

        return {
            "path": str(self.path),
            "model": self.model,
            "ok": self.ok,
            "tolerance": self.tolerance,
            "identity": {name: {"store": a, "model": b} for name, (a, b) in self.identity.items()},
            "problems": list(self.problems),
            "prompts": self.prompts,
            "of_prompts": self.of_prompts,
            "sites": [
                {
                    "site": str(s.site), "ok": s.ok, "rows": s.rows, "worst": _number(s.worst),
                    "median": _number(s.median), **where(s.at), "beyond": s.beyond, "not_finite": s.not_finite,
                    "diagnosis": s.diagnosis,
                }
                for s in self.sites
            ],
            "directions": [
                {
                    "site": str(d.site), "ok": d.ok, "rows": d.rows, "drift": _number(d.drift), **where(d.at),
                    "flips": d.flips, "margin": _number(d.margin),
                }
                for d in self.directions
            ],
        }  # fmt: skip


def replay(
    store: ActivationStore,
    lm: LanguageModel,
    *,
    sample: int | None = SAMPLE,
    seed: int = 0,
    directions: Sequence[Scorer] = (),
    tolerance: float | None = None,
    allow_mismatch: bool = False,
    progress: Progress = silent,
) -> Replay:
    """Compute the rows of `sample` prompts (None: of all) again from their stored tokens, and compare.

    Prompts are drawn by `seed` among those whose rows are all written. A row passes if its difference, relative to
    its scale (`difference.row_differences`), is at most `tolerance`: by default what rounding and the composition
    of batches alone may give (`difference.tolerance_of`) for the dtypes of the model, of the store's model and of
    the store. Another identity is a problem and ends the replay, unless `allow_mismatch`: then the numbers decide.
    In half precision neighbouring blocks may be closer than the tolerance at single tokens (the first of a text
    often hardly changes), and a mixture of experts may choose another expert: look at many rows.

    Raises `UsageError` while the model is being steered, for a store whose rows cannot be computed again (means
    over spans), or for a bad argument; `UnknownSite` for a direction at a site that is not stored or a stored site
    that the model lacks; `IdentityMismatch` if a direction is of another model, or widths differ;
    `IncompleteStore` if no prompt is complete; `CorruptArtifact` if the store is damaged.
    """
    if board_of(lm).changed:
        raise UsageError("the model is being steered, so it does not give its own activations: leave the context first")
    if sample is not None and sample < 1:
        raise UsageError(f"a sample of {sample} prompts replays nothing; give 1 or more, or None (all)")
    if tolerance is not None and not tolerance > 0:
        raise UsageError(f"tolerance={tolerance}: give a relative difference above 0, e.g. 1e-4")
    ledger = Ledger.of(store)
    here = lm.identity
    identity = store.identity.differences(here)
    for direction in directions:
        _require_stored(direction, store, allow_mismatch)
    limit = tolerance
    if limit is None:
        limit = tolerance_of(here.dtype, store.identity.dtype, stored=store.manifest.dtype)
    problems = () if allow_mismatch else tuple(_unlike(name, a, b) for name, (a, b) in identity.items())
    problems += tuple(ledger.problems(lm))
    chosen = _sample(store, ledger, sample, seed)
    if problems:
        return Replay(store.path, lm.name, limit, identity, problems, 0, len(ledger.ids), (), ())
    _require_sites(store, lm)
    rows, far, scores = _run(store, lm, ledger, chosen, directions, progress)
    sites = _judge(store, lm, ledger, rows, far, limit)
    decided = tuple(
        _decide(ledger, rows, d, before, after, limit) for d, (before, after) in zip(directions, scores, strict=True)
    )
    return Replay(store.path, lm.name, limit, identity, (), len(chosen), len(ledger.ids), sites, decided)


@dataclass(frozen=True, eq=False)
class _Far:
    """Of one site: the difference of each replayed row, and how many stored rows are not finite."""

    differences: Float[np.ndarray, " rows"]
    not_finite: int


def _run(
    store: ActivationStore,
    lm: LanguageModel,
    ledger: Ledger,
    chosen: Ints,
    directions: Sequence[Scorer],
    progress: Progress,
) -> tuple[Ints, dict[Site, _Far], list[tuple[NDArray[Any], NDArray[Any]]]]:
    """The replayed rows; per site their differences; per direction the scores of stored and replayed rows."""
    widths = {s.site: s.width for s in store.manifest.sites}
    lengths = ledger.lengths[chosen]
    plan = plan_packs(
        ledger.flat,  # not looked at: padded packs are made of lengths
        np.concatenate([[0], np.cumsum(lengths)]),
        packing="padded",
        budget=BATCH_TOKENS,
        alone_beyond=lm.architecture.alone_beyond(lm.net.config),
    )
    rows: list[Ints] = []
    far: dict[Site, list[torch.Tensor]] = {site: [] for site in store.sites}
    odd = dict.fromkeys(store.sites, 0)
    scores: list[list[tuple[NDArray[Any], NDArray[Any]]]] = [[] for _ in directions]
    done = 0
    progress("replay", 0, int(lengths.sum()))
    for k in range(plan.n_packs):
        here = np.concatenate([ledger.rows(int(p)) for p in chosen[plan.pack(k)]])
        rows.append(here)
        for site, computed in ledger.compute(lm, here, store.sites, widths):
            stored = store.read(site, here).float()
            far[site].append(row_differences(stored, computed))
            odd[site] += int((~stored.isfinite()).any(1).sum())
            for direction, of in zip(directions, scores, strict=True):
                if direction.site is not None and direction.site.whole == site:
                    part = _columns(store, direction.site)
                    both = (direction.score(values[:, part].double().numpy()) for values in (stored, computed))
                    of.append((next(both), next(both)))
        done += int(lengths[plan.pack(k)].sum())
        progress("replay", done, int(lengths.sum()))
    joined = {site: _Far(torch.cat(parts).double().numpy(), odd[site]) for site, parts in far.items()}
    return np.concatenate(rows), joined, [_joined(of) for of in scores]


def _judge(
    store: ActivationStore, lm: LanguageModel, ledger: Ledger, rows: Ints, far: Mapping[Site, _Far], limit: float
) -> tuple[SiteReplay, ...]:
    beyond = {site: rows[of.differences > limit] for site, of in far.items()}
    said = diagnose(store, lm, ledger, {site: found for site, found in beyond.items() if len(found)}, limit)
    out = []
    for site, of in far.items():
        worst = int(of.differences.argmax())
        out.append(
            SiteReplay(
                site=site,
                rows=len(rows),
                worst=float(of.differences[worst]),
                median=float(np.median(of.differences)),
                at=_where(ledger, int(rows[worst])),
                beyond=len(beyond[site]),
                not_finite=of.not_finite,
                diagnosis=said.get(site),
            )
        )
    return tuple(out)


def _decide(
    ledger: Ledger,
    rows: Ints,
    direction: Scorer,
    before: NDArray[np.float64],
    after: NDArray[np.float64],
    limit: float,
) -> DirectionReplay:
    assert direction.site is not None
    drift = np.nan_to_num(np.abs(after - before) / direction.scale, nan=np.inf)
    flips = (before > 0) != (after > 0)
    margins = np.maximum(np.abs(before), np.abs(after))[flips] / direction.scale
    worst = int(drift.argmax())
    return DirectionReplay(
        site=direction.site,
        rows=len(rows),
        drift=float(drift[worst]),
        at=_where(ledger, int(rows[worst])),
        flips=int(flips.sum()),
        margin=float(np.nan_to_num(margins, nan=np.inf).max(initial=0.0)),
        tolerance=limit,
    )


def _sample(store: ActivationStore, ledger: Ledger, n: int | None, seed: int) -> Ints:
    """Numbers of the prompts to replay, ascending."""
    shard = np.arange(store.rows) // store.manifest.grid.shard_rows
    written = np.isin(shard, list(store.committed))
    complete = np.setdiff1d(ledger.owner, ledger.owner[~written])
    if not len(complete):
        raise IncompleteStore(f"{store.path} has no prompt whose rows are all written: finish the store first")
    if n is None or n >= len(complete):
        return complete
    return np.sort(np.random.default_rng(seed).choice(complete, n, replace=False))


def _require_stored(direction: Scorer, store: ActivationStore, allow_mismatch: bool) -> None:
    if direction.site is None:
        raise UsageError(f"{direction!r} does not say at which site it reads; give it one with direction.at(site)")
    expand(direction.site, store.parts)
    if direction.identity is not None:
        direction.identity.require_same(store.identity, f"{direction!r}", allow_mismatch=allow_mismatch)


def _require_sites(store: ActivationStore, lm: LanguageModel) -> None:
    for stored in store.manifest.sites:
        if (width := lm.width(stored.site)) != stored.width:
            raise IdentityMismatch(
                f"'{stored.site}' is {stored.width} wide in {store.path} and {width} wide in {lm.name}: "
                "there is nothing to compare"
            )


def _columns(store: ActivationStore, site: Site) -> slice:
    if site.unit is None:
        return slice(None)
    width = store.width(site)
    return slice(site.unit * width, (site.unit + 1) * width)


def _joined(parts: Sequence[tuple[NDArray[Any], NDArray[Any]]]) -> tuple[NDArray[Any], NDArray[Any]]:
    return np.concatenate([a for a, _ in parts]), np.concatenate([b for _, b in parts])


def _where(ledger: Ledger, row: int) -> Where:
    position = int(ledger.position[row])
    return Where(row, ledger.ids[int(ledger.owner[row])], None if position < 0 else position)


def _unlike(name: str, there: Any, here: Any) -> str:
    return f"identity: {name} is {short(there)} in the store, {short(here)} here"


def _number(value: float) -> float | str:
    return value if np.isfinite(value) else str(value)
