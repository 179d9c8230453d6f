"""`PromptSet`: prompts with their labels, groups, pairs and spans, as one frozen table.

Enters: a table in the canonical columns (columns.py says which), or anything that `load`, `from_hf` and
`from_records` turn into one. Leaves: the table, checked once at construction, and smaller sets made from it.
Does not know tokenizers, models or labels' meaning.
"""

import dataclasses
import functools
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from reprobe.errors import ArtifactExists, DataError, UsageError
from reprobe.prompts import hub, load
from reprobe.prompts.columns import CANONICAL, canonical, from_records, rename, some, unknown
from reprobe.prompts.content import Format
from reprobe.provenance import digest_lines, write_durably


@dataclass(frozen=True, eq=False)
class PromptSet:
    """Prompts as a polars frame with the canonical columns first; `name` is for people and not part of
    `digest`.

    Construction brings `frame` into canonical form and raises `DataError`, naming the ids, for empty or
    duplicate ids, missing or empty texts, rows with both text and messages, spans outside their text, a pair
    across groups.
    """

    frame: pl.DataFrame
    name: str = "prompts"

    def __post_init__(self) -> None:
        object.__setattr__(self, "frame", canonical(self.frame, self.name))

    @classmethod
    def load(
        cls,
        source: str | Path,
        *,
        text: str | None = None,
        messages: str | None = None,
        label: str | None = None,
        group: str | None = None,
        pair: str | None = None,
        id: str | None = None,  # noqa: A002
        format: str | Format | None = None,  # noqa: A002
        limit: int | None = None,
    ) -> "PromptSet":
        """The prompts of a bundled data set, a file, or a Hugging Face data set.

        `source` is a bundled name (`bundled()` lists them), a path that ends in .jsonl, .json, .csv or
        .parquet, or `hf:NAME[:config][:split]`. A file in the canonical columns, or in a public format
        (`formats.FORMATS`), is recognised by its content; `format` names one instead, or is one with
        settings, e.g. `Relations(template=1)`. `text` … `id` name the columns of a file in columns of its
        own. `limit` takes the first prompts only. Raises `UnknownData` for a name, file or column that does
        not exist, `DataError` for one that is malformed or that no format, or more than one, fits.
        """
        columns = {"id": id, "text": text, "messages": messages, "label": label, "group": group, "pair": pair}
        frame, name = load.read(str(source), columns, format=format, limit=limit)
        return cls(frame, name)

    @classmethod
    def from_hf(
        cls,
        dataset: Any,
        *,
        text: str | None = None,
        messages: str | None = None,
        label: str | None = None,
        group: str | None = None,
        pair: str | None = None,
        id: str | None = None,  # noqa: A002
        limit: int | None = None,
        name: str | None = None,
    ) -> "PromptSet":
        """The prompts of a `datasets.Dataset` or `IterableDataset`; `text` … `id` name its columns.

        Of a streamed data set only `limit` rows are fetched (all if None). Class labels stay the integers
        they are.
        """
        columns = {"id": id, "text": text, "messages": messages, "label": label, "group": group, "pair": pair}
        title = name or hub.title(dataset)
        load.check_limit(limit)
        return cls(rename(hub.frame(dataset, limit, title), columns, title), title)

    @classmethod
    def from_records(cls, records: Iterable[Mapping[str, Any]], *, name: str = "prompts") -> "PromptSet":
        """The prompts of rows given as mappings, e.g. `[{"text": "…", "label": 1}, …]`."""
        return cls(from_records(records, name), name)

    def __len__(self) -> int:
        return self.frame.height

    @property
    def ids(self) -> list[str]:
        """The ids of the prompts."""
        return self.frame["id"].to_list()

    @property
    def texts(self) -> list[str]:
        """The plain texts; `DataError` if some prompts are messages, whose text only a tokenizer's template
        knows.
        """
        chats = self.frame.filter(pl.col("text").is_null())["id"]
        if chats.len():
            raise DataError(f"{self.name}: messages, not text, in {some(chats)}; see reprobe.model.chat.render")
        return self.frame["text"].to_list()

    @property
    def labels(self) -> pl.Series:
        """The labels of the prompts; null where one has none."""
        return self.frame["label"]

    @property
    def has_groups(self) -> bool:
        """False if every prompt is its own group (its group is its id): nothing then ties prompts
        together.
        """
        return bool((self.frame["group"] != self.frame["id"]).any())

    @property
    def span_names(self) -> list[str]:
        """Names of spans that occur, sorted; not all prompts need have them."""
        names = self.frame.select(pl.col("spans").explode().struct.field("name")).to_series().drop_nulls()
        return sorted(names.unique().to_list())

    @functools.cached_property
    def digest(self) -> str:
        """sha256 over the rows in order: equal content has equal digests, whatever its file and column order.

        A null and an absent value are the same content; 1 and 1.0 are not.
        """
        return digest_lines(json.dumps(row, sort_keys=True, ensure_ascii=False, default=str) for row in self._rows())

    def filter(self, *conditions: pl.Expr) -> "PromptSet":
        """The prompts for which all polars `conditions` hold; `DataError` if there are none.

        Raises `UnknownData` for a column that there is not, `UsageError` for what is no condition on these columns.
        """
        try:
            kept = self.frame.filter(*conditions)
        except pl.exceptions.ColumnNotFoundError as error:
            raise unknown("column", _column_of(error), self.frame.columns, self.name) from error
        except pl.exceptions.PolarsError as error:
            raise UsageError(f"{self.name}: these columns cannot be asked that: {error}") from error
        if not kept.height:
            raise DataError(f"{self.name}: no prompt passes the filter")
        return dataclasses.replace(self, frame=kept)

    def where(self, **values: Any) -> "PromptSet":
        """The prompts whose columns have these values; a list, tuple or set names several: `where(label=[0, 1])`.

        None means those without a value.
        """
        for column in values:
            if column not in self.frame.columns:
                raise unknown("column", column, self.frame.columns, self.name)
        conditions = [
            pl.col(c).is_in(list(v), nulls_equal=True)
            if isinstance(v, Collection) and not isinstance(v, str)
            else pl.col(c).eq_missing(pl.lit(v))
            for c, v in values.items()
        ]
        return self.filter(*conditions)

    def head(self, n: int) -> "PromptSet":
        """The first `n` prompts, or all if there are fewer."""
        load.check_limit(n)
        return dataclasses.replace(self, frame=self.frame.head(n))

    def split(self, by: str = "group", *, test: float = 0.2, seed: int = 0) -> "Split":
        """Two sets, named `train` and `test`; each value of column `by` is wholly in one, in the order it
        had.

        Values are shuffled by `seed` alone (not by row order) and go to the test set until its share of
        prompts is as near to `test` as whole values allow, at least one value on either side. A group never
        crosses: splitting by a column that cuts groups is a `DataError`.
        """
        if by not in self.frame.columns:
            raise unknown("column", by, self.frame.columns, self.name)
        if not 0 < test < 1:
            raise UsageError(f"test={test}: the test set's share of prompts lies between 0 and 1")
        if self.frame[by].null_count():
            lacking = self.frame.filter(pl.col(by).is_null())["id"]
            raise DataError(f"{self.name}: cannot split by {by!r}, which is null in {some(lacking)}")
        cut = self.frame.group_by("group").agg(pl.col(by).n_unique()).filter(pl.col(by) > 1) if by != "group" else None
        if cut is not None and cut.height:
            raise DataError(f"{self.name}: splitting by {by!r} would cut groups, e.g. {some(cut['group'].sort())}")
        sizes = self.frame.group_by(by).len().sort(by)
        if sizes.height < 2:
            raise DataError(f"{self.name}: one {by} only ({sizes[by][0]!r}), so there is nothing to hold out")
        shuffled = sizes[np.random.default_rng(seed).permutation(sizes.height)]
        held = shuffled["len"].cum_sum().to_numpy()[:-1]
        n_test = int(np.argmin(np.abs(held - test * len(self)))) + 1
        in_test = pl.col(by).is_in(shuffled[by][:n_test].to_list())
        return Split(
            PromptSet(self.frame.filter(~in_test), f"{self.name}/train"),
            PromptSet(self.frame.filter(in_test), f"{self.name}/test"),
        )

    def describe(self) -> "Description":
        """Counts for people: what there is, and how much of it."""
        labels = self.frame.group_by("label").len().sort("label", nulls_last=True)
        spans = self.frame.select(pl.col("spans").explode().struct.field("name")).to_series().drop_nulls()
        return Description(
            name=self.name,
            prompts=len(self),
            chats=self.frame["messages"].len() - self.frame["messages"].null_count(),
            labels=dict(zip(labels["label"].to_list(), labels["len"].to_list(), strict=True)),
            groups=self.frame["group"].n_unique(),
            has_groups=self.has_groups,
            pairs=self.frame["pair"].drop_nulls().n_unique(),
            spans={name: int((spans == name).sum()) for name in self.span_names},
            columns=tuple(c for c in self.frame.columns if c not in CANONICAL),
            digest=self.digest,
        )

    def to_jsonl(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write one JSON object per prompt; `load` gives back the same prompts, with the same digest.

        Canonical columns that hold nothing are left out; every row has the same keys.
        """
        target = Path(path)
        if target.exists() and not overwrite:
            raise ArtifactExists(f"{target} exists; pass overwrite=True to replace it")
        absent = {c for c in ("text", "messages", "label", "pair") if self.frame[c].null_count() == len(self)}
        # What is read without groups takes pairs for them.
        absent |= {"group"} if "pair" in absent and not self.has_groups else set()
        absent |= set() if self.span_names else {"spans"}
        keys = [c for c in self.frame.columns if c not in absent]
        lines = (json.dumps({k: row.get(k) for k in keys}, ensure_ascii=False, default=str) for row in self._rows())
        target.parent.mkdir(parents=True, exist_ok=True)
        write_durably(target, "".join(line + "\n" for line in lines).encode())

    def _rows(self) -> Iterator[dict[str, Any]]:
        """Rows as JSON values without nulls, spans as an object."""
        for row in self.frame.iter_rows(named=True):
            row["spans"] = {s["name"]: [s["start"], s["end"]] for s in row["spans"]}
            yield _without_nulls(row)


class Split(NamedTuple):
    """The two sides of `PromptSet.split`."""

    train: PromptSet
    test: PromptSet


@dataclass(frozen=True)
class Description:
    """What a prompt set holds. `labels` and `spans` count prompts; `columns` are those beyond the canonical
    ones.
    """

    name: str
    prompts: int
    chats: int
    labels: Mapping[Any, int]
    groups: int
    has_groups: bool
    pairs: int
    spans: Mapping[str, int]
    columns: tuple[str, ...]
    digest: str


def concat(sets: Sequence[PromptSet], name: str) -> PromptSet:
    """All prompts of several sets, in order; groups of one name are one group. Ids must differ between the
    sets.

    Further columns that a set lacks are null there. Raises `DataError` if ids repeat or a column's types
    differ.
    """
    try:
        frame = pl.concat([s.frame for s in sets], how="diagonal")
    except (pl.exceptions.SchemaError, pl.exceptions.ShapeError) as error:
        raise DataError(f"{name}: columns of one name hold different types: {error}") from error
    return PromptSet(frame, name)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    return [_without_nulls(v) for v in value] if isinstance(value, list) else value


def _column_of(error: Exception) -> str:
    quoted = str(error).split('"')
    return quoted[1] if len(quoted) > 1 else str(error)
