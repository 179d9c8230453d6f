"""Whether the order of two interventions matters.

Enters: two operators. Leaves: True only where it is certain that the model computes the same in either order. Does not
know bundles or hooks.
"""

from reprobe.control.along import Ablate, Add, AlongDirection, Scale
from reprobe.control.operators import Operator
from reprobe.model.sites import Site
from reprobe.probing.direction import Direction

#: Cosines this near to 0, or to 1, are taken to be that.
_EXACT = 1e-9


def commute(a: Operator, b: Operator) -> bool:
    """Whether `a` and `b` may change places in a list.

    They may at different sites (the model passes those in its own order), on scopes that share no token, or where they
    act on separate heads or neurons. On the same rows: constant pushes; linear maps along the same direction; operators
    along orthogonal directions; multiples of the whole vector with other linear maps along a direction. Otherwise, and
    where one writes what the other's gate reads, the order counts.
    """
    if any(one.when is not None and _meet(one.when.site, other.site) for one, other in ((a, b), (b, a))):
        return False
    if not _meet(a.site, b.site) or _apart(a, b) or _apart(b, a):
        return True
    if a.site != b.site or a.keep_norm or b.keep_norm:
        return False
    if all(isinstance(x, Add) and x.constant for x in (a, b)):
        return True
    if _multiple(a) or _multiple(b):
        return _linear(a) and _linear(b)
    along = _axis(a), _axis(b)
    if along[0] is None or along[1] is None:
        return False
    cosine = abs(along[0].cosine(along[1]))
    return cosine < _EXACT or (cosine > 1 - _EXACT and _linear(a) and _linear(b))


def _meet(a: Site, b: Site) -> bool:
    """Whether two sites are, or share components of, one vector; `embed` is what enters block 0."""
    first, second = (Site("resid.pre", 0) if s.part == "embed" else s for s in (a, b))
    return first.whole == second.whole and (first.unit == second.unit or None in (first.unit, second.unit))


def _apart(a: Operator, b: Operator) -> bool:
    """Whether `a` acts on tokens of the prompt alone and `b` on none of them."""
    return a.tokens.kind in ("prompt", "span") and b.tokens.kind == "generated"


def _axis(x: Operator) -> Direction | None:
    """The direction along which `x` acts, by an amount that depends on what lies along it alone."""
    if isinstance(x, Scale):
        return x.target if isinstance(x.target, Direction) else None
    if isinstance(x, Add) and x.unit == "norm":
        return None
    return x.direction if isinstance(x, AlongDirection) else None


def _multiple(x: Operator) -> bool:
    return isinstance(x, Scale) and not isinstance(x.target, Direction)


def _linear(x: Operator) -> bool:
    return isinstance(x, Ablate | Scale)
