"""A scratch folder, and the server that forks writers to be killed."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from folders import scratch
from store import synthetic


@pytest.fixture
def folder() -> Iterator[Path]:
    with scratch() as name:
        yield Path(name)


class Server:
    """Forks a writer per order, several at once for several. `finish` waits for them and returns the first's
    exit status, `finish_all` those of all; negative for a signal.
    """

    def __init__(self) -> None:
        here = Path(synthetic.__file__)
        paths = [str(here.parents[1]), str(here.parents[2]), os.environ.get("PYTHONPATH", "")]
        self._process = subprocess.Popen(
            [sys.executable, str(here)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"},
        )

    def order(self, **order: Any) -> None:
        self.order_all([order])

    def order_all(self, orders: list[dict[str, Any]]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(orders) + "\n")
        self._process.stdin.flush()

    def finish(self) -> int:
        return self.finish_all()[0]

    def finish_all(self) -> list[int]:
        assert self._process.stdout is not None
        statuses: list[int] = json.loads(self._process.stdout.readline())
        return statuses

    def stop(self) -> None:
        self._process.kill()  # it is waiting for orders, or still importing
        self._process.communicate()


@pytest.fixture(scope="session", autouse=True)
def server() -> Iterator[Server]:
    """Started before the first test of the folder, so that its imports are done when it is needed."""
    running = Server()
    yield running
    running.stop()
