"""An edited model on disk: an ordinary transformers folder that remembers its edits.

Enters: a language model whose ledger holds edits. Leaves: a folder that transformers (and `LanguageModel.load`) opens
as it is, with the edits, the base's identity and the original matrices beside the weights, so that `load_edited` can
take edits out again. Does not know how edits were made.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from reprobe.control.adapters import Adapter, holds_adapter
from reprobe.control.edits import WeightEdit
from reprobe.control.ledger import ledger_of
from reprobe.control.model_folder import put_model, whole_folder
from reprobe.errors import ArtifactMissing, CorruptArtifact, IdentityMismatch
from reprobe.model.identity import ModelIdentity, digest_weights
from reprobe.model.language_model import LanguageModel
from reprobe.provenance import canonical_json, digest_file, rebuilding, text, texts, versions, write_durably

FOLDER = "reprobe-edits"
_RECORD, _ORIGINALS = "edits.json", "originals.safetensors"


def export_edited(lm: LanguageModel, to: str | Path, *, originals: bool = True) -> Path:
    """Write the model as it is now, with its tokenizer and its edits, to a new folder.

    `originals` keeps a copy of each edited matrix as it was (where the ledger has it), so that reverting is exact.
    The folder exists whole or not at all. Raises `ArtifactExists` if something is there.
    """
    with whole_folder(Path(to)) as folder:
        put_model(lm, folder)
        _write_record(lm, folder / FOLDER, originals)
    return Path(to)


def save_edits(edits: Sequence[WeightEdit], to: str | Path) -> Path:
    """Write edits to a new folder, one file each, in their order. The folder exists whole or not at all. Raises
    `ArtifactExists`."""
    with whole_folder(Path(to)) as folder:
        for i, edit in enumerate(edits):
            edit.save(folder / f"{i:04d}.safetensors")
    return Path(to)


def load_edited(folder: str | Path, **options: Any) -> LanguageModel:
    """The model of a folder that `export_edited` wrote, with its edits in the ledger: `ledger_of(lm).revert(…)` works.

    `options` are those of `LanguageModel.load`. Raises `ArtifactMissing` if the folder holds no edits,
    `CorruptArtifact`, `IdentityMismatch` if the weights are not those that were exported (another dtype, say).
    """
    record, edits, originals = read_record(folder)
    lm = LanguageModel.load(folder, **options)
    if digest_weights(lm.net) != record["weights"]:
        raise IdentityMismatch(
            f"the weights loaded from {folder} are not those that were exported with its edits (changed since, or "
            f"loaded in another dtype: exported was {record['base']['dtype']}); its edits cannot be taken out"
        )
    ledger = ledger_of(lm, keep_originals=len(originals) > 0 or not edits)
    ledger.restore(
        ModelIdentity.from_json(record["base"]),
        edits,
        {name: original.to(lm.device) for name, original in originals.items()},
    )
    return lm


def edits_in(path: str | Path) -> list[WeightEdit]:
    """The edits of a file, of a folder of such files, of an adapter, or of an exported model."""
    place = Path(path)
    if not place.is_dir():
        return [WeightEdit.load(place)]
    if holds_adapter(place):
        return list(Adapter.load(place).edits())
    if (place / FOLDER / _RECORD).is_file():
        return read_record(place)[1]
    files = sorted(place.glob("*.safetensors"))
    if not files:
        raise ArtifactMissing(f"{place} is a folder without edits (*.safetensors)")
    return [WeightEdit.load(file) for file in files]


def read_record(folder: str | Path) -> tuple[dict[str, Any], list[WeightEdit], dict[str, torch.Tensor]]:
    """What an exported folder remembers: the record, the edits in their order, and the originals."""
    from safetensors.torch import load_file

    place = Path(folder) / FOLDER
    if not (place / _RECORD).is_file():
        raise ArtifactMissing(f"{folder} remembers no edits: it was not written by export_edited or `reprobe edit`")
    with rebuilding(f"{place / _RECORD}: malformed"):
        record = dict(json.loads((place / _RECORD).read_bytes()))
        files, kept = texts(record["edits"]), record["originals"]
        ModelIdentity.from_json(record["base"])
        text(record["weights"])
        if any(Path(name).name != name for name in files):
            raise ValueError("its edits do not lie beside it")
    edits = [WeightEdit.load(place / name) for name in files]
    if kept is None:
        return record, edits, {}
    file = place / _ORIGINALS
    if not file.is_file() or digest_file(file) != kept:
        raise CorruptArtifact(f"{file} is missing or was changed since it was written")
    with rebuilding(f"{file} cannot be read as safetensors"):
        return record, edits, load_file(file)


def _write_record(lm: LanguageModel, place: Path, originals: bool) -> None:
    from safetensors.torch import save_file

    ledger = ledger_of(lm)
    base = ledger.base
    place.mkdir()
    names = [f"{i:04d}.safetensors" for i in range(len(ledger.applied))]
    for name, edit in zip(names, ledger.applied, strict=True):
        edit.save(place / name)
    kept = {n: t.contiguous().cpu() for n, t in ledger.originals.items()} if originals else {}
    if kept:
        save_file(kept, place / _ORIGINALS)
    record = {
        "base": base.to_json(),
        "weights": digest_weights(lm.net),
        "edits": names,
        "originals": digest_file(place / _ORIGINALS) if kept else None,
        "versions": versions(),
    }
    write_durably(place / _RECORD, canonical_json(record).encode())
