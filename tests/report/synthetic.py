"""A results folder as the demo makes one: random activations with a planted direction."""

from pathlib import Path

import numpy as np
import polars as pl
import torch
from store.synthetic import tokens as tokens_of

from reprobe.evaluation import Contrast
from reprobe.methods.repe import Scan
from reprobe.model.identity import ModelIdentity
from reprobe.model.sites import Site
from reprobe.probing import LDAReader, MeanDifference, compare
from reprobe.probing.direction import Direction
from reprobe.probing.intervals import ClusterBootstrap
from reprobe.probing.probe_grid import COLUMNS, ProbeGrid
from reprobe.report import (
    Run,
    ScanResult,
    SteeringResult,
    Step,
    comparison_path,
    probe_path,
    store_path,
    write_run,
    write_scan,
    write_steering,
)
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
    with writer:
        for shard in writer.missing():
            writer.write_shard(shard.number, {s: v[shard.start : shard.stop] for s, v in values.items()})
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
    return ScanResult(Scan(tokens, sites, scores.astype(np.float32)), text, "cities-logistic")


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
    )


TEXT = (
    "Paris is the capital of France. Paris is the capital of Peru. The Eiffel Tower stands in Rome, and 日本 "
    "is an island country; Tokyo lies in it. Cairo is in Egypt."
)


def fill(folder: Path, *, rows: int = 800) -> Path:
    """Write a full results folder."""
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
