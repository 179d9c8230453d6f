"""Shards, chunks, sizes and names."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reprobe.errors import UsageError
from reprobe.model.sites import LAYER_PARTS, MODEL_PARTS, Site
from reprobe.store import Grid, size_on_disk
from reprobe.store.layout import SHARD_BYTES, array_name, decode, encode, hdf5_name, is_store_file, written_as
from reprobe.store.zarr_backend import metadata_file, shard_file

counts = st.integers(1, 3_000_000)
widths = st.lists(st.integers(1, 8192 * 4), min_size=1, max_size=80)


@pytest.mark.parametrize(("row_bytes", "shards"), [(2048, (4000, 4200)), (163_840, (130_000, 190_000))])
def test_very_large_stores_have_shards_of_up_to_a_gib(row_bytes: int, shards: tuple[int, int]) -> None:
    grid = Grid.of(10**9, [16_384] * (row_bytes // 16_384) or [row_bytes])
    assert shards[0] <= grid.n_shards <= shards[1]
    assert 2**28 <= grid.shard_rows * row_bytes <= 1.1 * 2**30


@settings(deadline=None, max_examples=200)
@given(rows=counts, row_bytes=widths)
def test_default_shards_hold_about_64_mb_or_a_4096th_of_the_store_in_chunks_of_256_to_1024_rows(
    rows: int, row_bytes: list[int]
) -> None:
    grid = Grid.of(rows, row_bytes)
    assert grid.shard_rows % grid.chunk_rows == 0
    assert min(rows, 256) <= grid.chunk_rows <= 1024
    assert grid.n_shards == math.ceil(rows / grid.shard_rows)
    # a row more per chunk of rounding is all that a shard may exceed the aim by, unless 256 rows do
    aim = min(max(SHARD_BYTES, rows * sum(row_bytes) // 4096), 2**30)
    slack = grid.shard_rows // grid.chunk_rows * sum(row_bytes)
    assert grid.shard_rows * sum(row_bytes) <= max(aim + slack, 256 * sum(row_bytes))
    if grid.n_shards > 1:
        assert grid.shard_rows * sum(row_bytes) >= min(aim, 256 * sum(row_bytes)) / 2


@settings(deadline=None, max_examples=100)
@given(rows=st.integers(1, 5000), shard=st.integers(1, 6000), chunk=st.none() | st.integers(1, 6000))
def test_shards_cover_every_row_once_and_in_order(rows: int, shard: int, chunk: int | None) -> None:
    grid = Grid.of(rows, [4], shard_rows=shard, chunk_rows=chunk)
    assert [r for s in grid.shards for r in range(s.start, s.stop)] == list(range(rows))
    assert all(s.rows == grid.shard_rows for s in grid.shards[:-1])
    assert min(rows, shard) <= grid.shard_rows < min(rows, shard) + grid.chunk_rows


@pytest.mark.parametrize("wrong", [{"shard_rows": 0}, {"chunk_rows": 0}, {"shard_rows": -3}])
def test_a_shard_or_chunk_of_no_rows_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="must be at least 1"):
        Grid.of(10, [4], **wrong)


def test_no_rows_and_no_sites_are_refused() -> None:
    with pytest.raises(UsageError, match="rows is 0"):
        Grid.of(0, [4])
    with pytest.raises(UsageError, match="no site"):
        Grid.of(10, [])


def test_a_shard_that_the_store_does_not_have_is_refused() -> None:
    with pytest.raises(UsageError, match="shards 0–3"):
        Grid(10, 3, 3).shard(4)


@pytest.mark.parametrize("dtype", ["float64", "int8", "bf16", ""])
def test_a_dtype_that_a_store_cannot_hold_is_refused(dtype: str) -> None:
    with pytest.raises(UsageError, match="float32, float16, bfloat16"):
        size_on_disk([3], Grid(10, 3, 3), dtype)


def test_every_bfloat16_there_is_keeps_its_bits() -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    back = decode(encode(every.view(torch.bfloat16).reshape(256, 256), "bfloat16"), "bfloat16")
    assert back.dtype == torch.bfloat16
    assert torch.equal(back.view(torch.int16).flatten(), every)


def test_values_of_another_dtype_are_refused_and_not_converted() -> None:
    with pytest.raises(UsageError, match="float64"):
        encode(torch.zeros(2, 2, dtype=torch.float64), "float32")
    with pytest.raises(UsageError, match="int16"):
        encode(np.zeros((2, 2), dtype=np.int16), "bfloat16")
    assert encode(np.zeros((2, 2), dtype=np.uint16), "bfloat16").dtype == np.uint16


def test_every_site_has_a_folder_of_its_own_with_a_portable_name() -> None:
    sites = [Site(p, i) for p in LAYER_PARTS for i in (0, 1, 10, 11)] + [Site(p) for p in MODEL_PARTS]
    names = {array_name(s) for s in sites}
    assert len(names) == len(sites)
    assert all(set(n) <= set("abcdefghijklmnopqrstuvwxyz.-0123456789") for n in names)


def test_only_files_of_a_store_and_leftovers_of_them_are_taken_for_its_own() -> None:
    own = [
        shard_file(Site("resid.post", 3), 12),
        metadata_file(Site("final")),
        hdf5_name(123456),
        "commits/00000.json",
        "index.parquet",
    ]
    for name in own:
        assert is_store_file(name)
        path = Path(name)
        assert written_as((path.parent / f".{path.name}.x1_y2z3w.tmp").as_posix()) == name
    for name in [
        "notes.txt",
        "commits/a.json",
        "../manifest.json",
        "activations.zarr/c.0.0",
        "x/manifest.json",
    ]:
        assert not is_store_file(name)
        assert written_as(name) is None
    assert written_as(".notes.txt.x1_y2z3w.tmp") is None
