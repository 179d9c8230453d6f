"""Workers of a Ray cluster write the bytes of a single process, whoever dies in the meantime.

Ray itself starts slowly: what can go wrong with workers is tried out with `FewRay`, which runs real workers in this
process and lets them die where a test says so; a real cluster shows that Ray behaves like it.
"""

import os

# Before Ray is imported, which reads them once: started by `uv run` it would make the environment anew per worker.
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import random
import signal
import socket
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
from cli.calling import called
from extracting import prompts
from folders import tree
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import save_tiny

import reprobe as rp
from reprobe.errors import (
    ArtifactExists,
    ClusterFailed,
    DiskFull,
    IdentityMismatch,
    ModelLoadFailed,
    StoreLocked,
    UnknownSite,
    UsageError,
)
from reprobe.extraction import cluster, extract_on_ray
from reprobe.extraction.cluster import Crew, Worker
from reprobe.model.language_model import LanguageModel

N = 50
OPTIONS = {"at": "all", "sites": "resid.post@*,attn.heads@1", "batch_tokens": 64, "shard_rows": 40}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model in a folder, as all nodes of a cluster would see it."""
    path = tmp_path_factory.mktemp("ray")
    save_tiny(path / "model")
    return path


@pytest.fixture(scope="module")
def whole(folder):
    """The bytes that a single process writes."""
    rp.extract(LanguageModel.load(folder / "model"), prompts(N), to=folder / "whole", **OPTIONS)
    return tree(folder / "whole")


# -- a cluster in this process ---------------------------------------------------------------------------------------


class FewRay:
    """What `extract_on_ray` uses of Ray, with workers in this process. `fate(what, nth)` is asked at the nth call
    of a method: "dies" (before it does anything), "half" (after the first of its shards), "late" (when all is done
    and nobody has been told), an error, or None."""

    exceptions = ray.exceptions

    def __init__(self, fate=lambda what, nth: None, seed=0):
        self.fate, self.random = fate, random.Random(seed)
        self.calls, self.done, self.live, self.hired = [], {}, set(), 0
        self.counts = {"load": 0, "begin": 0, "join": 0, "write": 0}

    def nodes(self):
        # one thread per worker, since the last bits depend on their number
        return [{"Alive": True, "Resources": {"CPU": 1.0}}, {"Alive": False, "Resources": {"CPU": 64.0}}]

    def put(self, value):
        return value

    def remote(self, **resources):
        def hire(kind):
            def make(*arguments):
                actor = kind(*arguments)
                self.live.add(actor)
                self.hired += 1
                return SimpleNamespace(
                    actor=actor,
                    **{what: SimpleNamespace(remote=self._caller(actor, what)) for what in self.counts},
                )

            return SimpleNamespace(remote=make)

        return hire

    def _caller(self, actor, what):
        def call(*arguments, **options):
            reference = object()
            self.calls.append((reference, actor, what, arguments, options))
            return reference

        return call

    def wait(self, references, *, num_returns, timeout):
        """Run one of the calls that are due, whichever."""
        due = [call for call in self.calls if call[0] in references]
        self.calls.remove(chosen := self.random.choice(due))
        reference, actor, what, arguments, options = chosen
        nth, self.counts[what] = self.counts[what], self.counts[what] + 1
        fate = self.fate(what, nth)
        try:
            if fate == "half":
                start, _stop = arguments
                actor.write(start, start + 1)
            if isinstance(fate, BaseException):
                raise fate
            if fate in (None, "late"):
                self.done[reference] = getattr(actor, what)(*arguments, **options)
            if fate is not None:
                raise ray.exceptions.ActorDiedError()
        except ray.exceptions.RayError as error:
            self.done[reference] = error
        except Exception as error:
            self.done[reference] = ray.exceptions.RayTaskError(what, "traceback", error)
        return [reference], [r for r in references if r is not reference]

    def get(self, reference):
        if isinstance(self.done[reference], Exception):
            raise self.done[reference]
        return self.done[reference]

    def kill(self, worker):
        self.live.discard(worker.actor)


@pytest.fixture(scope="module")
def on_few(folder):
    """`on_few(few, to, **options)`: the run on a `FewRay` in place of Ray; nobody is left working after it."""

    def run(few, to, model=folder / "model", **options):
        def connected(address, transport_bytes):
            return nullcontext(few)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cluster, "_connected", connected)
            patch.setattr(cluster, "_PAUSE_SECONDS", 0.001)
            try:
                return extract_on_ray(model, prompts(N), to=to, **OPTIONS | options)
            finally:
                assert not few.live

    return run


@settings(max_examples=5, deadline=None)
@given(
    seed=st.integers(0, 99),
    workers=st.integers(1, 4),
    deaths=st.dictionaries(
        st.one_of(
            st.tuples(st.sampled_from(["load", "join", "begin"]), st.integers(0, 3)),
            st.tuples(st.just("write"), st.integers(0, 12)),
        ),
        st.sampled_from(["dies", "late"]),
        max_size=2,
    ),
    halves=st.sets(st.integers(0, 12), max_size=1),
)
def test_the_bytes_are_those_of_one_process_whoever_works_and_whoever_dies(
    on_few, whole, tmp_path_factory, seed, workers, deaths, halves
):
    fates = {("write", nth): "half" for nth in halves} | deaths
    few = FewRay(lambda what, nth: fates.get((what, nth)), seed)
    store = on_few(few, tmp_path_factory.mktemp("any") / "s", workers=workers)
    assert store.complete
    assert tree(store.path) == whole


def test_a_shard_that_kills_whoever_computes_it_ends_the_run_and_the_rest_is_kept(on_few, whole, tmp_path):
    few = FewRay(lambda what, nth: None if what != "write" else "half" if nth == 0 else "dies")
    with pytest.raises(ClusterFailed, match=r"3 workers died at shard 1\. (.|\n)*--workers(.|\n)*--resume"):
        on_few(few, tmp_path / "s", workers=1)
    assert few.hired == 3
    assert rp.ActivationStore.open(tmp_path / "s").committed == {0}
    assert tree(on_few(FewRay(), tmp_path / "s", workers=2, resume=True).path) == whole


def test_workers_that_never_get_ready_end_the_run(on_few, tmp_path):
    few = FewRay(lambda what, nth: "dies" if what == "load" else None)
    with pytest.raises(ClusterFailed, match="died before they could write a shard"):
        on_few(few, tmp_path / "s", workers=2)
    assert few.hired <= 4
    assert not (tmp_path / "s").exists()


def test_where_there_is_no_room_for_all_workers_the_others_go_on(on_few, whole, tmp_path):
    few = FewRay(lambda what, nth: "dies" if what == "load" and nth > 0 else None)
    assert tree(on_few(few, tmp_path / "s", workers=4).path) == whole
    assert few.hired <= 8


def test_an_error_of_a_worker_ends_the_run_as_itself_and_is_not_tried_again(on_few, tmp_path):
    full = DiskFull("no room left on the device")
    few = FewRay(lambda what, nth: full if what == "write" and nth == 2 else None)
    with pytest.raises(DiskFull) as caught:
        on_few(few, tmp_path / "s", workers=2)
    assert caught.value is full
    assert few.counts["write"] <= 4
    assert rp.ActivationStore.open(tmp_path / "s").committed

    few = FewRay()
    with pytest.raises(UnknownSite, match="@9"):
        on_few(few, tmp_path / "t", workers=1, sites="resid.post@9")
    assert few.counts == {"load": 1, "begin": 1, "join": 0, "write": 0}
    with pytest.raises(ModelLoadFailed, match="no such folder"):
        on_few(FewRay(), tmp_path / "t", workers=1, model=tmp_path / "nothing")
    with pytest.raises(IdentityMismatch, match="dtype"):
        on_few(FewRay(), tmp_path / "s", workers=1, dtype="float16", resume=True)


def test_an_error_that_is_not_of_reprobe_says_that_it_comes_from_a_worker(on_few, tmp_path):
    few = FewRay(lambda what, nth: MemoryError("CUDA out of memory") if what == "write" else None)
    with pytest.raises(MemoryError, match="CUDA") as caught:
        on_few(few, tmp_path / "s", workers=1)
    assert any("worker of the Ray cluster" in note for note in caught.value.__notes__)


def test_an_interrupted_run_ends_its_workers_and_keeps_what_is_done(on_few, whole, tmp_path):
    few = FewRay(lambda what, nth: KeyboardInterrupt() if what == "write" and nth == 3 else None)
    with pytest.raises(KeyboardInterrupt):
        on_few(few, tmp_path / "s", workers=2)
    assert rp.ActivationStore.open(tmp_path / "s").committed
    assert tree(on_few(FewRay(), tmp_path / "s", workers=2, resume=True).path) == whole


def test_a_lock_that_a_dead_worker_still_holds_is_waited_for_but_not_for_ever(on_few, whole, tmp_path, monkeypatch):
    locked = StoreLocked("another process is writing some of its shards")
    few = FewRay(lambda what, nth: locked if what == "write" and nth in (1, 2, 4) else None)
    assert tree(on_few(few, tmp_path / "s", workers=2).path) == whole
    monkeypatch.setattr(cluster, "_PATIENCE_SECONDS", 0.01)
    with pytest.raises(StoreLocked):
        on_few(FewRay(lambda what, nth: locked if what == "write" else None), tmp_path / "t", workers=2)


def test_a_store_that_exists_is_refused_before_a_worker_starts_and_replaced_if_asked(on_few, whole, tmp_path):
    on_few(FewRay(), tmp_path / "s", workers=1, sites="resid.post@0")
    few = FewRay()
    with pytest.raises(ArtifactExists, match="--resume"):
        on_few(few, tmp_path / "s", workers=1)
    assert few.hired == 0
    assert tree(on_few(FewRay(), tmp_path / "s", workers=2, overwrite=True).path) == whole


def test_a_measured_budget_gives_way_to_that_of_the_store_and_holds_for_all_workers(on_few, folder, whole, tmp_path):
    lm = LanguageModel.load(folder / "model")
    part = rp.extraction.prepare(lm, prompts(N), **OPTIONS)
    part.run(tmp_path / "s", own=range(2, 5))
    assert tree(on_few(FewRay(), tmp_path / "s", workers=3, batch_tokens=None, resume=True).path) == whole


def test_progress_counts_what_is_committed(on_few, tmp_path):
    seen = []
    on_few(FewRay(), tmp_path / "s", workers=2, progress=lambda *call: seen.append(call))
    done = [done for what, done, total in seen if what == "extract"]
    assert done == sorted(done)
    assert done[-1] == pytest.approx(seen[-1][2])
    assert {what for what, _, _ in seen} == {"load", "extract"}


def test_workers_with_another_reprobe_are_refused(on_few, tmp_path, monkeypatch):
    monkeypatch.setattr(Worker, "load", lambda self, model, options: "0.0.1 (abc)")
    with pytest.raises(UsageError, match=r"has reprobe 0\.0\.1 \(abc\), and this process"):
        on_few(FewRay(), tmp_path / "s", workers=1)


def test_workers_that_write_to_a_folder_of_their_own_are_found_out(on_few, tmp_path, monkeypatch):
    class Elsewhere(Worker):
        def begin(self, prompts, options, to, **how):
            return super().begin(prompts, options, f"{to}-elsewhere", **how)

    monkeypatch.setattr(cluster, "Worker", Elsewhere)
    monkeypatch.setattr(cluster, "_PATIENCE_SECONDS", 0.01)
    with pytest.raises(ClusterFailed, match=r"does not see at .*shared?"):
        on_few(FewRay(), tmp_path / "s", workers=1)


@pytest.mark.parametrize(
    ("nodes", "workers", "gpu", "crew"),
    [
        ([{"CPU": 2}], None, True, Crew(1, 2, 0)),
        ([{"CPU": 16}, {"CPU": 9}, {"CPU": 2}, {}], None, True, Crew(6, 4, 0)),
        ([{"CPU": 64, "GPU": 8}, {"CPU": 64, "GPU": 4}, {"CPU": 8}], None, True, Crew(12, 1, 1)),
        ([{"CPU": 8, "GPU": 1}], None, False, Crew(2, 4, 0)),
        ([{"CPU": 8, "GPU": 4}], 2, True, Crew(2, 1, 1)),
        ([{"CPU": 64}], 1, True, Crew(1, 64, 0)),
        ([{"CPU": 8}, {"CPU": 6}], 5, True, Crew(5, 2, 0)),
        ([{"CPU": 2}], 9, True, Crew(9, 1, 0)),
    ],
)
def test_workers_get_a_gpu_each_or_a_few_cpus(nodes, workers, gpu, crew):
    assert Crew.of(nodes, workers, gpu=gpu) == crew


def test_a_crew_that_cannot_be_is_refused():
    with pytest.raises(UsageError, match="workers=0"):
        Crew.of([{"CPU": 2}], 0, gpu=True)
    with pytest.raises(ClusterFailed, match="no CPUs"):
        Crew.of([{"CPU": 0}, {}], None, gpu=True)


# -- before there is a cluster ---------------------------------------------------------------------------------------


def test_without_ray_the_error_names_the_extra(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"pip install 'reprobe-lm\[ray\]'"):
        extract_on_ray(folder / "model", prompts(2), to=tmp_path / "s")


@pytest.mark.parametrize(
    ("address", "error", "text"),
    [
        ("127.0.0.1:1", ClusterFailed, "nothing answers at 127.0.0.1:1"),
        ("here", UsageError, "HOST:PORT"),
        ("127.0.0.1:many", UsageError, "HOST:PORT"),
    ],
)
def test_an_address_that_does_not_answer_is_told_at_once(folder, tmp_path, monkeypatch, address, error, text):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    start = time.monotonic()
    with pytest.raises(error, match=text):
        extract_on_ray(folder / "model", prompts(2), to=tmp_path / "s", address=address)
    assert time.monotonic() - start < 10
    assert not (tmp_path / "s").exists()


def test_a_worker_takes_no_particular_gpu(folder, tmp_path):
    with pytest.raises(UsageError, match="cuda:1"):
        extract_on_ray(folder / "model", prompts(2), to=tmp_path / "s", load={"device": "cuda:1"})


@pytest.mark.parametrize(
    "more", [("--workers", "2"), ("--ray", "local", "--rank", "0"), ("--ray", "local", "--dry-run")]
)
def test_options_that_make_no_sense_together_are_refused(folder, tmp_path, more):
    prompts(2).to_jsonl(tmp_path / "p.jsonl")
    line = ("extract", folder / "model", tmp_path / "p.jsonl", "--to", tmp_path / "s", *more)
    assert "--ray" in called(*line, code=2).output
    assert not (tmp_path / "s").exists()


# -- a real cluster --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def address():
    """A cluster of one node with two CPUs, to which this process is connected; its address."""
    context = ray.init(
        address="local",
        num_cpus=2,
        object_store_memory=100 * 2**20,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
    )
    yield context.address_info["address"]
    ray.shutdown()


def test_a_killed_worker_is_replaced_and_nothing_is_computed_twice(address, folder, whole, tmp_path, monkeypatch):
    mark, path = tmp_path / "mark", tmp_path / "s"

    class Mortal(Worker):
        """The first that gets so far kills itself between two shards, with the rest of its run locked."""

        def write(self, start, stop):
            try:
                mark.touch(exist_ok=False)
            except FileExistsError:
                super().write(start, stop)
            else:
                super().write(start, start + 1)
                with self._writer.of(range(start + 1, stop)):
                    (mark.parent / "shard").write_text(str(start))
                    os.kill(os.getpid(), signal.SIGKILL)

    committed = {}

    def look(what, done, total):
        for p in (path / "commits").glob("0*.json"):
            committed.setdefault(p, p.stat().st_mtime_ns)

    monkeypatch.setattr(cluster, "Worker", Mortal)
    store = extract_on_ray(folder / "model", prompts(N), to=path, workers=2, progress=look, **OPTIONS)
    assert tree(path) == whole
    assert store.verify().ok
    assert int((tmp_path / "shard").read_text()) in store.committed
    assert {p: p.stat().st_mtime_ns for p in committed} == committed
    assert ray.is_initialized()  # it was not this run that connected
    with pytest.raises(UsageError, match="connected to a Ray cluster already"):
        extract_on_ray(folder / "model", prompts(N), to=tmp_path / "t", address=address)


@pytest.mark.slow  # nine seconds; workers' errors are also tested without a cluster, above
def test_an_error_crosses_the_cluster_as_itself(address, folder, tmp_path):
    with pytest.raises(UnknownSite, match="@9") as caught:
        extract_on_ray(folder / "model", prompts(N), to=tmp_path / "s", workers=1, sites="resid.post@9")
    assert type(caught.value) is UnknownSite
    assert not (tmp_path / "s").exists()


def command(folder, to, *more):
    """The command line as a process of its own: the run of `OPTIONS` on a cluster."""
    (folder / "prompts.jsonl").unlink(missing_ok=True)
    prompts(N).to_jsonl(folder / "prompts.jsonl")
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in OPTIONS.items()]
    line = ["extract", folder / "model", folder / "prompts.jsonl", "--to", to, *flags, *more]
    code = "from reprobe.cli import main; main()"
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, line)], stderr=subprocess.PIPE, text=True, start_new_session=True
    )


@pytest.mark.slow
def test_the_driver_may_be_killed_or_interrupted_and_the_run_goes_on(address, folder, whole, tmp_path):
    path = tmp_path / "s"
    for how, more in ((signal.SIGKILL, ()), (signal.SIGINT, ("--resume",))):
        before = len(list((path / "commits").glob("0*.json")) if path.exists() else [])
        driver = command(folder, path, "--ray", address, "--workers", 1, *more)
        while len(list((path / "commits").glob("0*.json")) if path.exists() else []) < before + 3:
            assert driver.poll() is None, driver.stderr.read()
            time.sleep(0.002)
        driver.send_signal(how)
        said = driver.communicate()[1]
        assert driver.returncode == {signal.SIGKILL: -signal.SIGKILL, signal.SIGINT: 130}[how], said
        assert not rp.ActivationStore.open(path).complete
        time.sleep(5)  # Ray ends the workers of a driver that is gone
    kept = {p: p.stat().st_mtime_ns for p in (path / "commits").glob("0*.json")}
    extract_on_ray(folder / "model", prompts(N), to=path, resume=True, **OPTIONS)
    assert tree(path) == whole
    assert {p: p.stat().st_mtime_ns for p in kept} == kept


@pytest.mark.slow
def test_a_cluster_of_ones_own_ends_with_the_run_and_says_nothing(folder, whole, tmp_path):
    run = command(folder, tmp_path / "s", "--ray", "local", "--workers", 2)
    said = run.communicate(timeout=300)[1]
    assert run.returncode == 0, said
    assert said.splitlines() == [
        f"{tmp_path / 's'}: {rp.ActivationStore.open(tmp_path / 's').rows:,} rows at 4 sites, complete"
    ]
    assert tree(tmp_path / "s") == whole
    sessions = [
        p for p in Path("/proc").glob("[0-9]*/stat") if p.read_text().rsplit(")", 1)[1].split()[3] == str(run.pid)
    ]
    assert not sessions, "processes of the cluster are still there"


@pytest.mark.slow
def test_a_port_at_which_something_else_listens_is_no_cluster(folder, tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        run = command(folder, tmp_path / "s", "--ray", address)
        said = run.communicate(timeout=120)[1]
    assert run.returncode == 1
    assert f"ClusterFailed: no connection to a Ray cluster ({address})" in said
