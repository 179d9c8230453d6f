"""Evaluation: the effect and the side effects of interventions."""

from reprobe.evaluation.effect import Contrast, divergence, dose_response, log_odds

__all__ = ["Contrast", "divergence", "dose_response", "log_odds"]
