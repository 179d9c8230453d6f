"""Directions and grids for others: a folder with one file and a model card, here or on the Hugging Face hub.

Enters: a `Direction` or `ProbeGrid` and a place, a local folder or `hf:OWNER/NAME`; or only the place. Leaves: the
folder; or what is in it. A folder is read as safetensors, and nothing in it is run. `huggingface_hub` is imported only
to write a card or where the hub is asked for; who may write there is its affair.
"""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from reprobe.errors import ArtifactExists, ArtifactMissing, FetchFailed, UsageError
from reprobe.probing import direction, probe_grid
from reprobe.probing.artifact import kind_of
from reprobe.probing.card import HUB_ID, model_card
from reprobe.probing.direction import Direction
from reprobe.probing.probe_grid import ProbeGrid
from reprobe.provenance import sync_folder, write_durably

CARD = "README.md"
#: The file of each kind in a folder.
FILES = {direction.KIND: "direction.safetensors", probe_grid.KIND: "grid.safetensors"}
_HUB = "hf:"


def push(
    artifact: Direction | ProbeGrid, to: str | Path, *, overwrite: bool = False, private: bool = False
) -> str | Path:
    """Write a direction or a grid with its model card to a folder, or to a repository on the hub.

    `to` is a local folder, or `hf:OWNER/NAME`: a model repository, made if need be (`private` or not), to which this
    adds one commit with two files. Returns the folder, or the commit's address. `overwrite` replaces what was pushed
    there before and leaves other files alone. Raises `ArtifactExists` if something is there and `overwrite` was not
    given, or if a folder holds only other things; `FetchFailed` if the hub does not answer or refuses.
    """
    if not isinstance(artifact, Direction | ProbeGrid):
        raise UsageError(f"push takes a Direction or a ProbeGrid, not a {type(artifact).__name__}")
    repo = _repo(to)
    if repo is not None:
        return _upload(artifact, repo, overwrite=overwrite, private=private)
    if private:
        raise UsageError(f"private=True is for the hub (hf:OWNER/NAME); {to} is a local folder")
    return _write(artifact, Path(to), overwrite=overwrite)


def pull(source: str | Path, *, revision: str | None = None) -> Direction | ProbeGrid:
    """The direction or grid in a folder that `push` wrote, or in `hf:OWNER/NAME` at `revision` (branch, tag, commit).

    Raises `ArtifactMissing` if there is nothing, `CorruptArtifact` if it is not as it was written, `SchemaMismatch` if
    another version wrote it, `FetchFailed` if the hub does not answer or refuses.
    """
    repo = _repo(source)
    if repo is not None:
        return _only(_download(repo, revision), str(source))
    if revision is not None:
        raise UsageError(f"revision={revision!r} is for the hub (hf:OWNER/NAME); {source} is a local folder")
    folder = Path(source)
    if not folder.is_dir():
        hint = f"; for the hub write hf:{source}" if HUB_ID.fullmatch(str(source)) else ""
        raise ArtifactMissing(f"there is no folder {source}{hint}")
    return _only(folder, str(source))


def load(path: str | Path) -> Direction | ProbeGrid:
    """The direction or grid in one file. Raises what `Direction.load` and `ProbeGrid.load` do."""
    return ProbeGrid.load(path) if kind_of(Path(path)) == probe_grid.KIND else Direction.load(path)


def _only(folder: Path, name: str) -> Direction | ProbeGrid:
    found = [file for file in FILES.values() if (folder / file).is_file()]
    if not found:
        raise ArtifactMissing(f"{name} holds neither {' nor '.join(FILES.values())}: nothing was pushed there")
    if len(found) > 1:
        raise UsageError(f"{name} holds {' and '.join(found)}: load the one you mean, e.g. with Direction.load")
    return load(folder / found[0])


def _fill(artifact: Direction | ProbeGrid, folder: Path, address: str) -> str:
    """Write both files, the card last; returns the name of the artifact's own."""
    name = FILES[direction.KIND if isinstance(artifact, Direction) else probe_grid.KIND]
    artifact.save(folder / name, overwrite=True)
    write_durably(folder / CARD, model_card(artifact, address).encode())
    return name


def _write(artifact: Direction | ProbeGrid, folder: Path, *, overwrite: bool) -> Path:
    if folder.exists() and not folder.is_dir():
        raise ArtifactExists(f"{folder} is a file; name a folder")
    there = {p.name for p in folder.iterdir()} if folder.is_dir() else set()
    if there and not overwrite:
        raise ArtifactExists(f"{folder} exists and is not empty; choose another name or pass overwrite=True")
    if there and not there & {*FILES.values()}:
        raise ArtifactExists(f"{folder} holds other things, and nothing that was pushed there; choose another name")
    if there:
        name = _fill(artifact, folder, folder.name)
        for other in {*FILES.values()} - {name}:
            (folder / other).unlink(missing_ok=True)
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
    try:
        _fill(artifact, made, folder.name)  # no paths of this machine
        made.chmod(0o755)  # mkdtemp makes folders private
        os.replace(made, folder)  # whole or not at all; an empty folder may give way
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise
    sync_folder(folder.parent)
    return folder


def _upload(artifact: Direction | ProbeGrid, repo: str, *, overwrite: bool, private: bool) -> str:
    from huggingface_hub import HfApi

    api = HfApi()
    with tempfile.TemporaryDirectory() as made:
        name = _fill(artifact, Path(made), _HUB + repo)
        with _hub_errors(repo):
            api.create_repo(repo, repo_type="model", private=private, exist_ok=overwrite)
            commit = api.upload_folder(
                repo_id=repo,
                repo_type="model",
                folder_path=made,
                allow_patterns=[name, CARD],
                delete_patterns=[other for other in FILES.values() if other != name],
                commit_message=f"reprobe: {name}",
            )
    return str(commit.commit_url)


def _download(repo: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    with _hub_errors(repo):
        return Path(snapshot_download(repo, repo_type="model", revision=revision, allow_patterns=[*FILES.values()]))


@contextlib.contextmanager
def _hub_errors(repo: str) -> Iterator[None]:
    """The hub's errors as ours."""
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        yield
    except (GatedRepoError, RepositoryNotFoundError) as error:
        raise ArtifactMissing(
            f"hf:{repo} does not exist or is not yours to see: check the spelling, and `hf auth login` for private ones"
        ) from error
    except RevisionNotFoundError as error:
        raise ArtifactMissing(f"hf:{repo} has no such revision: {_first_line(error)}") from error
    except HFValidationError as error:
        raise UsageError(f"hf:{repo} is no address on the hub: {_first_line(error)}") from error
    except Exception as error:  # no network, offline, no permission: the kinds come from whatever client the hub uses
        if getattr(getattr(error, "response", None), "status_code", None) == 409:
            raise ArtifactExists(
                f"hf:{repo} exists; choose another name, or pass overwrite=True: its model card is replaced"
            ) from error
        raise FetchFailed(
            f"the hub did not do it for hf:{repo}: {_first_line(error)}. Check the network, and `hf auth login`."
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _repo(place: str | Path) -> str | None:
    """OWNER/NAME of an address on the hub, None for a local folder."""
    if not isinstance(place, str) or not place.startswith(_HUB):
        return None
    repo = place.removeprefix(_HUB)
    if not HUB_ID.fullmatch(repo):
        raise UsageError(f"{place!r} is no address on the hub: write hf:OWNER/NAME")
    return repo
