"""Is truth read by every reader, on every data set, and does it carry over? Both bundled models.

    uv run python experiments/truth.py [--models smollm2-135m gemma3-270m] [--out experiments/truth] [--stores DIR]

Enters: the project's statements (cities, negations, translations, comparisons) and, where REPROBE_DATA names a folder
that has them, those of Geometry-of-Truth. Leaves, per model: readers.csv (nested cross-validation: reader and site
judged on groups that neither has seen), transfer.csv (trained on each data set, tested on each), transfer maps, and
README.md, into which notes.md goes, what a reader made of the figures. Stores are made anew unless --stores has them.
"""

import argparse
import dataclasses
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import polars as pl

import reprobe as rp
from reprobe.probing import READERS, write_table
from reprobe.report import transfer_map
from reprobe.report.transfer import best_on_the_diagonal

OURS = ("cities", "negations", "translations", "comparisons")
PUBLIC = ("cities", "neg_cities", "sp_en_trans", "larger_than")
#: Readers whose transfer is shown.
CARRIED = ("mean-difference", "logistic", "lda")
#: Every third block is probed: neighbours say nearly the same.
SITES = "resid.post@0:{layers}:3"
#: Readers of which a fit takes as long as a hundred others: on our own data only, at every fifth of those sites.
SLOW = ("ccs",)


def data_sets(limit: int | None) -> dict[str, rp.PromptSet]:
    found = {name: rp.PromptSet.load(name) for name in OURS}
    folder = os.environ.get("REPROBE_DATA")
    if folder is not None:
        found |= {
            f"GoT {name}": rp.PromptSet.load(Path(folder) / "geometry_of_truth" / f"{name}.csv") for name in PUBLIC
        }
    else:
        print("Geometry-of-Truth is left out: REPROBE_DATA is not set", file=sys.stderr)
    if limit is not None:
        found = {name: prompts.head(limit) for name, prompts in found.items()}
    return {name: all_in_pairs(prompts) for name, prompts in found.items()}


def all_in_pairs(prompts: rp.PromptSet) -> rp.PromptSet:
    """Without pairs unless every row is one of two sides: readers of pairs then match rows at random, and say so."""
    sides = prompts.frame.group_by("pair").agg(pl.col("label").n_unique())
    if sides["pair"].null_count() == 0 and (sides["label"] == 2).all():
        return prompts
    return dataclasses.replace(prompts, frame=prompts.frame.with_columns(pl.lit(None, pl.String).alias("pair")))


def store_of(lm: rp.LanguageModel, prompts: rp.PromptSet, path: Path) -> rp.ActivationStore:
    if path.exists():
        return rp.ActivationStore.open(path)
    return rp.extract(lm, prompts, sites=SITES.format(layers=lm.n_layers), at="last", to=path)


def compared(name: str, store: rp.ActivationStore) -> pl.DataFrame:
    """One line per reader: held-out results with its choice of site, which differs from fold to fold."""
    readers = {reader: make() for reader, make in READERS.items()}
    quick = {reader: made for reader, made in readers.items() if reader not in SLOW}
    slow = {reader: readers[reader] for reader in SLOW}
    found = [rp.compare(store, quick, seed=0)]
    if name in OURS:
        found.append(rp.compare(store, slow, sites=store.sites[1::5], seed=0))
    print(f"{name}: compared", file=sys.stderr)
    return pl.concat([f.choices.select(pl.lit(name).alias("data"), pl.all()) for f in found])


def polarised(stores: dict[str, rp.ActivationStore]) -> pl.DataFrame:
    """TTPD needs both polarities: fitted on `cities` and `negations` together, in folds of whole cities.

    One site is chosen inside the training rows of each fold, as for the others.
    """
    names = ("cities", "negations")
    index = [stores[n].index.select("row", "label", "group") for n in names]
    y = np.concatenate([i["label"].to_numpy() for i in index]) == 1
    polarity = np.concatenate([np.full(len(i), sign) for i, sign in zip(index, (1, -1), strict=True)])
    groups = np.unique(np.concatenate([i["group"].to_numpy() for i in index]), return_inverse=True)[1]
    fold = rp.probing.group_folds(groups, y, 5, 0)
    X = {s: np.concatenate([stores[n].read(s).double().numpy() for n in names]) for s in stores["cities"].sites}
    right, chosen = np.zeros(len(y), dtype=bool), []
    for k in range(5):
        training = fold != k
        inner = {}
        for site, rows in X.items():
            hits = 0
            for j in set(range(5)) - {k}:
                fit, test = training & (fold != j), fold == j
                reader = rp.TTPDReader().fit(rows[fit], y[fit], polarity=polarity[fit])
                hits += int((reader.predict(rows[test]) == y[test]).sum())
            inner[site] = hits
        best = max(inner, key=lambda site: inner[site])
        chosen.append(best)
        reader = rp.TTPDReader().fit(X[best][training], y[training], polarity=polarity[training])
        right[~training] = reader.predict(X[best][~training]) == y[~training]
    low, high = rp.probing.intervals.share_interval(right[:, None], groups)[:, 0]
    sites = ", ".join(map(str, sorted(set(chosen))))
    line = {
        "data": "cities + negations",
        "reader": "ttpd",
        "sites": sites,
        "n": len(y),
        "n_groups": int(groups.max()) + 1,
    }
    return pl.DataFrame([line | {"chance": 0.5, "accuracy": right.mean(), "accuracy_low": low, "accuracy_high": high}])


def sequences(lm: rp.LanguageModel, prompts: rp.PromptSet, folder: Path) -> pl.DataFrame:
    """Learned pooling over all tokens but the first, against fixed ones, at a few blocks."""
    path = folder / "tokens.reprobe"
    sites = f"resid.post@{lm.n_layers // 4}:{lm.n_layers}:{lm.n_layers // 4}"
    store = rp.ActivationStore.open(path) if path.exists() else rp.extract(lm, prompts, sites=sites, at="all", to=path)
    lines = []
    for pooling in ("attention", "mean", "max", "last"):
        grid = rp.probe_sequences(
            store, rp.AttentionReader(pooling=pooling, C=0.01), where=pl.col("position") > 0, folds=3
        )
        selected = grid.selected
        lines.append(
            {
                "data": f"cities ({len(prompts)})",
                "reader": f"pooling: {pooling}",
                "sites": ", ".join(map(str, sorted(set(selected.sites)))),
                "n": selected.n,
                "n_groups": selected.n_groups,
                "chance": selected.chance,
                "accuracy": selected.accuracy,
                "accuracy_low": selected.accuracy_low,
                "accuracy_high": selected.accuracy_high,
            }
        )
    return pl.DataFrame(lines)


def carried(stores: dict[str, rp.ActivationStore], out: Path) -> tuple[pl.DataFrame, list[str]]:
    """All pairs of data sets at all sites; and the matrices at the site that is best where train and test are one."""
    tables, text = [], []
    for reader in CARRIED:
        grid = rp.transfer(stores, READERS[reader](), transductive=True, seed=0)
        tables.append(grid.table.select(pl.lit(reader).alias("reader"), pl.all()))
        site = best_on_the_diagonal(grid)
        transfer_map(grid, site, title=f"{reader} at {site}").savefig(out / f"transfer-{reader}.svg")
        for centring in grid.table["centring"].unique(maintain_order=True):
            matrix = grid.matrix(site, "accuracy", centring=centring)
            text += [
                "",
                f"{reader}, {site}, centred by {centring}:",
                "",
                "| trained on | " + " | ".join(grid.names) + " |",
            ]
            text.append("|---" * (len(grid.names) + 1) + "|")
            text += [
                f"| {name} | " + " | ".join(f"{v:.2f}" for v in row) + " |"
                for name, row in zip(grid.names, matrix, strict=True)
            ]
    return pl.concat(tables), text


def table(lines: pl.DataFrame) -> list[str]:
    out = ["| data | reader | accuracy, nested | AUROC | recall at 1 % FPR | sites chosen | chance |", "|---" * 7 + "|"]
    for line in lines.iter_rows(named=True):
        cells = [
            line["data"],
            line["reader"],
            f"{line['accuracy']:.3f} [{line['accuracy_low']:.3f}, {line['accuracy_high']:.3f}]",
        ]
        cells += ["–" if line.get(m) is None else f"{line[m]:.3f}" for m in ("auroc", "recall")]
        cells += [line["sites"], f"{line['chance']:.2f}"]
        out.append(f"| {' | '.join(cells)} |")
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["smollm2-135m", "gemma3-270m"])
    parser.add_argument("--out", type=Path, default=Path("experiments/truth"))
    parser.add_argument("--stores", type=Path)
    parser.add_argument("--limit", type=int, help="only the first N statements of each data set")
    options = parser.parse_args()
    for model in options.models:
        lm, out = rp.LanguageModel.load(model), options.out / model
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as temporary:
            folder = (options.stores or Path(temporary)) / model
            folder.mkdir(parents=True, exist_ok=True)
            sets = data_sets(options.limit)
            stores = {
                name: store_of(lm, prompts, folder / f"{name.replace(' ', '-')}.reprobe")
                for name, prompts in sets.items()
            }
            lines = pl.concat(
                [
                    *(compared(name, store) for name, store in stores.items()),
                    polarised(stores),
                    sequences(lm, sets["cities"].head(240), folder),
                ],
                how="diagonal_relaxed",
            )
            matrices, text = carried(stores, out)
        write_table(lines, out / "readers.csv", overwrite=True)
        write_table(matrices, out / "transfer.csv", overwrite=True)
        sites = SITES.format(layers=lm.n_layers)
        about = (
            f"`experiments/truth.py --models {model}`; {sites}, last token, 5 folds of whole groups (3 of sequences)."
        )
        head = [f"# Truth in {model}", "", about, ""]
        notes = [(out / "notes.md").read_text()] if (out / "notes.md").exists() else []
        (out / "README.md").write_text("\n".join([*head, *table(lines), "", *notes, "## Carried over", *text]) + "\n")
        print(out / "README.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
