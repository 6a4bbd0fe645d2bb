"""The memory that operations move, and the most that is alive at once."""

import collections
import itertools
from collections.abc import Collection, Iterable, Sequence

from lowrank_optax.activations._operations import Operation, Value

# The result is the operand's memory, or is never formed.
_VIEWS = ("reshape", "broadcast_in_dim", "squeeze", "name", "stop_gradient", "iota")


def traffic(operations: Sequence[Operation]) -> int:
    """Returns the bytes read and written by operations that follow each other.

    What is not written to memory, see ``Operation.written``, costs nothing; its loop
    reads what it needs once.
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
    Inputs are there from the beginning to their last use. What nothing here reads is
    taken to leave at once: a gradient that is written to the stack of all layers.

    Args:
      operations: in their order.
      inputs: those whose memory counts.
      dropped: the tags that are not kept.
      fuses: whether an elementwise result that only elementwise operations and at most
        one product read is never written, as compilers for accelerators have it. It
        then keeps alive what its loop reads, until the next result that is written.
    """
    uses = collections.Counter(v for o in operations if o.written for v in {*o.reads})
    operands = {value for value, count in uses.items() if count > 1}
    read = {v for o in operations for v in o.needs(dropped)}
    held = [v for v in inputs if v in read]
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
            if not formed or operation.stored is not None:
                sources[value] = reads
                continue
            sources[value] = frozenset([value])
            born[value], end[value] = at, at + 1
            stays = operation.written or shrinks
            end.update((v, max(end[v], at + stays)) for v in reads)
    change = [0] * (len(operations) + 2)
    for value, start in born.items():
        change[start] += value.nbytes
        change[end[value]] -= value.nbytes
    return max(itertools.accumulate(change))
