"""Creating, resuming and replacing stores: nothing is mixed, and nothing of anybody else is touched."""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from folders import tree
from store import synthetic

from reprobe import provenance
from reprobe.errors import ArtifactExists, CorruptArtifact, IdentityMismatch, StoreLocked, UsageError
from reprobe.model.identity import ModelIdentity
from reprobe.model.sites import Site
from reprobe.store import ActivationStore, StoredSite, verify, writer


def test_arrays_and_tensors_are_written_alike(folder: Path) -> None:
    synthetic.fill(synthetic.create(folder / "a", dtype="float16"))
    with synthetic.create(folder / "b", dtype="float16") as other:
        for shard in other.shards:
            values = synthetic.shard_values(other, shard)
            other.write_shard(shard.number, {s: v.T.contiguous().T.numpy() for s, v in values.items()})
    assert tree(folder / "a") == tree(folder / "b")


def test_a_resumed_store_lacks_what_was_not_written_and_ends_like_an_uninterrupted_one(folder: Path) -> None:
    synthetic.fill(synthetic.create(folder / "whole"))
    synthetic.fill(synthetic.create(folder / "s"), shards=1)
    with synthetic.create(folder / "s", resume=True) as resumed:
        assert [s.number for s in resumed.missing()] == [1, 2, 3]
        resumed.write_shard(2, synthetic.shard_values(resumed, resumed.shards[2]))
        assert [s.number for s in resumed.missing()] == [1, 3]
    synthetic.fill(synthetic.create(folder / "s", resume=True))
    assert tree(folder / "s") == tree(folder / "whole")
    with synthetic.create(folder / "s", resume=True) as done:
        assert done.complete
    assert tree(folder / "s") == tree(folder / "whole")


@pytest.mark.parametrize("flag", ["resume", "overwrite"])
def test_a_store_that_is_not_there_is_simply_begun(folder: Path, flag: str) -> None:
    synthetic.fill(synthetic.create(folder / "deep" / "s", **{flag: True}))
    assert verify(folder / "deep" / "s").ok


def test_an_existing_store_is_refused_and_the_message_names_both_ways_on(folder: Path) -> None:
    synthetic.fill(synthetic.create(folder / "s"))
    before = tree(folder / "s")
    with pytest.raises(ArtifactExists, match=r"--resume.*--overwrite"):
        synthetic.create(folder / "s")
    assert tree(folder / "s") == before
    with pytest.raises(UsageError, match="exclude each other"):
        synthetic.create(folder / "s", resume=True, overwrite=True)


def test_overwriting_replaces_all_of_a_store_also_a_damaged_one(folder: Path) -> None:
    synthetic.fill(synthetic.create(folder / "new"))
    synthetic.fill(synthetic.create(folder / "s", rows=60, dtype="float32"))
    manifest = folder / "s" / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:-40])
    synthetic.fill(synthetic.create(folder / "s", overwrite=True))
    assert tree(folder / "s") == tree(folder / "new")


def _identity(**changes: Any) -> ModelIdentity:
    return ModelIdentity(**(synthetic.IDENTITY.to_json() | changes))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"identity": _identity(weights="v" * 64)}, "identity.weights"),
        ({"identity": _identity(template="c" * 64)}, "identity.template"),
        ({"identity": _identity(revision="other")}, "identity.revision"),
        ({"prompts": "e" * 64}, "prompts"),
        ({"plan": {"positions": "mean", "budget": 512}}, "plan.positions"),
        ({"plan": {"positions": "last", "budget": 512, "more": 1}}, "plan.more"),
        ({"sites": synthetic.SITES[:2]}, "sites.final"),
        ({"sites": synthetic.SITES[::-1]}, "sites (order)"),
        ({"dtype": "float16"}, "dtype"),
        ({"rows": 24}, "rows"),
        ({"index": synthetic.index().with_columns(label=pl.lit(True))}, "files.index.parquet"),
        ({"shard_rows": 9}, "shard_rows"),
        ({"chunk_rows": 2}, "chunk_rows"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_store_begun_with_anything_else_is_not_resumed_and_the_field_is_named(
    folder: Path, changes: dict[str, Any], field: str
) -> None:
    synthetic.fill(synthetic.create(folder / "s"), shards=2)
    before = tree(folder / "s")
    with pytest.raises(IdentityMismatch) as caught:
        synthetic.create(folder / "s", resume=True, **changes)
    assert f"  {field}: " in str(caught.value)
    assert tree(folder / "s") == before


def test_a_store_begun_with_other_versions_is_not_resumed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synthetic.fill(synthetic.create(folder / "s"), shards=2)
    monkeypatch.setattr(writer, "versions", lambda: provenance.versions() | {"torch": "0.1"})
    with pytest.raises(IdentityMismatch, match=r"versions\.torch: .* there, 0\.1 now"):
        synthetic.create(folder / "s", resume=True)


def test_resuming_a_store_whose_manifest_is_damaged_says_how_to_go_on(folder: Path) -> None:
    synthetic.fill(synthetic.create(folder / "s"), shards=2)
    manifest = folder / "s" / "manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(b"512", b"513"))
    with pytest.raises(CorruptArtifact, match="--overwrite"):
        synthetic.create(folder / "s", resume=True)


def test_resuming_makes_good_what_was_damaged_outside_whole_shards(folder: Path) -> None:
    synthetic.fill(synthetic.create(folder / "s"))
    whole = tree(folder / "s")
    (folder / "s" / "index.parquet").unlink()
    (folder / "s" / "activations.zarr" / "final" / "zarr.json").write_text("{}")
    (folder / "s" / "commits" / "00001.json").write_text("{}")
    (folder / "s" / "activations.zarr" / "final" / "c.2.0").unlink()
    (folder / "s" / "activations.zarr" / "final" / ".c.3.0.0a1b2c3d.tmp").write_text("half")
    with synthetic.create(folder / "s", resume=True) as resumed:
        assert [s.number for s in resumed.missing()] == [1, 2]
    synthetic.fill(synthetic.create(folder / "s", resume=True))
    assert tree(folder / "s") == whole


# ---- what is not ours


def _a_file(path: Path) -> None:
    path.write_text("mine")


def _a_folder_of_files(path: Path) -> None:
    path.mkdir()
    (path / "notes.txt").write_text("mine")


def _a_web_application(path: Path) -> None:
    path.mkdir()
    (path / "manifest.json").write_text('{"name": "mine"}')


def _a_table(path: Path) -> None:
    path.mkdir()
    (path / "index.parquet").write_text("mine")


def _somebody_elses_lock(path: Path) -> None:
    path.mkdir()
    (path / ".lock").write_text("mine")
    (path / "index.parquet").write_text("mine")


def _a_store_with_notes(path: Path) -> None:
    synthetic.fill(synthetic.create(path))
    (path / "notes.txt").write_text("mine")


def _a_store_with_notes_deep_inside(path: Path) -> None:
    synthetic.fill(synthetic.create(path))
    (path / "activations.zarr" / "final" / "mine").mkdir()


def _a_store_with_a_link(path: Path) -> None:
    synthetic.fill(synthetic.create(path))
    (path / "commits" / "00001.json").unlink()
    (path / "commits" / "00001.json").symlink_to(path / "manifest.json")


@pytest.mark.parametrize("flags", [{}, {"resume": True}, {"overwrite": True}], ids=str)
@pytest.mark.parametrize(
    "make",
    [
        _a_file,
        _a_folder_of_files,
        _a_web_application,
        _a_table,
        _somebody_elses_lock,
        _a_store_with_notes,
        _a_store_with_notes_deep_inside,
        _a_store_with_a_link,
    ],
)
def test_what_is_not_wholly_a_store_is_refused_and_not_touched(folder: Path, make: Any, flags: dict[str, bool]) -> None:
    make(folder / "s")
    before = tree(folder)
    with pytest.raises(ArtifactExists, match=r"choose another path|--overwrite"):
        synthetic.create(folder / "s", **flags)
    assert tree(folder) == before


@pytest.mark.parametrize("flag", ["resume", "overwrite"])
def test_an_empty_folder_can_be_used_when_asked_for(folder: Path, flag: str) -> None:
    (folder / "s").mkdir()
    with pytest.raises(ArtifactExists):
        synthetic.create(folder / "s")
    synthetic.fill(synthetic.create(folder / "s", **{flag: True}))
    assert verify(folder / "s").ok


# ---- one writer


@pytest.mark.parametrize("flag", ["resume", "overwrite"])
def test_a_second_writer_is_refused_while_the_first_lives(folder: Path, flag: str) -> None:
    with synthetic.create(folder / "s") as first:
        with pytest.raises(StoreLocked, match="another process"):
            synthetic.create(folder / "s", **{flag: True})
        first.write_shard(0, synthetic.shard_values(first, first.shards[0]))  # the refusal did no harm
    assert ".lock" not in tree(folder / "s")
    synthetic.create(folder / "s", **{flag: True}).close()


def test_an_error_in_the_body_of_with_gives_the_lock_back(folder: Path) -> None:
    with pytest.raises(KeyboardInterrupt), synthetic.create(folder / "s"):
        raise KeyboardInterrupt
    synthetic.fill(synthetic.create(folder / "s", resume=True))
    assert verify(folder / "s").ok


def test_a_closed_writer_writes_no_more(folder: Path) -> None:
    closed = synthetic.create(folder / "s")
    closed.close()
    closed.close()
    with pytest.raises(UsageError, match="closed"):
        closed.write_shard(0, synthetic.shard_values(closed, closed.shards[0]))


# ---- what a shard must be


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda v: v | {Site("final"): v[Site("final")][:-1]},
            r"'final' of shard 0: shape \(5, 35\), not \(6, 35\)",
        ),
        (lambda v: v | {Site("final"): v[Site("final")].float()}, "float32, but this store holds bfloat16"),
        (lambda v: v | {Site("final"): np.zeros((6, 35), np.float32)}, "float32"),
        (lambda v: v | {Site("embed"): v[Site("final")]}, "extra: embed"),
        (lambda v: {k: x for k, x in v.items() if k != Site("final")}, "missing: final"),
    ],
)
def test_a_shard_of_wrong_sites_shapes_or_dtype_is_refused_before_anything_is_written(
    folder: Path, change: Any, message: str
) -> None:
    with synthetic.create(folder / "s") as open_writer:
        before = tree(folder / "s")
        with pytest.raises(UsageError, match=message):
            open_writer.write_shard(0, change(synthetic.shard_values(open_writer, open_writer.shards[0])))
        assert tree(folder / "s") == before


def test_a_shard_is_written_once_and_only_if_there_is_one(folder: Path) -> None:
    with synthetic.create(folder / "s") as open_writer:
        values = synthetic.shard_values(open_writer, open_writer.shards[0])
        open_writer.write_shard(0, values)
        with pytest.raises(UsageError, match="committed already"):
            open_writer.write_shard(0, values)
        with pytest.raises(UsageError, match="shards 0–3"):
            open_writer.write_shard(4, values)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"index": synthetic.index().drop("token")}, "lacks the columns token"),
        ({"index": synthetic.index().head(0)}, "no rows"),
        ({"index": synthetic.index().reverse()}, "must count 0, 1, 2"),
        ({"index": synthetic.index().with_columns(row=pl.lit(None, pl.Int64))}, "must count"),
        ({"index": synthetic.index().with_columns(row=pl.col("row").cast(pl.Float64))}, "must count"),
        ({"dtype": "float64"}, "float64"),
        ({"shard_rows": 0}, "shard_rows is 0"),
        ({"sites": ()}, "no site"),
        ({"sites": (StoredSite(Site("mlp.out", 7), 3),)}, "blocks 0–2"),
        ({"plan": {"x": object()}}, "plain JSON"),
    ],
    ids=range(10),
)
def test_arguments_that_cannot_be_are_refused_and_leave_nothing(
    folder: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        synthetic.create(folder / "s", **changes)
    assert not list(folder.iterdir())


def test_values_on_a_graph_or_not_contiguous_are_written_as_they_are(folder: Path) -> None:
    site = Site("embed")
    values = torch.arange(12.0, requires_grad=True).reshape(3, 4).T
    with synthetic.create(folder / "s", rows=4, sites=(StoredSite(site, 3),), dtype="float32") as open_writer:
        open_writer.write_shard(0, {site: values})
    assert torch.equal(ActivationStore.open(folder / "s").read(site), values.detach())
