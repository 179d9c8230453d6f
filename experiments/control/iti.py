"""Inference-time intervention: does pushing the heads that know make true answers likelier, at the same price as
pushing any heads, or pushing them anywhere?

Enters: questions. Leaves: MC1 and MC2 of questions that neither ranked heads nor gave directions.
"""

from dataclasses import replace

import numpy as np
from shared import Outcomes, Setting, choices, priced, questions

import reprobe as rp
from reprobe.methods import iti

TITLE = "ITI (Li et al. 2023)"
#: The paper takes 48 of 1024 heads.
SHARE = 1 / 16


def shuffled(ranking: iti.HeadRanking, seed: int) -> iti.HeadRanking:
    """The heads in a random order, each with its own direction and σ."""
    order = np.random.default_rng([seed, 3]).permutation(len(ranking.sites))
    directions = {ranking.sites[i]: ranking.directions[ranking.sites[i]] for i in order}
    return replace(ranking, directions=directions, accuracy=ranking.accuracy[order])


def run(setting: Setting) -> tuple[Outcomes, list[str]]:
    lm, data, found = setting.lm, questions(setting.n), Outcomes()
    store = setting.store("heads", data, sites="attn.heads@*", at="last")
    group, before = store.index["group"].to_numpy(), choices(lm, data)
    for seed in setting.seeds:
        rankings = iti.head_ranking(store, seed=seed)
        elsewhere = iti.head_ranking(store, direction=rp.RandomReader(seed=seed), seed=seed)
        for fold, (ranking, other) in enumerate(zip(rankings, elsewhere, strict=True)):
            K = max(1, round(SHARE * len(ranking.sites)))
            test = data.where(group=sorted(set(group[ranking.test])))
            sides = {"ITI": ranking, "random heads": shuffled(ranking, seed), "random directions": other}
            for method, side in sides.items():

                def make(alpha: float, side: iti.HeadRanking = side, K: int = K) -> rp.Steering:
                    return side.steering(K=K, alpha=alpha, tokens="generated")

                paid = priced(lm, make, start=5.0)
                with rp.steer(lm, make(paid.strength)):
                    after = choices(lm, test)
                best = float(side.accuracy[:K].mean())
                found.add(method, seed, fold, before, after, K=K, alpha=paid.strength, kl=paid.kl, probes=best)
    top = np.mean([r["probes"] for r in found.runs if r["method"] == "ITI"])
    note = f"{K} of {len(ranking.sites)} heads, whose probes read truth at {top:.2f} of the validation answers (mean)."
    return found, [note]
