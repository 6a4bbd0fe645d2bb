"""The natural gradient against the dense solve, and Natural GaLore around it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lowrank_optax as lro
from lowrank_optax.testing import assert_state_stable

S, SHAPE = 4, (5, 7)


def noise(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def dense(gradients, damping):
    """The last gradient of a list, solved in full; everything in float64."""
    columns = np.stack([np.ravel(np.float64(g)) for g in gradients], axis=1)
    matrix = damping * np.eye(len(columns)) + columns @ columns.T
    return np.linalg.solve(matrix, columns[:, -1]).reshape(np.shape(gradients[-1]))


def run(tx, gradients):
    state, out = tx.init(jnp.zeros_like(gradients[0])), []
    update = jax.jit(tx.update)
    for gradient in gradients:
        updates, after = update(jnp.asarray(gradient), state)
        assert_state_stable(state, after)
        state = after
        out.append(np.asarray(updates))
    return out, state


def error(got, expected):
    return np.max(np.abs(got - expected)) / np.max(np.abs(expected))


@given(
    seed=st.integers(0, 999),
    damping=st.sampled_from([1e-3, 1.0, 1e3]),
    parallel=st.sampled_from([0.0, 1.0, 3.0]),
    wide=st.booleans(),
)
def test_is_the_dense_solve(seed, damping, parallel, wide):
    """Rounding is amplified by s |g|^2 / damping, 1.4e6 here at the most."""
    dtype = jnp.float64 if wide else jnp.float32
    size = 1.0 if wide else 0.01  # 140 at the most
    with jax.enable_x64(wide):
        common = parallel * noise(seed, *SHAPE)
        gradients = [
            np.asarray(size * (common + noise(1000 * seed + t, *SHAPE)), dtype)
            for t in range(2 * S + 1)
        ]
        out, _ = run(lro.scale_by_natural_gradient(S, damping), gradients)
    for t, got in enumerate(out):
        assert got.dtype == dtype
        expected = dense(gradients[max(0, t + 1 - S) : t + 1], damping)
        assert error(got, expected) < (1e-8 if wide else 1e-4)


@pytest.mark.parametrize("shape", [(), (6,), (3, 4, 5), (2, 3, 4, 5)], ids=str)
def test_leading_axes_are_batch_and_vectors_are_one_gradient(shape):
    gradients = [np.float32(0.3 * noise(t, *shape)) for t in range(6)]
    out, state = run(lro.scale_by_natural_gradient(S, 0.1), gradients)
    batch, matrix = shape[:-2], shape[-2:]
    assert state.history.shape == (*batch, S, *matrix)
    assert state.norms.shape == (*batch, S)
    for t, got in enumerate(out):
        for i in np.ndindex(batch):
            expected = dense([g[i] for g in gradients[max(0, t + 1 - S) : t + 1]], 0.1)
            # Amplified by at most s |g|^2 / damping, about 100.
            assert error(got[i], expected) < 5e-5


def test_much_damping_only_divides():
    gradients = [np.float32(noise(t, *SHAPE)) for t in range(6)]
    out, _ = run(lro.scale_by_natural_gradient(S, 1e9), gradients)
    for got, gradient in zip(out, gradients, strict=True):
        # |g|^2 / damping is 4e-8; small elements round with the others in the sum.
        np.testing.assert_allclose(got, gradient / 1e9, rtol=1e-6, atol=1e-15)


def test_the_current_gradient_shrinks_by_its_own_square():
    """One gradient alone: g / (damping + |g|^2)."""
    gradient = np.float32(noise(0, *SHAPE))
    out, _ = run(lro.scale_by_natural_gradient(S, 0.5), [gradient])
    expected = gradient / (0.5 + np.sum(np.float64(gradient) ** 2))
    np.testing.assert_allclose(out[0], expected, rtol=1e-5)


@pytest.mark.parametrize("scale", [1e-20, 1e15, 1e19, 1e30])
def test_any_scale(scale):
    """With damping in proportion to |G|^2 the result goes as 1 / |G|; 0 otherwise."""
    gradients = [np.float32(noise(t, *SHAPE)) for t in range(6)]
    scaled = [np.float32(scale) * g for g in gradients]
    out, _ = run(lro.scale_by_natural_gradient(S, 1e-3), scaled)
    # Against |G|^2 = 35 scale^2 the damping is everything, or nothing that counts.
    limit = [np.float64(g) * 1e3 * scale for g in gradients]
    if scale > 1:
        limit = [
            dense(gradients[max(0, t + 1 - S) : t + 1], 1e-30 + 1e-7) / scale
            for t in range(len(gradients))
        ]
    for got, expected in zip(out, limit, strict=True):
        # The least damping in float32 is 4e-6 of a squared gradient.
        assert error(got, expected) < 1e-4


@pytest.mark.parametrize("value", [0.0, 1e-30, 1e38])
@pytest.mark.parametrize("damping", [1e-12, 1e-3])
def test_extreme_histories_stay_finite(value, damping):
    """Equal columns: a Gram matrix of rank one with next to no damping."""
    gradients = [np.full(SHAPE, value, np.float32)] * 6 + [np.ones(SHAPE, np.float32)]
    out, state = run(lro.scale_by_natural_gradient(S, damping), gradients)
    assert all(np.isfinite(x).all() for x in (*out, *jax.tree.leaves(state)))
    assert np.all(out[-1] > 0)


def test_history_in_bfloat16_takes_half_and_keeps_two_digits():
    gradients = [np.float32(0.1 * noise(t, *SHAPE)) for t in range(6)]
    short = lro.scale_by_natural_gradient(S, 1e-1, history_dtype=jnp.bfloat16)
    out, state = run(short, gradients)
    assert state.history.dtype == jnp.bfloat16 and state.norms.dtype == jnp.float32
    for t, got in enumerate(out):
        expected = dense(gradients[max(0, t + 1 - S) : t + 1], 1e-1)
        # 2^-9 per element, amplified by about s |g|^2 / damping = 14 at the most.
        assert error(got, expected) < 3e-2


def test_a_gradient_that_is_not_finite_is_gone_after_s_steps():
    gradients = [np.float32(noise(t, *SHAPE)) for t in range(S + 2)]
    gradients[1][0, 0] = np.nan
    out, _ = run(lro.scale_by_natural_gradient(S, 1e-3), gradients)
    bad = [not np.isfinite(x).all() for x in out]
    assert bad == [False, *[True] * S, False]


# The method.


def test_state_bytes():
    """(m + n) r + 2 r^2 + s (r^2 + 1) numbers on both sides, (m + 2 n + s n) r + s on
    one; the counters are the bracket's 12 bytes, and 4 each of natural gradient and
    two Adams; one flag per matrix."""
    params = {"w": jnp.zeros((48, 32)), "b": jnp.zeros(5)}
    r, s, counters = 4, 20, 12 + 3 * 4 + 1
    both = lro.state_bytes(lro.natural_galore(1e-2, rank=r), params)
    full = 4 * 5
    assert both.by_role == {
        "basis": 4 * (48 + 32) * r,
        "mu": 4 * r * r + full,
        "nu": 4 * r * r + full,
        "other": 4 * s * (r * r + 1) + counters,
    }
    tx = lro.natural_galore(1e-2, rank=r, side="short", select="w", history=5)
    short = lro.state_bytes(tx, params)
    assert short.by_role == {
        "basis": 4 * 32 * r,
        "mu": 4 * r * 48 + full,
        "nu": 4 * r * 48 + full,
        "other": 4 * 5 * (r * 48 + 1) + counters,
    }
    assert short.total == sum(x.nbytes for x in jax.tree.leaves(tx.init(params)))


@pytest.mark.parametrize(
    ("shape", "rank", "side", "projected"),
    [
        ((512, 512), 128, "both", True),
        ((512, 512), 140, "both", False),
        ((512, 1376), 128, "both", True),
        ((512, 512), 128, "short", False),
        ((1408, 8192), 128, "short", False),
        ((1600, 1600), 128, "short", True),
    ],
)
def test_which_leaves_save_memory(shape, rank, side, projected):
    """What the docstring says of r = 0.26 n, and of 1408 at rank 128."""
    params = {"w": jax.ShapeDtypeStruct(shape, jnp.float32)}
    report = lro.selection_report(lro.natural_galore(1e-2, rank, side=side), params)
    assert ("would not save" not in str(report)) == projected


@pytest.mark.parametrize("conventions", ["optax", "authors"])
def test_full_leaves_get_adam_alone(conventions):
    params = {"w": jnp.ones((12, 9)), "b": jnp.ones(5)}
    tx = lro.natural_galore(1e-2, 2, conventions=conventions)
    eps = 1e-6 if conventions == "authors" else 1e-8
    adam = optax.adam(1e-2, eps=eps)
    state, adam_state = tx.init(params), adam.init(params["b"])
    update = jax.jit(tx.update)
    for step in range(4):
        gradient = {"w": noise(step, 12, 9), "b": noise(step, 5)}
        gradient = jax.tree.map(jnp.float32, gradient)
        updates, state = update(gradient, state, params)
        expected, adam_state = adam.update(gradient["b"], adam_state)
        # The authors' eps stands elsewhere: 30 times larger in effect, on values of 1.
        rtol = 1e-3 if conventions == "authors" else 1e-5
        np.testing.assert_allclose(updates["b"], expected, rtol=rtol)


def test_the_bracket_is_its_parts():
    params = {"w": jnp.ones((12, 9))}
    ours = lro.natural_galore(1e-2, 2, history=3, damping=0.1, update_proj_gap=2)
    adam = optax.scale_by_adam()
    parts = lro.chain(
        lro.project(lro.power(2, 2), side="both", full=adam),
        lro.scale_by_natural_gradient(3, 0.1),
        adam,
        lro.backproject(0.25, 1e-2),
    )
    states = [ours.init(params), parts.init(params)]
    first, second = jax.jit(ours.update), jax.jit(parts.update)
    for step in range(5):
        gradient = {"w": jnp.float32(noise(step, 12, 9))}
        a, states[0] = first(gradient, states[0], params)
        b, states[1] = second(gradient, states[1], params)
        np.testing.assert_allclose(a["w"], b["w"], rtol=1e-6, atol=1e-9)
    natural = states[0].inner_state[0]
    assert natural.history["w"].shape == (3, 2, 2)


def test_a_new_basis_leaves_the_history_alone():
    tx = lro.scale_by_natural_galore(2, history=3, update_proj_gap=1)
    params = {"w": jnp.ones((12, 9))}
    state, kept, update = tx.init(params), [], jax.jit(tx.update)
    for step in range(3):
        _, state = update({"w": jnp.float32(noise(step, 12, 9))}, state, params)
        kept.append(state.inner_state[0].history["w"])
    np.testing.assert_array_equal(kept[2][:2], kept[1][:2])
    np.testing.assert_array_equal(kept[2][0], kept[0][0])


@pytest.mark.parametrize("history", [0, -1])
def test_history_must_be_positive(history):
    with pytest.raises(ValueError, match="`history` must be at least 1"):
        lro.natural_galore(1e-2, history=history)


def test_damping_must_be_positive():
    with pytest.raises(ValueError, match=r"`damping` must be positive, got -1\.0"):
        lro.scale_by_natural_gradient(damping=-1.0)


def test_history_must_be_an_int():
    with pytest.raises(TypeError, match="`history` must be a positive int"):
        lro.scale_by_natural_gradient(history=True)
