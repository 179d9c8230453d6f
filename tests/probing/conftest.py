"""What the tests of probing are given: stores in memory and rows with a known answer."""

import pytest
from probing.memory import IDENTITY, make_store, planted_rows


@pytest.fixture(scope="session")
def planted():
    return planted_rows


@pytest.fixture(scope="session")
def store_of():
    return make_store


@pytest.fixture(scope="session")
def identity():
    return IDENTITY
