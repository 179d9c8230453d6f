"""Manifests and commit records notice every changed byte, and say what differs."""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from store import synthetic

from reprobe.errors import CorruptArtifact, SchemaMismatch, UnknownSite, UsageError
from reprobe.model.sites import Site
from reprobe.store import ActivationStore, Grid, Manifest, StoredSite
from reprobe.store.commit import Commit
from reprobe.store.manifest import SCHEMA
from reprobe.store.sealed import seal, unseal

MANIFEST = Manifest(
    identity=synthetic.IDENTITY,
    prompts="d" * 64,
    plan={"budget": 512, "names": ("a", "b"), "ü": None},
    sites=synthetic.SITES,
    dtype="float16",
    grid=Grid(23, 6, 3),
    format="hdf5",
    compression="zstd",
    files={"index.parquet": "0" * 64},
    versions={"python": "3"},
)

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def changed(**fields: Any) -> bytes:
    """The manifest's bytes with fields changed by someone who also sealed it again."""
    return seal(MANIFEST.to_json() | fields)


def test_a_manifest_is_read_as_it_was_written() -> None:
    back = Manifest.from_bytes(MANIFEST.to_bytes(), "m")
    assert back == MANIFEST
    assert back.to_bytes() == MANIFEST.to_bytes()
    assert back.units == {"attn.heads": 5}
    assert back.n_layers == 3


@settings(deadline=None, max_examples=25)
@given(st.dictionaries(st.text().filter(lambda k: k != "digest"), plain, max_size=4))
def test_any_plain_json_can_be_sealed_and_comes_back(body: dict[str, Any]) -> None:
    assert unseal(seal(body), "x") == body


def test_every_changed_lost_or_added_byte_of_a_manifest_is_noticed() -> None:
    data = MANIFEST.to_bytes()
    for i in range(len(data)):
        for mutant in (
            data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :],
            data[:i] + bytes([data[i] ^ 0x80]) + data[i + 1 :],
            data[:i] + data[i + 1 :],
            data[:i] + b" " + data[i:],
            data[:i],
        ):
            with pytest.raises(CorruptArtifact):
                Manifest.from_bytes(mutant, "m")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"{}",
        b"null",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"name": "a web application", "icons": []}',
        seal({"kind": "reprobe.store"}),
        changed(schema="2"),
        changed(schema=True),
        changed(schema=0),
        changed(rows="many"),
        changed(rows=True),
        changed(sites=[{"site": "nonsense@1", "width": 3, "unit_width": None}]),
        changed(sites=[]),
        changed(sites="none"),
        changed(dtype="float64"),
        changed(dtype=["float16"]),
        changed(identity={}),
        changed(identity=None),
        changed(files="x"),
        changed(plan="x"),
        changed(plan_digest="0" * 64),
        changed(units={"attn.heads": 4}),
        changed(n_layers=4),
        changed(shard_rows=7),
        changed(format="npy"),
        changed(format=None),
        changed(compression="gzip"),
        changed(more="fields"),
    ],
    ids=range(30),
)
def test_a_foreign_or_forged_manifest_is_corrupt_and_never_a_traceback(data: bytes) -> None:
    with pytest.raises(CorruptArtifact):
        Manifest.from_bytes(data, "m")


@pytest.mark.parametrize(("schema", "says"), [(SCHEMA + 1, "a newer reprobe"), (SCHEMA - 1, "an older reprobe")])
def test_a_manifest_of_another_version_says_both_and_what_to_do(schema: int, says: str) -> None:
    with pytest.raises(SchemaMismatch, match=says) as caught:
        Manifest.from_bytes(changed(schema=schema, fields="that this version does not know"), "m")
    told = str(caught.value)
    assert f"it has schema version {schema}" in told
    assert f"reprobe {version('reprobe-lm')} reads version {SCHEMA}" in told
    assert ("Upgrade" in told) == (schema > SCHEMA)
    assert ("the version that wrote it" in told) == (schema < SCHEMA)


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"sites": ()}, UsageError),
        ({"sites": (synthetic.SITES[0],) * 2}, UsageError),
        ({"sites": (StoredSite(Site("mlp.out", 3), 35),)}, UnknownSite),
        ({"sites": (StoredSite(Site("attn.heads", 0), 35, 5), synthetic.SITES[1])}, UsageError),
        ({"dtype": "float64"}, UsageError),
        ({"plan": {"a": {1, 2}}}, UsageError),
        ({"plan": {"a": float("nan")}}, UsageError),
    ],
    ids=range(7),
)
def test_a_manifest_that_cannot_be_is_refused(fields: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        Manifest(**({f: getattr(MANIFEST, f) for f in MANIFEST.__dataclass_fields__} | fields))


@pytest.mark.parametrize(
    ("site", "width", "unit_width"),
    [
        (Site("attn.heads", 1, 2), 7, 7),
        (Site("attn.heads", 1), 35, None),
        (Site("attn.heads", 1), 35, 6),
        (Site("resid.post", 1), 35, 5),
        (Site("resid.post", 1), 0, None),
    ],
)
def test_a_stored_site_is_whole_and_made_of_whole_units(site: Site, width: int, unit_width: int | None) -> None:
    with pytest.raises(UsageError, match=str(site.whole)):
        StoredSite(site, width, unit_width)


def test_every_changed_byte_of_a_commit_record_is_noticed(folder: Path) -> None:
    synthetic.fill(synthetic.create(folder / "s.reprobe"))
    store = ActivationStore.open(folder / "s.reprobe")
    path = store.path / "commits" / "00001.json"
    data = path.read_bytes()
    for i in range(len(data)):
        path.write_bytes(data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :])
        with pytest.raises(CorruptArtifact):
            Commit.read(store.place, store.manifest, 1)


@pytest.mark.parametrize("change", ["another shard", "another store", "a file less", "not a record"])
def test_a_commit_record_counts_in_its_own_place_only(folder: Path, change: str) -> None:
    synthetic.fill(synthetic.create(folder / "s.reprobe"))
    store = ActivationStore.open(folder / "s.reprobe")
    path = store.path / "commits" / "00001.json"
    if change == "another shard":
        path.write_bytes((store.path / "commits" / "00002.json").read_bytes())
    elif change == "another store":
        synthetic.fill(synthetic.create(folder / "t.reprobe", plan={"another": "plan"}))
        path.write_bytes((folder / "t.reprobe" / "commits" / "00001.json").read_bytes())
    else:
        body = json.loads(path.read_bytes())
        del body["digest"]
        files = {k: v for k, v in body["files"].items() if "final" not in k}
        body["files"] = files if "less" in change else {"final": 3}
        path.write_bytes(seal(body))
    with pytest.raises(CorruptArtifact, match="00001"):
        store.read("final")
