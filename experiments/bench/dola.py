"""What DoLa costs: tokens/s of greedy decoding without it, with it, and with it as the published code does it.

    uv run python experiments/bench/dola.py [--models M …] [--batches N …] [--tokens N] [--json F] [--markdown F]

Enters: names of models. Leaves: JSON and Markdown with the loss of speed per batch size. All sides generate the same
number of tokens in turn in one process. The published way (every candidate layer unembedded by itself, at all
positions of the pass, and compared with sorts and softmaxes over the whole vocabulary) is written here around the stock
network; that it generates the tokens of `compat="dola"` is checked first. Run it on an idle machine: the claims are 8
and 15 %, which is what other work on the same cores does to a round.
"""

import argparse
import math
import os
import statistics
from collections.abc import Sequence

import torch
from race import Side, race
from record import Claim, Recorder, Work, add_outputs
from torch.nn.functional import kl_div

import reprobe as rp
from reprobe.methods.dola import DoLa
from reprobe.model.hooks import computed

PLAIN, LIKE = "greedy", "greedy, logits by our product"
THEIRS = "DoLa as published: layer by layer, all positions"
#: Share of plain greedy decoding's time that DoLa may take beside it.
LOSS = {"smollm2-135m": 0.08, "gemma3-270m": 0.15}


class Published:
    """Greedy DoLa around the stock network, with a cache."""

    def __init__(self, lm: rp.LanguageModel, dola: DoLa) -> None:
        self.lm, self.dola, self.layers = lm, dola, dola.candidates(lm)
        end = lm.net.generation_config.eos_token_id
        self.ends = [end] if isinstance(end, int) else list(end)

    @torch.inference_mode()
    def generate(self, prompts: Sequence[str], tokens: int) -> list[str]:
        net, batch = self.lm.net, self.lm.encode(prompts)
        ids, mask, positions, cache = batch.input_ids, batch.real.long(), batch.position_ids, None
        given = ids
        for _ in range(tokens):
            out = net(
                given,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                output_hidden_states=True,
            )
            cache = out.past_key_values
            head = net.get_output_embeddings()
            early = {j: head(out.hidden_states[j])[:, -1] for j in self.layers}
            scores = self.scores(out.logits[:, -1].float(), early)
            for row, (seen, real) in enumerate(zip(ids, mask, strict=True)):
                known = seen[real.bool()].unique()
                s = scores[row, known]
                p = self.dola.repetition_penalty
                scores[row, known] = torch.where(s < 0, s * p, s / p)
            given = scores.argmax(-1, keepdim=True)
            ids, mask = torch.cat([ids, given], 1), torch.cat([mask, torch.ones_like(given)], 1)
            positions = positions[:, -1:] + 1
        new = ids[:, batch.input_ids.shape[1] :]
        return self.lm.tokenizer.batch_decode(new, skip_special_tokens=True)

    def scores(self, final: torch.Tensor, early: dict[int, torch.Tensor]) -> torch.Tensor:
        final[:, self.ends] = -1e4  # no text may end before the others
        stacked = torch.stack([early[j].float() for j in self.layers])
        stacked[..., self.ends] = -1e4
        mature, premature = final.log_softmax(-1), stacked.log_softmax(-1)
        m = 0.5 * (final.softmax(-1) + stacked.softmax(-1))
        kl = [kl_div(x, m, reduction="none").mean(-1) for x in (mature[None], premature)]
        chosen = int((0.5 * (kl[0] + kl[1])).mean(-1).argmax())
        bound = torch.sort(mature, descending=True)[0][:, :1] + math.log(self.dola.alpha)
        return torch.where(mature < bound, -torch.inf, mature - premature[chosen])


def ways(lm: rp.LanguageModel) -> dict[str, DoLa]:
    return {
        "DoLa, dynamic": DoLa("high"),
        "DoLa, dynamic, no repetition penalty": DoLa("high", repetition_penalty=1.0),
        'DoLa, dynamic, jsd="plausible"': DoLa("high", jsd="plausible"),
        "DoLa, static": DoLa(lm.n_layers // 2),
        'DoLa, compat="dola"': DoLa("high", compat="dola"),
    }


def overhead(lm: rp.LanguageModel, prompts: Sequence[str], tokens: int, repeats: int) -> Work:
    batch, n = len(prompts), len(prompts) * tokens
    found = ways(lm)
    layers = DoLa("high").candidates(lm)
    work = Work(
        f"batch of {batch}",
        lm.name,
        f"{tokens} new tokens for {batch} {'prompt' if batch == 1 else 'prompts'}, with a cache, {lm.dtype} on "
        f"{lm.device}; candidate layers {', '.join(map(str, layers))}, static {lm.n_layers // 2}; repetition penalty "
        "1.2 after the contrast unless said otherwise.",
    )

    def run(dola: DoLa | None) -> list[str]:
        return lm.generate(prompts, max_new_tokens=tokens, min_new_tokens=tokens, decoding=dola)

    published = Published(lm, found['DoLa, compat="dola"'])
    theirs, ours = published.generate(prompts, tokens), run(published.dola)
    work.notes.append(
        f'Published way and `compat="dola"`: {sum(a == b for a, b in zip(theirs, ours, strict=True))} of {batch} '
        "texts are the same."
    )

    def like_ours() -> list[str]:
        """Greedy decoding whose logits come out of the product that DoLa's come out of, which may be the faster one."""
        head = lm.net.get_output_embeddings()
        with computed(head, lambda h: lm.architecture.unembed(lm.net, h[:, -1:], raw=True)):
            return run(None)

    sides = [Side(PLAIN, lambda: run(None), n), Side(LIKE, like_ours, n)]
    sides += [Side(name, lambda dola=dola: run(dola), n) for name, dola in found.items()]
    sides.append(Side(THEIRS, lambda: published.generate(prompts, tokens), n))
    times = race(sides, repeats)
    work.timings = list(times.values())
    for name in found:
        if "compat" not in name:
            most = LOSS.get(lm.name, 0.08)
            for beside in (PLAIN, LIKE):
                lost = times[name].best / times[beside].best - 1
                work.claims.append(Claim(f"{name}: time beside that of {beside}", lost, "≤", most))
        pairs = zip(times[name].seconds, times[PLAIN].seconds, strict=True)
        work.notes.append(f"{name}: median over the rounds {statistics.median(a / b - 1 for a, b in pairs):+.1%}.")
    work.notes.append(f"As published: {times[THEIRS].best / times[PLAIN].best - 1:+.0%}.")
    return work


def main() -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: nothing asks a hub
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(LOSS))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="prompts generated from together")
    parser.add_argument("--tokens", type=int, default=48, help="new tokens per prompt")
    parser.add_argument("--repeats", type=int, default=9, help="rounds, of which the fastest of each side counts")
    add_outputs(parser)
    chosen = parser.parse_args()
    asked = rp.PromptSet.load("misconceptions").frame["question"].unique(maintain_order=True)
    prompts = [f"Q: {question}\nA:" for question in asked]
    shown = ["--models", *chosen.models, "--batches", *map(str, chosen.batches)]
    shown += ["--tokens", str(chosen.tokens), "--repeats", str(chosen.repeats)]
    record = Recorder("DoLa", f"uv run python experiments/bench/dola.py {' '.join(shown)}", chosen)
    for model in chosen.models:
        lm = rp.LanguageModel.load(model)
        for n in chosen.batches:
            record.add(overhead(lm, prompts[:n], chosen.tokens, chosen.repeats))
    print(record)


if __name__ == "__main__":
    main()
