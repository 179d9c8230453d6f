"""Inference-time intervention (Li et al. 2023, arXiv:2306.03341): push the heads that know along what they know.

Enters: a store of `attn.heads` at the last token of question-and-answer prompts, each question a group. Leaves: a
`Steering`, or, for an evaluation on questions that were not used, one `HeadRanking` per fold, each with its steering.
Does not know models or tokens.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import polars as pl
from jaxtyping import Float, Integer

from reprobe.control import Add, Scope, Steering
from reprobe.errors import UnknownSite, UsageError
from reprobe.model.sites import Site
from reprobe.probing import LogisticReader, MeanDifference, Reader
from reprobe.probing.crossval import group_folds
from reprobe.probing.direction import Direction, Label
from reprobe.probing.grid import Source, site_rows, wanted_sites
from reprobe.probing.probe_grid import store_provenance
from reprobe.probing.reader import TrainingRows
from reprobe.probing.refit import fit_on
from reprobe.probing.rows import ProbeRows, require_pairs, select_rows
from reprobe.progress import Progress, silent
from reprobe.provenance import digest_lines

#: The share of a development fold's questions that the probes are fitted on; the others rank the heads.
TRAIN_SHARE = 0.8


@dataclass(frozen=True, eq=False)
class HeadRanking:
    """All heads, best first, as one fold of questions sees them.

    `accuracy[i]` is that of the probe of the i-th head on the validation rows; equal heads are in the order of layer
    and head. `directions` are in the same order: unit vectors from the false to the true answers' mean, `scale` the σ
    by which the intervention is multiplied. `train`, `validation` and `test` are numbers of rows of the store; the
    test rows, those of the other folds' questions, were used for nothing (but see `compat` of `head_ranking`).
    """

    directions: Mapping[Site, Direction]
    accuracy: Float[np.ndarray, " heads"]
    train: Integer[np.ndarray, " train"]
    validation: Integer[np.ndarray, " validation"]
    test: Integer[np.ndarray, " test"]

    @property
    def sites(self) -> tuple[Site, ...]:
        """The heads, best first."""
        return tuple(self.directions)

    def top(self, k: int) -> tuple[Direction, ...]:
        """The directions of the k best heads; `UsageError` unless there are as many."""
        if not 1 <= k <= len(self.directions):
            raise UsageError(f"k={k}: a number of heads from 1 to {len(self.directions)}, which were ranked")
        return tuple(self.directions.values())[:k]

    def steering(self, *, K: int, alpha: float, tokens: Scope | str = "last") -> Steering:
        """x_h += α·σ_h·θ_h at the `K` best heads, `alpha` standard deviations along each head's own direction.

        One `Add` per block, at its whole `attn.heads`, with the heads' steps side by side. `tokens="last"` is the last
        position of every forward pass of a generation, as published; for multiple choice the published code acts from
        the answer's first token on, which is `tokens="generated"`. Raises `UsageError` unless there are K heads and
        `alpha` is a number.
        """
        chosen = tuple(zip(self.sites, self.top(K), strict=False))
        provenance = dict(chosen[0][1].provenance)
        adds = []
        for layer in sorted({site.layer or 0 for site in self.sites}):
            here = [(site.unit or 0, d) for site, d in chosen if site.layer == layer]
            if not here:
                continue
            n_heads = 1 + max(site.unit or 0 for site in self.sites if site.layer == layer)
            steps = np.zeros((n_heads, here[0][1].width))
            for unit, d in here:
                steps[unit] = d.step
            said = {"identity": provenance.get("identity"), "heads": [unit for unit, _ in here]}
            whole = Direction.from_vector(Site("attn.heads", layer), steps.ravel(), provenance=said)
            adds.append(Add(whole, alpha, tokens=tokens))
        made = {"method": "iti", "K": K, "alpha": alpha, "heads": [str(site) for site, _ in chosen]}
        return Steering(*adds, name=f"ITI, {K} heads", provenance=provenance | made)


def fit(
    store: Source,
    *,
    K: int,
    alpha: float,
    tokens: Scope | str = "last",
    probe: Reader | None = None,
    direction: Reader | None = None,
    label: str = "label",
    positive: Label | None = None,
    where: pl.Expr | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> Steering:
    """ITI from all questions of a store: the K best heads, each pushed α of its standard deviations towards the truth.

    The paper has K=48 of 1024 heads and α=15 for LLaMA-7B. Heads are ranked on a fifth of the questions; arguments,
    departures and errors are those of `head_ranking` and `HeadRanking.steering`. To evaluate on questions that the
    steering has not seen, take one per development fold instead:
    `[(r.steering(K=48, alpha=15), r.test) for r in head_ranking(store)]`.
    """
    (ranking,) = head_ranking(
        store,
        probe=probe,
        direction=direction,
        label=label,
        positive=positive,
        where=where,
        folds=1,
        seed=seed,
        progress=progress,
    )
    return ranking.steering(K=K, alpha=alpha, tokens=tokens)


def head_ranking(
    store: Source,
    *,
    probe: Reader | None = None,
    direction: Reader | None = None,
    compat: Literal["honest_llama"] | None = None,
    label: str = "label",
    positive: Label | None = None,
    where: pl.Expr | None = None,
    folds: int = 2,
    seed: int = 0,
    progress: Progress = silent,
) -> tuple[HeadRanking, ...]:
    """Rank the heads of a store by how well truth is read from each, and find the direction of each.

    Whole questions (groups) are dealt to `folds`; ranking k is made from the questions outside fold k, its development
    fold; with `folds=1` that is all questions, and none is left to test on. Of these 80 %, drawn by `seed`, fit a
    `probe` per head (default: `LogisticReader`), the others measure it. The direction θ is found in the whole
    development fold by `direction` (default: `MeanDifference`, the paper's "mass mean shift"; also `LogisticReader()`
    for probe weights, `CCSReader()`, `RandomReader()`), and σ is the standard deviation of the development fold's
    projections on it.

    Departures from the published code: features are standardised for the probes, by their training rows, and the
    penalty is that of `probe`; σ knows no test question. With `compat="honest_llama"` σ is over all rows, as there.

    Raises `UnknownSite` without stored `attn.heads`; `UsageError` for too few questions, labels that are not two, or
    a head in which the classes do not differ.
    """
    if compat not in (None, "honest_llama"):
        raise UsageError(f"compat={compat!r}: head_ranking has None and 'honest_llama'")
    if not any(site.part == "attn.heads" for site in store.sites):
        raise UnknownSite(
            f"ITI reads attn.heads, and the store holds {', '.join(map(str, store.sites))}: extract with "
            "sites='attn.heads@*'"
        )
    rows = select_rows(store.index, label=label, positive=positive, where=where)
    heads = tuple(site for site in wanted_sites(store, None) if site.part == "attn.heads")
    splits = _splits(rows, folds, seed)
    probe, direction = probe or LogisticReader(), direction or MeanDifference()
    for reader in (probe, direction):
        if reader.uses_pairs and rows.pairs is not None:
            require_pairs(rows, type(reader).__name__)
    accuracy = np.empty((folds, len(heads)))
    found: list[list[Direction]] = [[] for _ in splits]
    progress("iti", 0, len(heads))
    for i, (site, X) in enumerate(site_rows(store, heads, rows)):
        try:
            everything = TrainingRows(X, rows.positive, rows.pairs, groups=rows.groups)
            for k, split in enumerate(splits):
                fitted = fit_on(probe, everything, split.train).direction_
                held_out = split.validation
                right = (fitted.score(X[held_out]) > 0) == rows.positive[held_out]
                accuracy[k, i] = right.mean()
                theta = fit_on(direction, everything, split.development).direction_
                if compat == "honest_llama":
                    theta = dataclasses.replace(theta, scale=float(np.std(theta.project(X))))
                found[k].append(theta)
        except UsageError as error:
            raise UsageError(f"{site}: {error}") from error
        progress("iti", i + 1, len(heads))
    made = {"probe": repr(probe), "compat": compat, "folds": folds, "seed": seed}
    return tuple(
        _ranking(store, rows, heads, split, accuracy[k], found[k], made | {"fold": k}) for k, split in enumerate(splits)
    )


@dataclass(frozen=True)
class _Split:
    """Places in the selected rows; `development` is `train` and `validation` together."""

    train: Integer[np.ndarray, " train"]
    validation: Integer[np.ndarray, " validation"]
    test: Integer[np.ndarray, " test"]

    @property
    def development(self) -> Integer[np.ndarray, " development"]:
        return np.sort(np.concatenate([self.train, self.validation]))


def _splits(rows: ProbeRows, folds: int, seed: int) -> list[_Split]:
    fold = np.full(len(rows), -1) if folds == 1 else group_folds(rows.groups, rows.positive, folds, seed)
    splits = []
    for k in range(folds):
        questions = np.unique(rows.groups[fold != k])
        kept = int(TRAIN_SHARE * len(questions))
        chosen = np.random.default_rng([seed, k]).permutation(questions)[:kept]
        training = np.isin(rows.groups, chosen)
        split = _Split(*map(np.flatnonzero, (training, (fold != k) & ~training, fold == k)))
        if len(set(rows.positive[split.train].tolist())) < 2:
            raise UsageError(
                f"of the {len(questions)} questions outside fold {k}, the {kept} to fit on have answers of one class "
                "only: more questions are needed"
            )
        splits.append(split)
    return splits


def _ranking(
    store: Source,
    rows: ProbeRows,
    heads: tuple[Site, ...],
    split: _Split,
    accuracy: Float[np.ndarray, " heads"],
    found: list[Direction],
    made: Mapping[str, object],
) -> HeadRanking:
    order = sorted(range(len(heads)), key=lambda i: (-accuracy[i], heads[i].layer, heads[i].unit))
    used = (f"{rows.prompts[i]!r} {rows.rows[i]} {rows.positive[i]}" for i in split.development)
    provenance = store_provenance(store.manifest) | {"rows": digest_lines(used), "note": rows.note, **made}
    n = len(split.validation)
    directions = {
        heads[i]: dataclasses.replace(
            found[i],
            site=heads[i],
            classes=rows.classes,
            metrics={"accuracy": float(accuracy[i]), "n": n, "rank": rank},
            provenance=provenance,
        )
        for rank, i in enumerate(order)
    }
    return HeadRanking(
        directions,
        accuracy[order],
        rows.rows[split.train],
        rows.rows[split.validation],
        rows.rows[split.test],
    )
