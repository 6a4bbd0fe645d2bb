"""``Kernels``: which axes of a leaf form the matrix, judged by all leaves together."""

import collections
from collections.abc import Callable, Sequence
from typing import Any

from lowrank_optax.leaves.matrix import MatrixDimensionNumbers

# Positions of a convolution along one axis.
_POSITIONS = 16
DEPTHWISE = "a depthwise convolution: one channel to one"


class Kernels:
    """All leaves together, their batch axes known: what sizes mean.

    Attributes:
      leaves: one of each kind.
      support: how many leaves have a size.
      siblings: the leaves by the place of their modules.
      tables: embeddings by name, without those of positions.
      widths: sizes of the model's width, as norms and tables show it.
      layout: how a matrix is stored where nothing else says it.
      votes: each kind of evidence, the surer first, and for each array's key by how
        many it makes more leaves ``[out, in]``.
    """

    def __init__(self, leaves: Sequence[Any], layout: str):
        self.leaves, self.layout = leaves, layout
        self.support = collections.Counter(n for x in leaves for n in {*x.sizes})
        self.siblings: dict[Any, list[Any]] = collections.defaultdict(list)
        for leaf in leaves:
            self.siblings[leaf.name.place[:-1]].append(leaf)
        self.tables = [
            x
            for x in leaves
            if x.name.is_embedding and not x.name.is_position and len(x.axes) == 2
        ]
        self.widths = {min(table.sizes) for table in self.tables} | {
            size for x in leaves if x.name.is_norm for size in x.sizes
        }
        kinds = self._by_bias, self._by_width
        self.votes = [(evidence, self._votes(evidence)) for evidence in kinds]

    def numbers(self, leaf: Any) -> tuple[MatrixDimensionNumbers | None, str]:
        """Returns dimension numbers and how they are known, or why they are not."""
        axes = leaf.axes
        if leaf.name.of_convolution or self._is_window(leaf):
            return self._convolution(leaf)
        if len(axes) == 2:
            first, last = axes
            if self._out_in(leaf):
                return MatrixDimensionNumbers(last, first), ""
            return MatrixDimensionNumbers(first, last), ""
        if len(axes) in (3, 4):
            numbers = self._attention(leaf)
            if numbers is not None:
                return numbers, "an attention's kernel, heads merged"
        many = "three" if len(leaf.shape) == 3 else "four"
        if len(axes) == 3 and not leaf.batch:
            return None, f"{many} or more axes, no dimension numbers and no layer_axis"
        return None, f"{many} or more axes and no dimension numbers"

    @staticmethod
    def _is_window(leaf: Any) -> bool:
        """Whether the sizes are those of a kernel over two equal axes."""
        if len(leaf.axes) != 4 or leaf.name.of_attention:
            return False
        a, b, c, d = leaf.sizes
        front = a == b <= _POSITIONS and min(c, d) > 2 * a
        back = c == d <= _POSITIONS and min(a, b) > 2 * c
        return front != back

    def _convolution(self, leaf: Any) -> tuple[MatrixDimensionNumbers | None, str]:
        axes, sizes = leaf.axes, leaf.sizes
        if len(axes) < 3:  # a product, whatever it is called
            return MatrixDimensionNumbers(*axes), ""
        back = max(sizes[2:]) < max(sizes[0], sizes[-1] if len(axes) < 4 else 0) and (
            max(sizes[2:]) <= _POSITIONS
        )
        front = max(sizes[:-2]) <= _POSITIONS
        if front and back:
            back = leaf.name.array == "weight"
        if not front and not back:
            return None, "a convolution with axes in an unknown order"
        positions = tuple(axes[2:] if back else axes[:-2])
        out, inward = (axes[0], axes[1]) if back else (axes[-1], axes[-2])
        if min(leaf.shape[out], leaf.shape[inward]) == 1:
            return None, DEPTHWISE
        numbers = MatrixDimensionNumbers(inward, out, positions)
        return numbers, "a convolution's kernel, positions share a basis"

    def _attention(self, leaf: Any) -> MatrixDimensionNumbers | None:
        """Numbers of ``[d, heads, width]`` and its kin, None if it is no such kernel.

        With a fourth axis, queries, keys and values lie in one array: it is batch.
        """
        axes = list(leaf.axes)
        if len(axes) == 4:
            small = [axis for axis in axes[:-1] if leaf.shape[axis] in (2, 3)]
            if len(small) != 1 or not leaf.name.of_attention:
                return None
            axes.remove(small[0])
        sizes = [leaf.shape[axis] for axis in axes]
        x, y, z = map(self._weight, sizes)
        partners = [
            other.sizes
            for other in self.siblings[leaf.name.place[:-1]]
            if other is not leaf and len(other.axes) == 3
        ]
        inward = any(p[2] == sizes[0] and p[1] == sizes[2] for p in partners)
        outward = any(p[0] == sizes[2] and p[2] == sizes[1] for p in partners)
        first, second, third = axes
        if not leaf.name.of_attention and inward == outward:
            return None
        if sizes[0] == sizes[1] and not (inward or outward):
            return None  # layers and width of one size: not to be told apart
        fused = len(leaf.axes) == 4  # so what is read is projected, never written
        into = fused or leaf.name.goes_in or (inward and not outward)
        out = not into and (leaf.name.goes_out or outward)
        if y > max(x, z):  # [heads, d, width]
            return MatrixDimensionNumbers(second, (first, third))
        if out and not x > max(y, z):
            return MatrixDimensionNumbers((first, second), third)
        if out:  # [d, heads, width], stored before what it is read from
            return MatrixDimensionNumbers((second, third), first)
        if z > max(x, y) and not inward:
            if into:
                return MatrixDimensionNumbers(third, (first, second))
            return MatrixDimensionNumbers((first, second), third)
        if x < max(y, z) and not inward:
            return None
        return MatrixDimensionNumbers(first, (second, third))

    # Orientation.

    def _weight(self, size: int) -> tuple[bool, int]:
        """Orders sizes by how much they look like the model's width."""
        return size in self.widths, self.support[size]

    def _by_bias(self, leaf: Any) -> int:
        """Returns 1 if the leaf is ``[out, in]``, -1 if ``[in, out]``, 0 unknown."""
        first, last = leaf.sizes
        bias = self.bias(leaf)
        if first == last or bias not in (first, last):
            return 0
        return 1 if bias == first else -1

    def _by_width(self, leaf: Any) -> int:
        """Returns the same as the model's width tells it, which may be mistaken."""
        first, last = leaf.sizes
        if first == last:
            return 0
        wide, narrow = self._weight(first), self._weight(last)
        if wide == narrow or leaf.name.goes_in == leaf.name.goes_out:
            return 0
        reads_first = (wide > narrow) == leaf.name.goes_in
        return -1 if reads_first else 1

    def bias(self, leaf: Any) -> int:
        """Returns the length of the bias beside a matrix, 0 if it has none."""
        for other in self.siblings[leaf.name.place[:-1]]:
            if other.name.place == leaf.name.place and leaf.name.place:
                if other.name.array in ("bias", "b") and len(other.axes) == 1:
                    return other.sizes[0]
        return 0

    def _votes(self, evidence: Callable[[Any], int]) -> collections.Counter:
        """Returns for each array's key how many more leaves are ``[out, in]``."""
        votes: collections.Counter = collections.Counter()
        for leaf in self.leaves:
            if len(leaf.axes) == 2 and not leaf.name.is_embedding:
                votes[leaf.name.array] += evidence(leaf)
        return votes

    def _out_in(self, leaf: Any) -> bool:
        """Whether a matrix is stored ``[out, in]``."""
        if self.layout != "auto":
            return self.layout == "out_in"
        if leaf.name.is_embedding and leaf.name.module[-1:] != ("head",):
            return False
        # A bias cannot be mistaken, so that another leaf's comes before a leaf's width.
        for evidence, votes in self.votes:
            vote = evidence(leaf) or votes[leaf.name.array]
            if vote:
                return vote > 0
        return leaf.name.array == "weight"
