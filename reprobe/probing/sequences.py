"""One score per prompt, from all of its tokens: `AttentionReader` at the sites of a store, judged as `probe` judges.

Enters: a store with every token of each prompt (extracted with at="all", or a span's "all"), a reader of sequences.
Leaves: a `ProbeGrid` whose rows are prompts. Splits keep groups whole, as in `probe`. Does not know models.
"""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import polars as pl
from jaxtyping import Float, Integer
from joblib import Parallel, delayed
from sklearn.base import clone
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from reprobe.errors import UsageError
from reprobe.model.sites import Site
from reprobe.probing.crossval import group_folds
from reprobe.probing.direction import Direction, Label
from reprobe.probing.grid import Source, site_rows, wanted_sites
from reprobe.probing.intervals import ClusterBootstrap
from reprobe.probing.metrics import fold_auroc
from reprobe.probing.probe_grid import ProbeGrid, metrics_of, probe_provenance, results
from reprobe.probing.reader import without_direction
from reprobe.probing.readers.attention import AttentionReader, TokenRows
from reprobe.probing.rows import ProbeRows, select_rows
from reprobe.progress import Progress, silent


def probe_sequences(
    store: Source,
    reader: AttentionReader,
    *,
    sites: str | Site | Iterable[str | Site] | None = None,
    label: str = "label",
    positive: Label | None = None,
    where: pl.Expr | None = None,
    folds: int = 5,
    seed: int = 0,
    n_jobs: int = -1,
    progress: Progress = silent,
) -> ProbeGrid:
    """Cross-validate a reader of sequences at every site, and fit it once per site on all prompts.

    The stored rows of a prompt that `where` keeps are its sequence, in the order of positions; where=pl.col("position")
    > 0 leaves out the first token, whose state in many models is huge and the same in every prompt, so that it swamps
    the scale of the others. Arguments as in `probe`.
    In the grid a row is a prompt: `n`, `oof` and the intervals count prompts, and `rows` has the number of each
    prompt's last row. `directions` are the readers' value directions; a prompt's score is that of its pooled row.

    In memory are as many sites as threads (`n_jobs`), and one more, in float64. Raises as `probe`, and `UsageError` for
    a prompt with rows of both labels.
    """
    if not isinstance(reader, AttentionReader):
        raise UsageError(
            f"probe_sequences takes an AttentionReader, not {reader!r}: single rows are probed with probe(…)"
        )
    tokens = select_rows(store.index, label=label, positive=positive, where=where)
    starts, prompts = _prompts(tokens)
    chosen = wanted_sites(store, sites)
    fold = group_folds(prompts.groups, prompts.positive, folds, seed)
    bootstrap = ClusterBootstrap.draw(prompts.groups, seed)
    found: list[_Found] = []
    progress("probe", 0, len(chosen))
    with threadpool_limits(1, user_api="blas"):
        run = Parallel(n_jobs=n_jobs, backend="threading", return_as="generator", pre_dispatch="n_jobs")
        tasks = (
            delayed(_probe_site)(reader, site, TokenRows(X, starts, prompts.positive), fold)
            for site, X in site_rows(store, chosen, tokens)
        )
        for one in run(tasks):
            found.append(one)
            progress("probe", len(found), len(chosen))
    oof = np.stack([f.oof for f in found], axis=1)
    table = results(
        chosen,
        [f.direction.width for f in found],
        prompts,
        bootstrap,
        correct=(oof > 0) == prompts.positive[:, None],
        aurocs=[fold_auroc(o, prompts.positive, fold) for o in oof.T],
        auroc_bounds=[bootstrap.auroc(o, prompts.positive, fold) for o in oof.T],
    )
    provenance = probe_provenance(store.manifest, prompts, label=label, folds=folds, seed=seed, searched=len(chosen))
    return ProbeGrid(
        table=table,
        directions={
            site: dataclasses.replace(
                f.direction, site=site, classes=prompts.classes, metrics=metrics, provenance=provenance
            )
            for site, f, metrics in zip(chosen, found, metrics_of(table), strict=True)
        },
        oof=oof,
        inner=np.stack([f.inner for f in found], axis=1),
        positive=prompts.positive,
        groups=prompts.groups,
        fold=fold,
        rows=prompts.rows,
        classes=prompts.classes,
        note=prompts.note,
        seed=seed,
        provenance=provenance,
    )


def _prompts(tokens: ProbeRows) -> tuple[Integer[np.ndarray, " prompts"], ProbeRows]:
    """Where each prompt's rows start, and the same selection with one row per prompt, its last."""
    names = np.array(tokens.prompts)
    starts = np.flatnonzero(np.append(True, names[1:] != names[:-1]))
    lengths = np.diff(starts, append=len(names))
    mixed = np.repeat(tokens.positive[starts], lengths) != tokens.positive
    if mixed.any():
        raise UsageError(
            f"prompt {tokens.prompts[int(np.argmax(mixed))]!r} has rows of both labels: a sequence has one; tokens "
            "with labels of their own are probed with probe(…)"
        )
    last = starts + lengths - 1
    note = f"{tokens.note} {len(starts)} prompts of {lengths.min()} to {lengths.max()} rows, one sequence each."
    one = dataclasses.replace(
        tokens,
        rows=tokens.rows[last],
        positive=tokens.positive[last],
        groups=tokens.groups[last],
        pairs=None,
        names=tuple(tokens.names[i] for i in last),
        prompts=tuple(tokens.prompts[i] for i in last),
        note=note.strip(),
    )
    return starts, one


@dataclass(frozen=True)
class _Found:
    """What one site gave; fields as in `ProbeGrid`."""

    oof: Float[np.ndarray, " n"]
    inner: Float[np.ndarray, " folds"]
    direction: Direction


def _probe_site(reader: AttentionReader, site: Site, rows: TokenRows, fold: Integer[np.ndarray, " n"]) -> _Found:
    def fit(kept: np.ndarray) -> AttentionReader:
        fitted: AttentionReader = clone(reader).fit_tokens(rows.only(kept))
        return fitted

    def score(fitted: AttentionReader, held_out: np.ndarray) -> np.ndarray:
        part = rows.only(held_out)
        return fitted.score_tokens(part.X, part.starts)

    folds = int(fold.max()) + 1
    oof, right = np.empty(len(fold), dtype=np.float32), np.zeros(folds)
    try:
        for k in range(folds):
            oof[fold == k] = score(fit(fold != k), fold == k)
        # As in `probe`: a reader fitted without folds j and k judges the site for both.
        for j, k in combinations(range(folds), 2) if folds > 2 else ():
            inner = fit((fold != j) & (fold != k))
            for tested, judged in ((j, k), (k, j)):
                right[judged] += ((score(inner, fold == tested) > 0) == rows.positive[fold == tested]).sum()
        direction = fit(np.ones(len(fold), dtype=bool)).direction_
    except UsageError as error:
        raise without_direction(type(reader).__name__, site, error) from error
    return _Found(oof, right / (len(fold) - np.bincount(fold)) if folds > 2 else np.empty(0), direction)
