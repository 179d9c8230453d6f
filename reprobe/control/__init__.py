"""Control: directions put back into a model as interventions (operator × site × scope), and edits of its weights."""

from reprobe.control.edited_model import edits_in, export_edited, load_edited, save_edits
from reprobe.control.edits import Effect, WeightEdit
from reprobe.control.ledger import EditLedger, apply_edits, edited, ledger_of
from reprobe.control.operators import Ablate, Add, Affine, Operator
from reprobe.control.scopes import Scope
from reprobe.control.steering import steer

__all__ = [
    "Ablate",
    "Add",
    "Affine",
    "EditLedger",
    "Effect",
    "Operator",
    "Scope",
    "WeightEdit",
    "apply_edits",
    "edited",
    "edits_in",
    "export_edited",
    "ledger_of",
    "load_edited",
    "save_edits",
    "steer",
]
