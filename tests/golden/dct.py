"""DCT-AdamW's cases: nothing injected, but slots where they are mixed without care."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lowrank_optax as lro
from tests.golden.cases import Case
from tests.golden.replay import Replay, within_share, within_travel

# What a config says of its recording alone.
_REMARKS = ("f32_vs_f64_max_abs_dev_and_travel",)

_KINDS = {"matmul": "dct3", "makhoul": "dct2"}
_REFRESHES = "step1==1 or step1 % gap == 0 with 1-based step"

# The released code ran in float32 and ends up to 3e-6 of the travel away from a
# float64 replay of the same case; this is what the recording's notes allow.
_ROUNDING = 1e-4


@dataclasses.dataclass(frozen=True, eq=False)
class released_phase(lro.dct):
    """Chooses columns at steps 0, gap - 1, 2 gap - 1, ... as the released code does.

    The bracket asks at every step; between its own steps this keeps the choice.
    """

    own_gap: int = 1

    def refresh(self, matrix, gradient, stored, at):
        """Chooses anew, or answers with what is stored."""
        now = (at.count == 0) | ((at.count + 1) % self.own_gap == 0)
        new = super().refresh(matrix, gradient, stored, at)
        return jnp.where(now, new, stored)


class Slots(NamedTuple):
    """The columns in the places they had, and those that our own rule chooses."""

    used: Any
    own: Any


@dataclasses.dataclass(frozen=True, eq=False)
class recorded_slots(released_phase):
    """Takes the recorded columns, in the order in which they stood."""

    indices: Any = None

    def for_leaf(self, path):
        return dataclasses.replace(self, indices={"": self.indices[path]})

    def start(self, matrix):
        """Stores both, for the tests to compare."""
        first = super().start(matrix)
        return Slots(first, first)

    def axes(self, matrix):
        """Says of both what is said of one."""
        return Slots(super().axes(matrix), super().axes(matrix))

    def refresh(self, matrix, gradient, stored, at):
        """Looks the step's indices up, and chooses beside them."""
        used = jnp.asarray(self.indices[""], jnp.int32)[at.count]
        return Slots(used, super().refresh(matrix, gradient, stored.own, at))

    def basis(self, matrix, stored: Any, at):
        """Computes the recorded columns."""
        return super().basis(matrix, stored.used, at)


def dct_adamw(case: Case) -> Replay:
    """DCT-AdamW as released, with moments gathered exactly."""
    finals = _errors if case.config["error_feedback"] else lambda state: {}
    return Replay(
        _transformation(case),
        within_travel(_ROUNDING),
        finals,
        within_share(_ROUNDING),
    )


def choices(case: Case) -> dict[str, np.ndarray]:
    """The columns that our own rule chooses in a replay, [steps, r] per matrix."""
    tx = _transformation(case)
    params: Any = {name: case.params(name)[0] for name in case.names}
    state, step = tx.init(params), jax.jit(tx.update)
    chosen = {name: [] for name in _indices(case)}
    for k in range(case.config["steps"]):
        gradients: Any = {name: case.gradients[name][k] for name in case.names}
        updates, state = step(gradients, state, params)
        params = optax.apply_updates(params, updates)
        basis: Any = optax.tree_utils.tree_get(state, "basis")
        for name, found in chosen.items():
            stored = basis[name]
            found.append(stored.own if isinstance(stored, Slots) else stored)
    return {name: np.stack(found) for name, found in chosen.items()}


def _transformation(case: Case) -> optax.GradientTransformationExtraArgs:
    config = case.config
    for key in _REMARKS:
        config.get(key)
    if config["weight_decay_order"] != "before update":
        raise ValueError("Only decay before the update was recorded.")
    if config["refresh_rule"] != _REFRESHES:
        raise ValueError(f"Unknown refresh rule {config['refresh_rule']!r}.")
    indices = _indices(case)
    return lro.dct_adamw(
        config["learning_rate"],
        error_feedback=config["error_feedback"],
        scale=config["scale"],
        b1=config["b1"],
        b2=config["b2"],
        eps=config["eps"],
        weight_decay=config["weight_decay"] or None,
        select=lambda path, leaf: path in indices,
        # torch's weights are (out, in).
        weight_dimension_numbers=lro.MatrixDimensionNumbers(1, 0),
        conventions="authors",
        **_choosing(case),
    )


def _choosing(case: Case) -> dict[str, Any]:
    """The arguments that say which columns, and what becomes of the moments."""
    config, gap = case.config, case.config["update_proj_gap"]
    how = {"kind": _KINDS[config["sim_type"]], "norm": config["ell_norm"]}
    if not config["rotate_subspace"]:
        slots = recorded_slots(
            config["rank"], own_gap=gap, indices=_indices(case), **how
        )
        return {"projector": slots, "transport": lro.keep_moments()}
    if gap == 1:
        return {"rank": config["rank"], "update_proj_gap": 1, **how}
    return {"projector": released_phase(config["rank"], own_gap=gap, **how)}


def _indices(case: Case) -> dict[str, np.ndarray]:
    arrays = case.arrays
    found = {name: arrays.get(f"indices_{name}") for name in case.names}
    return {name: indices for name, indices in found.items() if indices is not None}


def _errors(state: Any) -> dict[str, Any]:
    recovery: Any = optax.tree_utils.tree_get(state, "recovery_state")
    matrices = {n: e for n, e in recovery.items() if isinstance(e, jax.Array)}
    return {f"ef_{name}": error for name, error in matrices.items()}
