"""What JAX knows of a mapped axis: its name, and what differs along it."""

from typing import Any

import jax

from lowrank_optax.leaves.matrix import path_string


def _names(axis_name: Any) -> tuple[Any, ...]:
    """Returns the axis' names; raises where one is not mapped."""
    names = tuple(axis_name) if isinstance(axis_name, tuple | list) else (axis_name,)
    for name in names:
        try:
            jax.lax.axis_size(name)
        except NameError:
            raise ValueError(
                f"axis_name={name!r} is no mapped axis here. Call this inside "
                f"jax.shard_map over a mesh with an axis {name!r} (in its axis_names, "
                f"if given), or inside jax.pmap(..., axis_name={name!r})."
            ) from None
    return names


def _varies(x: Any, name: Any) -> bool:
    """Whether JAX tracks that ``x`` differs from device to device.

    It does so under ``jax.shard_map`` with ``check_vma``, and refuses to let vary what
    already does.
    """
    try:
        jax.lax.pcast(x, name, to="varying")
    except ValueError:
        return True
    return False


def varying(tree: Any, axis_name: Any) -> Any:
    """Returns the tree as each device's own, so that its gradient is, too."""
    names = _names(axis_name)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if any(_varies(leaf, name) for name in names):
            raise ValueError(
                f"Parameter {path_string(path)!r} is itself spread over {axis_name!r} "
                f"(each device has {leaf.shape}), and there is one P^T G only where "
                "all devices have the whole of it. Replicate parameters over that axis "
                "(in_specs=P()); shard them over another, automatic, one."
            )
    return jax.lax.pcast(tree, names, to="varying")


def check_averaging(gradients: Any, axis_name: Any) -> None:
    """Raises for gradients that JAX knows to be the same on all devices."""
    for name in _names(axis_name):
        # An index differs from device to device by definition. If not even an index
        # counts as varying, JAX tracks nothing here.
        if not _varies(jax.lax.axis_index(name), name):
            continue  # not tracked
        for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
            if not _varies(leaf, name):
                raise ValueError(
                    f"The gradient of {path_string(path)!r}, shape {leaf.shape}, is "
                    f"the same on all devices of {name!r} already: jax.grad has summed "
                    "it, at full size, because the parameters were. Differentiate with "
                    f'jax.lax.pcast(params, {name!r}, to="varying"), or use '
                    "lro.distributed.value_and_grad."
                )
