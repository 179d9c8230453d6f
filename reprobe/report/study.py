"""Studies: the probe grids that belong together, and what can be said of a grid in a few words.

Enters: the results of a folder. Leaves: one `Study` per set of rows and labels that was probed, grids of some
of a grid's sites, and numbers with their intervals. Does not know figures or pages.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import polars as pl

from reprobe.errors import CorruptArtifact
from reprobe.model.identity import ModelIdentity
from reprobe.model.sites import Site, ranges
from reprobe.probing.comparison import Comparison
from reprobe.probing.direction import Label
from reprobe.probing.probe_grid import ProbeGrid
from reprobe.report.folder import Results
from reprobe.store.reader import ActivationStore


@dataclass(frozen=True, eq=False)
class Study:
    """Grids made from the same rows with the same labels, by name, and their store if it is at hand.

    Of a `comparison` they are its grids, by its names of the readers.
    """

    name: str
    grids: dict[str, ProbeGrid]
    store: ActivationStore | None
    comparison: Comparison | None = None

    @cached_property
    def first(self) -> ProbeGrid:
        return next(iter(self.grids.values()))

    @property
    def identity(self) -> ModelIdentity | None:
        """The model, if the grids say which it is."""
        return named_model(self.first.provenance)

    @cached_property
    def readers(self) -> dict[str, ProbeGrid]:
        """Grids by reader; with their own name too where two are of one reader."""
        if self.comparison is not None:
            return self.grids
        names = [reader_of(g) for g in self.grids.values()]
        return {
            reader if names.count(reader) == 1 else f"{reader} ({name})": grid
            for reader, (name, grid) in zip(names, self.grids.items(), strict=True)
        }

    def readers_of(self, keep: Callable[[Site], bool]) -> dict[str, ProbeGrid]:
        """The same, of the sites that `keep` accepts; a reader that was tried at none of them is left out."""
        found = {name: restricted(grid, keep) for name, grid in self.readers.items()}
        return {name: grid for name, grid in found.items() if grid is not None}

    @property
    def chance(self) -> float:
        """The share of the larger class."""
        return float(self.first.table["chance"][0])

    @property
    def size(self) -> str:
        line = self.first.table.row(0, named=True)
        return f"{line['n']:,} rows in {line['n_groups']:,} groups"

    @property
    def rows(self) -> str:
        """Which rows, how many, how grouped, and how held out, in words."""
        plan = self.first.provenance.get("plan", {})
        position = f", position {plan['at']}" if "at" in plan else ""
        folds = int(self.first.fold.max()) + 1
        return f"{self.name}: {self.size}{position}; {folds} folds that keep groups whole"

    @property
    def notes(self) -> str:
        """What the grids say of rows that were left out or assumed."""
        return " ".join(dict.fromkeys(g.note for g in self.grids.values() if g.note))


def named_model(provenance: Mapping[str, Any]) -> ModelIdentity | None:
    """The model that an artifact says it is of; None if it does not, or not in a way that can be read."""
    try:
        return ModelIdentity.from_json(provenance["identity"])
    except (KeyError, CorruptArtifact):
        return None


def reader_of(grid: ProbeGrid) -> str:
    """The reader that made a grid's directions."""
    return next(iter(grid.directions.values())).reader


def class_name(label: Label) -> str:
    """A label as a reader of a figure should see it: a bare number says that it is one."""
    return label if isinstance(label, str) else f"label {label}"


def spelled(row: Mapping[str, Any]) -> str:
    """A line of a grid's table in words."""
    return (
        f"{row['site']}: accuracy {row['accuracy']:.3f} "
        f"[{row['accuracy_low']:.3f}, {row['accuracy_high']:.3f}], AUROC {row['auroc']:.3f}"
    )


def spelled_sites(sites: Iterable[Site]) -> str:
    """Parts with their blocks: resid.post@0–29, attn.heads@0–29."""
    sites, out = list(sites), []
    for part in dict.fromkeys(site.part for site in sites):
        layers = sorted({site.layer for site in sites if site.part == part and site.layer is not None})
        out.append(f"{part}@{ranges(layers)}" if layers else part)
    return ", ".join(out)


def listing(sites: Iterable[Site]) -> str:
    """Sites for an error message, the middle left out where they are many."""
    names = [str(s) for s in sites]
    return ", ".join(names if len(names) <= 8 else [*names[:4], "…", *names[-3:]])


def studies(results: Results) -> tuple[Study, ...]:
    """The grids, put together by the rows and labels they were made from; a comparison is a study of its own."""
    stores = {store.manifest.digest: (name, store) for name, store in results.stores.items()}
    together: dict[tuple[Any, ...], dict[str, ProbeGrid]] = {}
    for name, grid in results.grids.items():
        source = tuple(grid.provenance.get(k) for k in ("store", "rows", "label"))
        # A grid that does not say what it was made from stands alone.
        together.setdefault(source if all(source) else (None, name, None), {})[name] = grid
    out = []
    for (digest, _, label), grids in together.items():
        known, store = stores.get(digest, (_common(list(grids)), None))
        out.append(Study(known if label in (None, "label") else f"{known} ({label})", grids, store))
    for name, comparison in results.comparisons.items():
        found = stores.get(str(comparison.first.provenance.get("store")))
        out.append(Study(name, dict(comparison.grids), found and found[1], comparison))
    names = [s.name for s in out]
    told_apart = [
        s if names.count(s.name) == 1 else dataclasses.replace(s, name=f"{s.name}: {', '.join(s.grids)}") for s in out
    ]
    return tuple(sorted(told_apart, key=lambda s: s.name))


def restricted(grid: ProbeGrid, keep: Callable[[Site], bool]) -> ProbeGrid | None:
    """The grid of the sites that `keep` accepts, so that choices are among those; None if there are none."""
    mask = np.array([keep(s) for s in grid.sites], dtype=bool)
    if not mask.any():
        return None
    return dataclasses.replace(
        grid,
        table=grid.table.filter(pl.Series(mask)),
        directions={s: d for s, d in grid.directions.items() if keep(s)},
        oof=grid.oof[:, mask],
        inner=grid.inner[:, mask],
    )


def whole_site(site: Site) -> bool:
    """Whether a site is neither a head nor a neuron."""
    return site.unit is None


def single_head(site: Site) -> bool:
    """Whether a site is one attention head."""
    return site.part == "attn.heads" and site.unit is not None


def best_line(grid: ProbeGrid) -> dict[str, Any]:
    """The table's line of `grid.best()`."""
    site = str(grid.best().site)
    return grid.table.row(by_predicate=pl.col("site") == site, named=True)


def interval(line: dict[str, Any], metric: str = "accuracy") -> str:
    """A metric of a line of a grid's table, with its interval."""
    return f"{line[metric]:.3f} [{line[f'{metric}_low']:.3f}, {line[f'{metric}_high']:.3f}]"


def chosen(grid: ProbeGrid) -> str:
    """The accuracy that includes the choice of site, with its interval."""
    if not len(grid.inner):  # with two folds there are no rows to choose with
        return "needs three folds"
    selected = grid.selected
    return f"{selected.accuracy:.3f} [{selected.accuracy_low:.3f}, {selected.accuracy_high:.3f}]"


def _common(names: Sequence[str]) -> str:
    """What names of grids have in common: cities-pca and cities-logistic are of cities."""
    words = [re.split(r"(?=[-_.])", n) for n in names]
    shared = words[0][:-1]
    if len(names) > 1:
        shared = [w[0] for w in zip(*words, strict=False) if len(set(w)) == 1]
    return "".join(shared) or names[0]
