"""Alice's case: another library's code, as the authors' is not to be had."""

from typing import Any

import jax
import numpy as np
import optax

import lowrank_optax as lro
from tests.golden.cases import Case
from tests.golden.replay import Replay, within


def alice(case: Case) -> Replay:
    """Recorded bases, moments that nothing turns, nothing corrected for its start."""
    config = case.config
    rule = config["refresh_rule"], config["side"]
    if rule != (
        "1-based step 1, K, 2K, ...",
        "left always (U is m x r), no transposition",
    ):
        raise ValueError(f"Another rule: {rule}")
    if config["bias_correction"] or config["weight_decay"]:
        raise ValueError("Bias correction or decay was not recorded.")
    for unused in ("leading", "b3", "update_interval"):  # what made the bases
        config.get(unused)
    factor = config["scale"] * config["compensation_scale"]
    bracket = lro.chain(
        lro.project(
            lro.given(config["rank"], 1, bases=bases(case)),
            side="left",
            select=".",
            transport=lro.keep_moments(),
        ),
        lro.scale_by_raw_adam(config["b1"], config["b2"], config["eps"]),
        lro.recover_scale(
            growth_limit=config["limiter"],
            entry_limit=None,
            energy_decay=config["b1"],
            factor=factor,
            debias=False,
        ),
        lro.backproject(config["scale"]),
    )
    tx = optax.chain(bracket, optax.scale_by_learning_rate(config["learning_rate"]))
    # 1.2e-7 was measured of another program.
    close = within(1e-5)
    return Replay(tx, close, lambda state: {}, close)


def bases(case: Case) -> dict[str, np.ndarray]:
    """The basis of every step: a gap of 1 puts each refresh where it was."""
    found = {}
    for name in case.names:
        steps = case.arrays[f"proj_step_{name}"]
        which = np.searchsorted(steps, np.arange(1, case.config["steps"] + 1), "right")
        found[name] = case.arrays[f"proj_{name}"][which - 1]
    return found


def energies(case: Case, state: Any) -> dict[str, jax.Array]:
    """The recorded last energies, out of a state; there, floored at 1e-8."""
    kept = state[0].recovery_state
    return {f"p_final_{name}": kept[name].energy[0] for name in case.names}
