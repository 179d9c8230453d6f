"""What probing leaves: a table of results, one direction per site, and the held-out scores they rest on.

Enters: results of `probe`. Leaves: the best direction, an estimate that the search did not flatter, a file, a
figure. Does not know stores or readers.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from jaxtyping import Bool, Float, Integer

from reprobe.errors import UsageError
from reprobe.model.sites import Site
from reprobe.probing.artifact import Artifact, array, read, write
from reprobe.probing.direction import Direction, Label
from reprobe.probing.intervals import ClusterBootstrap
from reprobe.probing.metrics import fold_auroc
from reprobe.probing.rows import ClassRows, ProbeRows
from reprobe.provenance import rebuilding, text, versions

KIND = "probe grid"
#: The table's columns, in order.
COLUMNS: dict[str, Any] = {
    "site": pl.String,
    "part": pl.String,
    "layer": pl.Int32,
    "head": pl.Int32,
    "width": pl.Int32,
    "n": pl.Int64,
    "n_groups": pl.Int64,
    "chance": pl.Float64,
    "accuracy": pl.Float64,
    "accuracy_low": pl.Float64,
    "accuracy_high": pl.Float64,
    "auroc": pl.Float64,
    "auroc_low": pl.Float64,
    "auroc_high": pl.Float64,
}
#: Columns that a table has besides where they were asked for (see `controlled`).
OPTIONAL: dict[str, Any] = {
    "p": pl.Float64,
    "control": pl.Float64,
    "selectivity": pl.Float64,
    "bits": pl.Float64,
    "compression": pl.Float64,
}
#: Arrays of a grid's file, with the kinds of numbers that they hold and their shape.
_ARRAYS: dict[str, tuple[Any, ...]] = {
    "oof": ("f", None, None),
    "inner": ("f", None, None),
    "positive": ("b", None),
    "groups": ("iu", None),
    "fold": ("iu", None),
    "rows": ("iu", None),
}


def site_columns(sites: Sequence[Site], widths: Sequence[int]) -> dict[str, list[Any]]:
    """The columns that say which site a line of a table is about."""
    return {
        "site": [str(s) for s in sites],
        "part": [s.part for s in sites],
        "layer": [s.layer for s in sites],
        "head": [s.unit if s.part == "attn.heads" else None for s in sites],
        "width": list(widths),
    }


def store_provenance(manifest: Any) -> dict[str, Any]:
    """What a result says of the store it was read from."""
    return {
        "identity": manifest.identity.to_json(),
        "prompts": manifest.prompts,
        "plan": dict(manifest.plan),
        "store": manifest.digest,
        "dtype": manifest.dtype,
        "versions": versions(),
    }


def probe_provenance(
    manifest: Any, rows: ProbeRows | ClassRows, *, label: str, folds: int, seed: int, searched: int
) -> dict[str, Any]:
    """What a result of cross-validation says of its store, its rows and folds, and the number of sites searched."""
    return store_provenance(manifest) | {
        "rows": rows.digest,
        "label": label,
        "folds": folds,
        "seed": seed,
        "sites_searched": searched,
        "note": rows.note,
    }


def results(
    sites: Sequence[Site],
    widths: Sequence[int],
    rows: ProbeRows | ClassRows,
    bootstrap: ClusterBootstrap,
    *,
    correct: Bool[np.ndarray, "n sites"],
    aurocs: Sequence[float],
    auroc_bounds: Sequence[Float[np.ndarray, " 2"]],
) -> pl.DataFrame:
    """The table of held-out results, a line per site; `correct` says of each row whether it was predicted rightly."""
    low, high = bootstrap.accuracy(correct)
    auroc_low, auroc_high = np.array(auroc_bounds).T
    values = {
        "n": [len(rows)] * len(sites),
        "n_groups": [rows.n_groups] * len(sites),
        "chance": [rows.chance] * len(sites),
        "accuracy": correct.mean(axis=0),
        "accuracy_low": low,
        "accuracy_high": high,
        "auroc": list(aurocs),
        "auroc_low": auroc_low,
        "auroc_high": auroc_high,
    }
    return pl.DataFrame(site_columns(sites, widths) | values, schema=COLUMNS)


def metrics_of(table: pl.DataFrame) -> list[dict[str, Any]]:
    """What each line of `results` says, but for the site it is of: the metrics of that site's direction."""
    return table.select(pl.exclude("site", "part", "layer", "head", "width")).to_dicts()


@dataclass(frozen=True)
class Selected:
    """Held-out accuracy with the choice of site included. `sites[k]` was chosen for, and tested on, fold k.

    `auroc` is the mean over folds; the interval is of the accuracy.
    """

    sites: tuple[Site, ...]
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    auroc: float
    chance: float
    n: int
    n_groups: int


@dataclass(frozen=True, eq=False)
class ProbeGrid:
    """Results of one reader at many sites.

    `table` has one line per site: accuracy of all held-out predictions, the mean of the folds' AUROCs, each
    with its 95 % interval over groups (see `intervals`), and `chance`, the share of the larger class. Where
    they were asked for, the columns of `OPTIONAL` follow; `controlled` says what they are.
    `directions` are fitted on all rows. `oof[i, j]` is the held-out score of row i at site j; above 0
    predicts `classes[1]`. `inner[k, j]` is the accuracy at site j by cross-validation among the rows outside
    fold k. `positive`, `groups`, `fold` and `rows` (number in the store) are those of each row. `note` says
    what was left out or assumed.
    """

    table: pl.DataFrame
    directions: Mapping[Site, Direction]
    oof: Float[np.ndarray, "n sites"]
    inner: Float[np.ndarray, "folds sites"]
    positive: Bool[np.ndarray, " n"]
    groups: Integer[np.ndarray, " n"]
    fold: Integer[np.ndarray, " n"]
    rows: Integer[np.ndarray, " n"]
    classes: tuple[Label, Label]
    note: str
    seed: int
    provenance: Mapping[str, Any]

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites probed, in the order of the table and of the columns of `oof`."""
        return tuple(self.directions)

    def best(self, by: str = "accuracy", *, part: str | None = None) -> Direction:
        """The direction of the site with the highest `by`; of equals, the first by layer, then by head.

        With `part`, the best among the sites of that part only. Its metrics are the site's own line of the table.
        They are the maximum over the sites searched, so they flatter it: `selected` does not.
        """
        numeric = [c for c, kind in COLUMNS.items() if kind == pl.Float64 and c != "chance"]
        if by not in numeric:
            raise UsageError(f"by={by!r}: a grid can be ranked by {', '.join(numeric)}")
        values = self.table[by].to_numpy()
        if part is not None:
            if part not in (have := {site.part for site in self.sites}):
                raise UsageError(f"no site of {part!r} was probed; parts here: {', '.join(sorted(have))}")
            values = np.where([site.part == part for site in self.sites], values, -np.inf)
        return self.directions[self.sites[self._first_best(values)]]

    @cached_property
    def selected(self) -> Selected:
        """An estimate that is not the maximum of what was searched: nested cross-validation.

        For each fold, the site is chosen by cross-validation among the other folds, and judged on this one;
        the folds' predictions are then pooled. No reader behind a choice has seen the fold it is made for.
        (Choosing by the `oof` scores of the other folds would take no further fits, but their readers were
        fitted on this fold, and on pure noise the result is 2 to 4 points too high.) The interval resamples
        groups and takes readers and choices as they are. Raises `UsageError` for a grid of two folds, which
        leave no rows to choose with.
        """
        scores, columns = self.nested
        right = (scores > 0) == self.positive
        low, high = ClusterBootstrap.draw(self.groups, self.seed).accuracy(right[:, None])[:, 0]
        return Selected(
            sites=tuple(self.sites[j] for j in columns),
            accuracy=float(right.mean()),
            accuracy_low=float(low),
            accuracy_high=float(high),
            auroc=fold_auroc(scores, self.positive, self.fold),
            chance=float(max(self.positive.mean(), 1 - self.positive.mean())),
            n=len(self.rows),
            n_groups=int(self.groups.max()) + 1,
        )

    @cached_property
    def nested(self) -> tuple[Float[np.ndarray, " n"], tuple[int, ...]]:
        """What `selected` rests on: each row's held-out score at the site chosen for its fold, and the column of
        that site for every fold. Raises `UsageError` for a grid of two folds."""
        if not len(self.inner):
            raise UsageError("two folds leave no rows to choose a site with: probe with folds=3 or more")
        columns = tuple(self._first_best(accuracies) for accuracies in self.inner)
        return self.oof[np.arange(len(self.fold)), np.array(columns)[self.fold]], columns

    def _first_best(self, values: Float[np.ndarray, " sites"]) -> int:
        """Column with the greatest value; of equals, the first by layer, head and order."""

        def rank(j: int) -> tuple[float, int, int, int]:
            layer, unit = self.sites[j].layer, self.sites[j].unit
            return -float(values[j]), -1 if layer is None else layer, -1 if unit is None else unit, j

        return min(range(len(values)), key=rank)

    def artifact(self) -> Artifact:
        """The grid as a JSON header and arrays, from which `from_artifact` makes an equal one."""
        shared = {"provenance", "classes"}
        header = {
            "table": self.table.to_dict(as_series=False),
            "directions": [{k: v for k, v in d.to_json().items() if k not in shared} for d in self.directions.values()],
            "classes": list(self.classes),
            "note": self.note,
            "seed": self.seed,
            "provenance": dict(self.provenance),
        }
        arrays = {name: np.asarray(getattr(self, name)) for name in _ARRAYS}
        return Artifact(header, arrays | {f"vector.{j}": d.vector for j, d in enumerate(self.directions.values())})

    @classmethod
    def from_artifact(cls, artifact: Artifact, where: Path) -> "ProbeGrid":
        """The grid of a header and arrays found in `where`. Raises `CorruptArtifact` if they are not those of one."""
        header, arrays = artifact.header, artifact.arrays
        with rebuilding(f"{where} is not a probe grid"):
            shared = {"provenance": header["provenance"], "classes": header["classes"]}
            found = [
                Direction.from_json(value | shared, arrays[f"vector.{j}"])
                for j, value in enumerate(header["directions"])
            ]
            negative, positive = header["classes"]
            grid = cls(
                table=pl.DataFrame(header["table"], schema=_schema(header["table"])),
                directions={d.site: d for d in found if d.site is not None},
                classes=(negative, positive),
                note=text(header["note"]),
                seed=header["seed"],
                provenance=header["provenance"],
                **{name: array(arrays, name, kinds, *shape) for name, (kinds, *shape) in _ARRAYS.items()},
            )
            grid._require_sound()
            return grid

    def _require_sound(self) -> None:
        """Raise `ValueError` where tables and arrays do not fit each other, or are no results at all."""
        n, sites = len(self.rows), len(self.directions)
        rows = {name: getattr(self, name) for name in ("positive", "groups", "fold", "rows")}
        if not n or any(a.shape != (n,) for a in rows.values()) or self.oof.shape != (n, sites):
            raise ValueError(f"its arrays are not of {n} rows and {sites} sites")
        if self.inner.ndim != 2 or self.inner.shape[1] != sites or not np.isfinite(self.oof).all():
            raise ValueError("its scores are not finite numbers of every row, fold and site")
        if any(a.min() < 0 for name, a in rows.items() if name != "positive") or self.groups.max() >= n:
            raise ValueError("its groups, folds or rows are no numbers from 0")
        if self.fold.max() >= min(n, len(self.inner) or n) or type(self.seed) is not int or self.seed < 0:
            raise ValueError("its folds or its seed are not those of a cross-validation")
        widths = [direction.width for direction in self.directions.values()]
        for name, values in site_columns(list(self.directions), widths).items():
            if self.table[name].to_list() != values:
                raise ValueError(f"its table and its directions are of different sites: column {name!r}")

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write one safetensors file, whole or not at all; `ArtifactExists` unless `overwrite`."""
        path = Path(path)
        write(path, KIND, self.artifact(), overwrite=overwrite)
        return path

    @classmethod
    def load(cls, path: str | Path) -> "ProbeGrid":
        """What `save` wrote. Raises `ArtifactMissing`, `CorruptArtifact`, or `UsageError`."""
        path = Path(path)
        return cls.from_artifact(read(path, KIND), path)

    def plot(self) -> Any:
        """A matplotlib `Figure`: accuracy over blocks with its interval and chance, and over block × head."""
        from matplotlib.figure import Figure

        heads = self.table.filter(pl.col("head").is_not_null())
        curves = self.table.filter(pl.col("head").is_null())
        panels = [draw for draw, data in ((draw_curves, curves), (_draw_heads, heads)) if len(data)]
        figure = Figure(figsize=(6.4 * len(panels), 4.0), layout="constrained")
        for axes, draw in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            draw(axes, curves if draw is draw_curves else heads)
        return figure


def _schema(columns: Iterable[str]) -> dict[str, Any]:
    return COLUMNS | {name: kind for name, kind in OPTIONAL.items() if name in columns}


def draw_curves(axes: Any, table: pl.DataFrame, *, by: str = "part") -> None:
    """Accuracy over blocks with its interval, a line per value of the column `by`, and chance."""
    last = int(table["layer"].max() or 0)  # type: ignore[arg-type]
    # What has no block stands where the data pass it: before the first block, or after the last.
    at = pl.coalesce("layer", pl.when(pl.col("part") == "embed").then(-1).otherwise(last + 1))
    for (name,), lines in table.with_columns(at=at).sort("at").group_by(by, maintain_order=True):
        (line,) = axes.plot(lines["at"], lines["accuracy"], marker="o", markersize=3, label=name)
        axes.fill_between(
            lines["at"],
            lines["accuracy_low"],
            lines["accuracy_high"],
            color=line.get_color(),
            alpha=0.2,
            linewidth=0,
        )
    axes.axhline(table["chance"][0], color="0.5", linestyle="--", label="majority class")
    axes.set(xlabel="block", ylabel="held-out accuracy (95 % interval)")
    axes.legend(frameon=False)


def _draw_heads(axes: Any, table: pl.DataFrame) -> None:
    layers, heads = table["layer"].to_numpy(), table["head"].to_numpy()
    values = np.full((layers.max() + 1, heads.max() + 1), np.nan)
    values[layers, heads] = table["accuracy"].to_numpy()
    image = axes.imshow(values, origin="lower", aspect="auto", cmap="viridis")
    axes.figure.colorbar(image, ax=axes, label=f"held-out accuracy (majority class: {table['chance'][0]:.2f})")
    axes.set(xlabel="head", ylabel="block")
