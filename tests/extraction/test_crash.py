"""Extraction survives `kill -9` at any point, and its memory does not grow with the number of prompts."""

import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import extracting
import numpy as np
import pytest

import reprobe as rp

KILLS = 20
N, SHARD_ROWS = 60, 40


@pytest.fixture(scope="module")
def server():
    """Children forked from a process that has imported everything, so that a kill falls into the work itself."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["extracting"])
    with pytest.MonkeyPatch.context() as patch:  # the fork server of Python 3.11 does not take over sys.path
        patch.setenv("PYTHONPATH", os.pathsep.join(p for p in sys.path if p))
        patch.setenv("TOKENIZERS_PARALLELISM", "false")
        patch.setenv("REPROBE_WARM", "1")
        yield context


def tree(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def test_twenty_kills_and_as_many_resumes_leave_the_bytes_of_an_undisturbed_run(server, tmp_path):
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
    while kills < KILLS:
        child = server.Process(target=extracting.run, args=(torn, N, SHARD_ROWS, torn.exists()))
        child.start()
        # Points over the whole run, start-up included; a child that finishes first begins the store anew.
        child.join(timeout=float(rng.uniform(0, length)))
        if child.exitcode is None:
            os.kill(child.pid, signal.SIGKILL)
            child.join()
            # 0: it was done before the signal came. Anything else would be a crash of its own.
            assert child.exitcode in (0, -signal.SIGKILL)
            kills += child.exitcode != 0
        else:
            assert child.exitcode == 0
        commits = sorted((torn / "commits").glob("*.json")) if torn.exists() else []
        progress.append(len(commits))
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
