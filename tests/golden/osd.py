"""Online Subspace Descent's cases, from the recorded first basis on."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import optax

import lowrank_optax as lro
from lowrank_optax.linalg.bases import leading_singular_vectors
from tests.golden.cases import Case, Config
from tests.golden.replay import Replay, within_share, within_travel

# The basis moves at every step by what rounding has left of the one before: 1e-3 of
# the travel, and where Adafactor moves it in large steps (1/10 of its size), 2e-2.
_TOLERANCE = 1e-3
_LOOSE = 2e-2


def online_subspace_descent(case: Case) -> Replay:
    """Online Subspace Descent as released, for all its pairs of optimizers."""
    config = case.config
    config.get("f32_vs_f64_max_abs_dev_and_travel")
    if not config["proj_type"].startswith("continuous"):
        raise ValueError("Only moving bases were recorded.")
    rate = learning_rate(case)
    optimizer, basis_rate = _basis_optimizer(config, rate)
    projector = started(
        config["rank"],
        basis_optimizer=optimizer,
        basis_learning_rate=basis_rate,
        first=_first_bases(case),
    )
    options: dict[str, Any] = {
        "projector": projector,
        "scale": config["scale"],
        "select": lambda path, leaf: leaf.ndim == 2,
        # torch's weights are (out, in).
        "weight_dimension_numbers": lro.MatrixDimensionNumbers(1, 0),
        "conventions": "authors",
    }
    decay = config["weight_decay"] or None
    inner, hparams = config["inner"], config["inner_hparams"]
    if inner == "adafactor":
        tx = lro.scale_by_online_subspace_descent(
            base_optimizer=adafactor(hparams, rate), **options
        )
        tx = tx if decay is None else optax.chain(tx, lro.decay_before(rate, decay))
    else:
        options |= _INNERS[inner](hparams)
        tx = lro.online_subspace_descent(rate, weight_decay=decay, **options)
    fast = config["update_proj_gap"] == 10
    loose = fast and config["proj_optimizer"]["name"] == "adafactor"
    share = _LOOSE if loose else _TOLERANCE
    return Replay(tx, within_travel(share), lambda state: {}, within_share(share))


@dataclasses.dataclass(frozen=True, eq=False)
class started(lro.online_pca):
    """Starts from the recorded first basis: an SVD's rounding would be magnified."""

    first: Mapping[str, Any] = dataclasses.field(default_factory=dict, kw_only=True)

    def for_leaf(self, path):
        return dataclasses.replace(self, first={"": self.first[path]})

    def find(self, matrix, gradient, at):
        best = leading_singular_vectors(gradient.array, matrix.rank)
        first = jnp.asarray(self.first[""], gradient.dtype)
        # It is the SVD's: the same span, to 1e-4 of a vector.
        same = jnp.abs(jnp.abs(jnp.sum(best * first, 0)) - 1).max() < 1e-4
        return jnp.where(same, first, jnp.nan)

    def align(self, old, new):
        return new


def _first_bases(case: Case) -> dict[str, Any]:
    """The bases after the first step, which does not move them, standing upright."""
    first = {}
    for name in case.names:
        if (bases := case.arrays.get(f"projafter_{name}")) is not None:
            rows, columns = case.params(name).shape[1:]
            first[name] = bases[0].T if rows >= columns else bases[0]
    return first


def learning_rate(case: Case) -> optax.ScalarOrSchedule:
    """The recorded schedule, where there is one, goes before the number."""
    rate, recorded = case.config["learning_rate"], case.arrays.get("learning_rates")
    case.config.get("schedule")
    if recorded is None:
        return rate
    rates = jnp.asarray(recorded, jnp.float32)
    return lambda count: rates[count]


def _basis_optimizer(config: Config, rate: Any):
    """The basis' optimizer, and 1/gap times the schedule relative to its start."""
    recorded, gap = config["proj_optimizer"], config["update_proj_gap"]
    if recorded["lr"].replace("update_proj_gap", "gap").replace(" ", "") != (
        "1/gap*lr_t/lr_0"
    ):
        raise ValueError(f"Another learning rate of the basis: {recorded['lr']}")
    peak = config["learning_rate"]
    basis_rate = (lambda count: rate(count) / peak / gap) if callable(rate) else 1 / gap
    return _OPTIMIZERS[recorded["name"]](recorded), basis_rate


def _adafactor_of_basis(recorded):
    eps, _ = recorded["eps"]
    return optax.chain(
        lro.scale_by_matrix_factored_rms(-recorded["decay_rate"], eps),
        lro.clip_by_matrix_rms(recorded["clip_threshold"]),
        optax.scale(-1.0),
    )


_OPTIMIZERS = {
    "adamw": lambda p: optax.adamw(
        1.0, p["b1"], p["b2"], p["eps"], weight_decay=p["weight_decay"]
    ),
    "lion": lambda p: optax.lion(1.0, p["b1"], p["b2"], weight_decay=p["weight_decay"]),
    "sgd": lambda p: optax.sgd(1.0),
    "adafactor": _adafactor_of_basis,
}


def adafactor(hparams, rate: Any) -> optax.GradientTransformation:
    """Adafactor with the learning rate inside, where its momentum wants it."""
    if hparams["relative_step"] or hparams["scale_parameter"]:
        raise ValueError("Only Adafactor with a learning rate was recorded.")
    momentum = hparams["beta1"]
    return optax.chain(
        lro.scale_by_matrix_factored_rms(-hparams["decay_rate"], hparams["eps"][0]),
        lro.clip_by_matrix_rms(hparams["clip_threshold"]),
        optax.scale_by_learning_rate(rate),
        optax.identity() if momentum is None else optax.ema(momentum, debias=False),
    )


def _adam(hparams) -> dict[str, Any]:
    if not hparams["bias_correction"]:
        raise ValueError("Only bias-corrected runs were recorded.")
    return {key: hparams[key] for key in ("b1", "b2", "eps")}


def _lion(hparams) -> dict[str, Any]:
    if not hparams["sign_after_project_back"]:
        raise ValueError("The released Lion takes the sign of the lifted direction.")
    return {
        "base_optimizer": lro.scale_by_lion_interpolation(hparams["b1"], hparams["b2"]),
        "after_lift": optax.scale_by_sign(),
    }


_INNERS = {"adamw": _adam, "lion": _lion}
