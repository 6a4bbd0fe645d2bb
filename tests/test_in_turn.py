"""Layers of a stack that lies on several devices are worked on one after another."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import lowrank_optax as lro

L, M, N, R = 3, 16, 24, 4
SHAPES = {"square": (L, M, M), "wide": (L, M, N), "tall": (L, N, M)}
# Axes of a mesh that is not there: enough to say that a stack is cut.
CUT = {"square": P(None, "x"), "wide": P(None, "x"), "tall": P(None, None, "x")}

METHODS = {
    "galore": lambda **o: lro.galore(1e-2, R, update_proj_gap=2, **o),
    "galore_long": lambda **o: lro.galore(1e-2, R, side="long", **o),
    "galore_both": lambda **o: lro.galore(1e-2, R, side="both", **o),
    "fira": lambda **o: lro.fira(1e-2, R, **o),
    "subtrack": lambda **o: lro.subtrack(1e-2, R, update_proj_gap=2, **o),
    "gwt": lambda **o: lro.gwt(1e-2, **o),
    "ldadam": lambda **o: lro.ldadam(1e-2, R, error_feedback=True, **o),
    "apollo": lambda **o: lro.apollo(1e-2, R, **o),
    "frugal": lambda **o: lro.frugal(1e-2, R, **o),
    "galore_8bit": lambda **o: lro.galore_8bit(
        1e-2, projector=lro.svd(R), min_size=0, **o
    ),
    "muon": lambda **o: lro.muon(1e-2, bits=4, min_size=0, **o),
    "even_muon": lambda **o: lro.even_muon(1e-2, bits=4, min_size=0, **o),
    "complement": lambda **o: lro.chain(  # with one counter for all layers of a leaf
        lro.project(lro.svd(R), select=".", **o),
        optax.scale_by_adam(),
        lro.complement(optax.scale_by_adam()),
        lro.backproject(learning_rate=1e-2),
    ),
}
OFTEN = ("galore", "subtrack", "gwt", "ldadam", "galore_8bit", "complement")


def gradients(step):
    return {
        name: jax.random.normal(jax.random.key(len(name) + 100 * step), shape)
        for name, shape in SHAPES.items()
    }


@pytest.mark.parametrize(
    "name",
    [
        name if name in OFTEN else pytest.param(name, marks=pytest.mark.slow)
        for name in METHODS
    ],
)
def test_in_turn_is_at_once(name):
    """Three steps, two refreshes; matrices of the same shape and different content."""

    def run(**options):
        tx = METHODS[name](layer_axis=0, **options)
        params = jax.tree.map(jnp.ones_like, gradients(0))
        state, update, updates = tx.init(params), jax.jit(tx.update), params
        for step in range(3):
            updates, state = update(gradients(step), state, params)
        return updates, state

    at_once, in_turn = run(), run(param_shardings=CUT)
    # Products of other shapes sum in another order; a sign of noise may turn where
    # Adam divides by a root near zero, hence not in all digits.
    for a, b in zip(jax.tree.leaves(at_once), jax.tree.leaves(in_turn), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.abs(a - b).max() <= 1e-4 * max(np.abs(a).max(), 1e-6)


def compiled(tx, shardings):
    params = {
        name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=shardings[name])
        for name, shape in SHAPES.items()
    }
    layout = lro.state_shardings(tx, params, shardings)
    state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        jax.eval_shape(tx.init, params),
        layout,
    )
    update = jax.jit(tx.update, out_shardings=(shardings, layout))
    return update.lower(params, state, params).compile()


def test_a_basis_is_whole_for_one_layer_at_a_time():
    mesh = Mesh(np.array(jax.devices()[:4]), ("x",))
    shardings = {name: NamedSharding(mesh, spec) for name, spec in CUT.items()}
    tx = lro.galore(1e-2, R, side="auto", layer_axis=0, param_shardings=shardings)
    gathers = [
        item
        for item in lro.collectives(compiled(tx, shardings).as_text() or "")
        if item.op == "all-gather" and not item.conditional
    ]
    assert gathers
    largest = 4 * N * R  # float32, the basis of one layer on its longer side
    assert max(item.bytes for item in gathers) <= largest


def test_one_layer_at_a_time_is_whole_for_its_polar_factor():
    mesh = Mesh(np.array(jax.devices()[:4]), ("x",))
    shardings = {name: NamedSharding(mesh, spec) for name, spec in CUT.items()}
    tx = lro.muon(1e-2, layer_axis=0, param_shardings=shardings)
    sent = lro.collectives(compiled(tx, shardings).as_text() or "")
    assert any(item.times == L for item in sent)
    assert max(item.bytes for item in sent) <= 4 * M * N  # float32, of one layer


def test_a_cut_axis_of_layers_is_not_looped_over():
    """A loop over it would gather the stack on every device."""
    mesh = jax.sharding.AbstractMesh((2, 2), ("pipe", "x"))
    for spec, expected in ((P(None, "x"), True), (P("pipe", "x"), False)):
        shardings = {"wide": NamedSharding(mesh, spec)}
        tx = lro.galore(1e-2, R, layer_axis=0, param_shardings=shardings)
        params = {"wide": jax.ShapeDtypeStruct(SHAPES["wide"], jnp.float32)}
        (row,) = lro.selection_report(tx, params).rows
        assert row.in_turn is expected


def test_one_device_is_not_made_to_wait():
    """Without a sharding, or with one that cuts nothing, all layers go at once."""

    def loops(**options):
        tx = lro.gwt(1e-2, layer_axis=0, **options)
        params = gradients(0)
        return str(jax.make_jaxpr(tx.update)(params, tx.init(params))).count("scan[")

    assert loops() == loops(param_shardings={name: P() for name in CUT}) == 0
    assert loops(param_shardings=CUT) > 0


@pytest.mark.parametrize(
    "transformation",
    [
        optax.normalize_by_update_norm(),
        optax.clip_by_block_rms(1.0),
        optax.add_noise(1.0, 0.55, jax.random.key(1)),
    ],
    ids=["whole_norm", "block_rms", "noise"],
)
def test_a_layout_does_not_change_what_a_complement_sees(transformation):
    """T sees the whole leaf, whether or not its layers are worked on in turn."""
    scales = jnp.asarray([1.0, 10.0])[:, None, None]
    gradient = {"w": scales * jax.random.normal(jax.random.key(0), (2, M, N))}
    params = {"w": jnp.zeros((2, M, N))}

    def run(**options):
        tx = lro.chain(
            lro.project(lro.svd(R), layer_axis=0, **options),
            optax.scale_by_adam(),
            lro.complement(transformation),
            lro.backproject(),
        )
        return jax.jit(tx.update)(gradient, tx.init(params), params)[0]["w"]

    plain, in_turn = run(), run(param_shardings={"w": P(None, "x")})
    np.testing.assert_allclose(in_turn, plain, rtol=0, atol=1e-5 * jnp.abs(plain).max())
