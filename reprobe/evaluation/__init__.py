"""Evaluation: the effect and the side effects of interventions."""

from reprobe.evaluation.choices import PRIMER, Choices, compare, multiple_choice
from reprobe.evaluation.effect import Contrast, divergence, dose_response, log_odds

__all__ = [
    "PRIMER",
    "Choices",
    "Contrast",
    "compare",
    "divergence",
    "dose_response",
    "log_odds",
    "multiple_choice",
]
