"""Steered generation against no steering, against other libraries, and against the same work done plainly, in turn.

    uv run --group bench python experiments/bench/control.py [--models M …] [--tokens N] [--repeats N] [--json F] …

Enters: names of models. Leaves: JSON and Markdown with each claim, its target, the measured ratio, and the tokens/s of
every side, on the machine at hand. Run it on an idle machine: the differences are a few hundredths of a second. All
sides generate greedily, each on its own network, and must write the same text (those that are steered); peers that are
not installed or do not run are left out with a line that says so. Steering is entered and left within the time that
counts, baking is not.

one       one prompt at a time, a direction added at every block
eight     eight prompts of unequal length, padded, the same
baked     one prompt, the same directions baked into the weights
contrast  one prompt under a contrast vector at the middle blocks, from three cached streams, against three forwards
          of everything so far for each token, as the method was published
"""

import argparse
import contextlib
import copy
import gc
import importlib
import importlib.metadata
import os
import statistics
import sys
from collections.abc import Callable, Sequence

import numpy as np
import torch
from peers import does_not_run, float_of_numpy_1
from race import Side, Timing, race, say
from record import Claim, Recorder, Work, add_outputs

import reprobe as rp
from reprobe.methods import repe

UNSTEERED, OURS, FLOOR = "unsteered", "reprobe", "bare hooks that add"
BAKED, STREAMS = "baked", "reprobe, three cached streams"
#: As published, and with the logits that nobody asks for left out.
FORWARDS, LEAN = "three uncached forwards per token", "the same, logits of the next token only"
PEERS = ("repeng", "steering-vectors")
#: The fastest of a few rounds is no finer than this: a ratio of smaller overheads says nothing.
TOLD_APART = 0.01
PROMPTS = {
    "one": ["The city of Paris is in"],
    "eight": [
        "The city of Paris is in",
        "She opened the letter and",
        "On",
        "The library opens at nine in the morning, and on Saturdays",
        "Water boils when",
        "My friend told me yesterday that he had never seen the sea, so we",
        "Once upon a time",
        "Two trains leave",
    ],
}
#: A prompt by itself, and under the two personas whose difference is the contrast vector.
PERSONAS = repe.Streams(
    ["What do you do on a Sunday? I"],
    ["You are a cheerful person. What do you do on a Sunday? I"],
    ["You are a gloomy person. What do you do on a Sunday? I"],
)
ALPHA = 0.3
#: What is added is this share of a typical row's length: enough to change the text, little enough to leave one.
SHARE = 0.02


def directions(lm: rp.LanguageModel) -> list[rp.Direction]:
    """One random direction per block, whose step has `SHARE` of the median row's length there."""
    sites = lm.sites("resid.post@*")
    seen = rp.capture(lm, lm.inputs(lm.encode(PROMPTS["eight"][3])), sites)
    rng = np.random.default_rng(0)
    lengths = [float(seen[site][0].norm(dim=-1).median()) for site in sites]
    return [
        rp.Direction.from_vector(site, rng.normal(size=lm.d_model), scale=SHARE * length)
        for site, length in zip(sites, lengths, strict=True)
    ]


def twin(lm: rp.LanguageModel) -> rp.LanguageModel:
    """Another network of the same weights in memory, which a peer may change."""
    memo = {id(t): t for t in (*lm.net.parameters(), *lm.net.buffers())}
    return rp.LanguageModel(copy.deepcopy(lm.net, memo), lm.tokenizer, name=lm.name)


def reprobe_side(lm: rp.LanguageModel, found: Sequence[rp.Direction]) -> Callable[..., list[str]]:
    items = [rp.Add(d) for d in found]

    def generate(*args, **options):
        with rp.steer(lm, *items):
            return lm.generate(*args, **options)

    return generate


def bare_side(lm: rp.LanguageModel, found: Sequence[rp.Direction]) -> Callable[..., list[str]]:
    """The least that can be done: no pads, no caches, no checks."""
    own = twin(lm)
    steps = [torch.tensor(d.step, dtype=own.dtype, device=own.device) for d in found]

    def generate(*args, **options):
        blocks = own.architecture.blocks(own.net)
        handles = [
            block.register_forward_hook(lambda module, inputs, out, step=step: out + step)
            for block, step in zip(blocks, steps, strict=True)
        ]
        try:
            return own.generate(*args, **options)
        finally:
            for handle in handles:
                handle.remove()

    return generate


def repeng_side(lm: rp.LanguageModel, found: Sequence[rp.Direction]) -> Callable[..., list[str]]:
    own = twin(lm)
    with float_of_numpy_1():
        control = importlib.import_module("repeng.control")
        importlib.import_module("repeng.extract")
    layers = list(range(own.n_layers))
    model = control.ControlModel(own.net, layers)
    steps = {k: torch.tensor(d.step, dtype=own.dtype, device=own.device) for k, d in zip(layers, found, strict=True)}

    def generate(*args, **options):
        model.set_raw_control(steps)
        try:
            return own.generate(*args, **options)
        finally:
            model.reset()

    return generate


def steering_vectors_side(lm: rp.LanguageModel, found: Sequence[rp.Direction]) -> Callable[..., list[str]]:
    from steering_vectors import SteeringVector

    own = twin(lm)
    vector = SteeringVector(
        {k: torch.tensor(d.step, dtype=own.dtype, device=own.device) for k, d in enumerate(found)}, "decoder_block"
    )

    def generate(*args, **options):
        with vector.apply(own.net):
            return own.generate(*args, **options)

    return generate


SIDES = {OURS: reprobe_side, FLOOR: bare_side, "repeng": repeng_side, "steering-vectors": steering_vectors_side}


def baked(model: str, tokens: int, repeats: int) -> Work:
    """The race of a baked network, a steered and an unsteered one."""
    lm, own = (rp.LanguageModel.load(model, dtype="float32") for _ in range(2))
    work = Work(f"baked, {tokens} new tokens", model, f"One prompt; a direction at each of the {lm.n_layers} blocks.")
    found, prompts = directions(lm), PROMPTS["one"]
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens}
    try:
        rp.bake(own, *(rp.Add(d) for d in found))
    except rp.ReprobeError as e:  # a model with post-norms: a result
        work.notes.append(f"Not baked: {e}")
        return work
    runs = {UNSTEERED: lm.generate, OURS: reprobe_side(lm, found), BAKED: own.generate}
    texts = {side: run(prompts, **options) for side, run in runs.items()}
    if texts[BAKED] != texts[OURS]:
        work.notes.append("The baked network writes another text than the steered one.")
    sides = [Side(side, lambda run=run: run(prompts, **options), tokens) for side, run in runs.items()]
    timings = race(sides, repeats, tidy=gc.collect)
    work.timings = list(timings.values())
    work.claims.append(Claim("tokens/s against unsteered", timings[UNSTEERED].best / timings[BAKED].best, "≥", 0.995))
    return work


@torch.inference_mode()
def three_forwards(lm: rp.LanguageModel, layers: Sequence[int], tokens: int, *, lean: bool = False) -> list[str]:
    """Contrast vectors as published: for each new token the positive, the negative and the steered run from the start.

    Block outputs get α(h⁺ − h⁻) from the prompt's last token on. `lean`: only the steered run computes logits, of one
    token.
    """
    reads = lm.architecture.trunk(lm.net) if lean else lm.net
    blocks = lm.architecture.blocks(lm.net)
    rows = [lm.encode(prompts[0]).input_ids for prompts in PERSONAS.rows]
    begun = [ids.shape[1] for ids in rows]
    for step in range(tokens):
        kept: list[dict[int, torch.Tensor]] = [{}, {}]
        for seen, ids in zip(kept, rows[1:], strict=True):

            def keep(layer: int, h: torch.Tensor, seen: dict[int, torch.Tensor] = seen, since: int = step + 1) -> None:
                seen[layer] = h[:, -since:].clone()

            with hooked(blocks, layers, keep):
                reads(input_ids=ids, use_cache=False)

        def contrasted(layer: int, h: torch.Tensor, kept: list = kept, since: int = step + 1) -> torch.Tensor:
            out = h.clone()
            out[:, -since:] += ALPHA * (kept[0][layer] - kept[1][layer])
            return out

        with hooked(blocks, layers, contrasted):
            logits = lm.net(input_ids=rows[0], use_cache=False, logits_to_keep=int(lean)).logits
        chosen = logits[:, -1].argmax(-1)[:, None]
        rows = [torch.cat([ids, chosen], 1) for ids in rows]
    return lm.tokenizer.batch_decode(rows[0][:, begun[0] :], skip_special_tokens=True)


@contextlib.contextmanager
def hooked(blocks: Sequence[torch.nn.Module], layers: Sequence[int], look: Callable[[int, torch.Tensor], object]):
    """`look(layer, h)` at block outputs; a tensor that it returns takes the place of h."""
    handles = []
    for layer in layers:

        def hook(module, inputs, out, layer=layer):
            new = look(layer, out)
            return new if isinstance(new, torch.Tensor) else None

        handles.append(blocks[layer].register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def contrast(model: str, tokens: int, repeats: int) -> Work:
    """The race of three cached streams and three uncached forwards."""
    lm = rp.LanguageModel.load(model, dtype="float32")
    lm.net.generation_config.eos_token_id = None  # all sides write all tokens
    layers = list(range(lm.n_layers // 4, 3 * lm.n_layers // 4))
    steering = repe.contrast(lm, [f"resid.post@{layer}" for layer in layers], ALPHA)

    def ours() -> list[str]:
        return repe.generate(lm, steering, PERSONAS, max_new_tokens=tokens)

    own = twin(lm)
    about = f"One prompt and its two personas; a contrast vector at {len(layers)} blocks, α {ALPHA}."
    work = Work(f"contrast vectors, {tokens} new tokens", model, about)
    steered = ours()
    if three_forwards(own, layers, tokens) != steered:
        work.notes.append("The two sides write different texts.")
    if steered == lm.generate(PERSONAS.base, max_new_tokens=tokens):
        work.notes.append("The contrast vector does not change the text: choose a larger α.")
    sides = [
        Side(STREAMS, ours, tokens),
        Side(FORWARDS, lambda: three_forwards(own, layers, tokens), tokens),
        Side(LEAN, lambda: three_forwards(own, layers, tokens, lean=True), tokens),
        Side(UNSTEERED, lambda: lm.generate(PERSONAS.base, max_new_tokens=tokens), tokens),
    ]
    timings = race(sides, repeats, tidy=gc.collect)
    work.timings = list(timings.values())
    for side in (FORWARDS, LEAN):
        work.claims.append(Claim(f"times as fast as {side}", timings[side].best / timings[STREAMS].best, "≥", 5.0))
    return work


def added(model: str, name: str, tokens: int, repeats: int) -> Work:
    """The race of all sides over `tokens` new tokens of each prompt of a work."""
    lm = rp.LanguageModel.load(model, dtype="float32")
    found, prompts = directions(lm), PROMPTS[name]
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens}
    work = Work(
        f"{name}, {tokens} new tokens",
        model,
        f"Greedy generation of {tokens} new tokens for {len(prompts)} prompt{'s' if len(prompts) > 1 else ''}, a "
        f"direction added at each of the {lm.n_layers} blocks.",
    )
    runs: dict[str, Callable[..., list[str]]] = {UNSTEERED: lm.generate}
    for side, make in SIDES.items():
        if side in PEERS:
            try:
                importlib.metadata.version(side)
            except importlib.metadata.PackageNotFoundError:
                work.notes.append(f"{side}: not installed (uv run --group bench …).")
                continue
        try:
            runs[side] = make(lm, found)
            texts = runs[side](prompts, **options)
        except Exception as e:  # a peer that breaks with these versions is a result, not an end
            if side not in PEERS:
                raise
            work.notes.append(f"{side} {does_not_run(e)}.")
            del runs[side]
            continue
        if side == OURS:
            steered = texts
            if steered == lm.generate(prompts, **options):
                work.notes.append("Steering does not change the text: choose a larger share.")
        elif texts != steered:
            work.notes.append(f"{side} writes another text than reprobe does.")
    count = tokens * len(prompts)
    sides = [Side(side, lambda run=run: run(prompts, **options), count) for side, run in runs.items()]
    timings = race(sides, repeats, tidy=gc.collect)
    work.timings = list(timings.values())
    base, ours = timings[UNSTEERED], timings[OURS]
    work.claims.append(Claim("tokens/s against unsteered", base.best / ours.best, "≥", 0.98))
    for peer in PEERS:
        if peer not in timings:
            continue
        theirs = overhead(timings[peer], base)
        if theirs < TOLD_APART:
            work.notes.append(f"{peer}'s overhead, {100 * theirs:.2f} %, is too small here to be compared with.")
            continue
        work.claims.append(Claim(f"overhead against {peer}'s", overhead(ours, base) / theirs, "≤", 0.5))
    work.facts["overhead"] = {side: round(overhead(t, base), 4) for side, t in timings.items()}
    work.facts["overhead, median over rounds"] = {
        side: round(statistics.median(a / b for a, b in zip(t.seconds, base.seconds, strict=True)) - 1, 4)
        for side, t in timings.items()
    }
    shown = ", ".join(f"{side} {100 * x:.1f} %" for side, x in work.facts["overhead"].items() if side != UNSTEERED)
    work.notes.append(f"Overhead over unsteered, fastest rounds: {shown}.")
    return work


WORKS: dict[str, Callable[[str, int, int], Work]] = {
    **{name: lambda model, *how, name=name: added(model, name, *how) for name in PROMPTS},
    "baked": baked,
    "contrast": contrast,
}


def overhead(timing: Timing, base: Timing) -> float:
    """Extra time as a share of the unsteered time; at least a tenth of a per mille, which is as good as none."""
    return max(timing.best / base.best - 1, 1e-4)


def main() -> int:
    os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no side asks a hub for anything
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["smollm2-135m"])
    parser.add_argument("--work", nargs="+", choices=list(WORKS), default=list(WORKS))
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of each prompt")
    parser.add_argument("--repeats", type=int, default=15)
    add_outputs(parser)
    chosen = parser.parse_args()
    shown = ["--models", *chosen.models, "--work", *chosen.work, "--tokens", str(chosen.tokens)]
    shown += ["--repeats", str(chosen.repeats)]
    command = " ".join(["uv run --group bench python experiments/bench/control.py", *shown])
    record = Recorder("Control", command, chosen)
    for model in chosen.models:
        for name in chosen.work:
            say(f"== {name}, {model}")
            record.add(WORKS[name](model, chosen.tokens, chosen.repeats))
    print(record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
