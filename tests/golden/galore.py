"""GaLore's cases: from the recorded hyperparameters to this library's arguments."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lowrank_optax as lro
from tests.golden.cases import Case, Config
from tests.golden.replay import Replay, within, within_share

_SIDES = {
    "std": "short",
    "reverse_std": "long",
    "left": "left",
    "right": "right",
    "full": "both",
}
_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}

# 25 steps of float32, in another order of summation: at most 4e-6 was measured.
PARAMS = within(1e-5)
# As a share of a moment's norm; at most 1.4e-7 was measured.
MOMENTS = within_share(1e-5)

# In bfloat16: 2 % of the distance that the parameter travels in the whole run, in the
# norm of a matrix. Entry by entry it could not be: a weight of size 0.5 is stored in
# steps of 0.002 to 0.004, which alone is more than 2 % of a travel of 0.1.
_PARAMS_BF16 = within_share(0.02)
# The recorded code rounds nu after decaying and again after adding, ours once.
_MOMENTS_BF16 = within_share(0.05)


def galore_adamw(case: Case) -> Replay:
    """GaLore with AdamW, as released."""
    config = case.config
    (b1, b2), eps = config["betas"], config["eps"]
    dtype = _DTYPES[config["dtype"]]
    adam = {"b1": b1, "b2": b2, "eps": eps}
    if not config["bias_correction"]:
        adam = {"base_optimizer": lro.scale_by_raw_adam(b1, b2, eps)}
    options = bracket(case)
    options["projector"] = dataclasses.replace(options["projector"], basis_dtype=dtype)
    tx = lro.galore(
        learning_rate(config), mu_dtype=dtype, nu_dtype=dtype, **adam, **options
    )
    half = dtype == jnp.bfloat16
    return Replay(
        tx,
        _PARAMS_BF16 if half else PARAMS,
        functools.partial(adam_finals, case),
        _MOMENTS_BF16 if half else MOMENTS,
        dtype,
        dtype,
    )


def galore_adafactor(case: Case) -> Replay:
    """GaLore with Adafactor, as released: computed in float32 whatever the weights."""
    config = case.config
    eps, min_scale = config["eps"]
    momentum = config["beta1"]
    tx = lro.galore_adafactor(
        _adafactor_rate(config),
        decay_rate=-config["decay_rate"],
        eps=eps,
        clipping_threshold=config["clip_threshold"],
        momentum=momentum,
        multiply_by_parameter_scale=config["scale_parameter"],
        **({"min_parameter_scale": min_scale} if config["scale_parameter"] else {}),
        **bracket(case),
    )
    dtype = _DTYPES[config["dtype"]]
    return Replay(
        tx,
        _PARAMS_BF16 if dtype == jnp.bfloat16 else PARAMS,
        functools.partial(_adafactor_finals, case, momentum is not None),
        MOMENTS,
        dtype,
    )


def bracket(case: Case) -> dict[str, Any]:
    """The arguments that both methods share."""
    config = case.config
    projected = set(config["projected_params"])
    if projected | set(config["unprojected_params"]) != set(case.names):
        raise ValueError(
            f"The config and the arrays name other parameters: {case.names}"
        )
    gap, steps = config["update_proj_gap"], config["steps"]
    refreshes = case.arrays["refresh_steps"].tolist()
    if refreshes != list(range(0, steps, gap)):
        raise ValueError(f"Refreshed at {refreshes}, which is not every {gap} steps.")
    return {
        "projector": lro.given(config["rank"], gap, bases=_bases(case)),
        "scale": config["scale"],
        "side": _SIDES[config["proj_type"]],
        "select": lambda path, leaf: path in projected,
        "clip_rank": True,
        # torch's weights are (out, in).
        "weight_dimension_numbers": lro.MatrixDimensionNumbers(1, 0),
        "weight_decay": config["weight_decay"] or None,
        "conventions": "authors",
    }


def on_the_right(proj_type: str, shape: tuple[int, ...]) -> bool:
    """Whether the recorded one-sided basis has the weight's columns, [r, n]."""
    rows, columns = shape
    tall = rows >= columns
    return {"std": tall, "reverse_std": not tall, "left": False, "right": True}[
        proj_type
    ]


def _bases(case: Case) -> dict[str, Any]:
    """The recorded bases, standing upright: [refreshes, m, r]."""
    kind, bases = case.config["proj_type"], {}
    for name in case.config["projected_params"]:
        if kind == "full":
            left, right = case.arrays[f"projL_{name}"], case.arrays[f"projR_{name}"]
            bases[name] = left, np.swapaxes(right, -1, -2)
            continue
        basis = case.arrays[f"proj_{name}"]
        turned = on_the_right(kind, case.params(name).shape[1:])
        bases[name] = np.swapaxes(basis, -1, -2) if turned else basis
    return bases


def learning_rate(config: Config) -> optax.ScalarOrSchedule:
    """The recorded schedule, where there is one, goes before the number."""
    rate, recorded = config["learning_rate"], config.get("lr_schedule")
    if recorded is None:
        return rate
    rates = jnp.asarray(recorded, jnp.float32)
    return lambda count: rates[count]


def _adafactor_rate(config: Config) -> optax.ScalarOrSchedule | None:
    """Adafactor's own steps where the learning rate is relative."""
    rate, warm = learning_rate(config), config.get("warmup_init", False)
    if not config["relative_step"]:
        return rate
    if not warm:
        return None

    def relative(count):
        k = count.astype(jnp.float32) + 1.0
        return jnp.minimum(1e-6 * k, 1.0 / jnp.sqrt(k))

    return relative


def _turned(case: Case) -> set[str]:
    """Parameters whose low-rank matrices were recorded as the transpose of ours."""
    kind = case.config["proj_type"]
    names = case.config["projected_params"] if kind != "full" else ()
    return {n for n in names if on_the_right(kind, case.params(n).shape[1:])}


def adam_finals(case: Case, state: Any) -> dict[str, jax.Array]:
    turned, finals = _turned(case), {}
    for field, recorded in (("mu", "exp_avg"), ("nu", "exp_avg_sq")):
        moments: Any = optax.tree_utils.tree_get(state, field)
        for name, moment in moments.items():
            finals[f"{recorded}_{name}"] = moment.T if name in turned else moment
    return finals


def _adafactor_finals(case: Case, momentum: bool, state: Any) -> dict[str, jax.Array]:
    turned, finals = _turned(case), {}
    factors: Any = [optax.tree_utils.tree_get(state, key) for key in ("row", "col")]
    for name in case.names:
        row, col = (factor[name] for factor in factors)
        if row.ndim != 1 or not isinstance(col, jax.Array):
            finals[f"exp_avg_sq_{name}"] = row
            continue
        row, col = (col, row) if name in turned else (row, col)
        finals[f"exp_avg_sq_row_{name}"], finals[f"exp_avg_sq_col_{name}"] = row, col
    if momentum:
        # Averages of what is added to the weights here, of what is taken off there.
        averages: Any = optax.tree_utils.tree_get(state, "ema")
        for name, average in averages.items():
            finals[f"exp_avg_{name}"] = -(average.T if name in turned else average)
    return finals
