"""A results folder as the demo makes one: random activations with a planted direction."""

from pathlib import Path

import numpy as np
import polars as pl
import torch
from store.synthetic import tokens as tokens_of
from store.synthetic import write
from tiny import tiny_model

from reprobe.control import EditEffect, WeightEdit
from reprobe.evaluation import Contrast
from reprobe.methods.concepts import Concept
from reprobe.methods.dissected import Dissection
from reprobe.methods.dissection import dissect
from reprobe.methods.repe import Scan
from reprobe.methods.tracing import KINDS, Trace, TraceGrid
from reprobe.methods.tracing import Settings as TraceSettings
from reprobe.model.identity import ModelIdentity
from reprobe.model.sites import Site
from reprobe.probing import LDAReader, MeanDifference, compare, write_table
from reprobe.probing.direction import Direction
from reprobe.probing.intervals import ClusterBootstrap
from reprobe.probing.probe_grid import COLUMNS, ProbeGrid
from reprobe.probing.transfer import COLUMNS as COLUMNS_OF_TRANSFER
from reprobe.prompts import Fact
from reprobe.report import (
    Run,
    ScanResult,
    SteeringResult,
    Step,
    comparison_path,
    probe_path,
    store_path,
    write_dissection,
    write_run,
    write_scan,
    write_steering,
)
from reprobe.report.measured import SCHEMAS, SIDE_EFFECTS
from reprobe.store import ActivationStore, StoredSite, StoreWriter

LAYERS, HEADS, HEAD_DIM = 30, 9, 5
WIDTH = HEADS * HEAD_DIM
READERS = ("LogisticReader", "MeanDifference", "PCAReader")
IDENTITY = ModelIdentity(
    name="smollm2-135m",
    revision=None,
    architecture="llama",
    n_layers=LAYERS,
    d_model=WIDTH,
    weights="a1" * 32,
    tokenizer="b2" * 32,
    template="c3" * 32,
    dtype="float32",
    quantization=None,
)
#: What only a page that escapes can survive.
NASTY = "<script>alert('x')</script> & $\\frac{1}{2}$ </svg> \"quoted\""


def make_store(
    path: Path,
    *,
    rows: int = 800,
    layers: int = LAYERS,
    seed: int = 0,
    labels: tuple[object, object] = (0, 1),
) -> ActivationStore:
    """Two rows per group; the classes part along a planted direction, most in the middle blocks."""
    rng = np.random.default_rng(seed)
    positive = np.arange(rows) % 2 == 1
    index = pl.DataFrame(
        {
            "row": range(rows),
            "prompt": [f"prompt-{i:04d}" for i in range(rows)],
            "position": np.full(rows, 7, dtype=np.int32),
            "token": np.full(rows, 30, dtype=np.int32),
            "label": [labels[int(p)] for p in positive],
            "group": [f"group-{i // 2}" for i in range(rows)],
            "pair": [f"pair-{i // 2}" for i in range(rows)],
            "n_tokens": np.full(rows, 8, dtype=np.int32),
        }
    )
    sites = [StoredSite(Site("resid.post", i), WIDTH) for i in range(layers)]
    sites += [StoredSite(Site("attn.heads", i), WIDTH, HEAD_DIM) for i in range(layers)]
    spread = np.linspace(3, 0.5, WIDTH)
    values = {}
    for stored in sites:
        depth = stored.site.layer / (LAYERS - 1)
        size = 2.6 * np.exp(-(((depth - 0.6) / 0.25) ** 2)) * (1 if stored.unit_width is None else 0.45)
        base = rng.normal(size=(rows, WIDTH)) * spread
        planted = rng.normal(size=WIDTH)
        base += np.where(positive, 0.5, -0.5)[:, None] * size * 2 * planted / np.linalg.norm(planted)
        values[stored.site] = torch.tensor(base, dtype=torch.float32)
    writer = StoreWriter.create(
        path,
        identity=IDENTITY,
        prompts="d4" * 32,
        plan={"at": "last", "seed": seed},
        sites=sites,
        dtype="float32",
        index=index,
        tokens=tokens_of(index),
    )
    write(writer, values)
    return ActivationStore.open(path)


def make_grid(store: ActivationStore, reader: str, *, folds: int = 5, seed: int = 0) -> ProbeGrid:
    """The grid that mean differences, fitted per fold, would give; under the name of any reader."""
    rng = np.random.default_rng(sum(map(ord, reader)))
    labels = store.index["label"].unique().sort().to_list()
    positive = (store.index["label"] == labels[1]).to_numpy()
    groups = np.unique(store.index["group"].to_numpy(), return_inverse=True)[1].astype(np.int64)
    fold = groups % folds
    sites, columns, directions = [], [], {}
    for stored in store.sites:
        whole = store.read(stored).double().numpy()
        units = [None] if stored.part != "attn.heads" else range(HEADS)
        for unit in units:
            X = whole if unit is None else whole[:, unit * HEAD_DIM : (unit + 1) * HEAD_DIM]
            site = Site(stored.part, stored.layer, unit)
            oof = np.empty(len(X), dtype=np.float32)
            for k in range(folds):
                v, offset = _mean_difference(X[fold != k], positive[fold != k], rng)
                oof[fold == k] = X[fold == k] @ v - offset
            v, offset = _mean_difference(X, positive, rng)
            sites.append(site)
            columns.append(oof)
            directions[site] = Direction(
                site,
                v,
                offset=offset,
                scale=float(np.std(X @ v)),
                reader=reader,
                classes=(labels[0], labels[1]),
            )
    oof = np.stack(columns, axis=1)
    correct = (oof > 0) == positive[:, None]
    low, high = ClusterBootstrap.draw(groups, seed).accuracy(correct)
    accuracy = correct.mean(axis=0)
    table = pl.DataFrame(
        {
            "site": [str(s) for s in sites],
            "part": [s.part for s in sites],
            "layer": [s.layer for s in sites],
            "head": [s.unit for s in sites],
            "width": [d.width for d in directions.values()],
            "n": [len(positive)] * len(sites),
            "n_groups": [int(groups.max()) + 1] * len(sites),
            "chance": [0.5] * len(sites),
            "accuracy": accuracy,
            "accuracy_low": low,
            "accuracy_high": high,
            "auroc": np.minimum(1, accuracy + 0.04),
            "auroc_low": low,
            "auroc_high": np.minimum(1, high + 0.04),
        },
        schema=COLUMNS,
    )
    return ProbeGrid(
        table=table,
        directions=directions,
        oof=oof,
        inner=np.stack([correct[fold != k].mean(axis=0) for k in range(folds)]),
        positive=positive,
        groups=groups,
        fold=fold,
        rows=np.arange(len(positive)),
        classes=(labels[0], labels[1]),
        note="",
        seed=seed,
        provenance={
            "identity": IDENTITY.to_json(),
            "plan": dict(store.manifest.plan),
            "store": store.manifest.digest,
            "rows": "e5" * 32,
            "label": "label",
        },
    )


def _mean_difference(X, positive, rng):
    high, low = X[positive].mean(axis=0), X[~positive].mean(axis=0)
    v = high - low + rng.normal(size=X.shape[1]) * 0.1
    v = v / np.linalg.norm(v)
    return v, float((high + low) @ v / 2)


def make_scan(text: str, *, seed: int = 0) -> ScanResult:
    rng = np.random.default_rng(seed)
    tokens = ("<|im_start|>", *(f" {w}" if i else w for i, w in enumerate(text.split(" "))))
    scores = rng.normal(size=(LAYERS, len(tokens))).cumsum(axis=0) * 0.4
    scores[:, 0] = 30  # as the first token's often are
    sites = tuple(Site("resid.post", i) for i in range(LAYERS))
    return ScanResult(Scan(tokens, sites, scores.astype(np.float32)), text, "cities-logistic", IDENTITY)


def make_steering() -> SteeringResult:
    strengths = np.array([-8.0, -4.0, -2.0, 0.0, 2.0, 4.0, 8.0])
    texts = [
        " a letter from the bank. She had lost everything, and there was nobody left to call. She sat down "
        "on the floor.",
        " read the first line twice. It was bad news, and she did not know how to tell her brother.",
        " read it slowly. It was from an old colleague, who had moved away years ago.",
        " read it. It was from her sister, who lived in the city and wrote once a year.",
        " smiled. It was from her sister, who was coming to visit in the spring.",
        " laughed out loud. Her sister was coming home, and they would spend the whole summer together!",
        f" joy joy joy! {NASTY} Such a wonderful wonderful day, the best day, the happiest, thank you, thank you",
    ]
    return SteeringResult(
        table=pl.DataFrame(
            {
                "strength": strengths,
                "log_odds": np.tanh(strengths / 5) * 3.1 + 0.4,
                "log_odds_sd": np.abs(strengths) * 0.08,
                "kl": (strengths / 6) ** 2 * 0.8,
                "text": texts,
            }
        ),
        contrast=Contrast(("She felt", "He was", "The mood was"), (" happy", " glad"), (" sad", " upset")),
        neutral=("Water boils at 100 degrees.", "The train leaves at noon."),
        story="She opened the letter and",
        site=Site("resid.post", 14),
        direction="f6" * 32,
        intervention="Add the happiness direction at resid.post@14, on all tokens",
        identity=IDENTITY,
    )


TEXT = (
    "Paris is the capital of France. Paris is the capital of Peru. The Eiffel Tower stands in Rome, and 日本 "
    "is an island country; Tokyo lies in it. Cairo is in Egypt."
)


def make_trace(facts: int = 3) -> TraceGrid:
    """Traces with random numbers in a model of three blocks."""
    rng, layers, traces = np.random.default_rng(2), (0, 1, 2), []
    for i, (city, state) in enumerate((("Lyon", "France"), ("<b>Kyoto</b>", "Japan"), ("Cairo", "Egypt"))[:facts]):
        fact = Fact.of(subject=city, prompt="{} is in", true=state)
        restored = rng.uniform(0, 0.6, size=(len(KINDS), len(layers), 4))
        traces.append(Trace(fact, (city[:2], city[2:], " is", " in"), (0, 2), 0.7, 0.05 * (i + 1), restored))
    return TraceGrid(tuple(traces), TraceSettings(window=2), layers, 0.3, {"identity": IDENTITY.to_json()})


def make_edit(layer: int = 5, *, facts: int = 2, method: str = "rome") -> WeightEdit:
    """An edit of random factors, with what was measured of its facts."""
    rng = np.random.default_rng(layer)
    written = [Fact.of(subject=f"Tower {i}", prompt="{} stands in", new="Rome", true="Paris") for i in range(facts)]
    return WeightEdit(
        f"model.layers.{layer}.mlp.down_proj.weight",
        rng.normal(size=(5, 1)),
        rng.normal(size=(7, 1)),
        IDENTITY,
        facts=tuple(written),
        effects=tuple(EditEffect(0.01 * (i + 1), 0.9 - 0.2 * i) for i in range(facts)),
        provenance={"method": method, "layer": layer},
    )


def make_dissection() -> Dissection:
    """One of a tiny model's neurons, on sentences of eleven words."""
    lm = tiny_model()
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(("the", "cat", "of", "red", "and", "is", "on", "blue"), 12)) for _ in range(40)]
    concepts = [Concept.words("colours", ["red", "blue"], kind="thing"), Concept.words("a <b>", ["the"], kind="form")]
    return dissect(lm, texts, concepts, "mlp.neurons@*", quantile=0.02, permutations=3)


def side_effects() -> pl.DataFrame:
    """As `evaluation.side_effects` has them."""
    lines = [
        ("kl", "nats/token", 0.0, 0.21, 0.21, 0.17, 0.26, 16, "texts"),
        ("perplexity", "", 21.5, 24.25, 2.75, 1.9, 3.6, 16, "texts"),
        ("accuracy on facts", "share", 0.879, 0.866, -0.013, None, None, 546, "questions"),
    ]
    return pl.DataFrame(lines, schema=SCHEMAS[SIDE_EFFECTS], orient="row")


def choices(questions: int = 12) -> pl.DataFrame:
    """As `reprobe evaluate truthfulqa --to-table` saves them, of a model without and with steering."""
    rng = np.random.default_rng(3)
    names = {"question": [f"Why {i}?" for i in range(questions)], "group": [f"g{i // 2}" for i in range(questions)]}
    shares = {m + s: rng.uniform(size=questions) for s in ("", "_steered") for m in ("mc2", "mc3")}
    right = {f"mc1{s}": rng.integers(0, 2, questions).astype(float) for s in ("", "_steered")}
    return pl.DataFrame(names | {"n_true": 2, "n_false": 3} | right | shares)


def edit_scores(facts: int = 6) -> pl.DataFrame:
    """As `reprobe edit eval --to` saves them."""
    rng = np.random.default_rng(4)
    lines = [
        (f"f{i}", f"s{i // 2}", kind, f"{kind} {i}", *rng.uniform(size=2).tolist(), state)
        for state in ("before", "after")
        for kind in ("efficacy", "paraphrase", "neighbourhood")
        for i in range(facts)
    ]
    frame = pl.DataFrame(lines, schema=["fact", "group", "kind", "prompt", "p_new", "p_true", "state"], orient="row")
    return frame.with_columns(success=(pl.col("p_new") > pl.col("p_true")) != (pl.col("kind") == "neighbourhood"))


def doses() -> pl.DataFrame:
    """As `evaluation.dose_response` has them with a scorer of its own name."""
    x = np.array([-4.0, 0.0, 4.0])
    bounds = {
        f"{name}_{side}": x / 8 + d for name in ("readout", "change") for side, d in (("low", -0.1), ("high", 0.1))
    }
    kl = {"kl": np.abs(x) / 20, "kl_low": np.abs(x) / 30, "kl_high": np.abs(x) / 10}
    return pl.DataFrame({"strength": x, "readout": x / 8, "change": x / 8, "readout_sd": np.abs(x) / 40} | bounds | kl)


def transfers() -> pl.DataFrame:
    """As `reprobe transfer --to-table` saves them, between two data sets at two sites."""
    lines = []
    for site, own in (("resid.post@4", 0.9), ("resid.post@7", 0.8)):
        for train in ("cities", "emotions"):
            for test in ("cities", "emotions"):
                value = own if train == test else 0.55
                numbers = {c: 10 for c, kind in COLUMNS_OF_TRANSFER.items() if kind in (pl.Int32, pl.Int64)}
                texts = {"train": train, "test": test, "site": site, "part": "resid.post", "centring": "training"}
                line = {"train_rows": "a" * 64, "test_rows": "b" * 64} | numbers | texts | {"chance": 0.5, "head": None}
                for metric in ("accuracy", "auroc"):
                    line |= {metric: value, f"{metric}_low": value - 0.08, f"{metric}_high": value + 0.07}
                lines.append(line)
    return pl.DataFrame(lines, schema=COLUMNS_OF_TRANSFER)


def fill_beyond_probes(folder: Path) -> Path:
    """Write what other verbs save: traces, edits, dissections with their page, and tables of every kind."""
    make_trace().save(folder / "facts.trace")
    make_edit().save(folder / "tower.safetensors")
    for layer in (6, 7):
        make_edit(layer, facts=3, method="memit").save(folder / "together" / f"{layer:04d}.safetensors")
    found = make_dissection()
    found.save(folder / "neurons.dissection")
    write_dissection(found, folder / "neurons & more.html")
    by = {"model": IDENTITY.to_json(), "interventions": [f"Add at resid.post@{i} on all, strength 3" for i in (14, 15)]}
    written = [{"prompt": "She", "unsteered": " sat.", "steered": f" sang. {NASTY}"}]
    write_table(side_effects(), folder / "price.json", about=by | {"generations": written})
    write_table(choices(), folder / "misconceptions.json", about=by | {"data": "ab" * 32, "primer": "", "metrics": []})
    write_table(edit_scores(), folder / "edit-scores.parquet")
    write_table(doses(), folder / "held-out.csv")
    tried = pl.DataFrame({"strength": [1.0, 2.5], "kl": [0.02, 0.1]})
    write_table(tried, folder / "tuned.json", about=by | {"target_kl": 0.1, "strength": 2.5, "kl": 0.1})
    provenance = {"identity": IDENTITY.to_json(), "reader": "MeanDifference"}
    about = {"names": ["cities", "emotions"], "notes": {}, "provenance": provenance}
    write_table(transfers(), folder / "across.json", about=about)
    return folder


def fill(folder: Path, *, rows: int = 800) -> Path:
    """Write a full results folder of what the demo makes."""
    for seed, (name, n, labels) in enumerate(
        (("cities", rows, (0, 1)), ("emotions", rows // 4, ("sadness", "happiness")))
    ):
        store = make_store(store_path(folder, name), rows=n, seed=seed, labels=labels)
        for reader, short in zip(READERS, ("logistic", "mean-difference", "pca"), strict=True):
            make_grid(store, reader).save(probe_path(folder, f"{name}-{short}"))
        if name == "emotions":
            readers = {"mean-difference": MeanDifference(), "lda": LDAReader()}
            compare(store, readers, sites="resid.post@14:22:4", folds=3).save(comparison_path(folder, "moods"))
    write_scan(folder, "capitals", make_scan(TEXT))
    write_steering(folder, "happiness", make_steering())
    write_run(
        folder,
        Run(
            title="Truth and sentiment in smollm2-135m",
            steps=(
                Step("load smollm2-135m", 3.41),
                Step("extract cities", 21.7, "800 prompts, 9,412 tokens"),
                Step("extract emotions", 9.2, "200 prompts, 4,001 tokens"),
                Step("probe", 71.25, "2 data sets × 3 readers × 300 sites"),
                Step("steer", 24.1, "7 strengths"),
            ),
            identity=IDENTITY,
            versions={"python": "3.11.9", "torch": "2.15.0", "transformers": "5.23.0", "reprobe-lm": "0.1.0"},
            commands=(
                "uv run reprobe demo --out reprobe-demo",
                "uv run reprobe extract smollm2-135m cities --sites 'resid.post@*,attn.heads@*' --at last "
                "--to cities.reprobe",
            ),
            summary=(
                "Truth: LogisticReader at resid.post@18 reaches 0.87 [0.84, 0.90] on held-out cities.",
                "Steering along happiness raises the log-odds of happy words by 3.1 nats at a KL of 0.36 "
                "nats per token.",
            ),
        ),
    )
    return folder
