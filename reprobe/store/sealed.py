"""JSON that notices every changed byte.

Enters: a JSON object. Leaves: its canonical text with its own digest inside; and back. Manifests and commit
records are written this way. The digest is a checksum, not a signature: it shows damage, not forgery. Does
not know what the fields mean.
"""

import json
from collections.abc import Mapping
from typing import Any

from reprobe.errors import CorruptArtifact
from reprobe.provenance import canonical_json, digest

_SEAL = "digest"


def seal(body: Mapping[str, Any]) -> bytes:
    """Canonical text of `body` with its digest as one more field, `digest`."""
    return canonical_json({**body, _SEAL: digest(dict(body))}).encode()


def unseal(data: bytes, what: str) -> dict[str, Any]:
    """The object that `seal` wrote; raises `CorruptArtifact`, naming `what`, unless every byte is as written.

    Parsing alone would forgive much (spaces, `1.00` for `1.0`, duplicate keys), so the bytes must also equal
    the canonical text of what was parsed.
    """
    try:
        value = json.loads(data.decode("utf-8"))
        canonical = canonical_json(value).encode()
    except (ValueError, RecursionError) as error:
        raise CorruptArtifact(f"{what} is not readable JSON ({error}): it was damaged after writing") from error
    if not isinstance(value, dict) or _SEAL not in value or canonical != data:
        raise CorruptArtifact(f"{what} is not as it was written: bytes were changed, or it was edited by hand")
    body = {k: v for k, v in value.items() if k != _SEAL}
    if value[_SEAL] != digest(body):
        raise CorruptArtifact(f"{what} does not match its own digest: it was damaged or edited after writing")
    return body
