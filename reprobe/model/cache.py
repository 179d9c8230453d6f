"""The cache: where fetched and converted weights live, and how something appears there whole or not at all.

Enters: a target path below `cache_folder()` and a function that makes it. Leaves: the finished file or
folder. It is made under a temporary name beside the target (same file system), flushed to disk and renamed,
under a lock, so that neither a crash, a kill, Ctrl-C nor a second process can leave a half-written thing
under the final name. Does not know what is cached.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import platformdirs

from reprobe.errors import DiskFull, FetchFailed
from reprobe.progress import Progress, silent
from reprobe.provenance import NO_ROOM, sync_folder


def cache_folder() -> Path:
    """`$REPROBE_CACHE`, or the platform's user cache folder for reprobe. It need not exist yet."""
    own = os.environ.get("REPROBE_CACHE")
    return Path(own).expanduser().absolute() if own else platformdirs.user_cache_path("reprobe")


def build(
    target: Path, make: Callable[[Path], None], *, whole: Callable[[Path], bool], progress: Progress = silent
) -> Path:
    """`target`, made first if it is not there or not `whole`.

    `make` gets an empty temporary folder and leaves in it one entry named like `target`, a file or a folder.
    What it raises passes through, after everything it wrote is removed; a full disk becomes `DiskFull`, a
    cache that cannot be written `FetchFailed`. Where another process is building the same target, it is
    waited for.
    """
    if whole(target):
        return target
    with explained(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with _lock(target, progress):
            if whole(target):  # another process made it while this one waited
                return target
            _remove_leftovers(target)
            scratch = Path(tempfile.mkdtemp(prefix=_prefix(target), dir=target.parent))
            try:
                make(scratch)
                _sync(scratch / target.name)
                if target.is_dir():  # damaged: a rename cannot replace a folder that has something in it
                    target.rename(scratch / "damaged")
                (scratch / target.name).rename(target)
                sync_folder(target.parent)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    return target


def require_room(folder: Path, n_bytes: int) -> None:
    """Raise `DiskFull` now if `n_bytes` more would not fit on the file system of `folder`."""
    free = shutil.disk_usage(folder).free
    if free < n_bytes:
        raise DiskFull(
            f"{n_bytes / 1e6:,.0f} MB are needed in {folder}, and {free / 1e6:,.0f} MB are free there. "
            "Free some room, or set REPROBE_CACHE to a folder on another disk."
        )


@contextlib.contextmanager
def _lock(target: Path, progress: Progress) -> Iterator[None]:
    """An advisory lock that the kernel releases however its holder ends. The lock file itself stays: removing
    it would let two processes hold locks on two files of the same name."""
    with open(target.parent / f".{target.name}.lock", "w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress(f"waiting for another process to finish {target.name}", 0, 0)
            fcntl.flock(f, fcntl.LOCK_EX)
        yield


def _prefix(target: Path) -> str:
    return f".{target.name}.making-"


def _remove_leftovers(target: Path) -> None:
    """Scratch folders of killed processes. Only called under the lock, so no living process works in them."""
    for left in target.parent.glob(f"{_prefix(target)}*"):
        shutil.rmtree(left, ignore_errors=True)


def _sync(path: Path) -> None:
    if path.is_dir():
        for entry in path.iterdir():
            _sync(entry)
        sync_folder(path)
    else:
        with path.open("rb") as f:
            os.fsync(f.fileno())


@contextlib.contextmanager
def explained(target: Path) -> Iterator[None]:
    """Turn what the system says while `target` is being written into `DiskFull` or `FetchFailed`."""
    try:
        yield
    except DiskFull:
        raise
    except OSError as e:
        if e.errno in NO_ROOM:
            raise DiskFull(
                f"no room left in {target.parent} while making {target.name}; nothing was left behind. "
                "Free some room, or set REPROBE_CACHE to a folder on another disk."
            ) from e
        raise FetchFailed(
            f"{target.name} could not be made in {target.parent}: {e}. "
            "If it is the folder's fault, set REPROBE_CACHE to one that can be written."
        ) from e
