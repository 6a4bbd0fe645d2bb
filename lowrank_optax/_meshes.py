"""Types on a mesh: Explicit axes, and what varies inside ``jax.shard_map``.

A step runs with automatic axes, and its results keep their types.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec


def explicit_mesh(tree: Any) -> Any:
    """Returns the mesh with explicit axes that the tree's arrays live on, if any."""
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array):
            # The type has the mesh under `jit` as well, where an array has no devices
            # yet.
            mesh = jax.typeof(leaf).sharding.mesh
            if mesh.explicit_axes:
                return mesh
    return None


def explicit_like(like: Any, fn: Callable, *args: Any) -> Any:
    """Calls ``fn(*args)``, whose result has the types of ``like``, on any mesh."""
    mesh = explicit_mesh((like, args))
    if mesh is None:
        return fn(*args)

    def place(x: Any) -> Any:
        sharding = jax.typeof(x).sharding
        # What lies on no mesh, as a shape without a sharding, is whole on this one.
        return NamedSharding(mesh, PartitionSpec()) if sharding.mesh.empty else sharding

    return with_auto_axes(mesh, jax.tree.map(place, like), fn, *args)


def with_auto_axes(mesh: Any, out: Any, fn: Callable, *args: Any) -> Any:
    """Calls ``fn(*args)``, whose result is laid out by ``out`` on an Explicit mesh.

    Axes that are manual, in ``jax.shard_map`` over others, stay so.
    """
    auto: Callable = jax.sharding.auto_axes(
        fn, axes=mesh.explicit_axes, out_sharding=out
    )
    return auto(*args)


def explicit_sharding(leaf: Any) -> Any:
    """Returns the sharding in a leaf's type, None if its mesh has no explicit axes."""
    kind = jax.typeof(leaf) if isinstance(leaf, jax.Array) else leaf
    sharding = getattr(kind, "sharding", None)
    mesh = getattr(sharding, "mesh", None)
    return sharding if getattr(mesh, "explicit_axes", ()) else None


def vary_like(tree: Any, *like: Any) -> Any:
    """Returns arrays as ones of each device's own, along axes where ``like``'s are.

    Inside ``jax.shard_map`` a fresh array is known to be the same on all devices. A
    branch or a loop in which it meets a parameter of each device's own is ill-typed.
    """
    axes = set().union(*map(varied_axes, jax.tree.leaves(like)))
    if not axes:
        return tree

    def own(x: Any) -> Any:
        missing = tuple(sorted(axes - varied_axes(x), key=str))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(own, tree)


def varied_axes(x: Any) -> Any:
    """Returns the mapped axes along which an array is known to vary."""
    # An array of NumPy, or a shape, varies along none.
    kind = jax.typeof(x) if isinstance(x, jax.Array) else None
    manual = getattr(kind, "manual_axis_type", None)
    if manual is not None:
        return manual.varying
    return getattr(kind, "vma", frozenset())  # as it was called before
