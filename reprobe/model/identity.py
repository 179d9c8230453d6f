"""Which model an artifact belongs to.

Enters: a loaded transformers model and its tokenizer. Leaves: a frozen `ModelIdentity`, small enough for every
manifest and header. Does not know where weights came from; it looks at what is loaded.
"""

import hashlib
import weakref
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from reprobe.errors import CorruptArtifact, IdentityMismatch
from reprobe.provenance import digest, digest_bytes

#: By fast tokenizer: its state in short, and the digest.
_DIGESTS: "weakref.WeakKeyDictionary[Any, tuple[str, str]]" = weakref.WeakKeyDictionary()

#: Elements of each tensor that enter the weights digest, evenly spaced from the first to the last.
SAMPLE = 2048


@dataclass(frozen=True)
class ModelIdentity:
    """What must agree for an activation to be the same activation.

    `name` and `revision` are for people and are not compared: the digests say more. All other fields are.
    `weights` covers the name, shape and dtype of every parameter and buffer, and of each the bytes of `SAMPLE`
    evenly spaced elements (all of them where it has no more): any retraining, merge or rank-one edit changes it; a
    change of a few single weights in a large matrix may not. `tokenizer` covers the fast tokenizer's whole
    serialisation and the special-token settings, `template` the chat template's text (None if there is none).
    """

    name: str
    revision: str | None
    architecture: str
    n_layers: int
    d_model: int
    weights: str
    tokenizer: str
    template: str | None
    dtype: str
    quantization: str | None

    def to_json(self) -> dict[str, Any]:
        """The fields as plain JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "ModelIdentity":
        """What `to_json` made. Raises `CorruptArtifact` for anything else."""
        want = {f.name for f in fields(cls)}
        if not isinstance(value, Mapping) or set(value) != want:
            raise CorruptArtifact(f"a model identity needs exactly the fields {', '.join(sorted(want))}")
        return cls(**value)

    def differences(self, other: "ModelIdentity") -> dict[str, tuple[Any, Any]]:
        """Compared fields that differ, each as (self's value, other's value)."""
        mine, theirs = asdict(self), asdict(other)
        return {k: (mine[k], theirs[k]) for k in mine if k not in ("name", "revision") and mine[k] != theirs[k]}

    def require_same(self, other: "ModelIdentity", what: str, *, allow_mismatch: bool = False) -> None:
        """Raise `IdentityMismatch`, listing the fields, if `what` (made with `self`) is used with `other`."""
        diff = self.differences(other)
        if diff and not allow_mismatch:
            lines = [f"  {k}: {short(a)} there, {short(b)} here" for k, (a, b) in diff.items()]
            raise IdentityMismatch(
                f"{what} was made with {self.name}, not with this {other.name}:\n" + "\n".join(lines) + "\n"
                "Load the model it was made with, or pass allow_mismatch=True if you know they agree."
            )


def short(value: Any) -> str:
    """A field of an identity for people: of a digest, its beginning."""
    text = str(value)
    return text[:12] + "…" if len(text) == 64 else text


def digest_weights(net: torch.nn.Module) -> str:
    """sha256 over names, shapes, dtypes and `SAMPLE` evenly spaced elements of every parameter and buffer.

    A tensor that is not in memory (offloaded to the meta device) enters with name, shape and dtype only.
    """
    h = hashlib.sha256()
    for name, tensor in sorted(net.state_dict().items()):
        if not isinstance(tensor, torch.Tensor):  # quantisers keep extra state beside the tensors
            h.update(f"{name}={tensor!r}\n".encode())
            continue
        h.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        if tensor.device.type != "meta" and tensor.numel():
            h.update(_sample(tensor).contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return h.hexdigest()


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.detach().reshape(-1)
    n = flat.numel()
    if n <= SAMPLE:
        return flat
    steps = torch.arange(SAMPLE, device=flat.device, dtype=torch.int64)
    return flat[steps * (n - 1) // (SAMPLE - 1)]


def digest_tokenizer(tokenizer: Any) -> str:
    """sha256 over what decides token ids: the backend's serialisation and the special tokens.

    Truncation and padding settings are left out: they are states of a call, not of the vocabulary.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    special = {k: str(v) for k, v in tokenizer.special_tokens_map.items()}
    if backend is None:
        return digest([sorted(tokenizer.get_vocab().items()), special])
    # Writing out a large vocabulary takes a third of a second, so it is done once for what can be changed in place.
    state = repr((len(tokenizer), special, tokenizer.added_tokens_decoder, backend.normalizer, backend.pre_tokenizer,
                  backend.post_processor, backend.decoder))  # fmt: skip
    known = _DIGESTS.get(tokenizer)
    if known is None or known[0] != state:
        # The text is canonical, its maps ordered, and the settings of a call stand before the vocabulary. Parsing it
        # to drop them would take seconds.
        head, mark, rest = backend.to_str().partition('"added_tokens":')
        known = _DIGESTS[tokenizer] = (state, digest([digest_bytes((rest if mark else head).encode()), special]))
    return known[1]


def digest_template(tokenizer: Any) -> str | None:
    """sha256 of the chat template's text, None if the tokenizer has none."""
    template = getattr(tokenizer, "chat_template", None)
    if template is None:
        return None
    return digest(template) if not isinstance(template, str) else digest_bytes(template.encode())
