"""Extraction: from prompts to activations in a store."""

from reprobe.extraction.plan import Plan, padded_plan
from reprobe.extraction.run import Job, extract, prepare

__all__ = ["Job", "Plan", "extract", "padded_plan", "prepare"]
