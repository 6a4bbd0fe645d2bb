"""A rank for every leaf, from the energy of a few gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_optax as lro


def with_spectrum(values, m, n, seed=0):
    draw = np.random.default_rng(seed)
    u = np.linalg.qr(draw.normal(size=(m, len(values))))[0]
    v = np.linalg.qr(draw.normal(size=(n, len(values))))[0]
    return jnp.asarray(u * np.asarray(values) @ v.T, jnp.float32)


# Energies 16, 4, 4, 1 of 25, and all in one direction.
FALLING, SINGLE = [4.0, 2.0, 2.0, 1.0], [3.0]


def gradient(scale=1.0):
    return {
        "tall": {"kernel": scale * with_spectrum(FALLING, 24, 12)},
        "wide": {"kernel": with_spectrum(SINGLE, 12, 24)},
        "bias": jnp.ones(12),
    }


def ranks_of(*gradients, share=0.9, **options):
    ranks = lro.rank_by_energy(share, *gradients, **options)
    return {row.path: row.rank for row in ranks.rows}


@pytest.mark.parametrize(
    ("share", "rank"), [(0.6, 1), (0.64, 1), (0.65, 2), (0.9, 3), (0.97, 4), (1.0, 4)]
)
@pytest.mark.parametrize("scale", [1.0, 1e-18, 1e18])
def test_the_least_rank_that_holds_the_share(share, rank, scale):
    found = ranks_of(gradient(scale), share=share)
    assert found == {"tall/kernel": rank, "wide/kernel": 1}


def test_the_mean_is_over_gradients_and_layers_that_have_any():
    falling, single = gradient()["tall"]["kernel"], with_spectrum(SINGLE, 24, 12)
    # Shares at ranks 1 to 4: 0.64, 0.8, 0.96, 1 beside 1; means 0.82, 0.9, 0.98.
    stack = {"layers": {"kernel": jnp.stack([falling, single, 0 * single])}}
    axis = lro.Selection(layer_axis=0)
    for trees in ([stack], [{"layers": {"kernel": x}} for x in (falling, single)]):
        options = {"selection": axis} if len(trees) == 1 else {}
        for share, rank in ((0.81, 1), (0.89, 2), (0.95, 3)):
            found = ranks_of(*trees, share=share, **options)
            assert found == {"layers/kernel": rank}
    nothing = jax.tree.map(jnp.zeros_like, stack)
    assert ranks_of(nothing, selection=axis) == {"layers/kernel": 1}


def test_bounds_and_multiples():
    tall = "tall/kernel"
    assert ranks_of(gradient(), multiple=4)[tall] == 4
    assert ranks_of(gradient(), multiple=4, maximum=3)[tall] == 3
    assert ranks_of(gradient(), minimum=5)[tall] == 5
    assert ranks_of(gradient(), multiple=16)[tall] == 12  # min(m, n)


def test_a_method_takes_them_and_a_table_shows_them():
    ranks = lro.rank_by_energy(0.9, gradient())
    state = jax.eval_shape(lro.galore(1e-2, rank=ranks).init, gradient())
    assert state.basis["tall"]["kernel"].shape == (12, 3)
    assert state.basis["wide"]["kernel"].shape == (12, 1)
    _, tall, _ = str(ranks).splitlines()
    assert tall.split() == ["tall/kernel", "24x12", "3", "of", "12", "96.0%"]
    assert ranks == lro.rank_by_energy(0.9, gradient()) and hash(ranks)
    with pytest.raises(ValueError, match=r"no rank for leaf 'other/kernel'.*'tall/ker"):
        jax.eval_shape(lro.galore(1e-2, rank=ranks).init, {"other": gradient()["tall"]})


@pytest.mark.parametrize(
    ("args", "options", "error", "message"),
    [
        ((1.5, gradient()), {}, ValueError, r"`share` is a part .*\(0, 1\]; got 1\.5"),
        ((0.9,), {}, ValueError, "needs gradients to choose by"),
        ((0.9, gradient(), {}), {}, ValueError, "trees of one structure"),
        ((0.9, gradient(jnp.nan)), {}, ValueError, "leaf 'tall/kernel' .* not finite"),
        ((0.9, gradient()), {"multiple": 0}, ValueError, "`multiple` must be at least"),
        ((0.9, gradient()), {"minimum": 4, "maximum": 2}, ValueError, "`maximum` must"),
        (
            (0.9, gradient()),
            {"minimum": 1.5},
            TypeError,
            "`minimum` must be a positive",
        ),
    ],
)
def test_bad_input(args, options, error, message):
    with pytest.raises(error, match=message):
        lro.rank_by_energy(*args, **options)
