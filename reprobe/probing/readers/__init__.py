"""The readers: each finds one direction in activations.

    means    · MeanDifference, ClusterMean, RandomReader     lda      · LDAReader
    pca      · PCAReader, of pair differences                ridge    · RidgeReader, of numbers
    logistic · LogisticReader                                sparse   · KSparseReader, of few features
    ccs      · CCSReader, of pairs, unsupervised             ttpd     · TTPDReader, of truth and polarity
    attention · AttentionReader, of whole sequences          multiclass · MultiClassReader, of more than two
    from_moments · what those share that need only moments   pairing  · the two sides of each pair

What all share (checks, the scikit-learn interface, the `Direction` made from a boundary) is in `probing.reader`.
"""

from reprobe.probing.readers.attention import AttentionReader
from reprobe.probing.readers.ccs import CCSReader
from reprobe.probing.readers.lda import LDAReader
from reprobe.probing.readers.logistic import LogisticReader
from reprobe.probing.readers.means import ClusterMean, MeanDifference, RandomReader
from reprobe.probing.readers.multiclass import MultiClassReader
from reprobe.probing.readers.pca import PCAReader
from reprobe.probing.readers.ridge import RidgeReader
from reprobe.probing.readers.sparse import KSparseReader
from reprobe.probing.readers.ttpd import TTPDReader

__all__ = [
    "AttentionReader",
    "CCSReader",
    "ClusterMean",
    "KSparseReader",
    "LDAReader",
    "LogisticReader",
    "MeanDifference",
    "MultiClassReader",
    "PCAReader",
    "RandomReader",
    "RidgeReader",
    "TTPDReader",
]
