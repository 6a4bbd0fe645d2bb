"""Weights in few bits: rounded at random, and so right in the mean."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from lowrank_optax import quantization


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def test_small_updates_are_made_in_the_mean():
    """An eighth of the distance to the next bfloat16: lost without, made with."""
    params = {"w": jnp.ones(40_000, jnp.bfloat16)}
    updates = {"w": jnp.full(40_000, 2.0**-10)}
    moved = lro.stochastic_round_apply_updates(params, updates, jax.random.key(0))["w"]
    assert moved.dtype == jnp.bfloat16
    assert set(np.unique(moved.astype(np.float32))) == {1.0, 1.0 + 2.0**-7}
    # Four standard errors of a Bernoulli mean at p = 1/8.
    error = abs(float(jnp.mean(moved.astype(jnp.float32))) - 1.0 - 2.0**-10)
    assert error < 4 * 2.0**-7 * np.sqrt(1 / 8 * 7 / 8 / 40_000)
    assert np.all(optax.apply_updates(params, updates)["w"] == 1)


def test_other_types_are_applied_as_optax_does():
    params = {"f": normal(0, 5), "h": normal(1, 5).astype(jnp.float16), "n": None}
    updates = {"f": normal(2, 5), "h": normal(3, 5).astype(jnp.float16), "n": None}
    got = lro.stochastic_round_apply_updates(params, updates, jax.random.key(0))
    want = optax.apply_updates(params, updates)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_the_bits_follow_from_key_and_path():
    params = {"a": jnp.ones(999, jnp.bfloat16), "b": jnp.ones(999, jnp.bfloat16)}
    updates = jax.tree.map(lambda x: jnp.full(x.shape, 2.0**-8), params)
    step = jax.jit(lro.stochastic_round_apply_updates)
    one = step(params, updates, jax.random.key(1))
    again = lro.stochastic_round_apply_updates(params, updates, jax.random.key(1))
    other = step(params, updates, jax.random.key(2))
    jax.tree.map(np.testing.assert_array_equal, one, again)
    assert np.any(one["a"] != one["b"]) and np.any(one["a"] != other["a"])
    alone = step({"b": params["b"]}, {"b": updates["b"]}, jax.random.key(1))
    np.testing.assert_array_equal(alone["b"], one["b"])


def test_boxes():
    box = nn.Partitioned(jnp.ones((4, 8), jnp.bfloat16), names=("embed", "mlp"))
    new = lro.stochastic_round_apply_updates(
        {"w": box}, {"w": box.replace_boxed(jnp.ones((4, 8)))}, jax.random.key(0)
    )
    np.testing.assert_array_equal(new["w"].value, 2.0)


def test_which_weights_are_stored_as_codes_and_their_bytes():
    params = {
        "kernel": jnp.ones((64, 512)),
        "stack": jnp.ones((3, 64, 300)),
        "embedding": jnp.ones((99, 64)),
        "norm": {"scale": jnp.ones((3, 64))},
    }
    stored = lro.quantize_weights(params, layer_axis=0)
    kinds = jax.tree.map(
        quantization.is_quantized, stored, is_leaf=quantization.is_quantized
    )
    chosen = {"kernel": True, "stack": True, "embedding": False}
    assert kinds == {**chosen, "norm": {"scale": False}}
    for name, groups in (("kernel", 64 * 2), ("stack", 3 * 64 * 2)):
        found = sum(x.nbytes for x in jax.tree.leaves(stored[name]))
        assert found == params[name].size + 5 * groups
    plain = lro.dequantize_weights(stored, jnp.bfloat16)
    assert plain["kernel"].dtype == jnp.bfloat16
    assert plain["embedding"].dtype == jnp.float32


@pytest.mark.parametrize("codec", [None, quantization.linear_int4(block=64)])
def test_quantized_weights_follow_their_updates_in_the_mean(codec):
    """Half a code's step, a hundred times: nearest rounding would stay."""
    params = {"w": normal(0, 64, 256)}
    stored = lro.quantize_weights(params, codec)
    start = lro.dequantize_weights(stored)["w"]
    size = 0.02 * float(jnp.abs(start).max()) / (1 if codec else 16)
    updates = {"w": jnp.where(jnp.abs(start) < 1, size, 0.0)}
    step = jax.jit(lro.stochastic_round_apply_updates)
    for seed in range(20):
        stored = step(stored, updates, jax.random.key(seed))
    moved = lro.dequantize_weights(stored)["w"] - start
    inner = np.asarray(jnp.abs(start) < 1)
    # Of 10,000 entries in the middle of their blocks; the spread of each is a step's.
    assert np.mean(np.asarray(moved)[inner]) == pytest.approx(20 * size, rel=0.1)


def test_an_update_of_nothing_changes_no_code():
    stored = lro.quantize_weights({"w": normal(0, 16, 256)})
    zero = {"w": jnp.zeros((16, 256))}
    after = lro.stochastic_round_apply_updates(stored, zero, jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, after, stored)


def test_training_on_codes_learns():
    """Gradients with respect to the decoded weights; the optimizer sees those."""
    target, inputs = normal(0, 32, 64), normal(1, 256, 32)
    stored = lro.quantize_weights({"w": jnp.zeros((32, 64)) + 0.01 * normal(2, 32, 64)})
    tx = lro.galore(0.05, rank=8, update_proj_gap=10, scale=1.0)
    state = tx.init(lro.dequantize_weights(stored))

    def loss_of(params):
        return jnp.mean((inputs @ (params["w"] - target)) ** 2)

    @jax.jit
    def step(stored, state, key):
        params = lro.dequantize_weights(stored)
        loss, grads = jax.value_and_grad(loss_of)(params)
        updates, state = tx.update(grads, state, params)
        return lro.stochastic_round_apply_updates(stored, updates, key), state, loss

    losses = []
    for seed in range(120):
        stored, state, loss = step(stored, state, jax.random.key(seed))
        losses.append(float(loss))
    assert losses[-1] < 0.2 * losses[0]


def test_a_codec_that_rounds_to_the_nearest_is_refused():
    with pytest.raises(ValueError, match=r"`codec` must be able to round at random"):
        lro.quantize_weights({"w": jnp.ones((4, 4))}, quantization.blockwise_int8())


@pytest.mark.parametrize("kind", ["plain", "stochastic-bf16", "int8"])
def test_a_storage_leaves_counters_alone(kind):
    params = {"kernel": jnp.ones((16, 64)), "steps": jnp.int32(2**20 + 1)}
    weights = lro.weight_storage(kind)
    loaded = weights.load(weights.store(params))
    assert loaded["steps"].dtype == jnp.int32
    assert int(loaded["steps"]) == 2**20 + 1
    assert loaded["kernel"].dtype == jnp.float32
