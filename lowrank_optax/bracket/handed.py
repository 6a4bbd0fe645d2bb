"""Arrays as hyperparameters on Explicit meshes: they are handed to the step."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import optax

from lowrank_optax._meshes import explicit_mesh, outside_shardings, under_auto_axes
from lowrank_optax.leaves.matrix import is_box, path_string, unbox
from lowrank_optax.leaves.slices import with_layer

Factory = TypeVar("Factory", bound=Callable[..., Any])


def hands_arrays_over(make: Factory) -> Factory:
    """Lets a factory of transformations take arrays as hyperparameters on any mesh.

    An array that a transformation closes over keeps its explicit type, which a step
    with automatic axes refuses. On an Explicit mesh the arrays are therefore handed to
    the step like its other arguments, and the transformation is made again inside,
    where leaves are known by the shardings they have outside.
    ``optax.inject_hyperparams`` is the usual source of such arrays. Only arguments of
    the factory are found: an array inside a part, or in a transformation that is given
    ready-made, must be on an Auto mesh.
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

            step, given = with_layer(step, (arrays, extra_args))
            with outside_shardings(_shardings(updates if params is None else params)):
                return under_auto_axes(step, updates, state, params, given)

        return optax.GradientTransformationExtraArgs(made.init, update)

    return wrapped  # pyright: ignore[reportReturnType]


def _shardings(tree: Any) -> dict[str, Any]:
    pairs, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_box)
    arrays = {path_string(path): unbox(leaf) for path, leaf in pairs}
    return {
        path: jax.typeof(leaf).sharding
        for path, leaf in arrays.items()
        if isinstance(leaf, jax.Array)
    }
