"""APOLLO: against its formula, its random bases, its bytes, the recorded norms."""

import hashlib
import os
import subprocess
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from lowrank_optax.testing import assert_bit_equal
from tests.distributed.cases import (
    LAYOUTS,
    PARAMS,
    Sharded,
    assert_close,
    explicit_mesh,
    gradients,
    named,
    updates_on_one_device,
)
from tests.golden import cases
from tests.golden.apollo import limiter_norms

R, GAP, LR, SCALE = 4, 3, 0.5, 0.25
SMALL = {"a": jnp.ones((12, 20)), "bias": jnp.ones(5)}
TREE = {**SMALL, "b": jnp.ones((12, 20)), "stack": jnp.ones((3, 20, 12))}


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def noise(tree, seed, size=1.0):
    leaves, treedef = jax.tree.flatten(tree)
    drawn = [size * normal(100 * seed + i, *x.shape) for i, x in enumerate(leaves)]
    return treedef.unflatten([jnp.asarray(x, jnp.float32) for x in drawn])


class SpyState(NamedTuple):
    """Adam's state and the bases that it worked in."""

    adam: Any
    seen: Any


def spy(b1=0.9, b2=0.999, eps=1e-8, rank=R):
    """Adam, with this step's bases in its state."""
    adam = optax.scale_by_adam(b1, b2, eps)

    def init(params):
        def zeros(x):
            if x.ndim < 2:
                return jnp.zeros(())
            return jnp.zeros((*x.shape[:-2], 12, rank))

        return SpyState(adam.init(params), jax.tree.map(zeros, params))

    def update(updates, state, params=None, **extra: Any):
        def keep(basis, before):
            return before if basis is None else basis

        updates, after = adam.update(updates, state.adam, params)
        seen = jax.tree.map(
            keep, extra["subspace"].basis, state.seen, is_leaf=lambda x: x is None
        )
        return updates, SpyState(after, seen)

    return optax.GradientTransformationExtraArgs(init, update)


def apollo(**options):
    options = {"layer_axis": 0, "update_proj_gap": GAP, **options}
    return lro.apollo(LR, R, **options)


def run(tx, grads):
    """Updates and states of every step, without moving the parameters."""
    params = jax.tree.map(jnp.ones_like, grads[0])
    state, step, out = tx.init(params), jax.jit(tx.update), []
    for gradient in grads:
        updates, state = step(gradient, state, params)
        out.append((updates, state))
    return out


def bases(steps=1, tree=TREE, **options):
    """Every matrix' basis of every step."""
    tx = apollo(base_optimizer=spy(), **options)
    grads = [noise(tree, k) for k in range(steps)]
    return [seen_in(state) for _, state in run(tx, grads)]


def seen_in(state):
    seen: Any = optax.tree_utils.tree_get(state, "seen")
    return {name: np.asarray(x) for name, x in seen.items() if x.ndim > 1}


# The formula.


def reference(grads, drawn, granularity, limit, b1=0.9, b2=0.999, eps=1e-8):
    """APOLLO's updates of one matrix [m, n] in float64, from the basis of each step."""
    mu = nu = before = 0.0
    axes = 0 if granularity == "column" else None
    for t, (g, p) in enumerate(zip(grads, drawn, strict=True), start=1):
        g, p = (np.asarray(x, np.float64) for x in (g, p))
        r = p.T @ g
        mu, nu = b1 * mu + (1 - b1) * r, b2 * nu + (1 - b2) * r**2
        n = (mu / (1 - b1**t)) / (np.sqrt(nu / (1 - b2**t)) + eps)

        def norm(x):
            return np.sqrt(np.sum(x**2, axis=axes))

        u = g * norm(n) / (norm(r) + 1e-8)
        size = np.linalg.norm(u)
        if limit is not None and before:
            u *= min(1.0, limit * before / size)
        before = np.linalg.norm(u)
        yield -LR * np.sqrt(SCALE) * u


@pytest.mark.parametrize(
    ("granularity", "limit"), [("column", 1.01), ("tensor", 1.01), ("column", None)]
)
def test_the_formula(granularity, limit):
    options = {"scale": SCALE, "granularity": granularity, "growth_limit": limit}
    tx = apollo(base_optimizer=spy(), entry_limit=None, **options)
    tree = {"a": TREE["a"], "stack": TREE["stack"]}
    grads = [noise(tree, k, 1.0 + k) for k in range(5)]
    steps = run(tx, grads)
    drawn = [seen_in(state) for _, state in steps]
    for name in ("a", "stack"):
        for layer in range(3 if name == "stack" else 1):

            def pick(x, name=name, layer=layer):
                x = np.asarray(x)[layer] if name == "stack" else np.asarray(x)
                return x.T if name == "stack" and x.shape == (20, 12) else x

            expected = reference(
                [pick(g[name]) for g in grads],
                [pick(basis[name]) for basis in drawn],
                granularity,
                limit,
            )
            for (updates, _), want in zip(steps, expected, strict=True):
                # Updates of size one; float32 sums, and 1 - 0.999^t in float32.
                np.testing.assert_allclose(pick(updates[name]), want, atol=1e-4)
    # The basis was spied on by an Adam that changes nothing.
    plain = run(apollo(**options), grads[:1])
    assert_bit_equal(steps[0][0], plain[0][0])


@pytest.mark.parametrize("granularity", ["column", "tensor"])
def test_the_update_is_the_gradient_rescaled(granularity):
    grads = [noise(SMALL, k) for k in range(2)]
    updates = run(apollo(granularity=granularity), grads)[-1][0]
    ratio = np.asarray(updates["a"] / grads[-1]["a"])
    along = ratio[:1] if granularity == "column" else ratio[:1, :1]
    np.testing.assert_allclose(ratio, np.broadcast_to(along, ratio.shape), rtol=1e-5)
    assert np.all(ratio < 0)
    if granularity == "column":
        assert np.ptp(ratio[0]) > 0.1 * np.abs(ratio).mean()


def test_scale_enters_as_its_square_root_and_spares_full_leaves():
    grads = [noise(SMALL, k) for k in range(3)]
    quarter, four = (run(apollo(scale=s), grads)[-1][0] for s in (0.25, 4.0))
    assert_bit_equal(4.0 * quarter["a"], four["a"])  # powers of two: exact
    assert_bit_equal(quarter["bias"], four["bias"])


def test_scale_may_be_traced():
    static = lro.static_args(lro.apollo)
    injected = optax.inject_hyperparams(lro.apollo, static_args=static)
    tx = injected(LR, R, scale=SCALE, layer_axis=0, update_proj_gap=GAP)
    gradient = noise(SMALL, 0)
    ((updates, _),) = run(tx, [gradient])
    ((plain, _),) = run(apollo(scale=SCALE), [gradient])
    # Traced decays are float32 numbers: 1 - 0.999 then is off by 1e-5.
    _assert_near(updates, plain, 2e-5)
    start: Any = tx.init(SMALL)
    start.hyperparams["scale"] = jnp.float32(4 * SCALE)
    twice, _ = jax.jit(tx.update)(gradient, start, SMALL)
    _assert_near(twice["a"], 2.0 * updates["a"], 1e-6)


def _assert_near(tree, other, rtol):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol), tree, other)


def test_steps_grow_no_faster_than_the_limit():
    grads = [noise(SMALL, k, 10.0**k) for k in range(5)]
    limited, free = (
        run(apollo(base_optimizer=optax.trace(0.5), growth_limit=limit), grads)
        for limit in (1.01, None)
    )

    def sizes(steps):
        return np.array([float(jnp.linalg.norm(u["a"])) for u, _ in steps])

    growth = sizes(limited)[1:] / sizes(limited)[:-1]
    np.testing.assert_allclose(growth, 1.01, rtol=1e-5)
    assert np.all(sizes(free)[1:] / sizes(free)[:-1] > 2)


def test_mini_is_apollo_with_rank_one_and_one_number():
    grads = [noise(SMALL, k) for k in range(3)]
    mini = lro.apollo_mini(LR, layer_axis=0)
    same = lro.apollo(LR, 1, scale=128.0, granularity="tensor", layer_axis=0)
    assert_bit_equal(run(mini, grads)[-1], run(same, grads)[-1])
    parts = optax.chain(
        lro.scale_by_apollo_mini(layer_axis=0), optax.scale_by_learning_rate(LR)
    )
    _assert_near(run(parts, grads[:1])[0][0], run(mini, grads[:1])[0][0], 1e-5)


def test_any_size_of_gradient_gives_finite_updates():
    """Up to where Adam's own squares overflow, and down to none at all."""
    sizes = [0.0, 1.0, 0.0, 1e-20, 1e15, 1e18, 1e-20, 1.0]
    grads = [noise(SMALL, k, size) for k, size in enumerate(sizes)]
    for updates, state in run(apollo(), grads):
        assert all(np.isfinite(x).all() for x in jax.tree.leaves((updates, state)))


def test_bfloat16_gradients_keep_their_dtype():
    short = jax.tree.map(lambda x: x.astype(jnp.bfloat16), noise(SMALL, 0))
    ((updates, state),) = run(apollo(), [short])
    assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype(jnp.bfloat16)}
    assert {x.dtype for x in jax.tree.leaves(state.inner_state.mu)} == {
        jnp.dtype(jnp.bfloat16)
    }


# The random bases.


def test_bases_differ_between_leaves_layers_and_epochs():
    first, *rest = bases(steps=GAP + 1)
    for same in rest[:-1]:
        assert_bit_equal(same, first)
    last = rest[-1]
    different = [x[name] for x in (first, last) for name in ("a", "b")]
    different += [x["stack"][layer] for x in (first, last) for layer in range(3)]
    for i, one in enumerate(different):
        for other in different[:i]:
            correlation = np.sum(one * other) / np.sqrt(
                np.sum(one**2) * np.sum(other**2)
            )
            # 48 independent pairs: a standard deviation of 0.14.
            assert np.abs(correlation) < 0.6


def test_bases_depend_on_the_path_and_not_on_the_other_leaves():
    (alone,) = bases(tree={"b": TREE["b"]})
    (together,) = bases()
    (reseeded,) = bases(seed=1)
    assert_bit_equal(alone["b"], together["b"])
    assert np.all(reseeded["b"] != together["b"])


def test_bases_are_the_same_on_every_replica():
    """Each of 8 devices draws for itself; all agree with a single device."""
    tx = apollo(base_optimizer=spy())
    count = jax.local_device_count()
    assert count == 8
    gradient = noise(TREE, 0)

    def step(gradient):
        return tx.update(gradient, tx.init(TREE), TREE)[1]

    stacked = jax.tree.map(lambda x: jnp.stack([x] * count), gradient)
    replicas = seen_in(jax.pmap(step)(stacked))
    alone = seen_in(jax.jit(step)(gradient))
    for name, basis in alone.items():
        for replica in replicas[name]:
            assert_bit_equal(replica, basis)


def test_a_sharded_run_is_that_of_one_device():
    tx = lro.apollo(1.0, R, update_proj_gap=2, eps=0.1, layer_axis=0)
    mesh = explicit_mesh()
    with jax.set_mesh(mesh):
        sharded = Sharded(tx, PARAMS, named(mesh, LAYOUTS["both"]))
        updates, state = sharded.updates(gradients(PARAMS))
    assert_close(updates, updates_on_one_device(tx, PARAMS)[0])
    assert jax.tree.map(lambda x: x.sharding, state) == sharded.state_shardings


def test_a_resumed_run_goes_on_as_before():
    """From numbers alone, into an optimizer built anew."""
    grads = [noise(SMALL, k) for k in range(GAP + 3)]
    whole = run(apollo(), grads)
    saved = jax.tree.map(np.array, whole[1][1])
    fresh = apollo()
    state = jax.tree.unflatten(
        jax.tree.structure(fresh.init(SMALL)),
        [jnp.asarray(x) for x in jax.tree.leaves(saved)],
    )
    step = jax.jit(fresh.update)
    for gradient, (expected, _) in zip(grads[2:], whole[2:], strict=True):
        updates, state = step(gradient, state, SMALL)
        assert_bit_equal(updates, expected)


def digest(drawn):
    joined = b"".join(drawn[name].tobytes() for name in sorted(drawn))
    return hashlib.sha256(joined).hexdigest()


@pytest.mark.whole
def test_bases_are_the_same_in_another_process():
    """Python's own hash of a path, for one, differs between processes."""
    code = "import tests.conftest\nfrom tests.test_apollo import bases, digest\n"
    code += "print(digest(bases()[0]))"
    environment = {**os.environ, "PYTHONHASHSEED": "77"}
    found = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        cwd=os.path.dirname(os.path.dirname(__file__)),
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.split()[-1] == digest(bases()[0])


# Bytes.

COUNTERS = 4 + 4 + 8  # the bracket's step, Adam's, and one key


@pytest.mark.parametrize("layers", [(), (3,)], ids=["matrix", "stack"])
@pytest.mark.parametrize("shape", [(48, 32), (32, 48), (40, 40)])
@pytest.mark.parametrize(("make", "r"), [(lro.apollo, R), (lro.apollo_mini, 1)])
def test_state_bytes(make, r, shape, layers):
    """2 r l numbers of moments and one of the limiter: nothing else per matrix."""
    params = {"w": jnp.zeros((*layers, *shape))}
    count, long = 3 if layers else 1, max(shape)
    tx = make(1e-2, rank=r, select="w", layer_axis=0)
    table = lro.state_bytes(tx, params)
    moments = {"mu": 4 * count * r * long, "nu": 4 * count * r * long}
    assert table.by_role == {**moments, "recovery": 4 * count, "other": COUNTERS}
    assert table.by_parameter == {
        "w": 4 * count * (2 * r * long + 1),
        "": COUNTERS,
    }
    state = tx.init(params)
    assert table.total == sum(x.nbytes for x in jax.tree.leaves(state))


def test_state_bytes_without_limiter_and_in_bfloat16():
    params = {"w": jnp.zeros((48, 32))}
    tx = lro.apollo(
        1e-2, R, growth_limit=None, mu_dtype=jnp.bfloat16, nu_dtype=jnp.bfloat16
    )
    roles = lro.state_bytes(tx, params).by_role
    assert roles == {"mu": 2 * R * 48, "nu": 2 * R * 48, "other": COUNTERS}


# Other projectors, and what is refused.


def test_another_projector_is_stored():
    tx = lro.apollo(LR, layer_axis=0, projector=lro.svd(R, GAP))
    ((updates, state),) = run(tx, [noise(SMALL, 0)])
    assert state.basis["a"].shape == (12, R)
    ratio = np.asarray(updates["a"] / noise(SMALL, 0)["a"])
    np.testing.assert_allclose(ratio, np.broadcast_to(ratio[:1], ratio.shape), 1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank"),
        ({"update_proj_gap": 0}, "update_proj_gap"),
        ({"granularity": "row"}, "granularity"),
        ({"conventions": "paper"}, "conventions"),
        ({"transport": lro.rotate_moments()}, "keeps no basis"),
        ({"side": "both"}, "has no column"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else None,
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        lro.apollo(**{"learning_rate": LR, "rank": R, **options}).init(SMALL)


# The recorded runs.


def recorded():
    """The cases that have a limiter."""
    for path in cases.files():
        config = cases.read_config(path)
        if config and config.get("method") == "apollo":
            if config["norm_growth_limiter"]:
                yield pytest.param(path, id=path.stem)


@pytest.mark.parametrize("path", list(recorded()))
def test_limiter_norms(path):
    """Those of G diag(phi), without scale and bias correction, after limiting."""
    for _, found, expected in limiter_norms(cases.load(path)):
        # Root sums of 2000 squares in float32; at most 5.1e-7 was measured.
        np.testing.assert_allclose(found, expected, rtol=5e-6)
