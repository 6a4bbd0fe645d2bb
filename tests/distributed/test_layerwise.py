"""Layer-wise steps on eight devices: the plain step's numbers, and what is sent."""

import functools
import math

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import lowrank_optax as lro
from tests.distributed.cases import AXES, MESHES, named
from tests.test_layerwise import batches, block, embed, head, make_params, plain_step

LAYERS, WIDTH = 4, 32
PARAMS = functools.partial(make_params, LAYERS, WIDTH)
FSDP = {
    "embed": {"table": P(None, AXES)},
    "layers": {
        "up": P(None, None, AXES),
        "down": P(None, AXES, None),
        "norm": P(None, AXES),
    },
    "head": {"kernel": P(AXES, None)},
}


def gathered(fn):
    """A function of the model on whole parameters, as a user's FSDP has it."""

    def call(part, *args):
        if any(
            jax.typeof(x).sharding.mesh.explicit_axes for x in jax.tree.leaves(part)
        ):
            part = jax.tree.map(lambda x: jax.sharding.reshard(x, P()), part)
        return fn(part, *args)

    return call


@pytest.mark.parametrize("mesh", MESHES)
def test_on_a_mesh(mesh):
    tx = lro.galore(1e-2, projector=lro.svd(4, 2), layer_axis=0, eps=1e-3, scale=1.0)
    params, data = PARAMS(), batches(3)
    state, plain = tx.init(params), jax.jit(plain_step(tx))
    expected = []
    for batch in data:
        params, state, metrics = plain(params, state, batch)
        expected.append(metrics["loss"])
    mesh = MESHES[mesh]()
    with jax.set_mesh(mesh):
        shardings = named(mesh, FSDP)
        sharded = jax.device_put(PARAMS(), shardings)
        layout = lro.state_shardings(tx, sharded, shardings)
        own = jax.jit(tx.init, out_shardings=layout)(sharded)
        step = lro.layerwise.train_step(
            gathered(embed), gathered(block), gathered(head), tx
        )
        step = jax.jit(
            step, donate_argnums=(0, 1), out_shardings=(shardings, layout, None)
        )
        compiled = step.lower(sharded, own, data[0]).compile()
        losses = []
        for batch in data:
            sharded, own, metrics = compiled(sharded, own, batch)
            losses.append(metrics["loss"])
    # Other orders of summation, through two refreshes.
    np.testing.assert_allclose(losses, expected, rtol=0, atol=1e-5)
    for a, b in zip(jax.tree.leaves(sharded), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)
    # What is gathered is one layer's at most, never a stack of all.
    stack = LAYERS * WIDTH * 2 * WIDTH
    found = lro.collectives(compiled.as_text())
    assert found
    for item in found:
        assert max(math.prod(shape) for shape in item.shapes) < stack, item
