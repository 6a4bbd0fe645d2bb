"""Fira's cases: GaLore's, with the residual scaled and limited."""

import functools

import lowrank_optax as lro
from tests.golden.cases import Case
from tests.golden.galore import MOMENTS, PARAMS, adam_finals, bracket, learning_rate
from tests.golden.replay import Replay


def fira_adamw(case: Case) -> Replay:
    """Fira with AdamW, as released."""
    config = case.config
    b1, b2 = config["betas"]
    if not config["bias_correction"] or config["dtype"] != "float32":
        raise ValueError("Only bias-corrected float32 runs were recorded.")
    tx = lro.fira(
        learning_rate(config), b1=b1, b2=b2, eps=config["eps"], **bracket(case)
    )
    return Replay(tx, PARAMS, functools.partial(adam_finals, case), MOMENTS)
