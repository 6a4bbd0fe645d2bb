"""Steps that stay sane: how far one update may go, whatever the gradient."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from lowrank_optax.testing import HARD_MATRICES, hard_matrix

LR = 1e-3
FINITE = [kind for kind in HARD_MATRICES if kind not in ("nan", "inf", "minus_inf")]
FINITE.remove("all_nan")
# Every kind is one layer of a stack, and every rank a leaf: one program per method.
LEAVES = {"tall_1": (12, 8), "wide_2": (3, 40), "tall_8": (12, 8)}

# SUMO adds the residual as it is: its steps are the gradient's, by construction.
METHODS = sorted(set(lro.METHODS) - {"sumo"})
# The limit on recovery's ratio is 10 root mean squares of Adam's direction, beside the
# subspace's own share; a method's scale multiplies both.
LARGEST = 12.0
SCALED = {"apollo_mini": 128.0**0.5}
# The papers' ratio, |N_j| / |R_j|, of which these are made.
WITH_A_RATIO = ("fira", "subtrack", "grass_walk", "grass_jump", "apollo", "apollo_mini")


def hard_gradients(step):
    """Every kind after every other: a basis meets what it was not made for."""
    kinds = FINITE[step:] + FINITE[:step]
    return {
        name: jnp.asarray(np.stack([hard_matrix(k, m, n, seed=step) for k in kinds]))
        for name, (m, n) in LEAVES.items()
    }


def largest_entry(name, steps=5, **options):
    """The largest entry of an update on the hard matrices, in learning rates."""
    factory = lro.METHODS[name].factory
    chosen = {
        "rank": lambda path: int(path.split("_")[1]),
        "update_proj_gap": 3,
        "select": ".",
        "layer_axis": 0,
    }
    taken = inspect.signature(factory).parameters
    if name in ("lora_pre", "dion"):  # of one rank for all leaves
        chosen["rank"] = 2
    chosen = {key: x for key, x in chosen.items() if key in taken}
    tx = factory(LR, **chosen, **options)
    params = jax.tree.map(jnp.zeros_like, hard_gradients(0))
    state, update, found = tx.init(params), jax.jit(tx.update), 0.0
    for step in range(steps):
        updates, state = update(hard_gradients(step), state, params)
        for leaf in updates.values():
            assert np.isfinite(leaf).all()
            found = max(found, float(jnp.abs(leaf).max()) / LR)
    return found


@pytest.mark.parametrize("name", METHODS)
def test_no_entry_goes_further_than_a_multiple_of_the_learning_rate(name):
    assert largest_entry(name) <= LARGEST * SCALED.get(name, 1.0)


def test_without_the_limit_some_do():
    """The papers' ratio, which the authors' conventions keep."""
    assert largest_entry("fira", entry_limit=None) > 5 * LARGEST
    assert largest_entry("fira", conventions="authors") > 2 * LARGEST


@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("granularity", ["column", "tensor"])
@pytest.mark.parametrize("side", ["short", "both"])
@pytest.mark.parametrize(
    ("projector", "of"),
    [(lro.svd, "residual"), (lro.svd, "gradient"), (lro.gaussian, "gradient")],
)
def test_the_limit_is_in_root_mean_squares_of_the_direction(
    rank, granularity, side, projector, of
):
    """No entry of ``G diag(phi)`` is larger, and the ratio is the paper's below it."""
    if side == "both" and granularity == "column":
        pytest.skip("such a projection has no columns of the gradient's")
    m, n, limit = 16, 60, 3.0
    rng = np.random.default_rng(rank)
    gradient = rng.standard_normal((m, n)) * 10.0 ** rng.uniform(-6, 3, n)

    def update(entry_limit):
        tx = lro.chain(
            lro.project(projector(rank), select=".", side=side),
            optax.scale_by_sign(),
            lro.recover_scale(of, granularity, None, entry_limit=entry_limit),
            lro.backproject(0.0 if of == "residual" else 1.0),
        )
        params = {"w": jnp.zeros((m, n))}
        grads = {"w": jnp.asarray(gradient, jnp.float32)}
        return np.asarray(jax.jit(tx.update)(grads, tx.init(params))[0]["w"])

    free, bound = update(None), update(limit)
    # A residual has less: of a column, what P R takes off has at most N_j's norm.
    slack = 0.0 if of == "gradient" else rank**0.5
    assert np.abs(bound).max() <= limit * (1 + 1e-5) + slack
    if granularity == "column":
        # Those far below the limit are the paper's, to the rounding of one product.
        far = np.abs(free).max(0) < 0.5 * limit
        np.testing.assert_allclose(bound[:, far], free[:, far], rtol=1e-4, atol=1e-6)
