"""Which neurons detect which concept, and do they cause it? Both bundled models, all MLP neurons, all ready concepts.

    uv run python experiments/dissection.py [--models smollm2-135m gemma3-270m] [--sampled 60000] [--text FILE]

Enters: the texts of the project's own data sets, each once, and text that SmolLM2 writes after openings on many
subjects (the same for both models; --text keeps it in a file, or takes it from there). Leaves, per model:
detectors.csv (those above all that chance gave), concepts.csv, layers.csv, chance.csv, causes.csv, two figures,
README.md, into which notes.md goes, what a reader made of the figures, and with --reports the page to browse and the
dissection itself. The control is rotation of the concepts along the stream; of what detectors cause, random units of
the same blocks that are as active.
"""

import argparse
import random
import sys
import time
from dataclasses import replace
from pathlib import Path

import polars as pl
from matplotlib import style
from tables import markdown

import reprobe as rp
from reprobe.methods.dissected import Snippet
from reprobe.methods.stream import token_stream
from reprobe.probing import write_table
from reprobe.progress import terminal
from reprobe.prompts.catalog import bundled
from reprobe.report import causal_intervals, detector_bars

WRITER, NEW_TOKENS, AT_ONCE, SEED = "smollm2-135m", 120, 64, 0
#: Sets of random units beside the detectors.
CONTROLS = 6
#: How the sampled texts begin: many subjects and forms, so that many concepts occur.
OPENINGS = (
    *("The history of", "In 1969,", "On Monday morning,", "In March of that year,", "During the winter of 1812,"),
    *("My grandmother used to say", "\"I don't know,\" she said.", "He was not", "Why do", "How does a", "What is the"),
    *("The recipe calls for", "To bake bread, first", "For breakfast we", "The doctor told the patient", "The teacher"),
    *("The capital of France is", "In Japan, people", "The river flows", "Mount Everest", "The city of", "Germany and"),
    *("The red car", "A blue bird", "The dog and the cat", "Elephants are", "The lion", "Trees in the forest"),
    *("The football team", "She played the piano", "The orchestra", "The church", "God", "The soldiers fought"),
    *("The price rose to $", "It costs 20 euros", "About 75% of", "Two plus two equals", "Solve for x: 3x + 5 ="),
    *("def main():\n", "import numpy as np\n", "for i in range(10):\n", "```python\n", "SELECT name FROM", "<html>\n"),
    *("Visit https://www.", "Dear Mr. Smith,", "1. First,", "- Apples\n- ", "## Introduction\n\n", "(see also", "e.g."),
    *("La casa es", "El niño", "Le chat est", "Bonjour, je", "Der Mann ist", "The weather today is", "The sun"),
    *("NASA announced that", "The government passed a law", "The computer program", "I was very happy", "I felt sad"),
    *("Emma and James walked", "Three years ago,", "The kitchen was", "His shirt was", "Water is made of", "Steel is"),
    *("It is better to", "Always remember", "Compared with", "Although", "Because", "The best way", "Unfortunately,"),
)  # fmt: skip


def sampled(tokens: int, file: Path | None) -> list[str]:
    """Texts of about so many tokens, written by `WRITER`; from `file` if it is there."""
    mark = "\n\x1e\n"
    if file is not None and file.exists():
        return file.read_text().split(mark)
    lm, texts, done, batch = rp.LanguageModel.load(WRITER), [], 0, 0
    while done < tokens:
        chosen = [OPENINGS[(batch * AT_ONCE + i) % len(OPENINGS)] for i in range(AT_ONCE)]
        new = lm.generate(chosen, max_new_tokens=NEW_TOKENS, do_sample=True, top_k=50, seed=SEED + batch)
        texts += [a + b for a, b in zip(chosen, new, strict=True)]
        done += sum(len(row) for row in lm.tokenizer(texts[-AT_ONCE:])["input_ids"])
        batch += 1
        print(f"{done:,} tokens sampled", file=sys.stderr, flush=True)
    if file is not None:
        file.write_text(mark.join(texts))
    return texts


def own() -> list[str]:
    """Every text of the project's data sets, once, in random order: of whatever is cut off, a bit of all is left."""
    texts = list(dict.fromkeys(t for name in bundled() for t in rp.PromptSet.load(name).frame["text"].drop_nulls()))
    random.Random(SEED).shuffle(texts)
    return texts


def around(snippet: Snippet, tokens: int = 10) -> str:
    """The text a few tokens around the peak."""
    near = slice(max(0, snippet.peak - tokens), snippet.peak + tokens + 1)
    return replace(snippet, pieces=snippet.pieces[near], marked=snippet.marked[near]).text


def quoted(text: str) -> str:
    """A snippet inside a table of Markdown, which sees to bars itself."""
    flat = " ".join(text.split()).replace("`", "'")
    return flat.replace("⟦", "**").replace("⟧", "**").replace("****", "")


def written(
    command: str, model: str, found: rp.Dissection, caused: rp.evaluation.Causation, seconds: float, notes: str
) -> str:
    detectors, chance = found.detectors, found.chance
    highest = chance["largest"].max()
    lines = [f"# What neurons of {model} detect", ""]
    lines += [
        f"`{command}`: {found.n:,} neurons of all blocks on {found.stream.n:,} tokens "
        f"({len(found.stream.documents):,} texts: the project's data sets and text sampled from {WRITER}), top "
        f"{found.settings.quantile:.1%}, {len(found.names)} concepts"
        + (f" (left out, not in the text: {', '.join(found.dropped)})" if found.dropped else "")
        + f". The whole took {seconds / 60:.1f} minutes beside other work.",
        "",
        f"**{len(detectors):,} neurons ({len(detectors) / found.n:.1%}) have an IoU above {found.settings.detector:g} "
        f"with a concept. With the concepts rotated along the stream {chance['detectors'].mean():,.0f} have "
        f"({chance['detectors'].min():,}–{chance['detectors'].max():,} in {chance.height} rotations), and the largest "
        f"IoU of all is {highest:.3f}; found are {int((found.units['iou'] > highest).sum()):,} above that, up to "
        f"{found.units['iou'].max():.3f}.**",
        "",
        "![detectors over blocks](detectors.svg)",
        "",
        *([notes, ""] if notes else []),
        "## What detectors cause",
        "",
        "Nats; the detectors of a concept (its five best), less random units of the same blocks that are as active "
        f"({CONTROLS} sets). *Stimulate*: clamped at their thresholds on neutral sentences, change of log Σ p of the "
        "concept's tokens. *Ablate*: set to 0 where the concept occurs, change of log p of its tokens. Intervals over "
        "concepts; the last two columns count concepts whose own interval (over texts) excludes 0.",
        "",
        *markdown(caused.summary),
        "",
        "![what detectors cause](causes.svg)",
        "",
        "## The best detector of each concept",
        "",
        "With the highest place at its top that is of the concept, if one of the eight shown is; tokens above its "
        "threshold in bold. *Possible* is the largest IoU of a full top; one with values equal to its threshold is "
        "smaller, and may have a larger one.",
        "",
    ]
    rows = []
    for line in found.concepts.sort("best_iou", descending=True).iter_rows(named=True):
        unit, column = found.number(line["best_unit"]), found.of[:, found.concept(line["concept"])]
        snippets = found.snippets(unit)
        # The highest place that is of the concept, if one of those shown is.
        chosen = sorted(zip(found.top[unit], snippets, strict=False), key=lambda pair: not column[pair[0]])
        rows.append(
            {
                "concept": line["concept"],
                "tokens": line["tokens"],
                "detectors": line["detectors"],
                "best neuron": line["best_unit"].removeprefix("mlp.neurons@"),
                "IoU": line["best_iou"],
                "possible": line["attainable"],
                "at its top": "" if not chosen else quoted(around(chosen[0][1])),
            }
        )
    lines += markdown(pl.DataFrame(rows))
    lines += [
        "",
        "## Blocks",
        "",
        *markdown(found.layers.select("layer", "units", "detectors", "expected", "concepts"), ".1f"),
    ]
    return "\n".join(lines) + "\n"


def save(
    found: rp.Dissection,
    caused: rp.evaluation.Causation,
    command: str,
    model: str,
    out: Path,
    seconds: float,
    reports: Path | None,
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for name, table in (
        ("detectors", found.detectors.filter(pl.col("iou") > found.null.max()).drop("detector", "layer", "index")),
        ("concepts", found.concepts),
        ("layers", found.layers),
        ("chance", found.chance),
        ("causes", caused.table),
    ):
        rounded = table.with_columns(pl.selectors.float().round_sig_figs(4))
        write_table(rounded, out / f"{name}.csv", overwrite=True)
    with style.context("default"):
        detector_bars(found, title=model).savefig(out / "detectors.svg")
        causal_intervals(caused).savefig(out / "causes.svg")
    notes = (out / "notes.md").read_text().strip() if (out / "notes.md").exists() else ""
    (out / "README.md").write_text(written(command, model, found, caused, seconds, notes))
    if reports is not None:
        reports.mkdir(parents=True, exist_ok=True)
        found.save(reports / f"{model}.safetensors", overwrite=True)
        rp.write_dissection(found, reports / f"{model}.html", causation=caused)
    print(out / "README.md")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["smollm2-135m", "gemma3-270m"])
    parser.add_argument("--out", type=Path, default=Path("experiments/dissection"))
    parser.add_argument("--sampled", type=int, default=60_000, help="tokens of text to sample")
    parser.add_argument("--text", type=Path, help="keep the sampled text here, or take it from here")
    parser.add_argument("--tokens", type=int, help="only the first N tokens of all")
    parser.add_argument("--causes", type=int, help="clamp and ablate for the N concepts best detected only")
    parser.add_argument("--reports", type=Path, help="a folder for the pages and the dissections")
    options = parser.parse_args()
    chosen = {name: getattr(options, name) for name in ("sampled", "tokens", "causes")}
    said = "".join(f" --{name} {value}" for name, value in chosen.items() if value is not None)
    texts = [*sampled(options.sampled, options.text), *own()]
    for model in options.models:
        command = f"uv run python experiments/dissection.py --models {model}{said}"
        lm, out, began = rp.LanguageModel.load(model), options.out / model, time.perf_counter()
        with terminal() as progress:
            stream = token_stream(lm, texts, tokens=options.tokens)
            found = rp.dissect(lm, stream, absent="drop", progress=progress)
            print(f"{model}: {found.units['detector'].sum():,} detectors", file=sys.stderr, flush=True)
            best = found.concepts.filter(pl.col("best_iou") > found.settings.detector).sort("best_iou", descending=True)
            wanted = best["concept"].head(options.causes or best.height).to_list()
            caused = rp.causes(lm, found, wanted, controls=CONTROLS, progress=progress)
        save(found, caused, command, model, out, time.perf_counter() - began, options.reports)
    return 0


if __name__ == "__main__":
    sys.exit(main())
