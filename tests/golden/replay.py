"""Runs a transformation over recorded gradients and compares what comes out."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tests.golden.cases import Case

# (got, recorded, reference) -> the error, in units of what is tolerated. The reference
# is how far the parameter travelled in the whole run, or the moment itself.
Measure = Callable[[np.ndarray, np.ndarray, np.ndarray], float]


def within(atol: float) -> Measure:
    """Largest difference of an entry."""
    return lambda got, want, reference: float(np.abs(got - want).max() / atol)


def within_share(share: float) -> Measure:
    """Norm of the difference, as a share of the reference's (Frobenius norms)."""

    def measure(got, want, reference):
        error = np.linalg.norm(got - want)
        return float(error / (share * np.linalg.norm(reference)))

    return measure


def within_travel(share: float) -> Measure:
    """Largest difference of an entry, as a share of the reference's largest entry."""

    def measure(got, want, reference):
        return float(np.abs(got - want).max() / (share * np.abs(reference).max()))

    return measure


@dataclasses.dataclass(frozen=True)
class Replay:
    """How a case is run again and judged.

    Attributes:
      tx: the transformation under test.
      params: tolerance on the parameters, at every recorded step.
      finals: from the last state, the arrays to hold against `final_*`.
      moments: tolerance on those.
      dtype: dtype of the parameters.
      gradient_dtype: dtype the gradients are handed over in.
      x64: whether float64 is enabled for the run.
    """

    tx: optax.GradientTransformation
    params: Measure
    finals: Callable[[Any], Mapping[str, jax.Array]]
    moments: Measure
    dtype: Any = jnp.float32
    gradient_dtype: Any = jnp.float32
    x64: bool = False


def run(case: Case, replay: Replay) -> tuple[dict[int, dict[str, Any]], Any]:
    """Returns the parameters after every recorded step, and the last state."""
    with jax.enable_x64(replay.x64):
        return _run(case, replay)


def _run(case: Case, replay: Replay) -> tuple[dict[int, dict[str, Any]], Any]:
    params = {
        name: jnp.asarray(case.params(name)[0], replay.dtype) for name in case.names
    }
    state = replay.tx.init(params)

    @jax.jit
    def step(params, state, gradients):
        updates, state = replay.tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    trajectory = {0: params}
    for k in range(case.config["steps"]):
        # A recording in bfloat16 rounded its gradients first, whatever it did then.
        gradients = {
            name: jnp.asarray(case.gradients[name][k], replay.dtype).astype(
                replay.gradient_dtype
            )
            for name in case.names
        }
        params, state = step(params, state, gradients)
        if k + 1 in case.recorded_steps:
            trajectory[k + 1] = params
    return trajectory, state


def complaints(case: Case, replay: Replay) -> list[str]:
    """What differs from the recording by more than is tolerated."""
    trajectory, state = run(case, replay)
    found = []
    for name in case.names:
        recorded = case.params(name)
        for k, want in zip(case.recorded_steps, recorded, strict=True):
            got = np.asarray(trajectory[k][name], np.float32)
            error = replay.params(got, want, recorded[-1] - recorded[0])
            if not error <= 1.0:
                found.append(f"{name} after step {k}: {error:.2f} of the tolerance")
    with jax.enable_x64(replay.x64):
        finals = {f"final_{key}": x for key, x in replay.finals(state).items()}
    recorded = {key: x for key, x in case.arrays.items() if key.startswith("final_")}
    if set(recorded) != set(finals):
        raise ValueError(f"Recorded {sorted(recorded)}, replayed {sorted(finals)}.")
    for key, want in recorded.items():
        got = np.asarray(finals[key], np.float32)
        assert got.shape == want.shape, (key, got.shape, want.shape)
        if not (error := replay.moments(got, want, want)) <= 1.0:
            found.append(f"{key}: {error:.2f} of the tolerance")
    return found
