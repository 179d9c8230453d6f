"""Directional ablation: is a mood that a scene calls for gone when one direction is?

Enters: scenes that call for a sad word, and happy ones on the same topics. Leaves: log-odds of sad against happy words
on scenes that neither gave the direction nor chose it, while it is ablated everywhere, or a random direction is.
"""

import numpy as np
from shared import HAPPY, TUNING, Outcomes, Setting, Words, baseline_of, halves, scenes, share_of

import reprobe as rp
from reprobe.methods import refusal

TITLE = "Directional ablation (Arditi et al. 2024), of sadness"
SAD = Words(HAPPY.negative, HAPPY.positive)
#: The paper's rule first; where no candidate meets it, twice as much KL, and so on.
KLS = (0.1, 0.2, 0.4, 0.8)


def _best(found: refusal.Search) -> tuple[rp.Direction, float] | None:
    """The candidate that the rule allows, and the KL that it had to allow; None if that would be more than all."""
    for kl in KLS:
        rule = refusal.Rule(max_kl=kl)
        allowed = [rule.allows(k, i) for k, i in found.table.select("kl", "induce").iter_rows()]
        if any(allowed):
            kept = refusal.Search(found.table.with_columns(allowed=np.array(allowed)), found.directions, found.base)
            return kept.best(), kl
    return None


def run(setting: Setting) -> tuple[Outcomes, list[str]]:
    lm, data, found = setting.lm, scenes(setting.n // 2), Outcomes()
    frame = data.frame
    odds = SAD(lm, frame["text"].to_list())
    baseline = baseline_of(lm, TUNING)
    too_dear: list[float] = []
    for seed in setting.seeds:
        for fold, (development, test) in enumerate(halves(frame["group"], seed)):
            own = frame.filter(frame["group"].is_in(development))
            sides = [own.filter(own["label"] == label)["text"].to_list() for label in ("sadness", "happiness")]
            search = refusal.search(
                lm,
                *sides,
                refusal.NextToken(tuple(f" {word}" for word in HAPPY.negative)),
                layers=share_of(lm, 0.2, 0.8, 3),
                positions=[-1],
                held_out=0.4,
                seed=seed,
            )
            best = _best(search)
            if best is None:
                too_dear.append(float(search.table["kl"].min()))
                continue
            direction, allowed = best
            v = np.random.default_rng([seed, fold, 13]).normal(size=lm.d_model)
            for method, d in (
                ("ablation", direction),
                ("ablation of a random direction", rp.Direction.from_vector("resid.post@0", v)),
            ):
                steering = refusal.ablation(lm, d)
                kl = baseline.divergence(steering).mean
                for label in ("sadness", "happiness"):
                    texts = frame.filter(frame["group"].is_in(test), frame["label"] == label)["text"].to_list()
                    with rp.steer(lm, steering):
                        after = SAD(lm, texts)
                    found.add(
                        f"{method}, {label} called for",
                        seed,
                        fold,
                        odds,
                        after,
                        site=str(direction.site),
                        max_kl=allowed,
                        kl=kl,
                    )
    notes = []
    if too_dear:
        notes.append(
            f"{len(too_dear)} of {2 * len(setting.seeds)} searches found nothing to ablate: no candidate costs at most "
            f"{KLS[-1]} nats on scenes that do not call for sadness and induces it when added; the cheapest of all "
            f"costs {min(too_dear):.2f}."
        )
    if not found.runs:
        return found, notes
    loose = [run for run in found.runs[::4] if run["max_kl"] > KLS[0]]
    chosen = sorted({run["site"] for run in found.runs})
    return found, [
        *notes,
        f"Chosen at {', '.join(chosen)}; {len(loose)} of {len(found.runs[::4])} searches had no candidate under the "
        f"paper's {KLS[0]} nats on scenes that do not call for sadness, and were allowed more.",
    ]
