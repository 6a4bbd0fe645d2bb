"""The code found by arithmetic is the one that a search among all borders finds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank_optax import quantization
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


computed = jax.jit(dynamic_map.computed_nearest, static_argnames="signed")
computed_values = jax.jit(dynamic_map.computed_values, static_argnames="signed")


@signs
def test_computed_values_are_the_tables(signed):
    codes = np.arange(256, dtype=np.uint8)
    values = np.asarray(computed_values(codes, signed=signed))
    table = dynamic_map.code_values(signed)
    # Three products and a sum against the table's own four roundings.
    assert np.all(np.abs(values - table) <= 4 * np.spacing(np.abs(table)))
    for exact in (dynamic_map.zero_code(signed), 255):
        assert values[exact] == table[exact]
    np.testing.assert_array_equal(computed(values, signed=signed), codes)
    np.testing.assert_array_equal(computed(table, signed=signed), codes)


@signs
def test_computed_codes_differ_next_to_midpoints_only(signed):
    decades = np.float32(10.0) ** np.arange(-7, 1)
    borders, values = dynamic_map.borders(signed), dynamic_map.code_values(signed)
    positive = np.concatenate([borders, values, decades, np.float32(0.1) * decades])
    rng = np.random.default_rng(0)
    spread = 2.0 ** rng.uniform(-126, 0, 200_000) * rng.choice([-1, 1], 200_000)
    near = around(np.concatenate([positive, -positive]), 200)
    q = np.concatenate([near, spread, rng.uniform(-1, 1, 200_000), [0.0, -0.0]])
    q = q.astype(np.float32)
    codes, exact = computed(q, signed=signed), searched(q, signed)
    other = np.flatnonzero(codes != exact)
    assert np.all(np.abs(np.int32(codes)[other] - exact[other]) == 1)
    crossed = borders[np.minimum(np.int32(codes), exact)[other]]
    assert np.all(np.abs(q[other] - crossed) <= 4 * np.spacing(np.abs(crossed)))


def test_nothing_is_looked_up_in_a_computed_form():
    def primitives(codec):
        def both(x):
            return codec.decode(codec.encode(x), x.shape)

        return str(jax.make_jaxpr(both)(jnp.ones((4, 256))))

    for signed in (True, False):
        exact = quantization.blockwise_int8(signed=signed)
        assert "gather" in primitives(exact)
        quick = quantization.blockwise_int8(signed=signed, exact=False)
        assert "gather" not in primitives(quick)
