"""On eight devices: Auto and Explicit meshes, and inside shard_map."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lowrank_optax import activations
from tests.activations.model import QUICK, distance, flat

AXES = ("data", "model")
MESHES = {
    "auto": lambda: Mesh(np.array(jax.devices()).reshape(4, 2), AXES),
    "explicit": lambda: jax.make_mesh(
        (4, 2), AXES, axis_types=(AxisType.Explicit,) * 2
    ),
}
SPECS = {"up": P(None, None, "model"), "down": P(None, "model", None)}
ROWS = P("data", None, None)
quick = functools.partial(jax.jit, compiler_options=QUICK)
meshes = pytest.mark.parametrize("mesh", MESHES)


def draw(*shape):
    rng = np.random.default_rng(len(shape))
    return jnp.asarray(rng.standard_normal(shape) / 4, jnp.float32)


PARAMS = {"up": draw(2, 32, 64), "down": draw(2, 64, 32)}
X = 4 * draw(8, 4, 32)


def mlp(params, x):
    x = checkpoint_name(x / (1 + jnp.abs(x)), "norm")
    y = checkpoint_name(x @ params["up"], "up")
    # The result's layout is said where the contracted axis is sharded on both sides.
    out = NamedSharding(jax.typeof(x).sharding.mesh, ROWS) if explicit(x) else None
    return x + jnp.einsum("btf,fd->btd", jnp.tanh(y), params["down"], out_sharding=out)


def explicit(x):
    return bool(jax.typeof(x).sharding.mesh.explicit_axes)


def gradients(body, params, x):
    def loss(params, x):
        step = lambda x, p: (body(p, x), None)  # noqa: E731
        return jnp.mean(jnp.square(jax.lax.scan(step, x, params)[0]))

    step = jax.value_and_grad(loss, (0, 1))
    return jax.jit(step, compiler_options=QUICK)(params, x)


@functools.cache
def on_one_device(action):
    return gradients(body(action), PARAMS, X)


def body(action):
    if action == "plain":
        return mlp
    policy = {"norm": action, "up": action}
    return activations.compressed_checkpoint(mlp, policy, group=16)


def placed(mesh):
    where = jax.tree.map(functools.partial(NamedSharding, mesh), SPECS)
    return jax.device_put(PARAMS, where), jax.device_put(X, NamedSharding(mesh, ROWS))


@meshes
@pytest.mark.parametrize("action", ["save", "int8", "int4+3", "offload", "recompute"])
def test_a_mesh_changes_no_gradient(mesh, action):
    """Sums in another order may move a number over the edge between two codes.

    That is one step of one entry among thousands: 1e-3 of the gradient at most.
    """
    mesh = MESHES[mesh]()
    with jax.set_mesh(mesh):
        params, x = placed(mesh)
        value, got = gradients(body(action), params, x)
    expected_value, expected = on_one_device(action)
    np.testing.assert_allclose(value, expected_value, rtol=1e-6)
    assert distance(got, expected) < (1e-3 if action.startswith("int") else 1e-5)
    if explicit(x):
        assert jax.typeof(got[0]["up"]).sharding.spec == SPECS["up"]
    if action.startswith("int"):
        assert distance(got, on_one_device("plain")[1]) > 2e-3


@functools.cache
def round_trip(action):
    """Compiled once per action, for one device and for those of a mesh."""
    return quick(action.round_trip)


@meshes
def test_draws_do_not_depend_on_the_layout(mesh):
    """Equal values read the same everywhere, bit for bit."""
    mesh, x = MESHES[mesh](), draw(8, 4, 64)
    action = activations.Quantize(4, outliers=2, stochastic=True)
    with jax.set_mesh(mesh):
        spread = jax.device_put(x, NamedSharding(mesh, P("data", None, "model")))
        got = round_trip(action)(spread)
    np.testing.assert_array_equal(got, round_trip(action)(x))
    nearest = round_trip(activations.Quantize(4, outliers=2))(x)
    assert distance(got, nearest) > 0.01


@pytest.mark.parametrize(
    ("spec", "codes", "outliers"),
    [
        (P("data", None, None), P("data", None, None), P(None, "data")),
        (P("data", None, "model"), P("data", None, "model"), P(None, "data")),
        (P(None, "data", None), P(None, "data", None), P(None, None)),
        # Half of 64 channels is no whole number of groups of 48.
        (P(None, None, "model"), P(None, None, None), P(None, None)),
    ],
)
def test_codes_on_an_explicit_mesh_lie_like_the_value(spec, codes, outliers):
    mesh = MESHES["explicit"]()
    group = 48 if codes[2] is None and spec[2] else 16
    action = activations.Quantize(4, outliers=2, group=group)
    with jax.set_mesh(mesh):
        x = jax.device_put(draw(8, 4, 64), NamedSharding(mesh, spec))
        kept = quick(action.compress)(x)
        assert [jax.typeof(a).sharding.spec for a in kept] == [
            codes,
            codes,
            P(None),
            outliers,
        ]
        back = quick(action.decompress)(kept, x)
        assert jax.typeof(back).sharding.spec == spec
    np.testing.assert_array_equal(back, round_trip(action)(draw(8, 4, 64)))


def test_inside_shard_map():
    """Data parallel by hand: replicated parameters, a shard of the rows each."""
    mesh = Mesh(np.array(jax.devices()), ("data",))

    def sharded(action):
        fn = body(action)

        def loss(params, x):
            for index in range(2):
                x = fn(jax.tree.map(lambda p, at=index: p[at], params), x)
            return jax.lax.pmean(jnp.mean(jnp.square(x)), "data")

        specs = (P(), P("data"))
        mapped = jax.shard_map(
            jax.grad(loss, (0, 1)), mesh=mesh, in_specs=specs, out_specs=specs
        )
        return jax.jit(mapped, compiler_options=QUICK)(PARAMS, X)

    exact = sharded("plain")
    np.testing.assert_allclose(flat(sharded("save")), flat(exact), rtol=1e-4, atol=1e-7)
    assert 1e-4 < distance(sharded("int8"), exact) < 0.03


def test_shardings_of_an_inner_jit_still_hold():
    """The function is entered for its tag; its constraints stay."""
    mesh = MESHES["auto"]()
    over_rows = NamedSharding(mesh, P("data", None))
    over_columns = NamedSharding(mesh, P(None, "model"))

    def fn(x):
        inner = jax.jit(
            lambda x: checkpoint_name(2 * x, "x"),
            in_shardings=over_columns,
            out_shardings=over_rows,
        )
        return jnp.sum(jnp.sin(inner(x)))

    wrapped = activations.compressed_checkpoint(fn, {"x": "save"})
    text = jax.jit(jax.grad(wrapped)).lower(jnp.ones((8, 16))).as_text()
    assert '[{"data"}, {}]' in text and '[{}, {"model"}]' in text
    with jax.set_mesh(mesh):
        np.testing.assert_allclose(
            jax.jit(jax.grad(wrapped))(jnp.ones((8, 16))), 2 * np.cos(2.0), rtol=1e-6
        )
