"""``Operation``: a jaxpr as a list of them, with FLOPs, traffic and peak memory."""

import collections
import dataclasses
import itertools
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from jax.extend import core as jex

# Calls whose bodies take the same operands as the equation itself: they are entered.
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
# of the loop that computes the next such result.
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
# The result is the operand's memory, or is never formed.
_VIEWS = ("reshape", "broadcast_in_dim", "squeeze", "name", "stop_gradient", "iota")


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
      stored: for a tagged value of the backward pass, the value that was kept of it.
    """

    name: str
    reads: tuple[Value, ...]
    writes: tuple[Value, ...]
    flops: float
    tag: str = ""
    stored: Value | None = None

    def needs(self, dropped: Collection[str]) -> tuple[Value, ...]:
        """Returns the values that it reads if these tags are not kept."""
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
        # A call of two operands, the second of which was kept, is `override`: the jaxpr
        # of a custom derivative has no other mark.
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
            name = eqn.primitive.name
            if tag:
                add(Operation(tag, (operands[0],), (*results,), 0.0, tag, operands[1]))
            else:
                reads = tuple(value for value in operands if value is not None)
                own = eqn.params["name"] if name == "name" else ""
                add(Operation(name, reads, (*results,), _flops(eqn), own))
        values.update(zip(eqn.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


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
    subs = jex.jaxprs_in_params(eqn.params)
    bodies = [sum(_flops(inner) for inner in sub.eqns) for sub in subs]
    if bodies:
        # The dearest branch counts; a scan runs its body `length` times; of a `while`,
        # whose turns are not known, one counts.
        each = max(bodies) if name == "cond" else sum(bodies)
        return each * eqn.params.get("length", 1)
    if name in ("name", "reshape", "broadcast_in_dim", "stop_gradient"):
        return 0.0
    return float(sum(math.prod(getattr(v.aval, "shape", ())) for v in eqn.outvars))


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


def traffic(operations: Sequence[Operation]) -> int:
    """Returns the bytes read and written by operations that follow each other.

    Results that are not written to memory, see ``Operation.written``, cost nothing;
    their loop reads its operands once.
    """
    work = [o for o in operations if not o.tag]
    fused = {v for o in work if not o.written for v in o.writes}
    loops = {v for o in work if not o.written for v in o.reads} - fused
    total = sum(value.nbytes for value in loops)
    for operation in operations:
        if operation.tag:
            # A product has written its result already.
            total += sum(v.nbytes for v in operation.reads if v in fused)
        elif operation.written:
            total += sum(v.nbytes for v in operation.reads if v not in fused)
            total += sum(v.nbytes for v in operation.writes)
    return total


def peak(
    operations: Sequence[Operation],
    inputs: Iterable[Value],
    dropped: Collection[str] = (),
    fuses: bool = True,
) -> int:
    """Returns the most bytes that are alive at once, operation after operation.

    An elementwise result may take the memory of an operand that is not read again.
    Inputs are there from the beginning to their last use. A result that no operation
    reads is taken to leave at once: a gradient that is written to the stack of all
    layers.

    Args:
      operations: in their order.
      inputs: those whose memory counts.
      dropped: the tags that are not kept.
      fuses: whether an elementwise result that only elementwise operations and at most
        one product read is never written, as compilers for accelerators have it. It
        then keeps alive the operands of its loop until the next result is written.
    """
    # A product can compute an elementwise operand on the fly; two of them share it.
    uses = collections.Counter(v for o in operations if o.written for v in {*o.reads})
    operands = {value for value, count in uses.items() if count > 1}
    read = {v for o in operations for v in o.needs(dropped)}
    held = [v for v in inputs if v in read]
    # value -> the values in memory that it is computed from, itself if it is in memory.
    sources: dict[Value, frozenset[Value]] = {v: frozenset([v]) for v in held}
    born = dict.fromkeys(sources, 0)
    end = dict.fromkeys(sources, 1)
    for at, operation in enumerate(operations):
        reads: frozenset[Value] = frozenset()
        reads = reads.union(*(sources.get(v, ()) for v in operation.needs(dropped)))
        shrinks = operation.name.startswith("reduce")
        for value in operation.writes:
            if fuses:
                formed = operation.written or shrinks or value in operands
            else:
                formed = operation.name not in _VIEWS
            # `override` makes no array: it names the kept one or the replayed one.
            if not formed or operation.stored is not None:
                sources[value] = reads
                continue
            sources[value] = frozenset([value])
            born[value], end[value] = at, at + 1
            # A product reads its operands until its result is there; an elementwise
            # result can take the place of one, which ends a step earlier.
            stays = operation.written or shrinks
            end.update((v, max(end[v], at + stays)) for v in reads)
    # Births and deaths at each operation; their running sum is the memory in use.
    change = [0] * (len(operations) + 2)
    for value, start in born.items():
        change[start] += value.nbytes
        change[end[value]] -= value.nbytes
    return max(itertools.accumulate(change))
