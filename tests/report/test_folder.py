"""A results folder is read by what lies in it: content tells the kinds, and nothing that lies there stops the rest."""

import json
import os
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from report import synthetic
from safetensors.numpy import save_file

from reprobe.errors import ArtifactMissing, CorruptArtifact
from reprobe.probing import write_table
from reprobe.report import Run, read_results, write_dissection, write_run, write_scan
from reprobe.report.folder import File
from reprobe.report.results import RECORD_KIND


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One small artifact of several kinds."""
    write_scan(tmp_path, "capitals", synthetic.make_scan("Rome is"))
    synthetic.make_trace().save(tmp_path / "facts.trace")
    synthetic.make_edit().save(tmp_path / "tower.safetensors")
    write_table(synthetic.side_effects(), tmp_path / "price.json")
    return tmp_path


def test_everything_in_a_full_folder_is_found(full: Path):
    results = read_results(full)
    assert list(results.traces) == ["facts"]
    assert {name: len(found) for name, found in results.edits.items()} == {"0006": 1, "0007": 1, "tower": 1}
    assert list(results.dissections) == ["neurons"]
    assert {name: found.kind for name, found in results.measured.items()} == {
        "across": "transfer table",
        "edit-scores": "edit-scores table",
        "held-out": "dose-response table",
        "misconceptions": "multiple-choice table",
        "price": "side-effects table",
        "tuned": "strength search",
    }
    assert results.pages == {results.dissections["neurons"].digest: full / "neurons & more.html"}
    assert not results.damaged
    assert not results.unknown


def test_a_file_is_what_it_holds_whatever_its_name_and_place(folder: Path):
    for old, new in (
        ("facts.trace", "a/b/c.bin"),
        ("tower.safetensors", "a/x.edit"),
        ("scans/capitals.json", "steering/of capitals.json"),
        ("price.json", "scans/1.json"),
    ):
        (folder / new).parent.mkdir(parents=True, exist_ok=True)
        (folder / old).rename(folder / new)
    results = read_results(folder)
    assert (list(results.traces), list(results.edits), list(results.scans)) == (["c"], ["x"], ["of capitals"])
    assert list(results.measured) == ["1"]
    assert not results.damaged


def test_names_that_are_alike_are_told_apart_by_their_folders(folder: Path):
    for layer, place in enumerate(("one", "two/deep")):
        synthetic.make_edit(layer).save(folder / place / "tower.safetensors")
    assert list(read_results(folder).edits) == ["one/tower", "tower", "two/deep/tower"]


def test_a_copy_is_listed_and_shown_once(folder: Path):
    shutil.copy(folder / "facts.trace", folder / "same.trace")
    results = read_results(folder)
    assert list(results.traces) == ["facts"]
    assert [file.name for file in results.files if file.kind == "causal trace"] == ["facts", "same"]


def test_files_are_listed_with_the_digests_of_their_bytes(folder: Path):
    files = {file.path: file for file in read_results(folder).files}
    assert set(files) == {"facts.trace", "price.json", "scans/capitals.json", "tower.safetensors"}
    assert files["facts.trace"] == File("causal trace", "facts", "facts.trace", files["facts.trace"].digest)
    changed = dict(files)
    synthetic.make_trace(2).save(folder / "facts.trace", overwrite=True)
    again = {file.path: file for file in read_results(folder).files}
    assert [path for path in again if again[path] != changed[path]] == ["facts.trace"]


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("grid.safetensors", b"\x08\0\0\0", "cannot be read as safetensors"),
        ("empty.safetensors", b"", "cannot be read as safetensors"),
        ("x.json", b"{", "not JSON"),
        ("scans/x.json", b"{}", "missing or unknown"),
        ("steering/x.json", b"[1]", "one JSON object"),
        ("table.parquet", b"PAR1 no more", "cannot be read as a table"),
        ("broken.reprobe/manifest.json", b"{}", ""),
    ],
)
def test_what_is_damaged_is_named_and_the_rest_is_read(folder: Path, name: str, content: bytes, why: str):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(content)
    results = read_results(folder)
    (damaged,) = results.damaged
    assert damaged.path == name.removesuffix("/manifest.json")
    assert why in damaged.why
    assert str(folder) not in damaged.why
    assert (len(results.scans), len(results.traces), len(results.edits), len(results.measured)) == (1, 1, 1, 1)


def test_an_artifact_that_was_cut_short_is_damaged_whole(folder: Path):
    data = (folder / "facts.trace").read_bytes()
    for cut in (len(data) - 1, len(data) // 2):
        (folder / "facts.trace").write_bytes(data[:cut])
        assert "facts.trace" in [*(d.path for d in read_results(folder).damaged), *read_results(folder).unknown]
    (folder / "facts.trace").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert [d.path for d in read_results(folder).damaged] == ["facts.trace"]


def test_what_is_no_result_is_unknown_and_figures_and_reports_are_neither(folder: Path):
    (folder / "notes.txt").write_text("mine")
    (folder / "other.json").write_text(json.dumps({"kind": "soup"}))
    (folder / "rows.csv").write_text("a,b\n1,2\n")
    save_file({"w": np.zeros(3)}, folder / "weights.safetensors")
    (folder / "figure.svg").write_text("<svg/>")
    (folder / "report.html").write_text('<!doctype html><meta name="generator" content="reprobe">')
    (folder / ".hidden.json").write_text("{")
    model = folder / "model"
    model.mkdir()
    (model / "config.json").write_text("{")
    save_file({"w": np.zeros(3)}, model / "model.safetensors")
    results = read_results(folder)
    assert list(results.unknown) == ["model", "notes.txt", "other.json", "rows.csv", "weights.safetensors"]
    assert not results.damaged


def test_a_pipe_and_a_link_to_nowhere_are_passed_over(folder: Path):
    os.mkfifo(folder / "pipe")
    (folder / "lost.json").symlink_to(folder / "nowhere")
    results = read_results(folder)
    assert list(results.unknown) == ["lost.json", "pipe"]
    assert list(results.traces) == ["facts"]


def test_a_link_to_a_folder_is_not_followed_in_a_circle(folder: Path):
    (folder / "again").symlink_to(folder, target_is_directory=True)
    assert list(read_results(folder).traces) == ["facts"]


def test_a_recipe_is_kept_as_text_and_is_no_result_by_itself(tmp_path: Path):
    (tmp_path / "recipe.toml").write_text('model = "smollm2-135m"\n')
    with pytest.raises(ArtifactMissing, match="holds no results"):
        read_results(tmp_path)
    write_run(tmp_path, Run("x"))
    assert read_results(tmp_path).recipes == {"recipe": 'model = "smollm2-135m"\n'}


def test_the_record_of_a_run_is_known_and_its_digests_are_kept(folder: Path):
    record = {"recipe": "aa", "model": {}, "data": {"cities": "bb"}, "digest": "cc", "versions": {}, "finished": {}}
    record["kind"] = RECORD_KIND
    (folder / "recipe.json").write_text(json.dumps(record))
    found = read_results(folder)
    assert found.records == {"recipe": {"recipe": "aa", "data cities": "bb", "recipe, model and data": "cc"}}
    assert not found.unknown
    (folder / "recipe.json").write_text(json.dumps(record | {"data": {"cities": 1}}))
    assert [d.path for d in read_results(folder).damaged] == ["recipe.json"]


def test_where_nothing_can_be_read_that_is_an_error_which_says_why(tmp_path: Path):
    (tmp_path / "x.safetensors").write_bytes(b"x" * 20)
    with pytest.raises(CorruptArtifact, match=r"nothing in .* can be read: x\.safetensors: .*safetensors"):
        read_results(tmp_path)


def test_the_page_of_a_dissection_is_known_by_what_it_is_of(folder: Path):
    found = synthetic.make_dissection()
    found.save(folder / "n.dissection")
    page = write_dissection(found, folder / "pages" / "n.html")
    shutil.copy(page, folder / "copy.html")
    assert list(read_results(folder).pages) == [found.digest]
    assert read_results(folder).dissections["n"].digest == found.digest


@settings(deadline=None, max_examples=60)
@given(
    name=st.sampled_from(["x.json", "run.json", "scans/x.json", "x.csv", "x.parquet", "x.safetensors", "x.toml", "x"]),
    content=st.one_of(
        st.binary(max_size=200),
        st.text(max_size=60).map(str.encode),
        st.recursive(
            st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=5)),
            lambda inner: st.one_of(
                st.lists(inner, max_size=3),
                st.dictionaries(
                    st.sampled_from(["kind", "table", "strength", "kl", "model", "tokens", "about"]), inner, max_size=4
                ),
            ),
            max_leaves=12,
        ).map(lambda value: json.dumps(value).encode()),
        st.sampled_from([b"PAR1", b"\x02\0\0\0\0\0\0\0{}", b"kl,strength\n", b"kl,strength\nx,1\n", b"\xff\xfe{"]),
    ),
)
def test_whatever_a_file_holds_the_rest_is_read(name: str, content: bytes):
    with TemporaryDirectory() as place:
        folder = Path(place)
        synthetic.make_edit().save(folder / "tower.safetensors")
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
        results = read_results(folder)
        assert "tower" in results.edits
        told = {*results.unknown, *(d.path for d in results.damaged), *(f.path for f in results.files)}
        assert name in told or results.run is not None
