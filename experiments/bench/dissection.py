"""What dissection costs beside the forward pass, and how long all neurons and concepts take.

    uv run python experiments/bench/dissection.py [--model M] [--device D] [--tokens N] [--json F] [--markdown F]

Enters: a model. Leaves: JSON and Markdown with the share of the time that counting takes, the minutes of a whole
dissection and its peak memory, on the machine at hand. The stream are words of the project's own texts in random order,
so that no rows share a beginning and none is computed once for several. The whole stream is run once, both sides in
turn, pack by pack: what else the machine does meets both alike.
"""

import argparse
import os
import resource
import sys
import time
from typing import Any

import numpy as np
import torch
from race import Timing
from record import Claim, Recorder, Work, add_outputs

import reprobe as rp
from reprobe.methods import counting, overlap
from reprobe.methods.concepts import masks, ready
from reprobe.methods.stream import TokenStream, token_stream
from reprobe.methods.units import readings
from reprobe.model.hooks import visit
from reprobe.model.packs import lay_out
from reprobe.prompts.catalog import bundled

QUANTILE, PERMUTATIONS, MINUTES, SHARE = 0.005, 20, 15, 0.25


def random_words(lm: rp.LanguageModel, tokens: int) -> TokenStream:
    texts = [t for name in bundled() for t in rp.PromptSet.load(name).frame["text"].drop_nulls()]
    words = np.array(" ".join(texts).split())
    rng = np.random.default_rng(0)
    rows = [" ".join(rng.choice(words, 120)) for _ in range(tokens // 100)]
    return token_stream(lm, rows, tokens=tokens)


def dissection(lm: rp.LanguageModel, tokens: int) -> Work:
    stream, read = random_words(lm, tokens), readings(lm, "mlp.neurons@*")
    start = time.perf_counter()
    found = masks(stream, ready(), absent="drop")
    masking = time.perf_counter() - start
    k = int(QUANTILE * stream.n)
    counters = {r.site: counting.Counter(r, k + 1, found.of.shape[1], lm.device) for r in read}
    sites, plan = list(counters), lm.plan(stream.ids, stream.starts)
    seconds = {"forward": 0.0, "counted": 0.0}

    def nothing(site: rp.Site, h: torch.Tensor) -> None:
        pass

    for p in range(plan.n_packs):
        layout = lay_out(plan, p, stream.ids, stream.starts)
        inputs = lm.pack_inputs(layout)

        def counted(plan_of: int = p, layout: Any = layout, inputs: Any = inputs) -> None:
            pack = counting.Pack.of(layout, plan.pack(plan_of), stream, found.of)
            visit(lm, inputs, sites, lambda site, h: counters[site].see(h, pack))

        def forward(inputs: Any = inputs) -> None:
            visit(lm, inputs, sites, nothing)

        sides = [("forward", forward), ("counted", counted)]
        for name, run in sides if p % 2 else sides[::-1]:
            start = time.perf_counter()
            run()
            if lm.device.type == "cuda":
                torch.cuda.synchronize(lm.device)
            seconds[name] += time.perf_counter() - start
        if p % 10 == 0:
            print(f"pack {p + 1} of {plan.n_packs}: {seconds}", file=sys.stderr, flush=True)
    start = time.perf_counter()
    counts = [counters[site].counts(lm) for site in sites]
    overlap.common(counts, found.of)
    closing = time.perf_counter() - start
    start = time.perf_counter()
    overlap.chance(counts, found.of, PERMUTATIONS)
    null = time.perf_counter() - start
    whole = masking + seconds["counted"] + closing + null
    counting_share = (masking + seconds["counted"] + closing - seconds["forward"]) / seconds["forward"]
    n = len(stream.ids)
    work = Work(
        "dissection",
        lm.name,
        f"{n:,} tokens in rows of {int(np.diff(stream.starts).max())}, {sum(r.n for r in read):,} neurons, "
        f"{found.of.shape[1]} concepts, top {QUANTILE:.1%}, {lm.dtype} on {lm.device}. *Counted* is the forward pass "
        "with everything that is counted on the way.",
    )
    work.claims = [
        Claim("time of counting over that of the forward pass", counting_share, "≤", SHARE),
        Claim("minutes for 200,000 tokens, with the null", whole / 60 * 200_000 / n, "≤", MINUTES),
    ]
    work.timings = [Timing(name, n, n, (s,)) for name, s in seconds.items()]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    work.notes = [
        f"Concept masks {masking:.1f} s, tops sorted and overlaps {closing:.1f} s, {PERMUTATIONS} rotations {null:.1f} "
        f"s (not part of counting). Peak memory {peak:.2f} GiB, of which tops "
        f"{14 * sum(r.n for r in read) * (k + 1) / 2**30:.2f} GiB."
    ]
    return work


def main() -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: nothing asks a hub
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", help="default: as the model's weights are kept")
    parser.add_argument("--device", help="default: CUDA where there is one")
    parser.add_argument("--tokens", type=int, default=200_000)
    add_outputs(parser)
    chosen = parser.parse_args()
    lm = rp.LanguageModel.load(chosen.model, dtype=chosen.dtype, device=chosen.device)
    command = f"uv run python experiments/bench/dissection.py --model {chosen.model} --tokens {chosen.tokens}"
    method = "The stream is run once, with and without counting in turn, pack by pack"
    record = Recorder("Dissection", command, chosen, lm.device, method)
    record.add(dissection(lm, chosen.tokens))
    print(record)


if __name__ == "__main__":
    main()
