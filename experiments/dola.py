"""What does contrasting layers do to truth, which layers win, and would any layer have done? Both bundled models.

    uv run python experiments/dola.py [--models M …] [--questions N] [--out experiments/dola]

Enters: `misconceptions` and, where REPROBE_DATA names a folder that has it, TruthfulQA. Leaves, per model: choices.csv
(MC1, MC2 and MC3 of every way to score, with its paired difference from the plain model), layers.csv and layers.svg
(which candidate is farthest, by kind of token), sentence.svg (the divergence of every layer at every token of one
answer), texts.md (what is written), and README.md. Controls: layers drawn at random for every token from the same
bucket, every layer by itself, and the length of an answer alone.
"""

import argparse
import dataclasses
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from tables import markdown

import reprobe as rp
from reprobe.evaluation import PRIMER, compare_choices, distinct, first_questions, fluency
from reprobe.methods.dola import DoLa, Trace
from reprobe.probing import write_table
from reprobe.report.style import SEQUENTIAL, WIDTH, Plot, colorbar, dress

#: Seeds of the control that draws a layer for every token.
DRAWS = 5
SENTENCE = (
    "Q: Who wrote the play Romeo and Juliet, and when?\nA:",
    " William Shakespeare wrote it in London, about 1595.",
)
FUNCTION = re.compile(
    "a|an|the|of|in|on|at|to|for|from|by|with|as|and|or|but|if|not|no|is|are|was|were|be|been|has|have|had|do|does|did|"
    "it|its|he|she|they|you|i|we|his|her|their|your|my|this|that|these|those|there|which|who|what|when|where|how|than|"
    "will|would|can|could|may|might|should|must",
    re.IGNORECASE,
)
KINDS = ("number", "name", "content word", "function word", "rest of a word", "punctuation")
#: Of a trace (tokens × layers), the layer that each token is contrasted with.
Choice = Callable[[Trace], np.ndarray]


class Replayed:
    """Scores answers by one trace of all layers, whatever layer is chosen: stands in for a DoLa."""

    def __init__(self, dola: DoLa, known: dict[tuple[str, str], Trace]) -> None:
        self.dola, self.known = dola, known
        self.choice: Choice = lambda trace: np.zeros(len(trace.tokens), int)

    def logprobs(self, lm: rp.LanguageModel, texts: Any, answers: Any, **options: Any) -> list[np.ndarray]:
        lacking = [i for i, (t, own) in enumerate(zip(texts, answers, strict=True)) if (t, own[0]) not in self.known]
        if lacking:
            batch_tokens = options["batch_tokens"]
            found = self.dola.trace(
                lm, [texts[i] for i in lacking], [answers[i] for i in lacking], batch_tokens=batch_tokens
            )
            for i, group in zip(lacking, found, strict=True):
                self.known |= {(texts[i], a): trace for a, trace in zip(answers[i], group, strict=True)}
        return [np.array([self.score(self.known[t, a]) for a in own]) for t, own in zip(texts, answers, strict=True)]

    def score(self, trace: Trace) -> float:
        column = self.choice(trace)
        return float((trace.mature - trace.early[np.arange(len(column)), column]).sum())


class Lengths:
    """Scores an answer by the number of its tokens, and knows no model: what a sum of positive contrasts comes near."""

    def logprobs(self, lm: rp.LanguageModel, texts: Any, answers: Any, **options: Any) -> list[np.ndarray]:
        return [np.array([float(len(ids)) for ids in lm.tokenizer(list(own))["input_ids"]]) for own in answers]


def farthest(among: Sequence[int]) -> Choice:
    return lambda trace: np.asarray(among)[trace.divergence[:, among].argmax(1)]


def always(column: int) -> Choice:
    return lambda trace: np.full(len(trace.tokens), column)


def drawn(among: Sequence[int], seed: int) -> Choice:
    rng = np.random.default_rng(seed)
    return lambda trace: rng.choice(among, len(trace.tokens))


def kind(piece: str, first: bool) -> str:
    word = piece.strip()
    if re.search(r"\d", word):
        return "number"
    if not re.search(r"\w", word):
        return "punctuation"
    if piece == word and not first:
        return "rest of a word"
    if FUNCTION.fullmatch(word):
        return "function word"
    return "name" if word[0].isupper() and not first else "content word"


def choices(
    lm: rp.LanguageModel, data: rp.PromptSet, layers: Sequence[int], high: Sequence[int], low: Sequence[int]
) -> tuple[pl.DataFrame, dict[tuple[str, str], Trace]]:
    """Every way to score the answers of `data`; `high` and `low` are columns of `layers`."""
    plain = rp.multiple_choice(lm, data)
    known: dict[tuple[str, str], Trace] = {}
    replayed, rows = Replayed(DoLa(layers), known), []

    def run(name: str, *ways: Choice) -> None:
        tables = []
        for way in ways:
            replayed.choice = way
            tables.append(compare_choices(plain, rp.multiple_choice(lm, data, decoding=replayed)))
        keep(name, tables)

    def keep(name: str, tables: Sequence[pl.DataFrame]) -> None:
        whole = pl.concat(tables).group_by("metric", maintain_order=True).mean()
        rows.append(whole.select(pl.lit(data.name).alias("data"), pl.lit(name).alias("scored by"), pl.all()))
        print(f"{data.name}: {name}", file=sys.stderr, flush=True)

    run("DoLa high", farthest(high))
    run("DoLa low", farthest(low))
    run("random layers of high", *(drawn(high, seed) for seed in range(DRAWS)))
    run("random layers of low", *(drawn(low, seed) for seed in range(DRAWS)))
    for column, layer in enumerate(layers):
        run(f"static {layer}", always(column))
    keep("the number of its tokens alone", [compare_choices(plain, rp.multiple_choice(lm, data, decoding=Lengths()))])
    return pl.concat(rows), known


def winners(known: dict[tuple[str, str], Trace], layers: Sequence[int], among: Sequence[int]) -> pl.DataFrame:
    """How often each candidate is the farthest, by kind of token; answers' first tokens count as words."""
    way, rows = farthest(among), []
    for trace in known.values():
        for i, (piece, column) in enumerate(zip(trace.tokens, way(trace), strict=True)):
            rows.append({"kind": kind(piece, i == 0), "layer": layers[column]})
    counts = pl.DataFrame(rows).group_by("kind", "layer").len("tokens")
    met = [k for k in KINDS if k in set(counts["kind"])]
    whole = pl.DataFrame({"kind": met}).join(pl.DataFrame({"layer": [layers[c] for c in among]}), how="cross")
    return whole.join(counts, on=["kind", "layer"], how="left").with_columns(pl.col("tokens").fill_null(0))


def drawn_layers(tables: dict[str, pl.DataFrame]) -> Plot:
    figure = Plot(WIDTH * 1.5, 0.6 + 2.3 * len(tables))
    panels = figure.subplots(len(tables), 1, squeeze=False)[:, 0]
    for axes, (name, table) in zip(panels, tables.items(), strict=True):
        layers = table["layer"].unique().sort().to_list()
        counts = table.pivot(on="layer", index="kind", values="tokens").select("kind", *map(str, layers))
        grid = counts.drop("kind").to_numpy().astype(float)
        share = grid / np.maximum(grid.sum(1, keepdims=True), 1)
        mesh = axes.imshow(share, cmap=SEQUENTIAL, vmin=0, vmax=1, aspect="auto")
        for (i, j), value in np.ndenumerate(share):
            tone = "black" if value > 0.55 else "white"
            axes.text(j, i, f"{100 * value:.0f}", ha="center", va="center", fontsize=8, color=tone)
        axes.set_xticks(range(len(layers)), layers)
        axes.set_yticks(
            range(len(counts)), [f"{k} ({int(n):,})" for k, n in zip(counts["kind"], grid.sum(1), strict=True)]
        )
        dress(axes, x="layer that wins (what enters that block)", y="", title=f"candidates: {name}", grid="none")
        colorbar(figure, mesh, axes, "share of the kind's tokens")
    return figure


def sentence(trace: Trace) -> Plot:
    figure = Plot(WIDTH * 1.9, 3.6)
    axes = figure.subplots()
    mesh = axes.imshow(trace.divergence.T, cmap=SEQUENTIAL, aspect="auto", vmin=0, vmax=np.log(2), origin="lower")
    for (i, j), value in np.ndenumerate(trace.divergence.T):
        tone = "black" if value > 0.38 else "white"
        axes.text(j, i, f"{value:.2f}"[1:], ha="center", va="center", fontsize=7, color=tone)
    axes.set_xticks(range(len(trace.tokens)), [t.strip() or repr(t) for t in trace.tokens], rotation=40, ha="right")
    axes.set_yticks(range(len(trace.layers)), trace.layers)
    dress(axes, x="token that is predicted", y="layer", title="JSD from the last layer", grid="none")
    colorbar(figure, mesh, axes, "nats")
    return figure


def written(lm: rp.LanguageModel, questions: Sequence[str], tokens: int) -> tuple[list[list[str]], pl.DataFrame]:
    """Free answers: greedy, greedy with the penalty that DoLa brings, DoLa, and static layers drawn at random."""
    prompts = [f"{PRIMER}\n\nQ: {q}\nA:" for q in questions]
    rng = np.random.default_rng(0)
    candidates = DoLa("high").candidates(lm)
    options: dict[str, dict[str, Any]] = {
        "greedy": {},
        "greedy, repetition penalty 1.2": {"repetition_penalty": 1.2},
        "DoLa high": {"decoding": DoLa("high")},
        "DoLa high, no penalty": {"decoding": DoLa("high", repetition_penalty=1.0)},
        'DoLa high, jsd="plausible"': {"decoding": DoLa("high", jsd="plausible")},
        'DoLa high, compat="dola"': {"decoding": DoLa("high", compat="dola")},
        "DoLa low": {"decoding": DoLa("low")},
    }
    for layer in rng.choice(candidates, 2, replace=False):
        options[f"random static layer {layer}"] = {"decoding": DoLa(int(layer))}
    texts = {n: lm.generate(prompts, max_new_tokens=tokens, **o) for n, o in options.items()}
    base = [lm.tokenizer(t)["input_ids"] for t in texts["greedy"]]
    rows = []
    for name, own in texts.items():
        ids = [lm.tokenizer(t)["input_ids"] for t in own]
        same = [next((i for i, (a, b) in enumerate(zip(x, y, strict=False)) if a != b), min(len(x), len(y)))
                for x, y in zip(ids, base, strict=True)]  # fmt: skip
        rows.append(
            {
                "decoding": name,
                "as greedy": np.mean([a == b for a, b in zip(own, texts["greedy"], strict=True)]),
                "tokens until it differs": float(np.mean(same)),
                "distinct words": float(np.mean([distinct(t, 1) for t in own])),
                "distinct pairs": float(np.mean([distinct(t, 2) for t in own])),
                "fluency (bits)": float(np.mean([fluency(t) for t in own])),
            }
        )
    lines = [[name, q, own] for name, some in texts.items() for q, own in zip(questions, some, strict=True)]
    return lines, pl.DataFrame(rows)


def shown(table: pl.DataFrame) -> list[str]:
    """MC1, MC2 and MC3 side by side, with the paired difference from the plain model."""
    out = []
    for name in table["data"].unique(maintain_order=True):
        own = table.filter(pl.col("data") == name)
        plain = {m: own.filter(pl.col("metric") == m)["unsteered"][0] for m in ("mc1", "mc2", "mc3")}
        out += [
            "",
            f"### {name}, {int(own['n'][0])} questions",
            "",
            "| scored by | MC1 | MC2 | MC3 |",
            "|---|---|---|---|",
        ]
        out.append("| the plain model | " + " | ".join(f"{plain[m]:.3f}" for m in plain) + " |")
        for way in own["scored by"].unique(maintain_order=True):
            rows = {r["metric"]: r for r in own.filter(pl.col("scored by") == way).iter_rows(named=True)}
            cells = [
                f"{rows[m]['steered']:.3f} ({rows[m]['change']:+.3f} [{rows[m]['low']:+.3f}, {rows[m]['high']:+.3f}])"
                for m in plain
            ]
            out.append(f"| {way} | {' | '.join(cells)} |")
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["smollm2-135m", "gemma3-270m"])
    parser.add_argument("--out", type=Path, default=Path("experiments/dola"))
    parser.add_argument("--questions", type=int, default=100, help="of each data set, the first N")
    parser.add_argument("--texts", type=int, default=12, help="questions that are answered freely")
    parser.add_argument("--tokens", type=int, default=32)
    options = parser.parse_args()
    sets = [rp.PromptSet.load("misconceptions")]
    if (folder := os.environ.get("REPROBE_DATA")) is not None:
        public = rp.PromptSet.load(Path(folder) / "truthfulqa" / "mc_task.json")
        sets.append(dataclasses.replace(public, name="TruthfulQA"))
    else:
        print("TruthfulQA is left out: REPROBE_DATA is not set", file=sys.stderr)
    sets = [first_questions(data, options.questions) for data in sets]
    for model in options.models:
        lm, out = rp.LanguageModel.load(model), options.out / model
        out.mkdir(parents=True, exist_ok=True)
        buckets = {name: DoLa(name).candidates(lm) for name in ("high", "low")}  # type: ignore[arg-type]
        layers = sorted({*buckets["high"], *buckets["low"]})
        columns = {name: [layers.index(j) for j in bucket] for name, bucket in buckets.items()}
        tables, known = [], {}
        for data in sets:
            table, traces = choices(lm, data, layers, columns["high"], columns["low"])
            tables.append(table)
            known |= traces
        table = pl.concat(tables)
        write_table(table, out / "choices.csv", overwrite=True)
        won = {name: winners(known, layers, among) for name, among in columns.items()}
        write_table(
            pl.concat([t.select(pl.lit(name).alias("candidates"), pl.all()) for name, t in won.items()]),
            out / "layers.csv",
            overwrite=True,
        )
        drawn_layers(won).savefig(out / "layers.svg")
        (one,) = DoLa(layers).trace(lm, *(SENTENCE[0], [SENTENCE[1]]))[0]
        sentence(one).savefig(out / "sentence.svg")
        asked = sets[-1].frame["question"].unique(maintain_order=True).head(options.texts).to_list()
        lines, varied = written(lm, asked, options.tokens)
        texts = [f"# What {model} writes under DoLa", ""]
        for q in asked:
            texts += [
                f"**{q}**",
                "",
                *(f"- {name}: {text.strip()!r}" for name, asked_, text in lines if asked_ == q),
                "",
            ]
        (out / "texts.md").write_text("\n".join(texts))
        report = [
            f"# DoLa on {model}",
            "",
            f"`experiments/dola.py --models {model} --questions {options.questions}`; layer j is what enters block j; "
            f"candidates high {', '.join(map(str, buckets['high']))}, low {', '.join(map(str, buckets['low']))}. "
            "In brackets: the paired difference from the plain model, with its 95 % interval over questions (of random "
            f"layers: the mean over {DRAWS} draws, of the difference and of its bounds).",
            "",
            "## Multiple choice",
            *shown(table),
            "",
            "## Which layers win",
            "",
            "![share of tokens by layer](layers.svg)",
            "",
            "![divergence by layer and token](sentence.svg)",
            "",
            f"## Free answers ({len(asked)} questions, {options.tokens} tokens; [texts](texts.md))",
            "",
            *markdown(varied),
        ]
        notes = out / "notes.md"  # what a reader made of the figures
        report += ["", notes.read_text().rstrip()] if notes.exists() else []
        (out / "README.md").write_text("\n".join(report) + "\n")
        print(out / "README.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
