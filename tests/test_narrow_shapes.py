"""Matrices of one row, one column, one element or none, and of full rank."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_optax as lro
from lowrank_optax.testing._subject import gradients_like, step_of

GAP = 2
SHAPES = {
    "row": (1, 6), "column": (6, 1), "one": (1, 1), "none": (0, 6), "empty": (6, 0),
    "wide": (3, 5), "tall": (5, 3), "square": (3, 3), "stack": (2, 1, 4),
}  # fmt: skip


def params():
    return {name: jnp.ones(shape) for name, shape in SHAPES.items()}


def optimizer(name):
    """The method on every leaf, at min(m, n) where its rank is larger."""
    factory = lro.METHODS[name].factory
    options = {"rank": 3, "update_proj_gap": GAP, "select": ".", "clip_rank": True}
    options |= {
        "level": 1,
        "min_size": 0,
        "bits": 8,
        "block": 4,
        "basis_group": 4,
        "layer_axis": 0,
    }
    taken = inspect.signature(factory).parameters
    if name == "apollo_mini":
        options["rank"] = 1
    return factory(1e-2, **{k: v for k, v in options.items() if k in taken})


@pytest.mark.parametrize("name", lro.METHODS)
def test_types_of_narrow_shapes(name):
    """Traced alone: a step of what `init` gives takes and gives the same types."""
    tx = optimizer(name)
    state = jax.eval_shape(tx.init, params())
    after = jax.eval_shape(step_of(tx), params(), state, params())
    assert jax.tree.structure(after) == jax.tree.structure((params(), state))
    shapes = [(x.shape, x.dtype) for x in jax.tree.leaves(after)]
    assert shapes == [(x.shape, x.dtype) for x in jax.tree.leaves((params(), state))]
    # What Orbax cannot save: an array without elements.
    assert all(0 not in x.shape for x in jax.tree.leaves(state))


@pytest.mark.slow
@pytest.mark.parametrize("name", lro.METHODS)
def test_steps_of_narrow_shapes(name):
    tx = optimizer(name)
    step, run = jax.jit(step_of(tx)), (params(), tx.init(params()))
    for number in range(2 * GAP + 1):
        before, run = run[0], step(*run, gradients_like(params(), number))
        for path, leaf in jax.tree_util.tree_leaves_with_path(run):
            assert np.isfinite(np.asarray(leaf)).all(), jax.tree_util.keystr(path)
        for leaf, old in zip(*map(jax.tree.leaves, (run[0], before)), strict=True):
            assert leaf.size == 0 or np.any(np.asarray(leaf) != np.asarray(old))
        assert max(float(jnp.abs(p).max(initial=0)) for p in run[0].values()) < 5
    assert step._cache_size() == 1
