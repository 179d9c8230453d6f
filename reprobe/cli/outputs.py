"""What a verb is to write: that it can be, found out before long work and not after it.

Enters: paths that a user gave. Leaves: nothing, or an error that names what stands in the way. Writes nothing itself.
"""

import os
from pathlib import Path

from reprobe.errors import ArtifactExists, UsageError

FIGURES = (".svg", ".png", ".pdf")


def new_file(path: Path | None, overwrite: bool) -> None:
    """Raises `ArtifactExists` for what is there, a folder also with `overwrite`."""
    if path is None:
        return
    if path.is_dir():
        raise ArtifactExists(f"{path} is a folder; name a file in it")
    if path.exists() and not overwrite:
        raise ArtifactExists(f"{path} exists; choose another name or pass --overwrite")
    _require_room_at(path)


def new_folder(path: Path | None, overwrite: bool | None = None) -> None:
    """Raises `ArtifactExists` for what is there, but for a folder with `overwrite` (of verbs that can)."""
    if path is not None and path.exists() and not overwrite:
        raise ArtifactExists(
            f"{path} exists; choose another name" + ("" if overwrite is None else " or pass --overwrite")
        )
    results_folder(path)


def results_folder(path: Path | None) -> None:
    """A folder that may exist."""
    if path is None:
        return
    if path.exists() and not path.is_dir():
        raise ArtifactExists(f"{path} is a file; name a folder")
    _require_room_at(path, inside=True)


def new_table(path: Path | None, overwrite: bool) -> None:
    """Raises `UsageError` for a suffix that no table has."""
    if path is not None:
        from reprobe.probing import require_new_table

        require_new_table(path, overwrite=True)  # the suffix; what is there is said below, as of any file
        new_file(path, overwrite)


def new_figure(path: Path | None, overwrite: bool) -> None:
    """Raises `UsageError` for a suffix that no figure has."""
    if path is None:
        return
    new_file(path, overwrite)
    if path.suffix not in FIGURES:
        raise UsageError(f"{path}: a figure is saved as {', '.join(FIGURES[:-1])} or {FIGURES[-1]}")


def new_report(path: Path | None) -> None:
    """A report replaces an older one, and nothing else."""
    if path is not None:
        from reprobe.report.page import writable

        _require_room_at(writable(path))


def new_store(to: str | Path, *, resume: bool, overwrite: bool) -> None:
    """A folder or s3://BUCKET/PREFIX, where there is nothing or a store that may be gone on with or replaced."""
    if resume and overwrite:
        raise UsageError(
            "--resume and --overwrite exclude each other: the one keeps what is there, the other removes it"
        )
    from reprobe.store.claim import require_ours
    from reprobe.store.places import place_of

    place = place_of(to)
    if isinstance(place.path, Path):
        _require_room_at(place.path)
    if place.exists() or (isinstance(place.path, Path) and place.path.exists()):
        require_ours(place, may_exist=resume or overwrite)


def _require_room_at(path: Path, inside: bool = False) -> None:
    """Something can be made there (`inside` it): the nearest of its folders that exists is one, and may be written."""
    whole = path.absolute()
    there = next(place for place in ((whole, *whole.parents) if inside else whole.parents) if place.exists())
    if not there.is_dir():
        raise ArtifactExists(f"{path} cannot be made: {there} is a file, not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UsageError(f"{path} cannot be made: you may not write in {there}")
