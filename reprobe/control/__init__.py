"""Control: directions put back into a model as interventions (operator × site × scope)."""

from reprobe.control.operators import Ablate, Add, Affine, Operator
from reprobe.control.scopes import Scope
from reprobe.control.steering import steer

__all__ = ["Ablate", "Add", "Affine", "Operator", "Scope", "steer"]
