"""Multiple choice in forest packs against one forward per answer; all sides in one process, in turn.

    uv run python experiments/bench/choices.py [--models M …] [--questions N] [--answers N] [--json F] [--markdown F]

Enters: names of models. Leaves: JSON and Markdown with the claim, the measured ratios, and the tokens/s of every side.
The questions are TruthfulQA's in the folder that REPROBE_DATA names, else our `misconceptions`. One forward per answer
runs on a sample of the answers and is scaled by tokens; scores that do not agree end the run. Run it on an idle
machine: two cores that others use too give ratios of nothing.
"""

import argparse
import os
from pathlib import Path

import numpy as np
import torch
from race import Side, race
from record import Claim, Recorder, Work, add_outputs

import reprobe as rp
from reprobe.evaluation import PRIMER, first_questions

OURS = "reprobe, forest packs"
#: As the benchmark's own scripts do it, and with the work that it does for nothing left out.
WHOLE, LEAN = "one forward per answer, logits of every token", "one forward per answer, logits of the answer only"
TARGET, SEED = 4.0, 0
#: Nats that two ways of summing a score may differ by.
SAME = 1e-3


class OneByOne:
    """One answer after the other through the stock network."""

    def __init__(self, lm: rp.LanguageModel, texts: list[tuple[str, str]]) -> None:
        self.lm, self.texts = lm, texts

    @torch.inference_mode()
    def scores(self, *, lean: bool) -> np.ndarray:
        out = []
        for prompt, answer in self.texts:
            coded = self.lm.tokenizer(prompt + answer, return_offsets_mapping=True)
            ids = torch.tensor([coded["input_ids"]])
            first = next(i for i, (_, end) in enumerate(coded["offset_mapping"]) if end > len(prompt))
            keep = ids.shape[1] - first + 1 if lean else 0
            logits = self.lm.net(ids, use_cache=False, logits_to_keep=keep).logits[0]
            logp = logits[-(ids.shape[1] - first + 1) : -1].log_softmax(-1)
            out.append(float(logp.gather(1, ids[0, first:, None]).double().sum()))
        return np.array(out)


def questions(n: int | None) -> rp.PromptSet:
    folder = os.environ.get("REPROBE_DATA")
    data = rp.PromptSet.load(Path(folder) / "truthfulqa" / "mc_task.json" if folder else "misconceptions")
    return data if n is None else first_questions(data, n)


def measure(model: str, data: rp.PromptSet, answers: int, repeats: int) -> Work:
    lm = rp.LanguageModel.load(model)
    pairs = [(f"{PRIMER}\n\nQ: {q}\nA:", f" {a}") for q, a in data.frame.select("question", "answer").iter_rows()]
    lengths = np.array([len(ids) for ids in lm.tokenizer([p + a for p, a in pairs])["input_ids"]])
    drawn = np.sort(np.random.default_rng(SEED).permutation(len(pairs))[:answers])
    single = OneByOne(lm, [pairs[i] for i in drawn])
    total, timed = int(lengths.sum()), int(lengths[drawn].sum())

    found = rp.multiple_choice(lm, data)
    ids = dict(zip(found.answers["id"], found.answers["score"], strict=True))
    ours = np.array([ids[data.frame["id"][int(i)]] for i in drawn])
    furthest = float(np.abs(ours - single.scores(lean=True)).max())
    if furthest > SAME:
        raise SystemExit(f"{model}: scores differ by up to {furthest:.2g} nats: the sides do not do the same work")

    times = race(
        [
            Side(OURS, lambda: rp.multiple_choice(lm, data), total),
            Side(WHOLE, lambda: single.scores(lean=False), timed, total),
            Side(LEAN, lambda: single.scores(lean=True), timed, total),
        ],
        repeats,
    )
    groups = found.table.height
    about = (
        f"`{data.name}`: {groups:,} questions, {len(pairs):,} answers, {total:,} tokens with the six-question primer."
    )
    work = Work("multiple choice", model, about, timings=list(times.values()))
    for side in (WHOLE, LEAN):
        work.claims.append(Claim(f"times as fast as {side}", times[side].best / times[OURS].best, "≥", TARGET))
    work.notes.append(f"Scores of {len(drawn)} answers differ from one forward each by at most {furthest:.1g} nats.")
    return work


def main() -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no side asks a hub for anything
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["smollm2-135m", "gemma3-270m"])
    parser.add_argument("--questions", type=int, metavar="N", help="only the first N questions")
    parser.add_argument("--answers", type=int, default=100, help="answers that run one by one")
    parser.add_argument("--repeats", type=int, default=3, help="rounds, of which the fastest counts")
    add_outputs(parser)
    chosen = parser.parse_args()
    limit = [] if chosen.questions is None else ["--questions", str(chosen.questions)]
    shown = ["--models", *chosen.models, *limit, "--answers", str(chosen.answers), "--repeats", str(chosen.repeats)]
    record = Recorder("Multiple choice", " ".join(["uv run python experiments/bench/choices.py", *shown]), chosen)
    data = questions(chosen.questions)
    for model in chosen.models:
        record.add(measure(model, data, chosen.answers, chosen.repeats))
    print(record)


if __name__ == "__main__":
    main()
