"""Stable-SPAM's front against its formulas: spikes, norms, layers, lost numbers."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro

DECAYS = (0.7, 0.9, 0.95)


def normal(seed, *shape):
    draw = np.random.default_rng(seed).standard_normal(shape)
    return np.asarray(draw, np.float32)


def run(tx, gradients) -> tuple[list[Any], Any]:
    state, update, out = tx.init(gradients[0]), jax.jit(tx.update), []
    for gradient in gradients:
        updates, state = update(gradient, state)
        out.append(updates)
    return out, state


def formula(gradients):
    g1, g2, g3 = DECAYS
    peak = norm = square = 0.0
    for t, g in enumerate(gradients, 1):
        g = np.float64(g)
        most = np.abs(g).max()
        peak = g3 * peak + (1 - g3) * most
        bound = peak / (1 - g3**t)
        g = np.where(np.abs(g) > bound, g / most * bound, g)
        size = np.linalg.norm(g)
        norm, square = g1 * norm + (1 - g1) * size, g2 * square + (1 - g2) * size**2
        level = norm / (1 - g1**t) / (np.sqrt(square / (1 - g2**t)) + 1e-8)
        yield g / size * level


def tx(**options):
    return lro.stabilize_gradients(*DECAYS, **options)


@pytest.mark.parametrize("size", [1e-25, 1.0, 1e10])
def test_as_written(size):
    """Of any size: eps is beside roots that are not small."""
    gradients = [normal(t, 6, 4) * 2.0**t for t in range(5)]
    gradients[3][2, 1] *= 1e4  # a spike
    got, _ = run(tx(eps=0.0), [np.float32(size) * g for g in gradients])
    for update, want in zip(got, formula(gradients), strict=True):
        np.testing.assert_allclose(update, want, rtol=2e-5, atol=1e-7)
    assert np.abs(got[3]).max() < 1.0


def test_layers_are_tensors_of_their_own():
    gradients = [normal(t, 3, 6, 4) * 3.0**t for t in range(3)]
    got, state = run(tx(layer_axis=0), gradients)
    for layer in range(3):
        want, _ = run(tx(), [g[layer] for g in gradients])
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a[layer], b, rtol=1e-5, atol=1e-7)
    assert state.peak.shape == (3,)


def test_what_is_no_number_is_zero_and_leaves_no_trace():
    gradients = [normal(t, 5) for t in range(3)]
    bad = [g.copy() for g in gradients]
    bad[1][:3] = np.nan, np.inf, 1e30
    clean = [g.copy() for g in bad]
    clean[1][:3] = 0.0
    got, state = run(tx(), [*bad, np.zeros(5, np.float32)])
    want, _ = run(tx(), clean)
    for a, b in zip(got, want, strict=False):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    assert not got[3].any()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))


def test_in_front_of_a_method():
    params = {"kernel": jnp.ones((16, 8)), "bias": jnp.zeros(8)}
    chained = optax.chain(lro.stabilize_gradients(), lro.galore(1e-2, rank=2))
    updates, _state = jax.jit(chained.update)(params, chained.init(params), params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert lro.state_bytes(lro.stabilize_gradients(), params).total == 4 + 4 * 3 * 2
