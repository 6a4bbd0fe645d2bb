"""Projectors and transports inside a bracket: bases, signs, keys, injected bases."""

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from lowrank_optax.leaves import moments as _moments
from lowrank_optax.testing import assert_orthonormal

M, N, R, GAP = 8, 12, 3, 2


def noise(step, shape=(M, N)):
    return jax.random.normal(jax.random.fold_in(jax.random.key(7), step), shape)


def bracket(projector, inner=None, **options):
    options = {"select": ".", "layer_axis": 0, **options}
    return lro.chain(
        lro.project(projector, **options), inner or optax.identity(), lro.backproject()
    )


def run(tx, gradients, jit=True):
    state = tx.init(jax.tree.map(jnp.zeros_like, gradients[0]))
    update, out = jax.jit(tx.update) if jit else tx.update, []
    for gradient in gradients:
        updates, state = update(gradient, state)
        out.append((updates, state))
    return out


ORTHONORMAL = {
    "svd": lro.svd,
    "power": lro.power,
    "grassmann": functools.partial(lro.grassmann, cold_start="svd"),
}
orthonormal = pytest.mark.parametrize("make", ORTHONORMAL.values(), ids=ORTHONORMAL)


@pytest.mark.parametrize(
    ("side", "dtype"), [("short", jnp.float32), ("both", jnp.bfloat16)]
)
@orthonormal
def test_bases_are_orthonormal_and_updates_lie_in_their_span(make, side, dtype):
    tx = bracket(make(R, GAP, basis_dtype=dtype), side=side)
    tree = {"w": noise(0), "stack": noise(1, (2, N, M))}
    for updates, state in run(tx, [tree, jax.tree.map(jnp.sin, tree), tree]):
        bases = jax.tree.leaves(state.basis)
        assert {basis.dtype for basis in bases} == {jnp.dtype(dtype)}
        assert_orthonormal(bases)
        assert np.linalg.matrix_rank(np.asarray(updates["w"]), tol=1e-3) == R


def test_svd_is_the_best_subspace_of_its_rank():
    """Invariant I4: |P^T G|^2 is the energy of the r leading singular values."""
    gradient = noise(3)
    ((updates, _),) = run(bracket(lro.svd(R, GAP)), [{"w": gradient}])
    left, values, right = np.linalg.svd(np.asarray(gradient, np.float64))
    best = (left[:, :R] * values[:R]) @ right[:R]
    np.testing.assert_allclose(updates["w"], best, atol=1e-5)


def test_a_gradient_in_the_subspace_passes_unchanged():
    """Invariant I10: with plain gradient steps, rank r loses nothing of rank r."""
    low = np.asarray(noise(4, (M, R)) @ noise(5, (R, N)))
    for make in ORTHONORMAL.values():
        for updates, _ in run(bracket(make(R, GAP)), [{"w": jnp.asarray(low)}] * 4):
            np.testing.assert_allclose(updates["w"], low, atol=2e-4)


@pytest.mark.parametrize("scale", [1e-20, 1e15])
@orthonormal
def test_a_basis_does_not_depend_on_the_gradient_s_scale(make, scale):
    """Invariant I7."""
    tx = bracket(make(R, GAP))
    ((_, plain),) = run(tx, [{"w": noise(6)}])
    ((_, scaled),) = run(tx, [{"w": scale * noise(6)}])
    np.testing.assert_allclose(plain.basis["w"], scaled.basis["w"], atol=1e-4)


# Signs.


@pytest.mark.parametrize(
    ("make", "side"), [(lro.svd, "short"), (lro.power, "both")], ids=["svd", "power"]
)
def test_new_bases_agree_with_the_old_ones_in_sign(make, side):
    tx = bracket(make(R, 1), side=side)
    tree = {"w": noise(0), "stack": noise(1, (2, M, N))}
    # The same leading directions, every gradient turned around: singular vectors
    # come with whatever sign, the aligned bases must not flip.
    gradients = [jax.tree.map(lambda g, s=s: s * g, tree) for s in (1.0, -1.0, 1.0)]
    states = [state for _, state in run(tx, gradients)]
    for before, after in itertools.pairwise(states):
        for old, new in zip(
            jax.tree.leaves(before.basis), jax.tree.leaves(after.basis), strict=True
        ):
            assert np.all(np.sum(old * new, axis=-2) > 0)


def test_alignment_flips_columns_and_nothing_else():
    projector = lro.svd(R)
    old = jnp.eye(M, R)
    new = jnp.linalg.qr(noise(2, (M, M)))[0][:, :R]
    aligned = np.asarray(projector.align(old, new))
    signs = np.where(np.sum(old * new, axis=0) < 0, -1.0, 1.0)
    np.testing.assert_array_equal(aligned, new * signs)
    flipped = projector.align(old, new * jnp.array([-1.0, 1.0, -1.0]))
    np.testing.assert_array_equal(aligned, flipped)


def test_no_alignment_where_moments_are_kept_as_they_come():
    class Flipping(lro.OrthonormalProjector):
        def compute(self, matrix, gradient, old, at):
            sign = jnp.where(at.epoch % 2 == 0, 1.0, -1.0)
            return sign * jnp.eye(matrix.m, matrix.rank)

    for transport, sign in ((lro.keep_moments(), -1.0), (lro.align_signs(), 1.0)):
        tx = bracket(Flipping(R, 1), transport=transport)
        (_, first), (_, second) = run(tx, [{"w": noise(0)}] * 2)
        np.testing.assert_array_equal(sign * first.basis["w"], second.basis["w"])


# Gaussian.


def gaussian_bases(tree, steps=1, seed=0, **options):
    """The bases used at every step, as the inner transformation sees them."""
    seen = []

    def update(updates, state, params=None, *, subspace, **extra_args):
        del params, extra_args
        seen.append(jax.tree.map(np.asarray, subspace.basis))
        return updates, state

    spy = optax.GradientTransformationExtraArgs(lambda p: optax.EmptyState(), update)
    tx = bracket(lro.gaussian(R, GAP), spy, seed=seed, **options)
    run(tx, [tree] * steps, jit=False)
    return seen


TREE = {"a": jnp.ones((M, N)), "b": jnp.ones((M, N)), "stack": jnp.ones((3, M, N))}


def test_gaussian_is_the_same_in_every_call():
    for first, second in zip(
        gaussian_bases(TREE, 3), gaussian_bases(TREE, 3), strict=True
    ):
        jax.tree.map(np.testing.assert_array_equal, first, second)


def test_gaussian_is_the_same_within_an_epoch_and_another_in_the_next():
    first, same, other = gaussian_bases(TREE, 3)
    jax.tree.map(np.testing.assert_array_equal, first, same)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(other), strict=True):
        assert np.all(a != b)


def test_gaussian_differs_between_leaves_layers_and_seeds():
    (bases,) = gaussian_bases(TREE)
    (others,) = gaussian_bases(TREE, seed=1)
    each = [bases["a"], bases["b"], *bases["stack"], others["a"]]
    for i, one in enumerate(each):
        for other in each[:i]:
            assert np.all(one != other)


def test_gaussian_does_not_depend_on_the_other_leaves():
    (alone,), (together,) = gaussian_bases({"a": TREE["a"]}), gaussian_bases(TREE)
    np.testing.assert_array_equal(alone["a"], together["a"])


def test_gaussian_is_the_identity_on_average():
    def draw(seed):
        matrix = lro.Matrix("w", (M, N), (), (0,), (1,), "left", R)
        zero = jnp.int32(0)
        at = lro.At(jax.random.key(seed), zero, zero, jnp.bool_(False))
        basis = lro.gaussian(R).basis(matrix, (), at)
        return basis @ basis.T

    mean = np.mean(jax.vmap(draw)(jnp.arange(4000)), axis=0)
    # 4000 draws: standard error 0.013 off the diagonal at r = 3, 0.013 on it.
    np.testing.assert_allclose(mean, np.eye(M), atol=0.07)


# Given.


def given_tree():
    q = functools.partial(np.linalg.qr)
    rng = np.random.default_rng(0)
    single = np.stack([q(rng.standard_normal((M, R)))[0] for _ in range(3)])
    stack = q(rng.standard_normal((3, 2, M, R)))[0]
    return {"w": single, "stack": stack}


def test_given_bases_are_used_one_per_epoch():
    bases = given_tree()
    tx = bracket(lro.given(R, GAP, bases=bases))
    tree = {"w": noise(0), "stack": noise(1, (2, M, N))}
    for step, (updates, state) in enumerate(run(tx, [tree] * 9)):
        epoch = min(step // GAP, 2)  # the last one stays
        for name, gradient in tree.items():
            basis = bases[name][epoch].astype(np.float32)
            np.testing.assert_array_equal(state.basis[name], basis)
            expected = basis @ (np.swapaxes(basis, -1, -2) @ np.asarray(gradient))
            np.testing.assert_allclose(updates[name], expected, atol=1e-5)


def test_given_bases_on_both_sides():
    rng = np.random.default_rng(1)
    left, right = (np.linalg.qr(rng.standard_normal((1, k, R)))[0] for k in (M, N))
    tx = bracket(lro.given(R, GAP, bases={"w": (left, right)}), side="both")
    gradient = np.asarray(noise(0))
    ((updates, _),) = run(tx, [{"w": jnp.asarray(gradient)}])
    expected = left[0] @ left[0].T @ gradient @ right[0] @ right[0].T
    np.testing.assert_allclose(updates["w"], expected, atol=1e-5)


def test_given_bases_are_not_aligned():
    bases = np.stack([np.eye(M, R), -np.eye(M, R)])
    tx = bracket(lro.given(R, 1, bases={"w": bases}))
    (_, first), (_, second) = run(tx, [{"w": noise(0)}] * 2)
    np.testing.assert_array_equal(first.basis["w"], -second.basis["w"])


# Transports.


def test_without_a_new_basis_no_moment_turns():
    """A zero gradient at a due step: the old basis stays, and so do the moments."""
    first = np.linalg.qr(np.random.default_rng(2).standard_normal((M, R)))[0]
    bases = np.stack([first, first[:, ::-1]])
    tx = bracket(
        lro.given(R, 3, bases={"w": bases}),
        optax.scale_by_adam(),
        transport=lro.rotate_moments(),
    )
    gradients = [{"w": noise(i)} for i in range(3)] + [{"w": jnp.zeros((M, N))}]
    states = [state.inner_state for _, state in run(tx, gradients)]
    np.testing.assert_allclose(states[3].mu["w"], 0.9 * states[2].mu["w"], rtol=1e-5)


def test_moments_turn_with_the_basis():
    """Two basis vectors swapped: so are the rows of both moments."""
    first = np.linalg.qr(np.random.default_rng(2).standard_normal((M, R)))[0]
    bases = np.stack([first, first[:, ::-1]])
    tx = bracket(
        lro.given(R, 2, bases={"w": bases}),
        optax.scale_by_adam(),
        # Without the floor, which a swap meets where mu^2 is above nu.
        transport=lro.rotate_moments(form="debiased"),
    )
    reference = bracket(lro.given(R, 9, bases={"w": bases}), optax.scale_by_adam())
    gradients = [{"w": noise(i)} for i in range(4)]
    for a, b in zip(run(tx, gradients), run(reference, gradients), strict=True):
        # The same directions in another order: the lifted update does not notice.
        np.testing.assert_allclose(a[0]["w"], b[0]["w"], atol=1e-4)


@pytest.mark.parametrize("form", ["bounded", "debiased", "paper"])
def test_rotation_against_the_formula(form):
    b1, b2, count = 0.9, 0.99, 5
    rng = np.random.default_rng(3)
    mu, nu = rng.standard_normal((R, N)) * 0.1, rng.random((R, N)) * 0.05
    c = np.linalg.qr(rng.standard_normal((R, R)))[0] * 0.9
    transport = lro.rotate_moments(b1, b2, form)
    group = {"mu": jnp.asarray(mu, jnp.float32), "nu": jnp.asarray(nu, jnp.float32)}
    rotation = lro.Rotation(jnp.asarray(c, jnp.float32))
    (got,) = transport.move((group,), rotation, jnp.int32(count))
    m, v = mu / (1 - b1**count), nu / (1 - b2**count)
    if form == "paper":
        m, v = mu, nu
    expected = np.abs(c**2 @ (v - m**2) + (c @ m) ** 2)
    if form == "bounded":
        lost = 1 - np.sum(c**2, 1, keepdims=True)  # 0.19 here
        lost = lost * np.mean(np.sqrt(v), 0) ** 2
        expected = c**2 @ (v - m**2) + (c @ m) ** 2 + lost
        expected = np.maximum(expected, (c @ m) ** 2)
    expected *= 1 - b2**count
    np.testing.assert_allclose(got["mu"], c @ mu, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(got["nu"], expected, rtol=1e-4, atol=1e-6)


def test_rotation_by_a_permutation_permutes_both_moments():
    permutation = jnp.eye(R)[jnp.array([2, 0, 1])]
    group = {"mu": noise(0, (R, N)) * 0.1, "nu": jnp.abs(noise(1, (R, N)))}
    transport = lro.rotate_moments(0.9, 0.99)
    (got,) = transport.move((group,), lro.Rotation(permutation), jnp.int32(7))
    np.testing.assert_allclose(got["mu"], permutation @ group["mu"], atol=1e-6)
    np.testing.assert_allclose(got["nu"], permutation @ group["nu"], rtol=1e-4)


@pytest.mark.parametrize("side", ["short", "both"])
def test_a_motionless_basis_moves_no_moment(side):
    tx = {
        name: bracket(
            # Between both bases all but the diagonal is rounding, which Adam must
            # not blow up: hence the large eps.
            lro.svd(R, gap),
            optax.scale_by_adam(eps=0.1),
            transport=transport,
            side=side,
        )
        for name, gap, transport in (
            ("once", 100, lro.keep_moments()),
            ("often", 1, lro.rotate_moments()),
        )
    }
    # One direction of growing size: the singular vectors stay.
    gradients = [{"w": (1.0 + i) * noise(0)} for i in range(4)]
    once, often = (run(tx[name], gradients)[-1][0]["w"] for name in ("once", "often"))
    np.testing.assert_allclose(once, often, rtol=1e-3, atol=1e-3)


def test_rotation_keeps_the_lifted_momentum_in_a_full_basis():
    """At r = m a basis change loses nothing: P mu is the same before and after."""
    tx = bracket(
        lro.svd(M, 1), optax.trace(0.9), transport=lro.rotate_moments(), clip_rank=True
    )
    gradients = [{"w": noise(i)} for i in range(5)]
    momentum = np.zeros((M, N))
    for gradient, (updates, _) in zip(gradients, run(tx, gradients), strict=True):
        momentum = 0.9 * momentum + np.asarray(gradient["w"])
        np.testing.assert_allclose(updates["w"], momentum, atol=1e-4)


def still_and_moving(transport, inner=None, steps=6, **options):
    """A basis found once, and gradients of its span or of any: states of both runs."""
    projector = lro.grassmann(R, 1, cold_start="svd")
    tx = bracket(projector, inner or optax.scale_by_adam(), transport=transport)
    update = jax.jit(tx.update)
    start = update({"w": noise(0)}, tx.init({"w": noise(0)}))[1]
    runs = []
    for still in (True, False):
        state = start
        for step in range(1, steps):
            inside = start.basis["w"] @ noise(step, (R, N))
            gradient = inside if still else noise(step)
            state = update({"w": gradient}, state)[1]
        same = np.array_equal(state.basis["w"], start.basis["w"])
        assert same == still
        runs.append(state.inner_state)
    return runs


def test_a_motionless_tracked_basis_moves_no_moment():
    """C = S^T S there: the identity but for float32, which stays below 1e-6."""
    kept, _ = still_and_moving(lro.keep_moments())
    turned, _ = still_and_moving(lro.rotate_moments(form="debiased"))
    np.testing.assert_allclose(turned.mu["w"], kept.mu["w"], atol=1e-6)
    np.testing.assert_allclose(turned.nu["w"], kept.nu["w"], rtol=2e-5, atol=1e-9)
    # The printed formula shrinks the second moment of a basis that did not move.
    paper, _ = still_and_moving(lro.rotate_moments(form="paper"))
    np.testing.assert_allclose(paper.mu["w"], kept.mu["w"], atol=1e-6)
    assert np.median(paper.nu["w"] / kept.nu["w"]) < 0.5


@pytest.mark.parametrize("count", [1, 7, 1000])
def test_the_identity_changes_nothing_in_the_debiased_form(count):
    b1, b2 = 0.9, 0.999
    g = noise(0, (count % 50 + 2, R, N))
    mu, nu = jnp.zeros((R, N)), jnp.zeros((R, N))
    for one in g:
        mu, nu = b1 * mu + (1 - b1) * one, b2 * nu + (1 - b2) * one**2
    group, still = {"mu": mu, "nu": nu}, lro.Rotation(jnp.eye(R))
    least = (mu / (1 - b1**count)) ** 2 * (1 - b2**count)
    for form, want in (("bounded", jnp.maximum(nu, least)), ("debiased", nu)):
        transport = lro.rotate_moments(b1, b2, form)
        (moved,) = transport.move((group,), still, jnp.int32(count))
        np.testing.assert_array_equal(moved["mu"], mu)
        # (nu - mu^2) + mu^2 of what was divided and multiplied: a few roundings of
        # the larger of the two, which here is nu but for its start.
        np.testing.assert_allclose(moved["nu"], want, rtol=1e-5, atol=1e-6 * nu.max())
    paper = lro.rotate_moments(b1, b2, "paper")
    ((changed),) = paper.move((group,), still, jnp.int32(count))
    if count < 1000:
        assert np.abs(changed["nu"] / nu - 1).min() > 0.5


def test_no_form_of_a_rotation_turns_nothing():
    with pytest.raises(ValueError, match=r"`form` must be one of 'bounded', .*'off'"):
        lro.rotate_moments(form="off")
    for still in (lro.align_signs(), lro.keep_moments()):
        # What turns nothing asks for no moment.
        bracket(lro.svd(R), optax.identity(), transport=still).init({"w": noise(0)})


@pytest.mark.parametrize("count", [1, 3, 40, 4000])
@pytest.mark.parametrize("right", [False, True])
def test_a_turned_second_moment_is_that_of_something(count, right):
    """``E x^2 >= (E x)^2`` for any moments and any turn, also where it did not hold."""
    b1, b2 = 0.9, 0.999
    rng = np.random.default_rng(count)
    mu = rng.standard_normal((R, N)) * 10.0 ** rng.uniform(-3, 1, (R, N))
    nu = mu**2 * 10.0 ** rng.uniform(-4, 1, (R, N))
    group = {"mu": jnp.asarray(mu, jnp.float32), "nu": jnp.asarray(nu, jnp.float32)}
    left = np.linalg.qr(rng.standard_normal((M, R)))[0][:R] * 1.2
    other = np.linalg.qr(rng.standard_normal((N, N)))[0] if right else None
    rotation = lro.Rotation(
        *(None if c is None else jnp.float32(c) for c in (left, other))
    )
    (got,) = lro.rotate_moments(b1, b2).move((group,), rotation, jnp.int32(count))
    mean = np.asarray(got["mu"]) / (1 - b1**count)
    square = np.asarray(got["nu"]) / (1 - b2**count)
    # Of float32: the products, and their way through the bias corrections.
    assert np.all(square >= mean**2 * (1 - 1e-4))


def test_what_a_basis_lost_of_the_second_moment_is_filled():
    """A gradient alike in all directions: whatever the turn, nu stays what it is."""
    nu = jnp.full((R, N), 2.0) * jnp.arange(1.0, N + 1)
    for moments in ({"nu": nu}, {"nu": nu, "mu": jnp.zeros((R, N))}):
        for share in (0.0, 0.1, 0.7, 1.0):
            turn = jnp.linalg.qr(noise(3, (R, R)))[0] * share**0.5
            transport = lro.rotate_moments()
            (got,) = transport.move((moments,), lro.Rotation(turn), jnp.int32(9))
            np.testing.assert_allclose(got["nu"], nu, rtol=1e-4)


class HalfVelocity(NamedTuple):
    """A momentum under another name, stored as half of itself."""

    velocity: Any


def heavy_ball(decay=0.9):
    """`optax.trace` with a state of its own."""

    def update(updates, state, params=None):
        del params
        full = jax.tree.map(lambda u, v: u + decay * 2 * v, updates, state.velocity)
        return full, HalfVelocity(jax.tree.map(lambda f: 0.5 * f, full))

    return optax.GradientTransformation(
        lambda params: HalfVelocity(jax.tree.map(jnp.zeros_like, params)), update
    )


@pytest.fixture
def registry(monkeypatch):
    """Registrations end with the test."""
    monkeypatch.setattr(_moments, "_REGISTERED", dict(_moments._REGISTERED))


def test_registered_moments_turn_as_known_ones(registry):
    lro.register_moments(
        HalfVelocity,
        read=lambda s: {"trace": jax.tree.map(lambda v: 2 * v, s.velocity)},
        write=lambda s, m: HalfVelocity(jax.tree.map(lambda v: 0.5 * v, m["trace"])),
    )
    tree = {"w": noise(0), "stack": noise(1, (2, N, M))}
    gradients = [jax.tree.map(lambda g, i=i: jnp.sin(i + g), tree) for i in range(4)]
    own, known, unmoved = (
        run(bracket(lro.svd(R, 1), inner, transport=transport), gradients)[-1]
        for inner, transport in (
            (heavy_ball(), lro.rotate_moments()),
            (optax.trace(0.9), lro.rotate_moments()),
            (optax.trace(0.9), lro.align_signs()),
        )
    )
    for name in tree:
        velocity = 2 * own[1].inner_state.velocity[name]
        np.testing.assert_allclose(velocity, known[1].inner_state.trace[name], 1e-5)
        np.testing.assert_allclose(own[0][name], known[0][name], atol=1e-5)
        assert not np.allclose(own[0][name], unmoved[0][name], atol=1e-2)


@pytest.mark.parametrize(
    "inner",
    [heavy_ball(), optax.identity(), lro.scale_by_matrix_factored_rms()],
    ids=["unregistered", "stateless", "factored"],
)
def test_a_transport_without_moments_is_an_error(inner):
    tx = bracket(lro.svd(R), inner, transport=lro.rotate_moments())
    with pytest.raises(ValueError, match=r"moves moments, but .*register_moments"):
        tx.init({"w": noise(0)})


def test_wrong_registrations(registry):
    with pytest.raises(TypeError, match="class of an optimizer"):
        lro.register_moments(heavy_ball(), lambda s: {}, lambda s, m: s)
    lro.register_moments(
        HalfVelocity, lambda s: {"velocity": s.velocity}, lambda s, m: s
    )
    tx = bracket(lro.svd(R), heavy_ball(), transport=lro.rotate_moments())
    with pytest.raises(ValueError, match=r"HalfVelocity returned \['velocity'\]"):
        tx.init({"w": noise(0)})
