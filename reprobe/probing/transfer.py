"""Does what was read from one data set hold on another? Train on each, test on each, at every site.

Enters: several stores of one model, a reader. Leaves: a `TransferGrid`. Means, scales and thresholds come from
training rows, unless `transductive` asks for the test data's own mean as well. Does not know models.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from jaxtyping import Bool, Float, Integer
from joblib import Parallel, delayed
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from reprobe.errors import UnknownSite, UsageError
from reprobe.model.sites import Site
from reprobe.probing.crossval import group_folds
from reprobe.probing.direction import Direction, Label
from reprobe.probing.grid import Source, site_rows, wanted_sites
from reprobe.probing.intervals import ClusterBootstrap
from reprobe.probing.metrics import fold_auroc
from reprobe.probing.reader import Reader, TrainingRows
from reprobe.probing.refit import fit_on
from reprobe.probing.rows import ProbeRows, common_groups, require_pairs, select_rows
from reprobe.probing.tables import write_table
from reprobe.progress import Progress, silent
from reprobe.provenance import versions

#: The table's columns, in order.
COLUMNS: dict[str, Any] = {
    "train": pl.String,
    "test": pl.String,
    "site": pl.String,
    "part": pl.String,
    "layer": pl.Int32,
    "head": pl.Int32,
    "centring": pl.String,
    "n_train": pl.Int64,
    "left_out": pl.Int64,
    "fits": pl.Int32,
    "n": pl.Int64,
    "n_groups": pl.Int64,
    "chance": pl.Float64,
    "accuracy": pl.Float64,
    "accuracy_low": pl.Float64,
    "accuracy_high": pl.Float64,
    "auroc": pl.Float64,
    "auroc_low": pl.Float64,
    "auroc_high": pl.Float64,
    "train_rows": pl.String,
    "test_rows": pl.String,
}
#: Values of the column `centring`.
TRAINING, OWN_MEAN = "training", "own mean"


@dataclass(frozen=True, eq=False)
class TransferGrid:
    """Results of one reader, trained on each data set and tested on each.

    `table` has one line per (train, test, site, centring):

    - `centring`: "training" uses nothing of the test rows but their activations one by one; "own mean" subtracts
      from each data set its own mean first, that of the tested one included (transductive).
    - `left_out`: rows of the training set whose group is among the tested rows; no reader was tested on a group it
      was fitted on. Where there are any, and on the diagonal, the test set is scored fold by fold by `fits` readers,
      each fitted without the groups of its fold; `n_train` is the smallest number of rows that one was fitted on.
    - `accuracy` of all test rows and `auroc` (mean over the folds) with 95 % intervals over groups of the test set;
      `chance`: the share of its larger class.
    - `train_rows`, `test_rows`: digests of the rows with their labels and groups.

    `names` are the data sets in the order given; `notes` what was left out or assumed in each.
    """

    table: pl.DataFrame
    names: tuple[str, ...]
    notes: Mapping[str, str]
    provenance: Mapping[str, Any]

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites that were tested, as texts."""
        return tuple(self.table["site"].unique(maintain_order=True))

    def matrix(
        self, site: Site | str, metric: str = "accuracy", *, centring: str = TRAINING
    ) -> Float[np.ndarray, "train test"]:
        """One metric at one site: a row per training set, a column per test set, in the order of `names`."""
        numeric = [c for c, kind in COLUMNS.items() if kind == pl.Float64]
        if metric not in numeric:
            raise UsageError(f"{metric!r} is no metric of the table; it has {', '.join(numeric)}")
        lines = self.table.filter((pl.col("site") == str(site)) & (pl.col("centring") == centring))
        if not len(lines):
            told = f"{', '.join(self.sites[:6])}{', …' if len(self.sites) > 6 else ''}"
            kinds = ", ".join(map(repr, self.table["centring"].unique(maintain_order=True)))
            raise UnknownSite(f"nothing for {str(site)!r} centred by {centring!r}: there are sites {told}; {kinds}")
        values = {(a, b): v for a, b, v in lines.select("train", "test", metric).iter_rows()}
        return np.array([[values[a, b] for b in self.names] for a in self.names])

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write the table whole or not at all: .parquet, .csv, or .json, which also holds notes and provenance.

        Raises `ArtifactExists` unless `overwrite`, `UsageError` for any other suffix.
        """
        about = {"names": list(self.names), "notes": dict(self.notes), "provenance": dict(self.provenance)}
        return write_table(self.table, path, overwrite=overwrite, about=about)


def transfer(
    stores: Mapping[str, Source],
    reader: Reader,
    *,
    sites: str | Site | Iterable[str | Site] | None = None,
    label: str = "label",
    positive: Label | None = None,
    where: pl.Expr | None = None,
    transductive: bool = False,
    folds: int = 5,
    seed: int = 0,
    n_jobs: int = -1,
    progress: Progress = silent,
) -> TransferGrid:
    """Train `reader` on each of `stores` (name → store) and test it on each, at every site that all of them hold.

    The diagonal is group-safe cross-validation. Groups are the same in two data sets if their names are, or if they
    hold the same prompts; a reader is never tested on a group that it was fitted on (see `TransferGrid`).
    `transductive=True` adds the results with every data set centred by its own mean, as in Marks & Tegmark 2023,
    beside the honest ones. Other arguments as in `probe`.

    Raises `IdentityMismatch` for stores of different models; `UnknownSite` for a site that one of them lacks;
    `UsageError` for fewer than two stores, labels that differ between them, too few groups for the folds, or groups
    so shared that a training set is left with one class.
    """
    if len(stores) < 2:
        raise UsageError(f"transfer is between data sets: it needs two stores or more, not {len(stores)}")
    if not isinstance(reader, Reader):
        raise UsageError(f"transfer takes a reader, such as MeanDifference(), not {reader!r}")
    names, first = tuple(stores), next(iter(stores.values()))
    for name, store in stores.items():
        store.manifest.identity.require_same(first.manifest.identity, f"the store {name!r}")
    chosen = _common_sites(stores, sites)
    selected = [_select(name, store, reader, label, positive, where) for name, store in stores.items()]
    classes = selected[0].classes
    for name, rows in zip(names, selected, strict=True):
        if rows.classes != classes:
            raise UsageError(f"labels differ: {names[0]!r} has {classes}, {name!r} has {rows.classes}")
    sets = _in_common_folds(names, stores, selected, folds, seed)
    tasks = (
        delayed(_at_site)(reader, arrays[0][0], [X for _, X in arrays], sets, transductive)
        for arrays in zip(
            *(site_rows(s, chosen, r) for s, r in zip(stores.values(), selected, strict=True)), strict=True
        )
    )
    lines: list[dict[str, Any]] = []
    progress("transfer", 0, len(chosen))
    with threadpool_limits(1, user_api="blas"):  # as in `probe`: one BLAS thread for each of ours
        run = Parallel(n_jobs=n_jobs, backend="threading", return_as="generator")
        for done, found in enumerate(run(tasks), start=1):
            lines += found
            progress("transfer", done, len(chosen))
    return TransferGrid(
        table=pl.DataFrame(lines, schema=COLUMNS),
        names=names,
        notes={name: rows.note for name, rows in zip(names, selected, strict=True)},
        provenance={
            "identity": first.manifest.identity.to_json(),
            "stores": {name: store.manifest.digest for name, store in stores.items()},
            "prompts": {name: store.manifest.prompts for name, store in stores.items()},
            "rows": {name: rows.digest for name, rows in zip(names, selected, strict=True)},
            "reader": type(reader).__name__,
            "params": reader.get_params(),
            "label": label,
            "classes": list(classes),
            "folds": folds,
            "seed": seed,
            "versions": versions(),
        },
    )


@dataclass(frozen=True)
class _DataSet:
    """Rows of one data set; `groups` and `fold` have the same meaning in all of them."""

    name: str
    rows: ProbeRows
    groups: Integer[np.ndarray, " n"]
    fold: Integer[np.ndarray, " n"]
    bootstrap: ClusterBootstrap


def _in_common_folds(
    names: tuple[str, ...], stores: Mapping[str, Source], selected: list[ProbeRows], folds: int, seed: int
) -> list[_DataSet]:
    prompts = [store.manifest.prompts for store in stores.values()]
    groups = common_groups(selected, prompts)
    # Every data set has its own share of every class in each fold, so that each can be tested fold by fold.
    kinds = np.concatenate([2 * i + rows.positive for i, rows in enumerate(selected)])
    try:
        fold = group_folds(np.concatenate(groups), kinds, folds, seed)
    except UsageError as error:
        told = "; ".join(
            f"{2 * i + j} is {name!r} with label {rows.classes[j]!r}"
            for i, (name, rows) in enumerate(zip(names, selected, strict=True))
            for j in (0, 1)
        )
        raise UsageError(f"{error} (here {told})") from error
    parts = np.split(fold, np.cumsum([len(g) for g in groups])[:-1])
    return [
        _DataSet(name, rows, g, f, ClusterBootstrap.draw(np.unique(g, return_inverse=True)[1], seed))
        for name, rows, g, f in zip(names, selected, groups, parts, strict=True)
    ]


def _at_site(
    reader: Reader, site: Site, arrays: list[Float[np.ndarray, "n width"]], sets: list[_DataSet], transductive: bool
) -> list[dict[str, Any]]:
    """The table's lines of one site."""
    lines = []
    for centring in (TRAINING, OWN_MEAN) if transductive else (TRAINING,):
        used = arrays if centring == TRAINING else [X - X.mean(axis=0) for X in arrays]
        for train, X in zip(sets, used, strict=True):
            fitted: dict[bytes, Direction] = {}  # tests that leave out the same rows share a reader
            for test, Z in zip(sets, used, strict=True):
                scores = np.empty(len(Z), dtype=np.float32)
                fold = _test_folds(train, test)
                n_train = []
                for k in np.unique(fold):
                    tested = fold == k
                    kept = ~np.isin(train.groups, test.groups[tested])
                    n_train.append(int(kept.sum()))
                    key = kept.tobytes()
                    if key not in fitted:
                        fitted[key] = _fit(reader, site, X, train, test, kept)
                    scores[tested] = fitted[key].score(Z[tested])
                lines.append(
                    _line(site, centring, train, test, fold, scores)
                    | {
                        "n_train": min(n_train),
                        "left_out": int(np.isin(train.groups, test.groups).sum()),
                        "fits": len(n_train),
                    }
                )
    return lines


def _test_folds(train: _DataSet, test: _DataSet) -> Integer[np.ndarray, " n"]:
    """The folds in which `test` is scored: one, unless groups of it are in the training set."""
    shared = bool(np.isin(test.groups, train.groups).any())
    return test.fold if shared else np.zeros_like(test.fold)


def _fit(
    reader: Reader,
    site: Site,
    X: Float[np.ndarray, "n width"],
    train: _DataSet,
    test: _DataSet,
    kept: Bool[np.ndarray, " n"],
) -> Direction:
    positive = train.rows.positive[kept]
    if positive.all() or not positive.any():
        raise UsageError(
            f"{train.name!r} and {test.name!r} share so many groups that no reader can be trained on the one and "
            f"tested on the other: without the tested groups, {len(positive)} rows of one class or none are left"
        )
    rows = TrainingRows(X, train.rows.positive, train.rows.pairs, groups=train.groups)
    try:
        return fit_on(reader, rows, kept).direction_
    except UsageError as error:
        raise UsageError(f"{type(reader).__name__} on {train.name!r} at {site}: {error}") from error


def _line(
    site: Site,
    centring: str,
    train: _DataSet,
    test: _DataSet,
    fold: Integer[np.ndarray, " n"],
    scores: Float[np.ndarray, " n"],
) -> dict[str, Any]:
    positive = test.rows.positive
    right = (scores > 0) == positive
    low, high = test.bootstrap.accuracy(right[:, None])[:, 0]
    auroc_low, auroc_high = test.bootstrap.auroc(scores, positive, fold)
    return {
        "train": train.name,
        "test": test.name,
        "site": str(site),
        "part": site.part,
        "layer": site.layer,
        "head": site.unit if site.part == "attn.heads" else None,
        "centring": centring,
        "n": len(positive),
        "n_groups": len(test.bootstrap.counts),
        "chance": test.rows.chance,
        "accuracy": float(right.mean()),
        "accuracy_low": float(low),
        "accuracy_high": float(high),
        "auroc": fold_auroc(scores, positive, fold),
        "auroc_low": float(auroc_low),
        "auroc_high": float(auroc_high),
        "train_rows": train.rows.digest,
        "test_rows": test.rows.digest,
    }


def _select(
    name: str, store: Source, reader: Reader, label: str, positive: Label | None, where: pl.Expr | None
) -> ProbeRows:
    try:
        rows = select_rows(store.index, label=label, positive=positive, where=where)
        if reader.uses_pairs and rows.pairs is not None:
            require_pairs(rows, type(reader).__name__)
    except UsageError as error:
        raise type(error)(f"{name!r}: {error}") from error
    return rows


def _common_sites(stores: Mapping[str, Source], sites: str | Site | Iterable[str | Site] | None) -> tuple[Site, ...]:
    """The sites asked for, which every store must hold; by default those that every store holds."""
    asked = sites if sites is None or isinstance(sites, str | Site) else tuple(sites)
    found = {name: wanted_sites(store, asked) for name, store in stores.items()}
    first = next(iter(found.values()))
    if sites is None:
        common = tuple(s for s in first if all(s in other for other in found.values()))
        if not common:
            raise UnknownSite(f"no site is stored in all of {', '.join(map(repr, stores))}")
        return common
    for name, other in found.items():
        lacking = sorted({*map(str, first)} ^ {*map(str, other)})
        if lacking:
            raise UnknownSite(f"{lacking[0]} is not in every store ({name!r} and {next(iter(stores))!r} differ in it)")
    return first
