"""What every codec does to numbers: bounds, fixed points, scales, odd numbers."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lowrank_optax.quantization import (
    Codec,
    dequantize,
    dynamic_map,
    quantize,
    scaling,
    symmetric,
)
from tests.quantization.coding import (
    BLOCK,
    CODECS,
    KINDS,
    SHAPE,
    SIGNED,
    UNSIGNED,
    affine,
    companded,
    data,
    decode,
    encode,
    float8,
    int4,
    int8,
    is_signed,
    normal,
    round_trip,
    same,
)

codecs = pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
signed_codecs = pytest.mark.parametrize("codec", SIGNED.values(), ids=SIGNED)
unsigned_codecs = pytest.mark.parametrize("codec", UNSIGNED.values(), ids=UNSIGNED)


def spread(x, scales):
    """Each block's scale beside its elements."""
    scales = np.asarray(scales, np.float64)
    return np.repeat(scales, BLOCK, axis=-1)[..., : x.shape[-1]]


def allowed(codec, x, scales):
    """How far a codec may be off, from its definition, in float64."""
    a = spread(x, scales)
    size, a = np.abs(x).astype(np.float64), np.abs(a)
    if isinstance(codec, int8):
        # Exactly the nearest value, and that is no farther than this.
        values = dynamic_map.code_values(codec.signed).astype(np.float64)
        q = x / np.where(a == 0, 1, spread(x, scales))
        nearest = np.abs(q[..., None] - values).min(-1) * a
        assert (nearest <= a * (0.00705 if codec.signed else 0.00353)).all()
        bound = nearest
    elif isinstance(codec, float8):
        e4m3 = "e4m3" in codec.dtype
        relative, least = (2**-4, 2.2e-6) if e4m3 else (2**-3, 1.4e-10)
        bound = np.maximum(relative * size, least * a)
    elif isinstance(codec, companded):
        q = size / np.where(a == 0, 1, a)
        # Half of a step of the curve to either side, and back.
        curve, back = (
            (lambda n: 2 * n / (1 + n), lambda y: y / (2 - y))
            if codec.signed
            else (np.sqrt, np.square)
        )
        y, half = curve(q), 0.5 / (2 ** (codec.bits - codec.signed) - 1)
        above, below = back(np.minimum(y + half, 1)), back(np.maximum(y - half, 0))
        bound = np.maximum(above - q, q - below) * a
    elif isinstance(codec, int4):
        bound = a / (14 if codec.signed else 30)
    else:
        bound = a / 2
    return bound + 1e-6 * a * levels(codec)  # roundings of float32


def levels(codec):
    """Steps between the largest number and zero, if the scale is one step."""
    return 2**codec.bits - 1 if isinstance(codec, affine) else 1


def wild(*shape):
    """Numbers over many decades."""
    return normal(*shape) * np.float32(10.0) ** normal(*shape, seed=1)


@signed_codecs
def test_every_entry_is_within_its_bound(codec):
    x = wild(*SHAPE)
    error = np.abs(round_trip(codec, x) - x)
    bound = allowed(codec, x, encode(codec, x).scales)
    assert (error <= bound).all(), (error / bound).max()
    assert (error / bound).max() > 0.5  # the bound is not idle


@unsigned_codecs
def test_every_entry_is_within_its_bound_and_none_is_zero(codec):
    """As much, or the smallest level, which tiny entries are raised to."""
    x = np.square(wild(*SHAPE))
    back, scales = round_trip(codec, x), encode(codec, x).scales
    least = 3.3e-7 if isinstance(codec, int8) else 1 / 15
    raised = 1.000001 * least * spread(x, scales)
    bound = np.maximum(allowed(codec, x, scales), raised)
    assert (np.abs(back - x) <= bound).all()
    assert (back > 0).all()


@codecs
def test_a_decoded_array_is_encoded_as_it_was(codec):
    """An affine step is a difference of rounded ends: it holds to a few ulp."""
    x = data(codec)
    if codec == SIGNED["int8"]:
        x[:, ::32] = 5.0  # the map has no -1: see the next test
    once = encode(codec, x)
    twice = encode(codec, decode(codec, once, SHAPE))
    np.testing.assert_array_equal(twice.codes, once.codes)
    if isinstance(codec, affine):
        np.testing.assert_array_equal(twice.zeros, once.zeros)
        np.testing.assert_allclose(twice.scales, once.scales, rtol=4e-7)
    else:
        np.testing.assert_array_equal(twice.scales, once.scales)
        same(decode(codec, twice, SHAPE), decode(codec, once, SHAPE))


def test_a_negative_largest_entry_shrinks_unless_the_scale_has_a_sign():
    x = data(SIGNED["int8"])
    x[:, ::32] = -5.0
    released, kept = SIGNED["int8"], SIGNED["int8 signed scale"]
    once = round_trip(released, x).astype(np.float32)
    np.testing.assert_allclose(once[:, 0], -5.0 * 0.99296874, rtol=1e-6)
    assert (round_trip(released, once)[:, 0] > once[:, 0] + 0.03).all()
    np.testing.assert_array_equal(encode(kept, x).scales, -5.0)
    once = round_trip(kept, x)
    np.testing.assert_array_equal(once[:, 0], -5.0)
    np.testing.assert_array_equal(round_trip(kept, once.astype(np.float32)), once)


@pytest.mark.parametrize("codec", KINDS.values(), ids=KINDS)
def test_jitted_is_eager(codec):
    x = data(codec)
    encoded = codec.encode(x)
    same(encoded, encode(codec, x))
    same(codec.decode(encoded, SHAPE), decode(codec, encoded, SHAPE))


# --- scales -------------------------------------------------------------------------


@codecs
def test_a_power_of_two_changes_nothing_but_the_scale(codec):
    x = data(codec)
    x /= 2 * np.abs(x).max()
    back = round_trip(codec, x)
    for exponent in (-100, -67, 50, 100, 126):
        factor = np.float32(2.0**exponent)
        scaled = round_trip(codec, x * factor) / factor
        # Values below 2^-126 are flushed to zero.
        np.testing.assert_allclose(scaled, back, rtol=0, atol=2.0 ** (-125 - exponent))


@codecs
def test_the_smallest_numbers(codec):
    """At 1e-37, steps of a 255th are no normal numbers any more: zeros at worst."""
    x = data(codec)
    x = x / np.abs(x).max() * np.float32(1e-37)
    back = round_trip(codec, x)
    assert np.isfinite(back).all()
    if isinstance(codec, affine):
        assert (np.abs(back) <= 1.1e-37).all()
    else:
        bound = allowed(codec, x, encode(codec, x).scales) + 1.2e-38
        if not is_signed(codec):
            bound += 1e-37 / 15
        assert (np.abs(back - x) <= bound).all()


@codecs
def test_the_largest_numbers(codec):
    x = np.zeros(SHAPE, np.float32)
    # A range from -2e38 to 2e38 is none that float32 holds. The end of an affine range
    # may be half a step farther out than the data.
    x[:, 0] = 2e38
    x[1, 1], x[:, 2] = -x[1, 0], x[:, 0] / 4
    x = x if is_signed(codec) else np.abs(x)
    back = round_trip(codec, x)
    assert np.isfinite(back).all()
    np.testing.assert_allclose(back, x, rtol=0, atol=0.08 * x[0, 0])


# --- numbers that are none, or zero -------------------------------------------------


@codecs
def test_blocks_of_zeros(codec):
    x = data(codec)
    x[:, 64:128] = 0
    x[0] = -0.0
    back = round_trip(codec, x)
    np.testing.assert_array_equal(encode(codec, x).scales[1:, 1], 0)
    np.testing.assert_array_equal(back[1:, 64:128], 0)
    np.testing.assert_array_equal(back[0], 0)
    assert (back[1:, :64] != 0).any()


def test_a_block_of_zeros_divides_nothing_by_zero():
    """What `jax_debug_nans` would stop at."""
    with jax.debug_nans(True), jax.debug_infs(True):
        x, scale = jnp.zeros((1, 1, 3)), jnp.zeros((1, 1, 1))
        np.testing.assert_array_equal(scaling.normalized(x, scale), x)


@codecs
def test_what_is_not_finite_does_not_reach_its_block(codec):
    """NaN becomes 0 and an infinity the last code on its side; the rest is as ever."""
    x = data(codec)
    x[0, :2] = [8, -8 if is_signed(codec) else 8]  # the largest on either side
    x[0, 5:9] = 0
    bad = x.copy()
    bad[0, 5:9] = [np.nan, np.inf, -np.inf, -np.nan]
    good, got = round_trip(codec, x), round_trip(codec, bad)
    same(encode(codec, bad).scales, encode(codec, x).scales)
    others = np.isfinite(bad)
    np.testing.assert_array_equal(got[others], good[others])
    np.testing.assert_array_equal(got[0, [5, 8]], 0)
    low = -8 if is_signed(codec) else 0
    if isinstance(codec, affine):  # its last codes are up to half a step beyond
        half = np.asarray(encode(codec, x).scales)[0, 0] / 2
        np.testing.assert_allclose(got[0, 6:8], [8, low], atol=1.0001 * half)
    else:
        np.testing.assert_array_equal(got[0, 6], 8)
        np.testing.assert_array_equal(got[0, 7], good[0, 1] if low else 0)


@codecs
@pytest.mark.parametrize("fill", [np.nan, np.inf, -np.inf])
def test_blocks_without_a_finite_entry_are_zeros(codec, fill):
    x = np.full(SHAPE, fill, np.float32)
    np.testing.assert_array_equal(encode(codec, x).scales, 0)
    np.testing.assert_array_equal(round_trip(codec, x), 0)


@pytest.mark.parametrize(
    "codec",
    [
        int8(signed=False),
        int8(signed=True, keep_nonzero=True, signed_scale=True),
        int4(signed=False),
        int4(signed=True, keep_nonzero=True),
        float8("e4m3", keep_nonzero=True),
    ],
    ids=str,
)
def test_what_is_not_zero_stays_so(codec):
    """Down to the smallest numbers there are, which the CPU counts as zero."""
    tiny = [1e-3, 1e-12, 1e-30, 1e-38, 1e-45]
    x = np.float32([[1.0], [-1.0]]) * np.float32([1, *tiny, *(-t for t in tiny)])
    x[1, 0] = -1.0 if is_signed(codec) else 1.0
    x = np.concatenate([x, np.float32([[0.0, np.nan]] * 2)], axis=1)
    expected = np.sign(np.nan_to_num(x).astype(np.float64))
    if not is_signed(codec):
        expected = np.maximum(expected, 0)
    np.testing.assert_array_equal(np.sign(round_trip(codec, x)), expected)
    off = dataclasses.replace(codec, keep_nonzero=False)
    np.testing.assert_array_equal(round_trip(off, x)[:, [2, 7]], 0)


@pytest.mark.parametrize(
    "codec", [*CODECS.values(), symmetric(4, BLOCK), symmetric(8, BLOCK)], ids=str
)
def test_every_codec_serves_second_moments(codec):
    """Numbers of many sizes, none negative: nothing but zero comes back as zero."""
    serving = codec.for_second_moments()
    assert serving.for_second_moments() == serving
    sizes = 10.0 ** np.random.default_rng(0).uniform(-30, 3, SHAPE)
    x = np.where(np.arange(SHAPE[-1]) % 5 == 0, 0.0, sizes).astype(np.float32)
    np.testing.assert_array_equal(round_trip(serving, x) > 0, x > 0)
    # What was asked for stays.
    off = dataclasses.replace(codec, keep_nonzero=False)
    assert off.for_second_moments() == off


def test_a_codec_that_cannot_is_refused():
    class plain(Codec):
        pass

    with pytest.raises(ValueError, match="plain may store small numbers as zero"):
        plain().for_second_moments()


def test_unsigned_codecs_keep_what_is_not_zero_by_default():
    assert int8(signed=False).keep_nonzero and not int8().keep_nonzero
    assert int4(signed=False).keep_nonzero and not int4().keep_nonzero
    assert not int8(signed=False, keep_nonzero=False).keep_nonzero


@codecs
def test_other_dtypes(codec):
    x = data(codec)
    half = x.astype(ml_dtypes.bfloat16)
    same(encode(codec, half), encode(codec, half.astype(np.float32)))
    expected = encode(codec, x)
    with jax.enable_x64(True):
        wide = jax.jit(codec.encode)(jnp.asarray(x, jnp.float64))
        back = jax.jit(lambda e: codec.decode(e, SHAPE))(wide)
    same(wide, expected)
    same(back, decode(codec, expected, SHAPE))


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2"])
def test_float8_codes_are_the_nearest(name):
    """In a block whose largest entry is the format's, x F / a is x to an ulp."""
    dtype = np.dtype(getattr(ml_dtypes, name))
    most = float(ml_dtypes.finfo(dtype).max)
    codec, x = float8(getattr(jnp, name), block=4096), wild(4096).clip(-most, most)
    x[0] = most
    encoded = encode(codec, x)
    assert encoded.codes.dtype == dtype
    np.testing.assert_array_equal(encoded.codes, x.astype(dtype))
    assert decode(codec, encoded, x.shape)[0] == most


# --- any numbers at all -------------------------------------------------------------

numbers = st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False)
arrays = hnp.arrays(
    np.float32, SHAPE, elements=numbers, fill=st.sampled_from([0, 1, -3])
)


@signed_codecs
@given(x=arrays)
def test_bounds_and_order_hold_for_anything(codec, x):
    """Numbers and steps below 1.2e-38 may be flushed; rounding is monotone."""
    back = round_trip(codec, x)
    flushed = 1.2e-38 * levels(codec)
    bound = allowed(codec, x, encode(codec, x).scales) + flushed
    assert (np.abs(back - x) <= bound).all()
    np.testing.assert_array_equal(back[x == 0], 0)
    for start in range(0, SHAPE[-1], BLOCK):
        rows, done = (v[:, start : start + BLOCK] for v in (x, back))
        order = np.argsort(rows, axis=-1, kind="stable")
        assert (np.diff(np.take_along_axis(done, order, -1)) >= 0).all()


# --- use ----------------------------------------------------------------------------


@codecs
def test_codecs_are_static_and_encodings_are_trees_of_arrays(codec):
    twin = dataclasses.replace(codec)
    assert codec == twin and hash(codec) == hash(twin)
    assert codec != dataclasses.replace(codec, blocks="flat")
    x = data(codec)
    jitted = jax.jit(lambda x, codec: codec.encode(x), static_argnames="codec")
    encoded = jitted(x, codec)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(encoded))
    stored = jax.tree.map(np.asarray, encoded)  # as a checkpoint has them
    same(decode(codec, stored, SHAPE), decode(codec, encoded, SHAPE))


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: int8(0), ValueError, "`block` must be at least 1, got 0"),
        (lambda: int8(True), TypeError, "`block` must be a positive int, got True"),
        (lambda: affine(4, 0), ValueError, "`group` must be at least 1, got 0"),
        (lambda: affine(5), ValueError, "`bits` must be one of 4, 8; got 5"),
        (lambda: int4(blocks="rows"), ValueError, "`blocks` must be one of 'last', 'f"),
        (lambda: float8("e3m4"), ValueError, "`dtype` must be one of 'float8_e4m3fn'"),
        (lambda: float8(jnp.bfloat16), ValueError, "`dtype` .*; got 'bfloat16'"),
    ],
)
def test_bad_arguments(build, error, message):
    with pytest.raises(error, match=message):
        build()


def test_a_wrong_shape_is_named():
    encoded = int8().zeros((4, 8))
    with pytest.raises(ValueError, match=r"`shape` must be that .*\(8, 4\) has codes"):
        int8().decode(encoded, (8, 4))


@pytest.mark.parametrize("codec", [int8(), float8()], ids=str)
def test_a_key_for_a_codec_without_chance(codec):
    with pytest.raises(ValueError, match=r"rounds to the nearest and takes no `key`"):
        codec.encode(jnp.ones(4), jax.random.key(0))


@pytest.mark.parametrize("value", [1.0, -0.25, 3e-6])
def test_a_group_of_one_number_keeps_it(value):
    """Such as a row of a basis of rank 1, which decoded to zero."""
    for shape in ((5, 1), (2, 7)):
        x = jnp.full(shape, value, jnp.float32)
        for bits in (4, 8):
            decoded = dequantize(quantize(x, affine(bits, 256)))
            np.testing.assert_allclose(decoded, x, rtol=1e-6)
