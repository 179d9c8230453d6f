"""Sites: where in a model a vector is read or written.

Enters: text such as `resid.post@12`, `attn.heads@12.3`, `mlp.neurons@*`. Leaves: `Site` values. Layers are block
indices from 0; heads and neurons are unit indices from 0. Patterns are expanded here, at the edge; everywhere else
there are only `Site`s. Does not know model families or modules: what a family has is told to `expand` as a `Parts`
description.
"""

import difflib
import functools
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from reprobe.errors import UnknownSite

#: Parts that live in a block, in the order in which a token's vector passes them.
LAYER_PARTS = ("resid.pre", "attn.heads", "attn.out", "resid.mid", "mlp.neurons", "mlp.out", "resid.post")
#: Parts that exist once in a model.
MODEL_PARTS = ("embed", "final")
#: Parts that can be narrowed to one unit, `part@layer.unit`.
UNIT_PARTS = ("attn.heads", "mlp.neurons")

_SITE = re.compile(r"(?P<part>[a-z.]+)(?:@(?P<layer>\d+)(?:\.(?P<unit>\d+))?)?")
_PATTERN = re.compile(r"(?P<part>[a-z.]+)@(?P<layers>\*|(?:-?\d+)?(?::(?:-?\d+)?){1,2}|-?\d+)(?:\.(?P<unit>\*|\d+))?")


@functools.total_ordering
@dataclass(frozen=True)
class Site:
    """One place in a model: `part`, block index `layer` (None for `embed` and `final`), and `unit`.

    `unit` narrows `attn.heads` to one head (head_dim wide) and `mlp.neurons` to one neuron (one wide).
    """

    part: str
    layer: int | None = None
    unit: int | None = None

    def __post_init__(self) -> None:
        if self.part not in LAYER_PARTS + MODEL_PARTS:
            raise UnknownSite(f"unknown part {self.part!r}{_suggest(self.part)}; parts: {', '.join(_all_parts())}")
        if (self.part in MODEL_PARTS) != (self.layer is None):
            need = "has no layer" if self.part in MODEL_PARTS else f"needs a layer, e.g. '{self.part}@0'"
            raise UnknownSite(f"{self._text()!r}: {self.part} {need}")
        if self.unit is not None and self.part not in UNIT_PARTS:
            raise UnknownSite(f"{self._text()!r}: only {' and '.join(UNIT_PARTS)} can be narrowed to a unit")
        if (self.layer or 0) < 0 or (self.unit or 0) < 0:
            raise UnknownSite(f"{self._text()!r}: layers and units count from 0")

    @classmethod
    def parse(cls, text: str) -> "Site":
        """The site named by `text`; raises `UnknownSite` for anything else, patterns included."""
        m = _SITE.fullmatch(text.strip())
        if m is None:
            hint = " (a pattern: expand it first)" if _PATTERN.fullmatch(text.strip()) else ""
            raise UnknownSite(
                f"not a site: {text!r}{hint}; write part@layer, e.g. 'resid.post@12', or 'attn.heads@12.3' for head 3"
            )
        layer, unit = m["layer"], m["unit"]
        return cls(m["part"], None if layer is None else int(layer), None if unit is None else int(unit))

    def __str__(self) -> str:
        return self._text()

    def __lt__(self, other: "Site") -> bool:  # by part, block, unit; a whole comes before its units
        return self._key() < other._key()

    def _key(self) -> tuple[str, int, int]:
        return self.part, -1 if self.layer is None else self.layer, -1 if self.unit is None else self.unit

    def _text(self) -> str:
        layer = "" if self.layer is None else f"@{self.layer}"
        return self.part + layer + ("" if self.unit is None else f".{self.unit}")

    @property
    def depth(self) -> tuple[int, int]:
        """Where it lies on a token's way through the model: smaller comes first. Units of one vector are equal."""
        if self.layer is None:
            return (-1, 0) if self.part == "embed" else (sys.maxsize, 0)
        return self.layer, LAYER_PARTS.index(self.part)

    @property
    def whole(self) -> "Site":
        """The same place without `unit`: the vector this site is a slice of."""
        return Site(self.part, self.layer)


@dataclass(frozen=True)
class Parts:
    """What sites a model has: its name, block count, the parts of each block, and units per part.

    `of_layer[l]` holds the parts of block l; `units[part]` is the number of heads or neurons.
    """

    model: str
    of_layer: tuple[frozenset[str], ...]
    units: Mapping[str, int]
    why_absent: str = ""

    @property
    def n_layers(self) -> int:
        return len(self.of_layer)

    def require(self, site: Site) -> Site:
        """`site` itself if the model has it; `UnknownSite` with what exists and the nearest name otherwise."""
        if site.layer is None:
            return site
        if site.layer >= self.n_layers:
            near = Site(site.part, self.n_layers - 1, site.unit)
            hint = f" Did you mean '{near}'?" if site.part in self.of_layer[-1] else ""
            raise UnknownSite(
                f"'{site}': {self.model} has blocks 0–{self.n_layers - 1}; parts: {self._listing(None)}.{hint}"
            )
        if site.part not in self.of_layer[site.layer]:
            why = f" ({self.why_absent})" if self.why_absent else ""
            raise UnknownSite(
                f"'{site}': block {site.layer} of {self.model} has no {site.part}{why}; "
                f"parts there: {self._listing(site.layer)}"
            )
        if site.unit is not None and site.unit >= self.units[site.part]:
            raise UnknownSite(f"'{site}': {site.part} of {self.model} has units 0–{self.units[site.part] - 1}")
        return site

    def _listing(self, layer: int | None) -> str:
        have = frozenset().union(*self.of_layer) if layer is None else self.of_layer[layer]
        return ", ".join(p for p in _all_parts() if p in have or p in MODEL_PARTS)


def expand(sites: "str | Site | Iterable[str | Site]", parts: Parts) -> tuple[Site, ...]:
    """Sites named by a site, a pattern, a comma list, or an iterable of those, in the order given, no duplicates.

    Patterns: `resid.post@*`, `resid.post@4:20:2` (Python slice over blocks), `resid.post@-1` (last block),
    `attn.heads@*.*` (every head on its own). `*` over blocks takes the blocks that have the part. Raises
    `UnknownSite` if a name is malformed, is not in the model, or matches nothing.
    """
    out: dict[Site, None] = {}
    for item in [sites] if isinstance(sites, str | Site) else sites:
        if isinstance(item, Site):
            out[parts.require(item)] = None
            continue
        for text in filter(None, (t.strip() for t in item.split(","))):
            for site in _expand_one(text, parts):
                out[site] = None
    if not out:
        raise UnknownSite("no site was named; write e.g. 'resid.post@*' or 'attn.heads@12'")
    return tuple(out)


def ranges(layers: Iterable[int]) -> str:
    """Layers for people: 1, 2, 3, 5 as '1–3, 5'."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and runs[-1][-1] == layer - 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}–{r[-1]}" for r in runs)


def _expand_one(text: str, parts: Parts) -> list[Site]:
    m = _PATTERN.fullmatch(text)
    if m is None:
        return [parts.require(Site.parse(text))]
    part, layers, unit = m["part"], m["layers"], m["unit"]
    Site(part, 0, 0 if unit is not None else None)  # a wrong part or unit is reported as such, not as "no match"
    n = parts.n_layers
    if layers == "*" or ":" in layers:
        start, stop, step = _slice(text, layers)
        chosen = [i for i in range(n)[start:stop:step] if part in parts.of_layer[i]]
    elif layers.startswith("-"):
        if int(layers) < -n:
            raise UnknownSite(f"'{text}': {parts.model} has blocks 0–{n - 1} (that is -{n} to -1 from the end)")
        chosen = [n + int(layers)]
    else:
        chosen = [int(layers)]
    if not chosen:
        why = f" ({parts.why_absent})" if parts.why_absent else ""
        raise UnknownSite(
            f"'{text}' matches no block of {parts.model}{why}; blocks: 0–{n - 1}, parts: {parts._listing(None)}"
        )
    if unit == "*":
        whole = [parts.require(Site(part, i)) for i in chosen]
        return [Site(part, site.layer, u) for site in whole for u in range(parts.units[part])]
    return [parts.require(Site(part, i, None if unit is None else int(unit))) for i in chosen]


def _slice(text: str, layers: str) -> tuple[int | None, int | None, int | None]:
    if layers == "*":
        return None, None, None
    fields = [int(f) if f else None for f in layers.split(":")]
    start, stop, step = [*fields, None, None][:3]
    if step == 0:
        raise UnknownSite(f"'{text}': the step of a slice cannot be 0")
    return start, stop, step


def _all_parts() -> tuple[str, ...]:
    return ("embed", *LAYER_PARTS, "final")


def _suggest(part: str) -> str:
    near = difflib.get_close_matches(part, _all_parts(), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
