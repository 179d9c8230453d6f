"""Commit records: which shards are there, whole.

Enters: a shard and the checksums of its files. Leaves: `commits/00003.json`, written after everything it
vouches for; a shard without a record does not exist, whatever files lie there. Does not write or read the
shards, and does not know their format.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from reprobe.errors import CorruptArtifact
from reprobe.store.formats import shard_files
from reprobe.store.layout import COMMITS, Shard, commit_name, shard_of
from reprobe.store.manifest import Manifest
from reprobe.store.places import Place
from reprobe.store.sealed import seal, unseal


@dataclass(frozen=True)
class FileRecord:
    """sha256 (hex) and length in bytes of a file."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class Commit:
    """A shard that is there whole: its rows, and one `FileRecord` per file of it, by relative path."""

    shard: Shard
    files: Mapping[str, FileRecord]

    def write(self, place: Place, manifest: Manifest) -> None:
        """Write the record durably. It names the manifest, so that it counts in no other store.

        Raises `FileExistsError` if the shard has a record already: whoever wrote it was first.
        """
        files = {name: {"sha256": f.sha256, "bytes": f.bytes} for name, f in self.files.items()}
        place.write_new(commit_name(self.shard.number), seal(_head(self.shard, manifest) | {"files": files}))

    @classmethod
    def read(cls, place: Place, manifest: Manifest, number: int) -> "Commit":
        """The record of shard `number`; raises `CorruptArtifact` unless it is one of this very store."""
        shard = manifest.grid.shard(number)
        what = place.at(commit_name(number))
        try:
            body = unseal(place.read(commit_name(number)), what)
        except FileNotFoundError as error:
            raise CorruptArtifact(f"{what} has gone: shard {number} can no longer be trusted") from error
        try:
            files = {name: FileRecord(**record) for name, record in body["files"].items()}
        except (KeyError, TypeError, AttributeError) as error:
            raise CorruptArtifact(f"{what} is not a commit record: {error}") from error
        head = {k: v for k, v in body.items() if k != "files"}
        if head != _head(shard, manifest) or set(files) != set(shard_files(manifest, number)):
            raise CorruptArtifact(f"{what} is the commit record of another store or another shard")
        return cls(shard, files)


def _head(shard: Shard, manifest: Manifest) -> dict[str, Any]:
    return {"shard": shard.number, "start": shard.start, "stop": shard.stop, "manifest": manifest.digest}


def committed(place: Place, manifest: Manifest) -> frozenset[int]:
    """Numbers of the shards that have a commit record (its content is read, and checked, with the shard)."""
    # By the records that are there: a manifest may claim more shards than anybody could count.
    numbers = {name: shard_of(name) for name in place.names(COMMITS)}
    n = manifest.grid.n_shards
    return frozenset(k for name, k in numbers.items() if k is not None and k < n and commit_name(k) == name)
