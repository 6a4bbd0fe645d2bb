"""FOAM's case, as released."""

from typing import Any

import jax
import optax

import lowrank_optax as lro
from tests.golden.cases import Case
from tests.golden.replay import Replay, within


def foam(case: Case) -> Replay:
    """torch's weights (out, in), folded along their last axis."""
    config = case.config
    rule = config["eps_place"], config["fold_axis"], config["weight_decay_order"]
    if rule != ("raw sqrt(v)", "last", "after update"):
        raise ValueError(f"Another rule: {rule}")
    tx = lro.foam(
        config["learning_rate"],
        config["level"],
        residual=config["residual_scale"],
        axis=-1,
        scale=config["scale"],
        b1=config["b1"],
        b2=config["b2"],
        eps=config["eps"],
        weight_decay=config["weight_decay"] or None,
        select=".",
        conventions="authors",
    )
    # 1.8e-7 was measured of another program.
    close = within(1e-5)
    return Replay(tx, close, lambda state: {}, close)


def foam_moments(case: Case, state: Any) -> dict[str, jax.Array]:
    """The recorded last moments, out of a state."""
    inner = optax.tree_utils.tree_get(state, "ScaleByFoldedAdamState")
    return {
        f"{recorded}_final_{name}": getattr(inner, field)[name]
        for recorded, field in (("m", "mu"), ("v", "nu"))
        for name in case.names
        if f"{recorded}_final_{name}" in case.arrays
    }
