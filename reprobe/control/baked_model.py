"""A baked model on disk: an ordinary transformers folder in which a steering is part of the weights.

Enters: a language model and interventions. Leaves: a folder that transformers (and `LanguageModel.load`) opens as it
is, with a record of what was baked into which model; and the model as it was. Does not know how anything is baked.
"""

from pathlib import Path

from reprobe.control.baking import bake
from reprobe.control.bundle import Steering
from reprobe.control.model_folder import put_model, refuse_existing, whole_folder
from reprobe.control.operators import Operator
from reprobe.model.language_model import LanguageModel
from reprobe.provenance import canonical_json, versions, write_durably

#: What was baked, beside the weights.
RECORD = "reprobe-baked.json"


def export_baked(
    lm: LanguageModel,
    to: str | Path,
    *interventions: Operator | Steering,
    untie: bool = False,
    allow_mismatch: bool = False,
) -> tuple[str, ...]:
    """Bake interventions, write the model with its tokenizer to the new folder `to`, and take them out again.

    Returns the names of the parameters that differ from the model's own. The folder exists whole or not at all. Raises
    `ArtifactExists` if something is there, and what `bake` does, with nothing written.
    """
    target, base = Path(to), lm.identity
    refuse_existing(target)  # before weights are touched
    items = [x for given in interventions for x in (given.interventions if isinstance(given, Steering) else (given,))]
    record = {
        "base": base.to_json(),
        "interventions": [str(item) for item in items],
        "steerings": [
            {"name": s.name, "provenance": dict(s.provenance)} for s in interventions if isinstance(s, Steering)
        ],
        "versions": versions(),
    }
    with bake(lm, *interventions, untie=untie, allow_mismatch=allow_mismatch) as baked, whole_folder(target) as folder:
        put_model(lm, folder)
        write_durably(folder / RECORD, canonical_json(record | {"parameters": list(baked.parameters)}).encode())
    return baked.parameters
