"""Every shard has one owner, and the environments of torchrun and SLURM arrays say who that is."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reprobe.errors import UsageError
from reprobe.extraction import Share


def slurm(**variables):
    return {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in variables.items()}


@given(cost=st.lists(st.floats(0.1, 100), min_size=1, max_size=50), world=st.integers(1, 9))
def test_every_shard_has_exactly_one_owner_and_owners_have_neighbours(cost, world):
    owned = [Share(rank, world).shards(np.asarray(cost)) for rank in range(world)]
    assert [shard for own in owned for shard in own] == list(range(len(cost)))


@given(cost=st.lists(st.floats(1, 2), min_size=40, max_size=90), world=st.integers(2, 8))
def test_the_work_is_shared_evenly_also_where_shards_cost_differently(cost, world):
    work = [sum(cost[i] for i in Share(rank, world).shards(np.asarray(cost))) for rank in range(world)]
    assert max(work) - min(work) <= 2 * max(cost) + 1e-9


@pytest.mark.parametrize(
    ("variables", "share"),
    [
        ({}, Share(0, 1)),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, Share(3, 4)),
        (slurm(ID=2, COUNT=4), Share(2, 4)),
        (slurm(ID=7, COUNT=3, MIN=3, STEP=4), Share(1, 3)),
        (slurm(ID=2, COUNT=3) | {"RANK": "1", "WORLD_SIZE": "4"}, Share(9, 12)),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "4"}, Share(0, 1)),
    ],
)
def test_the_environment_says_which_share_this_is(variables, share):
    assert Share.of_environment(variables) == share


@pytest.mark.parametrize(
    "variables",
    [
        slurm(ID=9, COUNT=3),
        slurm(ID=4, COUNT=3, MIN=1, STEP=2),
        {"RANK": "x", "WORLD_SIZE": "2"},
    ],
)
def test_an_environment_that_makes_no_sense_is_refused(variables):
    with pytest.raises(UsageError):
        Share.of_environment(variables)


@pytest.mark.parametrize(("rank", "world"), [(4, 4), (-1, 2), (0, 0)])
def test_a_rank_outside_its_world_is_refused(rank, world):
    with pytest.raises(UsageError, match="ranks count from 0"):
        Share(rank, world)
