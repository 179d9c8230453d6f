"""What a results folder holds that has no file format of its own elsewhere: what was run, scans and steering.

Enters: a folder and result values. Leaves: durable files, and the same values read back. Whoever makes results may
use these places; the report finds an artifact wherever it lies in the folder, by what it is:

    DIR/run.json                    a `Run`
    DIR/NAME.reprobe/               stores
    DIR/probes/NAME.safetensors     probe grids
    DIR/comparisons/NAME.safetensors    readers compared
    DIR/scans/NAME.json             a `ScanResult`
    DIR/steering/NAME.json          a `SteeringResult`; its table is NAME.parquet, written first

Does not know how results are made, found or drawn.
"""

import dataclasses
import io
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import polars as pl

from reprobe.errors import ArtifactMissing, CorruptArtifact, UsageError
from reprobe.evaluation.effect import Contrast
from reprobe.methods.repe import Scan
from reprobe.model.identity import ModelIdentity
from reprobe.model.sites import Site
from reprobe.provenance import canonical_json, digest_bytes, rebuilding, text, texts, write_durably

RUN = "run.json"
STORE_SUFFIX = ".reprobe"
#: What the field `kind` of a JSON file says. Files from before there was that field are known by where they lie.
RUN_KIND, SCAN_KIND, STEERING_KIND = "run", "scan", "dose response"
#: Of the record that `reprobe run` keeps of its steps: it is no result itself.
RECORD_KIND = "recipe record"
#: Of the columns of `evaluation.dose_response` with a `Contrast`, those that are kept.
DOSE_COLUMNS: dict[str, Any] = {
    "strength": pl.Float64,
    "log_odds": pl.Float64,
    "log_odds_sd": pl.Float64,
    "kl": pl.Float64,
    "text": pl.String,
}
_NAME = re.compile(r"[\w][\w.+-]*")
Value = TypeVar("Value")


@dataclass(frozen=True)
class Step:
    """One thing that was done: how long it took, and what is worth saying of it in a few words."""

    name: str
    seconds: float
    detail: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.seconds < math.inf:
            raise UsageError(f"step {self.name!r} took {self.seconds} seconds: not a duration")


@dataclass(frozen=True)
class Run:
    """What was run. `summary`: the findings in whole sentences; `commands`: how to get them again."""

    title: str
    steps: tuple[Step, ...] = ()
    identity: ModelIdentity | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    commands: tuple[str, ...] = ()
    summary: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class ScanResult:
    """A scan of `text` with the directions of the probe grid named `grid`, in the model `identity`."""

    scan: Scan
    text: str
    grid: str
    identity: ModelIdentity | None = None


@dataclass(frozen=True, eq=False)
class SteeringResult:
    """Effect against strength, and all that is needed to read it.

    `table` is that of `evaluation.dose_response`, of which `DOSE_COLUMNS` are written to a file, with the `contrast`,
    `neutral` texts (passages joined) and `story` it was called with. `site` and `direction` (its digest) are those of
    the direction; `intervention` says in words what was done with it, in the model `identity`.
    """

    table: pl.DataFrame
    contrast: Contrast
    neutral: tuple[str, ...]
    story: str
    site: Site
    direction: str
    intervention: str
    identity: ModelIdentity | None = None

    def __post_init__(self) -> None:
        if absent := [c for c in DOSE_COLUMNS if c not in self.table.columns]:
            raise UsageError(f"a dose-response table lacks {', '.join(absent)}; it has {', '.join(self.table.columns)}")
        require_dose_table(self.table)


def probe_path(folder: str | Path, name: str) -> Path:
    """Where the probe grid `name` lies: save it there with `ProbeGrid.save`."""
    return Path(folder) / "probes" / f"{_checked(name)}.safetensors"


def comparison_path(folder: str | Path, name: str) -> Path:
    """Where the comparison `name` lies: save it there with `Comparison.save`."""
    return Path(folder) / "comparisons" / f"{_checked(name)}.safetensors"


def store_path(folder: str | Path, name: str) -> Path:
    """Where the store `name` lies."""
    return Path(folder) / f"{_checked(name)}{STORE_SUFFIX}"


def write_run(folder: str | Path, run: Run) -> Path:
    """Write run.json, in place of one that is there."""
    value = dataclasses.asdict(run) | {"identity": _coded(run.identity)}
    return _write_json(Path(folder) / RUN, RUN_KIND, value)


def read_run(folder: str | Path) -> Run:
    """What `write_run` wrote. Raises `ArtifactMissing`, `CorruptArtifact`."""
    path = Path(folder) / RUN

    def build(value: dict[str, Any]) -> Run:
        return Run(
            title=text(value.pop("title")),
            steps=tuple(Step(text(s["name"]), float(s["seconds"]), text(s["detail"])) for s in value.pop("steps")),
            identity=_identity(value),
            versions={k: text(v) for k, v in value.pop("versions").items()},
            commands=texts(value.pop("commands")),
            summary=texts(value.pop("summary")),
        )

    return _parse(path, RUN_KIND, build)


def write_scan(folder: str | Path, name: str, result: ScanResult) -> Path:
    """Write scans/NAME.json, in place of one that is there. `UsageError` for NaN or infinite scores."""
    return save_scan(Path(folder) / "scans" / f"{_checked(name)}.json", result)


def save_scan(path: str | Path, result: ScanResult) -> Path:
    """Write a scan to a file of any name, as `write_scan` does."""
    scan = result.scan
    if not np.isfinite(scan.scores).all():
        raise UsageError(f"the scan of {result.text!r} has scores that are NaN or infinite; it cannot be stored")
    value = {
        "tokens": list(scan.tokens),
        "sites": [str(s) for s in scan.sites],
        "scores": scan.scores.tolist(),
        "text": result.text,
        "grid": result.grid,
        "identity": _coded(result.identity),
    }
    return _write_json(Path(path), SCAN_KIND, value)


def read_scan(path: str | Path) -> ScanResult:
    """What `write_scan` wrote. Raises `ArtifactMissing`, `CorruptArtifact`."""

    def build(value: dict[str, Any]) -> ScanResult:
        sites = tuple(Site.parse(s) for s in texts(value.pop("sites")))
        tokens = texts(value.pop("tokens"))
        scores = np.asarray(value.pop("scores"), dtype=np.float32)
        if scores.shape != (len(sites), len(tokens)) or not np.isfinite(scores).all():
            raise ValueError(f"scores must be {len(sites)} × {len(tokens)} finite numbers")
        scanned, grid = text(value.pop("text")), text(value.pop("grid"))
        return ScanResult(Scan(tokens, sites, scores), scanned, grid, _identity(value))

    return _parse(Path(path), SCAN_KIND, build)


def write_steering(folder: str | Path, name: str, result: SteeringResult) -> Path:
    """Write steering/NAME.parquet and NAME.json, in place of what is there; returns the latter's path."""
    base = Path(folder) / "steering" / f"{_checked(name)}.json"
    base.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    result.table.select(*DOSE_COLUMNS).cast(pl.Schema(DOSE_COLUMNS)).rechunk().write_parquet(buffer)
    write_durably(base.with_name(f"{name}.parquet"), buffer.getvalue())
    value = {
        "table": digest_bytes(buffer.getvalue()),
        "contrast": {k: list(v) for k, v in dataclasses.asdict(result.contrast).items()},
        "neutral": list(result.neutral),
        "story": result.story,
        "site": str(result.site),
        "direction": result.direction,
        "intervention": result.intervention,
        "identity": _coded(result.identity),
    }
    return _write_json(base, STEERING_KIND, value)


def read_steering(path: str | Path) -> SteeringResult:
    """What `write_steering` wrote, by the path of its .json. Raises `ArtifactMissing`, `CorruptArtifact`."""
    path = Path(path)

    def build(value: dict[str, Any]) -> SteeringResult:
        contrast = {k: texts(v) for k, v in value.pop("contrast").items()}
        return SteeringResult(
            table=_read_table(path.with_name(f"{path.stem}.parquet"), text(value.pop("table"))),
            contrast=Contrast(**contrast),
            neutral=texts(value.pop("neutral")),
            site=Site.parse(value.pop("site")),
            identity=_identity(value),
            **{k: text(value.pop(k)) for k in ("story", "direction", "intervention")},
        )

    return _parse(path, STEERING_KIND, build)


def effect_of(table: pl.DataFrame) -> str:
    """The column of a dose-response table that holds the effect: NAME of NAME and NAME_sd."""
    names = [c for c in table.columns if f"{c}_sd" in table.columns]
    if len(names) != 1:
        raise UsageError(
            "a dose-response table has one column with the effect and one, named as it with _sd, with its standard "
            f"deviation; this one has {', '.join(table.columns)}"
        )
    return names[0]


def require_dose_table(table: pl.DataFrame) -> pl.DataFrame:
    """`table` itself if it is one of `evaluation.dose_response`; raises `UsageError` otherwise."""
    effect = effect_of(table)
    numbers = ("strength", effect, f"{effect}_sd", "kl")
    if absent := [c for c in numbers if c not in table.columns]:
        raise UsageError(f"a dose-response table lacks {', '.join(absent)}; it has {', '.join(table.columns)}")
    if not len(table):
        raise UsageError("a dose-response table needs at least one strength; this one is empty")
    for column in numbers:
        if not (table[column].dtype.is_numeric() and table[column].is_finite().all() and not table[column].has_nulls()):
            raise UsageError(f"column {column!r} of a dose-response table must hold finite numbers")
    return table


def _checked(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise UsageError(f"{name!r} cannot name a result: use letters, digits, '_', '-', '+' and '.', e.g. cities-pca")
    return name


def _write_json(path: Path, kind: str, value: Mapping[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, canonical_json({"kind": kind, **value}).encode())
    return path


def _coded(identity: ModelIdentity | None) -> dict[str, Any] | None:
    return None if identity is None else identity.to_json()


def _identity(value: dict[str, Any]) -> ModelIdentity | None:
    found = value.pop("identity", None)
    return None if found is None else ModelIdentity.from_json(found)


def _parse(path: Path, kind: str, build: Callable[[dict[str, Any]], Value]) -> Value:
    """`build` of the JSON object in a file; it takes each field out, and none may be left over."""
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise ArtifactMissing(f"there is no {path}") from error
    with rebuilding(f"{path} is not JSON"):
        value = json.loads(data)
    with rebuilding(f"{path} is malformed"):
        canonical_json(value).encode()  # neither NaN nor half a character
        if not isinstance(value, dict):
            raise TypeError("the file must hold one JSON object")
        if (found := value.pop("kind", kind)) != kind:
            raise ValueError(f"it holds a {found}, not a {kind}")
        try:
            out = build(value)
        except KeyError as error:
            missing = error.args[0] if type(error) is KeyError else error
            raise ValueError(f"missing or unknown {missing}") from error
        if value:
            raise ValueError(f"unknown fields: {', '.join(sorted(value))}")
        return out


def _read_table(path: Path, digest: str) -> pl.DataFrame:
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise CorruptArtifact(f"{path} is missing beside its .json") from error
    if digest_bytes(data) != digest:
        raise CorruptArtifact(f"{path} is not as it was written: its checksum is wrong")
    with rebuilding(f"{path} is malformed"):
        return require_dose_table(pl.read_parquet(io.BytesIO(data)))
