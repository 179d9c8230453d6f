"""`verify` notices whatever is done to the files of a finished store, and never fails itself."""

import random
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from folders import scratch, tree
from store import synthetic

from reprobe.errors import ArtifactMissing, ReprobeError
from reprobe.store import ActivationStore, verify


@pytest.fixture(scope="module", params=[("zarr", None), ("zarr", "zstd"), ("hdf5", None), ("hdf5", "zstd")], ids=str)
def any_finished(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A finished store of each format."""
    with scratch() as name:
        form, compression = request.param
        synthetic.fill(synthetic.create(Path(name) / "s.reprobe", format=form, compression=compression))
        yield Path(name) / "s.reprobe"


@pytest.fixture(scope="module")
def finished() -> Iterator[Path]:
    with scratch() as name:
        synthetic.fill(synthetic.create(Path(name) / "s.reprobe"))
        yield Path(name) / "s.reprobe"


def _flip(data: bytes, rng: random.Random) -> bytes:
    i = rng.randrange(len(data))
    return data[:i] + bytes([data[i] ^ (1 << rng.randrange(8))]) + data[i + 1 :]


def _byte(data: bytes, rng: random.Random) -> bytes:
    i = rng.randrange(len(data))
    return data[:i] + rng.randbytes(1) + data[i + 1 :]


def _truncate(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def _lengthen(data: bytes, rng: random.Random) -> bytes:
    return data + rng.randbytes(rng.randint(1, 9))


def _zero(data: bytes, rng: random.Random) -> bytes:
    return bytes(len(data))


MUTATIONS: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    _flip,
    _flip,
    _byte,
    _truncate,
    _truncate,
    _lengthen,
    _zero,
)


def _mutations(finished: Path, times: int, seed: int) -> None:
    """Each time damage one file, of every file in turn: verify names it, and reading gives the truth or an
    error.
    """
    rng = random.Random(seed)
    truth = {s.site: ActivationStore.open(finished).read(s.site).view(torch.int16) for s in synthetic.SITES}
    files = sorted(p for p in finished.rglob("*") if p.is_file())
    for i in range(times):
        path = files[i % len(files)]
        data = path.read_bytes()
        mutant = rng.choice(MUTATIONS)(data, rng)
        if mutant == data:
            continue
        path.write_bytes(mutant)
        try:
            report = verify(finished)
            assert not report.ok, f"{path} was changed and nobody noticed"
            assert any(path.name in problem for problem in report.problems), report.problems
            with suppress(ReprobeError):
                store = ActivationStore.open(finished)
                for site, values in truth.items():
                    with suppress(ReprobeError):
                        assert torch.equal(store.read(site).view(torch.int16), values)
                assert store.index.height == synthetic.ROWS
        finally:
            path.write_bytes(data)
    assert verify(finished).ok


@pytest.mark.parametrize("form", synthetic.FORMATS)
def test_five_hundred_random_mutations_of_every_kind_of_file_are_noticed(folder: Path, form: str) -> None:
    synthetic.fill(synthetic.create(folder / "s.reprobe", format=form))
    _mutations(folder / "s.reprobe", times=500, seed=0)


@pytest.mark.slow
def test_five_thousand_random_mutations_of_every_kind_of_file_are_noticed(any_finished: Path) -> None:
    _mutations(any_finished, times=5000, seed=1)


def test_a_store_as_it_was_written_has_no_problems(any_finished: Path) -> None:
    report = ActivationStore.open(any_finished).verify()
    assert report.ok
    assert report.problems == ()
    assert report.files == len(tree(any_finished))


def test_every_missing_file_is_noticed(any_finished: Path) -> None:
    for path in [p for p in any_finished.rglob("*") if p.is_file()]:
        data = path.read_bytes()
        path.unlink()
        report = verify(any_finished)
        path.write_bytes(data)
        assert not report.ok
        assert any(path.name in p or path.stem.lstrip("0") in p for p in report.problems), (
            path,
            report.problems,
        )


@pytest.mark.parametrize(
    "name",
    [
        "notes.txt",
        "commits/00004.json",
        "commits/x",
        "activations.zarr/final/c.9.0",
        "activations.zarr/embed/zarr.json",
        "activations-00000.h5",
    ],
)
def test_a_file_that_is_not_part_of_the_store_is_noticed(finished: Path, name: str) -> None:
    path = finished / name
    made = [p for p in path.parents if not p.exists()]
    path.parent.mkdir(exist_ok=True)
    path.write_text("x")
    report = verify(finished)
    path.unlink()
    for folder in made:
        folder.rmdir()
    assert [p for p in report.problems if name in p and "not part of the store" in p]


def test_two_shards_that_changed_places_are_noticed(finished: Path) -> None:
    one, two = (finished / "activations.zarr" / "final" / f"c.{k}.0" for k in (0, 2))
    a, b = one.read_bytes(), two.read_bytes()
    one.write_bytes(b)
    two.write_bytes(a)
    report = verify(finished)
    one.write_bytes(a)
    two.write_bytes(b)
    assert len(report.problems) == 2


def test_a_link_in_place_of_a_file_is_noticed(finished: Path, folder: Path) -> None:
    path = finished / "activations.zarr" / "final" / "c.0.0"
    path.rename(folder / "elsewhere")
    path.symlink_to(folder / "elsewhere")
    report = verify(finished)
    path.unlink()
    (folder / "elsewhere").rename(path)
    assert not report.ok


def test_a_store_that_is_not_complete_is_not_verified(folder: Path) -> None:
    synthetic.fill(synthetic.create(folder / "s.reprobe"), shards=1)
    report = verify(folder / "s.reprobe")
    assert not report.ok
    assert "3 of 4 shards have no commit record" in report.problems[0]


def test_what_a_killed_writer_left_is_reported_but_its_lock_is_no_damage(finished: Path) -> None:
    (finished / ".lock").write_text("x")
    assert verify(finished).ok
    (finished / ".lock").unlink()
    left = finished / "commits" / ".00001.json.abcd1234.tmp"
    left.write_text("x")
    report = verify(finished)
    left.unlink()
    assert len(report.problems) == 1
    assert "interrupted write" in report.problems[0]


def test_a_folder_that_is_no_store_is_reported_and_no_folder_at_all_is_an_error(folder: Path) -> None:
    (folder / "empty").mkdir()
    assert not verify(folder / "empty").ok
    with pytest.raises(ArtifactMissing):
        verify(folder / "nothing")
