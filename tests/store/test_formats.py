"""One contract, every format: whatever is written comes back, bit for bit, and a twin in memory agrees."""

import os
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import h5py
import numpy as np
import pytest
import torch
from folders import scratch, tree
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from numpy.typing import NDArray
from store import synthetic
from store.synthetic import raw

from reprobe.errors import CorruptArtifact, IdentityMismatch, IncompleteStore, UsageError
from reprobe.model.sites import Site
from reprobe.store import ActivationStore, Grid, StoredSite, StoreWriter, size_on_disk, verify
from reprobe.store.formats import format_of

ROWS = synthetic.ROWS
FINAL = Site("final")


class Twin:
    """A perfect store: arrays in memory, of which a shard is there once it was written."""

    def __init__(self, grid: Grid, sites: tuple[StoredSite, ...], dtype: str) -> None:
        self.grid = grid
        self.arrays = {s.site: synthetic.bits(s.site, 0, grid.rows, s.width, dtype) for s in sites}
        self.written: set[int] = set()

    def has(self, rows: NDArray[np.int64]) -> bool:
        return set((rows // self.grid.shard_rows).tolist()) <= self.written

    def read(self, site: Site, rows: NDArray[np.int64]) -> torch.Tensor:
        return self.arrays[site][torch.from_numpy(rows)]


class Contract:
    """What holds for every format; a subclass names one."""

    form: ClassVar[str]
    compression: ClassVar[str | None]

    def create(self, path: Path, **changes: Any) -> StoreWriter:
        return synthetic.create(path, **({"format": self.form, "compression": self.compression} | changes))

    @settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.differing_executors])
    @given(
        dtype=st.sampled_from(["float32", "float16", "bfloat16"]),
        rows=st.integers(1, 40),
        width=st.integers(1, 9),
        shard_rows=st.integers(1, 45),
        chunk_rows=st.none() | st.integers(1, 45),
        data=st.data(),
    )
    def test_any_rows_of_any_store_are_those_of_a_twin_in_memory(
        self, dtype: str, rows: int, width: int, shard_rows: int, chunk_rows: int | None, data: st.DataObject
    ) -> None:
        site = StoredSite(Site("mlp.out", 1), width)
        wanted = np.array(data.draw(st.lists(st.integers(0, rows - 1), max_size=60)), dtype=np.int64)
        start, stop = sorted(data.draw(st.tuples(st.integers(0, rows), st.integers(0, rows))))
        with scratch() as name:
            path = Path(name) / "s.reprobe"
            writer = self.create(
                path, rows=rows, sites=(site,), dtype=dtype, shard_rows=shard_rows, chunk_rows=chunk_rows
            )
            synthetic.fill(writer)
            twin, store = Twin(writer.manifest.grid, (site,), dtype), ActivationStore.open(path)
            assert store.read(site.site).dtype == synthetic.DTYPES[dtype]
            assert torch.equal(raw(store.read(site.site)), twin.arrays[site.site])
            assert torch.equal(raw(store.read(site.site, wanted)), twin.read(site.site, wanted))
            assert torch.equal(raw(store.read(site.site, slice(start, stop))), twin.arrays[site.site][start:stop])
            assert verify(path).ok

    @settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.differing_executors])
    @given(
        dtype=st.sampled_from(["float32", "float16"]),
        rows=st.integers(1, 300),
        widths=st.lists(st.integers(1, 9), min_size=1, max_size=12),
        shard_rows=st.integers(1, 300),
        chunk_rows=st.integers(1, 60),
        seed=st.integers(0, 9),
    )
    def test_the_size_is_known_before_anything_is_written(
        self, dtype: str, rows: int, widths: list[int], shard_rows: int, chunk_rows: int, seed: int
    ) -> None:
        sites = [StoredSite(Site("mlp.out", i), width) for i, width in enumerate(widths)]
        grid = Grid.of(rows, widths, shard_rows=shard_rows, chunk_rows=chunk_rows)
        encoder = format_of(self.form).encoder(sites, dtype, grid, self.compression)
        rng, kind = np.random.default_rng(seed), {"float32": np.uint32, "float16": np.uint16}[dtype]
        size = 0
        for shard in grid.shards:
            values = {
                s.site: rng.integers(0, np.iinfo(kind).max, (shard.rows, s.width), kind).view(dtype) for s in sites
            }
            size += sum(len(data) for _, data in encoder.shard(shard, values))
        told = size_on_disk(widths, grid, dtype, format=self.form, compression=self.compression)
        if (self.form, self.compression) == ("zarr", None):
            assert size == told
        assert size <= told

    def test_two_runs_of_one_configuration_write_the_same_bytes_in_any_order_of_shards(self, folder: Path) -> None:
        synthetic.fill(self.create(folder / "a"))
        with self.create(folder / "b") as backwards:
            for shard in reversed(backwards.missing()):
                backwards.write_shard(shard.number, synthetic.shard_values(backwards, shard))
            assert backwards.complete
        assert tree(folder / "a") == tree(folder / "b")

    def test_a_large_shard_has_the_same_bytes_every_time(self, folder: Path) -> None:
        """Compressors that share a chunk among threads may not."""
        sites = (StoredSite(FINAL, 512),)
        values = torch.randn(4096, 512, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
        for name in ("a", "b"):
            with self.create(folder / name, rows=4096, sites=sites, shard_rows=None, chunk_rows=None) as writer:
                writer.write_shard(0, {FINAL: values})
        assert tree(folder / "a") == tree(folder / "b")
        assert torch.equal(ActivationStore.open(folder / "a").read(FINAL), values)

    def test_a_store_begun_in_another_format_is_not_resumed(self, folder: Path) -> None:
        synthetic.fill(self.create(folder / "s"), shards=1)
        other = {"zarr": "hdf5", "hdf5": "zarr"}[self.form]
        with pytest.raises(IdentityMismatch, match=f"format: {self.form} there, {other} now"):
            self.create(folder / "s", resume=True, format=other)
        compression = None if self.compression else "zstd"
        with pytest.raises(IdentityMismatch, match="compression"):
            self.create(folder / "s", resume=True, compression=compression)

    def test_damage_is_noticed_where_it_is_read_and_only_there(self, folder: Path) -> None:
        path = folder / "s"
        with self.create(path, rows=2048, sites=(StoredSite(FINAL, 64),), shard_rows=2048, chunk_rows=256) as writer:
            shard = writer.shards[0]
            writer.write_shard(0, synthetic.shard_values(writer, shard))
        whole = ActivationStore.open(path).read(FINAL)
        file = path / format_of(self.form).shard_file(FINAL, 0)
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1  # the middle of a file is a chunk of it, and not its description
        file.write_bytes(data)
        store = ActivationStore.open(path)
        sound = 0
        for start in range(0, 2048, 256):
            with suppress(CorruptArtifact):
                assert torch.equal(raw(store.read(FINAL, slice(start, start + 256))), raw(whole[start : start + 256]))
                sound += 1
        assert sound == 7
        with pytest.raises(CorruptArtifact, match=rf"{re.escape(file.name)}|final"):
            store.read(FINAL)

    def test_a_file_that_was_exchanged_for_that_of_another_store_is_not_read_as_ours(self, folder: Path) -> None:
        """Of equal length: the checksum of each chunk is right."""
        synthetic.fill(self.create(folder / "s"))
        name = format_of(self.form).shard_file(FINAL, 1)
        with self.create(folder / "u", plan={"another": "plan"}) as writer:
            values = synthetic.shard_values(writer, writer.shards[1])
            writer.write_shard(1, {s: v.flip(0) for s, v in values.items()})
        shutil.copy(folder / "u" / name, folder / "s" / name)
        assert not verify(folder / "s").ok

    def test_info_names_the_format(self, folder: Path) -> None:
        synthetic.fill(self.create(folder / "s"))
        info = ActivationStore.open(folder / "s").info()
        assert (info.format, info.compression) == (self.form, self.compression)
        files = tree(folder / "s")
        assert info.bytes_on_disk == sum(map(len, files.values()))
        arrays = sum(len(d) for name, d in files.items() if name.startswith("activations") and "json" not in name)
        assert arrays <= info.bytes_of_arrays_when_complete


class TestZarr(Contract):
    form, compression = "zarr", None


class TestCompressedZarr(Contract):
    form, compression = "zarr", "zstd"


class TestHdf5(Contract):
    form, compression = "hdf5", None


class TestCompressedHdf5(Contract):
    form, compression = "hdf5", "zstd"


@pytest.mark.parametrize("form", synthetic.FORMATS)
def test_compression_makes_a_store_of_real_numbers_smaller(folder: Path, form: str) -> None:
    values = torch.randn(1024, 64, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    sizes = {}
    for compression in (None, "zstd"):
        path = folder / str(compression)
        with synthetic.create(
            path, rows=1024, sites=(StoredSite(FINAL, 64),), shard_rows=1024, chunk_rows=256, format=form,
            compression=compression,
        ) as writer:  # fmt: skip
            writer.write_shard(0, {FINAL: values})
        sizes[compression] = (path / format_of(form).shard_file(FINAL, 0)).stat().st_size
        assert torch.equal(ActivationStore.open(path).read(FINAL), values)
    assert sizes["zstd"] < 0.9 * sizes[None]


@pytest.mark.parametrize("wrong", [{"format": "npy"}, {"compression": "gzip"}], ids=str)
def test_a_format_or_compression_that_does_not_exist_is_refused(folder: Path, wrong: dict[str, str]) -> None:
    with pytest.raises(UsageError, match=r"there are zarr, hdf5|there are None, zstd"):
        synthetic.create(folder / "s", **wrong)
    with pytest.raises(UsageError):
        size_on_disk([3], Grid(10, 3, 3), "float16", **wrong)
    assert not list(folder.iterdir())


# ---- HDF5


def test_plain_h5py_reads_the_same_bits_and_finds_the_dtype(folder: Path) -> None:
    synthetic.fill(synthetic.create(folder / "s", format="hdf5"))
    with h5py.File(folder / "s" / "activations-00001.h5") as file:
        assert sorted(file) == ["attn.heads-1", "final", "resid.post-2"]
        dataset = file["resid.post-2"]
        assert (dataset.dtype, dataset.shape, dataset.chunks) == (np.dtype("<u2"), (6, 35), (3, 35))
        assert (dataset.attrs["site"], dataset.attrs["dtype"]) == (b"resid.post@2", b"bfloat16")
        want = synthetic.bits(Site("resid.post", 2), 6, 12, 35, "bfloat16")
        assert torch.equal(torch.from_numpy(dataset[:]).view(torch.int16), want)


def _rewrite(path: Path, change: Any) -> None:
    """Change an HDF5 shard with h5py, and record its new length, as someone who forges a store would."""
    with h5py.File(path, "r+") as file:
        values = file["final"][:]
        del file["final"]
        change(file, values)


def _other_dtype(file: Any, values: Any) -> None:
    file.create_dataset("final", data=values.view(np.int16), chunks=(3, 35), fletcher32=True)


def _big_endian(file: Any, values: Any) -> None:
    file.create_dataset("final", data=values.astype(">u2"), chunks=(3, 35), fletcher32=True)


def _no_checksum(file: Any, values: Any) -> None:
    file.create_dataset("final", data=values, chunks=(3, 35))


def _another_shape(file: Any, values: Any) -> None:
    file.create_dataset("final", data=values[:, :34], chunks=(3, 34), fletcher32=True)


def _a_group(file: Any, values: Any) -> None:
    file.create_group("final")


def _nothing(file: Any, values: Any) -> None:
    pass


def _a_link(file: Any, values: Any) -> None:
    file["final"] = h5py.ExternalLink("elsewhere.h5", "final")


@pytest.mark.parametrize(
    "change", [_other_dtype, _big_endian, _no_checksum, _another_shape, _a_group, _nothing, _a_link]
)
def test_an_hdf5_file_that_is_not_exactly_as_declared_is_refused(
    folder: Path, change: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HDF5 would convert an int16 to uint16 by clipping, follow a link to another file, and so on."""
    synthetic.fill(synthetic.create(folder / "s", format="hdf5"))
    with h5py.File(folder / "elsewhere.h5", "w") as other:
        other.create_dataset("final", data=np.zeros((6, 35), np.uint16), chunks=(3, 35), fletcher32=True)
    _rewrite(folder / "s" / "activations-00001.h5", change)
    store = ActivationStore.open(folder / "s")
    monkeypatch.setattr(ActivationStore, "_require_files", lambda *_: None)  # it would see the new length
    with pytest.raises(CorruptArtifact, match=r"activations-00001\.h5"):
        store.read(FINAL, slice(6, 12))
    assert not verify(folder / "s").ok


# ---- a state machine beside the twin


class StoreMachine(RuleBasedStateMachine):
    """A store is driven through writing, kills, resumes, damage and reading; its twin in memory never errs."""

    form: ClassVar[str]

    @initialize(compression=st.sampled_from([None, "zstd"]), dtype=st.sampled_from(["float32", "bfloat16"]))
    def begin(self, compression: str | None, dtype: str) -> None:
        self.scratch = scratch()
        self.path = Path(self.scratch.name) / "s.reprobe"
        self.changes = {"format": self.form, "compression": compression, "dtype": dtype}
        self.writer: StoreWriter | None = synthetic.create(self.path, **self.changes)
        self.twin = Twin(self.writer.manifest.grid, synthetic.SITES, dtype)

    def teardown(self) -> None:
        if hasattr(self, "scratch"):
            if self.writer is not None:
                self.writer.close()
            self.scratch.cleanup()

    @precondition(lambda self: self.writer is not None)
    @rule(number=st.integers(0, 3))
    def write(self, number: int) -> None:
        assert self.writer is not None
        values = synthetic.shard_values(self.writer, self.writer.shards[number])
        if number in self.twin.written:
            with pytest.raises(UsageError, match="committed already"):
                self.writer.write_shard(number, values)
        else:
            self.writer.write_shard(number, values)
            self.twin.written.add(number)

    @precondition(lambda self: self.writer is not None)
    @rule()
    def close(self) -> None:
        assert self.writer is not None
        self.writer.close()
        self.writer = None

    @precondition(lambda self: self.writer is None)
    @rule(own=st.none() | st.just(range(1, 3)))
    def resume(self, own: range | None) -> None:
        with synthetic.create(self.path, **self.changes, own=own, resume=True) as writer:
            missing = {s.number for s in writer.missing()}
        assert missing == set(own if own is not None else range(4)) - self.twin.written
        self.writer = synthetic.create(self.path, **self.changes, resume=True)

    @precondition(lambda self: self.writer is None)
    @rule(number=st.integers(0, 3), what=st.sampled_from(["record", "file", "leftover"]))
    def lose(self, number: int, what: str) -> None:
        """What a dying disk may do; resuming makes it good."""
        if what == "leftover":
            (self.path / "commits" / f".{number:05d}.json.0a1b2c3d.tmp").write_text("half")
        elif number in self.twin.written:
            name = f"commits/{number:05d}.json"
            if what == "file":
                name = format_of(self.form).shard_file(FINAL, number)
                os.truncate(self.path / name, 10)
                with pytest.raises(CorruptArtifact):
                    ActivationStore.open(self.path).read(FINAL, slice(6 * number, 6 * number + 1))
            else:
                (self.path / name).unlink()
            assert not verify(self.path).ok
            synthetic.create(self.path, **self.changes, resume=True).close()
            self.twin.written.discard(number)

    @rule(rows=st.lists(st.integers(0, ROWS - 1), max_size=12), site=st.sampled_from(synthetic.SITES))
    def read(self, rows: list[int], site: StoredSite) -> None:
        store, wanted = ActivationStore.open(self.path), np.array(rows, dtype=np.int64)
        if self.twin.has(wanted):
            assert torch.equal(raw(store.read(site.site, rows)), self.twin.read(site.site, wanted))
        else:
            with pytest.raises(IncompleteStore):
                store.read(site.site, rows)

    @rule(batch_rows=st.integers(1, 30), shuffle=st.none() | st.integers(0, 3))
    def walk(self, batch_rows: int, shuffle: int | None) -> None:
        store = ActivationStore.open(self.path)
        if len(self.twin.written) < 4:
            with pytest.raises(IncompleteStore):
                store.iter(FINAL, batch_rows=batch_rows, shuffle=shuffle)
            return
        seen = []
        for rows, values in store.iter(FINAL, batch_rows=batch_rows, shuffle=shuffle):
            assert torch.equal(raw(values), self.twin.read(FINAL, rows))
            seen += rows.tolist()
        assert sorted(seen) == list(range(ROWS))

    @invariant()
    def the_commits_are_those_of_the_twin(self) -> None:
        if hasattr(self, "twin"):
            store = ActivationStore.open(self.path)
            assert store.committed == self.twin.written
            assert store.complete == (len(self.twin.written) == 4)

    @rule()
    def check(self) -> None:
        problems = [p for p in verify(self.path).problems if "no commit record" not in p]
        assert all("interrupted write" in p for p in problems)
        if self.writer is not None:
            assert not problems


class ZarrMachine(StoreMachine):
    form = "zarr"


class Hdf5Machine(StoreMachine):
    form = "hdf5"


for _machine in (ZarrMachine, Hdf5Machine):
    _machine.TestCase.settings = settings(deadline=None, max_examples=15, stateful_step_count=15)
TestZarrMachine = ZarrMachine.TestCase
TestHdf5Machine = Hdf5Machine.TestCase
