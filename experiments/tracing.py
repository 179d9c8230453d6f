"""Where is a fact recalled? Causal tracing over known facts, on both bundled models, and what ROME's blocks say to it.

    uv run python experiments/tracing.py [--models smollm2-135m gemma3-270m] [--facts 100] [--samples 10] [--out DIR]

Enters: names of models, facts (the bundled ones; one of each subject, and such as the model knows). Leaves, per model:
averages.csv (kind × role × block with intervals), facts.csv, curves.svg, roles.svg, maps of the first facts, and
results.md. The one-page reading of them is experiments/tracing/README.md.

The control of "this token, this block": the block is chosen on half of the facts and its effect taken on the other
half, beside that of the tokens between subject and end at the same block.
"""

import argparse
import dataclasses
import time
from pathlib import Path

import numpy as np

import reprobe as rp
from reprobe.methods import editing, tracing
from reprobe.probing import write_table
from reprobe.progress import terminal
from reprobe.prompts import facts_of
from reprobe.report import trace_curves, trace_map

MAPS = 2


def of_subjects(facts):
    """The first fact of each subject."""
    return list({fact.group: fact for fact in reversed(facts)}.values())[::-1]


def part(grid, which):
    return dataclasses.replace(grid, traces=grid.traces[which])


def told(row):
    low, high = (row[k] if k in row else row[f"effect_{k}"] for k in ("low", "high"))
    mean = row["mean"] if "mean" in row else row["effect"]
    return f"{mean:.3f}" + ("" if low is None else f" [{low:.3f}, {high:.3f}]")


def held_out(grid):
    """Per kind and role: the block that is best on the even facts, and there, on the odd facts, the effects."""
    even, odd = part(grid, slice(0, None, 2)), part(grid, slice(1, None, 2))
    for kind in grid.settings.kinds:
        for role in ("last subject", "last later"):
            layer = even.peak(kind, role)["layer"]
            lines = {row["role"]: row for row in odd.averages.filter(kind=kind, layer=layer).to_dicts()}
            yield kind, role, layer, lines[role], lines.get("middle later")


def results(lm, grid, seconds, command, drawn_from):
    layers = editing.default_layers(lm)
    out = [f"# Causal tracing in {lm.name}", "", f"`{command}`; {drawn_from}; {seconds / 60:.0f} min.", ""]
    out += ["| probability of the object | mean over facts |", "|---|---|"]
    out += [f"| {row['measure'].replace('_', ' ')} | {told(row)} |" for row in grid.totals.to_dicts()]
    out += ["", "The block with the greatest mean indirect effect, of all facts:", ""]
    out += ["| kind | token | n | block | effect |", "|---|---|---|---|---|"]
    out += [f"| {row['kind']} | {row['role']} | {row['n']} | {row['layer']} | {told(row)} |" for row in grid.peaks]
    out += ["", "The block chosen on half of the facts, the effects there on the other half:", ""]
    out += ["| kind | token | block | effect | of the tokens between subject and end |", "|---|---|---|---|---|"]
    for kind, role, layer, own, other in held_out(grid):
        out.append(f"| {kind} | {role} | {layer} | {told(own)} | {'–' if other is None else told(other)} |")
    mlp = grid.averages.filter(kind="mlp.out", role="last subject").sort("layer")
    effect = mlp["effect"].to_numpy()
    near = mlp.filter(mlp["effect_high"] >= effect.max())["layer"].to_list()
    share = float(np.interp(layers.rome, mlp["layer"], effect) / effect.max())
    out += [
        "",
        f"ROME edits block {layers.rome} of this model, MEMIT blocks {', '.join(map(str, layers.memit))}. At the "
        f"subject's last token, MLPs around block {layers.rome} have {share:.0%} of the greatest mean effect; blocks "
        f"whose interval reaches that: {', '.join(map(str, near))}.",
    ]
    return "\n".join(out) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["smollm2-135m", "gemma3-270m"])
    parser.add_argument("--source", default="facts", help="bundled facts, or a file such as known_1000.json")
    parser.add_argument("--facts", type=int, default=100)
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("experiments/tracing"))
    a = parser.parse_args()
    for model in a.models:
        lm, out = rp.LanguageModel.load(model), a.out / model
        out.mkdir(parents=True, exist_ok=True)
        facts = tracing.known(lm, of_subjects(facts_of(a.source)), limit=a.facts)
        start = time.perf_counter()
        with terminal() as progress:
            grid = tracing.trace(lm, facts, settings=tracing.Settings(samples=a.samples), progress=progress)
        seconds = time.perf_counter() - start
        write_table(grid.averages, out / "averages.csv", overwrite=True)
        write_table(grid.facts, out / "facts.csv", overwrite=True)
        trace_curves(grid, title=f"{model}, {len(facts)} facts").savefig(out / "curves.svg")
        grid.plot().savefig(out / "roles.svg")
        for i in range(min(MAPS, len(facts))):
            trace_map(grid, i).savefig(out / f"fact-{i}.svg")
        source = f" --source {Path(a.source).name}" if a.source != "facts" else ""
        command = f"experiments/tracing.py --models {model}{source} --facts {a.facts} --samples {a.samples}"
        about = f"{len(facts)} facts that it knows, the first of each subject in `{Path(a.source).stem}`"
        (out / "results.md").write_text(results(lm, grid, seconds, command, about))
        print(out / "results.md", flush=True)


if __name__ == "__main__":
    main()
