"""Directions as live probes: the score of every token, computed while the network runs.

Enters: directions (or whatever has a site, a unit vector, an offset and a scale), and passes as `follow` shows them.
Leaves: per text a `Reading` of scores. Activations are used where they are and not kept: one product per site and pass,
and numbers stay on the device until somebody looks. Does not know how directions were found.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from reprobe.errors import UsageError
from reprobe.model.hooks import Observer
from reprobe.model.identity import ModelIdentity
from reprobe.model.passes import Pass, Prompts
from reprobe.model.sites import Site

if TYPE_CHECKING:
    from reprobe.model.language_model import LanguageModel


class DirectionLike(Protocol):
    """What is needed of a direction in order to read with it: score(h) = (h·vector − offset) / scale."""

    @property
    def site(self) -> Site | None: ...
    @property
    def vector(self) -> Float[np.ndarray, " width"]: ...
    @property
    def offset(self) -> float: ...
    @property
    def scale(self) -> float: ...
    @property
    def identity(self) -> ModelIdentity | None: ...


def checked(
    lm: "LanguageModel", directions: Any, what: str, *, allow_mismatch: bool = False
) -> tuple[tuple[Site, DirectionLike], ...]:
    """Directions with the sites at which `what` reads them, all of which fit this model.

    `directions` is one, several, or a mapping from sites. Raises `UsageError` if there is none, if one has no site, is
    filed under another site than its own, or is not as wide as its site; `UnknownSite`; `IdentityMismatch`.
    """
    if isinstance(directions, Mapping):
        filed = [(Site.parse(k) if isinstance(k, str) else k, d) for k, d in directions.items()]
    else:
        many = isinstance(directions, Iterable) and not isinstance(directions, str)
        several = list(directions) if many and not hasattr(directions, "vector") else [directions]
        if strange := [d for d in several if not hasattr(d, "vector")]:
            raise UsageError(f"{what} reads with directions, not with {strange[0]!r:.80}")
        filed = [(d.site, d) for d in several]
    if not filed:
        raise UsageError(f"{what} needs at least one direction")
    here = None
    for site, direction in filed:
        if site is None:
            raise UsageError(
                "a direction has no site of its own: say where it is read with direction.at('resid.post@…')"
            )
        if direction.site not in (None, site):
            raise UsageError(
                f"the direction under {str(site)!r} is one of {str(direction.site)!r}; if it is to be read at "
                f"{str(site)!r} all the same, say so with direction.at({str(site)!r})"
            )
        if direction.identity is not None:
            here = here or lm.identity
            direction.identity.require_same(here, f"the direction at {site}", allow_mismatch=allow_mismatch)
        if (width := lm.width(site)) != len(direction.vector):
            raise UsageError(
                f"a direction of width {len(direction.vector)} does not fit {site} of {lm.name}, which is {width} wide"
            )
    return tuple(filed)


@dataclass(frozen=True, eq=False)
class Reading:
    """What was read of one text: `scores[i, t]` is token t at `sites[i]`, in units of that direction's scale.

    Positive is the direction's positive class. `tokens` are the pieces of text, special tokens by name ("" where the
    network was given vectors); pads are left out. `generated` marks those after the prompt. The last token of a
    generated text is never read by the network, so it has no score. NaN where a pass ended before it reached a site.
    """

    tokens: tuple[str, ...]
    sites: tuple[Site, ...]
    scores: Float[np.ndarray, "directions tokens"]
    generated: Bool[np.ndarray, " tokens"]


@dataclass
class _Run:
    """Passes that continue one another: columns `start` to `end`, so far as they are still valid.

    `prompts` are those of the first pass, `real` is what the newest one says of all columns.
    """

    prompts: Prompts
    real: Bool[Tensor, "rows columns"]
    rows: int
    start: int
    end: int
    products: list[Float[Tensor, "directions rows columns"]] = field(default_factory=list)
    ids: list[Int[Tensor, "rows columns"]] = field(default_factory=list)

    def add(self, products: Float[Tensor, "directions rows columns"], ids: Int[Tensor, "rows columns"]) -> None:
        self.products.append(products)
        self.ids.append(ids)
        self.end += ids.shape[-1]

    def cut(self, column: int) -> None:
        """Forget what was read from `column` on: it is computed again (always so without a key-value cache)."""
        while self.end > column:
            products, ids = self.products.pop(), self.ids.pop()
            self.end -= ids.shape[-1]
            if column > self.end:
                keep = column - self.end
                self.add(products[..., :keep], ids[:, :keep])


class _Place:
    """The directions that are read at one whole site (its heads or neurons included), as one matrix."""

    def __init__(self, lm: "LanguageModel", site: Site) -> None:
        self.site, self.width = site, lm.width(site)
        self._rows: list[np.ndarray] = []
        self._matrices: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, site: Site, vector: Float[np.ndarray, " width"]) -> None:
        row = np.zeros(self.width)
        first = (site.unit or 0) * len(vector)
        row[first : first + len(vector)] = vector
        self._rows.append(row)

    def products(self, h: Float[Tensor, "rows columns width"]) -> Float[Tensor, " products"]:
        """h·v̂ for each direction, row and column, in float32 (float64 for float64)."""
        h = h.detach()
        dtype = torch.float64 if h.dtype == torch.float64 else torch.float32
        matrix = self._matrices.get((h.device, dtype))
        if matrix is None:
            matrix = torch.from_numpy(np.stack(self._rows)).to(device=h.device, dtype=dtype)
            self._matrices[h.device, dtype] = matrix
        flat = h.to(dtype).flatten(0, 1)
        return torch.mv(flat, matrix[0]) if len(self) == 1 else torch.mm(matrix, flat.T).flatten()


class Monitor:
    """Scores of what ran inside `lm.monitor`. Made by it.

    `sites[i]` is where direction i is read. `readings` has one entry per text, in the order in which they ran; those of
    `lm.generate` stand as its texts do. A direct call of the network is one text per row, until a call without a past;
    rows are taken as they stand, so beams of the network's own `generate` are not told apart.
    """

    def __init__(self, lm: "LanguageModel", directions: Iterable[tuple[Site, DirectionLike]]) -> None:
        self._lm = lm
        chosen = tuple(directions)
        self.sites: tuple[Site, ...] = tuple(site for site, _ in chosen)
        self._offsets = np.array([d.offset for _, d in chosen])
        self._scales = np.array([d.scale for _, d in chosen])
        self._places: dict[Site, _Place] = {}
        for site, direction in chosen:
            place = self._places.setdefault(site.whole, _Place(lm, site.whole))
            place.add(site, np.asarray(direction.vector))
        # Products come place by place; row i of a reading is direction i.
        by_place = [i for place in self._places for i, site in enumerate(self.sites) if site.whole == place]
        self._order = np.argsort(by_place)
        self._runs: list[_Run] = []
        self._pass: Pass | None = None
        self._seen: dict[Site, Tensor] = {}

    @property
    def observers(self) -> Mapping[Site, Observer]:
        """Who looks at which whole site."""
        return dict.fromkeys(self._places, self._look)

    def begin(self, passing: Pass) -> None:
        """A pass begins."""
        self._end()
        run = self._runs[-1] if self._runs else None
        if run is None or passing.fresh or run.rows != passing.rows or not run.start <= passing.start <= run.end:
            run = _Run(passing.prompts, passing.prompts.real, passing.rows, passing.start, passing.start)
            self._runs.append(run)
        run.cut(passing.start)
        run.real = passing.prompts.real
        self._pass = passing

    def _look(self, site: Site, h: Tensor) -> None:
        if self._pass is None:  # a block that runs by itself, or again for the sake of a gradient
            return
        self._seen[site] = self._places[site].products(h)
        if len(self._seen) == len(self._places):
            self._end()

    def _end(self) -> None:
        """Keep the products of the present pass as one tensor; NaN for sites that it did not reach."""
        passing, self._pass = self._pass, None
        if passing is None:
            return
        seen, self._seen = self._seen, {}
        device = next(iter(seen.values())).device if seen else self._lm.device
        parts = [
            seen[site].to(device)
            if site in seen
            else torch.full((len(place) * passing.rows * passing.columns,), torch.nan, device=device)
            for site, place in self._places.items()
        ]
        self._runs[-1].add(torch.cat(parts).view(-1, passing.rows, passing.columns), _ids(passing))

    @property
    def latest(self) -> Float[Tensor, "directions rows"]:
        """Scores of the newest column of each row, on the device: of the token read last, while a text is generated.

        For rules that act at once, e.g. `lm.generate(…, stopping_criteria=[lambda ids, _: monitor.latest[0] > 3])`.
        Raises `UsageError` if nothing was read yet.
        """
        products = next((run.products[-1] for run in reversed(self._runs) if run.products), None)
        if products is None:
            raise UsageError("nothing was read yet: run the model inside `with lm.monitor(…)`")
        order = torch.from_numpy(self._order).to(products.device)
        offsets, scales = (torch.from_numpy(a[:, None]).to(products) for a in (self._offsets, self._scales))
        return (products[order, :, -1] - offsets) / scales

    @property
    def readings(self) -> list[Reading]:
        """What was read so far, one entry per text; the numbers are copied from the device here."""
        self._end()
        return [reading for run in self._runs if run.ids for reading in self._readings(run)]

    def _readings(self, run: _Run) -> list[Reading]:
        products = torch.cat(run.products, -1).double().cpu().numpy()[self._order]
        scores = (products - self._offsets[:, None, None]) / self._scales[:, None, None]
        ids = torch.cat(run.ids, -1).cpu().numpy()
        columns = np.arange(run.start, run.end)
        generated = columns >= run.prompts.width
        given = run.real[:, run.start : run.end].cpu().numpy()
        real = np.ones((run.rows, len(columns)), dtype=bool)  # what lies beyond the given columns is real
        real[:, : given.shape[1]] = np.repeat(given, run.rows // len(given), 0)
        out = []
        for row in range(run.rows):
            kept = real[row] & (np.arange(len(columns)) < _length(ids[row], generated, run.prompts))
            pieces = tuple("" if i < 0 else self._lm.tokenizer.decode([int(i)]) for i in ids[row][kept])
            out.append(Reading(pieces, self.sites, scores[:, row, kept], generated[kept]))
        return out


def _length(ids: Int[np.ndarray, " columns"], generated: Bool[np.ndarray, " columns"], prompts: Prompts) -> int:
    """Columns until the text's end: rows that are done while others go on are filled up."""
    if len(ended := np.flatnonzero(generated & np.isin(ids, list(prompts.ends)))):
        return int(ended[0]) + 1
    if prompts.filler is None:
        return len(ids)
    return int(np.flatnonzero(~generated | (ids != prompts.filler)).max(initial=-1)) + 1


def _ids(passing: Pass) -> Int[Tensor, "rows columns"]:
    """The tokens of a pass, −1 where they are not known."""
    if passing.ids is not None:
        return passing.ids.clone()  # a view would keep all earlier ones alive
    told = passing.prompts.ids
    if told is None or passing.start + passing.columns > told.shape[1]:
        return torch.full((passing.rows, passing.columns), -1, device=passing.prompts.real.device)
    here = told[:, passing.start : passing.start + passing.columns]
    return here.repeat_interleave(passing.rows // len(here), 0)
