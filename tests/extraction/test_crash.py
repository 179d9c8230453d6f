"""Extraction survives `kill -9` at any point, and its memory does not grow with the number of prompts."""

import os
import signal
import time
from pathlib import Path

import extracting
import numpy as np
import pytest
from folders import tree

import reprobe as rp

N, SHARD_ROWS = 60, 40


def committed(store: Path) -> int:
    """How many shards are there for good."""
    return len(list((store / "commits").glob("*.json")))


@pytest.mark.parametrize("n_kills", [8, pytest.param(200, marks=pytest.mark.slow)])
def test_kills_and_as_many_resumes_leave_the_bytes_of_an_undisturbed_run(server, tmp_path, n_kills):
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    first = server.Process(target=extracting.run, args=(whole, N, SHARD_ROWS, False))
    first.start()
    first.join()
    assert first.exitcode == 0
    start = time.perf_counter()
    again = server.Process(target=extracting.run, args=(tmp_path / "timed", N, SHARD_ROWS, False))
    again.start()
    again.join()
    length = time.perf_counter() - start

    rng = np.random.default_rng(0)
    kills = 0
    progress = []
    while kills < n_kills:
        child = server.Process(target=extracting.run, args=(torn, N, SHARD_ROWS, torn.exists()))
        child.start()
        # Points over the whole run, start-up included; a child that finishes first begins the store anew.
        wait = length
        if kills % 2:  # every second one soon after a shard: on a busy machine no clock says when one is written
            before = committed(torn)
            while child.exitcode is None and committed(torn) == before:
                time.sleep(0.001)
            wait = length / committed(whole)
        child.join(timeout=float(rng.uniform(0, wait)))
        if child.exitcode is None:
            os.kill(child.pid, signal.SIGKILL)
            child.join()
            # 0: it was done before the signal came. Anything else would be a crash of its own.
            assert child.exitcode in (0, -signal.SIGKILL)
            kills += child.exitcode != 0
        else:
            assert child.exitcode == 0
        progress.append(committed(torn))
        if child.exitcode == 0:
            assert tree(torn) == tree(whole)
            for p in sorted(torn.rglob("*"), reverse=True):
                p.rmdir() if p.is_dir() else p.unlink()
            torn.rmdir()
    assert any(0 < n < max(progress) for n in progress), "every kill fell before the first shard or after the last"
    last = server.Process(target=extracting.run, args=(torn, N, SHARD_ROWS, torn.exists()))
    last.start()
    last.join()
    assert last.exitcode == 0
    assert tree(torn) == tree(whole)
    assert rp.ActivationStore.open(torn).verify().ok


def test_what_a_kill_left_is_kept_and_not_computed_again(server, tmp_path):
    path = tmp_path / "s"
    child = server.Process(target=extracting.run, args=(path, N, SHARD_ROWS, False))
    child.start()
    while len(list((path / "commits").glob("0*.json")) if path.exists() else []) < 3:
        assert child.is_alive()
        time.sleep(0.005)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    kept = {p: p.stat().st_mtime_ns for p in (path / "commits").glob("0*.json")}
    more = server.Process(target=extracting.run, args=(path, N, SHARD_ROWS, True))
    more.start()
    more.join()
    assert more.exitcode == 0
    assert {p: p.stat().st_mtime_ns for p in kept} == kept


def of_torchrun(rank, world):
    return {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}


def of_slurm(rank, world):
    return {"SLURM_ARRAY_TASK_ID": str(rank + 1), "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_COUNT": str(world)}


def together(server, path, environment, world, options=None):
    children = [
        server.Process(
            target=extracting.run,
            args=(path, N, SHARD_ROWS, False),
            kwargs={"variables": environment(rank, world), "options": options},
        )
        for rank in range(world)
    ]
    for child in children:
        child.start()
    return children


@pytest.mark.parametrize(
    ("environment", "options"), [(of_torchrun, {}), (of_slurm, {"format": "hdf5", "compression": "zstd"})]
)
def test_four_processes_write_the_store_of_one(server, tmp_path, environment, options):
    extracting.run(tmp_path / "one", N, SHARD_ROWS, False, options=options)
    children = together(server, tmp_path / "four", environment, 4, options)
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0] * 4
    assert tree(tmp_path / "four") == tree(tmp_path / "one")
    assert rp.ActivationStore.open(tmp_path / "four").complete


def test_one_of_several_processes_is_killed_and_started_again(server, tmp_path):
    extracting.run(tmp_path / "one", N, SHARD_ROWS, False)
    children = together(server, tmp_path / "s", of_torchrun, 3)
    while not list((tmp_path / "s").glob("commits/*.json")):
        assert all(child.exitcode in (None, 0) for child in children)
        time.sleep(0.002)
    children[2].kill()
    for child in children:
        child.join()
    assert [child.exitcode for child in children[:2]] == [0, 0]
    again = together(server, tmp_path / "s", of_torchrun, 3)
    for child in again:
        child.join()
    assert [child.exitcode for child in again] == [0] * 3
    assert tree(tmp_path / "s") == tree(tmp_path / "one")


def test_memory_does_not_grow_with_the_number_of_prompts(server, tmp_path):
    peaks = []
    for n in (400, 4000):
        out = tmp_path / f"{n}.txt"
        child = server.Process(target=extracting.peak, args=(tmp_path / f"s{n}", n, out))
        child.start()
        child.join()
        assert child.exitcode == 0
        peaks.append(float(out.read_text()))
    stored = sum(p.stat().st_size for p in (tmp_path / "s4000").rglob("c.*")) / 2**20
    assert stored > 30, "too small to tell"
    assert peaks[1] - peaks[0] < 0.3 * stored
