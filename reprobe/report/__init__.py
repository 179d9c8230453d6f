"""Results as figures and as one self-contained HTML page.

folder   · what lies in a results folder      results  · files of runs, scans and steering
measured · tables that verbs save             study    · probe grids that belong together
curves   · accuracy over blocks, effect over strength
maps     · accuracy of heads, scores of tokens
points   · rows of one site                   transfer · from data set to data set
reliability · probabilities and what comes true    cosines · which directions are one
traces   · which states carry a fact
style    · how figures look
sections · what the page says                 blocks   · what sections are made of
detectors · how many detectors where, and what they cause      dissection · the report of those
svg      · a figure as part of a page         page     · the page itself
"""

from reprobe.report.cosines import cosine_map, layer_cosines
from reprobe.report.curves import dose_curves, layer_curves
from reprobe.report.detectors import causal_intervals, detector_bars
from reprobe.report.dissection import write_dissection
from reprobe.report.folder import Damaged, Results, read_results
from reprobe.report.maps import head_map, scan_map
from reprobe.report.page import write_report
from reprobe.report.points import projections, scatter
from reprobe.report.reliability import reliability
from reprobe.report.results import (
    Run,
    ScanResult,
    SteeringResult,
    Step,
    comparison_path,
    probe_path,
    read_run,
    read_scan,
    read_steering,
    save_scan,
    store_path,
    write_run,
    write_scan,
    write_steering,
)
from reprobe.report.traces import trace_curves, trace_map
from reprobe.report.transfer import transfer_map

__all__ = [
    "Damaged",
    "Results",
    "Run",
    "ScanResult",
    "SteeringResult",
    "Step",
    "causal_intervals",
    "comparison_path",
    "cosine_map",
    "detector_bars",
    "dose_curves",
    "head_map",
    "layer_cosines",
    "layer_curves",
    "probe_path",
    "projections",
    "read_results",
    "read_run",
    "read_scan",
    "read_steering",
    "reliability",
    "save_scan",
    "scan_map",
    "scatter",
    "store_path",
    "trace_curves",
    "trace_map",
    "transfer_map",
    "write_dissection",
    "write_report",
    "write_run",
    "write_scan",
    "write_steering",
]
