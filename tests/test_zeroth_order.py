"""Gradient estimates from losses alone: expectation, variance, keys, meshes, memory."""


import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_optax as lro
from lowrank_optax.quantization.rounding import round_to_float16
from lowrank_optax.zeroth_order import noise

KEY = jax.random.key(0)
METHODS = {
    "mezo": lro.mezo(),
    "subzero": lro.subzero(2, update_proj_gap=3, select="kernel"),
    "tezo": lro.tezo(2, select="kernel"),
    "lozo": lro.lozo(2, update_proj_gap=3, select="kernel"),
}


def every_method(function):
    return pytest.mark.parametrize("name", METHODS)(function)


# --- numbers -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "counter", "expected"),
    [
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((0xFFFFFFFF,) * 2, (0xFFFFFFFF,) * 2, (0x1CB996FC, 0xBB002BE7)),
        (
            (0x13198A2E, 0x03707344),
            (0x243F6A88, 0x85A308D3),
            (0xC4923A9C, 0x483DF7A0),
        ),
    ],
)
def test_threefry_has_the_known_answers(key, counter, expected):
    words = jnp.asarray([key, counter], jnp.uint32)
    found = noise.threefry(words[0], *words[1])
    assert tuple(map(int, found)) == expected


def test_numbers_are_normal_and_slices_are_those_of_the_whole():
    seed = jnp.asarray([3, 4], jnp.uint32)
    whole = noise.normal(seed, (40, 50, 60))
    part = noise.normal(seed, (50, 60), jnp.uint32(7))
    np.testing.assert_array_equal(whole[7], part)
    z, count = np.asarray(whole, np.float64).ravel(), whole.size
    # Five standard deviations of the sample moments of count normal numbers.
    for power, mean, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]:
        assert abs((z**power).mean() - mean) < 5 * (variance / count) ** 0.5
    # Neighbours along every axis are not correlated.
    for axis in range(3):
        ahead = np.roll(whole, 1, axis).ravel()
        assert abs((z * ahead).mean()) < 5 / count**0.5


def test_a_slice_that_counters_cannot_number_is_refused():
    with pytest.raises(ValueError, match="more than 2\\^32 numbers"):
        jax.eval_shape(lambda s: noise.normal(s, (2, 1 << 17, 1 << 16)), noise_seed())


def noise_seed():
    return jnp.zeros(2, jnp.uint32)


@pytest.mark.parametrize("number", [0.1, 1.0, -3e-6, 4e-8, 60000.3, 1e6, -0.0])
def test_float16_is_rounded_without_bias(number):
    bits = jnp.arange(1 << 16, dtype=jnp.uint32)  # every draw once
    found = np.asarray(round_to_float16(jnp.full(bits.shape, number), bits), np.float64)
    exact = np.float64(np.clip(np.float32(number), -65504, 65504))
    near = sorted(set(found))
    assert len(near) <= 2
    assert near[0] <= exact <= near[-1]
    # The mean over all draws is off by less than one draw.
    assert abs(found.mean() - exact) <= (near[-1] - near[0]) / (1 << 16)


# --- expectation and variance ------------------------------------------------------

M, N, RANK = 6, 5, 2
DRAWS = 20_000


def excess(name):
    """E|g|^2 - 1 for a gradient of norm 1, section by section derived."""
    if name == "mezo":
        return M * N + 1
    if name == "lozo":
        return M * N + 1 + (2 * (M + N) + 2) / RANK
    if name == "tezo":
        return M * N + 1 + (2 * M * N + 6 * (M + N) + 10) / RANK
    # Z = c U z V^T with normal z: |Z|^2 = c^2 |z|^2 and <G, Z> = c <U^T G V, z>, so
    # E[<G, Z>^2 |Z|^2] = c^4 (r^2 + 2) E|U^T G V|^2, and E|U^T G V|^2 = r^2 / (m n).
    return (M * N) * (RANK**2 + 2) / RANK**2 - 1


@every_method
def test_expectation_and_variance_on_a_quadratic(name):
    """Against the true gradient, within five standard errors of the sample itself."""
    rng = np.random.default_rng(0)
    true = rng.standard_normal((M, N)).astype(np.float32)
    true /= np.linalg.norm(true)
    # The gradient of this at zero is `true`, and its curvature drops out of k exactly.
    zo = lro.zeroth_order(
        lambda p: jnp.sum(true * p["kernel"]) + jnp.sum(p["kernel"] ** 2),
        METHODS[name],
        eps=0.5,
    )
    params = {"kernel": jnp.zeros((M, N))}

    @jax.jit
    @jax.vmap
    def draw(key):
        (_, grads), _ = zo.value_and_grad(params, zo.init(params, key))
        return grads["kernel"]

    found = np.asarray(draw(jax.random.split(KEY, DRAWS)), np.float64)
    error = found.std(0) / DRAWS**0.5
    assert np.max(np.abs(found.mean(0) - true) / error) < 5
    lengths = (found**2).sum((1, 2)) - 1
    assert abs(lengths.mean() - excess(name)) < 5 * lengths.std() / DRAWS**0.5


def test_samples_divide_the_variance():
    true = np.ones((M, N), np.float32) / (M * N) ** 0.5
    params = {"kernel": jnp.zeros((M, N))}
    zo = lro.zeroth_order(lambda p: jnp.sum(true * p["kernel"]), samples=4)

    @jax.jit
    @jax.vmap
    def draw(key):
        (_, grads), _ = zo.value_and_grad(params, zo.init(params, key))
        return jnp.sum(grads["kernel"] ** 2)

    lengths = np.asarray(draw(jax.random.split(KEY, 4000)), np.float64) - 1
    error = lengths.std() / 4000**0.5
    assert abs(lengths.mean() - excess("mezo") / 4) < 5 * error
