"""Conditional steering: are only those prompts steered that meet the condition?

Enters: sad and happy scenes, questions. Leaves: how often a gate found on the development scenes opens on the others,
and what steering towards happiness does to both kinds with and without it. Two conditions: the scene is sad (hard for a
small model), the prompt is a scene and no question (easy).
"""

import dataclasses

import numpy as np
import polars as pl
from shared import HAPPY, Outcomes, Setting, halves, priced, questions, scenes, share_of

import reprobe as rp
from reprobe.methods import cast
from reprobe.model.sites import Site

TITLE = "CAST (Lee et al. 2024)"
SAD = "the scene is sad"


def prompts(n: int) -> rp.PromptSet:
    """Scenes with their ending, `met` by sad ones, and questions; `kind` says which is which."""
    own = scenes(n).frame.with_columns(kind=pl.col("label"))
    asked = questions(n).frame.unique("group", maintain_order=True)
    asked = asked.with_columns(
        text="Q: " + pl.col("question") + "\nA:", kind=pl.lit("question"), spans=pl.lit([], own.schema["spans"])
    )
    rows = [
        {"id": r["id"], "text": r["text"], "label": r["kind"], "group": r["group"], "pair": r.get("pair")}
        for frame in (own, asked)
        for r in frame.iter_rows(named=True)
    ]
    return rp.PromptSet.from_records(rows, name="scenes and questions")


def run(setting: Setting) -> tuple[Outcomes, list[str]]:
    lm, data, found = setting.lm, prompts(setting.n // 2), Outcomes()
    sites = [Site("resid.post", layer) for layer in share_of(lm, 0.1, 0.6, 2)]
    acts = max(sites, key=lambda site: site.depth)
    store = setting.store("prompts", data, sites=sites, at="mean")
    frame, before = data.frame, HAPPY(lm, data.texts)
    scene = pl.col("label") != "question"
    # A question has no label of its own here, so that each condition is a column of two values.
    conditions = {
        SAD: (pl.when(pl.col("label") == "sadness").then(1).when(scene).then(0), scene),
        "the prompt is a scene": (pl.when(scene).then(1).otherwise(0), pl.lit(True)),
    }
    rates: dict[str, list[cast.Rates]] = {name: [] for name in conditions}
    for seed in setting.seeds:
        for fold, (development, test) in enumerate(halves(frame["group"], seed)):
            own, held_out = pl.col("group").is_in(development), pl.col("group").is_in(test)
            grid = rp.probe(store, rp.MeanDifference(), sites=[acts], positive="happiness", where=own & scene, folds=2)
            direction = grid.directions[acts]
            paid = priced(lm, lambda s, d=direction: rp.Steering(rp.Add(d, s), name="towards happiness"))
            push = rp.Add(direction, paid.strength)
            texts = frame.filter(held_out)
            with rp.steer(lm, push):
                ungated = HAPPY(lm, texts["text"].to_list())
            for name, (met, of) in conditions.items():
                marked = Marked(store, store.index.with_columns(met=met))
                where = own & of
                reader = rp.PCAReader() if name == SAD else rp.MeanDifference()  # the second has no pairs
                probes = rp.probe(marked, reader, label="met", where=where, folds=2, seed=seed, n_jobs=1)
                steering = cast.fit(marked, probes.directions, push, label="met", where=where)
                when = steering.interventions[0].when
                assert when is not None
                rates[name].append(cast.rates(marked, when, label="met", where=held_out & of))
                with rp.steer(lm, steering):
                    gated = HAPPY(lm, texts["text"].to_list())
                for how, after in (("gated", gated), ("always", ungated)):
                    for kind in ("sadness", "happiness", "question"):
                        kept = texts.filter(pl.col("label") == kind)["text"].to_list()
                        found.add(
                            f"{how} ({name}), on {kind}" if how == "gated" else f"always, on {kind}",
                            seed,
                            fold,
                            before,
                            {"log-odds": {text: after["log-odds"][text] for text in kept}},
                            condition=str(when),
                            kl=paid.kl,
                            true_rate=rates[name][-1].true,
                            false_rate=rates[name][-1].false,
                            f1=rates[name][-1].f1,
                        )
    return found, [
        f"“{name}”: opens on {np.mean([r.true for r in own]):.2f} of the held-out prompts that meet it "
        f"({min(r.true for r in own):.2f}–{max(r.true for r in own):.2f} over folds and seeds) and on "
        f"{np.mean([r.false for r in own]):.2f} of the others ({min(r.false for r in own):.2f}–"
        f"{max(r.false for r in own):.2f}); F1 {np.mean([r.f1 for r in own]):.2f}."
        for name, own in rates.items()
    ]


@dataclasses.dataclass(frozen=True)
class Marked:
    """A store whose index says of each row whether it meets a condition."""

    store: rp.ActivationStore
    index: pl.DataFrame

    def __getattr__(self, name: str):
        return getattr(self.store, name)
