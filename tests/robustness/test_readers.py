"""Whatever a file holds, reading it gives its content or an error of reprobe, and does nothing else.

The table is readers × mutations (`samples`, `mutations`); `guard` says what nothing else means.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest
from folders import scratch
from hypothesis import given, settings
from hypothesis import strategies as st
from robustness.guard import harmless
from robustness.mutations import Mutation
from robustness.samples import EVERY, Sample

from reprobe.errors import ReprobeError

TABLE = [pytest.param(s, m, id=f"{s.name}-{m.__name__}") for s in EVERY for m in s.mutations]


@pytest.fixture(scope="module")
def made() -> Iterator[Callable[[Sample], Path]]:
    """The valid file of a sample, written once, whose reading has brought in what is imported late."""
    with scratch() as name, pytest.MonkeyPatch.context() as patch:
        patch.setenv("REPROBE_CACHE", f"{name}/cache")
        known: dict[str, Path] = {}

        def of(sample: Sample) -> Path:
            if sample.name not in known:
                folder = Path(name) / str(len(known))
                folder.mkdir()
                path = sample.write(folder)
                sample.read(path)
                known[sample.name] = path
            return known[sample.name]

        yield of


def require_sound(path: Path, sample: Sample, mutation: Mutation, examples: int) -> None:
    """Mutate, read, and put back, `examples` times: an error of another kind comes out, with its seed."""
    kept = {p: p.read_bytes() for p in (path.rglob("*") if path.is_dir() else [path]) if p.is_file()}
    file = path if sample.file is None else path / sample.file

    @settings(max_examples=examples, derandomize=True, database=None, deadline=None)
    @given(seed=st.integers(0, 2**32 - 1))
    def check(seed: int) -> None:
        file.write_bytes(mutation(kept[file], Random(seed)))
        try:
            if sample.sign is not None:
                sample.sign(path)
            with harmless(caches=sample.caches), contextlib.suppress(ReprobeError):
                sample.read(path)
        finally:
            for place, data in kept.items():
                place.write_bytes(data)

    check()


@pytest.mark.parametrize(("sample", "mutation"), TABLE)
def test_a_damaged_or_forged_file_is_its_content_or_an_error_of_ours_and_harms_nothing(
    sample: Sample, mutation: Mutation, made: Callable[[Sample], Path]
) -> None:
    require_sound(made(sample), sample, mutation, examples=5 if sample.costly else 12)


@pytest.mark.slow
@pytest.mark.parametrize(("sample", "mutation"), TABLE)
def test_so_are_hundreds_of_them(sample: Sample, mutation: Mutation, made: Callable[[Sample], Path]) -> None:
    require_sound(made(sample), sample, mutation, examples=60 if sample.costly else 300)


@pytest.mark.parametrize("sample", EVERY, ids=lambda s: s.name)
def test_the_mutations_change_the_file_and_the_reader_notices_some(
    sample: Sample, made: Callable[[Sample], Path]
) -> None:
    """Or the test above would say nothing."""
    path = made(sample)
    file = path if sample.file is None else path / sample.file
    data = file.read_bytes()
    for mutation in sample.mutations:
        assert any(mutation(data, Random(seed)) != data for seed in range(5)), mutation.__name__
    whole, noticed = repr(sample.read(path)), 0
    for at in (0, len(data) // 2, len(data) - 9):
        file.write_bytes(data[:at])
        try:
            noticed += repr(sample.read(path)) != whole
        except ReprobeError:
            noticed += 1
    file.write_bytes(data)
    assert noticed
