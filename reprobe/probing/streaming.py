"""Readers fitted on sites that are larger than memory: in passes over the store, a batch of rows at a time.

Enters: a store, rows, the folds to leave out of each fit. Leaves: site after site, the score of every row by each fit,
and a direction. Does not know what is made of those; `grid` calls this when a site does not fit.

Readers made of moments need one pass to fit and one to score. Logistic regression is solved on as many rows as memory
holds, drawn at random, and finished on all of them: each pass gives the float64 gradient of every fit, and a step by
L-BFGS whose first guess is the Hessian of the rows held (subsampled Newton; Bollapragada, Byrd and Nocedal 2019). So
few passes are needed, and the result is the optimum on all rows, with the same bound on its error as in memory. Where
memory holds too few rows for that, the Hessians are summed over all of them. Of several penalties, one is chosen on the
rows held.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Float, Integer
from sklearn.base import clone
from torch import Tensor
from torch.nn.functional import softplus

from reprobe.errors import UsageError
from reprobe.model.sites import Site
from reprobe.probing.direction import Direction
from reprobe.probing.lbfgs import Memory
from reprobe.probing.logistic import FLAT, NEAR, constant_features
from reprobe.probing.moments import Batches, ClassMoments, FoldMoments, finite_batches, packs, read_moments
from reprobe.probing.reader import Plane, Reader, as_array, direction_of, without_direction
from reprobe.probing.readers.from_moments import MomentsReader
from reprobe.probing.readers.logistic import LogisticReader
from reprobe.probing.rows import ProbeRows

#: Passes over the store within which a logistic fit must end.
_MAX_PASSES = 60
#: Passes before which the Hessians of the rows held are formed anew.
_REFRESHED = (2, 5, 10)
#: From this pass on the Hessians are those of all rows: the rows held are too few to say much.
_PATIENCE = 20


@dataclass(frozen=True)
class Streamed:
    """What the fits of one site found: their scores of all rows, and the last fit's direction."""

    site: Site
    scores: Float[np.ndarray, "n fits"]
    direction: Direction


def can_stream(reader: Reader) -> bool:
    """Whether this reader can be fitted in batches."""
    return isinstance(reader, MomentsReader | LogisticReader)


def stream(
    store: Batches,
    reader: Reader,
    sites: Sequence[Site],
    rows: ProbeRows,
    fold: Integer[np.ndarray, " n"],
    left_out: Sequence[frozenset[int]],
    *,
    memory: int,
    batch_rows: int = 1024,
) -> Iterator[Streamed]:
    """Fit `reader` at every site once for each of `left_out`, on the rows outside those folds, and score all rows.

    `memory` bounds, in bytes, what is held of sums, factors, rows and scores: as many sites are read side by side as
    have room. Raises `UsageError` for NaN and infinity, and for readers that need all rows
    at once.
    """
    fits, scored = len(left_out), 4 * len(rows) * len(left_out)
    if isinstance(reader, MomentsReader):
        sizes = {s: 16 * (int(fold.max()) + 1) * store.width(s) ** 2 + scored for s in sites}
        for pack in packs(sizes, memory):
            yield from _by_moments(store, reader, pack, rows, fold, left_out, memory, batch_rows)
    elif isinstance(reader, LogisticReader):
        # Of each fit a Hessian in float64 and its factor in float32; and as many rows as say something about it.
        sizes = {s: (12 * fits + 48) * (store.width(s) + 1) ** 2 + scored for s in sites}
        for pack in packs(sizes, memory):
            yield from _by_passes(store, reader, pack, rows, fold, left_out, memory // len(pack), batch_rows)
    else:
        raise UsageError(f"{type(reader).__name__} needs all rows of a site at once: it cannot be fitted in batches")


def _by_moments(
    store: Batches,
    reader: MomentsReader,
    sites: Sequence[Site],
    rows: ProbeRows,
    fold: Integer[np.ndarray, " n"],
    left_out: Sequence[frozenset[int]],
    memory: int,
    batch_rows: int,
) -> Iterator[Streamed]:
    directions: dict[Site, list[Direction]] = {}
    for site, moments in read_moments(store, sites, rows, fold=fold, memory=memory, batch_rows=batch_rows):
        try:
            directions[site] = [clone(reader).fit_moments(moments.without(*out)).direction_ for out in left_out]
        except UsageError as error:
            raise without_direction(type(reader).__name__, site, error) from error
    normals = {s: np.stack([d.vector for d in found]).T for s, found in directions.items()}
    offsets = {s: np.array([d.offset for d in found]) for s, found in directions.items()}
    scores = {s: np.empty((len(rows), len(left_out)), dtype=np.float32) for s in directions}
    order = np.argsort(rows.rows, kind="stable")
    for site, place, X in finite_batches(store, sites, rows.rows[order], batch_rows):
        scores[site][order[place]] = X @ normals[site] - offsets[site]
    for site, found in directions.items():
        yield Streamed(site, scores.pop(site), found[-1])


@dataclass
class _Site:
    """The fits of one site on their way. The last dimension of θ is the intercept; features are centred and scaled
    over all rows, as `A` in `logistic`."""

    mean: Float[np.ndarray, " width"]
    scale: Float[np.ndarray, " width"]
    m: Float[Tensor, "fits width"]
    u: Float[Tensor, "fits width"]
    constant: Bool[Tensor, "fits width"]
    C: Float[Tensor, " fits"]
    ridge: Float[Tensor, "fits width+1"]
    theta: Float[Tensor, "fits width+1"]
    memory: Memory
    scores: Float[np.ndarray, "n fits"]
    #: The rows held, and how much each weighs in a fit: as the rows of the fit that it stands for.
    held: Float[Tensor, "held width+1"] = field(init=False)
    stands_for: Float[Tensor, "held fits"]
    hessian: Float[Tensor, "fits width+1 width+1"] = field(init=False)
    factor: Float[Tensor, "fits width+1 width+1"] = field(init=False)
    stretch: Float[Tensor, "fits 1"] = field(init=False)
    gradient: Float[Tensor, "fits width+1"] = field(init=False)
    loss: Float[Tensor, " fits"] = field(init=False)
    #: Where the last step began: θ, its loss and gradient, and the step.
    before: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
    running: Bool[Tensor, " fits"] = field(init=False)
    error: Float[Tensor, " fits"] = field(init=False)

    def rows(self, X: Float[np.ndarray, "rows width"]) -> Float[Tensor, "rows width+1"]:
        A = np.ones((len(X), len(self.mean) + 1))
        A[:, :-1] = (X - self.mean) / self.scale
        return torch.from_numpy(A)

    def estimate(self) -> None:
        """The Hessians at θ, as the rows held have them."""
        p = torch.sigmoid(self.held @ self.theta.T)
        weights = self.stands_for * p * (1 - p)
        self.hessian = torch.stack([(self.held * one[:, None]).T @ self.held for one in weights.T])
        self.factorise(torch.ones_like(self.running))

    def factorise(self, fits: Bool[Tensor, " fits"]) -> None:
        for f in fits.nonzero()[:, 0].tolist():
            hessian = self.hessian[f] + torch.diag(self.ridge[f])
            hessian.diagonal().mul_(1 + 1e-9)
            self.factor[f] = torch.linalg.cholesky(hessian).float()
        self.stretch = torch.ones(len(self.ridge), 1, dtype=torch.float64)

    def condition(self, q: Float[Tensor, "fits width+1"]) -> Float[Tensor, "fits width+1"]:
        """Roughly the inverse Hessian times q."""
        return self.stretch * torch.cholesky_solve(q.float()[..., None], self.factor)[..., 0].double()


def _by_passes(
    store: Batches,
    reader: LogisticReader,
    sites: Sequence[Site],
    rows: ProbeRows,
    fold: Integer[np.ndarray, " n"],
    left_out: Sequence[frozenset[int]],
    memory: int,
    batch_rows: int,
) -> Iterator[Streamed]:
    omega = np.stack([~np.isin(fold, list(out)) for out in left_out], axis=1)
    going: dict[Site, _Site] = {}
    for site, moments in read_moments(store, sites, rows, fold=fold, scatter="diagonal", batch_rows=batch_rows):
        try:
            going[site] = _start(store, reader, site, moments, rows, omega, left_out, memory)
        except UsageError as error:
            raise without_direction(type(reader).__name__, site, error) from error
    total = torch.from_numpy(omega.sum(0)).double()
    done: dict[Site, Streamed] = {}
    order = np.argsort(rows.rows, kind="stable")
    for number in range(_MAX_PASSES):
        for one in going.values():
            if number in _REFRESHED:
                one.estimate()
            if number >= _PATIENCE:
                one.hessian, one.memory = torch.zeros_like(one.hessian), Memory(one.theta)
            one.gradient, one.loss = torch.zeros_like(one.theta), torch.zeros_like(one.C)
        for site, place, X in finite_batches(store, list(going), rows.rows[order], batch_rows):
            one, at = going[site], order[place]
            y = torch.from_numpy(rows.positive[at]).double()[:, None]
            w = torch.from_numpy(omega[at]).double()
            A = one.rows(X)
            margins = A @ one.theta.T
            p = torch.sigmoid(margins)
            one.scores[at] = margins.numpy()
            one.loss += (w * (softplus(margins, threshold=40.0) - y * margins)).sum(0)
            one.gradient += (w * (p - y)).T @ A
            if number >= _PATIENCE:
                for f in one.running.nonzero()[:, 0].tolist():
                    one.hessian[f] += (A * (w * p * (1 - p))[:, f, None]).T @ A
        for site, one in list(going.items()):
            if _step(one, total, exact=number >= _PATIENCE):
                continue
            done[site] = _finished(reader, site, one)
            del going[site]
        if not going:
            yield from (done[site] for site in sites)
            return
    site, one = next(iter(going.items()))
    raise without_direction(
        type(reader).__name__,
        site,
        UsageError(
            f"logistic regression did not end within {_MAX_PASSES} passes over the store (error of the weights up to "
            f"{float(one.error.max()):.1e}): choose a smaller C"
        ),
    )


def _start(
    store: Batches,
    reader: LogisticReader,
    site: Site,
    moments: FoldMoments[ClassMoments],
    rows: ProbeRows,
    omega: Bool[np.ndarray, "n fits"],
    left_out: Sequence[frozenset[int]],
    memory: int,
) -> _Site:
    """The fits on rows drawn at random, as many as half of `memory` holds; and their Hessians there."""
    of_all = moments.total.total
    width = of_all.width
    held = min(len(rows), max(memory // 2 // (8 * 3 * (width + 1)), 16))
    drawn = np.sort(np.random.default_rng(reader.seed).choice(len(rows), held, replace=False))
    order = np.argsort(rows.rows[drawn])
    drawn = drawn[order]
    X = np.asarray(as_array(store.read(site, rows.rows[drawn])), dtype=np.float64)
    planes = next(iter(reader.fit_batch(X[None], rows.positive[drawn], rows.groups[drawn], omega[drawn].T)))
    mean, variance = of_all.mean, of_all.scatter / of_all.n
    scale = np.where(constant_features(variance, mean, of_all.n), 1.0, np.sqrt(variance))
    own = [moments.without(*out).total for out in left_out]
    constant = np.stack([constant_features(o.scatter / o.n, o.mean, o.n) for o in own])
    u = np.where(constant, 1 / scale, np.sqrt(np.stack([o.scatter / o.n for o in own])) / scale)
    C = np.array([p.C for p in planes])
    ridge = np.zeros((len(planes), width + 1))
    ridge[:, :-1] = np.where(constant, 1e8 * omega.sum(0)[:, None], u**2 / C[:, None])
    theta = np.zeros_like(ridge)
    theta[:, :-1] = np.where(constant, 0.0, np.stack([p.normal for p in planes]) * scale)
    theta[:, -1] = [p.normal @ mean - p.level for p in planes]
    out = _Site(
        mean=mean,
        scale=scale,
        m=torch.from_numpy(np.stack([(o.mean - mean) / scale for o in own])),
        u=torch.from_numpy(u),
        constant=torch.from_numpy(constant),
        C=torch.from_numpy(C),
        ridge=torch.from_numpy(ridge),
        theta=torch.from_numpy(theta),
        memory=Memory(torch.from_numpy(theta)),
        scores=np.empty((len(rows), len(planes)), dtype=np.float32),
        stands_for=torch.from_numpy(omega[drawn] * (omega.sum(0) / np.maximum(omega[drawn].sum(0), 1))),
    )
    out.held, out.running = out.rows(X), torch.ones(len(planes), dtype=torch.bool)
    out.factor = torch.empty(len(planes), width + 1, width + 1)
    out.estimate()
    return out


def _step(one: _Site, total: Float[Tensor, " fits"], *, exact: bool) -> bool:
    """Judge the fits where they are, and move those that have not ended. Whether any has not.

    `exact`: the Hessians are those of all rows, here.
    """
    one.gradient += one.ridge * one.theta
    one.loss += (one.ridge * one.theta.square()).sum(1) / 2
    by_w = ((one.gradient[:, :-1] - one.m * one.gradient[:, -1:]) / one.u).masked_fill(one.constant, 0.0)
    own = torch.cat([by_w, one.gradient[:, -1:]], 1)
    length = (one.theta[:, :-1] * one.u).masked_fill(one.constant, 0.0).norm(dim=1)
    one.error = torch.nan_to_num(one.C * own.norm(dim=1) / length, torch.inf)
    one.running = running = (one.error > NEAR) & (own.abs().amax(1) / total > FLAT)
    if not running.any():
        return False
    if one.before is None:
        worse = torch.zeros_like(running)
    else:
        start, loss, gradient, step = one.before
        # A step that went too far is halved, from where it began.
        worse = running & (one.loss > loss + 1e-12 * total)
        if not exact:
            change = one.gradient - gradient
            one.memory.add(torch.where(worse[:, None], 0.0, step), change)
            # The rows held may have another curvature than all: the last pair tells how much.
            one.stretch = one.stretch * _ratio(step, change, one.condition(change))
        one.theta = torch.where(worse[:, None], start, one.theta)
        one.loss, one.gradient = torch.where(worse, loss, one.loss), torch.where(worse[:, None], gradient, one.gradient)
    if exact:
        one.factorise(running & ~worse)
    q, alpha = one.memory.first(-one.gradient)
    new = one.memory.second(one.condition(q), alpha)
    step = torch.where(worse[:, None], one.before[3] / 2 if one.before is not None else new, new)
    step = step * running[:, None]
    one.before = (one.theta, one.loss, one.gradient, step)
    one.theta = one.theta + step
    return True


def _ratio(step: Tensor, change: Tensor, conditioned: Tensor) -> Float[Tensor, "fits 1"]:
    along, across = (step * change).sum(1, keepdim=True), (change * conditioned).sum(1, keepdim=True)
    return torch.where((along > 0) & (across > 0), along / across, 1.0)


def _finished(reader: LogisticReader, site: Site, one: _Site) -> Streamed:
    weights = one.theta[:, :-1].masked_fill(one.constant, 0.0).numpy() / one.scale
    intercept = one.theta[:, -1].numpy() - weights @ one.mean
    length = np.linalg.norm(weights, axis=1)
    if (one.theta[:, :-1] * one.u).abs().amax(1).min() <= 1e-12:
        raise without_direction(
            type(reader).__name__,
            site,
            UsageError("the two classes do not differ in any feature: every weight is zero"),
        )
    plane = Plane(weights[-1], -float(intercept[-1]), "the positive class has the higher log-odds")
    scores = one.scores / length.astype(np.float32)
    direction = direction_of(plane, float(np.std(scores[:, -1], dtype=np.float64)), reader, (False, True))
    return Streamed(site, scores, direction)
