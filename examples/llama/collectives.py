"""Counts what a compiled program sends between devices, from its HLO text."""

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

_HEADER = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (.*?) ([a-z][\w\-]*)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
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
    """One collective of the program.

    `times` multiplies the trip counts of the loops around it; a loop whose trip count
    the text does not tell counts once, and then `exact` is False. `branches` is the
    number of branches around it. `scope` is the path of named scopes that it was traced
    in, or the argument that it moves.
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
        """Bytes of the results on one device, over all loop trips."""
        return self.bytes * self.times


def collectives(hlo: str, by_channel: bool = True) -> list[Collective]:
    """Lists the collectives of a program, each once.

    A TPU program spreads one asynchronous collective over several fusions: those that
    share a channel are the same. In a program written with jax.shard_map all have one
    channel: pass `by_channel=False` there.
    """
    computations, entry = _computations(hlo)
    found: dict[object, Collective] = {}
    for n, (key, item) in enumerate(_walk(computations, entry, 1, True, 0)):
        key = key if by_channel else n
        known = found.get(key)
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
    bits = _BITS.get(dtype) or int(re.sub(r"\D", "", dtype) or 32)
    count = 1
    for dim in dims:
        count *= dim
    return count * bits // 8
