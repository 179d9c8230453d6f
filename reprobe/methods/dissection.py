"""Neurons as concepts: Network Dissection (Bau et al. 2017, arXiv:1704.05796) for language models.

Enters: a language model, a stream of text, concepts, units (neurons, any site's coordinates, directions). Leaves: a
`Dissection`: which unit detects which concept, how well, how well by chance, and the text at its top. Does not know
what a unit causes: see `reprobe.evaluation.causation`.

A unit's top are the tokens that exceed T_u, the smallest value that at most a share `quantile` of the tokens exceed.
With M_u those tokens and C those of a concept, IoU = |M_u ∩ C| / |M_u ∪ C|; a unit detects its best concept if that is
above 0.04. Here images are tokens and a mask has no smaller parts; T_u is exact, ties are below it.
"""

import math
from collections.abc import Iterable, Sequence
from functools import partial

import numpy as np

from reprobe.errors import UsageError
from reprobe.methods import concepts as concept_files
from reprobe.methods import overlap, tops
from reprobe.methods.concepts import Absent, Concept, masks
from reprobe.methods.counting import Counts, count
from reprobe.methods.dissected import Asked, Dissection, Settings
from reprobe.methods.stream import WINDOW, Source, TokenStream, token_stream
from reprobe.methods.units import Directions, Sites, readings
from reprobe.model.language_model import LanguageModel
from reprobe.progress import Progress, silent

__all__ = ["Concept", "Dissection", "dissect"]

#: A top of fewer tokens says nothing: IoU would come in steps of a tenth.
LEAST = 10


def dissect(
    lm: LanguageModel,
    stream: Source | TokenStream,
    concepts: Iterable[Concept] | str | None = None,
    sites: Sites | Directions = "mlp.neurons@*",
    *,
    quantile: float = 0.005,
    detector: float = 0.04,
    permutations: int = 20,
    absent: Absent = "raise",
    tokens: int | None = None,
    window: int = WINDOW,
    skip: int = 1,
    snippets: int = 8,
    seed: int = 0,
    memory: int = 4 * 10**9,
    allow_mismatch: bool = False,
    progress: Progress = silent,
) -> Dissection:
    """Ask every unit which concept it detects, in one pass over the stream.

    `stream` is a `PromptSet`, texts, a file, a `Sample` of what the model writes, or a `token_stream`, taken as it is;
    of the others the first `tokens` are read in rows of `window`, and special tokens and the first `skip` of each row
    do not count. `concepts` default to all ready ones; a string names some. Units are the coordinates of `sites`, or
    directions given instead. `permutations` rotate the masks for the null. `snippets` places are kept of each unit.
    Memory: 14 bytes × units × quantile × tokens, at most `memory`.

    Raises `UsageError` for concepts that never or always occur (unless `absent="drop"`), for a stream too short for the
    quantile, and for what does not fit `memory`; `UnknownSite`; `IdentityMismatch`.
    """
    if not 0 < quantile < 1 or not 0 <= detector < 1 or snippets < 0:
        raise UsageError(
            f"quantile={quantile}, detector={detector}, snippets={snippets}: between 0 and 1, from 0 to below 1, 0 or "
            "more"
        )
    read = readings(lm, sites, allow_mismatch=allow_mismatch)
    if not isinstance(stream, TokenStream):
        stream = token_stream(lm, stream, tokens=tokens, window=window, skip=skip, progress=progress)
    settings = Settings(quantile, detector, permutations, seed)
    k = settings.top(stream.n)
    if k < LEAST:
        raise UsageError(
            f"the top {quantile:.3%} of {stream.n:,} tokens are {k}: this quantile needs a stream of at least "
            f"{math.ceil(LEAST / quantile):,} tokens, and this stream a quantile of {LEAST / max(stream.n, 1):.2g}"
        )
    wanted = concept_files.ready(concepts) if concepts is None or isinstance(concepts, str) else concepts
    found = masks(stream, wanted, absent=absent)
    counts = count(lm, read, stream, found.of, k, memory=memory, progress=progress)
    join = partial(_joined, counts)
    active = np.concatenate([(c.tokens >= 0).sum(1) for c in counts]).astype(np.int32)
    total = join("total")
    sizes = found.of.sum(0)
    mean = total / stream.n
    shown = tops.shown(stream, counts, snippets)
    return Dissection(
        identity=lm.identity,
        readings=read,
        stream=stream,
        settings=settings,
        asked=tuple(Asked(c.name, c.kind, c.about) for c in found.concepts),
        dropped=found.dropped,
        of=found.of,
        threshold=join("threshold"),
        active=active,
        mean=mean.astype(np.float32),
        sd=np.sqrt(np.maximum(join("squares") / stream.n - mean**2, 0)).astype(np.float32),
        inside=(join("sums") / sizes).astype(np.float32),
        hits=overlap.common(counts, found.of),
        null=overlap.chance(counts, found.of, permutations, seed=seed, progress=progress),
        top=shown.tokens,
        top_values=shown.values,
        marks=shown.marks,
    )


def _joined(counts: Sequence[Counts], field: str) -> np.ndarray:
    joined: np.ndarray = np.concatenate([getattr(c, field) for c in counts])
    return joined
