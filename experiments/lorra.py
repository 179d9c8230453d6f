"""Does an adapter trained towards a mood move it where it was not trained, and at what price? Both bundled models.

    uv run python experiments/lorra.py [--models smollm2-135m gemma3-270m] [--steps 40] [--seeds 0 1]

Enters: the scenes of `emotions`, split by topic into three: responses to train on, scenes to fit a reader on, scenes to
measure on. Leaves, per model: lorra.csv (mean changes with 95 % intervals over the topics or beginnings measured on),
lorra-runs.csv (a row per method and seed: strength, price), differences.csv (LoRRA less each other method, paired),
effects.svg and README.md, into which notes.md goes, what a reader made of the figures.

Measured are the reader, logistic, of happy against sad scenes in the plain model, which knows nothing of the prompts
trained with; and the log-odds that the next word is a happy rather than a sad one, after the same scenes and after
beginnings of other texts. Every method pays the same KL on six neutral passages (an adapter by scaling its change);
the KL told is that on ten others. The seeds are wordings of the contrast. Controls: an adapter trained as long towards
random directions that are as long as the contrast, one trained on a contrast beside mood, random reading vectors.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

sys.path.insert(0, str(Path(__file__).parent / "control"))

from additions import BEGINNINGS
from shared import ENDING, HAPPY, OFF_TOPIC, PRICE, TUNING, Outcomes, Priced, at_price, baseline_of, randomised
from tables import markdown

import reprobe as rp
from reprobe.control import Adapter
from reprobe.evaluation.means import Mean, mean_of
from reprobe.evaluation.passages import divergences, measured
from reprobe.methods import lorra, repe
from reprobe.model.hooks import capture
from reprobe.model.sites import Site
from reprobe.probing import write_table
from reprobe.progress import terminal
from reprobe.report.style import INK, MUTED, SERIES, WIDTH, Mark, Plot, dress

#: (plain, positive, negative) prompts before a scene, one wording a seed; and those that say nothing of mood.
MOOD = (
    ("Here is what happened.", "I am very happy. Here is what happened.", "I am very sad. Here is what happened."),
    ("Here is a scene.", "Here is a joyful, happy scene.", "Here is a gloomy, sad scene."),
)
BESIDE = (
    ("Here is what happened.", "I am very tall. Here is what happened.", "I am very short. Here is what happened."),
    ("Here is a scene.", "Here is a modern, urban scene.", "Here is an ancient, rural scene."),
)
#: Prompts that pass together.
AT_ONCE = 20
METRICS = {
    "read": "mood as read\n(scales of the reader)",
    "scenes": "log-odds after scenes\n(nats)",
    "beginnings": "log-odds after beginnings\n(nats)",
}


@dataclass(frozen=True)
class Scenes:
    """Scenes of some topics, each followed by `ENDING` where it is to be answered."""

    texts: tuple[str, ...]
    labels: tuple[str, ...]
    topics: tuple[str, ...]

    @property
    def asked(self) -> list[str]:
        return [text + ENDING for text in self.texts]


def thirds() -> tuple[Scenes, Scenes, Scenes]:
    """The scenes of `emotions` by topic: to train on, to fit the reader on, to measure on."""
    frame = rp.PromptSet.load("emotions").frame
    topics = frame["group"].unique(maintain_order=True).to_list()
    order = np.random.default_rng(0).permutation(len(topics))
    found = []
    for part in np.array_split(order, 3):
        own = frame.filter(pl.col("group").is_in([topics[i] for i in part]))
        found.append(Scenes(*(tuple(own[name]) for name in ("text", "label", "group"))))
    train, read, test = found
    return train, read, test


@dataclass(frozen=True)
class Way:
    """A way of control: what a strength makes of the model, and the prompts that a text then runs under."""

    make: Callable[[float], AbstractContextManager[Any]]
    prefixes: tuple[str, ...] = ("",)
    start: float = 1.0

    def rows(self, texts: Sequence[str]) -> list[str]:
        return [f"{prefix} {text}".strip() for prefix in self.prefixes for text in texts]


@dataclass(frozen=True)
class Bench:
    """A model with the reader and the prompts that every way of control is measured by."""

    lm: rp.LanguageModel
    reader: rp.Direction
    test: Scenes

    def states(self, way: Way, strength: float, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """The score of the reader and the log-odds of words at each text's end."""
        lm, site, scores, odds = self.lm, self.reader.site, [], []
        positive, negative = (HAPPY.ids(lm, words) for words in (HAPPY.positive, HAPPY.negative))
        assert site is not None
        with way.make(strength):
            for first in range(0, len(texts), AT_ONCE):
                some = texts[first : first + AT_ONCE]
                inputs = lm.inputs(lm.encode(way.rows(some)))
                seen = capture(lm, inputs, [site, Site("final")], lambda h: h[:, -1].clone())
                scores.append(self.reader.score(seen[site][: len(some)].double().cpu().numpy()) / self.reader.scale)
                logits = lm.unembed(seen[Site("final")][: len(some)]).detach().double()
                odds.append((logits[:, positive].logsumexp(-1) - logits[:, negative].logsumexp(-1)).cpu().numpy())
        return np.concatenate(scores), np.concatenate(odds)

    def outcome(self, way: Way, strength: float) -> dict[str, dict[str, float]]:
        read, odds = self.states(way, strength, self.test.asked)
        beginnings = BEGINNINGS["mood"]
        return {
            "read": by_topic(self.test.topics, read),
            "scenes": by_topic(self.test.topics, odds),
            "beginnings": dict(zip(beginnings, self.states(way, strength, beginnings)[1].tolist(), strict=True)),
        }

    def kl(self, way: Way, strength: float, texts: tuple[rp.Passage, ...]) -> Mean:
        """KL(plain ‖ controlled) in nats per token of continuations, with its interval over texts."""
        plain = baseline_of(self.lm, texts).runs
        with way.make(strength):
            rows = way.rows([text.prompt for text in texts])
            given = [text.continuation for text in texts] * len(way.prefixes)
            runs = self.lm.continued(rows, given, in_step=True)[: len(texts)]
        each = [
            divergences(self.lm, measured(text, a), measured(text, b))
            for text, a, b in zip(texts, plain, runs, strict=True)
        ]
        number = np.repeat(np.arange(len(texts)), [len(own) for own in each])
        return mean_of(np.concatenate(each), number.tolist())

    def priced(self, way: Way) -> Priced:
        return at_price(lambda strength: self.kl(way, strength, TUNING).mean, start=way.start)


def by_topic(topics: Iterable[str], values: np.ndarray) -> dict[str, float]:
    frame = pl.DataFrame({"topic": list(topics), "value": values}).group_by("topic", maintain_order=True)
    return dict(frame.agg(pl.col("value").mean()).iter_rows())


def fitted(lm: rp.LanguageModel, scenes: Scenes, stores: Path) -> tuple[rp.Direction, str]:
    """The reader of happy against sad scenes at the best block of the upper half, and how well it reads."""
    records = [
        {"text": text, "label": int(label == "happiness"), "group": topic}
        for text, label, topic in zip(scenes.asked, scenes.labels, scenes.topics, strict=True)
    ]
    data = rp.PromptSet.from_records(records, name="scenes to read")
    sites = [Site("resid.post", layer) for layer in range(lm.n_layers // 2, lm.n_layers - 1)]
    store = rp.extract(lm, data, sites=sites, at="last", to=stores / "read.reprobe")
    grid = rp.probe(store, rp.LogisticReader(), n_jobs=1)
    best = grid.best()
    return (
        best,
        f"{best.site}, right on {grid.selected.accuracy:.2f} of held-out scenes (site chosen inside)",
    )


def contrasted(
    lm: rp.LanguageModel, scenes: Scenes, prefixes: tuple[str, str, str], sites: Sequence[Site], to: Path
) -> tuple[rp.ProbeGrid, dict[Site, float]]:
    """Reading vectors of the contrast at the targets, and the mean length of the contrast there (last tokens)."""
    records = [
        {"text": f"{prefix} {text}", "label": label, "group": topic, "pair": f"{i}"}
        for i, (text, topic) in enumerate(zip(scenes.texts, scenes.topics, strict=True))
        for label, prefix in ((1, prefixes[1]), (0, prefixes[2]))
    ]
    store = rp.extract(lm, rp.PromptSet.from_records(records, name="contrast"), sites=sites, at="last", to=to)
    values = {site: store.read(site).double().numpy() for site in sites}
    lengths = {site: float(np.linalg.norm(h[::2] - h[1::2], axis=1).mean()) for site, h in values.items()}
    return rp.probe(store, rp.PCAReader(), n_jobs=1), lengths


def switched(lm: rp.LanguageModel, adapter: Adapter) -> Way:
    return Way(lambda strength: rp.edited(lm, adapter.edits(strength)))


def steered(lm: rp.LanguageModel, make: Callable[[float], rp.Steering], **how: Any) -> Way:
    return Way(lambda strength: rp.steer(lm, make(strength)), **how)


def compared(
    bench: Bench, train: Scenes, seed: int, steps: int, stores: Path, found: Outcomes, notes: list[str]
) -> dict[str, tuple[Way, float]]:
    """Every way of control for one wording; returns each with its strength at the price."""
    lm, mood = bench.lm, MOOD[seed % len(MOOD)]
    settings = lorra.Settings(steps=steps, batch=8, rate=1e-3, seed=seed)
    sites = lorra.default_targets(lm.n_layers)
    reading, lengths = contrasted(lm, train, mood, sites, stores / f"contrast-{seed}.reprobe")
    responses = [f" {text}" for text in train.texts]

    def adapted(name: str, prompts: Any, **how: Any) -> Adapter:
        start = time.process_time()
        with terminal() as progress:
            made = lorra.train(
                lm, prompts, responses, to=stores / f"{name}-{seed}", settings=settings, progress=progress, **how
            )
        tail = np.mean(made.losses[-5:])
        notes.append(
            f"{name}, wording {seed}: loss {made.losses[0]:.1f} → {tail:.1f} (mean of the last five steps) in "
            f"{time.process_time() - start:.0f} s of CPU"
        )
        print(notes[-1], file=sys.stderr, flush=True)
        return made

    def streams(prefixes: tuple[str, str, str]) -> repe.Streams:
        return repe.Streams(*([prefix] * len(responses) for prefix in prefixes))

    rng = np.random.default_rng([seed, 3])
    mine = adapted("LoRRA", streams(mood))
    # As long as the contrast at each site is at last tokens, for its part; as all of it is, over all tokens.
    part = mine.losses[0] / np.mean(list(lengths.values()))
    random = [rp.Direction.from_vector(s, rng.normal(size=lm.d_model), scale=part * lengths[s]) for s in sites]
    vectors = repe.control(reading.directions, 1.0)
    noise = randomised(vectors, seed)
    ways = {
        "LoRRA": switched(lm, mine),
        "LoRRA, random directions": switched(
            lm, adapted("LoRRA, random directions", [mood[0]] * len(responses), directions=random)
        ),
        "LoRRA, contrast beside mood": switched(
            lm, adapted("LoRRA, contrast beside mood", streams(BESIDE[seed % len(BESIDE)]))
        ),
        "reading vectors": steered(lm, lambda s: repe.control(reading.directions, s)),
        "random vectors": steered(lm, lambda s: s * noise),
        "contrast vectors": steered(
            lm, lambda s: repe.contrast(lm, sites, s), prefixes=("", mood[1], mood[2]), start=0.5
        ),
    }
    before = bench.outcome(Way(lambda _: nullcontext()), 0.0)
    out = {}
    for name, way in ways.items():
        paid = bench.priced(way)
        out[name] = (way, paid.strength)
        tried = [(name, paid.strength)] + ([(f"{name}, as trained", 1.0)] if name.startswith("LoRRA") else [])
        for method, strength in tried:
            cost = bench.kl(way, strength, OFF_TOPIC)
            after = bench.outcome(way, strength)
            where = {"strength": strength, "kl": cost.mean, "kl_low": cost.low, "kl_high": cost.high}
            found.add(method, seed, 0, before, after, **where, reached=method != name or paid.reached)
            print(found.runs[-1], file=sys.stderr, flush=True)
    return out


def differences(found: Outcomes) -> pl.DataFrame:
    """LoRRA's change less that of every other method, of the same items, with intervals over them."""
    frame = pl.DataFrame(found.rows).with_columns(change=pl.col("after") - pl.col("before"))
    frame = frame.group_by("method", "metric", "item", maintain_order=True).agg(pl.col("change").mean())
    own = frame.filter(pl.col("method") == "LoRRA").select("metric", "item", mine="change")
    out = []
    for (method, metric), rows in frame.join(own, on=["metric", "item"]).group_by(
        "method", "metric", maintain_order=True
    ):
        if method != "LoRRA" and not str(method).endswith("as trained"):
            mean = mean_of((rows["mine"] - rows["change"]).to_numpy())
            out.append({"LoRRA less": method, "metric": metric, "mean": mean.mean, "low": mean.low, "high": mean.high})
    return pl.DataFrame(out)


def drawn(summary: pl.DataFrame) -> Plot:
    """The change of each metric under each method at the price, with intervals; small: seed by seed."""
    table = summary.filter(~pl.col("method").str.ends_with("as trained"))
    methods = table["method"].unique(maintain_order=True).to_list()
    figure = Plot(2 * WIDTH, 2.9)
    panels = figure.subplots(1, len(METRICS), sharey=True)
    for axes, (metric, told) in zip(panels, METRICS.items(), strict=True):
        for i, name in enumerate(methods):
            row = table.filter((pl.col("method") == name) & (pl.col("metric") == metric)).row(0, named=True)
            reach = [[row["change"] - row["low"]], [row["high"] - row["change"]]]
            color = SERIES[0] if name == "LoRRA" else MUTED if "random" in name or "beside" in name else SERIES[1]
            axes.errorbar([row["change"]], [i], xerr=reach, fmt="o", color=color, capsize=2, markersize=5)
            seeds = [float(value) for value in row["seed by seed"].split()]
            axes.plot(seeds, [i + 0.25] * len(seeds), "|", color=color, markersize=6)
            figure.marks.append(Mark(axes, row["change"], i, f"{name}: {row['change']:+.2f}"))
        axes.axvline(0, color=INK, linewidth=0.9, linestyle=":")
        axes.set_yticks(range(len(methods)), methods)
        dress(axes, x=told, y="", grid="x")
    panels[0].set_ylim(len(methods) - 0.4, -0.6)
    return figure


def written(bench: Bench, ways: dict[str, tuple[Way, float]]) -> list[str]:
    """How three beginnings go on."""
    texts, lines = BEGINNINGS["mood"][:3], []
    for name in ("plain", "LoRRA", "LoRRA, random directions"):
        way, strength = ways.get(name, (Way(lambda _: nullcontext()), 0.0))
        with way.make(strength):
            new = bench.lm.generate(list(texts), max_new_tokens=16)
        lines += [f"- {name}: {text} **{' '.join(own.split())}**" for text, own in zip(texts, new, strict=True)]
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["smollm2-135m", "gemma3-270m"])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "lorra")
    options = parser.parse_args()
    for model in options.models:
        start, out = time.process_time(), options.out / model
        out.mkdir(parents=True, exist_ok=True)
        lm = rp.LanguageModel.load(model, dtype="float32")
        train, read, test = thirds()
        found, notes = Outcomes(), []
        with tempfile.TemporaryDirectory() as stores:
            reader, how_well = fitted(lm, read, Path(stores))
            bench = Bench(lm, reader, test)
            made = [compared(bench, train, s, options.steps, Path(stores), found, notes) for s in options.seeds]
            samples = written(bench, made[0])
        table = found.save(out, "lorra")
        less = differences(found)
        write_table(less, out / "differences.csv", overwrite=True)
        drawn(found.summary()).savefig(out / "effects.svg")
        seeds, hand = " ".join(map(str, options.seeds)), out / "notes.md"
        lines = [
            f"# LoRRA on {model}",
            "",
            f"`uv run python experiments/lorra.py --models {model} --steps {options.steps} --seeds {seeds}`, "
            f"{(time.process_time() - start) / 60:.1f} minutes of CPU. Reader: {how_well}. {len(test.texts)} scenes of "
            f"{len(set(test.topics))} topics and {len(BEGINNINGS['mood'])} beginnings to measure on, "
            f"{len(train.texts)} scenes to train on, {len(read.texts)} for the reader; no topic in two of them.",
            "",
            *([hand.read_text().strip(), ""] if hand.exists() else []),
            "![effects](effects.svg)",
            "",
            f"At a KL of {PRICE} nats per token on the neutral text that tuned the strength (`KL` in the table: on ten "
            "other passages), and adapters as they were trained. *read*: the reader, in its scales; *scenes*, "
            "*beginnings*: log-odds (nats) of happy against sad words. Intervals over topics (beginnings), each the "
            "mean of its seeds; ticks in the figure are the seeds.",
            "",
            *table,
            "",
            "LoRRA less each other method at that price, paired:",
            "",
            *markdown(less, "+.3f"),
            "",
            "What is written, at that price, wording 0:",
            "",
            *samples,
            "",
            "Training: " + "; ".join(notes) + ".",
        ]
        (out / "README.md").write_text("\n".join(lines) + "\n")
        print("\n".join(lines), file=sys.stderr, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
