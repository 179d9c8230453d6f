"""Ways to damage and to forge files: each takes the bytes of a valid file and gives others.

Damage is blind: bytes change, are lost, are added. Forgery knows the format: it changes one value deep inside and makes
every checksum fit again, as somebody would who means harm.
"""

import json
import struct
import tomllib
from collections.abc import Callable, Mapping
from random import Random
from typing import Any

import numpy as np

from reprobe.probing.artifact import Artifact, to_bytes
from reprobe.provenance import canonical_json
from reprobe.store.sealed import seal

Mutation = Callable[[bytes, Random], bytes]

# -- damage ------------------------------------------------------------------------------------------------------


def flip(data: bytes, rng: Random) -> bytes:
    """One to four bits."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    return bytes(out)


def truncate(data: bytes, rng: Random) -> bytes:
    return data[: rng.randrange(len(data))]


def insert(data: bytes, rng: Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.randbytes(rng.randint(1, 9)) + data[at:]


def cut_out(data: bytes, rng: Random) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + data[at + rng.randint(1, 40) :]


def repeat(data: bytes, rng: Random) -> bytes:
    """A piece of the file a second time, somewhere else."""
    a, at = rng.randrange(len(data)), rng.randrange(len(data))
    return data[:at] + data[a : a + rng.randint(1, 60)] + data[at:]


def enlarge(data: bytes, rng: Random) -> bytes:
    """Eight bytes become a huge number (lengths and counts are little-endian in every format here)."""
    at, number = rng.randrange(max(len(data) - 8, 1)), rng.choice((2**60, 2**63, 2**64 - 1, 2**31, 2**40))
    return data[:at] + struct.pack("<Q", number) + data[at + 8 :]


#: Blind damage, which every reader must stand.
DAMAGE: tuple[Mutation, ...] = (flip, truncate, insert, cut_out, repeat, enlarge)


def in_head(data: bytes, rng: Random) -> bytes:
    """Damage among the first bytes, where formats keep what they say of the rest."""
    head = min(len(data), 1200)
    return rng.choice(DAMAGE)(data[:head], rng) + data[head:]


# -- JSON --------------------------------------------------------------------------------------------------------

_DEEP = "@deep@"
#: JSON of the wrong kind, size or shape. `_DEEP` becomes lists in lists, too deep for a recursive reader.
ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 3, 2**31, 2**63, 2**64, -(2**70), 10**400, 0.5, 1e308, float("nan"), float("inf"),
    "", "0", "x", "resid.post@1", "resid.post@99999999999", "attn.heads@1.2", "\ud800", "\x00", "ab\nc", "é" * 3000,
    "../../etc/passwd", "/etc/passwd", "__reduce__", [], {}, [[]], [None], [1, 2], [[1, 2], [3]], ["a", 1], {"a": {}},
    {"array": "0000"}, {"direction": 1, "vector": 2}, {"when": {}}, {"site": 3}, {"scope": []}, _DEEP,
)  # fmt: skip


def odd_json(value: Any, rng: Random) -> Any:
    """`value` with one thing changed: replaced, lost, added, renamed, or doubled, anywhere in it."""
    places = list(_places(value, ()))
    *path, last = rng.choice(places) if places else ()
    out = json.loads(json.dumps(value))
    at = out
    for key in path:
        at = at[key]
    match rng.randrange(6):
        case 0 if isinstance(at, dict):
            at[rng.choice(("x", "", "kind", "__class__", str(last) + "_"))] = at.pop(last)
        case 0:
            at.insert(last, at[last])
        case 1:
            del at[last]
        case 2 if isinstance(at[last], int | float) and not isinstance(at[last], bool):
            at[last] = rng.choice((-at[last], at[last] + 1, at[last] * 10**12, float(at[last]), str(at[last])))
        case _:
            at[last] = rng.choice(ODD)
    return out


def _places(value: Any, path: tuple[Any, ...]) -> Any:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from _places(item, (*path, key))


def json_text(value: Any, *, indent: int | None = None) -> str:
    """JSON as Python writes it, NaN and all; `_DEEP` is too deep for any writer and is put in by hand."""
    text = json.dumps(value, indent=indent, allow_nan=True)
    return text.replace(f'"{_DEEP}"', "[" * 100_000 + "]" * 100_000)


def odd_json_file(data: bytes, rng: Random) -> bytes:
    return json_text(odd_json(json.loads(data), rng)).encode()


def odd_json_line(data: bytes, rng: Random) -> bytes:
    lines = data.decode().splitlines()
    i = rng.randrange(len(lines))
    lines[i] = json_text(odd_json(json.loads(lines[i]), rng))
    return "\n".join(lines).encode()


def odd_toml(data: bytes, rng: Random) -> bytes:
    return toml_text(odd_json(tomllib.loads(data.decode()), rng)).encode("utf-8", "surrogatepass")


def toml_text(value: Mapping[str, Any]) -> str:
    """TOML, a key of the top a line; values that it lacks are written as JSON has them."""

    def inline(value: Any) -> str:
        if isinstance(value, dict):
            return f"{{{', '.join(f'{json.dumps(k)} = {inline(v)}' for k, v in value.items())}}}"
        if isinstance(value, list):
            return f"[{', '.join(map(inline, value))}]"
        if isinstance(value, float):
            return {"NaN": "nan", "Infinity": "inf"}.get(json.dumps(value), repr(value))
        return json_text(value)

    return "".join(f"{json.dumps(key)} = {inline(item)}\n" for key, item in value.items())


def odd_sealed(data: bytes, rng: Random) -> bytes:
    """A file of `store.sealed`, with its digest right again where such a value can have one."""
    body = odd_json({k: v for k, v in json.loads(data).items() if k != "digest"}, rng)
    try:
        return seal(body).replace(f'"{_DEEP}"'.encode(), b"[" * 100_000 + b"]" * 100_000)
    except ValueError:  # NaN, or half a character
        return json_text(body | {"digest": "0" * 64}, indent=2).encode()


# -- safetensors -------------------------------------------------------------------------------------------------


def opened(data: bytes) -> tuple[dict[str, Any], bytes]:
    """The header and the bytes behind it."""
    (n,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + n]), data[8 + n :]


def closed(header: Any, rest: bytes) -> bytes:
    text = json_text(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + rest


def odd_header(data: bytes, rng: Random) -> bytes:
    """safetensors' own header: wrong dtypes, shapes of 2^60 elements, ranges that overlap or end behind the file."""
    header, rest = opened(data)
    tensors = [name for name in header if name != "__metadata__"]
    if not tensors or rng.random() < 0.3:
        return closed(odd_json(header, rng), rest)
    about = header[rng.choice(tensors)]
    size = about["data_offsets"][1] - about["data_offsets"][0]
    match rng.randrange(4):
        case 0:
            about["dtype"] = rng.choice(
                ("F64", "F32", "BF16", "F16", "I64", "U8", "BOOL", "F8_E4M3", "C64", "object", "")
            )
        case 1:
            shape = rng.choice(([2**60], [0, 2**60], [2**32, 2**32], [], [-1], [size], [1, size], [0], [1] * 70, ["3"]))
            about["shape"] = shape
        case 2:
            about["data_offsets"] = rng.choice(([0, 2**60], [0, 0], [size, 0], [-8, size - 8], [0], [0, size, size]))
        case _:
            about["shape"], about["data_offsets"] = [2**57], [0, 2**60]
    return closed(header, rest)


def forged(data: bytes, rng: Random) -> bytes:
    """An artifact of `probing.artifact` with another value in its header or another array, and a checksum that fits."""
    raw, rest = opened(data)
    envelope = json.loads(raw["__metadata__"]["reprobe"])
    arrays = {n: _array(v, rest) for n, v in raw.items() if n != "__metadata__"}
    header = envelope["header"]
    if arrays and rng.random() < 0.4:
        arrays = odd_arrays(arrays, rng)
    else:
        header = odd_json(header, rng)
    try:
        if _DEEP not in canonical_json(header).encode().decode():
            return to_bytes(envelope["kind"], Artifact(header, arrays))
    except ValueError:
        pass  # NaN, or half a character: no canonical text, so no checksum either
    raw["__metadata__"]["reprobe"] = json_text(envelope | {"header": header})
    return closed(raw, rest)


def misplaced(data: bytes, rng: Random) -> bytes:
    """The envelope around the header of an artifact: its kind, schema, checksum."""
    raw, rest = opened(data)
    envelope = json.loads(raw["__metadata__"]["reprobe"])
    part = rng.choice(("kind", "schema", "sha256", "header"))
    envelope[part] = rng.choice(ODD)
    text = json_text(rng.choice((envelope, envelope, envelope, [envelope], part, None)))
    raw["__metadata__"]["reprobe"] = rng.choice((text, text, text, "{", "", text[:-1], "[" * 100_000))
    return closed(raw, rest)


_NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "U8": "u1", "BOOL": "?",
          "U64": "<u8", "U32": "<u4", "U16": "<u2", "I8": "i1"}  # fmt: skip


def _array(about: dict[str, Any], rest: bytes) -> np.ndarray:
    a, b = about["data_offsets"]
    return np.frombuffer(rest[a:b], _NUMPY[about["dtype"]]).reshape(about["shape"])


def odd_arrays(arrays: dict[str, np.ndarray], rng: Random) -> dict[str, np.ndarray]:
    """One array lost, renamed, or of another shape, dtype or content."""
    name = rng.choice(sorted(arrays))
    out, array = dict(arrays), arrays[name]
    match rng.randrange(8):
        case 0:
            del out[name]
        case 1:
            out[rng.choice(("x", name + ".0", "0." + name))] = out.pop(name)
        case 2:
            out[name] = array[: len(array) // 2] if array.ndim else array[None]
        case 3:
            out[name] = array.reshape(-1) if array.ndim != 1 else array[:, None]
        case 4:
            with np.errstate(invalid="ignore"):  # NaN as a whole number is some number
                out[name] = array.astype(rng.choice(("f8", "f4", "i8", "u1", "?", "i2")))
        case 5:
            out[name] = np.zeros((0, *array.shape[1:]), array.dtype)
        case 6:
            out[name] = np.full_like(array, np.nan if array.dtype.kind == "f" else rng.choice((0, 1, 100)))
        case _:
            out[name] = np.ascontiguousarray(array.T)[..., None]
    return out
