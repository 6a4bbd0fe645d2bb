"""Where state is made, and that a step is compiled once from there."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import lowrank_optax as lro
from tests.chosen import each_kind, each_row
from tests.distributed.cases import AXES
from tests.rows import ROWS, subject

KINDS = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}


def mesh_of(kind):
    return jax.make_mesh((4, 2), AXES, axis_types=(KINDS[kind],) * 2)


def spec_of(x):
    """Cuts the last axis over "model" and, where it can be, the first over "data"."""
    first = "data" if x.ndim > 1 and x.shape[0] % 4 == 0 else None
    last = "model" if x.ndim and x.shape[-1] % 2 == 0 else None
    return P(*[first, *[None] * (x.ndim - 2), last][-x.ndim :]) if x.ndim else P()


def layout_of(mesh, params):
    return jax.tree.map(lambda x: NamedSharding(mesh, spec_of(x)), params)


def types(tree):
    """The spec in the type of every array, None where there is no mesh in it."""
    pairs = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(k): getattr(x.sharding, "spec", None) for k, x in pairs
    }


@each_row
def test_types_stay_on_an_explicit_mesh(row):
    """By tracing: what a step returns has the types that it was given."""
    params, tx = subject(row).params, optax.with_extra_args_support(ROWS[row].make())
    untyped = jax.eval_shape(tx.init, params)
    mesh = mesh_of("explicit")
    with jax.set_mesh(mesh):
        layout = lro.state_shardings(tx, params, layout_of(mesh, params))
        typed = jax.tree.map(with_type, params, layout_of(mesh, params))
        told = jax.tree.map(with_type, untyped, layout)
        for state in (told, jax.eval_shape(tx.init, typed), untyped):
            updates, after = jax.eval_shape(tx.update, typed, state, typed)
            assert types(updates) == types(jax.eval_shape(lambda x: x, typed))
            for path, spec in types(after).items():
                # What had no type has that of a fresh state.
                assert spec == types(told)[path], path
                assert types(state)[path] in (None, spec), path


def with_type(x, place):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)


@each_row
def test_specs_are_spelled_as_jit_spells_them(row):
    params, tx = subject(row).params, ROWS[row].make()
    for kind in KINDS:
        mesh = mesh_of(kind)
        layout = lro.state_shardings(tx, params, layout_of(mesh, params))
        shapes = jax.eval_shape(tx.init, params)
        for place, x in zip(*map(jax.tree.leaves, (layout, shapes)), strict=True):
            if kind == "explicit":
                assert len(place.spec) == x.ndim
            else:
                assert not place.spec or place.spec[-1] is not None
            place.shard_shape(x.shape)  # raises where an axis cannot be cut so


@each_kind
def test_a_program_gives_back_the_layout_that_it_takes(row):
    """On automatic axes the compiler chooses; a second layout is a second program."""
    params, tx = subject(row).params, optax.with_extra_args_support(ROWS[row].make())
    mesh = mesh_of("auto")
    with jax.set_mesh(mesh):
        places = layout_of(mesh, params)
        layout = lro.state_shardings(tx, params, places)
        typed = jax.tree.map(with_type, params, places)
        state = jax.tree.map(with_type, jax.eval_shape(tx.init, params), layout)

        def step(params, state):
            updates, state = tx.update(params, state, params)
            return optax.apply_updates(params, updates), state

        compiled = jax.jit(step).lower(typed, state).compile()
    _, after = compiled.output_shardings
    assert types_of(after) == types_of(layout)


def factored(momentum):
    """Adafactor, which keeps sums over rows and columns, of small matrices, too."""
    return optax.adafactor(1e-2, min_dim_size_to_factor=2, momentum=momentum)


# One for every kind of array that a state has.
COMPILED = {
    "adam": lambda: optax.adam(1e-2),
    "galore": lambda: lro.galore(1e-2, projector=lro.svd(4)),
    "galore_8bit": lambda: lro.galore_8bit(1e-2, projector=lro.svd(4), min_size=0),
    "ldadam": lambda: lro.ldadam(1e-2, rank=4, error_feedback=True),
    "gwt": lambda: lro.gwt(1e-2, level=1),
    "adamw_8bit": lambda: lro.adamw_8bit(1e-2, min_size=0),
    "adafactor": lambda: lro.chain(
        lro.project(lro.svd(4), select="kernel"), factored(0.9), lro.backproject()
    ),
    "adafactor_of_basis": lambda: lro.online_subspace_descent(
        1e-2, rank=4, basis_optimizer=factored(None)
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", COMPILED)
def test_one_program(name, kind):
    """From the layout, from a restore into it, and from an eager init."""
    mesh, tx = mesh_of(kind), COMPILED[name]()
    shapes = {"kernel": jnp.ones((32, 64)), "bias": jnp.ones(64)}
    with jax.set_mesh(mesh):
        places = {
            "kernel": NamedSharding(mesh, P("data", "model")),
            "bias": NamedSharding(mesh, P("model")),
        }
        start = jax.device_put(shapes, places)
        layout = lro.state_shardings(tx, start, places)
        first = jax.jit(tx.init, out_shardings=layout)(start)
        restored = jax.device_put(jax.tree.map(np.asarray, first), layout)

        @jax.jit
        def step(params, state):
            updates, state = tx.update(params, state, params)
            return optax.apply_updates(params, updates), state

        for state in (first, restored, tx.init(start)):
            params = start
            for _ in range(2):
                params, state = step(params, state)
        assert step._cache_size() == 1


@pytest.mark.parametrize("kind", KINDS)
def test_an_eager_init_lies_where_the_helper_says(kind):
    mesh, tx = mesh_of(kind), COMPILED["galore"]()
    places = {"kernel": NamedSharding(mesh, P("data", "model"))}
    params = jax.device_put({"kernel": jnp.ones((32, 64))}, places)
    state = tx.init(params)
    where = jax.tree.map(lambda x: x.sharding, state)
    assert types_of(where) == types_of(lro.state_shardings(tx, params, places))


def types_of(layout):
    pairs = jax.tree_util.tree_leaves_with_path(layout)
    return {jax.tree_util.keystr(path): place for path, place in pairs}


def test_state_follows_its_owner():
    """Into its memory and onto its mesh; counters go to the largest."""
    devices = np.array(jax.devices())
    mesh, one = Mesh(devices, ("fsdp",)), Mesh(devices[:4], ("fsdp",))
    two = Mesh(devices.reshape(2, 4), ("fsdp", "expert"))
    params = {name: jnp.ones((64, 32)) for name in ("embed", "kernel", "stage", "moe")}
    places = {
        "embed": NamedSharding(mesh, P("fsdp"), memory_kind="pinned_host"),
        "kernel": NamedSharding(mesh, P("fsdp"), memory_kind="device"),
        "stage": NamedSharding(one, P("fsdp")),
        "moe": NamedSharding(two, P("expert", "fsdp")),
    }
    for name in ("adam", "galore", "adamw_8bit"):
        layout = lro.state_shardings(COMPILED[name](), params, places)
        for path, place in types_of(layout).items():
            own = [key for key in places if f"'{key}'" in path]
            if own:
                assert place.mesh == places[own[0]].mesh, path
                assert place.memory_kind == places[own[0]].memory_kind, path
            else:
                assert place.is_fully_replicated and place.mesh.size == 8, path
                assert place.memory_kind != "pinned_host", path


@pytest.mark.parametrize("name", ["galore", "adamw_8bit"])
def test_arrays_of_numpy_on_an_explicit_mesh(name):
    """Restored, or made before there was a mesh: run, not only traced."""
    mesh = mesh_of("explicit")
    # An eps of 0.1 bounds what Adam makes of the rounding of small projections.
    tx = {
        "galore": lambda: lro.galore(1e-2, projector=lro.svd(4), eps=0.1),
        "adamw_8bit": lambda: lro.adamw_8bit(1e-2, min_size=0, eps=0.1),
    }[name]()
    left, right = np.linalg.qr(np.random.default_rng(0).normal(size=(2, 64, 64)))[0]
    values = np.r_[8.0, 6.0, 4.0, 2.0, np.full(28, 0.1)]
    plain = {"kernel": jnp.asarray(left[:32, :32] * values @ right[:32], jnp.float32)}
    made = tx.init(plain)
    expected = tx.update(plain, made, plain)[0]
    with jax.set_mesh(mesh):
        params = jax.device_put(plain, NamedSharding(mesh, P("data", "model")))
        for state in (made, jax.tree.map(np.asarray, made)):
            updates, after = jax.jit(tx.update)(params, state, params)
            np.testing.assert_allclose(updates["kernel"], expected["kernel"], atol=1e-5)
    if name == "galore":
        assert after.inner_state.mu["kernel"].sharding.spec != P(None, None)
