"""What was written is read, bit for bit, whatever rows are asked for."""

import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
import zarr
from folders import scratch, tree
from polars.testing import assert_frame_equal
from store import synthetic
from store.synthetic import raw

from reprobe.errors import ArtifactMissing, CorruptArtifact, IncompleteStore, UnknownSite, UsageError
from reprobe.model.sites import Site, expand
from reprobe.store import ActivationStore, StoredSite
from reprobe.store.zarr_backend import shard_file

ROWS = synthetic.ROWS
FINAL = Site("final")


@pytest.fixture(scope="module")
def store() -> Iterator[ActivationStore]:
    with scratch() as name:
        synthetic.fill(synthetic.create(Path(name) / "s.reprobe"))
        yield ActivationStore.open(Path(name) / "s.reprobe")


@pytest.fixture(scope="module")
def partial() -> Iterator[ActivationStore]:
    """A store of which the first two of four shards are written."""
    with scratch() as name:
        synthetic.fill(synthetic.create(Path(name) / "s.reprobe"), shards=2)
        yield ActivationStore.open(Path(name) / "s.reprobe")


def written(site: Site, rows: Any, dtype: str = "bfloat16") -> torch.Tensor:
    """The bits that were written, rows chosen by numpy."""
    return torch.from_numpy(synthetic.bits(site, 0, ROWS, 35, dtype).numpy()[rows].copy())


@pytest.mark.parametrize(
    "rows",
    [
        None,
        slice(2, 17),
        slice(None, None, 3),
        slice(None, None, -1),
        slice(-4, None),
        slice(9, 9),
        [22, 0, 0, 7, 22],
        [],
        np.arange(ROWS)[::-1],
        np.array([5, 1], dtype=np.uint8),
        np.arange(ROWS) % 4 == 1,
        [True, False] * 11 + [True],
        torch.tensor([3, 3, 1]),
    ],
    ids=str,
)
def test_rows_are_chosen_as_numpy_chooses_them(store: ActivationStore, rows: Any) -> None:
    chosen = slice(None) if rows is None else rows if isinstance(rows, slice) else np.asarray(rows)
    if isinstance(chosen, np.ndarray) and not chosen.size:
        chosen = chosen.astype(int)
    assert torch.equal(raw(store.read("final", rows)), written(FINAL, chosen))


def test_rows_are_chosen_by_columns_of_the_index(store: ActivationStore) -> None:
    mask = store.index["label"]
    assert torch.equal(raw(store.read(FINAL, mask)), written(FINAL, np.arange(ROWS) % 3 == 0))
    numbers = store.index.filter(pl.col("group") == "g1")["row"]
    assert torch.equal(raw(store.read(FINAL, numbers)), written(FINAL, slice(4, 8)))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([0, ROWS], f"there is no row {ROWS}: this store has rows 0–{ROWS - 1}"),
        ([-1], "there is no row -1"),
        (np.array([2**63], dtype=np.uint64), "there is no row"),
        ([True] * (ROWS - 1), f"mask of {ROWS - 1} values"),
        ([0.0, 1.0], "float64"),
        (["0"], "integers"),
        ("0", "slice, a list"),
        (3, "slice, a list"),
        ([[1, 2]], r"shape \(1, 2\)"),
        (slice("a", None), "not a slice of row numbers"),
        (pl.Series([True, None]), "nulls"),
    ],
    ids=str,
)
def test_rows_that_cannot_be_are_refused(store: ActivationStore, rows: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        store.read("final", rows)


def test_the_index_and_the_manifest_come_back_as_given(store: ActivationStore) -> None:
    assert_frame_equal(store.index, synthetic.index())
    assert store.identity == synthetic.IDENTITY
    assert store.manifest.plan == {"positions": "last", "budget": 512}
    assert (store.rows, store.complete, store.sites) == (ROWS, True, tuple(s.site for s in synthetic.SITES))


def test_one_head_is_a_slice_of_all_heads(store: ActivationStore) -> None:
    heads = store.read("attn.heads@1")
    assert (store.width("attn.heads@1"), store.width("attn.heads@1.4")) == (35, 7)
    for head in range(5):
        assert torch.equal(raw(store.read(Site("attn.heads", 1, head))), raw(heads[:, 7 * head : 7 * head + 7]))
    assert torch.equal(raw(store.read("attn.heads@1.4", [9, 2])), raw(heads[[9, 2], 28:]))


def test_patterns_expand_to_what_is_stored(store: ActivationStore) -> None:
    parts = store.parts
    assert expand("resid.post@*", parts) == (Site("resid.post", 2),)
    assert [str(s) for s in expand("attn.heads@*.*", parts)] == [f"attn.heads@1.{h}" for h in range(5)]
    with pytest.raises(UnknownSite, match="not stored"):
        expand("attn.heads@2", parts)


@pytest.mark.parametrize("site", ["resid.post@1", "embed", "attn.heads@1.5", "mlp.neurons@1.0"])
def test_a_site_that_is_not_stored_is_unknown_and_what_is_stored_is_listed(store: ActivationStore, site: str) -> None:
    with pytest.raises(UnknownSite, match=r"it has resid.post@2|units 0–4"):
        store.read(site)
    with pytest.raises(UnknownSite):
        store.width(site)


def test_reading_a_few_rows_reads_little_of_the_file(folder: Path) -> None:
    io = Path("/proc/self/io")
    if not io.exists():
        pytest.skip("no /proc/self/io here")
    writer = synthetic.create(
        folder / "s.reprobe", rows=4096, sites=(StoredSite(FINAL, 64),), shard_rows=4096, chunk_rows=64
    )
    with writer:
        writer.write_shard(0, {FINAL: torch.zeros(4096, 64, dtype=torch.bfloat16)})
    store = ActivationStore.open(folder / "s.reprobe")
    store.read(FINAL, [0])  # open what has to be opened

    def bytes_read() -> int:
        return int(io.read_text().split()[1])

    before = bytes_read()
    store.read(FINAL, [3000, 17, 3001])
    assert bytes_read() - before < 6 * 64 * 64 * 2  # two chunks and the shard's index; the file holds 64


@pytest.mark.parametrize("damage", ["missing", "short"])
def test_a_shard_file_that_is_gone_or_short_is_not_read_as_zeros(folder: Path, damage: str) -> None:
    synthetic.fill(synthetic.create(folder / "s.reprobe"))
    path = folder / "s.reprobe" / shard_file(FINAL, 1)
    path.unlink() if damage == "missing" else path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorruptArtifact, match=damage if damage == "missing" else "bytes were committed"):
        ActivationStore.open(folder / "s.reprobe").read(FINAL)


def test_an_index_or_array_description_that_was_changed_is_not_used(folder: Path) -> None:
    synthetic.fill(synthetic.create(folder / "s.reprobe"))
    synthetic.index().reverse().write_parquet(folder / "s.reprobe" / "index.parquet")
    description = folder / "s.reprobe" / "activations.zarr" / "final" / "zarr.json"
    description.write_text(description.read_text().replace("uint16", "int16"))
    store = ActivationStore.open(folder / "s.reprobe")
    with pytest.raises(CorruptArtifact, match=r"index\.parquet"):
        _ = store.index
    with pytest.raises(CorruptArtifact, match=r"zarr\.json"):
        store.read(FINAL)


def test_plain_zarr_reads_the_same_bits_and_finds_the_dtype(store: ActivationStore) -> None:
    group = zarr.open_group(store.path / "activations.zarr", mode="r")
    array = group["resid.post-2"]
    assert array.attrs.asdict() == {"site": "resid.post@2", "dtype": "bfloat16"}
    assert torch.equal(
        torch.from_numpy(np.asarray(array[:])).view(torch.int16), written(Site("resid.post", 2), slice(None))
    )


# ---- incomplete stores


def test_rows_of_committed_shards_are_read_from_an_incomplete_store(partial: ActivationStore) -> None:
    assert not partial.complete
    assert torch.equal(raw(partial.read("final", slice(0, 12))), written(FINAL, slice(0, 12)))


@pytest.mark.parametrize("rows", [None, [0, 12], slice(20, 21)], ids=str)
def test_rows_that_are_not_written_yet_are_never_read(partial: ActivationStore, rows: Any) -> None:
    with pytest.raises(IncompleteStore, match=r"--resume"):
        partial.read("final", rows)
    with pytest.raises(IncompleteStore):
        partial.iter("final")


def test_shard_files_without_a_commit_record_do_not_exist(folder: Path) -> None:
    synthetic.fill(synthetic.create(folder / "s.reprobe"))
    (folder / "s.reprobe" / "commits" / "00001.json").unlink()
    with pytest.raises(IncompleteStore, match="rows 6–11"):
        ActivationStore.open(folder / "s.reprobe").read(FINAL)


def test_info_tells_sizes_and_completeness(store: ActivationStore, partial: ActivationStore) -> None:
    whole, half = store.info(), partial.info()
    assert (whole.complete, whole.committed, whole.shards) == (True, 4, 4)
    assert (half.complete, half.committed, half.shards) == (False, 2, 4)
    assert whole.bytes_on_disk == sum(map(len, tree(store.path).values()))
    assert half.bytes_on_disk < whole.bytes_on_disk
    assert half.bytes_of_arrays_when_complete == whole.bytes_of_arrays_when_complete < whole.bytes_on_disk


@pytest.mark.parametrize("path", ["nothing.reprobe", "empty", "file"])
def test_opening_what_is_not_a_store_says_so(folder: Path, path: str) -> None:
    (folder / "empty").mkdir()
    (folder / "file").write_text("x")
    with pytest.raises(ArtifactMissing, match="store"):
        ActivationStore.open(folder / path)


# ---- batches


def test_batches_of_several_sites_share_their_rows(store: ActivationStore) -> None:
    sites = (Site("resid.post", 2), Site("attn.heads", 1, 3))
    for rows, values in store.iter(["resid.post@*", "attn.heads@1.3"], batch_rows=5, shuffle=2):
        assert tuple(values) == sites
        assert torch.equal(raw(values[sites[0]]), written(sites[0], rows))
        assert torch.equal(raw(values[sites[1]]), written(sites[1].whole, rows)[:, 21:28])


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"sites": "final", "batch_rows": 0}, UsageError),
        ({"sites": "final", "shuffle": True}, UsageError),
        ({"sites": "resid.post@0"}, UnknownSite),
        ({"sites": "resid.post@*"}, UnknownSite),
        ({"sites": ["embed"]}, UnknownSite),
    ],
    ids=str,
)
def test_batches_that_cannot_be_are_refused_before_the_first(
    store: ActivationStore, arguments: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        store.iter(**arguments)


@pytest.mark.parametrize("shuffle", [None, 3])
def test_memory_for_batches_does_not_grow_with_the_store(folder: Path, shuffle: int | None) -> None:
    site, peaks = StoredSite(Site("embed"), 64), []
    for shards in (3, 24):
        path = folder / f"{shards}.reprobe"
        with synthetic.create(path, rows=512 * shards, sites=(site,), shard_rows=512, chunk_rows=64) as writer:
            for shard in writer.missing():
                writer.write_shard(shard.number, {site.site: torch.zeros(512, 64, dtype=torch.bfloat16)})
        store = ActivationStore.open(path)
        store.read("embed", [0])  # open what has to be opened
        tracemalloc.start()
        for batch in store.iter("embed", batch_rows=100, shuffle=shuffle):
            assert batch.values.shape[1] == 64
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]
    assert peaks[1] < 16 * 512 * 64 * 2  # five of these small shards are mixed; the store has 24
