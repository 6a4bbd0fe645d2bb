"""Bad input: every error says what was expected, what came and how to mend it."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import optax
import pytest

import lowrank_optax as lro

PROJECTORS = {
    "svd": lro.svd,
    "power": lro.power,
    "gaussian": lro.gaussian,
    "given": lro.given,
    "galore": lambda rank, gap=5: lro.galore(1e-3, rank, update_proj_gap=gap),
    "scale_by_galore": lambda rank, gap=5: lro.scale_by_galore(
        rank, update_proj_gap=gap
    ),
    "galore_adafactor": lambda rank, gap=5: lro.galore_adafactor(
        1e-3, rank, update_proj_gap=gap
    ),
}
every_projector = pytest.mark.parametrize("make", PROJECTORS.values(), ids=PROJECTORS)


@pytest.fixture(autouse=True)
def no_type_checks():
    """Users have no run-time type checks: the package's own messages must come."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


PARAMS = {"layer": {"kernel": jnp.ones((12, 8))}}


@every_projector
@pytest.mark.parametrize("rank", [0, -1])
def test_rank_below_one(make, rank):
    with pytest.raises(ValueError, match=f"`rank` must be at least 1, got {rank}"):
        make(rank)


@every_projector
@pytest.mark.parametrize("rank", [2.5, 0.0, -0.5, float("nan")])
def test_rank_is_no_fraction(make, rank):
    with pytest.raises(ValueError, match=r"fraction of min.*\(0, 1\].*an int for"):
        make(rank)


@every_projector
@pytest.mark.parametrize("rank", [True, "8", None, np.float32(4)])
def test_rank_is_no_number_of_vectors(make, rank):
    with pytest.raises(TypeError, match="`rank` must be a positive int, got"):
        make(rank)


@every_projector
def test_traced_rank_or_gap(make):
    with pytest.raises(TypeError, match=r"`rank` must .*static_args=lro\.static_args"):
        jax.jit(lambda rank: make(rank) and rank)(4)
    with pytest.raises(TypeError, match=r"`update_proj_gap` must .*static_args"):
        jax.jit(lambda gap: make(4, gap) and gap)(5)


def test_hyperparameters_injected_without_static_args():
    tx = optax.inject_hyperparams(lro.galore)(learning_rate=1e-3, rank=4)
    with pytest.raises(TypeError, match=r"static_args=lro\.static_args\(fn\)"):
        jax.jit(tx.init)(PARAMS)


@every_projector
@pytest.mark.parametrize("gap", [0, -3])
def test_gap_below_one(make, gap):
    with pytest.raises(ValueError, match=f"`update_proj_gap` must .* 1, got {gap}"):
        make(4, gap)


@every_projector
@pytest.mark.parametrize("gap", [True, 2.5, None])
def test_gap_is_no_int(make, gap):
    with pytest.raises(TypeError, match="`update_proj_gap` must be a positive int"):
        make(4, gap)


def test_rank_callable_is_checked_at_init():
    tx = lro.galore(1e-3, rank=lambda path: 0)
    with pytest.raises(ValueError, match="`rank` must be at least 1, got 0"):
        tx.init(PARAMS)


@pytest.mark.parametrize("sweeps", [0, 1.5])
def test_cold_sweeps(sweeps):
    with pytest.raises((TypeError, ValueError), match="`cold_sweeps` must be"):
        lro.power(4, cold_sweeps=sweeps)


@pytest.mark.parametrize(
    "options",
    [
        {"select": "kernel"},
        {"weight_dimension_numbers": lro.MatrixDimensionNumbers(0, 1)},
    ],
    ids=["select", "dimension numbers"],
)
def test_rank_above_the_matrix(options):
    tx = lro.galore(1e-3, rank=9, **options)
    message = (
        r"'layer/kernel' of shape \(12, 8\).* 12 x 8 .*explicitly.* rank=9 exceeds "
        r"min\(m, n\)=8.* clip_rank=True"
    )
    with pytest.raises(ValueError, match=message):
        tx.init(PARAMS)
    lro.galore(1e-3, rank=9, clip_rank=True, **options).init(PARAMS)
    # By the default rule it stays full, and the report says so.
    (row,) = lro.selection_report(lro.galore(1e-3, rank=9), PARAMS).rows
    assert row.reason == "rank 9 exceeds min(m, n)=8"


@pytest.mark.parametrize(
    "make", [lro.galore, lro.galore_adafactor, lambda _, **o: lro.scale_by_galore(**o)]
)
def test_unknown_choices(make):
    with pytest.raises(
        ValueError, match=r"`side` must be one of 'short', .*; got 'up'"
    ):
        make(1e-3, side="up")
    with pytest.raises(ValueError, match=r"`conventions` must be .*; got 'pap"):
        make(1e-3, conventions="paper")


def test_unknown_side_or_form_of_a_part():
    with pytest.raises(ValueError, match="`side` must be one of 'short'"):
        lro.project(lro.svd(4), side="top")
    with pytest.raises(ValueError, match="`form` must be one of 'bounded', 'debia"):
        lro.rotate_moments(form="raw")


# The order of the stages.

OPEN, CLOSE, ADAM = lro.project(lro.svd(4)), lro.backproject(), optax.scale_by_adam()
ORDER = r"project -> transformations -> \[recovery\] -> backproject, got "


@pytest.mark.parametrize(
    ("stages", "got"),
    [
        ((), "nothing"),
        ((OPEN,), "project"),
        ((ADAM, CLOSE), r"\w+ -> backproject"),
        ((OPEN, ADAM), r"project -> \w+"),
        ((CLOSE, ADAM, OPEN), r"backproject -> \w+ -> project"),
        ((OPEN, ADAM, CLOSE, ADAM), r"project -> \w+ -> backproject -> \w+"),
        ((OPEN, OPEN, ADAM, CLOSE), "project -> project"),
        ((OPEN, CLOSE, ADAM, CLOSE), "project -> backproject -> "),
        ((OPEN, lro.Recovery(), ADAM, CLOSE), "project -> Recovery -> "),
        ((OPEN, lro.align_signs(), ADAM, CLOSE), "project -> align_signs -> "),
    ],
)
def test_wrong_order_of_stages(stages, got):
    with pytest.raises(ValueError, match=ORDER + got):
        lro.chain(*stages)


def test_projector_in_place_of_project():
    with pytest.raises(ValueError, match=r"Wrap the projector: lro\.project\(lro\.svd"):
        lro.chain(lro.svd(4), ADAM, CLOSE)


@pytest.mark.parametrize(
    "stage", [3, None, "adam", optax.adam], ids=["int", "None", "str", "function"]
)
def test_no_transformation_in_the_chain(stage):
    with pytest.raises(TypeError, match=r"expected an optax\.GradientTransf.*, got "):
        lro.chain(OPEN, stage, CLOSE)


@pytest.mark.parametrize("what", [ADAM, "svd", lro.svd, None])
def test_project_wants_a_projector(what):
    with pytest.raises(TypeError, match=r"lro\.project expected a projector"):
        lro.project(what)
    with pytest.raises(TypeError, match="Expected a projector such as"):
        lro.subspace(what, ADAM)


def test_subspace_wants_transformations():
    with pytest.raises(TypeError, match=r"`inner` must be an optax\.Gradient.*got svd"):
        lro.subspace(lro.svd(4), lro.svd(4))  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match=r"`full` must be an optax\.Gradient.*got int"):
        lro.subspace(lro.svd(4), ADAM, full=1)  # pyright: ignore[reportArgumentType]


# Trees.


@pytest.mark.parametrize(
    "gradients",
    [
        {"layer": {"weight": jnp.ones((12, 8))}},
        {"layer": {"kernel": jnp.ones((12, 8)), "bias": jnp.ones(8)}},
        {"layer": jnp.ones((12, 8))},
        {},
    ],
    ids=["other key", "one more", "other depth", "empty"],
)
def test_gradients_of_another_tree(gradients):
    tx = lro.galore(1e-3, rank=2)
    with pytest.raises(ValueError, match=r"same structure; got gradients .*parameters"):
        tx.update(gradients, tx.init(PARAMS), PARAMS)


def test_gradients_of_another_tree_than_the_state():
    tx = lro.galore(1e-3, rank=2)
    with pytest.raises(ValueError, match="keys"):
        tx.update({"other": jnp.ones((12, 8))}, tx.init(PARAMS))


@pytest.mark.parametrize("name", ["weight_dimension_numbers", "param_shardings"])
def test_annotations_of_another_tree(name):
    options = {name: {"other": None}}
    tx = lro.galore(1e-3, projector=lro.svd(2))
    tx = lro.chain(lro.project(lro.svd(2), **options), ADAM, CLOSE)
    with pytest.raises(ValueError, match=f"`{name}` must be a tree like the param"):
        tx.init(PARAMS)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        (lro.MatrixDimensionNumbers(0, 2), r"'layer/kernel' has 2 axes, .*\(2,\)"),
        (lro.MatrixDimensionNumbers(-3, 1), r"'layer/kernel' has 2 axes, .*\(-3,\)"),
        (lro.MatrixDimensionNumbers(0, 0), r"\(12, 8\): .* disjoint, non-empty axes"),
        (lro.MatrixDimensionNumbers(0, -2), "disjoint, non-empty axes"),
        (lro.MatrixDimensionNumbers((), 1), "disjoint, non-empty axes"),
    ],
)
def test_impossible_dimension_numbers(numbers, message):
    with pytest.raises(ValueError, match=message):
        lro.galore(1e-3, rank=2, weight_dimension_numbers=numbers).init(PARAMS)


def test_selected_leaf_whose_matrix_is_not_said():
    params = {"w": jnp.ones((3, 12, 8, 2))}
    with pytest.raises(
        ValueError, match=r"'w' of shape \(3, 12, 8, 2\) was selected.*"
    ):
        lro.galore(1e-3, rank=2, select="w").init(params)


# Parts that do not fit each other.


@pytest.mark.parametrize("inner", [optax.identity(), optax.scale(2.0)])
def test_transport_without_moments(inner):
    tx = lro.galore(
        1e-3, rank=2, base_optimizer=inner, transport=lro.rotate_moments(), select="w"
    )
    with pytest.raises(ValueError, match=r"has none .*mu.*transport=lro\.align_signs"):
        tx.init({"w": jnp.ones((12, 8))})


def test_given_without_bases_for_a_leaf():
    projector = lro.given(2, 5, bases={"other": jnp.ones((1, 8, 2))})
    with pytest.raises(ValueError, match=r"no bases for leaf 'layer/kernel'.*\['other"):
        lro.galore(1e-3, projector=projector).init(PARAMS)


@pytest.mark.parametrize("shape", [(1, 12, 2), (1, 8, 3), (2,)])
def test_given_bases_of_another_shape(shape):
    projector = lro.given(2, 5, bases={"layer/kernel": jnp.ones(shape)})
    with pytest.raises(ValueError, match=r"'layer/kernel' must have shape \[k, 8, 2\]"):
        lro.galore(1e-3, projector=projector).init(PARAMS)


def test_decay_without_params():
    for tx in (lro.decay_after(0.1, 0.1), lro.decay_before(0.1, 0.1)):
        with pytest.raises(ValueError, match="pass params to update"):
            tx.update(PARAMS, tx.init(PARAMS))


def test_parameter_rms_without_params():
    tx = lro.scale_by_parameter_rms()
    with pytest.raises(ValueError, match="needs params"):
        tx.update(PARAMS, tx.init(PARAMS))


def test_report_without_a_bracket():
    with pytest.raises(ValueError, match="found no low-rank bracket"):
        lro.selection_report(optax.adam(1e-3), PARAMS)


@pytest.mark.parametrize(
    "part",
    [OPEN, CLOSE, lro.svd(4), lro.gaussian(4), lro.align_signs(), lro.Recovery()],
    ids=lambda part: type(part).__name__,
)
@pytest.mark.parametrize("first", [True, False])
def test_part_in_a_plain_chain(part, first):
    stages = (part, ADAM) if first else (ADAM, part)
    name = type(part).__name__
    with pytest.raises(
        TypeError, match=rf"{name} is a part .*lro\.chain\(lro\.project"
    ):
        optax.chain(*stages)


def test_gradient_of_another_shape():
    tx = lro.galore(1e-3, rank=2)
    gradients = {"layer": {"kernel": jnp.ones((8, 12))}}
    with pytest.raises(ValueError, match=r"layer/kernel.*\(8, 12\).*\(12, 8\)"):
        tx.update(gradients, tx.init(PARAMS), PARAMS)


def test_transport_between_bases_without_rotation():
    with pytest.raises(ValueError, match=r"gaussian keeps no basis.*keep_moments"):
        lro.galore(1e-3, projector=lro.gaussian(2, 3), transport=lro.rotate_moments())


def test_complex_leaf_selected_explicitly():
    params = {"w": jnp.ones((48, 32), jnp.complex64)}
    with pytest.raises(TypeError, match=r"'w' is complex64.*Leave the leaf out"):
        lro.galore(1e-3, rank=2, select="w").init(params)


@pytest.mark.parametrize("shape", [(8, 2), (1, 3, 8, 2)])
def test_given_bases_without_or_with_too_many_axes(shape):
    projector = lro.given(2, 5, bases={"layer/kernel": jnp.ones(shape)})
    with pytest.raises(ValueError, match=r"'layer/kernel' must have shape \[k, 8, 2\]"):
        lro.galore(1e-3, projector=projector).init(PARAMS)
