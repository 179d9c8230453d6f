"""L-BFGS for many logistic regressions over the same rows, in float32 about points that are known in float64.

Enters: `Around`, problems with their gradients at a point. Leaves: how far each of them has to go from there. Does not
know how problems are standardised, nor when they end for good; that is in `logistic`.

What is computed in float32 are differences to the point only: how probabilities change, not what they are. So each
round gains as many digits as float32 has in differences, about four, and a few rounds give a float64 solution.

Float32 halves the time of every product (TF32, where a device is told to use it, costs steps and no digits). Problems
are the rows of all arrays, so that sums run along memory. Source: Nocedal and Wright, Numerical Optimization, chapter
7; the triangular form of the two loops is that of Byrd, Nocedal and Schnabel (1994).
"""

from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor

#: Pairs of steps and gradients that are remembered at least, and at most. Measured: more save few iterations, and take
#: more time than those.
_MEMORY, _ROOM = 8, 16
#: Share of the slope along a line at which a step may end.
_FLATTER = 0.5
_MAX_STEPS = 200
_MAX_LINE = 40


class Preconditioner:
    """Roughly the inverse Hessian: each row's spread p(1 − p) taken for their mean κ, the penalties for 1/C.

    (κ AᵀA + 1/C)⁻¹ is diagonal in the eigenvectors of AᵀA, whatever κ and C are, so all problems of a site share them.
    """

    def __init__(self, A: Float[Tensor, "sites rows width"]) -> None:
        n, width = A.shape[1:]
        self._whole = width <= n
        if self._whole:
            values, vectors = torch.linalg.eigh(A.float().mT @ A.float())
        else:  # in float64, or what is left outside of the rows' space is not small
            values, rows = torch.linalg.eigh(A @ A.mT)
            inverse = torch.where(values > 1e-10 * values[:, -1:], values.clamp_min(1e-300).rsqrt(), 0.0)
            vectors = A.mT @ (rows * inverse[:, None])
        self._values, self._vectors = values.clamp_min(0.0).float()[:, None], vectors.float()

    def __getitem__(self, sites: Integer[Tensor, " kept"]) -> "Preconditioner":
        out = object.__new__(Preconditioner)
        out._whole, out._values, out._vectors = self._whole, self._values[sites], self._vectors[sites]
        return out

    def times(
        self,
        q: Float[Tensor, "sites problems width"],
        kappa: Float[Tensor, "sites problems 1"],
        C: Float[Tensor, "sites problems 1"],
    ) -> Float[Tensor, "sites problems width"]:
        inside = 1 / (kappa * self._values + 1 / C)
        # Outside of the rows' space the penalty is all there is.
        outside, share = (q * 0, inside) if self._whole else (C * q, inside - C)
        return torch.baddbmm(outside, (q @ self._vectors) * share, self._vectors.mT)


@dataclass(frozen=True)
class Around:
    """Problems at a point: their gradients, their probabilities p and 1 − p, and what else decides how these change.

    The sum of the loss, not its mean. `free` is 0 for what is to stay as it is. All in float32.
    """

    gradient: Float[Tensor, "sites problems width"]
    p: Float[Tensor, "sites problems rows"]
    q: Float[Tensor, "sites problems rows"]
    omega: Float[Tensor, "sites problems rows"]
    ridge: Float[Tensor, "sites problems width"]
    free: Float[Tensor, "sites problems width"]
    C: Float[Tensor, "sites problems 1"]
    #: The length of the gradient at which a problem ends.
    goal: Float[Tensor, "sites problems"]

    def __getitem__(self, kept: Any) -> "Around":
        return Around(*(getattr(self, f.name)[kept] for f in fields(self)))


def descend(
    A: Float[Tensor, "sites rows width"], problems: Around, condition: Preconditioner
) -> Float[Tensor, "sites problems width"]:
    """How far each problem has to go; `A` in float32."""
    out = torch.zeros_like(problems.gradient)
    # Of several sites those that have ended are left out, of one site its problems.
    whole_sites = len(out) > 1
    number = torch.arange(out.shape[0 if whole_sites else 1], device=out.device)
    gone, gradient = torch.zeros_like(out), problems.gradient
    along_gone, change = torch.zeros_like(problems.p), torch.zeros_like(problems.p)
    memory = Memory(out)
    for _ in range(_MAX_STEPS):
        running = gradient.norm(dim=-1) > problems.goal
        kept = running.any(1 if whole_sites else 0).nonzero()[:, 0]
        if not len(kept):
            break
        if len(kept) < 0.8 * len(number):  # leaving some out copies the others: not for each alone
            at: Any = kept if whole_sites else (slice(None), kept)
            out[number if whole_sites else (slice(None), number)] = gone
            number, running, problems, memory = number[kept], running[at], problems[at], memory[at]
            gone, gradient, along_gone, change = gone[at], gradient[at], along_gone[at], change[at]
            if whole_sites:
                A, condition = A[kept], condition[kept]
        spread = (problems.omega * (problems.p + change) * (problems.q - change)).mean(-1, keepdim=True)
        q, alpha = memory.first(-gradient)
        q = condition.times(q * problems.free, spread, problems.C) * problems.free
        step = memory.second(q, alpha)
        slope = (gradient * step).sum(-1)
        running &= slope < 0
        if not running.any():
            break
        step, slope = step * running[..., None], torch.where(running, slope, 0.0)
        along = step @ A.mT
        length, along_gone, change = _search(problems, gone, along_gone, step, along, slope)
        step = length[..., None] * step
        gone = gone + step
        before, gradient = gradient, _gradient(A, problems, gone, change)
        memory.add(step, gradient - before)
    out[number if whole_sites else (slice(None), number)] = gone
    return out


def _gradient(A: Tensor, problems: Around, gone: Tensor, change: Tensor) -> Float[Tensor, "sites problems width"]:
    return torch.baddbmm(torch.addcmul(problems.gradient, problems.ridge, gone), problems.omega * change, A)


def _search(
    problems: Around,
    gone: Tensor,
    along_gone: Tensor,
    step: Tensor,
    along: Tensor,
    slope: Float[Tensor, "sites problems"],
) -> tuple[Float[Tensor, "sites problems"], Float[Tensor, "sites problems rows"], Float[Tensor, "sites problems rows"]]:
    """How far to go along a step, and there the margins' and probabilities' changes. Where the slope is 0, nowhere.

    To where little of the slope is left, by bracketed Newton: the loss is convex, so the slope rises along the line.
    """
    length = (slope < 0).to(slope.dtype)
    low, high = torch.zeros_like(length), torch.full_like(length, torch.inf)
    weighted = problems.omega * along
    fixed = ((problems.gradient + problems.ridge * gone) * step).sum(-1)
    by_ridge = (problems.ridge * step.square()).sum(-1)
    for _ in range(_MAX_LINE):
        margins = torch.addcmul(along_gone, length[..., None], along)
        # σ(m + x) − σ(m) without a difference of nearly equal numbers.
        grown = torch.expm1(margins.clamp(-60, 60))
        change = problems.p * problems.q * grown / (problems.q + problems.p * (grown + 1))
        here = (weighted * change).sum(-1) + fixed + length * by_ridge
        rough = here.abs() > -_FLATTER * slope
        if not rough.any():
            break
        low, high = torch.where(here < 0, length, low), torch.where(here > 0, length, high)
        bend = (weighted * along * (problems.p + change) * (problems.q - change)).sum(-1) + by_ridge
        newton = length - here / bend
        halfway = torch.where(high < torch.inf, (low + high) / 2, 2 * length)
        length = torch.where(rough, torch.where((newton > low) & (newton < high), newton, halfway), length)
    return length, margins, change


class Memory:
    """The last steps S and changes of the gradient Y, and the upper triangle R of S Yᵀ, of each problem.

    Problems may have any number of leading dimensions.
    """

    def __init__(self, like: Float[Tensor, "*problems width"]) -> None:
        *problems, width = like.shape
        self._S = like.new_zeros(*problems, _ROOM, width)
        self._Y = torch.zeros_like(self._S)
        self._R = like.new_zeros(*problems, _ROOM, _ROOM)
        self._k = 0

    def __getitem__(self, kept: Any) -> "Memory":
        out = object.__new__(Memory)
        out._S, out._Y, out._R, out._k = self._S[kept], self._Y[kept], self._R[kept], self._k
        return out

    def add(self, step: Float[Tensor, "*problems width"], change: Float[Tensor, "*problems width"]) -> None:
        if self._k == _ROOM:
            last = slice(_ROOM - _MEMORY, _ROOM)
            self._S[..., :_MEMORY, :], self._Y[..., :_MEMORY, :] = (
                self._S[..., last, :].clone(),
                self._Y[..., last, :].clone(),
            )
            self._R[..., :_MEMORY, :_MEMORY] = self._R[..., last, last].clone()
            self._k = _MEMORY
        k = self._k
        self._S[..., k, :], self._Y[..., k, :] = step, change
        products = (self._S[..., : k + 1, :] @ change[..., None])[..., 0]
        sound: Bool[Tensor, "*problems"] = products[..., k] > 0
        # A problem that made no step gets a pair that does nothing.
        products = products * sound[..., None]
        products[..., k] = torch.where(sound, products[..., k], 1.0)
        self._S[..., k, :] *= sound[..., None]
        self._Y[..., k, :] *= sound[..., None]
        self._R[..., : k + 1, k], self._R[..., k, :k] = products, 0.0
        self._k = k + 1

    def first(self, q: Float[Tensor, "*problems width"]) -> tuple[Tensor, Tensor]:
        """The first of the two loops, from the newest pair to the oldest: what is left of q, and the shares taken."""
        S, Y, R = self._held()
        alpha = torch.linalg.solve_triangular(R, S @ q[..., None], upper=True)
        return q - (Y.mT @ alpha)[..., 0], alpha

    def second(self, z: Float[Tensor, "*problems width"], alpha: Tensor) -> Float[Tensor, "*problems width"]:
        """The second, back to the newest."""
        S, Y, R = self._held()
        wanted = R.diagonal(dim1=-2, dim2=-1)[..., None] * alpha - Y @ z[..., None]
        shares: Tensor = torch.linalg.solve_triangular(R.mT, wanted, upper=False)
        return z + (S.mT @ shares)[..., 0]

    def _held(self) -> tuple[Tensor, Tensor, Tensor]:
        k = self._k
        return self._S[..., :k, :], self._Y[..., :k, :], self._R[..., :k, :k]
