"""Rounding at random: the mean is the number, and only neighbors are hit."""

import jax
import ml_dtypes
import numpy as np
import pytest

from lowrank_optax import quantization
from tests.quantization.coding import data, decode, encode, same

N = 1_000_000
KEY = jax.random.key(7)
SHAPE = (4, 300)


def assert_unbiased(rounded, low, high, x):
    """The mean is off by less than 4 sigma / sqrt(n); sigma is that of the choice."""
    assert np.isin(rounded, [low, high]).all()
    share = (x - low) / (high - low)
    sigma = (high - low) * np.sqrt(share * (1 - share))
    assert abs(np.mean(rounded, dtype=np.float64) - x) < 4 * sigma / np.sqrt(N)


@pytest.mark.parametrize("x", [0.3, -0.3, 5.03, -1234.75])
def test_integers_without_bias(x):
    full = np.full(N, x, np.float32)
    rounded = np.asarray(jax.jit(quantization.stochastic_round)(full, KEY))
    assert_unbiased(rounded, np.floor(x), np.ceil(x), float(np.float32(x)))


def test_what_is_an_integer_stays():
    x = np.float32([0.0, -0.0, 7, -3, 2.0**24, 1e38, -1e38, np.inf, -np.inf, np.nan])
    rounded = quantization.stochastic_round(x, KEY)
    np.testing.assert_array_equal(rounded, x)


def test_given_draws_take_the_key_s_place():
    x = np.float32([0.25, 0.25, -0.25, 2.0])
    rounded = quantization.stochastic_round(x, np.float32([0.2, 0.25, 0.7, 0.0]))
    assert rounded.tolist() == [1, 0, 0, 2]
    with pytest.raises(ValueError, match=r"array's shape \(4,\), got \(3,\)"):
        quantization.stochastic_round(x, np.zeros(3, np.float32))


CODECS = {
    "affine 4": quantization.affine(4),
    "affine 8": quantization.affine(8),
    "int4": quantization.linear_int4(256),
    "int4 unsigned": quantization.linear_int4(256, signed=False, keep_nonzero=False),
}
codecs = pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)


@codecs
def test_codes_without_bias(codec):
    """Entries inside the range, which the clip at its ends does not reach."""
    x = np.full((N // 250, 256), 0.3, np.float32)
    x[:, :6] = [1, 0 if "unsigned" in str(codec) else -0.9, 0, 0, 0, 0]
    if not getattr(codec, "signed", True):
        x[:, 1] = 0
    back = jax.jit(lambda x: codec.decode(codec.encode(x, KEY), x.shape))(x)
    inner = np.asarray(back)[:, 6:]
    low, high = np.unique(inner)
    assert low < np.float32(0.3) < high
    assert_unbiased(inner, low, high, float(np.float32(0.3)))


@codecs
def test_codes_are_those_of_neighbors(codec):
    """Less than a step off, and of the same scales as the nearest ones."""
    x = data(codec, *SHAPE)
    nearest, given = encode(codec, x), encode(codec, x, KEY)
    same(given.scales, nearest.scales)
    step = np.repeat(given.scales, 256, axis=-1)[:, : SHAPE[-1]]
    if isinstance(codec, quantization.linear_int4):
        step = step / (7 if codec.signed else 15)
    back = np.asarray(decode(codec, given, SHAPE), np.float64)
    assert (np.abs(back - x) <= 1.00001 * step).all()
    assert (np.abs(back - x) > 0.51 * step).any()


def test_a_key_decides():
    codec = quantization.affine(4)
    x = data(codec, *SHAPE)
    first, again = encode(codec, x, KEY), encode(codec, x, KEY)
    same(first, again)
    other = encode(codec, x, jax.random.key(8))
    assert (np.asarray(first.codes) != other.codes).any()
    same(encode(codec, x, jax.random.PRNGKey(8)), other)


# --- bfloat16 -----------------------------------------------------------------------

rounded_to_bfloat16 = jax.jit(quantization.stochastic_round_to_bfloat16)


@pytest.mark.parametrize("x", [1 + 2.0**-10, -3.1415927, 1e-30, 1.1e38, 0.1])
def test_bfloat16_without_bias(x):
    full = np.full(N, x, np.float32)
    rounded = np.asarray(rounded_to_bfloat16(full, KEY)).astype(np.float64)
    low, high = np.unique(rounded)
    exact = float(np.float32(x))
    assert low < exact < high
    ulp = 2.0 ** (np.floor(np.log2(abs(exact))) - 7)
    assert high - low == ulp
    assert_unbiased(rounded, low, high, exact)


def test_bfloat16_keeps_what_it_holds():
    every = np.arange(2**16, dtype=np.uint16).view(ml_dtypes.bfloat16)
    rounded = np.asarray(rounded_to_bfloat16(every.astype(np.float32), KEY))
    finite = ~np.isnan(every.astype(np.float32))
    np.testing.assert_array_equal(
        rounded[finite].view(np.uint16), every[finite].view(np.uint16)
    )
    assert np.isnan(rounded[~finite].astype(np.float32)).all()


def test_bfloat16_stays_finite():
    """And a NaN that only the lower half tells from an infinity stays one."""
    most = np.full(4096, np.finfo(np.float32).max, np.float32)
    rounded = np.asarray(rounded_to_bfloat16(np.stack([most, -most]), KEY))
    np.testing.assert_array_equal(np.unique(rounded).size, 2)
    assert np.isfinite(rounded.astype(np.float32)).all()
    hidden = np.full(4096, 0x7F800001, np.uint32).view(np.float32)
    assert np.isnan(
        np.asarray(rounded_to_bfloat16(hidden, KEY)).astype(np.float32)
    ).all()


def test_bfloat16_rounds_to_a_neighbor():
    rng = np.random.default_rng(0)
    x = (rng.standard_normal(100_000) * 10.0 ** rng.uniform(-30, 30, 100_000)).astype(
        np.float32
    )
    rounded = np.asarray(rounded_to_bfloat16(x, KEY)).astype(np.float64)
    ulp = 2.0 ** (np.floor(np.log2(np.abs(x.astype(np.float64)))) - 7)
    assert (np.abs(rounded - x) < ulp).all()
