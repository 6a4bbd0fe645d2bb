"""Moments and bases are kept in the parameter's dtype, and decay in every one."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from lowrank_optax.bracket.storage import narrowed
from lowrank_optax.quantization.rounding import dither, round_to_bfloat16

HALF = {
    "mu_dtype": jnp.bfloat16,
    "nu_dtype": jnp.bfloat16,
    "basis_dtype": jnp.bfloat16,
}
SHAPES = {"kernel": (3, 64, 48), "embedding": (200, 64), "bias": (3, 48)}
# Their codes, or a history, are not what `state_dtype` speaks of.
ENCODED = {"galore_8bit", "q_galore", "adamw_8bit", "adamw_4bit", "even_muon"}


def shapes(dtype):
    return {name: jax.ShapeDtypeStruct(s, dtype) for name, s in SHAPES.items()}


def built(name, **options):
    factory = lro.METHODS[name].factory
    taken = inspect.signature(factory).parameters
    options = {"rank": 4, "layer_axis": 0, **options}
    return factory(1e-3, **{k: v for k, v in options.items() if k in taken})


def kept(state, field):
    return optax.tree_utils.tree_get(state, field)


@pytest.mark.parametrize("name", sorted(lro.METHODS.keys() - ENCODED))
def test_the_default_is_the_parameters_dtype(name):
    params = shapes(jnp.bfloat16)
    default = lro.state_bytes(built(name), params).total
    asked = lro.state_bytes(built(name, **HALF), params).total
    assert default == asked
    wide = lro.state_bytes(built(name, state_dtype=jnp.float32), params).total
    assert wide == lro.state_bytes(built(name), shapes(jnp.float32)).total
    if name not in ("column_sgd",):  # nothing outside a bracket follows
        assert default <= 0.75 * wide


@pytest.mark.parametrize(
    ("parameter", "expected"),
    [
        (jnp.float32, jnp.float32),
        (jnp.bfloat16, jnp.bfloat16),
        (jnp.float16, jnp.bfloat16),  # whose squares would vanish in a float16
        (jnp.float8_e4m3fn, jnp.bfloat16),
    ],
)
def test_dtypes_of_full_and_projected_leaves(parameter, expected):
    assert narrowed(jnp.dtype(parameter)) == expected
    if parameter == jnp.float8_e4m3fn:
        return
    tx = built("ldadam", error_feedback=True)
    state = jax.eval_shape(tx.init, shapes(parameter))
    for field in ("mu", "nu", "basis", "recovery_state"):
        found = {x.dtype for x in jax.tree.leaves(kept(state, field))}
        assert found == {jnp.dtype(expected)}, field


def test_single_dtypes_come_before_the_common_one():
    options = {"mu_dtype": jnp.bfloat16, "state_dtype": jnp.float32}
    tx = built("galore", **options, basis_dtype=jnp.bfloat16)
    (state, *_) = jax.tree.leaves(
        jax.eval_shape(tx.init, shapes(jnp.float32)),
        is_leaf=lambda x: hasattr(x, "basis"),
    )
    assert kept(state, "mu")["kernel"].dtype == jnp.bfloat16
    assert kept(state, "nu")["kernel"].dtype == jnp.float32
    assert state.basis["kernel"].dtype == jnp.bfloat16


def test_an_optimizers_own_choice_is_not_made_wider():
    adam = optax.scale_by_adam(mu_dtype=jnp.bfloat16)
    state = jax.eval_shape(
        built("galore", base_optimizer=adam).init, shapes(jnp.float32)
    )
    assert kept(state, "mu")["kernel"].dtype == jnp.bfloat16


def test_a_second_moment_in_bfloat16_decays():
    """Without gradients nu falls as b2^t; rounded to nearest it would stay forever."""
    tx = lro.galore(1e-3, rank=8, select="kernel", update_proj_gap=1000)
    params = {"kernel": jnp.ones((64, 256), jnp.bfloat16), "bias": jnp.ones(512)}
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    rng = np.random.default_rng(0)
    gradient = jax.tree.map(
        lambda p: jnp.asarray(rng.standard_normal(p.shape), p.dtype), params
    )
    zero, steps = jax.tree.map(jnp.zeros_like, params), 1500

    @jax.jit
    def run(state):
        _, state = tx.update(gradient, state, params)
        first = kept(state, "nu")
        state = jax.lax.fori_loop(
            0, steps, lambda _, s: tx.update(zero, s, params)[1], state
        )
        return first, kept(state, "nu")

    first, last = run(tx.init(params))
    for name in params:
        ratio = jnp.sum(last[name], dtype=jnp.float32)
        ratio = float(ratio / jnp.sum(first[name], dtype=jnp.float32))
        # 1500 roundings of a part in 256 each, averaged over hundreds of numbers.
        assert ratio == pytest.approx(0.999**steps, rel=0.03)


def test_draws_are_uniform_and_belong_to_their_place():
    draws = np.asarray(dither((3, 1, 4), (512, 512)))
    counts = np.bincount(draws.ravel() >> 12, minlength=16)
    expected = draws.size / 16
    assert np.sum((counts - expected) ** 2 / expected) < 40  # chi^2 of 15: 0.05 %
    for axis in (0, 1):
        beside = np.roll(draws, 1, axis)
        assert abs(np.corrcoef(draws.ravel(), beside.ravel())[0, 1]) < 0.01
    other = np.asarray(dither((3, 1, 5), (512, 512)))
    assert abs(np.corrcoef(draws.ravel(), other.ravel())[0, 1]) < 0.01
    # A layer by itself is rounded as it is in its stack.
    np.testing.assert_array_equal(dither((3, 1, 4), (1, 512), 7 * 512), draws[7:8])


def test_rounding_is_without_bias_and_exact_where_nothing_is_lost():
    x = jnp.full((400, 400), 1 + 2.0**-9)
    rounded = round_to_bfloat16(x, dither((1,), x.shape))
    mean = float(jnp.mean(rounded.astype(jnp.float32)))
    assert mean == pytest.approx(1 + 2.0**-9, abs=4 * 2.0**-9 / 400)
    exact = jnp.asarray([0.0, -0.0, 1.5, jnp.inf, -jnp.inf, jnp.nan], jnp.float32)
    np.testing.assert_array_equal(
        round_to_bfloat16(exact, dither((1,), exact.shape)).astype(jnp.float32), exact
    )


def test_a_run_in_bfloat16_is_a_run_in_float32_up_to_rounding():
    """Twenty steps on a quadratic: the same way down, state of half the bytes."""
    rng = np.random.default_rng(1)
    goal = jnp.asarray(rng.standard_normal((48, 32)), jnp.float32)

    def run(state_dtype):
        tx = lro.subtrack(
            0.05, rank=8, select=".*", update_proj_gap=5, state_dtype=state_dtype
        )

        @jax.jit
        def loss():
            def step(_, run):
                w, state = run
                updates, state = tx.update(w - goal, state, w)
                return w + updates, state

            zero = jnp.zeros_like(goal)
            w, _ = jax.lax.fori_loop(0, 20, step, (zero, tx.init(zero)))
            return jnp.sum(jnp.square(w - goal)) / jnp.sum(jnp.square(goal))

        return float(loss())

    wide, half = run(jnp.float32), run(jnp.bfloat16)
    assert wide < 0.8
    assert half == pytest.approx(wide, rel=0.02)
