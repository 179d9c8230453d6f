"""Reading concepts from stored activations, and proving how well.

direction  · a unit vector at a site, with its provenance    artifact  · one safe file for what is kept
    reader     · what all readers share                          readers   · the readers, one class each
rows       · which rows of a store, with which labels        crossval  · folds that never split a group
grid       · one reader at every site: `probe`               metrics   · AUROC, recall at 1 % FPR, ECE
probe_grid · what that leaves: `ProbeGrid`                   intervals · how sure they are, over groups
transfer   · from data set to data set                       calibration · scores as probabilities
permutation · p-values that include the search               controls  · selectivity, online code
comparison · several readers in the same folds               controlled · these two, in a grid's table
refit      · a reader fitted again, for those                tables    · tables as files
moments    · one-pass sums, streamed from a store        leace     · erasing a concept
"""

from reprobe.probing.calibration import Platt, platt
from reprobe.probing.comparison import Calibrated, Comparison, compare
from reprobe.probing.controlled import with_controls
from reprobe.probing.controls import OnlineCode, Selectivity, online_code, reader_probabilities, selectivity
from reprobe.probing.crossval import group_folds
from reprobe.probing.direction import Direction
from reprobe.probing.grid import probe
from reprobe.probing.leace import LEACE
from reprobe.probing.moments import ClassMoments, JointMoments, Moments, MomentsAccumulator, read_moments
from reprobe.probing.permutation import MeanDifferenceRefit, Permutations, permutation_test
from reprobe.probing.probe_grid import ProbeGrid, Selected
from reprobe.probing.reader import Reader
from reprobe.probing.readers import (
    READERS,
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
    readers_named,
)
from reprobe.probing.tables import require_new_table, write_table
from reprobe.probing.transfer import TransferGrid, transfer

__all__ = [
    "LEACE",
    "READERS",
    "CCSReader",
    "Calibrated",
    "ClassMoments",
    "ClusterMean",
    "Comparison",
    "Direction",
    "JointMoments",
    "KSparseReader",
    "LDAReader",
    "LogisticReader",
    "MeanDifference",
    "MeanDifferenceRefit",
    "Moments",
    "MomentsAccumulator",
    "OnlineCode",
    "PCAReader",
    "Permutations",
    "Platt",
    "ProbeGrid",
    "RandomReader",
    "Reader",
    "RidgeReader",
    "Selected",
    "Selectivity",
    "TTPDReader",
    "TransferGrid",
    "compare",
    "group_folds",
    "online_code",
    "permutation_test",
    "platt",
    "probe",
    "read_moments",
    "reader_probabilities",
    "readers_named",
    "require_new_table",
    "selectivity",
    "transfer",
    "with_controls",
    "write_table",
]
