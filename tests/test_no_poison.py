"""No bad gradient reaches a basis; a guarded run does not remember one."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lowrank_optax.testing import assert_bit_equal, assert_orthonormal
from lowrank_optax.testing._subject import gradients_like
from tests.chosen import each_bracket, each_method, each_row
from tests.rows import GAP, ROWS, subject

BAD = {
    "nan": float("nan"),
    "inf": float("inf"),
    "minus_inf": -float("inf"),
    "1e38": 1e38,
    "bf16_max": float(jnp.finfo(jnp.bfloat16).max),
}
NOT_FINITE = ("nan", "inf", "minus_inf")
EXTENTS = ("element", "leaf", "tree")
WHEN = {"at_a_refresh": GAP, "between_refreshes": 1}
GOOD_STEPS = 8  # good steps in all: two refreshes lie behind every bad one

cases = pytest.mark.parametrize("value", BAD)
not_finite = pytest.mark.parametrize("value", NOT_FINITE)


def spoil(gradient, value, extent):
    """Puts a bad value into one element, one matrix, or everywhere."""
    leaves, treedef = jax.tree.flatten(gradient)
    largest = max(range(len(leaves)), key=lambda i: leaves[i].size)

    def bad(i, leaf):
        if extent == "tree" or (extent == "leaf" and i == largest):
            # Of both signs: of a constant, a basis may see nothing but rounding errors.
            signs = np.random.default_rng(i).choice([-1.0, 1.0], leaf.shape)
            return jnp.asarray((value * signs).astype(leaf.dtype))
        if extent == "element" and i == largest:
            spoiled = np.array(leaf)  # NumPy: nothing to compile
            spoiled[(1,) * leaf.ndim] = value
            return jnp.asarray(spoiled)
        return leaf

    return treedef.unflatten([bad(i, leaf) for i, leaf in enumerate(leaves)])


@functools.cache
def good_gradients(row):
    return [gradients_like(subject(row).params, seed) for seed in range(GOOD_STEPS)]


@functools.cache
def guarded(row):
    """The guarded step, and its run on good gradients."""
    step, state = subject(row).guarded
    states = [(subject(row).params, state)]
    for gradient in good_gradients(row):
        states.append(step(*states[-1], gradient))
    return step, states


def bases(state):
    """What the brackets inside a state store."""
    found = optax.tree_utils.tree_get_all_with_path(state, "basis")
    assert len(found) == 1
    return found[0][1]


@each_method
@not_finite
def test_a_guarded_run_does_not_remember_a_bad_step(row, value):
    """R1: bit-equal after the bad step, and at every good step that follows."""
    step, states = guarded(row)
    for when in (0, *WHEN.values()):
        for extent in EXTENTS:
            params, state = states[when]
            bad = spoil(good_gradients(row)[when], BAD[value], extent)
            kept, skipped = step(params, state, bad)
            assert_bit_equal(
                (kept, skipped.inner_state), (params, states[when][1].inner_state)
            )
            assert int(skipped.notfinite_count) == int(skipped.total_notfinite) == 1
            run = (kept, skipped)
            for k in range(when, GOOD_STEPS):
                run = step(*run, good_gradients(row)[k])
                expected, expected_state = states[k + 1]
                assert_bit_equal(
                    (run[0], run[1].inner_state),
                    (expected, expected_state.inner_state),
                )


def assert_valid(row, stored):
    """What a row promises of its bases at any time."""
    if ROWS[row].orthonormal:
        # Alice keeps a second moment beside the vectors.
        def held(node):
            return hasattr(node, "vectors")

        assert_orthonormal(
            jax.tree.map(lambda b: b.vectors if held(b) else b, stored, is_leaf=held)
        )
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(stored))


@each_bracket
@cases
def test_a_bad_step_never_enters_a_basis(row, value):
    """Without the guard: bases stay finite (and orthonormal), and recover."""
    one = subject(row)
    for when in WHEN.values():
        for extent in EXTENTS:
            params, before = one.run[when]
            bad = spoil(one.gradients[when], BAD[value], extent)
            _, state = one.step(params, before, bad)
            assert_valid(row, bases(state))
            if value in NOT_FINITE and extent == "tree":
                assert_bit_equal(bases(state), bases(before))
            # Healthy gradients renew what was left undone.
            for gradient in good_gradients(row)[:GAP]:
                _, state = one.step(params, state, gradient)
                assert_valid(row, bases(state))
            pending = optax.tree_utils.tree_get_all_with_path(state, "pending")[0][1]
            if jax.tree.leaves(bases(state)):
                assert not any(np.any(p) for p in jax.tree.leaves(pending))


@each_bracket
def test_healthy_leaves_are_refreshed_beside_a_bad_one(row):
    """A bad leaf at a refresh keeps its own basis only."""
    one = subject(row)
    params, before = one.run[GAP]
    bad = spoil(one.gradients[GAP], float("nan"), "leaf")
    _, state = one.step(params, before, bad)
    _, good = one.step(params, before, one.gradients[GAP])
    assert_bit_equal(bases(state)["out"], bases(good)["out"])
    (bad_leaf,) = {"dense", "layers"} & set(params)
    assert_bit_equal(bases(state)[bad_leaf], bases(before)[bad_leaf])


# Finite, so that `apply_if_finite` lets them pass. Squares of the first overflow, those
# of the last are zero.
FINITE = {"1e20": 1e20, "1e30": 1e30, "1e38": 1e38, "3e38": 3e38} | {
    "denormal": 1e-40,
    "zero": 0.0,
}


def differing(left, right, measure):
    """A measure of every two leaves' difference."""
    pairs = zip(*map(jax.tree.leaves, jax.device_get((left, right))), strict=True)
    return [float(measure(a, b)) for a, b in pairs]


def assert_finite(tree):
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(jax.device_get(tree)))


@each_row
@pytest.mark.parametrize("value", FINITE)
def test_a_finite_number_is_not_remembered(row, value):
    """No NaN, nothing frozen, and no step into the distance."""
    one = subject(row)
    for when, extent in itertools.product((0, *WHEN.values()), EXTENTS):
        number = FINITE[value]
        if extent != "element":
            # In a projection of many such numbers, a sum may cancel all but a
            # hundredth.
            number = min(100 * number, 3e38)
        params, before = one.run[when]
        bad = spoil(good_gradients(row)[when], number, extent)
        run = one.step(params, before, bad)
        assert_finite(run)
        for gradient in good_gradients(row)[when:]:
            last, run = run[0], one.step(*run, gradient)
        assert_finite(run)
        # Steps are of the size of the rate, 1e-2, from and to weights near 1: what does
        # not move by a float32 spacing has stopped.
        moved = differing(last, run[0], lambda a, b: np.mean(a != b))
        assert min(moved) > 0.8, (when, extent)
        # The bad numbers themselves took no step.
        far = differing(params, run[0], lambda a, b: np.abs(a - b).max())
        assert max(far) < 20, (when, extent)


@functools.cache
def clip():
    """Global clipping by itself: with the plain step it is the chain of both."""
    tx = optax.clip_by_global_norm(1.0)
    return jax.jit(lambda gradient: tx.update(gradient, tx.init(gradient))[0])


@each_row
@pytest.mark.parametrize("value", ["1e38", "bf16_max"])
def test_clipping_before_the_bracket_keeps_huge_steps_finite(row, value):
    """A huge finite gradient passes `apply_if_finite`; global clipping takes it."""
    one = subject(row)
    start = one.step(*one.start[:2], clip()(one.gradients[0]))
    for extent in EXTENTS:
        bad = spoil(one.gradients[1], BAD[value], extent)
        run = one.step(*start, clip()(bad))
        for gradient in one.gradients[2:]:
            assert all(np.isfinite(x).all() for x in jax.tree.leaves(run))
            run = one.step(*run, clip()(gradient))
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(run))
