"""Verifying a store: is every byte as it was written, and is nothing missing?

Enters: the path of a store. Leaves: a `VerifyReport` that lists every problem. Damaged content is reported,
never raised. Does not know models: whether the activations are those of a model is another question.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from reprobe.errors import ArtifactMissing, CorruptArtifact
from reprobe.provenance import digest_file
from reprobe.store.commit import Commit, FileRecord, committed
from reprobe.store.folder import survey
from reprobe.store.layout import ARRAYS, COMMITS, MANIFEST, array_name, commit_name
from reprobe.store.manifest import Manifest, read_manifest
from reprobe.store.zarr_backend import shard_file


@dataclass(frozen=True)
class VerifyReport:
    """What `verify` found: one sentence per problem, and how many files were checked."""

    path: Path
    problems: tuple[str, ...]
    files: int

    @property
    def ok(self) -> bool:
        """Whether the store is complete and every byte of it is as it was written."""
        return not self.problems


def verify(path: str | Path) -> VerifyReport:
    """Recompute every checksum of the store at `path`, and look for missing, unfinished and unexpected files.

    A store that is not complete has problems too: a commit record that was lost looks the same. Raises
    `ArtifactMissing` if there is no folder at all; anything in the folder, however damaged, is reported.
    """
    path = Path(path)
    if not path.is_dir():
        raise ArtifactMissing(f"there is no store at {path}")
    try:
        manifest = read_manifest(path)
    except (ArtifactMissing, CorruptArtifact, OSError) as error:
        return VerifyReport(path, (str(error),), 1)
    problems = [*_fixed_files(path, manifest), *_shards(path, manifest), *_strangers(path, manifest)]
    return VerifyReport(path, tuple(problems), len(survey(path).files))


def _fixed_files(path: Path, manifest: Manifest) -> Iterator[str]:
    for name, sha256 in manifest.files.items():
        yield from _compare(path / name, sha256)


def _shards(path: Path, manifest: Manifest) -> Iterator[str]:
    there = committed(path, manifest)
    if absent := [s.number for s in manifest.grid.shards if s.number not in there]:
        yield (
            f"{len(absent)} of {manifest.grid.n_shards} shards have no commit record (the first is "
            f"{absent[0]}): finish the store with reprobe extract … --resume"
        )
    for number in sorted(there):
        try:
            commit = Commit.read(path, manifest, number)
        except (CorruptArtifact, OSError) as error:
            yield str(error)
            continue
        for stored in manifest.sites:
            yield from _compare(path / shard_file(stored.site, number), commit.files[str(stored.site)])


def _strangers(path: Path, manifest: Manifest) -> Iterator[str]:
    found = survey(path)
    shards = range(manifest.grid.n_shards)
    expected = {MANIFEST, *manifest.files}
    expected |= {commit_name(k) for k in shards}
    expected |= {shard_file(s.site, k) for s in manifest.sites for k in shards}
    folders = {COMMITS, ARRAYS, *(f"{ARRAYS}/{array_name(s.site)}" for s in manifest.sites)}
    for name in (*found.foreign, *(set(found.files) - expected), *(set(found.folders) - folders)):
        yield f"{path / name} is not part of the store"
    for name in found.temporary:
        yield f"{path / name} was left by an interrupted write; resuming removes it"


def _compare(path: Path, want: "str | FileRecord") -> Iterator[str]:
    sha256 = want if isinstance(want, str) else want.sha256
    try:
        size = path.stat().st_size
        if isinstance(want, FileRecord) and size != want.bytes:
            yield f"{path} has {size} bytes, not the {want.bytes} that were written"
        elif digest_file(path) != sha256:
            yield f"{path} is not as it was written: its checksum is wrong"
    except FileNotFoundError:
        yield f"{path} is missing"
    except OSError as error:
        yield f"{path} cannot be read: {error}"
