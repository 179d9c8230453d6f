"""Several readers at the same sites, on the same rows, in the same folds: which reads better, and is that sure?

Enters: a store, readers. Leaves: a `Comparison`. Every number is of rows that were held out, from its reader, its
site where one was chosen, and its calibration. Does not know models.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from jaxtyping import Bool, Float, Integer, Num
from joblib import Parallel, delayed
from scipy.special import expit
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from reprobe.errors import UsageError
from reprobe.model.sites import Site
from reprobe.probing.artifact import Artifact, array, read, write
from reprobe.probing.calibration import Platt
from reprobe.probing.direction import Label
from reprobe.probing.grid import Source, probe, site_rows
from reprobe.probing.intervals import ClusterBootstrap, share_interval
from reprobe.probing.metrics import Weighted, calibration_error, fold_auroc, recall_at_fpr, weighted_auroc
from reprobe.probing.probe_grid import ProbeGrid, draw_curves
from reprobe.probing.reader import Reader, TrainingRows, without_direction
from reprobe.probing.refit import scores_inside
from reprobe.probing.rows import ProbeRows, select_rows
from reprobe.progress import Progress, silent
from reprobe.provenance import rebuilding, text

KIND = "comparison"
_NUMBERS: dict[str, Any] = {
    name: pl.Float64
    for metric in ("accuracy", "auroc", "recall", "ece")
    for name in (metric, f"{metric}_low", f"{metric}_high")
}
#: The columns of `Comparison.table`, in order.
COLUMNS: dict[str, Any] = {
    "reader": pl.String,
    "site": pl.String,
    "part": pl.String,
    "layer": pl.Int32,
    "head": pl.Int32,
    "n": pl.Int64,
    "n_groups": pl.Int64,
    "chance": pl.Float64,
    **_NUMBERS,
    "chosen": pl.Int32,
}
#: The columns of `Comparison.choices`, in order.
CHOICES: dict[str, Any] = {
    "reader": pl.String,
    "sites": pl.String,
    "n": pl.Int64,
    "n_groups": pl.Int64,
    "chance": pl.Float64,
    **_NUMBERS,
}
#: The columns of `Comparison.differences`, in order.
DIFFERENCES: dict[str, Any] = {
    "reader": pl.String,
    "other": pl.String,
    **{
        f"{metric}{bound}": pl.Float64
        for metric in ("accuracy_difference", "auroc_difference")
        for bound in ("", "_low", "_high")
    },
}


@dataclass(frozen=True)
class Calibrated:
    """Held-out probabilities of the positive class, each row at the site that was chosen for its fold.

    `platt` is scaled after Platt, by scores held out inside the training rows; `plain` is σ(score), the score in
    standard deviations of those same scores: what one would have without scaling.
    """

    plain: Float[np.ndarray, " n"]
    platt: Float[np.ndarray, " n"]
    positive: Bool[np.ndarray, " n"]
    groups: Integer[np.ndarray, " n"]


@dataclass(frozen=True, eq=False)
class Comparison:
    """Results of several readers at the same sites.

    `table` has one line per reader and site: accuracy, AUROC, recall at 1 % false positives (means over the folds)
    and the calibration error after Platt scaling, each with its 95 % interval over groups; `chance`, the share of
    the larger class; `chosen`, in how many folds the nested cross-validation chose this site for this reader.
    `grids` are those of `probe`, by reader: same rows, same folds. `plain` and `platt` are probabilities as in
    `Calibrated`, (n, sites) for each reader.
    """

    table: pl.DataFrame
    grids: Mapping[str, ProbeGrid]
    plain: Mapping[str, Float[np.ndarray, "n sites"]]
    platt: Mapping[str, Float[np.ndarray, "n sites"]]

    @property
    def readers(self) -> tuple[str, ...]:
        """Names of the readers, in the order in which they were given."""
        return tuple(self.grids)

    @property
    def first(self) -> ProbeGrid:
        """A grid for what is the same in all of them: rows, classes, groups, folds, sites, provenance."""
        return next(iter(self.grids.values()))

    def calibrated(self, reader: str) -> Calibrated:
        """Probabilities of one reader; `UsageError` for one that was not compared."""
        grid = self._grid(reader)
        where = np.arange(len(grid.fold)), np.array(grid.nested[1])[grid.fold]
        return Calibrated(self.plain[reader][where], self.platt[reader][where], grid.positive, grid.groups)

    @cached_property
    def choices(self) -> pl.DataFrame:
        """One line per reader, with the choice of site included (`ProbeGrid.selected`): `sites` says what was chosen
        in how many folds; the metrics and intervals are those of `table`."""
        bootstrap = self._bootstrap
        lines = []
        for name, grid in self.grids.items():
            scores, columns = grid.nested
            line = self.first.table.select("n", "n_groups", "chance").row(0, named=True)
            numbers = _metrics(scores, self.calibrated(name).platt, grid, bootstrap)
            lines.append({"reader": name, "sites": _counted([grid.sites[j] for j in columns])} | line | numbers)
        return pl.DataFrame(lines, schema=CHOICES)

    @cached_property
    def differences(self) -> pl.DataFrame:
        """One line per pair of readers: accuracy and AUROC of `reader` minus those of `other`, each at the sites
        chosen for it, on the same rows in the same resamples of groups.

        Each interval holds by itself: of many pairs, one in twenty would exclude 0 if no two readers differed.
        """
        bootstrap, nested = self._bootstrap, {name: grid.nested[0] for name, grid in self.grids.items()}
        positive, fold = self.first.positive, self.first.fold
        lines = []
        for name, other in combinations(self.grids, 2):
            a, b = nested[name], nested[other]
            right = ((a > 0) == positive).astype(np.int64) - ((b > 0) == positive)
            low, high = bootstrap.bounds(_mean_of(right))
            if not right.any():  # no row tells them apart: as sure as of a share of which none was seen
                high = share_interval((right != 0)[:, None], bootstrap.groups)[1, 0]
                low = -high
            auroc_low, auroc_high = bootstrap.bounds(_difference(a, b, positive, fold))
            lines.append(
                {
                    "reader": name,
                    "other": other,
                    "accuracy_difference": float(right.mean()),
                    "accuracy_difference_low": float(low),
                    "accuracy_difference_high": float(high),
                    "auroc_difference": fold_auroc(a, positive, fold) - fold_auroc(b, positive, fold),
                    "auroc_difference_low": float(auroc_low),
                    "auroc_difference_high": float(auroc_high),
                }
            )
        return pl.DataFrame(lines, schema=DIFFERENCES)

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write one safetensors file, whole or not at all; `ArtifactExists` unless `overwrite`."""
        path = Path(path)
        grids = {name: grid.artifact() for name, grid in self.grids.items()}
        header = {
            "table": self.table.to_dict(as_series=False),
            "grids": [{"reader": name, "header": artifact.header} for name, artifact in grids.items()],
        }
        arrays: dict[str, np.ndarray] = {}
        for i, (name, artifact) in enumerate(grids.items()):
            arrays |= {f"{i}.{key}": value for key, value in artifact.arrays.items()}
            arrays |= {f"{i}.plain": self.plain[name], f"{i}.platt": self.platt[name]}
        write(path, KIND, Artifact(header, arrays), overwrite=overwrite)
        return path

    @classmethod
    def load(cls, path: str | Path) -> "Comparison":
        """What `save` wrote. Raises `ArtifactMissing`, `CorruptArtifact`, or `UsageError`."""
        path = Path(path)
        artifact = read(path, KIND)
        with rebuilding(f"{path} is not a comparison"):
            names = [text(entry["reader"]) for entry in artifact.header["grids"]]
            arrays: list[dict[str, np.ndarray]] = [{} for _ in names]
            for key, value in artifact.arrays.items():
                number, _, own = key.partition(".")
                arrays[int(number)][own] = value
            grids = {
                name: ProbeGrid.from_artifact(Artifact(entry["header"], own), path)
                for name, entry, own in zip(names, artifact.header["grids"], arrays, strict=True)
            }
            first = next(iter(grids.values()))
            for grid in grids.values():
                pairs = zip(_shared(grid), _shared(first), strict=True)
                if grid.sites != first.sites or any((a != b).any() for a, b in pairs):
                    raise ValueError("its readers were not judged on the same rows and folds")
            return cls(
                table=pl.DataFrame(artifact.header["table"], schema=COLUMNS),
                grids=grids,
                plain={
                    name: array(own, "plain", "f", *first.oof.shape) for name, own in zip(names, arrays, strict=True)
                },
                platt={
                    name: array(own, "platt", "f", *first.oof.shape) for name, own in zip(names, arrays, strict=True)
                },
            )

    def plot(self) -> Any:
        """A matplotlib `Figure`: accuracy over blocks, a line with its interval per reader, and chance; a panel per
        part. `report.layer_curves(comparison.grids)` draws the same for a page or a paper."""
        from matplotlib.figure import Figure

        table = self.table.filter(pl.col("head").is_null())
        if not len(table):
            raise UsageError("only heads were compared: plot one reader's, comparison.grids[reader].plot()")
        parts = table["part"].unique(maintain_order=True).to_list()
        figure = Figure(figsize=(6.4 * len(parts), 4.0), layout="constrained")
        for axes, part in zip(figure.subplots(1, len(parts), squeeze=False)[0], parts, strict=True):
            draw_curves(axes, table.filter(pl.col("part") == part), by="reader")
            axes.set_title(part)
        return figure

    def _grid(self, reader: str) -> ProbeGrid:
        if reader not in self.grids:
            raise UsageError(f"no reader {reader!r} was compared; there are {', '.join(self.grids)}")
        return self.grids[reader]

    @cached_property
    def _bootstrap(self) -> ClusterBootstrap:
        return ClusterBootstrap.draw(self.first.groups, self.first.seed)


def compare(
    store: Source,
    readers: Mapping[str, Reader] | Iterable[Reader],
    *,
    sites: str | Site | Iterable[str | Site] | None = None,
    label: str = "label",
    positive: Label | None = None,
    where: pl.Expr | None = None,
    folds: int = 5,
    seed: int = 0,
    n_jobs: int = -1,
    progress: Progress = silent,
) -> Comparison:
    """`probe` with each of `readers` (by name, or named by their classes), in the same folds, and what sets them apart.

    Other arguments as in `probe`; three folds at least, since sites are chosen and scores calibrated inside the
    training rows. Beside the fits of `probe`, each reader takes folds · (folds − 1) / 2 more per site for that.

    Raises as `probe` does, and `UsageError` for no reader or two of one name.
    """
    named = _named(readers)
    if folds < 3:
        raise UsageError(f"folds={folds}: three at least, to choose a site and to calibrate inside the training rows")
    asked = sites if sites is None or isinstance(sites, str | Site) else tuple(sites)
    grids = {
        name: probe(
            store,
            reader,
            sites=asked,
            label=label,
            positive=positive,
            where=where,
            folds=folds,
            seed=seed,
            n_jobs=n_jobs,
            progress=_under(name, progress),
        )
        for name, reader in named.items()
    }
    first = next(iter(grids.values()))
    rows = select_rows(store.index, label=label, positive=positive, where=where)
    bootstrap = ClusterBootstrap.draw(rows.groups, seed)
    done: list[list[_Judged]] = []
    progress("calibrate", 0, len(first.sites))
    with threadpool_limits(1, user_api="blas"):  # as in `probe`: one BLAS thread for each of ours
        run = Parallel(n_jobs=n_jobs, backend="threading", return_as="generator")
        tasks = (
            delayed(_judge)(named, grids, j, X, rows, bootstrap)
            for j, (_, X) in enumerate(site_rows(store, first.sites, rows))
        )
        for judged in run(tasks):
            done.append(judged)
            progress("calibrate", len(done), len(first.sites))
    by_reader = {name: [judged[i] for judged in done] for i, name in enumerate(named)}
    return Comparison(
        table=pl.DataFrame(
            [line for name, grid in grids.items() for line in _lines(name, grid, by_reader[name])], schema=COLUMNS
        ),
        grids=grids,
        plain={name: np.stack([j.plain for j in judged], axis=1) for name, judged in by_reader.items()},
        platt={name: np.stack([j.platt for j in judged], axis=1) for name, judged in by_reader.items()},
    )


@dataclass(frozen=True)
class _Judged:
    """What one reader gave at one site: probabilities, and the metrics that a grid does not have."""

    plain: Float[np.ndarray, " n"]
    platt: Float[np.ndarray, " n"]
    metrics: Mapping[str, float]


def _judge(
    readers: Mapping[str, Reader],
    grids: Mapping[str, ProbeGrid],
    j: int,
    X: Float[np.ndarray, "n width"],
    rows: ProbeRows,
    bootstrap: ClusterBootstrap,
) -> list[_Judged]:
    """All readers at the site of column j."""
    found = []
    training = TrainingRows(X, rows.positive, rows.pairs, groups=rows.groups)
    for name, reader in readers.items():
        grid = grids[name]
        try:
            plain, platt = _probabilities(
                scores_inside(reader, training, grid.fold), grid.oof[:, j], grid.positive, grid.fold
            )
        except UsageError as error:
            raise without_direction(name, grid.sites[j], error) from error
        found.append(_Judged(plain, platt, _further(grid.oof[:, j], platt, grid, bootstrap)))
    return found


def _shared(grid: ProbeGrid) -> tuple[np.ndarray, ...]:
    """What all readers of a comparison have in common."""
    return grid.positive, grid.groups, grid.fold, grid.rows


def _probabilities(
    inside: Float[np.ndarray, "folds n"],
    oof: Float[np.ndarray, " n"],
    positive: Bool[np.ndarray, " n"],
    fold: Integer[np.ndarray, " n"],
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """`Calibrated.plain` and `.platt` at one site, as saved: float32."""
    plain, platt = np.empty(len(oof), dtype=np.float32), np.empty(len(oof), dtype=np.float32)
    for k, scores in enumerate(inside):
        here = fold == k
        platt[here] = Platt.fit(scores[~here], positive[~here]).probabilities(oof[here])
        plain[here] = expit(oof[here] / scores[~here].std())
    return plain, platt


def _metrics(
    scores: Float[np.ndarray, " n"], platt: Float[np.ndarray, " n"], grid: ProbeGrid, bootstrap: ClusterBootstrap
) -> dict[str, float]:
    """All metrics with their bounds."""
    right = (scores > 0) == grid.positive
    found = {"accuracy": float(right.mean()), "auroc": fold_auroc(scores, grid.positive, grid.fold)}
    bounds = {
        "accuracy": bootstrap.accuracy(right[:, None])[:, 0],
        "auroc": bootstrap.auroc(scores, grid.positive, grid.fold),
    }
    return _with_bounds(found, bounds) | _further(scores, platt, grid, bootstrap)


def _further(
    scores: Float[np.ndarray, " n"], platt: Float[np.ndarray, " n"], grid: ProbeGrid, bootstrap: ClusterBootstrap
) -> dict[str, float]:
    """The metrics that a grid's table does not have."""
    found = {
        "recall": recall_at_fpr(scores, grid.positive, grid.fold),
        "ece": calibration_error(platt, grid.positive),
    }
    bounds = {
        "recall": bootstrap.recall_at_fpr(scores, grid.positive, grid.fold),
        "ece": bootstrap.calibration_error(platt, grid.positive),
    }
    return _with_bounds(found, bounds)


def _with_bounds(found: Mapping[str, float], bounds: Mapping[str, np.ndarray]) -> dict[str, float]:
    out: dict[str, float] = {}
    for name, value in found.items():
        low, high = bounds[name]
        out |= {name: value, f"{name}_low": float(low), f"{name}_high": float(high)}
    return out


def _lines(name: str, grid: ProbeGrid, judged: Sequence[_Judged]) -> Iterator[dict[str, Any]]:
    columns = [c for c in COLUMNS if c in grid.table.columns]
    chosen = np.bincount(grid.nested[1], minlength=len(grid.sites))
    for line, one, times in zip(grid.table.select(columns).iter_rows(named=True), judged, chosen, strict=True):
        yield {"reader": name, **line, **one.metrics, "chosen": int(times)}


def _mean_of(values: Integer[np.ndarray, " n"]) -> Weighted:
    """The mean of the rows' values, as a function of row weights."""

    def mean(weights: Num[np.ndarray, "rows draws"]) -> Float[np.ndarray, " draws"]:
        w = weights.astype(np.float64)
        found: np.ndarray = (values @ w) / w.sum(axis=0)
        return found

    return mean


def _difference(
    a: Float[np.ndarray, " n"],
    b: Float[np.ndarray, " n"],
    positive: Bool[np.ndarray, " n"],
    fold: Integer[np.ndarray, " n"],
) -> Weighted:
    """The AUROC of `a` minus that of `b`, as a function of row weights."""
    one, other = weighted_auroc(a, positive, fold), weighted_auroc(b, positive, fold)
    return lambda weights: one(weights) - other(weights)


def _counted(sites: Sequence[Site]) -> str:
    """Sites with the number of folds each was chosen in, most often chosen first: "resid.post@11 ×3, …"."""
    names = [str(s) for s in sites]
    found = sorted(dict.fromkeys(names), key=lambda name: -names.count(name))
    return ", ".join(f"{name} ×{names.count(name)}" for name in found)


def _named(readers: Mapping[str, Reader] | Iterable[Reader]) -> dict[str, Reader]:
    if isinstance(readers, Mapping):
        named = dict(readers)
    else:
        given = list(readers)
        names = [type(r).__name__ for r in given]
        if doubled := [name for name in names if names.count(name) > 1]:
            raise UsageError(f"several readers are a {doubled[0]}: name them, compare(store, {{name: reader, …}})")
        named = dict(zip(names, given, strict=True))
    if not named:
        raise UsageError("compare needs at least one reader, such as MeanDifference()")
    return named


def _under(name: str, progress: Progress) -> Progress:
    return lambda what, done, total: progress(f"{what} {name}", done, total)
