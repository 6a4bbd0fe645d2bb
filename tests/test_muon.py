"""Muon against Optax's, in fewer bits, and its parts against their formulas."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from lowrank_optax import quantization
from lowrank_optax.leaves.layer import Layer
from lowrank_optax.linalg.polar import polar_quintic
from tests.golden import cases

NUMBERS = lro.MatrixDimensionNumbers


def normal(seed, *shape):
    draw = np.random.default_rng(seed).standard_normal(shape)
    return jnp.asarray(draw, jnp.float32)


def run(tx, params, steps=4) -> tuple[Any, Any]:
    state, update = tx.init(params), jax.jit(tx.update)
    for t in range(steps):
        leaves, treedef = jax.tree.flatten(params)
        gradient = treedef.unflatten(
            normal((7, t, i), *leaf.shape) for i, leaf in enumerate(leaves)
        )
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


# --- as Optax's ----------------------------------------------------------------------

PARAMS = {
    "up": {"kernel": normal(0, 6, 10), "bias": normal(1, 10)},
    "down": {"kernel": normal(2, 10, 6)},
    "query": {"kernel": normal(3, 3, 6, 2, 5)},  # [layers, d, heads, width]
}
MINE = {
    "up": {"kernel": NUMBERS(0, 1), "bias": None},
    "down": {"kernel": NUMBERS(0, 1)},
    "query": {"kernel": NUMBERS(1, (2, 3))},
}


@pytest.mark.parametrize(
    "options",
    [{}, {"nesterov": False, "consistent_rms": 0.2, "ns_coeffs": "dion", "eps": 1e-6}],
    ids=["default", "other"],
)
def test_equal_to_optax(options):
    theirs = jax.tree.map(
        lambda n: optax.contrib.MuonDimensionNumbers(n.reduction_axis, n.output_axis),
        MINE,
        is_leaf=lambda n: isinstance(n, NUMBERS),
    )
    decay = jax.tree.map(lambda p: p.ndim > 1, PARAMS)
    reference = optax.contrib.muon(
        1e-2,
        weight_decay=0.1,
        muon_weight_dimension_numbers=theirs,
        **options,
    )
    tx = lro.muon(
        1e-2,
        weight_decay=0.1,
        mask=decay,
        weight_dimension_numbers=MINE,
        **options,
    )
    expected, _ = run(reference, PARAMS)
    got, _ = run(tx, PARAMS)
    # Products of another order, through steps that raise a small singular value 3.4
    # times each.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), got, expected
    )


def test_bias_and_width_decide_which_axis_is_the_input():
    """The factor by width needs it: another leaf's bias says how kernels are stored."""
    found = lro.dimension_numbers({k: PARAMS[k] for k in ("up", "down")})
    assert found == {k: MINE[k] for k in ("up", "down")}


# --- in fewer bits -------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "share"), [(8, 0.02), (4, 0.3)])
def test_few_bits_are_near_the_whole(bits, share):
    params = {"w": normal(0, 12, 16)}
    make = functools.partial(lro.scale_by_muon, select=".", min_size=0, block=8)
    few, state = run(make(bits=bits), params, 6)
    whole, _ = run(lro.scale_by_muon(select="."), params, 6)
    travel = np.linalg.norm(whole["w"] - params["w"])
    error = np.linalg.norm(few["w"] - whole["w"])
    # Errors of half a level in 127, or of one in 7, of which orthogonalization raises
    # what lies along small singular vectors.
    assert 0 < error < share * travel
    assert state.inner_state[0].mu["w"].codec.bits == bits


def test_bytes():
    params = {"w": jnp.zeros((2, 64, 128)), "b": jnp.zeros(5)}
    sizes = {
        bits: lro.state_bytes(lro.muon(1.0, bits=bits, layer_axis=0), params).by_role
        for bits in (None, 8, 4)
    }
    n, bias = 2 * 64 * 128, 4 * 5
    assert sizes[None]["mu"] == 4 * n + bias
    assert sizes[8]["mu"] == n + 2 * n // 128 + bias
    assert sizes[4]["mu"] == n // 2 + 2 * n // 128 + bias
    assert {found["nu"] for found in sizes.values()} == {bias}


@pytest.mark.parametrize("leafwise", [False, True])
def test_random_rounding_decays_and_follows(leafwise):
    """A momentum of two levels without gradient; to the nearest, it is stuck."""
    first = jnp.full((64, 64), 2.0).at[:, 0].set(7.0)

    def after(stochastic):
        tx = lro.quantize_state(
            lro.momentum(0.9, nesterov=False),
            quantization.symmetric(4, 64),
            min_size=0,
            leafwise=leafwise,
            stochastic=stochastic,
        )
        params = {"a": first, "b": first}
        _, state = tx.update(params, tx.init(params))
        # The largest entry holds its level, so that the step of the block stays.
        rest = {k: x.at[:, 1:].set(0.0) for k, x in params.items()}
        step = jax.jit(tx.update)
        for _ in range(5):
            _, state = step(rest, state)
        return {k: x.decode()[:, 1:] for k, x in state.mu.items()}

    start = 0.1 * 2.0
    stuck, free = after(False), after(True)
    # The largest grows from 0.7 to 3.3, and with it the step: to the nearest, entries
    # of 0.2 are two levels of 0.1, then none.
    expected = start * 0.9**5
    for name, x in free.items():
        # 4032 entries of a spread of a level, 0.5, or less.
        assert abs(x.mean() - expected) < 4 * 0.5 / 63, name
        assert not abs(stuck[name].mean() - expected) < 0.05
    assert bool(jnp.any(free["a"] != free["b"]))  # each leaf has numbers of its own


@pytest.mark.parametrize("leafwise", [False, True])
def test_a_layer_alone_is_rounded_as_in_its_stack(leafwise):
    """Whatever other leaves there are, and in whatever order they are worked on."""
    tx = lro.quantize_state(
        lro.momentum(),
        quantization.symmetric(4, 8),
        min_size=0,
        leafwise=leafwise,
        stochastic=True,
    )
    stack = {"a": normal(0, 6, 8), "b": normal(1, 3, 4, 8), "c": normal(2, 3, 4, 8)}
    _, whole = tx.update(stack, tx.init(stack))
    for i in range(3):
        layer = {k: x[i : i + 1] for k, x in stack.items()} | {"a": optax.MaskedNode()}
        _, state = tx.update(layer, tx.init(layer), layer=Layer(i, 3))
        for name in ("b", "c"):
            np.testing.assert_array_equal(
                state.mu[name].codes[0], whole.mu[name].codes[i]
            )
    assert np.any(whole.mu["b"].codes != whole.mu["c"].codes)


def test_random_rounding_wants_to_know_the_step():
    codec = quantization.symmetric(4)
    with pytest.raises(ValueError, match="needs a codec that can round at random"):
        lro.quantize_state(optax.trace(0.9), stochastic=True)
    tx = lro.quantize_state(optax.trace(0.9), codec, min_size=0, stochastic=True)
    params = {"w": jnp.ones((4, 4))}
    with pytest.raises(ValueError, match="which step it is"):
        tx.update(params, tx.init(params))


# --- the parts -----------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (2, 3, 6, 4)])
def test_quintic_steps(shape):
    table = ((3.0, -3.0, 1.0), (2.0, -1.5, 0.5))
    x = np.asarray(normal(4, *shape), np.float64)
    y = x / np.linalg.norm(x, axis=(-2, -1), keepdims=True)
    for a, b, c in table:
        gram = y @ y.swapaxes(-1, -2)
        y = a * y + b * gram @ y + c * gram @ gram @ y
    got = polar_quintic(jnp.float32(1e-20) * normal(4, *shape), table)
    np.testing.assert_allclose(got, y, atol=1e-6)


def test_shape_factors():
    x, sizes = normal(5, 4, 9), {}
    for axis in (-2, -1):
        tx = lro.orthogonalize("svd", shape_factor="width", axis=axis)
        sizes[axis] = jnp.linalg.norm(tx.update(x, tx.init(x))[0], 2)
    np.testing.assert_allclose([sizes[-2], sizes[-1]], [1.5, 1.0], rtol=1e-6)
    tx = lro.orthogonalize("svd", shape_factor="sqrt_long", rms=0.3)
    update = tx.update(x, tx.init(x))[0]
    np.testing.assert_allclose(jnp.sqrt(jnp.mean(update**2)), 0.3, rtol=1e-6)


def test_recorded_rows_are_chosen():
    case = cases.load(cases.DATA / "dion2_f0p25_exactpolar.npz")
    tx = lro.row_momentum(0.25, 0.95, axis=-1)
    params = {name: jnp.asarray(case.params(name)[0]) for name in case.names}
    state, update = tx.init(params), jax.jit(tx.update)
    for step in range(case.config["steps"]):
        gradient = {name: case.gradients[name][step] for name in case.names}
        updates, state = update(gradient, state)
        for name, rows in updates.items():
            chosen = case.arrays[f"indices_{name}"][step]
            along = 1 if rows.shape[0] <= rows.shape[1] else 0
            (found,) = np.nonzero(np.any(rows, along))
            assert found.tolist() == sorted(chosen.tolist()), (name, step)
    for name in case.names:
        want = case.arrays[f"m_final_{name}"]
        np.testing.assert_allclose(state.mu[name], want, rtol=1e-5, atol=1e-5)


def test_a_fraction_of_the_rows_moves():
    params = {"w": normal(0, 3, 6, 10)}
    numbers = {"w": NUMBERS(1, 2)}
    tx = lro.scale_by_muon(fraction=0.3, weight_dimension_numbers=numbers, bits=8)
    updates, _ = tx.update(params, tx.init(params))
    # Of the shorter side, two of six inputs in each of three layers.
    assert jnp.any(updates["w"], -1).sum(-1).tolist() == [2, 2, 2]
    with pytest.raises(ValueError, match="`fraction` must lie in"):
        lro.muon(1e-2, fraction=0.0).init(params)
    with pytest.raises(TypeError, match="`nesterov` has no effect beside `fraction`"):
        lro.muon(1e-2, fraction=0.5, nesterov=False)


def test_momentum():
    mu: Any = 0.0
    tx = lro.momentum(0.9)
    state = tx.init(jnp.zeros(3))
    for t in range(1, 5):
        gradient = normal(t, 3)
        update, state = tx.update(gradient, state)
        mu = 0.9 * mu + 0.1 * np.float64(gradient)
        want = 0.9 * mu / (1 - 0.9 ** (t + 1)) + 0.1 * np.float64(gradient) / (
            1 - 0.9**t
        )
        np.testing.assert_allclose(update, want, rtol=2e-6)
    np.testing.assert_allclose(state.mu, mu, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 2}, "`bits` must be"),
        ({"ns_coeffs": "muon"}, "`ns_coeffs` must be"),
        ({"ns_coeffs": (1.0, 2.0), "bits": 8}, "must be three numbers, or as many"),
        ({"ns_coeffs": "dion", "ns_steps": 3}, "got 5 for 3 steps"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        lro.muon(1e-2, **options).init({"w": jnp.ones((64, 64))})
