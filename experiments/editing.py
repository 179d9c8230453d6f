"""Facts written into weights: how well, at which block, from how much text, how many at once, how many in a row.

    uv run python experiments/editing.py rome       [--model NAME] [--facts 100] [--counterfact PATH]
    uv run python experiments/editing.py layers     [--facts 12]      ROME block by block
    uv run python experiments/editing.py choice     [--facts 12] --layers 2,4,6   the same, on facts that `rome` lacks
    uv run python experiments/editing.py settings   [--facts 24]      ROME's settings, on the same facts as `choice`
    uv run python experiments/editing.py search     [--facts 20]      our search against Adam's as published
    uv run python experiments/editing.py tokens     [--facts 20]      ROME from fewer and more tokens of ordinary text
    uv run python experiments/editing.py memit      [--sizes 1,10,100,500]
    uv run python experiments/editing.py weights    [--weights 1,2] [--spans 4-8,2-8]   500 facts at once by blocks, λ
    uv run python experiments/editing.py sequential [--facts 200]     r-ROME against the published form; all reverted
    uv run python experiments/editing.py baseline   [--facts 20]      constrained fine-tuning
    uv run python experiments/editing.py show                         tables and figures of what was run

Each writes OUT/MODEL/WHAT.json; `show` makes OUT/MODEL/README.md and its figures from these. Edits one at a time are of
facts that the model knows: greedily continued, the prompt gives the true object. Many at once and in a row are drawn
from all of `facts` and CounterFact, shuffled, one for a subject. Ordinary text, for perplexity, are the hand-written
scenes of `emotions`; second moments are of text that the model samples itself.
"""

import argparse
import json
import random
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from matplotlib.ticker import LogFormatter

import reprobe as rp
from reprobe.control.edits import Matrix
from reprobe.evaluation import editing as scores
from reprobe.methods import editing, finetune, memit, rome
from reprobe.methods.editing import PUBLISHED_RATE, Search
from reprobe.methods.moments import Sample, second_moments
from reprobe.methods.sequential import Guard, sequential
from reprobe.prompts import facts_of
from reprobe.provenance import versions
from reprobe.report.style import MUTED, WIDTH, Mark, Plot, dress, legend, series, whole_ticks

ORDINARY = 60
#: Of them, where the perplexity is measured for each of many edits.
FEW = 8
KINDS = scores.KINDS


def sources(a):
    return {"facts": "facts"} | ({"CounterFact": a.counterfact} if a.counterfact else {})


def candidates(source):
    return [f for f in facts_of(source) if f.new is not None and f.true is not None]


def said(lm, facts):
    """Of each fact whether the model, greedily, continues the prompt with the true object."""
    texts = []
    for start in range(0, len(facts), 64):
        texts += lm.generate([f.prompt for f in facts[start : start + 64]], max_new_tokens=6)
    return [text.strip().startswith(f.true) for text, f in zip(texts, facts, strict=True)]


def known(lm, source, n):
    """The first n facts that the model says, one for a subject."""
    found, facts = {}, candidates(source)
    for start in range(0, len(facts), 64):
        batch = facts[start : start + 64]
        for fact, says in zip(batch, said(lm, batch), strict=True):
            if says:
                found.setdefault(fact.group, fact)
        if len(found) >= n:
            break
    return list(found.values())[:n]


def held_out(lm, source, n):
    """n facts that are not `known`, from all over the source: the model does not say the true object, but finds it
    likelier than the new one."""
    facts = spread(candidates(source), 4 * n)
    unsaid = [fact for fact, says in zip(facts, said(lm, facts), strict=True) if not says]
    true, new = (editing.probabilities(lm, some) for some in ([replace(f, new=f.true) for f in unsaid], unsaid))
    return spread([fact for fact, better in zip(unsaid, true > new, strict=True) if better], n)


def spread(facts, n):
    """n of them, evenly spaced: they are ordered by relation."""
    return [facts[i * len(facts) // n] for i in range(min(n, len(facts)))]


def mixed(a):
    """All facts, known or not, one for a subject, shuffled."""
    found = {}
    for source in sources(a).values():
        for fact in candidates(source):
            found.setdefault(fact.subject.lower(), fact)
    facts = list(found.values())
    random.Random(0).shuffle(facts)
    return facts


def told(evaluation):
    """An evaluation as JSON: every measure before and after, with intervals."""
    return {
        "measures": {row.pop("measure"): row for row in evaluation.table.to_dicts()},
        "facts": evaluation.after.facts,
        "perplexity": [evaluation.perplexity_before, evaluation.perplexity_after],
    }


def one_at_a_time(lm, facts, make, texts=()):
    seconds, norms, steps = [], [], []

    def timed(fact):
        start, cpu = time.perf_counter(), time.process_time()
        edit = make(fact)
        seconds.append((time.perf_counter() - start, time.process_time() - cpu))
        norms.append(edit.norm)
        steps.append(edit.provenance.get("search", {}).get("steps", 0))
        return edit

    result = scores.evaluate(lm, facts, timed, texts=texts)
    wall, cpu = (sorted(s) for s in zip(*seconds, strict=True))
    return told(result) | {
        "seconds per fact": {"median": wall[len(wall) // 2], "max": wall[-1]},
        "CPU seconds per fact": {"median": cpu[len(cpu) // 2], "max": cpu[-1]},
        "median norm of an edit": float(np.median(norms)),
        "mean steps of the search": float(np.mean(steps)),
    }


def run_rome(lm, a):
    layer = a.layer if a.layer is not None else editing.default_layers(lm).rome
    moment = second_moments(lm, [layer], Sample(a.tokens))[layer]
    out = {}
    for name, source in sources(a).items():
        facts = known(lm, source, a.facts)
        make = lambda f: rome.edit(lm, f, layer=layer, moment=moment)  # noqa: E731
        out[name] = {"layer": layer} | one_at_a_time(lm, facts, make, a.texts[:FEW])
        a.keep(out)
    return out


def run_layers(lm, a, facts=None):
    layers = a.layers or list(range(0, lm.n_layers * 3 // 4 + 1, 2))
    moments = second_moments(lm, layers, Sample(a.tokens))
    facts = facts or spread(known(lm, "facts", 100), a.facts)
    return {
        layer: one_at_a_time(lm, facts, lambda f, at=layer: rome.edit(lm, f, layer=at, moment=moments[at]))
        for layer in layers
    }


def run_choice(lm, a):
    return run_layers(lm, a, [fact for source in sources(a).values() for fact in held_out(lm, source, a.facts)])


def run_settings(lm, a):
    """ROME's settings one by one, on facts that `rome` lacks."""
    layer = a.layer if a.layer is not None else editing.default_layers(lm).rome
    moment = second_moments(lm, [layer], Sample(a.tokens))[layer]
    facts = [fact for source in sources(a).values() for fact in held_out(lm, source, a.facts)]
    plain = Search()
    forms = {
        "as it is": rome.Settings(),
        "KL × 8": rome.Settings(search=replace(plain, kl=8 * plain.kl)),
        "KL × 64": rome.Settings(search=replace(plain, kl=64 * plain.kl)),
        "clamp 0.5": rome.Settings(search=replace(plain, clamp=0.5)),
        "clamp 0.35": rome.Settings(search=replace(plain, clamp=0.35)),
        "stop at 0.15 nats": rome.Settings(search=replace(plain, stop=0.15)),
        "decay × 32": rome.Settings(search=replace(plain, decay=32 * plain.decay)),
        "bare prompt a quarter of the key": rome.Settings(bare=0.25),
        "ridge × 100": rome.Settings(ridge=100 * rome.RIDGE),
    }
    out = {}
    for name, how in forms.items():
        out[name] = one_at_a_time(lm, facts, lambda f, s=how: rome.edit(lm, f, layer=layer, moment=moment, settings=s))
        a.keep(out)
    return out


def run_search(lm, a):
    layer = editing.default_layers(lm).rome
    moment = second_moments(lm, [layer], Sample(a.tokens))[layer]
    facts = spread(known(lm, "facts", 100), a.facts)
    return {
        name: one_at_a_time(
            lm,
            facts,
            lambda f, s=search: rome.edit(lm, f, layer=layer, moment=moment, settings=rome.Settings(search=s)),
        )
        for name, search in (("ours", Search()), ("Adam", Search(rate=PUBLISHED_RATE)))
    }


def run_tokens(lm, a):
    layer = editing.default_layers(lm).rome
    facts = spread(known(lm, "facts", 100), a.facts)
    out = {}
    for n in (1_000, 5_000, 20_000, 40_000, 80_000):
        moment = second_moments(lm, [layer], Sample(n))[layer]
        out[n] = one_at_a_time(lm, facts, lambda f, m=moment: rome.edit(lm, f, layer=layer, moment=m))
    return out


def run_memit(lm, a):
    """Values are searched once for all facts; each size writes the first of them, and a sample of these is scored."""
    layers = a.layers or list(editing.default_layers(lm).memit)
    moments = second_moments(lm, layers, Sample(a.tokens))
    facts = mixed(a)[: max(a.sizes)]
    values, found = values_of(lm, facts, layers[-1], a.values)
    out = {"seconds to find a value": [s / len(facts) for s in found], "facts of": counted(facts), "layers": layers}
    forms = {
        "MEMIT": memit.Settings(),
        "λ = 300": memit.Settings(weight=300.0),
        "null space": memit.Settings(null_space=memit.NullSpace()),
    }
    for n in a.sizes:
        # The other forms only where there are many facts: with few, all are alike.
        for name, how in forms.items() if n == max(a.sizes) else list(forms.items())[:1]:
            start = time.perf_counter(), time.process_time()
            edits = memit.edit(lm, facts[:n], layers=layers, moments=moments, settings=how, values=values[:n])
            spent = time.perf_counter() - start[0], time.process_time() - start[1]
            result = scores.evaluate_together(lm, facts[: min(n, a.score)], edits, texts=a.texts)
            out[f"{name}, {n}"] = told(result) | {
                "written": n,
                "seconds": [s + n * f / len(facts) for s, f in zip(spent, found, strict=True)],
                "with an effect": sum(e.found for e in edits[0].effects) / n,
                "norms": [e.norm for e in edits],
            }
            a.keep(out)
    return out


def run_weights(lm, a):
    """Many facts at once by λ and blocks. The facts behind those scored, and the texts behind those read, are for
    choosing."""
    spans = a.spans or [list(editing.default_layers(lm).memit)]
    if len({span[-1] for span in spans}) > 1:
        sys.exit("spans end at one block: the values are found there")
    moments = second_moments(lm, sorted({layer for span in spans for layer in span}), Sample(a.tokens))
    facts = mixed(a)[: max(a.sizes)]
    values, _ = values_of(lm, facts, spans[0][-1], a.values)
    beyond = tuple(rp.PromptSet.load("emotions").texts[ORDINARY : 2 * ORDINARY])
    parts = {"scored": (facts[: a.score], a.texts), "held out": (facts[a.score : a.score * 3 // 2], beyond)}
    out = {"written": len(facts), "forms": []}
    for span in spans:
        for widths in a.weights:
            how = memit.Settings(weight=widths * moments[span[0]].width)
            edits = memit.edit(lm, facts, layers=span, moments=moments, settings=how, values=values)
            out["forms"].append(
                {"layers": span, "widths": widths}
                | {
                    part: told(scores.evaluate_together(lm, some, edits, texts=texts))
                    for part, (some, texts) in parts.items()
                }
                | {
                    "with an effect": sum(e.found for e in edits[0].effects) / len(facts),
                    "norms": [e.norm for e in edits],
                }
            )
            a.keep(out)
    return out


def values_of(lm, facts, layer, file):
    """Values, and the seconds that finding them took (wall, processor); from a file of an earlier run if there is one,
    which is made else."""
    if file is not None and file.is_file():
        kept = np.load(file)
        return torch.from_numpy(kept["values"]), tuple(kept["seconds"].tolist())
    start = time.perf_counter(), time.process_time()
    values = memit.find_values(lm, facts, layer, memit.Settings())
    spent = time.perf_counter() - start[0], time.process_time() - start[1]
    if file is not None:
        np.savez(file, values=values.numpy(), seconds=spent)
    return values, spent


def counted(facts):
    ours = sum(f.id.startswith("facts-") for f in facts)
    return {"facts": ours, "CounterFact": len(facts) - ours}


def run_sequential(lm, a):
    layer = a.layer if a.layer is not None else editing.default_layers(lm).rome
    moment = second_moments(lm, [layer], Sample(a.tokens))[layer]
    facts = mixed(a)[: a.facts]
    weight = Matrix.projection(lm, layer).weight
    original = weight.detach().clone()
    ledger = rp.ledger_of(lm)
    out = {}
    for name, compat in (("r-ROME", None), ("published", "rome")):
        how = rome.Settings(compat=compat)
        guard = Guard(a.texts, limit=a.limit, every=10)
        make = lambda lm, f, how=how: rome.edit(lm, f, layer=layer, moment=moment, settings=how)  # noqa: E731
        run = sequential(lm, facts, make, guard)
        kept = [edits[0].facts[0] for edits in run.edits]
        parts = {"all": kept, "last 50": kept[-50:]}
        out[name] = {
            "layer": layer,
            "written": len(kept),
            "perplexity": [[c.facts, c.perplexity] for c in run.checked],
            "stopped": run.stopped,
            "scores": {
                part: {
                    kind: [m.mean, m.low, m.high]
                    for kind, m in scores.summarise(scores.score_facts(lm, scores.spared(some, kept))).shares.items()
                }
                for part, some in parts.items()
                if len(some) > 1
            },
        }
        if compat is None:
            out["reverted"] = reverted(lm, list(ledger.applied), weight, original)
        ledger.revert()
    return out


def reverted(lm, edits, weight, original):
    """Edits taken out one by one in a random order, from a model whose ledger keeps originals and from one without."""
    random.Random(1).shuffle(edits)
    ledger = rp.ledger_of(lm)
    found = {"edits": len(edits)}
    for edit in edits:
        ledger.revert([edit])
    found["with originals, bit-identical"] = torch.equal(weight, original)
    rp.ledger_of(lm, keep_originals=False)
    rp.apply_edits(lm, sorted(edits, key=lambda e: len(e.after)))
    for edit in edits:
        ledger.revert([edit])
    found["without originals, greatest difference"] = float((weight - original).abs().max())
    rp.ledger_of(lm, keep_originals=True)
    with torch.no_grad():
        weight.copy_(original)
    return found


def run_baseline(lm, a):
    """By how far each weight may move: what is published was chosen for another model."""
    facts, out = spread(known(lm, "facts", 100), a.facts), {}
    for norm in (5e-4, 2e-3, 8e-3):
        how = finetune.Settings(norm=norm, rate=norm)
        out[norm] = one_at_a_time(lm, facts, lambda f, s=how: finetune.edit(lm, f, settings=s), a.texts[:FEW])
        a.keep(out)
    return out


RUNS = {
    "rome": (run_rome, 100),
    "layers": (run_layers, 12),
    "choice": (run_choice, 12),
    "settings": (run_settings, 24),
    "search": (run_search, 20),
    "tokens": (run_tokens, 20),
    "memit": (run_memit, None),
    "weights": (run_weights, None),
    "sequential": (run_sequential, 200),
    "baseline": (run_baseline, 20),
}


def run(a):
    function, facts = RUNS[a.what]
    a.facts = a.facts or facts
    a.texts = tuple(rp.PromptSet.load("emotions").texts[:ORDINARY])
    warnings.simplefilter("ignore", UserWarning)  # edits without effect are in the numbers
    lm = rp.LanguageModel.load(a.model)
    start = time.perf_counter()
    shown = ["PATH" if x in (str(a.counterfact), str(a.values)) else x for x in sys.argv[1:]]
    folder = a.out / a.model
    folder.mkdir(parents=True, exist_ok=True)

    def keep(result):
        """Write what there is: parts of a long run are not lost with it."""
        record = {
            "what": a.what,
            "command": " ".join(["experiments/editing.py", *shown]),
            "second moments of": a.tokens,
            "model": lm.identity.to_json(),
            "seconds": time.perf_counter() - start,
            "result": result,
            "versions": versions(),
        }
        (folder / f"{a.what}.json").write_text(json.dumps(record, indent=1) + "\n")

    a.keep = keep
    keep(function(lm, a))
    print(folder / f"{a.what}.json")


def percent(measure, state):
    low, high = bounds(measure, state)
    return f"{measure[state]:.3f}" if np.isnan(low) else f"{measure[state]:.3f} [{low:.3f}, {high:.3f}]"


def bounds(measure, state):
    """NaN where there is none, for one subject: older records have it as NaN, newer as null."""
    return np.array([measure[f"{state}_{side}"] for side in ("low", "high")], float)


def line(name, result):
    """A row of a table: shares with intervals, neighbourhood without and with edits, perplexity."""
    m = result["measures"]
    cells = [name, str(result["facts"]), *(percent(m[k], "after") if k in m else "–" for k in KINDS[:2])]
    cells += [percent(m["neighbourhood"], s) if "neighbourhood" in m else "–" for s in ("before", "after")]
    one, two = result["perplexity"]
    cells.append("–" if one is None else f"{one:.2f} → {two:.2f} ({100 * (two / one - 1):+.1f} %)")
    return f"| {' | '.join(cells)} |"


def table(rows):
    head = ["", "facts", "efficacy", "paraphrase", "neighbourhood before", "after", "perplexity"]
    return [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *(line(name, r) for name, r in rows)]


def curves(rows, x, log=False):
    """Shares over something: `rows` are (where, result); dashed, the neighbourhood of the unedited model."""
    figure = Plot(WIDTH, 3.1)
    axes = figure.subplots()
    for i, kind in enumerate(KINDS):
        here = [(at, r["measures"][kind]) for at, r in rows if kind in r["measures"]]
        xs = [at for at, _ in here]
        look, band = series(i), np.transpose([bounds(m, "after") for _, m in here])
        axes.fill_between(xs, *band, color=look["color"], alpha=0.14, linewidth=0)
        axes.plot(xs, [m["after"] for _, m in here], label=kind, markersize=4, linewidth=1.5, **look)
        figure.marks += [Mark(axes, at, m["after"], f"{x} {at}: {kind} {percent(m, 'after')}") for at, m in here]
        if kind == "neighbourhood":
            axes.plot(
                xs, [m["before"] for _, m in here], color=MUTED, linestyle="--", linewidth=1.1,
                label="neighbourhood, unedited",
            )  # fmt: skip
    axes.set_ylim(0, 1.03)
    dress(axes, x=x, y="share of facts")
    if log:
        axes.set_xscale("log")
        axes.set_xticks([at for at, _ in rows], [str(at) for at, _ in rows], minor=False)
        axes.minorticks_off()
    else:
        whole_ticks(axes.xaxis)
    legend(figure, axes)
    return figure


def perplexities(result):
    """Perplexity over the facts written one after another, for each form of ROME."""
    figure = Plot(WIDTH, 3.0)
    axes = figure.subplots()
    for i, name in enumerate(("r-ROME", "published")):
        at, values = zip(*result[name]["perplexity"], strict=True)
        axes.plot(at, values, label=name, markersize=3.6, linewidth=1.5, **series(i))
        figure.marks += [Mark(axes, x, y, f"{name}, {x} facts: {y:.2f}") for x, y in zip(at, values, strict=True)]
    first = result["r-ROME"]["perplexity"][0][1]
    axes.axhline(2 * first, color=MUTED, linestyle="--", linewidth=1.1, label="the guard's limit")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(LogFormatter())
    axes.yaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False))
    dress(axes, x="facts written one after another", y="perplexity")
    legend(figure, axes)
    return figure


def shown(what, record, folder):
    """The lines of one part of a README; figures go to the folder."""
    result = record["result"]
    if what == "rome":
        took = {n: r["CPU seconds per fact"]["median"] for n, r in result.items()}
        times = ", ".join(f"{n} {s:.2f} s" for n, s in took.items())
        layer = next(iter(result.values()))["layer"]
        return [f"## ROME, one fact at a time (block {layer})", "", *table(result.items()), "",
                f"Processor time per fact, median, on a busy machine: {times}."]  # fmt: skip
    if what == "choice":
        return [
            "## ROME's block, chosen on facts that are not scored above",
            "",
            *table([(f"block {at}", r) for at, r in result.items()]),
        ]
    if what == "settings":
        return ["## ROME's settings, on facts that are not scored above", "", *table(result.items())]
    if what in ("layers", "tokens"):
        rows = [(int(at), r) for at, r in result.items()]
        curves(rows, "block" if what == "layers" else "tokens of text", log=what == "tokens").savefig(
            folder / f"{what}.svg"
        )
        title = "ROME block by block" if what == "layers" else "ROME by the number of tokens of C"
        return [f"## {title}", "", f"![{title}]({what}.svg)", "", *table([(f"{at:,}", r) for at, r in rows])]
    if what == "search":
        extra = ["", *(
            f"{name}: median norm of an edit {r['median norm of an edit']:.2f}, "
            f"{r['mean steps of the search']:.1f} steps, {r['CPU seconds per fact']['median']:.2f} s.  "
            for name, r in result.items()
        )]  # fmt: skip
        return ["## The search against Adam's, as published", "", *table(result.items()), *extra]
    if what == "memit":
        sizes = {name: r for name, r in result.items() if "measures" in r}
        rows = [(r["written"], r) for name, r in sizes.items() if name.startswith("MEMIT")]
        curves(rows, "facts at once", log=True).savefig(folder / "memit.svg")
        of = ", ".join(f"{n} of {name}" for name, n in result["facts of"].items())
        most = max(rows, key=lambda row: row[0])[1]
        where = ", ".join(map(str, result["layers"]))
        return [f"## MEMIT (blocks {where})", "", "![MEMIT by the number of facts](memit.svg)", "",
                *table(sizes.items()), "",
                f"The facts: {of}; “facts” in the table are those scored. {most['written']} facts took "
                f"{most['seconds'][0] / 60:.1f} minutes on a busy machine, {most['seconds'][1] / 60:.1f} of them "
                f"processor time; {100 * most['with an effect']:.0f} % of all have an effect."]  # fmt: skip
    if what == "weights":
        out = [f"## {result['written']} facts at once by blocks and λ", ""]
        for part, title in (("held out", "To choose by"), ("scored", "Facts and texts of the table above")):
            rows = [
                (f"blocks {f['layers'][0]}–{f['layers'][-1]}, λ = {f['widths']:g} widths", f[part])
                for f in result["forms"]
            ]
            out += [f"{title}:", "", *table(rows), ""]
        return out[:-1]
    if what == "sequential":
        perplexities(result).savefig(folder / "sequential.svg")
        out = ["## One after another", "", "![Perplexity over sequential edits](sequential.svg)", "",
               "| | written | perplexity | all: efficacy, paraphrase | last 50: efficacy | stopped |",
               "|---|---|---|---|---|---|"]  # fmt: skip
        for name in ("r-ROME", "published"):
            r = result[name]
            shares = {part: {k: f"{v[0]:.3f} [{v[1]:.3f}, {v[2]:.3f}]" for k, v in s.items()}
                      for part, s in r["scores"].items()}  # fmt: skip
            both = ", ".join(shares["all"][k] for k in KINDS[:2]) if "all" in shares else "–"
            last = shares["last 50"]["efficacy"] if "last 50" in shares else "–"
            pair = f"{r['perplexity'][0][1]:.2f} → {r['perplexity'][-1][1]:.2f}"
            out.append(f"| {name} | {r['written']} | {pair} | {both} | {last} | {r['stopped'] or 'no'} |")
        back = result["reverted"]
        return [*out, "", f"Reverted one by one in a random order ({back['edits']} edits): bit-identical with "
                f"originals kept: {back['with originals, bit-identical']}; without, the greatest difference is "
                f"{back['without originals, greatest difference']:.2g}."]  # fmt: skip
    return [
        "## Constrained fine-tuning, the baseline",
        "",
        *table([(f"weights within ± {float(norm):g}", r) for norm, r in result.items()]),
    ]


def show(a):
    folder = a.out / a.model
    records = {what: json.loads((folder / f"{what}.json").read_text()) for what in RUNS
               if (folder / f"{what}.json").is_file()}  # fmt: skip
    out = [f"# Editing facts in {a.model}", "", "Made by `experiments/editing.py show`; shares with 95 % intervals "
           "over subjects; a fact counts once whatever the number of its prompts."]  # fmt: skip
    for what, record in records.items():
        out += ["", *shown(what, record, folder), "", f"`{record['command']}`"]
    (folder / "README.md").write_text("\n".join(out) + "\n")
    print(folder / "README.md")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=[*RUNS, "show"])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--facts", type=int)
    parser.add_argument("--counterfact", type=Path)
    parser.add_argument("--layer", type=int)
    parser.add_argument("--layers", type=lambda s: [int(x) for x in s.split(",")])
    parser.add_argument("--sizes", type=lambda s: [int(x) for x in s.split(",")], default=[1, 10, 100, 500])
    parser.add_argument("--tokens", type=int, default=40_000)
    parser.add_argument("--score", type=int, default=200, help="facts scored of those that MEMIT writes")
    parser.add_argument(
        "--weights", type=lambda s: [float(x) for x in s.split(",")], default=[1, 3, 6, 12],
        help="MEMIT's λ, in widths of the keys",
    )  # fmt: skip
    parser.add_argument(
        "--spans", type=lambda s: [list(range(int(a), int(b) + 1)) for a, b in (x.split("-") for x in s.split(","))],
        help="MEMIT's blocks, several choices: 4-8,2-8",
    )  # fmt: skip
    parser.add_argument("--values", type=Path, help="an .npz to keep MEMIT's values in, or to take them from")
    parser.add_argument("--limit", type=float, default=2.0)
    parser.add_argument("--out", type=Path, default=Path("experiments/editing"))
    a = parser.parse_args()
    (show if a.what == "show" else run)(a)


if __name__ == "__main__":
    main()
