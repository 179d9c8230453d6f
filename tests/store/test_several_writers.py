"""Several writers of one store: each writes its own shards, and the bytes are those of a single one."""

import fcntl
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from folders import tree
from store import synthetic

from reprobe.errors import ArtifactExists, IdentityMismatch, StoreLocked, UsageError
from reprobe.store import ActivationStore, StoreWriter, locks, verify

KILLED = -signal.SIGKILL
FORMS = pytest.mark.parametrize("form", synthetic.FORMATS)


def _whole(folder: Path, form: str = "zarr", **changes: Any) -> dict[str, bytes]:
    synthetic.fill(synthetic.create(folder / "whole.reprobe", format=form, **changes))
    return tree(folder / "whole.reprobe")


def _order(path: Path, form: str, own: tuple[int, int], **more: Any) -> dict[str, Any]:
    return {"path": str(path), "changes": {"format": form}, "own": own, **more}


@FORMS
def test_four_processes_that_start_at_once_write_the_bytes_of_one(server: Any, folder: Path, form: str) -> None:
    whole = _whole(folder, form)
    for trial in range(2):
        path = folder / f"{trial}.reprobe"
        server.order_all([_order(path, form, (k, k + 1)) for k in range(4)])
        assert server.finish_all() == [0, 0, 0, 0]
        assert tree(path) == whole


@FORMS
def test_one_of_four_processes_is_killed_and_resumed_at_the_cost_of_one_shard(
    server: Any, folder: Path, form: str
) -> None:
    whole, rng = _whole(folder, form, rows=80), random.Random(0)  # 14 shards
    owned = [(0, 4), (4, 8), (8, 11), (11, 14)]
    kills = 0
    for trial in range(3):
        path = folder / f"{trial}.reprobe"
        logs = [str(folder / f"{trial}.{k}.log") for k in range(4)]
        changes = {"format": form, "rows": 80}
        orders = [_order(path, form, own, log=log) | {"changes": changes} for own, log in zip(owned, logs, strict=True)]
        victim = rng.randrange(4)
        orders[victim]["operation"] = rng.randrange(10, 50)
        server.order_all(orders)
        statuses = server.finish_all()
        assert [s for k, s in enumerate(statuses) if k != victim] == [0, 0, 0]
        died = statuses[victim] == KILLED
        assert died or statuses[victim] == 0
        del orders[victim]["operation"]
        server.order_all([orders[victim]])
        assert server.finish() == 0
        assert tree(path) == whole
        computed = [Path(log).read_text().split() for log in logs]
        assert [len(c) for k, c in enumerate(computed) if k != victim] == [
            b - a for k, (a, b) in enumerate(owned) if k != victim
        ]
        assert len(computed[victim]) <= owned[victim][1] - owned[victim][0] + died
        kills += died
    assert kills >= 2


@FORMS
def test_all_of_several_writers_may_be_killed_at_any_operation_again_and_again(
    server: Any, folder: Path, form: str
) -> None:
    whole, path, rng = _whole(folder, form), folder / "s.reprobe", random.Random(1)
    for _ in range(4):
        server.order_all([_order(path, form, own, operation=rng.randrange(60)) for own in ((0, 2), (2, 4))])
        assert set(server.finish_all()) <= {0, KILLED}
    server.order_all([_order(path, form, own) for own in ((0, 2), (2, 4))])
    assert server.finish_all() == [0, 0]
    synthetic.fill(synthetic.create(path, format=form, resume=True))  # alone, it clears what all have left
    assert tree(path) == whole


def test_a_writer_speaks_of_its_own_shards_only(folder: Path) -> None:
    with synthetic.create(folder / "s", own=range(1, 3)) as writer:
        assert [s.number for s in writer.missing()] == [1, 2]
        with pytest.raises(UsageError, match=r"shard 0 of .* is another writer's: this one has shards 1–2"):
            writer.write_shard(0, synthetic.shard_values(writer, writer.shards[0]))
        for shard in writer.missing():
            writer.write_shard(shard.number, synthetic.shard_values(writer, shard))
        assert writer.complete
    store = ActivationStore.open(folder / "s")
    assert not store.complete
    assert store.committed == {1, 2}


def test_a_rank_without_shards_is_complete_at_once_and_hinders_nobody(folder: Path) -> None:
    with (
        synthetic.create(folder / "s", own=range(2, 2)) as idle,
        synthetic.create(folder / "s", own=range(4)) as other,
    ):
        assert idle.complete
        assert len(other.missing()) == 4


def test_writers_of_the_same_shard_are_refused_when_they_come(folder: Path) -> None:
    with synthetic.create(folder / "s", own=range(2)) as first:
        for own in (range(2), range(1, 3), range(4)):
            with pytest.raises(StoreLocked, match="another process is writing some of its shards"):
                synthetic.create(folder / "s", own=own)
        for flag in ("resume", "overwrite"):
            with pytest.raises(StoreLocked):
                synthetic.create(folder / "s", **{flag: True})
        first.write_shard(0, synthetic.shard_values(first, first.shards[0]))
        with synthetic.create(folder / "s", own=range(2, 4)) as second:
            assert len(second.missing()) == 2
    synthetic.fill(synthetic.create(folder / "s", own=range(1, 3)))  # both have left
    assert ActivationStore.open(folder / "s").committed == {0, 1, 2}
    assert ".lock" not in tree(folder / "s")


def test_two_processes_with_the_same_shards_do_not_both_write(server: Any, folder: Path) -> None:
    with synthetic.create(folder / "s.reprobe", own=range(1, 2)):
        server.order_all([_order(folder / "s.reprobe", "zarr", (0, 2))])
        assert server.finish() == 1
    server.order_all([_order(folder / "s.reprobe", "zarr", (0, 2))])
    assert server.finish() == 0


def test_a_shard_committed_by_someone_else_in_the_meantime_is_seen(folder: Path) -> None:
    with synthetic.create(folder / "s", own=range(2)) as writer:
        record = folder / "s" / "commits" / "00000.json"
        writer.write_shard(0, synthetic.shard_values(writer, writer.shards[0]))
        late = StoreWriter(writer._place, writer.manifest, writer._encoder, writer._claim, range(2))
        late._written.clear()  # as if the file system had no locks, and it had looked before
        before = record.stat().st_mtime_ns
        with pytest.raises(StoreLocked, match="committed by another writer in the meantime"):
            late.write_shard(0, synthetic.shard_values(writer, writer.shards[0]))
        assert record.stat().st_mtime_ns == before
        assert [s.number for s in late.missing()] == [1]


def test_joining_a_store_of_another_configuration_names_the_difference(folder: Path) -> None:
    with synthetic.create(folder / "s", own=range(2)) as first:
        with pytest.raises(IdentityMismatch, match=r"plan\.budget"):
            synthetic.create(folder / "s", own=range(2, 4), plan={"positions": "last", "budget": 1})
        first.write_shard(0, synthetic.shard_values(first, first.shards[0]))


def test_one_of_several_writers_does_not_overwrite(folder: Path) -> None:
    synthetic.fill(synthetic.create(folder / "s"))
    before = tree(folder / "s")
    with pytest.raises(UsageError, match="remove what the others have just written"):
        synthetic.create(folder / "s", own=range(2), overwrite=True)
    assert tree(folder / "s") == before


@pytest.mark.parametrize("own", [range(0, 4, 2), range(3, 6), range(-1, 2), [0, 1]], ids=str)
def test_shards_that_cannot_be_owned_are_refused(folder: Path, own: Any) -> None:
    with pytest.raises(UsageError, match="neighbouring shards of 0–3"):
        synthetic.create(folder / "s", own=own)
    assert not list(folder.iterdir())


def test_joining_what_is_not_a_store_is_refused_and_touches_nothing(folder: Path) -> None:
    (folder / "s").mkdir()
    (folder / "s" / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactExists):
        synthetic.create(folder / "s", own=range(2))
    assert list(tree(folder)) == ["s/notes.txt"]


def test_leftovers_of_a_killed_writer_are_removed_by_its_successor_and_those_of_the_living_are_not(
    folder: Path,
) -> None:
    with synthetic.create(folder / "s", own=range(2)):
        living, left = (folder / "s" / "commits" / f".{k:05d}.json.0a1b2c3d.tmp" for k in (1, 2))
        for path in (living, left):
            path.write_text("half")
        with synthetic.create(folder / "s", own=range(2, 4)):
            assert living.exists()
            assert not left.exists()
    with synthetic.create(folder / "s", own=range(2)):
        assert not living.exists()


def test_who_comes_while_the_store_is_being_begun_waits_and_joins(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writers of a job start together: all but the first find a folder without a manifest."""
    sync, begun = os.fsync, threading.Event()

    def slow(fd: int) -> None:
        begun.set()
        time.sleep(0.02)
        sync(fd)

    joined: list[bool] = []

    def join() -> None:
        begun.wait()
        with synthetic.create(folder / "s", own=range(2, 4)) as second:
            joined.append((folder / "s" / "manifest.json").exists())
            for shard in second.missing():
                second.write_shard(shard.number, synthetic.shard_values(second, shard))

    thread = threading.Thread(target=join)
    thread.start()
    monkeypatch.setattr(os, "fsync", slow)
    synthetic.fill(synthetic.create(folder / "s", own=range(2)))
    thread.join()
    assert joined == [True]
    assert verify(folder / "s").ok


def test_who_waits_for_a_beginning_that_fails_begins_the_store_itself(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = folder / "s"
    root.mkdir()
    lock = locks.Lock(root, join=True)
    assert lock.alone
    writers: list[StoreWriter] = []
    thread = threading.Thread(target=lambda: writers.append(synthetic.create(root, own=range(4))))
    thread.start()
    time.sleep(0.1)
    assert not writers
    lock.release()
    with suppress(OSError):  # the other writer may have begun already
        root.rmdir()
    thread.join()
    synthetic.fill(writers[0])
    assert verify(root).ok


def _in_process(fd: int, start: int) -> bool:
    """Whether another process could lock a byte."""
    pid = os.fork()
    if pid == 0:
        try:
            other = os.open(f"/proc/{os.getppid()}/fd/{fd}", os.O_RDWR)
            fcntl.lockf(other, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, start)
            os._exit(0)
        except OSError:
            os._exit(1)
    return os.waitpid(pid, 0)[1] == 0


def test_where_locks_of_open_files_do_not_exist_those_of_processes_serve(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks.sys, "platform", "darwin")
    with synthetic.create(folder / "s", own=range(1, 3)) as writer:
        lock = writer._claim._lock
        assert lock is not None
        assert lock._fd is not None
        assert [_in_process(lock._fd, byte) for byte in range(5)] == [False, True, False, False, True]
    assert ".lock" not in tree(folder / "s")


def test_the_last_to_leave_removes_the_lock_whoever_it_is(folder: Path) -> None:
    for order in ((0, 1, 2), (2, 1, 0), (1, 0, 2)):
        writers = [synthetic.create(folder / "s", own=range(k, k + 1)) for k in range(3)]
        for k in order:
            assert (folder / "s" / ".lock").exists()
            writers[k].close()
        assert not (folder / "s" / ".lock").exists()


def test_writers_that_leave_at_the_same_moment_leave_no_lock(folder: Path) -> None:
    for _ in range(5):
        writers = [synthetic.create(folder / "s", own=range(k, k + 1)) for k in range(4)]
        gate = threading.Barrier(4)

        def leave(writer: StoreWriter, gate: threading.Barrier = gate) -> None:
            gate.wait()
            writer.close()

        threads = [threading.Thread(target=leave, args=(w,)) for w in writers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not (folder / "s" / ".lock").exists()


def test_many_shards_do_not_make_a_writer_slow(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each shard takes as many calls of the file system as any other, however many there are."""
    calls: list[str] = []

    def counted(name: str) -> Callable[..., Any]:
        original = getattr(os, name)

        def count(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return original(*args, **kwargs)

        return count

    per_shard = []
    for rows in (60, 600):
        with synthetic.create(folder / str(rows), rows=rows, shard_rows=6) as writer:
            missing = writer.missing()
            with monkeypatch.context() as patch:
                for name in ("stat", "open", "scandir", "listdir", "fsync"):
                    patch.setattr(os, name, counted(name))
                calls.clear()
                for shard in missing[:5]:
                    writer.write_shard(shard.number, synthetic.shard_values(writer, shard))
                per_shard.append(len(calls))
    assert per_shard[0] == per_shard[1]


@FORMS
def test_a_writer_lends_itself_to_other_shards_and_writes_the_same_bytes(folder: Path, form: str) -> None:
    whole = _whole(folder, form)
    with synthetic.create(folder / "s", format=form, own=range(0)) as joined:
        assert joined.complete
    with joined.of(range(1, 3)) as first:
        assert [s.number for s in first.missing()] == [1, 2]
        with pytest.raises(StoreLocked, match="another process"):
            joined.of(range(2, 4))
        first.write_shard(1, synthetic.shard_values(first, first.shards[1]))
        with pytest.raises(UsageError, match="another writer's"):
            first.write_shard(0, synthetic.shard_values(first, first.shards[0]))
    with joined.of(range(4)) as rest:
        assert [s.number for s in rest.missing()] == [0, 2, 3]
    synthetic.fill(joined.of(range(4)))
    assert tree(folder / "s") == whole
