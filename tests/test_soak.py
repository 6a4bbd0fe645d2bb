"""Thousands of steps: bases stay orthonormal, counters count, nothing drifts."""

import pathlib
import resource

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from lowrank_optax.testing import assert_orthonormal
from lowrank_optax.testing._subject import step_of
from tests.chosen import each_kind
from tests.rows import ROWS, subject

STEPS, GAP = 5_000, 5


@pytest.mark.slow
@pytest.mark.parametrize("basis_dtype", [jnp.float32, jnp.bfloat16])
def test_five_thousand_steps_on_a_drifting_problem(basis_dtype):
    shapes = {"wide": (24, 40), "tall": (2, 40, 24)}
    params = {name: jnp.zeros(shape) for name, shape in shapes.items()}
    tx = lro.galore(
        0.05,
        rank=6,
        update_proj_gap=GAP,
        scale=1.0,
        layer_axis=0,
        basis_dtype=basis_dtype,
    )

    def target(name, step):
        """A rank-8 matrix whose singular vectors turn slowly."""
        key = jax.random.key(len(name))
        *batch, m, n = shapes[name]
        left, right = (
            jax.random.normal(jax.random.fold_in(key, i), (2, *batch, size, 8))
            for i, size in enumerate((m, n))
        )
        angle = step / 2000.0
        turned = jnp.cos(angle) * left[0] + jnp.sin(angle) * left[1]
        return turned @ jnp.swapaxes(right[0], -1, -2)

    def body(carry, step):
        params, state = carry
        grads = {name: params[name] - target(name, step) for name in params}
        updates, state = tx.update(grads, state, params)
        error = optax.tree.norm(grads)
        return (optax.apply_updates(params, updates), state), error

    run = jax.jit(lambda carry: jax.lax.scan(body, carry, jnp.arange(float(STEPS))))
    (params, state), errors = run((params, tx.init(params)))
    # Float32 products of unit columns; bf16 rounds every entry to 2^-9.
    tolerance = 1e-5 if basis_dtype == jnp.float32 else 2e-2
    for basis in jax.tree.leaves(state.basis):
        assert_orthonormal(basis.astype(jnp.float32), tolerance)
    assert int(state.count) == STEPS
    assert bool(jnp.all(jnp.isfinite(errors)))
    # It follows the target: the last error is a fraction of the first.
    assert float(jnp.mean(errors[-500:])) < 0.5 * float(errors[0])


CHUNK, CHUNKS = 500, 20


def resident() -> int:
    """Bytes of this process in memory."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def counters(state):
    """The counters of a state, by their paths."""
    flat = jax.tree_util.tree_leaves_with_path(state)
    named = {jax.tree_util.keystr(path): leaf for path, leaf in flat}
    return {name: leaf for name, leaf in named.items() if name.endswith(".count")}


def set_counters(state, value):
    """The same state late in its life."""

    def late(path, leaf):
        own = jax.tree_util.keystr(path).endswith(".count")
        return jnp.full_like(leaf, value) if own else leaf

    return jax.tree_util.tree_map_with_path(late, state)


@pytest.mark.slow
@each_kind
def test_ten_thousand_steps(row):
    """And across the end of int32: one trace, no more memory, valid bases."""
    one, traces = subject(row), []
    step = step_of(one.tx)

    @jax.jit
    def run(params, state, first):
        traces.append(None)

        def body(carry, number):
            params, state = carry
            leaves, treedef = jax.tree.flatten(params)
            key = jax.random.fold_in(jax.random.key(0), number)
            keys = jax.random.split(key, len(leaves))
            # Back to zero, through noise.
            gradients = [
                p + jax.random.normal(k, p.shape, p.dtype)
                for p, k in zip(leaves, keys, strict=True)
            ]
            return step(params, state, treedef.unflatten(gradients)), None

        return jax.lax.scan(body, (params, state), first + jnp.arange(CHUNK))[0]

    def check(params, state):
        for leaf in jax.tree.leaves((params, state)):
            assert np.isfinite(np.asarray(leaf)).all()
        assert max(float(jnp.abs(p).max()) for p in jax.tree.leaves(params)) < 5
        bases = optax.tree_utils.tree_get_all_with_path(state, "basis")
        if bases and ROWS[row].orthonormal:
            assert_orthonormal(bases[0][1])

    params, state = one.start[:2]
    memory = []
    for chunk in range(CHUNKS):
        params, state = run(params, state, chunk * CHUNK)
        check(params, state)
        memory.append(resident())
    # A basis with an optimizer of its own takes no step at the first.
    for name, count in counters(state).items():
        assert set(CHUNK * CHUNKS - np.ravel(count)) <= {0, 1}, (name, count)
    grown = memory[-1] / memory[1] - 1
    print(f"{row}: {CHUNK * CHUNKS} steps, memory {grown:+.2%}, {len(traces)} trace")
    assert grown < 0.01
    before = set_counters(state, 2**31 - 1 - CHUNK // 2)
    params, state = run(params, before, CHUNK * CHUNKS)
    check(params, state)
    assert all(np.all(c > 2**29) for c in counters(state).values())
    # Behind the end as before it: bases are still renewed.
    params, behind = run(params, state, CHUNK * (CHUNKS + 1))
    check(params, behind)
    stored = optax.tree_utils.tree_get_all_with_path
    moved = jax.tree.leaves(
        jax.tree.map(
            lambda a, b: bool(np.any(np.asarray(a) != np.asarray(b))),
            [x for _, x in stored(state, "basis")],
            [x for _, x in stored(behind, "basis")],
        )
    )
    # Of vectors, scales, gaps and similarities, those that can; some store nothing.
    assert any(moved) or not moved
    assert len(traces) == 1
