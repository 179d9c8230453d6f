"""A model on disk as stock transformers opens it, whole or not at all.

Enters: a language model, the name of a new folder. Leaves: the folder, with weights, config and tokenizer. Does not
know what was done to the model.
"""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from reprobe.errors import ArtifactExists, DiskFull, ReprobeError, UsageError
from reprobe.model.language_model import LanguageModel, quiet_transformers
from reprobe.provenance import NO_ROOM, sync_folder


def put_model(lm: LanguageModel, folder: Path) -> None:
    """Write the model as it is now, and its tokenizer, into a folder."""
    with quiet_transformers():
        lm.net.save_pretrained(folder)
        lm.tokenizer.save_pretrained(folder)


@contextlib.contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """An empty folder to fill, which takes its place at `target` when the context is left without an error."""
    refuse_existing(target)
    with _explained(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        try:
            yield scratch
            for file in sorted(p for p in scratch.rglob("*") if p.is_file()):
                with file.open("rb") as f:
                    os.fsync(f.fileno())
            os.chmod(scratch, 0o755)
            scratch.rename(target)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        sync_folder(target.parent)


@contextlib.contextmanager
def _explained(target: Path) -> Iterator[None]:
    """Turn what the system says while `target` is being written into `DiskFull` or `UsageError`."""
    try:
        yield
    except OSError as e:
        if isinstance(e, ReprobeError):
            raise
        said = f"{target} could not be written: {e}; nothing was left behind"
        raise (DiskFull(said) if e.errno in NO_ROOM else UsageError(said)) from e


def refuse_existing(target: Path) -> None:
    """Raise `ArtifactExists` if something is at `target`."""
    if target.exists():
        raise ArtifactExists(f"{target} exists; name a folder that does not")
