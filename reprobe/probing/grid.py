"""One reader at many sites of a store, judged on rows it was not fitted on.

Enters: a store (or anything that looks like one), a reader. Leaves: a `ProbeGrid`. Every split keeps groups
whole, and every scale, mean and threshold is fitted on training rows alone. Does not know models.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, groupby
from typing import Any, Protocol

import numpy as np
import polars as pl
import torch
from jaxtyping import Bool, Float, Integer
from joblib import Parallel, delayed
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from reprobe.errors import UnknownSite, UsageError
from reprobe.model.sites import Parts, Site, expand
from reprobe.probing.crossval import group_folds
from reprobe.probing.direction import Direction, Label
from reprobe.probing.intervals import ClusterBootstrap
from reprobe.probing.metrics import fold_auroc
from reprobe.probing.probe_grid import ProbeGrid, metrics_of, probe_provenance, results
from reprobe.probing.reader import BatchReader, Plane, Reader, TrainingRows, as_array, direction_of, without_direction
from reprobe.probing.refit import fit_on
from reprobe.probing.rows import ClassRows, ProbeRows, require_pairs, select_rows
from reprobe.probing.streaming import can_stream, stream
from reprobe.progress import Progress, silent

#: Numbers of the sites that a `BatchReader` is given at once.
_BATCH = 1 << 22


class Source(Protocol):
    """What `probe` asks of a store; an `ActivationStore` is one."""

    @property
    def sites(self) -> tuple[Site, ...]: ...
    @property
    def parts(self) -> Parts: ...
    @property
    def index(self) -> pl.DataFrame: ...
    @property
    def manifest(self) -> Any: ...
    def width(self, site: Site) -> int: ...
    def read(self, site: Site, rows: Any = None) -> torch.Tensor: ...
    def iter(
        self, sites: Iterable[str | Site], *, batch_rows: int = ..., shuffle: None = ..., rows: Any = ...
    ) -> Iterator[Any]: ...


def probe(
    store: Source,
    reader: Reader,
    *,
    sites: str | Site | Iterable[str | Site] | None = None,
    label: str = "label",
    positive: Label | None = None,
    where: pl.Expr | None = None,
    folds: int = 5,
    seed: int = 0,
    n_jobs: int = -1,
    memory: int = 4 << 30,
    progress: Progress = silent,
) -> ProbeGrid:
    """Cross-validate `reader` at every site, and fit one direction per site on all rows.

    `sites`: sites or patterns; by default everything stored, `attn.heads` split into heads. `label` is the
    index column to predict and `positive` the label that scores above 0 (default: the greater of the two);
    rows without a label are left out, `where` keeps some of the others. `folds` hold whole groups, drawn by
    `seed`, which also draws the bootstrap. `n_jobs` threads (−1: one per processor). `reader` itself is
    not fitted. A site takes folds + 1 fits for its results, and folds · (folds − 1) / 2 more for the nested
    choice of a site, `ProbeGrid.selected`; a `BatchReader` does them for many sites at once.

    Where the rows of a site do not fit into `memory` (bytes), readers made of moments and the logistic reader are
    fitted in batches instead, to the same result (but of several penalties a logistic reader chooses on the rows that
    fit): see `streaming`.

    Raises `UnknownSite` for a site that is not stored; `UnknownData` for a missing column; `UsageError` for
    labels that are not two, too few groups, NaN in the activations, a site at which the reader finds no
    direction, or one that does not fit into memory and a reader that needs it whole.
    """
    if not isinstance(reader, Reader):
        raise UsageError(
            f"probe takes a reader of two classes, such as MeanDifference(), not {reader!r}; for more classes there is "
            "probe_classes, for the tokens of a sequence probe_sequences"
        )
    rows = select_rows(store.index, label=label, positive=positive, where=where)
    if reader.uses_pairs and rows.pairs is not None:
        require_pairs(rows, type(reader).__name__)
    chosen = wanted_sites(store, sites)
    fold = group_folds(rows.groups, rows.positive, folds, seed)
    bootstrap = ClusterBootstrap.draw(rows.groups, seed)
    left_out = _left_out(folds)
    kept = np.stack([~np.isin(fold, list(out)) for out in left_out])
    found: list[_Found] = []
    progress("probe", 0, len(chosen))
    # One BLAS thread for each of ours: the problems are small, and BLAS threads waiting for one another cost
    # more than they bring (ten times the time, measured with two).
    with threadpool_limits(1, user_api="blas"):
        run = Parallel(n_jobs=n_jobs, backend="threading", return_as="generator")
        if _too_large(store, reader, chosen, rows, memory):
            streamed = stream(store, reader, chosen, rows, fold, left_out, memory=memory)
            tasks = (delayed(_judge)(one.scores, one.direction, rows, fold, bootstrap) for one in streamed)
        elif isinstance(reader, BatchReader):
            fitted = _fit_together(reader, site_rows(store, chosen, rows), rows, kept)
            tasks = (delayed(_judge)(scores, direction, rows, fold, bootstrap) for scores, direction in fitted)
        else:
            tasks = (
                delayed(_fit_and_judge)(reader, site, X, rows, kept, fold, bootstrap)
                for site, X in site_rows(store, chosen, rows)
            )
        for one in run(tasks):
            found.append(one)
            progress("probe", len(found), len(chosen))
    oof = np.stack([f.oof for f in found], axis=1)
    table = results(
        chosen,
        [f.direction.width for f in found],
        rows,
        bootstrap,
        correct=(oof > 0) == rows.positive[:, None],
        aurocs=[f.auroc for f in found],
        auroc_bounds=[f.auroc_bounds for f in found],
    )
    provenance = probe_provenance(store.manifest, rows, label=label, folds=folds, seed=seed, searched=len(chosen))
    directions = {
        site: dataclasses.replace(f.direction, site=site, classes=rows.classes, metrics=metrics, provenance=provenance)
        for site, f, metrics in zip(chosen, found, metrics_of(table), strict=True)
    }
    return ProbeGrid(
        table=table,
        directions=directions,
        oof=oof,
        inner=np.stack([f.inner for f in found], axis=1),
        positive=rows.positive,
        groups=rows.groups,
        fold=fold,
        rows=rows.rows,
        classes=rows.classes,
        note=rows.note,
        seed=seed,
        provenance=provenance,
    )


@dataclass(frozen=True)
class _Found:
    """What one site gave: held-out scores, their AUROC with its bounds, the direction fitted on all rows.

    `inner[k]` is the accuracy by cross-validation among the rows outside fold k; empty for two folds.
    """

    oof: Float[np.ndarray, " n"]
    inner: Float[np.ndarray, " folds"]
    auroc: float
    auroc_bounds: Float[np.ndarray, " 2"]
    direction: Direction


def _pairs_of_folds(folds: int) -> list[tuple[int, int]]:
    # The inner folds are the outer ones, so a reader fitted without folds j and k serves both: tested on
    # j it judges the site for fold k, tested on k for fold j. That halves the price of nesting.
    return list(combinations(range(folds), 2)) if folds > 2 else []


def _left_out(folds: int) -> list[frozenset[int]]:
    """The folds that each fit at a site leaves out: one, two, none."""
    return [*(frozenset({k}) for k in range(folds)), *map(frozenset, _pairs_of_folds(folds)), frozenset()]


def _too_large(store: Source, reader: Reader, sites: tuple[Site, ...], rows: ProbeRows, memory: int) -> bool:
    """Whether a site's rows, as read, in float64 and once more as a reader works on them, are more than `memory`."""
    widest = max({site.whole for site in sites}, key=store.width)
    size = 3 * 8 * len(rows) * store.width(widest)
    if size > memory and not can_stream(reader):
        raise UsageError(
            f"{len(rows):,} rows of {widest} take {size / 2**30:.1f} GiB to fit, more than memory={memory}, and "
            f"{type(reader).__name__} needs them all at once: allow more memory, keep fewer rows with where=, or use a "
            "reader that is fitted in batches, such as MeanDifference, LDAReader or LogisticReader"
        )
    return size > memory


def _fit_and_judge(
    reader: Reader,
    site: Site,
    X: Float[np.ndarray, "n width"],
    rows: ProbeRows,
    kept: Bool[np.ndarray, "fits n"],
    fold: Integer[np.ndarray, " n"],
    bootstrap: ClusterBootstrap,
) -> _Found:
    everything = TrainingRows(X, rows.positive, rows.pairs, groups=rows.groups)
    try:
        found = [fit_on(reader, everything, training).direction_ for training in kept]
    except UsageError as error:
        raise without_direction(type(reader).__name__, site, error) from error
    scores = X @ np.stack([d.vector for d in found]).T - np.array([d.offset for d in found])
    return _judge(scores, found[-1], rows, fold, bootstrap)


def _fit_together(
    reader: BatchReader,
    reads: Iterable[tuple[Site, Float[np.ndarray, "n width"]]],
    rows: ProbeRows,
    kept: Bool[np.ndarray, "fits n"],
) -> Iterator[tuple[Float[np.ndarray, "n fits"], Direction]]:
    """The scores of all rows by each fit of a site, and the last fit's direction; a batch of sites at a time."""
    for batch in _batches(reads):
        planes: Iterator[Sequence[Plane]] | None = None
        for site, X in batch:
            try:
                if planes is None:
                    planes = reader.fit_batch(np.stack([X for _, X in batch]), rows.positive, rows.groups, kept)
                found = next(planes)
            except UsageError as error:
                raise without_direction(type(reader).__name__, site, error) from error
            lengths = np.array([np.linalg.norm(p.normal) for p in found])
            normals = np.stack([p.normal for p in found]) / lengths[:, None]
            direction = direction_of(found[-1], float(np.std(X @ normals[-1])), reader, (False, True))
            yield X @ normals.T - np.array([p.level for p in found]) / lengths, direction


def _batches(
    reads: Iterable[tuple[Site, Float[np.ndarray, "n width"]]],
) -> Iterator[list[tuple[Site, Float[np.ndarray, "n width"]]]]:
    """Neighbouring sites of one width, `_BATCH` numbers at a time."""
    for _, same in groupby(reads, key=lambda read: read[1].shape[1]):
        batch: list[tuple[Site, Float[np.ndarray, "n width"]]] = []
        for site, X in same:
            batch.append((site, X))
            if len(batch) * X.size >= _BATCH:
                yield batch
                batch = []
        if batch:
            yield batch


def _judge(
    scores: Float[np.ndarray, "n fits"],
    direction: Direction,
    rows: ProbeRows,
    fold: Integer[np.ndarray, " n"],
    bootstrap: ClusterBootstrap,
) -> _Found:
    """What a site's fits, of `_left_out`, say of it."""
    folds = int(fold.max()) + 1
    # From here on float32, as saved, so that a loaded grid gives the very same numbers.
    oof = scores[np.arange(len(scores)), fold].astype(np.float32)
    right = np.zeros(folds)
    for (j, k), inner in zip(_pairs_of_folds(folds), scores.T[folds:], strict=False):
        correct = (inner > 0) == rows.positive
        right[k] += correct[fold == j].sum()
        right[j] += correct[fold == k].sum()
    return _Found(
        oof=oof,
        inner=right / (len(scores) - np.bincount(fold)) if folds > 2 else np.empty(0),
        auroc=fold_auroc(oof, rows.positive, fold),
        auroc_bounds=bootstrap.auroc(oof, rows.positive, fold),
        direction=direction,
    )


def wanted_sites(store: Source, sites: str | Site | Iterable[str | Site] | None) -> tuple[Site, ...]:
    if sites is None:
        heads = {s: expand(f"attn.heads@{s.layer}.*", store.parts) for s in store.sites if s.part == "attn.heads"}
        return tuple(one for s in store.sites for one in heads.get(s, (s,)))
    chosen = expand(sites, store.parts)
    absent = [str(s) for s in chosen if s.whole not in store.sites]
    if absent:
        raise UnknownSite(f"{absent[0]!r} is not stored; stored are {', '.join(map(str, store.sites))}")
    return chosen


def site_rows(
    store: Source, sites: tuple[Site, ...], rows: ProbeRows | ClassRows
) -> Iterator[tuple[Site, Float[np.ndarray, "n width"]]]:
    """The rows of each site as float64. Neighbouring heads (or neurons) of one block are read at once."""
    for whole, units in groupby(sites, key=lambda s: s.whole):
        values = np.asarray(as_array(store.read(whole, rows.rows)), dtype=np.float64)
        bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
        if bad.size:
            shown = ", ".join(f"{rows.rows[i]} (prompt {rows.prompts[i]!r})" for i in bad[:5])
            raise UsageError(f"{whole}: NaN or infinity in {bad.size} of {len(values)} rows: {shown}")
        for site in units:
            if site.unit is None:
                yield site, values
            else:
                width = store.width(site)
                yield site, np.ascontiguousarray(values[:, site.unit * width : (site.unit + 1) * width])
