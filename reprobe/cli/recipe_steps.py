"""A recipe run: its steps done one after the other, into a folder of results that knows what it came from.

Enters: a `Recipe`, a folder. Leaves: in the folder the recipe itself, what the steps made, where the report looks for
it, and `recipe.json`:

    recipe       digest of what the recipe says
    model, data  which model and data were used, by identity and digest
    digest       of these three: the same digest, the same results (with the same versions on the same kind of machine)
    finished     per step the files that it left, with their digests, and the seconds that it took; written after each

With `resume`, steps that are finished are verified, byte for byte, and not done again. Every step is one or two calls
of the library with the recipe's own keys.
"""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import reprobe as rp
from reprobe.cli.inputs import directions_of
from reprobe.cli.recipe import Recipe, Step
from reprobe.cli.steering import done_by, per_question
from reprobe.errors import ArtifactExists, CorruptArtifact, IdentityMismatch, UsageError
from reprobe.evaluation import NEUTRAL, PRIMER, compare_choices, first_questions
from reprobe.model.sites import LAYER_PARTS, MODEL_PARTS
from reprobe.probing import readers, write_table
from reprobe.progress import Progress, silent
from reprobe.provenance import canonical_json, digest, digest_file, rebuilding, texts, versions, write_durably
from reprobe.report import results
from reprobe.report.study import chosen

RECORD, COPY = "recipe.json", "recipe.toml"
#: Tokens of a pack: left to measurement, it could differ from run to run, and with it the last bits of a row.
BATCH_TOKENS = 512
#: Keys that say what acts, and on what.
_ACT = ("probe", "part", "tokens")


@dataclass(frozen=True)
class Done:
    """What a run came to: its digest, that of its results, what was found in sentences, and the report."""

    folder: Path
    digest: str
    results: str
    summary: tuple[str, ...]
    report: Path


@dataclass(frozen=True)
class _Kitchen:
    """What the steps share: the recipe, the model, and the folder of results."""

    recipe: Recipe
    lm: rp.LanguageModel
    out: Path
    progress: Progress

    def direction(self, given: Mapping[str, Any]) -> rp.Direction:
        grid = rp.ProbeGrid.load(results.probe_path(self.out, given["probe"]))
        return grid.best(part=given.get("part"))

    def steering(self, given: Mapping[str, Any], strength: float) -> rp.Steering:
        direction = self.direction(given)
        return rp.Steering(rp.Add(direction, strength, **_some(given, "tokens")), name=given["probe"])

    def about(self, steering: rp.Steering) -> dict[str, Any]:
        """What a table of what a steering does says besides: in which model, by what."""
        return {"model": self.lm.identity.to_json(), "interventions": done_by(steering)}

    def prompts(self, given: Mapping[str, Any]) -> rp.PromptSet:
        return rp.PromptSet.load(self.recipe.file(given["data"]), **_some(given, "limit"))

    def file(self, kind: str, name: str) -> Path:
        path = self.out / kind / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


def _some(given: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """Those of the keys that were given: the others have the library's defaults."""
    return {name: given[name] for name in names if name in given}


def _all_but(given: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in given.items() if name not in names}


def run(
    recipe: Recipe,
    out: Path,
    *,
    device: str | None = None,
    resume: bool = False,
    progress: Progress = silent,
    say: Callable[[str], None] = lambda message: None,
) -> Done:
    """Do the steps of a recipe in `out`.

    Raises `ArtifactExists` if the folder holds anything and `resume` is not set, `IdentityMismatch` if what it holds
    was made by another recipe, from another model or other data, `CorruptArtifact` if a finished step's files are not
    as they were written; and what the steps raise. Whatever ends a run, finished steps stay.
    """
    before = _begun(out, resume)
    if before is not None and before["recipe"] != recipe.digest:
        raise IdentityMismatch(f"{out} was made by another recipe, which lies there as {COPY}: choose another folder")
    paths = [_paths(out, step) for step in recipe.steps]  # raises for a name that no file can have
    if len({path for some in paths for path in some}) < sum(map(len, paths)):
        raise UsageError(f"{recipe.path}: two steps would write the same file")
    data = {source: _data_digest(recipe, source) for source in _sources(recipe)}
    lm = rp.LanguageModel.load(
        recipe.file(recipe.model["name"]), device=device, progress=progress, **_all_but(recipe.model, "name")
    )
    about: dict[str, Any] = {"recipe": recipe.digest, "model": lm.identity.to_json(), "data": data}
    record: dict[str, Any] = about | {"digest": digest(about), "versions": versions(), "finished": {}}
    record["kind"] = results.RECORD_KIND
    if before is not None:
        _require_same(before, record, out)
        for name, version in before["versions"].items():
            if record["versions"].get(name) != version:
                say(f"note: begun with {name} {version}, this is {record['versions'].get(name)}")
        record |= {"versions": before["versions"], "finished": before["finished"]}
    _foresee(recipe, lm)
    out.mkdir(parents=True, exist_ok=True)
    write_durably(out / RECORD, canonical_json(record).encode())
    write_durably(out / COPY, recipe.source)
    kitchen = _Kitchen(recipe, lm, out, progress)
    for step, own in zip(recipe.steps, paths, strict=True):
        if (finished := record["finished"].get(str(step))) is not None:
            _verify(out, step, finished["files"])
            say(f"{step}: finished before, and as it was written")
            continue
        say(f"{step} …")
        start = time.perf_counter()
        STEPS[step.kind](kitchen, step)
        files = {str(path.relative_to(out)): _digest_of(path) for path in own}
        record["finished"][str(step)] = {"files": files, "seconds": time.perf_counter() - start}
        write_durably(out / RECORD, canonical_json(record).encode())
    return _report(kitchen, record, say)


def _begun(out: Path, resume: bool) -> dict[str, Any] | None:
    """The record of a run in this folder, None where there is none."""
    if not out.exists() or not any(out.iterdir()):
        return None
    if not resume:
        raise ArtifactExists(
            f"{out} is not empty; go on with what was begun there by --resume, or choose another folder"
        )
    path = out / RECORD
    if not path.is_file():
        raise ArtifactExists(
            f"{out} holds no run of a recipe ({RECORD}), so nothing can be gone on with; choose another"
        )
    return read_record(path)


def read_record(path: Path) -> dict[str, Any]:
    """The record of a run. Raises `CorruptArtifact` if it is none."""
    with rebuilding(f"{path} is damaged"):
        record: dict[str, Any] = json.loads(path.read_bytes())
        for name, of in (("recipe", str), ("model", dict), ("data", dict), ("versions", dict), ("finished", dict)):
            if not isinstance(record[name], of):
                raise TypeError(f"{name} is {record[name]!r:.60}")
        for name, step in record["finished"].items():
            texts([*step["files"], *step["files"].values()])
            results.Step(name, float(step["seconds"]))
        texts(list(record["versions"].values()))
    return record


def _require_same(before: Mapping[str, Any], now: Mapping[str, Any], out: Path) -> None:
    differing = [
        f"{what} {name}: {before[what].get(name)} there, {now[what].get(name)} now"
        for what in ("model", "data")
        for name in sorted({*before[what], *now[what]})
        if before[what].get(name) != now[what].get(name)
    ]
    if differing:
        raise IdentityMismatch(
            f"{out} was made from something else; choose another folder:\n  " + "\n  ".join(differing)
        )


def _foresee(recipe: Recipe, lm: rp.LanguageModel) -> None:
    """Find out now what the library would say of a value when its step is reached."""
    for step in recipe.steps:
        given = step.given
        try:
            if "sites" in given:
                lm.sites(given["sites"])
            if "at" in given:
                rp.Position.parse(given["at"])
            if "tokens" in given and step.kind in ("steer", "side-effects", "multiple-choice"):
                rp.Scope.parse(given["tokens"])
            if "part" in given and given["part"] not in (*LAYER_PARTS, *MODEL_PARTS):
                raise UsageError(f"unknown part {given['part']!r}; parts: {', '.join((*MODEL_PARTS, *LAYER_PARTS))}")
            for text in given.get("neutral", ()):
                rp.Passage.of(text)
        except UsageError as e:
            raise UsageError(f"{recipe.path}: [{step}]: {e}") from e


def _sources(recipe: Recipe) -> list[str]:
    """The data that the steps read, each once."""
    keys = (
        ("data", ["extract", "multiple-choice", "trace", "dissect"]),
        ("unrelated", ["side-effects"]),
        ("text", ["edit"]),
    )
    named = [
        step.given[key] for key, kinds in keys for step in recipe.steps if step.kind in kinds and key in step.given
    ]
    return sorted({source for source in named if source not in ("sample", "none")})


def _data_digest(recipe: Recipe, source: str) -> str:
    path = Path(recipe.file(source))
    return digest_file(path) if path.suffix == ".txt" and path.is_file() else rp.PromptSet.load(str(path)).digest


def _digest_of(path: Path) -> str:
    """Of a file; of a store that of its commit records, which hold the digests of its rows, and of all else in it."""
    if path.is_file():
        return digest_file(path)
    if rp.ActivationStore.open(path).verify().ok:
        small = [p for p in sorted(path.rglob("*")) if p.is_file() and (p.suffix in (".json", ".parquet"))]
        return digest({str(p.relative_to(path)): digest_file(p) for p in small})
    raise CorruptArtifact(f"{path} is not as it was written: see `reprobe verify {path}`")


def _verify(out: Path, step: Step, files: Mapping[str, str]) -> None:
    for name, written in files.items():
        path = out / name
        if not path.exists() or _digest_of(path) != written:
            raise CorruptArtifact(
                f"{path}, of the finished step {step}, is not as it was written: take {step} out of "
                f"{out / RECORD} to do it again, or run the recipe in another folder"
            )


def _report(kitchen: _Kitchen, record: Mapping[str, Any], say: Callable[[str], None]) -> Done:
    recipe, out, finished = kitchen.recipe, kitchen.out, record["finished"]
    found = digest({name: step["files"] for name, step in finished.items()})
    summary = tuple(_findings(kitchen))
    results.write_run(
        out,
        results.Run(
            title=recipe.title,
            steps=tuple(results.Step(name, step["seconds"]) for name, step in finished.items()),
            identity=kitchen.lm.identity,
            versions=record["versions"],
            commands=(f"reprobe run {COPY}",),
            summary=(
                *summary,
                f"Recipe, model and data have the digest {record['digest'][:12]}, the results {found[:12]}.",
            ),
        ),
    )
    return Done(out, record["digest"], found, summary, rp.write_report(out, say=say))


def _findings(kitchen: _Kitchen) -> list[str]:
    """What the grids and the steering say, in sentences."""
    said = []
    for step in kitchen.recipe.steps:
        if step.kind == "probe":
            grid = rp.ProbeGrid.load(results.probe_path(kitchen.out, step.name))
            best, line = grid.best(part=step.given.get("part")), grid.table.row(0, named=True)
            # Two folds leave no rows to choose a site with.
            honest = f"; with the site chosen on other folds {chosen(grid)}" if len(grid.inner) else ""
            said.append(
                f"{step.name}: best site {best.site}, held-out accuracy {best.metrics['accuracy']:.3f}{honest} "
                f"(chance {line['chance']:.2f}, {line['n']} rows, {line['n_groups']} groups)."
            )
        if step.kind == "steer":
            table = results.read_steering(kitchen.out / "steering" / f"{step.name}.json").table.sort("strength")
            low, high = table.row(0, named=True), table.row(-1, named=True)
            said.append(
                f"{step.name}: from strength {low['strength']:+g} to {high['strength']:+g} the log-odds go from "
                f"{low['log_odds']:+.2f} to {high['log_odds']:+.2f} nats, at a KL of {low['kl']:.3f} and "
                f"{high['kl']:.3f} nats per token."
            )
    return said


# -- the steps ------------------------------------------------------------------------------------------------------


def _paths(out: Path, step: Step) -> list[Path]:
    """The files, or the store, that a step leaves."""
    name = results.probe_path(out, step.name).stem  # raises for a name that no file can have
    match step.kind:
        case "extract":
            return [results.store_path(out, name)]
        case "probe":
            return [results.probe_path(out, name), out / "directions" / f"{name}.safetensors"]
        case "compare":
            return [results.comparison_path(out, name)]
        case "scan":
            return [out / "scans" / f"{name}.json"]
        case "steer":
            return [out / "steering" / f"{name}.json", out / "steering" / f"{name}.parquet"]
        case "trace" | "edit":
            return [out / f"{step.kind}s" / f"{name}.safetensors"]
        case "dissect":
            return [out / "dissections" / f"{name}.safetensors", out / "dissections" / f"{name}.html"]
        case _:
            return [out / step.kind / f"{name}.json"]


def _extract(kitchen: _Kitchen, step: Step) -> None:
    to = results.store_path(kitchen.out, step.name)
    how = {"batch_tokens": BATCH_TOKENS} | _all_but(step.given, "data", "limit")
    rp.extract(
        kitchen.lm,
        kitchen.prompts(step.given),
        to=to,
        share=rp.Share(0, 1),
        resume=to.exists(),
        progress=kitchen.progress,
        **how,
    )


def _probe(kitchen: _Kitchen, step: Step) -> None:
    store = rp.ActivationStore.open(results.store_path(kitchen.out, step.given["store"]))
    reader = readers.READERS[step.given.get("reader", "logistic")]()
    how = _all_but(step.given, "store", "reader", "part")
    grid = rp.probe(store, reader, progress=kitchen.progress, **how)
    direction = grid.best(part=step.given.get("part"))
    direction.save(kitchen.file("directions", f"{step.name}.safetensors"), overwrite=True)
    grid.save(results.probe_path(kitchen.out, step.name), overwrite=True)


def _compare(kitchen: _Kitchen, step: Step) -> None:
    store = rp.ActivationStore.open(results.store_path(kitchen.out, step.given["store"]))
    named = {name: readers.READERS[name]() for name in step.given["readers"]}
    found = rp.compare(store, named, progress=kitchen.progress, **_all_but(step.given, "store", "readers"))
    found.save(results.comparison_path(kitchen.out, step.name), overwrite=True)


def _scan(kitchen: _Kitchen, step: Step) -> None:
    from reprobe.methods import repe

    grid = rp.ProbeGrid.load(results.probe_path(kitchen.out, step.given["probe"]))
    of = f"[{step}]: the grid {step.given['probe']!r}"
    directions = directions_of(grid, step.given.get("part", "resid.post"), of)
    found = repe.scan(kitchen.lm, step.given["text"], directions)
    result = results.ScanResult(found, step.given["text"], step.given["probe"], kitchen.lm.identity)
    results.write_scan(kitchen.out, step.name, result)


def _steer(kitchen: _Kitchen, step: Step) -> None:
    given = step.given
    contrast = rp.Contrast(*(tuple(given[side]) for side in ("prompts", "positive", "negative")))
    # Passages, so that also a steering of generated tokens has some to act on.
    neutral = tuple(map(rp.Passage.of, given["neutral"])) if "neutral" in given else NEUTRAL
    story = given.get("story", given["prompts"][0])
    table = rp.dose_response(
        kitchen.lm,
        lambda strength: kitchen.steering(given, strength),
        [float(strength) for strength in given["strengths"]],
        scorer=contrast,
        neutral=neutral,
        story=story,
        progress=kitchen.progress,
        **_some(given, "max_new_tokens"),
    )
    direction = kitchen.direction(given)
    done = results.SteeringResult(
        table=table,
        contrast=contrast,
        neutral=tuple(text.prompt + text.continuation for text in neutral),
        story=story,
        site=rp.Site.parse(str(direction.site)),
        direction=direction.digest,
        intervention=f"strength × scale of {given['probe']} added at {direction.site}, on the tokens "
        f"{given.get('tokens', 'all')}",
        identity=kitchen.lm.identity,
    )
    results.write_steering(kitchen.out, step.name, done)


def _side_effects(kitchen: _Kitchen, step: Step) -> None:
    how = _all_but(step.given, *_ACT, "strength")
    if "unrelated" in how:
        how["unrelated"] = None if how["unrelated"] == "none" else kitchen.recipe.file(how["unrelated"])
    steering = kitchen.steering(step.given, step.given["strength"])
    found = rp.side_effects(kitchen.lm, steering, progress=kitchen.progress, **how)
    about = kitchen.about(steering) | {"generations": found.generations.to_dicts()}
    write_table(found.table, kitchen.file(step.kind, f"{step.name}.json"), overwrite=True, about=about)


def _multiple_choice(kitchen: _Kitchen, step: Step) -> None:
    given, data = step.given, rp.PromptSet.load(kitchen.recipe.file(step.given["data"]))
    if "limit" in given:
        data = first_questions(data, given["limit"])
    steering = kitchen.steering({"tokens": "generated", **given}, given["strength"])  # as the verb does
    plain = rp.multiple_choice(kitchen.lm, data, progress=kitchen.progress)
    with rp.steer(kitchen.lm, steering):
        steered = rp.multiple_choice(kitchen.lm, data, progress=kitchen.progress)
    about = kitchen.about(steering) | {
        "data": data.digest,
        "primer": PRIMER,
        "metrics": compare_choices(plain, steered, **_some(given, "seed")).to_dicts(),
    }
    to = kitchen.file(step.kind, f"{step.name}.json")
    write_table(per_question(plain, steered), to, overwrite=True, about=about)


def _trace(kitchen: _Kitchen, step: Step) -> None:
    from reprobe.methods import tracing
    from reprobe.prompts import facts_of

    given, unknown = step.given, step.given.get("unknown", "refuse")
    asked = _all_but(given, "data", "limit", "unknown")
    how: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in asked.items()}
    limit = given.get("limit")
    facts = facts_of(kitchen.recipe.file(given["data"]), limit=None if unknown == "drop" else limit)
    if unknown == "drop":
        facts = tracing.known(kitchen.lm, facts, limit=limit)
    found = tracing.trace(
        kitchen.lm,
        facts,
        settings=tracing.Settings(**how),
        unknown="keep" if unknown == "keep" else "refuse",
        progress=kitchen.progress,
    )
    found.save(kitchen.file("traces", f"{step.name}.safetensors"), overwrite=True)


def _edit(kitchen: _Kitchen, step: Step) -> None:
    from reprobe.methods import rome
    from reprobe.methods.moments import TOKENS, Corpus, Sample

    given, tokens = step.given, step.given.get("text_tokens", TOKENS)
    text = Sample(tokens) if "text" not in given else Corpus.load(kitchen.recipe.file(given["text"]), tokens=tokens)
    edit = rome.edit(kitchen.lm, moment=text, progress=kitchen.progress, **_all_but(given, "text", "text_tokens"))
    edit.save(kitchen.file("edits", f"{step.name}.safetensors"), overwrite=True)


def _dissect(kitchen: _Kitchen, step: Step) -> None:
    from reprobe.methods.moments import TOKENS, Sample

    given = step.given
    how = _all_but(given, "data", "drop_absent") | {"absent": "drop" if given.get("drop_absent") else "raise"}
    sample = Sample(given.get("tokens", TOKENS), given.get("seed", 0))
    stream = sample if given["data"] == "sample" else kitchen.recipe.file(given["data"])
    found = rp.dissect(kitchen.lm, stream, progress=kitchen.progress, **how)
    found.save(kitchen.file("dissections", f"{step.name}.safetensors"), overwrite=True)
    rp.write_dissection(found, kitchen.file("dissections", f"{step.name}.html"))


#: How each kind of step is done.
STEPS: Mapping[str, Callable[[_Kitchen, Step], None]] = {
    "extract": _extract,
    "probe": _probe,
    "compare": _compare,
    "scan": _scan,
    "steer": _steer,
    "side-effects": _side_effects,
    "multiple-choice": _multiple_choice,
    "trace": _trace,
    "edit": _edit,
    "dissect": _dissect,
}
