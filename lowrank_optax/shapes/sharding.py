"""``state_shardings``: a sharding for every array of a state, from the parameters'."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from lowrank_optax.bracket.leaf import LowLeaf
from lowrank_optax.bracket.notice import quiet_init
from lowrank_optax.bracket.selection import broadcast_prefix, mesh_axes
from lowrank_optax.bracket.start import (
    Described,
    described,
    outside_brackets,
)
from lowrank_optax.leaves.boxes import is_box, unbox
from lowrank_optax.leaves.layout import axes_of_state, names_of, owners
from lowrank_optax.leaves.matrix import Axes, path_string
from lowrank_optax.leaves.part import transformation
from lowrank_optax.quantization import is_quantized

# A piece of a state: an array or an encoded one, the position of the parameter that it
# belongs to, and the axes of that parameter behind its own.
Piece = tuple[Any, int | None, Axes]


def state_shardings(
    tx: optax.GradientTransformation, params: Any, param_shardings: Any
) -> Any:
    """Returns a sharding for every array of ``tx``'s state, bases included.

    An axis of the state takes the mesh axes of the parameter axis behind it: a basis
    ``[*batch, m, r]`` is sharded like the parameter's batch and projected axes, a
    projection ``[*batch, r, n]`` like its batch and kept axes; moments of full leaves
    like the parameter. Mesh axes of the parameter that a matrix would not keep (the
    moments, where the projected axis is a sharded one) go to its larger axis, if they
    divide it. Mesh and memory are those of the parameter. Counters and keys, which
    belong to none, are replicated on the largest mesh, in its default memory. Without
    this, ``jax.jit(tx.init)(params)`` puts all state on one device, and the compiler
    replicates the bases after a step.

    Args:
      tx: any Optax transformation, with or without brackets inside.
      params: parameters or ShapeDtypeStructs of them, Flax-boxed or not.
      param_shardings: a tree like ``params`` (a prefix will do) of ``NamedSharding``
        or of ``PartitionSpec``, on Auto or Explicit meshes. Only a ``NamedSharding``
        knows its mesh, and so which axes can be divided for the last rule.

    Returns:
      A tree like ``tx.init(params)``, of ``NamedSharding`` (or ``PartitionSpec``, as
      given), for ``jax.jit(tx.init, out_shardings=...)``. Specs are spelled as jit
      spells those of its results, so that the first step and the second are one
      program: without the axes at the end that have no name, but on an Explicit mesh
      (the one in use, where the specs name none) with an entry for every axis.

    Raises:
      ValueError: if ``param_shardings`` is not a tree like ``params`` or a parameter
        has none.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jax.sharding import PartitionSpec as P
      >>> import lowrank_optax as lro
      >>> tx, params = lro.galore(1e-3, rank=4), {"kernel": jnp.ones((64, 32))}
      >>> specs = lro.state_shardings(tx, params, {"kernel": P("data", "model")})
      >>> specs.basis["kernel"] == P("model")
      True
      >>> specs.inner_state.mu["kernel"] == P(None, "data")
      True
    """
    flat, treedef = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_box)
    paths = [path_string(path) for path, _ in flat]
    shardings = _declared(paths, treedef, param_shardings)
    shapes = [unbox(leaf).shape for _, leaf in flat]
    own = treedef.unflatten(_own_axes(shape) for shape in shapes)
    # Brackets become `()`, which has no leaves, so the pieces come in the order in
    # which the walk below meets those outside of brackets.
    outside = iter(_pieces(outside_brackets(tx), params, own))
    specs, common = [], _common(shardings)

    def add(piece: Any, owner: int | None, axes: Axes, projected: bool) -> None:
        for array, behind in _arrays(piece, axes):
            spec, like = PartitionSpec(), common
            if owner is not None:
                like = shardings[owner]
                spec = _spec(behind, array.shape, shapes[owner], like)
                if projected:
                    spec = _spread(spec, array.shape, like)
            specs.append(_place(spec, array.shape, like))

    state = described(tx, params)
    for node in jax.tree.leaves(state, is_leaf=_is_piece):
        if isinstance(node, Described):
            # A bracket behind `optax.masked` or `optax.partition` counts the leaves
            # that it sees, not all.
            places = [paths.index(leaf.path) for leaf in node.plan.leaves]
            for piece, owner, axes in _of_bracket(node):
                projected = owner is not None and bool(node.plan.leaves[owner].matrix)
                add(piece, None if owner is None else places[owner], axes, projected)
        else:
            add(*next(outside), projected=False)
    structure = jax.tree.structure(jax.eval_shape(quiet_init(tx), params))
    return jax.tree.unflatten(structure, specs)


def _declared(paths: list[str], treedef: Any, param_shardings: Any) -> list[Any]:
    given = broadcast_prefix(param_shardings, treedef, "param_shardings")
    missing = [
        path
        for path, sharding in zip(paths, given, strict=True)
        if not isinstance(sharding, NamedSharding | PartitionSpec)
    ]
    if missing:
        raise ValueError(
            "state_shardings expected a NamedSharding or PartitionSpec for every "
            f"parameter; there is none for {missing}."
        )
    return given


def _own_axes(shape: tuple[int, ...]) -> Axes:
    return Axes((axis,) for axis in range(len(shape)))


def _is_piece(node: Any) -> bool:
    return isinstance(node, Described) or is_quantized(node) or is_box(node)


def _of_bracket(node: Described) -> list[Piece]:
    """Returns the pieces of a bracket's state, in the order of its leaves.

    Every part says what the axes of its arrays mean; of the inner transformation, which
    may be any, `axes_of_state` asks the init.
    """
    plan, bracket, state = node.plan, node.planner.bracket, node.state
    infos = [jax.ShapeDtypeStruct(leaf.shape, jnp.float32) for leaf in plan.leaves]
    leaves = plan.leaves_of(bracket, infos)
    low: list[Any] = list(infos)
    axes = [_own_axes(info.shape) for info in infos]
    basis, pending, recovery = [], [], []
    for i, leaf in enumerate(leaves):
        if not isinstance(leaf, LowLeaf):
            continue
        batch, stored = leaf.matrix.batch_axes, plan.flat(state.basis)[i]
        meanings = leaf.projector.axes(leaf.matrix)
        basis += _meant(stored, i, batch, jax.tree.leaves(meanings))
        pending += _meant(plan.flat(state.pending)[i], i, batch, [Axes()])
        kept = plan.flat(state.recovery_state)[i]
        if leaf.recovery is not None and leaf.recovery.whole:
            pieces = _pieces(leaf.recovery.start_whole, infos[i], axes[i])
            recovery += [(piece, i, found) for piece, _, found in pieces]
        elif leaf.recovery is not None and leaf.recovery.like_leaf:
            recovery += _meant(kept, i, axes[i], [Axes()])
        else:
            none = [Axes(((),) * (x.ndim - len(batch))) for x in jax.tree.leaves(kept)]
            recovery += _meant(kept, i, batch, none)
        low[i] = jax.eval_shape(
            functools.partial(node.planner.low_zeros, leaf), _unboxed(stored)
        )
        axes[i] = batch + leaf.matrix.low_axes
    # As the inner transformation and `full` see them; boxes hold the same arrays.
    plain = dataclasses.replace(plan, has_boxes=False)
    numbers = list(range(len(low)))
    split = [
        plain.inner_trees(bracket, None, leaves) for leaves in (low, axes, numbers)
    ]
    inner = []
    for tx, *trees in zip((bracket.inner, bracket.full), *split, strict=True):
        if tx is not None:
            tree, meanings, places = trees
            positions = jax.tree.leaves(places)
            for piece, owner, found in _pieces(transformation(tx).init, tree, meanings):
                inner.append(
                    (piece, None if owner is None else positions[owner], found)
                )
    clock = [(state.count, None, Axes()), (state.key, None, Axes(((),)))]
    return [*clock, *basis, *pending, *inner, *recovery]


def _meant(kept: Any, owner: int, first: Axes, meanings: list[Axes]) -> list[Piece]:
    """Pairs what is kept of a leaf with what its axes mean, ``first`` in front."""
    pieces = jax.tree.leaves(kept, is_leaf=_is_piece)
    if not pieces:
        return []
    return [
        (unbox(piece), owner, first + axes)
        for piece, axes in zip(pieces, meanings, strict=True)
    ]


def _unboxed(tree: Any) -> Any:
    return jax.tree.map(unbox, tree, is_leaf=is_box)


def _pieces(init: Any, params: Any, axes: Any) -> list[Piece]:
    """Returns the pieces of ``init(params)`` with their owners and axes."""
    found = jax.tree.leaves(axes_of_state(init, params, axes))
    pairs = jax.tree_util.tree_leaves_with_path(
        jax.eval_shape(init, params), is_leaf=_is_piece
    )
    owner = owners([names_of(path) for path, _ in pairs], params)
    return [
        (unbox(piece), i, behind)
        for (_, piece), i, behind in zip(pairs, owner, found, strict=True)
    ]


def _arrays(piece: Any, axes: Axes) -> list[tuple[Any, Axes]]:
    """Returns the arrays of a piece with the axes behind theirs.

    Scales, and codes that share bytes, have a shorter last axis, or a row for each
    batch axis alone.
    """
    if not is_quantized(piece):
        return [(piece, axes)]
    arrays = jax.tree.leaves(_unboxed(piece))
    flat = Axes((*axes[:-2], ()))
    return [(x, axes if x.ndim == len(axes) else flat) for x in arrays]


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


def _common(shardings: list[Any]) -> Any:
    """Returns where counters and keys are: on the largest mesh, the first of equals."""
    meshes = [each.mesh for each in shardings if isinstance(each, NamedSharding)]
    if not meshes:
        return PartitionSpec()
    return NamedSharding(max(meshes, key=lambda mesh: mesh.size), PartitionSpec())


def _place(spec: PartitionSpec, shape: tuple[int, ...], like: Any) -> Any:
    """Returns the sharding in the spelling of jit's own results.

    To its cache two spellings are two programs. Axes at the end without a name are left
    out, but in the type of an array on an Explicit mesh, which has an entry for each.
    """
    named = isinstance(like, NamedSharding)
    mesh = like.mesh if named else jax.sharding.get_abstract_mesh()
    entries = [_entry(mesh_axes(entry)) for entry in spec]
    while entries and entries[-1] is None:
        entries.pop()
    if mesh.explicit_axes:
        entries += [None] * (len(shape) - len(entries))
    spec = PartitionSpec(*entries)
    return NamedSharding(mesh, spec, memory_kind=like.memory_kind) if named else spec
