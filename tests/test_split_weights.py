"""`split_weights`: bfloat16 and an integer are together a float32."""

import functools
import pathlib

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
from lowrank_optax.testing import LAWS, Subject
from tests.quantization.recorded import STEPS
from tests.rows import stacked_params
from tests.test_layerwise import batches, block, embed, head, make_params, plain_step

GRADIENTS = pathlib.Path(__file__).parent / "golden/data/gradients_galore.npz"
# Of the power of two not above the bfloat16 next to a number: half a code, and with
# int16, whose codes lie wider apart than float32, one of those.
ERROR = {"int8": 2.0**-8 / (2 * 127), "int16": 2.0**-23}


def bits(x):
    return np.asarray(jax.lax.bitcast_convert_type(x, jnp.uint16))


def bfloat16(tree):
    return optax.tree.cast(tree, jnp.bfloat16)


def power(x):
    """The power of two not above the bfloat16 next to x, that of subnormals for 0."""
    low = np.asarray(jnp.asarray(x).astype(jnp.bfloat16).astype(jnp.float32))
    return 2.0 ** np.floor(
        np.log2(np.maximum(np.abs(low, dtype=np.float64), 2.0**-126))
    )


def every_exponent():
    """Both signs, all exponents, the first, a middle and the last fraction."""
    found = [
        (sign << 15) | (exponent << 7) | fraction
        for sign in (0, 1)
        for exponent in range(256)
        for fraction in (0, 0x55, 0x7F)
    ]
    return jax.lax.bitcast_convert_type(jnp.asarray(found, jnp.uint16), jnp.bfloat16)


def test_where_the_update_leads_over_all_pairs_of_exponents():
    """From every bfloat16 p to every q: exact as far as any float32 update could be."""
    values = every_exponent()
    count = values.size
    start = jnp.broadcast_to(values[:, None], (count, count))
    end = jnp.broadcast_to(values[None], (count, count))
    # The inner update is the way to `end`, by force of a transformation that knows it.
    inner = optax.GradientTransformation(
        lambda params: (), lambda updates, state, params: (updates, state)
    )
    tx = lro.split_weights(inner)

    @jax.jit
    def step(params, end):
        state = tx.init(params)
        way = end.astype(jnp.float32) - params.astype(jnp.float32)
        updates, state = tx.update(way, state, params)
        landed = optax.apply_updates(params, updates)
        return landed, lro.full_weights(landed, state), params.astype(jnp.float32) + way

    landed, full, wanted = step(start, end)
    p, q = np.asarray(start, np.float64), np.asarray(end, np.float64)
    with np.errstate(invalid="ignore"):
        way = np.abs(q - p)
    least = 2.0**-126
    normal = (np.abs(p) >= least) & (np.abs(q) >= least)
    normal &= np.isfinite(p) & np.isfinite(q)
    near = normal & (np.abs(q) >= 2.0**-15 * np.abs(p))
    # A distance that float32 holds: it overflows and becomes subnormal as all do.
    near &= (way < 2.0**128) & ((way >= least) | (p == q))
    assert near.sum() > count**2 / 3
    np.testing.assert_array_equal(bits(landed)[near], bits(end)[near])
    # Where no update can lead there, less is lost than one rounding of float32 at p.
    far = normal & ~near & (way < 2.0**127)
    full, wanted = np.float64(full[far]), np.float64(wanted[far])
    assert np.all(np.abs(full - wanted) <= np.maximum(2.0**-24 * np.abs(p[far]), least))
    one, tiny = jnp.bfloat16(1), jnp.bfloat16(2.0**-30)
    candidates = np.float32(-1) + np.arange(-2, 3) * np.float32(2.0**-24)
    sums = {float(optax.apply_updates(one, jnp.float32(u))) for u in candidates}
    assert float(tiny) not in sums and len(sums) > 2


def test_infinities_and_nan_pass_as_in_float32():
    params = jnp.asarray([1, jnp.inf, -jnp.inf, jnp.nan, 1, -0.0], jnp.bfloat16)
    grads = jnp.asarray([-jnp.inf, 1, 1, 1, jnp.nan, 0.0])
    tx = lro.split_weights(optax.sgd(1.0), lambda path, leaf: "int8")
    updates, state = tx.update(grads, tx.init(params), params)
    moved = optax.apply_updates(params, updates)
    wanted = optax.apply_updates(params.astype(jnp.float32), -grads)
    np.testing.assert_array_equal(moved.astype(jnp.float32), wanted)
    np.testing.assert_array_equal(lro.full_weights(moved, state), wanted)
    assert np.signbit(np.float32(moved[5]))


def test_two_hundred_steps_stay_beside_float32():
    """Each step may be wrong by half a code, and no step by more."""
    rng = np.random.default_rng(0)
    sizes = 10.0 ** rng.uniform(-6, 1, 16)
    start = jnp.asarray(rng.standard_normal((24, 16)) * sizes, jnp.float32)
    weights = dict.fromkeys(ERROR, start)
    inner = optax.chain(optax.scale_by_sign(), optax.scale(1e-3))
    tx = lro.split_weights(inner, lambda path, leaf: path)
    params, state = lro.set_full_weights(weights, tx.init(bfloat16(weights)))
    for kind, full in lro.full_weights(params, state).items():
        assert np.all(np.abs(full - start) <= ERROR[kind] * power(start))

    @jax.jit
    def step(params, state, grads):
        before = lro.full_weights(params, state)
        moves, _ = inner.update(grads, inner.init(before), before)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        exact = optax.apply_updates(before, moves)
        return params, state, lro.full_weights(params, state), exact

    total = dict.fromkeys(ERROR, 0.0)
    for _ in range(200):
        grads = jnp.asarray(rng.standard_normal(start.shape))
        grads = dict.fromkeys(ERROR, grads)
        params, state, found, exact = step(params, state, grads)
        moves, _ = inner.update(grads, inner.init(weights))
        weights = optax.apply_updates(weights, moves)
        for kind, full in found.items():
            # Of a weight near zero as much as float32 loses where it comes from.
            allowed = np.maximum(ERROR[kind] * power(exact[kind]), 2.0**-24 * 2e-3)
            assert np.all(np.abs(np.float64(full) - exact[kind]) <= allowed)
            # Both runs round their sums.
            total[kind] += allowed + 2.0**-23 * np.abs(full)
    for kind, full in found.items():
        assert np.all(np.abs(np.float64(full) - weights[kind]) <= total[kind])
        assert np.any(full != weights[kind])
        low = full.astype(jnp.bfloat16)
        np.testing.assert_array_equal(bits(params[kind]), bits(low))


@functools.cache
def subject():
    """A low-rank method around stacked layers; gradients are float32, as updates are.

    Steps are below what a bfloat16 at 1 shows, else the last bit of another program's
    sum might lead to its neighbour: the corrections hold them.
    """

    def make():
        inner = lro.galore(1e-4, projector=lro.svd(2, 3), layer_axis=0)
        return lro.split_weights(inner)

    return Subject(make, bfloat16(stacked_params()), jnp.float32)


@pytest.mark.parametrize("law", LAWS)
def test_law(law):
    LAWS[law](subject())


def test_what_does_not_move_keeps_its_bits():
    """For every code, the last ones at ties between two bfloat16 among them."""
    tx = lro.split_weights(optax.set_to_zero())
    params = jnp.broadcast_to(jnp.bfloat16([[1], [1.0078125], [-3.5], [0]]), (4, 255))
    codes = jnp.broadcast_to(jnp.arange(-127, 128), params.shape).astype(jnp.int8)
    state = tx.init(params)._replace(correction=codes)
    updates, state = jax.jit(tx.update)(jnp.ones(params.shape), state, params)
    np.testing.assert_array_equal(optax.apply_updates(params, updates), params)
    np.testing.assert_array_equal(state.correction, codes)


def test_bytes_and_what_is_split():
    params = {
        "kernel": jnp.ones((8, 4), jnp.bfloat16),
        "bias": jnp.ones(4, jnp.bfloat16),
        "table": jnp.ones((8, 4)),
        "steps": jnp.int32(3),
        "none": None,
    }
    codes = lro.split_weights(optax.identity()).init(params).correction
    assert codes["kernel"].dtype == jnp.int8 and codes["bias"].dtype == jnp.int16
    assert isinstance(codes["table"], optax.MaskedNode)
    assert isinstance(codes["steps"], optax.MaskedNode)
    stored = params["kernel"].nbytes + codes["kernel"].nbytes
    assert stored == 3 * params["kernel"].size

    def choose(path, leaf):
        return {"kernel": "int16"}.get(path)

    codes = lro.split_weights(optax.identity(), choose).init(params).correction
    assert codes["kernel"].dtype == jnp.int16
    assert isinstance(codes["bias"], optax.MaskedNode)
    # The moments are those of float32 parameters.
    state = lro.split_weights(optax.adam(1e-3)).init(params)
    assert optax.tree_utils.tree_get(state, "mu")["kernel"].dtype == jnp.float32


def test_what_is_wrong_is_said():
    tx, params = (
        lro.split_weights(optax.sgd(0.1)),
        {"w": jnp.ones((2, 2), jnp.bfloat16)},
    )
    state = tx.init(params)
    with pytest.raises(ValueError, match=r"needs the parameters: call tx.update"):
        tx.update(params, state)
    with pytest.raises(ValueError, match=r"'w' was bfloat16\[2, 2\] .* is float32"):
        tx.update(params, state, optax.tree.cast(params, jnp.float32))
    with pytest.raises(ValueError, match=r"full_weights: .*'w' .* is bfloat16\[3\]"):
        lro.full_weights({"w": jnp.ones(3, jnp.bfloat16)}, state)
    with pytest.raises(ValueError, match="found no corrections"):
        lro.full_weights(params, optax.sgd(0.1).init(params))
    with pytest.raises(ValueError, match="`correction` must be one of 'int8', 'int16'"):
        lro.split_weights(optax.sgd(0.1), "int4")
    with pytest.raises(TypeError, match="`inner` must be an optax"):
        lro.split_weights("adamw")


def test_layer_by_layer_is_the_plain_step():
    """The correction of a layer goes with it."""
    tx = lro.split_weights(optax.sgd(0.5))
    plain = jax.jit(plain_step(tx))
    layered = jax.jit(lro.layerwise.train_step(embed, block, head, tx))
    start = bfloat16(make_params())
    runs = []
    for step in (plain, layered):
        params, state = start, tx.init(start)
        for batch in batches(2):
            params, state, _ = step(params, state, batch)
        runs.append((lro.full_weights(params, state), state))
    (one, state), (other, after) = runs
    assert jax.tree.structure(state) == jax.tree.structure(after)
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        # Gradients are bfloat16 here, and summed in another order.
        np.testing.assert_allclose(x, y, atol=5e-3)


def test_shardings_and_boxes():
    devices = np.array(jax.devices()[:2])
    tx = lro.split_weights(lro.galore(1.0, rank=2))
    params = {"dense": {"kernel": jnp.ones((8, 6), jnp.bfloat16)}}
    mesh = Mesh(devices, ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    place = NamedSharding(mesh, P("data"))
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, place)
        shardings = lro.state_shardings(tx, placed, place)
        state = jax.jit(tx.init, out_shardings=shardings)(placed)
        assert state.correction["dense"]["kernel"].sharding.is_equivalent_to(place, 2)
        grads = optax.tree.ones_like(placed)
        updates, state = jax.jit(tx.update)(grads, state, placed)
        assert state.correction["dense"]["kernel"].sharding.is_equivalent_to(place, 2)
        assert np.all(np.asarray(updates["dense"]["kernel"]) < 0)
    box = nn.Partitioned(jnp.ones((8, 6), jnp.bfloat16), names=("embed", "mlp"))
    state = tx.init({"kernel": box})
    assert state.correction["kernel"].names == ("embed", "mlp")
    grads = {"kernel": box.replace_boxed(jnp.ones((8, 6), jnp.bfloat16))}
    updates, state = tx.update(grads, state, {"kernel": box})
    assert updates["kernel"].value.dtype == jnp.float32


def test_under_an_nnx_optimizer():
    model = nnx.Linear(6, 4, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    tx = lro.split_weights(optax.sgd(1e-4, momentum=0.5))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    before = np.asarray(model.kernel[...].astype(jnp.float32))

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(lambda m: jnp.sum(m(jnp.ones((2, 6)))))(model)
        optimizer.update(model, grads)

    for _ in range(3):
        step(model, optimizer)
    params, state = nnx.state(model, nnx.Param), optimizer.opt_state
    full = lro.full_weights(params, state)
    moved = np.asarray(full["kernel"][...]) - before
    # Gradients of 2, steps far below what a bfloat16 of 0.3 shows; 3 codes at most off.
    way = -2e-4 * (1 + 1.5 + 1.75)
    np.testing.assert_allclose(moved, way, atol=3 * ERROR["int8"])


def test_a_step_of_the_released_adamw_from_its_recorded_state():
    """Weights of 24 bits around companded moments: a composition is that optimizer."""
    released = functools.partial(quantization.companded, 32, blocks="flat")
    released = functools.partial(released, keep_nonzero=False, half_scale=True)
    mu, nu = released(signed=True), released(signed=False)
    inner = optax.chain(
        lro.quantize_state(optax.scale_by_adam(), mu, nu, min_size=0),
        optax.add_decayed_weights(0.1),
        optax.scale(-1e-3),
    )
    tx = lro.split_weights(inner)
    gradients = np.load(GRADIENTS)["tall"]

    def recorded(i):
        found = STEPS["narrow_bits_tall"][i], STEPS["ecc_tall"][i]
        return jax.lax.bitcast_convert_type(jnp.asarray(found[0]), jnp.bfloat16), found

    def stored(empty, name, i):
        scales = STEPS[f"{name}_scales_tall"][i].reshape(empty.scales.shape)
        return empty._replace(codes=STEPS[f"{name}_codes_tall"][i], scales=scales)

    update = jax.jit(tx.update)
    for i, count in ((0, 4), (2, 14), (4, 24)):  # recorded in pairs
        params, (_, codes) = recorded(i)
        state = tx.init(params)
        adam, *rest = state.inner_state
        moments = stored(adam.mu, "m", i), stored(adam.nu, "v", i)
        adam = adam._replace(count=jnp.int32(count), mu=moments[0], nu=moments[1])
        state = state._replace(correction=codes, inner_state=(adam, *rest))
        gradient = jnp.asarray(gradients[count], jnp.bfloat16)
        updates, state = update(gradient, state, params)
        after, (low, codes) = recorded(i + 1)
        np.testing.assert_array_equal(bits(optax.apply_updates(params, updates)), low)
        adam = state.inner_state[0]
        for moment, name in ((adam.mu, "m"), (adam.nu, "v")):
            kept = STEPS[f"{name}_codes_tall"][i + 1]
            np.testing.assert_array_equal(moment.codes, kept)
        # The step's own rounding in float32: of 1536 codes a few are others.
        assert np.mean(state.correction != codes) < 0.005
        full = quantization.join(after, state.correction)
        apart = np.abs(full - quantization.join(after, jnp.asarray(codes)))
        assert np.max(apart) <= 2 * ERROR["int8"] * np.max(np.abs(full))
