"""``is_box``: what other software puts around an array, and what it makes of a state.

A box is a node of a tree that stands for one array and says something about it: Flax'
boxes of parameters and its variables, the named arrays of several libraries. What it
says is about the array's axes, and wrong around an array of another shape. No such
software is imported: a box shows by itself what it is.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

# How ``flax.nnx`` calls metadata with an entry for every axis, in several versions.
_BY_AXIS = ("out_sharding", "optimizer_sharding", "sharding", "sharding_names")
_ARRAYS = (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct)


def is_box(leaf: Any) -> bool:
    """Whether a node of a tree is metadata around one array."""
    if isinstance(leaf, _ARRAYS):
        return False
    return _is_linen(leaf) or _is_node(leaf)


def _is_linen(leaf: Any) -> bool:
    """Whether it is a box of Flax Linen's (Partitioned, LogicallyPartitioned, ...)."""
    kind = type(leaf)
    return hasattr(kind, "unbox") and hasattr(kind, "replace_boxed")


def _is_node(leaf: Any) -> bool:
    """Whether it looks like the one array that it is made of."""
    if not (hasattr(leaf, "dtype") and hasattr(leaf, "shape")):
        return False
    inside = jax.tree.leaves(leaf)
    return len(inside) == 1 and inside[0] is not leaf


def unbox(leaf: Any) -> Any:
    """Returns the array inside a box, or the leaf itself (numbers as arrays)."""
    if isinstance(leaf, _ARRAYS):
        return leaf
    if _is_linen(leaf):
        leaf = leaf.unbox()
    elif _is_node(leaf):
        (leaf,) = jax.tree.leaves(leaf)
    return jnp.asarray(leaf) if isinstance(leaf, int | float | complex) else leaf


def refill(leaf: Any, value: Any) -> Any:
    """Puts ``value``, of the same shape, into the same box, if ``leaf`` is one."""
    if not is_box(leaf):
        return value
    if _is_linen(leaf):
        return leaf.replace_boxed(value)
    return jax.tree.unflatten(jax.tree.structure(leaf), [value])


def rebox(leaf: Any, value: Any, axes: tuple[tuple[int, ...], ...]) -> Any:
    """Puts ``value``, of any shape, into a box that is right for it.

    Every axis is under the name of the one of ``leaf``'s axes that stands behind it;
    without one, as that of the rank, it has no name. A box that says anything else
    about its axes stays behind.

    Args:
      leaf: an array, in a box or not.
      value: another one.
      axes: for each axis of ``value`` those of ``leaf`` behind it.
    """
    if not is_box(leaf):
        return value
    shape, own = tuple(value.shape), tuple(unbox(leaf).shape)

    def renamed(names: Any, sizes: Mapping[str, int]) -> tuple[Any, ...]:
        names = (*names, *[None] * (len(own) - len(names)))

        # No single name is right for several axes merged into one.
        def name(size: int, group: tuple[int, ...]) -> Any:
            if len(group) != 1:
                return None
            (axis,) = group
            fits = size == own[axis] or _divides(sizes, names[axis], size)
            return names[axis] if fits else None

        return tuple(map(name, shape, axes))

    if _is_linen(leaf) and getattr(leaf, "names", None) is not None:
        # Logical names are those of no mesh.
        sizes = {} if hasattr(leaf, "rules") else _sizes(getattr(leaf, "mesh", None))
        return dataclasses.replace(leaf, value=value, names=renamed(leaf.names, sizes))
    said = _said(leaf)
    named = {key: said[key] for key in _BY_AXIS if said.get(key) is not None}
    if named:
        sizes = {} if said.get("sharding_rules") else _sizes(said.get("mesh"))
        fresh = {
            key: _spelled(names, lambda spec: renamed(spec, sizes))
            for key, names in named.items()
        }
        return leaf.replace(value, **fresh)
    same = shape == own and tuple(axes) == tuple((axis,) for axis in range(len(own)))
    return refill(leaf, value) if same else value


def _said(leaf: Any) -> dict[str, Any]:
    """Returns what a variable of ``flax.nnx`` says, nothing for other boxes."""
    kind = type(leaf)
    if hasattr(kind, "get_metadata") and hasattr(kind, "replace"):
        return dict(leaf.get_metadata())
    return {}


def _spelled(names: Any, rename: Callable[[Any], tuple[Any, ...]]) -> Any:
    """Renames axes in the form in which their names were given."""
    if isinstance(names, NamedSharding):
        spec = PartitionSpec(*rename(names.spec))
        return NamedSharding(names.mesh, spec, memory_kind=names.memory_kind)
    fresh = rename(names)
    return PartitionSpec(*fresh) if isinstance(names, PartitionSpec) else fresh


def _sizes(mesh: Any) -> Mapping[str, int]:
    """Returns the axes of a mesh, of the one in use if None."""
    return (jax.sharding.get_abstract_mesh() if mesh is None else mesh).shape


def _divides(sizes: Mapping[str, int], entry: Any, size: int) -> bool:
    """Whether mesh axes are known to divide an axis of an array."""
    names = (entry,) if isinstance(entry, str) else tuple(entry or ())
    if not names or any(name not in sizes for name in names):
        return False
    return size % math.prod(sizes[name] for name in names) == 0


def unbox_tree(tree: Any) -> Any:
    """``unbox`` for what a leaf's state may be, such as a pair of bases."""
    return jax.tree.map(unbox, tree, is_leaf=is_box)


def refill_tree(tree: Any, value: Any) -> Any:
    """``refill`` likewise."""
    return jax.tree.map(refill, tree, value, is_leaf=is_box)


def is_altered(treedef: Any, *trees: Any) -> bool:
    """Whether a mapping stands where a tree like the parameters has an array or tuple.

    As in the states that ``nnx.Optimizer`` gives back; ``()`` is no such tree.
    """
    return any(
        isinstance(leaf, Mapping)
        for tree in trees
        if not (isinstance(tree, tuple) and not tree)
        for leaf in treedef.flatten_up_to(tree)
    )


def restore(found: Any, make: Callable[[], Any]) -> Any:
    """Returns ``found`` in the structure of ``make()``, leaves matched by their paths.

    ``found`` may have a mapping wherever that has a tuple with named fields.
    """
    template = jax.eval_shape(make)
    if jax.tree.structure(found, is_leaf=is_box) == jax.tree.structure(
        template, is_leaf=is_box
    ):
        return found

    # A field of a named tuple and a key of a mapping have the same simple name.
    def named(path: tuple[Any, ...]) -> tuple[str, ...]:
        return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)

    flat = jax.tree_util.tree_leaves_with_path(found, is_leaf=is_box)
    leaves = {named(path): leaf for path, leaf in flat}
    wanted = jax.tree_util.tree_leaves_with_path(template, is_leaf=is_box)
    if any(named(path) not in leaves for path, _ in wanted):
        return found  # another state altogether
    return jax.tree_util.tree_map_with_path(
        lambda path, _: leaves[named(path)], template
    )
