"""``structure``: what every leaf of a tree is, concluded from shapes, then from names.

An axis is never judged by its size alone, but by the sizes of the leaf's siblings: an
axis of layers has one size in a whole subtree, the model's width is found in most
leaves, and the size of a vocabulary is that of an embedding and a head and of nothing
in between. Where siblings leave two readings the names decide, and where these say
nothing the leaf's axes stay unknown: it is not projected, and the report says so.
"""

import collections
import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from lowrank_optax.leaves.kernels import DEPTHWISE, Kernels
from lowrank_optax.leaves.matrix import MatrixDimensionNumbers
from lowrank_optax.leaves.names import Name
from lowrank_optax.leaves.stacks import Axis, find_stacks, stacks_along

LAYOUTS = ("auto", "in_out", "out_in")
# A vocabulary is longer than this many widths; a feed-forward layer is not, and where
# it is (T5) its size is found inside of layers.
_VOCABULARY = 6


@dataclasses.dataclass(frozen=True)
class Seen:
    """What a leaf is.

    Attributes:
      kind: "vector", "matrix", "table" (an embedding or an output head), "long" (one
        by its length alone) or "unknown".
      numbers: its dimension numbers, seen as a matrix; None for a vector or unknown.
      reason: why it is no matrix; what was concluded about one ("" if nothing was).
    """

    kind: str
    numbers: MatrixDimensionNumbers | None
    reason: str


class Leaf:
    """A leaf while it is judged.

    Attributes:
      name: its path, by words.
      shape: as stored.
      batch: axes found to count layers or experts, with how that is known.
      axes: the axes that are left.
      pattern: the path with every number replaced, to tell repeated layers.
      inside: whether it belongs to one of several equal layers, or to a stack.
      key: the same for leaves that stand in equal layers.
    """

    def __init__(self, path: str, shape: tuple[int, ...]):
        self.name, self.shape = Name(path), shape
        self.batch: list[Axis] = []
        self.axes = list(range(len(shape)))
        keys = self.name.components
        self.pattern = tuple(re.sub(r"\d+", "*", key) for key in keys)
        self.inside = False

        self.key: Any = path

    @property
    def sizes(self) -> list[int]:
        """Sizes of the axes that are left."""
        return [self.shape[axis] for axis in self.axes]

    def take(self, axis: Axis) -> None:
        """Notes that an axis counts layers or experts."""
        self.axes.remove(axis.axis)
        self.batch.append(axis)
        self.inside = True


def structure(
    paths: Sequence[str],
    shapes: Sequence[tuple[int, ...]],
    layer_axis: int | None = None,
    layout: str = "auto",
) -> list[Seen]:
    """Concludes what the leaves of one tree are.

    Args:
      paths: the leaves' paths.
      shapes: their shapes.
      layer_axis: an axis that counts layers in every leaf with three or more; None
        concludes it.
      layout: how a matrix is stored where nothing else says it: "in_out" (Flax),
        "out_in" (torch), or "auto".

    Returns:
      For each leaf what it is.

    Raises:
      ValueError: if siblings show that another axis than ``layer_axis`` counts layers.
    """
    leaves = [Leaf(*pair) for pair in zip(paths, shapes, strict=True)]
    _mark_blocks(leaves)
    unique: dict[Any, Leaf] = {}
    for leaf in leaves:
        if 0 not in leaf.shape:
            unique.setdefault(leaf.key, leaf)
    heard = [*unique.values()]
    if layer_axis is not None:
        stacks_along(layer_axis, heard)
    find_stacks(heard, heard)
    tree = _Tree(heard, layout)
    seen = {leaf.key: tree.judge(leaf) for leaf in heard}
    empty = Seen("vector", None, "no elements")
    return [seen.get(leaf.key, empty) for leaf in leaves]


def _mark_blocks(leaves: Sequence[Leaf]) -> None:
    """Marks leaves that stand in numbered layers of two matrices or more."""
    below: dict[tuple[str, ...], set[Any]] = collections.defaultdict(set)
    numbers: dict[tuple[str, ...], set[Any]] = collections.defaultdict(set)
    for leaf in leaves:
        if len(leaf.shape) < 2 or leaf.name.is_vector:
            continue
        keys = leaf.name.components
        for end in range(1, len(leaf.name.place)):
            if "*" in leaf.pattern[end - 1]:
                below[leaf.pattern[:end]].add((leaf.pattern, leaf.shape))
                numbers[leaf.pattern[:end]].add(keys[:end])
    total = len({(leaf.pattern, leaf.shape) for leaf in leaves if len(leaf.shape) > 1})
    for leaf in leaves:
        for end in range(1, len(leaf.name.place)):
            inner = below.get(leaf.pattern[:end], ())
            repeated = len(numbers.get(leaf.pattern[:end], ())) > 1
            if len(inner) > 1 and (repeated or 2 * len(inner) <= total + 2):
                leaf.inside = True
                # Equal layers say the same: one of them is heard.
                leaf.key = leaf.pattern, leaf.shape


class _Tree:
    """All leaves together, their batch axes known: what sizes mean."""

    def __init__(self, leaves: Sequence[Leaf], layout: str):
        self.leaves, self.kernels = leaves, Kernels(leaves, layout)
        self.siblings, self.tables = self.kernels.siblings, self.kernels.tables
        self.lists = [x for x in leaves if x.name.is_bare and len(x.axes) > 1]

    def judge(self, leaf: Leaf) -> Seen:
        """Returns what a leaf is."""
        axes = leaf.axes
        if len(leaf.shape) < 2:
            return Seen("vector", None, "fewer than two axes")
        told = "; ".join(axis.reason for axis in leaf.batch)
        if len(axes) < 2:
            return Seen("vector", None, f"stacked vectors, no matrix: {told}")
        numbers, how = self.kernels.numbers(leaf)
        reason = "; ".join(part for part in (told, how) if part)
        if leaf.name.is_vector or self._is_bias(leaf):
            named = "named like a norm, bias, embedding or head"
            return Seen("vector", numbers, named)
        if len(axes) > 2 and sum(size > 1 for size in leaf.sizes) < 2:
            return Seen("vector", numbers, "one axis longer than 1")
        why = self._why_table(leaf)
        if why:
            return Seen("long" if "longer" in why else "table", numbers, why)
        if numbers is None:
            return Seen("vector" if how == DEPTHWISE else "unknown", None, how)
        return Seen("matrix", numbers, reason)

    def _is_bias(self, leaf: Leaf) -> bool:
        """Whether a nameless leaf has but the heads of a kernel beside it."""
        return bool(
            leaf.name.is_bare
            and len(leaf.axes) == 2
            and any(
                len(x.axes) == 3 and x.sizes[1:] == leaf.sizes
                for x in self.siblings[leaf.name.place[:-1]]
            )
        )

    # Tables.

    def _why_table(self, leaf: Leaf) -> str:
        """Returns why a leaf is an embedding or a head, "" if it is none."""
        named = "named like a norm, bias, embedding or head"
        if leaf.name.is_embedding:
            return named
        if leaf.inside or len(leaf.axes) != 2:
            return ""
        if leaf.name.may_be_head and not self._among_heads(leaf):
            return named
        if leaf.name.of_body:
            return ""
        long, short = max(leaf.sizes), min(leaf.sizes)
        for table in self.tables:
            if long != short and {*table.sizes} == {long, short}:
                return f"shares the vocabulary's size {long} with {table.name.path!r}"
        if self._ends(leaf):
            return f"the list's first and last matrix share the size {long}"
        bias = self.kernels.bias(leaf)
        if bias != short and self._is_long(long, short):
            return f"much longer ({long}) than the model's width {short}: a vocabulary"
        return ""

    def _is_long(self, long: int, short: int) -> bool:
        """Whether a size is that of a vocabulary: long, and nowhere else."""
        known = [max(x.sizes) for x in self.tables if short in x.sizes]
        if long < _VOCABULARY * short:
            return False
        if known and not 0.9 < long / max(known) < 1.2:  # one may be padded
            return False
        holders = [x for x in self.leaves if long in x.sizes and len(x.axes) > 1]
        others = [x for x in self.leaves if short in x.sizes and long not in x.sizes]
        fits = all(self._fits(x, long, short) for x in holders)
        return fits and len(holders) <= 2 <= len(others)

    @staticmethod
    def _fits(leaf: Leaf, long: int, short: int) -> bool:
        outside = not (leaf.inside or leaf.name.of_body)
        return outside and sorted(leaf.sizes) == [short, long]

    def _among_heads(self, leaf: Leaf) -> bool:
        """Whether queries stand beside a leaf: it is an attention's output."""
        return any(
            x.name.of_attention and x.name.goes_in and len(x.axes) > 1
            for x in self.siblings[leaf.name.place[:-1]]
        )

    def _ends(self, leaf: Leaf) -> bool:
        """Whether a bare list begins and ends with the leaf's sizes alone."""
        if len(self.lists) < 3 or len(self.lists) != sum(
            len(x.axes) > 1 for x in self.leaves
        ):
            return False
        first, *between, last = self.lists
        if leaf not in (first, last) or sorted(first.sizes) != sorted(last.sizes):
            return False
        long, short = max(leaf.sizes), min(leaf.sizes)
        return long >= 2 * short and all(long not in x.sizes for x in between)
