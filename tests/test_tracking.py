"""Subspaces that follow a gradient: for thousands of steps, and as well as any eta."""

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from lowrank_optax.testing import (
    HARD_SHAPES,
    assert_bit_equal,
    assert_orthonormal,
    assert_projector_laws,
    hard_matrix,
)

M, N, R, DIRECTIONS = 96, 288, 16, 24
MOVES = ("track", "walk", "jump")


def refresher(projector, m=M, n=N, r=R):
    """One matrix' warm refresh: (key, gradient, old basis) -> basis."""
    matrix = lro.Matrix("w", (m, n), (), (0,), (1,), "left", r)
    zero = jnp.int32(0)

    def refresh(key, gradient, old):
        at = lro.At(key, zero, zero, jnp.bool_(False))
        return projector.refresh(matrix, gradient, old, at)

    return refresh


def stream(turn, m=M, n=N, seed=0):
    """Gradients of unit size: 24 directions of unlike weight, `turn` rad a step.

    Each direction turns towards one of its own; a column holds them with random signs.
    """
    key = jax.random.key(seed)
    frame = jnp.linalg.qr(jax.random.normal(key, (m, 2 * DIRECTIONS)))[0]
    here, there = frame[:, :DIRECTIONS], frame[:, DIRECTIONS:]
    size = jnp.geomspace(1.0, 0.3, DIRECTIONS)[:, None] / n**0.5

    def gradient(step):
        left = jnp.cos(turn * step) * here + jnp.sin(turn * step) * there
        signs = jax.random.rademacher(
            jax.random.fold_in(key, step), (DIRECTIONS, n), jnp.float32
        )
        return left @ (size * signs)

    return gradient


def leading(gradient, r=R):
    return jnp.linalg.svd(gradient, full_matrices=False)[0][:, :r]


def gram(a, b):
    return jnp.matmul(a.T, b, precision="highest")


# Five thousand updates.

STEPS = {
    "line_search": {"step": "line_search"},
    # Angles of a radian and more: the phase is as good as random.
    "large_eta": {"step": 30.0},
}


@functools.cache
def soak(steps, basis_dtype):
    """5,000 refreshes: defects, sines of the angles turned, and the last basis."""
    projector = lro.grassmann(R, 1, basis_dtype, **STEPS[steps])
    gradient, refresh = stream(0.01, n=M), refresher(projector, n=M)

    def body(basis, step):
        new = refresh(jax.random.key(0), gradient(step), basis)
        old, wide = basis.astype(jnp.float32), new.astype(jnp.float32)
        defect = jnp.linalg.norm(gram(wide, wide) - jnp.eye(R))
        # A rank-1 turn by a takes sin^2 a from |S_new^T S_old|^2 = r.
        sine = jnp.sqrt(jnp.maximum(R - jnp.sum(gram(wide, old) ** 2), 0.0))
        return new, (defect, sine)

    run = jax.jit(lambda basis: jax.lax.scan(body, basis, jnp.arange(1, 5001)))
    basis, (defects, sines) = run(leading(gradient(0)).astype(basis_dtype))
    return np.asarray(defects), np.asarray(sines), basis


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize(
    # Of float32 products of 96 terms; of entries rounded to 2^-9, whose errors add to
    # about 2^-9 sqrt(2 r) = 1e-2 in the worst case and half of that at random.
    ("basis_dtype", "bound"),
    [(jnp.float32, 1e-5), (jnp.bfloat16, 1e-2)],
    ids=["float32", "bfloat16"],
)
def test_orthonormal_through_5000_tracked_updates(steps, basis_dtype, bound):
    defects, _, basis = soak(steps, basis_dtype)
    assert defects.max() <= bound
    last = np.asarray(basis, np.float64)
    assert np.linalg.norm(last.T @ last - np.eye(R)) <= bound


def test_the_5000_updates_do_turn_the_basis():
    """Else the defects above would prove nothing."""
    small, large = (np.median(soak(name, jnp.float32)[1]) for name in STEPS)
    assert 0.01 < small < 0.5 < large


# The exact line search against every constant eta.

ETAS = np.geomspace(0.005, 1e4, 25)
SCALES = (1e-4, 1.0, 1e4)


def share(turn, scale, step, steps=600):
    """Share of the stream's energy that bases hold in the last quarter of steps."""
    gradient, refresh = stream(turn), refresher(lro.grassmann(R, 1, step=step))

    def body(basis, t):
        g = gradient(t)
        basis = refresh(jax.random.key(0), scale * g, basis)
        return basis, jnp.sum(gram(basis, g) ** 2) / jnp.sum(g**2)

    _, shares = jax.lax.scan(body, leading(gradient(0)), jnp.arange(1, steps))
    return jnp.mean(shares[-steps // 4 :])


@functools.cache
def captured():
    """Per (turn, scale): the share by line search, and by every eta."""
    streams = [*((0.01, scale) for scale in SCALES), (0.001, 1.0)]
    turns, scales = map(jnp.asarray, zip(*streams, strict=True))
    search = jax.vmap(functools.partial(share, step="line_search"))
    constant = jax.vmap(jax.vmap(share, (None, None, 0)), (0, 0, None))

    @jax.jit
    def run(etas):
        return search(turns, scales), constant(turns, scales, etas)

    return tuple(map(np.asarray, run(jnp.asarray(ETAS, jnp.float32))))


def test_line_search_captures_what_the_best_eta_does_at_every_scale():
    """A stream of 24 directions at rank 16, 96 x 288, turning 0.01 rad a step."""
    search, constant = (shares[:3] for shares in captured())
    best = constant.max()
    # The sweep has its best eta inside, at scale 1; at the others it is far outside.
    assert 2 < constant[1].argmax() < len(ETAS) - 3
    assert constant[1].max() == best > constant[[0, 2]].max() + 0.1
    assert search.min() >= best
    # Rounding parts the trajectories after some hundred steps, so these are means of
    # 150 steps of three runs: they differ by 2e-3.
    np.testing.assert_allclose(search, search[1], rtol=5e-3)


def test_where_averaging_pays_the_line_search_is_near_the_best_eta():
    """At 0.001 rad a step a smaller eta averages over gradients: worth 1 % at most."""
    search, constant = (shares[3] for shares in captured())
    assert constant.max() - 0.01 <= search


# Whatever the gradient is.

FEW_SHAPES = ((5, 5), (3, 40))


@pytest.mark.parametrize(
    ("make", "cold_start", "shapes"),
    [
        (lro.grassmann, "svd", HARD_SHAPES),
        (lro.grassmann, "power", FEW_SHAPES),
        (lro.power_iteration, "svd", FEW_SHAPES),
    ],
)
def test_projector_laws(make, cold_start, shapes):
    # The share that lro.power's cold start, the same 12 sweeps, is asked for.
    assert_projector_laws(make(3, cold_start=cold_start), shapes=shapes, energy=0.99)


@pytest.mark.parametrize(
    "options",
    [
        {"step": 1e4},
        {"damping": 0.5, "max_angle": 0.1},
        {"move": "walk", "step": 0.3},
        {"move": "walk", "step": 0.3, "basis_dtype": jnp.bfloat16},
        {"move": "jump", "basis_dtype": jnp.bfloat16},
    ],
    ids=["eta", "damped", "walk", "walk_bf16", "jump_bf16"],
)
def test_projector_laws_of_grassmann(options):
    projector = lro.grassmann(3, cold_start="svd", **options)
    assert_projector_laws(projector, shapes=FEW_SHAPES)


@pytest.mark.parametrize("step", ["line_search", 1e4])
def test_projector_laws_of_grassmann_in_bfloat16(step):
    projector = lro.grassmann(3, 1, jnp.bfloat16, cold_start="svd", step=step)
    assert_projector_laws(projector, shapes=FEW_SHAPES)


def bracket(projector, inner=None, **options):
    return lro.chain(
        lro.project(projector, select=".", **options),
        inner or optax.scale_by_adam(),
        lro.backproject(),
    )


def states(tx, gradients):
    state, update, out = tx.init(gradients[0]), jax.jit(tx.update), []
    for gradient in gradients:
        updates, state = update(gradient, state)
        out.append(state)
        assert all(np.isfinite(u).all() for u in jax.tree.leaves(updates))
    return out


def noise(seed, shape=(12, 20)):
    return {"w": jnp.asarray(hard_matrix("gaussian", *shape, seed=seed))}


def svd_started(rank=4, **options):
    return lro.grassmann(rank, 1, cold_start="svd", **options)


@pytest.mark.parametrize("step", ["line_search", 1e4])
@pytest.mark.parametrize(
    ("shape", "basis_dtype"),
    [
        ((12, 20), jnp.float32),
        ((20, 12), jnp.float32),
        ((12, 20), jnp.bfloat16),
    ],
    ids=["wide", "tall", "bfloat16"],
)
def test_a_gradient_inside_the_span_does_not_turn_the_basis(step, shape, basis_dtype):
    """Sigma is 0 but for rounding, at which 1e4 would turn far."""
    tx = bracket(svd_started(step=step, basis_dtype=basis_dtype))
    update = jax.jit(tx.update)
    start = tx.init(noise(0, shape))
    for seed in range(8):
        before = update(noise(seed, shape), start)[1]
        inside = before.basis["w"].astype(jnp.float32) @ noise(seed, (4, 20))["w"]
        after = update({"w": inside if shape == (12, 20) else inside.T}, before)[1]
        assert_bit_equal(after.basis, before.basis)
        assert not after.pending["w"]


@pytest.mark.parametrize("move", MOVES)
def test_zero_and_nan_gradients_at_a_refresh(move):
    """The basis stays; healthy gradients go on from there (moments are Optax' own)."""
    tx = bracket(svd_started(move=move), transport=lro.rotate_moments())
    update, zero = jax.jit(tx.update), jax.tree.map(jnp.zeros_like, noise(0))
    first = update(noise(0), tx.init(zero))[1]
    for value in (0.0, jnp.nan, jnp.inf):
        spoiled = {"w": zero["w"].at[3, 4].set(value)}
        updates, still = update(spoiled, first)
        assert_bit_equal(first.basis, still.basis)
        assert still.pending["w"]
        if value == 0.0:
            assert np.isfinite(updates["w"]).all()
            assert_bit_equal(still.inner_state.mu["w"], 0.9 * first.inner_state.mu["w"])
        healed = update(noise(2), still)[1]
        assert_orthonormal(healed.basis)
        assert not healed.pending["w"]
        assert not np.array_equal(healed.basis["w"], still.basis["w"])


@pytest.mark.parametrize(
    ("move", "shape"),
    [*((move, (4, 20)) for move in MOVES), ("walk", (20, 4)), ("track", (1, 1))],
)
def test_rank_of_the_whole_space(move, shape):
    """r = m: nowhere to turn, and nothing is lost."""
    tx = bracket(svd_started(9, move=move), optax.identity(), clip_rank=True)
    state, update = tx.init(noise(0, shape)), jax.jit(tx.update)
    for seed in range(3):
        gradient = noise(seed, shape)
        updates, after = update(gradient, state)
        assert_orthonormal(after.basis)
        # Two float32 products with an orthonormal matrix.
        np.testing.assert_allclose(updates["w"], gradient["w"], atol=2e-5)
        if seed and move != "jump":
            assert_bit_equal(after.basis, state.basis)
        state = after


@pytest.mark.parametrize("move", ["walk", "jump"])
def test_random_moves_differ_between_leaves_layers_and_seeds(move):
    """The same gradients and starts: all that bases differ by is what was drawn."""
    tree = {"a": noise(0)["w"], "stack": jnp.stack([noise(0)["w"]] * 2)}

    def make(seed):
        projector = svd_started(move=move, step=0.5)
        return bracket(projector, optax.identity(), layer_axis=0, seed=seed)

    update, bases = jax.jit(make(0).update), []
    for state in (make(0).init(tree), make(1).init(tree)):  # the seed is in the state
        for _ in range(2):
            _, state = update(tree, state)
        bases += [state.basis["a"], *state.basis["stack"]]
    for one, two in itertools.combinations(bases, 2):
        assert np.abs(np.abs(one.T @ two) - np.eye(4)).max() > 0.02


# A sudden change of the data.

WALK = functools.partial(lro.grass_walk, step=0.05)


@functools.cache
def after_a_change(method: Any, turned=True, **options):
    """Share of the gradient seen at every step, and the largest entries of updates.

    The gradient's subspace, of half the basis' rank, is another one from step 15 on,
    between two refreshes.
    """
    m, n, r, gap = 48, 96, 8, 10
    frame = jnp.linalg.qr(jax.random.normal(jax.random.key(0), (m, r)))[0]
    both = frame.reshape(m, 2, r // 2)
    fixed = jax.random.normal(jax.random.key(2), (r // 2, n))

    def gradient(step):
        here = jnp.where(turned & (step >= 15), both[:, 1], both[:, 0])
        a, b = jax.random.split(jax.random.fold_in(jax.random.key(1), step))
        low = fixed + 0.3 * jax.random.normal(a, (r // 2, n))
        return here @ low + 0.02 * jax.random.normal(b, (m, n))

    tx = method(1.0, r, update_proj_gap=gap, **options)

    def step(state: Any, t):
        g = gradient(t)
        update, state = tx.update(g, state)
        seen = jnp.sum(jnp.square(state.basis.T @ g)) / jnp.sum(jnp.square(g))
        return state, (seen, jnp.abs(update).max(), state.basis)

    start = tx.init(jnp.zeros((m, n)))
    run: Any = jax.jit(lambda start: jax.lax.scan(step, start, jnp.arange(50)))
    return jax.tree.map(np.asarray, run(start)[1])


@pytest.mark.parametrize("method", [lro.subtrack, WALK], ids=["subtrack", "walk"])
def test_a_basis_that_has_lost_the_gradient_is_found_anew(method):
    share, entries, _ = after_a_change(method)
    assert share[14] > 0.9 and share[15:20].max() < 0.5
    assert share[20:].min() > 0.9
    slow, far, _ = after_a_change(method, renew_below=None)
    assert slow[20:30].max() < 0.8
    assert entries[20:].max() < far[20:].max()


def test_a_basis_that_follows_is_not_found_anew():
    plain = after_a_change(lro.subtrack, turned=False, renew_below=None)
    assert_bit_equal(after_a_change(lro.subtrack, turned=False), plain)


# LDAdam's power step.


def momentum_step(basis, mu, count, gradient, b1, rho):
    """`orth(B (B^T U))` in float64, B formed and orthonormalized by Householder."""
    u, mu, a = (np.asarray(x, np.float64) for x in (basis, mu, gradient))
    b = rho * u @ mu / (1 - b1**count) + (1 - rho) * a
    return np.linalg.qr(b @ (b.T @ u))[0]


@pytest.mark.parametrize(
    ("shape", "rho"), [((12, 20), 0.0), ((12, 20), 0.8), ((20, 12), 0.99)], ids=str
)
def test_power_iteration_against_the_formula(shape, rho):
    b1 = 0.8
    tx = bracket(lro.power_iteration(4, b1, rho), optax.scale_by_adam(b1))
    gradients = [noise(seed, shape) for seed in range(6)]
    run = states(tx, gradients)
    for count, (before, after) in enumerate(itertools.pairwise(run), start=1):
        g = gradients[count]["w"]
        g = g if shape == (12, 20) else g.T
        mu = before.inner_state.mu["w"]
        want = momentum_step(before.basis["w"], mu, count, g, b1, rho)
        got = np.asarray(after.basis["w"], np.float64)
        # Float32 against the condition number of B (B^T U), here up to a few hundred.
        sines = np.linalg.norm(want - got @ (got.T @ want), axis=0)
        assert sines.max() <= 1e-4
        np.testing.assert_allclose(np.abs(np.sum(want * got, 0)), 1.0, atol=1e-4)


class Momentum(NamedTuple):
    """A first moment and nothing else."""

    mu: Any


def averaged(b1):
    """Adam's first moment as the direction: products of it are all there is."""

    def update(updates, state, params=None):
        del params
        mu = jax.tree.map(lambda m, u: b1 * m + (1 - b1) * u, state.mu, updates)
        return mu, Momentum(mu)

    return optax.GradientTransformation(
        lambda params: Momentum(jax.tree.map(jnp.zeros_like, params)), update
    )


def test_power_iteration_without_momentum_follows_the_gradient():
    """No `mu` in the inner state: B is the gradient."""
    first, second = states(
        bracket(lro.power_iteration(4), optax.identity()), [noise(0), noise(1)]
    )
    zero = np.zeros((4, 20))
    want = momentum_step(first.basis["w"], zero, 1, noise(1)["w"], 0.9, 0.0)
    agreement = np.abs(np.sum(want * np.asarray(second.basis["w"]), 0))
    np.testing.assert_allclose(agreement, 1.0, atol=1e-3)


@pytest.mark.parametrize("kind", ["rank_one", "rank_two"])
def test_power_iteration_of_too_few_directions(kind):
    """They are held, and the other directions stay where the old basis had them."""
    gradient = np.float64(hard_matrix(kind, 12, 20))
    tx = bracket(lro.power_iteration(4, 0.9, cold_start="svd"), optax.identity())
    run = states(tx, [noise(0), *[{"w": jnp.asarray(gradient, jnp.float32)}] * 3])
    for before, after in itertools.pairwise(run):
        assert_orthonormal(after.basis)
        old, new = (np.asarray(s.basis["w"], np.float64) for s in (before, after))
        missed = gradient - new @ (new.T @ gradient)
        assert np.linalg.norm(missed) <= 1e-3 * np.linalg.norm(gradient)
        known = np.linalg.svd(np.c_[old, gradient])[0]
        known = known[:, : np.linalg.matrix_rank(np.c_[old, gradient], 1e-4)]
        strange = new - known @ (known.T @ new)
        assert np.linalg.norm(strange) <= 1e-2


@pytest.mark.parametrize("scale", [1e-30, 1e15])
def test_power_iteration_has_no_scale(scale):
    """Momentum and gradient alike: products of both leave float32's range."""
    tx = bracket(lro.power_iteration(4, 0.9), averaged(0.9))
    plain, scaled = (
        states(tx, [{"w": s * noise(seed)["w"]} for seed in range(3)])[-1].basis["w"]
        for s in (1.0, scale)
    )
    np.testing.assert_allclose(scaled, plain, atol=1e-4)


def test_power_iteration_goes_on_after_a_nan():
    """It reaches no moment, as Adam would never lose it again, and no basis."""
    tx = bracket(lro.power_iteration(4, 0.9))
    update, bad = jax.jit(tx.update), noise(1)["w"].at[0, 0].set(jnp.nan)
    state = update(noise(0), tx.init(noise(0)))[1]
    before = update({"w": bad}, state)[1]
    assert_bit_equal(before.basis, state.basis)
    assert np.isfinite(before.inner_state.mu["w"]).all()
    after = update(noise(2), before)[1]
    after = update(noise(3), after)[1]
    assert_orthonormal(after.basis)
    assert not after.pending["w"]


def test_power_iteration_keeps_its_basis_at_a_zero_gradient():
    zero = jax.tree.map(jnp.zeros_like, noise(0))
    run = states(bracket(lro.power_iteration(4, 0.9)), [noise(0), zero, noise(1)])
    assert_bit_equal(run[0].basis, run[1].basis)
    assert_orthonormal(run[2].basis)


def test_power_iteration_has_no_two_sides():
    tx = bracket(lro.power_iteration(4), side="both")
    with pytest.raises(
        ValueError, match=r"power_iteration .*one basis, so leaf 'w' has no side"
    ):
        tx.init(noise(0))
