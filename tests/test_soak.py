"""Thousands of steps: bases stay orthonormal, counters count, nothing drifts."""

import jax
import jax.numpy as jnp
import optax
import pytest

import lowrank_optax as lro
from lowrank_optax.testing import assert_orthonormal

STEPS, GAP = 5_000, 5


@pytest.mark.slow
@pytest.mark.parametrize("basis_dtype", [jnp.float32, jnp.bfloat16])
def test_five_thousand_steps_on_a_drifting_problem(basis_dtype):
    shapes = {"wide": (24, 40), "tall": (2, 40, 24)}
    params = {name: jnp.zeros(shape) for name, shape in shapes.items()}
    tx = lro.galore(
        0.05,
        rank=6,
        update_proj_gap=GAP,
        scale=1.0,
        layer_axis=0,
        basis_dtype=basis_dtype,
    )

    def target(name, step):
        """A rank-8 matrix whose singular vectors turn slowly."""
        key = jax.random.key(len(name))
        *batch, m, n = shapes[name]
        left, right = (
            jax.random.normal(jax.random.fold_in(key, i), (2, *batch, size, 8))
            for i, size in enumerate((m, n))
        )
        angle = step / 2000.0
        turned = jnp.cos(angle) * left[0] + jnp.sin(angle) * left[1]
        return turned @ jnp.swapaxes(right[0], -1, -2)

    def body(carry, step):
        params, state = carry
        grads = {name: params[name] - target(name, step) for name in params}
        updates, state = tx.update(grads, state, params)
        error = optax.tree.norm(grads)
        return (optax.apply_updates(params, updates), state), error

    run = jax.jit(lambda carry: jax.lax.scan(body, carry, jnp.arange(float(STEPS))))
    (params, state), errors = run((params, tx.init(params)))
    # Float32 products of unit columns; bf16 rounds every entry to 2^-9.
    tolerance = 1e-5 if basis_dtype == jnp.float32 else 2e-2
    for basis in jax.tree.leaves(state.basis):
        assert_orthonormal(basis.astype(jnp.float32), tolerance)
    assert int(state.count) == STEPS
    assert bool(jnp.all(jnp.isfinite(errors)))
    # It follows the target: the last error is a fraction of the first.
    assert float(jnp.mean(errors[-500:])) < 0.5 * float(errors[0])
