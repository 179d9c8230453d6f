"""Extraction: from prompts to activations in a store, and back: are they what the model gives?

run         · from prompts to a store         calibration · how many tokens a pass should hold
transfer    · from the device to the host     share       · which shards one of several processes writes
cluster     · many workers, by Ray            vllm        · from vLLM's files to a store
proof       · from a store back to the model  ledger      · what a store says its rows are, and they computed again
difference  · how far two rows are apart      diagnosis   · what rows that differ are instead
"""

from reprobe.extraction.cluster import extract_on_ray
from reprobe.extraction.proof import DirectionReplay, Replay, SiteReplay, replay
from reprobe.extraction.run import Job, extract, prepare
from reprobe.extraction.share import Share
from reprobe.extraction.vllm import VllmFiles, import_vllm

__all__ = [
    "DirectionReplay",
    "Job",
    "Replay",
    "Share",
    "SiteReplay",
    "VllmFiles",
    "extract",
    "extract_on_ray",
    "import_vllm",
    "prepare",
    "replay",
]
