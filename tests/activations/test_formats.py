"""Compressed values: bounds, bytes, odd shapes, odd numbers."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lowrank_optax import activations, quantization
from tests.activations.model import QUICK, assert_same, distance

Quantize = activations.Quantize
GROUP = 16

# No group divides all of these; heads below the group, odd sizes, vectors.
SHAPES = [(5, 48), (3, 37), (2, 3, 2, 8), (7, 17), (40,), (2, 1)]
ACTIONS = [
    Quantize(bits, outliers, GROUP) for bits in (8, 4) for outliers in (0, 3, 1000)
]
DTYPES = ["float32", "bfloat16", "float16"]


@functools.cache
def pair(action):
    """Compression and its inverse, each compiled once per shape and dtype."""
    jit = functools.partial(jax.jit, compiler_options=QUICK)
    return jit(action.compress), jit(action.decompress)


def round_trip(action, x):
    compress, decompress = pair(action)
    kept = compress(x)
    return kept, decompress(kept, x)


def steps(kept, shape):
    """Each element's step, in float64."""
    scales = np.asarray(kept.scales, np.float64)
    return np.repeat(scales, GROUP, axis=-1)[..., : shape[-1]]


def spacing(x):
    """Half the distance of numbers of x's dtype at the largest magnitude."""
    info = ml_dtypes.finfo(x.dtype)
    return float(info.eps) * np.abs(x.astype(np.float64)) + float(info.tiny)


numbers = st.one_of(
    st.floats(-5, 5, width=32),
    st.floats(-(2.0**120), 2.0**120, width=32),
    st.floats(-(2.0**-60), 2.0**-60, width=32),
    st.sampled_from([0.0, -0.0, 3.4028235e38, -3.4028235e38, 1e-38, 7e-45]),
)
arrays = st.sampled_from(SHAPES).flatmap(
    lambda shape: hnp.arrays(np.float32, shape, elements=numbers)
)


@pytest.mark.parametrize("bits", [4, 8])
@given(x=arrays)
@example(x=np.zeros((3, 37), np.float32))
@example(x=np.full((5, 48), -3.4028235e38, np.float32))
@example(x=np.full((7, 17), 1e-37, np.float32))
def test_every_entry_is_within_half_a_step(bits, x):
    action = Quantize(bits, 0, GROUP)
    kept, back = round_trip(action, jnp.asarray(x))
    if not action.encodes(x.shape, x.dtype):
        assert_same(kept, jnp.asarray(x))
        return
    step = steps(kept, x.shape)
    error = np.abs(np.asarray(back, np.float64) - x)
    # Steps below the smallest normal number are 0, and so is what is decoded. The
    # product of code and step rounds once more.
    flushed = 2.0**-126 * 2 ** (bits - 1)
    bound = np.where(step == 0, flushed, step * (0.5 + 1e-5))
    assert (error <= bound).all(), (error - bound).max()
    assert np.isfinite(back).all()
    assert (np.asarray(back)[x == 0] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 1e4, 1e-3])
def test_other_dtypes_are_within_half_a_step_and_their_own_spacing(dtype, scale):
    rng = np.random.default_rng(0)
    x = (rng.uniform(-6, 6, (5, 48)) * scale).astype(dtype)
    kept, back = round_trip(Quantize(4, 0, GROUP), jnp.asarray(x))
    assert back.dtype == x.dtype and np.isfinite(np.asarray(back, np.float32)).all()
    error = np.abs(np.asarray(back, np.float64) - x.astype(np.float64))
    assert (error <= steps(kept, x.shape) * 0.50001 + spacing(x)).all()
    assert error.max() > 0.4 * steps(kept, x.shape).max()  # the bound is not idle


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_number_does_not_become_infinite(bits, dtype):
    """Seven steps, each rounded up to a bfloat16, are a little more than that."""
    most = jnp.finfo(dtype).max
    x = jnp.full((2, 48), most, dtype).at[1].multiply(-1)
    _, back = round_trip(Quantize(bits, 0, GROUP), x)
    assert jnp.isfinite(back).all()
    assert distance(back, x) <= 0.5 / (2 ** (bits - 1) - 1) + 2.0**-7


@pytest.mark.parametrize("bits", [4, 8])
def test_a_step_is_that_of_the_largest_entry(bits):
    """Not above it by more than a bfloat16's spacing: no bit is wasted."""
    x = np.random.default_rng(1).standard_normal((64, GROUP)).astype(np.float32)
    kept, _ = round_trip(Quantize(bits, 0, GROUP), jnp.asarray(x))
    exact = np.abs(x).max(-1, keepdims=True) / (2 ** (bits - 1) - 1)
    ratio = np.asarray(kept.scales, np.float64) / exact
    assert (ratio >= 1 - 2e-6).all() and (ratio <= 1 + 2.0**-7).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("action", ACTIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bytes_are_those_of_the_arrays(action, shape, dtype):
    x = jax.ShapeDtypeStruct(shape, dtype)
    kept = jax.eval_shape(action.compress, x)
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept))
    assert action.nbytes(shape, dtype) == held
    assert held <= activations.Save().nbytes(shape, dtype)


def test_bytes_of_a_real_array_by_hand():
    """300 channels: 2 groups of 128 and one of 44; 2 outliers in bfloat16."""
    x = jnp.ones((4, 8, 300), jnp.bfloat16)
    codes, steps, outliers = 32 * 150, 32 * 3 * 2, 2 * 4 + 2 * 32 * 2
    assert Quantize(4, 2).nbytes(x.shape, x.dtype) == codes + steps + outliers
    kept = pair(Quantize(4, 2))[0](x)
    assert sum(leaf.nbytes for leaf in kept) == codes + steps + outliers
    assert kept.outliers.shape == (2, 32)  # by channels, not [32, 2]


@pytest.mark.parametrize("dtype", DTYPES)
def test_outlier_channels_are_exact_and_do_not_widen_the_steps(dtype):
    rng = np.random.default_rng(2)
    x = rng.standard_normal((2, 3, 5, 37))
    x[..., [4, 30, 31]] *= 1000
    x = jnp.asarray(x.astype(dtype))
    kept, back = round_trip(Quantize(4, 3, GROUP), x)
    assert sorted(kept.channels.tolist()) == [4, 30, 31]
    np.testing.assert_array_equal(back[..., [4, 30, 31]], x[..., [4, 30, 31]])
    rest = np.delete(np.asarray(x, np.float64), [4, 30, 31], -1)
    error = np.abs(np.delete(np.asarray(back, np.float64), [4, 30, 31], -1) - rest)
    assert error.max() < 0.36  # half a step: at most 4.9 / 14
    plain = round_trip(Quantize(4, 0, GROUP), x)[1]
    assert np.abs(np.asarray(plain - x, np.float64)).max() > 50


def test_more_outliers_than_channels_keep_the_value():
    x = jnp.asarray(np.random.default_rng(3).standard_normal((4, 32)), jnp.float32)
    kept, back = round_trip(Quantize(4, 1000, GROUP), x)
    assert_same(kept, x)
    assert_same(back, x)
    assert Quantize(4, 1000).nbytes(x.shape, x.dtype) == x.nbytes


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, -np.nan])
@pytest.mark.parametrize("action", ACTIONS[:2] + ACTIONS[3:5], ids=str)
def test_what_is_not_finite_stays_so_and_stays_in_its_group(action, bad):
    x = np.random.default_rng(4).standard_normal((6, 48)).astype(np.float32)
    x[2, 20] = bad
    if np.isnan(bad):  # all bits set, as some kernels leave them
        x.view(np.uint32)[2, 20] = 0x7FFFFFFF if np.signbit(bad) else 0x7FC00000
    _, back = round_trip(action, jnp.asarray(x))
    wrong = ~np.isfinite(np.asarray(back))
    assert wrong[2, 20]
    wrong[2, 16:32] = False
    assert not wrong.any()


@pytest.mark.parametrize(
    "x",
    [
        jnp.arange(600).reshape(2, 300),
        jnp.ones((2, 300), bool),
        jax.random.split(jax.random.key(0), (2, 300)),
        jnp.ones((), jnp.float32),
        jnp.ones((50, 1), jnp.bfloat16),
        jnp.ones((4, 300), jnp.float8_e4m3fn),
        jnp.ones((0, 300), jnp.float32),
        jnp.ones((3, 0), jnp.float32),
    ],
    ids=[
        "int",
        "bool",
        "key",
        "scalar",
        "one channel",
        "float8",
        "empty",
        "no channel",
    ],
)
def test_what_cannot_become_smaller_is_kept_as_it_is(x):
    action = Quantize(4, 2, stochastic=True)
    assert action.compress(x) is x
    assert action.round_trip(x) is x
    assert action.nbytes(x.shape, x.dtype) == x.size * x.dtype.itemsize


def test_a_key_rounds_at_random_without_bias():
    """Over n = 2000 draws the mean is off by at most half a step times 5 / sqrt(n)."""
    x = jnp.asarray(np.random.default_rng(5).standard_normal(GROUP), jnp.float32)
    codec = quantization.symmetric(4, GROUP)

    def draw(key):
        return codec.decode(codec.encode(x, key), x.shape)

    draws = jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), 2000))
    step = float(codec.encode(x).scales[0])
    assert np.abs(draws.mean(0) - x).max() < 0.5 * step * 5 / 2000**0.5
    assert np.abs(draws - x).max() <= step * (1 + 1e-5)
    assert np.abs(draws - x).max() > 0.5 * step


def test_codes_are_encoded_again_as_they_were():
    """The step of a decoded array is its own step, but for a group whose largest code
    is below the last one."""
    x = np.random.default_rng(6).standard_normal((64, GROUP)).astype(np.float32)
    codec = quantization.symmetric(4, GROUP)
    encode = jax.jit(codec.encode)
    once = encode(x)
    again = encode(codec.decode(once, x.shape))
    assert_same(again, once)
    zeros = codec.zeros(x.shape)
    assert_same(encode(jnp.zeros(x.shape)), zeros)
    assert sum(leaf.nbytes for leaf in zeros[:2]) == codec.nbytes(x.shape)
