"""What all tests share."""

import os

# Before the hub's client is imported, which reads it once: a test must not depend on what a hub answers today.
os.environ["HF_HUB_OFFLINE"] = "1"

from functools import cache, lru_cache

import pytest
import torch
from tiny import tiny_net, tiny_tokenizer

from reprobe.model.language_model import LanguageModel


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Tiny matrices: threads cost more than they give."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_lm():
    """`tiny_lm(name, bos=True)`: a tiny random language model of a family, always the same."""

    @cache
    def make(name: str, bos: bool = True) -> LanguageModel:
        return LanguageModel(tiny_net(name), tiny_tokenizer(bos=bos), name=f"tiny-{name}")

    return make


@pytest.fixture(scope="session")
def real_lm():
    """`real_lm(name)`: a bundled model, loaded once."""
    return lru_cache(maxsize=None)(LanguageModel.load)
