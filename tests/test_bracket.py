"""The slots of a bracket that no shipped method fills: recovery, full, the view."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro

RANK, SCALE = 3, 0.5
PARAMS = {
    "wide": jnp.ones((8, 20)),
    "tall": jnp.ones((2, 20, 8)),  # a stack
    "bias": jnp.ones((5,)),
}


def gradients(seed):
    key = jax.random.key(seed)
    return {
        name: jax.random.normal(jax.random.fold_in(key, i), leaf.shape)
        for i, (name, leaf) in enumerate(PARAMS.items())
    }


class column_recovery(lro.Recovery):
    """Scales the residual's columns as the inner optimizer scaled the projection's."""

    def start(self, matrix):
        return jnp.zeros([])

    def update(self, matrix, state, view, scale):
        norm = lambda x: jnp.linalg.norm(x, axis=-2, keepdims=True)  # noqa: E731
        phi = norm(view.direction) / norm(view.projected)
        low = scale * view.direction - view.projected * phi
        addend = jnp.full(view.gradient.shape, 0.125)
        return lro.Recovered(low, phi, addend), state + 1


def bracket(*stages, **options):
    opening = lro.project(lro.svd(RANK, 2), layer_axis=0, select="wide|tall", **options)
    return lro.chain(opening, *stages, lro.backproject(SCALE))


def explicit_update(gradient, basis, direction, projected):
    """`scale P N + (G - P R) diag(phi) + addend` with the residual formed."""
    residual = gradient - basis @ projected
    phi = jnp.linalg.norm(direction, axis=-2) / jnp.linalg.norm(projected, axis=-2)
    return SCALE * basis @ direction + residual * phi[..., None, :] + 0.125


def test_recovery_adds_what_the_residual_formula_says():
    tx = bracket(optax.scale_by_rms(), column_recovery())
    state = tx.init(PARAMS)
    for step in range(3):
        gradient = gradients(step)
        inner, nu = optax.scale_by_rms(), state.inner_state
        updates, state = tx.update(gradient, state)
        for name, transposed in (("wide", False), ("tall", True)):
            flip = lambda x, t=transposed: jnp.swapaxes(x, -1, -2) if t else x  # noqa: E731
            basis, g = state.basis[name], flip(gradient[name])
            projected = jnp.swapaxes(basis, -1, -2) @ g
            direction, _ = inner.update(
                projected, optax.ScaleByRmsState(nu=nu.nu[name])
            )
            expected = flip(explicit_update(g, basis, direction, projected))
            # Two orders of summation of terms of size 1 in float32.
            chex.assert_trees_all_close(updates[name], expected, atol=1e-5)
    assert state.recovery_state["tall"].shape == (2,)
    assert float(state.recovery_state["wide"]) == 3
    assert isinstance(state.recovery_state["bias"], optax.MaskedNode)


def test_a_leaf_without_recovery_is_not_scaled():
    tx = bracket(optax.identity(), column_recovery())
    gradient = gradients(0)
    updates, _ = tx.update(gradient, tx.init(PARAMS))
    chex.assert_trees_all_equal(updates["bias"], gradient["bias"])


def test_recovery_must_stand_last():
    with pytest.raises(ValueError, match="column_recovery is out of place"):
        bracket(column_recovery(), optax.scale_by_rms())


def matrices_only(updates, state, params=None):
    del params
    assert all(leaf.ndim >= 2 for leaf in jax.tree.leaves(updates))
    return jax.tree.map(lambda u: 2 * u, updates), state


def test_full_takes_the_leaves_that_are_not_projected():
    inner = optax.GradientTransformation(lambda params: (), matrices_only)
    tx = bracket(inner, full=optax.scale_by_adam())
    state, gradient = tx.init(PARAMS), gradients(0)
    updates, state = tx.update(gradient, state)
    alone = optax.scale_by_adam()
    expected, _ = alone.update(gradient["bias"], alone.init(PARAMS["bias"]))
    chex.assert_trees_all_close(updates["bias"], expected, rtol=1e-6)
    assert jax.tree.leaves(state.full_state.mu)[0].shape == PARAMS["bias"].shape


def test_inner_sees_the_view():
    seen = {}

    def update(updates, state, params=None, *, subspace, value):
        seen.update(view=subspace, params=params, value=value)
        return updates, state

    inner = optax.GradientTransformationExtraArgs(lambda params: (), update)
    tx = bracket(inner)
    gradient = gradients(0)
    _, state = tx.update(gradient, tx.init(PARAMS), PARAMS, value=7)
    view = seen["view"]
    assert seen["value"] == 7
    assert view.gradient["tall"].shape == (2, 8, 20)
    assert view.params["tall"].shape == (2, 8, 20)
    assert view.projected["wide"].shape == seen["params"]["wide"].shape == (RANK, 20)
    assert view.basis["bias"] is None and view.matrices["bias"] is None
    assert view.matrices["tall"].transposed and not view.matrices["wide"].transposed
    chex.assert_trees_all_equal(view.basis["wide"], state.basis["wide"])
    chex.assert_trees_all_equal(view.previous_basis["wide"], jnp.eye(8, RANK))


def test_seed_changes_random_bases_only_between_brackets():
    def update(seed):
        opening = lro.project(
            lro.gaussian(RANK), select="wide|tall", layer_axis=0, seed=seed
        )
        tx = lro.chain(opening, optax.identity(), lro.backproject())
        return tx.update(gradients(0), tx.init(PARAMS))[0]

    chex.assert_trees_all_equal(update(0), update(0))
    assert not jnp.allclose(update(0)["wide"], update(1)["wide"])


@pytest.mark.parametrize("projector", [lro.power(RANK, 2), lro.svd(RANK, 2)])
def test_double_precision_parameters(projector):
    """With x64 the state stays float32 and stable, and updates follow the leaves."""
    with jax.enable_x64(True):
        params = jax.tree.map(lambda p: p.astype(jnp.float64), PARAMS)
        tx = lro.galore(1e-2, projector=projector, layer_axis=0, weight_decay=0.1)
        state = tx.init(params)
        update = jax.jit(tx.update)
        updates, after = update(params, state, params)
        chex.assert_trees_all_equal_shapes_and_dtypes(state, after)
        chex.assert_trees_all_equal_dtypes(updates, params)
        assert optax.tree_utils.tree_get(after, "mu")["wide"].dtype == jnp.float32


def test_strict_dtype_promotion():
    with jax.numpy_dtype_promotion("strict"):
        tx = bracket(lro.scale_by_raw_adam())
        updates, _ = tx.update(gradients(0), tx.init(PARAMS), PARAMS)
    chex.assert_tree_all_finite(updates)


def test_leaves_of_equal_shapes_share_a_trace():
    """The path enters as a number, so that 24 matrices are opened by one program."""

    def doors(count):
        tx = lro.galore(1e-2, projector=lro.gaussian(2))
        params = {f"layer{i}": jnp.ones((8, 6)) for i in range(count)}
        state = tx.init(params)
        jaxpr = jax.make_jaxpr(tx.update)(params, state, params)
        opened = [e for e in jaxpr.eqns if e.params.get("name") == "open"]
        assert len(opened) == count
        updates = tx.update(params, state, params)[0]
        return {id(e.params["jaxpr"]) for e in opened}, updates

    bodies, updates = doors(24)
    assert len(bodies) == 1
    # Each has random numbers of its own all the same.
    assert not np.allclose(updates["layer0"], updates["layer1"])


def test_a_part_that_can_change_is_equal_to_itself_alone():
    @dataclasses.dataclass(frozen=True, eq=False)
    class Noting(lro.svd):
        log: list = dataclasses.field(default_factory=list)

        def renew(self, matrix, gradient, old, at):
            self.log.append(matrix.shape)
            return super().renew(matrix, gradient, old, at)

    for _ in range(2):  # an equal list, empty at first
        projector = Noting(2)
        tx = lro.galore(1e-2, projector=projector)
        params = {"w": jnp.ones((8, 6))}
        tx.update(params, tx.init(params), params)
        assert projector.log
