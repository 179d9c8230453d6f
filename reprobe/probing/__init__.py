"""Reading concepts from stored activations, and proving how well.

direction  · a unit vector at a site, with its provenance    artifact  · one safe file for what is kept
    reader     · what all readers share                          readers   · the readers, one class each
rows       · which rows of a store, with which labels        crossval  · folds that never split a group
grid       · one reader at every site: `probe`               intervals · AUROC and cluster bootstrap
probe_grid · what that leaves: `ProbeGrid`                   logistic  · many logistic regressions solved at once
    logistic_reader · one penalty, or the best of several
"""

from reprobe.probing.crossval import group_folds
from reprobe.probing.direction import Direction
from reprobe.probing.grid import probe
from reprobe.probing.probe_grid import ProbeGrid, Selected
from reprobe.probing.reader import Reader
from reprobe.probing.readers import LogisticReader, MeanDifference, PCAReader

__all__ = [
    "Direction",
    "LogisticReader",
    "MeanDifference",
    "PCAReader",
    "ProbeGrid",
    "Reader",
    "Selected",
    "group_folds",
    "probe",
]
