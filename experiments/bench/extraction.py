"""Extraction to disk against the ways in which activations are usually read; all sides in one process, in turn.

    uv run --group bench python experiments/bench/extraction.py [--models M …] [--work W …] [--json F] [--markdown F]

Enters: names of models and of works. Leaves: JSON and Markdown with each work's claim, target, measured ratio, and the
tokens/s of every side, on the machine at hand. Run it on an idle machine: two cores that others use too give ratios of
nothing. Peers that are not installed or do not run are left out with a line that says so.

cities       last token, every resid.post: peers (peers.py), one by one, a bare forward of the blocks
truthfulqa   question-answer pairs, every resid.post and attn.heads: one by one, a bare forward (needs REPROBE_DATA)
one-site     one site a third of the way up against a bare forward of all blocks
bfloat16     compute and storage in bfloat16 against float32
memory       peak memory of ten times as many prompts
planning     share of the run that goes into trees, layouts and masks
"""

import argparse
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from peers import Way, does_not_run, one_by_one, ways
from race import Side, Timing, race, say
from record import Claim, Recorder, Work, add_outputs

import reprobe as rp
from reprobe.evaluation import first_questions
from reprobe.extraction import prepare
from reprobe.model.packs import lay_out

OURS, BARE, SINGLE = "reprobe, to disk", "bare forward of the blocks", "one by one, output_hidden_states"
FASTER_THAN_PEERS = {"smollm2-135m": 1.6, "gemma3-270m": 3.0}
#: Padded tokens per batch among which the bare forward's are chosen.
BUDGETS = (256, 512, 1024, 2048)
#: Prompts drawn where a side would take too long for all of them.
SAMPLE, SEED = 300, 0
#: A side whose vectors differ from ours by more than this share of their length reads something else.
SAME = 1e-3
MEMORY_PROMPTS = 150


class LeftOut(Exception):
    """Why a work cannot be done here."""


@dataclass(frozen=True)
class Setting:
    """What was asked for, and a folder to write stores into."""

    prompts: int
    questions: int | None
    repeats: int
    scratch: Path

    def race(self, *sides: Side) -> dict[str, Timing]:
        return race(sides, self.repeats, tidy=self.empty)

    def empty(self) -> None:
        for path in self.scratch.iterdir():
            shutil.rmtree(path)


# -- sides ----------------------------------------------------------------------------------------------------


def to_disk(lm: rp.LanguageModel, data: rp.PromptSet, sites: str, setting: Setting) -> rp.ActivationStore:
    """Ours: from texts to a finished store."""
    return rp.extract(lm, data, sites=sites, at="last", to=setting.scratch / "s.reprobe")


def bare_forward(lm: rp.LanguageModel, batches: Sequence[torch.Tensor]) -> None:
    """The blocks on batches made beforehand; nothing is tokenised, read or written."""
    trunk = lm.architecture.trunk(lm.net)
    with torch.inference_mode():
        for ids in batches:
            trunk(input_ids=ids, use_cache=False)


def padded_batches(lm: rp.LanguageModel, texts: Sequence[str], budget: int) -> list[torch.Tensor]:
    """Token ids sorted by length, padded on the right; rows × longest is at most `budget`."""
    coded = sorted(lm.tokenizer(list(texts))["input_ids"], key=len, reverse=True)
    batches = []
    while coded:
        width = len(coded[0])
        rows, coded = coded[: max(1, budget // width)], coded[max(1, budget // width) :]
        batches.append(torch.tensor([row + [lm.pad_id] * (width - len(row)) for row in rows]))
    return batches


def best_budget(lm: rp.LanguageModel, texts: Sequence[str], setting: Setting) -> tuple[int, dict[str, float]]:
    """The budget at which the bare forward of these texts is fastest, and the tokens/s of all that were tried."""
    tokens = n_tokens(lm, texts)
    sides = {}
    for budget in BUDGETS:
        batches = padded_batches(lm, texts, budget)
        sides[budget] = Side(
            f"bare forward, budget {budget}", lambda batches=batches: bare_forward(lm, batches), tokens
        )
    found = race(list(sides.values()), 2, tidy=setting.empty)
    speed = {budget: found[side.name].tokens_per_second for budget, side in sides.items()}
    return max(speed, key=speed.__getitem__), {str(budget): round(s, 1) for budget, s in speed.items()}


# -- works ----------------------------------------------------------------------------------------------------


def cities(model: str, setting: Setting) -> Work:
    lm, data = rp.LanguageModel.load(model), city_statements(setting)
    tokens = n_tokens(lm, data.texts)
    work = Work("cities", model, f"{len(data)} `cities` statements, {tokens:,} tokens: last token, every `resid.post`.")
    peers = same_values(lm, data, setting, work)
    budget, work.facts["bare forward, tokens per second by budget"] = best_budget(lm, data.texts, setting)
    batches = padded_batches(lm, data.texts, budget)
    times = setting.race(
        Side(OURS, lambda: to_disk(lm, data, "resid.post@*", setting), tokens),
        Side(BARE, lambda: bare_forward(lm, batches), tokens),
        Side(SINGLE, lambda: one_by_one(lm, data.texts), tokens),
        *[Side(way.name, lambda way=way: way.read(data.texts), tokens) for way in peers],
    )
    work.timings = list(times.values())
    for logits, how in ((True, "as it is documented"), (False, "with its logits left out")):
        names = [way.name for way in peers if way.logits == logits]
        fastest = min(names, key=lambda name: times[name].best)
        what = f"times as fast as the fastest peer {how} ({fastest})"
        work.claims.append(Claim(what, times[fastest].best / times[OURS].best, "≥", FASTER_THAN_PEERS[model]))
    work.claims.append(Claim("time, in bare forwards", times[OURS].best / times[BARE].best, "≤", 1.05))
    work.notes.append(about_bare_forward(budget))
    return work


def truthfulqa(model: str, setting: Setting) -> Work:
    lm, data = rp.LanguageModel.load(model), truthfulqa_pairs(setting)
    tokens, sites = n_tokens(lm, data.texts), "resid.post@*, attn.heads@*"
    drawn = np.random.default_rng(SEED).permutation(len(data))[:SAMPLE]
    sample = [data.texts[i] for i in sorted(drawn)]
    work = Work(
        "truthfulqa",
        model,
        f"{len(data):,} pairs “Q: … A: …” of {data.describe().groups} questions, {tokens:,} tokens: last token, every "
        "`resid.post` and `attn.heads`.",
    )
    to_disk(lm, data.head(8), sites, setting)
    setting.empty()
    budget, work.facts["bare forward, tokens per second by budget"] = best_budget(lm, sample, setting)
    batches = padded_batches(lm, data.texts, budget)
    times = setting.race(
        Side(OURS, lambda: to_disk(lm, data, sites, setting), tokens),
        Side(BARE, lambda: bare_forward(lm, batches), tokens),
        Side(SINGLE, lambda: one_by_one(lm, sample), n_tokens(lm, sample), of_tokens=tokens),
    )
    work.timings = list(times.values())
    work.claims = [
        Claim("times as fast as a bare padded forward", times[BARE].best / times[OURS].best, "≥", 2.4),
        Claim("times as fast as one prompt at a time", times[SINGLE].best / times[OURS].best, "≥", 15),
    ]
    work.notes += [
        about_bare_forward(budget),
        f"One by one: {len(sample)} of {len(data):,} prompts, drawn at random (seed {SEED}) and scaled by tokens to "
        "all; it keeps the residual stream only, not the heads.",
    ]
    return work


def one_site(model: str, setting: Setting) -> Work:
    lm, data = rp.LanguageModel.load(model), city_statements(setting)
    tokens, site = n_tokens(lm, data.texts), f"resid.post@{lm.n_layers // 3 - 1}"
    work = Work(
        "one-site", model, f"{len(data)} `cities` statements: last token, only `{site}` of {lm.n_layers} blocks."
    )
    to_disk(lm, data.head(8), site, setting)
    setting.empty()
    budget, work.facts["bare forward, tokens per second by budget"] = best_budget(lm, data.texts, setting)
    batches = padded_batches(lm, data.texts, budget)
    times = setting.race(
        Side(OURS, lambda: to_disk(lm, data, site, setting), tokens),
        Side(BARE, lambda: bare_forward(lm, batches), tokens),
    )
    work.timings = list(times.values())
    work.claims = [Claim("time, in bare forwards of all blocks", times[OURS].best / times[BARE].best, "≤", 0.4)]
    work.notes.append(about_bare_forward(budget))
    return work


def bfloat16(model: str, setting: Setting) -> Work:
    full, half = rp.LanguageModel.load(model), rp.LanguageModel.load(model, dtype="bfloat16")
    data = city_statements(setting)
    tokens = n_tokens(full, data.texts)
    work = Work("bfloat16", model, f"{len(data)} `cities` statements: last token, every `resid.post`, both to disk.")
    few = data.head(8)
    apart = differences(ours(half, few, setting), ours(full, few, setting))
    times = setting.race(
        Side("reprobe in float32", lambda: to_disk(full, data, "resid.post@*", setting), tokens),
        Side("reprobe in bfloat16", lambda: to_disk(half, data, "resid.post@*", setting), tokens),
    )
    work.timings = list(times.values())
    ratio = times["reprobe in float32"].best / times["reprobe in bfloat16"].best
    work.claims = [Claim("times as fast as float32", ratio, "≥", 2.0)]
    work.notes.append(f"The vectors of {len(few)} prompts differ by {np.median(apart):.2g} of their length (median).")
    return work


def memory(model: str, setting: Setting) -> Work:
    if not Path("/proc/self/clear_refs").exists():
        raise LeftOut("the peak of a process's memory is read the Linux way")
    script = Path(__file__).with_name("peak_memory.py")

    def extracting(n: int) -> dict[str, int]:
        say(f"memory: {n} prompts")
        child = subprocess.run([sys.executable, script, model, str(n)], stdout=subprocess.PIPE, text=True, check=True)
        found: dict[str, int] = json.loads(child.stdout)
        return found

    few, many = extracting(MEMORY_PROMPTS), extracting(10 * MEMORY_PROMPTS)
    work = Work(
        "memory",
        model,
        f"{few['prompts']} and {many['prompts']:,} generated prompts ({few['rows']:,} and {many['rows']:,} rows), "
        "every token, `resid.post` of the first third of the blocks; each in a process of its own.",
    )
    growth = many["bytes resident at most"] / few["bytes resident at most"] - 1
    work.claims = [Claim("growth of peak memory with ten times the prompts", growth, "≤", 0.05)]
    for run in (few, many):
        disk, peak, before = (
            run[f"bytes {name}"] / 2**20 for name in ("on disk", "resident at most", "resident before")
        )
        work.notes.append(
            f"{run['prompts']:,} prompts: {disk:,.0f} MiB on disk in {run['shards']} shards, {peak:,.0f} MiB resident "
            f"at most, {peak - before:,.0f} MiB of them above the loaded model."
        )
    work.facts["runs"] = [few, many]
    return work


def planning(model: str, setting: Setting) -> Work:
    lm = rp.LanguageModel.load(model)
    work = Work("planning", model, "Trees, layouts and masks of a run, made once more by themselves, against the run.")
    sets = [city_statements(setting)]
    try:
        sets.append(truthfulqa_pairs(setting))
    except LeftOut as e:
        work.notes.append(f"`cities` only: {e}.")
    for data in sets:
        job = prepare(lm, data, sites="resid.post@*", at="last")
        tokens, starts = job.table.tokens, job.table.starts

        def plan(job=job, tokens=tokens, starts=starts) -> None:
            made = lm.plan(tokens, starts, budget=job.batch_tokens)
            for k in range(made.n_packs):
                lm.pack_inputs(lay_out(made, k, tokens, starts))

        name = f"{len(data):,} prompts of {data.name}"
        parts, whole = f"planning {name}", f"reprobe, to disk, {name}"
        times = setting.race(
            Side(parts, plan, job.n_tokens),
            Side(whole, lambda data=data: to_disk(lm, data, "resid.post@*", setting), job.n_tokens),
        )
        work.timings += times.values()
        work.claims.append(Claim(f"share of the run, {name}", times[parts].best / times[whole].best, "≤", 0.03))
    return work


WORKS: dict[str, Callable[[str, Setting], Work]] = {
    "cities": cities,
    "truthfulqa": truthfulqa,
    "one-site": one_site,
    "bfloat16": bfloat16,
    "memory": memory,
    "planning": planning,
}


# -- shared ---------------------------------------------------------------------------------------------------


def city_statements(setting: Setting) -> rp.PromptSet:
    return rp.PromptSet.load("cities").head(setting.prompts)


def truthfulqa_pairs(setting: Setting) -> rp.PromptSet:
    """All pairs of the first questions. Raises `LeftOut` where the benchmark's file is not at hand."""
    folder = os.environ.get("REPROBE_DATA")
    if not folder:
        raise LeftOut("REPROBE_DATA does not name a folder with the published files")
    path = Path(folder) / "truthfulqa" / "mc_task.json"
    if not path.is_file():
        raise LeftOut("the folder that REPROBE_DATA names has no truthfulqa/mc_task.json")
    data = rp.PromptSet.load(path)
    return data if setting.questions is None else first_questions(data, setting.questions)


def n_tokens(lm: rp.LanguageModel, texts: Sequence[str]) -> int:
    return sum(map(len, lm.tokenizer(list(texts))["input_ids"]))


def about_bare_forward(budget: int) -> str:
    return (
        f"Bare forward: all blocks, sorted by length, {budget} padded tokens per batch (the fastest of "
        f"{', '.join(map(str, BUDGETS))}), tokenised before the clock starts."
    )


def ours(lm: rp.LanguageModel, data: rp.PromptSet, setting: Setting) -> np.ndarray:
    """Our values of every `resid.post`, in the order of the prompts: (prompts, blocks, d_model), float32."""
    store = to_disk(lm, data, "resid.post@*", setting)
    place = {prompt: row for row, prompt in enumerate(store.index["prompt"])}
    values = torch.stack([store.read(site) for site in store.sites], 1)[[place[prompt] for prompt in data.ids]]
    setting.empty()
    return values.float().numpy()


def differences(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Length of a − b in lengths of b, per vector."""
    return np.linalg.norm(a - b, axis=-1) / np.linalg.norm(b, axis=-1)


def same_values(lm: rp.LanguageModel, data: rp.PromptSet, setting: Setting, work: Work) -> list[Way]:
    """The ways whose values are ours on a few prompts; the work's notes say how near, and which are left out."""
    found, missing = ways(lm)
    few = data.head(8)
    expected, kept, largest = ours(lm, few, setting), [], 0.0
    for way in found:
        try:
            values = way.read(few.texts)
        except Exception as e:  # a peer that breaks with these versions is a result, not an end
            missing[way.name] = does_not_run(e)
            continue
        blocks = expected.shape[1] if way.last_block else expected.shape[1] - 1
        apart = float(differences(values[:, :blocks], expected[:, :blocks]).max())
        if apart > SAME:
            missing[way.name] = f"its vectors differ from ours by {apart:.2g} of their length"
        else:
            largest = max(largest, apart)
            kept.append(way)
    work.notes += [f"Left out: {name}: {why}." for name, why in missing.items()]
    normed = [way.name for way in kept if not way.last_block]
    work.notes.append(
        f"Values checked before timing, on {len(few)} prompts: all sides read the same vectors as reprobe, within "
        f"{largest:.1g} of their length. The last entry of {', '.join(normed)} is the state after the final norm, not "
        "the last block's output."
    )
    return kept


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(FASTER_THAN_PEERS), choices=list(FASTER_THAN_PEERS))
    parser.add_argument("--work", nargs="+", default=list(WORKS), choices=list(WORKS))
    parser.add_argument("--prompts", type=int, default=256, help="cities statements (an even number)")
    parser.add_argument("--pairs", type=int, metavar="N", help="only the pairs of the first N questions of TruthfulQA")
    parser.add_argument("--repeats", type=int, default=3, help="rounds, of which the fastest counts")
    parser.add_argument("--scratch", type=Path, help="where to write stores (default: the system's temporary folder)")
    add_outputs(parser)
    chosen = parser.parse_args()
    if chosen.prompts < 2 or chosen.prompts % 2:
        parser.error(f"--prompts {chosen.prompts}: an even number, because one peer takes pairs")
    if chosen.repeats < 1 or (chosen.pairs is not None and chosen.pairs < 1):
        parser.error("--repeats and --pairs are 1 or more")
    return chosen


def main() -> int:
    os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no side asks a hub for anything
    chosen = arguments()
    command = " ".join(["uv run --group bench python experiments/bench/extraction.py", *shown(chosen)])
    record = Recorder("Extraction", command, chosen)
    failed = False
    with tempfile.TemporaryDirectory(dir=chosen.scratch) as folder:
        setting = Setting(chosen.prompts, chosen.pairs, chosen.repeats, Path(folder))
        for model in chosen.models:
            for name in chosen.work:
                say(f"== {name}, {model}")
                try:
                    record.add(WORKS[name](model, setting))
                except LeftOut as e:
                    record.leave_out(f"{name}, {model}: {e}")
                except Exception as e:  # hours of other works must not be lost with one
                    traceback.print_exc()
                    failed = True
                    record.leave_out(f"{name}, {model}: failed with {type(e).__name__}")
                setting.empty()
                gc.collect()  # networks and their copies hold cycles
    print(record)
    return int(failed)


def shown(chosen: argparse.Namespace) -> list[str]:
    """The options that decide the numbers, as they would be typed."""
    pairs = [] if chosen.pairs is None else ["--pairs", str(chosen.pairs)]
    numbers = ["--prompts", str(chosen.prompts), *pairs, "--repeats", str(chosen.repeats)]
    return ["--models", *chosen.models, "--work", *chosen.work, *numbers]


if __name__ == "__main__":
    sys.exit(main())
