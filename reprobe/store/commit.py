"""Commit records: which shards are on disk, whole.

Enters: a shard and the checksums of its files. Leaves: `commits/00003.json`, written after everything it
vouches for; a shard without a record does not exist, whatever files lie there. Does not write or read the
shards.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reprobe.errors import CorruptArtifact
from reprobe.provenance import write_durably
from reprobe.store.layout import COMMITS, Shard, commit_name
from reprobe.store.manifest import Manifest
from reprobe.store.sealed import seal, unseal


@dataclass(frozen=True)
class FileRecord:
    """sha256 (hex) and length in bytes of a site's shard file."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class Commit:
    """A shard that is on disk whole: its rows, and one `FileRecord` per site (in text form)."""

    shard: Shard
    files: Mapping[str, FileRecord]

    def write(self, folder: Path, manifest: Manifest) -> None:
        """Write the record durably. It names the manifest, so that it counts in no other store."""
        body = _head(self.shard, manifest) | {
            "sites": {name: {"sha256": f.sha256, "bytes": f.bytes} for name, f in self.files.items()}
        }
        write_durably(folder / commit_name(self.shard.number), seal(body))

    @classmethod
    def read(cls, folder: Path, manifest: Manifest, number: int) -> "Commit":
        """The record of shard `number`; raises `CorruptArtifact` unless it is one of this very store."""
        shard = manifest.grid.shard(number)
        path = folder / commit_name(number)
        try:
            body = unseal(path.read_bytes(), str(path))
        except FileNotFoundError as error:
            raise CorruptArtifact(f"{path} has gone: shard {number} can no longer be trusted") from error
        head = _head(shard, manifest)
        sites = {str(s.site) for s in manifest.sites}
        try:
            files = {name: FileRecord(**record) for name, record in body["sites"].items()}
        except (KeyError, TypeError, AttributeError) as error:
            raise CorruptArtifact(f"{path} is not a commit record: {error}") from error
        if {k: v for k, v in body.items() if k != "sites"} != head or set(files) != sites:
            raise CorruptArtifact(f"{path} is the commit record of another store or another shard")
        return cls(shard, files)


def _head(shard: Shard, manifest: Manifest) -> dict[str, Any]:
    return {"shard": shard.number, "start": shard.start, "stop": shard.stop, "manifest": manifest.digest}


def committed(folder: Path, manifest: Manifest) -> frozenset[int]:
    """Numbers of the shards that have a commit record (its content is read, and checked, with the shard)."""
    names = {p.name for p in (folder / COMMITS).glob("*.json")}
    return frozenset(s.number for s in manifest.grid.shards if Path(commit_name(s.number)).name in names)
