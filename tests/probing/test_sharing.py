"""What is shared is one file and its card; what is pulled is what was pushed."""

import ast
import dataclasses
import inspect
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

import reprobe as rp
from reprobe.errors import ArtifactExists, ArtifactMissing, CorruptArtifact, FetchFailed, UsageError
from reprobe.probing.card import model_card
from reprobe.probing.sharing import load

HOSTILE = [
    "---\nbase_model: evil/model\n---",
    "```\n# free\n```",
    "a | b | c",
    "<script>alert(1)</script>",
    "[x](https://example.org) ![y](z)",
    "https://example.org www.example.org a@example.org &amp; &#60;",
    "*a* _b_ ~~c~~ `d` $e$ \\",
    "\u202eevil\u2028line\r\n\x00\x85",
    "{{ a }} {% b %} : # ' \"",
    "",
    "😀 ü",
]


@pytest.fixture
def one(identity):
    known = dataclasses.replace(identity, name="someone/some-model", revision="abc")
    return dataclasses.replace(
        rp.Direction.from_vector("resid.post@1", [3.0, 4.0], scale=2.0, offset=0.5, identity=known),
        reader="MeanDifference",
        classes=("no", "yes"),
        metrics={"n": 40, "chance": 0.5, "accuracy": 0.9, "accuracy_low": 0.8, "accuracy_high": 0.95},
        provenance={"identity": known.to_json(), "plan": {"at": "last"}, "store": "s" * 64},
    )


@pytest.fixture
def grid(planted, store_of):
    rows = planted(80, 21)
    return rp.probe(store_of({"resid.post@0": rows.X, "attn.heads@1": rows.X}, rows.y), rp.MeanDifference(), folds=4)


def parts(card):
    """The front matter as data, and the rest as Markdown tokens of an independent parser."""
    found = re.fullmatch(r"---\n(.*?)\n---\n(.*)", card, re.DOTALL)
    assert found
    return yaml.safe_load(found[1]), MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(found[2])


def cells(tokens):
    """The plain text of every table cell, row by row of two."""
    return [
        "".join(piece.content for piece in tokens[i + 1].children)
        for i, token in enumerate(tokens)
        if token.type == "td_open"
    ]


def test_a_folder_gives_back_what_was_pushed(tmp_path, one, grid):
    for artifact, name in ((one, "direction.safetensors"), (grid, "grid.safetensors")):
        folder = tmp_path / "sub" / name[:4]
        assert rp.push(artifact, folder) == folder
        assert sorted(p.name for p in folder.iterdir()) == sorted(["README.md", name])
        assert folder.stat().st_mode & 0o777 == 0o755
        pulled = rp.pull(folder)
        assert type(pulled) is type(artifact)
        assert rp.pull(str(folder)).provenance == artifact.provenance
    assert rp.pull(tmp_path / "sub" / "dire") == one
    assert rp.pull(tmp_path / "sub" / "grid").best() == grid.best()
    assert load(tmp_path / "sub" / "dire" / "direction.safetensors") == one
    assert sorted(p.name for p in (tmp_path / "sub").iterdir()) == ["dire", "grid"]  # no temporary folders


def test_nothing_is_replaced_unless_that_is_said_and_then_only_what_was_pushed(tmp_path, one, grid):
    folder = tmp_path / "shared"
    folder.mkdir()  # an empty folder holds nothing that could be lost
    rp.push(one, folder)
    with pytest.raises(ArtifactExists, match="overwrite=True"):
        rp.push(grid, folder)
    assert rp.pull(folder) == one
    (folder / "notes.txt").write_text("mine")
    rp.push(grid, folder, overwrite=True)
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "grid.safetensors", "notes.txt"]
    assert isinstance(rp.pull(folder), rp.ProbeGrid)
    project = tmp_path / "project"
    project.mkdir()
    (project / "README.md").write_text("a project")
    with pytest.raises(ArtifactExists, match="other things"):
        rp.push(one, project, overwrite=True)
    assert (project / "README.md").read_text() == "a project"
    with pytest.raises(ArtifactExists, match="is a file"):
        rp.push(one, project / "README.md", overwrite=True)


def test_a_push_that_fails_leaves_nothing(tmp_path, one, monkeypatch):
    monkeypatch.setattr("reprobe.probing.sharing.model_card", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        rp.push(one, tmp_path / "shared")
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_shared_folder_is_refused(tmp_path, one):
    with pytest.raises(ArtifactMissing, match="hf:someone/thing"):
        rp.pull("someone/thing")
    with pytest.raises(ArtifactMissing, match="neither"):
        rp.pull(tmp_path)
    with pytest.raises(UsageError, match="hf:OWNER/NAME"):
        rp.pull("hf:thing")
    with pytest.raises(UsageError, match="hf:OWNER/NAME"):
        rp.push(one, "hf:../../etc")
    with pytest.raises(UsageError, match="for the hub"):
        rp.pull(tmp_path, revision="main")
    with pytest.raises(UsageError, match="for the hub"):
        rp.push(one, tmp_path / "x", private=True)
    with pytest.raises(UsageError, match="not a dict"):
        rp.push({}, tmp_path / "x")
    rp.push(one, tmp_path / "both")
    (tmp_path / "both" / "grid.safetensors").write_bytes(b"junk")
    with pytest.raises(UsageError, match=r"direction\.safetensors and grid\.safetensors"):
        rp.pull(tmp_path / "both")
    (tmp_path / "both" / "direction.safetensors").unlink()
    with pytest.raises(CorruptArtifact):
        rp.pull(tmp_path / "both")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub that keeps what reaches it: `calls`, and per repository its files. It takes what the real client takes."""
    import huggingface_hub

    real = huggingface_hub.HfApi
    state = SimpleNamespace(calls=[], repos={}, fail=None)

    class Api:
        def create_repo(self, repo_id, *, repo_type, private, exist_ok):
            state.calls.append(("create_repo", repo_id, repo_type, private, exist_ok))
            if state.fail:
                raise state.fail
            state.repos.setdefault(repo_id, {})

        def upload_folder(self, *, repo_id, repo_type, folder_path, allow_patterns, delete_patterns, commit_message):
            inspect.signature(real.upload_folder).bind(
                self,
                repo_id=repo_id,
                repo_type=repo_type,
                folder_path=folder_path,
                allow_patterns=allow_patterns,
                delete_patterns=delete_patterns,
                commit_message=commit_message,
            )
            files = {str(p.relative_to(folder_path)): p.read_bytes() for p in Path(folder_path).rglob("*")}
            state.calls.append(("upload_folder", repo_id, repo_type, sorted(files), sorted(allow_patterns)))
            kept = {k: v for k, v in state.repos[repo_id].items() if k not in delete_patterns}
            state.repos[repo_id] = kept | files
            return SimpleNamespace(commit_url=f"https://hub.test/{repo_id}/commit/1")

    def snapshot_download(repo_id, *, repo_type, revision, allow_patterns):
        state.calls.append(("snapshot_download", repo_id, repo_type, revision, sorted(allow_patterns)))
        if state.fail:
            raise state.fail
        folder = tmp_path / "cache"
        folder.mkdir(exist_ok=True)
        for name, data in state.repos[repo_id].items():
            if name in allow_patterns:
                (folder / name).write_bytes(data)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return state


def test_only_our_two_files_go_to_the_hub_and_come_back_from_a_revision(hub, one, grid):
    assert rp.push(one, "hf:me/truth", private=True) == "https://hub.test/me/truth/commit/1"
    ours = ["README.md", "direction.safetensors"]
    assert hub.calls == [
        ("create_repo", "me/truth", "model", True, False),
        ("upload_folder", "me/truth", "model", ours, ours),
    ]
    assert sorted(hub.repos["me/truth"]) == ours
    assert b"rp.pull('hf:me/truth')" in hub.repos["me/truth"]["README.md"]
    assert rp.pull("hf:me/truth", revision="v1") == one
    assert hub.calls[-1] == (
        "snapshot_download", "me/truth", "model", "v1", ["direction.safetensors", "grid.safetensors"]
    )  # fmt: skip
    hub.repos["me/truth"]["mine.txt"] = b"x"
    rp.push(grid, "hf:me/truth", overwrite=True)
    assert ("create_repo", "me/truth", "model", False, True) in hub.calls
    assert sorted(hub.repos["me/truth"]) == ["README.md", "grid.safetensors", "mine.txt"]


def test_what_the_hub_refuses_is_told_in_our_words(hub, one):
    class Conflict(OSError):
        response = SimpleNamespace(status_code=409)

    hub.fail = Conflict("409 Conflict")
    with pytest.raises(ArtifactExists, match="overwrite=True"):
        rp.push(one, "hf:me/truth")
    for failure in (ConnectionError("no route\nmore"), RuntimeError("a client's own kind")):
        hub.fail = failure
        with pytest.raises(FetchFailed, match="Check the network"):
            rp.push(one, "hf:me/truth")
    assert [c[0] for c in hub.calls] == ["create_repo"] * 3
    from huggingface_hub.errors import RepositoryNotFoundError

    hub.fail = RepositoryNotFoundError.__new__(RepositoryNotFoundError)
    with pytest.raises(ArtifactMissing, match="hf auth login"):
        rp.pull("hf:me/truth")


def test_without_a_network_the_hubs_own_client_fails_in_our_words(one):
    with pytest.raises(FetchFailed, match="hf:me/truth"):
        rp.pull("hf:me/truth")
    with pytest.raises(FetchFailed, match="hf:me/truth"):
        rp.push(one, "hf:me/truth")


def test_a_card_says_where_of_what_and_how_well(one, grid):
    from huggingface_hub import ModelCard

    front, tokens = parts(model_card(one, "hf:me/truth"))
    assert front["base_model"] == "someone/some-model"
    assert front["library_name"] == "reprobe"
    assert "reprobe" in front["tags"]
    told = cells(tokens)
    pairs = dict(zip(told[::2], told[1::2], strict=True))
    assert pairs["site"] == "resid.post@1"
    assert pairs["token position"] == "last"
    assert pairs["weights"] == "a" * 64
    assert pairs["revision"] == "abc"
    assert pairs["classes"] == "no (below 0), yes (above)"
    assert pairs["accuracy, with its 95 % interval over groups"] == "0.900 [0.800, 0.950]"
    assert pairs["chance: the share of the larger class"] == "0.500"
    assert pairs["digest"] == one.digest
    (code,) = [t.content for t in tokens if t.type == "fence"]
    compile(code, "card", "exec")
    assert "By group-safe cross-validation" in model_card(grid.best(), "hf:me/truth")
    tried = dataclasses.replace(one, metrics={"bypass": 0.1, "kl": 0.02})  # as `refusal.search` leaves them
    assert "cross-validation" not in model_card(tried, "hf:me/truth")
    assert "rp.pull('hf:me/truth')" in code
    assert "rp.LanguageModel.load('someone/some-model', revision='abc')" in code
    assert ModelCard(model_card(one, "hf:me/truth")).data.base_model == "someone/some-model"
    front, tokens = parts(model_card(grid, "folder"))
    assert "base_model" not in front  # "tiny" is no address on the hub
    told = cells(tokens)
    first = grid.table.sort(["accuracy", "layer", "head"], descending=[True, False, False], nulls_last=True).row(
        0, named=True
    )
    assert told[0] == first["site"]
    assert told[1] == "{accuracy:.3f} [{accuracy_low:.3f}, {accuracy_high:.3f}]".format(**first)
    assert f"accuracy {grid.selected.accuracy:.3f}" in model_card(grid, "folder")


BLOCKS = {"paragraph", "heading", "table", "thead", "tbody", "tr", "th", "td"}
KINDS = {"inline", "fence"} | {f"{name}_{side}" for name in BLOCKS for side in ("open", "close")}
texts_of_data = st.sampled_from(HOSTILE) | st.text(st.characters(exclude_categories=["Cs"]))


@settings(deadline=None, max_examples=40)
@given(texts=st.lists(texts_of_data, min_size=8, max_size=8))
def test_no_text_from_data_is_more_than_text(texts):
    identity = rp.ModelIdentity(texts[0], texts[1], "llama", 3, 2, "a", "b", None, "float32", None)
    d = dataclasses.replace(
        rp.Direction.from_vector("resid.post@1", [3.0, 4.0], identity=identity),
        reader=texts[2],
        sign=texts[3],
        classes=(texts[4], texts[5]),
        params={texts[6]: texts[7]},
        metrics={texts[7]: texts[0]},
        provenance={"identity": identity.to_json(), "note": texts[1], texts[2]: texts[3], "plan": {"at": texts[4]}},
    )
    front, tokens = parts(model_card(d, "folder"))
    assert set(front) <= {"base_model", "library_name", "tags"}
    assert {t.type for t in tokens} <= KINDS
    assert [t.content for t in tokens if t.type == "inline" and t.level == 1 and t.content.startswith("A dir")] == [
        "A direction at `resid.post@1`"
    ]
    assert sum(t.type == "heading_open" for t in tokens) == 5
    inline = {child.type for t in tokens if t.type == "inline" for child in t.children}
    assert inline <= {"text", "text_special", "code_inline"}
    told = cells(tokens)
    assert len(told) % 2 == 0
    pairs = dict(zip(told[::2], told[1::2], strict=True))
    if all(c.isprintable() for c in texts[3]) and texts[3] == texts[3].strip() and texts[3]:
        assert pairs["sign"] == texts[3]
    assert all(c.isprintable() for cell in told for c in cell)
    (code,) = [t.content for t in tokens if t.type == "fence"]
    constants = [node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)]
    loaded = [texts[0], texts[1]] if "base_model" in front else [texts[0]]
    assert sorted(map(str, constants)) == sorted(["folder", "4", "The city of Paris is in", *loaded])


def test_where_numbers_are_missing_the_card_says_so():
    card = model_card(rp.Direction(None, np.array([1.0])), "folder")
    assert "None are known" in card
    assert "not recorded of which model" in card
    total = rp.Direction.from_vector("resid.post@1", [1.0, 0.0]) + rp.Direction.from_vector("resid.post@1", [0.0, 1.0])
    assert r"none at resid\.post\@1" in model_card(total, "folder")
