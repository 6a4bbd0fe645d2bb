"""Nothing is concluded about shapes or dtypes that JAX can be told to refuse."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest

from tests.chosen import each_row
from tests.rows import ROWS, subject

# Of Optax itself: `1 - decay**count` mixes a number and an int32.
OPTAX_CONCLUDES = ("bias_correction",)
# Its moments in float32 take gradients in bfloat16, as those of
# `optax.adam(mu_dtype=jnp.float32)` do, where no bracket casts these before.
MOMENTS = ("update_moment", "update_moment_per_elem_norm")
OUTSIDE_BRACKETS = ("adamw_8bit", "adamw_4bit", "column_sgd")


def relaxed(function):
    @functools.wraps(function)
    def run(*args, **kwargs):
        with jax.numpy_dtype_promotion("standard"):
            return function(*args, **kwargs)

    return run


def traced(row, dtype):
    params = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, dtype), subject(row).params
    )
    tx = optax.with_extra_args_support(ROWS[row].make())
    jax.eval_shape(tx.update, params, jax.eval_shape(tx.init, params), params)


@each_row
def test_ranks(row):
    with jax.numpy_rank_promotion("raise"):
        traced(row, jnp.float32)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@each_row
def test_dtypes(row, dtype, monkeypatch):
    for name in OPTAX_CONCLUDES + (MOMENTS if row in OUTSIDE_BRACKETS else ()):
        standard = relaxed(getattr(optax.tree, name))
        monkeypatch.setattr(optax.tree, name, standard)
        monkeypatch.setattr(optax.tree_utils, f"tree_{name}", standard)
    with jax.numpy_dtype_promotion("strict"):
        traced(row, dtype)
