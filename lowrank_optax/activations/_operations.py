"""A jaxpr as a flat list of operations: their FLOPs, and which are needed."""

import dataclasses
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from jax.extend import core as jex

# Entered: their bodies take the same operands as the equation itself.
_ENTERED = (
    "jit",
    "pjit",
    "closed_call",
    "core_call",
    "custom_jvp_call",
    "custom_vjp_call",
    "remat2",
    "checkpoint",
)
# Operations whose result a compiler writes to memory. All others are taken to be part
# of the loop that computes what follows.
_WRITTEN = (
    "dot_general",
    "conv_general_dilated",
    "scan",
    "while",
    "cond",
    "gather",
    "scatter",
    "scatter-add",
    "sort",
    "top_k",
    "cumsum",
    "custom_call",
    "pallas_call",
    "ragged_dot_general",
    "fft",
)


class Value:
    """A value that an operation reads or writes; compared by identity."""

    def __init__(self, nbytes: int, size: int = 0):
        """Takes the bytes and the number of elements."""
        self.nbytes = nbytes
        self.size = size


@dataclasses.dataclass(frozen=True, eq=False)
class Operation:
    """One operation on values.

    Attributes:
      name: of the primitive.
      reads: its operands, without literals.
      writes: its results.
      flops: floating point operations.
      tag: of the tagged value that it returns, else "".
      stored: for a tagged value of the backward pass, what it is if it was kept.
    """

    name: str
    reads: tuple[Value, ...]
    writes: tuple[Value, ...]
    flops: float
    tag: str = ""
    stored: Value | None = None

    def needs(self, dropped: Collection[str]) -> tuple[Value, ...]:
        """Returns what it reads if these tags are not kept."""
        if self.stored is None or self.tag in dropped:
            return self.reads
        return (self.stored,)

    @property
    def written(self) -> bool:
        """Whether the result is written to memory rather than fused."""
        return self.name in _WRITTEN


def value_of(aval: Any) -> Value:
    """Returns a new value of this shape and dtype."""
    size = math.prod(getattr(aval, "shape", ()))
    itemsize = getattr(getattr(aval, "dtype", None), "itemsize", 4)
    return Value(size * itemsize, size)


def flatten(
    jaxpr: Any, inputs: Sequence[Value], stored: Mapping[Value, str] | None = None
) -> tuple[list[Operation], list[Value]]:
    """Returns the operations of a jaxpr, calls entered, and its outputs.

    Args:
      jaxpr: without constants.
      inputs: the values of its inputs.
      stored: the inputs that stand for tagged values of the forward pass -> their tags;
        the call with two operands of which such a one is the second is the place where
        the backward pass uses it.
    """
    operations: list[Operation] = []
    outputs = _flatten(jaxpr, inputs, stored or {}, operations.append)
    return operations, [value for value in outputs if value is not None]


def _flatten(
    jaxpr: Any, inputs: Sequence[Any], stored: Any, add: Callable[[Operation], None]
) -> list[Any]:
    values = dict(zip(jaxpr.invars, inputs, strict=True))

    def read(atom: Any) -> Any:
        return None if isinstance(atom, jex.Literal) else values[atom]

    for eqn in jaxpr.eqns:
        operands = [read(atom) for atom in eqn.invars]
        body = _body(eqn)
        tag = stored.get(operands[1], "") if body and len(operands) == 2 else ""
        if body is not None and not tag:
            inner, constants = body
            operands = [value_of(getattr(c, "aval", c)) for c in constants] + operands
            results = _flatten(inner, operands, stored, add)
            # A literal among the results of a call is a value of its own outside.
            results = [
                value_of(var.aval) if value is None else value
                for var, value in zip(eqn.outvars, results, strict=True)
            ]
        else:
            results = [value_of(var.aval) for var in eqn.outvars]
            add(_operation(eqn, operands, results, tag))
        values.update(zip(eqn.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _operation(eqn: Any, operands: Any, results: Any, tag: str) -> Operation:
    if tag:
        return Operation(tag, (operands[0],), tuple(results), 0.0, tag, operands[1])
    name = eqn.primitive.name
    reads = tuple(value for value in operands if value is not None)
    own = eqn.params["name"] if name == "name" else ""
    return Operation(name, reads, tuple(results), _flops(eqn), own)


def _body(eqn: Any) -> Any:
    """Returns the jaxpr that an equation calls, without constants, and those."""
    if eqn.primitive.name not in _ENTERED:
        return None
    found = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
    inner = getattr(found, "jaxpr", found)
    constants = getattr(found, "consts", ())
    if inner is None or len(inner.invars) != len(eqn.invars):
        return None
    inner = inner.replace(constvars=(), invars=[*inner.constvars, *inner.invars])
    return inner, constants


def _flops(eqn: Any) -> float:
    """Returns 2 m n k for products, one per element of the result otherwise."""
    name = eqn.primitive.name
    if name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        shape = eqn.invars[0].aval.shape
        depth = math.prod(shape[axis] for axis in contracted)
        return 2.0 * depth * math.prod(eqn.outvars[0].aval.shape)
    if name == "conv_general_dilated":
        kernel = eqn.invars[1].aval.shape
        features = kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
        depth = math.prod(kernel) / max(features, 1)
        return 2.0 * depth * math.prod(eqn.outvars[0].aval.shape)
    bodies = [_total(sub) for sub in jex.jaxprs_in_params(eqn.params)]
    if bodies:
        each = max(bodies) if name == "cond" else sum(bodies)
        return each * eqn.params.get("length", 1)
    if name in ("name", "reshape", "broadcast_in_dim", "stop_gradient"):
        return 0.0
    return float(sum(math.prod(getattr(v.aval, "shape", ())) for v in eqn.outvars))


def _total(jaxpr: Any) -> float:
    return sum(_flops(eqn) for eqn in jaxpr.eqns)


def needed(
    operations: Sequence[Operation],
    outputs: Iterable[Value],
    dropped: Collection[str] = (),
) -> list[Operation]:
    """Returns the operations that the outputs depend on if these tags are not kept."""
    alive = set(outputs)
    found = []
    for operation in reversed(operations):
        if not alive.isdisjoint(operation.writes):
            alive.update(operation.needs(dropped))
            found.append(operation)
    return found[::-1]
