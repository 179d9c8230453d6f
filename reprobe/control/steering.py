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
    unpadded runs agree. Raises `UnknownSite`, `IdentityMismatch` if an operator was made with another model (unless
    `allow_mismatch`), `UsageError` if its width does not fit the site.
    """
    here = None
    for item in interventions:
        if item.identity is not None:
            here = here or lm.identity
            item.identity.require_same(here, f"the {type(item).__name__} at {item.site}", allow_mismatch=allow_mismatch)
        if (width := lm.width(item.site)) != item.width:
            raise UsageError(
                f"{type(item).__name__} of width {item.width} does not fit {item.site} of {lm.name}, which is "
                f"{width} wide"
            )
    with intervene(lm, interventions):
        yield
