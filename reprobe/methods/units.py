"""Units: the numbers of which each is asked what it detects. Coordinates of sites, or directions.

Enters: sites or patterns (`mlp.neurons@*`, `attn.heads@3.2`), or directions of readers. Leaves: `Reading`s, one a site,
each of which turns the vectors there into its units' values. Does not know tokens or concepts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from reprobe.errors import UsageError
from reprobe.model.language_model import LanguageModel
from reprobe.model.sites import Site
from reprobe.probing.direction import Direction

#: What units are of: every coordinate of these sites, or these directions, which may have names.
Sites = str | Site | Sequence[str | Site]
Directions = Direction | Sequence[Direction] | Mapping[str, Direction]


@dataclass(frozen=True, eq=False)
class Reading:
    """The units at one site: its coordinates, or what lies along `vectors` (width, units), whose names are `names`."""

    site: Site
    width: int
    vectors: Float[np.ndarray, "width units"] | None = None
    names: tuple[str, ...] = ()

    @property
    def n(self) -> int:
        return self.width if self.vectors is None else int(self.vectors.shape[1])

    def name(self, unit: int) -> str:
        """`mlp.neurons@7.1500` for a neuron, `resid.post@7[12]` for another coordinate, or a direction's name."""
        if self.vectors is not None:
            return self.names[unit]
        if self.site.part == "mlp.neurons":
            return str(self.site if self.site.unit is not None else Site(self.site.part, self.site.layer, unit))
        return f"{self.site}[{unit}]"

    def direction(self, unit: int) -> Direction:
        """The direction whose projection h·v̂ is the unit's value."""
        vector = np.eye(1, self.width, unit)[0] if self.vectors is None else self.vectors[:, unit]
        return Direction.from_vector(self.site, vector, scale=1.0)

    def values(self, h: Float[Tensor, "*rows width"]) -> Float[Tensor, "rows units"]:
        """The units' values of each row, in float32."""
        flat = h.reshape(-1, h.shape[-1]).float()
        return flat if self.vectors is None else flat @ self._on(flat.device)

    @cached_property
    def _copies(self) -> dict[torch.device, Tensor]:
        return {}

    def _on(self, device: torch.device) -> Tensor:
        if device not in self._copies:
            assert self.vectors is not None
            self._copies[device] = torch.from_numpy(self.vectors.astype(np.float32)).to(device)
        return self._copies[device]


def readings(lm: LanguageModel, units: Sites | Directions, *, allow_mismatch: bool = False) -> tuple[Reading, ...]:
    """What to read of a model, in the order given, directions of one site together.

    Raises `UnknownSite`, `IdentityMismatch` for directions of another model (unless `allow_mismatch`), `UsageError` for
    one without a site, or of another width than its site.
    """
    named = _named(units)
    if named is None:
        return tuple(Reading(site, lm.width(site)) for site in lm.sites(units))  # type: ignore[arg-type]
    here = lm.identity
    at: dict[Site, list[tuple[str, np.ndarray]]] = {}
    for name, direction in named.items():
        if direction.site is None:
            raise UsageError(f"{name!r} has no site of its own to be read at: direction.at('resid.post@…')")
        (site,) = lm.sites(direction.site)
        if direction.identity is not None:
            direction.identity.require_same(here, f"the direction {name!r}", allow_mismatch=allow_mismatch)
        if direction.width != lm.width(site):
            raise UsageError(f"{name!r} is {direction.width} wide, and {site} of {lm.name} {lm.width(site)}")
        at.setdefault(site, []).append((name, direction.vector))
    return tuple(
        Reading(site, lm.width(site), np.stack([v for _, v in found], axis=1), tuple(n for n, _ in found))
        for site, found in at.items()
    )


def _named(units: Sites | Directions) -> Mapping[str, Direction] | None:
    """Directions with their names; None for sites."""
    if isinstance(units, Mapping):
        return units
    items = [units] if isinstance(units, str | Site | Direction) else list(units)
    directions = [u for u in items if isinstance(u, Direction)]
    if not directions:
        return None
    if len(directions) < len(items):
        raise UsageError("units are sites or directions, not both at once: dissect them one after the other")
    return {f"direction {i} at {d.site}": d for i, d in enumerate(directions)}
