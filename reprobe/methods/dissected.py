"""What a dissection found: tables, text at the units' tops, and its file.

Enters: arrays of `dissect`. Leaves: polars tables of units, concepts and layers; `Snippet`s; one safetensors file,
which runs nothing when it is read. Does not know how anything was counted.
"""

import operator
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from jaxtyping import Bool, Float, Int

from reprobe.errors import UsageError
from reprobe.methods.overlap import iou
from reprobe.methods.stream import Document, TokenStream
from reprobe.methods.tops import AROUND
from reprobe.methods.units import Reading
from reprobe.model.identity import ModelIdentity
from reprobe.model.sites import Site
from reprobe.probing import artifact
from reprobe.probing.artifact import Artifact, array
from reprobe.provenance import digest, digest_chunks, rebuilding, text, texts

KIND = "dissection"
#: Arrays of a value per unit, or per unit and something, that are saved as they are: their kind of numbers, and shape.
_ARRAYS = {
    "threshold": ("f", "units"),
    "active": ("iu", "units"),
    "mean": ("f", "units"),
    "sd": ("f", "units"),
    "inside": ("f", "units", "concepts"),
    "hits": ("iu", "units", "concepts"),
    "null": ("f", "permutations", "units"),
    "top": ("i", "units", "shown"),
    "top_values": ("f", "units", "shown"),
    "marks": ("iu", "units", "shown"),
}
_STREAM = ("ids", "starts", "begin", "end", "document")


@dataclass(frozen=True)
class Settings:
    """`quantile`: the share of tokens at a unit's top; `detector`: the IoU above which a unit detects a concept."""

    quantile: float
    detector: float
    permutations: int
    seed: int

    def top(self, tokens: int) -> int:
        """How many of so many tokens may exceed a threshold. 0.005 is not exact in binary: of 2000 it must be 10."""
        return int(self.quantile * tokens * (1 + 1e-12))


@dataclass(frozen=True)
class Asked:
    """A concept that units were asked about; what finds it is not kept."""

    name: str
    kind: str
    about: str


@dataclass(frozen=True)
class Snippet:
    """Text around a token at a unit's top: `pieces` token by token, `marked` those above the threshold, `peak` the
    index of the token itself, `value` the unit's there."""

    pieces: tuple[str, ...]
    marked: tuple[bool, ...]
    peak: int
    value: float

    @property
    def text(self) -> str:
        """The text, marked tokens in ⟦ ⟧."""
        return "".join(f"⟦{p}⟧" if m else p for p, m in zip(self.pieces, self.marked, strict=True))


@dataclass(frozen=True, eq=False)
class Dissection:
    """Every unit of some sites against every concept.

    Units are numbered through all sites, in the order of `readings`; `units["unit"]` are their names. `inside[u, c]` is
    the mean of unit u over the tokens of concept c, `hits[u, c]` how many tokens of its top are of c, `null[p, u]` its
    largest IoU in permutation p. `of[i, c]`: whether the i-th counted token is of concept c.
    """

    identity: ModelIdentity
    readings: tuple[Reading, ...]
    stream: TokenStream
    settings: Settings
    asked: tuple[Asked, ...]
    dropped: tuple[str, ...]
    of: Bool[np.ndarray, "counted concepts"]
    threshold: Float[np.ndarray, " units"]
    active: Int[np.ndarray, " units"]
    mean: Float[np.ndarray, " units"]
    sd: Float[np.ndarray, " units"]
    inside: Float[np.ndarray, "units concepts"]
    hits: Int[np.ndarray, "units concepts"]
    null: Float[np.ndarray, "permutations units"]
    top: Int[np.ndarray, "units shown"]
    top_values: Float[np.ndarray, "units shown"]
    marks: Int[np.ndarray, "units shown"]

    # -- numbers ----------------------------------------------------------------------------------------------

    @property
    def n(self) -> int:
        """How many units there are."""
        return len(self.threshold)

    @property
    def names(self) -> list[str]:
        """Names of the concepts."""
        return [concept.name for concept in self.asked]

    @cached_property
    def digest(self) -> str:
        """sha256 over the model, the stream, the settings, the units, the concepts and what was counted of them."""
        counted = (self.threshold, self.active, self.hits, self.null, self.top)
        said = [self.identity.weights, self.stream.digest, asdict(self.settings), self.names]
        units = [[str(reading.site), reading.n] for reading in self.readings]
        return digest([KIND, said, units, digest_chunks(np.ascontiguousarray(a).tobytes() for a in counted)])

    @cached_property
    def sizes(self) -> Int[np.ndarray, " concepts"]:
        """How many tokens each concept has."""
        sizes: np.ndarray = self.of.sum(0)
        return sizes

    @cached_property
    def iou(self) -> Float[np.ndarray, "units concepts"]:
        """Overlap of each unit's top tokens with each concept: intersection over union."""
        return iou(self.hits, self.active, self.sizes)

    @cached_property
    def best(self) -> Int[np.ndarray, " units"]:
        """The concept with the largest IoU of each unit."""
        return np.asarray(self.iou.argmax(1))

    @cached_property
    def selectivity(self) -> Float[np.ndarray, "units concepts"]:
        """Mean on a concept's tokens less mean on all others, in standard deviations of the unit; 0 for a dead unit."""
        n, sizes = self.stream.n, self.sizes
        outside = (self.mean[:, None] * n - self.inside * sizes) / (n - sizes)
        with np.errstate(divide="ignore", invalid="ignore"):
            found: np.ndarray = np.where(self.sd[:, None] > 0, (self.inside - outside) / self.sd[:, None], 0.0)
        return found

    @cached_property
    def unit_names(self) -> list[str]:
        """The units as texts, `mlp.neurons@7.1500`, in the order of the rows."""
        return [reading.name(i) for reading in self.readings for i in range(reading.n)]

    @cached_property
    def reading_of(self) -> Int[np.ndarray, " units"]:
        """The index into `readings` of each unit."""
        return np.repeat(np.arange(len(self.readings)), [r.n for r in self.readings])

    def number(self, unit: int | str) -> int:
        """The number of a unit, given its name or number; `UsageError` if there is none."""
        found = unit if isinstance(unit, int) else self._numbers.get(unit, -1)
        if not 0 <= found < self.n:
            e = f"{self.unit_names[0]} … {self.unit_names[-1]}"
            raise UsageError(f"no unit {unit!r} was dissected; there are {self.n:,}: {e}")
        return found

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.unit_names)}

    def concept(self, name: str) -> int:
        """The column of a concept; `UsageError` if there is none of that name."""
        if name not in self.names:
            gone = " (it was left out: no token, or every token, is of it)" if name in self.dropped else ""
            raise UsageError(f"no concept {name!r} in this dissection{gone}; there are {', '.join(self.names)}")
        return self.names.index(name)

    # -- tables -----------------------------------------------------------------------------------------------

    @cached_property
    def units(self) -> pl.DataFrame:
        """One line a unit: unit, site, layer, index; threshold, active (tokens above it), mean, sd; its best concept
        with iou, precision (share of its top that is of the concept), recall (share of the concept that is at its top),
        selectivity; p, how often by chance any unit's largest IoU is as large; detector."""
        layers = [r.site.layer for r in self.readings]
        hits, rows = self.hits[np.arange(self.n), self.best], np.arange(self.n)
        best = self.iou[rows, self.best]
        return pl.DataFrame(
            {
                "unit": self.unit_names,
                "site": pl.Series([str(r.site) for r in self.readings])[self.reading_of],
                "layer": pl.Series(layers, dtype=pl.Int32)[self.reading_of],
                "index": np.concatenate([np.arange(r.n) for r in self.readings]).astype(np.int32),
                "threshold": self.threshold,
                "active": self.active,
                "mean": self.mean,
                "sd": self.sd,
                "concept": pl.Series(self.names)[self.best],
                "kind": pl.Series([concept.kind for concept in self.asked])[self.best],
                "iou": best,
                "precision": hits / np.maximum(self.active, 1),
                "recall": hits / self.sizes[self.best],
                "selectivity": self.selectivity[rows, self.best],
                "p": self.p(best),
                "detector": best > self.settings.detector,
            }
        )

    @property
    def detectors(self) -> pl.DataFrame:
        """The lines of `units` that detect their best concept, by falling IoU."""
        return self.units.filter(pl.col("detector")).sort("iou", descending=True)

    @cached_property
    def concepts(self) -> pl.DataFrame:
        """One line a concept: concept, kind, about; tokens, share of all; attainable, the largest IoU that a full
        top can have with so many tokens (one with values equal to its threshold is smaller, and may have a larger one);
        detectors (units whose best concept it is); best_unit with its iou."""
        n, k = self.stream.n, self.settings.top(self.stream.n)
        found = self.units.filter(pl.col("detector"))["concept"].value_counts()
        counts = dict(zip(found["concept"], found["count"], strict=True))
        first = self.iou.argmax(0)
        return pl.DataFrame(
            {
                "concept": self.names,
                "kind": [concept.kind for concept in self.asked],
                "about": [concept.about for concept in self.asked],
                "tokens": self.sizes,
                "share": self.sizes / n,
                "attainable": np.minimum(self.sizes, k) / np.maximum(self.sizes, k),
                "detectors": [counts.get(name, 0) for name in self.names],
                "best_unit": [self.unit_names[u] for u in first],
                "best_iou": self.iou.max(0),
            }
        )

    @cached_property
    def layers(self) -> pl.DataFrame:
        """One line a site: site, layer, units, detectors, expected (detectors by chance: the mean over permutations),
        concepts (different ones that are detected there)."""
        by_chance = self.null > self.settings.detector
        sites = [str(r.site) for r in self.readings]
        found = self.units.filter(pl.col("detector")).group_by("site").agg(pl.len(), pl.col("concept").n_unique())
        detected = {site: (count, concepts) for site, count, concepts in found.iter_rows()}
        return pl.DataFrame(
            {
                "site": sites,
                "layer": pl.Series([r.site.layer for r in self.readings], dtype=pl.Int32),
                "units": [r.n for r in self.readings],
                "detectors": [detected.get(site, (0, 0))[0] for site in sites],
                "expected": [
                    float(by_chance[:, self.reading_of == i].sum(1).mean()) if len(self.null) else None
                    for i in range(len(sites))
                ],
                "concepts": [detected.get(site, (0, 0))[1] for site in sites],
            }
        )

    @cached_property
    def chance(self) -> pl.DataFrame:
        """One line a permutation: detectors, and the largest IoU of any unit with any concept."""
        return pl.DataFrame(
            {
                "permutation": np.arange(len(self.null)),
                "detectors": (self.null > self.settings.detector).sum(1),
                "largest": self.null.max(1) if len(self.null) else np.zeros(0, np.float32),
            }
        )

    def p(self, value: Float[np.ndarray, " any"]) -> Float[np.ndarray, " any"]:
        """How often the largest IoU of a unit is at least `value` when masks are rotated: (1 + times) / (1 + units ×
        permutations), all units taken together, whose tops are of one size. NaN without permutations."""
        if not len(self.null):
            return np.full(len(value), np.nan)
        at_least = self._null.size - np.searchsorted(self._null, np.asarray(value, np.float32), side="left")
        found: np.ndarray = (1 + at_least) / (1 + self._null.size)
        return found

    @cached_property
    def _null(self) -> Float[np.ndarray, " all"]:
        return np.sort(self.null, axis=None)

    def of_unit(self, unit: int | str) -> pl.DataFrame:
        """One line a concept for one unit, by falling IoU: concept, iou, precision, recall, selectivity, hits."""
        u = self.number(unit)
        lines = pl.DataFrame(
            {
                "concept": self.names,
                "iou": self.iou[u],
                "precision": self.hits[u] / max(int(self.active[u]), 1),
                "recall": self.hits[u] / self.sizes,
                "selectivity": self.selectivity[u],
                "hits": self.hits[u],
            }
        )
        return lines.sort("iou", descending=True, maintain_order=True)

    def of_concept(self, name: str, most: int | None = None) -> pl.DataFrame:
        """One line a unit for one concept, by falling IoU: unit, site, iou, precision, recall, selectivity, hits."""
        c = self.concept(name)
        order = np.argsort(-self.iou[:, c], kind="stable")[:most]
        hits = self.hits[order, c]
        return pl.DataFrame(
            {
                "unit": [self.unit_names[u] for u in order],
                "site": pl.Series([str(r.site) for r in self.readings])[self.reading_of[order]],
                "iou": self.iou[order, c],
                "precision": hits / np.maximum(self.active[order], 1),
                "recall": hits / self.sizes[c],
                "selectivity": self.selectivity[order, c],
                "hits": hits,
            }
        )

    def snippets(self, unit: int | str) -> list[Snippet]:
        """The text at a unit's top, by falling value; of a row of the stream, and after the same words, only once."""
        u, out = self.number(unit), []
        stream = self.stream
        for token, value, marks in zip(self.top[u], self.top_values[u], self.marks[u], strict=True):
            if token < 0:
                break
            at = int(stream.places[token])
            row = int(stream.row[at])
            first, last = max(at - AROUND, int(stream.starts[row])), min(at + AROUND + 1, int(stream.starts[row + 1]))
            marked = tuple(bool(int(marks) >> (t - at + AROUND) & 1) for t in range(first, last))
            out.append(Snippet(tuple(stream.pieces(first, last)), marked, at - first, float(value)))
        return out

    # -- file -------------------------------------------------------------------------------------------------

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write one safetensors file, whole or not at all; `ArtifactExists` unless `overwrite`.

        Of the stream's documents their text is kept, not their spans and columns.
        """
        texts = [d.text.encode() for d in self.stream.documents]
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        arrays |= {f"stream.{name}": getattr(self.stream, name).astype(np.int32) for name in _STREAM}
        arrays |= {
            "stream.counted": np.packbits(self.stream.counted),
            "stream.text": np.frombuffer(b"".join(texts), np.uint8),
            "stream.text_ends": np.cumsum([len(t) for t in texts]),
            "of": np.packbits(self.of, axis=0),
        }
        arrays |= {f"vectors.{i}": r.vectors for i, r in enumerate(self.readings) if r.vectors is not None}
        header = {
            "identity": self.identity.to_json(),
            "settings": asdict(self.settings),
            "readings": [{"site": str(r.site), "width": r.width, "names": list(r.names)} for r in self.readings],
            "concepts": [asdict(concept) for concept in self.asked],
            "dropped": list(self.dropped),
            "stream": {"name": self.stream.name, "about": dict(self.stream.about), "digest": self.stream.digest},
        }
        artifact.write(Path(path), KIND, Artifact(header, arrays), overwrite=overwrite)
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> "Dissection":
        """What `save` wrote. Raises `ArtifactMissing`, `CorruptArtifact`, or `UsageError` for another kind of file."""
        content = artifact.read(Path(path), KIND)
        h, arrays = content.header, content.arrays
        with rebuilding(f"{path}: not a whole dissection"):
            readings = tuple(_reading(r, arrays.get(f"vectors.{i}")) for i, r in enumerate(h["readings"]))
            asked = tuple(Asked(*(text(concept[k]) for k in ("name", "kind", "about"))) for concept in h["concepts"])
            stream = _stream(h["stream"], arrays)
            s = h["settings"]
            settings = Settings(
                float(s["quantile"]), float(s["detector"]), operator.index(s["permutations"]), operator.index(s["seed"])
            )
            units, permutations = sum(r.n for r in readings), len(arrays["null"])
            lengths = {"units": units, "concepts": len(asked), "permutations": permutations}
            return cls(
                identity=ModelIdentity.from_json(h["identity"]),
                readings=readings,
                stream=stream,
                settings=settings,
                asked=asked,
                dropped=texts(h["dropped"]),
                of=np.unpackbits(
                    array(arrays, "of", "u", -(-stream.n // 8), len(asked)), axis=0, count=stream.n
                ).astype(np.bool_),
                **{
                    name: array(arrays, name, kinds, *(lengths.get(axis) for axis in shape))
                    for name, (kinds, *shape) in _ARRAYS.items()
                },
            )._sound()

    def _sound(self) -> "Dissection":
        """This, if every number of a token is one of the stream's; raises `ValueError` otherwise."""
        if (
            not self.n
            or not self.asked
            or self.top.shape != self.top_values.shape
            or self.top.shape != self.marks.shape
        ):
            raise ValueError("it has no units, no concepts, or tops of different lengths")
        if self.top.size and not -1 <= self.top.min() <= self.top.max() < self.stream.n:
            raise ValueError("a unit's top is of tokens that the stream does not have")
        if not (self.sizes > 0).all() or not (self.sizes < self.stream.n).all():
            raise ValueError("a concept is of no token, or of every one")
        return self


def _reading(header: Mapping[str, Any], vectors: np.ndarray | None) -> Reading:
    width, names = operator.index(header["width"]), texts(header["names"])
    if vectors is not None:
        vectors = array({"vectors": vectors}, "vectors", "f", width, len(names))
    return Reading(Site.parse(header["site"]), width, vectors, names)


def _stream(header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> TokenStream:
    ends = array(arrays, "stream.text_ends", "iu", None)
    joined = array(arrays, "stream.text", "u", int(ends[-1])).tobytes()
    documents = tuple(
        Document(joined[a:b].decode(), i) for i, (a, b) in enumerate(zip([0, *ends[:-1]], ends, strict=True))
    )
    flat = {name: array(arrays, f"stream.{name}", "iu", None).astype(np.int64) for name in _STREAM}
    n, starts = len(flat["ids"]), flat["starts"]
    counted = np.unpackbits(array(arrays, "stream.counted", "u", -(-n // 8)), count=n).astype(np.bool_)
    if any(len(flat[name]) != n for name in ("begin", "end", "document")) or flat["document"].min() < 0:
        raise ValueError("its stream's arrays are not of the same tokens")
    if flat["document"].max() >= len(documents) or starts[0] != 0 or starts[-1] != n or (np.diff(starts) < 0).any():
        raise ValueError("its stream's rows are not of its tokens, or of documents that it lacks")
    return TokenStream(text(header["name"]), counted=counted, documents=documents, about=dict(header["about"]), **flat)
