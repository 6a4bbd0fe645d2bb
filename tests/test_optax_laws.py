"""Every method under every Optax wrapper, tree and life cycle: rows x laws."""

import functools
import re

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import lowrank_optax as lro
from lowrank_optax.testing import (
    LAWS,
    Subject,
    assert_bit_equal,
    assert_laws,
    assert_state_stable,
)
from lowrank_optax.testing._subject import step_of
from tests.chosen import CHOSEN, COVER, METHODS, NEWEST, case, each_row, laws
from tests.rows import GAP, ROWS, subject


@pytest.mark.parametrize(
    ("row", "law"), [case(row, law) for row in ROWS for law in laws(row)]
)
def test_law(row, law):
    LAWS[law](subject(row))


@each_row
def test_no_buffer_stands_in_two_places(row):
    """What the law of donation needs of a state at the start, without a program."""
    params = jax.tree.map(jnp.copy, subject(row).params)
    leaves = jax.tree.leaves((params, subject(row).tx.init(params)))
    places = [leaf.unsafe_buffer_pointer() for leaf in leaves]
    assert len(set(places)) == len(places)


# --- which row stands under which law -------------------------------------------------


def kinds(node):
    """The project's own kinds of state in a state."""
    own = {type(node)} if type(node).__module__.startswith("lowrank_optax") else set()
    inside = node.values() if isinstance(node, dict) else node
    if isinstance(node, dict | tuple | list):
        return own.union(*map(kinds, inside))
    return own


def kinds_of(rows):
    states = (jax.eval_shape(subject(r).tx.init, subject(r).params) for r in rows)
    return set().union(*map(kinds, states))


def test_chosen_rows_have_every_kind_of_state():
    assert {*METHODS, *COVER} <= set(ROWS)
    assert len(kinds_of(COVER)) > 5
    assert kinds_of(COVER) == kinds_of(ROWS)


def test_chosen_rows_have_every_method():
    def methods(rows):
        return {ROWS[row].make.func for row in rows}

    assert methods(METHODS) == methods(NEWEST) == methods(ROWS)


def test_every_law_holds_some_row():
    assert {law for row in METHODS for law in laws(row)} >= {
        *("state_stable", "chain", "masked", "inject_hyperparams", "no_jit")
    }
    assert all(set(laws(row)) == set(LAWS) for row in COVER)


# --- accumulation inside the bracket -------------------------------------------------


@pytest.mark.parametrize("row", [case(row) for row in CHOSEN if ROWS[row].inner])
def test_multi_steps_inside(row):
    """Two equal halves are one whole, and nothing happens in between."""
    accumulate = optax.MultiSteps(ROWS[row].inner, 2).gradient_transformation()
    tx = ROWS[row].make(base_optimizer=accumulate, weight_decay=None)
    plain = ROWS[row].make(weight_decay=None)
    halves, whole = jax.jit(tx.update), jax.jit(plain.update)
    params = subject(row).params
    state, expected_state = tx.init(params), plain.init(params)
    for gradient in subject(row).gradients:
        nothing, state = halves(gradient, state, params)
        assert all(not np.any(u) for u in jax.tree.leaves(nothing))
        update, state = halves(gradient, state, params)
        expected, expected_state = whole(gradient, expected_state, params)
        # The mean of two equal numbers is exact; what is left is another program's
        # order of operations.
        chex.assert_trees_all_close(update, expected, rtol=1e-5, atol=1e-7)
    bracket = optax.tree_utils.tree_get(state, "SubspaceState")
    assert int((state if bracket is None else bracket).count) == len(
        subject(row).gradients
    )


def test_multi_steps_inside_keeps_the_basis_of_an_accumulation():
    tx = lro.scale_by_galore(
        projector=lro.svd(2, 1),
        base_optimizer=optax.MultiSteps(optax.identity(), 3).gradient_transformation(),
    )
    params = jnp.ones((12, 6))
    state, bases = tx.init(params), []
    for seed in range(6):
        gradient = jax.random.normal(jax.random.key(seed), params.shape)
        _, state = jax.jit(tx.update)(gradient, state)
        bases.append(state.basis)
    for step in (1, 2, 4, 5):
        assert_bit_equal(bases[step], bases[step - 1])
    assert np.any(bases[3] != bases[2])


# --- extra arguments -----------------------------------------------------------------


def test_extra_args_reach_the_inner_and_the_full_transformation():
    seen = []

    def update(updates, state, params=None, **extra_args):
        seen.append(extra_args)
        return updates, state

    probe = optax.GradientTransformationExtraArgs(lambda p: optax.EmptyState(), update)
    bracket = lro.project(lro.svd(2), full=probe, select="kernel")
    tx = optax.chain(lro.chain(bracket, probe, lro.backproject()), optax.identity())
    params = {"kernel": jnp.ones((12, 6)), "bias": jnp.ones(6)}
    tx.update(params, tx.init(params), params, value=jnp.float32(3.0))
    inner, full = seen
    assert inner["value"] == full["value"] == 3.0
    view = inner["subspace"]
    assert view.basis["kernel"].shape == (6, 2)
    assert view.params["kernel"].shape == view.gradient["kernel"].shape == (6, 12)
    assert view.projected["kernel"].shape == (2, 12)
    assert view.matrices["kernel"].transposed
    assert view.basis["bias"] is None
    assert "subspace" not in full


# --- trees of Flax -------------------------------------------------------------------


@functools.cache
def plain_program(row):
    """What the plain run's step is compiled from."""
    (params, state), gradient = subject(row).run[0], subject(row).gradients[0]
    return text_of(subject(row).step.lower(params, state, gradient))


def text_of(lowered):
    """A program without the names of its results, which tell the tree."""
    return re.sub(r'jax.result_info = "[^"]*"', "", lowered.as_text())


def run_on(row, params, gradients):
    """Runs a row on another kind of tree; returns the parameters and the state.

    The plain run's program on the plain run's numbers, leaf by leaf, gives what that
    run gave: it is not compiled again.
    """
    plain = subject(row)
    tx = optax.with_extra_args_support(ROWS[row].make())
    step, start = jax.jit(step_of(tx)), (params, tx.init(params))
    lowered = step.lower(*start, gradients[0])
    same = text_of(lowered) == plain_program(row)
    for ours, theirs in ((start, plain.run[0]), (gradients, plain.gradients)):
        same = same and all(map(np.array_equal, *map(jax.tree.leaves, (ours, theirs))))
    if same:
        treedef = jax.tree.structure(lowered.out_info)
        params, state = treedef.unflatten(jax.tree.leaves(plain.run[-1]))
    else:
        params, state = start
        for gradient in gradients:
            params, state = step(params, state, gradient)
    assert_state_stable(start[1], state)
    return params, state


@each_row
def test_nnx_state(row):
    def state(tree):
        return nnx.State(jax.tree.map(nnx.Param, tree))

    gradients = [state(g) for g in subject(row).gradients]
    params, _ = run_on(row, state(subject(row).params), gradients)
    assert isinstance(params, nnx.State)
    # The same program on the same numbers, in another container.
    chex.assert_trees_all_close(
        jax.tree.leaves(params), jax.tree.leaves(subject(row).final), rtol=1e-5
    )


# Several of them keep a tuple for every parameter, which nnx returns as a mapping.
NNX = {
    "galore": lambda: lro.galore(1e-2, rank=2),
    "galore both": lambda: lro.galore(1e-2, rank=2, side="both"),
    "osd": lambda: lro.online_subspace_descent(1e-2, rank=2),
    "q_galore": lambda: lro.q_galore(1e-2, rank=2, min_size=0),
    "frugal": lambda: lro.frugal(1e-2, rank=2, state_free=optax.trace(0.9)),
}


@pytest.mark.parametrize("name", NNX)
def test_nnx_optimizer(name):
    model = nnx.Linear(12, 6, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, NNX[name](), wrt=nnx.Param)
    before = jax.tree.map(jnp.copy, nnx.state(model, nnx.Param))
    params = {"bias": model.bias[...], "kernel": model.kernel[...]}
    params = jax.tree.map(jnp.copy, params)

    def loss(model):
        return jnp.sum(model(jnp.eye(12)) ** 2)

    def plain_loss(params):
        return jnp.sum((params["kernel"] + params["bias"]) ** 2)

    tx = NNX[name]()
    state, update = tx.init(params), jax.jit(tx.update)
    step = nnx.jit(lambda m, o: o.update(m, nnx.grad(loss)(m)))
    start = loss(model)
    for _ in range(3):
        step(model, optimizer)
        updates, state = update(jax.grad(plain_loss)(params), state, params)
        params = optax.apply_updates(params, updates)
    assert loss(model) < start
    chex.assert_trees_all_equal_structs(before, nnx.state(model, nnx.Param))
    # Another program's order of operations, through three steps of Adam.
    np.testing.assert_allclose(model.kernel[...], params["kernel"], atol=1e-5)


NAMES = {1: ("mlp",), 2: ("embed", "mlp"), 3: ("layers", "embed", "mlp")}


def boxed(tree):
    """Flax Linen's parameters with logical axis names."""

    def box(path, leaf):
        names = NAMES[leaf.ndim]
        if path[-1].key == "bias" and leaf.ndim == 2:
            names = ("layers", "mlp")
        return nn.LogicallyPartitioned(leaf, names)

    return jax.tree_util.tree_map_with_path(box, tree)


@each_row
def test_linen_boxes(row):
    gradients = [boxed(g) for g in subject(row).gradients]
    params, state = run_on(row, boxed(subject(row).params), gradients)
    chex.assert_trees_all_close(
        nn.meta.unbox(params), subject(row).final, rtol=1e-5, atol=1e-6
    )
    assert jax.tree.leaves(params, is_leaf=is_box)[0].names is not None
    for leaf in jax.tree.leaves(state, is_leaf=is_box):
        if is_box(leaf):
            # One name for every axis, so that nn.get_partition_spec can read it.
            assert len(leaf.names) == leaf.value.ndim


def is_box(leaf):
    return isinstance(leaf, nn.LogicallyPartitioned)


def test_boxes_leave_the_rank_axis_unnamed():
    params = boxed(subject("galore_stacked").params)
    tx = ROWS["galore_stacked"].make()
    state = jax.eval_shape(tx.init, params)
    basis = state.basis["layers"]["kernel"]
    assert (basis.names, basis.value.shape) == (("layers", "mlp", None), (3, 6, 2))
    mu = optax.tree_utils.tree_get(state, "mu")
    moment = mu["layers"]["kernel"]
    assert (moment.names, moment.value.shape) == (("layers", None, "embed"), (3, 2, 12))
    assert mu["layers"]["bias"].names == ("layers", "mlp")
    specs = nn.get_partition_spec(state)
    assert specs.basis["out"]["kernel"] == jax.sharding.PartitionSpec("embed", None)


# --- checkpoints ---------------------------------------------------------------------


@pytest.mark.parametrize("row", COVER)
@pytest.mark.parametrize("step", [1, GAP], ids=["plain", "before_a_refresh"])
def test_orbax_round_trip(row, step, tmp_path):
    """What was saved continues bit for bit."""
    one = subject(row)
    params, state = one.run[step]
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", (params, state))
        checkpointer.wait_until_finished()
        shapes = jax.eval_shape(lambda: (one.params, one.tx.init(one.params)))
        shapes = jax.tree.map(with_device, shapes)
        params, state = checkpointer.restore(tmp_path / "checkpoint", shapes)
    assert_bit_equal((params, state), one.run[step])
    for gradient, expected in zip(
        one.gradients[step:], one.run[step + 1 :], strict=True
    ):
        params, state = one.step(params, state, gradient)
        assert_bit_equal((params, state), expected)


def with_device(shape):
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=device)


# --- the suite itself ----------------------------------------------------------------


momentum = functools.partial(optax.sgd, learning_rate=1e-2, momentum=0.9)


def broken(update):
    """SGD with another update."""
    return lambda: optax.GradientTransformation(momentum().init, update)


def with_other_dtype(updates, state, params=None):
    return updates, jax.tree.map(lambda x: x.astype(jnp.bfloat16), state)


def test_laws_hold_for_optax_itself():
    costly = {"inject_hyperparams", "odd_leaves", "pmap", "partition", "no_jit"}
    # Its momentum takes the gradient's dtype: design of ours, not of Optax.
    assert_laws(momentum, costly | {"mixed_dtypes"})


@pytest.mark.parametrize("law", ["state_stable", "one_trace", "mixed_dtypes"])
def test_laws_see_a_state_that_changes_its_type(law):
    with pytest.raises((AssertionError, TypeError)):
        LAWS[law](momentum if law == "mixed_dtypes" else broken(with_other_dtype))


def test_laws_see_a_step_that_remembers_its_calls():
    calls = []

    def update(updates, state, params=None):
        calls.append(None)
        return jax.tree.map(lambda u: u * len(calls), updates), state

    for law in ("chain", "no_jit"):
        with pytest.raises(AssertionError):
            LAWS[law](Subject(broken(update)))
