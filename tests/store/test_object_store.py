"""A store on an object store: the objects are the files of a local one, put in an order that survives kills."""

import itertools
import json
import logging
import pickle
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import obstore
import pytest
import torch
from cli.calling import called
from folders import tree
from moto.server import ThreadedMotoServer
from obstore.store import from_url
from store import synthetic
from store.synthetic import raw
from torch.utils.data import DataLoader

from reprobe.errors import (
    ArtifactExists,
    ArtifactMissing,
    CorruptArtifact,
    IdentityMismatch,
    IncompleteStore,
    StoreLocked,
    StoreUnreachable,
    UsageError,
)
from reprobe.model.sites import Site
from reprobe.store import ActivationStore, verify
from reprobe.store import writer as writing
from reprobe.store.locks import LOCK_TEXT
from reprobe.store.object_store import ObjectStore
from reprobe.store.places import place_of

FINAL = Site("final")
FORMS = pytest.mark.parametrize("form", synthetic.FORMATS)
_CLOSED = "http://127.0.0.1:9"  # a port on which nobody answers


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(autouse=True)
def _environment(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ALLOW_HTTP": "true",
        "NO_PROXY": "127.0.0.1",
    }.items():
        monkeypatch.setenv(name, value)


_numbers = itertools.count()


@pytest.fixture
def url(endpoint: str) -> str:
    """A prefix in a bucket of the test's own."""
    bucket = f"bucket-{next(_numbers)}"
    urllib.request.urlopen(urllib.request.Request(f"{endpoint}/{bucket}", method="PUT")).close()
    return f"s3://{bucket}/some/cities.reprobe"


def _client(url: str) -> Any:
    return from_url(url, client_options={"allow_http": True})


def objects(url: str) -> dict[str, bytes]:
    client = _client(url)
    names = [entry["path"] for batch in obstore.list(client) for entry in batch]
    return {name: bytes(obstore.get(client, name).bytes()) for name in sorted(names)}


@FORMS
@pytest.mark.parametrize("compression", [None, "zstd"])
def test_the_objects_are_the_files_of_a_local_store_and_read_the_same(
    url: str, folder: Path, form: str, compression: str | None
) -> None:
    changes = {"format": form, "compression": compression}
    synthetic.fill(synthetic.create(folder / "s", **changes))
    synthetic.fill(synthetic.create(url, **changes))
    assert objects(url) == tree(folder / "s")
    local, remote = ActivationStore.open(folder / "s"), ActivationStore.open(url)
    assert verify(url).ok
    assert (remote.path, remote.name) == (url, "cities.reprobe")
    assert remote.info().bytes_on_disk == local.info().bytes_on_disk
    for site in local.sites:
        assert torch.equal(raw(remote.read(site)), raw(local.read(site)))
        assert torch.equal(raw(remote.read(site, [22, 0, 7, 0])), raw(local.read(site, [22, 0, 7, 0])))
    for mine, theirs in zip(remote.iter(FINAL, shuffle=1), local.iter(FINAL, shuffle=1), strict=True):
        assert torch.equal(raw(mine.values), raw(theirs.values))
    assert remote.index.equals(local.index)
    assert remote.tokens.equals(local.tokens)


@FORMS
def test_a_writer_that_was_abandoned_at_any_put_is_resumed_to_the_same_objects(
    url: str, folder: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    synthetic.fill(synthetic.create(folder / "s", format=form))
    whole = tree(folder / "s")

    class Died(Exception):
        pass

    put, left = obstore.put, 0

    def dying(*args: Any, **kwargs: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise Died
        return put(*args, **kwargs)

    monkeypatch.setattr(obstore, "put", dying)
    deaths = 0
    while True:
        left = 1 + 2 * deaths
        try:
            synthetic.fill(synthetic.create(url, format=form, resume=True))
            break
        except Died:
            deaths += 1
            if "manifest.json" in objects(url):
                left_over = [p for p in verify(url).problems if "no commit record" not in p]
                assert left_over == []
        assert deaths < 20
    assert deaths >= 3
    assert objects(url) == whole


@FORMS
def test_a_record_is_the_last_object_of_its_shard_and_the_manifest_the_last_of_the_beginning(
    url: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, order = obstore.put, []

    def noted(store: Any, name: str, data: Any, **kwargs: Any) -> Any:
        order.append(name)
        return put(store, name, data, **kwargs)

    monkeypatch.setattr(obstore, "put", noted)
    writer = synthetic.create(url, format=form)
    assert order[0] == ".lock"  # says whose the rest is, until there is a manifest
    assert order[-1] == "manifest.json"
    assert ".lock" not in objects(url)
    order.clear()
    with writer:
        writer.write_shard(2, synthetic.shard_values(writer, writer.shards[2]))
    assert order[-1] == "commits/00002.json"
    assert [name for name in order if "commits" in name] == order[-1:]


@FORMS
def test_of_two_writers_of_a_shard_the_second_is_refused_and_nothing_is_harmed(
    url: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with synthetic.create(url, format=form) as first, synthetic.create(url, format=form, resume=True) as second:
        values = synthetic.shard_values(first, first.shards[0])
        first.write_shard(0, values)
        before = objects(url)
        with pytest.raises(StoreLocked, match="committed by another writer in the meantime"):
            second.write_shard(0, values)
        # also if both looked at the same moment: the record is put only if there is none
        with monkeypatch.context() as patch:
            patch.setattr(ObjectStore, "size", lambda *_: None)
            with pytest.raises(StoreLocked):
                second.write_shard(0, values)
        assert objects(url) == before
        assert [s.number for s in second.missing()] == [1, 2, 3]


def test_writers_of_different_shards_join_and_write_the_bytes_of_one(url: str, folder: Path) -> None:
    synthetic.fill(synthetic.create(folder / "s"))
    with synthetic.create(url, own=range(2)) as first, synthetic.create(url, own=range(2, 4)) as second:
        for writer in (second, first):
            for shard in writer.missing():
                writer.write_shard(shard.number, synthetic.shard_values(writer, shard))
    assert objects(url) == tree(folder / "s")


def test_a_writer_that_begins_while_another_begins_and_writes_removes_nothing_of_it(
    url: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The slow one looked when nothing was there; the fast one has begun and written before it goes on."""
    begin, late = writing._begin_unlocked, []

    def slow(*args: Any, **kwargs: Any) -> None:
        if not late:
            late.append(True)
            synthetic.fill(synthetic.create(url, own=range(2, 4)))
        begin(*args, **kwargs)

    monkeypatch.setattr(writing, "_begin_unlocked", slow)
    synthetic.fill(synthetic.create(url, own=range(2)))
    synthetic.fill(synthetic.create(folder / "s"))
    assert objects(url) == tree(folder / "s")


def test_a_writer_of_another_store_that_begins_at_the_same_moment_harms_nothing(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin, late = writing._begin_unlocked, []

    def slow(*args: Any, **kwargs: Any) -> None:
        if not late:
            late.append(True)
            synthetic.fill(synthetic.create(url))
        begin(*args, **kwargs)

    monkeypatch.setattr(writing, "_begin_unlocked", slow)
    with pytest.raises(IdentityMismatch):
        synthetic.create(url, rows=40)
    assert verify(url).ok
    assert ".lock" not in objects(url)


def test_what_a_killed_beginning_of_another_store_left_is_not_mixed_in(url: str, folder: Path) -> None:
    synthetic.fill(synthetic.create(url, rows=40))
    obstore.delete(_client(url), "manifest.json")  # as an overwriting that was killed leaves it
    obstore.put(_client(url), ".lock", LOCK_TEXT)
    with pytest.raises(ArtifactExists, match="was left by a writer that was killed"):
        synthetic.create(url, own=range(2))
    synthetic.fill(synthetic.create(url, resume=True))
    synthetic.fill(synthetic.create(folder / "s"))
    assert objects(url) == tree(folder / "s")


def test_a_store_that_is_there_is_not_mixed_with_another(url: str) -> None:
    synthetic.fill(synthetic.create(url), shards=1)
    before = objects(url)
    with pytest.raises(ArtifactExists, match="--resume"):
        synthetic.create(url)
    for flags in ({"resume": True}, {"own": range(2)}):
        with pytest.raises(IdentityMismatch, match=r"plan\.budget"):
            synthetic.create(url, plan={"positions": "last", "budget": 1}, **flags)
    assert objects(url) == before
    with pytest.raises(IncompleteStore):
        ActivationStore.open(url).read(FINAL)


def test_overwriting_leaves_nothing_of_the_old_store(url: str, folder: Path) -> None:
    synthetic.fill(synthetic.create(url, rows=40, format="hdf5"))
    synthetic.fill(synthetic.create(url, overwrite=True))
    synthetic.fill(synthetic.create(folder / "s"))
    assert objects(url) == tree(folder / "s")


@pytest.mark.parametrize("flags", [{}, {"resume": True}, {"overwrite": True}, {"own": range(2)}], ids=str)
@pytest.mark.parametrize("name", ["notes.txt", "index.parquet"])
def test_objects_of_somebody_else_are_not_touched(url: str, name: str, flags: dict[str, Any]) -> None:
    obstore.put(_client(url), name, b"mine")
    with pytest.raises(ArtifactExists, match="choose another path"):
        synthetic.create(url, **flags)
    assert objects(url) == {name: b"mine"}


@FORMS
def test_a_changed_object_is_found_and_a_lost_one_is_not_read_as_zeros(url: str, form: str) -> None:
    synthetic.fill(synthetic.create(url, format=form))
    client = _client(url)
    for name, data in objects(url).items():
        obstore.put(client, name, data[: len(data) // 2] + b"\xa5" + data[len(data) // 2 + 1 :])
        problems = verify(url).problems
        obstore.put(client, name, data)
        assert [p for p in problems if name in p]
    name = next(n for n in objects(url) if "c.1.0" in n or "00001.h5" in n)
    obstore.delete(client, name)
    site = "attn.heads@1"
    assert ActivationStore.open(url).read(site, [0]).shape == (1, 35)
    with pytest.raises(CorruptArtifact, match="is missing"):
        ActivationStore.open(url).read(site)
    assert any("is missing" in p for p in verify(url).problems)


def test_a_store_goes_to_another_process_by_its_url(url: str) -> None:
    synthetic.fill(synthetic.create(url))
    store = ActivationStore.open(url)
    store.read(FINAL, [0])
    again = pickle.loads(pickle.dumps(store.place))
    assert again.read("manifest.json") == store.place.read("manifest.json")


# ---- what is in the way


def test_a_missing_store_and_a_missing_bucket_are_told_apart(url: str) -> None:
    with pytest.raises(ArtifactMissing, match="there is no store at s3://"):
        ActivationStore.open(url)
    with pytest.raises(ArtifactMissing):
        verify(url)
    nowhere = "s3://no-such-bucket-here/x.reprobe"
    for attempt in (ActivationStore.open, verify, synthetic.create):
        with pytest.raises(StoreUnreachable, match="there is no such bucket") as caught:
            attempt(nowhere)
        assert "Debug source" not in str(caught.value)


def test_without_credentials_the_error_says_what_to_set_and_comes_soon(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", _CLOSED)
    start = time.monotonic()
    with pytest.raises(StoreUnreachable, match=r"there are no credentials\. Set AWS_ACCESS_KEY_ID"):
        synthetic.create(url)
    assert time.monotonic() - start < 20


def test_an_endpoint_that_does_not_answer_or_is_not_allowed_is_named(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", _CLOSED)
    with pytest.raises(StoreUnreachable, match="AWS_ENDPOINT_URL"):
        ActivationStore.open(url)
    monkeypatch.delenv("AWS_ALLOW_HTTP")
    with pytest.raises(StoreUnreachable, match="AWS_ALLOW_HTTP"):
        ActivationStore.open(url)


def test_refused_access_is_said_without_a_traceback_of_the_library(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: Any, **kwargs: Any) -> Any:
        raise obstore.exceptions.PermissionDeniedError("403 Forbidden\n\nDebug source:\nlong")

    monkeypatch.setattr(obstore, "list", refused)
    with pytest.raises(StoreUnreachable, match=r"access is refused \(403 Forbidden\)"):
        synthetic.create(url)


@FORMS
def test_a_connection_that_is_lost_while_reading_is_not_taken_for_damage(
    url: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    synthetic.fill(synthetic.create(url, format=form))
    store = ActivationStore.open(url)
    store.read(FINAL, [0])

    def lost(*args: Any, **kwargs: Any) -> Any:
        raise obstore.exceptions.GenericError("connection reset")

    for name in ("get", "get_async", "get_range", "get_range_async"):
        monkeypatch.setattr(obstore, name, lost)
    with pytest.raises(StoreUnreachable, match="connection reset"):
        store.read(FINAL, [1])


@pytest.mark.parametrize("path", ["ftp://host/x", "http://host/x", "memory://x"])
def test_a_kind_of_url_that_no_store_can_have_is_refused(path: str) -> None:
    with pytest.raises(UsageError, match="s3, gs, az"):
        ActivationStore.open(path)


def test_a_path_object_that_lost_its_slash_is_not_taken_for_a_folder() -> None:
    with pytest.raises(UsageError, match="as text"):
        place_of(Path("s3://bucket/x"))


def test_the_command_line_takes_urls(url: str) -> None:
    synthetic.fill(synthetic.create(url, format="hdf5"))
    assert json.loads(called("info", url, "--json").stdout)["path"] == url
    called("verify", url)
    called("info", url + "x", code=2)


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])  # imports torch again
def test_workers_of_a_data_loader_must_be_spawned_because_the_client_does_not_survive_a_fork(
    url: str, context: str
) -> None:
    synthetic.fill(synthetic.create(url))
    data = ActivationStore.open(url).to_torch(FINAL, batch_rows=4, shuffle=1)
    loader = DataLoader(data, batch_size=None, num_workers=2, multiprocessing_context=context, timeout=60)
    if context == "fork":
        with pytest.raises(UsageError, match="multiprocessing_context='spawn'"):
            list(loader)
    else:
        assert sorted(int(r) for batch in loader for r in batch["row"]) == list(range(synthetic.ROWS))
