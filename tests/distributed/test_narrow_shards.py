"""8-bit codes where a device holds fewer columns than a run of `scaling._most`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import lowrank_optax as lro
from lowrank_optax.quantization import (
    affine,
    blockwise_int8,
    dequantize,
    is_quantized,
    quantize,
)
from tests.distributed.cases import (
    AXES,
    MESHES,
    Sharded,
    auto_mesh,
    gradients,
    named,
)

# Rows of 64 are one block and four runs: eight columns, half a run, on each device.
PARAMS = {"layers": {"up": jnp.ones((2, 128, 64))}}
SPECS = {"layers": {"up": P(None, None, AXES)}}


METHODS = {
    "adamw_8bit": lro.adamw_8bit(1.0),
    "galore_8bit": lro.galore_8bit(
        1.0, rank=4, update_proj_gap=2, layer_axis=0, side="left", min_size=0, eps=0.1
    ),
}


@pytest.mark.parametrize(
    ("name", "kind"),
    [("adamw_8bit", "auto"), ("galore_8bit", "auto"), ("galore_8bit", "explicit")],
)
def test_states(name, kind):
    tx = METHODS[name]
    state, step, expected = tx.init(PARAMS), jax.jit(tx.update), []
    for gradient in gradients(PARAMS, 3):
        update, state = step(gradient, state, PARAMS)
        expected.append(update)
    mesh = MESHES[kind]()
    with jax.set_mesh(mesh):
        run = Sharded(tx, PARAMS, named(mesh, SPECS))
        found, last = run.updates(gradients(PARAMS, 3))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        if name == "adamw_8bit":  # element by element, and the largest of a block
            np.testing.assert_array_equal(a, b)
        else:  # a code may differ, see test_mesh_grid.py, and with it a column
            assert np.mean(np.abs(a - b) > 1e-5) < 0.05
    codes = [x for x in jax.tree.leaves(last, is_leaf=is_quantized) if is_quantized(x)]
    assert len(codes) == 2
    for one in codes:
        assert one.codes.addressable_shards[0].data.shape[-1] == 8


@pytest.mark.parametrize(
    "codec", [affine(), blockwise_int8(signed_scale=True)], ids=["affine", "int8"]
)
def test_every_scale(codec):
    """The two kinds of scale that the states above do not take, and what is not
    finite."""
    x = gradients(PARAMS, 1)[0]["layers"]["up"]
    x = x.at[0, 0, :3].set(jnp.array([jnp.nan, jnp.inf, -jnp.inf]))
    cut = jax.device_put(x, NamedSharding(auto_mesh(), SPECS["layers"]["up"]))
    found = jax.jit(quantize, static_argnums=1)(cut, codec)
    expected = jax.jit(quantize, static_argnums=1)(x, codec)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize(
    "codec", [blockwise_int8(), affine(bits=4)], ids=["codes", "packed"]
)
def test_blocks_that_no_explicit_type_cuts(codec):
    """Of 64 columns on eight devices there are not eight runs; of 680 a short block."""
    mesh = jax.make_mesh((8,), "a", axis_types=(jax.sharding.AxisType.Explicit,))
    for n in (64, 680):
        x = jax.random.normal(jax.random.key(n), (4, n))
        cut = jax.device_put(x, NamedSharding(mesh, P(None, "a")))
        encode = jax.jit(quantize, static_argnums=1)
        found, expected = encode(cut, codec), encode(x, codec)
        jax.tree.map(np.testing.assert_array_equal, found, expected)
        again = jax.jit(dequantize)(found)
        np.testing.assert_array_equal(again, dequantize(expected))
        if codec.bits == 8:
            assert found.codes.sharding == again.sharding == cut.sharding


def test_weights():
    weights = lro.weight_storage("int8", layer_axis=0)
    params, update = gradients(PARAMS, 2)
    key = jax.random.key(1)

    def step(params, update):
        stored = weights.store(params)
        return stored, weights.apply(stored, update, key)

    places = named(auto_mesh(), SPECS)
    stored = jax.eval_shape(weights.store, params)
    out = lro.weight_shardings(stored, params, places)
    cut = jax.device_put((params, update), (places, places))
    found = jax.jit(step, out_shardings=(out, out))(*cut)
    jax.tree.map(np.testing.assert_array_equal, found, jax.jit(step)(params, update))
    codes = found[1]["layers"]["up"].codes
    assert codes.addressable_shards[0].data.shape[-1] == 8
