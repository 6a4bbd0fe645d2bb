"""Dion against its formulas in float64: stacks, axes, what M does not have, boxes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import lowrank_optax as lro
from lowrank_optax.linalg.bases import independent
from lowrank_optax.testing import assert_state_stable
from tests.golden import cases
from tests.golden.dion import dion, finals
from tests.golden.replay import run as replay

DECAY = 0.8


def normal(seed, *shape):
    draw = np.random.default_rng(seed).standard_normal(shape)
    return np.asarray(draw, np.float32)


def run(tx, gradients) -> tuple[list[Any], list[Any]]:
    state, update, out = tx.init(gradients[0]), jax.jit(tx.update), []
    states = [state]
    for gradient in gradients:
        updates, state = update(gradient, state)
        assert_state_stable(states[-1], state)
        out.append(updates)
        states.append(state)
    return out, states


def stepped(m, q, decay, factor):
    """One step on a matrix [k', k] in float64, with Householder's QR."""
    p, triangle = np.linalg.qr(m @ q)
    p = p * np.sign(np.diag(triangle))
    low = m.T @ p
    q = low / np.linalg.norm(low, axis=0)
    return factor * p @ q.T, m - (1 - decay) * p @ low.T, q


@pytest.mark.parametrize("axis", [-2, -1])
@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (6, 6)])
def test_as_written(shape, axis):
    gradients = [normal(t, 2, *shape) for t in range(4)]
    got, states = run(lro.power_momentum(3, DECAY, axis=axis), gradients)
    outputs, inputs = shape[-3 - axis], shape[axis]
    # Rows of the longer side; the outputs of a square.
    turned = shape[1] > shape[0] or (shape[0] == shape[1] and axis == -2)
    for layer in range(2):
        q = np.float64(states[0].directions[layer])
        m = np.zeros(shape[::-1] if turned else shape)
        for t, g in enumerate(gradients):
            g = np.float64(g[layer])
            out, m, q = stepped(
                m + (g.T if turned else g), q, DECAY, (outputs / inputs) ** 0.5
            )
            want = out.T if turned else out
            # Float32's rounding, through steps of Gram matrices.
            np.testing.assert_allclose(got[t][layer], want, atol=2e-5)
        np.testing.assert_allclose(states[-1].directions[layer], q, atol=2e-5)
        want = m.T if turned else m
        np.testing.assert_allclose(states[-1].mu[layer], want, atol=2e-5)


def test_the_recorded_sums_and_directions():
    case = cases.load(cases.DATA / "dion_f0p25_mu0p95_wd0p01.npz")
    _, state = replay(case, dion(case))
    for name, got in finals(case, state).items():
        want = case.arrays[name]
        if name.startswith("q"):  # whose signs are the factorization's
            want = want * np.sign(np.sum(got * want, 0))
        # 25 steps of two programs' roundings.
        np.testing.assert_allclose(got, want, atol=1e-4, err_msg=name)


def test_all_directions_are_the_polar_factor_in_the_limit():
    """At full rank, on a steady gradient, Q settles on the singular vectors."""
    u, _, v = np.linalg.svd(normal(0, 8, 4), full_matrices=False)
    gradient = np.float32(u * [8.0, 4.0, 2.0, 1.0] @ v)
    got, states = run(lro.power_momentum(1.0, axis=-1), [gradient] * 25)
    np.testing.assert_allclose(got[-1], np.sqrt(8 / 4) * u @ v, atol=1e-4)
    # And M is a geometric sum.
    factor = sum(0.95**t for t in range(1, 26))
    np.testing.assert_allclose(states[-1].mu, factor * gradient, rtol=1e-3)


def hard(rank, m=48, n=32):
    return normal(1, m, rank) @ normal(2, rank, n)


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e15])
@pytest.mark.parametrize("rank", [0, 1, 3])
def test_directions_that_the_sum_does_not_have_have_no_part(rank, size):
    """A QR factorization would make them of noise, each with a singular value of 1."""
    gradient = np.float32(size * hard(rank)) if rank else np.zeros((48, 32), "f")
    got, states = run(lro.power_momentum(8), [gradient] * 6)
    for update in got:
        values = np.linalg.svd(update / np.sqrt(32 / 48), compute_uv=False)
        assert np.sum(values > 1e-3) == rank
    if rank:  # on its way to the polar factor
        np.testing.assert_allclose(values[:rank], 1.0, atol=0.05)
    before, after = states[0].directions, states[-1].directions
    assert np.sum(np.all(before == after, axis=0)) == 8 - rank
    # They are found as soon as they are there.
    tx = lro.power_momentum(8)
    full, _ = tx.update(jnp.float32(size) * normal(3, 48, 32), states[-1])
    assert np.linalg.matrix_rank(full, 1e-3) == 8


@pytest.mark.parametrize("kind", ["normal", "one", "few", "falling", "same", "zero"])
def test_independent_columns(kind):
    """Orthonormal or zero, in the columns' order, and all of their span."""
    m, r = 64, 24
    y = normal(4, 2, m, r)
    if kind == "one":
        y = normal(5, 2, m, 1) * normal(6, 2, 1, r)
    elif kind == "few":
        y = normal(5, 2, m, 3) @ normal(6, 2, 3, r)
    elif kind == "falling":
        y = y * np.float32(10.0) ** -(np.arange(r, dtype=np.float32) / 2)
    elif kind == "same":
        y = np.repeat(y[..., : r // 2], 2, -1)
    elif kind == "zero":
        y = 0 * y
    got = np.float64(jax.jit(independent)(y))
    some = np.linalg.norm(got, axis=-2) > 0
    expected = {"one": 1, "few": 3, "same": r // 2, "zero": 0}
    assert some.sum(-1).tolist() == [expected.get(kind, r)] * 2
    gram = got.swapaxes(-1, -2) @ got
    # The last shift, 2 eps r, is 6e-6; rounding takes ten times that from the worst.
    np.testing.assert_allclose(gram, some[..., None] * np.eye(r), atol=1e-4)
    outside = y - got @ (got.swapaxes(-1, -2) @ y)
    share = np.linalg.norm(outside, axis=-2) / np.maximum(
        np.linalg.norm(y, axis=-2), 1e-9
    )
    # Of equal columns the second is rounding, which takes a little from the next ones.
    assert np.all(share <= (0.05 if kind == "same" else 1e-4))


def test_leaves_of_any_layout():
    """Heads, torch's order and layers that stand last: each as its own matrices."""
    numbers = lro.MatrixDimensionNumbers
    x = normal(7, 3, 6, 8)  # [layers, in, out]
    views = {
        "stack": (x, numbers(1, 2)),
        "last": (np.moveaxis(x, 0, -1), numbers(0, 1)),
        "torch": (x.swapaxes(1, 2), numbers(2, 1)),
        "heads": (x.reshape(3, 6, 2, 4), numbers(1, (2, 3))),
    }
    for name, (leaf, dimensions) in views.items():
        tx = lro.scale_by_dion(6, weight_dimension_numbers={"w": dimensions})
        state: Any = tx.init({"w": leaf})
        assert state.inner_state.directions["w"].shape == (3, 6, 6)
        update, _ = jax.jit(tx.update)({"w": leaf}, state)
        back = {
            "stack": lambda u: u,
            "last": lambda u: np.moveaxis(u, -1, 0),
            "torch": lambda u: u.swapaxes(1, 2),
            "heads": lambda u: u.reshape(3, 6, 8),
        }[name](np.asarray(update["w"]))
        # At full rank P spans G's columns whatever Q is: projected on it, N is there.
        for g, u in zip(x, back, strict=True):
            values = np.linalg.svd(u / np.sqrt(8 / 6), compute_uv=False)
            assert np.sum(values > 1e-3) == 6
            assert np.sum(u * g) > 0.5 * np.linalg.norm(g) * np.linalg.norm(u)


def test_boxes_seeds_and_bad_input():
    tx = lro.power_momentum(4)
    kernel = nn.LogicallyPartitioned(jnp.ones((3, 6, 8)), ("layers", "embed", "mlp"))
    state: Any = tx.init({"w": kernel})
    assert state.directions["w"].names == ("layers", "embed", None)
    other: Any = lro.power_momentum(4, seed=1).init({"w": kernel})
    assert np.any(other.directions["w"].value != state.directions["w"].value)
    # No more than the shorter side.
    assert tx.init({"w": jnp.ones((9, 2))}).directions["w"].shape == (2, 2)
    with pytest.raises(ValueError, match="works on matrices; leaf 'b'"):
        tx.init({"b": jnp.ones(4)})
    with pytest.raises(
        TypeError, match=r"of lro\.power_momentum is one for all leaves"
    ):
        lro.power_momentum(len)
    with pytest.raises(ValueError, match="made with rank 4 for leaf 'w'"):
        lro.power_momentum(2).update({"w": kernel}, state)
    with pytest.raises(ValueError, match="`axis` must be"):
        lro.power_momentum(2, axis=1)
