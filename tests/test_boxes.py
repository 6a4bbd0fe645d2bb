"""What other software puts around parameters, and what of it the state has."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import lowrank_optax as lro
from tests.chosen import each_row
from tests.rows import ROWS, subject

NAMES = {1: ("mlp",), 2: ("embed", "mlp"), 3: ("layers", "embed", "mlp")}


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class Named:
    """An array whose axes have names and sizes, as those of several libraries."""

    array: object
    axes: tuple

    @property
    def dtype(self):
        return self.array.dtype

    @property
    def shape(self):
        return dict(self.axes)

    def tree_flatten(self):
        return (self.array,), self.axes

    @classmethod
    def tree_unflatten(cls, axes, children):
        return cls(children[0], axes)


BOXES = {
    "nnx": lambda x, names: nnx.Param(x, out_sharding=names, eager_sharding=False),
    "linen": nn.Partitioned,
    "logical": nn.LogicallyPartitioned,
    "named": lambda x, names: Named(x, tuple(zip(names, x.shape, strict=True))),
}


def in_boxes(box, params):
    def put(x):
        return BOXES[box](x, NAMES[x.ndim])

    boxed = jax.tree.map(put, params)
    return nnx.State(boxed) if box == "nnx" else boxed


def is_box(node):
    return isinstance(node, (nnx.Variable, nn.Partitioned, Named))


def names_of(box):
    if isinstance(box, nnx.Variable):
        return box.get_metadata().get("out_sharding") or ()
    return [name for name, _ in box.axes] if isinstance(box, Named) else box.names


def array_of(box):
    (array,) = jax.tree.leaves(box)
    return array


@pytest.mark.parametrize("box", BOXES)
@each_row
def test_names_are_those_of_the_state_s_own_axes(row, box):
    """At init and after a step, for every row, by tracing."""
    plain = subject(row).params
    params = jax.eval_shape(lambda: in_boxes(box, plain))
    sizes = {
        jax.tree_util.keystr(path): dict(zip(NAMES[x.ndim], x.shape, strict=True))
        for path, x in jax.tree_util.tree_leaves_with_path(plain)
    }
    tx = optax.with_extra_args_support(ROWS[row].make())
    state = jax.eval_shape(tx.init, params)
    pairs = jax.tree_util.tree_leaves_with_path(state, is_leaf=is_box)
    boxed = [(jax.tree_util.keystr(path), x) for path, x in pairs if is_box(x)]
    for path, x in boxed:
        own = next(known for end, known in sizes.items() if end in path)
        shape, names = array_of(x).shape, names_of(x)
        assert len(names) == len(shape), path
        for name, size in zip(names, shape, strict=True):
            assert name is None or own[name] == size, (path, names, shape)
    updates, after = jax.eval_shape(tx.update, params, state, params)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert jax.tree.structure(updates) == jax.tree.structure(params)


@each_row
def test_a_spec_of_a_parameter_is_given_to_nothing_of_another_kind(row):
    """``optax.tree_map_params``, with which other software makes its layouts."""
    params = subject(row).params
    tx = ROWS[row].make()
    state = jax.eval_shape(tx.init, params)
    specs = jax.tree.map(lambda x: P(*NAMES[x.ndim]), params)

    found = optax.tree_map_params(
        tx,
        lambda _, spec: spec,
        state,
        specs,
        transform_non_params=lambda _: P(),
        is_leaf=lambda x: isinstance(x, optax.MaskedNode),
    )
    for field in ("basis", "pending", "recovery_state", "col", "row", "history"):
        for _, kept in optax.tree_utils.tree_get_all_with_path(found, field):
            assert all(spec == P() for spec in jax.tree.leaves(kept)), field
    for field in ("mu", "nu", "trace"):
        for _, moment in optax.tree_utils.tree_get_all_with_path(found, field):
            # Codes with scales, and means over blocks, are not like the parameter.
            coded = any(part in row for part in ("8bit", "4bit", "q_galore", "even"))
            other = {True, False} if row == "foam" else {coded}  # and vectors are
            assert {spec == P() for spec in jax.tree.leaves(moment)} <= other
    # The layout is one for the state, of which a prefix will do.
    jax.tree.map(lambda spec, part: None, found, state)


class Net(nnx.Module):
    def __init__(self):
        normal = nnx.initializers.normal()
        init = nnx.with_partitioning(normal, ("fsdp", "model"))
        rngs = nnx.Rngs(0)
        self.up = nnx.Linear(32, 64, kernel_init=init, use_bias=False, rngs=rngs)


OPTIMIZERS = {
    "galore": lambda: lro.galore(1e-2, rank=8),
    "fira": lambda: lro.fira(1e-2, rank=8),
    "gwt": lambda: lro.gwt(1e-2),
    "apollo_mini": lambda: lro.apollo_mini(1e-2),
    "adamw_8bit": lambda: lro.adamw_8bit(1e-2, min_size=0),
    "q_galore": lambda: lro.q_galore(1e-2, rank=8, min_size=0),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_sharded_nnx_model(name):
    mesh = jax.make_mesh((4, 2), ("fsdp", "model"), axis_types=(AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        model = Net()
        optimizer = nnx.Optimizer(model, OPTIMIZERS[name](), wrt=nnx.Param)
        state = nnx.state(optimizer, nnx.optimizer.OptState)
        specs = nnx.get_partition_spec(state)
        placed = jax.lax.with_sharding_constraint(state, specs)
        assert jax.tree.structure(placed) == jax.tree.structure(state)
        before = np.asarray(model.up.kernel[...])
        ones = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
        optimizer.update(model, ones)
    assert np.abs(np.asarray(model.up.kernel[...]) - before).max() > 1e-3


def test_specs_in_boxes_are_specs():
    """``nnx.get_partition_spec`` gives them in the variables of the parameters."""
    mesh = jax.make_mesh((4, 2), ("fsdp", "model"), axis_types=(AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        params = nnx.state(Net(), nnx.Param)
        specs = nnx.get_partition_spec(params)
        layout = lro.state_shardings(lro.galore(1e-2, rank=8), params, specs)
    (basis,) = jax.tree.leaves(layout.basis)
    assert basis == P("fsdp")


def test_a_basis_as_large_as_its_parameter_is_no_parameter():
    """Whose an axis is, is never concluded from its size."""
    params = in_boxes("named", {"kernel": jnp.ones((8, 8))})
    tx = lro.galore(1e-2, rank=8, select="kernel")
    state = jax.eval_shape(tx.init, params)
    assert not isinstance(state.basis["kernel"], Named)
    assert state.basis["kernel"].shape == (8, 8)
    assert not isinstance(state.inner_state.mu["kernel"], Named)
