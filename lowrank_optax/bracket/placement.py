"""``places_of``: the sharding of every array of a state, from its parameter's.

Every part of a bracket says what the axes of its arrays mean; what it does not say is
found by asking the init. An axis takes the mesh axes of the parameter's behind it.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

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


class Seen(NamedTuple):
    """A basis or a projection: a stack of matrices made of a parameter.

    Attributes:
      shape: its own.
      axes: those of the parameter behind its own.
    """

    shape: tuple[int, ...]
    axes: Axes


class Piece(NamedTuple):
    """A piece of a state, and what its axes mean.

    Attributes:
      array: an array or an encoded one, whose arrays lie as the one they stand for.
      owner: the position of the parameter that it belongs to, None if it is of none.
      axes: those of its parameter behind its own, or those of ``seen``.
      seen: the basis or the projection that it is, or that it was made of; it lies as
        that does.
    """

    array: Any
    owner: int | None
    axes: Axes
    seen: Seen | None = None


def places_of(piece: Piece, owner: tuple[int, ...], like: Any) -> list[Any]:
    """Returns the sharding of every array of a piece of a state.

    Args:
      piece: the piece.
      owner: the shape of the parameter that it belongs to.
      like: that one's sharding, a ``NamedSharding`` or a ``PartitionSpec``.
    """
    array, seen = unbox_tree(piece.array), piece.seen
    if seen is not None:
        spec = _spread(_spec(seen.axes, seen.shape, owner, like), seen.shape, like)
        owner, like = seen.shape, _with_spec(like, spec)
    spec = _spec(piece.axes, array.shape, owner, like)
    entries = (*spec, *[None] * (len(array.shape) - len(spec)))
    # Scales that cannot be cut as their codes are stay whole: by rows, the first step
    # would give them back whole, and be compiled again for that.
    return [
        _spelled(_shorter(entries, array.shape, x.shape, like), x.shape, like)
        for x in jax.tree.leaves(array)
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
    for piece in of_bracket(planner, plan, state):
        like, shape = common, ()
        if piece.owner is not None:
            like, shape = places[piece.owner], plan.leaves[piece.owner].shape
        if like is None:
            found += [None] * len(jax.tree.leaves(piece.array))
        else:
            found += places_of(piece, shape, like)
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
    seen: list[Seen | None] = [None] * len(infos)
    basis, pending, recovery, sample = [], [], [], []
    for i, leaf in enumerate(leaves):
        if not isinstance(leaf, LowLeaf):
            continue
        matrix, own = leaf.matrix, own_axes(infos[i].shape)
        batch, stored = matrix.batch_axes, plan.flat(state.basis)[i]
        pending += _meant(plan.flat(state.pending)[i], i, batch, [Axes()])
        kept = plan.flat(state.recovery_state)[i]
        if leaf.recovery is not None and leaf.recovery.whole:
            pieces = pieces_of(leaf.recovery.start_whole, infos[i])
            recovery += [piece._replace(owner=i) for piece in pieces]
        elif leaf.recovery is not None and leaf.recovery.like_leaf:
            recovery += _meant(kept, i, own, [Axes()])
        else:
            meant = () if leaf.recovery is None else leaf.recovery.axes(matrix)
            recovery += _meant(kept, i, batch, jax.tree.leaves(meant))
        columns = Axes(((), ()))  # of a few numbers each: not worth an axis of the mesh
        kept = plan.flat(state.sample)[i]
        sample += _meant(kept, i, batch, [columns] * len(jax.tree.leaves(kept)))
        low[i] = jax.eval_shape(
            functools.partial(planner.low_zeros, leaf), unbox_tree(stored)
        )
        seen[i] = projection = Seen(low[i].shape, batch + matrix.low_axes)
        basis += _of_basis(leaf, stored, i, projection)
    # As the inner transformation and `full` see them; boxes hold the same arrays.
    plain = dataclasses.replace(plan, has_boxes=False)
    split = [plain.inner_trees(bracket, None, x) for x in (low, list(range(len(low))))]
    inner = []
    for tx, tree, positions in zip((bracket.inner, bracket.full), *split, strict=True):
        if tx is None:
            continue
        numbers = jax.tree.leaves(positions)
        for piece in pieces_of(transformation(tx).init, tree):
            if piece.owner is not None:
                owner = numbers[piece.owner]
                piece = piece._replace(owner=owner, seen=seen[owner])
            inner.append(piece)
    clock = [Piece(state.count, None, Axes()), Piece(state.key, None, Axes(((),)))]
    return [*clock, *basis, *pending, *inner, *recovery, *sample]


def _meant(kept: Any, owner: int, first: Axes, meanings: list[Axes]) -> list[Piece]:
    """Pairs what is kept of a leaf with what its axes mean, ``first`` in front."""
    pieces = jax.tree.leaves(kept, is_leaf=_is_whole)
    if not pieces:
        return []
    return [
        Piece(unbox(piece), owner, first + axes)
        for piece, axes in zip(pieces, meanings, strict=True)
    ]


def _of_basis(leaf: LowLeaf, stored: Any, owner: int, low: Seen) -> list[Piece]:
    """Returns the pieces of a leaf's bases, and of what is kept beside them."""
    matrix, batch = leaf.matrix, leaf.matrix.batch_axes
    meanings = jax.tree.leaves(leaf.projector.axes(matrix))
    bases = (*matrix.batch_shape, matrix.m, matrix.rank)
    seen = {"basis": Seen(bases, batch + matrix.basis_axes), "projection": low}

    def place(piece: Piece, meaning: Axes) -> Piece:
        shape = piece.array.shape
        if meaning.of in seen:
            own = [tuple(axis + len(batch) for axis in group) for group in meaning]
            axes = own_axes(matrix.batch_shape) + tuple(own)
            return piece._replace(axes=axes, seen=seen[meaning.of])
        if len(meaning) == 2:  # a basis itself
            return piece._replace(axes=own_axes(shape), seen=Seen(shape, piece.axes))
        return piece

    return list(map(place, _meant(stored, owner, batch, meanings), meanings))


def pieces_of(init: Any, params: Any) -> list[Piece]:
    """Returns the pieces of ``init(params)`` with their owners and axes."""
    found = jax.tree.leaves(axes_of_state(init, params))
    pairs = jax.tree_util.tree_leaves_with_path(
        jax.eval_shape(init, params), is_leaf=_is_whole
    )
    owner = owners([names_of(path) for path, _ in pairs], params)
    return [
        Piece(unbox(array), i, behind)
        for (_, array), i, behind in zip(pairs, owner, found, strict=True)
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
    taken = set()

    def name(group: tuple[int, ...], size: int) -> Any:
        # Axes merged into one can keep a sharding only of the slowest of them.
        if not group or any(names[axis] is not None for axis in group[1:]):
            return None
        # A shorter axis keeps it if the parts are still whole.
        entry, long = names[group[0]], math.prod(owner[axis] for axis in group)
        # Of two with the same axis behind them, as a preconditioner's, one is cut.
        if group[0] in taken or not (size == long or _divides(sharding, entry, size)):
            return None
        taken.add(group[0])
        return entry

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
    known = isinstance(like, NamedSharding)
    mesh = like.mesh if known else jax.sharding.get_abstract_mesh()
    entries = [_entry(mesh_axes(entry)) for entry in spec]
    while entries and entries[-1] is None:
        entries.pop()
    if mesh.explicit_axes:
        entries += [None] * (len(shape) - len(entries))
    return _with_spec(like, PartitionSpec(*entries))


def _with_spec(like: Any, spec: PartitionSpec) -> Any:
    """Returns another spec on the same mesh, in the same memory, if they are known."""
    if not isinstance(like, NamedSharding):
        return spec
    return NamedSharding(like.mesh, spec, memory_kind=like.memory_kind)
