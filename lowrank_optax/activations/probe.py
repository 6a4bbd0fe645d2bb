"""How far the gradients of a block are off if a tagged value is kept in few bits."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_optax.activations import _interpret
from lowrank_optax.activations.actions import Action, Save
from lowrank_optax.activations.cost import is_inexact, replayed

# role -> relative error of the gradient per relative error of the value: the larger of
# two probes of a LLaMA-like block, with and without outliers in its norms. A role that
# is not known is taken for the worst.
SENSITIVITY: Mapping[str, float] = {
    "residual": 0.5,
    "norm": 2.0,
    "query_key": 4.7,
    "value": 0.9,
    "feed_forward": 1.1,
    "activation": 1.1,
}


def probe_errors(
    block: Callable,
    args: Sequence[Any],
    actions: Sequence[Action],
    *,
    probes: int = 1,
    seed: int = 0,
) -> dict[tuple[str, Action], float]:
    r"""Measures the relative gradient error of every action on every tag.

    With the gradient ``g`` of ``<y, r>`` with respect to all floating point arguments,
    for a random cotangent ``r`` of the block's result ``y``, and ``g'`` the same where
    the backward pass reads one tag's values after a round trip::

        error = |g' - g| / |g|

    One tag at a time: errors of several tags add about in squares. All of it runs in
    one compiled program, into which the values go as arguments.

    Args:
      block: ``block(params, x, *rest)`` with tags.
      args: real data: the parameters of a layer and what goes into it.
      actions: what to try. Those without rounding have the error 0.
      probes: how many cotangents to average over.
      seed: of the cotangents.

    Returns:
      (tag, action) -> error.

    Raises:
      ValueError: if the exact gradient is not finite, or is zero.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from jax.ad_checkpoint import checkpoint_name
      >>> from lowrank_optax import activations
      >>> def layer(w, x):
      ...     return jnp.tanh(checkpoint_name(x @ w, "hidden"))
      >>> args = jnp.eye(64), jnp.linspace(-1, 1, 8 * 64).reshape(8, 64)
      >>> actions = [activations.parse_action(a) for a in ("save", "int8", "int4")]
      >>> errors = activations.probe_errors(layer, args, actions)
      >>> [errors["hidden", action] < 0.2 for action in actions]
      [True, True, True]
      >>> errors["hidden", actions[1]] < errors["hidden", actions[2]] / 10
      True
    """
    program, flat = _interpret.trace(block, args, {})
    tagged = [value for value in program.tagged if not value.inside]
    at = {(value.tag, value.index): i for i, value in enumerate(tagged)}
    values: list[Any] = [None] * len(tagged)

    def collect(flat: Any) -> tuple[Any, Any]:
        found = list(values)

        def record(tag: str, index: int, value: Any) -> Any:
            if (tag, index) in at:
                found[at[tag, index]] = value
            return value

        out = program(flat, record)
        return found, [y for y in out if is_inexact(y)]

    stored, outs = jax.jit(collect)(flat)
    gradients = jax.jit(replayed(program, flat, tagged))
    squares: dict[tuple[str, Action], float] = {}
    for probe in range(probes):
        keys = jax.random.split(jax.random.key(seed + probe), max(len(outs), 1))
        cotangents = [
            jax.random.normal(key, y.shape, y.dtype)
            for key, y in zip(keys, outs, strict=False)
        ]
        exact = gradients(flat, stored, cotangents)
        _check(exact)
        for tag in dict.fromkeys(value.tag for value in tagged):
            for action in actions:
                rounded = _rounded(stored, tagged, tag, action)
                if rounded is None:
                    squares[tag, action] = 0.0
                    continue
                found = _distance(gradients(flat, rounded, cotangents), exact)
                before = squares.get((tag, action), 0.0)
                squares[tag, action] = before + float(found) ** 2 / probes
    return {key: value**0.5 for key, value in squares.items()}


def _rounded(stored: Any, tagged: Any, tag: str, action: Action) -> Any:
    """Returns the values with one tag's after a round trip, None if that is exact."""
    mine = [i for i, value in enumerate(tagged) if value.tag == tag]
    if all(is_exact(action, tagged[i].shape, tagged[i].dtype) for i in mine):
        return None
    found = list(stored)
    for i in mine:
        found[i] = _round_trip(action, stored[i])
    return found


def is_exact(action: Action, shape: Any, dtype: Any) -> bool:
    """Whether an action keeps a value as it is, or computes it again."""
    if isinstance(action, Save):
        return True
    return action.nbytes(shape, dtype) >= Save().nbytes(shape, dtype)


@functools.partial(jax.jit, static_argnums=0)
def _round_trip(action: Action, x: Any) -> Any:
    return action.round_trip(x)


def _scale(tree: Any) -> Any:
    """Returns the largest magnitude: squares of what it divides do not overflow."""
    return functools.reduce(
        jnp.maximum, [jnp.max(jnp.abs(x)).astype(jnp.float32) for x in tree]
    )


@jax.jit
def _distance(found: Any, exact: Any) -> Any:
    scale = _scale(exact)

    def square(tree: Any) -> Any:
        return sum(jnp.sum(jnp.square(jnp.abs(x / scale))) for x in tree)

    def wide(tree: Any) -> Any:
        return [x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in tree]

    found, exact = wide(found), wide(exact)
    off = [a - b for a, b in zip(found, exact, strict=True)]
    return jnp.sqrt(square(off) / square(exact))


def _check(gradients: Any):
    scale = float(_scale(gradients)) if gradients else 0.0
    if not np.isfinite(scale) or scale == 0:
        raise ValueError(
            "Errors are probed with the gradient of the block at `example_args`, which "
            f"is {'zero' if scale == 0 else 'not finite'} there. Pass data with a "
            "usable gradient, or ShapeDtypeStructs for errors by role."
        )


@functools.cache
def error_of_role(role: str, action: Action, width: int) -> float:
    """Returns an error without data: the role's sensitivity times that of the format.

    The format's is the relative error of normally distributed numbers, 64 rows of
    ``width`` elements.
    """
    x = jax.random.normal(jax.random.key(0), (64, max(width, 1)), jnp.float32)
    relative = jnp.linalg.norm(_round_trip(action, x) - x) / jnp.linalg.norm(x)
    return SENSITIVITY.get(role, max(SENSITIVITY.values())) * float(relative)
