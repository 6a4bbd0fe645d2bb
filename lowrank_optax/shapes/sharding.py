"""Shardings of an optimizer state, derived from those of the parameters."""

import math
from collections.abc import Iterator
from typing import Any

import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec

from lowrank_optax.bracket.plan import abstract_init, recording
from lowrank_optax.bracket.selection import broadcast_prefix, mesh_axes
from lowrank_optax.leaves.matrix import Matrix, is_box, path_string, unbox
from lowrank_optax.shapes.memory import ENCODED, owned_leaves

Axes = tuple[tuple[int, ...], ...]


def state_shardings(
    tx: optax.GradientTransformation, params: Any, param_shardings: Any
) -> Any:
    """Returns a sharding for every array of ``tx``'s state, bases included.

    An axis of the state takes the mesh axes of the parameter axis behind it: a basis
    ``[*batch, m, r]`` is sharded like the parameter's batch and projected axes, a
    projection ``[*batch, r, n]`` like its batch and kept axes; moments of full leaves
    like the parameter. Mesh axes of the parameter that a matrix would not keep (the
    moments, where the projected axis is a sharded one) go to its larger axis, if they
    divide it. Counters and keys are replicated. Without this,
    ``jax.jit(tx.init)(params)`` puts all state on one device, and the compiler
    replicates the bases after a step.

    Args:
      tx: any Optax transformation, with or without brackets inside.
      params: parameters or ShapeDtypeStructs of them, Flax-boxed or not.
      param_shardings: a tree like ``params`` (a prefix will do) of ``NamedSharding``
        or of ``PartitionSpec``, on Auto or Explicit meshes. Only a ``NamedSharding``
        knows its mesh, and so which axes can be divided for the last rule.

    Returns:
      A tree like ``tx.init(params)``, of ``NamedSharding`` (or ``PartitionSpec``, as
      given), for ``jax.jit(tx.init, out_shardings=...)``.

    Raises:
      ValueError: if ``param_shardings`` is not a tree like ``params`` or a parameter
        has none.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jax.sharding import PartitionSpec as P
      >>> import lowrank_optax as lro
      >>> tx, params = lro.galore(1e-3, rank=4), {"kernel": jnp.ones((64, 32))}
      >>> specs = lro.state_shardings(tx, params, {"kernel": P("data", "model")})
      >>> specs.basis["kernel"] == P("model", None)
      True
      >>> specs.inner_state.mu["kernel"] == P(None, "data")
      True
    """
    with recording() as records:
        state = abstract_init(tx, params)
    matrices = {
        matrix.path: matrix
        for record in records
        for _, matrix in record.plan.matrices()
    }
    shapes, shardings = _by_path(params, param_shardings)
    like = next(iter(shardings.values()), PartitionSpec())
    out = []
    for keys, owner, leaf in owned_leaves(state, params):
        spec = PartitionSpec()
        if owner is not None:
            encoded = bool(set(keys[-1:]) & set(ENCODED))
            within = keys[:-1] if encoded else keys
            side = within[-1] if within[-1:] in (("left",), ("right",)) else None
            whole = "recovery_state" in keys  # as error feedback: the leaf's own shape
            matrix = (
                None if whole and leaf.shape == shapes[owner] else matrices.get(owner)
            )
            stored = "basis" in keys
            candidates = _layouts(shapes[owner], matrix, side, stored)
            axes = _agreed(_fitting(list(candidates), leaf.shape, encoded))
            spec = _spec(axes, leaf.shape, shapes[owner], shardings[owner])
            if owner in matrices:
                spec = _spread(spec, leaf.shape, shardings[owner])
        out.append(_place(spec, like))
    return jax.tree.unflatten(jax.tree.structure(state), out)


def _by_path(params: Any, param_shardings: Any):
    flat, treedef = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_box)
    given = broadcast_prefix(param_shardings, treedef, "param_shardings")
    paths = [path_string(path) for path, _ in flat]
    missing = [
        path for path, sharding in zip(paths, given, strict=True) if not _ok(sharding)
    ]
    if missing:
        raise ValueError(
            "state_shardings expected a NamedSharding or PartitionSpec for every "
            f"parameter; there is none for {missing}."
        )
    shapes = {
        path: unbox(leaf).shape for path, (_, leaf) in zip(paths, flat, strict=True)
    }
    return shapes, dict(zip(paths, given, strict=True))


def _ok(sharding: Any) -> bool:
    return isinstance(sharding, NamedSharding | PartitionSpec)


def _layouts(
    shape: tuple[int, ...], matrix: Matrix | None, side: str | None, stored: bool
) -> Iterator[tuple[tuple[int, ...], Axes]]:
    """Yields the shapes a state array of a parameter may have, and their axes.

    ``stored``: whether it belongs to the basis, as its optimizer's moments do.
    """
    if matrix is None:
        yield from _factors(shape, tuple((axis,) for axis in range(len(shape))))
        return
    batch = matrix.batch_shape
    if stored:
        seen = matrix if side is None else matrix.seen_from(side)
        yield from _factors((*batch, seen.m, seen.rank), seen.basis_axes)
    else:
        kept = matrix.blocks * matrix.rank if matrix.side == "both" else matrix.n
        yield from _factors((*batch, matrix.rank, kept), matrix.low_axes)
    yield batch, matrix.basis_axes[: len(batch)]


def _factors(shape: tuple[int, ...], axes: Axes) -> Iterator[tuple[tuple, Axes]]:
    """Yields the array itself and its factors over the last two axes."""
    yield shape, axes
    if len(shape) >= 2:
        yield shape[:-1], axes[:-1]
        yield (*shape[:-2], shape[-1]), (*axes[:-2], axes[-1])


def _fitting(
    candidates: list[tuple[tuple, Axes]], shape: tuple[int, ...], encoded: bool
) -> list[Axes]:
    """Returns the axes of the layouts that have this shape.

    The scales and the packed codes of an encoded array have fewer columns, or a row for
    each of its batch axes alone.
    """
    fits = [axes for other, axes in candidates if other == shape]
    if fits or not encoded or not shape:
        return fits
    lead = shape[:-1]
    fits = [axes for other, axes in candidates if other[:-1] == lead and other]
    return fits or [(*axes, ()) for other, axes in candidates if other == lead]


def _agreed(candidates: list[Axes]) -> Axes:
    """Keeps the axes on which all layouts of the same shape agree."""
    if not candidates:
        return ()
    return tuple(
        groups[0] if len(set(groups)) == 1 else ()
        for groups in zip(*candidates, strict=True)
    )


def _spec(
    axes: Axes, shape: tuple[int, ...], owner: tuple[int, ...], sharding: Any
) -> PartitionSpec:
    spec = sharding.spec if isinstance(sharding, NamedSharding) else sharding
    names = [*spec, *[None] * (len(owner) - len(spec))]

    def name(group: tuple[int, ...], size: int) -> Any:
        # Axes merged into one can keep a sharding only of the slowest of them.
        if not group or any(names[axis] is not None for axis in group[1:]):
            return None
        # A shorter axis keeps it if the parts are still whole.
        shorter = size != math.prod(owner[axis] for axis in group)
        return (
            None if shorter and not _divides(names[group[0]], size) else names[group[0]]
        )

    def _divides(entry: Any, size: int) -> bool:
        if not isinstance(sharding, NamedSharding):
            return False
        parts = math.prod(sharding.mesh.shape[axis] for axis in mesh_axes(entry))
        return size % parts == 0

    sizes = shape[: len(axes)]
    return PartitionSpec(*map(name, axes, sizes))


def _spread(
    spec: PartitionSpec, shape: tuple[int, ...], sharding: Any
) -> PartitionSpec:
    """Gives a matrix the mesh axes of its parameter that it did not keep.

    The parameter's axis that they cut is the one this array was projected along, or
    lacks. Each goes to that of the last two axes of which a device has the most so far,
    if the parts are still whole.
    """
    if not isinstance(sharding, NamedSharding) or len(shape) < 2:
        return spec
    sizes = sharding.mesh.shape
    placed = [mesh_axes(entry) for entry in (*spec, *[None] * len(shape))]
    placed = placed[: len(shape)]
    kept = {name for names in placed for name in names}

    def local(axis: int) -> int:
        return shape[axis] // math.prod(sizes[name] for name in placed[axis])

    for name in (name for entry in sharding.spec for name in mesh_axes(entry)):
        fits = [a for a in (-1, -2) if local(a) % sizes[name] == 0]
        if sizes[name] == 1 or name in kept or not fits:
            continue
        place = max(fits, key=local)
        placed[place] = (*placed[place], name)
    return PartitionSpec(*map(_entry, placed))


def _entry(names: tuple[str, ...]) -> Any:
    return names if len(names) > 1 else next(iter(names), None)


def _place(spec: PartitionSpec, like: Any) -> Any:
    if isinstance(like, NamedSharding):
        return NamedSharding(like.mesh, spec, memory_kind=like.memory_kind)
    return spec
