"""Online PCA: a basis with an optimizer of its own, and the method around it."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from lowrank_optax.leaves.matrix import Matrix
from lowrank_optax.linalg.pca import frobenius, pca_gradient, penalty_gradient
from lowrank_optax.linalg.products import Operand
from lowrank_optax.projectors import At
from lowrank_optax.testing import assert_bit_equal

HIGHEST = jax.lax.Precision.HIGHEST


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def bracket(projector, **options):
    """The projector alone: what leaves the bracket is P P^T G."""
    opened = lro.project(projector, select=".*", side="left", **options)
    return jitted(lro.chain(opened, optax.identity(), lro.backproject()))


def jitted(tx):
    return optax.GradientTransformationExtraArgs(tx.init, jax.jit(tx.update))


def loss(basis, gradient, penalty=0.0):
    """The loss as it is written, with everything formed."""
    lifted = jnp.matmul(basis, basis.T @ gradient, precision=HIGHEST)
    gram = jnp.matmul(basis.T, basis, precision=HIGHEST)
    off = jnp.sum((gram - jnp.eye(basis.shape[1])) ** 2)
    return jnp.sum((lifted - gradient) ** 2) + penalty * off


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("scale", [1.0, 1e-20, 1e15, 1e37])
def test_the_derivative_of_the_loss(transposed, scale):
    gradient, basis = normal(0, 12, 20), 0.4 * normal(1, 12, 3)
    scaled = jnp.float32(scale) * gradient
    size = frobenius(scaled)
    low = basis.T @ scaled
    operand = Operand.of(scaled, transposed)
    got = pca_gradient(operand, basis, low, size)
    got = got + 0.7 * penalty_gradient(basis)
    want = jax.grad(loss)(basis, gradient / jnp.linalg.norm(gradient), 0.7)
    # Sums of up to 240 products in float32.
    np.testing.assert_allclose(got, want, atol=2e-5 * float(jnp.abs(want).max()))


def streams():
    """Name -> (m, n, r, decay of the spectrum, noise).

    A gradient is ``1e-3 (U diag((1 + i)^-decay) Z + noise s E)``: U a fixed orthogonal
    matrix, Z and E Gaussian and new at every step, s the rms entry of the spectrum.
    """
    return {"steep": (96, 160, 16, 1.0, 0.1), "flat": (96, 160, 16, 0.5, 0.3)}


@functools.cache
def captured(name, steps=300, **options):
    """Energy in the basis after all steps, as a share of the exact subspace's."""
    m, n, r, decay, noise = streams()[name]
    rng = np.random.default_rng(0)
    frame = np.linalg.qr(rng.standard_normal((m, m)))[0]
    spectrum = (1.0 + np.arange(m)) ** -decay
    factor = jnp.asarray(frame * spectrum, jnp.float32)
    rms = noise * np.sqrt(np.mean(spectrum**2))
    leading = jnp.asarray(frame[:, :r], jnp.float32)
    tx = bracket(lro.online_pca(r, cold_start="random", **options))

    def gradient(key):
        one, two = jax.random.split(key)
        z, e = jax.random.normal(one, (m, n)), jax.random.normal(two, (m, n))
        return 1e-3 * (factor @ z + rms * e)

    def step(state, key):
        return tx.update(gradient(key), state)[1], ()

    keys = jax.random.split(jax.random.key(1), steps)
    state = tx.init(jnp.zeros((m, n)))
    state = jax.jit(lambda s: jax.lax.scan(step, s, keys)[0])(state)
    basis = jnp.linalg.qr(state.basis.vectors)[0]
    fresh = [gradient(jax.random.key(100 + i)) for i in range(5)]
    got = sum(float(jnp.sum((basis.T @ g) ** 2)) for g in fresh)
    return got / sum(float(jnp.sum((leading.T @ g) ** 2)) for g in fresh)


@pytest.mark.parametrize("name", streams())
def test_default_rate_finds_the_leading_subspace_from_a_random_start(name):
    assert captured(name, steps=2) < 0.5
    assert captured(name) >= 0.98


@pytest.mark.parametrize("optimizer", [None, optax.sgd(1.0), optax.lion(1.0)])
def test_a_learning_rate_of_one_stays_finite(optimizer):
    rate = 1.0 if optimizer is None else None
    projector = lro.online_pca(
        4, basis_learning_rate=rate, basis_optimizer=optimizer, cold_start="random"
    )
    tx = bracket(projector)

    def step(state, key):
        gradient = 1e3 * jax.random.normal(key, (12, 20))
        updates, state = tx.update(gradient, state)
        return state, jnp.all(jnp.isfinite(updates))

    keys = jax.random.split(jax.random.key(0), 200)
    state = tx.init(jnp.zeros((12, 20)))
    state, finite = jax.jit(lambda s: jax.lax.scan(step, s, keys))(state)
    assert bool(jnp.all(finite))
    for leaf in jax.tree.leaves(state):
        assert np.isfinite(np.asarray(leaf, np.float64)).all()


def test_the_basis_moves_after_use_and_not_in_its_first_step():
    tx = bracket(lro.online_pca(3, basis_optimizer=optax.sgd(0.3)))
    g1, g2 = normal(0, 12, 20), normal(1, 12, 20)
    _, first = tx.update(g1, tx.init(g1))
    basis = first.basis.vectors
    np.testing.assert_allclose(basis.T @ basis, jnp.eye(3), atol=1e-6)
    updates, second = tx.update(g2, first)
    np.testing.assert_allclose(updates, basis @ (basis.T @ g2), atol=1e-5)
    slope = jax.grad(loss)(basis, g2 / jnp.linalg.norm(g2))
    moved = basis - 0.3 * slope
    np.testing.assert_allclose(second.basis.vectors, moved, atol=1e-6)
    assert float(jnp.abs(slope).max()) > 0.05


def test_a_basis_optimizer_gets_the_basis_as_params():
    def update(updates, state, params=None):
        assert params is not None
        return jax.tree.map(lambda p: -0.5 * p, params), state

    halve = optax.GradientTransformation(lambda params: optax.EmptyState(), update)
    tx = bracket(lro.online_pca(3, basis_optimizer=halve))
    gradient = normal(0, 12, 20)
    _, state = tx.update(gradient, tx.init(gradient))
    _, later = tx.update(gradient, state)
    np.testing.assert_allclose(
        later.basis.vectors, 0.5 * state.basis.vectors, rtol=1e-6
    )


@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf])
def test_a_bad_gradient_moves_neither_basis_nor_optimizer(bad):
    tx = bracket(lro.online_pca(3))
    gradient = normal(0, 12, 20)
    state = tx.init(gradient)
    for seed in (0, 1):
        _, state = tx.update(normal(seed, 12, 20), state)
    poisoned = jnp.zeros_like(gradient) if bad == 0 else gradient.at[2, 3].set(bad)
    _, after = tx.update(poisoned, state)
    assert_bit_equal(after.basis, state.basis)
    _, healed = tx.update(gradient, after)
    assert not np.array_equal(healed.basis.vectors, state.basis.vectors)


def test_the_scale_of_the_gradient_does_not_matter():
    def run(scale):
        tx = bracket(lro.online_pca(3, basis_learning_rate=0.05))
        state = tx.init(jnp.zeros((12, 20)))
        for seed in range(4):
            _, state = tx.update(jnp.float32(scale) * normal(seed, 12, 20), state)
        return state.basis.vectors

    # Above 2^56 squares cannot be summed: no step.
    for scale in (2.0**-60, 2.0**53):
        # Powers of two: only what divides by a rounded norm differs.
        np.testing.assert_allclose(run(scale), run(1.0), atol=1e-5)


def test_the_basis_stands_still_within_an_accumulation():
    projector = lro.online_pca(3, basis_optimizer=optax.sgd(0.3))
    inner = optax.MultiSteps(optax.scale_by_adam(), 3)
    opened = lro.project(projector, select=".*", side="left")
    tx = jitted(lro.chain(opened, inner, lro.backproject()))
    state = tx.init(jnp.zeros((12, 20)))
    bases = []
    for seed in range(9):
        _, state = tx.update(normal(seed, 12, 20), state)
        bases.append(np.asarray(state.basis.vectors))
    moved = [bool(np.any(a != b)) for a, b in itertools.pairwise(bases)]
    # The first accumulation finds the basis; each later one moves it at its end.
    assert moved == [False, False, False, False, True, False, False, True]


@pytest.mark.parametrize("optimizer", [None, optax.adafactor(0.05)])
def test_a_stack_is_as_many_matrices(optimizer):
    options = {"basis_optimizer": optimizer, "cold_start": "svd"}
    alone = bracket(lro.online_pca(3, **options))
    stacked = bracket(lro.online_pca(3, **options), layer_axis=0)
    state = stacked.init(jnp.zeros((2, 12, 20)))
    states = [alone.init(jnp.zeros((12, 20))) for _ in range(2)]
    for seed in range(4):
        gradient = normal(seed, 2, 12, 20) * jnp.asarray([1.0, 100.0])[:, None, None]
        _, state = stacked.update(gradient, state)
        states = [alone.update(gradient[i], states[i])[1] for i in range(2)]
    for i in range(2):
        np.testing.assert_allclose(
            state.basis.vectors[i], states[i].basis.vectors, atol=1e-5
        )


def test_orthonormal_again_every_third_step():
    tx = bracket(lro.online_pca(3, 3, basis_optimizer=optax.sgd(0.5)))
    never = bracket(lro.online_pca(3, basis_optimizer=optax.sgd(0.5)))

    def defects(tx):
        """How far P P^T, which takes G to its update, is from a projection."""
        state, found = tx.init(jnp.zeros((12, 20))), []
        for seed in range(7):
            gradient = normal(seed, 12, 20)
            updates, state = tx.update(gradient, state)
            lift = updates @ jnp.linalg.pinv(gradient)
            found.append(float(jnp.abs(lift @ lift - lift).max()))
        return np.asarray(found)

    # 1e-4: P P^T through a pseudo-inverse in float32.
    orthonormal = defects(tx) < 1e-4
    assert orthonormal.tolist() == [True, True, False, True, False, False, True]
    assert not (defects(never)[2:] < 1e-4).any()


def test_nothing_of_the_gradients_size_is_formed():
    m, n, r = 256, 512, 8
    projector = lro.online_pca(r, basis_optimizer=optax.sgd(0.1))
    matrix = lro.Matrix("w", (m, n), (), (0,), (1,), "left", r)
    zero = jnp.int32(0)

    def advance(basis, gradient, low):
        at = lro.At((), zero, zero, jnp.bool_(False), count=zero)
        stored = projector.start(matrix)._replace(vectors=basis)
        return projector.advance(matrix, stored, gradient, low, at)

    arguments = (normal(0, m, r), normal(1, m, n), normal(2, r, n))
    compiled = jax.jit(advance).lower(*arguments).compile()
    memory = compiled.memory_analysis()
    if memory is None:
        pytest.skip("this backend does not tell")
    assert memory.temp_size_in_bytes < 4 * m * n


@pytest.mark.parametrize(
    ("optimizer", "extra"),
    [
        (None, lambda b: 2 * b + 4),  # AdamW: two moments and a counter
        (optax.lion(0.01), lambda b: b + 4),
        (optax.sgd(0.01), lambda b: 0),
    ],
    ids=["adamw", "lion", "sgd"],
)
def test_state_bytes(optimizer, extra):
    m, n, r = 32, 64, 4
    params = {"kernel": jnp.zeros((m, n)), "bias": jnp.zeros(n)}
    tx = lro.online_subspace_descent(1e-2, r, basis_optimizer=optimizer)
    seen = lro.state_bytes(tx, params)
    assert seen.entries["kernel", "basis"] == 4 * m * r + extra(4 * m * r)
    assert seen.entries["kernel", "mu"] == seen.entries["kernel", "nu"] == 4 * r * n
    state = tx.init(params)
    assert seen.total == sum(x.nbytes for x in jax.tree.leaves(state))


def basis_after_two(tx):
    """The basis after one step and after two."""
    tx, params = jitted(tx), {"w": jnp.zeros((12, 20))}
    state, bases = tx.init(params), []
    for seed in range(2):
        _, state = tx.update({"w": normal(seed, 12, 20)}, state, params)
        bases.append(optax.tree_utils.tree_get(state, "vectors"))
    return bases


@pytest.mark.parametrize("schedule", [False, True])
def test_the_papers_preset_goes_with_the_learning_rate(schedule):
    rate = (lambda count: 1e-3 * (1.0 + count)) if schedule else 2e-3
    options = {"select": "w", "side": "left"}
    tx = lro.online_subspace_descent(rate, 3, basis_preset="paper", **options)
    same = lro.scale_by_online_subspace_descent(
        3, basis_learning_rate=0.01, ortho_penalty=1.0, **options
    )
    # At count 1, both rates are 5 * 0.002.
    got, want = basis_after_two(tx), basis_after_two(same)
    np.testing.assert_array_equal(got[0], want[0])
    np.testing.assert_allclose(got[1], want[1], atol=1e-7)
    assert float(jnp.abs(got[1] - got[0]).max()) > 0.005


def test_the_sign_after_the_lift_is_of_the_whole_matrix():
    params = {"w": jnp.zeros((12, 20))}
    tx = lro.online_subspace_descent(
        0.5,
        3,
        base_optimizer=lro.scale_by_lion_interpolation(),
        after_lift=optax.scale_by_sign(),
        select="w",
    )
    updates, _ = tx.update({"w": normal(0, 12, 20)}, tx.init(params), params)
    assert set(np.unique(updates["w"])) == {-0.5, 0.5}


def test_bad_input():
    with pytest.raises(TypeError, match=r"`basis_optimizer` must be an optax.* float"):
        lro.online_subspace_descent(1e-2, 4, basis_optimizer=0.1)
    with pytest.raises(TypeError, match=r"`after_lift` must be an optax.* str"):
        lro.online_subspace_descent(1e-2, 4, after_lift="sign")
    with pytest.raises(ValueError, match="`basis_preset` must be one of"):
        lro.online_subspace_descent(1e-2, 4, basis_preset="both")
    with pytest.raises(ValueError, match=r"does not know\. Give basis_learning_rate"):
        lro.scale_by_online_subspace_descent(4, basis_preset="paper")
    with pytest.raises(ValueError, match=r"`cold_start` must be one of .*'random'"):
        lro.online_subspace_descent(1e-2, 4, cold_start="warm")
    with pytest.raises(TypeError, match="`update_proj_gap` must be a positive int"):
        lro.online_subspace_descent(1e-2, 4, reorthonormalize_every=2.5)
    tx = lro.online_subspace_descent(1e-2, 4, side="both")
    with pytest.raises(ValueError, match=r"online_pca .*'w'.* no side=.both"):
        tx.init({"w": jnp.zeros((32, 64))})


def test_a_second_moment_in_bfloat16_decays():
    """Rounded to nearest it would stand still: 0.1 % is less than half a unit."""
    projector = lro.online_pca(
        4, basis_dtype=jnp.bfloat16, basis_optimizer=optax.scale_by_adam(b2=0.999)
    )
    matrix = Matrix("", (64, 8), (), (0,), (1,), "left", 4)
    stored = projector.start(matrix)
    found = {x.dtype.name for x in jax.tree.leaves(stored)}
    assert found == {"bfloat16", "int32"}
    stored = stored._replace(
        optimizer=stored.optimizer._replace(nu=jnp.ones((64, 4), jnp.bfloat16))
    )
    # All of the gradient is in the span of the basis, which then has no slope.
    gradient = jnp.eye(64, 8).at[:, 4:].set(0.0)

    def step(i, stored):
        key = jax.random.key(0)
        at = At(key, jnp.int32(0), jnp.int32(0), jnp.bool_(False), (), i)
        low = stored.vectors.T @ gradient
        return projector.advance(matrix, stored, gradient, low, at)

    after = jax.jit(lambda s: jax.lax.fori_loop(0, 100, step, s))(stored)
    # Every step rounds 256 numbers up or down by a unit of 2^-8, three times in four
    # up: 100 of them leave the mean uncertain by 0.0011.
    mean = float(after.optimizer.nu.astype(jnp.float32).mean())
    assert abs(mean - 0.999**100) < 0.005
