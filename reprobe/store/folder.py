"""A store's folder as a whole: what is in it, whose it is, and who may write it.

Enters: a path. Leaves: a survey of its content, the certainty that it is (or is not) a store that may be
resumed or replaced, and an exclusive lock. Does not read arrays. The rule it keeps: nothing that reprobe did
not write is ever removed.
"""

import fcntl
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from reprobe.errors import ArtifactExists, StoreLocked
from reprobe.provenance import sync_folder
from reprobe.store.layout import LOCK, MANIFEST, is_store_file, is_store_folder, is_temporary
from reprobe.store.manifest import MARK

_LOCK_TEXT = b"reprobe store: being written, or left by a writer that was killed\n"


@dataclass(frozen=True)
class Survey:
    """Relative paths in a folder: what a store may have, leftovers of interrupted writes, and the rest."""

    files: tuple[str, ...]
    temporary: tuple[str, ...]
    folders: tuple[str, ...]
    foreign: tuple[str, ...]


def survey(root: Path) -> Survey:
    """What lies at and below `root`; symbolic links are foreign and never followed. The lock is left out."""
    files, temporary, folders, foreign = [], [], [], []
    pending = [root]
    while pending:
        with os.scandir(pending.pop()) as entries:
            for entry in entries:
                name = Path(entry.path).relative_to(root).as_posix()
                if entry.is_dir(follow_symlinks=False) and is_store_folder(name):
                    folders.append(name)
                    pending.append(Path(entry.path))
                elif not entry.is_file(follow_symlinks=False):
                    foreign.append(name)
                elif is_store_file(name):
                    files.append(name)
                elif is_temporary(name):
                    temporary.append(name)
                elif name != LOCK:
                    foreign.append(name)
    return Survey(*(tuple(sorted(part)) for part in (files, temporary, folders, foreign)))


def is_store(root: Path) -> bool:
    """Whether `root` is a store, possibly damaged or incomplete: its manifest says so."""
    path = root / MANIFEST
    return path.is_file() and MARK in path.read_bytes()


def is_unfinished_creation(root: Path) -> bool:
    """Whether `root` is what a writer that was killed before it wrote a manifest leaves: nothing can be lost.

    That is an empty folder, or one in which our lock still lies and nothing but files of a store.
    """
    if not root.is_dir() or (root / MANIFEST).exists():
        return False
    found = survey(root)
    if found.foreign:  # also a lock that is not a plain file
        return False
    try:
        lock: bytes | None = (root / LOCK).read_bytes()
    except FileNotFoundError:
        lock = None
    if found.files or found.temporary or found.folders:
        return lock == _LOCK_TEXT
    return lock in (None, b"", _LOCK_TEXT)


def clear(root: Path) -> None:
    """Remove every file and folder of a store from `root`, the manifest first; the lock and anything foreign
    stay.

    The manifest goes first, so that a kill half-way leaves an unfinished creation, not a damaged store.
    """
    found = survey(root)
    for name in sorted((*found.files, *found.temporary), key=lambda n: n != MANIFEST):
        (root / name).unlink()
    for name in sorted(found.folders, key=len, reverse=True):
        (root / name).rmdir()


def remove_temporary(root: Path) -> None:
    """Remove what interrupted writes left."""
    for name in survey(root).temporary:
        (root / name).unlink()


class Lock:
    """An exclusive lock on a store's folder, from construction to `release`; `StoreLocked` if it is taken.

    The kernel frees the lock when its process dies, however it dies. The lock's file is removed by `release`;
    one left by a killed process is taken over.
    """

    def __init__(self, root: Path) -> None:
        self._path = root / LOCK
        fd: int | None = None
        while fd is None:
            fd = self._try()
        self._fd: int | None = fd

    def _try(self) -> int | None:
        """The locked file, or None if its last holder removed it between our open and our lock."""
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(fd)
            raise StoreLocked(
                f"{self._path.parent} is being written by another process: wait, or choose another path"
            ) from error
        except BaseException:
            os.close(fd)
            raise
        try:
            if os.path.samestat(os.fstat(fd), os.stat(self._path)):
                os.pwrite(fd, _LOCK_TEXT, 0)
                return fd
        except FileNotFoundError:
            pass
        except BaseException:  # e.g. a full disk: a lock without its text would look foreign
            self._path.unlink()
            os.close(fd)
            raise
        os.close(fd)
        return None

    @property
    def released(self) -> bool:
        return self._fd is None

    def release(self) -> None:
        """Give the lock back and remove its file; does nothing the second time."""
        if self._fd is not None:
            self._path.unlink(missing_ok=True)  # while still held, so that nobody else's lock is removed
            os.close(self._fd)
            self._fd = None


def claim(root: Path, *, resume: bool, overwrite: bool) -> Lock:
    """Make the folder, or see that it may be used, and lock it.

    Raises `ArtifactExists` if it exists and neither `resume` nor `overwrite` is set, or if it is not all
    ours; `StoreLocked` if another process writes it.
    """
    root.parent.mkdir(parents=True, exist_ok=True)
    try:
        root.mkdir()
    except FileExistsError:
        if not (resume or overwrite):
            raise ArtifactExists(f"{root} exists. {_ways_on(root)}") from None
        _require_ours(root)  # before anything of ours, even a lock, is put there
    try:
        sync_folder(root.parent)
        lock = Lock(root)
    except OSError:
        remove_if_empty(root)
        raise
    try:
        _require_ours(root)  # once more, now that nobody else can change it
    except BaseException:
        lock.release()
        raise
    return lock


def remove_if_empty(root: Path) -> None:
    """Take back a folder in which nothing was begun."""
    with suppress(OSError):
        root.rmdir()


def _require_ours(root: Path) -> None:
    """Raise `ArtifactExists` unless all at `root` belongs to a store, or to one that was never begun."""
    if is_store(root):
        if foreign := survey(root).foreign:
            raise ArtifactExists(
                f"{root} holds what is not part of a store: {', '.join(foreign[:5])}. Nothing was touched: "
                "move it away, or choose another path."
            )
    elif not is_unfinished_creation(root):
        raise ArtifactExists(
            f"{root} exists and is not a reprobe store, or its manifest is damaged beyond recognition. "
            "Nothing was touched: choose another path, or remove it yourself."
        )


def _ways_on(root: Path) -> str:
    if not is_store(root) and not is_unfinished_creation(root):
        return "It is not a reprobe store: choose another path."
    return "To go on with this store pass resume=True (--resume); to replace it overwrite=True (--overwrite)."
