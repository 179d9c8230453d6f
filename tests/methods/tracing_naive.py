"""Causal tracing written a second time: a whole forward pass of the stock network per kind, token and block.

Plain hooks on the network's modules, no cache, nothing of the library but where sites are and the noise itself, which
is read off a run of the library's own `Noise`.
"""

import contextlib

import numpy as np
import torch

import reprobe as rp
from reprobe.methods import tracing
from reprobe.model.text import tokenise


def rows_of(lm, fact):
    """Token ids of prompt and object, the object's first token, and the subject's tokens."""
    (row,) = tokenise(lm.tokenizer, [fact.prompt], spans=[{"subject": fact.span}], suffixes=[" " + fact.true])
    return row.ids, row.suffix, row.spans["subject"]


def noise_of(lm, ids, subject, fact, settings, std):
    """What `Noise` adds to the rows, from a run under it and one without."""
    batch = torch.from_numpy(ids[:-1])[None].expand(settings.samples, -1)
    noise = tracing.corruption(fact, (int(subject[0]), int(subject[-1]) + 1), settings, std)
    seen = []
    for given in ((noise,), ()):
        with rp.steer(lm, *given), rp.observe(lm, "embed") as found:
            lm.net(input_ids=batch)
        seen.append(found[rp.Site("embed")])
    return seen[0] - seen[1]


@contextlib.contextmanager
def changed(lm, edits):
    """`edits`: (site, f), f changes the site's tensor (rows, columns, width)."""
    handles = []
    try:
        for site, f in edits:
            tap = lm.architecture.tap(lm.net, site)

            def change(raw, f=f, tap=tap):
                h = raw * tap.scale
                if tap.flat:
                    h = h.view(*changed.shape, -1)
                return (f(h) / tap.scale).view(raw.shape)

            if tap.side == "in":

                def before(module, args, kwargs, change=change):
                    if args:
                        return (change(args[0]), *args[1:]), kwargs
                    return args, kwargs | {"hidden_states": change(kwargs["hidden_states"])}

                handles.append(tap.module.register_forward_pre_hook(before, with_kwargs=True))
            else:

                def after(module, args, out, change=change):
                    return change(out) if torch.is_tensor(out) else (change(out[0]), *out[1:])

                handles.append(tap.module.register_forward_hook(after))
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def naive(lm, fact, settings, std, *, whole_logits=True):
    """(clean, corrupted, restored[kind, layer, token]): row 0 of each batch is clean, the others have noise."""
    ids, n, subject = rows_of(lm, fact)
    m = len(ids) - n
    batch = torch.from_numpy(ids[:-1])[None].expand(settings.samples + 1, -1).contiguous()
    changed.shape = tuple(batch.shape)
    noise = torch.cat([torch.zeros(1, *(s := noise_of(lm, ids, subject, fact, settings, std)).shape[1:]), s]).to(
        s.dtype
    )
    corrupt = (rp.Site("embed"), lambda h: h + noise)
    target = torch.from_numpy(ids[n:])

    def probability(edits):
        with changed(lm, edits):
            out = lm.net(input_ids=batch, use_cache=False, **({} if whole_logits else {"logits_to_keep": m}))
        logp = out.logits[:, -m:].double().log_softmax(-1)
        return logp.gather(2, target.expand(len(batch), -1)[..., None])[..., 0].sum(1).exp().numpy()

    def restored(sites, t):
        def put(h):
            new = h.clone()
            new[1:, t] = h[0, t]  # row 0 is clean
            return new

        return float(probability([corrupt, *((site, put) for site in sites)])[1:].mean())

    both = probability([corrupt])
    layers = settings.layers or range(lm.n_layers)
    out = np.zeros((len(settings.kinds), len(layers), n))
    for k, kind in enumerate(settings.kinds):
        for i, layer in enumerate(layers):
            half = settings.window // 2
            blocks = [layer] if kind == "resid.post" else range(layer - half, layer - half + settings.window)
            sites = [rp.Site(kind, b) for b in blocks if 0 <= b < lm.n_layers]
            for t in range(n):
                out[k, i, t] = restored(sites, t)
    return float(both[0]), float(both[1:].mean()), out
