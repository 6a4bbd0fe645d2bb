"""GWT against its formulas in NumPy, and its laws."""

import itertools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st

import lowrank_optax as lro
from lowrank_optax.testing import assert_bit_equal, assert_state_stable
from tests import wavelets

# Where rows nearly cancel, Adam's division multiplies float32's rounding by 1 / |A|.
# An eps of 0.1 beside gradients of size 1 bounds that by 10.
EPS = 0.1
# Optax' 1 - b^t has five digits left of 0.999, and more of these.
B1, B2 = 0.875, 0.96875


def normal(seed, *shape):
    draw = np.random.default_rng(seed).standard_normal(shape)
    return jnp.asarray(draw, jnp.float32)


def growing(shape, steps=4, rate=3.0):
    """Gradients that grow, so that the limiter has something to hold."""
    return [normal(t, *shape) * rate**t for t in range(steps)]


def direction(level=2, **options):
    """GWT's direction of every leaf, unscaled and without a clip."""
    unscaled = {"scale": 1.0, "detail_clip": jnp.inf}
    options = {**unscaled, "select": ".", "eps": EPS, **options}
    return lro.scale_by_gwt(level, b1=B1, b2=B2, **options)


def formula(grads, level=2, wavelet="haar", **options):
    return wavelets.gwt(grads, level, wavelet, b1=B1, b2=B2, eps=EPS, **options)


def run(tx, gradients):
    """Returns the updates of one leaf, and the states after them."""
    params = {"w": jnp.zeros_like(gradients[0])}
    state, update, out = tx.init(params), jax.jit(tx.update), []
    for gradient in gradients:
        updates, state = update({"w": gradient}, state, params)
        out.append((updates["w"], state))
    return [u for u, _ in out], [s for _, s in out]


def assert_near(got, want, share=2e-6):
    """Ten roundings of 6e-8 and those of Adam's division, as a share of the largest."""
    for a, b in zip(got, want, strict=True):
        atol = share * max(1.0, float(np.max(np.abs(b))))
        np.testing.assert_allclose(a, b, rtol=0, atol=atol)


def norms(updates):
    return [float(jnp.linalg.norm(update)) for update in updates]


# --- Against the formulas ------------------------------------------------------------

AUTHORS = {"conventions": "authors"}
CASES = [
    ("haar", 0, (5, 4), {}),
    ("haar", 0, (5, 4), AUTHORS),
    ("haar", 1, (12, 3), {}),
    ("haar", 2, (13, 4), {}),
    ("haar", 3, (21, 2), {}),
    ("haar", 2, (9, 4), {"detail_clip": 0.7}),
    ("haar", 2, (13, 4), AUTHORS),
    ("haar", 3, (8, 4), {**AUTHORS, "detail_clip": 2.0}),
    ("db2", 1, (12, 3), {}),
    ("db2", 2, (9, 4), {}),
    ("db2", 3, (17, 2), AUTHORS),
    ("db2", 2, (10, 3), {"detail_clip": 0.7}),
    ("db4", 2, (11, 3), {}),
]


@pytest.mark.parametrize("axis", [-2, -1])
@pytest.mark.parametrize(("wavelet", "level", "shape", "options"), CASES)
def test_as_written(wavelet, level, shape, options, axis):
    """Whatever form it takes: by algebra, or band by band (with a clip, or db2)."""
    grads = growing(shape)
    want = formula(
        grads,
        level,
        wavelet,
        clip=options.get("detail_clip"),
        authors="conventions" in options,
    )
    tx = direction(level, wavelet=wavelet, axis=axis, **options)
    if axis == -2:
        got, _ = run(tx, grads)
    else:
        got = [x.T for x in run(tx, [g.T for g in grads])[0]]
    assert_near(got, want)


def test_the_limiter_and_the_clip_of_those_cases_act():
    grads = growing((9, 4))
    limited = formula(grads)
    for other in ({"growth": None}, {"clip": 0.7}, {"authors": True}):
        changed = formula(grads, **other)
        assert np.max(np.abs(changed[-1] - limited[-1])) > 0.05


@pytest.mark.parametrize("convention", [{}, AUTHORS])
def test_the_clip_of_the_default(convention):
    """1, and none in the released code."""
    grads = growing((9, 4))
    got, _ = run(direction(detail_clip=None, **convention), grads)
    clip = None if convention else 1.0
    assert_near(got, formula(grads, clip=clip, authors=bool(convention)))


def test_learning_rate_scale_and_decay():
    grads, rate = growing((12, 3)), 0.1
    weights = {"w": normal(9, 12, 3)}
    tx = lro.gwt(rate, b1=B1, b2=B2, eps=EPS, weight_decay=0.2, select=".")
    state = tx.init(weights)
    updates, _ = jax.jit(tx.update)({"w": grads[0]}, state, weights)
    (want,) = formula(grads[:1], clip=1.0)  # the default
    want = -rate * (0.25 * want + 0.2 * np.asarray(weights["w"]))
    assert_near([updates["w"]], [want])


# --- Section 10 of the specification's list ------------------------------------------


def test_level_zero_is_adamw():
    grads, params = growing((6, 5)), {"w": normal(8, 6, 5)}
    adam = {"eps": EPS, "weight_decay": 0.01}
    tx = lro.gwt(0.1, 0, scale=1.0, growth_limit=None, select=".", **adam)
    plain = optax.adamw(0.1, **adam)
    got, want = params, params
    state, other = tx.init(params), plain.init(params)
    for gradient in grads:
        updates, state = tx.update({"w": gradient}, state, got)
        got = optax.apply_updates(got, updates)
        updates, other = plain.update({"w": gradient}, other, want)
        want = optax.apply_updates(want, updates)
        np.testing.assert_allclose(got["w"], want["w"], atol=1e-6)


@pytest.mark.parametrize("level", [1, 2, 3])
@pytest.mark.parametrize("wavelet", ["haar", "db2"])
@pytest.mark.parametrize("axis", [-2, -1])
def test_state_bytes(wavelet, level, axis):
    """A band and one number per matrix; two counters and the key."""
    params = {"a": jnp.zeros((33, 47)), "b": jnp.zeros((2, 40, 42))}
    tx = lro.gwt(1e-3, level, wavelet=wavelet, axis=axis, layer_axis=0)
    band = elements = 0
    for count, (m, n) in ((1, (33, 47)), (2, (40, 42))):
        band, other = (m, n) if axis == -2 else (n, m)
        for _ in range(level):
            band = -(-band // 2) if wavelet == "haar" else (band + 3) // 2
        elements += count * band * other
    seen = lro.state_bytes(tx, params)
    assert seen.by_role == {
        "mu": 4 * elements,
        "nu": 4 * elements,
        "recovery": 4 * 3,
        "other": 4 + 4 + 8,
    }
    assert seen.total == sum(x.nbytes for x in jax.tree.leaves(tx.init(params)))
    without = lro.gwt(1e-3, level, wavelet=wavelet, growth_limit=None, layer_axis=0)
    assert "recovery" not in lro.state_bytes(without, params).by_role


def test_level_two_saves_three_quarters():
    params = {"w": jnp.zeros((64, 48)), "v": jnp.zeros((48, 64))}
    got = lro.state_bytes(lro.gwt(1e-3), params).by_role
    adam = lro.state_bytes(optax.adam(1e-3), params).by_role
    for role in ("mu", "nu"):
        assert 4 * got[role] == adam[role]


@pytest.mark.parametrize("options", [{}, {"wavelet": "db2", "detail_clip": 3.0}])
def test_a_stack_is_as_many_matrices(options):
    """Also for the limiter: the layers' gradients grow at different rates."""
    rates = (1.0, 3.0, 0.3)
    layers = [growing((9, 4), rate=rate) for rate in rates]
    stacked = [jnp.stack(grads) for grads in zip(*layers, strict=True)]
    got, states = run(direction(layer_axis=0, **options), stacked)
    assert states[-1].recovery_state["w"].shape == (3,)
    for i, grads in enumerate(layers):
        want, alone = run(direction(**options), grads)
        assert_near([update[i] for update in got], want, 1e-6)
        before = [float(s.recovery_state["w"][i]) for s in states]
        np.testing.assert_allclose(
            before, [float(s.recovery_state["w"]) for s in alone], rtol=1e-6
        )


def test_heads_by_dimension_numbers():
    """A kernel (embed, heads, head_dim) is the matrix (embed, heads * head_dim)."""
    grads = growing((12, 2, 3))
    numbers = lro.MatrixDimensionNumbers(0, (1, 2))
    tx = direction(weight_dimension_numbers=numbers)
    want, states = run(direction(), [g.reshape(12, 6) for g in grads])
    got, heads = run(tx, grads)
    assert_near([u.reshape(12, 6) for u in got], want, 1e-6)
    assert_bit_equal(heads[-1].recovery_state, states[-1].recovery_state)


@pytest.mark.parametrize("level", [1, 2])
def test_constant_blocks_are_adam_on_their_sums(level):
    block = 2**level
    small = growing((3, 4))
    grads = [jnp.repeat(g, block, axis=0) for g in small]
    got, _ = run(direction(level, growth_limit=None), grads)
    root = block**0.5  # a block's sum over the root of its size
    want, _ = run(optax.scale_by_adam(B1, B2, EPS), [g * root for g in small])
    assert_near(got, [np.repeat(w, block, axis=0) / root for w in want])


HOMOGENEOUS = {
    "haar": direction(eps=0.0),
    "db2": direction(eps=0.0, wavelet="db2", detail_clip=2.0),
    "authors": direction(eps=0.0, conventions="authors"),
}
compiled = {name: jax.jit(tx.update) for name, tx in HOMOGENEOUS.items()}


@hypothesis.given(name=st.sampled_from(sorted(HOMOGENEOUS)), power=st.integers(-30, 40))
@hypothesis.settings(max_examples=20)
def test_the_gradients_size_is_indifferent_without_eps(name, power):
    """To the bit: a power of two rounds nothing, and squares stay within range."""
    updates = {}
    for factor in (1.0, 2.0**power):
        state = HOMOGENEOUS[name].init({"w": jnp.zeros((8, 4))})
        for t in range(3):
            gradient = {"w": normal(t, 8, 4) * factor}
            updates[factor], state = compiled[name](gradient, state)
    assert_bit_equal(updates[2.0**power], updates[1.0])


@pytest.mark.parametrize("growth", [1.01, 1.3])
def test_no_direction_outgrows_the_one_before(growth):
    """Constant blocks have no details: the update is as long as the direction."""
    factors = np.exp(np.random.default_rng(0).uniform(-3.0, 3.0, 30))
    grads = [jnp.repeat(normal(t, 4, 3), 4, axis=0) * f for t, f in enumerate(factors)]
    free = norms(run(direction(growth_limit=None), grads)[0])
    assert max(b / a for a, b in itertools.pairwise(free)) > 1.5
    updates, states = run(direction(growth_limit=growth), grads)
    held = norms(updates)
    for before, after in itertools.pairwise(held):
        assert after <= growth * before * (1 + 1e-5)
    kept = [float(s.recovery_state["w"]) for s in states]
    np.testing.assert_allclose(held, kept, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"wavelet": "db2", "detail_clip": 1.0}])
def test_axes(options):
    grads = growing((10, 6))
    rows, _ = run(direction(axis=0, **options), grads)
    columns, _ = run(direction(axis=-1, **options), [g.T for g in grads])
    assert_near([u.T for u in columns], rows, 1e-6)
    same, _ = run(direction(axis=-2, **options), grads)
    assert_bit_equal(same, rows)
    across, _ = run(direction(axis=1, **options), grads)
    assert float(jnp.abs(across[-1] - rows[-1]).max()) > 0.1


@pytest.mark.parametrize("options", [{}, {"wavelet": "db2", "detail_clip": 1.0}])
def test_jit_or_not_and_stable_types(options):
    tx, grads = direction(**options), growing((9, 4), steps=3)
    compiled, states = run(tx, grads)
    state = tx.init({"w": grads[0]})
    for gradient, want, after in zip(grads, compiled, states, strict=True):
        updates, new = tx.update({"w": gradient}, state)
        assert_near([updates["w"]], [want], 1e-6)
        assert_state_stable(state, new)
        assert_state_stable(state, after)
        state = new


def test_bfloat16():
    """Moments are as the parameter unless told otherwise; updates as the gradient."""
    grads = [g.astype(jnp.bfloat16) for g in growing((16, 8))]
    wide, _ = run(direction(), [g.astype(jnp.float32) for g in grads])
    largest = max(float(jnp.abs(u).max()) for u in wide)
    dtypes = {None: jnp.bfloat16, jnp.float32: jnp.float32}
    for asked, stored in dtypes.items():
        tx = direction(mu_dtype=asked, nu_dtype=asked)
        got, states = run(tx, grads)
        assert got[0].dtype == jnp.bfloat16
        state = states[-1]
        for field in ("mu", "nu"):
            assert optax.tree_utils.tree_get(state, field)["w"].dtype == stored
        assert state.recovery_state["w"].dtype == jnp.float32
        assert_state_stable(tx.init({"w": grads[0]}), state)
        # Moments and update are rounded by 2^-9 each, and nu's root by half that.
        for a, b in zip(got, wide, strict=True):
            np.testing.assert_allclose(a.astype(jnp.float32), b, atol=0.02 * largest)
