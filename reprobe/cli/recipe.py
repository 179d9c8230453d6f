"""A recipe: everything that a study does, as one file that others can run again.

Enters: a TOML file. Leaves: its steps in the order in which they run, every key checked and every reference resolved,
and the digest of what it says. Does not know how a step is done; `reprobe.cli.recipe_steps` does.

    title = "Mood in SmolLM2"

    [model]
    name = "smollm2-135m"

    [extract.scenes]              # a store, scenes.reprobe
    data = "emotions"
    limit = 120

    [probe.happiness]             # a grid, probes/happiness.safetensors, and its best direction
    store = "scenes"
    positive = "happiness"

A section says the kind of a step and its author's name for it; a step refers to another by its name. Files are
looked for beside the recipe. What no key says is as the verb has it by default, but for `batch_tokens`, which is fixed.
"""

import difflib
import math
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from reprobe.cli.options import ReaderName
from reprobe.errors import UnknownData, UsageError
from reprobe.provenance import digest


@dataclass(frozen=True)
class Key:
    """What a key may hold, in words and as a test; whether it must be there; of which steps it is a name."""

    wanted: str
    holds: Callable[[Any], bool]
    required: bool = False
    names: str | None = None

    @property
    def needed(self) -> "Key":
        return Key(self.wanted, self.holds, True, self.names)


def _list_of(one: Key) -> Key:
    return Key(
        f"a list, each of it {one.wanted}",
        lambda v: isinstance(v, list) and bool(v) and all(map(one.holds, v)),
        names=one.names,
    )


def _one_of(*names: str) -> Key:
    return Key(f"one of {', '.join(names)}", lambda v: v in names)


def _step(kind: str) -> Key:
    return Key(f"the name of a step [{kind}.NAME]", lambda v: isinstance(v, str), True, kind)


_TEXT = Key("text", lambda v: isinstance(v, str) and v.strip() != "")
_COUNT = Key("a whole number, 1 or more", lambda v: type(v) is int and 1 <= v < 2**31)
_WHOLE = Key("a whole number, 0 or more", lambda v: type(v) is int and 0 <= v < 2**31)
_NUMBER = Key("a finite number", lambda v: type(v) in (int, float) and math.isfinite(v))
_YES = Key("true or false", lambda v: type(v) is bool)
_LABEL = Key("a label: text or a whole number", lambda v: type(v) in (str, int))
_DTYPE = _one_of("float32", "float16", "bfloat16")
_FOLDS = {"sites": _TEXT, "label": _TEXT, "positive": _LABEL, "folds": _COUNT, "seed": _WHOLE}
_READER = _one_of(*get_args(ReaderName))
#: What acts: the best direction of a grid (of the sites of one part), added or ablated.
_ACT = {"probe": _step("probe"), "part": _TEXT, "tokens": _TEXT}

MODEL: Mapping[str, Key] = {"name": _TEXT.needed, "dtype": _DTYPE, "revision": _TEXT}
#: The kinds of steps in the order in which they run, and the keys of each.
KINDS: Mapping[str, Mapping[str, Key]] = {
    "extract": {
        "data": _TEXT.needed,
        "limit": _COUNT,
        "sites": _TEXT,
        "at": _TEXT,
        "pack": _one_of("forest", "padded", "single"),
        "dtype": _DTYPE,
        "batch_tokens": _COUNT,
        "truncate": _one_of("left", "right"),
        "shard_rows": _COUNT,
        "format": _one_of("zarr", "hdf5"),
        "compression": _one_of("zstd"),
    },
    "probe": {"store": _step("extract"), "reader": _READER, **_FOLDS, "part": _TEXT},
    "compare": {"store": _step("extract"), "readers": _list_of(_READER).needed, **_FOLDS},
    "scan": {"probe": _step("probe"), "text": _TEXT.needed, "part": _TEXT},
    "steer": {
        **_ACT,
        "strengths": _list_of(_NUMBER).needed,
        "prompts": _list_of(_TEXT).needed,
        "positive": _list_of(_TEXT).needed,
        "negative": _list_of(_TEXT).needed,
        "neutral": _list_of(_TEXT),
        "story": _TEXT,
        "max_new_tokens": _COUNT,
    },
    "side-effects": {
        **_ACT,
        "strength": _NUMBER.needed,
        "unrelated": _TEXT,
        "max_new_tokens": _WHOLE,
        "seed": _WHOLE,
    },
    "multiple-choice": {**_ACT, "data": _TEXT.needed, "limit": _COUNT, "strength": _NUMBER.needed, "seed": _WHOLE},
    "trace": {
        "data": _TEXT.needed,
        "limit": _COUNT,
        "unknown": _one_of("refuse", "drop", "keep"),
        "kinds": _list_of(_TEXT),
        "layers": _list_of(_WHOLE),
        "window": _COUNT,
        "samples": _COUNT,
        "noise": _NUMBER,
        "seed": _WHOLE,
    },
    "edit": {
        "subject": _TEXT.needed,
        "prompt": _TEXT.needed,
        "target": _TEXT.needed,
        "layer": _WHOLE,
        "text": _TEXT,
        "text_tokens": _COUNT,
    },
    "dissect": {
        "data": _TEXT.needed,
        "concepts": _TEXT,
        "sites": _TEXT,
        "tokens": _COUNT,
        "window": _COUNT,
        "quantile": _NUMBER,
        "detector": _NUMBER,
        "permutations": _WHOLE,
        "drop_absent": _YES,
        "seed": _WHOLE,
    },
}


@dataclass(frozen=True)
class Step:
    """One thing to do: its kind, its name, and the keys that were given."""

    kind: str
    name: str
    given: Mapping[str, Any]

    def __str__(self) -> str:
        return f"{self.kind}.{self.name}"


@dataclass(frozen=True)
class Recipe:
    """A recipe that has been checked. `source` are the bytes of its file, `digest` is of what they say: comments and
    the order of keys do not count."""

    path: Path
    source: bytes
    title: str
    model: Mapping[str, Any]
    steps: tuple[Step, ...]
    digest: str

    def file(self, name: str) -> str:
        """A file or folder beside the recipe; what is not there stands for itself (a bundled name, a hub id)."""
        beside = self.path.parent / name
        return str(beside) if beside.exists() else name


def folder() -> Path:
    """Where the bundled recipes are."""
    from reprobe.prompts.catalog import folder as data

    return data() / "recipes"


def find(source: str) -> Path:
    """A bundled recipe's file, or the path itself; raises `UnknownData` with what exists if it is neither."""
    path = Path(source)
    if path.is_file():
        return path
    own = {p.stem: p for p in sorted(folder().glob("*.toml"))}
    if source not in own:
        raise UnknownData(
            f"there is no recipe {source!r}{_did_you_mean(source, own)}: give a .toml file, or {_or(own)}"
        )
    return own[source]


def read(path: Path) -> Recipe:
    """Read and check a recipe. Raises `UsageError` that names the key, says what it may hold, and what exists."""
    try:
        source = path.read_bytes()
        told = tomllib.loads(source.decode())
    except OSError as e:
        raise UsageError(f"{path} cannot be read: {e.strerror}") from e
    except (ValueError, RecursionError) as e:  # not UTF-8, not TOML, or too deep for any recipe
        raise UsageError(f"{path} is no TOML: {e}") from e
    value = digest(_plain(told, path))
    title = told.pop("title", path.stem)
    _require(path, "title", title, _TEXT)
    model = told.pop("model", None)
    if model is None:
        raise UsageError(f'{path} has no [model]: write\n[model]\nname = "smollm2-135m"')
    _check(path, "model", model, MODEL)
    if unknown := [kind for kind in told if kind not in KINDS]:
        raise UsageError(
            f"{path}: there are no steps {unknown[0]!r}{_did_you_mean(unknown[0], KINDS)}; there are {_or(KINDS)}"
        )
    steps = []
    for kind, keys in KINDS.items():
        named = told.get(kind, {})
        if not isinstance(named, dict) or not all(isinstance(step, dict) for step in named.values()):
            raise UsageError(f"{path}: every [{kind}] needs a name: [{kind}.NAME]")
        for name, given in named.items():
            _check(path, f"{kind}.{name}", given, keys)
            _resolve(path, f"{kind}.{name}", given, keys, told)
            steps.append(Step(kind, name, given))
    if not steps:
        raise UsageError(f"{path} has no steps; there are {_or(KINDS)}, e.g. [extract.NAME]")
    return Recipe(path, source, title, model, tuple(steps), value)


def _plain(value: Any, path: Path) -> Any:
    """A TOML value as JSON has it. Dates and numbers that are not finite mean nothing here."""
    if isinstance(value, dict):
        return {key: _plain(one, path) for key, one in value.items()}
    if isinstance(value, list):
        return [_plain(one, path) for one in value]
    if type(value) in (str, int, bool) or (type(value) is float and math.isfinite(value)):
        return value
    raise UsageError(f"{path}: {value!r} is no value for any key of a recipe")


def _check(path: Path, where: str, given: Any, keys: Mapping[str, Key]) -> None:
    if not isinstance(given, dict):
        raise UsageError(f"{path}: {where} is {given!r}, where [{where}] with keys is wanted")
    for name, value in given.items():
        if name not in keys:
            raise UsageError(
                f"{path}: [{where}] has no key {name!r}{_did_you_mean(name, keys)}; there are {_or(sorted(keys))}"
            )
        _require(path, f"[{where}] {name}", value, keys[name])
    if absent := [name for name, key in keys.items() if key.required and name not in given]:
        raise UsageError(f"{path}: [{where}] lacks {absent[0]!r}: {keys[absent[0]].wanted}")


def _require(path: Path, what: str, value: Any, key: Key) -> None:
    if not key.holds(value):
        raise UsageError(f"{path}: {what} = {value!r}, where {key.wanted} is wanted")


def _resolve(
    path: Path, where: str, given: Mapping[str, Any], keys: Mapping[str, Key], told: Mapping[str, Any]
) -> None:
    """Names of steps must be those of steps."""
    for name, value in given.items():
        if (kind := keys[name].names) is not None and value not in (there := told.get(kind, {})):
            raise UsageError(
                f"{path}: [{where}] {name} = {value!r}, and there is no [{kind}.{value}]"
                + (f"{_did_you_mean(value, there)}; there are {_or(there)}" if there else f" and no {kind} at all")
            )


def _or(names: Iterable[str]) -> str:
    return ", ".join(names)


def _did_you_mean(name: str, there: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(there), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
