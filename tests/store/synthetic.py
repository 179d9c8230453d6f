"""Small stores of made-up activations, and a process that writes them and is killed on the way.

As a module: `create`, `fill` and what they write, for the tests. As a script: a server that forks a child for each line
of JSON on its standard input, so that a hundred writers can be killed for the price of one import.
"""

import ctypes
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from folders import tree

from reprobe.errors import DiskFull
from reprobe.model.identity import ModelIdentity
from reprobe.model.sites import Site
from reprobe.store import Shard, StoredSite, StoreWriter

IDENTITY = ModelIdentity("tiny", "abc", "llama", 3, 35, "w" * 64, "t" * 64, None, "float32", None)
SITES = (
    StoredSite(Site("resid.post", 2), 35),
    StoredSite(Site("attn.heads", 1), 35, 7),
    StoredSite(Site("final"), 35),
)
ROWS, SHARD_ROWS, CHUNK_ROWS = 23, 6, 3
FORMATS = ("zarr", "hdf5")
BITS = {"float32": torch.int32, "float16": torch.int16, "bfloat16": torch.int16}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def index(rows: int = ROWS) -> pl.DataFrame:
    numbers = range(rows)
    return pl.DataFrame(
        {
            "row": pl.Series(numbers, dtype=pl.UInt64),
            "prompt": [f"p{i // 2}" for i in numbers],
            "position": pl.Series([i % 2 for i in numbers], dtype=pl.Int32),
            "token": pl.Series([7 * i for i in numbers], dtype=pl.Int32),
            "label": [i % 3 == 0 for i in numbers],
            "group": [f"g{i // 4}" for i in numbers],
            "pair": [None if i % 5 else f"q{i}" for i in numbers],
            "n_tokens": pl.Series([2 for _ in numbers], dtype=pl.Int32),
        }
    )


def tokens(of: pl.DataFrame) -> pl.DataFrame:
    prompts = of["prompt"].unique(maintain_order=True)
    lists = pl.Series([[7 * i, 7 * i + 1] for i in range(len(prompts))], dtype=pl.List(pl.Int32))
    return pl.DataFrame({"prompt": prompts, "tokens": lists})


def create(path: Path | str, *, rows: int = ROWS, **changes: Any) -> StoreWriter:
    """A writer of the synthetic store; `changes` replace arguments of `StoreWriter.create`."""
    arguments: dict[str, Any] = {
        "identity": IDENTITY,
        "prompts": "d" * 64,
        "plan": {"positions": "last", "budget": 512},
        "sites": SITES,
        "dtype": "bfloat16",
        "index": index(rows),
        "tokens": tokens(changes.get("index", index(rows))),
        "shard_rows": SHARD_ROWS,
        "chunk_rows": CHUNK_ROWS,
    }
    return StoreWriter.create(path, **(arguments | changes))


def bits(site: Site, start: int, stop: int, width: int, dtype: str) -> torch.Tensor:
    """Rows of arbitrary bits (NaN payloads and infinities among them), the same for the same arguments.

    Every fifth row is all zeros, and so is the whole second chunk.
    """
    kind = BITS[dtype]
    span = torch.iinfo(kind)
    seed = sum(map(ord, str(site)))
    rows = [
        np.zeros(width, dtype=np.int64)
        if r % 5 == 0 or 3 <= r < 6
        else np.random.default_rng((seed, r)).integers(span.min, span.max + 1, width)
        for r in range(start, stop)
    ]
    return torch.from_numpy(np.stack(rows)).to(kind)


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """The bits of a tensor, so that NaNs can be compared."""
    return tensor.view(torch.int32 if tensor.element_size() == 4 else torch.int16)


def shard_values(writer: StoreWriter, shard: Shard) -> dict[Site, torch.Tensor]:
    dtype = writer.manifest.dtype
    return {
        s.site: bits(s.site, shard.start, shard.stop, s.width, dtype).view(DTYPES[dtype]) for s in writer.manifest.sites
    }


def write(writer: StoreWriter, values: Mapping[Site, torch.Tensor]) -> None:
    """Write all missing shards, from the rows of whole sites, and give the lock back."""
    with writer:
        for shard in writer.missing():
            writer.write_shard(shard.number, {s: v[shard.start : shard.stop] for s, v in values.items()})


def fill(writer: StoreWriter, shards: int | None = None) -> None:
    """Write the missing shards (the first `shards` of them) and give the lock back."""
    with writer:
        for shard in writer.missing()[:shards]:
            writer.write_shard(shard.number, shard_values(writer, shard))


def _dies_at(operation: int) -> None:
    """From now on, the process kills itself at its `operation`-th change of the file system."""
    count = itertools.count()
    for name in ("open", "fsync", "replace", "mkdir", "unlink", "rmdir"):
        original = getattr(os, name)

        def wrapped(*args: Any, _original: Any = original, **kwargs: Any) -> Any:
            if next(count) == operation:
                os.kill(os.getpid(), signal.SIGKILL)
            return _original(*args, **kwargs)

        setattr(os, name, wrapped)


def _own_namespace() -> None:
    """A user and a mount namespace for this process alone, in which it may mount without being root."""
    ids = (os.getuid(), os.getgid())
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(0x10000000 | 0x00020000) != 0:
        raise OSError(ctypes.get_errno(), "unshare")
    Path("/proc/self/setgroups").write_text("deny")
    for kind, own in zip("ug", ids, strict=True):
        Path(f"/proc/self/{kind}id_map").write_text(f"0 {own} 1")


def _on_small_disk(path: Path, pages: int, changes: dict[str, Any]) -> dict[str, Any]:
    """Fill a tmpfs of a few pages, then enlarge it and resume; what happened, as JSON."""
    try:
        _own_namespace()
        size = pages * os.sysconf("SC_PAGE_SIZE")  # a file takes whole pages
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path], check=True)
    except (OSError, AttributeError, subprocess.CalledProcessError) as error:
        return {"skipped": f"no disk of our own can be mounted here: {error}"}
    root = path / "s.reprobe"
    out: dict[str, Any] = {}
    try:
        fill(create(root, **changes))
    except DiskFull as error:
        out["message"] = str(error)
    out["before"] = {k: v.hex() for k, v in tree(root).items()}
    subprocess.run(["mount", "-o", "remount,size=10m", path], check=True)
    writer = create(root, **changes, resume=True)
    out["missing"] = len(writer.missing())
    fill(writer)
    out["after"] = {k: v.hex() for k, v in tree(root).items()}
    return out


def _child(order: dict[str, Any]) -> None:
    if "small_disk" in order:
        result = _on_small_disk(Path(order["small_disk"]), order["pages"], order["changes"])
        Path(order["result"]).write_text(json.dumps(result))
        return
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND) if "log" in order else None
    if "operation" in order:
        _dies_at(order["operation"])
    changes = order["changes"] | ({"own": range(*order["own"])} if "own" in order else {})
    with create(Path(order["path"]), **changes) as writer:
        for shard in writer.missing():
            if log is not None:
                os.write(log, f"{shard.number}\n".encode())
            writer.write_shard(shard.number, shard_values(writer, shard))


def _forked(order: dict[str, Any]) -> int:
    """A child that carries out the order; its process id."""
    if (pid := os.fork()) == 0:
        status = 1
        try:
            _child(order)
            status = 0
        finally:
            os._exit(status)
    return pid


def _serve() -> None:
    for line in sys.stdin:
        orders = json.loads(line)
        children = [(order, _forked(order)) for order in orders]
        statuses = []
        for order, pid in children:
            if "seconds" in order:
                time.sleep(order["seconds"])
                os.kill(pid, signal.SIGKILL)  # perhaps it has finished; not waited for, it keeps its id
            statuses.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        sys.stdout.write(json.dumps(statuses) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _serve()
