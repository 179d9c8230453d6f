"""`WeightEdit`: a low-rank change of one weight matrix, as a value.

Enters: two factors, the name of a parameter, the model they were made for, the facts they write. Leaves: a frozen edit
that saves and loads, and the arithmetic of putting edits into a matrix. Does not know which edits a network holds;
that is the ledger's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from reprobe.errors import UnsupportedOperation, UsageError
from reprobe.model.identity import ModelIdentity
from reprobe.model.language_model import LanguageModel
from reprobe.probing import artifact
from reprobe.probing.artifact import Artifact
from reprobe.prompts.fact import Fact
from reprobe.provenance import digest, digest_bytes, rebuilding, text, texts

KIND = "weight edit"
#: An edit that raises the probability of its target by less than this did nothing worth the name.
LEAST_EFFECT = 0.01


@dataclass(frozen=True)
class EditEffect:
    """Probability of a fact's new object after its prompt, exp(mean log-probability of its tokens), without and with
    the edit."""

    before: float
    after: float

    @property
    def found(self) -> bool:
        """Whether the edit did anything: raised the probability by `LEAST_EFFECT` or more."""
        return self.after - self.before >= LEAST_EFFECT


@dataclass(frozen=True, eq=False)
class WeightEdit:
    """W ← W + left · rightᵀ, where W (outputs, inputs) maps what a layer reads to what it returns.

    That is the orientation here whatever the network's own is (GPT-2 stores inputs first). `left` is (outputs, rank),
    `right` (inputs, rank), float64 and read-only. `base` is the model without any edit of the ledger, `after` the
    digests of the edits that were in it when this one was made. `facts` are what it writes, `effects` what was
    measured of each (with all edits made together with this one), `provenance` how it was made, as plain JSON.
    """

    parameter: str
    left: Float[np.ndarray, "outputs rank"]
    right: Float[np.ndarray, "inputs rank"]
    base: ModelIdentity
    after: tuple[str, ...] = ()
    facts: tuple[Fact, ...] = ()
    effects: tuple[EditEffect, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("left", "right"):
            factor = np.array(getattr(self, name), dtype=np.float64)
            if factor.ndim != 2 or not np.isfinite(factor).all():
                raise UsageError(f"the {name} factor of an edit is a finite matrix, not of shape {factor.shape}")
            factor.setflags(write=False)
            object.__setattr__(self, name, factor)
        if self.left.shape[1] != self.right.shape[1] or not self.left.shape[1]:
            raise UsageError(f"factors of one rank, not {self.left.shape} and {self.right.shape}")
        if self.effects and len(self.effects) != len(self.facts):
            raise UsageError(f"{len(self.facts)} facts cannot have {len(self.effects)} effects")

    @property
    def rank(self) -> int:
        """Columns of the factors."""
        return int(self.left.shape[1])

    @property
    def norm(self) -> float:
        """Frobenius norm of the change."""
        return float(np.sqrt(np.sum((self.left.T @ self.left) * (self.right.T @ self.right)).clip(0)))

    @cached_property
    def digest(self) -> str:
        """sha256 over the change itself and the model it is for; what was measured does not enter."""
        factors = [digest_bytes(np.ascontiguousarray(f).tobytes()) for f in (self.left, self.right)]
        return digest([self.parameter, self.rank, *factors, self.base.weights, list(self.after)])

    def measured(self, effects: Sequence[EditEffect]) -> "WeightEdit":
        """The same edit with what was measured of it."""
        return replace(self, effects=tuple(effects))

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write a safetensors file with a JSON header. Raises `ArtifactExists`."""
        artifact.write(Path(path), KIND, self.to_artifact(), overwrite=overwrite)

    @classmethod
    def load(cls, path: str | Path) -> "WeightEdit":
        """Raises `ArtifactMissing`, `CorruptArtifact`, `UsageError` for another kind of artifact."""
        return cls.from_artifact(artifact.read(Path(path), KIND), str(path))

    def to_artifact(self) -> Artifact:
        """The edit as a file's header and arrays."""
        header = {
            "parameter": self.parameter,
            "base": self.base.to_json(),
            "after": list(self.after),
            "facts": [f.to_json() for f in self.facts],
            "effects": [[e.before, e.after] for e in self.effects],
            "provenance": dict(self.provenance),
        }
        return Artifact(header, {"left": self.left, "right": self.right})

    @classmethod
    def from_artifact(cls, found: Artifact, where: str) -> "WeightEdit":
        """What `to_artifact` made; `where` it was, for errors. Raises `CorruptArtifact`."""
        h = found.header
        with rebuilding(f"{where}: malformed header"):
            return cls(
                parameter=text(h["parameter"]),
                left=found.arrays["left"],
                right=found.arrays["right"],
                base=ModelIdentity.from_json(h["base"]),
                after=texts(h["after"]),
                facts=tuple(Fact.from_json(f) for f in h["facts"]),
                effects=tuple(EditEffect(float(before), float(after)) for before, after in h["effects"]),
                provenance=dict(h["provenance"]),
            )


@dataclass(frozen=True, eq=False)
class Matrix:
    """A weight matrix of a network that edits may change, outputs first whatever the network stores."""

    name: str
    weight: Tensor
    inputs_first: bool

    @classmethod
    def of(cls, lm: LanguageModel, name: str) -> "Matrix":
        """The parameter `name` of the network.

        Raises `UsageError` if there is none or it is no matrix of a linear layer, `UnsupportedOperation` if another
        module shares it (tied embeddings) or its values are quantised or not in memory.
        """
        parameters = dict(lm.net.named_parameters(remove_duplicate=False))
        if name not in parameters:
            raise UsageError(f"{lm.name} has no parameter {name!r}")
        weight = parameters[name]
        if weight.ndim != 2:
            raise UsageError(f"{name} of {lm.name} has the shape {tuple(weight.shape)}: an edit changes a matrix")
        shared = [n for n, p in parameters.items() if p is weight and n != name]
        if shared:
            raise UnsupportedOperation(f"{name} of {lm.name} is also {', '.join(shared)}: an edit would change both")
        if not weight.is_floating_point() or weight.device.type == "meta":
            raise UnsupportedOperation(
                f"{name} of {lm.name} is {weight.dtype} on {weight.device.type}: load the model unquantised and in "
                "memory (dtype='float32' or 'bfloat16', no quantization_config) to edit it"
            )
        # Conv1D of transformers (GPT-2) stores inputs first and calls their number nx.
        return cls(name, weight, hasattr(lm.net.get_submodule(name.rpartition(".")[0]), "nx"))

    @classmethod
    def projection(cls, lm: LanguageModel, layer: int) -> "Matrix":
        """The down projection of a block. Raises `UnknownSite` where the block has no `mlp.neurons`."""
        module = lm.architecture.projection(lm.net, layer)
        name = next(name for name, found in lm.net.named_modules() if found is module)
        return cls.of(lm, f"{name}.weight")

    @property
    def values(self) -> Float[Tensor, "outputs inputs"]:
        """The matrix as it is now, in float64 on its device: a copy."""
        wide = self.weight.detach().to(torch.float64, copy=True)
        return wide.T if self.inputs_first else wide

    @torch.no_grad()
    def put(self, values: Float[Tensor, "outputs inputs"]) -> None:
        """Round to the network's dtype and write, in place."""
        self.weight.copy_(values.T if self.inputs_first else values)

    def change(self, edits: Sequence[WeightEdit]) -> Float[Tensor, "outputs inputs"]:
        """The sum of what edits of this matrix add, in float64. Raises `UsageError` if their shape is another."""
        shape = tuple(self.weight.shape[::-1] if self.inputs_first else self.weight.shape)
        for edit in edits:
            if (len(edit.left), len(edit.right)) != shape:
                raise UsageError(
                    f"an edit of a matrix {len(edit.left)} × {len(edit.right)} does not fit {self.name}, "
                    f"which is {shape[0]} × {shape[1]} (outputs × inputs)"
                )
        left, right = (
            torch.from_numpy(np.concatenate([getattr(e, side) for e in edits], axis=1)).to(self.weight.device)
            for side in ("left", "right")
        )
        return left @ right.T
