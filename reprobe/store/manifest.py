"""What a store holds and where it came from.

Enters: model identity, digests, plan, sites, dtype, grid. Leaves: a frozen `Manifest` and its bytes, and
back. It has no times and no paths: two runs of one configuration write the same bytes. Does not know how
arrays are written, nor what the plan's fields mean; extraction gives it as plain JSON.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from reprobe.errors import ArtifactMissing, CorruptArtifact, IdentityMismatch, UnknownSite, UsageError
from reprobe.model.identity import ModelIdentity
from reprobe.model.sites import UNIT_PARTS, Site, ranges
from reprobe.provenance import canonical_json, digest, require_schema, text
from reprobe.store.layout import MANIFEST, Grid, check_dtype, check_format, is_store_file, itemsize
from reprobe.store.places import Place
from reprobe.store.sealed import seal, unseal

SCHEMA = 2
_KIND = "reprobe.store"
#: Bytes by which even a damaged manifest is known to be one of ours.
MARK = f'"kind": "{_KIND}"'.encode()


@dataclass(frozen=True)
class StoredSite:
    """A site of a store: `width` numbers per row, of which each head or neuron, if any, has `unit_width`."""

    site: Site
    width: int
    unit_width: int | None = None

    def __post_init__(self) -> None:
        if self.site.unit is not None:
            raise UsageError(f"a store holds whole sites: store '{self.site.whole}', then read '{self.site}' from it")
        for name, value in (("width", self.width), ("unit_width", self.unit_width)):
            if value is not None and (type(value) is not int or value < 1):
                raise UsageError(f"'{self.site}': {name} is {value!r}, it must be a whole number, at least 1")
        if (self.unit_width is not None) != (self.site.part in UNIT_PARTS):
            raise UsageError(f"'{self.site}': only {' and '.join(UNIT_PARTS)} have, and need, a unit_width")
        if self.unit_width is not None and self.width % self.unit_width:
            raise UsageError(f"'{self.site}': width {self.width} is not a multiple of unit_width {self.unit_width}")

    @property
    def units(self) -> int:
        """How many heads or neurons the vector is made of; 1 for a part without units."""
        return 1 if self.unit_width is None else self.width // self.unit_width


@dataclass(frozen=True)
class Manifest:
    """Everything that two equal stores agree on.

    `prompts` is the digest of the prompt set, `plan` what extraction decided (positions, packing, budget …),
    `files` the sha256 of the index, of the tokens and of each array's metadata by relative path.
    """

    identity: ModelIdentity
    prompts: str
    plan: Mapping[str, Any]
    sites: tuple[StoredSite, ...]
    dtype: str
    grid: Grid
    format: str
    compression: str | None
    files: Mapping[str, str]
    versions: Mapping[str, str]

    def __post_init__(self) -> None:
        check_dtype(self.dtype)
        check_format(self.format, self.compression)
        names = [str(s.site) for s in self.sites]
        if not names or len(set(names)) < len(names):
            raise UsageError(f"a store needs sites, each once; got: {', '.join(names) or 'none'}")
        for stored in self.sites:
            if (stored.site.layer or 0) >= self.identity.n_layers:
                raise UnknownSite(f"'{stored.site}': {self.identity.name} has blocks 0–{self.identity.n_layers - 1}")
        for part in UNIT_PARTS:
            if len(widths := {s.unit_width for s in self.sites if s.site.part == part}) > 1:
                raise UsageError(f"{part}: unit_width must be the same in all blocks, got {sorted(map(str, widths))}")
        try:
            plain = json.loads(canonical_json(dict(self.plan)))  # tuples become lists, as after reading
        except (TypeError, ValueError) as error:
            raise UsageError(f"the plan is not plain JSON: {error}") from error
        object.__setattr__(self, "plan", plain)

    @property
    def sites_text(self) -> str:
        """For people: parts with their blocks, and units × width: resid.post@0–29, attn.heads@0–29 (9 × 64)."""
        out = []
        for part in dict.fromkeys(s.site.part for s in self.sites):
            stored = [s for s in self.sites if s.site.part == part]
            layers = sorted(s.site.layer for s in stored if s.site.layer is not None)
            units = f" ({stored[0].units} × {stored[0].unit_width})" if stored[0].unit_width else ""
            out.append((f"{part}@{ranges(layers)}" if layers else part) + units)
        return ", ".join(out)

    @property
    def row_bytes(self) -> int:
        """Bytes per row over all sites."""
        return sum(s.width for s in self.sites) * itemsize(self.dtype)

    @property
    def n_layers(self) -> int:
        """Blocks of the model, stored or not."""
        return self.identity.n_layers

    @property
    def units(self) -> dict[str, int]:
        """Units per part (heads, neurons) of the parts that are stored and have them."""
        out: dict[str, int] = {}
        for s in self.sites:
            if s.unit_width is not None:
                out[s.site.part] = max(s.units, out.get(s.site.part, 0))
        return out

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": _KIND,
            "schema": SCHEMA,
            "identity": self.identity.to_json(),
            "prompts": self.prompts,
            "plan": dict(self.plan),
            "plan_digest": digest(self.plan),
            "sites": [{"site": str(s.site), "width": s.width, "unit_width": s.unit_width} for s in self.sites],
            "units": self.units,
            "n_layers": self.n_layers,
            "dtype": self.dtype,
            "rows": self.grid.rows,
            "shard_rows": self.grid.shard_rows,
            "chunk_rows": self.grid.chunk_rows,
            "format": self.format,
            "compression": self.compression,
            "files": dict(self.files),
            "versions": dict(self.versions),
        }

    @cached_property
    def digest(self) -> str:
        """sha256 of the whole manifest; every commit record names it."""
        return digest(self.to_json())

    def to_bytes(self) -> bytes:
        return seal(self.to_json())

    @classmethod
    def from_bytes(cls, data: bytes, what: str) -> "Manifest":
        """The manifest that `to_bytes` wrote.

        Raises, naming `what`, `SchemaMismatch` for one of another version and `CorruptArtifact` for anything else.
        """
        if MARK not in data:
            raise CorruptArtifact(f"{what} is not the manifest of a reprobe store, or is damaged beyond recognition")
        value = unseal(data, what)
        require_schema(value.get("schema"), SCHEMA, what)
        try:
            manifest = cls._from_json(value)
            same = manifest.to_json() == value
        except (KeyError, TypeError, ValueError, AttributeError, CorruptArtifact) as error:
            raise CorruptArtifact(f"{what} is malformed: {type(error).__name__}: {error}") from error
        if not same:
            raise CorruptArtifact(f"{what} contradicts itself, or has fields that no version of reprobe writes")
        return manifest

    @classmethod
    def _from_json(cls, value: Mapping[str, Any]) -> "Manifest":
        for name in ("prompts", "dtype"):
            if not isinstance(value[name], str):
                raise TypeError(f"{name} must be text")
        if type(value["identity"]["n_layers"]) is not int:
            raise TypeError("identity.n_layers must be a whole number")
        if strange := [name for name in value["files"] if not is_store_file(name)]:
            raise ValueError(f"a store has no file {strange[0]!r}")
        return cls(
            identity=ModelIdentity.from_json(value["identity"]),
            prompts=value["prompts"],
            plan=value["plan"],
            sites=tuple(StoredSite(Site.parse(s["site"]), s["width"], s["unit_width"]) for s in value["sites"]),
            dtype=value["dtype"],
            grid=Grid(value["rows"], value["shard_rows"], value["chunk_rows"]),
            format=value["format"],
            compression=value["compression"],
            files={name: text(sha256) for name, sha256 in value["files"].items()},
            versions={name: text(version) for name, version in value["versions"].items()},
        )

    def differences(self, other: "Manifest") -> dict[str, tuple[Any, Any]]:
        """Fields that differ, by dotted name, each as (self's value, other's value)."""
        mine, theirs = _flat(self.to_json()), _flat(other.to_json())
        absent = "(absent)"
        names = [*mine, *(k for k in theirs if k not in mine)]
        pairs = {k: (mine.get(k, absent), theirs.get(k, absent)) for k in names if k != "plan_digest"}
        return {k: pair for k, pair in pairs.items() if pair[0] != pair[1]}

    def require_same(self, other: "Manifest", where: Place) -> None:
        """Raise `IdentityMismatch`, listing the fields, unless `other` would write the store at `where`."""
        if diff := self.differences(other):
            lines = [f"  {k}: {_short(a)} there, {_short(b)} now" for k, (a, b) in diff.items()]
            raise IdentityMismatch(
                f"{where} cannot be resumed: it was begun with another model, data set or configuration:\n"
                + "\n".join(lines)
                + "\nUse what it was begun with, choose another path, or pass overwrite=True (--overwrite)."
            )


def read_manifest(place: Place) -> Manifest:
    """The manifest of the store at `place`; raises `ArtifactMissing`, `SchemaMismatch`, `CorruptArtifact`."""
    try:
        data = place.read(MANIFEST)
    except (FileNotFoundError, NotADirectoryError) as error:
        if not place.exists():
            raise ArtifactMissing(f"there is no store at {place}: make one with reprobe extract") from error
        raise ArtifactMissing(
            f"{place} is not a store: it has no {MANIFEST}. If an extraction to it was interrupted at its "
            "very start, run that again with resume=True (--resume)."
        ) from error
    return Manifest.from_bytes(data, place.at(MANIFEST))


def _flat(value: Mapping[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, Mapping):
            out |= {f"{key}.{k}": v for k, v in item.items()}
        elif key == "sites":
            out |= {f"sites.{s['site']}": f"width {s['width']}, unit_width {s['unit_width']}" for s in item}
            out["sites (order)"] = [s["site"] for s in item]
        else:
            out[key] = item
    return out


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:39] + "…"
