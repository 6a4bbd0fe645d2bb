"""SinkGD and RACS against their formulas in float64, and wherever else they serve."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import lowrank_optax as lro
from lowrank_optax.testing import assert_state_stable
from tests.golden import cases
from tests.golden.replay import run as replay
from tests.golden.stateless import racs, racs_finals

BOTH = {
    "sinkgd": lro.normalize_rows_and_columns,
    "racs": functools.partial(lro.scale_by_rank_one_rms, growth_limit=None),
}
both = pytest.mark.parametrize("make", BOTH.values(), ids=BOTH)


def normal(seed, *shape):
    """Rows and columns of very different sizes."""
    rng = np.random.default_rng(seed)
    rows = np.exp(2 * rng.standard_normal((*shape[:-1], 1)))
    columns = np.exp(2 * rng.standard_normal((*shape[:-2], 1, shape[-1])))
    return np.asarray(rng.standard_normal(shape) * rows * columns, np.float32)


def rms(x, axis):
    return np.sqrt(np.mean(x**2, axis, keepdims=True))


def balanced(x, iterations, axis):
    for _ in range(iterations):
        x = x / rms(x, axis)
        x = x / rms(x, -3 - axis)
    return x


def fitted(x, iterations, axis):
    squares, out = x**2, -3 - axis
    s = q = np.ones_like(np.sum(squares, axis, keepdims=True))
    for _ in range(iterations):
        s = np.sum(squares * q, out, keepdims=True) / np.sum(q**2, out, keepdims=True)
        q = np.sum(squares * s, axis, keepdims=True) / np.sum(s**2, axis, keepdims=True)
    return s, q


def run(tx, gradients) -> tuple[list[Any], Any]:
    state, update, out = tx.init(gradients[0]), jax.jit(tx.update), []
    for gradient in gradients:
        before = state
        updates, state = update(gradient, state)
        assert_state_stable(before, state)
        out.append(updates)
    return out, state


@pytest.mark.parametrize("axis", [-2, -1])
@pytest.mark.parametrize("shape", [(6, 4), (1, 5), (2, 3, 4, 6)])
def test_rows_and_columns(shape, axis):
    x = normal(0, *shape)
    (got,), _ = run(lro.normalize_rows_and_columns(3, axis), [x])
    # Three times two roots of sums in float32.
    np.testing.assert_allclose(got, balanced(np.float64(x), 3, axis), rtol=5e-6)


@pytest.mark.parametrize("axis", [-2, -1])
@pytest.mark.parametrize("shape", [(6, 4), (2, 3, 4, 6)])
def test_rank_one_rms(shape, axis):
    gradients = [normal(t, *shape) * 3.0**t for t in range(4)]
    tx = lro.scale_by_rank_one_rms(0.8, 1.5, iterations=3, axis=axis)
    got, state = run(tx, gradients)
    s: Any = 0.0
    q: Any = 0.0
    before: Any = 0.0
    for t, (g, u) in enumerate(zip(gradients, got, strict=True), 1):
        new = fitted(np.float64(g), 3, axis)
        s, q = (0.8 * old + 0.2 * x for old, x in zip((s, q), new, strict=True))
        want = g / np.sqrt(s * q) * (1 - 0.8**t)
        norm = np.sqrt(np.sum(want**2, (-2, -1), keepdims=True))
        limit = np.where(before > 0, 1.5 * before, np.inf)
        want, before = want * np.minimum(1, limit / norm), np.minimum(norm, limit)
        np.testing.assert_allclose(u, want, rtol=1e-5, atol=1e-7)
    rows, columns = (s, q) if axis == -2 else (q, s)
    np.testing.assert_allclose(state.row, rows[..., 0], rtol=1e-5)
    np.testing.assert_allclose(state.col, columns[..., 0, :], rtol=1e-5)
    np.testing.assert_allclose(state.norm, before[..., 0, 0], rtol=1e-5)


def test_the_recorded_factors_and_norms():
    case = cases.load(cases.DATA / "racs_paper_it5.npz")
    _, state = replay(case, racs(case))
    for name, got in racs_finals(case, state).items():
        np.testing.assert_allclose(got, case.arrays[name], rtol=1e-5, err_msg=name)


@both
@pytest.mark.parametrize("size", [1e-15, 1.0, 1e15])
def test_the_size_of_a_gradient_does_not_matter(make, size):
    x = normal(1, 6, 4)
    x[2] = x[:, 1] = 0.0  # and what is zero stays zero
    (got,), _ = run(make(), [np.float32(size) * x])
    (want,), _ = run(make(), [x])
    assert np.isfinite(got).all()
    assert not got[2].any() and not got[:, 1].any()
    np.testing.assert_allclose(got, want, rtol=2e-5)


@both
def test_zeros_and_vectors(make):
    tx = make()
    (got, again), _ = run(tx, [jnp.zeros((4, 3)), jnp.ones((4, 3))])
    assert not got.any() and np.isfinite(again).all() and again.all()
    with pytest.raises(ValueError, match=r"works on matrices; leaf 'b' has shape \(5,"):
        make().init({"w": jnp.ones((4, 3)), "b": jnp.ones(5)})


@both
def test_an_unknown_axis(make):
    with pytest.raises(ValueError, match="`axis` must be"):
        make(axis=0)


@pytest.mark.parametrize("name", BOTH)
def test_dimension_numbers_say_which_axis_is_the_input(name):
    """Stacks, torch's order and heads: each as its own matrices (in, out)."""
    method = getattr(lro, f"scale_by_{name}")
    x = normal(2, 3, 6, 4)
    plain = BOTH[name]()
    want = np.stack([run(plain, [layer])[0][0] for layer in x])
    numbers = lro.MatrixDimensionNumbers
    views = {
        "stack": (x, numbers(1, 2)),
        "layers last": (np.moveaxis(x, 0, -1), numbers(0, 1)),
        "torch": (x.swapaxes(1, 2), numbers(2, 1)),
        "heads": (x.reshape(3, 6, 2, 2), numbers(1, (2, 3))),
    }
    tree = {key: view for key, (view, _) in views.items()}
    tx = method(
        scale=1.0, weight_dimension_numbers={k: n for k, (_, n) in views.items()}
    )
    (got,), _ = run(tx, [tree])
    undo = {
        "stack": lambda u: u,
        "layers last": lambda u: np.moveaxis(u, -1, 0),
        "torch": lambda u: u.swapaxes(1, 2),
        "heads": lambda u: u.reshape(x.shape),
    }
    for key, update in got.items():
        np.testing.assert_allclose(undo[key](update), want, rtol=1e-5, err_msg=key)


@both
def test_as_the_complement(make):
    """What lies outside the subspace gets the transformation, leaf by leaf."""
    basis = jnp.linalg.qr(jax.random.normal(jax.random.key(0), (6, 2)))[0]
    tx = lro.chain(
        lro.project(lro.given(2, bases={"w": basis[None]}), select="w", side="left"),
        optax.identity(),
        lro.complement(make(), 0.5),
        lro.backproject(2.0),
    )
    x = jax.random.normal(jax.random.key(1), (6, 8))
    inside = basis @ (basis.T @ x)
    (want,), _ = run(make(), [x - inside])
    (got,), _ = run(tx, [{"w": x}])
    # What is outside is a difference in float32.
    np.testing.assert_allclose(got["w"], 2.0 * inside + 0.5 * want, atol=1e-5)


def test_as_the_treatment_of_embedding_and_head():
    """A bracket of its own in the place of `full`: no state of their size is left."""
    params = {
        "embed": jnp.ones((64, 8)),
        "mlp": {"kernel": jnp.ones((8, 16))},
        "norm": {"scale": jnp.ones(8)},
        "lm_head": jnp.ones((8, 64)),
    }
    outer = functools.partial(lro.scale_by_galore, 2, update_proj_gap=3)
    adam = lro.state_bytes(outer(), params)
    for name, kept in (("sinkgd", 0), ("racs", 2 * (64 + 8 + 1))):
        tables = getattr(lro, f"scale_by_{name}")(select="embed|lm_head", scale=1.0)
        tx = outer(full=tables)
        numbers = (adam.total - lro.state_bytes(tx, params).total) / 4
        # The inner bracket has a counter and a key of its own, and one more counter.
        assert 2 * 2 * 64 * 8 - kept - 8 < numbers <= 2 * 2 * 64 * 8 - kept
        gradient = {**params, "embed": normal(5, 64, 8)}
        (got,), _ = run(tx, [gradient])
        (want,), _ = run(BOTH[name](), [gradient["embed"]])
        np.testing.assert_allclose(got["embed"], want, rtol=1e-5)


def test_boxes_have_the_names_of_the_axes_that_are_left():
    kernel = nn.LogicallyPartitioned(jnp.ones((3, 6, 4)), ("layers", "embed", "mlp"))
    params: Any = {"w": kernel}
    state: Any = lro.scale_by_rank_one_rms().init(params)
    assert state.row["w"].names == ("layers", "embed")
    assert state.col["w"].names == ("layers", "mlp")
    assert state.norm["w"].names == ("layers",)


@pytest.mark.parametrize("make", [lro.sinkgd, lro.racs])
def test_a_side_is_no_argument(make):
    with pytest.raises(TypeError, match=r"has no argument `side`"):
        make(1e-2, side="left")
    bracket = lro.project(lro.whole(), side="long")
    tx = lro.chain(bracket, optax.identity(), lro.backproject())
    with pytest.raises(ValueError, match=r"lro\.whole works along an axis of its own"):
        tx.init({"w": jnp.ones((6, 4))})
