"""What an edit takes: seconds per fact of ROME, and of finding MEMIT's values, with second moments in the cache.

    uv run python experiments/bench/editing.py [--model M] [--facts N] [--json F] [--markdown F]

Enters: a model. Leaves: JSON and Markdown. Facts are of `facts`, evenly spaced over its relations. Each is edited with
our search and with Adam as published, in turn, so that a change in the machine meets both. Run it on an idle machine.
"""

import argparse
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

from record import Claim, Recorder, Work, add_outputs

import reprobe as rp
from reprobe.methods import editing, memit, rome
from reprobe.methods.editing import PUBLISHED_RATE, Search
from reprobe.methods.moments import Sample, second_moments
from reprobe.prompts import facts_of

#: Seconds per fact that are claimed, on two cores.
MOST = 3.0


def seconds(act: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    out = act()
    return time.perf_counter() - start, out


def one_by_one(lm: rp.LanguageModel, facts: list[rp.Fact], tokens: int) -> Work:
    layer = editing.default_layers(lm).rome
    moment = second_moments(lm, [layer], Sample(tokens))[layer]
    forms = {"ours": Search(), "Adam as published": Search(rate=PUBLISHED_RATE)}
    took: dict[str, list[float]] = {name: [] for name in forms}
    steps: dict[str, list[int]] = {name: [] for name in forms}

    def act(fact: rp.Fact, search: Search) -> rp.WeightEdit:
        return rome.edit(lm, fact, layer=layer, moment=moment, settings=rome.Settings(search=search))

    act(facts[0], Search(steps=1))  # prefixes are sampled, C is decomposed
    for i, fact in enumerate(facts):
        for name in list(forms) if i % 2 else reversed(forms):
            spent, edit = seconds(lambda f=fact, n=name: act(f, forms[n]))  # type: ignore[misc]
            took[name].append(spent)
            steps[name].append(edit.provenance["search"]["steps"])
            print(f"{fact.subject}, {name}: {spent:.2f} s", file=sys.stderr, flush=True)
    work = Work(
        "ROME",
        lm.name,
        f"{len(facts)} facts, block {layer}, C of {moment.n:,} tokens, {lm.dtype} on {lm.device}; everything that "
        "`rome.edit` does, the measuring of its effect included.",
        claims=[Claim("median seconds per fact", statistics.median(took["ours"]), "≤", MOST)],
        facts={"seconds": took, "steps": steps},
    )
    for name in forms:
        work.notes.append(
            f"{name}: median {statistics.median(took[name]):.2f} s, slowest {max(took[name]):.2f} s, "
            f"{statistics.mean(steps[name]):.1f} steps on average."
        )
    return work


def values(lm: rp.LanguageModel, facts: list[rp.Fact]) -> Work:
    last, how = editing.default_layers(lm).memit[-1], memit.Settings()
    spent, _ = seconds(lambda: memit.find_values(lm, facts, last, how))
    work = Work(
        "MEMIT's values",
        lm.name,
        f"{len(facts)} facts, block {last}, {how.batch} at once, {lm.dtype} on {lm.device}.",
        facts={"seconds": spent},
    )
    work.notes.append(f"{spent / len(facts):.2f} s per fact; writing 500 of them takes a few seconds a block more.")
    return work


def main() -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: nothing asks a hub
    warnings.simplefilter("ignore", UserWarning)  # a fact without an effect takes its time, too
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--facts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=40_000, help="of the text of the second moments")
    add_outputs(parser)
    chosen = parser.parse_args()
    if chosen.facts < 1:
        parser.error("--facts is 1 or more")
    lm = rp.LanguageModel.load(chosen.model)
    shown = f"--model {chosen.model} --facts {chosen.facts} --tokens {chosen.tokens}"
    method = "Each fact is edited once in each way, in turn, and the median over facts counts"
    record = Recorder("Editing", f"uv run python experiments/bench/editing.py {shown}", chosen, lm.device, method)
    every = list({f.group: f for f in facts_of("facts")}.values())
    facts = [every[i * len(every) // chosen.facts] for i in range(chosen.facts)]
    record.add(one_by_one(lm, facts, chosen.tokens))
    record.add(values(lm, facts))
    print(record)


if __name__ == "__main__":
    main()
