"""Extraction on a Ray cluster: many workers write one store.

Enters: how to load a model, prompts, what `extract` takes. Leaves: the store that a single process with the same token
budget and number of threads writes, byte for byte, whoever wrote which shard. Does not know what computing a shard
takes: a worker is a process that prepares the same `Job` as all others and writes the shards that it is told to.

Whoever is free gets the next few neighbouring shards, so that a slow worker delays little. Nothing of a worker that
dies is needed: what it committed stays, the rest goes to the others, and a new worker takes its place.
"""

import importlib
import importlib.metadata
import os
import signal
import socket
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import torch

from reprobe.errors import ArtifactMissing, ClusterFailed, CorruptArtifact, ReprobeError, StoreLocked, UsageError
from reprobe.extraction.run import Job, prepare
from reprobe.model.language_model import LanguageModel
from reprobe.model.packs import Packing
from reprobe.model.sites import Site
from reprobe.model.text import Truncate
from reprobe.progress import Progress, silent
from reprobe.prompts import Position, PromptSet
from reprobe.provenance import digest_file, digest_lines
from reprobe.store import ActivationStore, StoreWriter
from reprobe.store.claim import require_ours
from reprobe.store.commit import committed
from reprobe.store.places import place_of

#: CPUs of a worker without a GPU. Small models gain little from more threads, and each worker holds the weights.
_CPUS = 4
#: Shards that a worker gets at once, at most. The more, the fewer packs that straddle two runs are computed twice.
_RUN = 8
#: How often a worker may die at one shard, or before it has begun, until the run ends.
_DEATHS = 3
#: How long a shard may be locked by a worker that was taken for dead, and a store unseen on a slow shared folder.
_PATIENCE_SECONDS = 90.0
_PAUSE_SECONDS = 0.5
_ANSWER_SECONDS = 5.0
#: Ray's own memory for what it transports, besides the prompts.
_TRANSPORT_BYTES = 128 * 2**20


@dataclass(frozen=True)
class Crew:
    """How many workers, and what each takes."""

    size: int
    cpus: int
    gpus: int

    @classmethod
    def of(cls, nodes: Iterable[Mapping[str, float]], workers: int | None, *, gpu: bool) -> "Crew":
        """The crew for nodes with these resources ("CPU", "GPU"): one worker per GPU if there are GPUs and `gpu`
        allows them, else one per `_CPUS` CPUs. With `workers` given their CPUs are shared out among so many."""
        if workers is not None and workers < 1:
            raise UsageError(f"workers={workers}: it must be at least 1")
        nodes = list(nodes)
        gpus = sum(int(node.get("GPU", 0)) for node in nodes)
        if gpu and gpus:
            return cls(workers or gpus, cpus=1, gpus=1)
        cpus = [int(node.get("CPU", 0)) for node in nodes]
        most = max(cpus, default=0)
        if most < 1:
            raise ClusterFailed("the Ray cluster has no CPUs to run workers on: start its nodes without --num-cpus=0")
        each = most if workers is not None else min(_CPUS, most)
        while workers is not None and each > 1 and sum(n // each for n in cpus) < workers:
            each -= 1
        return cls(workers or sum(n // each for n in cpus), cpus=each, gpus=0)


@dataclass(frozen=True)
class Order:
    """What every worker is told: what to load, and what to extract from it to where. `prompts` is Ray's reference."""

    model: str
    load: Mapping[str, Any]
    prompts: Any
    options: Mapping[str, Any]
    to: str | Path


@dataclass(frozen=True)
class Begun:
    """What the worker that began the store found out, and all others go by."""

    batch_tokens: int
    manifest: str
    costs: tuple[float, ...]
    missing: tuple[int, ...]


class Worker:
    """A process of the cluster that holds a model and writes shards; its methods are called through Ray, in turn."""

    def __init__(self, threads: int) -> None:
        torch.set_num_threads(threads)
        self._lm: LanguageModel
        self._job: Job
        self._writer: StoreWriter

    def load(self, model: str, options: Mapping[str, Any]) -> str:
        """Load the model. Returns this worker's version of reprobe."""
        self._lm = LanguageModel.load(model, **options)
        return _version()

    def begin(
        self, prompts: PromptSet, options: Mapping[str, Any], to: str | Path, *, resume: bool, overwrite: bool
    ) -> Begun:
        """Begin the store, or go on with it, as a single process would, but write no shard."""
        job = prepare(self._lm, prompts, **options)
        self._job = job.as_begun_at(to) if resume else job
        with self._job.writer(to, resume=resume, overwrite=overwrite) as self._writer:
            missing = tuple(shard.number for shard in self._writer.missing())
        costs = tuple(self._job.costs.tolist())
        return Begun(self._job.batch_tokens, self._writer.manifest.digest, costs, missing)

    def join(self, prompts: PromptSet, options: Mapping[str, Any], to: str | Path, manifest: str) -> None:
        """Make ready to write shards of the store that another worker has begun."""
        _seen(to, manifest, f"a worker on {socket.gethostname()}")
        self._job = prepare(self._lm, prompts, **options)
        with self._job.writer(to, own=range(0)) as self._writer:
            pass

    def write(self, start: int, stop: int) -> None:
        """Write the shards from `start` to before `stop` that are missing."""
        with self._writer.of(range(start, stop)) as writer:
            self._job.fill(writer)


def extract_on_ray(
    model: str | Path,
    prompts: PromptSet | str | Path,
    *,
    to: str | Path,
    load: Mapping[str, Any] | None = None,
    address: str | None = None,
    workers: int | None = None,
    sites: Site | str | Iterable[Site | str] = "resid.post@*",
    at: Position | str = "last",
    pack: Packing = "forest",
    dtype: str | None = None,
    batch_tokens: int | None = None,
    truncate: Truncate | None = None,
    shard_rows: int | None = None,
    format: str = "zarr",  # noqa: A002
    compression: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress = silent,
) -> ActivationStore:
    """Stream the activations of prompts into a store with the workers of a Ray cluster. Needs reprobe-lm[ray].

    Each worker loads the model by itself: `model` and the options `load` (dtype, revision …) are what
    `LanguageModel.load` takes, and the rest is what `extract` takes. Local models, and the store at `to`, must be
    there under the same path on all nodes and here: a shared folder, or s3://bucket/prefix. All nodes need the same
    version of reprobe.

    `address` is HOST:PORT of a cluster; "auto" the one that this machine is a node of; None the one that this process
    is connected to, or else, as "local", one on this machine that ends with the run. There is one worker per GPU, or
    per 4 CPUs where there are no GPUs (or `load` has device="cpu"), or as many as `workers`; what is more than the
    cluster has room for joins when there is room. The token budget is measured by the first worker that is ready, and
    holds for all.

    Raises what `extract` raises, as soon as any worker does; `ClusterFailed` if the cluster does not answer, or if
    workers die again and again at the same shard or while they load. Whatever ends the run, completed shards stay.
    """
    if load is not None and load.get("device") not in (None, "cpu", "cuda"):
        raise UsageError(f"device={load['device']!r}: a worker has a GPU to itself; say cuda or cpu, or leave it out")
    data = prompts if isinstance(prompts, PromptSet) else PromptSet.load(prompts)
    options = {
        "sites": sites if isinstance(sites, Site | str) else tuple(sites),
        "at": at,
        "pack": pack,
        "dtype": dtype,
        "batch_tokens": batch_tokens,
        "truncate": truncate,
        "shard_rows": shard_rows,
        "format": format,
        "compression": compression,
    }
    local = Path(model).expanduser()
    place = place_of(to)
    if place.exists():  # said by the first worker too, but after it has loaded the model
        require_ours(place, may_exist=resume or overwrite)
    with _connected(address, _TRANSPORT_BYTES + 2 * int(data.frame.estimated_size())) as ray:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        run = _Run(
            ray,
            Crew.of(nodes, workers, gpu=(load or {}).get("device") != "cpu"),
            Order(
                model=str(local.absolute() if local.exists() else model),  # workers run in other folders
                load=load or {},
                prompts=ray.put(data),
                options=options,
                to=place.path,
            ),
            resume=resume,
            overwrite=overwrite,
            progress=progress,
        )
        try:
            run.finish()
        finally:
            run.dismiss()
    return ActivationStore.open(place.path)


@dataclass(frozen=True)
class _Call:
    """Something that a worker is doing; `own` are the shards that it writes."""

    worker: Any
    what: Literal["load", "begin", "join", "write"]
    own: range = range(0)


@dataclass
class _Run:
    """A run as its driver sees it: who does what, and what is left to do."""

    ray: Any
    crew: Crew
    order: Order
    resume: bool
    overwrite: bool
    progress: Progress
    begun: Begun | None = None
    store: ActivationStore | None = None
    #: All workers that are not known to be dead.
    hired: list[Any] = field(default_factory=list)
    #: By Ray's reference to the result.
    calls: dict[Any, _Call] = field(default_factory=dict)
    #: Workers that have loaded the model while another begins the store.
    waiting: list[Any] = field(default_factory=list)
    idle: list[Any] = field(default_factory=list)
    #: Shards that are to be written and that nobody is writing, ascending.
    left: list[int] = field(default_factory=list)
    #: How often a worker died at a shard.
    deaths: Counter[int] = field(default_factory=Counter)
    #: How often one died before it could write, since the last time that one could.
    stillborn: int = 0
    #: Since when a shard has been locked, and until when nobody tries again.
    locked: dict[int, float] = field(default_factory=dict)
    pause: float = 0.0

    def finish(self) -> None:
        """Hire workers and give them shards until the store is complete."""
        for _ in range(self.crew.size):
            self._hire()
        while self.begun is None or self.left or any(call.what == "write" for call in self.calls.values()):
            ready = self.ray.wait(list(self.calls), num_returns=1, timeout=_PAUSE_SECONDS)[0] if self.calls else ()
            for reference in ready:
                self._returned(reference)
            if not self.calls:
                time.sleep(_PAUSE_SECONDS)
            self._assign()
            self._show()
        self._see_all()

    def dismiss(self) -> None:
        """End all workers, whatever they are doing."""
        for worker in list(self.hired):
            self._kill(worker)

    def _hire(self) -> None:
        kind = self.ray.remote(num_cpus=self.crew.cpus, num_gpus=self.crew.gpus)(Worker)
        worker = kind.remote(self.crew.cpus)
        self.hired.append(worker)
        self._call(_Call(worker, "load"), self.order.model, self.order.load)

    def _call(self, call: _Call, *arguments: Any, **options: Any) -> None:
        self.calls[getattr(call.worker, call.what).remote(*arguments, **options)] = call

    def _kill(self, worker: Any) -> None:
        self.hired.remove(worker)
        with suppress(Exception):  # it may be dead, and the cluster too
            self.ray.kill(worker)

    def _returned(self, reference: Any) -> None:
        call = self.calls.pop(reference)
        try:
            result = self.ray.get(reference)
        except self.ray.exceptions.RayTaskError as error:
            self._failed(call, error)
        except self.ray.exceptions.RayError as error:
            self._died(call, error)
        else:
            self._go_on(call, result)

    def _go_on(self, call: _Call, result: Any) -> None:
        """What a worker does next."""
        order, worker = self.order, call.worker
        if call.what == "load":
            _require_version(result)
            if self.begun is not None:
                self._join(worker)
            elif any(c.what == "begin" for c in self.calls.values()):
                self.waiting.append(worker)
            else:
                self._call(
                    _Call(worker, "begin"),
                    order.prompts,
                    order.options,
                    order.to,
                    resume=self.resume,
                    overwrite=self.overwrite,
                )
            return
        if call.what == "begin":
            self.store = _seen(order.to, result.manifest, "this process")
            self.begun, self.left = result, list(result.missing)
            for other in self.waiting:
                self._join(other)
            self.waiting = []
        if call.what != "write":
            self.stillborn = 0
        self.idle.append(worker)

    def _join(self, worker: Any) -> None:
        assert self.begun is not None
        options = {**self.order.options, "batch_tokens": self.begun.batch_tokens}
        self._call(_Call(worker, "join"), self.order.prompts, options, self.order.to, self.begun.manifest)

    def _assign(self) -> None:
        """Give the next shards to whoever is free: fewer and fewer, so that all end at about the same time."""
        while self.idle and self.left and time.monotonic() >= self.pause:
            most = min(max(len(self.left) // (4 * self.crew.size), 1), _RUN)
            n = next((i for i in range(1, most) if self.left[i] != self.left[0] + i), most)
            own = range(self.left[0], self.left[0] + n)
            del self.left[:n]
            self._call(_Call(self.idle.pop(), "write", own), own.start, own.stop)

    def _put_back(self, own: range) -> list[int]:
        """Return the shards of a run that are not committed to those that are left."""
        done = self._committed()
        back = [k for k in own if k not in done]
        self.left = sorted([*self.left, *back])
        return back

    def _committed(self) -> frozenset[int]:
        assert self.store is not None
        return committed(self.store.place, self.store.manifest)

    def _failed(self, call: _Call, error: Any) -> None:
        """A worker raised an error. It would again, except where a dead worker's lock has not been taken away yet."""
        cause = error.cause
        if call.what == "write" and isinstance(cause, StoreLocked):
            now = time.monotonic()
            since = min((self.locked.setdefault(k, now) for k in self._put_back(call.own)), default=now)
            if now - since <= _PATIENCE_SECONDS:
                self.pause = now + _PAUSE_SECONDS
                self.idle.append(call.worker)
                return
        if not isinstance(cause, ReprobeError):
            cause.add_note(f"In a worker of the Ray cluster:\n{error}")
        raise cause from None

    def _died(self, call: _Call, error: Exception) -> None:
        """A worker died, or cannot be reached: another takes its place, unless that happens again and again."""
        self._kill(call.worker)
        if "failed to import on the worker" in str(error):
            raise ClusterFailed(
                "workers of the Ray cluster cannot import reprobe: install the same on all its nodes, "
                f"reprobe-lm[ray] {_version()}"
            ) from error
        if call.what == "begin":
            self.resume = not self.overwrite  # it may have begun the store before it died
            if self.waiting:
                self._go_on(_Call(self.waiting.pop(), "load"), _version())
        if call.what == "write":
            back = self._put_back(call.own)
            self.locked = {}  # whatever it held takes a while to be free
            self.deaths.update(back[:1])
            if back and self.deaths[back[0]] >= _DEATHS:
                raise _again_and_again(f"at shard {back[0]}", error)
        else:
            self.stillborn += 1
            if self.stillborn >= _DEATHS:
                if not (self.calls or self.idle):
                    raise _again_and_again("before they could write a shard", error)
                return  # there is no room for so many: the others go on without it
        self._hire()

    def _show(self) -> None:
        if self.begun is None:
            loading = sum(call.what == "load" for call in self.calls.values())
            self.progress("load", self.crew.size - loading, self.crew.size)
            return
        costs, done = self.begun.costs, self._committed()
        missing = self.begun.missing
        self.progress("extract", sum(costs[k] for k in missing if k in done), sum(costs[k] for k in missing))

    def _see_all(self) -> None:
        """See that what workers have written is where this process reads."""
        assert self.begun is not None
        until = time.monotonic() + _PATIENCE_SECONDS
        while unseen := set(self.begun.missing) - self._committed():
            if time.monotonic() > until:
                raise _not_shared(self.order.to, "this process", f"{len(unseen)} shards that workers have written")
            time.sleep(_PAUSE_SECONDS)


def _version() -> str:
    """The version of reprobe, and what tells two states of one version apart."""
    files = sorted(Path(__file__).parents[1].rglob("*.py"))
    return f"{importlib.metadata.version('reprobe-lm')} ({digest_lines(map(digest_file, files))[:8]})"


def _require_version(theirs: str) -> None:
    if theirs != _version():
        raise UsageError(
            f"a worker of the Ray cluster has reprobe {theirs}, and this process {_version()}: install the same on all "
            "nodes"
        )


def _seen(to: str | Path, manifest: str, who: str) -> ActivationStore:
    """The store that a worker has just begun, as another process sees it."""
    until = time.monotonic() + _PATIENCE_SECONDS
    while True:
        with suppress(ArtifactMissing, CorruptArtifact):
            store = ActivationStore.open(to)
            if store.manifest.digest == manifest:
                return store
        if time.monotonic() > until:
            raise _not_shared(to, who, "the store that a worker has begun")
        time.sleep(_PAUSE_SECONDS)


def _not_shared(to: str | Path, who: str, what: str) -> ClusterFailed:
    return ClusterFailed(
        f"{who} does not see at {to} {what}: give a folder that all nodes and this machine share, or an object store "
        "(s3://bucket/prefix)"
    )


def _again_and_again(where: str, error: Exception) -> ClusterFailed:
    return ClusterFailed(
        f"{_DEATHS} workers died {where}. What Ray says of the last:\n{textwrap.indent(str(error).strip(), '  ')}\n"
        "If memory ran out, use fewer workers (workers=, --workers), a smaller batch_tokens, or a smaller shard_rows "
        "in a new store. Completed shards are kept: go on with resume=True (--resume)."
    )


@contextmanager
def _connected(address: str | None, transport_bytes: int) -> Iterator[Any]:
    """Ray, connected to a cluster; what was connected or started here is ended again."""
    # Nothing of reprobe's run is told to others, and workers use the environment that their node has; variables that
    # are set already are left as they are.
    quiet = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
    with _variables(quiet):
        try:
            ray = importlib.import_module("ray")
        except ImportError as error:
            raise UsageError(
                "extracting on a cluster needs Ray, which is not installed: pip install 'reprobe-lm[ray]'"
            ) from error
        own = not ray.is_initialized()
        if not own and address not in (None, "auto"):
            raise UsageError(
                f"address={address!r}: this process is connected to a Ray cluster already; leave the address out to "
                "use that, or call ray.shutdown() first"
            )
        main = threading.current_thread() is threading.main_thread()
        handler = signal.getsignal(signal.SIGTERM) if main else None  # Ray puts its own in place of it
        try:
            if own:
                _connect(ray, address or "local", transport_bytes)
            try:
                yield ray
            finally:
                if own:
                    ray.shutdown()
        finally:
            if handler is not None:
                signal.signal(signal.SIGTERM, handler)


def _connect(ray: Any, address: str, transport_bytes: int) -> None:
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    tries = {}
    if address == "local":
        options |= {"include_dashboard": False, "object_store_memory": transport_bytes}
    else:
        tries = {"RAY_gcs_server_port_wait_time_s": "1"}  # once; by default 20 times, which takes minutes
    if address not in ("local", "auto"):
        _require_answer(address)
    try:
        with _variables(tries):
            ray.init(address=address, **options)
    except (ray.exceptions.RayError, ConnectionError, RuntimeError, ValueError, AssertionError) as error:
        ray.shutdown()
        raise ClusterFailed(
            f"no connection to a Ray cluster ({address}): {error}\nStart one with `ray start --head`, or use one on "
            "this machine for the run (address=None, --ray local)"
        ) from error


def _require_answer(address: str) -> None:
    """See that something answers at HOST:PORT, since Ray would try for minutes."""
    try:
        parts = urlsplit(address if "://" in address else f"//{address}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if host is None or port is None:
        raise UsageError(
            f"{address!r} is no address of a Ray cluster: HOST:PORT (as `ray start` prints it), auto, local"
        )
    try:
        socket.create_connection((host, port), timeout=_ANSWER_SECONDS).close()
    except OSError as error:
        raise ClusterFailed(
            f"nothing answers at {address} ({error}): is the Ray cluster running, and this its address as `ray start` "
            "printed it?"
        ) from error


@contextmanager
def _variables(values: Mapping[str, str]) -> Iterator[None]:
    """Environment variables that hold inside, unless they are set already."""
    added = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
