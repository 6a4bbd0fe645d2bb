"""``block_cost``: FLOPs and bytes of computing tagged values again, off the jaxpr."""

import dataclasses
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax

from lowrank_optax.activations.checkpoint.program import (
    Program,
    TaggedValue,
    is_inexact,
    trace,
)
from lowrank_optax.activations.checkpoint.replay import override
from lowrank_optax.activations.planner import operations
from lowrank_optax.activations.planner.operations import Operation, value_of


@dataclasses.dataclass(frozen=True)
class TagCost:
    """Bytes of a tag's values if they are kept, and operations if they are not.

    Attributes:
      tag: its name.
      values: those that carry the name, outside of loops and branches.
      nbytes: of the values as they are.
      flops: additional operations of the backward pass if this tag alone is not kept.
      traffic: bytes that the memory moves for them, from the nearest tagged values and
        arguments.
    """

    tag: str
    values: tuple[TaggedValue, ...]
    nbytes: int
    flops: float
    traffic: int


@dataclasses.dataclass(frozen=True)
class Link:
    """When a tagged value is computed again: it is not kept, and somebody needs it.

    Attributes:
      tag: the value's.
      always: whether the backward pass itself reads the value.
      users: numbers of the later values whose computation reads it.
    """

    tag: str
    always: bool
    users: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Rerun:
    """Operations that run again, once, as soon as one of some values does.

    Attributes:
      values: their numbers: several where they are cut from one product.
      flops: of the operations.
      traffic: bytes that the memory moves for them.
    """

    values: tuple[int, ...]
    flops: float
    traffic: int


@dataclasses.dataclass(frozen=True)
class BlockCost:
    """The costs of one layer.

    Attributes:
      tags: in the order of evaluation.
      input_bytes: of the second argument, of which every layer keeps its own. The
        parameters are there anyway, and further arguments are the same for all.
      working_bytes: the most that the backward pass of one layer holds at once, apart
        from the parameters and the kept values; of the parameters' gradients it counts
        the one that is being formed. An estimate.
      forward_flops: of the forward pass.
      backward_flops: of the backward pass if every tag is kept.
      links: one per tagged value, in the order of evaluation.
      reruns: what is computed again; together with ``links`` the replay's own count,
        whatever is kept.
    """

    tags: tuple[TagCost, ...]
    input_bytes: int
    working_bytes: int
    forward_flops: float
    backward_flops: float
    links: tuple[Link, ...] = ()
    reruns: tuple[Rerun, ...] = ()


def block_cost(block: Callable, args: Sequence[Any], fuses: Any = True) -> BlockCost:
    """Counts the operations of a block's backward pass for every tag that is not kept.

    The block's backward pass is traced once, with a place for each tagged value that
    stands either for the kept value or for the one computed again; operations that no
    gradient then depends on are left out. So an operation that the backward pass needs
    anyway (a norm before a product with weights, say) is no cost of the tags after it.

    Products take ``2 m n k``; everything else is counted by the memory it moves, and
    elementwise operations are taken to be fused with those that follow.

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
    program, flat = trace(block, args, {})
    tagged = [value for value in program.tagged if not value.inside]
    names = tuple(dict.fromkeys(value.tag for value in tagged))
    inputs = [value_of(var.aval) for var in program.jaxpr.invars]
    forward, outputs = operations.flatten(program.jaxpr, inputs)
    replay = _Replay(program, flat, tagged, len(jax.tree.leaves(args[1:])))
    base = replay.flops(())
    tags = []
    for name in names:
        own = _own(forward, name)
        tags.append(
            TagCost(
                tag=name,
                values=tuple(value for value in tagged if value.tag == name),
                nbytes=sum(v.nbytes for o in own if o.tag for v in o.writes),
                flops=max(replay.flops({name}) - base, 0.0),
                traffic=operations.traffic(own),
            )
        )
    links, reruns = replay.again()
    return BlockCost(
        tags=tuple(tags),
        input_bytes=sum(value_of(x).nbytes for x in jax.tree.leaves(args[1:2])),
        # Both extremes, for either may be larger: a replay, or all kept values.
        working_bytes=max(replay.peak(d, fuses) for d in (set(names), ())),
        forward_flops=math.fsum(o.flops for o in operations.needed(forward, outputs)),
        backward_flops=base,
        links=links,
        reruns=reruns,
    )


def _own(forward: Sequence[Operation], tag: str) -> list[Operation]:
    """Returns the operations that lead to a tag from the nearest tags and arguments."""
    alive = {v for o in forward if o.tag == tag for v in o.reads}
    found = []
    for operation in reversed(forward):
        if operation.tag == tag:
            found.append(operation)
        elif not operation.tag and not alive.isdisjoint(operation.writes):
            alive.update(operation.reads)
            found.append(operation)
    return found[::-1]


class _Replay:
    """The backward pass of a block with a choice at every tagged value.

    The last ``rest`` inputs of the program are no parameters.
    """

    def __init__(self, program: Program, flat: Any, tagged: Any, rest: int):
        keys = [(value.tag, value.index) for value in tagged]

        def backward(flat: Any, stored: Any, cotangents: Any) -> Any:
            kept = dict(zip(keys, stored, strict=True))

            # Integers are overridden as well, so that every tag has its place.
            def replace(tag: str, index: int, value: Any) -> Any:
                return override(value, kept[tag, index])

            return program.gradients(flat, replace, cotangents)

        flat = [_struct(x) for x in flat]
        stored = [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in tagged]
        outs = [_struct(var.aval) for var in program.jaxpr.outvars]
        outs = [out for out in outs if is_inexact(out)]
        closed = jax.make_jaxpr(backward)(flat, stored, outs)
        jaxpr = closed.jaxpr
        invars = [*jaxpr.constvars, *jaxpr.invars]
        self.inputs = [value_of(var.aval) for var in invars]
        first = len(jaxpr.constvars) + len(flat)
        places = self.inputs[first : first + len(tagged)]
        names = dict(zip(places, (value.tag for value in tagged), strict=True))
        # Without the parameters, which are there anyway.
        self.held = [v for v in self.inputs if v not in self.inputs[: first - rest]]
        jaxpr = jaxpr.replace(constvars=(), invars=invars)
        self.operations, self.outputs = operations.flatten(jaxpr, self.inputs, names)

    def flops(self, dropped: Collection[str]) -> float:
        """Returns the operations if these tags are not kept."""
        found = operations.needed(self.operations, self.outputs, dropped)
        return math.fsum(operation.flops for operation in found)

    def again(self) -> tuple[tuple[Link, ...], tuple[Rerun, ...]]:
        """Returns what runs again, by the tagged values that bring it about.

        From the end to the beginning, every value learns who asks for it: the backward
        pass itself, or tagged values that are computed again.
        """
        ends = [o for o in self.operations if o.stored is not None]
        number = {operation: k for k, operation in enumerate(ends)}
        always = -1
        asked: dict[Any, set[int]] = {value: {always} for value in self.outputs}
        links: list[Link] = []
        groups: dict[tuple[int, ...], list[Operation]] = {}
        for operation in reversed(self.operations):
            by = set().union(*(asked.get(v, ()) for v in operation.writes))
            k = number.get(operation)
            if k is not None:
                users = tuple(sorted(by - {always}))
                links.append(Link(operation.tag, always in by, users))
                by = {k} if by else by
                # The traffic of what leads to this value alone includes writing it.
                groups.setdefault((k,), []).append(operation)
            elif by and always not in by:
                groups.setdefault(tuple(sorted(by)), []).append(operation)
            for value in operation.reads if by else ():
                asked.setdefault(value, set()).update(by)
        reruns = []
        for values, found in groups.items():
            flops = math.fsum(operation.flops for operation in found)
            if flops:
                traffic = operations.traffic(found[::-1])
                reruns.append(Rerun(values, flops, traffic))
        return tuple(links[::-1]), tuple(reruns)

    def peak(self, dropped: Collection[str], fuses: bool) -> int:
        """Returns the most bytes alive at once if these tags are not kept."""
        found = operations.needed(self.operations, self.outputs, dropped)
        return operations.peak(found, self.held, dropped, fuses)


def _struct(x: Any) -> Any:
    aval = jax.typeof(x) if not hasattr(x, "shape") else x
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype)
