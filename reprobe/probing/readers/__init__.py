"""The readers: each finds one direction in activations.

    means    · MeanDifference, ClusterMean, RandomReader     lda      · LDAReader
    pca      · PCAReader, of pair differences                ridge    · RidgeReader, of numbers
    logistic · LogisticReader                                sparse   · KSparseReader, of few features
    ccs      · CCSReader, of pairs, unsupervised             ttpd     · TTPDReader, of truth and polarity
    attention · AttentionReader, of whole sequences          multiclass · MultiClassReader, of more than two
    from_moments · what those share that need only moments   pairing  · the two sides of each pair

`READERS` has them by name. What all share (checks, the scikit-learn interface, the `Direction` made from a boundary)
is in `probing.reader`.
"""

from collections.abc import Callable, Mapping
from functools import partial

from reprobe.errors import UsageError
from reprobe.probing.reader import Reader
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
    "READERS",
    "RandomReader",
    "RidgeReader",
    "TTPDReader",
    "readers_named",
]

#: The readers of two classes that need nothing but rows, labels and pairs, by the names the command line has for them.
READERS: Mapping[str, Callable[[], Reader]] = {
    "mean-difference": MeanDifference,
    "whitened": partial(MeanDifference, whiten=True),
    "cluster-mean": ClusterMean,
    "pca": PCAReader,
    "logistic": LogisticReader,
    "lda": LDAReader,
    "ccs": CCSReader,
    "k-sparse": KSparseReader,
    "random": RandomReader,
}


def readers_named(text: str) -> dict[str, Reader]:
    """Readers of "logistic,lda", with their defaults, by name. `UsageError` for a name that is none, or comes twice."""
    names = [name.strip() for name in text.split(",")]
    if unknown := [name for name in names if name not in READERS]:
        raise UsageError(f"{unknown[0]!r} is no reader; there are {', '.join(READERS)}")
    if doubled := [name for name in names if names.count(name) > 1]:
        raise UsageError(f"{doubled[0]!r} comes twice")
    return {name: READERS[name]() for name in names}
