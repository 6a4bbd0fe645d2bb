"""Adam-mini's transformation against its formula, and what it stores."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import lowrank_optax as lro
from lowrank_optax.testing import assert_bit_equal, assert_state_stable

# Corrected for bias in float32 without loss, against float64: a few roundings of 6e-8.
RTOL = 2e-6
B1, B2, EPS = 0.9, 0.999, 1e-3


def normal(seed, *shape):
    draw = np.random.default_rng(seed).standard_normal(shape)
    return jnp.asarray(draw, jnp.float32)


def run(tx, grads):
    state, update, out = tx.init(grads[0]), jax.jit(tx.update), []
    for gradient in grads:
        updates, state = update(gradient, state)
        out.append(updates)
    return out, state


def formula(grads):
    mu = col = 0.0
    for t, gradient in enumerate(grads, start=1):
        gradient = np.asarray(gradient, np.float64)
        mu = B1 * mu + (1 - B1) * gradient
        col = B2 * col + (1 - B2) * np.mean(gradient**2, -2, keepdims=True)
        corrected, seen = mu / (1 - B1**t), 1 - B2**t
        yield corrected / (np.sqrt(col / seen) + EPS), mu, col[..., 0, :]


@pytest.mark.parametrize("shape", [(6, 4), (1, 5), (3, 6, 4), (2, 3, 4, 5)])
def test_as_written(shape):
    grads = [{"w": normal(t, *shape) * 3.0**t} for t in range(4)]
    got, state = run(lro.scale_by_adam_mini(B1, B2, EPS), grads)
    want = list(formula([g["w"] for g in grads]))
    for updates, (update, _, _) in zip(got, want, strict=True):
        np.testing.assert_allclose(updates["w"], update, rtol=RTOL, atol=1e-6)
    _, mu, col = want[-1]
    np.testing.assert_allclose(state.mu["w"], mu, rtol=RTOL, atol=1e-6)
    np.testing.assert_allclose(state.col["w"], col, rtol=RTOL)
    assert int(state.count) == 4


def test_a_stack_is_as_many_matrices():
    stacked = [normal(t, 3, 6, 4) * 3.0**t for t in range(3)]
    tx = lro.scale_by_adam_mini()
    got, state = run(tx, stacked)
    for layer in range(3):
        want, alone = run(tx, [g[layer] for g in stacked])
        np.testing.assert_allclose([g[layer] for g in got], want, rtol=1e-6)
        np.testing.assert_allclose(state.col[layer], alone.col, rtol=1e-6)


def test_vectors_and_scalars_get_adam():
    """Optax' own ``1 - b^t`` has lost two digits at 0.999: hence 0.96875."""
    grads = [{"b": normal(t, 5), "s": normal(9 + t)} for t in range(4)]
    tx = lro.scale_by_adam_mini(0.875, 0.96875)
    got, state = run(tx, grads)
    want, adam = run(optax.scale_by_adam(0.875, 0.96875), grads)
    for a, b in zip(got, want, strict=True):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=RTOL), a, b)
    assert_bit_equal(state.mu, adam.mu)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=RTOL), state.col, adam.nu
    )


def test_bytes():
    params = {"w": jnp.zeros((2, 6, 4)), "b": jnp.zeros(5)}
    seen = lro.state_bytes(lro.scale_by_adam_mini(), params)
    assert seen.by_role == {"mu": 4 * (48 + 5), "nu": 4 * (8 + 5), "other": 4}


def test_types_are_stable():
    params = {"w": jnp.ones((6, 4), jnp.bfloat16), "b": jnp.ones(5)}
    tx = lro.scale_by_adam_mini()
    updates, state = run(tx, [params, params])
    assert_state_stable(tx.init(params), state)
    assert updates[0]["w"].dtype == jnp.bfloat16


def test_boxes_keep_their_names():
    def box(x, *names):
        return nn.Partitioned(x, names)

    grads = [
        {"w": normal(t, 3, 6, 4), "b": normal(t, 5), "bare": normal(t, 6, 4)}
        for t in range(2)
    ]
    names = {"w": ("layers", "embed", "mlp"), "b": ("mlp",)}
    boxed = [
        {k: box(x, *names[k]) if k in names else x for k, x in g.items()} for g in grads
    ]
    tx = lro.scale_by_adam_mini()
    want, plain = run(tx, grads)
    got, state = run(tx, boxed)
    for tree in (got[-1], state.mu):
        assert tree["w"].names == names["w"] and tree["b"].names == names["b"]
    assert state.col["w"].names == ("layers", "mlp")
    assert state.col["b"].names == ("mlp",)
    assert_bit_equal(nn.unbox(got), want)
    assert_bit_equal(nn.unbox(state), plain)


def test_nothing_to_do():
    tx = lro.scale_by_adam_mini()
    masked = {"w": optax.MaskedNode(), "b": {}}
    for tree in ({}, masked):
        updates, _ = tx.update(tree, tx.init(tree))
        assert jax.tree.leaves(updates) == []


def test_zero_gradients():
    got, state = run(lro.scale_by_adam_mini(), [jnp.zeros((6, 4))] * 2)
    for leaf in jax.tree.leaves((got, state.mu, state.col)):
        np.testing.assert_array_equal(leaf, 0.0)
    # A column that never had a gradient leaves the others alone.
    gradient = normal(0, 6, 4)
    (got,), _ = run(lro.scale_by_adam_mini(), [gradient.at[:, 1].set(0.0)])
    (want,), _ = run(lro.scale_by_adam_mini(), [gradient])
    np.testing.assert_allclose(got, want.at[:, 1].set(0.0), rtol=1e-6)


def test_traced_hyperparameters():
    gradient = {"w": normal(0, 6, 4)}

    @jax.jit
    def update(b1, b2, eps):
        tx = lro.scale_by_adam_mini(b1, b2, eps)
        return tx.update(gradient, tx.init(gradient))[0]["w"]

    (want,) = formula([gradient["w"]])
    # Traced, 0.999 is a float32 whose logarithm has lost two digits.
    np.testing.assert_allclose(update(B1, B2, EPS), want[0], rtol=5e-5)
