"""SCALE against its formulas in NumPy: roles, momentum, decay, Adam's vectors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_optax as lro

LR, DECAY, RATIO = 1e-2, 0.1, 5.0
SHAPES = {"embed": (12, 6), "wide": (6, 12), "lm_head": (6, 8), "gain": (6,)}


def normal(seed):
    rng = np.random.default_rng(seed)
    return {k: rng.standard_normal(s).astype(np.float32) for k, s in SHAPES.items()}


def reference(params, steps):
    """The weights in float64."""
    w = {k: x.astype(np.float64) for k, x in params.items()}
    head, mu, nu = np.zeros(SHAPES["lm_head"]), np.zeros(6), np.zeros(6)
    for t in range(1, steps + 1):
        g = {k: x.astype(np.float64) for k, x in normal(t).items()}
        head = 0.9 * head + 0.1 * g["lm_head"]
        g["lm_head"] = head
        mu = 0.9 * mu + 0.1 * g["gain"]
        nu = 0.999 * nu + 0.001 * g["gain"] ** 2
        for k, x in g.items():
            if x.ndim > 1:
                u = x / np.maximum(np.sqrt(np.mean(x**2, 0)), 1e-8)
            else:
                root = np.sqrt(nu / (1 - 0.999**t))
                u = RATIO * mu / (1 - 0.9**t) / (root + 1e-8)
            w[k] = w[k] - LR * (u + DECAY * w[k])
    return w


def run(tx, params, steps):
    state = tx.init(params)
    for t in range(1, steps + 1):
        updates, state = tx.update(normal(t), state, params)
        params = jax.tree.map(lambda p, u: p + u, params, updates)
    return params, state


def test_steps_are_the_formulas():
    tx = lro.column_sgd(LR, weight_decay=DECAY, vector_scale=RATIO)
    params, _ = run(tx, normal(0), 7)
    for name, expected in reference(normal(0), 7).items():
        # Float32 rounding of seven steps of size 0.01 on numbers of size 1. In those of
        # Adam, of size 0.05, `1 - 0.999^t` is off by up to 6e-5, its root by 3e-5.
        atol = 1e-5 if expected.ndim == 1 else 2e-6
        np.testing.assert_allclose(params[name], expected, atol=atol, err_msg=name)


def test_only_the_head_and_the_vectors_have_state():
    sizes = lro.state_bytes(lro.column_sgd(LR), normal(0))
    assert sizes.total == 4 * (6 * 8 + 2 * 6) + 4  # and a counter


def test_a_zero_gradient_is_no_step_and_size_does_not_matter():
    tx = lro.scale_by_column_sgd()
    state = tx.init(normal(0))
    zero, _ = tx.update(jax.tree.map(jnp.zeros_like, normal(1)), state)
    one, _ = tx.update(normal(1), state)
    many, _ = tx.update(jax.tree.map(lambda g: 1e3 * g, normal(1)), state)
    assert not any(jnp.any(x) for x in jax.tree.leaves(zero))
    np.testing.assert_allclose(one["wide"], many["wide"], rtol=1e-5)


def test_a_head_that_is_not_there_is_an_error():
    with pytest.raises(ValueError, match=r"`head` 'decoder' finds no matrix"):
        lro.column_sgd(LR, head="decoder").init(normal(0))
    tied = lro.column_sgd(LR, head="embed").init(normal(0))
    assert tied is not None


def test_matched_layers_are_matched_one_by_one_wherever_they_are_stacked():
    # Layer 1 is shown noise alone, layer 0 a signal: AdamW goes further in that.
    noise = np.random.default_rng(0).standard_normal((3, 2, 16, 24))
    gradients = [np.float32(x * [[[0.1]], [[1]]] + [[[1]], [[0]]]) for x in noise]
    both = []
    for axis in (0, 1):
        tx = lro.scale_by_column_sgd(
            axis=-2 * (axis == 0), layer_axis=axis, match="adamw"
        )
        stacks = [{"w": jnp.moveaxis(g, 0, axis)} for g in gradients]
        state = tx.init(stacks[0])
        for stack in stacks:
            updates, state = tx.update(stack, state)
        both.append(jnp.moveaxis(updates["w"], axis, 0))
    np.testing.assert_allclose(both[0], both[1], rtol=1e-5)
    signal, without = jnp.sqrt(jnp.mean(both[0] ** 2, (1, 2)))
    assert signal > 1.2 * without
