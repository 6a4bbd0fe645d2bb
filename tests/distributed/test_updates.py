"""Sharded or not, the same updates."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest

import lowrank_optax as lro
from tests.distributed.cases import (
    LAYOUTS,
    PARAMS,
    PROJECTORS,
    Sharded,
    assert_close,
    explicit_mesh,
    galore,
    gradients,
    named,
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


def test_array_hyperparameters_do_not_change_the_side():
    """Made again under automatic axes, the optimizer still sees how leaves are cut."""
    mesh = explicit_mesh()
    with jax.set_mesh(mesh):
        place = jax.sharding.NamedSharding(
            mesh, jax.sharding.PartitionSpec(mesh.axis_names[0], None)
        )
        params = {"w": jax.device_put(jnp.ones((32, 64)), place)}
        tx = lro.galore(jnp.asarray(1e-2), rank=4, side="auto")
        state = jax.jit(tx.init)(params)
        _, after = jax.jit(tx.update)(params, state, params)
    # On the longer side, the one that is whole.
    assert state.basis["w"].shape == after.basis["w"].shape == (64, 4)


@pytest.mark.parametrize("spelling", ["method", "chain"])
def test_array_hyperparameters_on_an_explicit_mesh(spelling):
    """An array that a step closes over would keep the mesh's explicit type."""

    def by_hand(learning_rate, scale):
        return lro.chain(
            lro.project(PROJECTORS["power"], layer_axis=0),
            optax.scale_by_adam(eps=0.1),
            lro.backproject(scale, learning_rate),
        )

    if spelling == "method":
        make = optax.inject_hyperparams(
            lro.galore, static_args=lro.static_args(lro.galore)
        )
        tx = make(
            1.0,
            scale=1.0,
            eps=0.1,
            projector=PROJECTORS["power"],
            layer_axis=0,
            weight_decay=0.0,
        )
    else:
        tx = optax.inject_hyperparams(by_hand)(learning_rate=1.0, scale=1.0)
    mesh = explicit_mesh()
    with jax.set_mesh(mesh):
        run = Sharded(tx, PARAMS, named(mesh, LAYOUTS["both"]))
        updates, state = run.updates(gradients(PARAMS))
    assert_close(updates, reference("power", "short"))
    assert jax.typeof(state.hyperparams["scale"]).sharding.mesh.explicit_axes
