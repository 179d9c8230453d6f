"""What control does on a small model: ITI, RepE, ActAdd, CAA, directional ablation, CAST. Both bundled models.

    uv run python experiments/control/run.py [--models M …] [--recipes iti repe …] [--n 80] [--seeds 0 1 2]

Enters: names of models. Leaves, per model and recipe: NAME.csv (mean changes with 95 % intervals over the questions or
prompts), NAME-runs.csv (a row per method, seed and fold: what was chosen, what it cost) and NAME.md, the first as a
table with notes. The README beside them is written by hand.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import ablation
import additions
import cast
import iti
import repe
from shared import PRICE, SEEDS, Setting

import reprobe as rp

RECIPES = {"iti": iti, "repe": repe, "additions": additions, "ablation": ablation, "cast": cast}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["smollm2-135m", "gemma3-270m"])
    parser.add_argument("--recipes", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--n", type=int, default=80, help="questions; pairs of scenes are half as many")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    options = parser.parse_args()
    for model in options.models:
        lm, out = rp.LanguageModel.load(model, dtype="float32"), options.out / model
        out.mkdir(parents=True, exist_ok=True)
        for name in options.recipes:
            recipe, start = RECIPES[name], time.process_time()
            with tempfile.TemporaryDirectory() as stores:
                found, notes = recipe.run(Setting(lm, Path(stores), options.n, options.seeds))
            lines = [f"## {recipe.TITLE}", "", *found.save(out, name)]
            lines += [line for note in notes for line in ("", note)]
            seconds = time.process_time() - start
            seeds = " ".join(map(str, options.seeds))
            lines += ["", f"`--models {model} --recipes {name} --n {options.n} --seeds {seeds}`; price {PRICE} nats."]
            (out / f"{name}.md").write_text("\n".join(lines) + "\n")
            print("\n".join(lines), f"\n({seconds:.0f} s of CPU)\n", file=sys.stderr, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
