"""Verifying a store: is every byte as it was written, and is nothing missing?

Enters: the path or URL of a store. Leaves: a `VerifyReport` that lists every problem. Damaged content is reported,
never raised. Does not know models: whether the activations are those of a model is another question.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from reprobe.errors import ArtifactMissing, CorruptArtifact, SchemaMismatch
from reprobe.store.commit import Commit, FileRecord, committed
from reprobe.store.formats import shard_files
from reprobe.store.layout import MANIFEST, commit_name, shard_of
from reprobe.store.manifest import Manifest, read_manifest
from reprobe.store.places import Place, Survey, place_of


@dataclass(frozen=True)
class VerifyReport:
    """What `verify` found: one sentence per problem, and how many files were checked."""

    path: Path | str
    problems: tuple[str, ...]
    files: int

    @property
    def ok(self) -> bool:
        """Whether the store is complete and every byte of it is as it was written."""
        return not self.problems


def verify(path: str | Path) -> VerifyReport:
    """Recompute every checksum of the store at `path`, and look for missing, unfinished and unexpected files.

    A store that is not complete has problems too: a commit record that was lost looks the same. Raises
    `ArtifactMissing` if there is nothing at all; anything that is there, however damaged, is reported.
    """
    place = place_of(path)
    if not place.exists():
        raise ArtifactMissing(f"there is no store at {place}")
    try:
        manifest = read_manifest(place)
    except (ArtifactMissing, CorruptArtifact, SchemaMismatch, OSError) as error:
        return VerifyReport(place.path, (str(error),), 1)
    found = place.survey()
    problems = [*_fixed_files(place, manifest), *_shards(place, manifest), *_strangers(place, manifest, found)]
    return VerifyReport(place.path, tuple(problems), len(found.files))


def _fixed_files(place: Place, manifest: Manifest) -> Iterator[str]:
    for name, sha256 in manifest.files.items():
        yield from _compare(place, name, sha256)


def _shards(place: Place, manifest: Manifest) -> Iterator[str]:
    there = committed(place, manifest)
    if absent := [k for k in range(manifest.grid.n_shards) if k not in there]:
        yield (
            f"{len(absent)} of {manifest.grid.n_shards} shards have no commit record (the first is "
            f"{absent[0]}): finish the store with reprobe extract … --resume"
        )
    for number in sorted(there):
        try:
            commit = Commit.read(place, manifest, number)
        except (CorruptArtifact, OSError) as error:
            yield str(error)
            continue
        for name, record in commit.files.items():
            yield from _compare(place, name, record)


def _strangers(place: Place, manifest: Manifest, found: Survey) -> Iterator[str]:
    expected = {MANIFEST, *manifest.files}
    for number in {0} | {k for name in found.files if (k := shard_of(name)) is not None}:
        if number < manifest.grid.n_shards:
            expected |= {commit_name(number), *shard_files(manifest, number)}
    folders = {str(parent) for name in expected for parent in Path(name).parents}
    for name in (*found.foreign, *(set(found.files) - expected), *(set(found.folders) - folders)):
        yield f"{place.at(name)} is not part of the store"
    for name in found.temporary:
        yield f"{place.at(name)} was left by an interrupted write; resuming removes it"


def _compare(place: Place, name: str, want: "str | FileRecord") -> Iterator[str]:
    sha256 = want if isinstance(want, str) else want.sha256
    try:
        size = place.size(name)
        if size is None:
            yield f"{place.at(name)} is missing"
        elif isinstance(want, FileRecord) and size != want.bytes:
            yield f"{place.at(name)} has {size} bytes, not the {want.bytes} that were written"
        elif place.digest(name) != sha256:
            yield f"{place.at(name)} is not as it was written: its checksum is wrong"
    except OSError as error:
        yield f"{place.at(name)} cannot be read: {error}"
