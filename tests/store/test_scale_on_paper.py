"""The arithmetic of experiments/bench/SCALE.md, against numbers worked out by hand."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

PATH = Path(__file__).parents[2] / "experiments" / "bench" / "scale.py"
ROUND = {
    "tokens": 10**9, "blocks": 80, "d_model": 8192, "d_ff": 28672, "key and value width": 1024,
    "tokens per prompt": 1000, "peak of a GPU": 10**15, "utilisation": 0.5, "GPUs per rank": 2, "GPUs per node": 8,
    "PCIe of a GPU": 50 * 10**9, "network of a node": 50 * 10**9, "disks of a node": 6 * 10**9, "writer": 10**9,
    "reader": 2 * 10**9, "shuffled": 0.5, "compression ratio": 2, "buffer of a rank": 2**34,
    "index": 5, "token table": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def scale() -> Any:
    spec = importlib.util.spec_from_file_location("scale", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_document_is_what_its_inputs_give(scale: Any) -> None:
    text = scale.DOCUMENT.read_text(encoding="utf-8")
    assert set(scale.inputs(text)) == set(ROUND)
    assert scale.document(text) == text, "run: uv run python experiments/bench/scale.py"


def test_work_per_token_is_that_of_a_llama_of_70_billion(scale: Any) -> None:
    # 2 · 67,108,864 + 2 · 8,388,608 + 3 · 234,881,024
    assert scale.block_parameters(ROUND) == 855_638_016
    # the published 70.55e9 are these, two tables of 128,256 × 8,192 and the norms
    assert 80 * 855_638_016 + 2 * 128_256 * 8192 + 161 * 8192 == 70_553_706_496
    # per block 1,711,276,032 + 4 · 500 · 8192 = 16,384,000
    assert scale.flop_per_token(ROUND) == 80 * (1_711_276_032 + 16_384_000)
    assert scale.tokens_per_second(ROUND) == pytest.approx(5e14 / 1.3821280256e11)  # 3,617.6


def test_bytes_are_two_per_number_and_token(scale: Any) -> None:
    one, ten, residual, everything = scale.cases(ROUND)
    assert [c.row_bytes(ROUND) for c in (one, ten, residual)] == [16_384, 163_840, 1_310_720]
    # 402 · 16,384 + 80 · 57,344
    assert (everything.sites, everything.row_bytes(ROUND)) == (482, 6_586_368 + 4_587_520)
    assert scale.quantity(one.row_bytes(ROUND) * 10**9, "B") == "16.4 TB"
    assert scale.quantity(residual.row_bytes(ROUND) * 10**9, "B") == "1.31 PB"


def test_the_first_resource_to_saturate_is_the_one_with_the_highest_load(scale: Any) -> None:
    # four ranks share a node; compression doubles what disks and network carry, in bytes of rows
    assert scale.capacities(ROUND) == {
        "PCIe, device to host": 50e9,
        "writer, one process": 1e9,
        "disks of the node": 3e9,
        "network of the node": 25e9,
    }
    text = scale.derived(ROUND)
    # 3,617.6 tokens/s · 163,840 B = 0.593 GB/s; · 1,310,720 B = 4.74 GB/s
    assert "| ten sites | 1.2 % | 59 % | 20 % | 2.4 % | none" in text
    assert "writer, one process: 4.7 times what it can" in text
    # 10⁹ / 3,617.6 s = 76.8 h on a rank, 19.2 h on four; 4.74 times that where the writer is the limit
    assert "| time on one node (4 ranks) |  | 19.2 h |" in text
    assert "4.7 times what it can | 91.0 h |" in text
    # 16.384 TB / 2 GB/s = 8,192 s
    assert "| 1 | 2.28 h | 4.55 h |" in text


def test_shards_and_files_are_counted_as_a_store_lays_them_out(scale: Any) -> None:
    one, _, residual, _ = scale.cases(ROUND)
    grid = scale.proposed(one, ROUND)
    assert (grid.shard_rows, grid.chunk_rows, grid.n_shards) == (65_536, 512, 15_259)  # a GiB per file
    grid = scale.proposed(residual, ROUND)  # 16 GiB / 1,310,720 B = 13,107.2 rows, in whole chunks
    assert (grid.shard_rows, grid.n_shards) == (12_800, 78_125)
