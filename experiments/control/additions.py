"""Activation addition and contrastive activation addition: do they move mood and topic, at what cost off topic?

Enters: pairs of prompts (ActAdd); questions with two lettered answers (CAA); beginnings of texts. Leaves: log-odds of
words after beginnings of which half chose the block, and perplexity on ordinary text. The seeds of ActAdd are three
wordings, those of CAA draw half of its questions.
"""

from collections.abc import Callable, Sequence

import numpy as np
import polars as pl
from shared import ENDING, HAPPY, Outcomes, Priced, Setting, Words, halves, off_topic, priced, randomised, scenes

import reprobe as rp
from reprobe.methods import actadd, caa
from reprobe.model.sites import Site

TITLE = "ActAdd (Turner et al. 2023) and CAA (Rimsky et al. 2023)"
DEPTHS = (0.2, 0.4)
WEDDING = Words(
    ("wedding", "marriage", "bride", "groom", "ceremony", "weddings"),
    ("car", "book", "meeting", "garden", "storm", "river", "school"),
)
BEGINNINGS = {
    "mood": (
        "Anna opened the letter and read it twice. She felt",
        "The bus stopped at the corner and he got off. He was",
        "It was a Tuesday morning and I walked to the office. I felt",
        "When the phone rang, Maria picked it up. She sounded",
        "Tom looked out of the window for a while. He seemed",
        "The doors closed and the train began to move. We were",
        "My neighbour came over to talk about the fence. He was",
        "After the meeting the two of them went for a walk. They felt",
        "The clerk looked at the form and stamped it. She seemed",
        "I thought about the past year. It had been",
        "Someone was singing in the flat above. The song was",
        "The children came back from the lake. They were",
    ),
    "weddings": (
        "Yesterday my sister and I talked about the",
        "The photograph on the wall shows a",
        "The magazine has a long article about the",
        "For the whole evening they could speak only of the",
        "The first chapter of the novel describes a",
        "On Saturday we all went to see the",
        "He has been getting everything ready for the",
        "The most important day of the year was the",
        "In the afternoon she wrote a few lines about the",
        "What I remember best from that summer is the",
        "The whole village was busy with the",
        "They drove for six hours because of the",
    ),
}
WORDS = {"mood": HAPPY, "weddings": WEDDING}
PAIRS = {
    "mood": ((" Love", " Hate"), (" Joy", " Grief"), (" Happy", " Sad")),
    "weddings": (
        (" I talk about weddings constantly", " I do not talk about weddings constantly"),
        (" Weddings", " "),
        (" The bride and the groom", " The car and the road"),
    ),
}
SUBJECTS = (
    "football", "gardens", "trains", "the weather", "old coins", "bread", "bicycles", "maps", "bridges", "taxes",
    "insects", "rivers", "computers", "shoes", "chess", "mountains", "newspapers", "boats", "paint", "horses", "glass",
    "islands", "clocks", "potatoes",
)  # fmt: skip


def lettered(behaviour: str, n: int) -> rp.PromptSet:
    """Questions, each answered with the letter that shows the behaviour and with the other."""
    asked = (
        [(f"{text} How did it feel?", "happy", "sad") for text in _one_of_each_pair(n)]
        if behaviour == "mood"
        else [(f"Shall we talk about {subject} or about weddings?", "weddings", subject) for subject in SUBJECTS]
    )
    rows = []
    for i, (question, yes, no) in enumerate(asked):
        first, second = (yes, no) if i % 2 else (no, yes)
        text = f"{question}\n(A) {first}\n(B) {second}\nAnswer: ("
        for label, letter in ((1, "A" if i % 2 else "B"), (0, "B" if i % 2 else "A")):
            spans = {"answer": [len(text), len(text) + 1]}
            rows.append({"text": text + letter, "label": label, "group": f"{i}", "pair": f"{i}", "spans": spans})
    return rp.PromptSet.from_records(rows, name=f"{behaviour}, lettered")


def _one_of_each_pair(n: int) -> list[str]:
    """Scenes without their ending, as many happy as sad, whichever letter stands for which."""
    texts = scenes(n).texts
    return [texts[2 * i + i // 2 % 2].removesuffix(ENDING) for i in range(len(texts) // 2)]


def _tried(
    setting: Setting,
    found: Outcomes,
    method: str,
    behaviour: str,
    seed: int,
    make: Callable[[float], Callable[[float], rp.Steering]],
) -> None:
    """Steer at each depth at one price; the depth counts that did more for the development beginnings. Then the same
    with random vectors."""
    lm, beginnings, words = setting.lm, BEGINNINGS[behaviour], WORDS[behaviour]
    before = words(lm, beginnings)

    def measured(of: Callable[[float], rp.Steering]) -> tuple[Priced, rp.Steering, dict[str, dict[str, float]]]:
        paid = priced(lm, of)
        steering = of(paid.strength)
        with rp.steer(lm, steering):
            return paid, steering, words(lm, beginnings)

    made = {depth: measured(make(depth)) for depth in DEPTHS}
    folds = [
        (max(DEPTHS, key=lambda d: np.mean([made[d][2]["log-odds"][b] for b in development])), test)
        for development, test in halves(beginnings, seed)
    ]
    random = {
        depth: measured(lambda s, depth=depth: s * randomised(make(depth)(1.0), seed))
        for depth in {d for d, _ in folds}
    }
    for fold, (depth, test) in enumerate(folds):
        for name, (paid, steering, after) in ((method, made[depth]), (f"random, as {method}", random[depth])):
            found.add(
                f"{name}: {behaviour}",
                seed,
                fold,
                before,
                {"log-odds": {b: after["log-odds"][b] for b in test}},
                depth=depth,
                strength=paid.strength,
                kl=paid.kl,
                reached=paid.reached,
                perplexity_times=off_topic(lm, steering),
            )


def run(setting: Setting) -> tuple[Outcomes, list[str]]:
    lm, found = setting.lm, Outcomes()
    for behaviour in BEGINNINGS:
        for seed in setting.seeds:
            pair = PAIRS[behaviour][seed % len(PAIRS[behaviour])]
            _tried(
                setting,
                found,
                "ActAdd",
                behaviour,
                seed,
                lambda depth, pair=pair: lambda s: actadd.fit(lm, *pair, layer=round(depth * lm.n_layers), strength=s),
            )
        data = caa.with_letters(lettered(behaviour, setting.n // 2))
        sites = {depth: Site("resid.post", round(depth * lm.n_layers)) for depth in DEPTHS}
        store = setting.store(f"letters-{behaviour}", data, sites=sorted(set(sites.values())), at=caa.AT)
        groups = data.frame["group"].unique(maintain_order=True).to_list()
        for seed in setting.seeds:
            half = np.random.default_rng([seed, 11]).permutation(groups)[: len(groups) // 2].tolist()
            _tried(
                setting,
                found,
                "CAA",
                behaviour,
                seed,
                lambda depth, half=half, store=store, sites=sites: (
                    lambda s: caa.fit(store, sites[depth], s, tokens="last", where=pl.col("group").is_in(half))
                ),
            )
    return found, [_price(found), *_unreached(found)]


def _price(found: Outcomes) -> str:
    table = pl.DataFrame(found.runs).group_by("method", maintain_order=True).agg(pl.col("perplexity_times").mean())
    shown = ", ".join(f"{method} ×{times:.3f}" for method, times in table.iter_rows())
    return f"Perplexity on off-topic text, which tuned nothing: {shown}."


def _unreached(found: Outcomes) -> Sequence[str]:
    short = [run for run in found.runs if not run["reached"]]
    if not short:
        return []
    methods = ", ".join(sorted({run["method"] for run in short}))
    return [f"{len(short)} of {len(found.runs)} runs could not be made to cost the price ({methods})."]
