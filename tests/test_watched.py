"""A basis is renewed when it has lost the gradient, and not before."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro

M, N, R, PERIOD = 16, 24, 2, 3


def gradient(direction, seed):
    """Energy along two rows, and a little noise."""
    noise = 0.1 * np.random.default_rng(seed).standard_normal((2, M, N))
    noise[:, direction : direction + R] += 1.0 + noise[:, :R]
    return {"w": jnp.asarray(noise, jnp.float32)}  # a stack of two


def test_refreshes_follow_the_gradient():
    projector = lro.watched(lro.svd(R), below=0.5, period=PERIOD)
    tx = lro.chain(
        lro.project(projector, select="w", layer_axis=0, side="left"),
        optax.identity(),
        lro.backproject(),
    )
    params = gradient(0, 0)
    state, update = tx.init(params), jax.jit(tx.update)
    renewed, shares = [], []
    for t in range(24):
        first_moves = 0 if t < 10 else 8
        g = gradient(first_moves, t)
        g["w"] = g["w"].at[1].set(gradient(0, t)["w"][1])  # the second layer stays
        before = state.basis["w"].vectors
        out, state = update(g, state, params)
        moved = np.abs(np.asarray(state.basis["w"].vectors - before)).max((-2, -1)) > 0
        renewed.append(moved)
        shares.append(np.sum(np.square(out["w"]), (-2, -1)))
    renewed = np.asarray(renewed)
    assert renewed[0].all()
    # The first gradients that count are those of steps 2, 3 and 4, and the share of the
    # period that ends with step 10 is only a third lower. That of the next is none.
    assert np.nonzero(renewed[1:, 0])[0].tolist() == [13]
    assert not renewed[1:, 1].any()
    assert shares[13][0] < 0.1 * shares[14][0]


def test_a_random_basis_is_another_at_every_refresh():
    projector = lro.watched(lro.sampled_svd(R, 1000), below=10.0, period=1)
    tx = lro.scale_by_galore(projector=projector)
    params = jnp.ones((M, N))
    state, update, found = tx.init(params), jax.jit(tx.update), []
    for t in range(8):
        _, state = update(gradient(0, t)["w"][0], state)
        found.append(np.asarray(state.basis.vectors))
    different = {basis.tobytes() for basis in found}
    assert len(different) > 2


def test_what_moves_by_itself_is_refused():
    with pytest.raises(ValueError, match="keep it from one refresh to the next"):
        lro.watched(lro.online_pca(4))
    with pytest.raises(ValueError, match="keep it from one refresh to the next"):
        lro.lazy(lro.watched(lro.svd(4)))
    with pytest.raises(TypeError, match=r"lro\.watched expected a projector"):
        lro.watched(4)
    with pytest.raises(TypeError, match="`period` must be a positive int"):
        lro.watched(lro.svd(4), period=2.5)
