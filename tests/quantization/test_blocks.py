"""Where blocks lie: shapes, bytes, batch axes, short blocks, shards."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tests.quantization.coding import (
    BLOCK,
    CODECS,
    KINDS,
    affine,
    data,
    decode,
    encode,
    float8,
    int4,
    int8,
    round_trip,
    same,
)

codecs = pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
kinds = pytest.mark.parametrize("codec", KINDS.values(), ids=KINDS)
rules = pytest.mark.parametrize("blocks", ["last", "flat"])
SHAPES = [(), (1,), (5,), (300,), (3, 64), (3, 70), (2, 3, 65), (2, 1, 4, 129), (4, 1)]


@codecs
@rules
def test_the_formula_counts_the_arrays_there_are(codec, blocks):
    codec = dataclasses.replace(codec, blocks=blocks)
    for shape in SHAPES:
        encoded = jax.eval_shape(codec.encode, jax.ShapeDtypeStruct(shape, jnp.float32))
        sizes = [leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(encoded)]
        assert sum(sizes) == codec.nbytes(shape)
        assert all(leaf.size for leaf in jax.tree.leaves(encoded))
        if codec.bits == 8:
            assert encoded.codes.shape == shape
        decoded = jax.eval_shape(lambda e, s=shape: codec.decode(e, s), encoded)
        assert decoded.shape == shape and decoded.dtype == jnp.float32


@pytest.mark.parametrize(
    ("codec", "expected"),
    [
        (int8(), 4096 * 11008 + 4 * 4096 * 43),
        (int8(2048, blocks="flat"), 4096 * 11008 + 4 * 22016),
        (int8(2048), 4096 * 11008 + 4 * 4096 * 6),
        (float8(), 4096 * 11008 + 4 * 4096 * 43),
        (int4(), 4096 * 11008 // 2 + 4 * 4096 * 86),
        (affine(4), 4096 * 11008 // 2 + 5 * 4096 * 43),
        (affine(8), 4096 * 11008 + 5 * 4096 * 43),
    ],
    ids=str,
)
def test_bytes_of_a_large_matrix(codec, expected):
    assert codec.nbytes((4096, 11008)) == expected
    assert codec.nbytes((32, 4096, 11008)) == 32 * expected


@codecs
@pytest.mark.parametrize("shape", [(), (4, 150)], ids=str)
def test_zeros_are_what_zeros_are_encoded_as(codec, shape):
    zeros = codec.zeros(shape)
    same(zeros, encode(codec, np.zeros(shape, np.float32)))
    np.testing.assert_array_equal(decode(codec, zeros, shape), np.zeros(shape))


@kinds
def test_both_rules_agree_where_the_block_divides(codec):
    shape = (2, 6, 192)
    x, flat = data(codec, *shape), dataclasses.replace(codec, blocks="flat")
    a, b = encode(codec, x), encode(flat, x)
    assert b.scales.shape == (2, 18)
    same(a, jax.tree.map(lambda field, like: field.reshape(like.shape), b, a))
    same(decode(codec, a, shape), decode(flat, b, shape))


@kinds
def test_flat_blocks_run_over_rows(codec):
    flat = dataclasses.replace(codec, blocks="flat")
    x = data(codec, 5, 30)
    a, b = encode(flat, x), encode(codec, x.reshape(150))
    assert a.scales.shape == (3,)
    assert encode(codec, x).scales.shape == (5, 1)
    same(a, jax.tree.map(lambda field, like: field.reshape(like.shape), b, a))


@kinds
@rules
def test_batch_axes_are_a_loop_over_matrices(codec, blocks):
    codec = dataclasses.replace(codec, blocks=blocks)
    shape = (2, 2, 5, 70)
    x = data(codec, *shape)
    whole = encode(codec, x)
    same(whole, jax.jit(jax.vmap(codec.encode))(x))
    back = decode(codec, whole, shape)
    for i in np.ndindex(*shape[:-2]):
        one = encode(codec, x[i])
        same(jax.tree.map(lambda field, i=i: field[i], whole), one)
        same(back[i], decode(codec, one, shape[2:]))
    mapped = jax.jit(jax.vmap(lambda e: codec.decode(e, shape[1:])))
    same(back, mapped(whole))


@kinds
def test_a_short_block_is_on_its_own(codec):
    x = data(codec)
    whole = round_trip(codec, x)
    np.testing.assert_array_equal(whole[:, :128], round_trip(codec, x[:, :128]))
    np.testing.assert_array_equal(whole[:, 128:], round_trip(codec, x[:, 128:]))


@codecs
def test_encode_holds_no_second_copy(codec):
    """The CPU compiler's own count, for blocks that divide: below a quarter."""
    codec = dataclasses.replace(codec, **{size_field(codec): 256})
    x = jnp.zeros((256, 1024))
    compiled = jax.jit(codec.encode).lower(x).compile()
    assert compiled.memory_analysis().temp_size_in_bytes <= x.nbytes / 4


def size_field(codec):
    return "group" if isinstance(codec, affine) else "block"


COLLECTIVE = re.compile("all-gather|all-reduce|all-to-all|collective-permute")


@kinds
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_codes_and_scales_are_sharded_as_the_array(codec, kind):
    """Along all axes, and no device needs another's blocks."""
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(kind, kind))
    spec = PartitionSpec(None, "a", "b")
    x = data(codec, 3, 8, 4 * BLOCK)
    sharded = jax.device_put(x, NamedSharding(mesh, spec))
    compiled = jax.jit(codec.encode).lower(sharded).compile()
    encoded = compiled(sharded)
    back = jax.jit(lambda e: codec.decode(e, x.shape)).lower(encoded).compile()
    for leaf in jax.tree.leaves((encoded, back(encoded))):
        assert leaf.sharding.is_equivalent_to(NamedSharding(mesh, spec), 3)
    assert not COLLECTIVE.search(compiled.as_text() + back.as_text())
    same(jax.device_get(encoded), jax.device_get(encode(codec, x)))
