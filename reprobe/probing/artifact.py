"""One file for what probing leaves on disk: named arrays and a JSON header, as safetensors.

Enters: a kind ("direction", "probe grid"), plain JSON, numpy arrays. Leaves: a file that exists whole or not
at all, whose bytes depend on its content alone, and that is read without running anything in it. Does not
know what the header means.

The header is stored under one metadata key, beside a sha256 over header and arrays: safetensors itself
notices a truncated file but not a changed byte.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as safetensors_bytes

from reprobe.errors import ArtifactExists, ArtifactMissing, CorruptArtifact, UsageError
from reprobe.provenance import canonical_json, rebuilding, require_schema, write_durably

#: Version of the header's meaning. A file of another one is refused.
SCHEMA = 1
_KEY = "reprobe"


@dataclass(frozen=True)
class Artifact:
    """What a file holds: its JSON header and its arrays by name."""

    header: dict[str, Any]
    arrays: dict[str, np.ndarray]


def to_bytes(kind: str, artifact: Artifact) -> bytes:
    """The file's bytes: a pure function of kind and content."""
    arrays = {name: np.ascontiguousarray(a) for name, a in artifact.arrays.items()}
    body = {"kind": kind, "schema": SCHEMA, "header": artifact.header}
    envelope = body | {"sha256": _checksum(body, arrays)}
    # One metadata key only: safetensors writes several in an order that changes from run to run.
    return safetensors_bytes(arrays, metadata={_KEY: canonical_json(envelope)})


def write(path: Path, kind: str, artifact: Artifact, *, overwrite: bool) -> None:
    """Write the file durably, making its folder where that is missing.

    Raises `ArtifactExists` if something is there already (a folder always, a file unless `overwrite`).
    """
    if path.is_dir():
        raise ArtifactExists(
            f"{path} is a folder; name a file, e.g. {path / (kind.replace(' ', '-') + '.safetensors')}"
        )
    if path.exists() and not overwrite:
        raise ArtifactExists(f"{path} exists; choose another name or pass overwrite=True")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, to_bytes(kind, artifact))


def read(path: Path, kind: str) -> Artifact:
    """The content of a file written as `kind`.

    Raises `ArtifactMissing`, `CorruptArtifact` (not safetensors, not from reprobe, or changed since it was
    written), `SchemaMismatch` (of a newer or older version), `UsageError` (another kind of artifact).
    """
    envelope, arrays = _open(path, kind)
    checksum, header = envelope.pop("sha256"), envelope["header"]
    if envelope["kind"] != kind:
        raise UsageError(f"{path} holds a {envelope['kind']}, not a {kind}")
    with rebuilding(f"{path}: malformed header"):  # what has no canonical text has no checksum
        found = _checksum(envelope, arrays)
    if not isinstance(header, dict) or checksum != found:
        raise CorruptArtifact(f"{path}: the content does not match its checksum; it was changed after writing")
    return Artifact(header, arrays)


def kind_of(path: Path) -> str:
    """The kind that a file says it is of; raises as `read` does. Whether the content is sound shows `read`."""
    kind = kind_in(path)
    if kind is None:
        raise _foreign(path)
    return kind


def kind_in(path: Path) -> str | None:
    """The kind that a safetensors file says it is of, None if reprobe did not write it. No array is read, however large
    the file. Raises as `read` does."""
    text, _ = _contents(path, "artifact", arrays=False)
    return None if text is None else str(_envelope(path, text)["kind"])


def array(arrays: Mapping[str, np.ndarray], name: str, kinds: str, *shape: int | None) -> np.ndarray:
    """The array of a name, if its dtype is of one of `kinds` (numpy's letters: f, i, u, b) and it has `shape` (None:
    any length). Raises `CorruptArtifact`."""
    found = arrays.get(name)
    if found is None:
        raise CorruptArtifact(f"the array {name!r} is missing")
    fits = found.ndim == len(shape) and all(want in (None, n) for want, n in zip(shape, found.shape, strict=False))
    if found.dtype.kind not in kinds or not fits:
        want = ", ".join("any" if n is None else str(n) for n in shape)
        raise CorruptArtifact(
            f"the array {name!r} is {found.dtype} of shape {found.shape}, not ({want}) of kind {kinds}"
        )
    return found


def _open(path: Path, what: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The header's envelope, of our schema and with all its fields, and the arrays."""
    text, arrays = _contents(path, what)
    if text is None:
        raise _foreign(path)
    return _envelope(path, text), arrays


def _contents(path: Path, what: str, *, arrays: bool = True) -> tuple[str | None, dict[str, np.ndarray]]:
    """The text under our metadata key, and the arrays if they are wanted."""
    if not path.is_file():
        raise ArtifactMissing(f"{path}: no such {what}" + (" (it is a folder)" if path.is_dir() else ""))
    try:
        with safe_open(path, framework="numpy") as f:
            names = f.keys() if arrays else ()
            return (f.metadata() or {}).get(_KEY), {name: f.get_tensor(name) for name in names}
    except (SafetensorError, ValueError, TypeError, AttributeError) as error:
        raise CorruptArtifact(
            f"{path} cannot be read as safetensors ({error}); it is damaged or something else"
        ) from error


def _foreign(path: Path) -> CorruptArtifact:
    return CorruptArtifact(f"{path} is a safetensors file, but reprobe did not write it")


def _envelope(path: Path, text: str) -> dict[str, Any]:
    with rebuilding(f"{path}: malformed header"):
        envelope = dict(json.loads(text))
        schema = envelope["schema"]
    require_schema(schema, SCHEMA, str(path))  # first: of another schema, nothing else is known
    if lacking := {"kind", "header", "sha256"} - set(envelope):
        raise CorruptArtifact(f"{path}: malformed header (no {', '.join(sorted(lacking))})")
    found: dict[str, Any] = envelope
    return found


def _checksum(body: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> str:
    h = hashlib.sha256(canonical_json(body).encode())
    for name, array in sorted(arrays.items()):
        h.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        h.update(np.ascontiguousarray(array).tobytes())
    return h.hexdigest()
