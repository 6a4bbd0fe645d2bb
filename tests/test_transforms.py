"""The plain transformations against formulas written out with NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro

# Float32 sums of a few hundred terms against float64.
RTOL = 1e-5


def noise(step, shape=(3, 4, 6)):
    return np.asarray(jax.random.normal(jax.random.key(step), shape), np.float32)


def steps(tx, gradients, params=None):
    state, out = tx.init({"w": jnp.zeros_like(gradients[0])}), []
    params = None if params is None else {"w": jnp.asarray(params)}
    for gradient in gradients:
        updates, state = tx.update({"w": jnp.asarray(gradient)}, state, params)
        out.append(np.asarray(updates["w"]))
    return out, state


def test_raw_adam():
    b1, b2, eps = 0.8, 0.95, 1e-2
    gradients = [noise(i) for i in range(4)]
    out, state = steps(lro.scale_by_raw_adam(b1, b2, eps), gradients)
    mu = nu = np.zeros(gradients[0].shape)
    for got, g in zip(out, gradients, strict=True):
        mu, nu = b1 * mu + (1 - b1) * g, b2 * nu + (1 - b2) * g.astype(float) ** 2
        np.testing.assert_allclose(got, mu / (np.sqrt(nu) + eps), rtol=RTOL)
    np.testing.assert_allclose(state.mu["w"], mu, rtol=RTOL, atol=1e-7)
    assert int(state.count) == 4


def test_bias_correction():
    out, _ = steps(lro.scale_by_bias_correction(0.8, 0.95), [np.ones((2, 2))] * 5)
    for t, got in enumerate(out, start=1):
        factor = np.sqrt(1 - 0.95**t) / (1 - 0.8**t)
        np.testing.assert_allclose(got, factor, rtol=RTOL)


def test_raw_adam_and_bias_correction_are_adam_without_eps():
    gradients = [noise(i) for i in range(4)]
    tx = optax.chain(lro.scale_by_raw_adam(eps=0.0), lro.scale_by_bias_correction())
    for a, b in zip(
        steps(tx, gradients)[0],
        steps(optax.scale_by_adam(eps=0.0), gradients)[0],
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4)  # 1 - 0.999 has four digits


@pytest.mark.parametrize(
    "rate", [0.1, lambda count: 0.1 / (1.0 + count)], ids=["number", "schedule"]
)
def test_decay_before_and_after(rate):
    w, u, wd = noise(1), noise(2), 0.3
    before, _ = steps(lro.decay_before(rate, wd), [u] * 3, w)
    after, _ = steps(lro.decay_after(rate, wd), [u] * 3, w)
    for t in range(3):
        lr = rate(t) if callable(rate) else rate
        np.testing.assert_allclose(w + before[t], w + u - lr * wd * w, rtol=1e-5)
        np.testing.assert_allclose(
            w + after[t], (1 - lr * wd) * (w + u), rtol=1e-5, atol=1e-6
        )


def test_decay_before_is_what_optax_adds():
    w, u = noise(1), noise(2)
    ours, _ = steps(lro.decay_before(0.1, 0.3), [-0.1 * u], w)
    tx = optax.chain(optax.add_decayed_weights(0.3), optax.scale_by_learning_rate(0.1))
    np.testing.assert_allclose(ours[0], steps(tx, [u], w)[0][0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("make", [lro.decay_before, lro.decay_after])
def test_decay_mask(make):
    params = {"w": jnp.ones(2), "bias": jnp.ones(2)}
    tx = make(0.5, 0.5, mask={"w": True, "bias": False})
    updates, _ = tx.update(
        jax.tree.map(jnp.zeros_like, params), tx.init(params), params
    )
    np.testing.assert_allclose(updates["w"], -0.25)
    np.testing.assert_allclose(updates["bias"], 0.0)


def factored(gradients, decay_rate, eps):
    """One matrix' Adafactor directions, written out."""
    row, col, out = 0.0, 0.0, []
    for t, g in enumerate(gradients, start=1):
        b, squared = 1.0 - t**-decay_rate, g.astype(float) ** 2 + eps
        row = b * row + (1 - b) * squared.mean(axis=1)
        col = b * col + (1 - b) * squared.mean(axis=0)
        out.append(g / np.sqrt(row / row.mean())[:, None] / np.sqrt(col)[None, :])
    return out


def test_factored_rms_of_a_stack_is_a_loop_over_its_matrices():
    gradients = [noise(i) for i in range(4)]
    out, _ = steps(lro.scale_by_matrix_factored_rms(0.7, 1e-6), gradients)
    for layer in range(3):
        expected = factored([g[layer] for g in gradients], 0.7, 1e-6)
        for got, want in zip(out, expected, strict=True):
            np.testing.assert_allclose(got[layer], want, rtol=RTOL)


def test_factored_rms_keeps_vectors_whole():
    gradients = [noise(i, (5,)) for i in range(3)]
    out, state = steps(lro.scale_by_matrix_factored_rms(0.8, 1e-6), gradients)
    v = 0.0
    for t, (got, g) in enumerate(zip(out, gradients, strict=True), start=1):
        b = 1 - t**-0.8
        v = b * v + (1 - b) * (g.astype(float) ** 2 + 1e-6)
        np.testing.assert_allclose(got, g / np.sqrt(v), rtol=RTOL)
    assert state.row["w"].shape == (5,)


def test_clip_by_matrix_rms():
    g = noise(0) * np.array([0.1, 1.0, 10.0], np.float32)[:, None, None]
    (got,), _ = steps(lro.clip_by_matrix_rms(0.5), [g])
    for layer in range(3):
        rms = np.sqrt((g[layer].astype(float) ** 2).mean())
        np.testing.assert_allclose(got[layer], g[layer] / max(1, rms / 0.5), rtol=RTOL)
    assert np.sqrt((got[0] ** 2).mean()) < 0.2  # small matrices are not scaled up


def test_parameter_rms_of_every_matrix():
    w = noise(1) * np.array([1e-6, 1.0, 10.0], np.float32)[:, None, None]
    (got,), _ = steps(lro.scale_by_parameter_rms(1e-3), [np.ones_like(w)], w)
    rms = np.sqrt((w.astype(float) ** 2).mean(axis=(1, 2)))
    assert rms[0] < 1e-3
    want = np.broadcast_to(np.maximum(rms, 1e-3)[:, None, None], w.shape)
    np.testing.assert_allclose(got, want, rtol=RTOL)


def test_parameter_rms_inside_a_bracket_reads_the_full_parameter():
    w, g = noise(1, (8, 6)) * 5, noise(2, (8, 6))
    tx = lro.chain(
        lro.project(lro.svd(1), select="w"),
        lro.scale_by_parameter_rms(),
        lro.backproject(),
    )
    plain = lro.chain(
        lro.project(lro.svd(1), select="w"), optax.identity(), lro.backproject()
    )
    (got,), _ = steps(tx, [g], w)
    (low,), _ = steps(plain, [g], w)
    rms = np.sqrt((w.astype(float) ** 2).mean())
    np.testing.assert_allclose(got, rms * low, rtol=1e-4, atol=1e-5)


# Storage dtypes.


def test_cast_moments_stores_and_computes():
    tx = lro.cast_moments(optax.scale_by_adam(), jnp.bfloat16, jnp.float16)
    gradients = [noise(i) for i in range(3)]
    out, state = steps(tx, gradients)
    assert state.mu["w"].dtype == jnp.bfloat16
    assert state.nu["w"].dtype == jnp.float16
    exact, _ = steps(optax.scale_by_adam(), gradients)
    assert out[0].dtype == np.float32
    # Two roundings of mu to 8 bits: 2 * 2^-9, and of nu to 11 bits.
    np.testing.assert_allclose(out[2], exact[2], rtol=2e-2, atol=1e-2)
    assert np.abs(out[2] - exact[2]).max() > 0


def test_cast_moments_leaves_what_it_is_not_told():
    tx = lro.cast_moments(optax.scale_by_adam(), nu_dtype=jnp.bfloat16)
    state = tx.init({"w": jnp.zeros((2, 2))})
    assert (state.mu["w"].dtype, state.nu["w"].dtype) == (jnp.float32, jnp.bfloat16)
    trace = lro.cast_moments(optax.trace(0.9), mu_dtype=jnp.bfloat16)
    assert trace.init({"w": jnp.zeros(2)}).trace["w"].dtype == jnp.bfloat16


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a_narrow_second_moment_neither_vanishes_nor_overflows(dtype):
    """Squares of 1e-6 and 1e3 lie outside float16."""
    tx = lro.cast_moments(optax.scale_by_adam(), nu_dtype=dtype)
    gradient = {"w": jnp.float32([1e-6, 1e-3, 1e4, 0.0])}
    state, update = tx.init(gradient), jax.jit(tx.update)
    for factor in (1.0, 1e-3):
        step, state = update({"w": factor * gradient["w"]}, state)
        assert float(jnp.abs(step["w"]).max()) < 10
        np.testing.assert_array_equal(state.nu["w"] > 0, gradient["w"] > 0)
        assert np.isfinite(np.float32(state.nu["w"])).all()


def test_cast_moments_around_an_accumulation():
    every = optax.MultiSteps(optax.scale_by_adam(), 2).gradient_transformation()
    tx = lro.cast_moments(every, jnp.bfloat16, jnp.bfloat16)
    state = tx.init({"w": jnp.zeros((4, 6))})
    update = jax.jit(tx.update)
    for i in range(4):
        updates, after = update({"w": jnp.asarray(noise(i, (4, 6)))}, state)
        assert jax.tree.map(jnp.result_type, after) == jax.tree.map(
            jnp.result_type, state
        )
        state = after
        assert bool((updates["w"] != 0).any()) == (i % 2 == 1)
    adam = state.inner_opt_state
    assert adam.mu["w"].dtype == adam.nu["w"].dtype == jnp.bfloat16
    # The sum under way is no moment.
    assert state.acc_grads["w"].dtype == jnp.float32


def test_accumulation_inside_a_bracket_steps_on_the_mean():
    """One basis for the whole sum, so projecting and averaging commute."""
    gradients = [noise(i, (8, 6)) for i in range(4)]
    basis = np.linalg.qr(noise(9, (6, 2)))[0]
    projector = lro.given(2, 10, bases={"w": basis[None]})

    def bracket(inner):
        return lro.chain(
            lro.project(projector, select="w"), inner, lro.backproject(0.5)
        )

    every = optax.MultiSteps(optax.scale_by_adam(), 2).gradient_transformation()
    out, _ = steps(bracket(every), gradients)
    means = [(gradients[0] + gradients[1]) / 2, (gradients[2] + gradients[3]) / 2]
    want, _ = steps(bracket(optax.scale_by_adam()), means)
    assert not out[0].any()
    assert not out[2].any()
    np.testing.assert_allclose(out[1], want[0], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(out[3], want[1], rtol=1e-4, atol=1e-6)
