"""kill -9 at any point, then resume, gives the store of an uninterrupted run."""

import random
import signal
from pathlib import Path
from typing import Any

import pytest
from folders import tree
from store import synthetic

from reprobe.errors import ArtifactMissing
from reprobe.store import ActivationStore, verify

KILLED = -signal.SIGKILL
#: More than the changes of the file system that writing the whole store takes.
OPERATIONS = {"zarr": 150, "hdf5": 90}


def _uninterrupted(path: Path, **changes: Any) -> dict[str, bytes]:
    synthetic.fill(synthetic.create(path, **changes))
    return tree(path)


def _require_undamaged(path: Path) -> None:
    """A killed writer leaves no store, or one that is merely unfinished."""
    try:
        problems = ActivationStore.open(path).verify().problems
    except ArtifactMissing:
        return
    assert [p for p in problems if "no commit record" not in p and "interrupted write" not in p] == []


def _kill_until_done(server: Any, path: Path, rng: random.Random, expected: dict[str, bytes], form: str) -> int:
    """Kill a writer at a random operation, resume with one that is killed too, and so on; how many kills."""
    kills, log = 0, path.with_suffix(".log")
    while True:
        operation = rng.randrange(OPERATIONS[form])
        changes = {"resume": True, "format": form}
        server.order(path=str(path), changes=changes, operation=operation, log=str(log))
        status = server.finish()
        if status == 0:
            break
        assert status == KILLED
        _require_undamaged(path)
        kills += 1
    assert tree(path) == expected
    assert verify(path).ok
    computed = log.read_text().split()
    assert len(computed) <= 4 + kills, "a kill cost more than the shard that was being written"
    return kills


def _many_kills(server: Any, folder: Path, wanted: int, seed: int, form: str) -> None:
    expected = _uninterrupted(folder / "whole.reprobe", format=form)
    rng, kills, trial = random.Random(seed), 0, 0
    while kills < wanted:
        kills += _kill_until_done(server, folder / f"{trial}.reprobe", rng, expected, form)
        trial += 1


@pytest.mark.parametrize("form", synthetic.FORMATS)
def test_a_store_whose_writers_were_killed_at_twenty_random_operations_equals_an_uninterrupted_one(
    server: Any, folder: Path, form: str
) -> None:
    _many_kills(server, folder, wanted=20, seed=0, form=form)


@pytest.mark.slow
@pytest.mark.parametrize("form", synthetic.FORMATS)
def test_a_store_whose_writers_were_killed_at_two_hundred_random_operations_equals_an_uninterrupted_one(
    server: Any, folder: Path, form: str
) -> None:
    _many_kills(server, folder, wanted=200, seed=1, form=form)


def test_a_writer_killed_from_outside_at_random_times_leaves_a_store_that_resumes(server: Any, folder: Path) -> None:
    expected = _uninterrupted(folder / "whole.reprobe")
    path, rng, kills = folder / "s.reprobe", random.Random(2), 0
    for attempt in range(10):
        server.order(path=str(path), changes={"resume": True}, seconds=rng.uniform(0, 0.15) if attempt else 0)
        kills += server.finish() == KILLED
        _require_undamaged(path)
        if attempt % 3 == 2:
            synthetic.fill(synthetic.create(path, resume=True))
            assert tree(path) == expected
            path = folder / f"{attempt}.reprobe"
    assert kills  # a writer may finish before its signal comes, but not the first


def test_overwriting_that_is_killed_at_any_operation_can_be_done_again(server: Any, folder: Path) -> None:
    path, rng = folder / "s.reprobe", random.Random(3)
    expected = _uninterrupted(folder / "whole.reprobe")
    for _ in range(8):
        if not path.exists():
            _uninterrupted(path, plan={"another": "plan"})
        server.order(path=str(path), changes={"overwrite": True}, operation=rng.randrange(1, 60))
        assert server.finish() == KILLED
        _require_undamaged(path)
        synthetic.fill(synthetic.create(path, overwrite=True))
        assert tree(path) == expected
