"""Sampled singular vectors: the law of the draw, its keys, and what is stored."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from lowrank_optax.projectors import sampled
from lowrank_optax.testing import (
    assert_bit_equal,
    assert_orthonormal,
    assert_projector_laws,
)

SIGMA = np.array([4.0, 2.0, 1.0, 0.5])
KEYS = 8000


def diagonal(sigma, n=6):
    """A matrix whose left singular vectors are the unit vectors."""
    return jnp.eye(len(sigma), n) * jnp.asarray(sigma, jnp.float32)[:, None]


def at(key):
    zero = jnp.int32(0)
    return lro.At(key, zero, zero, jnp.bool_(True))


def draw(sigma, rank, keys):
    """The drawn indices per key, from the basis that comes out."""
    gradient = diagonal(sigma)
    matrix = lro.Matrix("", gradient.shape, (), (0,), (1,), "left", rank)
    projector = lro.sampled_svd(rank)
    one = functools.partial(
        projector.refresh, matrix, gradient, projector.start(matrix)
    )
    bases = jax.jit(jax.vmap(lambda key: one(at(key))))(keys)
    return np.argmax(np.abs(np.asarray(bases)), axis=1)


def inclusion(sigma, rank):
    """Probability that each index is among the first `rank` drawn, exactly."""
    out = np.zeros(len(sigma))
    for order in itertools.permutations(range(len(sigma)), rank):
        left, p = sigma.sum(), 1.0
        for i in order:
            p, left = p * sigma[i] / left, left - sigma[i]
        out[list(order)] += p
    return out


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_inclusion_follows_the_singular_values(rank):
    """Sequential sampling without replacement (Plackett-Luce), over many keys.

    A frequency over K independent keys has a standard deviation of sqrt(p (1 - p) / K),
    0.0056 at most; five of them are exceeded once in 2e6.
    """
    drawn = draw(SIGMA, rank, jax.random.split(jax.random.key(0), KEYS))
    frequency = np.array([(drawn == i).any(axis=1).mean() for i in range(4)])
    expected = inclusion(SIGMA, rank)
    bound = 5 * np.sqrt(expected * (1 - expected) / KEYS)
    assert np.all(np.abs(frequency - expected) < bound), (frequency, expected)
    # The bounds do tell the law from its neighbours.
    assert np.any(np.abs(inclusion(SIGMA**2, rank) - expected) > bound)
    assert np.any(np.abs(rank / 4 - expected) > bound)


def test_drawn_vectors_differ_and_stand_by_falling_singular_value():
    drawn = draw(SIGMA, 3, jax.random.split(jax.random.key(1), 500))
    assert np.all(np.diff(drawn, axis=1) > 0)


def test_zero_singular_values_come_last():
    keys = jax.random.split(jax.random.key(2), 500)
    assert set(draw([2.0, 1.0, 0.0, 0.0], 2, keys).ravel()) == {0, 1}
    # With too few others all of these are taken.
    assert np.all(draw([2.0, 1.0, 0.0, 0.0], 3, keys)[:, :2] == [0, 1])


def test_with_all_vectors_the_basis_is_the_svd_s():
    gradient = {"w": jax.random.normal(jax.random.key(3), (5, 9))}

    def basis(projector):
        return run(bracket(projector), [gradient])[0].basis["w"]

    assert_bit_equal(basis(lro.sampled_svd(5)), basis(lro.svd(5)))


def bracket(projector, **options):
    opening = lro.project(projector, select=".", layer_axis=0, **options)
    return lro.chain(opening, optax.identity(), lro.backproject())


def run(tx, gradients):
    state, states = tx.init(jax.tree.map(jnp.zeros_like, gradients[0])), []
    update = jax.jit(tx.update)
    for gradient in gradients:
        _, state = update(gradient, state)
        states.append(state)
    return states


def test_draws_differ_by_leaf_layer_epoch_and_seed_and_repeat_otherwise():
    matrix = jax.random.normal(jax.random.key(4), (10, 12))
    tree = {"a": matrix, "b": matrix, "stack": jnp.stack([matrix] * 3)}
    first, held, second = run(bracket(lro.sampled_svd(4, 2)), [tree] * 3)
    assert_bit_equal(first.basis, held.basis)
    (again,) = run(bracket(lro.sampled_svd(4, 2)), [tree])
    assert_bit_equal(first.basis, again.basis)
    (other,) = run(bracket(lro.sampled_svd(4, 2), seed=1), [tree])
    bases = [first.basis["a"], first.basis["b"], *first.basis["stack"]]
    bases += [second.basis["a"], other.basis["a"]]
    for one, two in itertools.combinations(bases, 2):
        # The same vectors up to sign would have |P^T P'| = I.
        assert np.max(np.abs(np.abs(one.T @ two) - np.eye(4))) > 0.5


@pytest.mark.parametrize("scale", [1e-20, 1e15, 1e16])
def test_the_draw_does_not_depend_on_the_gradient_s_scale(scale):
    gradient = jnp.clip(jax.random.normal(jax.random.key(5), (6, 9)), -3, 3)
    ((plain,), (scaled,)) = (
        run(bracket(lro.sampled_svd(3)), [{"w": s * gradient}]) for s in (1.0, scale)
    )
    # Where the scale is no power of two it rounds 54 elements by 1e-7 each; 1e-4 leaves
    # room for the distance between singular values.
    np.testing.assert_allclose(plain.basis["w"], scaled.basis["w"], atol=1e-4)


# Unbiased.


def minimal(sigma, rank):
    """The probabilities by hand: as many ones as it takes for none to exceed 1."""
    for k in range(rank):
        rest = (rank - k) * sigma[k:] / sigma[k:].sum()
        if rest[0] <= 1:
            return np.concatenate([np.ones(k), rest])
    raise AssertionError


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_inclusion_probabilities_are_those_of_least_variance(rank):
    sigma = np.array([100.0, 4.0, 2.0, 1.0, 1.0, 0.5, 1e-4])
    got = np.float64(sampled.inclusion(jnp.float32(sigma), rank))
    np.testing.assert_allclose(got, minimal(sigma, rank), rtol=1e-5)
    assert got.sum() == pytest.approx(rank, rel=1e-6)

    def variance(pi):
        return np.sum(sigma**2 * (1 / pi - 1))

    # Moving a little from one to another makes it larger.
    for i, j in itertools.permutations(range(7), 2):
        moved = got.copy()
        moved[[i, j]] += [1e-6, -1e-6]
        if moved[i] <= 1 and moved[j] > 0:
            assert variance(moved) > variance(got) * (1 - 1e-9)
    few = np.float64(sampled.inclusion(jnp.float32([2.0, 1.0, 0.0, 0.0, 0.0]), 3))
    np.testing.assert_allclose(few, [1, 1, 1 / 3, 1 / 3, 1 / 3], rtol=1e-5)
    enough = np.float64(sampled.inclusion(jnp.float32([2.0, 1.0, 0.0]), 2))
    np.testing.assert_allclose(enough, [1, 1, 0], atol=1e-20)


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_systematic_draws_have_their_probabilities(rank):
    pi = sampled.inclusion(jnp.float32([9.0, 4.0, 2.0, 1.0, 1.0, 0.5, 0.1]), rank)
    keys = jax.random.split(jax.random.key(8), KEYS)
    drawn = np.asarray(jax.vmap(lambda key: sampled.systematic(key, pi, rank))(keys))
    assert np.all(np.diff(drawn, axis=1) > 0)  # so many different ones
    frequency = np.stack([(drawn == i).any(axis=1).mean() for i in range(7)])
    p = np.float64(pi)
    bound = 5 * np.sqrt(p * (1 - p) / KEYS) + 1e-9
    assert np.all(np.abs(frequency - p) <= bound), (frequency, p)


def averaged(one, want, keys):
    """Asserts that the mean of draws is ``want``, to 4 standard errors of its norm."""
    draws = np.float64(jax.jit(jax.vmap(one))(keys))
    error = np.linalg.norm(draws.mean(0) - want)
    spread = np.sqrt(draws.var(0).sum() / len(draws))
    assert spread > 1e-4 * np.linalg.norm(want)  # or nothing was drawn
    assert error < 4 * spread, (error, spread)


def test_the_projection_is_unbiased():
    """For this gradient, and for others until the next draw."""
    with jax.enable_x64(True):
        gradient = jax.random.normal(jax.random.key(9), (6, 8), jnp.float64)
        gradient = gradient * jnp.exp(-jnp.arange(6.0))[:, None]
        later = jax.random.normal(jax.random.key(10), (6, 8), jnp.float64)
        matrix = lro.Matrix("", (6, 8), (), (0,), (1,), "left", 3)
        projector = lro.sampled_svd(3, basis_dtype=jnp.float64, sampling="unbiased")
        assert not projector.orthonormal

        def lifted(key):
            p = projector.refresh(matrix, gradient, projector.start(matrix), at(key))
            return jnp.stack([p @ (p.T @ x) for x in (gradient, later)])

        keys = jax.random.split(jax.random.key(11), KEYS)
        for i, want in enumerate((gradient, later)):
            averaged(lambda key, i=i: lifted(key)[i], np.asarray(want), keys)

        def biased(key):
            plain = lro.sampled_svd(3, basis_dtype=jnp.float64)
            p = plain.refresh(matrix, gradient, plain.start(matrix), at(key))
            return p @ (p.T @ gradient)

        with pytest.raises(AssertionError):
            averaged(biased, np.asarray(gradient), keys)


def test_unbiased_draws_in_a_bracket():
    """All vectors: the identity. Fewer: orthogonal columns, the rarer the longer."""
    tree = {"w": jax.random.normal(jax.random.key(12), (3, 5, 9))}
    tx = bracket(lro.sampled_svd(5, sampling="unbiased"))
    updates, _ = tx.update(tree, tx.init(tree))
    np.testing.assert_allclose(updates["w"], tree["w"], atol=1e-5)
    for side in ("short", "both"):
        projector = lro.sampled_svd(3, sampling="unbiased")
        (state,) = run(bracket(projector, side=side), [tree])
        for basis in jax.tree.leaves(state.basis):
            gram = np.asarray(basis.swapaxes(1, 2) @ basis)
            lengths = np.diagonal(gram, axis1=1, axis2=2)
            rest = gram - lengths[..., None] * np.eye(3)
            assert np.all(np.abs(rest) < 1e-5 * lengths.max())
            assert np.all(lengths >= 1 - 1e-5) and lengths.max() > 1.01
    with pytest.raises(ValueError, match="`sampling` must be"):
        lro.sampled_svd(3, sampling="plumage")


def test_projector_laws():
    assert_projector_laws(lro.sampled_svd(2), energy=None)


@pytest.mark.parametrize("side", ["short", "long", "both"])
def test_sides(side):
    tree = {"w": jax.random.normal(jax.random.key(6), (7, 5))}
    (state,) = run(bracket(lro.sampled_svd(3), side=side), [tree])
    assert_orthonormal(state.basis)


# The method.


@pytest.mark.parametrize("conventions", ["optax", "authors"])
def test_sara_is_galore_on_drawn_bases(conventions):
    options = {"conventions": conventions, "weight_decay": 0.1}
    ours = lro.sara(1e-2, 2, update_proj_gap=2, **options)
    parts = lro.galore(1e-2, projector=lro.sampled_svd(2, 2), **options)
    assert_same(ours, parts)


def test_sara_with_recovery_is_fira_on_drawn_bases():
    ours = lro.sara(1e-2, 2, update_proj_gap=2, recovery=lro.recover_scale())
    assert_same(ours, lro.fira(1e-2, projector=lro.sampled_svd(2, 2)))


def assert_same(tx, other):
    params = {"w": jnp.ones((8, 6)), "b": jnp.ones(4)}
    states = [tx.init(params), other.init(params)]
    updates = [jax.jit(tx.update), jax.jit(other.update)]
    for step in range(5):
        gradient = jax.tree.map(
            lambda p, s=step: jax.random.normal(jax.random.key(s), p.shape), params
        )
        out = [u(gradient, s, params) for u, s in zip(updates, states, strict=True)]
        states = [state for _, state in out]
        # The same formula, where the bias is corrected elsewhere.
        for a, b in zip(*(jax.tree.leaves(u) for u, _ in out), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("recovery", [None, lro.recover_scale()])
def test_state_bytes(recovery):
    """GaLore's: m r + 2 n r numbers, counters and a flag; 4 bytes for a limiter."""
    table = lro.state_bytes(
        lro.sara(1e-2, rank=4, recovery=recovery), {"w": jnp.zeros((48, 32))}
    )
    expected = {"basis": 4 * 32 * 4, "mu": 4 * 48 * 4, "nu": 4 * 48 * 4, "other": 17}
    if recovery is not None:
        expected["recovery"] = 4
    assert table.by_role == expected


def test_errors():
    with pytest.raises(TypeError, match="rank"):
        lro.sampled_svd(jnp.float32(2.0))
    with pytest.raises(ValueError, match="`rank` must be at least 1, got 0"):
        lro.sara(1e-2, rank=0)
    with pytest.raises(ValueError, match="conventions"):
        lro.sara(1e-2, conventions="paper")
    with pytest.raises(ValueError, match="exceeds min"):
        lro.sara(1e-2, rank=9, select="w").init({"w": jnp.ones((8, 6))})
