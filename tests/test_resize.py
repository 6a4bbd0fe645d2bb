"""A state is carried over to another rank, gap, projector, dtype or codec."""

import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lowrank_optax as lro
from lowrank_optax import quantization
from tests.rows import ROWS, subject
from tests.test_rank_on_restore import HAVING, at_another_rank

PARAMS = {"layers": {"kernel": jnp.ones((2, 12, 16))}, "bias": jnp.ones(6)}
pytestmark = pytest.mark.filterwarnings("ignore::lowrank_optax.SelectionWarning")
SHAPES = {
    "layers": {"kernel": jax.ShapeDtypeStruct((2, 64, 48), "float32")},
    "n": {"kernel": jax.ShapeDtypeStruct((40, 64), "float32")},
    "bias": jax.ShapeDtypeStruct((64,), "float32"),
}


def shapes(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


def resized(old, new, params=SHAPES) -> Any:
    """From shapes alone: nothing is compiled."""
    state = jax.eval_shape(old.init, params)
    return jax.eval_shape(lambda s: lro.resize_state(s, old, new, params), state)


def galore(rank=4, **options):
    size = {} if "projector" in options else {"rank": rank}
    return lro.galore(1e-2, **{**size, "layer_axis": 0, **options})


def stepped(tx, params=PARAMS, steps=2) -> Any:
    """A state that has seen gradients of a falling spectrum."""
    draw = np.random.default_rng(0)

    def gradient(p):
        weights = 0.7 ** np.arange(p.shape[-1])
        return jnp.asarray(draw.normal(size=p.shape) * weights, p.dtype)

    update, state = jax.jit(tx.update), tx.init(params)
    for _ in range(steps):
        _, state = update(jax.tree.map(gradient, params), state, params)
    return state


def test_a_larger_rank_keeps_vectors_and_moments_and_adds_orthogonal_ones():
    old, new = galore(4, select="."), galore(7, select=".")
    before = stepped(old)
    after = jax.jit(lambda s: lro.resize_state(s, old, new, PARAMS))(before)
    assert shapes(after) == shapes(jax.eval_shape(new.init, PARAMS))
    p, q = (x.basis["layers"]["kernel"] for x in (before, after))
    np.testing.assert_array_equal(q[..., :4], p)
    gram = jnp.swapaxes(q, -1, -2) @ q
    np.testing.assert_allclose(gram, np.broadcast_to(np.eye(7), gram.shape), atol=1e-5)
    for field in ("mu", "nu"):
        old_, new_ = (getattr(x.inner_state, field) for x in (before, after))
        low, more = old_["layers"]["kernel"], new_["layers"]["kernel"]
        np.testing.assert_array_equal(more[:, :4], low)
        np.testing.assert_array_equal(new_["bias"], old_["bias"])
        rest = jnp.zeros_like(low[:, :3])
        if field == "nu":  # of new vectors nothing is known, and zero would be a claim
            rest = rest + jnp.mean(jnp.sqrt(low), 1, keepdims=True) ** 2
        np.testing.assert_allclose(more[:, 4:], rest, rtol=1e-6)
    assert int(after.count) == int(after.inner_state.count) == 2
    np.testing.assert_array_equal(after.key, before.key)
    assert not jnp.any(after.pending["layers"]["kernel"])


@pytest.mark.parametrize("base", [optax.scale_by_adam, lambda: optax.trace(0.9)])
def test_a_smaller_rank_keeps_the_vectors_with_the_largest_moments(base):
    old, new = (galore(r, select=".", base_optimizer=base()) for r in (4, 2))
    state = stepped(old)
    field = "nu" if hasattr(state.inner_state, "nu") else "trace"
    moments = getattr(state.inner_state, field)
    sizes = jnp.asarray([[1.0, 4.0, 2.0, 3.0], [4.0, 1.0, 3.0, 2.0]])
    known = sizes[..., None] * jnp.ones_like(moments["layers"]["kernel"])
    moments = moments | {"layers": {"kernel": known}}
    inner = state.inner_state._replace(**{field: moments})
    state = state._replace(inner_state=inner)
    after = lro.resize_state(state, old, new, PARAMS)
    p, q = (x.basis["layers"]["kernel"] for x in (state, after))
    for layer, kept in enumerate(([1, 3], [0, 2])):  # in their order
        np.testing.assert_array_equal(q[layer], p[layer][:, kept])
        moved = getattr(after.inner_state, field)["layers"]["kernel"][layer]
        np.testing.assert_array_equal(moved, known[layer][jnp.asarray(kept)])


def test_two_sides_keep_those_of_each():
    old, new = (galore(r, select=".", side="both") for r in (4, 3))
    state = stepped(old)
    nu = jnp.outer(jnp.asarray([1.0, 4, 3, 2]), jnp.asarray([4.0, 3, 1, 2]))
    nu = {"layers": {"kernel": jnp.stack([nu, nu])}, "bias": jnp.ones(6)}
    state = state._replace(inner_state=state.inner_state._replace(nu=nu))
    after = lro.resize_state(state, old, new, PARAMS)
    rows, columns = np.asarray([1, 2, 3]), np.asarray([0, 1, 3])
    for side, kept in (("left", rows), ("right", columns)):
        p, q = (getattr(x.basis["layers"]["kernel"], side) for x in (state, after))
        np.testing.assert_array_equal(q, p[..., kept])
    for field in ("mu", "nu"):
        p, q = (
            getattr(x.inner_state, field)["layers"]["kernel"] for x in (state, after)
        )
        np.testing.assert_array_equal(q, p[:, rows][:, :, columns])


def test_what_becomes_full_is_lifted_and_what_was_full_finds_its_basis():
    # At rank 12 the default rule keeps the matrices full: nothing would be saved.
    low, full = galore(2), galore(12)
    before = stepped(low)
    lifted = lro.resize_state(before, low, full, PARAMS)
    assert shapes(lifted) == shapes(jax.eval_shape(full.init, PARAMS))
    p, mu = before.basis["layers"]["kernel"], before.inner_state.mu["layers"]["kernel"]
    whole = lifted.inner_state.mu["layers"]["kernel"]
    np.testing.assert_allclose(whole, p @ mu, atol=1e-6)
    nu = lifted.inner_state.nu["layers"]["kernel"]
    assert jnp.all(nu >= whole**2) and jnp.all(nu > 0)

    # Of rank 2, so that two vectors hold all of it.
    found = lro.resize_state(lifted, full, low, PARAMS)
    p, mu = found.basis["layers"]["kernel"], found.inner_state.mu["layers"]["kernel"]
    np.testing.assert_allclose(p @ mu, whole, atol=1e-5)
    assert not jnp.any(found.pending["layers"]["kernel"])
    # Before the first step there is nothing to find, and a refresh is owed.
    fresh = lro.resize_state(full.init(PARAMS), full, low, PARAMS)
    assert jnp.all(fresh.pending["layers"]["kernel"])
    assert all(jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(fresh))


@pytest.mark.parametrize("method", [lro.fira, lro.frugal, lro.ldadam])
def test_recoveries_end_and_begin_with_their_leaves(method):
    low, full = (method(1e-2, rank=r, layer_axis=0) for r in (2, 12))
    for old, new in ((low, full), (full, low), (low, low)):
        found = resized(old, new, PARAMS)
        assert shapes(found) == shapes(jax.eval_shape(new.init, PARAMS))


def test_codecs_and_dtypes_round_once():
    plain, small = galore(8, select="."), galore(8, select=".", state_dtype="bfloat16")
    codes = functools.partial(lro.galore_8bit, 1e-2, 8, layer_axis=0, select=".")
    codes = codes(min_size=0)
    state = stepped(plain)
    nu = state.inner_state.nu["layers"]["kernel"]

    encoded = lro.resize_state(state, plain, codes, PARAMS)
    found = encoded.inner_state.nu["layers"]["kernel"]
    same = quantization.quantize(nu, found.codec)
    jax.tree.map(np.testing.assert_array_equal, found, same)
    decoded = lro.resize_state(encoded, codes, plain, PARAMS)
    np.testing.assert_array_equal(
        decoded.inner_state.nu["layers"]["kernel"], found.decode()
    )
    # Bases of an 8-bit method are bfloat16.
    np.testing.assert_array_equal(
        decoded.basis["layers"]["kernel"],
        state.basis["layers"]["kernel"].astype("bfloat16").astype("float32"),
    )
    narrow = lro.resize_state(state, plain, small, PARAMS)
    np.testing.assert_array_equal(
        narrow.inner_state.nu["layers"]["kernel"], nu.astype("bfloat16")
    )
    # Nothing changes where nothing has changed, codes included.
    again = lro.resize_state(encoded, codes, codes, PARAMS)
    jax.tree.map(np.testing.assert_array_equal, again, encoded)


SIZED = [
    name
    for name, row in ROWS.items()
    if HAVING & set(inspect.signature(row.make.func).parameters)
]
# Projectors without a stored basis, and inner optimizers with sizes of their own.
REFUSED = ("has lro.gaussian", "has lro.wavelet", "it is no moment of a basis")


@pytest.mark.parametrize("name", SIZED)
def test_every_method_at_another_rank(name):
    make, params = ROWS[name].make, subject(name).params
    old, (new, *_) = make(), at_another_rank(make)
    try:
        state = resized(old, new(), params)
    except ValueError as error:
        assert any(reason in str(error) for reason in REFUSED), error
    else:
        assert shapes(state) == shapes(jax.eval_shape(new().init, params))


@pytest.mark.parametrize(
    "projector",
    [
        lro.svd(6),
        lro.grassmann(6),
        lro.online_pca(6),
        lro.lazy(lro.quantize_basis(lro.power(6), quantization.affine(bits=8))),
        lro.watched(lro.power(6)),
        lro.switched(6),
    ],
    ids=lambda p: type(p).__name__,
)
def test_another_projector_takes_the_basis_over(projector):
    old, new = galore(4, select="."), galore(4, select=".", projector=projector)
    assert shapes(resized(old, new)) == shapes(jax.eval_shape(new.init, SHAPES))
    assert shapes(resized(new, old)) == shapes(jax.eval_shape(old.init, SHAPES))


def test_columns_of_a_cosine_basis_stay_such():
    old, new = (lro.dct_adamw(1e-2, rank=r, select=".") for r in (3, 5))
    before = stepped(old, {"kernel": jnp.ones((8, 12))})
    after = lro.resize_state(before, old, new, {"kernel": jnp.ones((8, 12))})
    p, q = (np.asarray(x.basis["kernel"]) for x in (before, after))
    np.testing.assert_array_equal(q[:3], p)
    assert len({*q.tolist()}) == 5
    with pytest.raises(ValueError, match=r"dct\(kind='dct3'\) chooses among fixed"):
        resized(galore(4), galore(4, projector=lro.dct(4)))


def nested(rank, rate=1e-2):
    """Most wrappers at once."""
    low = optax.inject_hyperparams(lro.galore, static_args=lro.static_args(lro.galore))(
        learning_rate=rate, rank=rank, layer_axis=0
    )
    masks = {"layers": True, "n": True, "bias": False}
    labels = {"layers": "low", "n": "low", "bias": "rest"}
    parts = {"low": low, "rest": lro.quantize_state(optax.scale_by_adam())}
    chain = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.partition(parts, labels),
        optax.masked(galore(rank), masks),
    )
    return optax.MultiSteps(
        optax.apply_if_finite(chain, 3), 2
    ).gradient_transformation()


def test_through_wrappers():
    old, new = nested(4), nested(8, rate=1e-3)
    assert shapes(resized(old, new)) == shapes(jax.eval_shape(new.init, SHAPES))
    state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), SHAPES)
    state = jax.jit(lambda p: lro.resize_state(old.init(p), old, new, p))(state)
    rates = optax.tree_utils.tree_get(state, "learning_rate")
    assert rates == pytest.approx(1e-2)  # kept, as all that is no basis and no moment


def test_sums_inside_a_bracket_turn_too():
    def tx(rank):
        inner = optax.MultiSteps(optax.scale_by_adam(), 3).gradient_transformation()
        return galore(rank, select=".", base_optimizer=inner)

    old, new = tx(2), tx(4)
    before = stepped(old)
    after = lro.resize_state(before, old, new, PARAMS)
    sums, more = (x.inner_state.acc_grads["layers"]["kernel"] for x in (before, after))
    assert jnp.any(sums)
    np.testing.assert_array_equal(more, jnp.pad(sums, ((0, 0), (0, 2), (0, 0))))


MERGED = {
    "layers": {"kernel": lro.MatrixDimensionNumbers(1, (0, 2))},
    "n": {"kernel": lro.MatrixDimensionNumbers(0, 1)},
    "bias": None,
}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (galore(), galore(side="long"), "lies on its right side, .*side='right'"),
        (galore(), lro.fira(1e-2, 4, layer_axis=0), "has recover_scale, .*no recovery"),
        (galore(), optax.adamw(1e-2), "another method: the state has"),
        (
            galore(),
            galore(base_optimizer=optax.scale_by_lion()),
            r"moments are \[\['mu",
        ),
        (lro.apollo(1e-2, 4), lro.apollo(1e-2, 8), "lro.gaussian at rank=4.*at rank=8"),
        (lro.gwt(1e-2, 1), lro.gwt(1e-2, 2), "lro.wavelet at level=1.*at level=2"),
        (galore(), galore(layer_axis=None, weight_dimension_numbers=MERGED), "64 x 96"),
    ],
)
def test_what_cannot_be_kept_is_refused(old, new, message):
    with pytest.raises(ValueError, match=rf"(?s)lro\.resize_state: .*({message})"):
        resized(old, new)


def test_a_state_of_another_optimizer_is_refused():
    state = jax.eval_shape(optax.adam(1e-2).init, SHAPES)
    with pytest.raises(ValueError, match="the state is not one of old_tx: it has"):
        jax.eval_shape(
            lambda s: lro.resize_state(s, galore(4), galore(8), SHAPES), state
        )
    state = jax.eval_shape(galore(2).init, SHAPES)
    with pytest.raises(ValueError, match=r"made with rank 2 .*has rank 4\."):
        jax.eval_shape(
            lambda s: lro.resize_state(s, galore(4), galore(8), SHAPES), state
        )


@pytest.mark.variant
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_state_that_lies_on_a_mesh(kind):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(kind,), devices=jax.devices()[:2])
    place = {"kernel": NamedSharding(mesh, P(None, "x"))}
    params = {"kernel": jnp.ones((16, 12))}
    old, new = galore(3, layer_axis=None), galore(5, layer_axis=None)
    state = stepped(old, params)
    expected = lro.resize_state(state, old, new, params)
    with jax.set_mesh(mesh):
        params = jax.device_put(params, place)
        was, places = (lro.state_shardings(tx, params, place) for tx in (old, new))
        state = jax.device_put(state, was)
        resize = jax.jit(
            lambda s, p: lro.resize_state(s, old, new, p), out_shardings=places
        )
        found = resize(state, params)
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), found, expected
        )
        assert jax.tree.map(lambda x: x.sharding, found) == places
        jax.eval_shape(new.update, params, found, params)
        eager = lro.resize_state(state, old, new, params)
        assert shapes(eager) == shapes(found)
