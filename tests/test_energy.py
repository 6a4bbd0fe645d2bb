"""`captured_energy`: what bases hold of a gradient, against singular values."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

import lowrank_optax as lro

L, M, N, R = 2, 12, 20, 3


def tree(seed, scale=1.0):
    """A stack of layers, a matrix and a vector."""
    draw = np.random.default_rng(seed)
    shapes = {"layers": (L, M, N), "tall": (N, M), "bias": (N,)}
    return {
        name: jnp.asarray(scale * draw.standard_normal(shape), jnp.float32)
        for name, shape in shapes.items()
    }


def best(gradient, rank=R):
    """The largest share that any basis of this rank holds."""
    squares = np.linalg.svd(np.asarray(gradient, np.float64), compute_uv=False) ** 2
    return squares[..., :rank].sum(-1) / squares.sum(-1)


def within(gradient, *bases):
    """The share in the span of the columns of a basis, or of one for each side."""
    g = np.asarray(gradient, np.float64)
    seen = g
    for side, basis in enumerate(bases):
        q, _ = np.linalg.qr(np.asarray(basis, np.float64))
        seen = q @ (q.T @ seen) if side == 0 else seen @ q @ q.T
    return np.sum(seen**2) / np.sum(g**2)


def projected(projector, select="layers|tall", **options):
    """Its update is the gradient inside the subspace, and nothing else."""
    return lro.chain(
        lro.project(projector, select=select, layer_axis=0, **options),
        optax.identity(),
        lro.backproject(),
    )


def test_a_fresh_basis_holds_the_leading_singular_values():
    params, gradients = tree(0), tree(1)
    tx = optax.chain(optax.clip_by_global_norm(1e9), projected(lro.svd(R)))
    state = jax.jit(tx.update)(gradients, tx.init(params), params)[1]
    shares = jax.jit(lambda g, s: lro.captured_energy(tx, g, s, params))
    found = shares(gradients, state)
    assert found.keys() == {"layers", "tall"} and found["layers"].shape == (L,)
    for name, share in found.items():
        np.testing.assert_allclose(share, best(gradients[name]), rtol=1e-5)
    # Of any scale: neither square is in float32's range.
    for scale in (1e-30, 1e30):
        scaled = shares(jax.tree.map(lambda g, s=scale: g * s, gradients), state)
        np.testing.assert_allclose(scaled["tall"], found["tall"], rtol=1e-5)
    # Another gradient, in the same basis.
    other, basis = tree(2), state[1].basis
    np.testing.assert_allclose(
        shares(other, state)["layers"],
        [within(g, p) for g, p in zip(other["layers"], basis["layers"], strict=True)],
        rtol=1e-5,
    )
    nothing = jax.tree.map(jnp.zeros_like, gradients)
    assert shares(nothing, state)["tall"] == 0
    wrong = gradients | {"tall": gradients["tall"].at[0, 0].set(jnp.inf)}
    assert np.isnan(shares(wrong, state)["tall"])


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(make, id=name, marks=[pytest.mark.variant] * more)
        for name, more, make in [
            ("bfloat16", 0, lambda: projected(lro.power(R, basis_dtype=jnp.bfloat16))),
            ("online pca", 0, lambda: projected(lro.online_pca(R))),
            ("gaussian", 0, lambda: projected(lro.gaussian(R))),
            (
                "both sides",
                0,
                lambda: projected(lro.power(R, basis_dtype=jnp.bfloat16), side="both"),
            ),
            ("int4", 1, lambda: projected(lro.quantize_basis(lro.power(R)))),
            ("dct", 1, lambda: projected(lro.dct(R, update_proj_gap=9))),
            ("wavelet", 1, lambda: projected(lro.wavelet(1))),
        ]
    ],
)
def test_any_basis_holds_what_its_span_does(make):
    gradients, tx = {"layers": tree(1)["layers"]}, make()

    @jax.jit
    def twice(gradients, state):
        _, state = tx.update(gradients, state, gradients)
        shares = lro.captured_energy(tx, gradients, state, gradients)
        # The second step renews nothing: its bases are those of the state behind the
        # first, and its update spans what they do.
        return shares, tx.update(gradients, state, gradients)[0]

    shares, updates = twice(gradients, tx.init(gradients))
    for share, g, update in zip(
        *map(lambda x: x["layers"], (shares, gradients, updates)), strict=True
    ):
        left, values, right = np.linalg.svd(np.asarray(update, np.float64))
        rank = int(np.sum(values > 1e-4 * values[0]))
        # Of all rows, one side alone decides.
        bases = (left[:, :rank], right[:rank].T)
        np.testing.assert_allclose(share, within(g, *bases), rtol=2e-4)
        assert 0 < share < 1


def test_what_has_no_bracket_or_another_state():
    params = tree(0)
    with pytest.raises(ValueError, match="captured_energy found no low-rank bracket"):
        tx = optax.adam(1e-3)
        lro.captured_energy(tx, params, tx.init(params), params)
    with pytest.raises(ValueError, match=r"with 1 low-rank bracket\(s\).*one with 0"):
        lro.captured_energy(
            projected(lro.svd(R)), params, optax.adam(1e-3).init(params), params
        )


def test_gradients_of_another_tree():
    tx, params = projected(lro.svd(R)), tree(0)
    state = tx.init(params)
    for gradients, message in (
        ({"layers": params["layers"]}, r"\(20, 12\) for leaf 'tall', found none"),
        (params | {"tall": params["bias"]}, r"found one of the shape \(20,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            lro.captured_energy(tx, gradients, state, params)


def test_on_an_explicit_mesh_and_for_a_masked_bracket():
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Explicit,))
    tx = optax.masked(
        projected(lro.svd(R), "tall"),
        {"tall": True, "layers": False, "bias": False},
    )
    params, gradients = tree(0), tree(1)
    state = tx.update(gradients, tx.init(params), params)[1]
    alone = lro.captured_energy(tx, gradients, state, params)
    assert alone.keys() == {"tall"}
    np.testing.assert_allclose(alone["tall"], best(gradients["tall"]), rtol=1e-5)
    place = jax.NamedSharding(mesh, jax.P("x"))
    with jax.set_mesh(mesh):
        put = jax.device_put((gradients, params), jax.NamedSharding(mesh, jax.P()))
        put[0]["tall"] = jax.device_put(gradients["tall"], place)
        put[1]["tall"] = jax.device_put(params["tall"], place)
        state = tx.update(put[0], tx.init(put[1]), put[1])[1]
        found = lro.captured_energy(tx, put[0], state, put[1])
    np.testing.assert_allclose(found["tall"], alone["tall"], rtol=1e-5)
