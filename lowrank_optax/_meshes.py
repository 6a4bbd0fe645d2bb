"""Explicit meshes: the step runs with automatic axes, its results keep their types."""

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import jax


def explicit_mesh(tree: Any) -> Any:
    """Returns the mesh with explicit axes that the tree's arrays live on, if any."""
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array):
            mesh = jax.typeof(leaf).sharding.mesh
            if mesh.explicit_axes:
                return mesh
    return None


def explicit_like(like: Any, fn: Callable, *args: Any) -> Any:
    """Calls ``fn(*args)``, whose result has the types of ``like``, on any mesh."""
    mesh = explicit_mesh((like, args))
    if mesh is None:
        return fn(*args)
    out = jax.tree.map(lambda x: jax.typeof(x).sharding, like)
    return with_auto_axes(mesh, out, fn, *args)


def with_auto_axes(mesh: Any, out: Any, fn: Callable, *args: Any) -> Any:
    """Calls ``fn(*args)``, whose result is laid out by ``out`` on an Explicit mesh.

    Axes that are manual, in ``jax.shard_map`` over others, stay so.
    """
    auto: Callable = jax.sharding.auto_axes(
        fn, axes=mesh.explicit_axes, out_sharding=out
    )
    return auto(*args)


def under_auto_axes(step: Callable, updates, state, params, extra_args) -> Any:
    """Calls ``step(updates, state, params, extra_args)`` on any kind of mesh.

    On an Explicit mesh every result of a step has the type of something that went
    in: the update that of the gradient, the new state that of the old. So the
    step itself can leave all sharding to the compiler, as on an Auto mesh. Arrays that
    the step closes over keep their explicit type: see ``_handed``.
    """
    return explicit_like((updates, state), step, updates, state, params, extra_args)


_OUTSIDE: contextvars.ContextVar[Mapping[str, Any]] = contextvars.ContextVar(
    "outside", default=MappingProxyType({})
)


@contextlib.contextmanager
def outside_shardings(by_path: Mapping[str, Any]) -> Iterator[None]:
    """Inside the block axes are automatic; leaves had these shardings before."""
    token = _OUTSIDE.set(by_path)
    try:
        yield
    finally:
        _OUTSIDE.reset(token)


def outside_sharding(path: str) -> Any:
    """Returns the sharding that a leaf had outside of automatic axes, if known."""
    return _OUTSIDE.get().get(path)
