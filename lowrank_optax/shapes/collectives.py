"""`collectives` counts all that a compiled program sends between devices."""

import dataclasses
import re
from collections.abc import Iterator

_OPS = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-permute",
    "reduce-scatter",
)
_BITS = {"pred": 8, "f16": 16, "bf16": 16, "c64": 64, "c128": 128}

# The head of a computation, and an instruction of its body: `%name = type
# operation(operands), attributes`.
_HEADER = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (.*?) ([a-z][\w\-]*)\((.*)$")
_ARRAY = re.compile(r"\b([a-z][a-z\d]*)\[([\d,]*)\]")
_SCOPE = re.compile(r'op_name="([^"]*)"')
_CHANNEL = re.compile(r"channel_id=(\d+)")
_LOOP = re.compile(r"condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_BRANCHES = re.compile(
    r"(?:branch_computations=\{([^}]*)\}"
    r"|true_computation=%?([\w.\-]+), false_computation=%?([\w.\-]+))"
)
_CALLS = re.compile(r"(?:calls|to_apply|async_execution_thread)=%?([\w.\-]+)")
_KNOWN_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
_CONSTANT = re.compile(r"s32\[\]\S* constant\((\d+)\)")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a compiled program, as one device sees it.

    Attributes:
      op: "all-gather", "all-reduce", "all-to-all", "collective-permute" or
        "reduce-scatter".
      shapes: of its results on one device.
      bytes: of its results on one device, for one run of it.
      times: how often it runs in a step: the product of the trip counts of the loops
        around it. A loop whose trip count the text does not tell counts once.
      exact: False where such a loop is around it.
      branches: the number of branches of ``lax.cond`` around it.
      scope: the path of named scopes that it was traced in, or the argument that it
        moves; "" where the compiler says nothing.
    """

    op: str
    shapes: tuple[tuple[int, ...], ...]
    bytes: int
    times: int
    exact: bool
    branches: int
    scope: str = ""

    @property
    def conditional(self) -> bool:
        """Whether it stands inside a branch, so that not every step runs it."""
        return self.branches > 0

    @property
    def total(self) -> int:
        """Bytes of the results on one device, over all trips of the loops."""
        return self.bytes * self.times


def collectives(hlo: str, by_channel: bool = True) -> list[Collective]:
    """Lists the collectives of a compiled program, each once.

    A result of ``N`` entries of ``b`` bits takes ``N b / 8`` bytes, and a step moves
    the sum of ``bytes * times`` over the list. A refresh of a basis stands in a branch
    (``conditional``), as few steps run it.

    Args:
      hlo: the program's text after compilation, ``compiled.as_text()``. Lowered
        (StableHLO) text holds no collectives yet where the compiler places them.
      by_channel: whether collectives of one kind that share a channel are the same. A
        TPU's program spreads one asynchronous collective over several fusions; in a
        program written with ``jax.shard_map`` all have one channel: pass False there.

    Returns:
      The collectives, in the order of the program.

    Raises:
      TypeError: if ``hlo`` is no text, such as the compiled program itself.

    Examples:
      Rows cut over all devices are summed on every one of them:

      >>> import jax, jax.numpy as jnp
      >>> from jax.sharding import NamedSharding, PartitionSpec as P
      >>> import lowrank_optax as lro
      >>> mesh = jax.sharding.Mesh(jax.devices(), ("x",))
      >>> rows, whole = NamedSharding(mesh, P("x")), NamedSharding(mesh, P())
      >>> total = jax.jit(lambda x: x.sum(0), out_shardings=whole)
      >>> x = jax.ShapeDtypeStruct((8 * mesh.size, 256), jnp.float32, sharding=rows)
      >>> program = total.lower(x).compile()
      >>> found = lro.collectives(program.as_text())
      >>> several = mesh.size > 1
      >>> [c.bytes for c in found if c.op == "all-reduce"] == [256 * 4] * several
      True
    """
    if not isinstance(hlo, str):
        raise TypeError(
            "`hlo` must be the text of a compiled program, `compiled.as_text()`, got "
            f"{type(hlo).__name__}."
        )
    computations, entry = _computations(hlo)
    found: dict[object, Collective] = {}
    for n, (key, item) in enumerate(_walk(computations, entry, 1, True, 0)):
        key = key if by_channel else n
        known = found.get(key)
        # The part of a spread collective that carries the data is the largest.
        if known is None or known.total < item.total:
            found[key] = item
    return list(found.values())


def _computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    computations: dict[str, list[str]] = {}
    entry, body = "", []
    for line in hlo.splitlines():
        header = _HEADER.match(line)
        if header:
            body = computations.setdefault(header[1], [])
            entry = header[1] if line.startswith("ENTRY") else entry
        elif line.startswith(" "):
            body.append(line)
    return computations, entry


def _walk(
    computations: dict[str, list[str]],
    name: str,
    times: int,
    exact: bool,
    branches: int,
) -> Iterator[tuple[object, Collective]]:
    for number, line in enumerate(computations.get(name, ())):
        match = _INSTRUCTION.match(line)
        if match is None:
            continue
        result, op, rest = match.groups()
        # An asynchronous collective is a pair of instructions; the second, "-done", is
        # none of _OPS and is not counted again.
        kind = op.removesuffix("-start")
        if kind in _OPS:
            channel = _CHANNEL.search(rest)
            key = (kind, channel[1]) if channel else (name, number)
            shapes, size = _result(result, kind, op.endswith("-start"))
            scope = _SCOPE.search(rest)
            yield (
                key,
                Collective(
                    kind,
                    shapes,
                    size,
                    times,
                    exact,
                    branches,
                    scope[1] if scope else "",
                ),
            )
            continue
        loop = _LOOP.search(rest) if op == "while" else None
        if loop:
            trips = _trips(computations, loop[1], rest)
            yield from _walk(
                computations,
                loop[2],
                times * (trips or 1),
                exact and trips is not None,
                branches,
            )
        for branch in _branches(rest) if op == "conditional" else ():
            yield from _walk(computations, branch, times, exact, branches + 1)
        # The function of a reduction or a sort is named likewise, but holds no
        # collective.
        if op in ("call", "fusion", "async-start"):
            for callee in _CALLS.findall(rest):
                yield from _walk(computations, callee, times, exact, branches)


def _branches(rest: str) -> list[str]:
    match = _BRANCHES.search(rest)
    if match is None:
        return []
    names = match[1].split(",") if match[1] else [match[2], match[3]]
    return [name.strip().lstrip("%") for name in names]


def _trips(computations: dict[str, list[str]], condition: str, rest: str) -> int | None:
    known = _KNOWN_TRIPS.search(rest)
    if known:
        return int(known[1])
    # Loops of lax.scan and lax.map compare a counter from 0 with one constant.
    bounds = [
        int(n) for line in computations[condition] for n in _CONSTANT.findall(line)
    ]
    return bounds[0] if len(bounds) == 1 else None


def _result(
    text: str, kind: str, started: bool
) -> tuple[tuple[tuple[int, ...], ...], int]:
    arrays = _ARRAY.findall(text)
    # The type of an asynchronous instruction lists its operands as well, for a permute
    # an operand, a result and two contexts. That of an all-reduce is its result's
    # alone.
    if started and kind == "collective-permute":
        arrays = arrays[1:2]
    elif started and kind != "all-reduce":  # operands first, then as many results
        arrays = arrays[len(arrays) // 2 :]
    shapes = [tuple(int(n) for n in dims.split(",") if n) for _, dims in arrays]
    size = sum(
        _size(dtype, dims) for (dtype, _), dims in zip(arrays, shapes, strict=True)
    )
    return tuple(shapes), size


def _size(dtype: str, dims: tuple[int, ...]) -> int:
    # The first number of s4, u32, f8e4m3fn.
    number = re.search(r"\d+", dtype)
    bits = _BITS.get(dtype) or int(number[0] if number else 32)
    count = 1
    for dim in dims:
        count *= dim
    return count * bits // 8
