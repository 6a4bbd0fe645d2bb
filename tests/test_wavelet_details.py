"""The details beside every host, what bounds them, and gradients of any size."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from lowrank_optax.testing import assert_bit_equal
from tests import wavelets

SHAPE, STEPS = (12, 5), 3


def normal(seed, *shape):
    draw = np.random.default_rng(seed).standard_normal(shape)
    return jnp.asarray(draw, jnp.float32)


def gradients(shape=SHAPE):
    return [normal(t, *shape) * 3.0**t for t in range(STEPS)]


def bracket(inner, level=2, wavelet="haar", axis=-2, full=None, layer=None, **details):
    return lro.chain(
        lro.project(
            lro.wavelet(level, wavelet, axis),
            select=r"^w|kernel",
            full=full,
            layer_axis=layer,
        ),
        inner,
        lro.wavelet_details(**details),
        lro.backproject(),
    )


def run(tx, grads):
    """Returns the updates of one leaf, and the last state."""
    state, update, out = tx.init({"w": grads[0]}), jax.jit(tx.update), []
    for gradient in grads:
        updates, state = update({"w": gradient}, state)
        out.append(updates["w"])
    return out, state


def assert_near(got, want, share=1e-5):
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=share * np.max(np.abs(b)))


# --- Hosts: inner optimizer, options of the details, formula -------------------------


HOSTS = {
    "adafactor": (
        optax.chain(lro.scale_by_matrix_factored_rms(), lro.clip_by_matrix_rms()),
        {},
        wavelets.adafactor,
    ),
    "adam_mini": (
        lro.scale_by_adam_mini(0.875, 0.96875, 0.1),
        {"b2": 0.96875, "eps": 0.1},
        wavelets.adam_mini,
    ),
    "muon": (
        optax.chain(
            optax.trace(0.95, nesterov=True), lro.orthogonalize("newton_schulz")
        ),
        {"normalize": "matrix"},
        wavelets.muon,
    ),
    "lion": (optax.scale_by_lion(0.9, 0.99), {"normalize": "matrix"}, wavelets.lion),
    "raw": (optax.scale(0.1), {"normalize": False}, wavelets.tenth),
}


def formula(host, grads, level=2, wavelet="haar", clip=None):
    return wavelets.with_details(HOSTS[host][2], grads, level, wavelet, clip)


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize(
    ("wavelet", "axis", "clip"),
    [("haar", -2, None), ("haar", -1, 0.8), ("db2", -1, None), ("db2", -2, 0.8)],
)
def test_hosts_as_written(host, wavelet, axis, clip):
    grads, (inner, options, _) = gradients(), HOSTS[host]
    tx = bracket(inner, 2, wavelet, axis, clip=clip, **options)
    want = formula(host, grads, 2, wavelet, clip)
    if axis == -2:
        got, _ = run(tx, grads)
    else:
        got = [u.T for u in run(tx, [g.T for g in grads])[0]]
    assert_near(got, want)


@pytest.mark.parametrize("host", ["adafactor", "muon"])
def test_hosts_see_a_stack_as_many_matrices(host):
    inner, options, _ = HOSTS[host]
    layers = [gradients(), [g * 5.0 for g in gradients()[::-1]]]
    stacked = [jnp.stack(grads) for grads in zip(*layers, strict=True)]
    got, _ = run(bracket(inner, layer=0, **options), stacked)
    for i, grads in enumerate(layers):
        want, _ = run(bracket(inner, **options), grads)
        assert_near([u[i] for u in got], want)


def test_vectors_go_through_full():
    inner, options, _ = HOSTS["muon"]
    tx = bracket(inner, full=optax.scale_by_adam(), **options)
    tree = {"bias": normal(1, 5), "w": gradients()[0]}
    got, _ = tx.update(tree, tx.init(tree))
    want, _ = optax.scale_by_adam().update(
        {"b": tree["bias"]}, optax.scale_by_adam().init({"b": tree["bias"]})
    )
    np.testing.assert_allclose(got["bias"], want["b"], rtol=1e-6)
    assert_near([got["w"]], formula("muon", [tree["w"]]))


@pytest.mark.parametrize("host", ["muon", "lion", "adafactor"])
@pytest.mark.parametrize("size", [1e-20, 1e-10, 1e15])
def test_hosts_without_eps_are_indifferent_to_the_gradients_size(host, size):
    if host == "adafactor" and size == 1e-20:
        pytest.skip("beside its eps of 1e-30 such squares are nothing")
    inner, options, _ = HOSTS[host]
    tx = bracket(inner, **options)
    want, _ = run(tx, gradients())
    got, _ = run(tx, [g * jnp.float32(size) for g in gradients()])
    assert_near(got, want)


@pytest.mark.parametrize("size", [1e-20, 1e15])
def test_raw_details_have_the_gradients_size(size):
    want, _ = run(bracket(optax.identity(), normalize=False), gradients())
    scaled = [g * jnp.float32(size) for g in gradients()]
    got, _ = run(bracket(optax.identity(), normalize=False), scaled)
    assert_near([u / jnp.float32(size) for u in got], want)


def test_without_details_the_update_stays_in_the_band():
    tx = lro.chain(
        lro.project(lro.wavelet(2), select="."), optax.identity(), lro.backproject()
    )
    (gradient, *_) = gradients()
    (got,), _ = run(tx, [gradient])
    low, _ = wavelets.all_levels(12, 2, "haar")
    np.testing.assert_allclose(got, low.T @ low @ np.asarray(gradient), atol=1e-6)


# --- What has no bound, and the clip -------------------------------------------------


def cancelling(seed, gap=1e-4):
    """Neighbouring rows that nearly cancel, at both levels."""
    return jnp.kron(normal(seed, 4, 3), jnp.array([[1.0], [-1.0 + gap]]))


def largest_direction(t, b1=0.9, b2=0.999):
    """Bounds |m^| / sqrt(v^) after t steps (Cauchy and Schwarz)."""
    age = np.arange(t)
    first = (1 - b1) * b1**age / (1 - b1**t)
    second = (1 - b2) * b2**age / (1 - b2**t)
    return np.sqrt(np.sum(first**2 / second))


def test_details_have_no_bound_but_the_clip():
    """An element is ``2^(-l/2) N`` and ``2^(-j/2) E_j`` of every level, plus or minus.

    The limiter only lowers that; float32 adds 1e-5 of it.
    """
    rate, scale, clip, level = 0.01, 0.25, 10.0, 2
    grads = [cancelling(t) for t in range(4)]
    unbounded = lro.gwt(rate, level, scale=scale, select=".", detail_clip=jnp.inf)
    free, _ = run(unbounded, grads)
    tx = lro.gwt(rate, level, scale=scale, select=".", detail_clip=clip)
    held, _ = run(tx, grads)
    of_details = clip * sum(2.0 ** (-j / 2) for j in range(1, level + 1))
    for t, update in enumerate(held, start=1):
        bound = of_details + 2.0 ** (-level / 2) * largest_direction(t)
        assert jnp.abs(update).max() <= rate * scale * bound * (1 + 1e-5)
        assert jnp.abs(update).max() >= 0.5 * rate * scale * clip  # it acts
    assert jnp.abs(free[0]).max() > 100 * rate * scale * clip


def test_a_loose_clip_is_no_clip():
    grads = gradients((13, 4))
    free, _ = run(lro.gwt(1.0, eps=0.1, select=".", detail_clip=jnp.inf), grads)
    held, _ = run(lro.gwt(1.0, eps=0.1, select=".", detail_clip=1e6), grads)
    assert_near(held, free)


def test_traced_hyperparameters():
    """As ``optax.inject_hyperparams`` has them; None or not is decided before."""
    (gradient, *_) = gradients()

    @jax.jit
    def update(clip, growth, eps, b2):
        tx = lro.scale_by_gwt(
            select=".", detail_clip=clip, growth_limit=growth, eps=eps, b2=b2
        )
        return tx.update({"w": gradient}, tx.init({"w": gradient}))[0]["w"]

    values = {"detail_clip": 0.5, "growth_limit": 1.01, "eps": 0.1, "b2": 0.96875}
    (want,), _ = run(lro.scale_by_gwt(select=".", **values), [gradient])
    np.testing.assert_allclose(update(*values.values()), want, atol=2e-6)


# --- Gradients of nothing, and bad ones ----------------------------------------------


def norm_of(state):
    return float(optax.tree_utils.tree_get(state, "recovery_state")["w"])


@pytest.mark.parametrize("options", [{}, {"detail_clip": jnp.inf}, {"wavelet": "db2"}])
def test_steps_without_a_gradient_limit_nothing(options):
    """Before the first gradient the norm is zero, and the next is again a first."""
    grads = [jnp.zeros(SHAPE)] * 2 + gradients()
    tx = lro.scale_by_gwt(select=".", **options)
    updates, state = run(tx, grads[:2])
    assert norm_of(state) == 0.0
    for update in updates:
        np.testing.assert_array_equal(update, 0.0)
    limited, _ = run(tx, grads[:3])
    free, _ = run(lro.scale_by_gwt(select=".", growth_limit=None, **options), grads[:3])
    assert float(jnp.abs(free[2]).max()) > 0.1
    assert_near(limited[2:], free[2:], 1e-6)


@pytest.mark.parametrize("host", HOSTS)
def test_a_step_without_a_gradient_between_others(host):
    """Momentum goes on; there is nothing to divide, and nothing to divide by."""
    first, _, last = gradients((12, 8))
    grads, (inner, options, _) = [first, jnp.zeros((12, 8)), last], HOSTS[host]
    got, _ = run(bracket(inner, **options), grads)
    for update, want in zip(got, formula(host, grads), strict=True):
        atol = 1e-5 * max(0.1, np.max(np.abs(want)))
        np.testing.assert_allclose(update, want, rtol=0, atol=atol)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("good", [0, 1])
def test_the_limiter_recovers_from_a_bad_gradient(value, good):
    """Its bad entries count as zeros, so that the norm stays one of numbers."""
    tx = bracket(optax.identity(), normalize=False)
    first, second, third = gradients()
    _, state = run(tx, [*[first] * good, second.at[0, 0].set(value)])
    assert np.isfinite(norm_of(state))
    update, after = tx.update({"w": third}, state)
    assert np.all(np.isfinite(update["w"])) and np.any(update["w"])
    assert np.isfinite(norm_of(after))


def test_a_bad_gradient_in_one_layer_stays_there():
    stacked = [jnp.stack([g, g * 2.0]) for g in gradients()]
    spoiled = [stacked[0], stacked[1].at[0, 3, 1].set(jnp.nan), stacked[2]]
    tx = lro.scale_by_gwt(select=".", layer_axis=0)
    (*_, want), good = run(tx, stacked)
    (*_, got), state = run(tx, spoiled)
    assert_bit_equal(got[1], want[1])
    assert_bit_equal(state.recovery_state["w"][1], good.recovery_state["w"][1])
    assert np.isfinite(state.recovery_state["w"][0])
