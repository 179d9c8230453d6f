"""Reading concepts from stored activations, and proving how well.

direction  · a unit vector at a site, with its provenance    artifact  · one safe file for what is kept
    reader     · what all readers share                          readers   · the readers, one class each
rows       · which rows of a store, with which labels        crossval  · folds that never split a group
grid       · one reader at every site: `probe`               intervals · AUROC and cluster bootstrap
probe_grid · what that leaves: `ProbeGrid`
moments    · one-pass sums, streamed from a store        leace     · erasing a concept
"""

from reprobe.probing.crossval import group_folds
from reprobe.probing.direction import Direction
from reprobe.probing.grid import probe
from reprobe.probing.leace import LEACE
from reprobe.probing.moments import ClassMoments, JointMoments, Moments, MomentsAccumulator, read_moments
from reprobe.probing.probe_grid import ProbeGrid, Selected
from reprobe.probing.reader import Reader
from reprobe.probing.readers import (
    CCSReader,
    ClusterMean,
    KSparseReader,
    LDAReader,
    LogisticReader,
    MeanDifference,
    PCAReader,
    RandomReader,
    RidgeReader,
    TTPDReader,
)

__all__ = [
    "LEACE",
    "CCSReader",
    "ClassMoments",
    "ClusterMean",
    "Direction",
    "JointMoments",
    "KSparseReader",
    "LDAReader",
    "LogisticReader",
    "MeanDifference",
    "Moments",
    "MomentsAccumulator",
    "PCAReader",
    "ProbeGrid",
    "RandomReader",
    "Reader",
    "RidgeReader",
    "Selected",
    "TTPDReader",
    "group_folds",
    "probe",
    "read_moments",
]
