"""Polar factors against NumPy in float64, Lion's interpolation, and SUMO."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from lowrank_optax.testing import HARD_SHAPES, hard_matrix

METHODS = ("svd", "newton_schulz")
methods = pytest.mark.parametrize("method", METHODS)


def noise(seed, *shape):
    return np.float32(np.random.default_rng(seed).standard_normal(shape))


def polar(x):
    left, _, right = np.linalg.svd(np.float64(x), full_matrices=False)
    return left @ right


def conditioned(m, n, condition, seed=0):
    """Singular values spread evenly on a logarithmic scale, and the polar factor."""
    rng = np.random.default_rng(seed)
    k = min(m, n)
    left = np.linalg.qr(rng.standard_normal((m, k)))[0]
    right = np.linalg.qr(rng.standard_normal((n, k)))[0]
    values = np.geomspace(1.0, 1.0 / condition, k)
    return np.float32((left * values) @ right.T), left @ right.T


def apply(tx, x):
    return np.asarray(jax.jit(tx.update)(jnp.asarray(x), tx.init(x))[0])


@methods
@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (5, 5), (3, 6, 9), (2, 3, 9, 6)])
def test_every_matrix_becomes_its_polar_factor(method, shape):
    x = noise(0, *shape)
    # Random matrices of this size: condition numbers below 100, rounding of 1e-7.
    np.testing.assert_allclose(apply(lro.orthogonalize(method), x), polar(x), atol=2e-5)


@methods
@pytest.mark.parametrize(("m", "n"), [(4, 64), (64, 128), (128, 64)])
@pytest.mark.parametrize("condition", [1e1, 1e3, 1e4])
def test_accuracy_by_condition_number(method, m, n, condition):
    """Singular vectors of the smallest value are known to 1e-7 times the condition.

    1e-6, as the docstring says, covers the sum over several small ones.
    """
    x, expected = conditioned(m, n, condition)
    got = apply(lro.orthogonalize(method), x)
    np.testing.assert_allclose(got, expected, atol=1e-6 * max(condition, 10.0))
    values = np.linalg.svd(np.float64(got), compute_uv=False)
    np.testing.assert_allclose(values, 1.0, atol=2e-6)


def test_newton_schulz_reaches_what_its_steps_say():
    """Above 5 * 1.5^-steps of the norm: within 1e-3 of 1; far below: not there."""
    steps = 12
    reach = 5 * 1.5**-steps
    values = np.array([1.0, reach * 1.1, reach / 20])
    x = np.float32(np.diag(values))
    got = np.diag(apply(lro.orthogonalize("newton_schulz", steps), x))
    assert abs(got[0] - 1) < 1e-3 and abs(got[1] - 1) < 1e-3
    assert got[2] < 0.5


def test_svd_drops_rounding_noise():
    """Rank k in, rank k out, whatever the shape."""
    for m, n in [(8, 8), (40, 300), (300, 40)]:
        x = noise(0, m, 2) @ noise(1, 2, n)
        got = apply(lro.orthogonalize("svd"), x)
        values = np.linalg.svd(np.float64(got), compute_uv=False)
        np.testing.assert_allclose(values[:2], 1.0, atol=1e-5)
        np.testing.assert_allclose(values[2:], 0.0, atol=1e-6)


@methods
def test_zero_gives_zero_beside_others(method):
    x = np.stack([np.zeros((4, 6), np.float32), noise(0, 4, 6)])
    got = apply(lro.orthogonalize(method), x)
    np.testing.assert_array_equal(got[0], 0.0)
    np.testing.assert_allclose(got[1], polar(x[1]), atol=1e-5)


@methods
@pytest.mark.parametrize("scale", [1e-20, 1e15, 1e38])
def test_any_scale(method, scale):
    x = np.clip(noise(0, 4, 6), -3, 3)
    got = apply(lro.orthogonalize(method), np.float32(scale) * x)
    np.testing.assert_allclose(got, polar(x), atol=1e-5)


@methods
def test_hard_matrices_stay_finite_and_bounded(method):
    tx = lro.orthogonalize(method)
    step = jax.jit(tx.update)
    for m, n in HARD_SHAPES:
        for kind in ("zero", "all_equal", "rank_one", "repeated", "geometric", "tiny"):
            got, _ = step(jnp.asarray(hard_matrix(kind, m, n)), optax.EmptyState())
            assert np.linalg.norm(np.asarray(got), 2) < 1 + 1e-5, (kind, m, n)


@methods
def test_sqrt_long_makes_elements_of_root_mean_square_a_fifth(method):
    for shape in [(6, 24), (24, 6)]:
        got = apply(
            lro.orthogonalize(method, shape_factor="sqrt_long"), noise(0, *shape)
        )
        np.testing.assert_allclose(np.sqrt(np.mean(got**2)), 0.2, rtol=1e-5)


def test_dtype_is_kept():
    got = apply(lro.orthogonalize(), jnp.asarray(noise(0, 4, 6), jnp.bfloat16))
    assert got.dtype == jnp.bfloat16


def test_vectors_are_refused_by_name():
    tx = lro.orthogonalize()
    params = {"w": jnp.ones((2, 3)), "layer": {"bias": jnp.ones(3)}}
    with pytest.raises(ValueError, match=r"leaf 'layer/bias' has shape \(3,\)"):
        tx.init(params)
    with pytest.raises(ValueError, match=r"leaf 'layer/bias' has shape \(3,\)"):
        tx.update(params, optax.EmptyState())
    bracket = lro.chain(lro.project(lro.power(1)), tx, lro.backproject())
    with pytest.raises(ValueError, match="full="):
        bracket.init(params)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "qr"}, "`method` must be one of"),
        ({"shape_factor": "sqrt"}, "`shape_factor` must be one of"),
        ({"steps": 0}, "`steps` must be at least 1"),
    ],
)
def test_choices_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        lro.orthogonalize(**options)


# Lion's interpolation.


def test_lion_interpolation_under_a_sign_is_lion():
    tree = {"w": noise(0, 3, 4), "b": noise(1, 4)}
    ours = optax.chain(
        lro.scale_by_lion_interpolation(0.8, 0.95), optax.scale_by_sign()
    )
    lion = optax.scale_by_lion(0.8, 0.95)
    state, lion_state = ours.init(tree), lion.init(tree)
    for step in range(4):
        gradient = jax.tree.map(lambda x, s=step: jnp.sin(x + s), tree)
        got, state = ours.update(gradient, state)
        expected, lion_state = lion.update(gradient, lion_state)
        jax.tree.map(np.testing.assert_array_equal, got, expected)
        jax.tree.map(np.testing.assert_array_equal, state[0].mu, lion_state.mu)
    assert int(state[0].count) == 4


def test_lion_interpolation_is_its_formula():
    tx, mu = lro.scale_by_lion_interpolation(0.8, 0.95), np.zeros((3, 4))
    state = tx.init(jnp.zeros((3, 4)))
    for step in range(4):
        g = noise(step, 3, 4)
        got, state = tx.update(jnp.asarray(g), state)
        np.testing.assert_allclose(got, 0.8 * mu + 0.2 * g, rtol=1e-5, atol=1e-7)
        mu = 0.95 * mu + 0.05 * g
        np.testing.assert_allclose(state.mu, mu, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("mu_dtype", [None, jnp.bfloat16])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_lion_interpolation_keeps_its_dtypes(mu_dtype, dtype):
    tx = lro.scale_by_lion_interpolation(mu_dtype=mu_dtype)
    state = tx.init(jnp.zeros((3, 4)))
    update, state = tx.update(jnp.ones((3, 4), dtype), state)
    assert update.dtype == dtype
    assert state.mu.dtype == (mu_dtype or jnp.float32)


# SUMO.

R, GAP = 3, 2
SHAPES = {"wide": (8, 20), "tall": (20, 8), "stack": (2, 10, 14)}


def view(x, shape):
    return np.swapaxes(x, -1, -2) if shape[-2] > shape[-1] else x


@pytest.mark.parametrize("residual", [None, 0.5, 1.0])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_sumo_is_its_formula(shape, residual):
    """Against the docstring's lines in float64, from the bases that it formed."""
    b1, scale, n = 0.9, 0.5, max(shape[-2:])
    tx = lro.scale_by_sumo(
        R, update_proj_gap=GAP, b1=b1, scale=scale, residual=residual, layer_axis=0
    )
    state, moment, before = tx.init({"w": jnp.zeros(shape)}), 0.0, None
    update = jax.jit(tx.update)
    for step in range(5):
        gradient = noise(step, *shape)
        updates, state = update({"w": jnp.asarray(gradient)}, state)
        basis = np.float64(state.basis["w"])
        turn = np.swapaxes(basis, -1, -2)
        seen = view(np.float64(gradient), shape)
        low = turn @ seen
        if before is not None:
            moment = (turn @ before) @ moment
        moment = b1 * moment + (1 - b1) * low
        before = basis
        left, _, right = np.linalg.svd(moment, full_matrices=False)
        expected = scale * 0.2 * n**0.5 * basis @ (left @ right)
        if residual is not None:
            expected = expected + residual * (seen - basis @ low)
        # Products of float32 numbers of about 1, and M's condition number of 10.
        got = view(np.asarray(updates["w"]), shape)
        np.testing.assert_allclose(got, expected, atol=5e-5)


def test_sumo_s_step_in_the_subspace_has_one_length():
    """|P O| = sqrt(r), so a limit on its growth would never bind."""
    tx = lro.scale_by_sumo(R, shape_factor="none", residual=None, update_proj_gap=GAP)
    state, update = tx.init({"w": jnp.zeros((8, 20))}), jax.jit(tx.update)
    for step in range(4):
        gradient = {"w": jnp.asarray(10.0 ** (3 * step) * noise(step, 8, 20))}
        updates, state = update(gradient, state)
        np.testing.assert_allclose(np.linalg.norm(updates["w"]), R**0.5, rtol=1e-5)


def test_sumo_s_full_leaves_get_adam_or_what_is_asked_for():
    params = {"w": jnp.ones((8, 6)), "b": jnp.ones(3)}
    gradient = jax.tree.map(lambda p: -2.0 * p, params)
    for full, expected in [(None, 1.0), (optax.identity(), -2.0)]:
        tx = lro.scale_by_sumo(2, full=full, select="w")
        updates, _ = tx.update(gradient, tx.init(params), params)
        np.testing.assert_allclose(np.abs(updates["b"]), abs(expected), rtol=1e-5)


@methods
def test_sumo_state_bytes(method):
    """m r + r n numbers; counters of bracket (12), ema and Adam (4 each), one flag."""
    params = {"w": jnp.zeros((48, 32))}
    tx = lro.sumo(1e-2, rank=4, orthogonalization=method)
    table = lro.state_bytes(tx, params)
    assert table.by_role == {"basis": 4 * 32 * 4, "mu": 4 * 48 * 4, "other": 12 + 8 + 1}
    short = lro.sumo(1e-2, rank=4, mu_dtype=jnp.bfloat16, basis_dtype=jnp.bfloat16)
    table = lro.state_bytes(short, params)
    assert table.by_role == {"basis": 2 * 32 * 4, "mu": 2 * 48 * 4, "other": 12 + 8 + 1}


def test_sumo_errors():
    with pytest.raises(ValueError, match="`orthogonalization` must be one of"):
        lro.sumo(1e-2, orthogonalization="qr")
    with pytest.raises(ValueError, match="`rank`"):
        lro.sumo(1e-2, rank=0)
