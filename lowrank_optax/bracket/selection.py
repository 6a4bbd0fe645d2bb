"""Which leaves are projected, from which side, at which rank.

Everything here is decided from shapes and paths alone, before any array exists.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lowrank_optax import _checks
from lowrank_optax.leaves.boxes import is_box, unbox
from lowrank_optax.leaves.matrix import Parts, path_string
from lowrank_optax.leaves.names import Name
from lowrank_optax.leaves.structure import LAYOUTS, Seen, structure

SIDES = ("short", "long", "left", "right", "both", "auto")
ALL_LINEAR = "all-linear"


class SelectionWarning(UserWarning):
    """What a bracket says at ``init`` of its choice of leaves; see the two kinds."""


class ConcludedAxesWarning(SelectionWarning):
    """Says at ``init`` that layers lie on another axis than the first.

    It was concluded from the leaves' siblings alone, as for MaxText's layers on axis
    1. Pass ``weight_dimension_numbers=lro.dimension_numbers`` to agree.
    """


class NotProjectedWarning(SelectionWarning):
    """Says at ``init`` that a bracket projects nothing, or less than half.

    Less than half of the elements of the leaves that look like matrices: such leaves
    keep the inner optimizer's state at full size. Silence it, or make it an error::

        warnings.simplefilter("error", lro.NotProjectedWarning)
    """


@dataclasses.dataclass(frozen=True)
class Selection:
    """Which leaves are projected, and from which side (the options of ``project``).

    Attributes:
      select: None (default rule), a regular expression searched in the path, a list
        of words, "all-linear", a callable ``(path, leaf) -> bool``, or a tree of
        flags like the parameters.
      min_size: leaves with fewer elements stay full.
      weight_dimension_numbers: None, a tree of ``MatrixDimensionNumbers`` (None
        where a leaf is not a matrix), or a callable of the parameters giving it.
      layer_axis: an axis of every leaf with three or more axes that only counts
        layers; None concludes it where siblings leave no doubt.
      side: see ``lro.project``.
      clip_rank: run leaves whose rank exceeds min(m, n) at r = min(m, n).
      param_shardings: tree of shardings read by ``side="auto"``.
    """

    select: Any = None
    min_size: int = 0
    weight_dimension_numbers: Any = None
    layer_axis: int | None = None
    side: str = "short"
    clip_rank: bool = False
    param_shardings: Any = None

    def __post_init__(self):
        _checks.choice("side", self.side, SIDES)
        _check_select(self.select)

    def seen(self, paths: Sequence[str], shapes: Sequence[Any]) -> list[Seen]:
        """Returns what every leaf of a tree is, by its siblings."""
        return structure(paths, shapes, self.layer_axis)

    @property
    def agrees(self) -> bool:
        """Whether the user has agreed to what is concluded: the default rule, then."""
        return self.weight_dimension_numbers is dimension_numbers

    @property
    def clips(self) -> bool:
        """Whether a leaf whose rank is too large runs at its largest."""
        return self.clip_rank or self.select == ALL_LINEAR

    def numbers(self, tree: Any, treedef: Any) -> list[Any]:
        """Returns the dimension numbers of every leaf, None where none are given."""
        numbers = None if self.agrees else self.weight_dimension_numbers
        if _checks.is_function(numbers):
            numbers = numbers(tree)
        return broadcast_prefix(numbers, treedef, "weight_dimension_numbers")

    def shardings(self, treedef: Any) -> list[Any]:
        """Returns the declared sharding of every leaf, None where none is given."""
        return broadcast_prefix(self.param_shardings, treedef, "param_shardings")

    def chosen(self, treedef: Any) -> list[Any]:
        """Returns what ``select`` says of every leaf, None where it is no tree."""
        if not _is_tree(self.select):
            return [None] * treedef.num_leaves
        flags = broadcast_prefix(self.select, treedef, "select")
        for flag in flags:
            if not isinstance(flag, bool | np.bool_):
                raise TypeError(
                    "A tree given as `select` must have True or False for every leaf "
                    f"of the parameters, got {flag!r} of type {type(flag).__name__}."
                )
        return list(map(bool, flags))

    def explicit(self, numbers: Any) -> bool:
        """Whether a selected leaf was asked for by name, so is never dropped."""
        return self.select is not None or numbers is not None

    def why_full(
        self, path: str, leaf: Any, numbers: Any, seen: Seen, chosen: bool | None
    ) -> str | None:
        """Returns why the leaf is not a candidate, or None if it is one.

        Raises:
          TypeError: if a leaf asked for is complex.
        """
        reason = self._why_not_chosen(path, leaf, numbers, seen, chosen)
        if reason is not None or jnp.issubdtype(leaf.dtype, jnp.floating):
            return reason
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating) and self.explicit(numbers):
            raise TypeError(
                f"Leaf {path!r} is {leaf.dtype}; low-rank projection is for real "
                "matrices. Leave the leaf out of the selection."
            )
        return f"not a real floating-point leaf ({leaf.dtype})"

    def _why_not_chosen(
        self, path: str, leaf: Any, numbers: Any, seen: Seen, chosen: bool | None
    ) -> str | None:
        if leaf.ndim < 2:
            return "fewer than two axes"
        if leaf.size < self.min_size:
            return f"smaller than min_size={self.min_size}"
        named = self.select is not None and self.select != ALL_LINEAR
        found = self.finds(path, leaf) if chosen is None else chosen
        if named and not found:
            return "not chosen by select"
        if numbers is not None:
            return None
        given = self.weight_dimension_numbers is not None and not self.agrees
        if given and not named:
            return "no dimension numbers given for it"
        if named:
            return seen.reason if _is_stacked_vector(seen) else None
        return None if seen.kind == "matrix" else seen.reason

    def finds(self, path: str, leaf: Any) -> bool:
        """Whether ``select`` chooses a path."""
        if _checks.is_function(self.select):
            return bool(self.select(path, leaf))
        if isinstance(self.select, str):
            return re.search(self.select, path) is not None
        dotted = path.replace("/", ".")
        return any(
            Name(path).has(word)
            or re.fullmatch(word, path)
            or re.fullmatch(word, dotted)
            for word in self.select or ()
        )

    def axes(self, path: str, leaf: Any, numbers: Any, seen: Seen):
        """Returns (batch, shared, rows, columns, reduction_is_rows) of a leaf."""
        everything = tuple(range(leaf.ndim))
        if numbers is None:
            numbers = seen.numbers
        if numbers is None:
            raise ValueError(
                f"Leaf {path!r} of shape {leaf.shape} was selected, but which of its "
                f"{leaf.ndim} axes form the matrix is not said. Give "
                "weight_dimension_numbers with a MatrixDimensionNumbers for this leaf, "
                "or layer_axis for stacked [L, m, n] leaves."
            )
        reduction = _axes_tuple(numbers.reduction_axis, leaf.ndim, path)
        output = _axes_tuple(numbers.output_axis, leaf.ndim, path)
        shared = _axes_tuple(getattr(numbers, "shared_axis", ()), leaf.ndim, path)
        named = (*reduction, *output, *shared)
        if not reduction or not output or len(set(named)) != len(named):
            raise ValueError(
                f"Leaf {path!r} of shape {leaf.shape}: reduction_axis and output_axis "
                "must name disjoint, non-empty axes (and shared_axis others), got "
                f"{numbers}."
            )
        batch = tuple(axis for axis in everything if axis not in named)
        reduction_is_rows = min(reduction) < min(output)
        rows, columns = (
            (reduction, output) if reduction_is_rows else (output, reduction)
        )
        return batch, shared, rows, columns, reduction_is_rows

    def resolve_side(
        self, rows: int, columns: int, reduction_is_rows: bool, parts: Parts | None
    ) -> str:
        """Returns "left", "right" or "both" from the matrix' own shape."""
        if self.side in ("left", "right", "both"):
            return self.side
        if rows == columns:
            short_is_rows = reduction_is_rows
        else:
            short_is_rows = rows < columns
        if self.side == "auto" and parts is not None:
            # An unknown number of parts, 0, counts as several. `P^T G` sums along the
            # side of the basis, so on an unsharded side it needs no communication.
            sharded = [count != 1 for count in parts]
            if sharded[0] != sharded[1]:
                return "right" if sharded[0] else "left"
        return "left" if short_is_rows == (self.side != "long") else "right"


def dimension_numbers(params: Any, layout: str = "auto") -> Any:
    r"""Returns the dimension numbers that are concluded from a tree of parameters.

    Every leaf is judged by its axes and its place among the others, then by its name:

    * an axis that a whole subtree has in common counts layers, or experts, and is left
      out of the numbers: it is batch. ``[L, d]`` among stacks is a stack of vectors;
    * ``[d, heads, width]`` and ``[heads, width, d]`` beside each other are an
      attention's kernels: the heads are part of the output, or of the input;
    * ``[k, k, in, out]`` and ``[out, in, k, k]`` are convolutions, whose positions
      share a basis;
    * embeddings and output heads stay full, and are recognised by the length that they
      share, or one that is many times the model's width.

    This is the default selection of every method; look at it, change it, and give it
    back as ``weight_dimension_numbers``.

    Args:
      params: parameters, arrays or ShapeDtypeStructs, Flax-boxed or not: trees of Flax
        Linen and NNX, MaxText, Tunix, Haiku, Equinox and Keras, or flat mappings with
        the names of Hugging Face.
      layout: how a two-axis matrix is stored, "in_out" (Flax, Haiku, Keras) or "out_in"
        (torch, Equinox). "auto" asks the biases, the width that queries read and down
        projections write, and then the name: a ``weight`` without any such sign is
        ``[out, in]``. It matters where a matrix is square: its input axis is projected.

    Returns:
      A tree like ``params`` of ``MatrixDimensionNumbers``, None for what stays full.

    Raises:
      ValueError: if ``layout`` is unknown.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> import lowrank_optax as lro
      >>> def kernel(*shape):
      ...     return {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)}
      >>> layers = {  # MaxText: layers on axis 1
      ...     "query": kernel(512, 6, 8, 64),
      ...     "out": kernel(8, 6, 64, 512),
      ...     "wi": kernel(512, 6, 2048),
      ... }
      >>> params = {"layers": layers, "logits_dense": kernel(512, 32000)}
      >>> numbers = lro.dimension_numbers(params)
      >>> numbers["layers"]["query"]["kernel"]
      MatrixDimensionNumbers(reduction_axis=0, output_axis=(2, 3), shared_axis=())
      >>> numbers["layers"]["out"]["kernel"].reduction_axis
      (0, 2)
      >>> numbers["logits_dense"]["kernel"] is None
      True
    """
    _checks.choice("layout", layout, LAYOUTS)
    flat, treedef = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_box)
    paths = [path_string(path) for path, _ in flat]
    shapes = [tuple(unbox(leaf).shape) for _, leaf in flat]
    return treedef.unflatten(
        seen.numbers if seen.kind == "matrix" else None
        for seen in structure(paths, shapes, layout=layout)
    )


def _is_stacked_vector(seen: Seen) -> bool:
    return seen.kind == "vector" and seen.numbers is None


def _check_select(select: Any) -> None:
    """Raises if ``select`` is none of the forms that it has."""
    if select is None or _checks.is_function(select) or isinstance(select, str):
        return
    if _is_tree(select):
        return
    if isinstance(select, Sequence) and all(isinstance(x, str) for x in select):
        if select:
            return
        raise ValueError(
            "`select` is an empty list, which chooses nothing. Pass None for the "
            'default rule, "all-linear", or words such as ["attn", "mlp"].'
        )
    raise TypeError(
        "`select` must be None, a regular expression, a list of words such as "
        '["attn", "mlp"], "all-linear", a callable (path, leaf) -> bool, or a tree of '
        "True and False like the parameters; got "
        f"{select!r} of type {type(select).__name__}."
    )


def _is_tree(select: Any) -> bool:
    """Whether it is a tree, and neither words nor a function."""
    if select is None or _checks.is_function(select):
        return False
    leaves = jax.tree.leaves(select)
    if not leaves or jax.tree_util.all_leaves([select]):
        return False
    return not any(isinstance(leaf, str) for leaf in leaves)


def _axes_tuple(axes: Any, ndim: int, path: str) -> tuple[int, ...]:
    axes = (axes,) if isinstance(axes, int) else tuple(axes)
    if any(not -ndim <= axis < ndim for axis in axes):
        raise ValueError(
            f"Leaf {path!r} has {ndim} axes, its dimension numbers name {axes}."
        )
    return tuple(axis % ndim for axis in axes)


def _is_annotation(node: Any) -> bool:
    # Dimension numbers are named tuples and None is an empty tree: JAX would take both
    # apart without this test.
    return node is None or hasattr(node, "reduction_axis") or _is_sharding(node)


def _is_sharding(node: Any) -> bool:
    return isinstance(node, jax.sharding.Sharding | jax.sharding.PartitionSpec)


def broadcast_prefix(tree: Any, treedef: Any, name: str) -> list[Any]:
    """Flattens a prefix tree of annotations to one entry per leaf of ``treedef``.

    What ``optax.masked`` hides of the parameters has no entry.
    """
    out: list[Any] = [None] * treedef.num_leaves

    def spread(node: Any, positions: Any) -> None:
        if isinstance(positions, optax.MaskedNode):
            return
        if isinstance(positions, int):
            node = _content(node)
        if _is_annotation(node) or jax.tree_util.all_leaves([node]):
            for position in jax.tree.leaves(positions):
                out[position] = node
            return
        # One level: the children count as leaves.
        jax.tree.map(spread, node, positions, is_leaf=lambda x: x is not node)

    try:
        spread(tree, treedef.unflatten(range(treedef.num_leaves)))
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"`{name}` must be a tree like the parameters (a prefix of it will do): "
            f"{error}"
        ) from error
    return out


def _content(node: Any) -> Any:
    """Returns the annotation in a box such as the parameter's, else the node."""
    if isinstance(node, Mapping | list | tuple):
        return node
    found = jax.tree.leaves(node, is_leaf=_is_annotation)
    return found[0] if len(found) == 1 else node


def axis_parts(sharding, leaf, rows, columns) -> Parts | None:
    """Returns how rows and columns are sharded, None if not known."""
    if sharding is None:
        return None
    spec = getattr(sharding, "spec", sharding)
    if not isinstance(spec, jax.sharding.PartitionSpec):
        return None
    names = [*spec, *[None] * (leaf.ndim - len(spec))]
    mesh = getattr(sharding, "mesh", None)

    def parts(axes: tuple[int, ...]) -> int:
        if all(names[axis] is None for axis in axes):
            return 1
        first, *rest = (names[axis] for axis in axes)
        # Of several axes merged into one only the first may be cut: each part of it is
        # then a run of consecutive rows.
        if mesh is None or any(name is not None for name in rest):
            return 0
        return math.prod(mesh.shape[name] for name in mesh_axes(first))

    return parts(rows), parts(columns)


def mesh_axes(name: Any) -> tuple[str, ...]:
    """Returns the mesh axes that an entry of a partition spec stands for."""
    if name is None:
        return ()
    return name if isinstance(name, tuple) else (name,)
