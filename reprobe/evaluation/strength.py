"""How strong is as strong as this? The strength at which an intervention costs a given KL divergence.

Enters: a language model, a function from strength to interventions, a target. Leaves: the strength, and what was tried.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import polars as pl

from reprobe.errors import TargetUnreachable, UsageError
from reprobe.evaluation.effect import Baseline, Interventions
from reprobe.evaluation.means import Mean
from reprobe.evaluation.passages import NEUTRAL, Text
from reprobe.model.language_model import LanguageModel
from reprobe.progress import Progress, silent

TOLERANCE = 0.05
MAX_EVALUATIONS = 8
#: Where KL is 0, or does not say by its slope how far to go, the strength changes by this factor.
_LEAP = 10.0
#: KL ~ strength² for a small one; a slope of log KL on log strength outside these bounds is no guide.
_SLOPES = (0.5, 8.0)
#: No step changes the strength by more than a factor of 1000.
_FURTHEST = math.log(1000.0)


@dataclass(frozen=True, eq=False)
class Tuned:
    """The `strength` found and the KL it costs, nats per token, with its 95 % interval over the texts (None for one
    text). `tried` has `strength` and `kl` of every evaluation in order."""

    strength: float
    kl: float
    kl_low: float | None
    kl_high: float | None
    target_kl: float
    tried: pl.DataFrame


def tune(
    lm: LanguageModel,
    make: Callable[[float], Interventions],
    target_kl: float,
    *,
    texts: Sequence[Text] = NEUTRAL,
    start: float = 1.0,
    tolerance: float = TOLERANCE,
    max_evaluations: int = MAX_EVALUATIONS,
    allow_mismatch: bool = False,
    progress: Progress = silent,
) -> Tuned:
    """The strength at which the interventions `make(strength)` have a mean KL(unsteered ‖ steered) of `target_kl`
    nats per token on `texts`, to within the share `tolerance` of it, in at most `max_evaluations` evaluations.

    `make` is, for example, `lambda s: Add(direction, s)`; it returns what `steer` takes, one or several. The search is
    on log KL against log strength, from `start` on, whose sign decides on which side of 0; see `search`. Raises
    `TargetUnreachable`, with what was tried, if the interventions do nothing to the texts or no strength comes near
    enough.
    """
    _require_sense(target_kl, start, tolerance, max_evaluations)  # before the model runs
    baseline = Baseline.of(lm, texts)
    tried: list[tuple[float, Mean]] = []

    def price(strength: float) -> float:
        tried.append((strength, baseline.divergence(make(strength), allow_mismatch=allow_mismatch)))
        progress("tune", len(tried), max_evaluations)
        return tried[-1][1].mean

    search(price, target_kl, start=start, tolerance=tolerance, max_evaluations=max_evaluations)
    strength, found = tried[-1]
    return Tuned(
        strength=strength,
        kl=found.mean,
        kl_low=found.low,
        kl_high=found.high,
        target_kl=target_kl,
        tried=pl.DataFrame({"strength": [s for s, _ in tried], "kl": [kl.mean for _, kl in tried]}),
    )


def search(
    price: Callable[[float], float],
    target: float,
    *,
    start: float = 1.0,
    tolerance: float = TOLERANCE,
    max_evaluations: int = MAX_EVALUATIONS,
) -> float:
    """An x with |price(x) − target| ≤ tolerance · target, for a price that rises with |x| from 0 at 0.

    A bracketing search on log price against log |x|, where a price ~ x² is a line: from `start` by the slope (2 at
    first) until the target lies between two points, then by inverse quadratic or linear interpolation, or to the
    middle where neither falls well inside the bracket. A price that has stopped rising is near its ceiling; from then
    on the log-odds of the price below the ceiling take the place of its logarithm. Raises `UsageError` for a target,
    start, tolerance or number of evaluations that cannot be, `TargetUnreachable` with what was tried.
    """
    _require_sense(target, start, tolerance, max_evaluations)
    points: list[_Point] = []
    x = math.log(abs(start))
    for _ in range(max_evaluations):
        kl = price(math.copysign(math.exp(x), start))
        kl = math.inf if math.isnan(kl) else kl  # activations beyond what the dtype holds
        if abs(kl - target) <= tolerance * target:
            return math.copysign(math.exp(x), start)
        points.append(_Point(x, kl))
        x = _next(points, target)
    tried = ", ".join(f"{math.copysign(math.exp(p.x), start):.4g} → {p.kl:.4g}" for p in points)
    raise TargetUnreachable(_why_not([p.kl for p in points], target, tolerance) + f" Tried (strength → KL): {tried}.")


def _require_sense(target: float, start: float, tolerance: float, max_evaluations: int) -> None:
    if not 0 < target < math.inf:
        raise UsageError(f"a target KL of {target}: a divergence is a positive number of nats per token")
    if start == 0 or not math.isfinite(start):
        raise UsageError(f"a search cannot start at a strength of {start}; give one above 0, or below it to steer away")
    if not 0 < tolerance < math.inf or max_evaluations < 1:
        raise UsageError(f"tolerance={tolerance}, max_evaluations={max_evaluations}: a share above 0, and 1 or more")


@dataclass(frozen=True, order=True)
class _Point:
    """log |strength|, and the KL there."""

    x: float
    kl: float


def _next(points: Sequence[_Point], target: float) -> float:
    """Where to look next, as a log strength."""
    low = max((p for p in points if p.kl < target), default=None)
    above = [p for p in points if p.kl >= target and (low is None or p.x > low.x)]
    height = _height(points, target)
    # The points that say something of the curve near the target.
    near = sorted(((p.x, y) for p in points if math.isfinite(y := height(p.kl))), key=lambda point: abs(point[1]))[:3]
    if low is None or not above:
        return _outwards(points, near, rising=low is not None)
    a, b = low.x, min(above).x
    ends = [(p.x, y) for p in (low, min(above)) if math.isfinite(y := height(p.kl))]
    for guess in (_quadratic(near), _linear(ends), _linear(near[:2])):
        if guess is not None and a + 0.01 * (b - a) < guess < b - 0.01 * (b - a):
            return guess
    return (a + b) / 2


def _height(points: Sequence[_Point], target: float) -> Callable[[float], float]:
    """A measure of KL that is 0 at the target and about a line in log strength."""
    rest = sorted((p for p in points if p.kl < math.inf), key=lambda p: -p.kl)[:2]
    flat = len(rest) == 2 and rest[1].kl >= target and _rise(*rest) < _SLOPES[0]
    if not flat:
        return lambda kl: math.log(kl / target) if 0 < kl < math.inf else math.nan
    top = rest[0].kl * 1.002

    def odds(kl: float) -> float:
        # Of a point on the ceiling itself it cannot be said how far along it lies.
        return math.log(kl / (top - kl) * (top - target) / target) if 0 < kl < 0.995 * rest[0].kl else math.nan

    return odds


def _rise(p: _Point, q: _Point) -> float:
    """The slope of log KL on log strength between two points."""
    return math.log(p.kl / q.kl) / (p.x - q.x) if p.x != q.x else math.inf


def _outwards(points: Sequence[_Point], near: Sequence[tuple[float, float]], *, rising: bool) -> float:
    """A step from the outermost point towards a target that no two points enclose."""
    edge = max(points) if rising else min(points)
    guess = _linear(near[:2])
    step = 0.0 if guess is None else abs(guess - edge.x) if (guess > edge.x) == rising else 0.0
    leap = math.log(_LEAP) * 1.5 ** max(0, len(points) - 2)
    if step == 0 or (not rising and len(points) > 1):
        step = min(step or leap, leap)
    step = min(1.05 * step, _FURTHEST)  # a little further, to enclose the target
    return edge.x + (step if rising else -step)


def _linear(points: Sequence[tuple[float, float]]) -> float | None:
    """Where the line through one point (of slope 2) or two meets 0; None if it is too flat to say."""
    if not points:
        return None
    (x, y), *others = points
    slope = 2.0
    if others:
        slope = (others[0][1] - y) / (others[0][0] - x) if others[0][0] != x else 0.0
        if slope < _SLOPES[0]:
            return None
    return x - y / min(slope, _SLOPES[1])


def _quadratic(points: Sequence[tuple[float, float]]) -> float | None:
    """Where the parabola x(y) through three points has y = 0; None without three different heights."""
    if len({y for _, y in points}) < 3:
        return None
    return sum(
        x * math.prod(other / (other - y) for j, (_, other) in enumerate(points) if j != i)
        for i, (x, y) in enumerate(points)
    )


def _why_not(kls: Sequence[float], target: float, tolerance: float) -> str:
    wanted = f"a KL of {target:g} nats per token (± {tolerance:.0%})"
    if all(kl == 0 for kl in kls):
        return f"{wanted} cannot be reached: the interventions change nothing on these texts (an empty scope?)."
    if max(kls) < target:
        return f"{wanted} was not reached: the highest was {max(kls):.4g}."
    if min(kls) > target:
        why = "the interventions may not depend on the strength"
        return f"{wanted} was not reached: the lowest was {min(kls):.4g}; {why}."
    return f"{wanted} was not met in {len(kls)} evaluations: the KL may not rise with the strength."
