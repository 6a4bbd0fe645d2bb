"""``places_of``: the sharding of every array of a state, from its parameter's.

Every part of a bracket says what the axes of its arrays mean; what it does not say is
found by asking the init. An axis takes the mesh axes of the parameter's behind it.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from lowrank_optax._meshes import explicit_mesh, explicit_sharding
from lowrank_optax.bracket.leaf import LowLeaf
from lowrank_optax.bracket.plan import Plan
from lowrank_optax.bracket.planner import Planner
from lowrank_optax.bracket.selection import mesh_axes
from lowrank_optax.bracket.state import SubspaceState
from lowrank_optax.leaves.boxes import is_box, unbox, unbox_tree
from lowrank_optax.leaves.layout import axes_of_state, names_of, owners
from lowrank_optax.leaves.matrix import Axes
from lowrank_optax.leaves.part import transformation
from lowrank_optax.quantization import is_quantized

# A piece of a state: an array or an encoded one, the position of the parameter that it
# belongs to, and the axes of that parameter behind its own.
Piece = tuple[Any, int | None, Axes]


def places_of(
    piece: Any, axes: Axes, owner: tuple[int, ...], like: Any, projected: bool
) -> list[Any]:
    """Returns the sharding of every array of a piece of a state.

    Args:
      piece: an array or an encoded one, whose arrays lie as the one they stand for.
      axes: those of its owner behind its own.
      owner: the shape of the parameter that it belongs to.
      like: that one's sharding, a ``NamedSharding`` or a ``PartitionSpec``.
      projected: whether it is projected, so that its matrices may take the mesh axes
        that they would not keep.
    """
    piece = unbox_tree(piece)
    spec = _spec(axes, piece.shape, owner, like)
    if projected:
        spec = _spread(spec, piece.shape, like)
    entries = (*spec, *[None] * (len(piece.shape) - len(spec)))
    # Scales that cannot be cut as their codes are stay whole: by rows, the first step
    # would give them back whole, and be compiled again for that.
    return [
        _spelled(_shorter(entries, piece.shape, x.shape, like), x.shape, like)
        for x in jax.tree.leaves(piece)
    ]


def laid_out(planner: Planner, params: Any, state: SubspaceState) -> SubspaceState:
    """Returns a fresh bracket's state where its parameters are, if they say so.

    Arrays on several devices do, and under ``jax.jit`` types on an Explicit mesh.
    """
    return _moved(state, _places(planner, params, state), lambda x: True)


def typed(planner: Planner, params: Any, state: SubspaceState) -> SubspaceState:
    """Returns a state whose arrays have types on the parameters' Explicit mesh.

    Those that have none, as arrays of NumPy and those made before there was a mesh,
    get the types that a fresh state has.
    """
    if explicit_mesh(params) is None or not any(
        map(_is_untyped, jax.tree.leaves(state))
    ):
        return state
    return _moved(state, _places(planner, params, state), _is_untyped)


def _is_untyped(x: Any) -> bool:
    return jax.typeof(x).sharding.mesh.empty


def _places(planner: Planner, params: Any, state: SubspaceState) -> list[Any]:
    """Returns the sharding of every array of the state, None where it is not known."""
    plan = planner.plan(params)
    places = [_known(x) for x in plan.arrays(params)]
    known = [place for place in places if place is not None]
    if not known:
        return [None] * len(jax.tree.leaves(state))
    # Of several meshes none is known to be the one of the step.
    common = common_place(known) if len({place.mesh for place in known}) == 1 else None
    found = []
    for piece, owner, axes in of_bracket(planner, plan, state):
        like, shape, projected = common, (), False
        if owner is not None:
            leaf = plan.leaves[owner]
            like, shape = places[owner], leaf.shape
            projected = leaf.matrix is not None
        if like is None:
            found += [None] * len(jax.tree.leaves(piece))
        else:
            found += places_of(piece, axes, shape, like, projected)
    return found


def _known(leaf: Any) -> NamedSharding | None:
    """Returns where a parameter is, None if that is one device, or not known yet."""
    if not isinstance(leaf, jax.Array) or isinstance(leaf, Tracer):
        return explicit_sharding(leaf)
    place = leaf.sharding
    return place if isinstance(place, NamedSharding) and place.mesh.size > 1 else None


def _moved(state: Any, places: list[Any], chosen: Callable[[Any], bool]) -> Any:
    def move(x: Any, place: NamedSharding | None) -> Any:
        if place is None or not chosen(x):
            return x
        # A mesh without devices is that of a type, where arrays are traced.
        if isinstance(place.mesh, jax.sharding.AbstractMesh):
            return jax.sharding.reshard(x, place)
        return jax.device_put(x, place)

    arrays, structure = jax.tree.flatten(state)
    return structure.unflatten(map(move, arrays, places))


def common_place(shardings: list[Any]) -> Any:
    """Returns where counters and keys are: on the largest mesh, the first of equals."""
    meshes = [each.mesh for each in shardings if isinstance(each, NamedSharding)]
    if not meshes:
        return PartitionSpec()
    return NamedSharding(max(meshes, key=lambda mesh: mesh.size), PartitionSpec())


def own_axes(shape: tuple[int, ...]) -> Axes:
    return Axes((axis,) for axis in range(len(shape)))


def _is_whole(node: Any) -> bool:
    return is_quantized(node) or is_box(node)


def of_bracket(planner: Planner, plan: Plan, state: SubspaceState) -> list[Piece]:
    """Returns the pieces of a bracket's state, in the order of its leaves.

    Every part says what the axes of its arrays mean; of the inner transformation, which
    may be any, `axes_of_state` asks the init.
    """
    bracket = planner.bracket
    infos = [jax.ShapeDtypeStruct(leaf.shape, jnp.float32) for leaf in plan.leaves]
    leaves = plan.leaves_of(bracket, infos)
    low: list[Any] = list(infos)
    axes = [own_axes(info.shape) for info in infos]
    basis, pending, recovery, sample = [], [], [], []
    for i, leaf in enumerate(leaves):
        if not isinstance(leaf, LowLeaf):
            continue
        batch, stored = leaf.matrix.batch_axes, plan.flat(state.basis)[i]
        meanings = leaf.projector.axes(leaf.matrix)
        basis += _meant(stored, i, batch, jax.tree.leaves(meanings))
        pending += _meant(plan.flat(state.pending)[i], i, batch, [Axes()])
        kept = plan.flat(state.recovery_state)[i]
        if leaf.recovery is not None and leaf.recovery.whole:
            pieces = pieces_of(leaf.recovery.start_whole, infos[i], axes[i])
            recovery += [(piece, i, found) for piece, _, found in pieces]
        elif leaf.recovery is not None and leaf.recovery.like_leaf:
            recovery += _meant(kept, i, axes[i], [Axes()])
        else:
            none = [Axes(((),) * (x.ndim - len(batch))) for x in jax.tree.leaves(kept)]
            recovery += _meant(kept, i, batch, none)
        columns = Axes(((), ()))  # of a few numbers each: not worth an axis of the mesh
        kept = plan.flat(state.sample)[i]
        sample += _meant(kept, i, batch, [columns] * len(jax.tree.leaves(kept)))
        low[i] = jax.eval_shape(
            functools.partial(planner.low_zeros, leaf), unbox_tree(stored)
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
            found = pieces_of(transformation(tx).init, tree, meanings)
            inner += [
                (piece, None if owner is None else positions[owner], behind)
                for piece, owner, behind in found
            ]
    clock = [(state.count, None, Axes()), (state.key, None, Axes(((),)))]
    return [*clock, *basis, *pending, *inner, *recovery, *sample]


def _meant(kept: Any, owner: int, first: Axes, meanings: list[Axes]) -> list[Piece]:
    """Pairs what is kept of a leaf with what its axes mean, ``first`` in front."""
    pieces = jax.tree.leaves(kept, is_leaf=_is_whole)
    if not pieces:
        return []
    return [
        (unbox(piece), owner, first + axes)
        for piece, axes in zip(pieces, meanings, strict=True)
    ]


def pieces_of(init: Any, params: Any, axes: Any) -> list[Piece]:
    """Returns the pieces of ``init(params)`` with their owners and axes."""
    found = jax.tree.leaves(axes_of_state(init, params, axes))
    pairs = jax.tree_util.tree_leaves_with_path(
        jax.eval_shape(init, params), is_leaf=_is_whole
    )
    owner = owners([names_of(path) for path, _ in pairs], params)
    return [
        (unbox(piece), i, behind)
        for (_, piece), i, behind in zip(pairs, owner, found, strict=True)
    ]


def _shorter(
    entries: tuple[Any, ...], whole: tuple[int, ...], shape: tuple[int, ...], like: Any
) -> PartitionSpec:
    """Returns the spec of an array that is a part of another's encoded form.

    Scales, and codes that share bytes, have a shorter last axis, or a row for each
    batch axis alone.
    """
    if len(shape) != len(whole):
        return PartitionSpec(*entries[:-2])
    return PartitionSpec(
        *(
            entry if size == long or _divides(like, entry, size) else None
            for entry, long, size in zip(entries, whole, shape, strict=True)
        )
    )


def _divides(like: Any, entry: Any, size: int) -> bool:
    """Whether mesh axes are known to divide an axis of an array."""
    if not isinstance(like, NamedSharding):
        return False
    return size % math.prod(like.mesh.shape[axis] for axis in mesh_axes(entry)) == 0


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
        entry, long = names[group[0]], math.prod(owner[axis] for axis in group)
        return entry if size == long or _divides(sharding, entry, size) else None

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


def _spelled(spec: PartitionSpec, shape: tuple[int, ...], like: Any) -> Any:
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
