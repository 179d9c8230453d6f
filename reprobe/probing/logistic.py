"""Penalised logistic regression, many problems at once, each solved to a certified gradient.

Enters: rows of one or more sites, as tensors on any device; per problem its labels, its rows as weights (folds,
bootstraps) and its penalty. Leaves: weights and intercepts in the units of the rows, with the gradient at each
solution. Does not know readers or folds. A reference for it is scikit-learn's `StandardScaler` and
`LogisticRegression(solver="newton-cholesky")` at a small tolerance, on the rows that have a weight.

Every problem standardises features by its own rows. That need not change the features: with z = (x − m) / u, a
penalty on the weights of z is the penalty u²·v² on the weights v = w / u of x, and m moves the free intercept. So all
problems of a site share one matrix, and what is computed from it.

Newton's method; only the float64 gradient decides where it ends, so its steps may be rough:
- narrow sites, the Hessian of each problem by Cholesky, all in one batch, used again while the gradient falls fast;
- wide sites, conjugate gradients in float32 for all problems at once, preconditioned by the eigenvectors of the
  site's Gram matrix (of rows or of features, whichever are fewer), computed once for all labels, folds and penalties.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor
from torch.nn.functional import pad, softplus

#: Gradient at which the solver stops.
TOLERANCE = 1e-10
#: Sites up to this wide are solved by Cholesky factors. Measured: from about here conjugate gradients are faster.
NARROW = 256
#: The Hessian is formed anew when a step leaves more than this share of the gradient.
_STALE = 0.2
_MAX_STEPS = 200
_MAX_CONJUGATE = 100
#: Conjugate gradients end when this share of the residual, in the preconditioner's norm, is left.
_ROUGH = 0.1
_EPS = float(np.finfo(np.float64).eps)
#: Numbers in the largest arrays of a chunk: on a processor few enough for its caches.
_CHUNK = {"cpu": 1 << 20, "cuda": 1 << 27}
_CHUNK_ELSEWHERE = 1 << 24


@dataclass(frozen=True)
class Fits:
    """Log-odds at site s, problem p are `x @ weights[s, p] + intercept[s, p]`, x in the units of the rows.

    `gradient` is the largest component of the gradient of the mean penalised loss, by the standardised weights and
    the intercept: 0 at the exact optimum. `largest` is the largest standardised weight.
    """

    weights: Float[Tensor, "sites problems width"]
    intercept: Float[Tensor, "sites problems"]
    gradient: Float[Tensor, "sites problems"]
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
    `positive` is the same for all problems, or one line for each;
    `C` one number, or one for each problem, or for each site and problem. Computed on the device of X; in float64.

    A problem ends when its gradient is below `TOLERANCE` or no longer falls; the caller judges `gradient`.
    """
    sites, n, width = X.shape
    y = positive.reshape(-1, n).to(X.device, torch.float64)
    ones = torch.ones(1, n, dtype=torch.float64, device=X.device)
    omega = ones if weights is None else weights.to(X.device, torch.float64)
    penalty = torch.as_tensor(C, dtype=torch.float64, device=X.device)
    problems = max(len(y), len(omega), penalty.shape[-1] if penalty.ndim else 1)
    y, omega = y.expand(problems, n).T, omega.expand(problems, n).T
    penalty = penalty.expand(sites, problems)
    parts = []
    for at in _chunks(sites, 1 if width > NARROW else _room(X) // (n * (width + 1))):
        shared = _Shared.of(X[at])
        lines = len(shared.mean)
        per_problem = lines * (n + width if width > NARROW else n + width**2)
        found = [
            _solve_chunk(shared, y[:, part], omega[:, part], penalty[at, part])
            for part in _chunks(problems, 4 * _room(X) // per_problem)
        ]
        parts.append([torch.cat(one, dim=1) for one in zip(*found, strict=True)])
    return Fits(*(torch.cat(one) for one in zip(*parts, strict=True)))


def as_tensor(array: np.ndarray) -> Tensor:
    """The same numbers, copied only where torch cannot read them in place."""
    return torch.from_numpy(np.require(array, requirements=["C", "W"]))


def _room(X: Tensor) -> int:
    return _CHUNK.get(X.device.type, _CHUNK_ELSEWHERE)


def _chunks(n: int, size: int) -> Iterator[slice]:
    size = max(1, size)
    return (slice(a, min(a + size, n)) for a in range(0, n, size))


@dataclass(frozen=True)
class _Shared:
    """What all problems of some sites share: `A`, their rows centred and scaled over all rows, with a column of ones.
    The scaling is for the numbers only; where the optimum lies is decided by each problem's own."""

    A: Float[Tensor, "sites rows width+1"]
    mean: Float[Tensor, "sites width"]
    scale: Float[Tensor, "sites width"]

    @classmethod
    def of(cls, X: Float[Tensor, "sites rows width"]) -> "_Shared":
        A = pad(X.double(), (0, 1), value=1.0)
        x = A[..., :-1]
        mean = x.mean(1)
        x -= mean[:, None]
        scale = x.square().mean(1).sqrt()
        scale = torch.where(_constant(scale.square(), mean, x.shape[1]), 1.0, scale)
        x /= scale[:, None]
        return cls(A, mean, scale)


def _constant(variance: Tensor, mean: Tensor, n: Any) -> Tensor:
    """Features that vary by no more than rounding: scikit-learn's rule, so that both call the same ones constant."""
    return variance <= n * _EPS * variance + (n * mean * _EPS) ** 2


@dataclass(frozen=True)
class _Own:
    """A problem's own units: z = (x − m) / u for the columns x of `_Shared.A`; `constant` features have no z."""

    m: Float[Tensor, "sites width problems"]
    u: Float[Tensor, "sites width problems"]
    constant: Bool[Tensor, "sites width problems"]

    @classmethod
    def of(cls, shared: _Shared, omega: Float[Tensor, "rows problems"]) -> "_Own":
        x, total = shared.A[..., :-1], omega.sum(0)
        m = x.mT @ omega / total
        variance = x.square().mT @ omega / total - m.square()
        # The difference of two nearly equal numbers has few digits left: there, sum squares about the mean.
        for s, p in (variance < 1e-6 * (1 + m.square())).any(1).nonzero().tolist():
            variance[s, :, p] = (x[s] - m[s, :, p]).square().mT @ omega[:, p] / total[p]
        mean, scale = shared.mean[..., None], shared.scale[..., None]
        constant = _constant(variance * scale.square(), mean + scale * m, total)
        # What is constant here need not be so in all rows, whose mean then is in the rounding of x and m.
        rounding = (x.shape[1] * _EPS) ** 2 * (1 + m.square() + (mean / scale).square())
        constant = constant | (variance <= rounding)
        return cls(m, torch.where(constant, 1 / scale, variance.sqrt()), constant)

    def __getitem__(self, kept: Any) -> "_Own":
        return _Own(self.m[..., kept], self.u[..., kept], self.constant[..., kept])

    def gradient(self, g: Float[Tensor, "sites width+1 problems"]) -> Float[Tensor, "sites problems"]:
        """Largest component of a gradient by the columns of A, turned into one by w and b."""
        by_w = ((g[:, :-1] - self.m * g[:, -1:]) / self.u).masked_fill(self.constant, 0.0)
        return torch.maximum(by_w.abs().amax(1), g[:, -1].abs())


def _solve_chunk(
    shared: _Shared,
    y: Float[Tensor, "rows problems"],
    omega: Float[Tensor, "rows problems"],
    C: Float[Tensor, "sites problems"],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four arrays of `Fits`."""
    own = _Own.of(shared, omega)
    # A constant feature is a second intercept; a wall of a penalty keeps it at 0.
    ridge = torch.where(own.constant, 1e8 * omega.sum(0), own.u.square() / C[:, None])
    task = _Task(shared.A, y.contiguous(), omega.contiguous(), pad(ridge, (0, 0, 0, 1)), own)
    if shared.mean.shape[1] <= NARROW:
        theta, gradient = _newton(task, _Cholesky(task.A), torch.zeros_like(task.ridge))
    else:
        theta, gradient = _newton(task, _Conjugate(task.A), torch.zeros_like(task.ridge))
        # What float32 could not finish goes on, one at a time, from where it is.
        for p in (~(gradient <= 10 * TOLERANCE)).any(0).nonzero()[:, 0].tolist():
            one = slice(p, p + 1)
            theta[..., one], gradient[..., one] = _newton(task[one], _Cholesky(task.A), theta[..., one])
    v = theta[:, :-1].masked_fill(own.constant, 0.0)
    weights = (v / shared.scale[..., None]).mT
    intercept = theta[:, -1] - (weights @ shared.mean[..., None])[..., 0]
    return weights, intercept, gradient, (v * own.u).abs().amax(1)


@dataclass(frozen=True)
class _Task:
    """Problems over the same A: Σ ω·log-loss(A θ, y) + Σ ridge·θ² / 2. The last dimension counts problems."""

    A: Float[Tensor, "sites rows width+1"]
    y: Float[Tensor, "rows problems"]
    omega: Float[Tensor, "rows problems"]
    ridge: Float[Tensor, "sites width+1 problems"]
    own: _Own

    def __getitem__(self, kept: Any) -> "_Task":
        return _Task(self.A, self.y[:, kept], self.omega[:, kept], self.ridge[..., kept], self.own[kept])

    def loss(self, theta: Tensor, margins: Tensor) -> Float[Tensor, "sites problems"]:
        fit = self.omega * (softplus(margins, threshold=40.0) - self.y * margins)
        return fit.sum(1) + (self.ridge * theta.square()).sum(1) / 2


class _Steps(Protocol):
    """Solves Hessian · step = −gradient, roughly."""

    #: Whether the last step rests on the Hessian at its own place: if it leads nowhere, so will another.
    fresh: bool

    def step(self, task: _Task, gradient: Tensor, spread: Tensor, size: Tensor) -> Tensor: ...

    def keep(self, kept: Integer[Tensor, " kept"]) -> None:
        """Go on with these problems only."""

    def forget(self) -> None:
        """The last step led nowhere."""


def _newton(task: _Task, steps: _Steps, theta: Tensor) -> tuple[Tensor, Tensor]:
    """The best θ found and its gradient, of each problem; `theta` is where to start."""
    out, out_size = theta.clone(), torch.full_like(theta[:, 0], torch.inf)
    number = torch.arange(theta.shape[-1], device=theta.device)
    margins = task.A @ theta
    loss = task.loss(theta, margins)
    stuck = torch.zeros_like(loss, dtype=torch.bool)
    for _ in range(_MAX_STEPS):
        p = torch.sigmoid(margins)
        total = task.omega.sum(0)
        gradient = task.A.mT @ (task.omega * (p - task.y)) + task.ridge * theta
        size = task.own.gradient(gradient) / total
        better = size < out_size[:, number]
        out[..., number] = torch.where(better[:, None], theta, out[..., number])
        out_size[:, number] = torch.where(better, size, out_size[:, number])
        running = (size > TOLERANCE) & ~stuck
        kept = running.any(0).nonzero()[:, 0]
        if not len(kept):
            break
        if len(kept) < len(number):
            number, task = number[kept], task[kept]
            theta, margins, loss, gradient = theta[..., kept], margins[..., kept], loss[:, kept], gradient[..., kept]
            p, size, stuck, running, total = p[..., kept], size[:, kept], stuck[:, kept], running[:, kept], total[kept]
            steps.keep(kept)
        step = steps.step(task, gradient, task.omega * p * (1 - p), torch.where(running, size, 0.0))
        along, slope = task.A @ step, (gradient * step).sum(1)
        length = running.to(loss.dtype)
        while True:
            tried, reached = theta + length[:, None] * step, margins + length[:, None] * along
            value = task.loss(tried, reached)
            # Near the optimum the loss is flat to its last digits: a step that changes nothing else is a good one.
            far = (length > 0) & ~(value <= loss + 1e-4 * length * slope + 1e-13 * total)
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
    return out, out_size


class _Cholesky:
    """Steps by the factor of each problem's Hessian."""

    def __init__(self, A: Float[Tensor, "sites rows width+1"]) -> None:
        self._A = A
        self._factor: Float[Tensor, "sites problems width+1 width+1"] | None = None
        self._last: Tensor | None = None
        self.fresh = False

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
                return factor
        raise FloatingPointError("a positive definite matrix has no Cholesky factor: the rows are not finite")

    def keep(self, kept: Integer[Tensor, " kept"]) -> None:
        if self._factor is not None and self._last is not None:
            self._factor, self._last = self._factor[:, kept], self._last[:, kept]

    def forget(self) -> None:
        self._factor = None


class _Conjugate:
    """Steps by conjugate gradients in float32, all problems at once.

    The preconditioner takes each row's spread p(1 − p) for their mean κ and the penalties for their mean δ:
    (κ AᵀA + δ)⁻¹, which is diagonal in the eigenvectors of AᵀA whatever κ and δ are.
    """

    fresh = True

    def __init__(self, A: Float[Tensor, "sites rows width+1"]) -> None:
        self._A = A.float()
        n, width = A.shape[1:]
        self._whole = width <= n
        if self._whole:
            self._values, self._vectors = torch.linalg.eigh(self._A.mT @ self._A)
        else:
            values, rows = torch.linalg.eigh(self._A @ self._A.mT)
            self._values = values
            inverse = torch.where(values > 1e-5 * values[:, -1:], values.clamp_min(1e-30).rsqrt(), 0.0)
            self._vectors = self._A.mT @ (rows * inverse[:, None])
        self._values = self._values.clamp_min(0.0)

    def step(self, task: _Task, gradient: Tensor, spread: Tensor, size: Tensor) -> Tensor:
        # In float32 small gradients would vanish: they are scaled to 1, and the step back.
        length = gradient.abs().amax(1, keepdim=True).clamp_min(1e-300)
        # Constant features stay out: all vectors are kept in the space of the others.
        free = pad(~task.own.constant, (0, 0, 0, 1), value=True).float()
        residual = (-gradient / length).float() * free
        curvature, ridge = spread.float(), task.ridge.float()
        kappa = spread.mean(1, keepdim=True).float()
        delta = task.ridge[:, :-1].masked_fill(task.own.constant, 0.0).mean(1, keepdim=True).float().clamp_min(1e-30)
        inverse = 1 / (kappa * self._values[..., None] + delta)

        def precondition(r: Tensor) -> Tensor:
            inside = self._vectors.mT @ r
            if self._whole:
                return free * (self._vectors @ (inverse * inside))
            return r / delta + free * (self._vectors @ ((inverse - 1 / delta) * inside))

        found = torch.zeros_like(residual)
        z = precondition(residual)
        direction = z
        now = (residual * z).sum(1, keepdim=True)
        enough = _ROUGH**2 * now
        for _ in range(_MAX_CONJUGATE):
            image = self._A.mT @ (curvature * (self._A @ direction)) + ridge * direction
            image = image * free
            bend = (direction * image).sum(1, keepdim=True)
            running = (now > enough) & (bend > 0)
            if not running.any():
                break
            ahead = torch.where(running, now / bend, 0.0)
            found = found + ahead * direction
            residual = residual - ahead * image
            z = precondition(residual)
            last, now = now, torch.where(running, (residual * z).sum(1, keepdim=True), 0.0)
            direction = z + torch.where(running, now / last, 0.0) * direction
        return found.double() * length

    def keep(self, kept: Integer[Tensor, " kept"]) -> None:
        pass

    def forget(self) -> None:
        pass
