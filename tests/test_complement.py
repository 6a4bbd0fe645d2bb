"""What stands outside the subspace: the complement's optimizer, FRUGAL, GaLore+."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import lowrank_optax as lro
from lowrank_optax.testing import assert_bit_equal, assert_orthonormal

M, N, R = 12, 20, 3


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def basis():
    return jnp.linalg.qr(normal(9, M, R))[0]


def bracket(recovery, inner=None, scale=0.25, side="left", **options):
    projector = lro.given(R, 5, bases={"w": basis()[None]})
    return lro.chain(
        lro.project(projector, side=side, select="w", **options),
        inner or optax.identity(),
        *([recovery] if recovery else []),
        lro.backproject(scale),
    )


def split(gradient):
    inside = basis() @ (basis().T @ gradient)
    return inside, gradient - inside


def one_step(tx, gradient):
    params = {"w": gradient}
    updates, state = jax.jit(tx.update)(params, tx.init(params), params)
    return updates["w"], state


def test_the_residual_itself():
    gradient = normal(0, M, N)
    inside, outside = split(gradient)
    got, _ = one_step(bracket(lro.complement(scale=0.5)), gradient)
    # Products of 12 terms in float32.
    np.testing.assert_allclose(got, 0.25 * inside + 0.5 * outside, atol=2e-6)


@pytest.mark.parametrize("side", ["left", "right"])
def test_another_transformation_of_the_residual(side):
    gradient = normal(0, M, N)
    inside, outside = split(gradient)
    leaf = gradient if side == "left" else gradient.T
    tx = bracket(lro.complement(optax.scale_by_sign(), 0.5), side=side)
    got, _ = one_step(tx, leaf)
    want = 0.25 * inside + 0.5 * jnp.sign(outside)
    want = want if side == "left" else want.T
    np.testing.assert_allclose(got, want, atol=2e-6)


def test_identity_is_the_residual_itself():
    gradient = normal(0, M, N)
    formed, _ = one_step(bracket(lro.complement(optax.identity())), gradient)
    by_algebra, _ = one_step(bracket(lro.complement()), gradient)
    np.testing.assert_allclose(formed, by_algebra, atol=2e-6)


def test_a_residual_drawn_now_and_then_is_unbiased():
    """All of it or none, for every matrix by itself; in the mean over keys, once."""
    q, keys, p = 0.25, 4000, basis()
    with jax.enable_x64(True):
        leaf = {"w": normal(0, 2, M, N).astype(jnp.float64)}
        tx = lro.chain(
            lro.project(
                lro.given(R, 5, bases={"w": jnp.stack([p] * 2)[None]}),
                side="left",
                layer_axis=0,
                select="w",
                dtype=jnp.float64,
            ),
            optax.identity(),
            lro.complement(scale=0.5, probability=q),
            lro.backproject(0.25),
        )
        state = tx.init(leaf)

        def two_steps(data):
            first, moved = tx.update(leaf, state._replace(key=data))
            return jnp.stack([first["w"], tx.update(leaf, moved)[0]["w"]])

        data = jax.random.split(jax.random.key(1), keys)
        data = jax.random.key_data(data).astype(state.key.dtype)
        got = np.asarray(jax.jit(jax.vmap(two_steps))(data))  # [keys, steps, 2, M, N]
    p, gradient = np.float64(p), np.asarray(leaf["w"])
    inside = p @ (p.T @ gradient)
    inside, outside = 0.25 * inside, 0.5 * (gradient - inside)
    size = np.sum((got - inside) * outside, (-2, -1)) / np.sum(outside**2, (-2, -1))
    np.testing.assert_allclose(size, np.where(size > 1, 1 / q, 0), atol=1e-5)
    # Four standard errors of a mean of numbers that are 0 or 1 / q.
    bound = 4 * np.sqrt((1 / q - 1) / keys)
    assert np.all(np.abs(size.mean(0) - 1) < bound)
    # Steps and layers are drawn apart.
    assert np.all(np.abs(np.corrcoef(size.reshape(keys, 4).T) - np.eye(4)) < 0.08)


def test_bad_probabilities():
    for q in (0.0, -0.1, 1.5):
        with pytest.raises(ValueError, match=r"`probability` of lro\.complement must"):
            lro.complement(probability=q)
    with pytest.raises(ValueError, match="Leave one of them out"):
        lro.complement(optax.scale_by_sign(), probability=0.5)


def test_a_state_has_the_leafs_size_and_is_kept():
    tx = bracket(lro.complement(optax.trace(0.5)), side="right")
    leaf = {"w": normal(0, M, N).T}
    state = tx.init(leaf)
    for _ in range(2):
        updates, state = jax.jit(tx.update)(leaf, state, leaf)
    inside, outside = split(leaf["w"].T)
    want = (0.25 * inside + 1.5 * outside).T
    np.testing.assert_allclose(updates["w"], want, atol=4e-6)
    assert state.recovery_state["w"].trace.shape == (N, M)
    assert lro.state_bytes(tx, leaf).by_role["recovery"] == 4 * M * N
    specs = lro.state_shardings(tx, leaf, {"w": jax.P("data", None)})
    assert specs.recovery_state["w"].trace == jax.P("data")


def test_a_stack_is_as_many_matrices():
    stacked = lro.frugal(1e-2, layer_axis=0, projector=lro.svd(R))
    alone = lro.frugal(1e-2, projector=lro.svd(R))
    gradient = normal(0, 2, M, N)
    got, _ = one_step(stacked, gradient)
    for i in range(2):
        want, _ = one_step(alone, gradient[i])
        np.testing.assert_allclose(got[i], want, atol=1e-6)


def test_a_traced_scale():
    gradient = normal(0, M, N)

    @jax.jit
    def update(scale):
        tx = bracket(lro.complement(optax.scale_by_sign(), scale))
        return tx.update({"w": gradient}, tx.init({"w": gradient}))[0]["w"]

    halved = update(0.5) - split(gradient)[0] * 0.25
    np.testing.assert_allclose(jnp.abs(halved), 0.5, atol=2e-6)


def test_a_bad_gradient_leaves_the_basis():
    tx = lro.frugal(1e-2, R, update_proj_gap=1)
    params = {"w": normal(0, M, N)}
    update = jax.jit(tx.update)
    _, state = update(params, tx.init(params), params)
    _, other = update({"w": normal(1, M, N)}, state, params)
    assert np.any(other.basis["w"] != state.basis["w"])
    poisoned = {"w": normal(1, M, N).at[0, 0].set(jnp.nan)}
    _, after = update(poisoned, state, params)
    assert_bit_equal(after.basis, state.basis)


def test_nothing_outside_is_no_step():
    """A gradient inside the subspace leaves rounding, whose sign is no direction."""
    inside, _ = split(normal(0, M, N))
    tx = bracket(lro.complement(optax.scale_by_sign()), scale=0.0)
    got, _ = one_step(tx, inside)
    assert not np.any(got)
    full = lro.frugal(1.0, M, select="w", scale=0.0)
    got, _ = one_step(full, normal(0, M, N))
    assert not np.any(got)


def test_frugal_as_written():
    gradient = normal(0, M, N)
    projector = lro.given(R, 5, bases={"w": basis()[None]})
    tx = lro.frugal(
        0.1, projector=projector, side="left", state_free_scale=0.5, weight_decay=0.2
    )
    got, _ = one_step(tx, gradient)
    inside = basis() @ jnp.sign(basis().T @ gradient)  # Adam's first direction
    outside = jnp.sign(split(gradient)[1])
    want = -0.1 * (inside + 0.5 * outside + 0.2 * gradient)
    np.testing.assert_allclose(got, want, atol=1e-5)
    seen = lro.state_bytes(tx, {"w": gradient})
    assert seen.by_role["mu"] + seen.by_role["nu"] == 2 * 4 * R * N
    assert seen.by_role["basis"] == 4 * M * R
    assert "recovery" not in seen.by_role


@pytest.mark.parametrize("method", [lro.frugal, lro.galore_plus])
def test_state_bytes(method):
    params = {"w": jnp.zeros((M, N))}
    tx = method(1e-2, R)
    seen = lro.state_bytes(tx, params)
    assert seen.by_role == {
        "basis": 4 * M * R,
        "mu": 4 * R * N,
        "nu": 4 * R * N,
        "other": 4 + 8 + 4 + 1,  # two counters, the key, whether a refresh is pending
    }
    assert seen.total == sum(x.nbytes for x in jax.tree.leaves(tx.init(params)))


def head_basis(gradient, **options):
    tx = lro.scale_by_galore_plus(R, side="left", **options)
    return one_step(tx, gradient)[1].basis["w"]


def test_galore_plus_looks_at_one_head():
    gradient, other = normal(0, M, N), normal(1, M, N)
    first = jnp.concatenate([gradient[:, :5], other[:, 5:]], axis=1)
    want = head_basis(gradient[:, :5])
    np.testing.assert_allclose(head_basis(gradient, heads=4), want, atol=1e-6)
    assert_bit_equal(head_basis(gradient, heads=4), head_basis(first, heads=4))
    mean = head_basis(gradient, heads=4, head="mean")
    np.testing.assert_allclose(
        mean, head_basis(gradient.reshape(M, 4, 5).mean(1)), atol=1e-5
    )
    # Where there are no heads, or other numbers of them, the whole gradient counts.
    whole = head_basis(gradient)
    for heads in (1, 3, lambda path: 4 if path == "q" else 1):
        assert_bit_equal(head_basis(gradient, heads=heads), whole)
    assert float(jnp.abs(whole - want).max()) > 0.05


def test_galore_plus_with_an_idle_first_head():
    """Its gradient says nothing; the others' average does."""
    left, right = normal(0, M, R), jnp.tile(normal(1, R, 5), (1, 4))
    gradient = (left @ right).at[:, :5].set(0.0)
    found = head_basis(gradient, heads=4)
    assert_orthonormal(found)
    # Rank 3 and three vectors: everything is captured, to rounding.
    captured = jnp.sum((found.T @ gradient) ** 2) / jnp.sum(gradient**2)
    assert captured > 0.999


def test_galore_plus_refresh_costs_a_share():
    gradient = jnp.zeros((64, 512))
    matrix = lro.Matrix("w", (64, 512), (), (0,), (1,), "left", 4)
    zero = jnp.int32(0)

    def flops(heads):
        projector = lro.power(4, blocks=heads)

        def refresh(gradient, old):
            at = lro.At(jax.random.key(0), zero, zero, jnp.bool_(False))
            return projector.refresh(matrix, gradient, old, at)

        lowered = jax.jit(refresh).lower(gradient, jnp.zeros((64, 4)))
        costs = lowered.compile().cost_analysis()
        if not costs or "flops" not in costs:
            pytest.skip("this backend does not tell")
        return costs["flops"]

    assert flops(8) < 0.35 * flops(1)


def test_bad_input():
    with pytest.raises(TypeError, match=r"`transformation` must be an optax.* float"):
        lro.complement(0.5)
    with pytest.raises(TypeError, match=r"`transformation` must be an optax.* str"):
        lro.frugal(1e-2, 4, state_free="sign")
    with pytest.raises(ValueError, match="`head` must be one of"):
        lro.galore_plus(1e-2, 4, heads=4, head="last")
    with pytest.raises(ValueError, match="`heads` must be at least 1"):
        lro.galore_plus(1e-2, 4, heads=0)
    with pytest.raises(TypeError, match="`blocks` must be a positive int"):
        one_step(lro.galore_plus(1e-2, 4, heads=lambda path: 2.0), normal(0, M, N))


def test_a_state_of_whole_leaves_stays_in_its_box():
    """One box, step after step: it was put into one more by every step."""
    tx = bracket(lro.complement(optax.trace(0.9)))
    params = {"w": nn.Partitioned(normal(0, M, N), names=("in", "out"))}
    state = tx.init(params)
    for _ in range(2):
        _, after = tx.update(params, state, params)
        assert jax.tree.structure(after) == jax.tree.structure(state)
        state = after


def test_two_accumulations_inside_are_refused():
    twice = optax.MultiSteps(optax.identity(), 2).gradient_transformation()
    params, inner = {"w": normal(0, M, N)}, optax.chain(twice, twice)
    with pytest.raises(ValueError, match="accumulates in 2 places"):
        tx = bracket(None, inner)
        tx.update(params, tx.init(params), params)


def test_recovery_beside_a_transform_that_stores_nothing():
    tx = lro.chain(
        lro.project(lro.wavelet(1), select="w"),
        optax.scale_by_adam(),
        lro.recover_scale(),
        lro.backproject(),
    )
    update, _ = one_step(tx, normal(0, M, N))
    assert jnp.all(jnp.isfinite(update)) and jnp.any(update)
