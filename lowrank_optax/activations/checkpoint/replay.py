"""``compressed_checkpoint``: an exact forward pass, and a backward pass from codes."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jaxtyping import Array

from lowrank_optax.activations.checkpoint.codecs import key_from
from lowrank_optax.activations.checkpoint.policy import Policy
from lowrank_optax.activations.checkpoint.program import (
    Program,
    TaggedValue,
    is_inexact,
    trace,
)

HOW_TO_TAG = (
    "Tag what is worth keeping inside the function: from jax.ad_checkpoint import "
    "checkpoint_name; q = checkpoint_name(q, 'q')."
)


def compressed_checkpoint(
    fn: Callable,
    policy: Any,
    *,
    group: Any = 128,
    stochastic: Any = False,
) -> Callable:
    r"""A function whose backward pass reads compressed activations.

    ``fn`` tags values with ``jax.ad_checkpoint.checkpoint_name``; the policy gives each
    tag an action: how its values are kept for the backward pass, if they are. A value
    without a tag, or with one that is not listed, is computed again from the kept
    values and from the arguments, as under ``jax.checkpoint``. With the values
    ``v_t`` of the tags, decoded ``v'_t``::

        forward     y = fn(x),  keep x and c_t = compress(v_t)
        backward    run fn again with v_t replaced by v'_t = decompress(c_t),
                    while dv'_t / dv_t = 1

    so *the forward value is exact*; only gradients see the rounding, and the operations
    that computed a kept value are not run again. "save" for every tag gives the
    gradients of ``jax.grad``, and an empty policy is full recomputation.

    It composes with ``jax.jit``, ``jax.grad`` (of any order, where the rounding counts
    as the identity), ``jax.vmap``, ``jax.lax.scan`` over stacked layers,
    ``jax.shard_map``, arrays on Auto and Explicit meshes, and closed-over tracers,
    through which gradients flow. Forward mode (``jax.jvp``) is not possible.

    The wrapper enters ``fn`` itself and the ``jax.jit`` functions it calls. Loops,
    branches, a ``jax.checkpoint`` inside (around attention, say) and functions with
    derivatives of their own stay as they are; a kept tag inside one of them is an
    error. Wrap the body of the loop instead.

    Args:
      fn: a function of pytrees of arrays. Random numbers come from keys among its
        arguments, so that both runs draw the same.
      policy: a ``Policy``, or a mapping of tags to actions: "save", "recompute",
        "int8", "int4", "int4+8" (8 outlier channels), "offload", or ``Action`` objects.
      group: elements per step, for actions given as strings.
      stochastic: round at random, for actions given as strings; see ``Quantize``.

    Returns:
      A function with the arguments and the result of ``fn``.

    Raises:
      TypeError: if an argument is no array, when called.
      ValueError: if the policy names an unknown action; when called, if it lists a tag
        that does not occur in ``fn``.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from jax.ad_checkpoint import checkpoint_name
      >>> from lowrank_optax import activations
      >>> def layer(w, x):
      ...     return jnp.tanh(checkpoint_name(x @ w, "hidden")).sum()
      >>> small = activations.compressed_checkpoint(layer, {"hidden": "int8"})
      >>> w, x = jnp.eye(64), jnp.linspace(-1, 1, 8 * 64).reshape(8, 64)
      >>> bool(small(w, x) == layer(w, x))
      True
      >>> exact, got = jax.grad(layer)(w, x), jax.grad(small)(w, x)
      >>> bool(jnp.linalg.norm(got - exact) < 0.01 * jnp.linalg.norm(exact))
      True

    References:
      Chen et al., Adacc: An Adaptive Framework Unifying Compression and Activation
      Recomputation for LLM Training (2025), https://arxiv.org/abs/2508.00806
    """
    settled = Policy(policy, group, stochastic)

    @functools.wraps(fn)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        program, flat = trace(fn, args, kwargs)
        _check(settled, program.tagged)
        out = _differentiable(program, settled)(*flat)
        return program.out_tree.unflatten(out)

    return wrapped


def tagged_values(fn: Callable, *args: Any, **kwargs: Any) -> tuple[TaggedValue, ...]:
    """Lists the values that ``fn`` tags, with shapes and dtypes; nothing is computed.

    Args:
      fn: a function of pytrees of arrays.
      *args: its arguments, or ShapeDtypeStructs of them.
      **kwargs: likewise.

    Returns:
      The values in the order of evaluation; ``inside`` is not empty for those that
      ``compressed_checkpoint`` does not reach.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from jax.ad_checkpoint import checkpoint_name
      >>> from lowrank_optax import activations
      >>> def layer(x):
      ...     return checkpoint_name(jnp.sin(x), "sine") ** 2
      >>> (found,) = activations.tagged_values(layer, jnp.ones((2, 3)))
      >>> found.tag, found.shape, found.dtype.name
      ('sine', (2, 3), 'float32')
    """
    return trace(fn, args, kwargs)[0].tagged


@jax.custom_vjp
def override(value: Array, stored: Array) -> Array:
    """Returns ``stored``, whose gradient becomes that of ``value``."""
    del value
    return stored


# The rule calls the function itself, so that second derivatives obey it as well.
# Afterwards nothing reads `value`, and XLA drops the operations that only led to it.
override.defvjp(
    lambda value, stored: (override(value, stored), None), lambda _, g: (g, None)
)


def _barrier(tree: Any) -> Any:
    """Returns the tree; XLA computes nothing with it until all of it is there.

    One barrier for all would make values that are equal on all shards of a
    ``jax.shard_map`` count as different, so there is one barrier for each kind. Values
    in the host's memory have none, because a barrier would fetch them.
    """
    leaves, treedef = jax.tree.flatten(tree)
    kinds: dict[str, list[int]] = {}
    for i, leaf in enumerate(leaves):
        aval = jax.typeof(leaf)
        if getattr(aval, "memory_space", None) != jax.memory.Space.Host:
            # How a value differs between shards; JAX called `mat` `vma` before 0.10.
            kind = str(getattr(aval, "mat", getattr(aval, "vma", "")))
            kinds.setdefault(kind, []).append(i)
    for which in kinds.values():
        done = jax.lax.optimization_barrier([leaves[i] for i in which])
        for i, leaf in zip(which, done, strict=True):
            leaves[i] = leaf
    return treedef.unflatten(leaves)


def _differentiable(program: Program, policy: Policy) -> Callable:
    """Returns the program on flat arrays with the derivative of its replay."""

    @jax.custom_vjp
    def run(*flat: Any) -> list[Any]:
        return program(flat)

    def forward(*flat: Any) -> tuple[list[Any], Any]:
        kept: dict[tuple[str, int], Any] = {}

        def keep(tag: str, index: int, value: Array) -> Array:
            action = policy.kept(tag)
            if action is not None:
                # A second derivative runs through the replay alone.
                still = jax.lax.stop_gradient(value) if is_inexact(value) else value
                key = None
                if getattr(action, "stochastic", False) and is_inexact(value):
                    # From the value's bits: a restart draws the same, layers do not.
                    key = key_from(still, f"{tag}#{index}")
                kept[tag, index] = action.compress(still, key)
            return value

        out = program(flat, keep)
        # Otherwise XLA may put the compression off and keep the value until then.
        out, kept = _barrier((out, kept))
        return out, (flat, kept)

    def backward(residuals: Any, cotangents: Sequence[Any]) -> tuple[Any, ...]:
        # Outputs that are no floats come with cotangents of float0, and take none.
        given = [g for g in cotangents if g.dtype != jax.dtypes.float0]
        # Otherwise XLA merges the replay with the forward pass and keeps everything.
        # The cotangents are behind the same barrier, so that no replay starts before
        # they are there: one layer's values are alive at a time.
        (flat, kept), given = _barrier((residuals, given))

        def replace(tag: str, index: int, value: Array) -> Array:
            if (tag, index) not in kept:
                return value
            # Decoded here, where the replay needs it, not before it starts.
            stored = policy[tag].decompress(kept[tag, index], jax.typeof(value))
            return override(value, stored) if is_inexact(value) else stored

        return tuple(program.gradients(flat, replace, given))

    run.defvjp(forward, backward)
    return run


def _check(policy: Policy, tagged: Sequence[TaggedValue]):
    """Raises if the policy lists a tag that cannot be kept or does not occur."""
    reached = {value.tag for value in tagged if not value.inside}
    hidden = {value.tag: value.inside for value in tagged if value.inside}
    for tag in policy:
        if policy.kept(tag) and tag in hidden:
            raise ValueError(
                f"The policy keeps '{tag}', which is tagged inside a `{hidden[tag]}`; "
                "compressed_checkpoint does not look into those. Wrap the function "
                f"inside in compressed_checkpoint, or leave '{tag}' out of the policy."
            )
        if tag not in reached and tag not in hidden:
            occurring = ", ".join(f"'{name}'" for name in sorted(reached))
            raise ValueError(
                f"The policy lists '{tag}', which the function does not tag. "
                + (f"It tags {occurring}. " if reached else "It tags nothing. ")
                + ("" if reached else HOW_TO_TAG)
            )
