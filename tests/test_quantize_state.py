"""Moments in eight bits: what is stored, what it costs, and who decodes it."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import lowrank_optax as lro
from lowrank_optax import quantization
from lowrank_optax.quantization import (
    QuantizedArray,
    affine,
    blockwise_int8,
    dequantize,
    float8,
    linear_int4,
    symmetric,
)
from lowrank_optax.testing import LAWS, Subject, assert_bit_equal
from tests.chosen import COMPILED

ADAM = optax.scale_by_adam(0.9, 0.96875, 1e-8)
SIGNED = blockwise_int8(16, signed_scale=True)
UNSIGNED = blockwise_int8(16, signed=False)


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def quantized(inner=ADAM, **options):
    return lro.quantize_state(inner, **{"mu": SIGNED, "nu": UNSIGNED, **options})


def is_encoded(node):
    return isinstance(node, QuantizedArray)


@pytest.mark.parametrize("shape", [(16, 32), (3, 8, 20), (40,)])
def test_a_step_is_decode_step_encode(shape):
    tx, params = quantized(min_size=8), {"w": jnp.zeros(shape)}
    state, update = tx.init(params), jax.jit(tx.update)
    plain, known = jax.jit(ADAM.update), ADAM.init(params)
    for seed in range(3):
        gradient = {"w": normal(seed, *shape)}
        want, stepped = plain(gradient, known)
        got, state = update(gradient, state)
        np.testing.assert_allclose(got["w"], want["w"], rtol=1e-5)
        for name, codec in (("mu", SIGNED), ("nu", UNSIGNED)):
            tree = optax.tree_utils.tree_get(state, name)
            exact = optax.tree_utils.tree_get(stepped, name)["w"]
            stored = codec.encode(exact)
            # A code may differ where two programs round to either side of a border.
            assert np.mean(tree["w"].codes != stored.codes) <= 0.01
            np.testing.assert_allclose(tree["w"].scales, stored.scales, rtol=1e-6)
        known = jax.tree.map(dequantize, state, is_leaf=is_encoded)


def test_small_matrices_stay_and_layers_count_one_by_one():
    params = {
        "large": jnp.zeros((8, 16)),
        "small": jnp.zeros((8, 15)),
        "stack": jnp.zeros((5, 8, 15)),
        "count": jnp.zeros((), jnp.int32),
    }
    tx = quantized(optax.trace(0.9), min_size=128)
    trace = tx.init(params).trace
    assert [name for name, x in trace.items() if is_encoded(x)] == ["large"]


@pytest.mark.parametrize("only", ["mu", "nu"])
def test_none_leaves_a_moment(only):
    other = {"mu": "nu", "nu": "mu"}[only]
    state = quantized(min_size=0, **{other: None}).init({"w": jnp.zeros((4, 32))})
    assert is_encoded(getattr(state, only)["w"])
    assert getattr(state, other)["w"].dtype == jnp.float32


def test_state_bytes():
    """A byte per element, four per block of 256 along the last axis."""
    params = {"w": jnp.zeros((64, 512)), "odd": jnp.zeros((30, 300)), "b": jnp.zeros(9)}
    table = lro.state_bytes(lro.adamw_8bit(1e-3), params)
    one = 64 * 512 + 4 * 64 * 2
    odd = 30 * 300 + 4 * 30 * 2
    assert table.by_parameter == {"": 8 - 4, "w": 2 * one, "odd": 2 * odd, "b": 8 * 9}
    assert table.by_role["mu"] == table.by_role["nu"] == one + odd + 4 * 9
    state = lro.adamw_8bit(1e-3).init(params)
    assert table.total == sum(x.nbytes for x in jax.tree.leaves(state))


@pytest.mark.parametrize(
    "codec",
    [
        UNSIGNED,
        blockwise_int8(16),
        linear_int4(16),
        float8("e4m3", 16),
        float8("e5m2", 16),
        affine(4, 16),
        affine(8, 16),
        symmetric(4, 16),
        symmetric(8, 16),
    ],
    ids=str,
)
def test_a_second_moment_does_not_vanish(codec):
    """Elements 1e-8 of their block's largest: with zeros Adam would step by 1 / eps."""
    gradient = {"w": jnp.full((16, 16), 1e-6).at[:, 0].set(1.0)}
    released = blockwise_int8(16, signed=False, keep_nonzero=False)
    largest = []
    for each in (codec, released):
        tx = quantized(nu=each, min_size=0)
        state = tx.init(gradient)
        update = jax.jit(tx.update)
        _, state = update(gradient, state)
        step, _ = update(jax.tree.map(lambda g: 1e-3 * g, gradient), state)
        largest.append(float(jnp.abs(step["w"]).max()))
    assert largest[0] < 2 < 10 < largest[1]


@pytest.mark.parametrize("form", ["bounded", "root"])
def test_transports_move_decoded_moments(form):
    """After a refresh the moments are those of the float run, up to the codes."""
    transport = lro.rotate_moments(0.9, 0.96875, form)

    def run(inner):
        bracket = lro.project(lro.svd(4, 2), transport=transport, select=".")
        tx = lro.chain(bracket, inner, lro.backproject())
        params = {"w": jnp.zeros((16, 64))}
        state, update = tx.init(params), jax.jit(tx.update)
        for seed in range(3):  # a new basis at the third
            _, state = update({"w": normal(seed, 16, 64)}, state, params)
        return [
            np.asarray(dequantize(optax.tree_utils.tree_get(state, name)["w"]))
            for name in ("mu", "nu")
        ]

    for got, want in zip(run(quantized(min_size=0)), run(ADAM), strict=True):
        # Two steps' codes: each off by 0.7 % of its block's largest, and mixed.
        np.testing.assert_allclose(got, want, atol=0.05 * np.abs(want).max())
        # Without the rotation they would be another matrix.
        assert np.linalg.norm(got - want) < 0.05 * np.linalg.norm(want)


def test_shardings_follow_the_moment():
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "model"))
    params = {"w": jnp.zeros((3, 8, 256)), "v": jnp.zeros((8, 128))}
    specs = {"w": P(None, "data", "model"), "v": P("data", "model")}
    named = jax.tree.map(lambda s: NamedSharding(mesh, s), specs)
    tx = quantized(min_size=0, mu=blockwise_int8(64), nu=UNSIGNED)
    layout = lro.state_shardings(tx, params, named)
    assert layout.mu["w"].codes.spec == layout.mu["w"].scales.spec == specs["w"]
    assert layout.nu["v"].scales.spec == specs["v"]
    state = jax.jit(tx.init, out_shardings=layout)(params)
    gradients = {"w": normal(0, 3, 8, 256), "v": normal(1, 8, 128)}
    step = jax.jit(tx.update, out_shardings=(named, layout))
    lowered = step.lower(jax.device_put(gradients, named), state)
    assert not any(
        op in (lowered.compile().as_text() or "")
        for op in ("all-gather(", "all-reduce(", "all-to-all(", "collective-permute(")
    )
    got, after = step(jax.device_put(gradients, named), state)
    want, expected = jax.jit(tx.update)(gradients, tx.init(params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got, want)
    np.testing.assert_array_equal(after.mu["w"].codes, expected.mu["w"].codes)


def test_flat_blocks_have_a_layout():
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    tx = quantized(min_size=0, mu=blockwise_int8(16, blocks="flat"))
    params = {"w": jnp.zeros((2, 8, 32))}
    named = {"w": NamedSharding(mesh, P("data"))}
    layout = lro.state_shardings(tx, params, named)
    assert layout.mu["w"].scales.spec == P("data")


def test_boxes_keep_their_names():
    params = {"w": nn.Partitioned(jnp.zeros((8, 32)), names=("embed", "mlp"))}
    tx = quantized(min_size=0)
    state = tx.init(params)
    # A row has one scale: an axis of another size cannot be cut like that of the codes.
    assert state.mu["w"].codes.names == ("embed", "mlp")
    assert state.mu["w"].scales.names == ("embed", None)
    gradient = jax.tree.map(lambda x: normal(0, *x.shape), params)
    update, after = jax.jit(tx.update)(gradient, state)
    assert update["w"].names == ("embed", "mlp")
    assert jax.tree.structure(after) == jax.tree.structure(state)


def test_nnx_optimizer():
    model = nnx.Linear(16, 32, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, lro.adamw_8bit(1e-2, min_size=0), wrt=nnx.Param)
    before = model.kernel[...].copy()
    grads = nnx.grad(lambda m: jnp.sum(m(jnp.ones((1, 16))) ** 2))(model)
    for _ in range(2):
        optimizer.update(model, grads)
    assert np.abs(model.kernel[...] - before).max() > 1e-3


def test_a_leaf_is_decoded_in_two_moments_memory():
    """And nothing else of its size: direction and codes are outputs."""
    params = {"w": jax.ShapeDtypeStruct((512, 512), jnp.float32)}
    tx = lro.quantize_state(optax.scale_by_adam())
    state = jax.eval_shape(tx.init, params)
    step = jax.jit(tx.update, donate_argnums=1).lower(params, state)
    temporaries = step.compile().memory_analysis().temp_size_in_bytes
    assert temporaries <= 2.1 * 512 * 512 * 4


@pytest.mark.parametrize("min_size", [0, 100])
def test_leaf_by_leaf_is_the_same(min_size):
    """Also with leaves that stay as they are, and with none at all."""
    params = {
        "a": jnp.zeros((8, 32)),
        "b": jnp.zeros(16),
        "c": {"d": jnp.ones((9, 30))},
    }
    whole, by_leaf = (quantized(min_size=min_size, leafwise=x) for x in (False, True))
    state = whole.init(params)
    assert_bit_equal(state, by_leaf.init(params))
    steps = [jax.jit(tx.update) for tx in (whole, by_leaf)]
    for seed in range(3):
        gradient = jax.tree.map(lambda p: normal(seed, *p.shape), params)  # noqa: B023
        (want, after), (got, same) = (step(gradient, state, params) for step in steps)
        assert jax.tree.structure(after) == jax.tree.structure(same)
        chex.assert_trees_all_close(got, want, rtol=1e-6)
        for name in ("mu", "nu"):
            one, other = (
                [dequantize(x) for x in jax.tree.leaves(tree[name], is_leaf=is_encoded)]
                for tree in (after._asdict(), same._asdict())
            )
            # Another program may round to the other side of a border between codes.
            for a, b in zip(one, other, strict=True):
                assert np.mean(np.abs(a - b) > 1e-6 * np.abs(a)) <= 0.01
        assert int(after.count) == int(same.count) == seed + 1
        state = same
    empty = by_leaf.init({})
    assert by_leaf.update({}, empty)[0] == {}


def test_leaf_by_leaf_one_waits_for_the_other():
    """Barriers: what a TPU's compiler makes of them shows benchmarks.tpu_aot."""
    params = {name: jnp.zeros((8, 32)) for name in "abc"}

    def barriers(tx):
        state = tx.init(params)
        equations = jax.make_jaxpr(tx.update)(params, state).eqns
        return [e.primitive.name for e in equations].count("optimization_barrier")

    assert barriers(quantized(min_size=0)) == 0
    assert barriers(quantized(min_size=0, leafwise=True)) == 2 * 3


def test_blocks_that_cross_shards():
    """32 columns to a shard, blocks of 64: something is sent, and all is the same."""
    mesh = Mesh(np.array(jax.devices()[:4]), ("model",))
    params, sharding = {"w": jnp.zeros((8, 128))}, NamedSharding(mesh, P(None, "model"))
    tx = quantized(mu=blockwise_int8(64), min_size=0)
    layout = lro.state_shardings(tx, params, {"w": sharding})
    gradient = {"w": normal(0, 8, 128)}
    step = jax.jit(tx.update, out_shardings=({"w": sharding}, layout))
    state = jax.device_put(tx.init(params), layout)
    _, state = step(jax.device_put(gradient, sharding), state)
    _, expected = jax.jit(tx.update)(gradient, tx.init(params))
    np.testing.assert_array_equal(state.mu["w"].codes, expected.mu["w"].codes)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"inner": "adam"}, TypeError, r"`inner` must be an optax\.Gradient.*got str"),
        ({"leafwise": "yes"}, ValueError, r"`leafwise` must be one of False, True"),
        ({"mu": "int8"}, TypeError, r"codec of `mu` must be one of .*got 'int8'"),
        ({"nu": 8}, TypeError, "codec of `nu` must be one of .*got 8"),
        ({"min_size": 0.5}, TypeError, r"`min_size` must be an int, got 0\.5"),
        ({"min_size": -1}, ValueError, "`min_size` must be at least 0, got -1"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        lro.quantize_state(**{"inner": ADAM, **arguments})


def test_float8_and_int4_moments():
    """Any codec will do, each with its own error."""
    gradient = {"w": normal(0, 8, 64)}
    codecs = {
        quantization.float8(): 0.04,  # 3 bits behind the point: 1/16 at most
        quantization.linear_int4(block=16): 0.2,
    }
    for codec, share in codecs.items():
        tx = lro.quantize_state(optax.trace(0.9), mu=codec, min_size=0)
        _, state = jax.jit(tx.update)(gradient, tx.init(gradient))
        found, wanted = state.trace["w"].decode(), gradient["w"]
        error = jnp.linalg.norm(found - wanted) / jnp.linalg.norm(wanted)
        assert 0 < error < share, codec


def test_random_rounding_makes_small_changes_in_the_mean():
    """A tenth of a 4-bit step, ten times: nearest rounding stays where it is."""
    codec = quantization.companded(128, bits=4)
    start = jnp.zeros((64, 128)).at[:, 0].set(1.0) + 0.3 * (jnp.arange(128) > 0)
    start = codec.decode(codec.encode(start), start.shape)
    # A mean that moves by 0.005 at first, far below the 0.1 between two codes.
    gradient = start + jnp.full(start.shape, 0.05).at[:, 0].set(0.0)
    moved = {}
    for stochastic in (False, True):
        inner = lro.momentum(0.9, nesterov=False)
        tx = lro.quantize_state(inner, codec, min_size=0, stochastic=stochastic)
        state = tx.init({"w": start})
        encoded = {"w": quantization.quantize(start, codec)}
        state = optax.tree_utils.tree_set(state, mu=encoded)
        update = jax.jit(tx.update)
        for _ in range(10):
            _, state = update({"w": gradient}, state)
        after = optax.tree_utils.tree_get(state, "mu")["w"].decode()
        moved[stochastic] = np.mean(np.asarray(after - start)[:, 1:])
    assert moved[False] == 0
    # Of 8128 entries, each with a spread below the distance of two codes.
    assert moved[True] == pytest.approx(0.05 * (1 - 0.9**10), abs=0.005)


def test_random_rounding_needs_a_codec_that_can():
    with pytest.raises(ValueError, match="`stochastic` needs a codec"):
        lro.quantize_state(optax.scale_by_adam(), stochastic=True)


FEW_BITS = {
    "companded": dict(
        mu=quantization.companded(), nu=quantization.companded(signed=False)
    ),
    "released scales": dict(
        mu=quantization.companded(32, half_scale=True),
        nu=quantization.companded(32, signed=False, half_scale=True),
    ),
    "4 bits": dict(
        mu=quantization.companded(32, bits=4),
        nu=quantization.companded(32, signed=False, bits=4),
        stochastic=True,
    ),
}


@pytest.mark.parametrize("name", FEW_BITS)
def test_no_moment_vanishes_beside_a_first_one_that_does_not(name):
    """A rare row: small gradients beside a large one that alternates, then none.

    Released codes drop the second moment of the small ones and keep the first: a step
    of 52,600 learning rates.
    """
    tx = lro.quantize_state(optax.scale_by_adam(), min_size=0, **FEW_BITS[name])
    small = 1e-3 * (jnp.arange(128) > 0)
    sizes = jnp.concatenate([jnp.ones(30), jnp.zeros(30)])

    @jax.jit
    def run(state):
        def body(state, k):
            gradient = small.at[0].set((-1.0) ** k) * sizes[k]
            updates, state = tx.update({"w": gradient[None]}, state)
            return state, jnp.max(jnp.abs(updates["w"]))

        return jax.lax.scan(body, state, jnp.arange(60))[1]

    assert np.max(run(tx.init({"w": jnp.zeros((1, 128))}))) < 10


@pytest.mark.parametrize("law", sorted(set(LAWS) - COMPILED))
def test_law_of_four_bits(law):
    """All but those that compare programs: a last bit decides on a draw."""
    LAWS[law](four_bits())


@functools.cache
def four_bits():
    return Subject(functools.partial(lro.adamw_4bit, 1e-2, min_size=0, block=4))


def test_four_bits_under_an_nnx_optimizer():
    model = nnx.Linear(6, 4, rngs=nnx.Rngs(0))
    tx = lro.adamw_4bit(1e-2, min_size=0)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    before = np.asarray(model.kernel[...])

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(lambda m: jnp.sum(m(jnp.ones((2, 6)))))(model)
        optimizer.update(model, grads)

    for _ in range(2):
        step(model, optimizer)
    moved = np.asarray(model.kernel[...]) - before
    np.testing.assert_allclose(moved, -2e-2, rtol=0.3)
