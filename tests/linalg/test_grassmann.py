"""Turns of a subspace: against the SVD, a grid search, and the curve written out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from lowrank_optax.linalg import grassmann as geometry
from lowrank_optax.linalg.products import Operand
from lowrank_optax.testing import assert_bit_equal, assert_orthonormal

M, N, R = 24, 40, 6
SHAPES = [(M, N, R), (N, M, R), (20, 20, 4), (9, 30, 8), (12, 5, 3)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
moves = pytest.mark.parametrize("move", ["track", "walk"])


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def orthonormal(seed, m, r):
    return jnp.asarray(np.linalg.qr(normal(seed, m, r))[0], jnp.float32)


def f32(x):
    return jnp.asarray(x, jnp.float32)


@functools.partial(jax.jit, static_argnames=("move", "transposed"))
def geodesic_of(move, gradient, basis, transposed=False):
    """The move's geodesic and best angle, and the gradient it saw."""
    seen = geometry.see(Operand.of(gradient, transposed), basis)
    if move == "track":
        geodesic = geometry.descent(basis, seen)
    else:
        geodesic = geometry.random_direction(jax.random.key(5), basis)
    return geodesic, geometry.best_angle(geodesic, seen)


def energy(basis, gradient):
    basis, gradient = np.asarray(basis, np.float64), np.asarray(gradient, np.float64)
    return np.sum((basis.T @ gradient) ** 2)


def curve(geodesic, basis, angle):
    """`S + [(cos a - 1) S V + sin a U] V^T` in float64."""
    s, u, v = (np.asarray(x, np.float64) for x in (basis, geodesic.u, geodesic.v))
    return s + ((np.cos(angle) - 1) * s @ v + np.sin(angle) * u) @ v.T


# The leading direction.


@pytest.mark.parametrize("second", [0.0, 0.5, 0.9, 0.95])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_leading_direction_is_the_svd_s(second, scale):
    for seed, (m, r) in enumerate([(64, 16), (16, 16), (200, 32), (8, 2)]):
        left = np.linalg.qr(normal(seed, m, r))[0]
        right = np.linalg.qr(normal(seed + 9, r, r))[0]
        values = np.r_[1.0, second * 0.98 ** np.arange(r - 1)]
        x = scale * (left * values) @ right.T
        v = np.asarray(jax.jit(geometry.leading_direction)(f32(x)))
        # Rounding of the Gram matrix, 6e-8 r at most, over its gap 1 - 0.95^2 = 0.1.
        sign = np.sign(v @ right[:, 0])
        np.testing.assert_allclose(sign * v, right[:, 0], atol=1e-5)
        np.testing.assert_allclose(np.linalg.norm(v), 1.0, atol=1e-6)


@pytest.mark.parametrize("second", [0.999, 0.99999, 1.0])
def test_without_a_gap_it_is_as_good_a_direction(second):
    """Which of two equal singular vectors it is cannot be told, nor need it be."""
    left, right = (np.linalg.qr(normal(seed, 30, 8))[0] for seed in (1, 2))
    x = (left * np.r_[1.0, second, 0.5 * np.ones(6)]) @ right[:8].T
    top = np.linalg.svd(x)[1][0]
    v = np.asarray(geometry.leading_direction(f32(x)), np.float64)
    assert np.linalg.norm(x @ v) >= top * (min(second, 1.0) - 1e-6)
    np.testing.assert_allclose(np.linalg.norm(v), 1.0, atol=1e-6)


def test_leading_direction_of_nothing_is_nothing():
    assert_bit_equal(geometry.leading_direction(jnp.zeros((5, 3))), jnp.zeros(3))


# Geodesics.


@shapes
def test_descent_is_the_tangent_s_leading_triple(shape):
    m, n, r = shape
    basis, gradient = orthonormal(0, m, r), normal(1, m, n)
    geodesic, _ = geodesic_of("track", f32(gradient), basis)
    s = np.asarray(basis, np.float64)
    g = np.asarray(f32(gradient), np.float64)
    g = g / np.abs(g).max()
    tangent = -2 * (g - s @ (s.T @ g)) @ (s.T @ g).T
    left, values, right = np.linalg.svd(tangent)
    np.testing.assert_allclose(geodesic.slope, values[0], rtol=1e-5)
    rank_one = np.asarray(geodesic.u @ geodesic.v.T, np.float64)
    # Against the tangent; their gap is what float32 has to tell apart.
    want = -np.outer(left[:, 0], right[0])
    gap = 1 - values[1] / values[0] if r > 1 else 1.0
    np.testing.assert_allclose(rank_one, want, atol=2e-6 / gap)


@shapes
@moves
def test_geodesics_leave_the_subspace_at_right_angles(shape, move):
    m, n, r = shape
    """Also where next to nothing lies outside: G A^T less its span is a difference."""
    basis = orthonormal(0, m, r)
    for share in (1.0, 1e-2, 1e-3):
        gradient = np.asarray(basis) @ normal(1, r, n) + share * normal(2, m, n)
        geodesic, _ = geodesic_of(move, f32(gradient), basis)
        assert geodesic.slope > 0
        assert_orthonormal((geodesic.u, geodesic.v))
        assert geodesic.u.shape[1] == (1 if move == "track" else min(r, m - r))
        inside = np.asarray(basis, np.float64).T @ np.asarray(geodesic.u, np.float64)
        assert np.abs(inside).max() <= 2e-6


@shapes
@moves
def test_best_angle_is_that_of_a_grid_search(shape, move):
    m, n, r = shape
    for seed in range(3):
        basis, gradient = orthonormal(seed, m, r), normal(seed + 5, m, n)
        geodesic, angle = geodesic_of(move, f32(gradient), basis)
        grid = np.linspace(-np.pi / 2, np.pi / 2, 2001)
        held = [energy(curve(geodesic, basis, a), gradient) for a in grid]
        best = energy(curve(geodesic, basis, float(angle)), gradient)
        assert best >= max(held) - 1e-6 * np.sum(gradient**2)
        # The curve has period pi: angles are compared up to it, at half a spacing.
        apart = (float(angle) - grid[np.argmax(held)] + np.pi / 2) % np.pi - np.pi / 2
        assert abs(apart) <= 0.51 * np.pi / 2000
        if move == "track":
            assert 0 < angle < np.pi / 2  # it descends


@moves
def test_best_angle_where_most_energy_lies_outside(move):
    """p < q: more outside than inside, where a turn by more than pi/4 is best."""
    basis, gradient = orthonormal(0, M, R), 1e-3 * normal(1, M, N)
    gradient[:, :] += np.asarray(basis)[:, :1] * 0.01
    outside = np.linalg.qr(np.c_[np.asarray(basis), normal(2, M, 1)])[0][:, -1:]
    gradient += outside * normal(3, 1, N)
    geodesic, angle = geodesic_of(move, f32(gradient), basis)
    grid = np.linspace(-np.pi / 2, np.pi / 2, 2001)
    held = [energy(curve(geodesic, basis, a), gradient) for a in grid]
    best = energy(curve(geodesic, basis, float(angle)), gradient)
    assert best >= max(held) - 1e-6 * np.sum(gradient**2)
    assert abs(float(angle)) > np.pi / 4


# Turning.


@shapes
@moves
def test_turn_along_follows_the_curve_and_stays_orthonormal(shape, move):
    m, n, r = shape
    basis = orthonormal(0, m, r)
    geodesic, best = geodesic_of(move, f32(normal(1, m, n)), basis)
    turn = jax.jit(geometry.turn_along)
    for angle in (0.0, 1e-6, -1e-3, 0.3, float(best), 1.5, -3.0, 100.0):
        turned = turn(geodesic, basis, f32(angle))
        assert_orthonormal(turned, 2e-6)
        # Float32 entries below 1, and the reduction of large angles.
        want = curve(geodesic, basis, np.float32(angle))
        np.testing.assert_allclose(turned, want, atol=2e-6)


def test_newton_schulz_takes_back_what_a_turn_is_off():
    """A basis off by 1e-3 comes back to 1e-6; without the sweep it would not."""
    off = orthonormal(0, M, R) * f32(1 + 5e-4 * normal(1, 1, R))
    geodesic, _ = geodesic_of("track", f32(normal(2, M, N)), off)
    turned = geometry.turn_along(geodesic, off, f32(0.0))
    defect = np.abs(np.asarray(off, np.float64).T @ np.asarray(off) - np.eye(R)).max()
    assert defect > 1e-4
    assert_orthonormal(turned, 2 * defect**2 + 1e-6)


# Views and scales.


@shapes
@moves
def test_a_transposed_view_gives_the_same_turn(shape, move):
    m, n, r = shape
    basis, gradient = orthonormal(0, m, r), f32(normal(1, m, n))
    plain, angle = geodesic_of(move, gradient, basis)
    other, same = geodesic_of(move, gradient, basis, True)
    assert Operand.of(gradient, True).stored.shape == (n, m)
    # Sums in another order.
    np.testing.assert_allclose(angle, same, rtol=1e-4)
    product = [np.asarray(g.u @ g.v.T) for g in (plain, other)]
    np.testing.assert_allclose(*product, atol=1e-5)


@functools.cache
def refreshed(move, m, n, r, side="left"):
    """One warm refresh of a stored [m, n] (or its transpose): jitted."""
    step = 0.4 if move == "walk" else "line_search"
    stored = (n, m) if side == "right" else (m, n)
    matrix = lro.Matrix("w", stored, (), (0,), (1,), side, r)
    projector, zero = lro.grassmann(r, 1, move=move, step=step), jnp.int32(0)

    @jax.jit
    def refresh(gradient, basis):
        at = lro.At(jax.random.key(3), zero, zero, jnp.bool_(False))
        return projector.refresh(matrix, matrix.view(gradient), basis, at)

    return refresh


@pytest.mark.parametrize("move", ["track", "walk", "jump"])
def test_a_tall_matrix_turns_as_its_transpose(move):
    basis, gradient = orthonormal(0, M, R), f32(normal(1, M, N))
    wide = refreshed(move, M, N, R)(gradient, basis)
    tall = refreshed(move, M, N, R, "right")(gradient.T, basis)
    np.testing.assert_allclose(wide, tall, atol=1e-5)
    assert np.abs(np.asarray(wide - basis)).max() > 1e-2


@pytest.mark.parametrize("move", ["track", "walk", "jump"])
def test_powers_of_two_do_not_change_a_bit(move):
    """The default has no scale at all, where the paper's eta has its square."""
    basis, gradient = orthonormal(0, M, R), f32(normal(1, M, N))
    plain = refreshed(move, M, N, R)(gradient, basis)
    for scale in (2.0**-40, 2.0**-13, 2.0**13, 2.0**40):
        assert_bit_equal(refreshed(move, M, N, R)(scale * gradient, basis), plain)


def test_eta_is_the_angle_per_slope():
    """`a = eta sigma` of the gradient as it comes: quadratic in its scale."""
    basis, gradient = orthonormal(0, M, R), f32(0.1 * normal(1, M, N))
    geodesic, _ = geodesic_of("track", gradient, basis)
    peak = float(jnp.max(jnp.abs(gradient)))
    matrix, zero = lro.Matrix("w", (M, N), (), (0,), (1,), "left", R), jnp.int32(0)
    at = lro.At(jax.random.key(0), zero, zero, jnp.bool_(False))
    for scale, eta in ((1.0, 0.01), (3.0, 0.01), (1.0, 5.0)):
        projector = lro.grassmann(R, 1, step=eta)
        turned = projector.refresh(matrix, scale * gradient, basis, at)
        angle = eta * float(geodesic.slope) * (scale * peak) ** 2
        want = curve(geodesic, basis, angle)
        np.testing.assert_allclose(turned, want, atol=1e-5 * max(1.0, angle))
        limited = lro.grassmann(R, 1, step=eta, damping=0.5, max_angle=0.02)
        turned = limited.refresh(matrix, scale * gradient, basis, at)
        want = curve(geodesic, basis, min(0.5 * angle, 0.02))
        np.testing.assert_allclose(turned, want, atol=1e-6)


def test_damping_and_limit_of_the_line_search():
    basis, gradient = orthonormal(0, M, R), f32(normal(1, M, N))
    geodesic, best = geodesic_of("track", gradient, basis)
    matrix, zero = lro.Matrix("w", (M, N), (), (0,), (1,), "left", R), jnp.int32(0)
    at = lro.At(jax.random.key(0), zero, zero, jnp.bool_(False))
    for options, angle in (
        ({"damping": 0.3}, 0.3 * float(best)),
        ({"max_angle": 0.05}, min(0.05, float(best))),
    ):
        turned = lro.grassmann(R, 1, **options).refresh(matrix, gradient, basis, at)
        np.testing.assert_allclose(turned, curve(geodesic, basis, angle), atol=2e-6)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_stack_turns_as_its_matrices(side):
    """Through the bracket, where a stack goes layer by layer."""
    projector = lro.grassmann(R, 1, cold_start="svd")

    def run(gradients):
        tx = lro.subspace(
            projector,
            optax.identity(),
            selection=lro.Selection(select=".", layer_axis=0, side=side),
        )
        state, update = tx.init(gradients[0]), jax.jit(tx.update)
        for gradient in gradients:
            updates, state = update(gradient, state)
        return updates, state.basis

    layers = 3
    stacks = [f32(normal(seed, layers, M, N)) for seed in range(3)]
    updates, bases = run([{"w": stack} for stack in stacks])
    for layer in range(layers):
        alone, basis = run([{"w": stack[layer]} for stack in stacks])
        np.testing.assert_allclose(bases["w"][layer], basis["w"], atol=1e-5)
        np.testing.assert_allclose(updates["w"][layer], alone["w"], atol=1e-4)
