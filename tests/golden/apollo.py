"""APOLLO's and APOLLO-Mini's cases: the recorded draws injected, nothing else."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import optax

import lowrank_optax as lro
from tests.golden.cases import Case
from tests.golden.replay import Replay, within_travel

# What a config says of its recording alone; the draws themselves are injected.
_REMARKS = ("f32_vs_f64_max_abs_dev_and_travel", "seeds", "proj")

_GRANULARITY = {"channel": "column", "tensor": "tensor"}

# The released code ran in float32 and ends up to 3e-6 of the travel away from a
# float64 replay of the same case; this allows for what the recording's notes allow.
_ROUNDING = 5e-5

_NO_MOMENTS = within_travel(0.0)  # none were recorded


def apollo(case: Case) -> Replay:
    """APOLLO as released, of either granularity."""
    return Replay(
        lro.apollo(**_arguments(case)),
        within_travel(_ROUNDING),
        lambda state: {},
        _NO_MOMENTS,
    )


def limiter_norms(case: Case) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Yields each matrix' limiter norms of all steps: path, ours, the recorded ones."""
    arguments, factor = _arguments(case), 1.0
    if case.config["scale_front"]:
        factor = np.sqrt(case.config["scale"])  # applied before the recorded limiter
    tx = lro.apollo(**arguments)
    params: Any = {name: case.params(name)[0] for name in case.names}
    state, norms = tx.init(params), {name: [] for name in _bases(case)}
    step = jax.jit(tx.update)
    for k in range(case.config["steps"]):
        gradients: Any = {name: case.gradients[name][k] for name in case.names}
        _, state = step(gradients, state, params)
        recovery: Any = optax.tree_utils.tree_get(state, "recovery_state")
        for name, found in norms.items():
            found.append(float(recovery[name]))
    for name, found in norms.items():
        yield name, factor * np.array(found), case.arrays[f"limiter_norm_{name}"]


def _arguments(case: Case) -> dict[str, Any]:
    config = case.config
    for key in _REMARKS:
        config.get(key)
    if config["inner"] != "adamw" or config["effective_multiplier"] != "sqrt(scale)":
        raise ValueError("Only AdamW, and the square root of the scale, was recorded.")
    adam = dict(config["inner_hparams"])
    if not adam.pop("bias_correction"):
        raise ValueError("Only bias-corrected runs were recorded.")
    # A limiter compares norms, so `scale_front` may be True or False: both are one run.
    config.get("scale_front")
    rank, gap = config["rank"], config["update_proj_gap"]
    bases = _bases(case)
    return {
        "learning_rate": config["learning_rate"],
        "scale": config["scale"],
        "granularity": _GRANULARITY[config["scale_type"]],
        "growth_limit": config["norm_growth_limiter"],
        "projector": lro.given(rank, gap, bases=bases),
        "select": lambda path, leaf: path in bases,
        # torch's weights are (out, in).
        "weight_dimension_numbers": lro.MatrixDimensionNumbers(1, 0),
        "weight_decay": config["weight_decay"] or None,
        "conventions": "authors",
        **adam,
    }


def _bases(case: Case) -> dict[str, np.ndarray]:
    """The recorded draws, standing upright: [draws, m, r]."""
    bases, config = {}, case.config
    for name in case.names:
        if (basis := case.arrays.get(f"proj_{name}")) is None:
            continue
        steps = case.arrays[f"proj_step_{name}"].tolist()
        if steps != list(range(0, config["steps"], config["update_proj_gap"])):
            raise ValueError(f"{name} was redrawn at {steps}, not at every gap.")
        rows, columns = case.params(name).shape[1:]
        bases[name] = basis.swapaxes(-1, -2) if rows >= columns else basis
    return bases
