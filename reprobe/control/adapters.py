"""Low-rank adapters on disk: a folder that stock peft loads, and the same change as weight edits.

Enters: the factors that a training found for matrices of a model, and its configuration for peft. Leaves: a frozen
`Adapter`, its folder, and `WeightEdit`s, which put it into a network and take it out again. Needs no peft. Does not
know how it was trained.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.numpy import load as arrays_of
from safetensors.numpy import save as bytes_of

from reprobe.control.edits import WeightEdit
from reprobe.control.model_folder import whole_folder
from reprobe.errors import ArtifactMissing, CorruptArtifact, ReprobeError
from reprobe.model.identity import ModelIdentity
from reprobe.provenance import canonical_json, digest_bytes, require_schema, write_durably

_SCHEMA = 1
#: The names that peft gives its files, and ours beside them.
_CONFIG, _WEIGHTS, _RECORD = "adapter_config.json", "adapter_model.safetensors", "reprobe.json"
#: What peft puts before a module's path.
_PREFIX = "base_model.model."


@dataclass(frozen=True, eq=False)
class Factors:
    """W ← W + scale · up · down, as peft keeps it (its lora_B and lora_A)."""

    down: Float[np.ndarray, "rank inputs"]
    up: Float[np.ndarray, "outputs rank"]


@dataclass(frozen=True, eq=False)
class Adapter:
    """A low-rank change of several matrices that belong together.

    `factors` are by the path of the linear layer in the network, `config` is peft's, as plain JSON. `base` is the model
    without any edit of the ledger, `after` the digests of the edits that it held. `losses` are those of each training
    step, `provenance` how it was made, as plain JSON.
    """

    config: Mapping[str, Any]
    factors: Mapping[str, Factors]
    base: ModelIdentity
    after: tuple[str, ...] = ()
    losses: tuple[float, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def scale(self) -> float:
        """What the product of the factors is multiplied by."""
        return float(self.config["lora_alpha"]) / int(self.config["r"])

    def edits(self, strength: float = 1.0) -> tuple[WeightEdit, ...]:
        """The adapter, or `strength` times it, as one edit per matrix.

        `edited(lm, adapter.edits())` switches it on and off, `apply_edits` merges it, `export_edited` writes the merged
        model. The weights are then others, and so is the model's identity.
        """
        made = dict(self.provenance) | {"strength": strength}
        return tuple(
            WeightEdit(
                f"{path}.weight",
                strength * self.scale * own.up.astype(np.float64),
                own.down.T,
                base=self.base,
                after=self.after,
                provenance=made | {"layer": _layer(path)},
            )
            for path, own in self.factors.items()
        )

    def save(self, to: str | Path) -> Path:
        """Write a new folder as `peft.PeftModel.from_pretrained(net, folder)` loads it, with our record beside.

        The folder exists whole or not at all. Raises `ArtifactExists`.
        """
        arrays = {
            f"{_PREFIX}{path}.{name}.weight": np.ascontiguousarray(factor)
            for path, own in self.factors.items()
            for name, factor in (("lora_A", own.down), ("lora_B", own.up))
        }
        files = {_CONFIG: canonical_json(dict(self.config)).encode(), _WEIGHTS: bytes_of(arrays, {"format": "pt"})}
        record = {
            "schema": _SCHEMA,
            "base": self.base.to_json(),
            "after": list(self.after),
            "losses": list(self.losses),
            "provenance": dict(self.provenance),
            "sha256": {name: digest_bytes(data) for name, data in files.items()},
        }
        with whole_folder(Path(to)) as folder:
            for name, data in (*files.items(), (_RECORD, canonical_json(record).encode())):
                write_durably(folder / name, data)
        return Path(to)

    @classmethod
    def load(cls, folder: str | Path) -> "Adapter":
        """The adapter of a folder that `save` wrote.

        Raises `ArtifactMissing` (also for adapters of others, of which it is not known which weights they are for),
        `CorruptArtifact`, `SchemaMismatch`.
        """
        place = Path(folder)
        if not holds_adapter(place):
            what = (
                "an adapter that reprobe did not write, so that its base is not known"
                if (place / _CONFIG).is_file()
                else "no adapter"
            )
            raise ArtifactMissing(f"{place} holds {what}; `reprobe lorra` and methods.lorra.train write adapters")
        try:
            record = json.loads((place / _RECORD).read_text())
            require_schema(record["schema"], _SCHEMA, str(place / _RECORD))
            data = {name: (place / name).read_bytes() for name in (_CONFIG, _WEIGHTS)}
            changed = [name for name in data if digest_bytes(data[name]) != record["sha256"][name]]
            if changed:
                raise CorruptArtifact(f"{place / changed[0]} was changed since it was written")
            return cls(
                config=json.loads(data[_CONFIG]),
                factors=_factors(arrays_of(data[_WEIGHTS])),
                base=ModelIdentity.from_json(record["base"]),
                after=tuple(record["after"]),
                losses=tuple(record["losses"]),
                provenance=record["provenance"],
            )
        except ReprobeError:
            raise
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise CorruptArtifact(f"{place}: malformed ({error!r})") from error


def holds_adapter(place: Path) -> bool:
    """Whether a folder was written by `Adapter.save`."""
    return (place / _CONFIG).is_file() and (place / _RECORD).is_file()


def _factors(arrays: Mapping[str, np.ndarray]) -> dict[str, Factors]:
    down = {name.removesuffix(".lora_A.weight"): a for name, a in arrays.items() if name.endswith(".lora_A.weight")}
    return {path.removeprefix(_PREFIX): Factors(a, arrays[f"{path}.lora_B.weight"]) for path, a in sorted(down.items())}


def _layer(path: str) -> int | None:
    """The first number in a module's path: its block."""
    found = re.search(r"\.(\d+)\.", path)
    return None if found is None else int(found[1])
