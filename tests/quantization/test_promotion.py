"""Codecs conclude nothing about shapes or dtypes that JAX can be told to refuse."""

import jax
import jax.numpy as jnp
import pytest

from lowrank_optax import quantization as q

CODECS = {
    "affine8": q.affine(bits=8, group=16),
    "affine4": q.affine(bits=4, group=16),
    "int4": q.linear_int4(),
    "signed": q.blockwise_int8(16),
    "exact": q.blockwise_int8(16, signed=True, signed_scale=True, exact=False),
    "unsigned": q.blockwise_int8(16, signed=False).for_second_moments(),
    "flat": q.blockwise_int8(16, blocks="flat"),
    "float8": q.float8(),
    "symmetric": q.symmetric(bits=8, group=16),
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", CODECS)
def test_codecs(name, dtype):
    codec, x = CODECS[name], jax.ShapeDtypeStruct((3, 6, 20), dtype)

    def there_and_back(x, key):
        out = codec.decode(codec.encode(x), x.shape)
        if codec.stochastic:
            out += codec.decode(codec.encode(x, key), x.shape)
        return out, codec.decode(codec.zeros(x.shape), x.shape)

    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        out, zeros = jax.eval_shape(there_and_back, x, jax.random.key(0))
    assert out.shape == zeros.shape == x.shape


@pytest.mark.parametrize("round", [q.stochastic_round, q.stochastic_round_to_bfloat16])
def test_rounding(round):
    x = jax.ShapeDtypeStruct((6, 20), jnp.float32)
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        assert jax.eval_shape(round, x, jax.random.key(0)).shape == x.shape
