"""Reading concepts from stored activations, and proving how well.

direction   · a unit vector at a site, with its provenance  artifact    · one safe file for what is kept
reader      · what all readers share                        readers     · the readers, one class each
rows        · which rows of a store, with which labels      crossval    · folds that never split a group
grid        · one reader at every site: `probe`             metrics     · AUROC, recall at 1 % FPR, ECE
probe_grid  · what that leaves: `ProbeGrid`                 intervals   · how sure they are, over groups
transfer    · from data set to data set                     calibration · scores as probabilities
permutation · p-values that include the search              controls    · selectivity, online code
comparison  · several readers in the same folds             controlled  · these two, in a grid's table
refit       · a reader fitted on some of the rows           tables      · tables as files
moments     · one-pass sums, streamed from a store          leace       · erasing a concept
logistic    · many logistic regressions solved at once      lbfgs       · the wide ones of them
streaming   · sites larger than memory, in batches
sharing     · folders and the hub: `push`, `pull`           card        · what their README.md says
sequences   · one score per prompt: `probe_sequences`       classes     · more than two: `probe_classes`
"""

from reprobe.probing.calibration import Platt
from reprobe.probing.classes import ClassGrid, probe_classes
from reprobe.probing.comparison import Calibrated, Comparison, compare
from reprobe.probing.controlled import with_controls
from reprobe.probing.controls import OnlineCode, Selectivity, online_code, reader_probabilities, selectivity
from reprobe.probing.crossval import group_folds
from reprobe.probing.direction import Direction
from reprobe.probing.grid import probe
from reprobe.probing.leace import LEACE
from reprobe.probing.moments import (
    ClassMoments,
    JointMoments,
    Moments,
    MomentsAccumulator,
    PairMoments,
    read_joint_moments,
    read_moments,
)
from reprobe.probing.pair_moments import read_pair_moments
from reprobe.probing.permutation import MeanDifferenceRefit, Permutations, permutation_test
from reprobe.probing.probe_grid import ProbeGrid, Selected
from reprobe.probing.reader import Reader
from reprobe.probing.readers import (
    READERS,
    AttentionReader,
    CCSReader,
    ClusterMean,
    KSparseReader,
    LDAReader,
    LogisticReader,
    MeanDifference,
    MultiClassReader,
    PCAReader,
    RandomReader,
    RidgeReader,
    TTPDReader,
    readers_named,
)
from reprobe.probing.sequences import probe_sequences
from reprobe.probing.sharing import load, pull, push
from reprobe.probing.tables import require_new_table, write_table
from reprobe.probing.transfer import TransferGrid, transfer

__all__ = [
    "AttentionReader",
    "CCSReader",
    "Calibrated",
    "ClassGrid",
    "ClassMoments",
    "ClusterMean",
    "Comparison",
    "Direction",
    "JointMoments",
    "KSparseReader",
    "LDAReader",
    "LEACE",
    "LogisticReader",
    "MeanDifference",
    "MeanDifferenceRefit",
    "Moments",
    "MomentsAccumulator",
    "MultiClassReader",
    "OnlineCode",
    "PCAReader",
    "PairMoments",
    "Permutations",
    "Platt",
    "ProbeGrid",
    "READERS",
    "RandomReader",
    "Reader",
    "RidgeReader",
    "Selected",
    "Selectivity",
    "TTPDReader",
    "TransferGrid",
    "compare",
    "group_folds",
    "load",
    "online_code",
    "permutation_test",
    "probe",
    "probe_classes",
    "probe_sequences",
    "pull",
    "push",
    "read_joint_moments",
    "read_moments",
    "read_pair_moments",
    "reader_probabilities",
    "readers_named",
    "require_new_table",
    "selectivity",
    "transfer",
    "with_controls",
    "write_table",
]
