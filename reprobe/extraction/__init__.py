"""Extraction: from prompts to activations in a store.

run         · from prompts to a store         calibration · how many tokens a pass should hold
transfer    · from the device to the host     share       · which shards one of several processes writes
cluster     · many workers of one store, on Ray
"""

from reprobe.extraction.cluster import extract_on_ray
from reprobe.extraction.run import Job, extract, prepare
from reprobe.extraction.share import Share

__all__ = ["Job", "Share", "extract", "extract_on_ray", "prepare"]
