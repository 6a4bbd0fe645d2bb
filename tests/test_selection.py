"""Which leaves are projected, at which rank, and what the report says of it."""

import jax
import jax.numpy as jnp
import optax
import pytest

import lowrank_optax as lro

Numbers = lro.MatrixDimensionNumbers


def bracket(rank=4, inner=None, **options):
    return lro.chain(
        lro.project(lro.power(rank), **options),
        inner or optax.scale_by_adam(),
        lro.backproject(),
    )


def report(params, rank=4, **options):
    return lro.selection_report(bracket(rank, **options), params)


def reason(path, leaf, **options):
    """Why the leaf stays full, None if it is projected."""
    tree = leaf
    for key in reversed(path.split("/")):
        tree = {key: tree}
    (row,) = report(tree, **options).rows
    assert row.path == path
    return None if row.matrix else row.reason


def zeros(*shape, dtype=jnp.float32):
    return jnp.zeros(shape, dtype)


# The default rule.


@pytest.mark.parametrize("path", ["w", "attention/kernel", "scales/kernel", "biased"])
def test_matrices_are_projected(path):
    assert reason(path, zeros(48, 32)) is None


@pytest.mark.parametrize(
    "path",
    [
        "layer/scale",
        "layer/bias",
        "norm/kernel",
        "LayerNorm_0/kernel",
        "pre_norm",
        "embed/kernel",
        "token_Embedding",
        "lm_head/kernel",
    ],
)
def test_leaves_named_like_no_layer_stay_full(path):
    assert reason(path, zeros(48, 32)) == "named like a norm, bias, embedding or head"


@pytest.mark.parametrize(
    ("leaf", "options", "why"),
    [
        (zeros(), {}, "fewer than two axes"),
        (zeros(48), {}, "fewer than two axes"),
        (zeros(0, 32), {}, "no elements"),
        (zeros(48, 32, dtype=jnp.int32), {}, "not a real floating-point leaf (int32)"),
        (
            zeros(48, 32, dtype=jnp.complex64),
            {},
            "not a real floating-point leaf (complex64)",
        ),
        (
            zeros(3, 48, 32),
            {},
            "three or more axes, no dimension numbers and no layer_axis",
        ),
        (
            zeros(2, 3, 48, 32),
            {"layer_axis": 0},
            "four or more axes and no dimension numbers",
        ),
        (zeros(48, 3), {}, "rank 4 exceeds min(m, n)=3"),
        (zeros(48, 32), {"min_size": 1537}, "smaller than min_size=1537"),
        (zeros(48, 32), {"select": "kernel"}, "not chosen by select"),
        (
            zeros(48, 32),
            {"weight_dimension_numbers": {"w": None}},
            "no dimension numbers given for it",
        ),
    ],
)
def test_why_a_leaf_stays_full(leaf, options, why):
    assert reason("w", leaf, **options) == why


def test_min_size_is_the_smallest_size_projected():
    assert reason("w", zeros(48, 32), min_size=48 * 32) is None


def test_a_leaf_that_would_not_save_stays_full():
    # Adam: 2 * 8 * 8 floats and a counter; rank 6: 2 * 6 * 8 + 8 * 6 floats, the
    # counter and one flag.
    full, low = 2 * 64 * 4 + 4, 3 * 48 * 4 + 4 + 1
    assert low > full
    why = reason("w", zeros(8, 8), rank=6)
    assert why == f"low rank would not save: {low} >= {full} bytes"
    assert reason("w", zeros(8, 8), rank=5) is None
    # The inner optimizer's state counts, not Adam's.
    assert "would not save" in str(reason("w", zeros(8, 8), inner=optax.identity()))
    # What was asked for by name is never dropped.
    assert reason("w", zeros(8, 8), rank=6, select="w") is None


def test_layer_axis_makes_stacks_of_matrices():
    (row,) = report({"w": zeros(3, 48, 32)}, layer_axis=0).rows
    assert row.matrix is not None
    assert (row.matrix.batch_shape, row.matrix.m, row.matrix.n) == ((3,), 32, 48)
    # Stacked gains look like a matrix: their name keeps them out.
    assert reason("norm/scale", zeros(3, 48), layer_axis=0)


# Selection by the user.

PARAMS = {
    "a": {"kernel": zeros(48, 32), "bias": zeros(32)},
    "b": {"kernel": zeros(32, 16)},
    "embed": zeros(64, 16),
}


def test_select_by_regular_expression():
    assert report(PARAMS, select="^a/|embed").projected == ("a/kernel", "embed")


def test_select_by_callable():
    def large(path, leaf):
        return leaf.size >= 1024 and path != "a/kernel"

    assert report(PARAMS, select=large).projected == ("embed",)


def test_dimension_numbers_by_tree():
    numbers = {
        "a": {"kernel": Numbers(0, 1), "bias": None},
        "b": {"kernel": None},
        "embed": Numbers(0, 1),
    }
    chosen = report(PARAMS, weight_dimension_numbers=numbers)
    assert chosen.projected == ("a/kernel", "embed")


def test_dimension_numbers_by_prefix():
    numbers = {"a": Numbers(1, 0), "b": None, "embed": None}
    rows = {
        row.path: row for row in report(PARAMS, weight_dimension_numbers=numbers).rows
    }
    matrix = rows["a/kernel"].matrix
    assert matrix is not None
    assert (matrix.rows, matrix.columns) == ((0,), (1,))
    assert rows["a/bias"].reason == "fewer than two axes"
    assert rows["b/kernel"].reason == "no dimension numbers given for it"


def test_dimension_numbers_by_callable_of_the_parameters():
    seen = []

    def numbers(params):
        seen.append(jax.tree.structure(params))
        return jax.tree.map(lambda p: Numbers(0, 1) if p.ndim == 2 else None, params)

    chosen = report(PARAMS, weight_dimension_numbers=numbers)
    assert chosen.projected == ("a/kernel", "b/kernel", "embed")
    assert seen[0] == jax.tree.structure(PARAMS)


def test_attention_kernels_by_dimension_numbers():
    # (embed, heads, head_dim): the output has two axes.
    numbers = {"q": Numbers(0, (1, 2)), "o": Numbers((0, 1), 2)}
    params = {"q": zeros(32, 4, 12), "o": zeros(4, 12, 32)}
    for row in report(params, weight_dimension_numbers=numbers).rows:
        assert row.matrix is not None
        assert {row.matrix.m, row.matrix.n} == {32, 48}
        assert row.matrix.m == 32


# Ranks.


@pytest.mark.parametrize(
    ("rank", "shape", "expected"),
    [
        (8, (48, 32), 8),
        (0.25, (48, 32), 8),
        (0.25, (20, 64), 5),
        (0.01, (48, 32), 1),
        (1.0, (48, 8), 8),
        (lambda path: 3, (48, 32), 3),
        (lambda path: 0.5, (48, 32), 16),
    ],
)
def test_rank(rank, shape, expected):
    (row,) = report({"w": zeros(*shape)}, rank=rank, select="w").rows
    assert row.matrix is not None
    assert row.matrix.rank == expected


def test_rank_by_path():
    def rank(path):
        return 4 if path.startswith("a") else 0.5

    rows = report(PARAMS, rank=rank, select="kernel").rows
    ranks = {row.path: row.matrix.rank for row in rows if row.matrix}
    assert ranks == {"a/kernel": 4, "b/kernel": 8}


def test_clip_rank_runs_small_leaves_at_their_smaller_side():
    rows = report(PARAMS, rank=24, select="kernel", clip_rank=True).rows
    ranks = {row.path: row.matrix.rank for row in rows if row.matrix}
    assert ranks == {"a/kernel": 24, "b/kernel": 16}


# The report.


def test_report_text():
    text = str(report(PARAMS))
    lines = text.splitlines()
    assert lines[0].split() == "leaf shape decision state bytes full bytes why".split()
    table = {line.split()[0]: line for line in lines[1:-1]}
    assert list(table) == ["a/bias", "a/kernel", "b/kernel", "embed"]
    # Basis 32 x 4, moments 2 * 4 * 48, Adam's counter, one flag; or 2 * 48 * 32.
    low, full = 4 * (32 * 4 + 2 * 4 * 48) + 4 + 1, 4 * 2 * 48 * 32 + 4
    cells = ["48x32", "right,", "rank", "4", f"{low:,}", f"{full:,}"]
    assert table["a/kernel"].split()[1:7] == cells
    assert "selected by the default rule" in table["a/kernel"]
    assert "full" in table["embed"]
    assert lines[-1].startswith("2 projected, 2 full; ")


def test_report_names_explicit_choices():
    (row, *_) = report({"w": zeros(48, 32)}, select="w").rows
    assert row.reason == "selected explicitly"


def test_report_sees_through_wrappers():
    inner = optax.chain(optax.clip_by_global_norm(1.0), bracket(), optax.scale(-1.0))
    mask = {"a": {"kernel": True, "bias": True}, "b": {"kernel": False}, "embed": False}
    seen = lro.selection_report(optax.masked(inner, mask), PARAMS)
    assert [row.path for row in seen.rows] == ["a/bias", "a/kernel"]
    labels = {"a": "low", "b": "low", "embed": "adam"}
    parted = optax.partition({"low": inner, "adam": optax.adam(1e-3)}, labels)
    assert lro.selection_report(parted, PARAMS).projected == ("a/kernel", "b/kernel")
    make = optax.inject_hyperparams(lro.galore, static_args=lro.static_args(lro.galore))
    injected = lro.selection_report(make(learning_rate=1e-3, rank=4), PARAMS)
    assert injected.projected == ("a/kernel", "b/kernel")


def test_report_on_shapes_agrees_with_arrays():
    shapes = jax.eval_shape(lambda: PARAMS)
    assert report(shapes) == report(PARAMS)


def test_report_agrees_with_the_state():
    state = bracket().init(PARAMS)
    projected = jax.tree.map(
        lambda basis: not isinstance(basis, optax.MaskedNode),
        state.basis,
        is_leaf=lambda x: isinstance(x, optax.MaskedNode),
    )
    named = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, low in jax.tree_util.tree_leaves_with_path(projected)
        if low
    }
    assert named == set(report(PARAMS).projected)


def test_complex_leaf_goes_through_the_inner_at_full_size():
    params = {"w": jnp.ones((48, 32), jnp.complex64) * (1 + 2j)}
    tx, reference = bracket(), optax.scale_by_adam()
    updates, _ = tx.update(params, tx.init(params), params)
    expected, _ = reference.update(params, reference.init(params))
    assert jnp.array_equal(updates["w"], expected["w"])


def test_annotations_of_what_a_mask_hides():
    """A mask that is a prefix hides a whole subtree; its annotations are not missed."""
    params = {"a": {"k": jnp.ones((16, 12))}, "b": {"k": jnp.ones((16, 12))}}
    cut = jax.sharding.PartitionSpec("x")
    specs = {"a": {"k": cut}, "b": {"k": cut}}
    tx = optax.masked(
        bracket(side="auto", param_shardings=specs), {"a": False, "b": True}
    )
    (row,) = lro.selection_report(tx, params).rows
    assert row.path == "b/k" and row.matrix.side == "right"  # the axis that is whole
