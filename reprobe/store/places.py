"""Where the bytes of a store live: a local folder, or a prefix of an object store.

Enters: a path or a URL, names relative to it, bytes. Leaves: a `Place`, which reads, lists, and writes whole
files durably. Does not know what the files mean; only their names tell whose they are.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from polars.exceptions import PanicException
from zarr.abc.store import Store
from zarr.storage import LocalStore

from reprobe.errors import CorruptArtifact, ReprobeError, UsageError
from reprobe.provenance import digest_file, sync_folder, write_durably
from reprobe.store.layout import LOCK, is_store_file, is_store_folder, written_as

#: Kinds of object stores that have create-only writes; S3 is the one that the tests run against.
SCHEMES = ("s3", "gs", "az")
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://.+")


@dataclass(frozen=True)
class Survey:
    """Relative paths at a place: what a store may have, leftovers of interrupted writes, and the rest.

    `files` are those of a store, each with its size in bytes. The lock is left out.
    """

    files: Mapping[str, int]
    temporary: tuple[str, ...]
    folders: tuple[str, ...]
    foreign: tuple[str, ...]


class Place(Protocol):
    """Where a store's files are. Names are relative, with slashes; `str` of a place is for people.

    Reading what is not there raises `FileNotFoundError`.
    """

    @property
    def path(self) -> Path | str:
        """What `place_of` makes this place from: the absolute path of a folder, or a URL."""
        ...

    @property
    def name(self) -> str:
        """The last part of the path."""
        ...

    def at(self, name: str) -> str:
        """Where a file is, for people."""
        ...

    def exists(self) -> bool: ...

    def read(self, name: str) -> bytes: ...

    def size(self, name: str) -> int | None:
        """Length of a file in bytes, or None if there is none."""
        ...

    def digest(self, name: str) -> str:
        """sha256 (hex) of a file, read in blocks."""
        ...

    def open(self, name: str) -> BinaryIO:
        """A file to read and seek in; parts that are not read are not fetched."""
        ...

    def names(self, folder: str) -> frozenset[str]:
        """Relative paths of the files in a folder; none if there is no such folder."""
        ...

    def survey(self) -> Survey: ...

    def prepare(self, names: Iterable[str]) -> None:
        """Make the folders that files of these names need."""
        ...

    def write(self, name: str, data: bytes) -> None:
        """Write a file so that it exists whole or not at all, also after a crash."""
        ...

    def write_new(self, name: str, data: bytes) -> None:
        """As `write`, but raise `FileExistsError` if the file is there."""
        ...

    def remove(self, name: str) -> None: ...

    def zarr(self) -> Store:
        """The place as zarr reads it."""
        ...

    def failures(self) -> AbstractContextManager[None]:
        """A context in which failures of the place itself become errors of reprobe."""
        ...


def place_of(path: str | Path) -> Place:
    """The place that `path` names: a URL such as `s3://bucket/prefix`, or a folder, there or not."""
    text = os.fspath(path)
    if isinstance(path, Path) and text.startswith(tuple(f"{s}:/" for s in SCHEMES)):
        raise UsageError(f"{text} lost a slash as a Path: give the URL of an object store as text")
    if (url := _URL.fullmatch(text)) is None:
        return LocalFolder(Path(os.path.abspath(text)))
    if url[1] not in SCHEMES:
        raise UsageError(f"{text}: there is no store of kind {url[1]}://; there are {', '.join(SCHEMES)} and folders")
    from reprobe.store.object_store import ObjectStore  # nobody else needs it

    return ObjectStore(text)


@contextmanager
def reading(place: Place, what: str) -> Iterator[None]:
    """Damaged bytes can fail anywhere inside a format's library: any failure in here is damage of `what`.

    Except those of the place itself, and of memory.
    """
    try:
        with place.failures():
            yield
    except (ReprobeError, MemoryError):
        raise
    except (Exception, PanicException) as error:  # polars panics on some damaged tables
        if isinstance(error, OSError) and error.errno is not None:  # the device, not the bytes
            raise
        raise CorruptArtifact(f"{what} ({type(error).__name__}: {error}). verify() lists all that is.") from error


@dataclass(frozen=True)
class LocalFolder:
    """A folder. Files are written to a temporary name, fsynced and renamed, and their folder is fsynced."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    @property
    def name(self) -> str:
        return self.path.name

    def at(self, name: str) -> str:
        return str(self.path / name)

    def exists(self) -> bool:
        return self.path.is_dir()

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    def size(self, name: str) -> int | None:
        path = self.path / name
        return path.stat().st_size if path.is_file() else None

    def digest(self, name: str) -> str:
        return digest_file(self.path / name)

    def open(self, name: str) -> BinaryIO:
        return (self.path / name).open("rb")

    def names(self, folder: str) -> frozenset[str]:
        try:
            return frozenset(f"{folder}/{name}" for name in os.listdir(self.path / folder))
        except FileNotFoundError:
            return frozenset()

    def survey(self) -> Survey:
        """Symbolic links are foreign and never followed; what another writer removes meanwhile is left out."""
        files: dict[str, int] = {}
        temporary, folders, foreign = [], [], []
        pending = [""]
        while pending:
            parent = pending.pop()
            with suppress(FileNotFoundError), os.scandir(self.path / parent) as entries:
                for entry in entries:
                    name = f"{parent}{entry.name}"
                    if entry.is_dir(follow_symlinks=False) and is_store_folder(name):
                        folders.append(name)
                        pending.append(f"{name}/")
                    elif not entry.is_file(follow_symlinks=False):
                        foreign.append(name)
                    elif is_store_file(name):
                        with suppress(FileNotFoundError):
                            files[name] = entry.stat(follow_symlinks=False).st_size
                    elif written_as(name) is not None:
                        temporary.append(name)
                    elif name != LOCK:
                        foreign.append(name)
        return Survey(dict(sorted(files.items())), *(tuple(sorted(part)) for part in (temporary, folders, foreign)))

    def prepare(self, names: Iterable[str]) -> None:
        for folder in sorted({os.path.dirname(name) for name in names}):
            (self.path / folder).mkdir(parents=True, exist_ok=True)
        sync_folder(self.path)

    def write(self, name: str, data: bytes) -> None:
        write_durably(self.path / name, data)

    def write_new(self, name: str, data: bytes) -> None:
        # Locks keep writers apart; this is for a file system on which they do not work.
        if (self.path / name).exists():
            raise FileExistsError(self.at(name))
        write_durably(self.path / name, data)

    def remove(self, name: str) -> None:
        (self.path / name).unlink()

    def zarr(self) -> Store:
        return LocalStore(self.path, read_only=True)

    def failures(self) -> AbstractContextManager[None]:
        return nullcontext()
