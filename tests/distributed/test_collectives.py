"""What a compiled step sends between devices, read from the program itself."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import lowrank_optax as lro
from tests.distributed.cases import (
    PARAMS,
    PROJECTORS,
    RANK,
    Sharded,
    auto_mesh,
    explicit_mesh,
    named,
    sharded,
)

SIZES = sorted(
    math.prod(leaf.shape[-2:]) for leaf in jax.tree.leaves(PARAMS) if leaf.ndim > 1
)


def test_a_loop_multiplies_and_a_branch_is_told_apart():
    mesh = Mesh(np.array(jax.devices()), ("x",))

    def program(flag, xs):
        def body(carry, x):
            return carry + jax.lax.psum(x, "x"), None

        once, _ = jax.lax.scan(body, jnp.zeros(16), xs)
        gather = lambda: jax.lax.all_gather(xs[0], "x").sum()  # noqa: E731
        return once + jax.lax.cond(flag, gather, lambda: jnp.float32(0))

    mapped = jax.shard_map(
        program, mesh=mesh, in_specs=(P(), P(None, "x")), out_specs=P(), check_vma=False
    )
    xs = jax.ShapeDtypeStruct((3, 128), jnp.float32, sharding=NamedSharding(mesh, P()))
    hlo = jax.jit(mapped).lower(jnp.bool_(True), xs).compile().as_text()
    found = {item.op: item for item in lro.collectives(hlo)}
    reduce, gather = found["all-reduce"], found["all-gather"]
    assert len(found) == 2
    assert (reduce.times, reduce.bytes, reduce.conditional) == (3, 64, False)
    assert reduce.exact and reduce.total == 192
    assert (gather.times, gather.conditional) == (1, True)
    assert gather.bytes == 8 * 64
    # A dtype is as wide as the first number in its name says.
    for name, share in {"f8e4m3fn": 4, "bf16": 2, "s4": 8}.items():
        found = lro.collectives(hlo.replace("f32[", f"{name}["))
        assert {item.bytes for item in found} == {64 // share, 8 * 64 // share}


@pytest.mark.parametrize("mesh", ["auto", "explicit"])
def test_a_refresh_by_power_steps_gathers_no_gradient(mesh):
    found = sharded(mesh, "power", "left", "fsdp").collectives()
    assert any(item.conditional and item.op == "all-reduce" for item in found)
    for item in found:
        if item.op in ("all-gather", "all-to-all"):
            # Directions [layers, r, n] are gathered for the lift; a gradient has m n.
            largest = max(math.prod(shape) for shape in item.shapes)
            assert largest <= 2 * RANK * 64 < PARAMS["dense"].size


def test_dion_sends_thin_matrices_alone():
    """Two products of a side with r columns, Q, and Gram matrices, per matrix."""
    mesh = auto_mesh()
    params = {"dense": jnp.ones((64, 32))}
    with jax.set_mesh(mesh):
        tx = lro.dion(1e-2, RANK)
        run = Sharded(tx, params, named(mesh, {"dense": P("model", "data")}))
        found = run.collectives()
    sent = [math.prod(s) * item.times for item in found for s in item.shapes]
    # On a device M Q has 32 rows and M^T P 8, as Q, which is cut over "model" as well
    # and gathered thrice; three Gram matrices; norms five times, and the largest entry.
    assert sum(sent) <= (32 + 4 * 8) * RANK + 3 * RANK**2 + 5 * RANK + 2
    gathered = [item for item in found if item.op in ("all-gather", "all-to-all")]
    assert all(math.prod(s) <= 8 * RANK for item in gathered for s in item.shapes)


# Sharded on the rows, which are the short side: "short" projects them.
WIDE = {"dense": jnp.ones((32, 64)), "layers": {"up": jnp.ones((2, 32, 64))}}
ROWS = {"dense": P("data"), "layers": {"up": P(None, "data")}}


def every_step(mesh, side, declare):
    """Returns the size of the projected axes, and what every step sends."""
    shardings = named(mesh, ROWS)
    bracket = lro.project(
        PROJECTORS["svd"],
        side=side,
        layer_axis=0,
        param_shardings=shardings if declare else None,
    )
    tx = lro.chain(bracket, optax.scale_by_adam(), lro.backproject())
    with jax.set_mesh(mesh):
        run = Sharded(tx, WIDE, shardings)
        found = run.collectives()
    rows_of_bases = {leaf.shape[-2] for leaf in jax.tree.leaves(run.state.basis)}
    return rows_of_bases, [item.op for item in found if not item.conditional]


def test_projecting_the_sharded_axis_costs_an_all_reduce():
    projected, ops = every_step(auto_mesh(), "short", declare=False)
    assert projected == {32}
    assert "all-reduce" in ops or "reduce-scatter" in ops


def test_side_auto_projects_the_unsharded_axis_without_an_all_reduce():
    projected, ops = every_step(auto_mesh(), "auto", declare=True)
    assert projected == {64}
    assert "all-reduce" not in ops and "reduce-scatter" not in ops


def test_side_auto_reads_the_sharding_from_an_explicit_mesh():
    projected, ops = every_step(explicit_mesh(), "auto", declare=False)
    assert projected == {64}
    assert "all-reduce" not in ops and "reduce-scatter" not in ops


def test_the_report_gives_both_sides_costs():
    """What is reduced per step is what the compiled step reduces."""
    mesh = auto_mesh()
    shardings = named(mesh, ROWS)
    for side, reduced in (("left", 4 * RANK * 64), ("right", 0)):
        bracket = lro.project(
            PROJECTORS["svd"], side=side, layer_axis=0, param_shardings=shardings
        )
        tx = lro.chain(bracket, optax.scale_by_adam(), lro.backproject())
        report = lro.selection_report(tx, WIDE)
        dense, up = (row.costs for row in report.rows)
        assert dense["left"].reduced_bytes == 4 * RANK * 64
        assert up["left"].reduced_bytes == 2 * 4 * RANK * 64
        assert dense["right"].reduced_bytes == up["right"].reduced_bytes == 0
        # Basis [m, r] and two moments [r, n], in float32; counter and pending flag.
        assert dense["left"].state_bytes == 4 * RANK * (32 + 2 * 64) + 5
        assert dense["right"].state_bytes == 4 * RANK * (64 + 2 * 32) + 5
        assert report.rows[0].low_bytes == dense[side].state_bytes
        assert "bytes reduced per step" in str(report)
        assert "1,024 | 0" in str(report)
        run = Sharded(tx, WIDE, shardings)
        steady = [
            item.total
            for item in run.collectives()
            if not item.conditional and item.op in ("all-reduce", "reduce-scatter")
        ]
        # A parameter is projected as well, for inner optimizers that read it; Adam
        # does not, so that sum is left out.
        assert sum(steady) == 3 * reduced
    plain = lro.selection_report(lro.galore(1e-3, rank=RANK, layer_axis=0), WIDE)
    assert not any(row.costs for row in plain.rows)
    assert "reduced" not in str(plain)
