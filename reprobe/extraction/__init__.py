"""Extraction: from prompts to activations in a store, and back: are they what the model gives?"""

from reprobe.extraction.plan import Plan, padded_plan
from reprobe.extraction.replay import DirectionReplay, Replay, SiteReplay, replay
from reprobe.extraction.run import Job, extract, prepare
from reprobe.extraction.vllm import VllmFiles, import_vllm

__all__ = [
    "DirectionReplay",
    "Job",
    "Plan",
    "Replay",
    "SiteReplay",
    "VllmFiles",
    "extract",
    "import_vllm",
    "padded_plan",
    "prepare",
    "replay",
]
