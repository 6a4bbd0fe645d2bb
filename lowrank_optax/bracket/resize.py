"""``resize_state``: the state of one optimizer becomes that of another, in mid-run.

Every matrix keeps as many of its basis vectors as the new rank allows, and their
moments with them. All else is stored as the new optimizer stores it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from lowrank_optax._meshes import explicit_mesh, with_auto_axes
from lowrank_optax.bracket.checks import check_maker, check_state
from lowrank_optax.bracket.leaf import LowLeaf
from lowrank_optax.bracket.notice import quiet_init
from lowrank_optax.bracket.plan import low_leaf
from lowrank_optax.bracket.start import Described, described
from lowrank_optax.bracket.state import Clock, SubspaceState
from lowrank_optax.leaves.boxes import is_box, refill_tree, restore, unbox_tree
from lowrank_optax.leaves.layout import names_of
from lowrank_optax.leaves.matrix import Matrix
from lowrank_optax.leaves.moments import FACTORS, FIELDS, HISTORY, by_leaf, find
from lowrank_optax.linalg.bases import Rotation, block_power, random_start
from lowrank_optax.linalg.products import wide
from lowrank_optax.projectors import At, TwoSidedBasis
from lowrank_optax.quantization import dequantize, is_quantized, quantize
from lowrank_optax.transport import Transport, gather_moments, rotate_moments

# Sums of gradients under way turn as first moments do. They are looked for by
# themselves: `optax.MultiSteps`, which keeps them, has the moments inside.
_SUMS = ("acc_grads",)

# By row of the projection, and so of one axis less.
_BY_ROW = "row"

# As a cold start of `lro.power` has it.
_SWEEPS = 12


class Turn(NamedTuple):
    """How a leaf's moments become those in other coordinates.

    Attributes:
      of: one moment, given the name of its field.
      whole: whether the leaf is projected in one of the two states alone, so that every
        new coordinate is made of several old ones.
    """

    of: Callable[[str, Array], Array]
    whole: bool = False


def resize_state(
    state: Any,
    old_tx: optax.GradientTransformation,
    new_tx: optax.GradientTransformation,
    params: Any,
) -> Any:
    r"""Returns the state of ``old_tx`` as one with which ``new_tx`` goes on.

    Another rank, ``update_proj_gap``, projector on the same side, dtype or codec of
    moments and bases, in mid-run. With the old basis P ``[m, r]``, moments ``[r, n]``
    and s = min(r, r') vectors kept, P_s of them::

        P'  = [P_s, Q]         Q [m, r' - s] random, Q^T Q = I, Q^T P = 0
        C   = P'^T P_s = [I; 0]
        mu' = C mu_s           (and the same for trace, ema and sums of gradients)
        nu' = C2 nu_s + (1 - C2 1) f        C2 = C * C entrywise

    A larger rank keeps all vectors and their moments, bit for bit. Nothing is known of
    Q's: their first moment is zero, and so for some ``1 / (1 - b1)`` steps too small,
    while their second moment is f, column by column the squared mean of the roots of
    those kept. Zero would be a claim: the bias correction is that of all steps so far,
    and Adam's first step along them 3.2 times too large. The next refresh turns them
    to where the gradient is.

    A smaller rank keeps, in their order, the vectors with the largest second moments,
    summed over columns (squared first moments where there are no second ones; the
    first vectors where there are neither).

    A matrix that is projected in one of the two alone is carried over, too: what was
    full takes for its basis the leading directions of its first moment, what becomes
    full is lifted, with C = P'^T or P in the formulas above and ``nu' >= mu'^2``.

    Counters, keys, accumulations, a recovery's state and injected hyperparameters stay.
    What a projector keeps beside its vectors (the gaps of ``lro.lazy``, the optimizer
    of ``lro.online_pca``) begins anew where anything of the projector changes. A new
    dtype or codec rounds once, to the nearest.

    Args:
      state: a state of ``old_tx``.
      old_tx: the optimizer that made it, in any nesting (``optax.chain``, ``masked``,
        ``partition``, ``inject_hyperparams``, ``apply_if_finite``).
      new_tx: the same with other numbers.
      params: the parameters, or ShapeDtypeStructs of them.

    Returns:
      A state like ``new_tx.init(params)``. For one that lies on several devices call it
      as ``jax.jit(..., out_shardings=lro.state_shardings(new_tx, ...))``.

    Raises:
      ValueError: if ``state`` is not one of ``old_tx``, or if what it keeps has no
        place with ``new_tx``: another inner optimizer, recovery or set of leaves,
        bases on another side, wavelets in place of a basis, bases that are drawn afresh
        (``lro.gaussian``) at another rank.

    Examples:
      >>> import jax.numpy as jnp
      >>> import lowrank_optax as lro
      >>> params = {"kernel": jnp.ones((64, 32))}
      >>> small, large = lro.galore(1e-2, rank=4), lro.galore_8bit(1e-2, rank=8)
      >>> _, state = small.update(params, small.init(params), params)
      >>> state = lro.resize_state(state, small, large, params)
      >>> state.inner_state.mu["kernel"].shape, int(state.count)
      ((8, 64), 1)
      >>> updates, state = large.update(params, state, params)
    """
    old, new = described(old_tx, params), described(new_tx, params)
    fresh = jax.eval_shape(quiet_init(old_tx), params)
    state = restore(state, lambda: jax.tree.map(lambda x: jnp.empty_like(x), fresh))
    state = jax.tree.map(jnp.asarray, state)
    mesh = explicit_mesh(state)
    was = _pieces(old)
    _check_alike(_pieces(state), was, "the state is not one of old_tx: it")
    if mesh is None:
        return _settled(state, new, was)
    place = NamedSharding(mesh, PartitionSpec())
    like = jax.eval_shape(quiet_init(new_tx), params)
    out = jax.tree.map(lambda _: place, like)
    return with_auto_axes(mesh, out, lambda x: _settled(x, new, was), state)


def _settled(state: Any, like: Any, was: Any = None) -> Any:
    """Returns a state piece by piece as ``like`` has it.

    ``was``: the brackets that made those inside.
    """
    has, wanted = _pieces(state), _pieces(like)
    _check_alike(has, wanted, "new_tx is another method: the state")
    pieces = [
        _bracket(was[path], piece, has[path])
        if isinstance(piece, Described)
        else _stored(path, has[path], piece)
        for path, piece in wanted.items()
    ]
    return jax.tree.structure(like, is_leaf=_is_piece).unflatten(pieces)


def _bracket(old: Described, new: Described, state: SubspaceState) -> SubspaceState:
    """Returns the state of a bracket."""
    check_maker(old.plan, old.planner.bracket, state)
    check_state(old.planner, old.plan, state)
    was, now = (x.planner.bracket.recovery for x in (old, new))
    if type(was) is not type(now):
        was, now = (type(x).__name__ if x else "no recovery" for x in (was, now))
        raise ValueError(
            f"lro.resize_state: new_tx is another method: it has {now}, and old_tx "
            f"{was}. Start anew with new_tx.init(params)."
        )
    treedef, like = old.plan.treedef, new.state
    moments = by_leaf(treedef, state.inner_state, also=FACTORS)
    clock = Clock(state.count, None, state.key, 0)
    turns, bases, pending, recovery = [], [], [], []
    columns = (
        old.plan.arrays(state.basis),
        old.plan.flat(state.pending),
        old.plan.flat(state.recovery_state),
    )
    for i, (stored, owed, recovered) in enumerate(zip(*columns, strict=True)):
        then, now = _door(old, i), _door(new, i)
        turn = None
        if then and now:
            turn, stored = _resized(then, now, clock, stored, moments[i][0])
        elif then:
            turn = _lifted(then, clock, stored)
            stored = owed = recovered = optax.MaskedNode()
        elif now:
            turn, stored, owed = _found(now, clock, moments[i][0])
            recovered = now.start_recovery(jnp.zeros(now.matrix.shape, now.dtype))
        turns.append(turn)
        bases.append(stored)
        pending.append(owed)
        recovery.append(recovered)
    if state.recovery_state != ():
        state = state._replace(recovery_state=treedef.unflatten(recovery))
    inner = _turned(treedef, state.inner_state, like.inner_state, turns)
    return SubspaceState(
        state.count,
        state.key,
        _settled(treedef.unflatten(bases), like.basis),
        treedef.unflatten(pending),
        _settled(inner, like.inner_state),
        _settled(state.full_state, like.full_state),
        _settled(state.recovery_state, like.recovery_state),
        _settled(state.sample, like.sample),
    )


def _door(bracket: Described, i: int) -> LowLeaf | None:
    leaf, shift = bracket.plan.leaves[i], bracket.plan.shifts[i]
    if leaf.matrix is None:
        return None
    return low_leaf(bracket.planner.bracket, leaf.matrix, leaf.dtype, None, shift)


# The three ways of a leaf that is projected, now or then.


def _resized(
    then: LowLeaf, now: LowLeaf, clock: Clock, stored: Any, moments: Any
) -> tuple[Turn | None, Any]:
    """Keeps the basis vectors that matter most, and their moments."""
    before, after = then.matrix, now.matrix
    if before.side != after.side:
        raise ValueError(
            f"lro.resize_state: the basis of leaf {before.path!r} lies on its "
            f"{before.side} side, and with new_tx on its {after.side} side. Give "
            f"new_tx side={before.side!r}, or start anew."
        )
    if _view(before) != _view(after):
        raise ValueError(
            f"lro.resize_state: leaf {before.path!r} of {before.shape} is seen as "
            f"matrices {before.m} x {before.n} in the state, and {after.m} x {after.n} "
            "with new_tx. Give new_tx the same axes, or start anew."
        )
    same = jax.tree.structure(then.projector) == jax.tree.structure(now.projector)
    if same and before.rank == after.rank:
        return None, stored
    if not (then.projector.stores_basis and now.projector.stores_basis):
        alike = type(then.projector) is type(now.projector)
        if alike and before.rank == after.rank:
            return None, stored
        was, wants = (_asked(door) for door in (then, now))
        raise ValueError(
            f"lro.resize_state: leaf {before.path!r} has {was}, and with new_tx {wants}"
            ". Moments follow a stored basis, and one of the two stores none. Start "
            "anew with new_tx.init(params)."
        )
    vectors = then.lift(then.basis_of, stored, then.at(clock))
    count = min(before.rank, after.rank)

    def side(vectors: Array, energy: Array | None) -> tuple[Array, Array]:
        """Returns the vectors kept, and C."""
        if energy is None or count == before.rank:
            places = jnp.arange(count)
            places = jnp.broadcast_to(places, (*vectors.shape[:-2], count))
        else:  # in their order
            places = jnp.sort(jax.lax.top_k(energy, count)[1])
        chosen = jnp.take_along_axis(vectors, places[..., None, :], -1)
        rows = jax.nn.one_hot(places, before.rank, dtype=jnp.float32)
        more = [(0, 0)] * (rows.ndim - 2) + [(0, after.rank - count), (0, 0)]
        return chosen, jnp.pad(rows, more)

    rows, columns = _energies(moments, before.side == "both", before.rank)
    if before.side == "both":
        left, turn = side(vectors.left, rows)
        right, other = side(vectors.right, columns)
        chosen, rotation = TwoSidedBasis(left, right), Rotation(turn, other)
    else:
        chosen, turn = side(vectors, rows)
        rotation = Rotation(turn)
    stored = now.lift(
        lambda at, basis: now.projector.adopt(after, basis, at, then.projector),
        now.at(clock),
        chosen,
    )
    return Turn(lambda field, x: _moved(now, gather_moments(), rotation, field, x)), (
        stored
    )


def _lifted(then: LowLeaf, clock: Clock, stored: Any) -> Turn:
    """Makes moments of the whole matrix; there is no basis any more."""
    if not then.projector.stores_basis:
        raise ValueError(
            f"lro.resize_state: leaf {then.matrix.path!r} has {_asked(then)}, and is "
            "full with new_tx. Without a stored basis no moment can be kept. Start "
            "anew with new_tx.init(params)."
        )
    basis = then.lift(then.basis_of, stored, then.at(clock))
    rotation = Rotation(*basis) if isinstance(basis, TwoSidedBasis) else Rotation(basis)

    def turn(field: str, x: Array) -> Array:
        return then.matrix.undo(_moved(then, rotate_moments(), rotation, field, x))

    return Turn(turn, whole=True)


def _found(now: LowLeaf, clock: Clock, moments: Any) -> tuple[Turn, Any, Any]:
    """Finds a basis in the first moment of a full leaf."""
    matrix = now.matrix
    first = [x for g in moments for f, x in g.items() if f in FIELDS and f != "nu"]
    if not first or matrix.side == "both" or not now.projector.stores_basis:
        raise ValueError(
            f"lro.resize_state: leaf {matrix.path!r} is full in the state, and has "
            f"{_asked(now)} with new_tx. A basis for one side can be found in a first "
            "moment alone (mu, trace or ema). Start anew with new_tx.init(params)."
        )

    def find_basis(at: At, mean: Array) -> tuple[Array, Array]:
        start = random_start(at.key, matrix.m, matrix.rank, mean.dtype)
        basis = block_power(mean, start, _SWEEPS)
        # Of a moment that is zero, as before the first step, there is none.
        good = jnp.all(jnp.isfinite(basis))
        return jnp.where(good, basis, jnp.eye(matrix.m, matrix.rank)), ~good

    at = now.at(clock)
    basis, owed = now.lift(find_basis, at, wide(matrix.view(first[0])))
    rotation = Rotation(jnp.swapaxes(basis, -1, -2))

    def turn(field: str, x: Array) -> Array:
        return _moved(now, rotate_moments(), rotation, field, matrix.view(x))

    stored = now.lift(
        lambda at, basis: now.projector.adopt(matrix, basis, at, now.projector),
        at,
        basis,
    )
    return Turn(turn, whole=True), stored, owed


def _view(matrix: Matrix) -> Matrix:
    """Returns how a leaf is seen, whatever its rank."""
    return dataclasses.replace(matrix, rank=0, block=0, in_turn=False)


def _asked(door: LowLeaf) -> str:
    """Returns how a leaf's projector and size are asked for."""
    matrix, name = door.matrix, type(door.projector).__name__
    option = door.projector.at_rank(matrix, matrix.rank)
    return f"lro.{name}" + (f" at {option[0]}" if option else "")


def _energies(moments: Any, both: bool, rank: int) -> tuple[Any, Any]:
    """Returns how large the moments of every basis vector are, of both sides' ones."""
    fields = {field: x for group in moments for field, x in group.items()}
    if _BY_ROW in fields and "nu" not in fields:
        return wide(fields[_BY_ROW]), None
    name = next((f for f in ("nu", "mu", "trace", "ema") if f in fields), None)
    if name is None:
        return None, None
    squares = wide(fields[name])
    squares = squares if name == "nu" else jnp.square(squares)
    if not both:
        return jnp.sum(squares, -1), None
    blocks = squares.reshape((*squares.shape[:-1], -1, rank))
    return jnp.sum(blocks, (-2, -1)), jnp.sum(blocks, (-3, -2))


def _moved(
    door: LowLeaf, transport: Transport, rotation: Rotation, field: str, x: Array
) -> Array:
    """Returns a moment in other coordinates."""
    kind = "nu" if field in ("nu", _BY_ROW) else "trace"

    def one(rotation: Rotation, x: Array) -> Array:
        if x.ndim > 2:  # several gradients
            return jax.vmap(lambda x: one(rotation, x))(x)
        low = x[:, None] if field == _BY_ROW else x
        (moved,) = transport.move(({kind: low},), rotation, jnp.int32(0))
        return moved[kind][:, 0] if field == _BY_ROW else moved[kind]

    return door.lift(one, rotation, x)


def _turned(treedef: Any, state: Any, like: Any, turns: list[Turn | None]) -> Any:
    """Returns an inner state with the moments of all leaves turned."""
    for also in (FACTORS + HISTORY, _SUMS):
        found = find(state, also)
        shapes = jax.eval_shape(lambda tree, also=also: find(tree, also).groups, like)
        if list(map(set, found.groups)) != list(map(set, shapes)):
            raise ValueError(
                "lro.resize_state: new_tx is another method: the inner optimizer's "
                f"moments are {[*map(list, shapes)]}, in the state "
                f"{[*map(list, found.groups)]}. Start anew with new_tx.init(params)."
            )
        groups = []
        for group, wanted in zip(found.groups, shapes, strict=True):
            fields = also if also == _SUMS else tuple(group)
            flat = {f: treedef.flatten_up_to(tree) for f, tree in group.items()}
            for field in set(fields) & set(group):
                sizes = treedef.flatten_up_to(wanted[field])
                flat[field] = [
                    _turn(turn, field, x, size)
                    for turn, x, size in zip(turns, flat[field], sizes, strict=True)
                ]
            if {"mu", "nu"} <= set(group) and also != _SUMS:
                flat["nu"] = [
                    jnp.maximum(nu, jnp.square(mu)) if turn and turn.whole else nu
                    for turn, nu, mu in zip(turns, flat["nu"], flat["mu"], strict=True)
                ]
            groups.append({f: treedef.unflatten(x) for f, x in flat.items()})
        state = found.rebuild(tuple(groups))
    return state


def _turn(turn: Turn | None, field: str, found: Any, like: Any) -> Any:
    if turn is None or isinstance(found, optax.MaskedNode):
        return found
    x = unbox_tree(found)
    # What does not hang on the rank, such as a mean over rows, has kept its shape.
    if not turn.whole and x.shape == unbox_tree(like).shape:
        return found
    if turn.whole and field in FACTORS + HISTORY:
        raise ValueError(
            f"lro.resize_state: {field!r} of a leaf that is projected in one of the "
            "two states alone cannot be carried over. Select the same leaves."
        )
    return turn.of(field, wide(dequantize(x)))


# Piece by piece: arrays and encoded ones, in boxes or not.


def _is_piece(node: Any) -> bool:
    return (
        isinstance(node, Described | SubspaceState) or is_quantized(node)
    ) or is_box(node)


def _pieces(tree: Any) -> dict[tuple[str, ...], Any]:
    flat = jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_piece)
    return {names_of(path): piece for path, piece in flat}


def _check_alike(found: Any, wanted: Any, who: str) -> None:
    """Raises if a state has not the pieces that are wanted."""
    kinds = [
        {(path, isinstance(x, Described | SubspaceState)) for path, x in pieces.items()}
        for pieces in (found, wanted)
    ]
    for more, less, verb in ((0, 1, "has"), (1, 0, "lacks")):
        for path, _ in sorted(kinds[more] - kinds[less]):
            raise ValueError(
                f"lro.resize_state: {who} {verb} "
                f"{'/'.join(path) or 'one low-rank bracket, and no more'!r}. Start "
                "anew with new_tx.init(params)."
            )


def _stored(path: tuple[str, ...], found: Any, like: Any) -> Any:
    """Returns a piece in the dtype, the codec and the box of another."""
    x, wanted = unbox_tree(found), unbox_tree(like)
    if x.shape != wanted.shape:
        raise ValueError(
            f"lro.resize_state: {'/'.join(path)!r} has shape {x.shape} in the state, "
            f"and {wanted.shape} with new_tx; it is no moment of a basis that could be "
            "carried over. Start anew with new_tx.init(params)."
        )
    if is_quantized(wanted):
        # Codes that stay are not decoded.
        if type(x) is not type(wanted):
            x = quantize(wide(dequantize(x)), wanted.codec)
        return refill_tree(like, x)
    x = dequantize(x)
    if x.dtype != wanted.dtype:
        floats = (jnp.issubdtype(each.dtype, jnp.floating) for each in (x, wanted))
        if not all(floats):
            raise ValueError(
                f"lro.resize_state: {'/'.join(path)!r} is {x.dtype} in the state, and "
                f"{wanted.dtype} with new_tx. Only real numbers change their dtype."
            )
        x = x.astype(wanted.dtype)
    return refill_tree(like, x)
