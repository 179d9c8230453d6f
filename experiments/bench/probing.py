"""Logistic probes of many sites, folds and penalties, against a loop over scikit-learn; all sides in turn.

    uv run python experiments/bench/probing.py [--work heads layers] [--repeats N] [--synthetic] [--json F]

Enters: names of works. Leaves: JSON with each work's claims, targets and measured ratios, the seconds of every side,
and the machine. Both sides hold the same float64 rows in memory; reading a store is measured in reading.py.

heads    every head of SmolLM2-135M on TruthfulQA's question-answer pairs, 2 folds of questions (needs REPROBE_DATA)
layers   the last token of `cities` statements at every block, 5 folds of whole cities × 10 penalties

scikit-learn's side standardises by each fold's training rows and fits `LogisticRegression` at its default solver and
tolerance, one fold, penalty and site at a time. With --synthetic, rows are drawn at random, correlated as hidden states
are, in the shapes that --rows and the works give.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from race import Side, Timing, race
from record import Claim, machine
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import reprobe as rp
from reprobe.probing.crossval import group_folds
from reprobe.probing.logistic import solve_many
from reprobe.provenance import write_durably

C = 0.1
PATH = np.logspace(-4, 0, 10)
#: Layers that scikit-learn's side of `layers` works through; its time is scaled to all.
SAMPLE = 3


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
    worst = float(found.gradient.max())
    if worst > 1e-6:
        raise ArithmeticError(f"a fit stopped at a gradient of {worst:.1e}")
    right = np.zeros((len(rows.X), len(path)), dtype=int)
    for s, X in enumerate(rows.X):
        scores = X @ found.weights[s].numpy().T + found.intercept[s].numpy()
        for k in range(len(kept)):
            held_out = rows.fold == k
            guessed = scores[held_out, k * len(path) : (k + 1) * len(path)] > 0
            right[s] += (guessed == rows.positive[held_out, None]).sum(axis=0)
    return right


def one_by_one(rows: Rows, path: Sequence[float], sites: int) -> np.ndarray:
    """scikit-learn's: as `together`, of the first sites."""
    right = np.zeros((sites, len(path)), dtype=int)
    for s, X in enumerate(rows.X[:sites]):
        for k, kept in enumerate(rows.kept):
            for c, penalty in enumerate(path):
                model = make_pipeline(StandardScaler(), LogisticRegression(C=penalty, max_iter=1000))
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
    fits = len(rows.X) * 2
    answers: dict[str, np.ndarray] = {}
    times = run(
        options,
        Side("reprobe", lambda: answers.update(ours=together(rows, [C])), fits),
        Side("scikit-learn", lambda: answers.update(theirs=one_by_one(rows, [C], len(rows.X))), fits),
    )
    apart = int(np.abs(answers["ours"] - answers["theirs"]).max())
    claims = [
        Claim("times as fast as scikit-learn, one by one", times["scikit-learn"].best / times["reprobe"].best, "≥", 5),
        Claim("right answers apart, at the head where most", apart, "≤", 1),
    ]
    return f"{rows.about}; {len(rows.X)} heads × 2 folds", claims, list(times.values())


def layers(options: argparse.Namespace) -> tuple[str, list[Claim], list[Timing]]:
    if options.synthetic:
        rows = synthetic(30, options.rows or 842, 576, 5)
    else:
        rows = read(rp.PromptSet.load("cities"), "resid.post@*", None, 5)
    fits = len(rows.X) * 5 * len(PATH)
    sample = min(SAMPLE, len(rows.X))
    times = run(
        options,
        Side("reprobe, all folds and penalties", lambda: together(rows, PATH), fits),
        Side("reprobe, one fit per layer", lambda: one_fit_each(rows), len(rows.X)),
        Side("scikit-learn", lambda: one_by_one(rows, PATH, sample), fits * sample // len(rows.X), of_tokens=fits),
    )
    ours, single, theirs = (times[name].best for name in times)
    claims = [
        Claim("time, in times that of one fit per layer", ours / single, "≤", 3),
        Claim("times as fast as scikit-learn, one by one", theirs / ours, "≥", 10),
    ]
    about = f"{rows.about}; {len(rows.X)} layers × 5 folds × {len(PATH)} penalties, C = {PATH[0]:g} … {PATH[-1]:g}"
    return about + f"; scikit-learn on {sample} layers, scaled", claims, list(times.values())


WORKS: dict[str, Callable[[argparse.Namespace], tuple[str, list[Claim], list[Timing]]]] = {
    "heads": heads,
    "layers": layers,
}


def run(options: argparse.Namespace, *sides: Side) -> dict[str, Timing]:
    """What `race` calls tokens are fits here."""
    return race(sides, options.repeats, tidy=lambda: None, say=lambda _: None)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", nargs="+", choices=WORKS, default=list(WORKS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rows", type=int, help="rows of the synthetic sites")
    parser.add_argument("--synthetic", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    record = {"machine": machine(), "repeats": options.repeats, "load": [os.getloadavg()[0]], "works": []}
    for name in options.work:
        try:
            about, claims, times = WORKS[name](options)
        except LeftOut as error:
            record["works"].append({"work": name, "left out": str(error)})
            continue
        record["works"].append(
            {
                "work": name,
                "about": about,
                "claims": [
                    {
                        "what": c.what,
                        "measured": round(c.measured, 3),
                        "target": f"{c.relation} {c.target:g}",
                        "met": bool(c.met),
                    }
                    for c in claims
                ],
                "seconds": {t.name: [round(s, 3) for s in t.seconds] for t in times},
            }
        )
    record["load"].append(os.getloadavg()[0])
    text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
    print(text)
    if options.json is not None:
        write_durably(options.json, text.encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
