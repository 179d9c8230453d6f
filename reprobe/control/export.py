"""Steering in the layouts of other programs: llama.cpp, repeng, steering-vectors, vllm-lens, or plain tensors.

Enters: a direction, an intervention or a `Steering`. Leaves: one file of vectors, or back from a GGUF control vector a
`Steering`. All of these programs add vectors to every token, so only what does that, and nothing else, can be exported;
all but the plain tensors do it to the outputs of blocks. Does not know how these programs are run.

Block N is counted from 0 in all of them: its output is `resid.post@N` here, `hidden_states[N + 1]` of transformers
(but for the last block, whose entry there is after the final norm). What enters block N + 1 is the same vector.

| format | file | read with |
|---|---|---|
| gguf | GGUF, architecture `controlvector`, tensors `direction.N`, N ≥ 1 | `llama-cli --control-vector FILE` |
| repeng | the same with repeng's metadata; also N = 0 | `ControlVector.import_gguf(FILE)` |
| steering-vectors | safetensors, tensors `N`, metadata `layer_type` | `SteeringVector({N: tensor})` |
| vllm-lens | JSON: `activations` (base64), `layer_indices`, `scale` | `SteeringVector.model_validate_json(text)` |
| tensors | safetensors, a tensor per site, by its name | anything; the metadata say what is added where |

Vectors are float32, with the strength in them: what the program multiplies them by is 1 for the strength given here.
"""

import base64
import json
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import gguf
import numpy as np
from jaxtyping import Float
from safetensors.numpy import save as safetensors_bytes

from reprobe.control.along import Add
from reprobe.control.bundle import Steering
from reprobe.control.operators import Operator
from reprobe.errors import ArtifactExists, ArtifactMissing, CorruptArtifact, UsageError
from reprobe.model.gguf_families import FAMILIES
from reprobe.model.identity import ModelIdentity
from reprobe.model.sites import Site
from reprobe.probing.direction import Direction
from reprobe.provenance import canonical_json, digest_file, write_durably

Format = Literal["gguf", "repeng", "steering-vectors", "vllm-lens", "tensors"]

_ARCHITECTURE = "controlvector"
_TENSOR = re.compile(r"direction\.(\d+)")


def export(
    what: Direction | Operator | Steering,
    to: str | Path,
    *,
    format: Format = "gguf",  # noqa: A002
    overwrite: bool = False,
) -> Path:
    """Write a direction (at strength 1), an Add or a bundle of them as a file that another program reads.

    The module's docstring says what each format holds and how it is read. The file exists whole or not at all. Raises
    `UsageError` for what the format cannot say: anything but adding one vector to every token, other sites than the
    outputs of blocks (but for "tensors"), block 0 in "gguf"; `ArtifactExists` unless `overwrite`.
    """
    if format not in get_args(Format):
        raise UsageError(f"unknown format {format!r}; one of {', '.join(get_args(Format))}")
    path = Path(to)
    if path.is_dir() or (path.exists() and not overwrite):
        raise ArtifactExists(f"{path} exists; choose another name or pass overwrite=True")
    steering = _steering(what)
    data = _tensors(steering) if format == "tensors" else _WRITERS[format](block_vectors(steering), steering.identity)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, data)
    return path


def block_vectors(what: Direction | Operator | Steering) -> dict[int, Float[np.ndarray, " d_model"]]:
    """What is added to the output of each block, strengths included, by block from 0: repeng's `directions`.

    Raises `UsageError` for what is not that.
    """
    out: dict[int, np.ndarray] = {}
    for site, vector in _added(_steering(what)).items():
        if site.part not in ("resid.post", "resid.pre") or site == Site("resid.pre", 0):
            raise UsageError(
                f"a vector at {site} cannot be exported in this format: it knows the outputs of blocks only "
                "(resid.post@N); export it as tensors, or bake it into the model"
            )
        assert site.layer is not None
        block = site.layer if site.part == "resid.post" else site.layer - 1
        out[block] = out[block] + vector if block in out else vector
    return dict(sorted(out.items()))


def read_control_vector(
    path: str | Path,
    *,
    format: Literal["gguf", "repeng"] = "gguf",  # noqa: A002
    identity: ModelIdentity | None = None,
) -> Steering:
    """The `Steering` that adds what a GGUF control vector of llama.cpp or repeng adds, at strength 1.

    Each vector becomes a direction whose scale is its length; vectors of zeros add nothing and are left out. The file
    does not say which model it is of: `identity` does, if you know. Raises `ArtifactMissing`, `CorruptArtifact`, and
    `UsageError` for another kind of GGUF file, tensors that are no float32 rows of one width, or block 0 in the format
    "gguf" (llama.cpp refuses it; repeng takes it).
    """
    path = Path(path)
    if not path.is_file():
        raise ArtifactMissing(f"{path}: no such control vector")
    from reprobe.model.gguf import Reader  # and transformers with it, which writing does not need

    try:
        reader = Reader(path)
        about = {name: field.contents() for name, field in reader.fields.items()}
        tensors = [(t.name, t.tensor_type, np.array(t.data)) for t in reader.tensors]
    except Exception as error:  # the reader indexes into what is not there in a dozen ways
        raise CorruptArtifact(f"{path} cannot be read as GGUF ({error}); it is damaged or something else") from error
    if (architecture := about.get("general.architecture")) != _ARCHITECTURE:
        raise UsageError(f"{path} is a GGUF file of the architecture {architecture!r}, not of a control vector")
    vectors: dict[int, np.ndarray] = {}
    for name, kind, values in tensors:
        found = _TENSOR.fullmatch(name)
        if found is None or kind != gguf.GGMLQuantizationType.F32 or values.ndim != 1:
            raise UsageError(
                f"{path}: the tensor {name!r} ({kind.name}, {values.ndim} dimensions) is none of a control vector, "
                "which has float32 rows named direction.N"
            )
        vectors[int(found[1])] = values.astype(np.float64)
    if format == "gguf":
        _require_no_block_0(vectors, f"{path} names block 0")
    if len({len(v) for v in vectors.values()}) != 1 or not any(v.any() for v in vectors.values()):
        raise UsageError(f"{path} holds no vectors of one width that add anything")
    known = {"sha256": digest_file(path), "model_hint": about.get(f"{_ARCHITECTURE}.model_hint")}
    adds = [
        Add(Direction.from_vector(Site("resid.post", block), vector, identity=identity, provenance={"gguf": known}))
        for block, vector in sorted(vectors.items())
        if vector.any()
    ]
    return Steering(*adds, name=path.stem, provenance={"gguf": known})


def _steering(what: Direction | Operator | Steering) -> Steering:
    if isinstance(what, Steering):
        return what
    if isinstance(what, Direction):
        what = Add(what)
    if isinstance(what, Operator):
        return Steering(what)
    raise UsageError(f"a direction, an intervention or a Steering can be exported, not a {type(what).__name__}")


def _added(steering: Steering) -> dict[Site, Float[np.ndarray, " width"]]:
    """The sum of what is added at each site, in the order of the sites on a token's way."""
    out: dict[Site, np.ndarray] = {}
    for item in sorted(steering.interventions, key=lambda item: item.site.depth):
        if item.step is None or item.when is not None or item.tokens.kind != "all":
            raise UsageError(
                f"'{item}' cannot be exported: other programs add one vector to every token, the same for all prompts "
                "and without a condition"
            )
        out[item.site] = out[item.site] + item.step if item.site in out else item.step
    if not out:
        raise UsageError(f"the steering {steering.name!r} adds nothing that could be exported")
    return out


def _require_no_block_0(vectors: Mapping[int, np.ndarray], what: str) -> None:
    if 0 in vectors:
        raise UsageError(
            f"{what}: llama.cpp's control vectors begin at block 1 and it refuses others. Leave that block out, or "
            "use the format repeng, which has it"
        )


def _gguf(vectors: Mapping[int, np.ndarray], identity: ModelIdentity | None) -> bytes:
    _require_no_block_0(vectors, "this adds to the output of block 0")
    family = None if identity is None else identity.architecture
    # llama.cpp writes its own name of the architecture, and reads none of the metadata.
    name = next((name for name, row in FAMILIES.items() if row.model_type == family), family)
    return _control_vector(vectors, name, lambda writer, key, n: writer.add_int32(key, n))


def _repeng(vectors: Mapping[int, np.ndarray], identity: ModelIdentity | None) -> bytes:
    name = None if identity is None else identity.architecture
    return _control_vector(vectors, name, lambda writer, key, n: writer.add_uint32(key, n))


def _control_vector(
    vectors: Mapping[int, np.ndarray], model: str | None, count: Callable[[gguf.GGUFWriter, str, int], None]
) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vector.gguf"
        writer = gguf.GGUFWriter(path, _ARCHITECTURE)
        writer.add_string(f"{_ARCHITECTURE}.model_hint", model or "unknown")
        count(writer, f"{_ARCHITECTURE}.layer_count", len(vectors))
        for block, vector in vectors.items():
            writer.add_tensor(f"direction.{block}", vector.astype(np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path.read_bytes()


def _steering_vectors(vectors: Mapping[int, np.ndarray], identity: ModelIdentity | None) -> bytes:
    tensors = {str(block): vector.astype(np.float32) for block, vector in vectors.items()}
    return safetensors_bytes(tensors, metadata={"layer_type": "decoder_block"})


def _vllm_lens(vectors: Mapping[int, np.ndarray], identity: ModelIdentity | None) -> bytes:
    rows = np.stack(list(vectors.values())).astype("<f4")
    value = {
        "activations": {
            "data": base64.b64encode(rows.tobytes()).decode("ascii"),
            "dtype": "float32",
            "original_dtype": "torch.float32",
            "shape": list(rows.shape),
        },
        "layer_indices": list(vectors),
        "scale": 1.0,
        "norm_match": False,
    }
    return canonical_json(value).encode()


def _tensors(steering: Steering) -> bytes:
    about: dict[str, Any] = {
        "adds": "the tensor named like a site is added there to every token's activation, as it is",
        "sites": "blocks are counted from 0; resid.post@N is the output of block N, before any final norm; "
        "attn.heads@N.H is head H of what enters the attention output projection of block N",
        "name": steering.name,
        "identity": None if steering.identity is None else steering.identity.to_json(),
    }
    tensors = {str(site): vector.astype(np.float32) for site, vector in _added(steering).items()}
    return safetensors_bytes(tensors, metadata={"reprobe": json.dumps(about, sort_keys=True)})


_WRITERS: Mapping[str, Callable[[Mapping[int, np.ndarray], ModelIdentity | None], bytes]] = {
    "gguf": _gguf,
    "repeng": _repeng,
    "steering-vectors": _steering_vectors,
    "vllm-lens": _vllm_lens,
}
