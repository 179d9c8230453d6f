"""Every wanted row once, whatever the order, the batch size, the shards and the number of readers."""

import copy
import pickle
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import polars as pl
import pytest
import torch
from folders import scratch
from hypothesis import given, settings
from hypothesis import strategies as st
from store import synthetic
from store.synthetic import raw
from torch.utils.data import DataLoader

from reprobe.errors import CorruptArtifact, IncompleteStore, UnknownSite, UsageError
from reprobe.model.sites import Site
from reprobe.store import ActivationStore, Grid, StoredSite, TorchBatches, order
from reprobe.store.rows import numbers
from reprobe.store.zarr_backend import shard_file

ROWS = 203
RESID, HEADS, FINAL = (s.site for s in synthetic.SITES)


@pytest.fixture(scope="module", params=synthetic.FORMATS)
def store(request: pytest.FixtureRequest) -> Iterator[ActivationStore]:
    """203 rows in shards of 24 and chunks of 8."""
    with scratch() as name:
        path = Path(name) / "s.reprobe"
        synthetic.fill(synthetic.create(path, rows=ROWS, shard_rows=24, chunk_rows=8, format=request.param))
        yield ActivationStore.open(path)


@pytest.fixture
def partial(folder: Path) -> ActivationStore:
    """A store of which the first two of four shards are written."""
    synthetic.fill(synthetic.create(folder / "s.reprobe"), shards=2)
    return ActivationStore.open(folder / "s.reprobe")


def wanted_of(data: st.DataObject) -> Any:
    return data.draw(
        st.none()
        | st.builds(slice, st.integers(0, ROWS), st.integers(0, ROWS))
        | st.lists(st.integers(0, ROWS - 1), max_size=80)
        | st.lists(st.integers(0, ROWS - 1), max_size=80, unique=True).map(sorted)
    )


# ---- where


@pytest.mark.parametrize(
    ("condition", "wanted"),
    [
        (pl.col("label"), [0, 3, 6, 9, 12, 15, 18, 21]),
        (pl.col("group") == "g1", [4, 5, 6, 7]),
        (pl.col("pair") == "q10", [10]),  # null in most rows
        (pl.col("pair") != "q10", [0, 5, 15, 20]),
        ((pl.col("position") == 0) & (pl.col("row") > 19), [20, 22]),
        (pl.col("row") < 0, []),
    ],
    ids=str,
)
def test_rows_are_found_by_what_the_index_says(folder: Path, condition: pl.Expr, wanted: list[int]) -> None:
    synthetic.fill(synthetic.create(folder / "s.reprobe"))
    small = ActivationStore.open(folder / "s.reprobe")
    found = small.where(condition)
    assert (found.dtype, found.tolist()) == (np.int64, wanted)
    assert torch.equal(raw(small.read(FINAL, found)), raw(small.read(FINAL)[wanted]))


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        (pl.col("labels") == 1, r"its columns: row \(UInt64\), prompt \(String\)"),
        (pl.col("n_tokens"), r"n_tokens \(Int32\), not one truth value"),
        (pl.col("label", "pair").is_null(), "not one truth value"),
        (pl.col("label").any(), f"1 values for {ROWS} rows"),
        (pl.col("label") == pl.col("prompt").str.to_integer(), "its columns"),
        (True, "not a polars expression"),
        ("label", "not a polars expression"),
    ],
    ids=str,
)
def test_conditions_that_cannot_be_are_refused(store: ActivationStore, condition: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        store.where(condition)


# ---- iter


@settings(deadline=None, max_examples=60)
@given(data=st.data(), batch_rows=st.integers(1, 300), seed=st.none() | st.integers(0, 2**40))
def test_an_epoch_has_each_wanted_row_as_often_as_asked_with_its_values(
    store: ActivationStore, data: st.DataObject, batch_rows: int, seed: int | None
) -> None:
    wanted = wanted_of(data)
    found = list(store.iter(FINAL, batch_rows=batch_rows, shuffle=seed, rows=wanted))
    in_order = np.arange(ROWS)[slice(None) if wanted is None else np.array(wanted, dtype=np.int64)
                               if isinstance(wanted, list) else wanted]  # fmt: skip
    assert [len(b.rows) for b in found[:-1]] == [batch_rows] * (len(found) - 1)
    epoch = np.concatenate([b.rows for b in found]) if found else np.empty(0, dtype=np.int64)
    if seed is None:
        assert epoch.tolist() == in_order.tolist()
    assert sorted(epoch) == sorted(in_order)
    for batch in found:
        assert torch.equal(raw(batch.values), raw(store.read(FINAL, batch.rows)))


@settings(deadline=None, max_examples=60)
@given(
    data=st.data(),
    n=st.integers(1, 500),
    chunk_rows=st.integers(1, 30),
    chunks=st.integers(1, 8),
    row_bytes=st.sampled_from([1, 2**16, 2**19, 2**22]),
    seed=st.none() | st.integers(0, 99),
    of=st.integers(1, 5),
    batch_rows=st.none() | st.integers(1, 50),
)
def test_parts_of_an_epoch_are_disjoint_and_equal_and_pieces_lie_in_bounds(
    data: st.DataObject,
    n: int,
    chunk_rows: int,
    chunks: int,
    row_bytes: int,
    seed: int | None,
    of: int,
    batch_rows: int | None,
) -> None:
    grid = Grid(n, chunk_rows * chunks, chunk_rows)
    wanted: Any = data.draw(
        st.just(range(n))
        | st.lists(st.integers(0, n - 1), max_size=300).map(lambda rows: np.array(rows, dtype=np.int64))
    )
    piece = order.piece_rows(grid, row_bytes)
    assert piece % chunk_rows == 0
    assert piece == chunk_rows or piece * row_bytes <= order.PIECE_BYTES
    parts = []
    for number in range(of):
        mine = order.Order(None if seed is None else (seed,), number, of, batch_rows is not None)
        bounds = mine.bounds(len(wanted), batch_rows or 1)
        pieces = list(
            order.in_order(wanted, piece, bounds)
            if mine.seed is None
            else order.shuffled(wanted, grid, piece, mine.seed, bounds)
        )
        assert all(0 < len(p) <= piece for p in pieces)
        parts.append([int(r) for p in pieces for r in p])
        assert len(parts[-1]) == bounds[1] - bounds[0]
    sizes = [len(p) for p in parts]
    together = sorted(r for p in parts for r in p)
    if batch_rows is None:
        assert max(sizes) - min(sizes) <= 1
        assert together == sorted(np.asarray(wanted).tolist())
    else:
        assert len(set(sizes)) == 1
        assert sizes[0] % batch_rows == 0
        assert len(wanted) - len(together) < of * batch_rows
        left = sorted(np.asarray(wanted).tolist())
        for r in together:
            left.remove(r)  # ValueError for a row that is there too often


def test_reading_in_order_and_shuffled_touches_each_chunk_once() -> None:
    grid = Grid(1000, 96, 8)
    for piece in (8, 24, 40, 96):
        for wanted in (range(1000), range(30, 777), np.flatnonzero(np.arange(1000) % 3)):
            orders = [order.shuffled(wanted, grid, piece, (1,), (0, len(wanted)))]
            if isinstance(wanted, range):
                orders.append(order.in_order(wanted, piece, (0, len(wanted))))
            for pieces in orders:
                chunks = [c for p in pieces for c in np.unique(numbers(p) // 8)]
                assert len(chunks) == len(set(chunks))


def test_the_order_depends_on_seed_and_rows_and_not_on_sites_or_batch_size(store: ActivationStore) -> None:
    def epoch(seed: int, sites: Any = FINAL, batch_rows: int = 7, wanted: Any = None) -> list[int]:
        found = store.iter(sites, batch_rows=batch_rows, shuffle=seed, rows=wanted)
        return [int(r) for b in found for r in b.rows]

    assert epoch(1) == epoch(1) == epoch(1, ["resid.post@*"]) == epoch(1, ["final", "attn.heads@1.*"], 64)
    assert len({tuple(epoch(seed)) for seed in range(8)}) == 8
    assert epoch(3, wanted=[5, 1, 90]) == epoch(3, wanted=[90, 5, 1])


def test_shuffled_batches_mix_several_chunks_of_several_shards(folder: Path) -> None:
    """Also where a shard is a single chunk, as in stores of many sites."""
    for chunk_rows in (64, 16):
        path = folder / f"{chunk_rows}.reprobe"
        sites = (StoredSite(FINAL, 3),)
        synthetic.fill(synthetic.create(path, rows=64 * 12, sites=sites, shard_rows=64, chunk_rows=chunk_rows))
        shards_of = [b.rows // 64 for b in ActivationStore.open(path).iter(FINAL, batch_rows=32, shuffle=0)]
        assert np.mean([len(set(s)) for s in shards_of]) > 3
        assert min(len(set(s)) for s in shards_of) >= 2
        share = [np.bincount(s).max() / len(s) for s in shards_of]
        assert np.median(share) < 0.5  # no shard is most of a batch


def test_neighbouring_rows_end_up_apart(store: ActivationStore) -> None:
    place = np.empty(ROWS)
    epoch = np.concatenate([b.rows for b in store.iter(FINAL, batch_rows=10, shuffle=4)])
    place[epoch] = np.arange(ROWS)
    assert np.abs(np.diff(place)).mean() > ROWS / 12  # 1 in order, ROWS / 3 in a full shuffle
    assert abs(np.corrcoef(place, np.arange(ROWS))[0, 1]) < 0.7


def test_heads_of_one_site_are_read_together_and_are_those_that_read_gives(
    store: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    heads = [f"attn.heads@1.{h}" for h in (4, 1, 2)]
    want = {h: raw(store.read(h)) for h in heads}
    reads = 0
    decoder = type(store._decoder(HEADS))
    original = decoder.read

    def counted(self: Any, *args: Any) -> Any:
        nonlocal reads
        reads += 1
        return original(self, *args)

    monkeypatch.setattr(decoder, "read", counted)
    for seed in (None, 0):
        reads = 0
        for batch in store.iter(heads, batch_rows=50, shuffle=seed):
            assert [str(s) for s in batch.values] == heads
            for site, values in batch.values.items():
                assert torch.equal(raw(values.contiguous()), want[str(site)][batch.rows])
        assert reads <= 2 * store.manifest.grid.n_shards  # not once per head


def test_a_batch_stays_as_it_is_when_more_are_read(store: ActivationStore) -> None:
    for seed in (None, 5):
        kept = list(store.iter(FINAL, batch_rows=20, shuffle=seed))
        for batch in kept:
            assert torch.equal(raw(batch.values), raw(store.read(FINAL, batch.rows)))


def test_walking_can_stop_half_way_and_damage_is_raised_where_it_lies(folder: Path) -> None:
    synthetic.fill(synthetic.create(folder / "s.reprobe"))
    store = ActivationStore.open(folder / "s.reprobe")
    walk = store.iter(FINAL, batch_rows=2, shuffle=1)
    next(walk)
    walk.close()  # type: ignore[attr-defined]
    path = folder / "s.reprobe" / shard_file(FINAL, 3)
    data = bytearray(path.read_bytes())
    data[10] ^= 1
    path.write_bytes(data)
    walk = store.iter(FINAL, batch_rows=3)
    assert [next(walk).rows.tolist() for _ in range(6)] == [[3 * i, 3 * i + 1, 3 * i + 2] for i in range(6)]
    with pytest.raises(CorruptArtifact, match="final"):
        next(walk)
    with pytest.raises(CorruptArtifact, match="final"):
        list(store.iter(FINAL, shuffle=0))


def test_an_incomplete_store_is_walked_over_the_rows_it_has(partial: ActivationStore) -> None:
    for seed in (None, 0):
        epoch = [int(r) for b in partial.iter(FINAL, shuffle=seed, rows=slice(0, 12)) for r in b.rows]
        assert sorted(epoch) == list(range(12))
        with pytest.raises(IncompleteStore):
            partial.iter(FINAL, shuffle=seed, rows=[3, 12])
    for make in (partial.to_dataset, lambda rows: partial.to_torch(FINAL, rows=rows)):
        with pytest.raises(IncompleteStore):
            make(rows=[12])


@pytest.mark.parametrize("seed", [-1, 1.0, "1", True], ids=repr)
def test_what_is_not_a_seed_is_refused(store: ActivationStore, seed: Any) -> None:
    with pytest.raises(UsageError, match="seed"):
        store.iter(FINAL, shuffle=seed)
    with pytest.raises(UsageError, match="seed"):
        store.to_torch(FINAL, shuffle=seed)


# ---- torch


def read_all(data: TorchBatches, **loader: Any) -> list[dict[str, Any]]:
    return list(DataLoader(data, batch_size=None, **loader))


def row_list(batches: list[dict[str, Any]]) -> list[int]:
    return [int(r) for b in batches for r in b["row"]]


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")
@pytest.mark.parametrize("shuffle", [None, 3])
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_workers_divide_an_epoch_without_overlap_or_loss(
    store: ActivationStore, workers: int, shuffle: int | None
) -> None:
    store.read(FINAL, [0])  # the parent has files and threads open, which its children must not use
    wanted = store.where(pl.col("row") % 7 > 0)
    data = store.to_torch(
        ["final", "attn.heads@1.2"], batch_rows=8, shuffle=shuffle, columns=["label", "prompt", "pair"], rows=wanted
    )
    found = read_all(data, num_workers=workers, **({"multiprocessing_context": "fork"} if workers else {}))
    assert sorted(row_list(found)) == wanted.tolist()
    if workers == 0 and shuffle is None:
        assert row_list(found) == wanted.tolist()
    for batch in found:
        lines = store.index[batch["row"].numpy()]
        assert list(batch) == ["row", "label", "prompt", "pair", "final", "attn.heads@1.2"]
        assert batch["label"].tolist() == lines["label"].to_list()
        assert (batch["prompt"], batch["pair"]) == (lines["prompt"].to_list(), lines["pair"].to_list())
        for site in ("final", "attn.heads@1.2"):
            assert batch[site].dtype == torch.bfloat16
            assert torch.equal(raw(batch[site].contiguous()), raw(store.read(site, lines["row"])))


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])  # imports torch again
def test_workers_that_are_kept_see_each_epoch(store: ActivationStore, context: str) -> None:
    store.read(FINAL, [0])
    data = store.to_torch(FINAL, batch_rows=16, shuffle=3)
    loader = DataLoader(
        data, batch_size=None, num_workers=2, multiprocessing_context=context, persistent_workers=True
    )  # fmt: skip
    epochs = []
    for epoch in (0, 1, 0):
        data.set_epoch(epoch)
        epochs.append(row_list(list(loader)))
    assert epochs[0] == epochs[2] != epochs[1]
    assert all(sorted(e) == list(range(ROWS)) for e in epochs)


def test_epochs_differ_and_come_back(store: ActivationStore) -> None:
    data = store.to_torch(FINAL, batch_rows=16, shuffle=3)
    orders = []
    for epoch in (0, 1, 2, 1):
        data.set_epoch(epoch)
        orders.append(row_list(read_all(data)))
    assert orders[1] == orders[3]
    assert len({tuple(o) for o in orders}) == 3
    # epochs and seeds are not exchangeable
    other = store.to_torch(FINAL, batch_rows=16, shuffle=1)
    other.set_epoch(3)
    assert row_list(read_all(other)) not in orders
    # the first epoch is that of iter
    assert orders[0] == [int(r) for b in store.iter(FINAL, batch_rows=16, shuffle=3) for r in b.rows]
    for epoch in (-1, 1.0, True):
        with pytest.raises(UsageError, match="epoch"):
            data.set_epoch(epoch)  # type: ignore[arg-type]


@pytest.mark.parametrize("shuffle", [None, 3])
def test_ranks_divide_an_epoch_and_can_be_made_to_take_equal_steps(store: ActivationStore, shuffle: int | None) -> None:
    parts = [read_all(store.to_torch(FINAL, batch_rows=8, shuffle=shuffle, share=(r, 4))) for r in range(4)]
    assert sorted(row_list([b for p in parts for b in p])) == list(range(ROWS))
    equal = [
        read_all(store.to_torch(FINAL, batch_rows=8, shuffle=shuffle, share=(r, 4), drop_last=True)) for r in range(4)
    ]
    assert [[len(b["row"]) for b in p] for p in equal] == [[8] * (ROWS // 4 // 8)] * 4
    rows = row_list([b for p in equal for b in p])
    assert len(set(rows)) == len(rows)


def test_a_data_set_can_be_pickled_and_copied_without_what_it_opened(store: ActivationStore) -> None:
    data = store.to_torch(FINAL, batch_rows=16, shuffle=3)
    data.set_epoch(2)
    want = row_list(read_all(data))
    pickled = pickle.dumps(data)
    assert len(pickled) < 20_000  # no files, no arrays: a store has 200 kB
    for other in (pickle.loads(pickled), copy.deepcopy(data)):
        assert row_list(read_all(other)) == want
        other.set_epoch(0)
        assert row_list(read_all(other)) != want
        assert row_list(read_all(data)) == want
    again = pickle.loads(pickle.dumps(store))
    assert torch.equal(raw(again.read(FINAL)), raw(store.read(FINAL)))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"columns": ["labels"]}, UsageError, "no column 'labels'; it has row, prompt"),
        ({"columns": "label"}, UsageError, r"\['label'\]"),
        ({"batch_rows": 0}, UsageError, "batch_rows"),
        ({"share": (4, 4)}, UsageError, "no part 4 of 4"),
        ({"share": (-1, 4)}, UsageError, "no part -1 of 4"),
        ({"rows": [ROWS]}, UsageError, "no row"),
        ({"sites": ["embed"]}, UnknownSite, "embed"),
        ({"sites": "embed"}, UnknownSite, "embed"),
    ],
    ids=str,
)
def test_a_data_set_that_cannot_be_is_refused_when_it_is_made(
    store: ActivationStore, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        store.to_torch(**({"sites": FINAL} | changes))


# ---- Hugging Face


@pytest.fixture
def cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
    return folder / "cache" / "reprobe"


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_dataset_has_the_index_and_every_number(folder: Path, cache: Path, dtype: str) -> None:
    synthetic.fill(synthetic.create(folder / "s.reprobe", rows=600, dtype=dtype, shard_rows=100, chunk_rows=50))
    store = ActivationStore.open(folder / "s.reprobe")
    drawn = random.Random(0).choices(range(600), k=500)
    for sites, rows in ((None, None), (["final", "attn.heads@1.3"], drawn), ("resid.post@2", [])):
        data = store.to_dataset(sites, rows)
        chosen = (
            store.sites if sites is None else [Site.parse(s) for s in ([sites] if sites == "resid.post@2" else sites)]
        )
        lines = store.index if rows is None else store.index[rows]
        assert data.num_rows == lines.height
        assert data.column_names == [*store.index.columns, *map(str, chosen)]
        assert data.select_columns(store.index.columns).to_list() == lines.to_dicts()
        for site in chosen:
            want = store.read(site, rows).float().numpy()
            assert data.features[str(site)] == datasets.List(datasets.Value("float32"), length=want.shape[1])
            if len(want):
                assert np.array_equal(np.stack(data.with_format("numpy")[str(site)][:]), want, equal_nan=True)


def test_a_dataset_is_written_once_and_a_changed_store_has_another(folder: Path, cache: Path) -> None:
    def files() -> dict[str, int]:
        return {p.name: p.stat().st_mtime_ns for p in cache.iterdir()}

    synthetic.fill(synthetic.create(folder / "s.reprobe"))
    store = ActivationStore.open(folder / "s.reprobe")
    store.to_dataset("final")
    first = files()
    assert len(first) == 1
    store.to_dataset("final")
    assert files() == first
    store.to_dataset("final", [1, 2])
    store.to_dataset("resid.post@2")
    assert len(files()) == 3
    # the same manifest, other values
    with synthetic.create(folder / "s.reprobe", overwrite=True) as writer:
        for shard in writer.missing():
            values = {s.site: torch.ones(shard.rows, s.width, dtype=torch.bfloat16) for s in writer.manifest.sites}
            writer.write_shard(shard.number, values)
    data = ActivationStore.open(folder / "s.reprobe").to_dataset("final")
    assert np.all(np.stack(data.with_format("numpy")["final"][:]) == 1)


def test_a_dataset_that_fails_half_way_leaves_nothing(folder: Path, cache: Path) -> None:
    synthetic.fill(synthetic.create(folder / "s.reprobe"))
    path = folder / "s.reprobe" / shard_file(FINAL, 3)
    data = bytearray(path.read_bytes())
    data[10] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptArtifact):
        ActivationStore.open(folder / "s.reprobe").to_dataset()
    assert list(cache.iterdir()) == []
