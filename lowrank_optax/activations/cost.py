"""What it costs to compute a block's tagged values again, read off its jaxpr."""

import dataclasses
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax

from lowrank_optax.activations import _interpret, _operations, _traffic
from lowrank_optax.activations._interpret import Program, TaggedValue
from lowrank_optax.activations._operations import Operation, Value
from lowrank_optax.activations.checkpoint import override


@dataclasses.dataclass(frozen=True)
class TagCost:
    """What a tag's values take if they are kept, and if they are not.

    Attributes:
      tag: its name.
      values: what carries the name, outside of loops and branches.
      nbytes: of the values as they are.
      flops: additional operations of the backward pass if this tag alone is not kept.
      traffic: bytes that the memory moves for them, from the nearest tagged values and
        arguments.
      children: the tags that are computed from this one without another between.
      joint_flops: additional operations if the children are not kept either, beyond
        those of the children. It is larger than ``flops`` where only the children need
        the value: what is only added to something, say.
    """

    tag: str
    values: tuple[TaggedValue, ...]
    nbytes: int
    flops: float
    traffic: int
    children: tuple[str, ...] = ()
    joint_flops: float = 0.0


@dataclasses.dataclass(frozen=True)
class BlockCost:
    """The costs of one layer.

    Attributes:
      tags: in the order of evaluation.
      input_bytes: of the second argument, of which every layer keeps its own. The
        parameters are there anyway, and further arguments are the same for all.
      working_bytes: the most that the backward pass of one layer holds at once, apart
        from the parameters and what is kept; of their gradients the one that is being
        formed. An estimate.
      forward_flops: of the forward pass.
      backward_flops: of the backward pass if every tag is kept.
    """

    tags: tuple[TagCost, ...]
    input_bytes: int
    working_bytes: int
    forward_flops: float
    backward_flops: float


def block_cost(block: Callable, args: Sequence[Any], fuses: Any = True) -> BlockCost:
    """Counts what the backward pass of a block takes for every tag that is not kept.

    The block's backward pass is traced once, with a place for each tagged value at
    which it is either what was kept or computed again; what then no gradient depends on
    is left out. So an operation that the backward pass needs anyway (a norm before a
    product with weights, say) is no cost of the tags after it.

    Products take ``2 m n k``; everything else is counted by the memory it moves, and
    elementwise operations are taken to be fused with what follows.

    Args:
      block: ``block(params, x, *rest)`` with tags.
      args: its arguments, or ShapeDtypeStructs of them. Nothing is computed.
      fuses: see ``Hardware``.

    Returns:
      The costs of one layer.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from jax.ad_checkpoint import checkpoint_name
      >>> from lowrank_optax import activations
      >>> def layer(w, x):
      ...     hidden = checkpoint_name(x @ w, "hidden")
      ...     return x + checkpoint_name(jax.nn.relu(hidden), "act") @ w
      >>> cost = activations.block_cost(layer, [jnp.ones((64, 64))] * 2)
      >>> [(tag.tag, tag.nbytes, tag.flops) for tag in cost.tags]
      [('hidden', 16384, 524288.0), ('act', 16384, 4096.0)]
    """
    program, flat = _interpret.trace(block, args, {})
    tagged = [value for value in program.tagged if not value.inside]
    names = tuple(dict.fromkeys(value.tag for value in tagged))
    forward, outputs = _forward(program)
    replay = _Replay(program, flat, tagged, len(jax.tree.leaves(args[1:])))
    base = replay.flops(())
    tags = []
    for name in names:
        own = _own(forward, name)
        children = tuple(c for c in names if name in _ancestors(forward, c) - {c})
        flops = max(replay.flops({name}) - base, 0.0)
        joint = replay.flops({name, *children}) - replay.flops(children)
        tags.append(
            TagCost(
                tag=name,
                values=tuple(value for value in tagged if value.tag == name),
                nbytes=sum(v.nbytes for o in own if o.tag for v in o.writes),
                flops=flops,
                traffic=_traffic.traffic(own),
                children=children,
                joint_flops=max(joint, flops),
            )
        )
    return BlockCost(
        tags=tuple(tags),
        input_bytes=_input_bytes(args),
        working_bytes=max(replay.peak(d, fuses) for d in (set(names), ())),
        forward_flops=math.fsum(o.flops for o in _operations.needed(forward, outputs)),
        backward_flops=base,
    )


def _input_bytes(args: Sequence[Any]) -> int:
    leaves = [_operations.value_of(x) for x in jax.tree.leaves(args[1:2])]
    return sum(leaf.nbytes for leaf in leaves)


def _forward(program: Program) -> tuple[list[Operation], list[Value]]:
    inputs = [_operations.value_of(var.aval) for var in program.jaxpr.invars]
    return _operations.flatten(program.jaxpr, inputs)


def _own(operations: Sequence[Operation], tag: str) -> list[Operation]:
    """Returns what computes a tag from the nearest tagged values and arguments."""
    alive = {v for o in operations if o.tag == tag for v in o.reads}
    found = []
    for operation in reversed(operations):
        if operation.tag == tag:
            found.append(operation)
        elif not operation.tag and not alive.isdisjoint(operation.writes):
            alive.update(operation.reads)
            found.append(operation)
    return found[::-1]


def _ancestors(operations: Sequence[Operation], tag: str) -> set[str]:
    """Returns the nearest tags that a tag is computed from."""
    reads = {v for o in _own(operations, tag) for v in o.reads}
    return {o.tag for o in operations if o.tag and not reads.isdisjoint(o.writes)}


def replayed(program: Program, flat: Any, tagged: Sequence[TaggedValue]) -> Callable:
    """Returns the gradients as a function of what stands for the tagged values.

    It takes the flat inputs, a value for each tagged one, and cotangents of the
    floating point results; it returns the gradients of the floating point inputs.
    """
    moving = [i for i, x in enumerate(flat) if is_inexact(x)]
    keys = [(value.tag, value.index) for value in tagged]

    def backward(flat: Any, stored: Any, cotangents: Any) -> Any:
        kept = dict(zip(keys, stored, strict=True))

        def replace(tag: str, index: int, value: Any) -> Any:
            return override(value, kept[tag, index])

        def replay(*inputs: Any) -> Any:
            values = list(flat)
            for i, x in zip(moving, inputs, strict=True):
                values[i] = x
            return [y for y in program(values, replace) if is_inexact(y)]

        _, pull_back = jax.vjp(replay, *(flat[i] for i in moving))
        return pull_back(cotangents)

    return backward


class _Replay:
    """The backward pass of a block with a choice at every tagged value.

    The last ``rest`` inputs of the program are no parameters.
    """

    def __init__(self, program: Program, flat: Any, tagged: Any, rest: int):
        backward = replayed(program, flat, tagged)
        flat = [_struct(x) for x in flat]
        stored = [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in tagged]
        outs = [_struct(var.aval) for var in program.jaxpr.outvars]
        outs = [out for out in outs if is_inexact(out)]
        closed = jax.make_jaxpr(backward)(flat, stored, outs)
        jaxpr = closed.jaxpr
        invars = [*jaxpr.constvars, *jaxpr.invars]
        self.inputs = [_operations.value_of(var.aval) for var in invars]
        first = len(jaxpr.constvars) + len(flat)
        places = self.inputs[first : first + len(tagged)]
        names = dict(zip(places, (value.tag for value in tagged), strict=True))
        # Without the parameters, which are there anyway.
        self.held = [v for v in self.inputs if v not in self.inputs[: first - rest]]
        jaxpr = jaxpr.replace(constvars=(), invars=invars)
        self.operations, self.outputs = _operations.flatten(jaxpr, self.inputs, names)

    def flops(self, dropped: Collection[str]) -> float:
        """Returns the operations if these tags are not kept."""
        found = _operations.needed(self.operations, self.outputs, dropped)
        return math.fsum(operation.flops for operation in found)

    def peak(self, dropped: Collection[str], fuses: bool) -> int:
        """Returns the most bytes alive at once if these tags are not kept."""
        found = _operations.needed(self.operations, self.outputs, dropped)
        return _traffic.peak(found, self.held, dropped, fuses)


def _struct(x: Any) -> Any:
    aval = jax.typeof(x) if not hasattr(x, "shape") else x
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype)


def is_inexact(x: Any) -> bool:
    """Whether x has gradients."""
    aval = jax.typeof(x) if not hasattr(x, "dtype") else x
    return jax.numpy.issubdtype(aval.dtype, jax.numpy.inexact)
