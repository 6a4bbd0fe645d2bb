"""Where `state_shardings` puts an optimizer's state."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import lowrank_optax as lro
from tests.distributed.cases import (
    AXES,
    GAP,
    LAYOUTS,
    MESHES,
    PARAMS,
    RANK,
    Sharded,
    assert_close,
    auto_mesh,
    galore,
    gradients,
    named,
    per_device_bytes,
    updates_on_one_device,
)

SVD = lro.svd(RANK, GAP)
DIMENSIONS = lro.MatrixDimensionNumbers


def state_specs(params, specs, **options):
    """Returns the specs of GaLore's state."""
    return lro.state_shardings(galore(projector=SVD, **options), params, specs)


def mu_of(state):
    return optax.tree_utils.tree_get(state, "mu")


def same(spec, expected):
    """Whether two specs say the same of every axis, trailing None or not."""
    trimmed = [list(s) for s in (spec, expected)]
    for names in trimmed:
        while names and names[-1] is None:
            names.pop()
    return trimmed[0] == trimmed[1]


@pytest.mark.parametrize("mesh", MESHES)
def test_the_state_lies_where_the_helper_says(mesh):
    mesh = MESHES[mesh]()
    with jax.set_mesh(mesh):
        run = Sharded(galore(projector=SVD), PARAMS, named(mesh, LAYOUTS["both"]))
        where = jax.tree.map(lambda leaf: leaf.sharding, run.state)
    assert where == run.state_shardings
    basis, mu = run.state.basis, mu_of(run.state)
    # dense [64, 32] is sharded (model, data) and projected on its 32 columns, up
    # [2, 32, 64] is sharded (data, model) and projected on its 32 rows. The mesh axis
    # of the axis that an array lacks comes behind that of the one it has.
    assert same(basis["dense"].sharding.spec, P(("data", "model"), None))
    assert same(mu["dense"].sharding.spec, P(None, ("model", "data")))
    assert same(basis["layers"]["up"].sharding.spec, P(None, ("data", "model"), None))
    assert same(mu["layers"]["up"].sharding.spec, P(None, None, ("model", "data")))
    assert same(mu["layers"]["bias"].sharding.spec, P(None, "data"))
    for leaf in jax.tree.leaves(basis):
        assert not leaf.sharding.is_fully_replicated


def test_bytes_per_device():
    mesh = auto_mesh()
    run = Sharded(galore(projector=SVD), PARAMS, named(mesh, LAYOUTS["both"]))
    assert {
        k: per_device_bytes(v) for k, v in run.state.basis.items() if k != "norm"
    } == {
        "dense": 4 * 32 * RANK // 8,
        "layers": 4 * 2 * 32 * RANK // 8,
    }
    mu = mu_of(run.state)
    assert per_device_bytes(mu["dense"]) == 4 * RANK * 64 // 8
    assert per_device_bytes(mu["layers"]["up"]) == 4 * 2 * RANK * 64 // 8
    assert per_device_bytes(mu["norm"]) == 4 * 16 // 4


@pytest.mark.parametrize("side", ["left", "right"])
def test_fsdp_replicates_no_matrix_of_the_state(side):
    mesh = auto_mesh()
    shardings = lro.state_shardings(
        galore(projector=SVD, side=side), PARAMS, named(mesh, LAYOUTS["fsdp"])
    )
    matrices = [shardings.basis, mu_of(shardings)["dense"], mu_of(shardings)["layers"]]
    for sharding in jax.tree.leaves(matrices):
        assert not sharding.is_fully_replicated


def test_an_axis_of_size_one_does_not_count_as_sharded():
    """A mesh of three axes of which one cuts anything, as FSDP alone on a pod."""
    mesh = Mesh(np.array(jax.devices()).reshape(1, 8, 1), ("data", "fsdp", "tensor"))
    specs = {"w": NamedSharding(mesh, P("fsdp", "tensor"))}
    tx = galore(projector=SVD, side="left")
    shardings = lro.state_shardings(tx, {"w": jnp.ones((32, 64))}, specs)
    assert same(shardings.basis["w"].spec, P("fsdp"))
    assert mu_of(shardings)["w"].shard_shape((RANK, 64)) == (RANK, 8)


def test_trees_of_partition_specs_keep_the_parameters_own_axes():
    # A PartitionSpec does not know the sizes that spreading a mesh axis over another
    # one needs.
    given = state_specs(PARAMS, LAYOUTS["both"])
    assert same(given.basis["dense"], P("data", None))
    assert same(mu_of(given)["dense"], P(None, "model"))
    assert same(given.basis["layers"]["up"], P(None, "data", None))
    assert same(mu_of(given)["layers"]["up"], P(None, None, "model"))
    assert same(mu_of(given)["layers"]["bias"], P(None, "data"))


def test_asking_twice_gives_the_same():
    tx, specs = galore(projector=SVD), LAYOUTS["both"]
    first = lro.state_shardings(tx, PARAMS, specs)
    assert lro.state_shardings(tx, PARAMS, specs) == first


def test_shapes_will_do_for_parameters():
    shapes = jax.eval_shape(lambda: PARAMS)
    specs = LAYOUTS["both"]
    assert state_specs(shapes, specs) == state_specs(PARAMS, specs)


def wrappers():
    bracket = galore(projector=SVD)

    def mask(tree):
        return jax.tree.map(lambda leaf: leaf.ndim > 1, tree)

    def label(tree):
        return jax.tree.map(lambda leaf: "low" if leaf.ndim > 1 else "full", tree)

    return {
        "chain": optax.chain(
            optax.clip_by_global_norm(50.0), bracket, optax.add_decayed_weights(0.1)
        ),
        "masked": optax.chain(optax.masked(bracket, mask), optax.trace(0.9)),
        "partition": optax.partition({"low": bracket, "full": optax.adam(1.0)}, label),
        "guard": optax.apply_if_finite(bracket, 3),
    }


@pytest.mark.parametrize("name", ["chain", "masked", "partition", "guard"])
def test_wrapped_in_other_transformations(name):
    tx, mesh = wrappers()[name], auto_mesh()
    run = Sharded(tx, PARAMS, named(mesh, LAYOUTS["both"]))
    updates, state = run.updates(gradients(PARAMS))
    assert_close(updates, updates_on_one_device(tx, PARAMS)[0])
    basis = optax.tree_utils.tree_get(state, "basis")
    assert same(basis["dense"].sharding.spec, P(("data", "model"), None))
    assert same(basis["layers"]["up"].sharding.spec, P(None, ("data", "model"), None))


def factored(momentum=None):
    return optax.adafactor(1e-2, min_dim_size_to_factor=2, momentum=momentum)


def test_sums_over_a_projection_lie_as_it_does():
    """As Adafactor's: they have the mesh axes that the projection itself was given."""
    layout = named(auto_mesh(), LAYOUTS["both"])
    bracket = lro.project(SVD, select=["dense", "up"], layer_axis=0)
    for inner in (factored(0.9), lro.scale_by_matrix_factored_rms()):
        tx = lro.chain(bracket, inner, lro.backproject())
        state = lro.state_shardings(tx, PARAMS, layout)
        get = functools.partial(optax.tree_utils.tree_get, state)
        names = ("v_row", "v_col") if get("v_row") else ("row", "col")
        row, col = map(get, names)
        # dense [64, 32] is seen as [32, 64] and up [2, 32, 64] as it is, so both
        # projections, [4, 64] and [2, 4, 64], have all mesh axes on their columns.
        assert same(row["dense"].spec, P())
        assert same(col["dense"].spec, P(("model", "data")))
        assert same(row["layers"]["up"].spec, P())
        assert same(col["layers"]["up"].spec, P(None, ("model", "data")))
    # Three columns of a device cannot be cut in two, so the four rows are.
    params, specs = {"dense": jnp.ones((12, 6))}, {"dense": P("data", "model")}
    for momentum in (None, 0.9):
        tx = lro.chain(
            lro.project(SVD, select="dense"), factored(momentum), lro.backproject()
        )
        state = lro.state_shardings(tx, params, named(auto_mesh(), specs))
        where = optax.tree_utils.tree_get(state, "v_row")["dense"]
        assert same(where.spec, P("model"))
        where = optax.tree_utils.tree_get(state, "v_col")["dense"]
        assert same(where.spec, P("data"))


def test_sums_over_a_basis_lie_as_it_does():
    options = {"layer_axis": 0, "basis_optimizer": factored()}
    tx = lro.online_subspace_descent(1e-2, RANK, **options)
    basis = lro.state_shardings(tx, PARAMS, named(auto_mesh(), LAYOUTS["both"])).basis
    names = ("data", "model")  # of the 32 rows, those of the columns behind
    for bases, spec in (
        (basis["dense"], P(names)),
        (basis["layers"]["up"], P(None, names)),
    ):
        assert same(bases.vectors.spec, spec)
        assert same(bases.optimizer[0].v_col.spec, spec)
        assert same(bases.optimizer[0].v_row.spec, P())


def test_numbers_of_columns_lie_as_the_rows_of_the_projection():
    params, specs = {"dense": jnp.ones((12, 6))}, {"dense": P("data", "model")}
    tx = lro.dct_adamw(1e-2, RANK)
    state = lro.state_shardings(tx, params, named(auto_mesh(), specs))
    assert same(optax.tree_utils.tree_get(state, "basis")["dense"].spec, P("model"))
    assert same(mu_of(state)["dense"].spec, P("model", "data"))


def test_the_sums_of_a_square_matrix_keep_their_axes():
    """Both axes are the largest; which one Optax sums over, its init has to say."""
    params, specs = {"w": jnp.ones((64, 64))}, {"w": P("data", "model")}
    state = lro.state_shardings(factored(), params, named(auto_mesh(), specs))
    assert same(optax.tree_utils.tree_get(state, "v_row")["w"].spec, P("data"))
    assert same(optax.tree_utils.tree_get(state, "v_col")["w"].spec, P("model"))


def test_an_axis_that_a_state_has_twice_is_cut_once():
    """As a preconditioner's, ``[m, m]``: a spec that names an axis twice is none."""
    tx = optax.GradientTransformation(
        lambda params: jax.tree.map(lambda x: jnp.ones((x.shape[0],) * 2), params),
        lambda updates, state, params=None: (updates, state),
    )
    params, specs = {"w": jnp.ones((64, 32))}, {"w": P("data", "model")}
    state = lro.state_shardings(tx, params, named(auto_mesh(), specs))
    assert same(state["w"].spec, P("data"))


def test_what_is_no_matrix_takes_no_more_axes():
    """A flag for every matrix of a stack over two axes, ``[4, 8]``, is not cut up."""
    params, numbers = {"w": jnp.ones((4, 8, 32, 64))}, {"w": DIMENSIONS(2, 3)}
    tx = galore(projector=SVD, layer_axis=None, weight_dimension_numbers=numbers)
    layout = named(auto_mesh(), {"w": P(None, None, "data", "model")})
    state = lro.state_shardings(tx, params, layout)
    assert same(state.pending["w"].spec, P())
    assert same(state.basis["w"].spec, P(None, None, ("data", "model")))


CONV = {"kernel": jnp.ones((3, 3, 8, 32))}
HEADS = {"kernel": jnp.ones((32, 4, 16))}


@pytest.mark.parametrize(
    ("params", "numbers", "spec", "basis", "mu"),
    [
        # All of (height, width, in) is the matrix' row axis: a sharding of its fastest
        # part cannot be kept by the merged axis, that of the columns can.
        (
            CONV,
            DIMENSIONS((0, 1, 2), 3),
            P(None, None, "data", "model"),
            P(("model", "data")),
            P(None, ("data", "model")),
        ),
        (
            CONV,
            DIMENSIONS(2, 3),
            P(None, None, None, "model"),
            P(None, None, "model"),
            P(*[None] * 3, "model"),
        ),
        # (embed, heads, head_dim), heads merged with head_dim, then heads as a batch.
        (
            HEADS,
            DIMENSIONS(0, (1, 2)),
            P("data", "model"),
            P(("data", "model")),
            P(None, ("model", "data")),
        ),
        (
            HEADS,
            DIMENSIONS(0, 2),
            P("data", "model"),
            P("model", "data"),
            P("model", None, "data"),
        ),
    ],
    ids=["conv", "conv-batch", "heads-merged", "heads-batch"],
)
def test_leaves_seen_through_dimension_numbers(params, numbers, spec, basis, mu):
    mesh = auto_mesh()
    tx = galore(projector=SVD, weight_dimension_numbers={"kernel": numbers})
    run = Sharded(tx, params, named(mesh, {"kernel": spec}))
    assert same(run.state_shardings.basis["kernel"].spec, basis)
    assert same(mu_of(run.state_shardings)["kernel"].spec, mu)
    updates, _ = run.updates(gradients(params))
    assert_close(updates, updates_on_one_device(tx, params)[0])


# The logical names of the boxed parameters below, and where they go.
RULES = (("embed", "data"), ("mlp", "model"), ("layers", None))


def boxed_params(box):
    """Puts the parameters into Flax boxes that name their axes."""
    logical = {
        "dense": ("mlp", "embed"),
        "layers": {"bias": ("layers", "embed"), "up": ("layers", "embed", "mlp")},
        "norm": ("embed",),
    }
    names = dict(RULES) if box is nn.Partitioned else None

    def wrap(leaf, axes):
        if names is not None:
            axes = tuple(names[axis] for axis in axes)
        return box(leaf, names=axes)

    return jax.tree.map(wrap, PARAMS, logical, is_leaf=lambda x: isinstance(x, tuple))


@pytest.mark.parametrize("box", [nn.LogicallyPartitioned, nn.Partitioned])
def test_boxed_parameters(box):
    mesh, tx = auto_mesh(), galore(projector=SVD)
    params = boxed_params(box)
    abstract = jax.eval_shape(galore(projector=SVD).init, params)
    basis = abstract.basis["layers"]["up"]
    assert isinstance(basis, box)
    specs = nn.get_partition_spec(params)
    if box is nn.LogicallyPartitioned:
        shardings = nn.logical_to_mesh_sharding(specs, mesh, RULES)
        from_boxes = nn.logical_to_mesh_sharding(
            nn.get_partition_spec(abstract), mesh, RULES
        )
        assert basis.names == ("layers", "embed", None)
    else:
        shardings = named(mesh, specs)
        from_boxes = named(mesh, nn.get_partition_spec(abstract))
        assert basis.names == (None, "data", None)
    layout = lro.state_shardings(tx, params, shardings)
    own = P(None, "data", None), P(None, ("data", "model"), None)
    # Flax' own way, which knows the names alone, and the helper.
    for way, spec in zip((from_boxes, layout), own, strict=True):
        state = jax.jit(tx.init, out_shardings=way)(params)
        up = nn.meta.unbox(state.basis)["layers"]["up"]
        assert same(up.sharding.spec, spec)
    with jax.set_mesh(mesh):
        step = jax.jit(tx.update, out_shardings=(shardings, layout))
        for gradient, expected in zip(
            gradients(PARAMS), updates_on_one_device(tx, PARAMS)[0], strict=True
        ):
            given = jax.tree.map(
                lambda leaf, value: leaf.replace_boxed(value),
                params,
                gradient,
                is_leaf=lambda leaf: isinstance(leaf, box),
            )
            update, state = step(given, state, params)
            assert_close(nn.meta.unbox(update), expected)


def test_a_merged_mesh_axis_stays_whole():
    specs = state_specs(PARAMS, LAYOUTS["fsdp"], side="left")
    assert same(specs.basis["dense"], P(AXES, None))
