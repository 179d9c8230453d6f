"""Evaluation: the effect and the side effects of interventions."""

from reprobe.evaluation.causation import Causation, causes
from reprobe.evaluation.choices import (
    METRICS,
    PRIMER,
    Choices,
    ChoiceScore,
    compare_choices,
    first_questions,
    multiple_choice,
)
from reprobe.evaluation.effect import Contrast, Readout, divergence, dose_response, log_odds
from reprobe.evaluation.generation import distinct, entropy, fluency
from reprobe.evaluation.passages import NEUTRAL, Passage
from reprobe.evaluation.side_effects import SideEffects, side_effects
from reprobe.evaluation.strength import Tuned, tune

__all__ = [
    "Causation",
    "ChoiceScore",
    "Choices",
    "Contrast",
    "METRICS",
    "NEUTRAL",
    "PRIMER",
    "Passage",
    "Readout",
    "SideEffects",
    "Tuned",
    "causes",
    "compare_choices",
    "distinct",
    "divergence",
    "dose_response",
    "entropy",
    "first_questions",
    "fluency",
    "log_odds",
    "multiple_choice",
    "side_effects",
    "tune",
]
