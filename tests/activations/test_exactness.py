"""What is exact: the forward pass, "save", and recomputation; how far codes are off."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank_optax import activations
from tests.activations.model import (
    PRODUCTS,
    QUICK,
    STRICT,
    TAGS,
    assert_same,
    block,
    compiled,
    distance,
    inputs,
    kept,
    run,
)

recompute = activations.compressed_checkpoint(block, {})
BODIES = {"plain": block, "recompute": recompute, "jax": jax.checkpoint(block)}


@functools.cache
def exact(scan, dtype):
    return run(block, inputs(dtype=dtype), scan, options=STRICT)


@pytest.mark.parametrize("scan", [True, False], ids=["scan", "unrolled"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_saving_everything_is_the_plain_gradient(dtype, scan):
    got = run(kept("save"), inputs(dtype=dtype), scan, options=STRICT)
    assert_same(got, exact(scan, dtype))


@pytest.mark.parametrize(
    ("action", "dtype"),
    [
        ("int8", "float32"),
        ("int4", "bfloat16"),
        ("int4+4", "float32"),
        ("offload", "float32"),
    ],
)
def test_the_forward_value_is_exact(action, dtype):
    got = run(kept(action, group=16), inputs(dtype=dtype), options=STRICT)
    value, gradient = exact(True, dtype)
    assert_same(got[0], value)
    if action == "offload":
        assert_same(got[1], gradient)
    else:
        assert distance(got[1], gradient) > 1e-3  # the codes are really read


plain = jax.jit(block, compiler_options=QUICK)


@pytest.mark.parametrize("action", ["save", "int4"])
def test_the_plain_call_is_the_function(action):
    """Without a derivative nothing is compressed, and nothing is behind a barrier."""
    params, x = inputs(layers=1)
    params = jax.tree.map(lambda p: p[0], params)
    body = kept(action)
    assert_same(jax.jit(body, compiler_options=QUICK)(params, x), plain(params, x))
    text = str(jax.make_jaxpr(body)(params, x))
    assert "optimization_barrier" not in text and "u8" not in text


# A block of 4 x 64 tokens, of which two stacks differ in depth alone.
TOKENS = {"width": 64, "ff": 160, "rows": 4, "length": 64}


@functools.cache
def program(action, layers, scan=True):
    """The compiled step of one of BODIES, or under an action for all products."""
    body = BODIES.get(action) or kept(action, PRODUCTS)
    return compiled(body, inputs(layers=layers, **TOKENS), scan)


@pytest.mark.parametrize("scan", [True, False], ids=["scan", "unrolled"])
def test_the_empty_policy_is_full_recomputation(scan):
    """The same bytes and the same operations, and the same numbers."""
    programs = [program(name, 2, scan) for name in ("recompute", "jax", "plain")]
    ours, peer, exact = map(activations.audit, programs)
    assert (ours.temp_bytes, ours.flops) == (peer.temp_bytes, peer.flops)
    assert ours.temp_bytes < exact.temp_bytes and ours.flops > 1.15 * exact.flops
    arguments = inputs(layers=2, **TOKENS)
    assert_same(programs[0](*arguments), programs[1](*arguments))


def predicted(action):
    """Bytes kept of the products of one block, and bytes of their steps."""
    params, x = inputs(layers=1, **TOKENS)
    params = jax.tree.map(lambda p: p[0], params)
    found = activations.tagged_values(block, params, x)
    found = [value for value in found if value.tag in PRODUCTS]
    action = activations.parse_action(action)
    scales = [
        getattr(jax.eval_shape(action.compress, value), "scales", jnp.zeros(()))
        for value in found
    ]
    size = sum(action.nbytes(value.shape, value.dtype) for value in found)
    return size, sum(s.size for s in scales if s.ndim) * 2


@pytest.mark.parametrize("action", ["recompute", "save", "int4"])
def test_a_layer_more_takes_its_predicted_bytes(action):
    """What is kept, and the layer's input of 64 KiB, which recomputation starts from.

    On a CPU the loop of the backward pass holds the bfloat16 steps in float32.
    """
    few, many = (activations.audit(program(action, layers)) for layers in (2, 6))
    size, steps = predicted(action)
    per_layer = (many.temp_bytes - few.temp_bytes) / 4
    assert size + 65536 <= per_layer <= size + steps + 65536


def test_kept_products_are_not_computed_again():
    """Products in the replay would be 20 % more operations, the codes are a few."""
    actions = ("plain", "recompute", "save", "int4")
    exact, again, saved, coded = (
        activations.audit(program(action, 2)).flops for action in actions
    )
    assert saved < 1.05 * exact and coded < 1.08 * exact and again > 1.2 * exact


# --- gradients -----------------------------------------------------------------------

# Four of 256 norm gains are 12, as in trained models: their channels are outliers.
WIDE = {"layers": 4, "width": 256, "ff": 704, "rows": 4, "length": 64}


@functools.cache
def of_wide():
    return compiled(block, inputs(**WIDE))


@functools.cache
def wide(gain):
    arguments = inputs(**WIDE, gain=gain)
    return arguments, of_wide()(*arguments)[1]


def error(action, tags, gain, **options):
    arguments, gradient = wide(gain)
    return distance(run(kept(action, tags, **options), arguments)[1], gradient)


@pytest.mark.parametrize(
    ("action", "least", "most"), [("int8", 0.002, 0.012), ("int4", 0.04, 0.17)]
)
def test_codes_of_products_bend_the_gradient_a_little(action, least, most):
    """Half a step is 0.4 % of a group's largest entry in 8 bits and 7 % in 4."""
    assert least < error(action, PRODUCTS, 1.0) < most


def test_outlier_channels_save_the_gradients_of_norm_outputs():
    tags = ("norm1", "norm2", "act")
    assert error("int4", tags, 12.0) > 0.3
    assert error("int4+4", tags, 12.0) < 0.15


def test_the_default_roles_are_safe():
    policy = activations.transformer_policy()
    arguments, gradient = wide(1.0)
    body = activations.compressed_checkpoint(block, policy)
    assert distance(run(body, arguments)[1], gradient) < 0.15


def test_rounding_at_random_is_right_in_the_mean():
    """Over inputs that differ by 1e-5, the mean gradient comes closer to the exact one.

    A gradient through one linear map is linear in the kept value, so that its mean
    over n draws is off by 1 / sqrt(n) of one draw: 0.25 for 16. Rounding to the
    nearest is off by the same every time.
    """
    params, x = inputs(width=64, rows=4)
    w = params["wq"][0]

    def product(w, x):
        x = jax.ad_checkpoint.checkpoint_name(jnp.tanh(x), "x")
        return jnp.sum(jnp.sin(jnp.arange(64.0)) * (x @ w))

    def gradients(fn):
        shifted = x * (1 + 1e-5 * jnp.arange(16.0)[:, None, None, None])
        return jax.jit(jax.vmap(jax.grad(fn), (None, 0)))(w, shifted)

    exact = jax.jit(jax.grad(product))(w, x)
    random = gradients(kept("int4", ["x"], product, stochastic=True))
    nearest = gradients(kept("int4", ["x"], product))
    one = distance(random[0], exact)
    assert distance(random.mean(0), exact) < 0.4 * one
    assert distance(nearest.mean(0), exact) > 0.9 * distance(nearest[0], exact)


def test_rounding_at_random_repeats_itself():
    """The draws come from the values: no key, and a restart changes nothing."""

    def fn(x, w):
        x = jax.ad_checkpoint.checkpoint_name(jnp.tanh(x @ w), "x")
        x = jax.ad_checkpoint.checkpoint_name(jnp.tanh(x @ w), "x")
        return jnp.sum(x**2)

    def gradient(**options):
        body = kept("int4", ["x"], fn, **options)
        return jax.jit(jax.grad(body, (0, 1)))(x, params["wq"][0])

    params, x = inputs(rows=4)
    random = gradient(stochastic=True)
    assert_same(gradient(stochastic=True), random)
    assert distance(random, gradient()) > 1e-3


@pytest.mark.parametrize("action", ["save", "int8", "int4", "int4+4", "recompute"])
def test_what_is_not_finite_is_never_hidden(action):
    """The plain gradient of this function is not finite; no format makes it finite."""

    def cubed(x):
        return jnp.sum(jax.ad_checkpoint.checkpoint_name(2 * x, "x") ** 3)

    found = jax.jit(jax.grad(kept(action, ["x"], cubed)), compiler_options=QUICK)
    for bad in (np.nan, np.inf, -np.inf):
        gradient = found(jnp.ones((4, 300)).at[2, 200].set(bad))
        assert not np.isfinite(gradient[2, 200])
        assert np.isfinite(gradient[:2]).all()


def test_every_tag_may_have_its_own_action():
    actions = ["save", "recompute", "int8", "int4", "int4+2"] * 2
    policy = activations.Policy(dict(zip(TAGS, actions, strict=True)), group=16)
    arguments = inputs()
    value, gradient = run(activations.compressed_checkpoint(block, policy), arguments)
    assert_same(value, exact(True, "float32")[0])
    assert 1e-3 < distance(gradient, exact(True, "float32")[1]) < 0.2
