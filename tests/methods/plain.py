"""Generation written a second time: one prompt at a time, no cache, plain hooks; and the same by the library."""

import torch
from control.reference import Sequence, logits

import reprobe as rp


def ids_of(lm, prompt):
    return lm.encode(prompt).input_ids[0].tolist()


def sequence(lm, prompt, more=()):
    ids = ids_of(lm, prompt)
    return Sequence(0, [*ids, *more], len(ids), {})


def decoded(lm, prompt, edits, n):
    """Greedy tokens and the logits they were chosen from, (n, vocab); `edits` as in `control.reference.logits`."""
    one, seen = sequence(lm, prompt), []
    for _ in range(n):
        seen.append(logits(lm, one, *edits)[-1])
        one.ids.append(int(_allowed(lm, seen[-1]).argmax()))
    return one.ids[one.n_prompt :], torch.stack(seen)


def _allowed(lm, scores):
    out = scores.clone()
    out[lm.tokenizer.eos_token_id] = -torch.inf  # as min_new_tokens does
    return out


def steered(lm, steering, prompts, n, run=None, **options):
    """The library's tokens and logits for each prompt, each as `decoded` gives them."""
    seen, kept = [], {}

    def record(ids, scores):
        seen.append(scores.clone())
        kept["ids"] = ids
        return scores

    options |= {"max_new_tokens": n, "min_new_tokens": n, "logits_processor": [record]}
    if run is None:
        with rp.steer(lm, steering):
            lm.generate(prompts, **options)
    else:
        run(**options)
    tokens = kept["ids"][:, -(n - 1) :].tolist() if n > 1 else [[] for _ in prompts]
    return [(tokens[i], torch.stack(seen, 1)[i]) for i in range(len(prompts))]


def same_run(lm, found, prompts, edits_of, n):
    """Whether tokens and logits of each prompt are those of the plain loop."""
    for i, (prompt, (tokens, scores)) in enumerate(zip(prompts, found, strict=True)):
        wanted, reference = decoded(lm, prompt, edits_of(i), n)
        assert tokens == wanted[: n - 1]
        assert near(scores, reference)


def near(got, want, tolerance=1e-4):
    kept = (got > -torch.inf) & (want > -torch.inf)  # the end token is forbidden
    return float((got - want)[kept].abs().max()) <= tolerance * max(1.0, float(want[kept].abs().max()))
