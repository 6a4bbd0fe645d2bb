"""LoRA-Pre against its formulas in float64: factors, moments, the limit, stacks."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import lowrank_optax as lro

B1, B2, EPS, R = 0.8, 0.9, 1e-3, 2


def normal(seed, *shape):
    draw = np.random.default_rng(seed).standard_normal(shape)
    return np.asarray(draw, np.float32)


def run(tx, gradients) -> tuple[list[Any], list[Any]]:
    state, update, out = tx.init(gradients[0]), jax.jit(tx.update), []
    states = [state]
    for gradient in gradients:
        updates, state = update(gradient, state)
        out.append(updates)
        states.append(state)
    return out, states


def ridged(gram):
    mean = np.trace(gram) / len(gram)
    return gram + np.eye(len(gram)) * (1e-5 * mean if mean else 1.0)


def regressed(g, left, right, keep):
    peak = np.abs(right).max()
    new_left = np.linalg.solve(ridged(right @ right.T), right @ g.T).T
    step = (1 - keep) * np.linalg.solve(ridged(left.T @ left), left.T @ g)
    step = step * min(1.0, 2 * peak / max(np.abs(step).max(), 1e-30))
    return keep * left + (1 - keep) * new_left, keep * right + step


@pytest.mark.parametrize("limit", [None, 1.5])
def test_as_written(limit):
    gradients = [normal(t, 2, 6, 5) * 1.5**t for t in range(5)]
    tx = lro.scale_by_regressed_adam(R, B1, B2, EPS, entry_limit=limit)
    got, states = run(tx, gradients)
    for layer in range(2):
        b, a, d, c = (np.float64(x[layer]) for x in states[0][1:])
        for t, g in enumerate(gradients, 1):
            g = np.float64(g[layer])
            b, a = regressed(g, b, a, B1**0.5)
            d, c = regressed(np.abs(g), d, c, B2**0.25)
            first, root = b @ a / (1 - B1**t), d @ c / (1 - B2 ** (t / 2))
            mu = B1 * (1 - B1 ** (t - 1)) * first + (1 - B1) * g
            nu = B2 * (1 - B2 ** (t - 1)) * root**2 + (1 - B2) * g**2
            want = mu / (1 - B1**t) / (np.sqrt(nu / (1 - B2**t)) + EPS)
            if limit:
                want = np.clip(want, -limit, limit)
            # Solved in float32 with Gram matrices of condition numbers up to 1e3.
            np.testing.assert_allclose(got[t - 1][layer], want, atol=2e-3)


def test_a_steady_gradient_of_low_rank_is_remembered():
    """Then the product of the factors is the mean that it stands for."""
    steady = normal(0, 8, R) @ normal(1, R, 6)
    _, states = run(lro.scale_by_regressed_adam(R), [steady] * 60)
    left, right = states[-1].mu_left, states[-1].mu_right
    error = np.linalg.norm(left @ right - steady) / np.linalg.norm(steady)
    assert error < 0.01


def test_steps_on_noise_are_as_long_as_adams():
    """Its root mean square is that of Adam's, and not several times as much."""
    gradients = [normal(t, 16, 12) for t in range(40)]
    got, _ = run(lro.scale_by_regressed_adam(3), gradients)
    adam, _ = run(optax.scale_by_adam(), gradients)
    for t in (1, 10, 39):
        ratio = np.sqrt(np.mean(got[t] ** 2) / np.mean(adam[t] ** 2))
        assert 0.5 < ratio < 2.0, (t, ratio)


@pytest.mark.parametrize("size", [1e-12, 1e12])
def test_the_size_of_a_gradient_does_not_matter(size):
    gradients = [normal(t, 6, 5) for t in range(4)]
    tx = lro.scale_by_regressed_adam(R, eps=0.0)
    want, _ = run(tx, gradients)
    got, _ = run(tx, [np.float32(size) * g for g in gradients])
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-3)


def test_zeros_boxes_and_seeds():
    tx = lro.scale_by_regressed_adam(R)
    got, states = run(tx, [np.zeros((6, 5), np.float32)] * 2)
    assert not np.any(got[-1])
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(states[-1]))
    kernel = nn.LogicallyPartitioned(jnp.ones((3, 6, 4)), ("layers", "embed", "mlp"))
    params: Any = {"w": kernel}
    state: Any = tx.init(params)
    assert state.mu_left["w"].names == ("layers", "embed", None)
    assert state.root_right["w"].names == ("layers", None, "mlp")
    other: Any = lro.scale_by_regressed_adam(R, seed=1).init(params)
    assert np.any(other.mu_right["w"].value != state.mu_right["w"].value)
    with pytest.raises(ValueError, match="works on matrices; leaf 'b'"):
        tx.init({"b": jnp.ones(4)})
    half: Any = lro.scale_by_regressed_adam(0.5).init(params)
    assert half.mu_left["w"].value.shape == (3, 6, 2)
    with pytest.raises(TypeError, match="one for all leaves"):
        lro.scale_by_regressed_adam(len)
