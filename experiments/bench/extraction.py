"""Extraction to disk against the ways in which activations are usually read; both sides in one run.

    uv run python experiments/bench/extraction.py [MODEL] [N]

Reads the last token of N `cities` statements at every `resid.post`. Prints one JSON object: tokens/s of each way, and
the ratios of their times. Each way is run twice and its faster time counts; the model is warm.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import reprobe as rp


def one_by_one(lm, texts):
    """Each prompt by itself with output_hidden_states and the whole head, as many research scripts do."""
    with torch.no_grad():
        for text in texts:
            out = lm.net(**lm.tokenizer(text, return_tensors="pt"), output_hidden_states=True)
            torch.stack(out.hidden_states)[:, 0, -1].numpy()


def bare_forward(lm, texts):
    """The blocks alone on length-sorted padded batches of the same budget, nothing read and nothing written."""
    coded = sorted((lm.tokenizer(t)["input_ids"] for t in texts), key=len, reverse=True)
    with torch.no_grad():
        while coded:
            width = len(coded[0])
            n = max(1, 512 // width)
            rows, coded = coded[:n], coded[n:]
            ids = torch.full((len(rows), width), lm.pad_id)
            for i, row in enumerate(rows):
                ids[i, : len(row)] = torch.tensor(row)
            lm.architecture.trunk(lm.net)(input_ids=ids, use_cache=False)


def ours(lm, data):
    with tempfile.TemporaryDirectory() as folder:
        rp.extract(lm, data, sites="resid.post@*", at="last", to=Path(folder) / "s.reprobe")


def best_of_two(run, *arguments):
    times = []
    for _ in range(2):
        start = time.perf_counter()
        run(*arguments)
        times.append(time.perf_counter() - start)
    return min(times)


def main(model="smollm2-135m", n="256"):
    lm = rp.LanguageModel.load(model)
    data = rp.PromptSet.load("cities").head(int(n))
    tokens = int(np.sum([len(lm.tokenizer(t)["input_ids"]) for t in data.texts]))
    ours(lm, data.head(8))
    seconds = {
        "one by one": best_of_two(one_by_one, lm, data.texts),
        "bare forward of the blocks": best_of_two(bare_forward, lm, data.texts),
        "reprobe, to disk": best_of_two(ours, lm, data),
    }
    mine = seconds["reprobe, to disk"]
    print(
        json.dumps(
            {
                "model": model,
                "prompts": len(data),
                "tokens": tokens,
                "tokens per second": {k: round(tokens / s) for k, s in seconds.items()},
                "times as long as reprobe": {k: round(s / mine, 2) for k, s in seconds.items()},
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
