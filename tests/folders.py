"""Folders that tests write to, and what lies in them."""

import os
import tempfile
from pathlib import Path

_MEMORY = Path("/dev/shm")


def scratch() -> tempfile.TemporaryDirectory[str]:
    """A temporary folder, in memory, where fsync costs nothing, if that can be had."""
    usable = _MEMORY.is_dir() and os.access(_MEMORY, os.W_OK)
    return tempfile.TemporaryDirectory(prefix="reprobe-", dir=_MEMORY if usable else None)


def tree(root: Path) -> dict[str, bytes]:
    """Every file below `root`, hidden ones too, by relative path."""
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*")) if not p.is_dir()}
