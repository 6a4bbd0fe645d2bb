"""``Program``: a function as a jaxpr, evaluated with a say at every tagged value."""

import collections
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core as jex
from jaxtyping import Array

_TAG = "name"  # the primitive of jax.ad_checkpoint.checkpoint_name

# Calls that are entered if there is a tag inside. JAX called "jit" "pjit" before 0.7.
_INLINED = ("jit", "pjit", "closed_call", "core_call")

OnTag = Callable[[str, int, Array], Array]


@dataclasses.dataclass(frozen=True)
class TaggedValue:
    """A value that a function tags with ``jax.ad_checkpoint.checkpoint_name``.

    Attributes:
      tag: its name.
      index: how many values of the same name come before it.
      shape: its shape, without the axes of an enclosing ``jax.vmap``.
      dtype: its dtype.
      inside: "", or the primitive ("scan", "cond", "checkpoint", ...) that hides it:
        ``compressed_checkpoint`` does not look into those.
    """

    tag: str
    index: int
    shape: tuple[int, ...]
    dtype: Any
    inside: str = ""


@dataclasses.dataclass(frozen=True)
class Program:
    """A traced function of flat arrays.

    Attributes:
      jaxpr: without constants: arrays that the function closes over come first among
        its inputs, so that gradients flow there.
      out_tree: the structure of the function's result.
      tagged: the values that it tags, in the order of evaluation.
    """

    jaxpr: Any
    out_tree: Any
    tagged: tuple[TaggedValue, ...]

    def __call__(self, flat: Sequence[Any], on_tag: OnTag | None = None) -> list[Any]:
        """Returns the flat outputs; ``on_tag`` may replace each tagged value."""
        on_tag = on_tag or (lambda tag, index, value: value)
        return _evaluate(self.jaxpr, flat, on_tag, collections.Counter())

    def gradients(
        self, flat: Sequence[Any], on_tag: OnTag, cotangents: Sequence[Any]
    ) -> list[Any]:
        """Returns the gradient of every flat input, None for one that has none.

        Args:
          flat: the inputs.
          on_tag: as in a call.
          cotangents: of the floating point outputs alone, in their order.
        """
        moving = [i for i, x in enumerate(flat) if is_inexact(x)]

        def run(*inputs: Any) -> list[Any]:
            values = list(flat)
            for i, x in zip(moving, inputs, strict=True):
                values[i] = x
            return [y for y in self(values, on_tag) if is_inexact(y)]

        _, pull_back = jax.vjp(run, *(flat[i] for i in moving))
        found: list[Any] = [None] * len(flat)
        for i, gradient in zip(moving, pull_back(list(cotangents)), strict=True):
            found[i] = gradient
        return found


def is_inexact(x: Any) -> bool:
    """Whether an array, tracer or abstract value has gradients."""
    aval = x if hasattr(x, "dtype") else jax.typeof(x)
    return jnp.issubdtype(aval.dtype, jnp.inexact)


def trace(fn: Callable, args: Any, kwargs: Any) -> tuple[Program, list[Any]]:
    """Traces ``fn(*args, **kwargs)``; returns the program and its flat inputs.

    The arguments may be tracers or ShapeDtypeStructs. Tracers that fn closes over
    become inputs.
    """
    leaves, tree = jax.tree.flatten((args, kwargs))
    for leaf in leaves:
        number = isinstance(leaf, bool | int | float | complex)
        if not number and not hasattr(leaf, "dtype"):
            raise TypeError(
                "Arguments of a function under `compressed_checkpoint` must be arrays "
                f"or pytrees of them, got {leaf!r} of type {type(leaf).__name__}. Bind "
                "it first: compressed_checkpoint(functools.partial(fn, option=value), "
                "policy)."
            )
    # A trace returns flat outputs alone, so their structure is noted on the way.
    out_trees = []

    def flat_fn(*leaves: Any) -> list[Any]:
        args, kwargs = tree.unflatten(leaves)
        out, out_tree = jax.tree.flatten(fn(*args, **kwargs))
        out_trees.append(out_tree)
        return out

    closed = jax.make_jaxpr(flat_fn)(*leaves)
    jaxpr = closed.jaxpr
    # Constants become inputs: a tracer that is closed over is such a constant, and a
    # custom derivative must be told of everything that it differentiates.
    inputs = [*jaxpr.constvars, *jaxpr.invars]
    program = Program(
        jaxpr=jaxpr.replace(constvars=(), invars=inputs),
        out_tree=out_trees[-1],
        tagged=tuple(_tagged(jaxpr, "", collections.Counter())),
    )
    return program, [*closed.consts, *leaves]


def _tagged(jaxpr: Any, inside: str, counts: Any) -> Iterator[TaggedValue]:
    """Yields the tagged values in the order in which ``_evaluate`` meets them."""
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name == _TAG:
            (var,) = eqn.outvars
            tag = eqn.params["name"]
            # Values in loops are counted apart, for `_evaluate` never meets them.
            key = (tag, bool(inside))
            yield TaggedValue(
                tag, counts[key], tuple(var.aval.shape), var.aval.dtype, inside
            )
            counts[key] += 1
            continue
        plain = "checkpoint" if name.startswith("remat") else name
        within = inside or ("" if name in _INLINED else plain)
        for sub in jex.jaxprs_in_params(eqn.params):
            yield from _tagged(sub, within, counts)


def _evaluate(jaxpr: Any, inputs: Sequence[Any], on_tag: OnTag, counts: Any) -> list:
    """Evaluates a jaxpr without constants, equation by equation."""
    values: dict[Any, Any] = dict(zip(jaxpr.invars, inputs, strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, jex.Literal) else values[atom]

    for eqn in jaxpr.eqns:
        if eqn.primitive.name == _TAG:
            tag = eqn.params["name"]
            out = [on_tag(tag, counts[tag], read(eqn.invars[0]))]
            counts[tag] += 1
        elif eqn.primitive.name in _INLINED and _has_tag(eqn):
            operands = [read(atom) for atom in eqn.invars]
            out = _evaluate_call(eqn, operands, on_tag, counts)
        else:
            operands = [read(atom) for atom in eqn.invars]
            out = _evaluate_equation(jaxpr, eqn, operands)
        values.update(zip(eqn.outvars, out, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _has_tag(eqn: Any) -> bool:
    subs = jex.jaxprs_in_params(eqn.params)
    return any(
        not found.inside
        for sub in subs
        for found in _tagged(sub, "", collections.Counter())
    )


def _evaluate_call(eqn: Any, inputs: Any, on_tag: OnTag, counts: Any) -> list[Any]:
    """Evaluates the body of a call in place; a jit's own shardings still hold."""
    closed = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
    inner = closed.jaxpr
    inner = inner.replace(constvars=(), invars=[*inner.constvars, *inner.invars])
    inputs = _constrained(inputs, eqn.params.get("in_shardings", ()))
    with jax.named_scope(str(eqn.params.get("name", "call"))):
        out = _evaluate(inner, [*closed.consts, *inputs], on_tag, counts)
    return _constrained(out, eqn.params.get("out_shardings", ()))


def _constrained(values: list[Any], shardings: Sequence[Any]) -> list[Any]:
    if not any(isinstance(s, jax.sharding.Sharding) for s in shardings):
        return values
    return [
        jax.lax.with_sharding_constraint(value, sharding)
        if isinstance(sharding, jax.sharding.Sharding)
        else value
        for value, sharding in zip(values, shardings, strict=True)
    ]


def _evaluate_equation(jaxpr: Any, eqn: Any, inputs: Sequence[Any]) -> list[Any]:
    """Evaluates one equation of a jaxpr on the values of its operands.

    Versions of JAX differ in how a primitive is bound to the parameters of an equation,
    so JAX's own evaluator does it, on a jaxpr of this equation alone. The evaluator
    also keeps the equation's context (mesh, compute type) and its name for profiles.
    """
    # As a dictionary, because an operand that occurs twice is one input.
    operands = {
        atom: value
        for atom, value in zip(eqn.invars, inputs, strict=True)
        if not isinstance(atom, jex.Literal)
    }
    wanted = [var for var in eqn.outvars if not isinstance(var, jex.DropVar)]
    alone = jaxpr.replace(
        constvars=(),
        invars=list(operands),
        outvars=wanted,
        eqns=[eqn],
        effects=eqn.effects,
    )
    evaluate = jex.jaxpr_as_fun(jex.ClosedJaxpr(alone, ()))
    found = iter(evaluate(*operands.values()))
    return [None if isinstance(v, jex.DropVar) else next(found) for v in eqn.outvars]
