"""Sharded or not, the same updates."""

import functools

import jax
import pytest

from tests.distributed.cases import (
    PARAMS,
    PROJECTORS,
    assert_close,
    galore,
    gradients,
    sharded,
    updates_on_one_device,
)

CASES = [
    ("power", "left", "fsdp"),
    ("power", "left", "tensor"),
    ("power", "short", "both"),
    ("svd", "left", "both"),
]


@functools.cache
def reference(projector, side):
    tx = galore(projector=PROJECTORS[projector], side=side)
    return updates_on_one_device(tx, PARAMS)[0]


@pytest.mark.parametrize(("projector", "side", "layout"), CASES)
@pytest.mark.parametrize("mesh", ["auto", "explicit"])
def test_updates_equal_those_of_one_device(mesh, projector, side, layout):
    run = sharded(mesh, projector, side, layout)
    updates, state = run.updates(gradients(PARAMS))
    assert_close(updates, reference(projector, side))
    assert jax.tree.map(lambda x: x.sharding, state) == run.state_shardings
