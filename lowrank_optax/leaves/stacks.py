"""``find_stacks``: the axes that count layers or experts, concluded from siblings."""

import collections
from collections.abc import Sequence
from typing import Any, NamedTuple

_FRONT = 2  # an axis of layers is one of the first


class Axis(NamedTuple):
    """An axis that counts matrices.

    Attributes:
      axis: which one, of the leaf as stored.
      reason: how it is known.
    """

    axis: int
    reason: str


def stacks_along(layer_axis: int, leaves: Sequence[Any]) -> None:
    """Takes the axis that the user says counts layers.

    Of leaves with three or more axes, and of those with two that are as long there as
    the stacks nearest to them: stacked vectors.

    Raises:
      ValueError: if siblings show that it is another axis.
    """
    big = [leaf for leaf in leaves if _is_big(leaf)]
    _check(layer_axis, leaves, big)
    near: dict[tuple[str, ...], set[int]] = collections.defaultdict(set)
    for leaf in big:
        axis = _position(layer_axis, len(leaf.shape))
        if axis is None:
            raise ValueError(
                f"layer_axis={layer_axis} names no axis of leaf {leaf.name.path!r} of "
                f"shape {leaf.shape}."
            )
        for end in range(len(leaf.name.components)):
            near[leaf.name.components[:end]].add(leaf.shape[axis])
    reason = f"axis {layer_axis} counts layers (layer_axis)"
    axis = layer_axis if layer_axis >= 0 else 3 + layer_axis
    for leaf in leaves:
        if _is_big(leaf):
            own = _position(layer_axis, len(leaf.shape))
            leaf.take(Axis(own, reason))  # pyright: ignore[reportArgumentType]
        elif len(leaf.shape) == 2 and axis < 2:
            keys = leaf.name.components
            ends = (near.get(keys[:end]) for end in range(len(keys) - 1, -1, -1))
            sizes = next((found for found in ends if found), set())
            if leaf.shape[axis] in sizes:
                leaf.take(Axis(axis, reason))


def find_stacks(leaves: Sequence[Any], tree: Sequence[Any]) -> None:
    """Takes every axis that all stacks of a subtree have in common.

    The deepest subtrees that agree on one axis win; an axis counts as one of layers (or
    experts) if its size is not as common elsewhere, as that of a width is. What is left
    is searched again: experts within layers.

    Args:
      leaves: those of the subtree, not taken yet.
      tree: all leaves, for the sizes found elsewhere.
    """
    for group in _groups(leaves):
        found = _common_axis(group, tree)
        parts = _split(group, len(_prefix(group)) + 1)
        if found is None or _better(parts, tree, found[0]):
            for part in parts:
                find_stacks(part, tree)
            continue
        _, place, size = found
        holder = _prefix([leaf for leaf in group if _is_big(leaf)])
        taken = []
        for leaf in group:
            if leaf.name.components[: len(holder)] != holder:
                continue
            if len(leaf.axes) > 1 and leaf.shape[leaf.axes[place]] == size:
                taken.append(leaf)
        where = "/".join(holder) or "the tree"
        for leaf in taken:
            axis = leaf.axes[place]
            reason = f"axis {axis} counts {size} alike, as in all of {where!r}"
            leaf.take(Axis(axis, reason))
        find_stacks(taken, tree)


def _better(parts: Sequence[Sequence[Any]], tree: Sequence[Any], doubt: float) -> bool:
    """Whether every part with stacks has an axis of its own with less doubt."""
    groups = [group for part in parts for group in _groups(part)]
    if doubt == 0 or len(groups) < 2:
        return False
    found = [_common_axis(group, tree) for group in groups]
    return all(axis is not None and axis[0] < doubt for axis in found)


def _groups(leaves: Sequence[Any]) -> list[list[Any]]:
    big = [leaf for leaf in leaves if _is_big(leaf)]
    if not big:
        return []
    prefix = _prefix(big)
    inside = [x for x in leaves if x.name.components[: len(prefix)] == prefix]
    return [inside]


def _split(leaves: Sequence[Any], depth: int) -> list[list[Any]]:
    parts: dict[Any, list[Any]] = collections.defaultdict(list)
    for leaf in leaves:
        parts[leaf.pattern[:depth]].append(leaf)
    return list(parts.values()) if len(parts) > 1 else []


def _prefix(leaves: Sequence[Any]) -> tuple[str, ...]:
    """Returns the keys that all leaves' places begin with."""
    first, *rest = (leaf.name.components[:-1] for leaf in leaves)
    length = len(first)
    for keys in rest:
        same = 0
        for a, b in zip(first[:length], keys, strict=False):
            if a != b:
                break
            same += 1
        length = same
    return first[:length]


def _is_big(leaf: Any) -> bool:
    """Whether a leaf has an axis more than a matrix, and none of a convolution."""
    if len(leaf.axes) < 3 or leaf.name.of_convolution:
        return False
    return sum(leaf.shape[axis] > 1 for axis in leaf.axes) > 1


def _common_axis(
    leaves: Sequence[Any], tree: Sequence[Any]
) -> tuple[float, int, int] | None:
    """Returns the doubt, the place among the axes left, and the size all stacks share.

    The doubt is how many leaves have that size elsewhere, for each one of the stacks.
    """
    big = [leaf for leaf in leaves if _is_big(leaf)]
    if len(big) < 2 and not any(_shows_stack(x, big[0]) for x in leaves):
        return None
    if _are_heads(big):
        return None
    found = []
    for place in range(_FRONT):
        sizes = {leaf.shape[leaf.axes[place]] for leaf in big}
        if len(sizes) == 1:
            (size,) = sizes
            members = sum(_has(x, place, size) for x in leaves)
            elsewhere = _elsewhere(place, size, leaves, tree)
            if elsewhere < members:
                found.append((elsewhere / members, place, size))
    found.sort()
    if not found or (len(found) > 1 and found[0][0] == found[1][0]):
        return None
    return found[0]


def _shows_stack(leaf: Any, big: Any) -> bool:
    """Whether a vector beside a lone stack has the axis of layers, too."""
    if len(leaf.axes) != 2 or not leaf.name.is_vector:
        return False
    return any(
        leaf.shape[leaf.axes[place]] == big.shape[big.axes[place]]
        for place in range(_FRONT)
    )


def _has(leaf: Any, place: int, size: int) -> bool:
    return len(leaf.axes) > 1 and leaf.shape[leaf.axes[place]] == size


def _elsewhere(place: int, size: int, group: Sequence[Any], tree: Sequence[Any]) -> int:
    """Counts leaves with the size on an axis that does not count the group's stacks."""
    members = {id(leaf) for leaf in group if len(leaf.axes) > 1}

    def has(leaf: Any) -> bool:
        skipped = place if id(leaf) in members else None
        return any(
            leaf.shape[axis] == size and i != skipped
            for i, axis in enumerate(leaf.axes)
        )

    return sum(map(has, tree))


def _are_heads(big: Sequence[Any]) -> bool:
    """Whether all are attention kernels with an axis of heads, so no stack at all.

    Within a stack what an attention has besides are heads; elsewhere the sizes tell
    ``[d, heads, width]`` from ``[L, d, d]``.
    """
    for leaf in big:
        if not leaf.name.of_attention:
            return False
        if leaf.batch:
            continue
        if len(leaf.axes) != 3:
            return False
        d, heads, width = (leaf.shape[axis] for axis in leaf.axes)
        inward = d <= 8 * heads * width and heads * width <= 4 * d
        outward = width <= 8 * d * heads and d * heads <= 4 * width
        if not (
            (inward and not leaf.name.goes_out) or (outward and not leaf.name.goes_in)
        ):
            return False
    return True


def _position(layer_axis: int, ndim: int) -> int | None:
    return layer_axis % ndim if -ndim <= layer_axis < ndim else None


def _check(layer_axis: int, leaves: Sequence[Any], big: Sequence[Any]) -> None:
    """Raises if the stacks agree on another axis than ``layer_axis``."""
    _check_heads(layer_axis, big)
    if len(big) < 2:
        return
    prefix = _prefix(big)
    group = [x for x in leaves if x.name.components[: len(prefix)] == prefix]
    found = _common_axis(group, leaves)
    if found is None or found[1] == layer_axis % 3:
        return
    said = {
        leaf.name.path: leaf.shape[layer_axis]
        for leaf in big
        if -len(leaf.shape) <= layer_axis < len(leaf.shape)
    }
    doubt, right, size = found
    also = {
        other: _elsewhere(layer_axis % 3, other, group, leaves)
        for other in {*said.values()}
    }
    if len(also) > 1 or (doubt == 0 and any(also.values())):
        sizes = ", ".join(f"{path!r}: {n}" for path, n in list(said.items())[:3])
        raise ValueError(
            f"layer_axis={layer_axis} contradicts the leaves: along it they have "
            f"different sizes or those of a width ({sizes}), while axis {right} has "
            f"{size} in all of them. Use layer_axis={right}, or None to conclude it; "
            "lro.dimension_numbers(params) shows what that gives."
        )


def _check_heads(layer_axis: int, big: Sequence[Any]) -> None:
    """Raises if an attention's kernels with heads have no axis of layers."""
    by_place: dict[Any, Any] = {
        (leaf.name.place[:-1], leaf.shape): leaf for leaf in big
    }
    for (place, shape), leaf in by_place.items():
        if len(shape) != 3 or shape[0] == shape[1]:
            continue
        other = by_place.get((place, (shape[1], shape[2], shape[0])))
        if other is not None and leaf.name.of_attention:
            raise ValueError(
                f"layer_axis={layer_axis} contradicts the leaves: {leaf.name.path!r} "
                f"{shape} and {other.name.path!r} {other.shape} are the kernels of one "
                "attention, [d, heads, width] and [heads, width, d], without an axis "
                "of layers. Leave layer_axis out; lro.dimension_numbers(params) shows "
                "what is concluded."
            )
