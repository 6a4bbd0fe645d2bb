"""One optimizer for each device, inside ``jax.shard_map``."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import lowrank_optax as lro
from tests.chosen import each_row
from tests.rows import ROWS, subject


def mesh():
    return jax.make_mesh((2,), ("member",), axis_types=(AxisType.Auto,))


def own(function):
    """Runs a function of one member's trees on every device."""

    def member(*trees):
        out = function(*jax.tree.map(lambda x: x[0], trees))
        return jax.tree.map(lambda x: x[None], out)

    return jax.shard_map(
        member, mesh=mesh(), in_specs=P("member"), out_specs=P("member")
    )


def assert_traces(tx, params):
    """Init, and steps in a loop, whose state has to keep its types."""
    tx = optax.with_extra_args_support(tx)

    def steps(params):
        def step(carry, _):
            params, state = carry
            updates, state = tx.update(params, state, params)
            return (optax.apply_updates(params, updates), state), None

        start = params, tx.init(params)
        return jax.lax.scan(step, start, None, length=2)[0][0]

    two = jax.tree.map(lambda x: jax.ShapeDtypeStruct((2, *x.shape), x.dtype), params)
    out = jax.eval_shape(own(steps), two)
    assert jax.tree.map(jnp.shape, out) == jax.tree.map(jnp.shape, two)


@each_row
def test_every_row_traces(row):
    assert_traces(ROWS[row].make(), subject(row).params)


# Parts and transformations of which no row is made.
OTHERS = {
    "lazy": lambda: lro.galore(1e-2, projector=lro.lazy(lro.power(2))),
    "sampled": lambda: lro.galore(1e-2, projector=lro.sampled_svd(2)),
    "both": lambda: lro.galore(1e-2, rank=2, side="both"),
    "accumulation": lambda: lro.galore(
        1e-2, rank=2, base_optimizer=optax.MultiSteps(optax.scale_by_adam(), 2)
    ),
    "mini": lro.scale_by_adam_mini,
    "factored": lro.scale_by_matrix_factored_rms,
    "natural": lambda: lro.natural_galore(1e-2, rank=2, select="kernel"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_others_trace(name):
    assert_traces(OTHERS[name](), {"kernel": jnp.ones((16, 12)), "bias": jnp.ones(12)})


@pytest.mark.parametrize("name", ["power", "svd", "8bit"])
def test_each_device_refreshes_from_its_own_gradient(name):
    """A scan of steps with two refreshes, against members run one after another."""
    tx = {
        "power": lambda: lro.galore(1e-2, rank=4, update_proj_gap=2),
        "svd": lambda: lro.galore(1e-2, projector=lro.svd(4, update_proj_gap=2)),
        "8bit": lambda: lro.galore_8bit(1e-2, projector=lro.svd(4, 2), min_size=0),
    }[name]()
    rng = np.random.default_rng(0)
    params = {"kernel": rng.standard_normal((2, 16, 8)).astype(np.float32)}
    grads = {"kernel": rng.standard_normal((2, 3, 16, 8)).astype(np.float32)}
    # The members disagree on whether their first gradient can tell a subspace.
    grads["kernel"][1, 0] = 0

    def run(params, grads):
        def step(carry, gradient):
            params, state = carry
            updates, state = tx.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), None

        (params, state), _ = jax.lax.scan(step, (params, tx.init(params)), grads)
        return params, state.basis

    found = jax.jit(own(run))(params, grads)
    alone = [
        jax.jit(run)(*jax.tree.map(lambda x, i=i: x[i], (params, grads)))
        for i in range(2)
    ]
    expected = jax.tree.map(lambda *x: np.stack(x), *alone)
    # Another program's order of operations.
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), found, expected
    )
