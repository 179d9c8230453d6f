"""Facts written into weights: how well, at which block, from how much text, how many at once, how many in a row.

    uv run python experiments/editing.py rome       [--model NAME] [--facts 100] [--counterfact PATH]
    uv run python experiments/editing.py layers     [--facts 20]      ROME block by block
    uv run python experiments/editing.py tokens     [--facts 20]      ROME from fewer and more tokens of ordinary text
    uv run python experiments/editing.py memit      [--sizes 1,10,100,500]
    uv run python experiments/editing.py sequential [--facts 200]     r-ROME against the published form
    uv run python experiments/editing.py baseline   [--facts 20]      constrained fine-tuning

Each prints one JSON object. Facts are such as the model knows: greedily continued, the prompt gives the true object.
Ordinary text, for perplexity, are the hand-written scenes of `emotions`; second moments are of text that the model
samples itself.
"""

import argparse
import json
import time
import warnings
from pathlib import Path

import reprobe as rp
from reprobe.evaluation import editing as scores
from reprobe.methods import editing, finetune, memit, rome
from reprobe.methods.moments import Sample, second_moments
from reprobe.methods.sequential import Guard, sequential
from reprobe.prompts import facts_of
from reprobe.provenance import versions

ORDINARY = 60


def known(lm, source, n):
    """The first n facts whose true object the model says, one for a subject."""
    found, subjects = [], set()
    facts = [f for f in facts_of(source) if f.new is not None and f.true is not None]
    for start in range(0, len(facts), 64):
        batch = facts[start : start + 64]
        for fact, text in zip(batch, lm.generate([f.prompt for f in batch], max_new_tokens=6), strict=True):
            if text.strip().startswith(fact.true) and fact.group not in subjects:
                found.append(fact)
                subjects.add(fact.group)
        if len(found) >= n:
            break
    return found[:n]


def told(evaluation):
    """An evaluation as JSON: every measure before and after, with intervals."""
    return {
        "measures": {row.pop("measure"): row for row in evaluation.table.to_dicts()},
        "facts": evaluation.after.facts,
        "perplexity": [evaluation.perplexity_before, evaluation.perplexity_after],
    }


def one_at_a_time(lm, facts, make, texts=()):
    times = []

    def timed(fact):
        start = time.perf_counter()
        edit = make(fact)
        times.append(time.perf_counter() - start)
        return edit

    result = scores.evaluate(lm, facts, timed, texts=texts)
    effects = sorted(times)
    return told(result) | {"seconds per fact": {"median": effects[len(effects) // 2], "max": effects[-1]}}


def run_rome(lm, a):
    layer = a.layer if a.layer is not None else editing.default_layers(lm).rome
    moment = second_moments(lm, [layer], Sample(a.tokens))[layer]
    sources = {"facts": "facts"} | ({"counterfact": a.counterfact} if a.counterfact else {})
    return {
        name: {"layer": layer}
        | one_at_a_time(lm, known(lm, source, a.facts), lambda f: rome.edit(lm, f, layer=layer, moment=moment), a.texts)
        for name, source in sources.items()
    }


def run_layers(lm, a):
    layers = a.layers or list(range(lm.n_layers - 4))
    moments = second_moments(lm, layers, Sample(a.tokens))
    facts = known(lm, "facts", a.facts)
    return {
        layer: one_at_a_time(lm, facts, lambda f, at=layer: rome.edit(lm, f, layer=at, moment=moments[at]))
        for layer in layers
    }


def run_tokens(lm, a):
    layer = editing.default_layers(lm).rome
    facts = known(lm, "facts", a.facts)
    out = {}
    for n in (1_000, 5_000, 20_000, 40_000, 80_000):
        moment = second_moments(lm, [layer], Sample(n))[layer]
        out[n] = one_at_a_time(lm, facts, lambda f, m=moment: rome.edit(lm, f, layer=layer, moment=m))
    return out


def run_memit(lm, a):
    layers = a.layers or list(editing.default_layers(lm).memit)
    moments = second_moments(lm, layers, Sample(a.tokens))
    facts = list({f.group: f for f in facts_of("facts")}.values())
    out = {}
    for n in a.sizes:
        for name, null in (("memit", None), ("null space", memit.NullSpace())):
            start = time.perf_counter()
            how = memit.Settings(weight=a.weight, null_space=null)
            edits = memit.edit(lm, facts[:n], layers=layers, moments=moments, settings=how)
            seconds = time.perf_counter() - start
            result = scores.evaluate_together(lm, facts[:n], edits, texts=a.texts)
            out[f"{name}, {n}"] = told(result) | {"seconds": seconds, "layers": layers}
    return out


def run_sequential(lm, a):
    layer = editing.default_layers(lm).rome
    moment = second_moments(lm, [layer], Sample(a.tokens))[layer]
    facts = list({f.group: f for f in facts_of("facts")}.values())[: a.facts]
    out = {}
    for name, compat in (("r-rome", None), ("published", "rome")):
        how = rome.Settings(compat=compat)
        guard = Guard(a.texts, limit=a.limit, every=10)
        make = lambda lm, f, how=how: rome.edit(lm, f, layer=layer, moment=moment, settings=how)  # noqa: E731
        run = sequential(lm, facts, make, guard)
        kept = [edits[0].facts[0] for edits in run.edits]
        parts = {"all": kept, "last 50": kept[-50:]}
        out[name] = {
            "perplexity": [[c.facts, c.perplexity] for c in run.checked],
            "stopped": run.stopped,
            "efficacy": {
                part: str(scores.summarise(scores.score_facts(lm, some)).shares["efficacy"])
                for part, some in parts.items()
                if len(some) > 1
            },
        }
        rp.ledger_of(lm).revert()
    return out


def run_baseline(lm, a):
    return one_at_a_time(lm, known(lm, "facts", a.facts), lambda f: finetune.edit(lm, f), a.texts)


def main():
    runs = {
        "rome": (run_rome, 100),
        "layers": (run_layers, 20),
        "tokens": (run_tokens, 20),
        "memit": (run_memit, None),
        "sequential": (run_sequential, 200),
        "baseline": (run_baseline, 20),
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=runs)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--facts", type=int)
    parser.add_argument("--counterfact", type=Path)
    parser.add_argument("--layer", type=int)
    parser.add_argument("--layers", type=lambda s: [int(x) for x in s.split(",")])
    parser.add_argument("--sizes", type=lambda s: [int(x) for x in s.split(",")], default=[1, 10, 100, 500])
    parser.add_argument("--tokens", type=int, default=40_000)
    parser.add_argument("--weight", type=float)
    parser.add_argument("--limit", type=float, default=2.0)
    a = parser.parse_args()
    run, facts = runs[a.what]
    a.facts = a.facts or facts
    a.texts = tuple(rp.PromptSet.load("emotions").texts[:ORDINARY])
    warnings.simplefilter("ignore", UserWarning)  # edits without effect are in the numbers
    lm = rp.LanguageModel.load(a.model)
    start = time.perf_counter()
    result = run(lm, a)
    print(
        json.dumps(
            {
                "what": a.what,
                "model": lm.identity.to_json(),
                "tokens of the second moments": a.tokens,
                "seconds": time.perf_counter() - start,
                "result": result,
                "versions": versions(),
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
