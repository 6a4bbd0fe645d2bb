"""``probe_errors``: how far gradients are off if a tagged value is kept in few bits."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_optax.activations.checkpoint.actions import Action, is_exact
from lowrank_optax.activations.checkpoint.program import (
    Program,
    TaggedValue,
    is_inexact,
    trace,
)
from lowrank_optax.activations.checkpoint.replay import override
from lowrank_optax.activations.planner.costs import BlockCost

# role -> relative error of the gradient per relative error of the value: the larger of
# two probes of a LLaMA-like block, with and without outliers in its norms. An unknown
# role is taken for the worst.
SENSITIVITY: Mapping[str, float] = {
    "residual": 1.3,
    "norm": 9.5,
    "query_key": 5.7,
    "value": 1.5,
    "feed_forward": 1.1,
    "activation": 1.1,
}


def probe_errors(
    block: Callable,
    args: Sequence[Any],
    actions: Sequence[Action],
    *,
    cotangent: Any = None,
    n_layers: Any = 1,
    probes: int = 1,
    seed: int = 0,
) -> dict[tuple[str, Action], float]:
    r"""Measures the relative gradient error of every action on every tag.

    With ``(g, h)`` the gradients of ``<y, r>`` for the block's result ``y``, ``h`` that
    of its input and ``g`` all others, and ``(g', h')`` the same under a policy that
    keeps one tag alone, by the action::

        error^2 = |g' - g|^2 / |g|^2  +  (n_layers - 1) / 2 * |h' - h|^2 / |h|^2

    The second term is the error that reaches the layers below: each has half the others
    above it in the mean. One tag at a time: errors of several tags add about in
    squares. Values that are computed from the tag are computed again, from the rounded
    ones; a plan that keeps them as well rounds less. All of it runs in one compiled
    program, into which the values go as arguments.

    Args:
      block: ``block(params, x, *rest)`` with tags.
      args: real data: the parameters of a layer and its input.
      actions: those to try. Actions without rounding have the error 0.
      cotangent: ``r``, a tree like ``y``: that of the loss, at this layer. None draws
        it at random: quick to have, but a loss's own has more structure.
      n_layers: how many layers like this one the stack has.
      probes: how many random cotangents to average over.
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
    program, flat = trace(block, args, {})
    tagged = [value for value in program.tagged if not value.inside]
    tags = list(dict.fromkeys(value.tag for value in tagged))
    sizes = tuple(len(jax.tree.leaves(part)) for part in (args, args[0], args[1]))
    # The same block is probed again and again while it trains: compiled once.
    avals = [jax.typeof(x) for x in flat]
    types = [(a.shape, str(a.dtype), str(getattr(a, "sharding", ""))) for a in avals]
    made = _made(block, tuple(types), sizes)
    if not made:
        made += [_collector(program, tagged), _gradients(program, tagged, sizes)]
    collect, gradients = made
    stored, outs = collect(flat)
    given = None
    if cotangent is not None:
        given = [r for r in jax.tree.leaves(cotangent) if is_inexact(r)]
        probes = 1
    squares: dict[tuple[str, Action], float] = {}
    for probe in range(probes):
        cotangents = given or _drawn(outs, seed + probe)
        exact = _checked(gradients(flat, stored, -1, cotangents))
        for number, tag in enumerate(tags):
            for action in actions:
                rounded = _rounded(stored, tagged, tag, action)
                if rounded is None:
                    squares[tag, action] = 0.0
                    continue
                found = gradients(flat, rounded, number, cotangents)
                own, below = (
                    float(_distance(a, b)) ** 2 if b else 0.0
                    for a, b in zip(found, exact, strict=True)
                )
                # A block without parameters has an error at its input alone.
                square = own + (n_layers - 1) / 2 * below if exact[0] else below
                before = squares.get((tag, action), 0.0)
                squares[tag, action] = before + square / probes
    return {key: value**0.5 for key, value in squares.items()}


@functools.lru_cache(maxsize=8)
def _made(block: Callable, types: tuple, sizes: tuple) -> list[Any]:
    """Returns a list of its own for each block and each kind of its arguments."""
    # The caller fills the list: programs are made from a trace, which can be no key.
    del block, types, sizes
    return []


def _collector(program: Program, tagged: Sequence[TaggedValue]) -> Callable:
    """Returns a function of flat inputs: tagged values, floating point results."""
    keys = [(value.tag, value.index) for value in tagged]

    @jax.jit
    def collect(flat: Any) -> tuple[Any, Any]:
        found: dict[tuple[str, int], Any] = {}

        def record(tag: str, index: int, value: Any) -> Any:
            found[tag, index] = value
            return value

        out = program(flat, record)
        return [found[key] for key in keys], [y for y in out if is_inexact(y)]

    return collect


def _gradients(
    program: Program, tagged: Sequence[TaggedValue], sizes: tuple[int, ...]
) -> Callable:
    """Returns a function that gives the block's gradients, those of its input apart.

    Where the values of tag number ``which`` occur, the backward pass reads ``stored``.
    """
    at = {(value.tag, value.index): i for i, value in enumerate(tagged)}
    tags = list(dict.fromkeys(value.tag for value in tagged))
    leaves, of_params, of_input = sizes

    @jax.jit
    def gradients(flat: Any, stored: Any, which: Any, cotangents: Any) -> Any:
        # Arrays that the block closes over come before its arguments.
        first = len(flat) - leaves + of_params

        def replace(tag: str, index: int, value: Any) -> Any:
            if not is_inexact(value):
                return value
            # `which` is an argument, so that one program serves every tag.
            kept = jnp.where(which == tags.index(tag), stored[at[tag, index]], value)
            return override(value, kept)

        found = program.gradients(flat, replace, cotangents)
        below = found[first : first + of_input]
        del found[first : first + of_input]
        return jax.tree.leaves(found), jax.tree.leaves(below)  # without None

    return gradients


def _drawn(outs: Sequence[Any], seed: int) -> list[Any]:
    keys = jax.random.split(jax.random.key(seed), max(len(outs), 1))
    pairs = zip(keys, outs, strict=False)
    return [jax.random.normal(key, y.shape, y.dtype) for key, y in pairs]


def _rounded(stored: Any, tagged: Any, tag: str, action: Action) -> Any:
    """Returns the values with one tag's after a round trip, None if that is exact."""
    mine = [i for i, value in enumerate(tagged) if value.tag == tag]
    if all(is_exact(action, tagged[i].shape, tagged[i].dtype) for i in mine):
        return None
    found = list(stored)
    for i in mine:
        found[i] = _round_trip(action, stored[i])
    return found


@functools.partial(jax.jit, static_argnums=0)
def _round_trip(action: Action, x: Any) -> Any:
    return action.round_trip(x)


def _scale(tree: Any) -> Any:
    """Returns the largest magnitude: divided by it, no square overflows."""
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


def _checked(exact: Any) -> Any:
    """Returns the parts of the gradient, without one that is zero."""
    scales = [float(_scale(part)) if part else 0.0 for part in exact]
    largest = max(scales) if all(map(np.isfinite, scales)) else math.inf
    if not 0 < largest < math.inf:
        raise ValueError(
            "Errors are probed with the gradient of the block at `example_args`, which "
            f"is {'not finite' if largest else 'zero'} there. Pass data with a usable "
            "gradient, or ShapeDtypeStructs for errors by role."
        )
    return [
        part if scale > 0 else [] for part, scale in zip(exact, scales, strict=True)
    ]


@functools.cache
def error_of_role(role: str, action: Action, width: int) -> float:
    """Returns an error without data: the role's sensitivity times that of the format.

    The format's is the relative error of normally distributed numbers, 64 rows of
    ``width`` elements.
    """
    x = jax.random.normal(jax.random.key(0), (64, max(width, 1)), jnp.float32)
    relative = jnp.linalg.norm(_round_trip(action, x) - x) / jnp.linalg.norm(x)
    return SENSITIVITY.get(role, max(SENSITIVITY.values())) * float(relative)


Errors = Mapping[tuple[str, Action], float]


def errors_of(
    block: Callable,
    args: Sequence[Any],
    n_layers: int,
    costs: BlockCost,
    actions: Sequence[Action],
    roles: Mapping[str, str],
    given: Any,
    cotangent: Any,
) -> tuple[Errors, bool]:
    """Returns (tag, action) -> error, and whether the errors were measured.

    Errors that are given come first, then measured ones where there is data, then those
    by role.
    """
    pairs = [(tag, action) for tag in costs.tags for action in actions]
    if given is not None:
        for tag, action in pairs:
            if (tag.tag, action) not in given:
                raise ValueError(
                    f"`errors` has no entry for ('{tag.tag}', {action!r}). Measure "
                    "with probe_errors(block, example_args, actions)."
                )
        return given, True
    if not any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(args)):
        options = {"cotangent": cotangent, "n_layers": n_layers}
        return probe_errors(block, args, actions, **options), True
    found = {}
    for tag, action in pairs:
        exact = all(is_exact(action, v.shape, v.dtype) for v in tag.values)
        width = max(math.prod(v.shape[-1:]) for v in tag.values)
        role = roles.get(tag.tag, "")
        error = 0.0 if exact else error_of_role(role, action, width)
        found[tag.tag, action] = error
    return found, False
