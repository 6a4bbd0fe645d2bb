"""Explicit meshes: the step runs with automatic axes, its results keep their types."""

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
