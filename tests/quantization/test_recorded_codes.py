"""Codes and values recorded from the released quantizers, reproduced bit for bit."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank_optax import quantization
from lowrank_optax.quantization import dynamic_map
from tests.quantization.recorded import GROUPS, MAPS, MOMENTS, WEIGHTS

CODES = sorted(key for key in MAPS if key.startswith("codes_exact_"))
AFFINE = sorted(key for key in GROUPS if re.fullmatch(r"q_\w+_n\d_g\d+", key))
ONE_SIDED = ("allpos", "allneg", "const", "tinyrange")


@pytest.mark.parametrize("signed", [True, False])
def test_the_map(signed):
    name = "map_signed" if signed else "map_unsigned"
    np.testing.assert_array_equal(dynamic_map.code_values(signed), MAPS[name])


@pytest.mark.parametrize("key", CODES)
def test_blockwise_codes(key):
    case, sign, block = re.fullmatch(r"codes_exact_(\w+)_(\w+)_b(\d+)", key).groups()
    suffix = "_abs" if sign == "unsigned" else ""
    x = MAPS.get(f"x_{case}{suffix}", MAPS[f"x_{case}"])
    codec = quantization.blockwise_int8(
        int(block), sign == "signed", blocks="flat", keep_nonzero=False
    )
    encoded = jax.jit(codec.encode)(x)
    np.testing.assert_array_equal(encoded.codes, MAPS[key])
    tail = f"_{case}_{sign}_b{block}"
    np.testing.assert_array_equal(encoded.scales, MAPS["absmax" + tail])
    if "dequant_exact" + tail in MAPS:
        decoded = jax.jit(lambda e: codec.decode(e, x.shape))(encoded)
        np.testing.assert_array_equal(decoded, MAPS["dequant_exact" + tail])


def test_the_excerpt_holds_what_is_hard():
    """A last block that is short, a block of zeros, an entry within an ulp of a tie."""
    assert any("with_zero_block" in key for key in CODES)
    assert MAPS["x_tiny"].size % 256
    x, codes = MAPS["x_square"], MAPS["codes_exact_square_unsigned_b2048"]
    q = x[1980] * (np.float32(1) / MAPS["absmax_square_unsigned_b2048"][0])
    assert codes[1980] == np.searchsorted(dynamic_map.borders(False), q)
    assert q == dynamic_map.borders(False)[codes[1980]]


def unpacked(codec, encoded, shape):
    """Codes of a flat encoding of whole groups, in the order of the elements."""
    codes = np.asarray(encoded.codes)
    if codec.bits == 4:
        packed = codes.reshape(-1, codec.group // 2)
        codes = np.concatenate([packed & 15, packed >> 4], -1)
    return codes.reshape(shape)


@pytest.mark.parametrize(
    "key", [key for key in AFFINE if not any(case in key for case in ONE_SIDED)]
)
def test_affine_codes(key):
    case, bits, group = re.fullmatch(r"q_(\w+)_n(\d)_g(\d+)", key).groups()
    w, tail = GROUPS[f"w_{case}"], key[1:]
    codec = quantization.affine(int(bits), int(group), blocks="flat")
    encoded = jax.jit(codec.encode)(w)
    codes = unpacked(codec, encoded, GROUPS[key].shape)
    np.testing.assert_array_equal(codes, GROUPS[key])
    np.testing.assert_array_equal(encoded.scales, GROUPS["scale" + tail].ravel())
    np.testing.assert_array_equal(encoded.zeros, GROUPS["zero" + tail].ravel())
    decoded = jax.jit(lambda e: codec.decode(e, w.shape))(encoded)
    np.testing.assert_array_equal(decoded, GROUPS["dq" + tail])


@pytest.mark.parametrize(
    "case",
    [k[4:] for k in GROUPS if k.startswith("qsr_") and k[4:] not in ONE_SIDED],
)
def test_stochastic_codes_with_the_recorded_draws(case):
    w = GROUPS[f"w_{case}"]
    codec = quantization.affine(bits=8, blocks="flat")
    draws = GROUPS[f"uniform_{case}"].reshape(w.shape)
    encoded = jax.jit(codec.encode)(w, draws)
    np.testing.assert_array_equal(encoded.codes, GROUPS[f"qsr_{case}"])
    np.testing.assert_array_equal(encoded.scales, GROUPS[f"scalesr_{case}"].ravel())
    np.testing.assert_array_equal(encoded.zeros, GROUPS[f"zerosr_{case}"].ravel())
    decoded = codec.decode(encoded, w.shape)
    np.testing.assert_array_equal(decoded, GROUPS[f"dqsr_{case}"])


@pytest.mark.parametrize("case", ONE_SIDED)
@pytest.mark.parametrize("bits", [4, 8])
def test_groups_on_one_side_of_zero_survive(case, bits):
    """The released zero-point loses them; a range with zero keeps half a step.

    1e-6 of the entry is float32's rounding of (q - z) s.
    """
    w = GROUPS[f"w_{case}"]
    codec = quantization.affine(bits, blocks="flat")
    encoded = codec.encode(w)
    error = np.abs(np.asarray(codec.decode(encoded, w.shape)) - w).reshape(-1, 256)
    step = np.asarray(encoded.scales)[:, None]
    assert (error <= 0.5 * step + 1e-6 * np.abs(w).reshape(-1, 256)).all()
    assert (step <= 1.0001 * np.abs(w).max() / (2**bits - 1)).all()
    if case == "allpos" and bits == 4:
        released = GROUPS["dq_allpos_n4_g256"]
        assert np.abs(released - w).max() > 0.4  # of entries in [0.5, 1]


@pytest.mark.parametrize(("width", "dtype"), [("24", jnp.int8), ("32", jnp.int16)])
def test_split_weights(width, dtype):
    """Every code; put together, the released arithmetic rounds once more than ours."""
    x, codes = WEIGHTS["x_bf16"], WEIGHTS[f"ecc{width}_bf16"]
    low, code = jax.jit(quantization.split, static_argnums=1)(x, dtype)
    bits = jax.lax.bitcast_convert_type(low, jnp.uint16)
    np.testing.assert_array_equal(bits, WEIGHTS["narrow_bits_bf16"])
    np.testing.assert_array_equal(code, codes)
    assert np.any((np.abs(x) < 2.0**-126) & (x != 0))  # subnormal ones are among them
    found = np.asarray(jax.jit(quantization.join)(low, codes))
    released = WEIGHTS[f"reconstructed{width}_bf16"]
    if width == "24":
        np.testing.assert_array_equal(found, released)
    apart = found.view(np.int32).astype(np.int64) - released.view(np.int32)
    assert np.all((np.abs(apart) <= 1) | (found == released))


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.int16])
def test_split_weights_do_not_drift(dtype):
    """Taken apart again, a number that was put together is what it was."""
    every = jnp.arange(1 << 16).astype(jnp.uint16)
    low = jax.lax.bitcast_convert_type(every, jnp.bfloat16)
    most = jnp.iinfo(dtype).max
    codes = np.random.default_rng(0).integers(-most, most + 1, (4, 1 << 16))
    codes[3] = np.sign(codes[3]) * most

    @jax.jit
    def again(low, codes):
        full = quantization.join(low, codes)
        return full, quantization.join(*quantization.split(full, dtype))

    first = again(low, codes.astype(dtype))[0]
    low, codes = quantization.split(first, dtype)  # as a step leaves them
    full, later = again(low, codes)
    sure = np.isfinite(full)
    np.testing.assert_array_equal(full[sure], later[sure])
    # A NaN is one, and so is an infinity, whatever stands beside it.
    np.testing.assert_array_equal(np.isnan(full), np.isnan(low.astype(jnp.float32)))
    np.testing.assert_array_equal(np.isinf(full), np.isinf(low.astype(jnp.float32)))


@pytest.mark.parametrize(
    "name", [key.removeprefix("codes_") for key in MOMENTS if key.startswith("codes_")]
)
def test_companded_moments(name):
    """Rows that groups cross, a short group, ties, zeros and entries below 1e-12."""
    x, signed = MOMENTS[name], "variance" not in name
    codec = quantization.companded(
        32, signed, "flat", keep_nonzero=False, half_scale=True
    )
    encoded = jax.jit(codec.encode)(x)
    np.testing.assert_array_equal(encoded.codes, MOMENTS[f"codes_{name}"])
    scales = np.asarray(encoded.scales).reshape(-1)
    np.testing.assert_array_equal(scales, MOMENTS[f"scales_{name}"])
    back = jax.jit(lambda e: codec.decode(e, x.shape))(encoded)
    np.testing.assert_allclose(back, MOMENTS[f"dequant_{name}"], rtol=3e-7, atol=0)
