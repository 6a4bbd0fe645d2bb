"""Even Muon against its formula in float64, its parts, and its bytes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from examples.llama.model import abstract_model
from examples.llama.presets import PRESETS
from lowrank_optax import quantization
from lowrank_optax.methods.muon import coefficients_of


def normal(seed, *shape):
    draw = np.random.default_rng(seed).standard_normal(shape)
    return jnp.asarray(draw, jnp.float32)


def steps(tx, gradients) -> list[Any]:
    """The updates of one step after another, and the state at the end."""
    state, update, out = tx.init(gradients[0]), jax.jit(tx.update), []
    for gradient in gradients:
        updates, state = update(gradient, state)
        out.append(updates)
    return [*out, state]


def even(x, v, decay, t):
    """The formula of the card for inputs in rows, in float64."""
    v = decay * v + (1 - decay) * np.mean(x**2, -2)
    y = x / np.sqrt(v / (1 - decay**t))[..., None, :]
    sizes = [np.sqrt(np.sum(z**2, (-2, -1), keepdims=True)) for z in (x, y)]
    return y * sizes[0] / sizes[1], v


@pytest.mark.parametrize("axis", [-2, -1])
@pytest.mark.parametrize("shape", [(6, 4), (2, 3, 4, 6)])
def test_normalized_outputs(shape, axis):
    tx = lro.normalize_outputs(0.8, axis)
    gradients, v = [normal(t, *shape) * 3.0**t for t in range(1, 5)], 0.0
    *found, state = steps(tx, gradients)
    for t, (x, got) in enumerate(zip(gradients, found, strict=True), 1):
        inward = np.float64(x) if axis == -2 else np.swapaxes(np.float64(x), -1, -2)
        want, v = even(inward, v, 0.8, t)
        want = want if axis == -2 else np.swapaxes(want, -1, -2)
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(state.col if axis == -2 else state.row, v, rtol=1e-5)


def test_a_steady_input_leaves_every_output_as_long():
    x = normal(0, 5, 7) * jnp.exp(normal(1, 1, 7))
    *_, y, _ = steps(lro.normalize_outputs(), [x] * 3)
    lengths = np.linalg.norm(y, axis=0)
    np.testing.assert_allclose(lengths, lengths[0], rtol=1e-5)
    np.testing.assert_allclose(jnp.linalg.norm(y), jnp.linalg.norm(x), rtol=1e-5)


def test_zeros_stay_and_poison_nothing():
    x = normal(0, 5, 7).at[:, 2].set(0.0)
    nothing, y, _ = steps(lro.normalize_outputs(), [jnp.zeros_like(x), x])
    assert not nothing.any() and not y[:, 2].any()
    assert np.isfinite(y).all() and y[:, 3].all()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_step_is_the_formula(bits, transposed):
    """From the momentum as it is stored; inputs are the shorter side, or the longer."""
    shape = (12, 8) if transposed else (8, 12)
    params: Any = {"w": normal(0, *shape)}
    numbers = {"w": lro.MatrixDimensionNumbers(0, 1)}
    tx = lro.even_muon(
        1e-2, bits=bits, block=4, min_size=0, weight_decay=0.1,
        weight_dimension_numbers=numbers,
    )  # fmt: skip
    beta, decay, rms, v = 0.95, 0.95, 0.2, 0.0
    state: Any = tx.init(params)
    update, before = jax.jit(tx.update), np.zeros(shape)
    for t in range(1, 4):
        g = normal((7, t), *shape)
        updates, state = update({"w": g}, state, params)
        m = beta * before + (1 - beta) * np.float64(g)
        n = beta * m / (1 - beta ** (t + 1)) + (1 - beta) * g / (1 - beta**t)
        y: Any = np.float64(n) / np.linalg.norm(n)
        y = y if y.shape[0] <= y.shape[1] else y.T
        for _ in range(5):
            a, b, c = coefficients_of("standard")
            if isinstance(a, tuple):
                a, b, c = a
            gram = y @ y.T
            y = a * y + (b * gram + c * gram @ gram) @ y
        y = y if y.shape == shape else y.T
        o = rms * max(shape) ** 0.5 * y
        want, v = even(o, v, decay, t)
        want = -1e-2 * (want + 0.1 * np.float64(params["w"]))
        np.testing.assert_allclose(updates["w"], want, rtol=1e-4, atol=1e-7)
        if bits == 4:
            return  # how it is read again, the last test here looks at
        (_, mu), *_ = optax.tree_utils.tree_get_all_with_path(state, "mu")
        before = np.float64(mu["w"].decode())


# At 128 wide, the numbers for rows and columns are 3 % too many.
@pytest.mark.parametrize("preset", ["60m", "350m", "1b", "7b"])
def test_at_most_an_eighth_of_adamw(preset):
    params = abstract_model(PRESETS[preset].model)[1]
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    for bits, share in ((8, 1 / 8), (4, 1 / 13)):
        tx = lro.even_muon(1e-3, bits=bits, layer_axis=0)
        assert lro.state_bytes(tx, params).total <= 8 * size * share


def test_bytes():
    params = {"w": jnp.zeros((2, 64, 128)), "embed": jnp.zeros((4096, 128))}
    found = {
        bits: lro.state_bytes(lro.even_muon(1.0, bits=bits, layer_axis=0), params)
        for bits in (8, 4)
    }
    n, table = 2 * 64 * 128, 4096 * 128
    for bits, sizes in found.items():
        kept = n * bits // 8 + 2 * n // 128 + 4 * 2 * (64 + 128)
        assert sizes.by_parameter["w"] == kept
        coded = table // 2 + 2 * table // 64
        assert sizes.by_parameter["embed"] == coded + 4 * (4096 + 128)


def test_matrices_are_chosen_whatever_full_leaves_would_take():
    """No low rank is meant to save: Adafactor's state is smaller than any momentum."""
    params = {"w": jnp.zeros((64, 128)), "b": jnp.zeros(5)}
    for tx in (lro.even_muon(1.0), lro.muon(1.0, full=lro.scale_by_column_sgd())):
        report = lro.selection_report(tx, params)
        assert [row.path for row in report.rows if row.matrix] == ["w"]


def test_gains_of_stacked_norms_are_no_matrix():
    """Each has a second moment of its own, as on a layer by itself."""
    tx = lro.scale_by_matrix_factored_rms(min_dim=4)
    gains, table = normal(0, 3, 8), normal(1, 6, 8)
    ((one, other), state) = steps(tx, [(gains, table)])
    np.testing.assert_allclose(one, jnp.sign(gains), rtol=1e-6)
    assert not np.allclose(other, jnp.sign(table), atol=0.1)
    assert [x.shape for x in jax.tree.leaves((state.row, state.col))] == [
        (3, 8), (6,), (8,)
    ]  # fmt: skip


# --- rounding at random, taken off again ---------------------------------------------


def test_draws_taken_off_leave_half_the_variance():
    x = normal(0, 64, 256)
    codec = quantization.symmetric(4, 32)
    draws = jax.random.uniform(jax.random.key(1), x.shape)
    encoded = codec.encode(x, draws)
    step = jnp.repeat(encoded.scales.astype(jnp.float32), 32, -1)
    left = (codec.decode(encoded, x.shape) - x) / step
    off = (codec.decode(encoded, x.shape, draws) - x) / step
    assert jnp.abs(off).max() <= 0.5 + 1e-5
    # 16384 draws: a mean within 4 deviations, and variances of 1/6 and 1/12.
    assert abs(float(off.mean())) < 4 * (1 / 12 / x.size) ** 0.5
    np.testing.assert_allclose(jnp.var(left), 1 / 6, rtol=0.05)
    np.testing.assert_allclose(jnp.var(off), 1 / 12, rtol=0.05)
    with pytest.raises(ValueError, match="uneven steps and cannot take `draws` off"):
        codec = quantization.companded(32, bits=4)
        codec.decode(codec.encode(x, draws), x.shape, draws)


@pytest.mark.parametrize("leafwise", [False, True])
def test_the_momentum_is_read_by_the_draws_of_the_step_before(leafwise):
    """Rounded at random alone, twice the variance would add up over the steps."""
    exact = lro.momentum(0.95, nesterov=False)
    tx = lro.quantize_state(
        exact, quantization.symmetric(4, 32), None, 0, leafwise, stochastic=True
    )
    gradients = [
        {name: normal((t, i), 64, 64) for i, name in enumerate("ab")} for t in range(40)
    ]
    *_, got, _ = steps(tx, gradients)
    *_, want, _ = steps(exact, gradients)
    for name, x in got.items():
        error = jnp.linalg.norm(x - want[name]) / jnp.linalg.norm(want[name])
        # A step of 2 deviations in 7: 0.31; 0.44 with the draws left on.
        assert 0.25 < error < 0.37
