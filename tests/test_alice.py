"""Alice: bases that switch, and what its columns' energies make of the residual."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from lowrank_optax.testing import assert_orthonormal
from tests.golden import cases
from tests.golden.alice import alice, energies
from tests.golden.replay import run as replay

M, N, R = 8, 12, 4


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def run(tx, gradients) -> tuple[list[Any], list[Any]]:
    gradients = [jnp.asarray(g, jnp.float32) for g in gradients]
    params = jnp.zeros_like(gradients[0])
    state, update = tx.init(params), jax.jit(tx.update)
    updates, states = [], []
    for gradient in gradients:
        out, state = update(gradient, state, params)
        updates.append(out)
        states.append(state)
    return updates, states


def test_the_recorded_energies():
    case = cases.load(cases.DATA / "alice_ptopt_r8_l3_K5.npz")
    _, state = replay(case, alice(case))
    for name, got in energies(case, state).items():
        np.testing.assert_allclose(got, case.arrays[name], rtol=1e-4, err_msg=name)


@pytest.mark.parametrize("limit", [None, 1.01])
def test_as_written(limit):
    """On the bases that were formed, with moments that nothing turns."""
    gradients = [normal(t, M, N) * 1.5**t for t in range(6)]
    tx = lro.scale_by_alice(
        R,
        update_proj_gap=2,
        growth_limit=limit,
        transport=lro.keep_moments(),
        eps=1e-3,
    )
    updates, states = run(tx, gradients)
    mu = nu = energy = before = np.float64(0.0)
    for t, (g, u, state) in enumerate(zip(gradients, updates, states, strict=True), 1):
        basis = np.float64(state.basis.vectors)
        low = basis.T @ g
        mu, nu = 0.9 * mu + 0.1 * low, 0.9 * nu + 0.1 * low**2
        seen = 1 - 0.9**t
        direction = mu / seen / (np.sqrt(nu / seen) + 1e-3)
        rest = g - basis @ low
        energy = 0.9 * energy + 0.1 * np.sum(rest**2, 0)
        outside = np.sqrt(M - R) * rest / np.sqrt(energy / seen)
        norm = np.linalg.norm(outside)
        if limit and before:
            outside = outside * min(1.0, limit * before / norm)
        before = np.linalg.norm(outside)
        want = 0.3 * (basis @ direction + 0.4 * outside)
        np.testing.assert_allclose(u, want, atol=5e-6)
        np.testing.assert_allclose(state.recovery_state.energy[0], energy, rtol=1e-5)
    assert before < 0.9 * norm if limit else before == norm


def test_state_bytes():
    params = {"w": jnp.zeros((16, 40))}
    sizes = lro.state_bytes(lro.alice(1.0, 4), params).by_role
    assert sizes["basis"] == 4 * (16 * 4 + 4 * 4)
    assert sizes["recovery"] == 4 * (40 + 1)
    assert sizes["mu"] == sizes["nu"] == 4 * 4 * 40
    without = lro.alice(1.0, 4, tracking=None, compensation=None)
    sizes = lro.state_bytes(without, params).by_role
    assert sizes["basis"] == 4 * 16 * 4
    assert "recovery" not in sizes


@pytest.mark.parametrize("tracking", [None, 0.9])
def test_what_stays_and_what_is_drawn(tracking):
    """Three directions in every gradient stay, and the fourth is new each time."""
    signal, _ = np.linalg.qr(normal(0, M, 3))
    gradients = [
        10 * signal @ normal(t, 3, N) + 0.1 * normal(50 + t, M, N) for t in range(1, 9)
    ]
    projector = lro.switched(R, 2, leading=3, tracking=tracking)
    tx = lro.scale_by_galore(projector=projector, transport=lro.keep_moments())
    _, states = run(tx, gradients)
    bases = [np.float64(state.basis.vectors) for state in states[1::2]]
    for basis in bases:
        assert_orthonormal(jnp.asarray(basis, jnp.float32))
        # Noise of a hundredth turns a direction by less than that.
        assert np.linalg.norm(signal - basis[:, :3] @ basis[:, :3].T @ signal) < 0.05
    drawn = np.stack([basis[:, 3] for basis in bases])
    assert np.all(np.abs(drawn @ signal) < 0.05)
    cosines = np.abs(drawn @ drawn.T)[np.triu_indices(len(bases), 1)]
    assert np.median(cosines) < 0.9


def test_the_second_moment_of_the_projection():
    gradients = [normal(t, M, N) for t in range(3)]
    projector = lro.switched(R, 2, tracking=0.8)
    _, states = run(lro.scale_by_galore(projector=projector), gradients)
    found = [np.float64(state.basis.second) for state in states]
    bases = [np.float64(state.basis.vectors) for state in states]
    want = np.zeros((R, R))
    # Step 0 finds a basis, and what it made does not move: Q begins with step 1.
    low = bases[1].T @ gradients[1]
    want = 0.2 * low @ low.T
    np.testing.assert_allclose(found[1], want, atol=1e-5)
    turn, low = bases[2].T @ bases[1], bases[2].T @ gradients[2]
    want = 0.8 * turn @ want @ turn.T + 0.2 * low @ low.T
    np.testing.assert_allclose(found[2], want, atol=1e-5)


def test_more_is_kept_where_little_is_left():
    """Of 8 rows a basis of 7 leaves one direction to draw."""
    basis = lro.switched(7, 1, leading=2)
    matrix = lro.Matrix("", (M, N), (), (0,), (1,), "left", 7)
    assert basis._kept(matrix) == 6
    assert lro.switched(8)._kept(lro.Matrix("", (M, N), (), (0,), (1,), "left", 8)) == 8
    assert (
        lro.switched(8)._kept(lro.Matrix("", (64, N), (), (0,), (1,), "left", 8)) == 2
    )


@pytest.mark.parametrize(
    "options", [{"of": "gradient"}, {"granularity": "tensor"}, {"residual": "authors"}]
)
def test_energies_are_of_the_papers_residual(options):
    with pytest.raises(ValueError, match="energy_decay"):
        lro.recover_scale(energy_decay=0.9, **options)


def test_a_column_without_a_residual_gets_none():
    """Neither at once nor while its energy is known, and zeros are no NaN."""
    basis = np.eye(M)[:, :R]
    gradients = [normal(1, M, N), np.zeros((M, N)), normal(2, M, N)]
    gradients[0][R:, 0] = 0.0
    tx = lro.chain(
        lro.project(
            lro.given(R, bases={"": basis[None]}), side="left", select="all-linear"
        ),
        optax.identity(),
        lro.recover_scale(energy_decay=0.5, growth_limit=None),
        lro.backproject(),
    )
    updates, _ = run(tx, gradients)
    assert not updates[0][R:, 0].any() and not updates[1].any()
    rest = np.linalg.norm(updates[0][R:, 1:], axis=0)
    np.testing.assert_allclose(rest, np.sqrt(M - R), rtol=1e-5)
    # Only half of its energy's weight has seen anything, and the correction says so.
    assert np.isfinite(updates[2]).all()
    assert np.linalg.norm(updates[2][R:, 0]) < np.sqrt((M - R) / 0.5)
