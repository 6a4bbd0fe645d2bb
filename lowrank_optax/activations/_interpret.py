"""A function as a jaxpr that is evaluated with a say at every tagged value."""

import collections
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.extend import core as jex
from jaxtyping import Array

_TAG = "name"  # the primitive of jax.ad_checkpoint.checkpoint_name

# What is entered if there is a tag inside. JAX called "jit" "pjit" before 0.7.
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
      jaxpr: without constants: what the function closes over comes first among its
        inputs, so that gradients flow there.
      out_tree: the structure of what the function returns.
      tagged: the values that it tags, in the order of evaluation.
    """

    jaxpr: Any
    out_tree: Any
    tagged: tuple[TaggedValue, ...]

    def __call__(self, flat: Sequence[Any], on_tag: OnTag | None = None) -> list[Any]:
        """Returns the flat outputs; each tagged value is what ``on_tag`` returns."""
        return _evaluate(self.jaxpr, flat, on_tag or _as_it_is, collections.Counter())


def _as_it_is(tag: str, index: int, value: Array) -> Array:
    del tag, index
    return value


def trace(fn: Callable, args: Any, kwargs: Any) -> tuple[Program, list[Any]]:
    """Traces ``fn(*args, **kwargs)``; returns the program and its flat inputs.

    The arguments may be tracers or ShapeDtypeStructs. Tracers that fn closes over
    become inputs.
    """
    leaves, tree = jax.tree.flatten((args, kwargs))
    for leaf in leaves:
        _check_is_array(leaf)
    out_trees = []

    def flat_fn(*leaves: Any) -> list[Any]:
        args, kwargs = tree.unflatten(leaves)
        out, out_tree = jax.tree.flatten(fn(*args, **kwargs))
        out_trees.append(out_tree)
        return out

    closed = jax.make_jaxpr(flat_fn)(*leaves)
    jaxpr = closed.jaxpr
    inputs = [*jaxpr.constvars, *jaxpr.invars]
    program = Program(
        jaxpr=jaxpr.replace(constvars=(), invars=inputs),
        out_tree=out_trees[-1],
        tagged=tuple(_tagged(jaxpr, "", collections.Counter())),
    )
    return program, [*closed.consts, *leaves]


def _check_is_array(leaf: Any):
    if not hasattr(leaf, "dtype") and not isinstance(
        leaf, bool | int | float | complex
    ):
        raise TypeError(
            "Arguments of a function under `compressed_checkpoint` must be arrays or "
            f"pytrees of them, got {leaf!r} of type {type(leaf).__name__}. Bind it "
            "first: compressed_checkpoint(functools.partial(fn, option=value), policy)."
        )


def _tagged(jaxpr: Any, inside: str, counts: Any) -> Iterator[TaggedValue]:
    """Yields the tagged values in the order in which ``_evaluate`` meets them."""
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name == _TAG:
            (var,) = eqn.outvars
            tag = eqn.params["name"]
            key = (tag, bool(inside))
            yield TaggedValue(
                tag, counts[key], tuple(var.aval.shape), var.aval.dtype, inside
            )
            counts[key] += 1
            continue
        within = inside or ("" if name in _INLINED else _plain(name))
        for sub in jex.jaxprs_in_params(eqn.params):
            yield from _tagged(sub, within, counts)


def _plain(name: str) -> str:
    return "checkpoint" if name.startswith("remat") else name


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
            inner = [read(atom) for atom in eqn.invars]
            out = _evaluate_call(eqn, inner, on_tag, counts)
        else:
            operands = [read(atom) for atom in eqn.invars]
            out = evaluate_equation(jaxpr, eqn, operands)
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
    """Evaluates what a call calls, in place; a jit's own shardings still hold."""
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


def evaluate_equation(jaxpr: Any, eqn: Any, inputs: Sequence[Any]) -> list[Any]:
    """Evaluates one equation of a jaxpr on the values of its operands.

    How a primitive is bound to the parameters of an equation differs between versions
    of JAX. Here its own evaluator does it, on a jaxpr of this equation alone; it also
    keeps the equation's context (mesh, compute type) and its name for profiles.
    """
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
