"""Which rows of a store are probed: labels, groups and pairs as plain arrays.

Enters: a store's index, the name of a label column. Leaves: `ProbeRows`, `ClassRows` or `NumberRows`. Does
not know activations or readers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from jaxtyping import Bool, Float, Integer
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from reprobe.errors import UnknownData, UsageError
from reprobe.probing.direction import Label
from reprobe.provenance import digest_lines


@dataclass(frozen=True)
class ProbeRows:
    """Rows to fit and test on, in the order of prompt ids and positions, however the store is laid out.

    `rows` are row numbers of the store; `groups` counts from 0 without gaps; `pairs` is −1 where a row has
    none, and None if no row has one. `names` are the groups' own names ("group Paris"; "prompt 17" where there is
    none), before pairs joined them. `note` says in words what a reader of the results must know; `digest`
    covers which tokens of which prompts these are, with label and group.
    """

    rows: Integer[np.ndarray, " n"]
    positive: Bool[np.ndarray, " n"]
    groups: Integer[np.ndarray, " n"]
    pairs: Integer[np.ndarray, " n"] | None
    names: tuple[str, ...]
    classes: tuple[Label, Label]
    prompts: tuple[str, ...]
    note: str
    digest: str

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def n_groups(self) -> int:
        return int(self.groups.max()) + 1

    @property
    def chance(self) -> float:
        """The share of the larger class: the accuracy of always answering with it."""
        share = float(self.positive.mean())
        return max(share, 1 - share)

    @property
    def codes(self) -> Integer[np.ndarray, " n"]:
        """The place of each row's label in `classes`."""
        return self.positive.astype(np.int64)


@dataclass(frozen=True)
class ClassRows:
    """Rows of two or more classes: `codes` is the place of each row's label in `classes`, the rest is as in
    `ProbeRows`."""

    rows: Integer[np.ndarray, " n"]
    codes: Integer[np.ndarray, " n"]
    groups: Integer[np.ndarray, " n"]
    pairs: Integer[np.ndarray, " n"] | None
    names: tuple[str, ...]
    classes: tuple[Label, ...]
    prompts: tuple[str, ...]
    note: str
    digest: str

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def n_groups(self) -> int:
        return int(self.groups.max()) + 1

    @property
    def chance(self) -> float:
        """The share of the largest class: the accuracy of always answering with it."""
        return float(np.bincount(self.codes).max() / len(self.codes))


@dataclass(frozen=True)
class NumberRows:
    """Rows with a number each, `values`, to be predicted; the rest is as in `ProbeRows`."""

    rows: Integer[np.ndarray, " n"]
    values: Float[np.ndarray, " n"]
    groups: Integer[np.ndarray, " n"]
    pairs: Integer[np.ndarray, " n"] | None
    names: tuple[str, ...]
    prompts: tuple[str, ...]
    note: str
    digest: str

    def __len__(self) -> int:
        return len(self.rows)


def select_rows(
    index: pl.DataFrame, *, label: str = "label", positive: Label | None = None, where: pl.Expr | None = None
) -> ProbeRows:
    """The labelled rows of `index` that `where` keeps.

    `positive` is the label that scores above 0; by default the greater of the two. A row without a group is
    grouped with the rows of its prompt. Groups that share a pair are one group: the two sides of a contrast
    stay together. Raises `UnknownData` for a missing column, `UsageError` unless exactly two labels are left.
    """
    frame, notes = _labelled(index, label, where)
    classes = _classes(frame[label], label, positive)
    values = frame[label].to_list()
    return ProbeRows(
        positive=np.array([v == classes[1] for v in values], dtype=bool),
        classes=classes,
        **_described(frame, label, notes),
    )


def select_classes(index: pl.DataFrame, *, label: str = "label", where: pl.Expr | None = None) -> ClassRows:
    """The labelled rows of `index` that `where` keeps, of however many classes, in the order of the labels.

    As `select_rows`; `UsageError` unless at least two labels are left.
    """
    frame, notes = _labelled(index, label, where)
    classes = frame[label].unique().sort().to_list()
    if len(classes) < 2:
        raise UsageError(
            f"column {label!r} has {len(classes)} labels in the rows kept ({', '.join(map(repr, classes)) or 'none'}); "
            "a probe of classes needs two or more"
        )
    place = {value: i for i, value in enumerate(classes)}
    codes = np.array([place[v] for v in frame[label].to_list()], dtype=np.int64)
    return ClassRows(codes=codes, classes=tuple(classes), **_described(frame, label, notes))


def select_numbers(index: pl.DataFrame, *, label: str = "label", where: pl.Expr | None = None) -> NumberRows:
    """The rows of `index` that `where` keeps and that have a number in column `label`.

    As `select_rows`; `UsageError` if the column holds no numbers, or one that is not finite.
    """
    frame, notes = _labelled(index, label, where)
    if not (frame[label].dtype.is_numeric() or frame[label].dtype == pl.Boolean):
        raise UsageError(f"column {label!r} holds {frame[label].dtype}, not numbers")
    values = frame[label].cast(pl.Float64).to_numpy()
    if not np.isfinite(values).all():
        at = int(np.argmin(np.isfinite(values)))
        raise UsageError(f"column {label!r} is {values[at]} in row {frame['row'][at]} (prompt {frame['prompt'][at]!r})")
    return NumberRows(values=values, **_described(frame, label, notes))


def require_pairs(rows: ProbeRows, reader: str) -> Integer[np.ndarray, " n"]:
    """The pair of each row. Raises `UsageError`, with a prompt, for rows without a pair and pairs without one side."""
    if rows.pairs is None:
        raise UsageError(f"the rows have no pairs, and {reader} reads pairs: give the prompts a column 'pair'")
    if (rows.pairs < 0).any():
        alone = rows.prompts[int(np.argmax(rows.pairs < 0))]
        raise UsageError(
            f"{int((rows.pairs < 0).sum())} rows have no pair, e.g. prompt {alone!r}, and {reader} reads pairs: "
            'leave them out with where=pl.col("pair").is_not_null()'
        )
    n = int(rows.pairs.max()) + 1
    sides = [np.bincount(rows.pairs[side], minlength=n) for side in (rows.positive, ~rows.positive)]
    lacking = (sides[0] == 0) != (sides[1] == 0)
    if lacking.any():
        alone = rows.prompts[int(np.argmax(lacking[rows.pairs]))]
        raise UsageError(
            f"{int(lacking.sum())} pairs have rows of one label only, e.g. that of prompt {alone!r}, and {reader} "
            "reads both sides of a pair: leave those rows out"
        )
    return rows.pairs


def _labelled(index: pl.DataFrame, label: str, where: pl.Expr | None) -> tuple[pl.DataFrame, list[str]]:
    """The rows that have a label, by prompt and position, and what is to be said of the others."""
    if label not in index.columns:
        raise UnknownData(f"no column {label!r} in the index; it has {', '.join(index.columns)}")
    kept = index if where is None else index.filter(where)
    frame = kept.filter(pl.col(label).is_not_null()).sort("prompt", "position")
    notes = []
    if len(frame) < len(index):
        filtered, unlabelled = len(index) - len(kept), len(kept) - len(frame)
        parts = ([f"{filtered} by the filter"] if filtered else []) + (
            [f"{unlabelled} without a label"] if unlabelled else []
        )
        notes.append(f"Left out of {len(index)} rows: {', '.join(parts)}.")
    return frame, notes


def _described(frame: pl.DataFrame, label: str, notes: list[str]) -> dict[str, Any]:
    """What all selections say of their rows, by field."""
    own = frame["group"].is_null()
    if own.all():
        notes.append("The data have no groups: each prompt is its own group.")
    elif own.any():
        notes.append(f"{int(own.sum())} rows have no group: there each prompt is its own group.")
    named = frame.select(
        group=pl.when(pl.col("group").is_null())
        .then(pl.lit("prompt ") + pl.col("prompt").cast(pl.String))
        .otherwise(pl.lit("group ") + pl.col("group").cast(pl.String)),
        pair=pl.col("pair").cast(pl.String),
    )
    names, groups = np.unique(named["group"].to_numpy(), return_inverse=True)
    pairs = _codes(named["pair"])
    if pairs is not None:
        groups = _joined(groups, pairs)
        joined = int(groups.max()) + 1
        if joined < len(names):
            notes.append(f"Pairs join {len(names)} groups into {joined}, so that no split parts a pair.")
    lines = zip(frame["prompt"], frame["position"], frame[label].to_list(), groups, strict=True)
    return {
        "rows": frame["row"].to_numpy().astype(np.int64),
        "groups": groups.astype(np.int64),
        "pairs": pairs,
        "names": tuple(named["group"]),
        "prompts": tuple(frame["prompt"]),
        "note": " ".join(notes),
        "digest": digest_lines(f"{prompt!r} {position} {value!r} {group}" for prompt, position, value, group in lines),
    }


def common_groups(selections: Sequence[ProbeRows], prompts: Sequence[str]) -> list[Integer[np.ndarray, " n"]]:
    """Group numbers that hold across several selections: rows of one group have one number, wherever they are.

    Groups are the same if their names are (the city of a true and of a negated statement), or if they hold the same
    prompt; `prompts` are digests of the prompt sets, since ids compare only within one. Whatever pairs or names link
    is one group, in every selection.
    """
    nodes: dict[object, int] = {}
    edges = []
    for i, (rows, digest) in enumerate(zip(selections, prompts, strict=True)):
        for group, name, prompt in zip(rows.groups.tolist(), rows.names, rows.prompts, strict=True):
            own = nodes.setdefault((i, group), len(nodes))
            keys = [(digest, prompt)] if name.startswith("prompt ") else [(digest, prompt), name]
            edges += [(own, nodes.setdefault(key, len(nodes))) for key in keys]
    ends = np.array(edges, dtype=np.int64).T
    graph = coo_matrix((np.ones(ends.shape[1]), (ends[0], ends[1])), shape=(len(nodes), len(nodes)))
    component = connected_components(graph, directed=False)[1]
    found = [
        component[[nodes[i, group] for group in rows.groups.tolist()]].astype(np.int64)
        for i, rows in enumerate(selections)
    ]
    codes = np.unique(np.concatenate(found), return_inverse=True)[1]
    return np.split(codes, np.cumsum([len(f) for f in found])[:-1])


def _classes(labels: pl.Series, name: str, positive: Label | None) -> tuple[Label, Label]:
    found = labels.unique().sort().to_list()
    if len(found) != 2:
        shown = ", ".join(map(repr, found[:8])) + (", …" if len(found) > 8 else "")
        raise UsageError(
            f"column {name!r} has {len(found)} labels in the rows kept ({shown or 'none'}); a probe needs two"
            + (
                f": keep two of them, e.g. where=pl.col({name!r}).is_in([{found[0]!r}, {found[1]!r}])"
                if found[2:]
                else ""
            )
        )
    if positive is None:
        return found[0], found[1]
    if positive not in found:
        raise UsageError(
            f"positive={positive!r} is not a label of column {name!r}; it has {found[0]!r} and {found[1]!r}"
        )
    return next(v for v in found if v != positive), positive


def _codes(names: pl.Series) -> Integer[np.ndarray, " n"] | None:
    if names.is_null().all():
        return None
    ranks = names.rank("dense").fill_null(0).cast(pl.Int64).to_numpy()
    return ranks - 1


def _joined(groups: Integer[np.ndarray, " n"], pairs: Integer[np.ndarray, " n"]) -> Integer[np.ndarray, " n"]:
    """Groups merged where rows of one pair lie in several."""
    n_groups, paired = int(groups.max()) + 1, pairs >= 0
    edges = (groups[paired], n_groups + pairs[paired])
    size = n_groups + int(pairs.max()) + 1
    _, component = connected_components(coo_matrix((np.ones(len(edges[0])), edges), shape=(size, size)), directed=False)
    joined: np.ndarray = np.unique(component[groups], return_inverse=True)[1]
    return joined
