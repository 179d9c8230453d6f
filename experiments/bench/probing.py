"""Logistic probes of many sites, folds and penalties, against a loop over scikit-learn; all sides in turn.

    uv run python experiments/bench/probing.py [--work NAME …] [--repeats N] [--synthetic] [--json F] [--markdown F]

Enters: names of works. Leaves: JSON with each work's claims, targets and measured ratios, the seconds of every side,
and the machine. Both sides hold the same float64 rows in memory; reading a store is measured in reading.py.

heads    every head of SmolLM2-135M on TruthfulQA's question-answer pairs, 2 folds of questions (needs REPROBE_DATA)
layers   the last token of `cities` statements at every block, 5 folds of whole cities × 10 penalties
bootstrap  1,000 resamples of whole groups of the AUROC of 1,000 probes
memory   a made-up store 20 times as large as the memory allowed, read once for four methods at 30 sites

scikit-learn's side standardises by each fold's training rows and fits `LogisticRegression` at its default solver and
tolerance, one fold, penalty and site at a time. With --synthetic, rows are drawn at random, correlated as hidden states
are, in the shapes that --rows and the works give.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import torch
from race import Side, Timing, race
from record import Claim, Recorder, Work, add_outputs
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import reprobe as rp
from reprobe.model import ModelIdentity, Site
from reprobe.probing.crossval import group_folds
from reprobe.probing.intervals import ClusterBootstrap
from reprobe.probing.logistic import solve_many
from reprobe.store import StoredSite, StoreWriter

C = 0.1
PATH = np.logspace(-4, 0, 10)
#: Layers that scikit-learn's side of `layers` works through; its time is scaled to all.
SAMPLE = 5


class LeftOut(Exception):
    """Why a work cannot be done here."""


@dataclass(frozen=True)
class Rows:
    """Sites of one width, labels, and the fold in which each row is held out."""

    about: str
    X: np.ndarray  # (sites, rows, width) float64
    positive: np.ndarray
    fold: np.ndarray

    @property
    def kept(self) -> np.ndarray:
        return np.stack([self.fold != k for k in range(self.fold.max() + 1)])


def synthetic(sites: int, rows: int, width: int, folds: int, seed: int = 0) -> Rows:
    """Rows whose variances fall off as a power of their rank, in pairs of opposite labels."""
    rng = np.random.default_rng(seed)
    groups = np.arange(rows) // 2
    positive = np.arange(rows) % 2 == 1
    X = np.empty((sites, rows, width))
    for site in X:
        mix = np.linalg.qr(rng.standard_normal((width, width)))[0] * np.arange(1, width + 1)[:, None] ** -0.7
        axis = rng.standard_normal(width)
        site[:] = (rng.standard_normal((rows, width)) + 0.1 * np.outer(positive - 0.5, axis)) @ mix
    return Rows(f"synthetic, {rows:,} rows", X, positive, group_folds(groups, positive, folds, seed))


def read(data: rp.PromptSet, sites: str, unit: int | None, folds: int) -> Rows:
    """The rows of a bundled model's sites, split into units of that width."""
    lm = rp.LanguageModel.load("smollm2-135m")
    with tempfile.TemporaryDirectory() as folder:
        store = rp.extract(lm, data, sites=sites, at="last", to=Path(folder) / "s.reprobe")
        values = [store.read(site).double().numpy() for site in store.sites]
        index = store.index
    split = [x if unit is None else x.reshape(len(x), -1, unit).transpose(1, 0, 2) for x in values]
    X = np.stack(split) if unit is None else np.concatenate(split)
    positive = index["label"].to_numpy() == 1
    groups = np.unique(index["group"].to_numpy(), return_inverse=True)[1]
    return Rows(f"{data.name}, {len(positive):,} rows", X, positive, group_folds(groups, positive, folds, seed=0))


def truthfulqa() -> rp.PromptSet:
    path = Path(os.environ.get("REPROBE_DATA", "")) / "truthfulqa" / "mc_task.json"
    if not path.is_file():
        raise LeftOut("REPROBE_DATA names no folder with truthfulqa/mc_task.json; --synthetic goes without")
    return rp.PromptSet.load(path)


# -- sides ----------------------------------------------------------------------------------------------------


def together(rows: Rows, path: Sequence[float]) -> np.ndarray:
    """Ours: right answers among held-out rows, (sites, penalties)."""
    kept = rows.kept
    found = solve_many(
        torch.from_numpy(rows.X),
        torch.from_numpy(rows.positive),
        torch.tensor(np.tile(path, len(kept))),
        torch.from_numpy(kept.repeat(len(path), axis=0)),
    )
    worst = float(found.error.max())
    if worst > 1e-5:
        raise ArithmeticError(f"a fit stopped with weights off by up to {worst:.1e}")
    right = np.zeros((len(rows.X), len(path)), dtype=int)
    for s, X in enumerate(rows.X):
        scores = X @ found.weights[s].numpy().T + found.intercept[s].numpy()
        for k in range(len(kept)):
            held_out = rows.fold == k
            guessed = scores[held_out, k * len(path) : (k + 1) * len(path)] > 0
            right[s] += (guessed == rows.positive[held_out, None]).sum(axis=0)
    return right


def sample(rows: Rows, sites: int) -> np.ndarray:
    """The numbers of that many sites, evenly from the first to the last."""
    return np.linspace(0, len(rows.X) - 1, sites).round().astype(int)


def one_by_one(rows: Rows, path: Sequence[float], sites: np.ndarray, tol: float = 1e-4) -> np.ndarray:
    """scikit-learn's: as `together`, of these sites."""
    right = np.zeros((len(sites), len(path)), dtype=int)
    for s, X in enumerate(rows.X[sites]):
        for k, kept in enumerate(rows.kept):
            for c, penalty in enumerate(path):
                model = make_pipeline(StandardScaler(), LogisticRegression(C=penalty, max_iter=10_000, tol=tol))
                model.fit(X[kept], rows.positive[kept])
                right[s, c] += (model.predict(X[rows.fold == k]) == rows.positive[rows.fold == k]).sum()
    return right


def one_fit_each(rows: Rows) -> None:
    """One fit per site, on all rows, at one penalty; by the same solver, site after site."""
    labels = torch.from_numpy(rows.positive)
    for X in rows.X:
        solve_many(torch.from_numpy(X)[None], labels, C)


# -- works ----------------------------------------------------------------------------------------------------


def heads(options: argparse.Namespace) -> tuple[str, list[Claim], list[Timing]]:
    rows = (
        synthetic(270, options.rows or 1500, 64, 2) if options.synthetic else read(truthfulqa(), "attn.heads@*", 64, 2)
    )
    fits, everywhere = len(rows.X) * 2, np.arange(len(rows.X))
    answers: dict[str, np.ndarray] = {}
    times = run(
        options,
        Side("reprobe", lambda: answers.update(ours=together(rows, [C])), fits),
        Side("scikit-learn", lambda: answers.update(theirs=one_by_one(rows, [C], everywhere)), fits),
    )
    off = np.abs(answers["ours"] - answers["theirs"])[:, 0]
    worst = np.argsort(-off)[:10]
    converged = one_by_one(rows, [C], worst, tol=1e-10)
    claims = [
        Claim("times as fast as scikit-learn, one by one", times["scikit-learn"].best / times["reprobe"].best, "≥", 5),
        Claim("right answers apart, at the head where most", int(off.max()), "≤", 1),
        Claim(
            "the same at the ten worst heads, once scikit-learn has converged (tol=1e-10)",
            int(np.abs(answers["ours"][worst] - converged).max()),
            "≤",
            1,
        ),
    ]
    return f"{rows.about}; {len(rows.X)} heads × 2 folds", claims, list(times.values())


def layers(options: argparse.Namespace) -> tuple[str, list[Claim], list[Timing]]:
    if options.synthetic:
        rows = synthetic(30, options.rows or 842, 576, 5)
    else:
        rows = read(rp.PromptSet.load("cities"), "resid.post@*", None, 5)
    fits = len(rows.X) * 5 * len(PATH)
    few = sample(rows, min(SAMPLE, len(rows.X)))
    times = run(
        options,
        Side("reprobe, all folds and penalties", lambda: together(rows, PATH), fits),
        Side("reprobe, one fit per layer", lambda: one_fit_each(rows), len(rows.X)),
        Side("scikit-learn", lambda: one_by_one(rows, PATH, few), fits * len(few) // len(rows.X), of_tokens=fits),
    )
    ours, single, theirs = (times[name].best for name in times)
    claims = [
        Claim("time, in times that of one fit per layer", ours / single, "≤", 3),
        Claim("times as fast as scikit-learn, one by one", theirs / ours, "≥", 10),
    ]
    about = f"{rows.about}; {len(rows.X)} layers × 5 folds × {len(PATH)} penalties, C = {PATH[0]:g} … {PATH[-1]:g}"
    return about + f"; scikit-learn on {len(few)} layers, scaled", claims, list(times.values())


def bootstrap(options: argparse.Namespace) -> tuple[str, list[Claim], list[Timing]]:
    rng = np.random.default_rng(0)
    n, probes = options.rows or 842, 1000
    groups, positive = np.arange(n) // 2, np.arange(n) % 2 == 1
    fold = group_folds(groups, positive, 5, seed=0)
    scores = rng.standard_normal((probes, n)) + positive
    bounds = np.empty((probes, 2))

    def resample() -> None:
        drawn = ClusterBootstrap.draw(groups, seed=0)
        bounds[:] = [drawn.auroc(s, positive, fold) for s in scores]

    times = run(options, Side("reprobe", resample, probes))
    assert np.isfinite(bounds).all()
    about = f"{probes:,} probes, {n:,} rows in {n // 2} groups, 1,000 resamples, on one thread"
    return about, [Claim("seconds", times["reprobe"].best, "≤", 20)], list(times.values())


def memory(options: argparse.Namespace) -> tuple[str, list[Claim], list[Timing]]:
    limit, layers, width = options.limit << 20, 30, 576
    n = 20 * limit // (layers * width * 4)
    sites = [StoredSite(Site("resid.post", i), width) for i in range(layers)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "s.reprobe"
        write_rows(path, sites, n)
        size = sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
        script = Path(__file__).with_name("streamed.py")
        done = subprocess.run([sys.executable, script, path, str(limit)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
    told = json.loads(done.stdout)
    claims = [
        Claim("times the memory allowed, the store's size", size / limit, "≥", 20),
        Claim("times the store was read", told["reads"], "≤", 1),
        Claim("GB resident at most", told["peak"] / 1e9, "≤", 2),
    ]
    about = (
        f"{n:,} rows × {layers} sites of width {width} in float32, {size / 1e9:.1f} GB; {limit / 2**20:,.0f} MiB "
        f"of data allowed by RLIMIT_DATA; {told['fits']} fits of mean difference, LDA, PCA and LEACE"
    )
    return about, claims, [Timing("reprobe", n, n, (told["seconds"],))]


def write_rows(path: Path, sites: list[StoredSite], n: int) -> None:
    """A store of n made-up rows, correlated and off centre, with labels that they tell a little of."""
    rng = np.random.default_rng(0)
    label = np.arange(n) % 2
    names = [f"{i:08}" for i in range(n)]
    index = pl.DataFrame(
        {
            "row": pl.Series(range(n), dtype=pl.UInt64),
            "prompt": names,
            "position": pl.Series(np.zeros(n), dtype=pl.Int32),
            "token": pl.Series(np.full(n, 5), dtype=pl.Int32),
            "label": label == 1,
            "group": pl.Series(np.arange(n) // 2).cast(pl.String),
            "pair": pl.Series([None] * n, dtype=pl.String),
            "n_tokens": pl.Series(np.ones(n), dtype=pl.Int32),
        }
    )
    tokens = pl.DataFrame({"prompt": names, "tokens": pl.Series([[5]] * n, dtype=pl.List(pl.Int32))})
    mix = torch.from_numpy(np.linalg.qr(rng.standard_normal((sites[0].width,) * 2))[0].astype(np.float32))
    mix = mix * torch.arange(1, len(mix) + 1)[:, None] ** -0.7
    with StoreWriter.create(
        path,
        identity=ModelIdentity("made up", None, "none", 30, 576, "0" * 64, "0" * 64, None, "float32", None),
        prompts="0" * 64,
        plan={"at": "last"},
        sites=sites,
        dtype="float32",
        index=index,
        tokens=tokens,
    ) as writer:
        for shard in writer.missing():
            draw = torch.Generator().manual_seed(shard.number)
            rows = torch.randn(shard.stop - shard.start, len(mix), generator=draw)
            rows[:, 0] += torch.from_numpy(label[shard.start : shard.stop]).float()
            mixed = rows @ mix + 1
            writer.write_shard(shard.number, {s.site: mixed + i for i, s in enumerate(sites)})


WORKS: dict[str, Callable[[argparse.Namespace], tuple[str, list[Claim], list[Timing]]]] = {
    "heads": heads,
    "layers": layers,
    "bootstrap": bootstrap,
    "memory": memory,
}


def run(options: argparse.Namespace, *sides: Side) -> dict[str, Timing]:
    """What `race` calls tokens are fits here."""
    return race(sides, options.repeats)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", nargs="+", choices=WORKS, default=list(WORKS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rows", type=int, help="rows of the synthetic sites")
    parser.add_argument("--synthetic", action="store_true")
    parser.add_argument("--limit", type=int, default=1900, help="MiB of memory allowed in the work `memory`")
    add_outputs(parser)
    options = parser.parse_args()
    shown = ["--work", *options.work, "--repeats", str(options.repeats)]
    shown += [] if options.rows is None else ["--rows", str(options.rows)]
    shown += [*(["--synthetic"] if options.synthetic else []), "--limit", str(options.limit)]
    record = Recorder("Probing", f"uv run python experiments/bench/probing.py {' '.join(shown)}", options)
    for name in options.work:
        try:
            about, claims, times = WORKS[name](options)
        except LeftOut as error:
            record.leave_out(f"{name}: {error}")
            continue
        record.add(Work(name, "", about, claims, times))
    print(record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
