"""Dion's case: recorded with Householder's QR, from Q that are handed over."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

import lowrank_optax as lro
from tests.golden.cases import Case
from tests.golden.replay import Replay, within_travel

_ADAM = "adamw b=(0.9,0.95), same lr and decay"


def dion(case: Case) -> Replay:
    """torch's weights (out, in)."""
    config = case.config
    rule = [config[k] for k in ("lr_scale", "bias", "weight_decay_order", "qr")]
    if rule != ["sqrt(rows/cols)", _ADAM, "before update", "householder"]:
        raise ValueError(f"Another rule: {rule}")
    if (config["power_iters"], config["transposed"]) != (1, "wide only"):
        raise ValueError("More power steps, or another side.")
    config.get("rank_multiple_of"), config.get("ranks")  # what the shapes of Q say
    numbers = lro.MatrixDimensionNumbers(1, 0)
    tx = lro.dion(
        config["learning_rate"],
        config["rank_fraction"],
        decay=config["mu"],
        weight_decay=config["weight_decay"],
        b2=0.95,
        eps=config["eps"],
        weight_dimension_numbers={
            name: None if name == "bias" else numbers for name in case.names
        },
    )

    def init(params: Any) -> Any:
        decay_behind, *rest = tx.init(params)
        inner: Any = decay_behind.inner_state
        directions = {
            name: jnp.asarray(case.arrays[f"q0_{name}"])
            if f"q0_{name}" in case.arrays
            else q
            for name, q in inner.directions.items()
        }
        inner = inner._replace(directions=directions)
        return (decay_behind._replace(inner_state=inner), *rest)

    close = within_travel(1e-4)  # 6.5e-6 was measured of another program
    replayed = optax.GradientTransformationExtraArgs(init, tx.update)
    return Replay(replayed, close, lambda state: {}, close)


def finals(case: Case, state: Any) -> dict[str, jax.Array]:
    """The recorded last M and Q by name, out of a state."""
    inner = state[0].inner_state
    fields = {"m": inner.mu, "q": inner.directions}
    return {
        f"{recorded}_final_{name}": tree[name]
        for recorded, tree in fields.items()
        for name in case.names
        if name != "bias"
    }
