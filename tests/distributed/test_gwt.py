"""GWT on eight devices: the axis it chooses, where its moments lie, what it sends."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import lowrank_optax as lro
from tests.distributed.cases import (
    AXES,
    MESHES,
    Sharded,
    auto_mesh,
    explicit_mesh,
    gradients,
    named,
    updates_on_one_device,
)

# As in `cases.galore`: an eps of 0.1 bounds what Adam makes of rounding.
gwt = functools.partial(lro.gwt, 1.0, scale=1.0, eps=0.1, layer_axis=0)


# --- axis="auto" ---------------------------------------------------------------------


def side(shape, spec, mesh=None, **options):
    """Returns the side that axis="auto" takes: "left" are the rows.

    ``mesh`` None declares the partition spec alone; on an Explicit one nothing is
    declared, the array's type says it.
    """
    params = declared = {"w": spec}
    if mesh is None:
        params = {"w": jax.ShapeDtypeStruct(shape, jnp.float32)}
    else:
        declared = named(mesh, declared)
        params = jax.device_put({"w": jnp.zeros(shape)}, declared)
        declared = None if mesh.explicit_axes else declared
    tx = lro.gwt(
        1e-2, axis="auto", param_shardings=declared, select=".", layer_axis=0, **options
    )
    (row,) = lro.selection_report(tx, params).rows
    assert row.matrix is not None
    return row.matrix.side


INPUT_IS_COLUMNS = {"weight_dimension_numbers": lro.MatrixDimensionNumbers(1, 0)}
CHOICES = [
    ("unsharded", (64, 32), P(), {}, "left"),
    ("another axis sharded", (64, 32), P(None, "data"), {}, "left"),
    ("whole blocks in each part", (64, 32), P("data"), {}, "left"),
    ("blocks cut", (40, 32), P("data"), {}, "right"),
    ("blocks cut, less deep", (40, 32), P("data"), {"level": 1}, "left"),
    ("blocks cut, both sharded", (40, 32), P("data", "model"), {}, "right"),
    ("blocks cut on both", (40, 12), P("data", "model"), {}, "left"),
    ("two mesh axes", (64, 32), P(AXES), {}, "left"),
    ("two mesh axes, blocks cut", (48, 32), P(AXES), {}, "right"),
    ("a stack", (2, 40, 32), P("model", "data"), {}, "right"),
    ("input is columns", (64, 32), P(), INPUT_IS_COLUMNS, "right"),
    ("input is columns, cut", (32, 40), P(None, "data"), INPUT_IS_COLUMNS, "left"),
]


@pytest.mark.parametrize(
    ("shape", "spec", "options", "expected"),
    [case[1:] for case in CHOICES],
    ids=[case[0] for case in CHOICES],
)
@pytest.mark.parametrize("mesh", MESHES)
def test_the_axis_is_the_inputs_unless_blocks_are_cut(
    mesh, shape, spec, options, expected
):
    mesh = MESHES[mesh]()
    with jax.set_mesh(mesh):
        assert side(shape, spec, mesh, **options) == expected


@pytest.mark.parametrize(
    ("spec", "expected"),
    [(P(), "left"), (P("data"), "right"), (P(None, "data"), "left"), (None, "left")],
)
def test_a_partition_spec_alone_does_not_tell_the_parts(spec, expected):
    """So a sharded axis may be cut anywhere."""
    assert side((64, 32), spec) == expected


def test_a_longer_filter_crosses_every_border():
    """No local size keeps db2's coefficients inside a shard."""
    mesh = auto_mesh()
    with jax.set_mesh(mesh):
        assert side((64, 32), P("data"), mesh, wavelet="db2") == "right"
        assert side((64, 32), P("data", "model"), mesh, wavelet="db2") == "left"


# --- The state's layout --------------------------------------------------------------

PARAMS = {
    "bias": jnp.ones((32,)),
    "dense": jnp.ones((64, 32)),
    "up": jnp.ones((2, 32, 64)),
}
OTHER = {"bias": P("data"), "dense": P(None, "data"), "up": P(None, None, "model")}
ALONG = {"bias": P(), "dense": P("data"), "up": P(None, "model")}
BOTH = {"bias": P("data"), "dense": P("data", "model"), "up": P(None, "model", "data")}
LAYOUTS = {"other": OTHER, "along": ALONG, "both": BOTH}


def moments(tx, params, specs):
    mu = lro.state_shardings(tx, params, specs).inner_state.mu
    return {
        key: [*spec, *[None] * (params[key].ndim - len(spec))]
        for key, spec in jax.tree.map(lambda s: s.spec, mu).items()
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_moments_lie_like_their_parameter(layout):
    specs = named(auto_mesh(), LAYOUTS[layout])
    for level in (1, 2):
        found = moments(gwt(level), PARAMS, specs)
        for key, spec in LAYOUTS[layout].items():
            assert found[key] == [*spec, *[None] * (PARAMS[key].ndim - len(spec))]


def test_a_band_that_cannot_be_divided_lies_elsewhere():
    """Two rows on 4 devices; or rows that are no blocks of the parameter's rows."""
    specs = named(auto_mesh(), {"w": P("data")})
    for tx, m, r in (
        (gwt(5), 64, 2),
        (gwt(3), 28, 4),
        (gwt(2, wavelet="db2"), 40, 12),
    ):
        params = {"w": jnp.zeros((m, 32))}
        assert tx.init(params).inner_state.mu["w"].shape == (r, 32)
        assert moments(tx, params, specs) == {"w": [None, "data"]}
    both = named(auto_mesh(), {"w": P("data", "model")})
    params = {"w": jnp.zeros((64, 32))}
    assert moments(gwt(5), params, both) == {"w": [None, ("model", "data")]}


def test_the_columns_likewise():
    specs = named(auto_mesh(), {"w": P("model", "data")})
    params = {"w": jnp.zeros((32, 64))}
    tx = gwt(2, axis=-1)  # moments [r, n]: bands of the columns first
    assert tx.init(params).inner_state.mu["w"].shape == (16, 32)
    assert moments(tx, params, specs) == {"w": ["data", "model"]}


# --- What a step sends, and what it computes -----------------------------------------


@functools.cache
def sharded(mesh, layout, **options):
    mesh = MESHES[mesh]()
    with jax.set_mesh(mesh):
        return Sharded(gwt(**options), PARAMS, named(mesh, LAYOUTS[layout]))


@functools.cache
def on_one_device(**options):
    return updates_on_one_device(gwt(**options), PARAMS)[0]


def numbers_sent(run):
    """Returns how many numbers the step's all-reduces carry; it has nothing else."""
    found = run.collectives()
    assert {item.op for item in found} <= {"all-reduce"}
    assert all(item.exact for item in found)
    return sum(item.times * math.prod(shape) for item in found for shape in item.shapes)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mesh", MESHES)
def test_a_step_sends_one_norm_per_matrix(mesh, layout):
    """Of three; once for every mesh axis that the norm is summed over."""
    axes = 2 if layout == "both" else 1
    assert 0 < numbers_sent(sharded(mesh, layout)) <= axes * 3


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mesh", MESHES)
def test_a_step_without_limiter_sends_nothing(mesh, layout):
    assert numbers_sent(sharded(mesh, layout, growth_limit=None)) == 0


@pytest.mark.parametrize(
    ("layout", "options"),
    [("along", {"detail_clip": 1.0}), ("other", {"wavelet": "db2"})],
)
def test_nor_do_formed_details(layout, options):
    run = sharded("auto", layout, growth_limit=None, **options)
    assert numbers_sent(run) == 0


def test_the_search_sees_a_filter_across_borders():
    """db2 along the sharded axis needs its neighbours' samples."""
    run = sharded("auto", "along", growth_limit=None, wavelet="db2")
    assert run.collectives()


@pytest.mark.parametrize(
    ("mesh", "layout", "options"),
    [
        ("auto", "along", {}),
        ("auto", "other", {}),
        ("explicit", "both", {}),
        ("auto", "along", {"wavelet": "db2"}),
        ("explicit", "along", {"detail_clip": 1.0}),
    ],
)
def test_updates_equal_those_of_one_device(mesh, layout, options):
    """Norms summed in another order; 1e-6 of the largest element."""
    run = sharded(mesh, layout, **options)
    updates, state = run.updates(gradients(PARAMS))
    for got, want in zip(updates, on_one_device(**options), strict=True):
        for key, update in want.items():
            atol = 1e-6 * max(1.0, float(np.abs(update).max()))
            np.testing.assert_allclose(got[key], update, rtol=0, atol=atol)
    assert jax.tree.map(lambda x: x.sharding, state) == run.state_shardings


def test_the_axis_chosen_from_an_explicit_mesh_sends_nothing():
    """40 rows in 4 parts would be cut; the 32 columns are whole."""
    mesh, params = explicit_mesh(), {"w": jnp.ones((40, 32))}
    tx = gwt(axis="auto", growth_limit=None)
    with jax.set_mesh(mesh):
        run = Sharded(tx, params, named(mesh, {"w": P("data")}))
    assert optax.tree_utils.tree_get(run.state, "mu")["w"].shape == (8, 40)
    assert numbers_sent(run) == 0
