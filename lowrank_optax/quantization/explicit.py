"""Explicit meshes: blocks are cut and joined with automatic axes."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from lowrank_optax._meshes import with_auto_axes

Axes = tuple[Any, ...]


def axes_of(x: Any) -> Axes | None:
    """Returns what each axis is cut over, None for an array on no Explicit mesh."""
    sharding = jax.typeof(x).sharding
    if not sharding.mesh.explicit_axes:
        return None
    return (*sharding.spec, *[None] * (x.ndim - len(sharding.spec)))


def rows_of(like: Any, axes: Axes, batch: int, shape: Sequence[int]) -> Axes:
    """Returns the axes of an array with as many batch axes, and rows, as another.

    Args:
      like: an array on the mesh.
      axes: those of the other array.
      batch: how many axes come before rows.
      shape: the array's own; rows that the devices do not divide are whole.
    """
    out = [*axes[:batch], *[None] * (len(shape) - batch)]
    if len(axes) == len(shape) == batch + 1:
        last = axes[-1] or ()
        names = (last,) if isinstance(last, str) else last
        sizes = jax.typeof(like).sharding.mesh.shape
        if shape[-1] % math.prod(sizes[name] for name in names) == 0:
            out[-1] = axes[-1]
    return tuple(out)


def with_axes(fn: Callable, like: Any, out: Sequence[Axes], *args: Any) -> Any:
    """Returns ``fn(*args)``, a sequence of arrays whose axes are ``out``.

    A block may lie on several devices, and then no type says how its array is cut.
    """
    mesh = jax.typeof(like).sharding.mesh
    places = tuple(NamedSharding(mesh, PartitionSpec(*axes)) for axes in out)
    return with_auto_axes(mesh, places, fn, *args)
