"""FOAM against its formulas in float64: folds, moments, the rest, and their bytes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import lowrank_optax as lro
from lowrank_optax.testing import assert_bit_equal
from tests.golden import cases
from tests.golden.foam import foam, foam_moments
from tests.golden.replay import run as replay

B1, B2, EPS = 0.8, 0.9, 1e-3


def normal(seed, *shape):
    draw = np.random.default_rng(seed).standard_normal(shape)
    return np.asarray(draw, np.float32)


def run(tx, gradients) -> tuple[list[Any], Any]:
    state, update, out = tx.init(gradients[0]), jax.jit(tx.update), []
    for gradient in gradients:
        updates, state = update(gradient, state)
        out.append(updates)
    return out, state


def fold(x, size):
    """Means over blocks of rows, block by block."""
    starts = range(0, x.shape[-2], size)
    return np.stack([x[..., i : i + size, :].mean(-2) for i in starts], -2)


def unfold(x, size, rows):
    return np.repeat(x, size, -2)[..., :rows, :]


def formula(gradients, size, residual):
    mu: Any = 0.0
    nu: Any = 0.0
    for t, g in enumerate(gradients, 1):
        g, rows = np.float64(g), g.shape[-2]
        mean = fold(g, size)
        mu = B1 * mu + (1 - B1) * mean
        nu = B2 * nu + (1 - B2) * fold(g**2, size)
        rest = residual * (g - unfold(mean, size, rows))
        first = unfold(mu / (1 - B1**t), size, rows)
        second = unfold(nu / (1 - B2**t), size, rows)
        yield (first + rest) / (np.sqrt(second + rest**2) + EPS), mu, nu


@pytest.mark.parametrize(
    ("shape", "level", "axis"),
    [((8, 3), 1, -2), ((7, 3), 2, -2), ((2, 5, 6), 2, -1), ((3, 4), 3, -2)],
)
def test_as_written(shape, level, axis):
    turn = (lambda x: x) if axis == -2 else (lambda x: np.swapaxes(x, -1, -2))
    gradients = [normal(t, *shape) * 3.0**t for t in range(4)]
    tx = lro.scale_by_folded_adam(B1, B2, EPS, level=level, residual=0.7, axis=axis)
    got, state = run(tx, gradients)
    want = list(formula([turn(g) for g in gradients], 2**level, 0.7))
    for update, (expected, _, _) in zip(got, want, strict=True):
        np.testing.assert_allclose(turn(update), expected, atol=2e-6)
    np.testing.assert_allclose(turn(state.mu), want[-1][1], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(turn(state.nu), want[-1][2], rtol=1e-5)


def test_level_0_is_adam():
    gradients = [normal(t, 4, 6) for t in range(3)]
    # Optax' own ``1 - b^t`` has lost two digits near 1.
    got, state = run(lro.scale_by_folded_adam(0.875, 0.96875, level=0), gradients)
    want, adam = run(optax.scale_by_adam(0.875, 0.96875), gradients)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-6)
    np.testing.assert_allclose(state.nu, adam.nu, rtol=1e-6)


def test_the_recorded_moments():
    case = cases.load(cases.DATA / "foam_l2_s0p25_wd0p1.npz")
    _, state = replay(case, foam(case))
    found = foam_moments(case, state)
    assert len(found) == 6
    for name, got in found.items():
        np.testing.assert_allclose(got, case.arrays[name], rtol=1e-4, atol=1e-7)


def test_a_spike_is_bounded():
    """An entry of the rest is divided by itself, whatever its neighbours were."""
    gradients = [1e-3 * normal(t, 8, 4) for t in range(5)]
    gradients[4][3, 1] = 1e6
    got, _ = run(lro.scale_by_folded_adam(), gradients)
    assert np.abs(got[4]).max() < 1.0 + 0.1 / np.sqrt(0.05)


def test_boxes_and_bytes():
    kernel = nn.LogicallyPartitioned(jnp.ones((3, 8, 4)), ("layers", "embed", "mlp"))
    params: Any = {"w": kernel}
    tx = lro.scale_by_folded_adam(level=1)
    state: Any = tx.init(params)
    assert state.mu["w"].names == ("layers", None, "mlp")  # of another length
    assert state.mu["w"].value.shape == (3, 4, 4)
    got, after = tx.update(params, state)
    want, plain = tx.update({"w": kernel.value}, tx.init({"w": kernel.value}))
    assert_bit_equal(nn.unbox(got), want)
    assert_bit_equal(nn.unbox(after), plain)


def test_quantized_and_in_bfloat16():
    params = {"w": jnp.zeros((64, 32), jnp.bfloat16)}
    small = lro.state_bytes(lro.foam(1e-2), params).by_role
    assert small["mu"] == small["nu"] == 2 * 16 * 32
    tx = lro.quantize_state(lro.scale_by_folded_adam(), min_size=0)
    state: Any = tx.init({"w": jnp.zeros((64, 32))})
    assert state.mu["w"].codes.shape == (16, 32)


def test_bad_input():
    with pytest.raises(TypeError, match="`level` must be an int"):
        lro.foam(1e-2, level=1.5)
    with pytest.raises(ValueError, match="`axis` must be"):
        lro.foam(1e-2, axis=0).init({"w": jnp.ones((8, 4))})
    with pytest.raises(ValueError, match="works on matrices; leaf 'b'"):
        lro.scale_by_folded_adam().init({"b": jnp.ones(4)})
