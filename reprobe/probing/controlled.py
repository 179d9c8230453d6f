"""Controls in a grid's table: p-values that include the search, selectivity, description length.

Enters: a grid, the store and the reader it was made with. Leaves: the same grid with further columns. How each is
computed is in `permutation` and `controls`; here they are applied at every site, which is read once.
"""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from jaxtyping import Float, Integer
from joblib import Parallel, delayed
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from reprobe.errors import UnknownData, UsageError
from reprobe.model.sites import Site
from reprobe.probing.controls import CONTROLS, OnlineCode, Selectivity, online_code, reader_probabilities
from reprobe.probing.controls import selectivity as measure_selectivity
from reprobe.probing.grid import Source, site_rows
from reprobe.probing.permutation import Permutations, permutation_test
from reprobe.probing.probe_grid import OPTIONAL, ProbeGrid
from reprobe.probing.reader import Reader
from reprobe.probing.refit import refit_of
from reprobe.probing.rows import ProbeRows, select_rows
from reprobe.progress import Progress, silent

#: As `types`: each group is a type, and the rows of a group are spread over the folds.
GROUP = "group"


def with_controls(
    grid: ProbeGrid,
    store: Source,
    reader: Reader,
    *,
    permutations: int = 0,
    selectivity: bool = False,
    types: str = GROUP,
    mdl: bool = False,
    n_jobs: int = -1,
    progress: Progress = silent,
) -> ProbeGrid:
    """`grid` with the columns that are asked for, in its table and in the metrics of its directions.

    - `permutations` > 0 adds `p`: how often the best of all sites searched would have as high an AUROC if the labels
      meant nothing, (1 + as good) / (1 + permutations); family-wise over the sites of the grid (`permutation_test`).
    - `selectivity` adds `control`, the mean accuracy on `CONTROLS` tasks with a random label per type, and
      `selectivity`, the accuracy on the true task less that. `types` is the index column that names the types. With
      "group" the rows of a group are spread over the folds, so both accuracies are of types that were seen (in
      contrast pairs the side that was seen has the other label, which costs accuracy, and selectivity with it); with
      another column (the token, a template) the folds are the grid's.
    - `mdl` adds `bits`, the online code of the labels with whole groups, and `compression`, 1 bit a row over that.

    Selectivity and code use no pairs. With P permutations, a site takes P · folds fits (for `MeanDifference` two
    products of matrices each); the store's sites are read one by one. Seeds are those of the grid; what was done is
    in its provenance, under "controls".

    Raises `UsageError` if the grid is of another store, other rows or another reader, or nothing is asked for.
    """
    if not (permutations or selectivity or mdl):
        raise UsageError("no control was asked for: permutations=, selectivity=True or mdl=True")
    rows = _rows(grid, store)
    _require_reader(grid, reader)
    task = _Task(
        reader=reader,
        rows=rows,
        fold=grid.fold,
        seed=grid.seed,
        permutations=permutations,
        types=_types(store, rows, types, grid.fold, grid.seed) if selectivity else None,
        mdl=mdl,
    )
    found: list[_Controls] = []
    progress("controls", 0, len(grid.sites))
    with threadpool_limits(1, user_api="blas"):  # as in `probe`: one BLAS thread for each of ours
        run = Parallel(n_jobs=n_jobs, backend="threading", return_as="generator")
        for one in run(delayed(task)(site, X) for site, X in site_rows(store, grid.sites, rows)):
            found.append(one)
            progress("controls", len(found), len(grid.sites))
    columns, about = _columns(found, types)
    return _with_columns(grid, columns, about | {"seed": grid.seed})


@dataclass(frozen=True)
class _Types:
    """The type of each row, and the folds in which a type recurs."""

    names: np.ndarray
    fold: Integer[np.ndarray, " n"]


@dataclass(frozen=True)
class _Controls:
    """What was asked for at one site."""

    permuted: Permutations | None
    selective: Selectivity | None
    code: OnlineCode | None


@dataclass(frozen=True)
class _Task:
    """All controls of one site; the same draws of labels, types and order of groups at every site."""

    reader: Reader
    rows: ProbeRows
    fold: Integer[np.ndarray, " n"]
    seed: int
    permutations: int
    types: _Types | None
    mdl: bool

    def __call__(self, site: Site, X: Float[np.ndarray, "n width"]) -> _Controls:
        positive, groups, pairs = self.rows.positive, self.rows.groups, self.rows.pairs
        permuted = selective = code = None
        try:
            if self.permutations:
                permuted = permutation_test(
                    refit_of(self.reader, X, pairs, self.fold, groups),
                    positive,
                    groups,
                    pairs,
                    folds=self.fold,
                    permutations=self.permutations,
                    seed=self.seed,
                )
            if self.types is not None:
                # No groups: where they are the types, rows of one are on both sides here, and meant to be.
                refit = refit_of(self.reader, X, None, self.types.fold)
                selective = measure_selectivity(refit, positive, self.types.names, self.types.fold, seed=self.seed)
            if self.mdl:
                probabilities = reader_probabilities(self.reader, X, positive, groups, seed=self.seed)
                code = online_code(probabilities, positive, groups, seed=self.seed)
        except UsageError as error:
            raise UsageError(f"controls of {type(self.reader).__name__} at {site}: {error}") from error
        return _Controls(permuted, selective, code)


def _rows(grid: ProbeGrid, store: Source) -> ProbeRows:
    """The grid's rows, with what a grid does not keep of them."""
    if grid.provenance.get("store") != store.manifest.digest:
        raise UsageError("the grid was made from another store: controls are computed on the rows it was made from")
    rows = select_rows(
        store.index,
        label=grid.provenance["label"],
        positive=grid.classes[1],
        where=pl.col("row").is_in(grid.rows.tolist()),
    )
    if rows.digest != grid.provenance["rows"]:
        raise UsageError("the grid's rows, labels or groups are not those of this store")
    return rows


def _require_reader(grid: ProbeGrid, reader: Reader) -> None:
    made = next(iter(grid.directions.values()))
    params = json.loads(json.dumps(reader.get_params(), default=lambda value: value.item()))
    if made.reader != type(reader).__name__ or dict(made.params) != params:
        raise UsageError(f"the grid was made by {made.reader} with {dict(made.params)}, not by {reader!r}")


def _types(store: Source, rows: ProbeRows, types: str, fold: Integer[np.ndarray, " n"], seed: int) -> _Types:
    if types == GROUP:
        return _Types(rows.groups, _spread(rows.groups, int(fold.max()) + 1, seed))
    if types not in store.index.columns:
        raise UnknownData(f"no column {types!r} in the index; it has {', '.join(store.index.columns)}")
    named = store.index.select("row", type=pl.col(types).cast(pl.String).fill_null("")).sort("row")
    return _Types(named["type"].to_numpy()[np.searchsorted(named["row"].to_numpy(), rows.rows)], fold)


def _spread(groups: Integer[np.ndarray, " n"], folds: int, seed: int) -> Integer[np.ndarray, " n"]:
    """Folds that part the rows of every group as evenly as can be, and are of nearly one size."""
    order = np.lexsort((np.random.default_rng(seed).random(len(groups)), groups))
    fold = np.empty(len(groups), dtype=np.int64)
    fold[order] = np.arange(len(groups)) % folds
    return fold


def _columns(found: list[_Controls], types: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The columns, and in words and numbers how they came about."""
    columns: dict[str, np.ndarray] = {}
    about: dict[str, Any] = {}
    if permuted := [one.permuted for one in found if one.permuted is not None]:
        together = Permutations.of_all(permuted)
        columns["p"] = together.adjusted
        about |= {"permutations": len(together.maxima), "exchange": together.rule}
    if selective := [one.selective for one in found if one.selective is not None]:
        columns["control"] = np.concatenate([s.control for s in selective])
        columns["selectivity"] = np.concatenate([s.selectivity for s in selective])
        about |= {"types": types, "control_tasks": CONTROLS}
    if codes := [one.code for one in found if one.code is not None]:
        columns["bits"] = np.array([c.bits for c in codes])
        columns["compression"] = np.array([c.compression for c in codes])
        about["code_ends"] = list(codes[0].ends)
    return columns, about


def _with_columns(grid: ProbeGrid, columns: dict[str, np.ndarray], about: dict[str, Any]) -> ProbeGrid:
    """The grid with these columns, in the order of `OPTIONAL`, beside those it has."""
    table = grid.table.with_columns(**{name: pl.Series(values, dtype=pl.Float64) for name, values in columns.items()})
    table = table.select(
        [*(c for c in table.columns if c not in OPTIONAL), *(c for c in OPTIONAL if c in table.columns)]
    )
    provenance = {**grid.provenance, "controls": {**grid.provenance.get("controls", {}), **about}}
    directions = {
        site: dataclasses.replace(
            d, metrics={**d.metrics, **{c: float(columns[c][j]) for c in columns}}, provenance=provenance
        )
        for j, (site, d) in enumerate(grid.directions.items())
    }
    return dataclasses.replace(grid, table=table, directions=directions, provenance=provenance)
