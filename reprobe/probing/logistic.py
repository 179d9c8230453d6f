"""Penalised logistic regression, many problems at once, each solved to a certified gradient.

Enters: rows of one or more sites, as tensors on any device; per problem its labels, its rows as weights (folds,
bootstraps) and its penalty. Leaves: weights and intercepts in the units of the rows, with the gradient at each
solution. Does not know readers or folds. A reference for it is scikit-learn's `StandardScaler` and
`LogisticRegression(solver="newton-cholesky")` at a small tolerance, on the rows that have a weight.

Every problem standardises features by its own rows. That need not change the features: with z = (x − m) / u, a
penalty on the weights of z is the penalty u²·v² on the weights v = w / u of x, and m moves the free intercept. So all
problems of a site share one matrix, and what is computed from it.

Only the float64 gradient decides where a problem ends, so steps may be rough:
- few numbers, Newton's: the Hessian of each problem by Cholesky, all in one batch, used again while the gradient falls
  fast;
- many, L-BFGS for all problems at once in float32 (`lbfgs`), in rounds about points known in float64,
  preconditioned by the eigenvectors of the site's Gram matrix (of rows or of features, whichever are fewer), which are
  computed once for all labels, folds and penalties.
On a processor, sites are shared out over threads.

Where to end: the loss is strongly convex in the standardised weights, by 1/C, so ‖w − w*‖ ≤ C·‖gradient‖. That bound,
relative to ‖w‖, is what every fit is driven below, and carries.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Integer
from torch import Tensor
from torch.nn.functional import pad, softplus

from reprobe.probing.lbfgs import Around, Preconditioner, descend

Array = TypeVar("Array", np.ndarray, Tensor)

#: A problem ends when its weights are as near as this to the optimum, relative to their length …
NEAR = 1e-6
#: … or when the largest component of the gradient is below this: optimal weights may be 0.
FLAT = 1e-10
#: Up to this many products in a Hessian, rows × width², Newton's method is faster than L-BFGS. Measured.
FEW = 1 << 20
#: Numbers of the rows' probabilities from which on a site is solved by itself: fewer cost little beside the calls.
_BESIDE = 1 << 14
#: Problems that use at most this share of the rows, in so few different sets, are solved on their own rows.
_SPARSE, _SETS = 0.6, 4
#: The Hessian is formed anew when a step leaves more than this share of the gradient.
_STALE = 0.2
_MAX_STEPS = 200
_MAX_ROUNDS = 12
#: A round of L-BFGS ends when this share of the gradient is left: about what float32 can see.
_GAIN = 1e-4
_EPS = float(np.finfo(np.float64).eps)
#: Numbers in the largest arrays of a chunk: on a processor few enough for its caches.
_CHUNK = {"cpu": 1 << 20, "cuda": 1 << 27}
_CHUNK_ELSEWHERE = 1 << 24


@dataclass(frozen=True)
class Fits:
    """Log-odds at site s, problem p are `x @ weights[s, p] + intercept[s, p]`, x in the units of the rows.

    `gradient` is the largest component of the gradient of the mean penalised loss, by the standardised weights and
    the intercept: 0 at the exact optimum. `error` bounds ‖w − w*‖ / ‖w‖, standardised. `largest` is the largest
    standardised weight.
    """

    weights: Float[Tensor, "sites problems width"]
    intercept: Float[Tensor, "sites problems"]
    gradient: Float[Tensor, "sites problems"]
    error: Float[Tensor, "sites problems"]
    largest: Float[Tensor, "sites problems"]


def solve_many(
    X: Float[Tensor, "sites rows width"],
    positive: Bool[Tensor, "*problems rows"],
    C: float | Float[Tensor, "*sites problems"],
    weights: Float[Tensor, "problems rows"] | None = None,
) -> Fits:
    """Minimise Σᵢ ωᵢ log(1 + exp(−yᵢ (zᵢ·w + b))) + ‖w‖² / (2C) over w and b, y = ±1; `b` is not penalised.

    z are the features standardised by the mean and standard deviation of the problem's own rows, weighted by ω
    (`weights`, ≥ 0; default: all rows count once); a feature that is constant in them gets the weight 0.
    `positive` is the same for all problems, or one line for each; `C` one number, or one for each problem, or for each
    site and problem. Computed on the device of X; in float64.

    A problem ends when its error is below `NEAR`, its gradient below `FLAT`, or neither falls any more; the caller
    judges.
    """
    sites, n, width = X.shape
    y = positive.reshape(-1, n).to(X.device, torch.float64)
    ones = torch.ones(1, n, dtype=torch.float64, device=X.device)
    omega = ones if weights is None else weights.to(X.device, torch.float64)
    penalty = torch.as_tensor(C, dtype=torch.float64, device=X.device)
    problems = max(len(y), len(omega), penalty.shape[-1] if penalty.ndim else 1)
    y, omega = y.expand(problems, n).T, omega.expand(problems, n).T
    penalty = penalty.expand(sites, problems)
    sets = _row_sets(omega)
    newton = n * (width + 1) ** 2 <= FEW

    def solve(at: slice) -> list[Tensor]:
        found = []
        for rows, of in sets:
            shared = _Shared.of(X[at], rows)
            lines, used = shared.A.shape[:2]
            per_problem = lines * (used + width**2 if newton else used + width)
            for part in _chunks(len(of), 4 * _room(X) // per_problem):
                own = of[part]
                labels, weight = (a[:, own] if rows is None else a[:, own].index_select(0, rows) for a in (y, omega))
                found.append(_solve_chunk(shared, labels, weight, penalty[at][:, own], newton))
        return [torch.cat(one, dim=1)[:, back] for one in zip(*found, strict=True)]

    back = torch.argsort(torch.cat([of for _, of in sets]))
    largest = max((n if rows is None else len(rows)) * len(of) for rows, of in sets)
    together = _room(X) // (n * (width + 1)) if newton else _BESIDE // largest
    parts = _shared_out(solve, _chunks(sites, together), X.device)
    return Fits(*(torch.cat(one) for one in zip(*parts, strict=True)))


def _row_sets(omega: Float[Tensor, "rows problems"]) -> list[tuple[Tensor | None, Int[Tensor, " problems"]]]:
    """The problems to be solved over the same rows (None: all): rows that weigh nothing cost as much as others, but few
    are worth a matrix of their own."""
    sets, of = torch.unique(omega.T > 0, dim=0, return_inverse=True)
    if not 1 < len(sets) <= _SETS or sets.double().mean(1).max() > _SPARSE:
        return [(None, torch.arange(omega.shape[1], device=omega.device))]
    return [(rows.nonzero()[:, 0], (of == k).nonzero()[:, 0]) for k, rows in enumerate(sets)]


def _shared_out(
    solve: Callable[[slice], list[Tensor]], chunks: list[slice], device: torch.device
) -> list[list[Tensor]]:
    """Every chunk solved; on a processor, by as many threads of Python as torch would use, each with one of torch's.

    The arrays are small: torch's own threads would wait for one another at every operation.
    """
    threads = min(torch.get_num_threads(), len(chunks))
    if device.type != "cpu" or threads == 1:
        return [solve(at) for at in chunks]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(solve, chunks))
    finally:
        torch.set_num_threads(before)


def as_tensor(array: np.ndarray) -> Tensor:
    """The same numbers, copied only where torch cannot read them in place."""
    return torch.from_numpy(np.require(array, requirements=["C", "W"]))


def _room(X: Tensor) -> int:
    return _CHUNK.get(X.device.type, _CHUNK_ELSEWHERE)


def _chunks(n: int, size: int) -> list[slice]:
    size = max(1, size)
    return [slice(a, min(a + size, n)) for a in range(0, n, size)]


@dataclass(frozen=True)
class _Shared:
    """What all problems of some sites share: `A`, their rows centred and scaled over all rows, with a column of ones.
    The scaling is for the numbers only; where the optimum lies is decided by each problem's own."""

    A: Float[Tensor, "sites rows width+1"]
    mean: Float[Tensor, "sites width"]
    scale: Float[Tensor, "sites width"]
    constant: Bool[Tensor, "sites width"]

    @classmethod
    def of(cls, X: Float[Tensor, "sites all_rows width"], rows: Int[Tensor, " rows"] | None = None) -> "_Shared":
        # In few arrays: fresh memory takes longer than the sums.
        raw = (X if rows is None else X.index_select(1, rows)).double()
        A = raw.new_empty(*raw.shape[:2], raw.shape[2] + 1)
        A[..., -1] = 1.0
        mean = raw.mean(1)
        x = torch.sub(raw, mean[:, None], out=A[..., :-1])
        scale = torch.mul(x, x, out=None if raw is X else raw).mean(1).sqrt()
        constant = constant_features(scale.square(), mean, x.shape[1])
        scale = torch.where(constant, 1.0, scale)
        x /= scale[:, None]
        return cls(A, mean, scale, constant)


def constant_features(variance: Array, mean: Array, n: Any) -> Array:
    """Which features vary by no more than rounding: scikit-learn's rule, so that both call the same ones constant."""
    return cast(Array, variance <= n * _EPS * variance + (n * mean * _EPS) ** 2)


@dataclass(frozen=True)
class _Own:
    """A problem's own units: z = (x − m) / u for the columns x of `_Shared.A`; `constant` features have no z."""

    m: Float[Tensor, "sites width problems"]
    u: Float[Tensor, "sites width problems"]
    constant: Bool[Tensor, "sites width problems"]

    @classmethod
    def of(cls, shared: _Shared, omega: Float[Tensor, "rows problems"]) -> "_Own":
        x, total = shared.A[..., :-1], omega.sum(0)
        if bool((omega == 1).all()):  # the very rows that A is standardised by
            zero = torch.zeros_like(shared.mean)
            return cls(*(a[..., None].expand(*a.shape, len(total)) for a in (zero, zero + 1, shared.constant)))
        m = x.mT @ omega / total
        variance = x.square().mT @ omega / total - m.square()
        # The difference of two nearly equal numbers has few digits left: there, sum squares about the mean.
        for s, p in (variance < 1e-6 * (1 + m.square())).any(1).nonzero().tolist():
            variance[s, :, p] = (x[s] - m[s, :, p]).square().mT @ omega[:, p] / total[p]
        mean, scale = shared.mean[..., None], shared.scale[..., None]
        constant = constant_features(variance * scale.square(), mean + scale * m, total)
        # What is constant here need not be so in all rows, whose mean then is in the rounding of x and m.
        rounding = (x.shape[1] * _EPS) ** 2 * (1 + m.square() + (mean / scale).square())
        constant = constant | (variance <= rounding)
        return cls(m, torch.where(constant, 1 / scale, variance.sqrt()), constant)

    def __getitem__(self, kept: Any) -> "_Own":
        return _Own(self.m[..., kept], self.u[..., kept], self.constant[..., kept])

    def gradient(self, g: Float[Tensor, "sites width+1 problems"]) -> Float[Tensor, "sites width+1 problems"]:
        """A gradient by the columns of A turned into one by w and b."""
        by_w = ((g[:, :-1] - self.m * g[:, -1:]) / self.u).masked_fill(self.constant, 0.0)
        return torch.cat([by_w, g[:, -1:]], 1)

    def weights(self, theta: Float[Tensor, "sites width+1 problems"]) -> Float[Tensor, "sites width problems"]:
        """w, of θ."""
        return (theta[:, :-1] * self.u).masked_fill(self.constant, 0.0)


def _solve_chunk(
    shared: _Shared,
    y: Float[Tensor, "rows problems"],
    omega: Float[Tensor, "rows problems"],
    C: Float[Tensor, "sites problems"],
    newton: bool,
) -> tuple[Tensor, ...]:
    """The arrays of `Fits`."""
    own = _Own.of(shared, omega)
    # A constant feature is a second intercept; a wall of a penalty keeps it at 0.
    ridge = torch.where(own.constant, 1e8 * omega.sum(0), own.u.square() / C[:, None])
    task = _Task(shared.A, y.contiguous(), omega.contiguous(), pad(ridge, (0, 0, 0, 1)), C, own)
    theta = torch.zeros_like(task.ridge)
    if newton:
        theta, gradient, error = _newton(task, theta)
    else:
        theta, gradient, error = _rounds(task, theta)
        # What did not end there goes on, one at a time, from where it is.
        for p in ((error > NEAR) & (gradient > FLAT)).any(0).nonzero()[:, 0].tolist():
            one = slice(p, p + 1)
            theta[..., one], gradient[..., one], error[..., one] = _newton(task[one], theta[..., one])
    v = theta[:, :-1].masked_fill(own.constant, 0.0)
    weights = (v / shared.scale[..., None]).mT
    intercept = theta[:, -1] - (weights @ shared.mean[..., None])[..., 0]
    return weights, intercept, gradient, error, (v * own.u).abs().amax(1)


@dataclass(frozen=True)
class _Task:
    """Problems over the same A: Σ ω·log-loss(A θ, y) + Σ ridge·θ² / 2. The last dimension counts problems."""

    A: Float[Tensor, "sites rows width+1"]
    y: Float[Tensor, "rows problems"]
    omega: Float[Tensor, "rows problems"]
    ridge: Float[Tensor, "sites width+1 problems"]
    C: Float[Tensor, "sites problems"]
    own: _Own

    def __getitem__(self, kept: Any) -> "_Task":
        return _Task(
            self.A, self.y[:, kept], self.omega[:, kept], self.ridge[..., kept], self.C[:, kept], self.own[kept]
        )

    def loss(self, theta: Tensor, margins: Tensor) -> Float[Tensor, "sites problems"]:
        fit = self.omega * (softplus(margins, threshold=40.0) - self.y * margins)
        return fit.sum(1) + (self.ridge * theta.square()).sum(1) / 2

    def gradient(self, theta: Tensor, p: Tensor) -> Float[Tensor, "sites width+1 problems"]:
        return self.A.mT @ (self.omega * (p - self.y)) + self.ridge * theta


class _Best:
    """The best θ of each problem so far, and how good it is."""

    def __init__(self, theta: Tensor) -> None:
        self.theta = theta.clone()
        self.gradient = torch.full_like(theta[:, 0], torch.inf)
        self.error = self.gradient.clone()

    def keep(self, task: _Task, number: Tensor, theta: Tensor, gradient: Tensor) -> Bool[Tensor, "sites problems"]:
        """Judge θ of the problems of these numbers; which of them have not ended."""
        own = task.own.gradient(gradient)
        size = own.abs().amax(1) / task.omega.sum(0)
        error = torch.nan_to_num(task.C * own.norm(dim=1) / task.own.weights(theta).norm(dim=1), torch.inf)
        better = size < self.gradient[:, number]
        self.theta[..., number] = torch.where(better[:, None], theta, self.theta[..., number])
        self.gradient[:, number] = torch.where(better, size, self.gradient[:, number])
        self.error[:, number] = torch.where(better, error, self.error[:, number])
        return (error > NEAR) & (size > FLAT)


def _newton(task: _Task, theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The best θ found, its gradient and error, of each problem; `theta` is where to start."""
    best, steps = _Best(theta), _Cholesky(task.A)
    number = torch.arange(theta.shape[-1], device=theta.device)
    margins = task.A @ theta
    loss = task.loss(theta, margins)
    stuck = torch.zeros_like(loss, dtype=torch.bool)
    for _ in range(_MAX_STEPS):
        p = torch.sigmoid(margins)
        gradient = task.gradient(theta, p)
        running = best.keep(task, number, theta, gradient) & ~stuck
        kept = running.any(0).nonzero()[:, 0]
        if not len(kept):
            break
        if len(kept) < len(number):
            number, task = number[kept], task[kept]
            theta, margins, loss, gradient = theta[..., kept], margins[..., kept], loss[:, kept], gradient[..., kept]
            p, stuck, running = p[..., kept], stuck[:, kept], running[:, kept]
            steps.keep(kept)
        size = torch.where(running, best.gradient[:, number], 0.0)
        step = steps.step(task, gradient, task.omega * p * (1 - p), size)
        along, slope = task.A @ step, (gradient * step).sum(1)
        length = running.to(loss.dtype)
        while True:
            tried, reached = theta + length[:, None] * step, margins + length[:, None] * along
            value = task.loss(tried, reached)
            # Near the optimum the loss is flat to its last digits: a step that changes nothing else is a good one.
            flat = 1e-13 * task.omega.sum(0)
            far = (length > 0) & ~(value <= loss + 1e-4 * length * slope + flat)
            if not far.any():
                break
            length = torch.where(far, length / 2, length)
            length = torch.where(length < 1e-8, 0.0, length)
        lost = running & (length == 0)
        if lost.any():
            if steps.fresh:
                stuck = stuck | lost
            steps.forget()
        theta, margins, loss = tried, reached, value
    return best.theta, best.gradient, best.error


class _Cholesky:
    """Steps by the factor of each problem's Hessian."""

    def __init__(self, A: Float[Tensor, "sites rows width+1"]) -> None:
        self._A = A
        #: Whether the last step rests on the Hessian at its own place: if it leads nowhere, so will another.
        self.fresh = False
        self._factor: Float[Tensor, "sites problems width+1 width+1"] | None = None
        self._last: Tensor | None = None

    def step(self, task: _Task, gradient: Tensor, spread: Tensor, size: Tensor) -> Tensor:
        self.fresh = self._factor is None or self._last is None or bool((size > _STALE * self._last).any())
        if self._factor is None or self.fresh:
            hessians = [(self._A * spread[..., p, None]).mT @ self._A for p in range(spread.shape[-1])]
            self._factor = self._factored(torch.stack(hessians, dim=1), task)
        self._last = size
        return -torch.cholesky_solve(gradient.mT[..., None], self._factor)[..., 0].mT

    @staticmethod
    def _factored(hessian: Tensor, task: _Task) -> Tensor:
        """The factor; where rounding makes a Hessian indefinite, with its diagonal raised, which shortens the step and
        leaves the optimum where it is."""
        diagonal = hessian.diagonal(dim1=-2, dim2=-1)
        diagonal += task.ridge.mT
        for raised in (1e-13, 1e-9, 1e-5, 1.0):
            diagonal += raised * (diagonal + task.omega.sum(0)[:, None])
            factor, failed = torch.linalg.cholesky_ex(hessian)
            if not failed.any():
                return cast(Tensor, factor)
        raise FloatingPointError("a positive definite matrix has no Cholesky factor: the rows are not finite")

    def keep(self, kept: Integer[Tensor, " kept"]) -> None:
        """Go on with these problems only."""
        if self._factor is not None and self._last is not None:
            self._factor, self._last = self._factor[:, kept], self._last[:, kept]

    def forget(self) -> None:
        """The last step led nowhere."""
        self._factor = None


def _rounds(task: _Task, theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `_newton`, by rounds of L-BFGS."""
    best, condition, A = _Best(theta), Preconditioner(task.A), task.A.float()
    number = torch.arange(theta.shape[-1], device=theta.device)
    for _ in range(_MAX_ROUNDS):
        margins = task.A @ theta
        p = torch.sigmoid(margins)
        gradient = task.gradient(theta, p)
        running = best.keep(task, number, theta, gradient)
        kept = running.any(0).nonzero()[:, 0]
        if not len(kept):
            break
        if len(kept) < len(number):
            number, task, theta, running = number[kept], task[kept], theta[..., kept], running[:, kept]
            margins, p, gradient = margins[..., kept], p[..., kept], gradient[..., kept]
        enough = torch.maximum(_GAIN * gradient.norm(dim=1), 0.7 * NEAR * task.own.weights(theta).norm(dim=1) / task.C)
        about = Around(
            gradient=_lines(gradient),
            p=_lines(p),
            q=_lines(1 - p),
            omega=_lines(task.omega.expand(margins.shape)),
            ridge=_lines(task.ridge),
            free=_lines(pad(~task.own.constant, (0, 0, 0, 1), value=True)),
            C=_lines(task.C[:, None]),
            goal=torch.where(running, enough, torch.inf).float(),
        )
        theta = theta + descend(A, about, condition).mT.double()
    return best.theta, best.gradient, best.error


def _lines(array: Float[Tensor, "sites any problems"]) -> Float[Tensor, "sites problems any"]:
    return array.mT.float().contiguous()
