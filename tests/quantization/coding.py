"""The codecs under test, compiled once for every shape."""

import functools

import jax
import numpy as np

from lowrank_optax import quantization

int8, float8 = quantization.blockwise_int8, quantization.float8
int4, affine = quantization.linear_int4, quantization.affine
companded = quantization.companded

BLOCK, SHAPE = 64, (4, 150)  # rows of two full blocks and a short one

SIGNED = {
    "int8": int8(BLOCK),
    "int8 signed scale": int8(BLOCK, signed_scale=True),
    "int8 computed": int8(BLOCK, signed_scale=True, exact=False),
    "companded": companded(BLOCK),
    "companded 4": companded(BLOCK, bits=4),
    "e4m3": float8("e4m3", BLOCK),
    "e5m2": float8("e5m2", BLOCK),
    "int4": int4(BLOCK),
    "affine 4": affine(4, BLOCK),
    "affine 8": affine(8, BLOCK),
}
UNSIGNED = {
    "int8 unsigned": int8(BLOCK, signed=False),
    "int8 unsigned computed": int8(BLOCK, signed=False, exact=False),
    "companded unsigned": companded(BLOCK, signed=False),
    "companded unsigned 4": companded(BLOCK, signed=False, bits=4),
    "int4 unsigned": int4(BLOCK, signed=False),
}
CODECS = SIGNED | UNSIGNED
# One of each kind, for what does not depend on the numbers: compiling takes the time.
KINDS = {name: CODECS[name] for name in ("int8", "e4m3", "int4", "affine 4")}


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def is_signed(codec):
    return getattr(codec, "signed", True)


def data(codec, *shape, seed=0):
    """Normal numbers, or their squares for codecs that know no sign."""
    x = normal(*(shape or SHAPE), seed=seed)
    return x if is_signed(codec) else np.square(x)


@functools.cache
def encoder(codec):
    return jax.jit(codec.encode)


@functools.cache
def decoder(codec, shape):
    return jax.jit(lambda encoded: codec.decode(encoded, shape))


def encode(codec, x, *key):
    return encoder(codec)(x, *key)


def decode(codec, encoded, shape):
    return decoder(codec, tuple(shape))(encoded)


def round_trip(codec, x):
    """Encoded and decoded, in float64 for comparing."""
    return np.asarray(decode(codec, encode(codec, x), x.shape), np.float64)


def same(a, b):
    """Bit for bit, the dtypes included."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(left, right)
