"""Who may write what in a store's folder.

Enters: a folder, shard numbers. Leaves: a `Lock` that other processes see. One file holds all locks, as ranges
of bytes: byte 0 is the folder as a whole, byte 1 + k is shard k. The kernel frees them when their process
dies, however it dies. Does not know what is being written.
"""

import fcntl
import os
import struct
import sys
import time
from pathlib import Path

from reprobe.errors import StoreLocked
from reprobe.store.layout import LOCK

LOCK_TEXT = b"reprobe store: being written, or left by a writer that was killed\n"

_WHOLE, _FIRST_SHARD, _LEAVING = 0, 1, 2**62
#: How long to wait for another writer that is beginning the store, and how often to look.
_PATIENCE_SECONDS, _PAUSE_SECONDS = 600.0, 0.02


class Lock:
    """A lock on a store's folder, from construction to `release`.

    It begins `alone`: nobody else may do anything there. `share` lets others in, who write other shards. With
    `join` the lock may also begin shared, if others are writing; if one of them is only just beginning the
    store, it is waited for. Raises `StoreLocked` if the folder is taken.

    The last to leave removes the lock's file; one left by a killed process is taken over.
    """

    def __init__(self, root: Path, *, join: bool) -> None:
        self._path = root / LOCK
        self.alone = False
        until = time.monotonic() + (_PATIENCE_SECONDS if join else 0)
        while (fd := self._try(join)) is None:
            if join and time.monotonic() > until:
                raise self._taken("another process has been beginning it for a long time")
            if join:
                time.sleep(_PAUSE_SECONDS)
        self._fd: int | None = fd

    def _try(self, join: bool) -> int | None:
        """The locked file; None if it is held by someone to wait for, or was removed while we locked it."""
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        kept = False
        try:
            self.alone = _set(fd, fcntl.F_WRLCK, _WHOLE)
            if not self.alone and not join:
                raise self._taken("another process is writing it")
            if not (self.alone or _set(fd, fcntl.F_RDLCK, _WHOLE)) or not self._is_current(fd):
                return None
            if self.alone:
                self._mark(fd)
            kept = True
            return fd
        finally:
            if not kept:
                os.close(fd)

    def _is_current(self, fd: int) -> bool:
        """Whether our file is still the one in the folder: its last holder may have removed it."""
        try:
            return os.path.samestat(os.fstat(fd), os.stat(self._path))
        except FileNotFoundError:
            return False

    def _mark(self, fd: int) -> None:
        try:
            os.pwrite(fd, LOCK_TEXT, 0)
        except BaseException:  # e.g. a full disk: a lock without its text would look foreign
            self._path.unlink()
            raise

    def own(self, shards: range) -> None:
        """Take the locks of these shards; `StoreLocked` if another writer has one of them."""
        assert self._fd is not None
        # a length of 0 would mean all bytes to the end
        if len(shards) and not _set(self._fd, fcntl.F_WRLCK, _FIRST_SHARD + shards.start, len(shards)):
            raise self._taken(f"another process is writing some of its shards {shards.start}–{shards.stop - 1}")

    def share(self) -> None:
        """Let others in, who write other shards."""
        assert self._fd is not None
        _set(self._fd, fcntl.F_RDLCK, _WHOLE)
        self.alone = False

    @property
    def released(self) -> bool:
        return self._fd is None

    def release(self) -> None:
        """Give the lock back and, as the last, remove its file; does nothing the second time."""
        if self._fd is None:
            return
        fd, self._fd = self._fd, None
        try:
            _set(fd, fcntl.F_WRLCK, _LEAVING, wait=True)  # one by one, or none of two would be the last
            if _set(fd, fcntl.F_WRLCK, _WHOLE):
                self._path.unlink(missing_ok=True)  # while still held, so that nobody else's lock is removed
        finally:
            os.close(fd)

    def _taken(self, why: str) -> StoreLocked:
        return StoreLocked(f"{self._path.parent} is locked: {why}. Wait, or choose another path.")


def _set(fd: int, kind: int, start: int, length: int = 1, *, wait: bool = False) -> bool:
    """Lock bytes of a file in place of what lock of ours they had; False if another's lock is in the way.

    Where the kernel has them, locks of the open file and not of the process: those hold between two writers
    of one process too, and are not lost when the process closes another handle of the file.
    """
    try:
        if sys.platform == "linux" and sys.maxsize > 2**32:
            command = fcntl.F_OFD_SETLKW if wait else fcntl.F_OFD_SETLK
            fcntl.fcntl(fd, command, struct.pack("hhqqi4x", kind, os.SEEK_SET, start, length, 0))
        else:
            shared = fcntl.LOCK_SH if kind == fcntl.F_RDLCK else fcntl.LOCK_EX
            fcntl.lockf(fd, shared if wait else shared | fcntl.LOCK_NB, length, start)
    except (BlockingIOError, PermissionError):  # EAGAIN or EACCES: POSIX allows either
        return False
    return True
