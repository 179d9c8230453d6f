"""Second moments C = E[kkᵀ] of what down projections read: which keys a model uses on ordinary text.

Enters: a language model, blocks, and a text: given by the user, or sampled from the model itself. Leaves: one
`SecondMoment` a block, all blocks in one pass, kept in the user's cache by a digest of the weights, the block, the
tokens and the way of computing it. Does not know edits; of an edited model they are the base's.
"""

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import scipy.linalg
import torch
from jaxtyping import Float
from torch import Tensor

from reprobe.control.ledger import ledger_of, unedited
from reprobe.errors import ArtifactMissing, CorruptArtifact, DataError, UnsupportedOperation, UsageError
from reprobe.model.cache import build, cache_folder
from reprobe.model.hooks import board_of, capture
from reprobe.model.identity import digest_tokenizer
from reprobe.model.language_model import LanguageModel
from reprobe.model.packs import lay_out
from reprobe.model.sites import Site
from reprobe.model.text import tokenise
from reprobe.probing import artifact
from reprobe.probing.artifact import Artifact
from reprobe.progress import Progress, silent
from reprobe.prompts import PromptSet
from reprobe.provenance import digest, digest_chunks, rebuilding, texts

KIND = "second moment"
#: Version of how a moment comes from tokens, and a sample from a seed: a part of every digest.
VERSION = 1
TOKENS = 40_000
#: How texts begin that are sampled from a model: each is continued as the model would.
OPENINGS = (
    *("The", "In", "A", "It", "He", "She", "They", "When", "After", "As", "There", "This"),
    *("On", "At", "For", "We", "One", "Many", "During", "By", "With", "While", "From", "Since"),
)
_SAMPLED_ROWS, _SAMPLED_TOKENS = 64, 96


@dataclass(frozen=True)
class Sample:
    """Text that the model writes itself: continuations of `OPENINGS`, drawn from its 50 likeliest next tokens.

    Needs no data and fits any model; takes about as long as writing `tokens` tokens (SmolLM2: two minutes), once: the
    text is kept in the user's cache.
    """

    tokens: int = TOKENS
    seed: int = 0

    def texts(self, lm: LanguageModel, progress: Progress) -> Iterator[str]:
        """Texts of in all at least `tokens` tokens, each with its opening; of an edited model, its base's."""
        base = ledger_of(lm).base
        file = cache_folder() / "samples" / f"{digest([base.weights, base.dtype, self.digest(lm)])}.json"

        def make(scratch: Path) -> None:
            require_unsteered(lm)
            with unedited(lm):
                (scratch / file.name).write_text(json.dumps(list(self._written(lm, progress))))

        build(file, make, whole=lambda path: path.is_file())
        with rebuilding(f"{file} is damaged, delete it"):
            written = texts(json.loads(file.read_bytes()))
        yield from written

    def rows(self, lm: LanguageModel, progress: Progress) -> Iterator[np.ndarray]:
        """Token ids, about `_SAMPLED_TOKENS` a row, in all at least `tokens`."""
        return (row.ids for row in tokenise(lm.tokenizer, list(self.texts(lm, progress))))

    def _written(self, lm: LanguageModel, progress: Progress) -> Iterator[str]:
        done = batch = 0
        while done < self.tokens:
            first = batch * _SAMPLED_ROWS
            openings = [OPENINGS[(first + i) % len(OPENINGS)] for i in range(_SAMPLED_ROWS)]
            new = min(_SAMPLED_TOKENS, (lm.context or _SAMPLED_TOKENS) // 2)
            seed = self.seed * 1_000_003 + batch
            written = lm.generate(openings, max_new_tokens=new, do_sample=True, top_k=50, seed=seed)
            texts = [a + b for a, b in zip(openings, written, strict=True)]
            for text, row in zip(texts, tokenise(lm.tokenizer, texts), strict=True):
                done += len(row.ids)
                yield text
            batch += 1
            progress("sample", min(done, self.tokens), self.tokens)

    def digest(self, lm: LanguageModel) -> str:
        return digest(["sample", VERSION, self.tokens, self.seed, digest_tokenizer(lm.tokenizer)])

    def to_json(self) -> dict[str, Any]:
        return {"sampled tokens": self.tokens, "seed": self.seed}


@dataclass(frozen=True)
class Corpus:
    """Text that the user gives, cut into windows of `window` tokens; of all, the first `tokens` (None: all)."""

    texts: tuple[str, ...]
    name: str
    tokens: int | None = None
    window: int = 256

    @classmethod
    def load(cls, source: str | Path | PromptSet | Sequence[str], *, tokens: int | None = None) -> "Corpus":
        """A .txt file, anything that `PromptSet.load` takes (a .jsonl/.csv/.parquet file, `hf:NAME`), or texts."""
        if isinstance(source, PromptSet):
            return cls(tuple(source.texts), source.name, tokens)
        if isinstance(source, str | Path):
            path = Path(source)
            if path.suffix == ".txt":
                if not path.is_file():
                    raise UsageError(f"{path}: no such file")
                try:
                    return cls((path.read_text(encoding="utf-8"),), path.stem, tokens)
                except UnicodeDecodeError as error:
                    raise DataError(f"{path} is no text in UTF-8: {error}") from error
            return cls.load(PromptSet.load(source), tokens=tokens)
        return cls(tuple(source), "texts", tokens)

    def rows(self, lm: LanguageModel, progress: Progress) -> Iterator[np.ndarray]:
        """Token ids of the windows."""
        window = min(self.window, lm.context or self.window)
        for row in tokenise(lm.tokenizer, [text for text in self.texts if text.strip()]):
            for start in range(0, len(row.ids), window):
                yield row.ids[start : start + window]

    def digest(self, lm: LanguageModel) -> str:
        pieces = (row.tobytes() + b"|" for row in _cut(self.rows(lm, silent), self.tokens))
        return digest(["corpus", VERSION, digest_chunks(pieces)])

    def to_json(self) -> dict[str, Any]:
        return {"corpus": self.name, "tokens": self.tokens, "window": self.window}


Text = Sample | Corpus


@dataclass(frozen=True, eq=False)
class SecondMoment:
    """C = (1/n) Σ kkᵀ over n tokens, uncentred, (width, width) in float64, read-only; `text` says of what."""

    site: Site
    n: int
    matrix: Float[np.ndarray, "width width"]
    text: Mapping[str, Any]
    digest: str
    _factors: dict[float, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.matrix.setflags(write=False)

    @property
    def width(self) -> int:
        return len(self.matrix)

    @property
    def singular(self) -> bool:
        """Whether there were fewer tokens than directions, so that no inverse exists without a ridge."""
        return self.n < self.width

    def regularised(self, ridge: float) -> Float[np.ndarray, "width width"]:
        """C + ridge · unit · 1. The unit is the median neuron's mean square, of those that are ever used.

        Not the mean eigenvalue: where a first token's activations are massive (SmolLM2's block 11), that is two
        thousand times what other tokens have, and one hundredth of it would drown all their directions.
        """
        used = np.diag(self.matrix)[np.diag(self.matrix) > 0]
        unit = float(np.median(used)) if len(used) else 0.0
        out: np.ndarray = self.matrix + ridge * unit * np.eye(self.width)
        return out

    def solve(self, k: Float[np.ndarray, "..."], ridge: float) -> Float[np.ndarray, "..."]:
        """(C + ridge)⁻¹ k, for one key (width,) or several as columns (width, n). The decomposition is kept.

        Raises `UsageError` if the matrix is singular, as it is without a ridge from fewer tokens than `width`; with
        one, a warning says that the ridge decides what the directions cost that no token used.
        """
        if ridge < 0:
            raise UsageError(f"ridge={ridge}: in units of the median neuron's mean square, 0 or more")
        if ridge not in self._factors:
            try:
                if self.singular and ridge == 0:
                    raise np.linalg.LinAlgError
                if self.singular:
                    warnings.warn(
                        f"the second moment at {self.site} is singular ({self.n} tokens, width {self.width}): in "
                        f"directions that no token used, ridge={ridge:g} decides. Take more text",
                        UserWarning,
                        stacklevel=3,
                    )
                self._factors[ridge] = scipy.linalg.cho_factor(self.regularised(ridge), lower=True)
            except np.linalg.LinAlgError:
                raise UsageError(
                    f"the second moment at {self.site} ({self.n} tokens, width {self.width}) is singular with "
                    f"ridge={ridge:g}: take more text, or a greater ridge such as 0.01"
                ) from None
        out: np.ndarray = scipy.linalg.cho_solve(self._factors[ridge], k)
        return out


def second_moments(
    lm: LanguageModel,
    layers: Sequence[int],
    text: Text | None = None,
    *,
    fresh: bool = False,
    progress: Progress = silent,
) -> dict[int, SecondMoment]:
    """The second moments of `mlp.neurons` at some blocks: from the cache, else computed in one pass and kept there.

    `text` defaults to `Sample()`. Of a model with edits they are those of its base. `fresh` computes anew. Memory:
    8 · width² bytes a block, and one pack's rows. Raises `UnknownSite` for blocks that have no `mlp.neurons`,
    `UnsupportedOperation` for encoders, `UsageError` while the model is being steered.
    """
    if lm.architecture.kind != "decoder":
        raise UnsupportedOperation(f"{lm.name} is an encoder ({lm.architecture.family}): it cannot be edited")
    source = text or Sample()
    base = ledger_of(lm).base
    sites = {layer: lm.parts.require(Site("mlp.neurons", layer)) for layer in layers}
    of_text = source.digest(lm)
    files = {
        layer: cache_folder() / "moments" / f"{digest([VERSION, base.weights, base.dtype, layer, of_text])}.safetensors"
        for layer in sites
    }
    found = {} if fresh else {layer: m for layer, file in files.items() if (m := _read(file)) is not None}
    missing = [layer for layer in sites if layer not in found]
    if missing:
        require_unsteered(lm)
        with unedited(lm):
            rows = list(_cut(source.rows(lm, progress), source.tokens))
            n, sums = _accumulate(lm, [sites[layer] for layer in missing], rows, progress)
        for layer in missing:
            site = sites[layer]
            moment = SecondMoment(site, n, sums.pop(site) / n, source.to_json(), files[layer].stem)
            _keep(files[layer], moment)
            found[layer] = moment
    return {layer: found[layer] for layer in sites}


@torch.no_grad()
def _accumulate(
    lm: LanguageModel, sites: Sequence[Site], rows: Sequence[np.ndarray], progress: Progress
) -> tuple[int, dict[Site, np.ndarray]]:
    """Number of tokens, and Σ kkᵀ at each site in float64."""
    if not rows:
        raise UsageError("there is no text to take second moments of")
    tokens, starts = np.concatenate(rows), np.concatenate([[0], np.cumsum([len(r) for r in rows])])
    plan = lm.plan(tokens, starts)
    sums = {site: torch.zeros(lm.width(site), lm.width(site), dtype=torch.float64, device=lm.device) for site in sites}
    done = 0
    for k in range(plan.n_packs):
        layout = lay_out(plan, k, tokens, starts)
        # A beginning that prompts share is computed once and counts as often as it occurs.
        places = torch.from_numpy(layout.at).to(lm.device)

        def select(h: Tensor, places: Tensor = places) -> Tensor:
            return h.flatten(0, 1)[places.to(h.device)]

        for site, found in capture(lm, lm.pack_inputs(layout), sites, select).items():
            wide = found.double()
            sums[site].addmm_(wide.T.to(sums[site].device), wide.to(sums[site].device))
        done += len(layout.at)
        progress("moments", done, len(tokens))
    return len(tokens), {site: total.cpu().numpy() for site, total in sums.items()}


def require_unsteered(lm: LanguageModel) -> None:
    """Raise `UsageError` rather than keep what a steered model does as if it were the model's."""
    if board_of(lm).changed:
        raise UsageError("the model is being steered, and what is kept would be of that: do this outside the context")


def _cut(rows: Iterator[np.ndarray], tokens: int | None) -> Iterator[np.ndarray]:
    """Rows up to exactly `tokens` tokens."""
    left = tokens
    for row in rows:
        if left is None:
            yield row
        elif left > 0:
            yield row[:left]
            left -= len(row)
        else:
            return


def _read(file: Path) -> SecondMoment | None:
    """A moment from the cache; None where there is none, or it was damaged and has to be made again."""
    try:
        found = artifact.read(file, KIND)
        with rebuilding(str(file)):
            h, width = found.header, len(found.arrays["matrix"])
            matrix = artifact.array(found.arrays, "matrix", "f", width, width)
            return SecondMoment(Site.parse(h["site"]), int(h["n"]), matrix, dict(h["text"]), file.stem)
    except (ArtifactMissing, CorruptArtifact):
        return None


def _keep(file: Path, moment: SecondMoment) -> None:
    header = {"site": str(moment.site), "n": moment.n, "text": dict(moment.text)}
    content = Artifact(header, {"matrix": moment.matrix})
    # A fresh moment replaces what is there; nobody else's work is lost, the same digest is the same content.
    build(
        file, lambda scratch: artifact.write(scratch / file.name, KIND, content, overwrite=True), whole=lambda _: False
    )
