"""States of encoded moments and bases, saved by other software and read again."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx, serialization

import lowrank_optax as lro
from lowrank_optax.quantization import affine, blockwise_int8, is_quantized, quantize
from lowrank_optax.testing import assert_bit_equal
from tests.chosen import kinds_of
from tests.rows import ROWS, subject

# Of every kind of state with something encoded, one row.
ENCODED = ["galore_8bit", "galore_8bit_stacked", "q_galore", "q_galore_stacked"]


def of_msgpack(state, fresh):
    return serialization.from_bytes(fresh, serialization.to_bytes(state))


def of_state_dict(state, fresh):
    return serialization.from_state_dict(fresh, serialization.to_state_dict(state))


def of_pickle(state, fresh):
    del fresh
    return pickle.loads(pickle.dumps(jax.tree.map(np.asarray, state)))


def of_copy(state, fresh):
    del fresh
    return copy.deepcopy(state)


def of_leaves(state, fresh):
    """Arrays alone, by number or path: Equinox, safetensors, the weights of Keras."""
    pairs = jax.tree_util.tree_leaves_with_path(state)
    saved = {jax.tree_util.keystr(path): np.asarray(x) for path, x in pairs}
    assert len(saved) == len(pairs)
    return jax.tree_util.tree_map_with_path(
        lambda path, _: jnp.asarray(saved[jax.tree_util.keystr(path)]), fresh
    )


WAYS = {
    f.__name__: f for f in (of_msgpack, of_state_dict, of_pickle, of_copy, of_leaves)
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("row", ENCODED)
def test_round_trip(row, way):
    assert "SubspaceState" in kinds_of(row)
    one = subject(row)
    params, state = one.run[1]
    assert any(map(is_quantized, jax.tree.leaves(state, is_leaf=is_quantized)))
    again = WAYS[way](state, ROWS[row].make().init(one.params))
    assert jax.tree.structure(again) == jax.tree.structure(state)
    assert_bit_equal(again, state)
    # A program that was made for the one takes the other.
    again = jax.tree.map(jnp.asarray, again)
    assert_bit_equal(one.step(params, again, one.gradients[1]), one.run[2])


class Net(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.up = nnx.Linear(16, 32, rngs=rngs)
        self.embed = nnx.Embed(24, 16, rngs=rngs)


OPTIMIZERS = {
    "galore_8bit": lambda: lro.galore_8bit(1e-3, rank=4, min_size=0),
    "adamw_8bit": lambda: lro.adamw_8bit(1e-3, min_size=0),
    "q_galore": lambda: lro.q_galore(1e-3, rank=4, min_size=0),
    "zeros": lambda: lro.quantize_state(
        optax.scale_by_adam(), mu=affine(bits=4), min_size=0
    ),
}


# Without a target Orbax says that it reads the layout from the checkpoint.
@pytest.mark.filterwarnings("ignore:Sharding info not provided:UserWarning")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_orbax_inside_nnx(name, tmp_path):
    """Standard and PyTree, with and without a target."""

    def state_of(optimizer):
        return nnx.state(optimizer, nnx.optimizer.OptState)

    model = Net()
    optimizer = nnx.Optimizer(model, OPTIMIZERS[name](), wrt=nnx.Param)
    ones = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
    optimizer.update(model, ones)
    state = state_of(optimizer)
    fresh = state_of(nnx.Optimizer(Net(), OPTIMIZERS[name](), wrt=nnx.Param))
    with ocp.StandardCheckpointer() as standard:
        standard.save(tmp_path / "standard", state)
        standard.wait_until_finished()
        found = [standard.restore(tmp_path / "standard", fresh)]
        bare = [standard.restore(tmp_path / "standard")]
    plain = ocp.PyTreeCheckpointer()
    plain.save(tmp_path / "tree", state)
    arguments = ocp.checkpoint_utils.construct_restore_args(fresh)
    found.append(plain.restore(tmp_path / "tree", item=fresh, restore_args=arguments))
    bare.append(plain.restore(tmp_path / "tree"))
    for again in found:
        assert_bit_equal(again, state)
    for again in bare:
        assert_bit_equal(jax.tree.leaves(again), jax.tree.leaves(state))


def test_an_encoded_array_says_what_it_stands_for():
    x = jnp.linspace(-1, 1, 96).reshape(2, 6, 8)
    found = quantize(x, affine(bits=4, group=4))
    assert (found.shape, found.ndim, found.size) == ((2, 6, 8), 3, 96)
    assert found.dtype == found.decode().dtype == jnp.float32
    assert found._fields == ("codes", "scales", "zeros")
    other = quantize(x, blockwise_int8(4))
    assert (other._fields, other.zeros) == (("codes", "scales"), ())
    assert pickle.loads(pickle.dumps(type(found))) is type(found)
    structure = jax.tree.structure({"x": found})
    assert pickle.loads(pickle.dumps(structure)) == structure
    # One class for a codec and a shape: two arrays are one structure.
    same = quantize(x + 1, affine(bits=4, group=4))
    assert jax.tree.structure(found) == jax.tree.structure(same)
    assert jax.tree.structure(found) != jax.tree.structure(other)
