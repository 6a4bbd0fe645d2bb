"""The code found by arithmetic is the one that a search among all borders finds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank_optax.quantization import dynamic_map

signs = pytest.mark.parametrize("signed", [True, False])
jitted = jax.jit(dynamic_map.nearest, static_argnames="signed")


def searched(q, signed):
    """The other way: how many of the 255 borders a number exceeds."""
    return np.searchsorted(dynamic_map.borders(signed), np.asarray(q), side="left")


def brute(q, signed):
    """By definition, in float64: the first of the nearest values."""
    values = dynamic_map.code_values(signed).astype(np.float64)
    return np.argmin(np.abs(np.asarray(q, np.float64)[:, None] - values), axis=1)


def around(centers, ulps):
    """Every float32 within so many ulps of the centers, kept within [-1, 1]."""
    bits = np.asarray(centers, np.float32).view(np.int32)[:, None]
    near = (bits + np.arange(-ulps, ulps + 1, dtype=np.int32)).view(np.float32).ravel()
    return near[np.abs(near) <= 1]


@signs
def test_around_every_border_value_and_decade(signed):
    """1000 floats on either side of each: more than the product is ever off by."""
    decades = np.float32(10.0) ** np.arange(-7, 1)
    centers = [dynamic_map.borders(signed), dynamic_map.code_values(signed), decades]
    positive = np.concatenate([*centers, np.float32(0.1) * decades])
    q = around(np.concatenate([positive, -positive]), 1000)
    assert q.size > 1_000_000
    np.testing.assert_array_equal(jitted(q, signed=signed), searched(q, signed))


@signs
def test_over_the_whole_range(signed):
    """All exponents down to 2^-126, where the product would underflow unnoticed."""
    rng = np.random.default_rng(0)
    size = 2.0 ** rng.uniform(-126, 0, 500_000) * rng.choice([-1, 1], 500_000)
    q = np.concatenate([size, rng.uniform(-1, 1, 500_000), [0.0, -0.0]])
    q = q.astype(np.float32)
    np.testing.assert_array_equal(jitted(q, signed=signed), searched(q, signed))
    np.testing.assert_array_equal(
        jnp.searchsorted(jnp.asarray(dynamic_map.borders(signed)), q[::97]),
        jitted(q[::97], signed=signed),
    )


@signs
def test_the_search_is_the_definition(signed):
    near = around(dynamic_map.borders(signed), 3)
    np.testing.assert_array_equal(searched(near, signed), brute(near, signed))


@signs
def test_an_exact_midpoint_goes_to_the_lower_code(signed):
    values = dynamic_map.code_values(signed).astype(np.float64)
    middle = (values[:-1] + values[1:]) / 2
    exact = middle == middle.astype(np.float32)
    assert exact.sum() > 50
    codes = jitted(middle[exact].astype(np.float32), signed=signed)
    np.testing.assert_array_equal(codes, np.flatnonzero(exact))


@signs
def test_every_value_has_its_own_code(signed):
    values = dynamic_map.code_values(signed)
    np.testing.assert_array_equal(jitted(values, signed=signed), np.arange(256))
    np.testing.assert_array_equal(
        dynamic_map.values(jnp.arange(256, dtype=jnp.uint8), signed), values
    )
    assert values[dynamic_map.zero_code(signed)] == 0
