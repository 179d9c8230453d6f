"""Putting interventions into a model.

Enters: a language model and operators. Leaves: a context in which the model is steered, and no trace after it.
"""

import contextlib
from collections.abc import Iterator

from reprobe.control.operators import Operator
from reprobe.errors import UsageError
from reprobe.model.hooks import intervene
from reprobe.model.language_model import LanguageModel


@contextlib.contextmanager
def steer(lm: LanguageModel, *interventions: Operator, allow_mismatch: bool = False) -> Iterator[None]:
    """Steer whatever the model does inside the context: `lm.generate`, `lm.logits`, `lm.logprobs`, or a direct call.

    Interventions act in the order given; nested contexts compose, the outer first. Cached and uncached, padded and
    unpadded runs agree. Raises `UnknownSite`, `IdentityMismatch` if a direction was read in another model (unless
    `allow_mismatch`), `UsageError` if its width does not fit the site.
    """
    here = None
    for item in interventions:
        made_with = item.direction.identity
        if made_with is not None:
            here = here or lm.identity
            made_with.require_same(here, f"the direction at {item.direction.site}", allow_mismatch=allow_mismatch)
        width, have = lm.width(item.site), len(item.direction.vector)
        if width != have:
            raise UsageError(
                f"a direction of width {have} does not fit {item.site} of {lm.name}, which is {width} wide"
            )
    with intervene(lm, interventions):
        yield
