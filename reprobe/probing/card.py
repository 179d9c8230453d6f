"""The model card of a direction or a grid: what a folder's README.md says of the file beside it.

Enters: a `Direction` or a `ProbeGrid`, and the address from which it will be pulled. Leaves: Markdown with the front
matter that the Hugging Face hub reads. Whatever comes from data (labels, names, notes, parameters) is escaped, so that
none of it can be markup. Does not know folders or the hub.
"""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

import polars as pl

from reprobe.model.identity import ModelIdentity
from reprobe.probing.direction import Direction
from reprobe.probing.probe_grid import ProbeGrid

#: Lines of a grid's table that are shown.
TOP = 20
TAGS = ("reprobe", "interpretability", "linear-probe", "steering")

_PUNCTUATION = re.compile(r"([!-/:-@\[-`{-~])")
#: `owner/name` as the hub has them; a folder's or a bundled model's own name is none.
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
#: Metrics that are shown with an interval, by their names for people.
_INTERVALS = {"accuracy": "accuracy", "auroc": "AUROC"}


def model_card(artifact: Direction | ProbeGrid, address: str) -> str:
    """The text of README.md; `address` is what a reader of it gives to `pull`."""
    identity = artifact.identity if isinstance(artifact, Direction) else _identity(artifact.provenance)
    body = _of_direction(artifact) if isinstance(artifact, Direction) else _of_grid(artifact)
    parts = [
        _front_matter(identity),
        *body,
        *_of_model(identity),
        *_training(artifact),
        *_use(artifact, identity, address),
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(identity: ModelIdentity | None) -> str:
    from huggingface_hub import ModelCardData

    base = identity.name if identity is not None and HUB_ID.fullmatch(identity.name) else None
    return f"---\n{ModelCardData(base_model=base, library_name='reprobe', tags=list(TAGS)).to_yaml()}\n---"


def _of_direction(d: Direction) -> list[str]:
    where = "no site" if d.site is None else f"`{d.site}`"
    facts = {
        "site": where,
        "width": f"{d.width:,}",
        "classes": "not known"
        if d.classes is None
        else f"{_text(d.classes[0])} (below 0), {_text(d.classes[1])} (above)",
        "sign": _text(d.sign),
        "scale": f"{d.scale:.6g}, the standard deviation of h·v̂ over the training rows (of a sum: the step's length)",
        "offset": f"{d.offset:.6g}",
        "digest": f"`{d.digest}`",
    }
    return [
        f"# A direction at {where}",
        "A unit vector v̂ in a language model's activations. A row h is read as h·v̂ − offset, of which above 0 is the "
        "positive class; steering adds strength · scale · v̂.",
        _table(("", "value"), facts.items()),
        "## Held-out results",
        *_metrics(d.metrics),
    ]


def _metrics(metrics: Mapping[str, Any]) -> list[str]:
    if not metrics:
        return ["None are known."]
    lines: list[tuple[str, str]] = []
    left = dict(metrics)
    for name, shown in _INTERVALS.items():
        if name in left:
            value, low, high = (left.pop(k, None) for k in (name, f"{name}_low", f"{name}_high"))
            between = "" if low is None or high is None else f" [{_number(low)}, {_number(high)}]"
            lines.append(
                (f"{shown}, with its 95 % interval over groups" if between else shown, _number(value) + between)
            )
    if "chance" in left:
        lines.append(("chance: the share of the larger class", _number(left.pop("chance"))))
    lines += [(_text(k), _number(v)) for k, v in left.items()]
    how = ["By group-safe cross-validation at this site."] if "n_groups" in metrics else []
    flattered = "If the site was chosen for its result, the result flatters it."
    return [_table(("metric", "value"), lines), " ".join([*how, flattered])]


def _of_grid(grid: ProbeGrid) -> list[str]:
    best = grid.table.sort(["accuracy", "layer", "head"], descending=[True, False, False], nulls_last=True).head(TOP)
    lines = [
        (
            f"`{row['site']}`",
            *(f"{row[m]:.3f} [{row[f'{m}_low']:.3f}, {row[f'{m}_high']:.3f}]" for m in _INTERVALS),
            f"{row['chance']:.3f}",
        )
        for row in best.iter_rows(named=True)
    ]
    n, n_groups = (int(grid.table[c].max() or 0) for c in ("n", "n_groups"))  # type: ignore[arg-type]
    negative, positive = map(_text, grid.classes)
    parts = grid.table.group_by("part", maintain_order=True).agg(pl.len())
    listed = ", ".join(f"{count} of `{part}`" for part, count in parts.iter_rows())
    text = [
        f"# Directions at {len(grid.sites)} sites",
        f"One reader at every site ({listed}), each with a direction that tells {negative} (below 0) from {positive} "
        f"(above), fitted on {n:,} rows of {n_groups:,} groups.",
        "## Held-out results",
    ]
    if len(grid.inner):
        chosen = grid.selected
        text.append(
            f"With the choice of the site included (nested cross-validation): accuracy {chosen.accuracy:.3f} "
            f"[{chosen.accuracy_low:.3f}, {chosen.accuracy_high:.3f}], chance {chosen.chance:.3f}."
        )
    shown = f"The best {len(lines)} of {len(grid.sites)} sites" if len(lines) < len(grid.sites) else "All sites"
    text += [
        f"{shown}, by group-safe cross-validation, with 95 % intervals over groups. The greatest of them flatters its "
        "site.",
        _table(("site", "accuracy", "AUROC", "chance"), lines),
    ]
    return text


def _of_model(identity: ModelIdentity | None) -> list[str]:
    if identity is None:
        return ["## Model", "It is not recorded of which model this is."]
    facts = {name: "none" if value is None else _text(value) for name, value in identity.to_json().items()}
    return [
        "## Model",
        _table(("", "value"), facts.items()),
        "`weights`, `tokenizer` and `template` are digests. reprobe refuses to use this with a model in which any of "
        "these differs (but for name and revision).",
    ]


def _training(artifact: Direction | ProbeGrid) -> list[str]:
    of = artifact if isinstance(artifact, Direction) else next(iter(artifact.directions.values()))
    known = {"reader": of.reader, "parameters": dict(of.params)} | dict(artifact.provenance)
    known.pop("identity", None)  # has a section of its own
    plan = known.get("plan")
    at = plan.get("at") if isinstance(plan, dict) else None
    facts: dict[str, str] = {"token position": "not recorded" if at is None else _text(at)}
    if isinstance(terms := known.pop("terms", None), list):
        named = (f"{t.get('reader')} at {t.get('site')}" for t in terms if isinstance(t, dict))
        facts["terms"] = _text(", ".join(named))
    facts |= {_text(k): _text(v) for k, v in known.items() if v not in (None, "", {}, [])}
    return ["## How it was made", _table(("", "value"), facts.items())]


def _use(artifact: Direction | ProbeGrid, identity: ModelIdentity | None, address: str) -> list[str]:
    best = "" if isinstance(artifact, Direction) else ".best()"
    lines = [
        "import reprobe as rp",
        f"direction = rp.pull({address!r}){best}",
        f"lm = rp.LanguageModel.load({_load_arguments(identity)})",
        "with rp.steer(lm, rp.Add(direction, strength=4)), lm.monitor(direction) as monitor:",
        '    print(lm.generate("The city of Paris is in"))',
    ]
    return ["## Use", "```python\n" + "\n".join(lines) + "\n```", "Loading runs nothing: the file is safetensors."]


def _load_arguments(identity: ModelIdentity | None) -> str:
    if identity is None:
        return "..."
    pinned = identity.revision is not None and HUB_ID.fullmatch(identity.name)  # only the hub has revisions
    return repr(identity.name) + (f", revision={identity.revision!r}" if pinned else "")


def _identity(provenance: Mapping[str, Any]) -> ModelIdentity | None:
    value = provenance.get("identity")
    return None if value is None else ModelIdentity.from_json(value)


def _table(head: tuple[str, ...], lines: Iterable[tuple[str, ...]]) -> str:
    rows = [head, ("---",) * len(head), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _number(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else _text(value)


def _text(value: Any) -> str:
    """Any plain value as Markdown that shows it and means nothing: no markup, link, line break or hidden sign."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    shown = "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in text)
    return _PUNCTUATION.sub(r"\\\1", shown) or '\\"\\"'
