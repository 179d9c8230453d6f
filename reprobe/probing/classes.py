"""A reader of several classes at many sites of a store, judged on rows it was not fitted on.

Enters: a store, a `MultiClassReader`. Leaves: a `ClassGrid`. Splits keep groups whole, as in `probe`. Does not know
models.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from jaxtyping import Float, Integer
from joblib import Parallel, delayed
from sklearn.base import clone
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from reprobe.errors import UnknownSite, UsageError
from reprobe.model.sites import Site
from reprobe.probing.crossval import group_folds
from reprobe.probing.direction import Direction, Label
from reprobe.probing.grid import Source, site_rows, wanted_sites
from reprobe.probing.intervals import ClusterBootstrap
from reprobe.probing.metrics import fold_auroc
from reprobe.probing.probe_grid import metrics_of, probe_provenance, results
from reprobe.probing.reader import without_direction
from reprobe.probing.readers.multiclass import MultiClassReader
from reprobe.probing.rows import ClassRows, select_classes
from reprobe.progress import Progress, silent


@dataclass(frozen=True, eq=False)
class ClassGrid:
    """Results of one reader of several classes at many sites.

    `table` has the columns of a `ProbeGrid`'s: `accuracy` of all held-out predictions, `chance`, the share of the
    largest class, and `auroc`, the macro average: the mean over classes of the AUROC of the class's score against all
    other classes (0.5 by chance). Intervals are over groups. `directions[site]` holds one direction per class, fitted
    on all rows. `scores[i, j]` are the held-out scores of row i at site j, one per class; `predicted[i, j]` the place
    in `classes` of the highest. `codes`, `groups`, `fold` and `rows` (number in the store) are those of each row.
    """

    table: pl.DataFrame
    directions: Mapping[Site, Mapping[Label, Direction]]
    scores: Float[np.ndarray, "n sites classes"]
    codes: Integer[np.ndarray, " n"]
    groups: Integer[np.ndarray, " n"]
    fold: Integer[np.ndarray, " n"]
    rows: Integer[np.ndarray, " n"]
    classes: tuple[Label, ...]
    note: str
    provenance: Mapping[str, Any]

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites probed, in the order of the table."""
        return tuple(self.directions)

    @property
    def predicted(self) -> Integer[np.ndarray, "n sites"]:
        """The place in `classes` of each held-out prediction."""
        highest: np.ndarray = np.argmax(self.scores, axis=2)
        return highest

    def confusion(self, site: Site | str) -> pl.DataFrame:
        """Held-out predictions at a site, counted: a line per true label, a column per predicted one."""
        where = Site.parse(site) if isinstance(site, str) else site
        if where not in self.directions:
            raise UnknownSite(f"{where} was not probed; probed were {', '.join(map(str, self.sites))}")
        n = len(self.classes)
        cells = n * self.codes + self.predicted[:, self.sites.index(where)]
        counts = np.bincount(cells, minlength=n * n).reshape(n, n)
        names = [str(c) for c in self.classes]
        return pl.DataFrame({"label": names} | {f"as {name}": counts[:, i] for i, name in enumerate(names)})


def probe_classes(
    store: Source,
    reader: MultiClassReader,
    *,
    sites: str | Site | Iterable[str | Site] | None = None,
    label: str = "label",
    where: pl.Expr | None = None,
    folds: int = 5,
    seed: int = 0,
    n_jobs: int = -1,
    progress: Progress = silent,
) -> ClassGrid:
    """Cross-validate a reader of several classes at every site, and fit it once per site on all rows.

    `label` is the index column that names the classes, two or more; the other arguments are as in `probe`. The best
    line of the table is the maximum over the sites searched, so it flatters; there is no nested choice here.

    Raises as `probe`, and `UsageError` for a class that fewer groups hold than there are folds.
    """
    if not isinstance(reader, MultiClassReader):
        raise UsageError(f"probe_classes takes a MultiClassReader, such as MultiClassReader({reader!r})")
    rows = select_classes(store.index, label=label, where=where)
    chosen = wanted_sites(store, sites)
    fold = group_folds(rows.groups, np.array(rows.classes)[rows.codes], folds, seed)
    bootstrap = ClusterBootstrap.draw(rows.groups, seed)
    found: list[tuple[np.ndarray, Mapping[Label, Direction]]] = []
    progress("probe", 0, len(chosen))
    with threadpool_limits(1, user_api="blas"):
        run = Parallel(n_jobs=n_jobs, backend="threading", return_as="generator")
        of_sites = site_rows(store, chosen, rows)
        tasks = (delayed(_probe_site)(reader, site, X, rows, fold) for site, X in of_sites)
        for one in run(tasks):
            found.append(one)
            progress("probe", len(found), len(chosen))
    scores = np.stack([s for s, _ in found], axis=1)
    widths = [next(iter(each.values())).width for _, each in found]
    sides = [rows.codes == c for c in range(len(rows.classes))]
    table = results(
        chosen,
        widths,
        rows,
        bootstrap,
        correct=np.argmax(scores, axis=2) == rows.codes[:, None],
        aurocs=[
            float(np.mean([fold_auroc(of_site[:, c], side, fold) for c, side in enumerate(sides)]))
            for of_site in scores.swapaxes(0, 1)
        ],
        auroc_bounds=[bootstrap.macro_auroc(of_site, rows.codes, fold) for of_site in scores.swapaxes(0, 1)],
    )
    provenance = probe_provenance(store.manifest, rows, label=label, folds=folds, seed=seed, searched=len(chosen))
    return ClassGrid(
        table=table,
        directions={
            site: {
                c: dataclasses.replace(d, site=site, metrics=metrics, provenance=provenance) for c, d in each.items()
            }
            for site, (_, each), metrics in zip(chosen, found, metrics_of(table), strict=True)
        },
        scores=scores,
        codes=rows.codes,
        groups=rows.groups,
        fold=fold,
        rows=rows.rows,
        classes=rows.classes,
        note=rows.note,
        provenance=provenance,
    )


def _probe_site(
    reader: MultiClassReader,
    site: Site,
    X: Float[np.ndarray, "n width"],
    rows: ClassRows,
    fold: Integer[np.ndarray, " n"],
) -> tuple[Float[np.ndarray, "n classes"], Mapping[Label, Direction]]:
    def fit(kept: np.ndarray) -> MultiClassReader:
        fitted: MultiClassReader = clone(reader).fit_rows(X[kept], rows.codes[kept], rows.classes, rows.groups[kept])
        return fitted

    scores = np.empty((len(X), len(rows.classes)), dtype=np.float32)
    try:
        for k in range(int(fold.max()) + 1):
            scores[fold == k] = fit(fold != k).scores(X[fold == k])
        return scores, fit(np.ones(len(X), dtype=bool)).directions_
    except UsageError as error:
        raise without_direction(repr(reader), site, error) from error
