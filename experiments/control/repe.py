"""Representation engineering: does a direction read from an honest against a dishonest speaker, or the difference that
their two prompts make token by token, make true answers likelier?

Enters: `honesty` (statements under two personas), questions. Leaves: MC1 and MC2. Reading vectors are fitted on half of
the statements, drawn by the seed; the blocks that are controlled are chosen on the development questions. Contrast
vectors are fitted on nothing: the seeds are three wordings of the two personas.
"""

import numpy as np
import polars as pl
from shared import (
    PRICE,
    TUNING,
    Outcomes,
    Priced,
    Setting,
    at_price,
    baseline_of,
    choices,
    halves,
    priced,
    questions,
    randomised,
    share_of,
)

import reprobe as rp
from reprobe.evaluation.choices import first_questions, mc1, mc2
from reprobe.evaluation.passages import divergences, measured
from reprobe.methods import repe
from reprobe.model.sites import Site

TITLE = "RepE (Zou et al. 2023)"
WINDOWS = ((0.25, 0.5), (0.5, 0.75))
#: (positive, negative) prompts before a question; the second three say nothing of honesty.
PERSONAS = (
    ("Pretend to be an honest person. ", "Pretend to be a dishonest person. "),
    ("Imagine that a truthful speaker answers. ", "Imagine that an untruthful speaker answers. "),
    ("Answer as someone who never lies. ", "Answer as someone who always lies. "),
)
BESIDE = (
    ("Pretend to be a tall person. ", "Pretend to be a short person. "),
    ("Imagine that a lively speaker answers. ", "Imagine that a sleepy speaker answers. "),
    ("Answer as someone who never sings. ", "Answer as someone who always sings. "),
)


def reading(setting: Setting, data: rp.PromptSet, found: Outcomes) -> list[str]:
    lm, honesty = setting.lm, rp.PromptSet.load("honesty")
    layers = share_of(lm, WINDOWS[0][0], WINDOWS[-1][1])
    statements = honesty.frame["group"].unique(maintain_order=True).to_list()[: 2 * setting.n]
    store = setting.store(
        "honesty",
        honesty.where(group=statements),
        sites=[Site("resid.post", layer) for layer in layers],
        at="span:statement:last",
    )
    before, accuracy = choices(lm, data), []
    for seed in setting.seeds:
        half = np.random.default_rng([seed, 5]).permutation(statements)[: len(statements) // 2].tolist()
        grid = rp.probe(store, rp.PCAReader(), where=pl.col("group").is_in(half), seed=seed, n_jobs=1)
        accuracy.append(float(grid.table["accuracy"].max()))  # type: ignore[arg-type]
        made: dict[tuple[float, float], tuple[Priced, dict[str, dict[str, float]]]] = {}
        for window in WINDOWS:
            # Once for all questions: no question has a part in the vectors.
            def make(strength: float, window: tuple[float, float] = window, grid: rp.ProbeGrid = grid) -> rp.Steering:
                return repe.control(grid.directions, strength, layers=share_of(lm, *window))

            paid = priced(lm, make)
            with rp.steer(lm, make(paid.strength)):
                made[window] = paid, choices(lm, data)
        for fold, (development, test) in enumerate(halves(data.frame["group"], seed)):
            best = max(WINDOWS, key=lambda w: np.mean([made[w][1]["mc2"][q] for q in development]))
            paid, after = made[best]
            kept = {metric: {q: values[q] for q in test} for metric, values in after.items()}
            found.add("reading vectors", seed, fold, before, kept, blocks=str(best), strength=paid.strength, kl=paid.kl)

            random = randomised(repe.control(grid.directions, 1.0, layers=share_of(lm, *best)), seed)
            paid = priced(lm, lambda s, random=random: s * random)
            with rp.steer(lm, paid.strength * random):
                after = choices(lm, data.where(group=test))
            found.add("random vectors", seed, fold, before, after, blocks=str(best), strength=paid.strength, kl=paid.kl)
    return [
        f"The personas are told apart from the statement's last token at {np.mean(accuracy):.2f} (best block, "
        f"cross-validated, mean over seeds; {len(half)} statements, chance 0.50)."
    ]


def streams(prompts: list[str], personas: tuple[str, str]) -> repe.Streams:
    return repe.Streams(prompts, *([persona + prompt for prompt in prompts] for persona in personas))


def price(lm: rp.LanguageModel, steering: rp.Steering, personas: tuple[str, str]) -> float:
    """KL on `TUNING` under contrast control."""
    rows = [prompt for side in streams([p.prompt for p in TUNING], personas).rows for prompt in side]
    with rp.steer(lm, steering):
        runs = lm.continued(rows, [p.continuation for p in TUNING] * 3, in_step=True)
    plain = baseline_of(lm, TUNING).runs
    each = [
        divergences(lm, measured(text, a), measured(text, b)) for text, a, b in zip(TUNING, plain, runs, strict=False)
    ]
    return float(np.concatenate(each).mean())


def contrast(setting: Setting, data: rp.PromptSet, found: Outcomes) -> list[str]:
    lm, sites = setting.lm, [Site("resid.post", layer) for layer in share_of(setting.lm, 0.25, 0.75)]
    asked = data.frame.group_by("group", "question", maintain_order=True).agg(pl.col("answer", "label", "best"))
    prompts = [f"Q: {question}\nA:" for question in asked["question"]]
    answers = [[f" {answer}" for answer in own] for own in asked["answer"]]

    def judged(scores: list[np.ndarray]) -> dict[str, dict[str, float]]:
        out: dict[str, dict[str, float]] = {"mc1": {}, "mc2": {}}
        for own, row in zip(scores, asked.iter_rows(named=True), strict=True):
            true = np.array(row["label"]) == 1
            out["mc1"][row["group"]] = mc1(own, true, row["best"].index(True))
            out["mc2"][row["group"]] = mc2(own, true)
        return out

    before = judged(lm.logprobs(prompts, answers))
    for method, sides in (("contrast vectors", PERSONAS), ("contrast, beside honesty", BESIDE)):
        for seed in setting.seeds:
            personas = sides[seed % len(sides)]
            paid = at_price(lambda a, personas=personas: price(lm, repe.contrast(lm, sites, a), personas))
            steering = repe.contrast(lm, sites, paid.strength)
            after = judged(repe.logprobs(lm, steering, streams(prompts, personas), answers))
            found.add(method, seed, 0, before, after, blocks="(0.25, 0.75)", strength=paid.strength, kl=paid.kl)
    kept = [r["strength"] for r in found.runs if r["method"] == "contrast vectors"]
    return [f"α of the contrast vectors at a KL of {PRICE}: {', '.join(f'{a:.2f}' for a in kept)}."]


def run(setting: Setting) -> tuple[Outcomes, list[str]]:
    data, found = questions(setting.n), Outcomes()
    notes = reading(setting, data, found)
    return found, [*notes, *contrast(setting, first_questions(data, max(4, setting.n // 2)), found)]
