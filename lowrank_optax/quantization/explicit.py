"""Explicit meshes: blocks are cut and joined with automatic axes."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

Axes = tuple[Any, ...]


def axes_of(x: Any) -> Axes | None:
    """Returns what each axis is cut over, None for an array on no Explicit mesh."""
    sharding = jax.typeof(x).sharding
    if not sharding.mesh.explicit_axes:
        return None
    return (*sharding.spec, *[None] * (x.ndim - len(sharding.spec)))


def rows_of(axes: Axes, batch: int, ndim: int) -> Axes:
    """Returns the axes of what has rows for as many batch axes; rows are whole."""
    return (*axes[:batch], *[None] * (ndim - batch))


def under_auto_axes(fn: Callable, like: Any, out: Sequence[Axes], *args: Any) -> Any:
    """Returns ``fn(*args)``, a sequence of arrays whose axes are ``out``.

    A block may lie on several devices, and then no type says how its array is cut.
    Axes that are manual stay so.
    """
    mesh = jax.typeof(like).sharding.mesh
    places = tuple(NamedSharding(mesh, PartitionSpec(*axes)) for axes in out)
    auto: Callable = jax.sharding.auto_axes(
        fn, axes=mesh.explicit_axes, out_sharding=places
    )
    return auto(*args)
