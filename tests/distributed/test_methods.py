"""Bases that move, are drawn, chosen or learned: sharded or not, the same updates."""

import functools

import jax
import optax
import pytest

import lowrank_optax as lro
from tests.distributed.cases import (
    GAP,
    LAYOUTS,
    MESHES,
    PARAMS,
    RANK,
    Sharded,
    assert_close,
    gradients,
    named,
    updates_on_one_device,
)

# As `cases.galore`: eps bounds what Adam makes of a projection's rounding.
COMMON = {"rank": RANK, "layer_axis": 0, "scale": 1.0, "eps": 0.1, "side": "left"}
AT_GAPS = {**COMMON, "update_proj_gap": GAP}
METHODS = {
    # Adam on the basis would divide small slopes by their own rounding.
    "osd": functools.partial(
        lro.online_subspace_descent,
        1.0,
        basis_optimizer=optax.sgd(0.1),
        cold_start="svd",
        **COMMON,
    ),
    "apollo": functools.partial(lro.apollo, 1e-2, **AT_GAPS),
    "coap": functools.partial(
        lro.coap, 1.0, transport=lro.rotate_moments(form="root"), **AT_GAPS
    ),
    "dct": functools.partial(lro.dct_adamw, 1.0, error_feedback=True, **AT_GAPS),
    "matched": functools.partial(
        lro.galore,
        1e-2,
        match="adamw",
        **{k: AT_GAPS[k] for k in AT_GAPS if k != "scale"},
    ),
    # Whole matrices: polar factors, codes that are rounded at random, vectors.
    "muon": functools.partial(lro.muon, 1e-2, layer_axis=0),
    "muon_4bit": functools.partial(lro.muon, 1e-5, bits=4, min_size=0, layer_axis=0),
    "dion": functools.partial(lro.dion, 1e-2, RANK, layer_axis=0, eps=0.1),
    "foam": functools.partial(lro.foam, 1.0, eps=0.1, layer_axis=0),
    "racs": functools.partial(lro.racs, 1e-2, layer_axis=0),
    "lora_pre": functools.partial(lro.lora_pre, 1e-2, 2, eps=0.1, layer_axis=0),
    "alice": functools.partial(
        lro.alice, 1e-2, transport=lro.keep_moments(), **AT_GAPS
    ),
    # A sign would turn rounding into a step.
    "frugal": functools.partial(
        lro.frugal, 1e-2, state_free=optax.trace(0.9), **AT_GAPS
    ),
}


@functools.cache
def reference(name):
    return updates_on_one_device(METHODS[name](), PARAMS)[0]


SLOW = ("alice", "muon")


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in METHODS],
)
@pytest.mark.parametrize("mesh", MESHES)
def test_updates_equal_those_of_one_device(mesh, name):
    mesh = MESHES[mesh]()
    with jax.set_mesh(mesh):
        run = Sharded(METHODS[name](), PARAMS, named(mesh, LAYOUTS["both"]))
        updates, state = run.updates(gradients(PARAMS))
    assert_close(updates, reference(name))
    assert jax.tree.map(lambda x: x.sharding, state) == run.state_shardings


def test_the_basis_optimizer_is_sharded_like_its_basis():
    mesh = MESHES["auto"]()
    tx = lro.online_subspace_descent(1e-2, **COMMON)
    specs = lro.state_shardings(tx, PARAMS, named(mesh, LAYOUTS["both"])).basis
    for stored in (specs["dense"], specs["layers"]["up"]):
        adam = stored.optimizer[0]
        assert adam.mu == adam.nu == stored.vectors
        assert any(adam.mu.spec)
        assert adam.count.is_fully_replicated
