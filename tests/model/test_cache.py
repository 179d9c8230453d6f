"""What is built in the cache appears whole or not at all."""

from pathlib import Path

import pytest

from reprobe.errors import DiskFull, FetchFailed
from reprobe.model import cache


def test_the_cache_is_where_the_environment_says_or_the_platform(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REPROBE_CACHE", str(tmp_path / "here"))
    assert cache.cache_folder() == tmp_path / "here"
    monkeypatch.setenv("REPROBE_CACHE", "~/there")
    assert cache.cache_folder() == Path.home() / "there"
    monkeypatch.delenv("REPROBE_CACHE")
    assert cache.cache_folder().name == "reprobe"


def test_a_target_that_exists_is_not_made_again(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "thing"
    cache.build(target, lambda scratch: (scratch / "thing").write_text("1") and None, whole=Path.exists)
    cache.build(target, lambda scratch: pytest.fail("made twice"), whole=Path.exists)
    assert target.read_text() == "1"


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt(), SystemExit(3)])
def test_whatever_goes_wrong_passes_through_and_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    def make(scratch: Path) -> None:
        (scratch / "thing").mkdir()
        (scratch / "thing" / "half").write_text("x")
        raise error

    with pytest.raises(type(error)):
        cache.build(tmp_path / "thing", make, whole=Path.exists)
    assert [p.name for p in tmp_path.iterdir()] == [".thing.lock"]


def test_a_damaged_folder_is_replaced_whole(tmp_path: Path) -> None:
    target = tmp_path / "thing"
    target.mkdir()
    (target / "old").write_text("old")

    def make(scratch: Path) -> None:
        (scratch / "thing").mkdir()
        (scratch / "thing" / "new").mkdir()
        (scratch / "thing" / "new" / "file").write_text("new")

    cache.build(target, make, whole=lambda p: (p / "new").exists())
    assert [p.name for p in target.rglob("*")] == ["new", "file"]


def test_a_full_disk_says_how_to_use_another(tmp_path: Path) -> None:
    def make(scratch: Path) -> None:
        with open("/dev/full", "w") as f:
            f.write("x")

    with pytest.raises(DiskFull, match="REPROBE_CACHE"):
        cache.build(tmp_path / "thing", make, whole=Path.exists)
    with pytest.raises(DiskFull, match="MB are needed"):
        cache.require_room(tmp_path, 1 << 60)


def test_a_cache_that_cannot_be_written_says_how_to_use_another(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(FetchFailed, match="REPROBE_CACHE"):
        cache.build(tmp_path / "file" / "thing", lambda scratch: None, whole=Path.exists)
