"""Causal tracing against the loop of whole forward passes; all sides in one process, in turn.

    uv run python experiments/bench/tracing.py [--models M …] [--one N] [--facts N] [--json F] [--markdown F]

Enters: names of models. Leaves: JSON and Markdown with the claims, the measured ratios and times. The loop is that of
the published code: for every kind, token and block one forward pass of eleven rows, one clean and ten with noise, and
hooks that copy the clean row's state. It runs on a sample of its passes and is scaled by their number; probabilities
that do not agree with ours end the run. Besides, it is timed without the logits that it does not need, and so with the
matrix products that ours takes (see `reprobe/model/products.py`), to tell what is due to which. Run it on an idle
machine: two cores that others use too give ratios of nothing.
"""

import argparse
import contextlib
import os
import time
from typing import Any

import numpy as np
import torch
from race import Side, race, say
from record import Claim, Recorder, Work, add_outputs

import reprobe as rp
from reprobe.methods import tracing
from reprobe.model.products import FastProducts
from reprobe.model.text import tokenise
from reprobe.prompts import facts_of

OURS = "reprobe"
WHOLE, LEAN, FAST = (
    "one forward per kind, token and block, logits of every token",
    "the same, logits of the last token only",
    "the same, and oneDNN's matrix products",
)
TARGET, SEED, SAME = 8.0, 0, 1e-5
MINUTES = 15.0


class Loop:
    """The published loop on one fact."""

    def __init__(self, lm: rp.LanguageModel, fact: rp.Fact, grid: tracing.TraceGrid) -> None:
        (row,) = tokenise(lm.tokenizer, [fact.prompt], spans=[{"subject": fact.span}], suffixes=[f" {fact.true}"])
        if len(row.ids) - row.suffix != 1:
            raise SystemExit(f"{fact.true!r} is not one token: the loop reads the first only")
        self.lm, self.how, self.n, self.target = lm, grid.settings, row.suffix, int(row.ids[-1])
        self.batch = torch.from_numpy(row.ids[:-1])[None].expand(self.how.samples + 1, -1).contiguous()
        subject = (int(row.spans["subject"][0]), int(row.spans["subject"][-1]) + 1)
        seen = []
        for noise in ([tracing.corruption(fact, subject, self.how, grid.std)], []):
            with torch.no_grad(), rp.steer(lm, *noise), rp.observe(lm, "embed") as found:
                lm.net(input_ids=self.batch[1:])
            seen.append(found[rp.Site("embed")])
        self.noise = torch.nn.functional.pad(seen[0] - seen[1], (0, 0, 0, 0, 1, 0))  # row 0 is clean
        every = np.ndindex(len(self.how.kinds), lm.n_layers, self.n)
        self.passes = [(k, layer, t) for k, layer, t in every]

    @torch.inference_mode()
    def run(self, k: int, layer: int, t: int, *, lean: bool) -> float:
        kind, half = self.how.kinds[k], self.how.window // 2
        blocks = [layer] if kind == "resid.post" else range(layer - half, layer - half + self.how.window)

        def corrupt(module: Any, args: Any, kwargs: Any) -> Any:
            if args:
                return (args[0] + self.noise, *args[1:]), kwargs
            return args, kwargs | {"hidden_states": kwargs["hidden_states"] + self.noise}

        def restore(module: Any, args: Any, out: Any) -> Any:
            h = out if torch.is_tensor(out) else out[0]
            h[1:, t] = h[0, t]
            return out

        with contextlib.ExitStack() as stack:
            first = self.lm.architecture.blocks(self.lm.net)[0]
            stack.callback(first.register_forward_pre_hook(corrupt, with_kwargs=True).remove)
            for block in blocks:
                if 0 <= block < self.lm.n_layers:
                    tap = self.lm.architecture.tap(self.lm.net, rp.Site(kind, block))
                    stack.callback(tap.module.register_forward_hook(restore).remove)
            out = self.lm.net(input_ids=self.batch, use_cache=False, logits_to_keep=1 if lean else 0)
        return float(out.logits[1:, -1].softmax(-1)[:, self.target].mean())


def measure(model: str, one: int, passes: int, repeats: int) -> Work:
    lm = rp.LanguageModel.load(model)
    fact = facts_of("facts", limit=one + 1)[one]
    grid = tracing.trace(lm, fact)
    loop, found = Loop(lm, fact, grid), grid.traces[0].restored
    drawn = [loop.passes[i] for i in np.random.default_rng(SEED).permutation(len(loop.passes))[:passes]]
    furthest = max(abs(loop.run(*at, lean=True) - float(found[at])) for at in drawn)
    if furthest > SAME:
        raise SystemExit(f"{model}: probabilities differ by up to {furthest:.2g}: the sides do not do the same work")

    def sampled(*, lean: bool, fast: bool = False) -> None:
        with FastProducts() if fast else contextlib.nullcontext():
            for at in drawn:
                loop.run(*at, lean=lean)

    tokens = loop.batch.numel()
    total, timed = len(loop.passes) * tokens, len(drawn) * tokens
    times = race(
        [
            Side(OURS, lambda: tracing.trace(lm, fact), total),
            Side(WHOLE, lambda: sampled(lean=False), timed, total),
            Side(LEAN, lambda: sampled(lean=True), timed, total),
            Side(FAST, lambda: sampled(lean=True, fast=True), timed, total),
        ],
        repeats,
    )
    about = (
        f"“{fact.prompt}” → {fact.true}, {loop.n} tokens, three kinds, {len(loop.passes):,} forward passes of 11 rows."
    )
    work = Work("tracing one fact", model, about, timings=list(times.values()))
    work.claims = [Claim(f"times as fast as {s}", times[s].best / times[OURS].best, "≥", TARGET) for s in (WHOLE, LEAN)]
    work.notes.append(
        f"Of {len(drawn)} passes of the loop, probabilities differ from ours by at most {furthest:.1g}. With the same "
        f"matrix products, tracing is {times[FAST].best / times[OURS].best:.1f} times as fast as the lean loop: that "
        "much is due to computing less."
    )
    return work


def many(model: str, n: int) -> Work:
    lm = rp.LanguageModel.load(model)
    facts = tracing.known(lm, facts_of("facts"), limit=n)
    start = time.perf_counter()
    tracing.trace(lm, facts, progress=lambda what, done, of: say(f"{what}: {done:g} of {of:g}"))
    minutes = (time.perf_counter() - start) / 60
    work = Work("tracing many facts", model, f"The first {len(facts)} of `facts` that the model knows, three kinds.")
    work.claims.append(Claim(f"minutes for {len(facts)} facts", minutes, "≤", MINUTES))
    return work


def main() -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no side asks a hub for anything
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["smollm2-135m"])
    parser.add_argument("--one", type=int, default=0, metavar="N", help="the number of the fact in `facts`")
    parser.add_argument("--passes", type=int, default=30, help="forward passes of the loop that are timed")
    parser.add_argument("--facts", type=int, default=100, help="facts traced together; 0: none")
    parser.add_argument("--repeats", type=int, default=3, help="rounds, of which the fastest counts")
    add_outputs(parser)
    chosen = parser.parse_args()
    shown = f"--models {' '.join(chosen.models)} --one {chosen.one} --passes {chosen.passes} --facts {chosen.facts}"
    command = f"uv run python experiments/bench/tracing.py {shown} --repeats {chosen.repeats}"
    record = Recorder("Causal tracing", command, chosen)
    for model in chosen.models:
        record.add(measure(model, chosen.one, chosen.passes, chosen.repeats))
        if chosen.facts:
            record.add(many(model, chosen.facts))
    print(record)


if __name__ == "__main__":
    main()
