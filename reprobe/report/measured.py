"""Tables that verbs save with --to-table, read back: CSV, Parquet or JSON, known by their columns.

Enters: a file. Leaves: a `Measured`: the table with checked columns, and what a JSON file says of it besides. What
kind of table it is, its columns say; a table of other columns is none of these. Does not know how they are shown.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl
import polars.selectors as cs

from reprobe.errors import UsageError
from reprobe.evaluation.choices import METRICS, Choices, compare_choices
from reprobe.evaluation.editing import Evaluation, summarise
from reprobe.model.identity import ModelIdentity
from reprobe.probing.transfer import COLUMNS, TransferGrid
from reprobe.provenance import rebuilding, text, texts
from reprobe.report.results import require_dose_table

TRANSFER, CHOICES, SIDE_EFFECTS = "transfer table", "multiple-choice table", "side-effects table"
COMPARED, EDITING = "multiple-choice comparison", "edit-scores table"
DOSES, TUNING = "dose-response table", "strength search"

_INTERVAL = {"low": pl.Float64, "high": pl.Float64}
_PER_QUESTION: dict[str, Any] = dict.fromkeys(METRICS, pl.Float64)
#: The columns of each kind, by which it is known, the more telling before those that others have too.
SCHEMAS: dict[str, dict[str, Any]] = {
    TRANSFER: COLUMNS,
    SIDE_EFFECTS: {"measure": pl.String, "unit": pl.String}
    | dict.fromkeys(("unsteered", "steered", "change"), pl.Float64)
    | _INTERVAL
    | {"n": pl.Int64, "over": pl.String},
    COMPARED: {"metric": pl.String}
    | dict.fromkeys(("unsteered", "steered", "change"), pl.Float64)
    | _INTERVAL
    | {"n": pl.Int64},
    CHOICES: {"question": pl.String, "group": pl.String} | _PER_QUESTION,
    EDITING: dict.fromkeys(("fact", "group", "kind", "prompt", "state"), pl.String)
    | {"p_new": pl.Float64, "p_true": pl.Float64, "success": pl.Boolean},
    DOSES: dict.fromkeys(("strength", "change", "kl"), pl.Float64),
    TUNING: {"strength": pl.Float64, "kl": pl.Float64},
}
#: Where a value may be missing: bounds of a single group, the block of `final`, the unit of a ratio.
_MAY_LACK = ("low", "high", "layer", "head", "unit")


@dataclass(frozen=True, eq=False)
class Measured:
    """A saved table of one of the kinds of `SCHEMAS`; `about` is what its file says besides."""

    kind: str
    table: pl.DataFrame
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def identity(self) -> ModelIdentity | None:
        """The model, where the file names it."""
        found = self.about.get("model", self.about.get("provenance", {}).get("identity"))
        return None if found is None else ModelIdentity.from_json(found)

    @property
    def data(self) -> dict[str, str]:
        """Digests of the data by what they are of, as far as the file has them."""
        if self.kind == TRANSFER:
            lines = self.table.select("test", "test_rows").unique(maintain_order=True)
            return {f"rows of {name}": digest for name, digest in lines.iter_rows()}
        return {"data": text(self.about["data"])} if "data" in self.about else {}

    @property
    def interventions(self) -> str:
        """What was done in the model, where the file says so."""
        return ", ".join(self.about.get("interventions", ()))

    @property
    def transfer(self) -> TransferGrid:
        names = tuple(self.table["train"].unique(maintain_order=True))
        return TransferGrid(self.table, names, self.about.get("notes", {}), self.about.get("provenance", {}))

    @property
    def choices(self) -> pl.DataFrame:
        """`metric`, `low`, `high`, `n` as `reprobe evaluate truthfulqa` shows them: `mean` of a single run, or
        `unsteered`, `steered` and `change` of two."""
        if self.kind == COMPARED:
            return self.table
        plain = self._run("")
        if not {f"{m}_steered" for m in METRICS} <= set(self.table.columns):
            return plain.summary()
        return compare_choices(plain, self._run("_steered"))

    @property
    def editing(self) -> Evaluation:
        """Scores of the facts without and with edits."""
        before, after = (summarise(self.table.filter(state=state)) for state in ("before", "after"))
        return Evaluation(before, after)

    def _run(self, suffix: str) -> Choices:
        values = [pl.col(f"{m}{suffix}").cast(pl.Float64).alias(m) for m in METRICS]
        table = self.table.select("question", "group", *values)
        return Choices(table, pl.DataFrame(), "", str(self.about.get("data", "")), str(self.about.get("primer", "")))


def kind_of_columns(columns: Collection[str]) -> str | None:
    """The kind of a table with these columns, None if it is of another."""
    names = set(columns)
    if names == set(SCHEMAS[TUNING]):
        return TUNING
    return next((kind for kind, schema in SCHEMAS.items() if kind != TUNING and set(schema) <= names), None)


def columns_of(path: Path) -> list[str]:
    """The columns of a table, without its rows where that is possible. Raises as `read_measured` does."""
    if path.suffix == ".json":
        return _json(path)[0].columns
    with rebuilding(f"{path} cannot be read as a table"):
        scan = pl.scan_csv if path.suffix == ".csv" else pl.scan_parquet
        return scan(path).collect_schema().names()


def read_measured(path: str | Path) -> Measured:
    """A table of one of the kinds. Raises `CorruptArtifact`; `UsageError` for a table of another kind, or none."""
    path, about = Path(path), dict[str, Any]()
    if path.suffix == ".json":
        table, about = _json(path)
    else:
        with rebuilding(f"{path} cannot be read as a table"):
            table = pl.read_csv(path, infer_schema_length=None) if path.suffix == ".csv" else pl.read_parquet(path)
    kind = kind_of_columns(table.columns)
    if kind is None:
        raise UsageError(f"{path} is a table of {', '.join(table.columns)}: none that a report shows")
    with rebuilding(f"{path} is not as it was written"):
        if not table.height:
            raise ValueError("it has no lines")
        table = table.with_columns(cs.matches("_(low|high)$").cast(pl.Float64))
        found = Measured(kind, table.with_columns(pl.col(c).cast(dtype) for c, dtype in SCHEMAS[kind].items()), about)
        for name in SCHEMAS[kind]:
            if found.table[name].null_count() and not name.endswith(_MAY_LACK):
                raise ValueError(f"values are missing in the column {name!r}")
        _require_whole(found)
    return found


def _require_whole(found: Measured) -> None:
    """Everything that is shown of it can be worked out."""
    _ = found.identity, found.data
    texts(found.about.get("interventions", ()))
    if found.kind == TRANSFER:
        grid = found.transfer
        texts(list(grid.notes.values()))
        for site in grid.sites:
            grid.matrix(site)
    elif found.kind == CHOICES:
        _ = found.choices
    elif found.kind == EDITING:
        _ = found.editing
    elif found.kind == DOSES:
        require_dose_table(found.table)
        if "text" in found.table.columns:
            texts(found.table["text"].drop_nulls().to_list())
    elif found.kind == TUNING:
        for name in ("strength", "target_kl"):
            float(found.about.get(name, 0.0))


def _json(path: Path) -> tuple[pl.DataFrame, dict[str, Any]]:
    """The table of a JSON file, and what stands beside it."""
    with rebuilding(f"{path} is not JSON"):
        value = json.loads(path.read_bytes())
    about = dict(value) if isinstance(value, dict) else {}
    rows = about.pop("table", None) if isinstance(value, dict) else value
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise UsageError(f"{path} holds no table")
    with rebuilding(f"{path} cannot be read as a table"):
        return pl.DataFrame(rows, infer_schema_length=None), about
