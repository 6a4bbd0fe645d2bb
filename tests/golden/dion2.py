"""Dion2's case: chosen rows, their exact polar factor, and the factor of its own."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

import lowrank_optax as lro
from tests.golden.cases import Case
from tests.golden.replay import Replay, within_travel


def dion2(case: Case) -> Replay:
    """torch's weights (out, in); what was chosen was cast to bfloat16, as released."""
    config = case.config
    if config["lr_scale"] != "sqrt(rows/cols)" or not config["select"].startswith(
        "top-k l1 norm of rows if rows<=cols else columns; k=ceil(fraction*size)"
    ):
        raise ValueError(f"Another rule: {config['lr_scale']}, {config['select']}")
    if config["weight_decay_order"] != "before update":
        raise ValueError(f"Another order: {config['weight_decay_order']}")

    def rounded(updates: Any, params: Any = None) -> Any:
        del params
        return jax.tree.map(lambda u: u.astype(jnp.bfloat16).astype(u.dtype), updates)

    def scaled(updates: Any, params: Any = None) -> Any:
        del params
        return jax.tree.map(lambda u: u * (u.shape[0] / u.shape[1]) ** 0.5, updates)

    tx = optax.chain(
        lro.row_momentum(config["fraction"], config["ef_decay"], axis=-1),
        optax.stateless(rounded),
        lro.orthogonalize("svd"),
        optax.stateless(scaled),
        optax.add_decayed_weights(config["weight_decay"]),
        optax.scale_by_learning_rate(config["learning_rate"]),
    )
    # 1.1e-4 was measured of another program: a factor of what bfloat16 rounds.
    return Replay(tx, within_travel(1e-3), lambda state: {}, within_travel(1e-3))
