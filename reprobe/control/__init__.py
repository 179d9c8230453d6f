"""Control: directions, maps and activations put into a model (operator × site × scope × gate); edits of weights."""

from reprobe.control.adapters import Adapter
from reprobe.control.along import Ablate, Add, Clamp, Scale
from reprobe.control.baked_model import export_baked
from reprobe.control.baking import Baked, bake
from reprobe.control.bundle import Steering
from reprobe.control.edited_model import edits_in, export_edited, load_edited, save_edits
from reprobe.control.edits import EditEffect, WeightEdit
from reprobe.control.effects import Done, Effect
from reprobe.control.export import export, read_control_vector
from reprobe.control.gates import When
from reprobe.control.ledger import EditLedger, apply_edits, edited, ledger_of
from reprobe.control.maps import Affine, LowRank
from reprobe.control.operators import Operator
from reprobe.control.scopes import Scope
from reprobe.control.steering import steer
from reprobe.control.streams import AddContrast
from reprobe.control.values import Noise, Replace

__all__ = [
    "Ablate",
    "Adapter",
    "Add",
    "AddContrast",
    "Affine",
    "Baked",
    "Clamp",
    "Done",
    "EditEffect",
    "EditLedger",
    "Effect",
    "LowRank",
    "Noise",
    "Operator",
    "Replace",
    "Scale",
    "Scope",
    "Steering",
    "WeightEdit",
    "When",
    "apply_edits",
    "bake",
    "edited",
    "edits_in",
    "export",
    "export_baked",
    "export_edited",
    "ledger_of",
    "load_edited",
    "read_control_vector",
    "save_edits",
    "steer",
]
