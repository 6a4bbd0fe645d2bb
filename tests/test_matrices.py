"""The matrix view of a leaf, the side rule, and Flax' metadata boxes."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

import lowrank_optax as lro
from lowrank_optax.leaves.matrix import path_string

Numbers = lro.MatrixDimensionNumbers


@st.composite
def matrices(draw):
    """A leaf of up to five axes, cut into batch, rows and columns anyhow."""
    ndim = draw(st.integers(2, 5))
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=ndim, max_size=ndim)))
    order = draw(st.permutations(range(ndim)))
    a = draw(st.integers(1, ndim - 1))
    b = draw(st.integers(a + 1, ndim))
    rows, columns, batch = order[:a], order[a:b], sorted(order[b:])
    side = draw(st.sampled_from(["left", "right", "both"]))
    return "w", shape, tuple(batch), tuple(rows), tuple(columns), side, 1


@given(matrices())
def test_view_and_back(fields):
    matrix = lro.Matrix(*fields)
    leaf = jnp.arange(math.prod(matrix.shape), dtype=jnp.float32).reshape(matrix.shape)
    view = matrix.view(leaf)
    assert view.shape == (*matrix.batch_shape, matrix.m, matrix.n)
    np.testing.assert_array_equal(matrix.undo(view), leaf)


@given(matrices())
def test_every_element_of_a_view_is_where_its_axes_say(fields):
    matrix = lro.Matrix(*fields)
    leaf = np.arange(math.prod(matrix.shape), dtype=np.float32).reshape(matrix.shape)
    view = np.asarray(matrix.view(jnp.asarray(leaf)))

    def at(axes, index):
        return int(
            np.ravel_multi_index(
                [index[a] for a in axes], [matrix.shape[a] for a in axes]
            )
        )

    for index in itertools.islice(np.ndindex(*matrix.shape), 0, None, 7):
        where = at(matrix.rows, index), at(matrix.columns, index)
        if matrix.side == "right":
            where = where[::-1]
        batch = tuple(index[axis] for axis in matrix.batch)
        assert view[(*batch, *where)] == leaf[index]


def plan(params, rank=2, **options):
    """The matrices that a bracket makes of a tree, by path."""
    tx = lro.chain(
        lro.project(lro.svd(rank), **options), optax.scale_by_adam(), lro.backproject()
    )
    return {row.path: row.matrix for row in lro.selection_report(tx, params).rows}


def side_of(shape, numbers=None, side="short", **options):
    params = {"w": jnp.zeros(shape)}
    matrix = plan(
        params, side=side, select="w", weight_dimension_numbers=numbers, **options
    )["w"]
    assert matrix is not None
    return matrix.side


FLAX, TORCH = Numbers(0, 1), Numbers(1, 0)


@pytest.mark.parametrize("numbers", [None, FLAX, TORCH])
@pytest.mark.parametrize(
    ("shape", "short", "long"),
    [((48, 32), "right", "left"), ((32, 48), "left", "right")],
)
def test_side_follows_the_shape(shape, short, long, numbers):
    assert side_of(shape, numbers, "short") == short
    assert side_of(shape, numbers, "long") == long
    assert side_of(shape, numbers, "auto") == short


@pytest.mark.parametrize(
    ("numbers", "short", "long"),
    [(None, "left", "right"), (FLAX, "left", "right"), (TORCH, "right", "left")],
    ids=["default", "flax", "torch"],
)
def test_a_tie_goes_to_the_input_axis(numbers, short, long):
    assert side_of((40, 40), numbers, "short") == short
    assert side_of((40, 40), numbers, "long") == long


@pytest.mark.parametrize("shape", [(48, 32), (32, 48), (40, 40)])
@pytest.mark.parametrize("numbers", [FLAX, TORCH])
@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_a_side_named_outright_is_of_the_stored_matrix(shape, numbers, side):
    assert side_of(shape, numbers, side) == side


def test_side_comes_from_the_matrix_not_from_the_projection():
    # At rank 32 the projection of a (32, 48) leaf from its long side is square.
    assert side_of((32, 48), side="long", rank=32) == "right"
    # An input of 4 heads times 8 is narrower than the output of 48.
    assert side_of((4, 8, 48), Numbers((0, 1), 2)) == "left"
    assert side_of((48, 4, 8), Numbers(0, (1, 2))) == "right"


@pytest.mark.parametrize(
    ("spec", "side"),
    [
        (PartitionSpec("data", None), "right"),
        (PartitionSpec(None, "data"), "left"),
        (PartitionSpec(None, None), "left"),
        (PartitionSpec("data", "model"), "left"),
    ],
)
def test_auto_takes_the_unsharded_axis(spec, side):
    assert side_of((32, 48), side="auto", param_shardings={"w": spec}) == side


def test_unnamed_axes_are_batch():
    experts = {"w": jnp.zeros((3, 2, 16, 24))}
    matrix = plan(experts, weight_dimension_numbers={"w": Numbers(2, 3)})["w"]
    assert matrix is not None
    assert (matrix.batch, matrix.batch_shape) == ((0, 1), (3, 2))
    assert (matrix.m, matrix.n) == (16, 24)


def test_negative_axes_count_from_the_end():
    leaf = {"w": jnp.zeros((3, 16, 24))}
    matrix = plan(leaf, weight_dimension_numbers=Numbers(-2, -1))["w"]
    assert matrix is not None
    assert (matrix.batch, matrix.rows, matrix.columns) == ((0,), (1,), (2,))


def test_optax_dimension_numbers_are_accepted():
    leaf = {"w": jnp.zeros((16, 3, 24))}
    numbers = optax.contrib.MuonDimensionNumbers(0, 2)
    matrix = plan(leaf, weight_dimension_numbers={"w": numbers})["w"]
    assert matrix is not None
    assert (matrix.batch, matrix.m, matrix.n) == ((1,), 16, 24)


@pytest.mark.parametrize(
    ("side", "layer_axis"), [("short", 0), ("long", 1), ("both", 2)]
)
def test_a_stack_steps_as_its_layers_do(side, layer_axis):
    """Invariant I13; the tolerance is that of another batching of the products."""
    tx = lro.galore(
        1e-2, projector=lro.svd(2, 2), side=side, select="w", layer_axis=layer_axis
    )
    keys = jax.random.split(jax.random.key(0), 4)
    gradients = [jax.random.normal(key, (3, 6, 8)) for key in keys]
    stacked = [{"w": jnp.moveaxis(g, 0, layer_axis)} for g in gradients]
    single = [{"w0": g[0], "w1": g[1], "w2": g[2]} for g in gradients]
    whole, parts = run(tx, stacked), run(tx, single)
    for a, b in zip(whole, parts, strict=True):
        layers = jnp.moveaxis(a["w"], layer_axis, 0)
        np.testing.assert_allclose(layers, [b["w0"], b["w1"], b["w2"]], atol=1e-6)


def run(tx, gradients):
    params = jax.tree.map(jnp.zeros_like, gradients[0])
    state, out = tx.init(params), []
    update = jax.jit(tx.update)
    for gradient in gradients:
        updates, state = update(gradient, state, params)
        out.append(updates)
    return out


def test_transposing_a_parameter_transposes_its_updates():
    """Invariant I5, for a matrix that is not square."""
    tx = lro.galore(1e-2, projector=lro.svd(2, 2))
    keys = jax.random.split(jax.random.key(1), 3)
    gradients = [{"w": jax.random.normal(key, (12, 8))} for key in keys]
    turned = [{"w": g["w"].T} for g in gradients]
    for a, b in zip(run(tx, gradients), run(tx, turned), strict=True):
        np.testing.assert_allclose(a["w"].T, b["w"], atol=1e-6)


class TestFlaxBoxes:
    tx = lro.galore(1e-2, projector=lro.svd(2, 2), layer_axis=0)

    @staticmethod
    def box(value, *names):
        return linen.Partitioned(value, names)

    def boxed(self):
        return {
            "kernel": self.box(jnp.ones((12, 8)), "embed", "mlp"),
            "stack": self.box(jnp.ones((3, 8, 12)), "layers", "embed", "mlp"),
            "bias": self.box(jnp.ones(8), "mlp"),
        }

    def test_bases_and_moments_are_boxed_under_the_names_of_their_axes(self):
        state = self.tx.init(self.boxed())
        basis, mu = state.basis, optax.tree_utils.tree_get(state, "mu")
        assert basis["kernel"].names == ("mlp", None)
        assert mu["kernel"].names == (None, "embed")
        assert basis["stack"].names == ("layers", "embed", None)
        assert mu["stack"].names == ("layers", None, "mlp")
        assert mu["bias"].names == ("mlp",)
        assert basis["stack"].value.shape == (3, 8, 2)

    def test_steps_as_if_unboxed(self):
        boxed = self.boxed()
        plain = linen.meta.unbox(boxed)
        update = jax.jit(self.tx.update)
        params, state = boxed, self.tx.init(boxed)
        like, like_state = plain, self.tx.init(plain)
        for key in jax.random.split(jax.random.key(0), 3):
            noise = jax.tree.map(
                lambda p, key=key: jax.random.normal(key, p.shape), plain
            )
            updates, state = update(
                jax.tree.map(
                    lambda b, g: b.replace_boxed(g),
                    boxed,
                    noise,
                    is_leaf=lambda x: isinstance(x, linen.Partitioned),
                ),
                state,
                params,
            )
            expected, like_state = update(noise, like_state, like)
            assert jax.tree.structure(updates) == jax.tree.structure(boxed)
            np.testing.assert_allclose(updates["kernel"].value, expected["kernel"])
            np.testing.assert_allclose(updates["stack"].value, expected["stack"])


def test_paths_leave_out_the_value_attribute():
    keys = (jax.tree_util.DictKey("a"), jax.tree_util.GetAttrKey("value"))
    assert path_string(keys) == "a"
    assert path_string((jax.tree_util.DictKey("value"),)) == "value"
