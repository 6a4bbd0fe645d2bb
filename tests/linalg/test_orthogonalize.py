"""Bases from matrix products: orthonormal whatever the gradient is, and good ones.

Spectra are prescribed and everything is judged in float64 against the exact answer.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_optax as lro
from lowrank_optax.linalg.bases import cholesky_qr

SHAPES = [(32, 48, 4), (64, 256, 16), (96, 64, 32), (24, 24, 24)]
SCALES = [1.0, 1e-20, 1e15]
SPECTRA = {
    "power law 0.5": lambda i: (i + 1.0) ** -0.5,
    "power law 1": lambda i: (i + 1.0) ** -1.0,
    "power law 1.5": lambda i: (i + 1.0) ** -1.5,
    "power law 2": lambda i: (i + 1.0) ** -2.0,
    "geometric": lambda i: 10.0**-i,
    "repeated": np.ones_like,
    "repeated pairs": lambda i: 2.0 ** -(i // 2),
    "rank one": lambda i: 1.0 * (i == 0),
    "rank three": lambda i: 1.0 * (i < 3),
    "cliff": lambda i: np.where(i < 3, 1.0, 1e-4),
}

spectra = pytest.mark.parametrize("spectrum", SPECTRA.values(), ids=SPECTRA)
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def factors(spectrum, m, n, seed):
    rng, k = np.random.default_rng(seed), min(m, n)
    left = np.linalg.qr(rng.standard_normal((m, k)))[0]
    right = np.linalg.qr(rng.standard_normal((n, k)))[0]
    return left, spectrum(np.arange(k, dtype=float)), right


def off_orthonormal(basis):
    basis = np.asarray(basis, np.float64)
    return np.abs(basis.T @ basis - np.eye(basis.shape[1])).max()


@functools.cache
def refresh(m, n, r):
    """One matrix' own refresh: (gradient, old, cold, key) -> basis."""
    matrix = lro.Matrix("w", (m, n), (), (0,), (1,), "left", r)
    projector, zero = lro.power(r), jnp.int32(0)

    @jax.jit
    def step(gradient, old, cold, key):
        at = lro.At(key, zero, zero, cold)
        return projector.refresh(matrix, gradient, old, at)

    return step


def lost_energy(basis, gradient, spectrum):
    """Share of the gradient's energy that the best basis of its rank has over it."""
    basis, energy = np.asarray(basis, np.float64), spectrum**2
    best = energy[: basis.shape[1]].sum()
    return (best - np.sum((basis.T @ gradient) ** 2)) / energy.sum()


# One refresh may miss 1 % of the energy: the share that the projection is after.
ENERGY = 0.01


@spectra
@shapes
def test_cold_start(shape, spectrum):
    m, n, r = shape
    for seed, scale in enumerate(SCALES):
        left, values, right = factors(spectrum, m, n, seed)
        gradient = (left * values) @ right.T
        start = jnp.eye(m, r)
        basis = refresh(m, n, r)(
            jnp.asarray(scale * gradient, jnp.float32),
            start,
            True,
            jax.random.key(seed),
        )
        assert off_orthonormal(basis) <= 1e-5
        assert lost_energy(basis, gradient, values) <= ENERGY, scale


@spectra
@shapes
def test_warm_step_follows_a_drift(shape, spectrum):
    """The old basis is the exact one of a gradient turned by about 0.3."""
    m, n, r = shape
    for seed, scale in enumerate(SCALES):
        left, values, right = factors(spectrum, m, n, seed)
        gradient = (left * values) @ right.T
        noise = np.random.default_rng(seed + 9).standard_normal(left.shape)
        before = np.linalg.qr(left + 0.3 * noise / np.sqrt(m))[0][:, :r]
        basis = refresh(m, n, r)(
            jnp.asarray(scale * gradient, jnp.float32),
            jnp.asarray(before, jnp.float32),
            False,
            jax.random.key(seed),
        )
        assert off_orthonormal(basis) <= 1e-5
        assert lost_energy(basis, gradient, values) <= ENERGY, scale


@spectra
@shapes
def test_warm_steps_converge(shape, spectrum):
    """From any basis, repeated refreshes of one gradient lose nothing that counts."""
    m, n, r = shape
    left, values, right = factors(spectrum, m, n, 5)
    gradient = (left * values) @ right.T
    basis = jnp.asarray(
        np.linalg.qr(np.random.default_rng(6).standard_normal((m, r)))[0], jnp.float32
    )
    lost = []
    for _ in range(12):
        basis = refresh(m, n, r)(
            jnp.asarray(gradient, jnp.float32), basis, False, jax.random.key(0)
        )
        assert off_orthonormal(basis) <= 1e-5
        lost.append(lost_energy(basis, gradient, values))
    # Never a step backwards, but for float32.
    assert np.all(np.diff(lost) <= 1e-5)
    assert lost[-1] <= ENERGY


def test_gradient_nearly_orthogonal_to_the_old_basis():
    gradient = np.random.default_rng(0).standard_normal((32, 48))
    gradient[:4] *= 1e-3
    old = jnp.eye(32, 4)
    basis = refresh(32, 48, 4)(
        jnp.asarray(gradient, jnp.float32), old, False, jax.random.key(0)
    )
    assert off_orthonormal(basis) <= 1e-5
    before = np.sum((np.asarray(old).T @ gradient) ** 2)
    assert np.sum((np.asarray(basis, float).T @ gradient) ** 2) > 100 * before


def test_a_refresh_that_finds_nothing_in_the_old_basis_starts_anew():
    """A gradient orthogonal to the old basis: the next step must have left it."""
    gradient = np.zeros((16, 24), np.float32)
    gradient[8:] = np.random.default_rng(0).standard_normal((8, 24))
    tx = lro.scale_by_galore(projector=lro.power(2, 1), scale=1.0)
    params = {"w": jnp.zeros((16, 24))}
    state = tx.init(params)._replace(pending={"w": jnp.bool_(False)})
    update = jax.jit(tx.update)
    for _ in range(2):
        updates, state = update({"w": jnp.asarray(gradient)}, state)
        assert np.isfinite(updates["w"]).all()
        assert off_orthonormal(state.basis["w"]) <= 1e-5
    assert np.linalg.norm(np.asarray(state.basis["w"]).T @ gradient) > 1.0


# The orthonormalization alone.


@pytest.mark.parametrize("condition", [1.0, 1e2, 1e4, 1e5])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_cholesky_qr(condition, scale):
    rng = np.random.default_rng(int(condition))
    left = np.linalg.qr(rng.standard_normal((64, 12)))[0]
    right = np.linalg.qr(rng.standard_normal((12, 12)))[0]
    y = scale * (left * np.geomspace(1.0, 1.0 / condition, 12)) @ right.T
    basis = np.asarray(jax.jit(cholesky_qr)(jnp.asarray(y, jnp.float32)), np.float64)
    assert off_orthonormal(basis) <= 1e-5
    # The same space: float32 rounds y by 6e-8, the condition number magnifies that.
    outside = left - basis @ (basis.T @ left)
    assert np.abs(outside).max() <= 1e-6 * max(condition, 10.0)


def test_cholesky_qr_keeps_signs():
    y = np.linalg.qr(np.random.default_rng(3).standard_normal((32, 6)))[0]
    flipped = y * np.array([1, -1, 1, -1, -1, 1])
    basis = np.asarray(cholesky_qr(jnp.asarray(flipped, jnp.float32)))
    np.testing.assert_allclose(basis, flipped, atol=1e-5)
