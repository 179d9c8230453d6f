"""Where an artifact came from: digests and canonical JSON.

Enters: bytes, files, plain JSON values. Leaves: hex digests, canonical text, durable files. Knows nothing of models
or stores; everything on disk uses these functions so that equal content always has equal bytes.
"""

import contextlib
import errno
import hashlib
import importlib.metadata
import json
import os
import platform
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from reprobe.errors import CorruptArtifact, SchemaMismatch

#: Numbers of the errors with which a system says that there is no room for what is written.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


def canonical_json(value: Any) -> str:
    """The one text of a JSON value: sorted keys, two-space indent, no NaN, trailing newline."""
    return json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def digest(value: Any) -> str:
    """sha256 (hex) of a JSON value: of its text with sorted keys and no blanks (indenting takes ten times longer)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return digest_bytes(text.encode())


def digest_bytes(data: bytes | memoryview) -> str:
    """sha256 (hex) of bytes."""
    return hashlib.sha256(data).hexdigest()


def digest_lines(lines: Iterable[str]) -> str:
    """sha256 (hex) of a stream of lines, each followed by a newline; memory does not grow with their number."""
    h = hashlib.sha256()
    for line in lines:
        h.update(line.encode())
        h.update(b"\n")
    return h.hexdigest()


def digest_chunks(chunks: Iterable[Any]) -> str:
    """sha256 (hex) of bytes that come in pieces."""
    h = hashlib.sha256()
    for chunk in chunks:
        h.update(chunk)
    return h.hexdigest()


def digest_file(path: Path) -> str:
    """sha256 (hex) of a file's bytes, read in blocks."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def write_durably(path: Path, data: bytes | memoryview) -> None:
    """Write a file so that it exists whole or not at all, also after a crash.

    Temporary name in the same folder → fsync → rename → fsync of the folder. On any failure the temporary file is
    removed and whatever stood at `path` before still stands.
    """
    fd, tmp = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(fd, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.chmod(tmp, 0o644)  # mkstemp makes files private; artifacts are shared like any other file
        os.replace(tmp, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(tmp)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """fsync a folder, which makes a rename in it durable."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def require_schema(found: Any, reads: int, what: str) -> None:
    """Raise `SchemaMismatch` unless `what` has the schema that this version reads, `CorruptArtifact` if it has none."""
    if type(found) is not int or found < 1:
        raise CorruptArtifact(f"{what} has schema version {found!r}, which no version of reprobe writes")
    if found == reads:
        return
    newer = found > reads
    raise SchemaMismatch(
        f"{what} was written by {'a newer' if newer else 'an older'} reprobe: it has schema version {found}, and this "
        f"reprobe {importlib.metadata.version('reprobe-lm')} reads version {reads}. "
        + ("Upgrade reprobe to read it." if newer else "Read it with the version that wrote it, or make it anew.")
    )


@contextlib.contextmanager
def rebuilding(what: str) -> Iterator[None]:
    """Values are made in here of what a file says: whatever fails, the file is at fault, and `what` begins the message.

    A file may hold anything in any place: numbers for texts, lists that are too deep, arrays of another shape. Code
    that trusts its arguments fails of that in a dozen ways, all of which become `CorruptArtifact`.
    """
    try:
        yield
    except BaseException as error:
        # A panic of polars is no Exception, and importing its class would import polars.
        failed = isinstance(error, Exception) or type(error).__name__ == "PanicException"
        if not failed or isinstance(error, MemoryError):
            raise
        raise CorruptArtifact(f"{what}: {str(error) or type(error).__name__}") from error


def text(value: Any) -> str:
    """`value` itself, if it is text; raises `TypeError`."""
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.80} should be text")
    return value


def texts(value: Any) -> tuple[str, ...]:
    """A JSON list of texts as a tuple; raises `TypeError`."""
    if not isinstance(value, list | tuple):
        raise TypeError(f"{value!r:.80} should be a list of texts")
    return tuple(text(v) for v in value)


def versions() -> dict[str, str]:
    """Versions that an artifact's bytes may depend on, for its manifest."""
    names = ("reprobe-lm", "torch", "transformers", "tokenizers", "numpy", "zarr", "polars", "scikit-learn")
    return {"python": platform.python_version()} | {n: importlib.metadata.version(n) for n in names}
