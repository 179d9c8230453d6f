"""What lies in a results folder: every artifact, found by what it is.

Enters: a folder. Leaves: `Results`, everything in it by kind and name; files that are damaged, with what is wrong, and
files that are no results. A file says by its content what it is: a safetensors header, the field `kind`, the columns of
a table; names and places only name it. Does not know how anything is drawn.
"""

import json
import os
import re
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reprobe.control import Steering, WeightEdit, bundle, edits, edits_in
from reprobe.control.edited_model import FOLDER
from reprobe.errors import ArtifactMissing, CorruptArtifact, ReprobeError, UsageError
from reprobe.methods import dissected, tracing
from reprobe.methods.dissected import Dissection
from reprobe.methods.tracing import TraceGrid
from reprobe.probing import comparison, direction, probe_grid
from reprobe.probing.artifact import kind_in
from reprobe.probing.comparison import Comparison
from reprobe.probing.direction import Direction
from reprobe.probing.probe_grid import ProbeGrid
from reprobe.provenance import digest_file, rebuilding, text
from reprobe.report.measured import SCHEMAS, Measured, columns_of, kind_of_columns, read_measured
from reprobe.report.results import (
    DOSE_COLUMNS,
    RECORD_KIND,
    RUN,
    RUN_KIND,
    SCAN_KIND,
    STEERING_KIND,
    STORE_SUFFIX,
    Run,
    ScanResult,
    SteeringResult,
    read_run,
    read_scan,
    read_steering,
)
from reprobe.store.layout import MANIFEST
from reprobe.store.manifest import MARK
from reprobe.store.reader import ActivationStore

#: By this an HTML file is known to be a report, which may be drawn anew.
REPORT_MARK = b'<meta name="generator" content="reprobe">'
#: A dissection's own page says by its digest which one it is of.
_DISSECTED = re.compile(rb'<meta name="dissection" content="([0-9a-f]{64})">')
_HEAD = 4096  # bytes of an HTML file in which those stand
#: Bytes up to which a JSON file may be a result; larger ones are data.
_LARGEST = 1 << 26
#: Folders inside folders that are searched.
_DEPTH = 4
_STORE, _EDITED, _PAGE, _FIGURE = "store", "edited model", "report", "figure"
_RECIPE = "recipe"
_FIGURES = (".svg", ".png", ".pdf")
#: Where JSON files lie whose kind is not written in them.
_PLACES = {"scans": SCAN_KIND, "steering": STEERING_KIND}


@dataclass(frozen=True)
class File:
    """An artifact: what it is, its name, where it lies in the folder, and the sha256 of its bytes (of a store, that of
    its manifest; None of a folder)."""

    kind: str
    name: str
    path: str
    digest: str | None


@dataclass(frozen=True)
class Damaged:
    """A file that could not be read, and why."""

    path: str
    why: str


@dataclass(frozen=True, eq=False)
class Results:
    """Everything found in a results folder, by kind and name, in the order of the paths.

    `edits` are those of a file or of an edited model, `measured` tables that verbs saved, `pages` the pages of
    dissections by their digests, `recipes` the texts of TOML files, `records` digests that the run of a recipe left,
    by what they are of. `unknown` are paths of what is no result.
    """

    folder: Path
    run: Run | None = None
    stores: Mapping[str, ActivationStore] = field(default_factory=dict)
    grids: Mapping[str, ProbeGrid] = field(default_factory=dict)
    comparisons: Mapping[str, Comparison] = field(default_factory=dict)
    directions: Mapping[str, Direction] = field(default_factory=dict)
    scans: Mapping[str, ScanResult] = field(default_factory=dict)
    steering: Mapping[str, SteeringResult] = field(default_factory=dict)
    steerings: Mapping[str, Steering] = field(default_factory=dict)
    measured: Mapping[str, Measured] = field(default_factory=dict)
    traces: Mapping[str, TraceGrid] = field(default_factory=dict)
    edits: Mapping[str, Sequence[WeightEdit]] = field(default_factory=dict)
    dissections: Mapping[str, Dissection] = field(default_factory=dict)
    pages: Mapping[str, Path] = field(default_factory=dict)
    recipes: Mapping[str, str] = field(default_factory=dict)
    records: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    files: Sequence[File] = ()
    damaged: Sequence[Damaged] = ()
    unknown: Sequence[str] = ()

    def of(self, kind: str) -> dict[str, Measured]:
        """The saved tables of a kind."""
        return {name: found for name, found in self.measured.items() if found.kind == kind}


#: Of each kind, which field of `Results` holds it, and how it is read.
_KINDS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    _STORE: ("stores", lambda path: _open_store(path)),
    probe_grid.KIND: ("grids", ProbeGrid.load),
    comparison.KIND: ("comparisons", Comparison.load),
    direction.KIND: ("directions", Direction.load),
    SCAN_KIND: ("scans", read_scan),
    STEERING_KIND: ("steering", read_steering),
    bundle.KIND: ("steerings", Steering.load),
    tracing.KIND: ("traces", TraceGrid.load),
    edits.KIND: ("edits", edits_in),
    _EDITED: ("edits", edits_in),
    dissected.KIND: ("dissections", Dissection.load),
    _RECIPE: ("recipes", lambda path: path.read_text(encoding="utf-8")),
    RECORD_KIND: ("records", lambda path: _read_record(path)),
    **dict.fromkeys(SCHEMAS, ("measured", read_measured)),
}


def read_results(folder: str | Path, stores: Mapping[str, ActivationStore] | None = None) -> Results:
    """Everything in a results folder and in folders inside it, and `stores` that lie elsewhere, by name.

    What is damaged is told in `Results.damaged`. Raises `ArtifactMissing` if there is no such folder or no result in
    it, `CorruptArtifact` if all there is is damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ArtifactMissing(f"there is no folder {folder}: make one with `reprobe demo --out {folder}`")
    paths: dict[str, list[Path]] = {}
    damaged: list[Damaged] = []
    unknown: list[str] = []
    pages: dict[str, Path] = {}
    for path in _walk(folder):
        try:
            kind = _kind(path)
            if kind == _PAGE and (match := _DISSECTED.search(_head(path))):
                pages[match[1].decode()] = path
        except (ReprobeError, OSError) as error:
            damaged.append(_damage(folder, path, error))
            continue
        if kind is None:
            unknown.append(path.relative_to(folder).as_posix())
        else:
            paths.setdefault(kind, []).append(path)
    found: dict[str, dict[str, Any]] = {attribute: {} for attribute, _ in _KINDS.values()}
    files: list[File] = []
    by_field: dict[str, list[tuple[Path, str]]] = {}
    for kind in _KINDS:
        for path in paths.get(kind, ()):
            by_field.setdefault(_KINDS[kind][0], []).append((path, kind))
    for attribute, kinds in by_field.items():
        names, seen = _names(folder, [path for path, _ in kinds]), set[str | None]()
        for path, kind in sorted(kinds):
            try:
                value = _KINDS[kind][1](path)
                digest = _digest(path, value)
            except (ReprobeError, OSError, ValueError) as error:
                damaged.append(_damage(folder, path, error))
                continue
            files.append(File(kind, names[path], path.relative_to(folder).as_posix(), digest))
            if digest is None or digest not in seen:  # a copy is listed, not shown again
                found[attribute][names[path]] = value
            seen.add(digest)
    run = None
    for i, path in enumerate(sorted(paths.get(RUN_KIND, ()), key=lambda path: len(path.parts))):
        if i:  # of a run inside this one, its results are shown, not its story
            unknown.append(path.relative_to(folder).as_posix())
            continue
        try:
            run = read_run(path.parent)
        except ReprobeError as error:
            damaged.append(_damage(folder, path, error))
    found["stores"] |= dict(stores or {})
    if run is None and not any(found[attribute] for attribute in found if attribute not in ("recipes", "records")):
        _raise_empty(folder, damaged)
    return Results(folder, run, pages=pages, files=files, damaged=damaged, unknown=unknown, **found)


def _raise_empty(folder: Path, damaged: Sequence[Damaged]) -> None:
    if damaged:
        raise CorruptArtifact(
            f"nothing in {folder} can be read: " + "; ".join(f"{d.path}: {d.why}" for d in damaged[:5])
        )
    raise ArtifactMissing(
        f"{folder} holds no results. `reprobe demo --out {folder}` makes a full set; or put there what verbs save: "
        f"stores (reprobe extract --to {folder}/NAME{STORE_SUFFIX}), probe grids (reprobe probe --to), traces, edits, "
        "dissections, tables."
    )


def _walk(folder: Path, depth: int = _DEPTH) -> Iterator[Path]:
    """Files, and folders that are one artifact; what is hidden is nobody's business."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if not path.is_dir() or not os.access(path, os.R_OK | os.X_OK) or _whole(path):
            yield path
        elif depth and not path.is_symlink():  # a link may lead in a circle
            yield from _walk(path, depth - 1)


def _whole(folder: Path) -> bool:
    """Whether a folder is one thing, inside which nothing is looked for: a store, or a model."""
    return (
        folder.suffix == STORE_SUFFIX
        or (folder / FOLDER).is_dir()
        or (folder / "config.json").is_file()
        or _is_store(folder)
    )


def _is_store(folder: Path) -> bool:
    manifest = folder / MANIFEST
    return manifest.is_file() and MARK in manifest.read_bytes()


def _kind(path: Path) -> str | None:
    """What a file or a whole folder is, None if it is no result. Raises `CorruptArtifact` if it cannot be told."""
    if path.is_dir():
        _ = next(path.iterdir(), None)  # raises where one may not look
        edited = (path / FOLDER).is_dir()
        return _EDITED if edited else _STORE if path.suffix == STORE_SUFFIX or _is_store(path) else None
    if not path.is_file():  # a pipe would be waited for, a link lead nowhere
        return None
    head, suffix = _head(path), path.suffix.lower()
    if suffix == ".safetensors" or _is_safetensors(head, path.stat().st_size):
        kind = kind_in(path)
        return kind if kind in _KINDS else None
    if suffix == ".json" and path.stat().st_size <= _LARGEST:
        return _kind_of_json(path)
    if head.startswith(b"PAR1") or suffix in (".parquet", ".csv"):
        return _kind_of_table(path)
    if suffix == ".toml":
        return _RECIPE if _is_toml(path) else None
    if REPORT_MARK in head:
        return _PAGE
    return _FIGURE if suffix in _FIGURES else None


def _head(path: Path) -> bytes:
    with path.open("rb") as f:
        return f.read(_HEAD)


def _is_safetensors(head: bytes, size: int) -> bool:
    """Eight bytes with the length of a JSON object, and that object."""
    return len(head) > 8 and head[8:9] == b"{" and 8 + int.from_bytes(head[:8], "little") <= size


def _kind_of_json(path: Path) -> str | None:
    placed = RUN_KIND if path.name == RUN else _PLACES.get(path.parent.name)
    with rebuilding(f"{path} is not JSON"):
        value = json.loads(path.read_bytes())
    said = value.get("kind") if isinstance(value, dict) else None
    if said in (SCAN_KIND, STEERING_KIND, RECORD_KIND):
        return str(said)
    if said is not None:
        return placed if said == placed else None
    try:
        return kind_of_columns(columns_of(path)) or placed
    except UsageError:  # no table
        return placed


def _open_store(path: Path) -> ActivationStore:
    """A store whose manifest and index are sound. Its rows, which may be many, are checked as they are read."""
    store = ActivationStore.open(path)
    _ = store.index
    return store


def _read_record(path: Path) -> dict[str, str]:
    with rebuilding(f"{path} is malformed"):
        value = json.loads(path.read_bytes())
        data = {f"data {name}": text(digest) for name, digest in value["data"].items()}
        return {"recipe": text(value["recipe"])} | data | {"recipe, model and data": text(value["digest"])}


def _kind_of_table(path: Path) -> str | None:
    columns = columns_of(path)
    if path.suffix == ".parquet" and set(columns) == set(DOSE_COLUMNS):
        if path.with_suffix(".json").is_file():
            return STEERING_KIND + " table"  # read with that file
        raise CorruptArtifact(f"{path} has no {path.stem}.json beside it: writing it was interrupted; run it again")
    return kind_of_columns(columns)


def _is_toml(path: Path) -> bool:
    try:
        tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return True


def _names(folder: Path, paths: Sequence[Path]) -> dict[Path, str]:
    """Names without suffix; with their folders where two would be called alike."""
    stems = {path: path.name.removesuffix(path.suffix) for path in paths}
    count = Counter(stems.values())
    return {
        path: stem if count[stem] == 1 else path.relative_to(folder).with_name(stem).as_posix()
        for path, stem in stems.items()
    }


def _digest(path: Path, value: Any) -> str | None:
    if isinstance(value, ActivationStore):
        return value.manifest.digest
    return None if path.is_dir() else digest_file(path)


def _damage(folder: Path, path: Path, error: Exception) -> Damaged:
    name = path.relative_to(folder).as_posix()
    why = (str(error).strip() or type(error).__name__).splitlines()[0]
    return Damaged(name, why.replace(f"{path}: ", "").replace(str(path), name))
