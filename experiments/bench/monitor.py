"""What a live probe costs: tokens/s of `lm.generate` with one direction at every block, and without.

    uv run python experiments/bench/monitor.py [--model M] [--device D] [--batches N …] [--json F] [--markdown F]

Enters: a model. Leaves: JSON and Markdown with the loss of speed for each batch size, on the machine at hand. Both
sides generate the same number of tokens in turn in one process, so that a change in the machine meets both. Run it on
an idle machine: the claim is 3 %, which is less than what other work on the same cores does to a single round.
"""

import argparse
import os
import statistics
from collections.abc import Sequence

import numpy as np
import torch
from race import Side, race
from record import Claim, Recorder, Work, add_outputs

import reprobe as rp

PLAIN, WATCHED = "generate", "generate, monitored"
LOSS = 0.03


def overhead(lm: rp.LanguageModel, prompts: Sequence[str], tokens: int, repeats: int) -> Work:
    directions = [
        rp.Direction.from_vector(site, np.random.default_rng(i).normal(size=lm.width(site)))
        for i, site in enumerate(lm.sites("resid.post@*"))
    ]
    n = len(prompts) * tokens
    work = Work(
        f"batch of {len(prompts)}",
        lm.name,
        f"{tokens} new tokens for {len(prompts)} {'prompt' if len(prompts) == 1 else 'prompts'}, greedy, with a cache, "
        f"{lm.dtype} on {lm.device}; one direction at each of {len(directions)} blocks' `resid.post`.",
    )

    def plain() -> list[str]:
        texts = lm.generate(prompts, max_new_tokens=tokens, min_new_tokens=tokens)
        if lm.device.type == "cuda":
            torch.cuda.synchronize(lm.device)
        return texts

    def watched() -> list[str]:
        with lm.monitor(directions) as monitor:
            texts = plain()
        if any(len(r.tokens) < tokens for r in monitor.readings):
            raise RuntimeError("the monitor missed tokens")
        return texts

    if plain() != watched():
        raise RuntimeError("the monitored texts are others")
    times = race(
        [Side(PLAIN, plain, n), Side(WATCHED, watched, n)],
        repeats,
    )
    work.timings = list(times.values())
    work.claims = [Claim("share of tokens/s lost", 1 - times[PLAIN].best / times[WATCHED].best, "≤", LOSS)]
    pairs = zip(times[PLAIN].seconds, times[WATCHED].seconds, strict=True)
    median = statistics.median(1 - a / b for a, b in pairs)
    work.notes.append(f"Median over the rounds, each with both sides: {median:.2%}.")
    return work


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", help="default: as the model's weights are kept")
    parser.add_argument("--device", help="default: CUDA where there is one")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="prompts generated from together")
    parser.add_argument("--tokens", type=int, default=48, help="new tokens per prompt")
    parser.add_argument("--repeats", type=int, default=15, help="rounds, of which the fastest of each side counts")
    add_outputs(parser)
    chosen = parser.parse_args()
    if min(*chosen.batches, chosen.tokens, chosen.repeats) < 1:
        parser.error("--batches, --tokens and --repeats are 1 or more")
    return chosen


def main() -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: nothing asks a hub
    chosen = arguments()
    lm = rp.LanguageModel.load(chosen.model, dtype=chosen.dtype, device=chosen.device)
    command = (
        "uv run python experiments/bench/monitor.py "
        f"--model {chosen.model} --dtype {str(lm.dtype).removeprefix('torch.')} --device {lm.device.type} "
        f"--batches {' '.join(map(str, chosen.batches))} --tokens {chosen.tokens} --repeats {chosen.repeats}"
    )
    record = Recorder("Monitoring", command, chosen, lm.device)
    texts = rp.PromptSet.load("cities").texts
    for n in chosen.batches:
        record.add(overhead(lm, texts[:n], chosen.tokens, chosen.repeats))
    print(record)


if __name__ == "__main__":
    main()
