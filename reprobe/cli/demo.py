"""`reprobe demo`: the whole way of the data on a real model, in one command.

Enters: a folder and a model's name. Leaves: stores, probes, a scan, a dose-response table and `report.html` in that
folder, and a short summary. Everything here is done with public functions; it is meant to be read and copied.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import polars as pl

import reprobe as rp
from reprobe.errors import ArtifactExists
from reprobe.methods import repe
from reprobe.probing import readers
from reprobe.progress import Progress, silent
from reprobe.provenance import versions
from reprobe.report import results

#: Truth is read at the end of a statement, mood at the end of a scene.
DATA_SETS = ("cities", "emotions")
SITES = "resid.post@*,attn.heads@*"
#: A text with two true statements and two false ones, to be read token by token.
SCAN_TEXT = (
    "Lyon is a city in France. Kyoto is a city in Brazil. Chicago is a city in the United States. "
    "Cairo is a city in Norway."
)
#: The readers that are tried, by the names under which their grids are saved.
READERS = ("logistic", "mean-difference", "pca")
#: The reader whose directions read that text.
SCAN_READER = "mean-difference"
#: A neutral opening that a mood can colour.
STORY = "Anna came home from work, put her bag on the table and opened the letter. It said that"
STRENGTHS = (-6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0)
MOOD = rp.Contrast(
    prompts=(
        "Anna opened the letter and read it twice. She felt",
        "The bus stopped at the corner and he got off. He was",
        "It was a Tuesday morning and I walked to the office. I felt",
        "They sat in the kitchen and talked about the year. They were",
        "When the phone rang, Maria picked it up. She sounded",
        "Tom looked out of the window for a while. He seemed",
    ),
    positive=(" happy", " glad", " delighted", " cheerful", " excited", " proud"),
    negative=(" sad", " unhappy", " miserable", " lonely", " heartbroken", " upset"),
)
#: Plain text about nothing in particular: what steering should leave alone.
NEUTRAL = (
    "The library opens at nine in the morning and closes at six. Books can be borrowed for three weeks.",
    "To make tea, boil the water, pour it over the leaves and wait for four minutes before you drink it.",
    "The river rises in the hills, flows past two small towns and reaches the sea after ninety kilometres.",
)


def run_demo(
    out: Path,
    *,
    model: str = "smollm2-135m",
    overwrite: bool = False,
    progress: Progress = silent,
    say: Callable[[str], None] = lambda message: None,
) -> tuple[list[str], Path]:
    """Extract, probe, scan, steer, report; returns what was found, in sentences, and the report.

    Raises `ArtifactExists` if `out` holds anything and `overwrite` is not set.
    """
    if out.exists() and any(out.iterdir()) and not overwrite:
        raise ArtifactExists(f"{out} is not empty; choose another folder with --out, or pass --overwrite")
    steps: list[results.Step] = []

    @contextmanager
    def step(name: str, detail: str = "") -> Iterator[None]:
        say(f"{name} …")
        start = time.perf_counter()
        yield
        steps.append(results.Step(name, time.perf_counter() - start, detail))

    with step("load", model):
        lm = rp.LanguageModel.load(model, progress=progress)
        lm.check()
    grids: dict[tuple[str, str], rp.ProbeGrid] = {}
    for name in DATA_SETS:
        with step(f"extract {name}", f"{SITES} at the last token"):
            store = rp.extract(
                lm, name, sites=SITES, to=results.store_path(out, name), overwrite=overwrite, progress=progress
            )
        for reader in READERS:
            with step(f"probe {name}", reader):
                # Of two labels the greater is positive: 1 in cities; happiness has to be named.
                positive = "happiness" if name == "emotions" else None
                grid = rp.probe(store, readers.READERS[reader](), positive=positive, progress=progress)
                grid.save(results.probe_path(out, f"{name}-{reader}"), overwrite=overwrite)
                grids[name, reader] = grid

    truth = {site: d for site, d in grids["cities", SCAN_READER].directions.items() if site.part == "resid.post"}
    with step("scan", "every token at every block"):
        found = repe.scan(lm, SCAN_TEXT, truth)
        results.write_scan(out, "truth", results.ScanResult(found, SCAN_TEXT, f"cities-{SCAN_READER}", lm.identity))

    mood = grids["emotions", "mean-difference"].best(part="resid.post")
    mood.save(out / "happiness.safetensors", overwrite=overwrite)
    with step("steer", f"{len(STRENGTHS)} strengths at {mood.site}"):
        table = rp.dose_response(
            lm,
            lambda strength: [rp.Add(mood, strength)],
            STRENGTHS,
            scorer=MOOD,
            neutral=NEUTRAL,
            story=STORY,
            progress=progress,
        )
        done = results.SteeringResult(
            table=table,
            contrast=MOOD,
            neutral=NEUTRAL,
            story=STORY,
            site=rp.Site.parse(str(mood.site)),
            direction=mood.digest,
            intervention=f"strength × scale of happiness added at {mood.site}, on all tokens",
            identity=lm.identity,
        )
        results.write_steering(out, "happiness", done)
    summary = _summary(lm, grids, table, mood)
    run = results.Run(
        title=f"Truth and mood in {lm.name}",
        steps=tuple(steps),
        identity=lm.identity,
        versions=versions(),
        commands=_commands(model),
        summary=tuple(summary),
    )
    results.write_run(out, run)
    page = rp.write_report(out)
    seconds = sum(s.seconds for s in steps)
    return [*summary, f"It took {seconds:.0f} s."], page


def _summary(
    lm: rp.LanguageModel, grids: Mapping[tuple[str, str], rp.ProbeGrid], table: pl.DataFrame, mood: rp.Direction
) -> list[str]:
    lines = []
    for name, what in (("cities", "True and false statements about cities"), ("emotions", "Happy and sad scenes")):
        grid = grids[name, "logistic"]
        best, honest = grid.best(part="resid.post"), grid.selected
        lines.append(
            f"{what}: best block by a logistic reader {best.site}, held-out accuracy {best.metrics['accuracy']:.3f} "
            f"[{best.metrics['accuracy_low']:.3f}, {best.metrics['accuracy_high']:.3f}]; with the site chosen on "
            f"other folds, among all blocks and heads, {honest.accuracy:.3f} [{honest.accuracy_low:.3f}, "
            f"{honest.accuracy_high:.3f}] (chance {honest.chance:.2f}, {honest.n} prompts, {honest.n_groups} groups)."
        )
    rows = table.sort("strength").to_dicts()
    low, high = rows[0], rows[-1]
    odds = [row["log_odds"] for row in rows]
    rises = all(a < b for a, b in pairwise(odds))
    lines.append(
        f"Steering {lm.name} along happiness at {mood.site} from {low['strength']:+g} to {high['strength']:+g} "
        f"moves the log-odds of happy against sad words from {low['log_odds']:+.2f} to {high['log_odds']:+.2f} nats, "
        f"{'rising at each of' if rises else 'but not rising at every one of'} {len(rows)} strengths; the price on "
        f"neutral text is a KL of {low['kl']:.3f} and {high['kl']:.3f} nats per token."
    )
    return lines


def _commands(model: str) -> tuple[str, ...]:
    """What to type to do the same by hand."""
    lines = []
    for name in DATA_SETS:
        lines.append(f"reprobe extract {model} {name} --sites '{SITES}' --at last --to {name}.reprobe")
        positive = " --positive happiness" if name == "emotions" else ""
        lines += [
            f"reprobe probe {name}.reprobe --reader {reader}{positive} --to probes/{name}-{reader}.safetensors"
            for reader in READERS
        ]
    lines.append(f"reprobe scan {model} '{SCAN_TEXT}' --grid probes/cities-{SCAN_READER}.safetensors")
    lines += [
        "reprobe probe emotions.reprobe --reader mean-difference --positive happiness --sites 'resid.post@*' "
        "--to-direction happiness.safetensors",
        f"reprobe steer {model} '{STORY}' --direction happiness.safetensors --strength 4",
    ]
    return tuple(lines)
