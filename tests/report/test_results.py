"""The files of a results folder: what is written is read back, and what is damaged says so."""

import dataclasses
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from polars.testing import assert_frame_equal
from report import synthetic

from reprobe.errors import ArtifactMissing, CorruptArtifact, UsageError
from reprobe.methods.repe import Scan
from reprobe.report import (
    Run,
    ScanResult,
    Step,
    probe_path,
    read_results,
    read_run,
    read_scan,
    read_steering,
    write_run,
    write_scan,
    write_steering,
)

texts = st.lists(st.text(max_size=20), max_size=3).map(tuple)


@settings(deadline=None, max_examples=25)
@given(
    title=st.text(max_size=30),
    commands=texts,
    summary=texts,
    seconds=st.floats(0, 1e6),
    identity=st.sampled_from([None, synthetic.IDENTITY]),
)
def test_a_run_is_read_back_as_it_was_written(title, commands, summary, seconds, identity):
    run = Run(title, (Step("a", seconds, title),), identity, {"torch": "2"}, commands, summary)
    with TemporaryDirectory() as folder:
        write_run(folder, run)
        assert read_run(folder) == run


def test_a_scan_is_read_back_bit_for_bit(tmp_path: Path):
    result = synthetic.make_scan(synthetic.NASTY)
    found = read_scan(write_scan(tmp_path, "nasty", result))
    assert (found.scan.tokens, found.scan.sites) == (result.scan.tokens, result.scan.sites)
    np.testing.assert_array_equal(found.scan.scores, result.scan.scores, strict=True)
    assert (found.text, found.grid) == (result.text, result.grid)


def test_a_dose_response_is_read_back_as_it_was_written(tmp_path: Path):
    result = synthetic.make_steering()
    found = read_steering(write_steering(tmp_path, "happiness", result))
    assert_frame_equal(found.table, result.table, check_exact=True)
    for field in ("contrast", "neutral", "story", "site", "direction", "intervention"):
        assert getattr(found, field) == getattr(result, field)


def test_writing_again_replaces_what_was_there(tmp_path: Path):
    write_steering(tmp_path, "x", synthetic.make_steering())
    shorter = dataclasses.replace(synthetic.make_steering(), table=synthetic.make_steering().table.head(2))
    assert len(read_steering(write_steering(tmp_path, "x", shorter)).table) == 2


def _edit(path: Path, change: Any) -> Path:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))
    return path


@pytest.mark.parametrize(
    "change",
    [
        lambda v: v.pop("tokens"),
        lambda v: v.update(more=1),
        lambda v: v.update(text=3),
        lambda v: v.update(tokens="abc"),
        lambda v: v.update(sites=["resid.past@1"]),
        lambda v: v["scores"].pop(),
        lambda v: v["scores"][0].__setitem__(0, float("nan")),
        lambda v: v["scores"][0].__setitem__(0, "much"),
    ],
)
def test_a_malformed_scan_is_corrupt_and_named(tmp_path: Path, change: Any):
    path = _edit(write_scan(tmp_path, "x", synthetic.make_scan("a b")), change)
    with pytest.raises(CorruptArtifact, match=r"x\.json is malformed"):
        read_scan(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda v: v.pop("steps"),
        lambda v: v["steps"].append({"name": "x", "seconds": -1, "detail": ""}),
        lambda v: v["identity"].pop("weights"),
        lambda v: v.update(versions=[]),
        lambda v: v.update(summary="done"),
    ],
)
def test_a_malformed_run_is_corrupt_and_named(tmp_path: Path, change: Any):
    path = _edit(write_run(tmp_path, Run("x", (), synthetic.IDENTITY)), change)
    with pytest.raises(CorruptArtifact, match=f"{path.name} is malformed"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda v: v["contrast"].pop("positive"),
        lambda v: v["contrast"].update(positive=[]),
        lambda v: v["contrast"].update(other=[]),
        lambda v: v.update(site="nowhere"),
        lambda v: v.update(table="0" * 64),
    ],
)
def test_a_malformed_dose_response_is_corrupt(tmp_path: Path, change: Any):
    path = _edit(write_steering(tmp_path, "x", synthetic.make_steering()), change)
    with pytest.raises(CorruptArtifact):
        read_steering(path)


def test_what_is_not_json_is_corrupt(tmp_path: Path):
    (tmp_path / "run.json").write_bytes(b"\xff\xfe{")
    with pytest.raises(CorruptArtifact, match="not JSON"):
        read_run(tmp_path)
    (tmp_path / "run.json").write_text("[1]")
    with pytest.raises(CorruptArtifact, match="one JSON object"):
        read_run(tmp_path)


def test_a_table_that_was_changed_or_lost_is_corrupt(tmp_path: Path):
    path = write_steering(tmp_path, "x", synthetic.make_steering())
    table = path.with_suffix(".parquet")
    table.write_bytes(table.read_bytes()[:-1] + b"x")
    with pytest.raises(CorruptArtifact, match="checksum"):
        read_steering(path)
    table.unlink()
    with pytest.raises(CorruptArtifact, match=r"x\.parquet is missing"):
        read_steering(path)


def test_a_table_without_its_description_is_not_passed_over(tmp_path: Path):
    write_steering(tmp_path, "x", synthetic.make_steering()).unlink()
    with pytest.raises(CorruptArtifact, match="interrupted"):
        read_results(tmp_path)


@pytest.mark.parametrize("name", ["", "../x", "a/b", "a b", ".hidden", "a\n"])
def test_a_name_that_is_no_plain_file_name_is_refused_and_nothing_is_written(tmp_path: Path, name: str):
    for write in (
        lambda: write_scan(tmp_path, name, synthetic.make_scan("a b")),
        lambda: write_steering(tmp_path, name, synthetic.make_steering()),
        lambda: probe_path(tmp_path, name),
    ):
        with pytest.raises(UsageError, match="cannot name a result"):
            write()
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_scores_that_are_not_finite_cannot_be_stored(tmp_path: Path):
    good = synthetic.make_scan("a b").scan
    bad = Scan(good.tokens, good.sites, np.full_like(good.scores, np.inf))
    with pytest.raises(UsageError, match="NaN or infinite"):
        write_scan(tmp_path, "x", ScanResult(bad, "a b", "g"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.drop("kl"), "lacks kl"),
        (lambda t: t.head(0), "empty"),
        (lambda t: t.with_columns(kl=float("nan")), "'kl'"),
        (lambda t: t.with_columns(log_odds=pl.lit(None, pl.Float64)), "'log_odds'"),
        (lambda t: t.with_columns(strength=pl.lit("much")), "'strength'"),
    ],
)
def test_a_table_that_is_no_dose_response_is_refused(change: Any, said: str):
    result = synthetic.make_steering()
    with pytest.raises(UsageError, match=said):
        dataclasses.replace(result, table=change(result.table))


def test_a_step_lasts_no_negative_or_endless_time():
    for seconds in (-1.0, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="not a duration"):
            Step("x", seconds)


def test_a_folder_that_is_missing_or_empty_says_what_to_run(tmp_path: Path):
    with pytest.raises(ArtifactMissing, match="reprobe demo --out"):
        read_results(tmp_path / "none")
    with pytest.raises(ArtifactMissing, match=r"holds no results.*reprobe demo --out"):
        read_results(tmp_path)


def test_everything_in_a_folder_is_found_by_name(full: Path):
    results = read_results(full)
    assert results.run is not None
    assert list(results.stores) == ["cities", "emotions"]
    assert list(results.grids) == [
        f"{data}-{reader}" for data in ("cities", "emotions") for reader in ("logistic", "mean-difference", "pca")
    ]
    assert (list(results.scans), list(results.steering)) == (["capitals"], ["happiness"])
