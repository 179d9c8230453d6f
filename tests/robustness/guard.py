"""What reading a file may do to the machine: take some memory and some seconds, and nothing else.

`harmless` watches a piece of code by an audit hook, a limit of its address space and an alarm. The hook stays in the
process, since Python cannot take one out, and does nothing outside of `harmless`.
"""

import gc
import resource
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

#: More address space than any reader of the small files here has a use for.
ROOM = 2 << 30
SECONDS = 20
_FORBIDDEN = {
    "ctypes.dlopen",
    "os.exec",
    "os.fork",
    "os.forkpty",
    "os.mkdir",
    "os.posix_spawn",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.spawn",
    "os.system",
    "os.truncate",
    "pickle.find_class",
    "shutil.rmtree",
    "socket.connect",
    "subprocess.Popen",
    "tempfile.mkdtemp",
    "tempfile.mkstemp",
}
_seen: list[str] | None = None
_thread = 0


def _audit(event: str, args: tuple[Any, ...]) -> None:
    if _seen is None or threading.get_ident() != _thread:
        return
    if event in _FORBIDDEN:
        _seen.append(f"{event}{args[:1]}")
    elif event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+"):
        _seen.append(f"{event} {args[0]} {args[1]}")
    elif event in ("compile", "exec"):
        code = args[0] if event == "exec" else args[1]
        name = getattr(code, "co_filename", code)
        if isinstance(name, str) and name.startswith("<") and not name.startswith(("<frozen", "<__array_function__")):
            _seen.append(f"{event} {name}")


sys.addaudithook(_audit)


@contextmanager
def harmless(*, caches: bool = False) -> Iterator[None]:
    """Fail if what is done inside runs code, writes (unless it `caches`), takes `ROOM` bytes more than before, or
    `SECONDS`."""
    global _seen, _thread
    gc.collect(0)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, _too_long)
    seen: list[str] = []
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, hard))
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    _seen, _thread = seen, threading.get_ident()
    try:
        yield
    finally:
        _seen = None
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    if caches:
        seen = [s for s in seen if not s.startswith(("open", "os.", "tempfile.", "shutil."))]
    assert not seen, f"reading did what reading must not do: {seen}"


def _too_long(*_: object) -> None:
    raise AssertionError(f"reading takes longer than {SECONDS} seconds")
