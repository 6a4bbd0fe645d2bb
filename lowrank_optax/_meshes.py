"""Explicit meshes: the step runs with automatic axes, its results keep their types."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import optax

Factory = TypeVar("Factory", bound=Callable[..., Any])


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
    # Axes that are manual, in jax.shard_map over others, stay so.
    auto: Callable = jax.sharding.auto_axes(
        fn, axes=mesh.explicit_axes, out_sharding=out
    )
    return auto(*args)


def under_auto_axes(step: Callable, updates, state, params, extra_args) -> Any:
    """Calls ``step(updates, state, params, extra_args)`` on any kind of mesh.

    On an Explicit mesh every result of a step has the type of something that went
    in: the update that of the gradient, the new state that of the old. So the
    step itself can leave all sharding to the compiler, as on an Auto mesh. Arrays that
    the step closes over keep their explicit type: see ``hands_arrays_over``.
    """
    return explicit_like((updates, state), step, updates, state, params, extra_args)


def hands_arrays_over(make: Factory) -> Factory:
    """Lets a factory of transformations take arrays as hyperparameters on any mesh.

    An array that a transformation closes over keeps its explicit type, which a step
    with automatic axes refuses. On an Explicit mesh the arrays are therefore handed to
    the step like its other arguments, and the transformation is made again inside.
    ``optax.inject_hyperparams`` is the usual source of such arrays.
    """

    @functools.wraps(make)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        made = make(*args, **kwargs)
        leaves, treedef = jax.tree.flatten((args, kwargs))
        arrays = {i: x for i, x in enumerate(leaves) if isinstance(x, jax.Array)}
        if not arrays or not isinstance(made, optax.GradientTransformation):
            return made

        def update(updates, state, params=None, **extra_args):
            if explicit_mesh((updates, state, params)) is None:
                return made.update(updates, state, params, **extra_args)

            def step(updates, state, params, given):
                arrays, extra_args = given
                again = [arrays.get(i, leaf) for i, leaf in enumerate(leaves)]
                args, kwargs = treedef.unflatten(again)
                inside = make(*args, **kwargs)
                return inside.update(updates, state, params, **extra_args)

            return under_auto_axes(step, updates, state, params, (arrays, extra_args))

        return optax.GradientTransformationExtraArgs(made.init, update)

    return wrapped  # pyright: ignore[reportReturnType]
