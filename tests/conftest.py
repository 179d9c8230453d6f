"""What all tests share."""

import os

# Before the hub's client is imported, which reads it once: a test must not depend on what a hub answers today.
os.environ["HF_HUB_OFFLINE"] = "1"

import multiprocessing
import sys
from functools import cache
from multiprocessing import forkserver

import pytest
import torch
from tiny import tiny_model

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
        return tiny_model(name, bos=bos)

    return make


@pytest.fixture(scope="session")
def real_lm():
    """`real_lm(name, dtype="float32")`: a bundled model, loaded once."""

    @cache
    def load(name: str, dtype: str = "float32") -> LanguageModel:
        return LanguageModel.load(name, dtype=dtype)

    return load


@pytest.fixture(scope="session")
def server():
    """A context of multiprocessing whose processes are forked from one that has imported everything, and so start at
    once: a kill falls into the work itself."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["extracting"])
    with pytest.MonkeyPatch.context() as patch:  # the fork server of Python 3.11 does not take over sys.path
        patch.setenv("PYTHONPATH", os.pathsep.join(p for p in sys.path if p))
        patch.setenv("TOKENIZERS_PARALLELISM", "false")
        patch.setenv("REPROBE_WARM", "1")
        forkserver.ensure_running()
    return context
