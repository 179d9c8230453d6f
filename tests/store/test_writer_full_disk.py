"""A full disk is a clear error, and what was committed is kept."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
from folders import tree
from store import synthetic

from reprobe.errors import ArtifactMissing, DiskFull
from reprobe.store import ActivationStore


def _full_after(monkeypatch: pytest.MonkeyPatch, calls: int) -> None:
    """From its `calls`-th call on, fsync finds the disk full: where delayed allocation reports it."""
    original, left = os.fsync, iter(range(calls))

    def fsync(fd: int) -> None:
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(fd)

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize(("form", "pages"), [("zarr", 20), ("hdf5", 9)])  # of about 22 and 14 that are needed
def test_a_store_on_a_disk_that_is_really_full_keeps_its_shards_and_resumes_once_there_is_room(
    server: Any, folder: Path, form: str, pages: int
) -> None:
    (folder / "disk").mkdir()
    changes = {"plan": {}, "format": form}
    server.order(small_disk=str(folder / "disk"), pages=pages, changes=changes, result=str(folder / "result.json"))
    assert server.finish() == 0
    result = json.loads((folder / "result.json").read_text())
    if "skipped" in result:
        pytest.skip(result["skipped"])
    assert "no room left on the device" in result["message"]
    assert "--resume" in result["message"]
    committed = [name for name in result["before"] if name.startswith("commits/")]
    assert 0 < len(committed) < 4
    assert result["missing"] == 4 - len(committed)
    assert not [name for name in result["before"] if name.endswith(".tmp")]
    synthetic.fill(synthetic.create(folder / "whole.reprobe", **changes))
    assert {k: bytes.fromhex(v) for k, v in result["after"].items()} == tree(folder / "whole.reprobe")


@pytest.mark.parametrize(("form", "calls"), [("zarr", 3), ("hdf5", 0), ("hdf5", 2)])
def test_a_shard_for_which_there_is_no_room_leaves_the_shards_before_it_readable(
    folder: Path, monkeypatch: pytest.MonkeyPatch, form: str, calls: int
) -> None:
    path = folder / "s.reprobe"
    with synthetic.create(path, format=form) as writer:
        first, second, *_ = writer.shards
        writer.write_shard(first.number, synthetic.shard_values(writer, first))
        with monkeypatch.context() as patch:
            _full_after(patch, calls)
            with pytest.raises(DiskFull, match=r"1 of 4 shards are committed and kept.*--resume"):
                writer.write_shard(second.number, synthetic.shard_values(writer, second))
        assert not list(path.rglob("*.tmp"))
        assert ActivationStore.open(path).read("final", slice(0, 6)).shape == (6, 35)
        writer.write_shard(second.number, synthetic.shard_values(writer, second))  # there is room again
    synthetic.fill(synthetic.create(path, format=form, resume=True))
    synthetic.fill(synthetic.create(folder / "whole.reprobe", format=form))
    assert tree(path) == tree(folder / "whole.reprobe")


@pytest.mark.parametrize("calls", range(0, 11, 2))
def test_a_store_that_cannot_even_be_begun_leaves_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    _full_after(monkeypatch, calls)
    with pytest.raises(DiskFull, match="could not be begun"):
        synthetic.create(folder / "s.reprobe")
    assert not list(folder.iterdir())
    with pytest.raises(ArtifactMissing):
        ActivationStore.open(folder / "s.reprobe")


def test_another_failure_of_the_disk_is_not_called_a_full_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with synthetic.create(folder / "s.reprobe") as writer:
        monkeypatch.setattr(os, "fsync", fsync)
        with pytest.raises(OSError, match="Input/output") as caught:
            writer.write_shard(0, synthetic.shard_values(writer, writer.shards[0]))
    assert not isinstance(caught.value, DiskFull)
