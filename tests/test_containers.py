"""Parameters in mappings, modules and tuples of other software."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import FrozenDict

import lowrank_optax as lro
from tests.test_layerwise import batches, block, embed, head, make_params


class Tuple(NamedTuple):
    embed: Any
    layers: Any
    head: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Module:
    """Can be called, as a module of Equinox can, and is a tree all the same."""

    embed: Any
    layers: Any
    head: Any

    def __call__(self, x):
        raise AssertionError("A tree was taken for a function.")


CONTAINERS = {
    "frozen": FrozenDict,
    "state": lambda tree: nnx.State(jax.tree.map(nnx.Param, tree)),
    "tuple": lambda tree: Tuple(**tree),
    "module": lambda tree: Module(**tree),
}


def optimizer():
    return lro.galore(1e-2, rank=4, layer_axis=0)


@pytest.mark.parametrize("name", CONTAINERS)
def test_a_layer_wise_step_gives_back_what_it_was_given(name):
    tx, (batch, *_) = optimizer(), batches(1)
    step = jax.jit(lro.layerwise.train_step(embed, block, head, tx))
    plain = make_params()
    expected, *_ = step(plain, tx.init(plain), batch)
    params = CONTAINERS[name](plain)
    state = tx.init(params)
    found, after, _ = step(params, state, batch)
    assert type(found) is type(params)
    assert jax.tree.structure((found, after)) == jax.tree.structure((params, state))
    # Leaves have another order where the fields do.
    for part in ("embed", "layers", "head"):
        own = found[part] if hasattr(found, "keys") else getattr(found, part)
        pairs = zip(jax.tree.leaves(own), jax.tree.leaves(expected[part]), strict=True)
        for x, y in pairs:
            np.testing.assert_allclose(x, y, rtol=0, atol=1e-6)


SHAPES = {
    "embed": jax.ShapeDtypeStruct((64, 16), jnp.float32),
    "layers": jax.ShapeDtypeStruct((32, 16), jnp.float32),
    "head": jax.ShapeDtypeStruct((16, 16), jnp.float32),
}


def test_a_module_of_dimension_numbers_is_a_tree():
    params = Module(**SHAPES)
    numbers = Module(None, lro.MatrixDimensionNumbers(0, 1), None)
    tx = lro.galore(1e-2, rank=4, weight_dimension_numbers=numbers)
    state = jax.eval_shape(tx.init, params)
    assert state.basis.layers.shape == (16, 4)
    assert isinstance(state.basis.embed, optax.MaskedNode)


@pytest.mark.parametrize("make", [Module, Tuple, dict])
def test_a_tree_of_flags_selects(make):
    params, flags = make(**SHAPES), make(embed=False, layers=True, head=False)
    tx = lro.galore(1e-2, rank=4, select=flags)
    state = jax.eval_shape(tx.init, params)
    bases = jax.tree.leaves(state.basis)
    assert [x.shape for x in bases] == [(16, 4)]


def test_a_module_as_mask_is_a_tree():
    params = jax.tree.map(lambda x: jnp.ones(x.shape), Module(**SHAPES))
    mask = Module(embed=False, layers=True, head=False)
    zeros = jax.tree.map(jnp.zeros_like, params)
    for tx in (
        lro.adamw_8bit(1e-2, weight_decay=0.1, mask=mask),
        lro.galore(1e-2, rank=4, weight_decay=0.1, mask=mask),
    ):
        updates, _ = tx.update(zeros, tx.init(params), params)
        moved = [bool(jnp.any(x)) for x in (updates.embed, updates.layers)]
        assert moved == [False, True]


def test_a_tree_of_something_else_is_refused():
    tx = lro.galore(1e-2, rank=4, select=dict.fromkeys(SHAPES, 1.0))
    with pytest.raises(TypeError, match="True or False for every leaf"):
        jax.eval_shape(tx.init, SHAPES)
