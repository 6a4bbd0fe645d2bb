"""What comes back from outside the subspace, against plain formulas in float64."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import lowrank_optax as lro

R, SCALE = 4, 0.25
WIDE, TALL, SQUARE, STACK = (12, 30), (30, 12), (16, 16), (3, 20, 12)
SHAPES = {"wide": WIDE, "tall": TALL, "square": SQUARE, "stack": STACK}


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def turn(x):
    return np.swapaxes(np.asarray(x, np.float64), -1, -2)


def norm(x, axes=(-2, -1)):
    return np.sqrt(np.sum(np.square(x), axes, keepdims=True))


def tall(shape):
    """Whether the view of a leaf is its transpose: the basis is on the short side."""
    return shape[-2] > shape[-1]


def view(x, shape):
    x = np.asarray(x, np.float64)
    return np.swapaxes(x, -1, -2) if tall(shape) else x


def bases_of(shape, count=1):
    """`count` orthonormal bases of a leaf's short side, for `lro.given`."""
    *batch, m, n = shape
    return np.linalg.qr(normal(len(shape) + m, count, *batch, min(m, n), R))[0]


# Bounded, smooth and of different slope everywhere: phi differs between columns, and
# float32 does not change what it makes of a rounded projection.
INNER = optax.stateless(lambda u, _: jax.tree.map(jnp.arctan, u))


@dataclasses.dataclass(frozen=True)
class Bracket:
    """A bracket on one leaf, with bases of `lro.given` unless told otherwise."""

    shape: tuple[int, ...]
    recovery: Any
    inner: Any = INNER
    bases: Any = None
    options: Any = dataclasses.field(default_factory=dict)
    projector: Any = None

    @functools.cached_property
    def tx(self):
        bases = bases_of(self.shape) if self.bases is None else self.bases
        projector = self.projector or lro.given(R, 1, bases={"w": bases})
        opening = lro.project(projector, select=".", layer_axis=0, **self.options)
        return lro.chain(opening, self.inner, self.recovery, lro.backproject(SCALE))

    def run(self, gradients):
        """Updates as views, and the states after them."""
        state, update, out = self.tx.init(self.leaf(gradients[0])), None, []
        update = jax.jit(self.tx.update)
        for gradient in gradients:
            updates, state = update(self.leaf(gradient), state)
            out.append((view(updates["w"], self.shape), state))
        return out

    def leaf(self, gradient):
        gradient = np.asarray(gradient)
        leaf = np.swapaxes(gradient, -1, -2) if tall(self.shape) else gradient
        return {"w": jnp.asarray(leaf, jnp.float32)}


def with_residual(shape, share, seed=0):
    """A gradient (as a view) whose residual has that share of its norm."""
    *_, m, n = shape
    m, n = min(m, n), max(m, n)
    basis = bases_of(shape)[0].astype(np.float32).astype(np.float64)
    g = normal(seed, *shape[:-2], m, n)
    # Twice, so that the residual of a small share is not the first one's rounding.
    residual = g - basis @ (turn(basis) @ g)
    residual -= basis @ (turn(basis) @ residual)
    inside = basis @ normal(seed + 1, *shape[:-2], R, n)
    residual *= norm(inside) / norm(residual) * share / np.sqrt(1 - share**2)
    return np.float64(np.float32(inside + residual))


def formed(g, basis, granularity="column", residual="paper"):
    """`scale P N`, Lambda (the residual formed) and `G diag(phi)`, not limited."""
    basis = np.asarray(basis, np.float64)
    r = turn(basis) @ g
    n = np.arctan(r)
    axes = -2 if granularity == "column" else (-2, -1)
    phi = norm(n, axes) / (norm(r, axes) + 1e-8)
    taken = SCALE if residual == "authors" else 1.0
    return SCALE * basis @ n, (g - taken * basis @ r) * phi, g * phi


# Recovery scaling.


class Stretched(lro.svd):
    """As orthonormal as float32 work leaves a basis, on the bad side of it."""

    def compute(self, matrix, gradient, old, at):
        return (1 + 1e-6) * super().compute(matrix, gradient, old, at)


CHOICES = [(g, r) for g in ("column", "tensor") for r in ("paper", "authors")]


@pytest.mark.parametrize(
    ("shape", "projector", "granularity", "residual"),
    [
        *((shape, None, *choice) for shape in SHAPES.values() for choice in CHOICES),
        *((STACK, lro.svd(R, 1), *choice) for choice in CHOICES),
        (TALL, lro.svd(R, 1, jnp.bfloat16), "column", "paper"),
        (WIDE, Stretched(R, 1), "column", "paper"),
    ],
)
def test_recover_scale_against_the_residual_formed(
    shape, projector, granularity, residual
):
    """The svd's bases are known to be orthonormal, given ones are not."""
    recovery = lro.recover_scale(
        granularity=granularity, residual=residual, entry_limit=None
    )
    one = Bracket(shape, recovery, projector=projector)
    update = jax.jit(one.tx.update)
    for share in (0.9, 0.3, 0.03, 2e-3):
        g = with_residual(shape, share)
        updates, state = update(one.leaf(g), one.tx.init(one.leaf(g)))
        kept, recovered, whole = formed(g, state.basis["w"], granularity, residual)
        error = view(updates["w"], shape) - kept - recovered
        assert np.all(norm(error) <= 1e-6 * norm(whole))
        # |Lambda|^2 is a difference of three terms of the size of |G phi|^2, each
        # with the rounding of a float32 sum, 1e-7 of it; and an orthonormal basis,
        # which is so to 2e-6, counts as one where the difference is not small.
        size = norm(recovered)[..., 0, 0]
        slack = 3e-7 * norm(whole)[..., 0, 0] ** 2 / size
        assert np.all(np.abs(state.recovery_state["w"] - size) <= 2e-5 * size + slack)


@pytest.mark.parametrize("residual", ["paper", "authors"])
@pytest.mark.parametrize("basis_dtype", [jnp.float32, jnp.bfloat16])
def test_recover_scale_on_both_sides(residual, basis_dtype):
    """R is P^T G Q, and one phi serves the matrix."""
    left, right = (np.linalg.qr(normal(k, 1, k, R))[0] for k in WIDE)
    left, right = (np.asarray(jnp.asarray(b, basis_dtype)) for b in (left, right))
    recovery = lro.recover_scale(granularity="tensor", residual=residual)
    one = Bracket(WIDE, recovery, bases=(left, right), options={"side": "both"})
    g = np.float64(np.float32(normal(3, *WIDE)))
    ((update, state),) = one.run([g])
    p, q = np.float64(left[0]), np.float64(right[0])
    r = p.T @ g @ q
    n = np.arctan(r)
    phi = norm(n) / (norm(r) + 1e-8)
    taken = SCALE if residual == "authors" else 1.0
    recovered = phi * (g - taken * p @ r @ q.T)
    error = update - SCALE * p @ n @ q.T - recovered
    assert norm(error) <= 1e-6 * norm(g * phi)
    np.testing.assert_allclose(state.recovery_state["w"], norm(recovered)[0, 0], 1e-5)


def test_columns_need_columns():
    opening = lro.project(lro.svd(R), select=".", side="both")
    recovery = lro.recover_scale(granularity="column")
    tx = lro.chain(opening, INNER, recovery, lro.backproject())
    with pytest.raises(ValueError, match=r"cannot serve leaf 'w' with side=\"both\""):
        tx.init({"w": jnp.zeros(WIDE)})


@pytest.mark.parametrize("basis_dtype", [jnp.float32, jnp.bfloat16])
def test_the_norm_is_that_of_the_basis_as_it_is(basis_dtype):
    """P^T P is not I in bfloat16: a formula that takes it for I is off by percents."""
    basis = jnp.asarray(bases_of(WIDE), basis_dtype)
    one = Bracket(WIDE, lro.recover_scale(), bases=np.asarray(basis))
    g = with_residual(WIDE, 0.05)
    ((update, state),) = one.run([g])
    kept, recovered, _ = formed(g, state.basis["w"])
    assert norm(update - kept - recovered) <= 1e-5 * norm(recovered)
    np.testing.assert_allclose(state.recovery_state["w"], norm(recovered)[0, 0], 1e-4)


@pytest.mark.parametrize("granularity", ["column", "tensor"])
def test_of_the_gradient(granularity):
    """APOLLO's rule: `scale G diag(phi)`, and N itself is not in it."""
    recovery = lro.recover_scale("gradient", granularity, None, entry_limit=None)
    g = with_residual(WIDE, 0.5)
    ((update, state),) = Bracket(WIDE, recovery).run([g])
    _, _, whole = formed(g, state.basis["w"], granularity)
    assert norm(update - SCALE * whole) <= 1e-6 * norm(whole)


def test_of_the_gradient_is_limited_too():
    recovery = lro.recover_scale("gradient", "tensor", 1.5)
    g = with_residual(WIDE, 0.5)
    (first, _), (second, state) = Bracket(WIDE, recovery, optax.identity()).run(
        [g, 9 * g]
    )
    np.testing.assert_allclose(second, 1.5 * first, rtol=1e-5)
    np.testing.assert_allclose(state.recovery_state["w"], 1.5 * norm(g)[0, 0], 1e-5)


# The limiter.


def spy():
    """Keeps what the inner optimizer returned, to take it off the update."""
    return optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params),
        lambda updates, state, params=None: (updates, updates),
    )


def sizes(shape, gradients, recovery, inner=None, **options):
    """|Lambda| per step and matrix, Lambda being `update - scale P N`; the states."""
    inner = optax.chain(inner or optax.scale_by_adam(), spy())
    one, out = Bracket(shape, recovery, inner, **options), []
    run = one.run(gradients)
    for update, state in run:
        basis = np.asarray(state.basis["w"], np.float64)
        direction = np.asarray(state.inner_state[-1]["w"], np.float64)
        out.append(norm(update - SCALE * basis @ direction)[..., 0, 0])
    return np.stack(out), [state for _, state in run]


@pytest.mark.parametrize("limit", [1.01, 1.3])
@pytest.mark.parametrize("shape", [WIDE, STACK], ids=["wide", "stack"])
def test_growth_never_above_the_limit(shape, limit):
    """Gradients with spikes and dips; every matrix of a stack has its own norm."""
    bases = bases_of(shape, 4)
    gradients = []
    for step in range(24):
        size = {7: 1e3, 8: 1e-2, 15: 30.0}.get(step, 1.0 + step / 5)
        g = normal(step, *shape[:-2], min(shape[-2:]), max(shape[-2:]))
        if shape == STACK:  # a spike in one layer only
            g[1] *= 100.0 if step == 11 else 1.0
        gradients.append(size * g)
    # Without Adam, whose direction does not know the gradient's size.
    options = {"inner": optax.trace(0.5), "bases": bases}
    # Entries are clipped behind the limiter: here it is the limiter alone.
    recovery = lro.recover_scale(growth_limit=limit, entry_limit=None)
    found, states = sizes(shape, gradients, recovery, **options)
    ratios = found[1:] / found[:-1]
    # 1e-5: the float32 formula of the norm against Lambda in float64.
    assert ratios.max() <= limit * (1 + 1e-5)
    assert np.sum(ratios > limit * (1 - 1e-5)) >= 5  # it did limit
    stored = [state.recovery_state["w"] for state in states]
    np.testing.assert_allclose(found, np.stack(stored), rtol=1e-5)
    # Without a limit they would have grown further.
    free, _ = sizes(shape, gradients, lro.recover_scale(growth_limit=None), **options)
    assert np.max(free[1:] / free[:-1]) > 100 * limit
    if shape == STACK:
        assert not np.allclose(found[:, 0], found[:, 1], rtol=1e-2)


def test_a_limit_may_be_traced():
    @jax.jit
    def second(limit):
        one = Bracket(WIDE, lro.recover_scale(growth_limit=limit), optax.identity())
        state = one.tx.init(one.leaf(g))
        _, state = one.tx.update(one.leaf(g), state)
        return one.tx.update(one.leaf(9 * g), state)[1].recovery_state["w"]

    g = with_residual(WIDE, 0.5)
    np.testing.assert_allclose(second(3.0) / second(1.5), 2.0, rtol=1e-6)


def test_no_limit_has_no_state():
    recovery = lro.recover_scale(growth_limit=None)
    one = Bracket(WIDE, recovery)
    ((_, state),) = one.run([with_residual(WIDE, 0.5)])
    assert jax.tree.leaves(state.recovery_state) == []
    params = {"w": jnp.zeros(WIDE)}
    assert "recovery" not in lro.state_bytes(one.tx, params).by_role


def rest(step):
    """A gradient with much of it outside the span."""
    return with_residual(WIDE, 0.6, seed=step)


@pytest.mark.parametrize(
    ("kind", "residual"),
    # The authors' residual holds part of what lies inside.
    [("zero", "paper"), ("zero", "authors"), ("inside", "paper"), ("tiny", "paper")],
)
def test_nothing_outside_is_a_reset(kind, residual):
    """No Lambda at that step, and the next one is a first again: not held down."""
    g = {
        "zero": np.zeros(WIDE),
        "inside": with_residual(WIDE, 1e-6),
        "tiny": 1e-25 * rest(0),
    }[kind]
    gradients = [rest(0), rest(1), g, 50 * rest(2), rest(3)]
    recovery = lro.recover_scale(growth_limit=1.01, residual=residual)
    found, states = sizes(WIDE, gradients, recovery)
    free, _ = sizes(
        WIDE, gradients, lro.recover_scale(growth_limit=None, residual=residual)
    )
    assert found[2] <= 1e-6 * found[1]
    assert float(states[2].recovery_state["w"]) == 0.0
    # The step after is as if there were no limit, the one after that is limited.
    np.testing.assert_allclose(found[3], free[3], rtol=1e-5)
    assert found[4] <= 1.01 * found[3] * (1 + 1e-5)


def test_a_residual_just_above_the_rule_is_not_dropped():
    """1e-3 of |G phi| is where the formula stops: 3e-3 still counts."""
    for share, counts in ((3e-3, True), (3e-4, False)):
        one = Bracket(WIDE, lro.recover_scale())
        ((update, state),) = one.run([with_residual(WIDE, share)])
        kept, recovered, _ = formed(with_residual(WIDE, share), state.basis["w"])
        assert (float(state.recovery_state["w"]) > 0) == counts
        size = norm(update - kept) / norm(recovered)
        assert abs(size - 1.0) <= 1e-2 if counts else size <= 1e-2


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_bad_gradient_does_not_stay_in_the_limiter(value):
    bad = rest(1)
    bad[2, 3] = value
    one = Bracket(WIDE, lro.recover_scale())
    (_, first), (_, state), (update, last) = one.run([rest(0), bad, rest(2)])
    assert float(first.recovery_state["w"]) > 0
    assert np.isfinite(state.recovery_state["w"])
    assert np.isfinite(last.recovery_state["w"]) and last.recovery_state["w"] > 0
    assert np.isfinite(update).all()


@pytest.mark.parametrize("argument", ["of", "granularity", "residual"])
def test_unknown_choices_of_recover_scale(argument):
    with pytest.raises(ValueError, match=f"`{argument}` must be one of"):
        lro.recover_scale(**{argument: "none"})


# Error feedback.


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_what_is_applied_and_what_is_left_add_up(shape):
    """Plain gradient steps: the updates' sum and E are the gradients' sum."""
    recovery = lro.error_feedback(momentum=False)
    tx = lro.chain(
        lro.project(
            lro.given(R, 1, bases={"w": bases_of(shape, 5)}), select=".", layer_axis=0
        ),
        optax.identity(),
        recovery,
        lro.backproject(),
    )
    state, update = tx.init({"w": jnp.zeros(shape)}), jax.jit(tx.update)
    given, applied = np.zeros(shape), np.zeros(shape)
    for step in range(8):
        gradient = np.float32(normal(step, *shape))
        updates, state = update({"w": jnp.asarray(gradient)}, state)
        given += gradient
        applied += np.asarray(updates["w"])
        # Sums of a dozen float32 products, 8 times.
        np.testing.assert_allclose(
            applied + state.recovery_state["w"], given, atol=1e-5
        )
    assert norm(state.recovery_state["w"]).min() > 0.5 * norm(given).min()


def feedback_reference(gradients, bases, b1, field, dtype=np.float64):
    """E in float64 with the momentum carried by C = P_new^T P_old."""
    e, mu, old = 0.0, 0.0, None
    errors = []
    for g, new in zip(gradients, bases, strict=True):
        new = np.float64(np.float32(new))
        old = new if old is None else old
        a = g + e
        carried = turn(new) @ old @ mu if np.ndim(mu) else 0.0
        lost = old @ mu - new @ carried if np.ndim(mu) else 0.0
        r = turn(new) @ a
        e = a - new @ r + (b1 / (1 - b1) if field == "mu" else b1) * lost
        e = np.asarray(jnp.asarray(e, dtype), np.float64) if dtype != np.float64 else e
        mu = b1 * carried + ((1 - b1) * r if field == "mu" else r)
        errors.append(e)
        old = new
    return errors


INNERS = {
    "mu": lambda b1: optax.scale_by_adam(b1),
    "trace": lambda b1: optax.trace(b1),
}


@pytest.mark.parametrize("field", INNERS)
@pytest.mark.parametrize("shape", [WIDE, STACK], ids=["wide", "stack"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_error_feedback_against_the_formula(shape, field, dtype):
    b1, steps = 0.8, 6
    bases = bases_of(shape, steps)
    one = Bracket(
        shape,
        lro.error_feedback(b1, dtype),
        INNERS[field](b1),
        bases,
        {"transport": lro.rotate_moments(b1)},
    )
    m, n = sorted(shape[-2:])
    gradients = [np.float64(np.float32(normal(i, *shape[:-2], m, n))) for i in range(6)]
    short = dtype == jnp.bfloat16
    want = feedback_reference(
        gradients, bases, b1, field, jnp.bfloat16 if short else np.float64
    )
    for (_, state), expected in zip(one.run(gradients), want, strict=True):
        error = state.recovery_state["w"]
        assert error.dtype == dtype and error.shape == shape
        # Float32 sums of numbers of size 10; a bfloat16 that another rounding tips over
        # is 2^-8 off, and both runs go on from what they stored.
        atol, rtol = (0.02, 2.0**-7) if short else (2e-5, 0.0)
        np.testing.assert_allclose(view(error, shape), expected, rtol, atol)
    # The momentum's part is not small change here.
    plain = feedback_reference(gradients, bases, 0.0, field)
    assert norm(plain[-1] - want[-1]).max() > 0.1 * norm(want[-1]).max()


def test_error_feedback_enters_what_the_projector_sees():
    """A = G + E is projected and refreshed from, not G."""
    recovery = lro.error_feedback(momentum=False)
    tx = lro.chain(
        lro.project(lro.svd(R, 1), select="."),
        optax.identity(),
        recovery,
        lro.backproject(),
    )
    gradients = [jnp.asarray(normal(i, *WIDE), jnp.float32) for i in range(2)]
    _, first = tx.update({"w": gradients[0]}, tx.init({"w": gradients[0]}))
    left_out = np.asarray(first.recovery_state["w"], np.float64)
    updates, _ = tx.update({"w": gradients[1]}, first)
    u, s, v = np.linalg.svd(np.asarray(gradients[1], np.float64) + left_out)
    best = (u[:, :R] * s[:R]) @ v[:R]
    np.testing.assert_allclose(updates["w"], best, atol=1e-4)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_error_feedback_stays_finite(value):
    tx = lro.scale_by_ldadam(R, error_feedback=True, select=".")
    gradient = {"w": jnp.asarray(normal(0, *WIDE), jnp.float32)}
    state, update = tx.init(gradient), jax.jit(tx.update)
    _, state = update(gradient, state)
    bad = {"w": gradient["w"].at[1, 2].set(value)}
    for step in (bad, gradient):
        _, state = update(step, state)
        assert np.isfinite(state.recovery_state["w"]).all()


def feedback(dtype=jnp.float32, inner=None, **options):
    recovery = lro.error_feedback(0.9, dtype)
    options = {"transport": lro.rotate_moments(), **options}
    return lro.chain(
        lro.project(lro.svd(R, 1), select=".", layer_axis=0, **options),
        inner or optax.scale_by_adam(),
        recovery,
        lro.backproject(),
    )


@pytest.mark.parametrize(("dtype", "size"), [(jnp.float32, 4), (jnp.bfloat16, 2)])
def test_the_price_of_error_feedback(dtype, size):
    params = {name: jnp.zeros(shape) for name, shape in SHAPES.items()}
    table = lro.state_bytes(feedback(dtype), params)
    for name, leaf in params.items():
        assert table.entries[name, "recovery"] == size * leaf.size
    state = feedback(dtype).init(params)
    assert jax.tree.map(jnp.shape, state.recovery_state) == SHAPES


def test_error_feedback_is_sharded_as_the_parameter():
    params = {name: jnp.zeros(shape) for name, shape in SHAPES.items()}
    specs = {
        "wide": P("data", "model"),
        "tall": P("model", "data"),
        "square": P(None, "model"),
        "stack": P("data", None, "model"),
    }
    shardings = lro.state_shardings(feedback(), params, specs)
    assert shardings.recovery_state == specs
    fira = lro.scale_by_fira(R, layer_axis=0, select=".")
    norms = lro.state_shardings(fira, params, specs).recovery_state
    assert norms["wide"] == norms["tall"] == P()


def test_error_feedback_of_a_convolution():
    """The buffer has the kernel's own four axes."""
    params = {"w": jnp.asarray(normal(0, 3, 3, 8, 12), jnp.float32)}
    numbers = {"w": lro.MatrixDimensionNumbers((0, 1, 2), 3)}
    tx = feedback(weight_dimension_numbers=numbers)
    state = tx.init(params)
    updates, state = tx.update(params, state)
    assert state.recovery_state["w"].shape == updates["w"].shape == (3, 3, 8, 12)


@pytest.mark.parametrize("momentum", [True, False])
def test_error_feedback_refuses_an_accumulation_inside(momentum):
    every = optax.MultiSteps(optax.scale_by_adam(), 2)
    tx = lro.chain(
        lro.project(lro.svd(R, 1), select="."),
        every,
        lro.error_feedback(momentum=momentum),
        lro.backproject(),
    )
    with pytest.raises(ValueError, match=r"Put optax\.MultiSteps around the whole"):
        tx.init({"w": jnp.zeros(WIDE)})


@pytest.mark.parametrize(
    ("projector", "inner"),
    [
        (lro.svd(R, 1), optax.scale_by_rms()),
        (lro.svd(R, 1), optax.identity()),
        (lro.gaussian(R, 1), optax.scale_by_adam()),
    ],
    ids=["nu_only", "stateless", "no_stored_basis"],
)
def test_error_feedback_without_a_momentum(projector, inner):
    def make(momentum):
        opening = lro.project(projector, select=".", transport=lro.keep_moments())
        feedback = lro.error_feedback(momentum=momentum)
        return lro.chain(opening, inner, feedback, lro.backproject())

    params = {"w": jnp.ones(WIDE)}
    tx = make(True)
    with pytest.raises(ValueError, match=r"needs the momentum of leaf 'w'.*=False"):
        tx.update(params, tx.init(params))
    tx = make(False)
    tx.update(params, tx.init(params))
