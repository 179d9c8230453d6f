"""`reprobe demo`: the whole way of the data on a real model, in one command.

Enters: a folder and a model's name. Leaves: stores, probes, a scan, a dose-response table and `report.html` in that
folder, and a short summary. Everything here is done with public functions; it is meant to be read and copied.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import reprobe as rp
from reprobe.errors import ArtifactExists
from reprobe.methods import repe
from reprobe.progress import Progress, silent
from reprobe.report import results

#: Truth is read at the end of a statement, mood at the end of a scene.
DATA_SETS = ("cities", "emotions")
SITES = "resid.post@*,attn.heads@*"
#: A text with two true statements and two false ones, to be read token by token.
SCAN_TEXT = "Lyon is a city in France. Kyoto is a city in Brazil. Chicago is a city in the United States. Cairo is a city in Norway."
#: Neutral openings that a mood can colour.
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
) -> str:
    """Extract, probe, scan, steer, report; returns the summary. Raises `ArtifactExists` if `out` holds anything."""
    if out.exists() and any(out.iterdir()) and not overwrite:
        raise ArtifactExists(f"{out} is not empty; choose another folder with --out, or pass --overwrite")
    clock = Clock(say)
    with clock.step(f"load {model}"):
        lm = rp.LanguageModel.load(model, progress=progress)
        lm.check()
    folder = results.Folder.create(out, title=f"Truth and mood in {lm.name}")

    stores = {}
    for name in DATA_SETS:
        with clock.step(f"extract {name}"):
            stores[name] = rp.extract(
                lm, rp.PromptSet.load(name), sites=SITES, to=out / f"{name}.reprobe", overwrite=overwrite,
                progress=progress,
            )
    readers = {"logistic": rp.LogisticReader(), "mean-difference": rp.MeanDifference(), "pca": rp.PCAReader()}
    grids = {}
    for name, store in stores.items():
        with clock.step(f"probe {name}"):
            for reader, estimator in readers.items():
                grids[name, reader] = grid = rp.probe(store, estimator, progress=progress)
                grid.save(folder.probe(f"{name}-{reader}"), overwrite=overwrite)

    truth = grids["cities", "mean-difference"]
    blocks = {site: d for site, d in truth.directions.items() if site.part == "resid.post"}
    with clock.step("scan"):
        folder.write_scan("truth", repe.scan(lm, SCAN_TEXT, blocks), text=SCAN_TEXT, grid="cities-mean-difference")

    mood = grids["emotions", "mean-difference"].best(part="resid.post")
    if mood.classes is not None and mood.classes[1] != "happiness":
        mood = -mood
    mood.save(out / "happiness.safetensors", overwrite=overwrite)
    with clock.step("steer"):
        table = rp.dose_response(
            lm, lambda strength: [rp.Add(mood, strength)], STRENGTHS, contrast=MOOD, neutral=NEUTRAL, story=STORY,
            progress=progress,
        )
        folder.write_steering("happiness", table, direction=mood, contrast=MOOD, neutral=NEUTRAL, story=STORY)
    summary = _summary(lm.name, grids, table)
    folder.finish(identity=lm.identity, steps=clock.steps, summary=summary)
    with clock.step("report"):
        page = rp.write_report(out)
    return "\n".join([*summary, f"Report: {page}"])
