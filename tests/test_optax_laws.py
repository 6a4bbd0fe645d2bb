"""Every method under every Optax wrapper, tree and life cycle: rows x laws."""

import functools
import inspect
import itertools

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
from lowrank_optax.testing._programs import by_place
from lowrank_optax.testing._subject import step_of
from tests.chosen import (
    COMPILED,
    case,
    chosen,
    each_kind,
    each_row,
    kinds_of,
    laws,
    usual,
)
from tests.rows import GAP, NOT_INSIDE, RAW, ROWS, subject


@pytest.mark.parametrize(
    ("row", "law"), [case(row, law) for row in ROWS for law in laws(row)]
)
def test_law(row, law):
    LAWS[law](subject(row))


@each_row
def test_hyperparameters_may_be_traced(row):
    """What `inject_hyperparams` needs of a factory, without a program."""
    make = optax.inject_hyperparams(
        ROWS[row].make, static_args=lro.static_args(ROWS[row].make)
    )
    tx, one = make(learning_rate=0.5), subject(row)
    state = jax.eval_shape(tx.init, one.params)
    _, after = jax.eval_shape(tx.update, one.gradients[0], state, one.params)
    assert_state_stable(state, after)


# --- which row stands under which law -------------------------------------------------


def test_chosen_rows_have_every_kind_of_state():
    def kinds(rows):
        return frozenset().union(*map(kinds_of, rows))

    assert kinds(chosen()) == kinds(ROWS)
    assert len(chosen()) < len(ROWS) / 2
    found = {kind for kind in kinds(ROWS) if isinstance(kind, str)}
    assert len(found) > 5


def test_the_usual_rows_have_every_method():
    assert {ROWS[row].make.func for row in usual()} == {
        row.make.func for row in ROWS.values()
    }


def test_every_law_holds_every_row_or_every_kind():
    assert set(LAWS) > COMPILED
    assert all(set(laws(row)) == set(LAWS) for row in chosen())
    assert all(set(laws(row)) >= set(LAWS) - COMPILED for row in ROWS)


# --- accumulation inside the bracket -------------------------------------------------


@pytest.mark.parametrize("row", [case(row) for row in chosen() if ROWS[row].inner])
def test_multi_steps_inside(row):
    """Two equal halves are one whole, and nothing happens in between."""
    accumulate = optax.MultiSteps(ROWS[row].inner, 2).gradient_transformation()
    tx = ROWS[row].make(base_optimizer=accumulate, weight_decay=None)
    one = Subject(
        functools.partial(ROWS[row].make, weight_decay=None), ROWS[row].params
    )
    if one.written == subject(row).written:
        one = subject(row)  # it has no decay: the plain run serves
    halves = jax.jit(step_of(tx))
    params, state = one.params, tx.init(one.params)
    for gradient, (expected, _) in zip(one.gradients, one.run[1:], strict=True):
        before = params
        params, state = halves(params, state, gradient)
        assert_bit_equal(params, before)
        params, state = halves(params, state, gradient)
        # The mean of two equal numbers is exact; what is left is another program's
        # order of operations. A turn of moments that are kept in bfloat16 comes at the
        # first half, and is rounded by itself: a unit there in steps of size 1e-2.
        atol = 1e-7 if row != "subtrack_bf16" else len(one.gradients) * 1e-2 * 2**-8
        chex.assert_trees_all_close(params, expected, rtol=1e-5, atol=atol)
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


ADAM = optax.scale_by_adam()
AUTHORS = ("galore", "fira")
EVERY = 3


def hosts():
    """Methods that host an accumulation, under either order of the decay."""
    rows = []
    for name, method in lro.METHODS.items():
        taken = inspect.signature(method.factory).parameters
        if "base_optimizer" in taken and method.factory not in NOT_INSIDE:
            rows.append(pytest.param(name, "optax", id=name))
    return [*rows, *(pytest.param(n, "authors", id=f"{n}_authors") for n in AUTHORS)]


@pytest.mark.parametrize(("name", "conventions"), hosts())
def test_decay_behind_an_accumulation_is_once_per_step(name, conventions):
    """Only the decay moves the weights, and its schedule counts real steps."""
    factory = lro.METHODS[name].factory
    taken = inspect.signature(factory).parameters
    options = {"rank": 2, "weight_decay": 0.5, "conventions": conventions}
    options = {key: x for key, x in options.items() if key in taken}
    inner = optax.MultiSteps(RAW if conventions == "authors" else ADAM, EVERY)
    tx = factory(
        lambda count: 0.1 / (1.0 + count),
        base_optimizer=inner.gradient_transformation(),
        **options,
    )
    params = {"kernel": jnp.ones((16, 12))}
    zero, state = jax.tree.map(jnp.zeros_like, params), tx.init(params)
    step, found = jax.jit(step_of(tx)), []
    for _ in range(2 * EVERY):
        params, state = step(params, state, zero)
        found.append(params["kernel"][0, 0])
    first, second = 1 - 0.1 * 0.5, (1 - 0.1 * 0.5) * (1 - 0.05 * 0.5)
    want = [1, 1, first, first, first, second]
    np.testing.assert_allclose(found, want, rtol=1e-6)


def test_what_stands_behind_follows_the_bracket():
    """A skipped micro-batch is no step either, and updates in between are zero."""
    skip = optax.MultiSteps(ADAM, 2, should_skip_update_fn=optax.skip_not_finite)
    parts = lro.project(lro.svd(2, 3), select="."), skip, lro.backproject()
    rate = optax.scale_by_learning_rate(lambda count: 1.0 / (1.0 + count))
    tx = lro.behind(lro.chain(*parts), optax.add_decayed_weights(0.1), rate)
    reference = optax.chain(
        lro.chain(parts[0], ADAM, parts[2]), optax.add_decayed_weights(0.1), rate
    )
    params = {"kernel": jnp.ones((8, 6))}
    gradient = {"kernel": jax.random.normal(jax.random.key(0), (8, 6))}
    bad = {"kernel": jnp.full((8, 6), jnp.nan)}
    run, plain = (jax.jit(t.update) for t in (tx, reference))
    state, known = tx.init(params), reference.init(params)
    for step in range(2):
        for micro in (bad, gradient, bad):
            updates, state = run(micro, state, params)
            assert not np.any(updates["kernel"])
        updates, state = run(gradient, state, params)
        expected, known = plain(gradient, known, params)
        # Another program: the mean of two equal gradients is exact.
        chex.assert_trees_all_close(updates, expected, rtol=1e-5, atol=1e-6)
        assert int(state[0].count) == int(state[2].count) == step + 1


@pytest.mark.parametrize("where", ["inner", "full"])
def test_two_times_behind_a_bracket_are_refused(where):
    every = optax.MultiSteps(ADAM, 2)
    inner, full = (every, ADAM) if where == "inner" else (ADAM, every)
    inner, full = (
        x.gradient_transformation() if isinstance(x, optax.MultiSteps) else x
        for x in (inner, full)
    )
    bracket = lro.chain(lro.project(lro.svd(2), full=full), inner, lro.backproject())
    tx = lro.behind(bracket, optax.add_decayed_weights(0.1))
    with pytest.raises(ValueError, match=r"accumulates gradients and .* does not"):
        tx.init({"kernel": jnp.ones((8, 6)), "bias": jnp.zeros(6)})


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


def run_on(row, params, gradients):
    """Runs a row on another kind of tree; returns the parameters and the state.

    Where the plain run's numbers meet the plain run's expressions, leaf by leaf, the
    result is what that run gave: nothing is compiled.
    """
    plain = subject(row)
    tx = optax.with_extra_args_support(ROWS[row].make())
    start = params, tx.init(params)
    beside = plain.beside(tx, (*start, gradients[0]), by_place)
    same = beside.runs_as_plain
    for ours, theirs in zip(gradients, plain.gradients, strict=True):
        same = same and all(map(np.array_equal, *map(jax.tree.leaves, (ours, theirs))))
    if same:
        treedef = jax.tree.structure(beside.out[:2])
        params, state = treedef.unflatten(jax.tree.leaves(plain.run[-1]))
    else:
        step, (params, state) = jax.jit(step_of(tx)), start
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


@each_kind
def test_orbax_round_trip(row, tmp_path):
    """What was saved continues bit for bit, through a refresh."""
    one, step = subject(row), 1
    assert step < GAP < len(one.gradients)
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
    costly = {"inject_hyperparams", "odd_leaves", "pmap", "no_jit"}
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


def with_neighbours(updates, state, params=None):
    mean = sum(jnp.sum(u) for u in jax.tree.leaves(updates)) / 10
    updates, state = momentum().update(updates, state, params)
    return jax.tree.map(lambda u: u + mean, updates), state


@pytest.mark.parametrize("law", ["masked", "partition"])
def test_laws_see_a_leaf_that_depends_on_its_neighbours(law):
    with pytest.raises(AssertionError, match=r"not almost equal|Not equal"):
        LAWS[law](Subject(broken(with_neighbours)))


@pytest.mark.parametrize("law", ["chain", "partition"])
def test_laws_see_a_start_that_differs(law):
    starts = itertools.count()

    def init(params):
        start, shift = momentum().init(params), next(starts)
        return jax.tree.map(lambda x: x + shift, start)

    with pytest.raises(AssertionError, match=r"not almost equal|Not equal"):
        LAWS[law](
            Subject(lambda: optax.GradientTransformation(init, momentum().update))
        )


@pytest.mark.parametrize("law", ["chain", "masked", "partition", "scan", "pmap"])
def test_laws_see_a_trace_that_differs(law):
    traces = itertools.count(1)

    def update(updates, state, params=None):
        factor = next(traces)
        updates, state = momentum().update(updates, state, params)
        return jax.tree.map(lambda u: factor * u, updates), state

    with pytest.raises(AssertionError, match=r"not almost equal|Not equal"):
        LAWS[law](Subject(broken(update)))


def test_the_law_of_donation_sees_a_buffer_in_two_places():
    def init(params):
        zeros = jnp.zeros(3)
        return zeros, zeros

    def make():
        return optax.GradientTransformation(init, lambda u, s, p=None: (u, s))

    with pytest.raises(AssertionError, match="a buffer stands in two places"):
        LAWS["donation"](Subject(make))
