"""Control: directions, maps and activations put back into a model (operator × site × scope × gate)."""

from reprobe.control.along import Ablate, Add, Clamp, Scale
from reprobe.control.baking import Baked, bake
from reprobe.control.bundle import Steering
from reprobe.control.effects import Done, Effect
from reprobe.control.export import export, read_control_vector
from reprobe.control.gates import When
from reprobe.control.maps import Affine, LowRank
from reprobe.control.operators import Operator
from reprobe.control.scopes import Scope
from reprobe.control.steering import steer
from reprobe.control.values import Noise, Replace

__all__ = [
    "Ablate",
    "Add",
    "Affine",
    "Baked",
    "Clamp",
    "Done",
    "Effect",
    "LowRank",
    "Noise",
    "Operator",
    "Replace",
    "Scale",
    "Scope",
    "Steering",
    "When",
    "bake",
    "export",
    "read_control_vector",
    "steer",
]
