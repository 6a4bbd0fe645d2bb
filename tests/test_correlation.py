"""COAP: the step on the basis, decompositions, and Tucker-2 for convolutions."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from lowrank_optax.linalg.bases import Rotation
from tests.golden import cases
from tests.golden.registry import METHODS

M, N, R = 12, 20, 3


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


@functools.cache
def refresher(projector, matrix):
    """One warm refresh of one matrix, compiled once for every epoch."""

    @jax.jit
    def run(gradient, old, moments, epoch):
        at = lro.At(
            jax.random.key(0),
            epoch,
            jnp.int32(0),
            jnp.bool_(False),
            moments,
            jnp.int32(7),
        )
        return projector.refresh(matrix, gradient, old, at)

    return run


def refresh(projector, matrix, gradient, old, moment=None, epoch=1):
    moments = () if moment is None else ({"mu": jnp.asarray(moment, jnp.float32)},)
    gradient, old = (jnp.asarray(x, jnp.float32) for x in (gradient, old))
    new = refresher(projector, matrix)(gradient, old, moments, jnp.int32(epoch))
    return np.asarray(new, np.float64)


def viewed(side, reduction_is_rows):
    """A matrix whose view is M x N."""
    shape = (M, N) if side == "left" else (N, M)
    matrix = lro.Matrix("w", shape, (), (0,), (1,), side, R)
    return dataclasses.replace(matrix, reduction_is_rows=reduction_is_rows)


def slope(gradient, basis, momentum, inputs):
    """f's derivative, worked out by hand, in float64; `inputs` is their axis."""
    m, n = gradient.shape
    error = basis @ basis.T @ gradient - gradient
    size = np.mean(error**2)
    by_error = 2 / (m * n) * (error @ gradient.T + gradient @ error.T) @ basis
    lifted = basis @ momentum

    def norm(x):
        return np.linalg.norm(x, axis=inputs, keepdims=True)

    cosine = np.sum(lifted * gradient, inputs, keepdims=True)
    cosine = cosine / norm(lifted) / norm(gradient)
    by_lifted = gradient / norm(lifted) / norm(gradient)
    by_lifted = (by_lifted - cosine * lifted / norm(lifted) ** 2) / cosine.size
    by_cosine = by_lifted @ momentum.T
    return (1 - cosine.mean()) * by_error - size * by_cosine


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("reduction_is_rows", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("clip", [1e9, 0.01])
def test_the_step_is_the_clipped_derivative(side, reduction_is_rows, normalize, clip):
    matrix = viewed(side, reduction_is_rows)
    gradient, basis, momentum = normal(0, M, N), 0.5 * normal(1, M, R), normal(2, R, N)
    projector = lro.correlation(R, learning_rate=0.3, clip=clip, normalize=normalize)
    got = refresh(projector, matrix, gradient, basis, momentum)
    if normalize:
        gradient = gradient / np.sqrt(np.mean(gradient**2))
    # The view has the projected axis first: the inputs, if it is what is summed over.
    inputs = 0 if reduction_is_rows == (side == "left") else 1
    want = slope(gradient, basis, momentum, inputs)
    norm = np.linalg.norm(want)
    assert (norm > clip) == (clip == 0.01)
    want = want * min(1.0, clip / (norm + 1e-6))
    # Sums of 240 products in float32, seen on a basis with entries of about 1.
    np.testing.assert_allclose(got - basis, -0.3 * want, atol=2e-6)


def test_the_step_lowers_the_objective():
    def objective(basis):
        error = np.mean((basis @ basis.T @ gradient - gradient) ** 2)
        lifted = basis @ momentum
        norms = np.linalg.norm(lifted, axis=0) * np.linalg.norm(gradient, axis=0)
        return error * (1 - np.mean(np.sum(lifted * gradient, 0) / norms))

    gradient, momentum = normal(0, M, N), normal(2, R, N)
    gradient /= np.sqrt(np.mean(gradient**2))
    basis = np.linalg.qr(normal(1, M, R))[0]
    projector = lro.correlation(R)
    after = refresh(projector, viewed("left", True), gradient, basis, momentum)
    assert objective(after) < objective(basis) - 1e-3


def test_only_the_normalized_step_moves_at_the_scale_of_a_language_model():
    gradient, basis = 1e-3 * normal(0, M, N), np.linalg.qr(normal(1, M, R))[0]
    matrix, momentum = viewed("left", True), 1e-3 * normal(2, R, N)

    def moved(gradient, **options):
        projector = lro.correlation(R, **options)
        after = refresh(projector, matrix, gradient, basis, momentum)
        return np.abs(after - np.asarray(basis, np.float32)).max()

    assert moved(gradient, normalize=False) < 1e-6
    assert moved(gradient) > 1e-3
    # Up to rounding the scale of the gradient does not matter at all.
    assert abs(moved(gradient) - moved(1e15 * gradient)) < 1e-6


@pytest.mark.parametrize("momentum", [None, np.full((R, N), np.nan), np.zeros((R, N))])
def test_without_a_momentum_the_error_alone_counts(momentum):
    gradient, basis = normal(0, M, N), 0.5 * normal(1, M, R)
    projector = lro.correlation(R, clip=1e9, normalize=False)
    got = refresh(projector, viewed("left", True), gradient, basis, momentum)
    error = basis @ basis.T @ gradient - gradient
    want = 2 / (M * N) * (error @ gradient.T + gradient @ error.T) @ basis
    np.testing.assert_allclose(got - basis, -0.1 * want, atol=2e-6)


@pytest.mark.parametrize("cold_start", ["power", "svd"])
def test_every_fifth_refresh_decomposes(cold_start):
    gradient, old = normal(0, M, N), np.linalg.qr(normal(1, M, R))[0]
    projector = lro.correlation(R, cold_start=cold_start)
    matrix = viewed("left", True)

    def energy(basis):
        q = np.linalg.qr(basis)[0]
        return np.sum((q.T @ gradient) ** 2)

    best = np.sum(np.linalg.svd(gradient, compute_uv=False)[:R] ** 2)
    for epoch in range(11):
        new = refresh(projector, matrix, gradient, old, normal(2, R, N), epoch)
        defect = np.abs(new.T @ new - np.eye(R)).max()
        if epoch % 5 == 0:
            assert defect < 1e-5
            # One sweep from a random basis.
            assert energy(old) < 0.55 * best < 0.75 * best < energy(new)
        else:
            assert defect > 1e-4
    # With "svd" the columns are principal axes of what the sketch sees, in order.
    new = refresh(projector, matrix, gradient, old, None, 5)
    sketch = np.linalg.qr(gradient.T @ old)[0]
    seen = gradient @ sketch
    gram = new.T @ seen @ seen.T @ new
    off = np.abs(gram - np.diag(np.diag(gram))).max() / gram[0, 0]
    assert (off < 1e-4) == (cold_start == "svd")


CONV = lro.MatrixDimensionNumbers(2, 3, shared_axis=(0, 1))
KERNEL = (3, 3, 16, 24)


def conv_bracket(projector, **options):
    opened = lro.project(
        projector, side="both", weight_dimension_numbers=CONV, **options
    )
    return lro.chain(opened, optax.scale_by_adam(), lro.backproject())


def test_a_convolution_has_two_bases_for_all_its_positions():
    tx = conv_bracket(lro.correlation(4, 2))
    gradient = jnp.asarray(normal(0, *KERNEL), jnp.float32)
    state = tx.init(gradient)
    updates, state = jax.jit(tx.update)(gradient, state)
    left, right = (np.asarray(b, np.float64) for b in state.basis)
    assert left.shape == (16, 4) and right.shape == (24, 4)
    low = np.einsum("hwio,ir,os->rhws", gradient, left, right)
    mu = np.asarray(state.inner_state.mu).reshape(4, 3, 3, 4)
    np.testing.assert_allclose(mu, 0.1 * low, atol=1e-5)
    # Adam's first direction is the sign.
    want = np.einsum("rhws,ir,os->hwio", np.sign(low), left, right)
    np.testing.assert_allclose(updates, want, atol=1e-4)
    # Each basis is that of its unfolding.
    for basis, axis in ((left, 2), (right, 3)):
        unfolded = np.moveaxis(np.asarray(gradient, np.float64), axis, 0)
        unfolded = unfolded.reshape(KERNEL[axis], -1)
        best = np.sum(np.linalg.svd(unfolded, compute_uv=False)[:4] ** 2)
        assert np.sum((basis.T @ unfolded) ** 2) > 0.98 * best


def test_both_bases_of_a_convolution_move_down_one_objective():
    def objective(left, right):
        low = np.einsum("hwio,ir,os->hwrs", gradient, left, right)
        error = np.einsum("hwrs,ir,os->hwio", low, left, right) - gradient
        lifted = np.einsum("rhws,ir,os->hwio", momentum, left, right)
        norms = np.linalg.norm(lifted, axis=2) * np.linalg.norm(gradient, axis=2)
        cosines = np.sum(lifted * gradient, axis=2) / norms
        return np.mean(error**2) * (1 - np.mean(cosines))

    gradient, momentum = normal(0, *KERNEL), normal(1, 4, 3, 3, 4)
    gradient /= np.sqrt(np.mean(gradient**2))
    old = 0.4 * normal(2, 16, 4), 0.4 * normal(3, 24, 4)
    projector = lro.correlation(4, learning_rate=1.0, clip=1e9)
    matrix = lro.Matrix("w", KERNEL, (), (2,), (3,), "both", 4, shared=(0, 1))
    at = lro.At(
        jax.random.key(0),
        jnp.int32(1),
        jnp.int32(0),
        jnp.bool_(False),
        ({"mu": jnp.asarray(momentum.reshape(4, -1), jnp.float32)},),
        jnp.int32(7),
    )
    stored = type(conv_bracket(projector).init(jnp.zeros(KERNEL)).basis)(
        *(jnp.asarray(b, jnp.float32) for b in old)
    )
    view = matrix.view(jnp.asarray(gradient, jnp.float32))
    new = projector.both().refresh(matrix, view, stored, at)
    for k in (0, 1):
        got = old[k] - np.asarray(new[k], np.float64)
        # Central differences of the formula in float64, at a few entries.
        for i, j in ((0, 0), (5, 1), (15, 3)):
            ends = []
            for h in (1e-5, -1e-5):
                moved = [b.copy() for b in old]
                moved[k][i, j] += h
                ends.append(objective(*moved))
            assert got[i, j] == pytest.approx((ends[0] - ends[1]) / 2e-5, abs=3e-6)


def test_state_bytes_of_a_convolution():
    h, w, i, o = KERNEL
    tx = lro.coap(1e-2, 4, side="both", weight_dimension_numbers=CONV)
    seen = lro.state_bytes(tx, {"kernel": jnp.zeros(KERNEL)})
    moments = 4 * 4 * h * w * 4
    assert seen.entries == {
        ("kernel", "basis"): 4 * (i + o) * 4,
        ("kernel", "mu"): moments,
        ("kernel", "nu"): moments,
        ("kernel", "other"): 1,  # whether a refresh is pending
        ("", "other"): 4 + 8 + 4,  # two counters and the key
    }


def test_state_bytes():
    seen = lro.state_bytes(lro.coap(1e-2, R), {"w": jnp.zeros((M, N))})
    assert seen.by_role == {
        "basis": 4 * M * R,
        "mu": 4 * R * N,
        "nu": 4 * R * N,
        "other": 4 + 8 + 4 + 1,  # two counters, the key, whether a refresh is pending
    }


def test_the_roots_are_transported_as_a_vector():
    c, mu, nu = normal(0, 3, 3), normal(1, 3, 5), normal(2, 3, 5) ** 2
    (moved,) = lro.rotate_moments(form="root").move(
        ({"mu": jnp.asarray(mu), "nu": jnp.asarray(nu)},),
        Rotation(jnp.asarray(c, jnp.float32)),
        jnp.int32(3),
    )
    np.testing.assert_allclose(moved["mu"], c @ mu, atol=1e-5)
    np.testing.assert_allclose(moved["nu"], (c @ np.sqrt(nu)) ** 2, atol=1e-5)


@functools.cache
def recorded(name):
    return cases.load(cases.DATA / f"{name}.npz")


@pytest.mark.parametrize("name", ["tall", "wide", "square"])
def test_the_recorded_steps_of_the_basis(name):
    """They are too small to show in the weights: 4e-5 in a basis' entries."""
    case = recorded("coap_adamw_r4_gap5_s1p0_wd0p1_restore")
    replay = METHODS[case.method](case)
    params = {n: jnp.asarray(case.params(n)[0]) for n in case.names}
    state, update = replay.tx.init(params), jax.jit(replay.tx.update)
    bases = []
    for k in range(6):
        gradient = {n: jnp.asarray(case.gradients[n][k]) for n in case.names}
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        bases.append(optax.tree_utils.tree_get(state, "basis")[name])
    want = case.arrays[f"projused_{name}"]
    want = want if name == "wide" else want.swapaxes(1, 2)
    step = want[5] - want[0]
    assert np.abs(step).max() > 1e-5
    # The recording's basis, with entries of up to 1, is rounded to 6e-8.
    np.testing.assert_allclose(bases[5] - bases[0], step, atol=5e-7)


def test_bad_input():
    with pytest.raises(ValueError, match="`reproject_factor` must be at least 1"):
        lro.coap(1e-2, 4, reproject_factor=0)
    with pytest.raises(ValueError, match=r"`form` must be one of .*'root'"):
        lro.rotate_moments(form="roots")
    overlap = lro.MatrixDimensionNumbers(2, 3, shared_axis=(1, 2))
    with pytest.raises(ValueError, match=r"disjoint.*shared_axis"):
        lro.coap(1e-2, 4, weight_dimension_numbers=overlap).init(jnp.zeros(KERNEL))


def test_both_sides_of_a_square_matrix_start_with_numbers_of_their_own():
    """A symmetric gradient would give them the same basis."""
    one = jax.random.normal(jax.random.key(0), (24, 24))
    tx = lro.galore(1.0, projector=lro.correlation(3), side="both", select="w")
    _, state = jax.jit(tx.update)({"w": one + one.T}, tx.init({"w": one}))
    left, right = jax.tree.leaves(optax.tree.get(state, "basis"))
    assert not np.allclose(left, right, atol=1e-3)
