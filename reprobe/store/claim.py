"""May this writer use this place: what is there, whose is it, and who else is writing it?

Enters: a place, and what its writer was told it may do. Leaves: a `Claim`, or an error that names the way on.
Does not read arrays. The rule it keeps: nothing that reprobe did not write is ever removed.
"""

import time
from contextlib import suppress
from pathlib import Path

from reprobe.errors import ArtifactExists
from reprobe.provenance import sync_folder
from reprobe.store.layout import LOCK, MANIFEST, shard_of, written_as
from reprobe.store.locks import LOCK_TEXT, Lock
from reprobe.store.manifest import MARK
from reprobe.store.places import LocalFolder, Place


class Claim:
    """The right to write, until `release`. While `alone`, nobody else writes anything at the place.

    Object stores have no locks (`lock` is None): there a claim is always alone, and a shard that two writers
    write becomes that of the first to put its commit record.
    """

    def __init__(self, place: Place, lock: Lock | None) -> None:
        self._place = place
        self._lock = lock
        self.released = False

    @property
    def alone(self) -> bool:
        return self._lock is None or self._lock.alone

    def own(self, shards: range) -> None:
        """Claim these shards; raises `StoreLocked` if another writer has one of them."""
        if self._lock is not None:
            self._lock.own(shards)

    def share(self) -> None:
        """Let writers of other shards in: the store is begun."""
        if self._lock is not None:
            self._lock.share()

    def release(self) -> None:
        """Give the right back; a folder in which nothing was begun is taken back too."""
        if self._lock is not None:
            self._lock.release()
        if isinstance(self._place, LocalFolder):
            remove_if_empty(self._place.path)
        self.released = True


def claim(place: Place, *, resume: bool, overwrite: bool, join: bool) -> Claim:
    """See that the place may be used, make its folder, and lock it.

    Raises `ArtifactExists` if something is there and none of `resume`, `overwrite` and `join` is set, or if
    it is not all ours; `StoreLocked` if another process writes it, or with `join` if it alone does.
    """
    may_exist = resume or overwrite or join
    if isinstance(place, LocalFolder):
        return Claim(place, _locked(place, may_exist=may_exist, join=join))
    if place.exists():
        require_ours(place, may_exist=may_exist)
    return Claim(place, None)


def _locked(place: LocalFolder, *, may_exist: bool, join: bool) -> Lock:
    root = place.path
    root.parent.mkdir(parents=True, exist_ok=True)
    while True:
        try:
            root.mkdir()
        except FileExistsError:
            try:
                require_ours(place, may_exist=may_exist)  # before anything of ours, even a lock, is put there
            except (ArtifactExists, FileNotFoundError):
                if join and not root.exists():
                    continue  # another writer, whose beginning failed, took it back
                raise
        try:
            sync_folder(root.parent)
            lock = Lock(root, join=join)
        except FileNotFoundError:
            if join and not root.exists():
                continue
            raise
        except OSError:
            remove_if_empty(root)
            raise
        try:
            require_ours(place, may_exist=True)  # once more, now that nobody else can begin or replace it
            if lock.alone or is_store(place):
                return lock
        except BaseException:
            lock.release()
            raise
        lock.release()  # whoever began it gave up, and others wait as we do
        time.sleep(0.01)


def remove_if_empty(root: Path) -> None:
    """Take back a folder in which nothing was begun."""
    with suppress(OSError):
        root.rmdir()


def is_store(place: Place) -> bool:
    """Whether there is a store, possibly damaged or incomplete: its manifest says so."""
    try:
        return MARK in place.read(MANIFEST)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return False


def is_unfinished_creation(place: Place) -> bool:
    """Whether this is what a writer that was killed before it wrote a manifest leaves: nothing can be lost.

    That is nothing at all, or our lock and nothing but files of a store.
    """
    if not place.exists() or place.size(MANIFEST) is not None:
        return False
    found = place.survey()
    if found.foreign:  # also a lock that is not a plain file
        return False
    try:
        lock: bytes | None = place.read(LOCK)
    except FileNotFoundError:
        lock = None
    if found.files or found.temporary or found.folders:
        return lock == LOCK_TEXT
    return lock in (None, b"", LOCK_TEXT)


def clear(place: Place) -> None:
    """Remove every file and folder of a store, the manifest first; the lock and anything foreign stay.

    The manifest goes first, so that a kill half-way leaves an unfinished creation, not a damaged store.
    """
    found = place.survey()
    for name in sorted((*found.files, *found.temporary), key=lambda n: (n != MANIFEST, n)):
        place.remove(name)
    if isinstance(place, LocalFolder):
        for name in sorted(found.folders, key=len, reverse=True):
            (place.path / name).rmdir()


def remove_temporary(place: Place, shards: range | None) -> None:
    """Remove what interrupted writes left; given `shards`, only of these, as other writers are at work."""
    for name in place.survey().temporary:
        shard = shard_of(written_as(name) or "")
        if shards is None or (shard is not None and shard in shards):
            place.remove(name)


def require_ours(place: Place, *, may_exist: bool) -> None:
    """Raise `ArtifactExists` unless this may be used, and all of it belongs to a store or to one never begun."""
    store = is_store(place)
    # asked once more at the end: another writer may have begun it between the first two questions
    if not store and not is_unfinished_creation(place) and not (store := is_store(place)):
        raise ArtifactExists(
            f"{place} exists and is not a reprobe store, or its manifest is damaged beyond recognition. "
            "Nothing was touched: choose another path, or remove it yourself."
        )
    if not may_exist:
        raise ArtifactExists(
            f"{place} exists. To go on with this store pass resume=True (--resume); to replace it "
            "overwrite=True (--overwrite)."
        )
    if store and (foreign := place.survey().foreign):
        raise ArtifactExists(
            f"{place} holds what is not part of a store: {', '.join(foreign[:5])}. Nothing was touched: "
            "move it away, or choose another path."
        )
