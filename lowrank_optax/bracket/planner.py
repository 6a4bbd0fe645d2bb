"""``Planner``: decides from shapes, once per structure, what happens to every leaf."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from lowrank_optax._meshes import explicit_sharding
from lowrank_optax.bracket.bases import PRNG
from lowrank_optax.bracket.leaf import LowLeaf
from lowrank_optax.bracket.notice import quiet
from lowrank_optax.bracket.plan import LeafPlan, Plan, low_leaf
from lowrank_optax.bracket.selection import Selection, axis_parts
from lowrank_optax.bracket.state import Bracket, Clock, Kept
from lowrank_optax.leaves.boxes import is_box, unbox
from lowrank_optax.leaves.matrix import Matrix, Parts, path_string
from lowrank_optax.leaves.part import transformation
from lowrank_optax.leaves.structure import Seen


class LeafInfo(NamedTuple):
    """What is known of a leaf before any array exists.

    Attributes:
      shape: its shape as stored, the whole stack's in a layer-wise step.
      dtype: of its entries.
      sharding: as the type of an array on an Explicit mesh says it, else None.
    """

    shape: tuple[int, ...]
    dtype: Any
    sharding: Any

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)


class LeafState(NamedTuple):
    """Shapes of what one leaf adds to a bracket's state.

    Attributes:
      kept: ``Kept``, without its recovery; of a full leaf nothing.
      inner: the state of the inner transformation, or of ``full``, as it is stored.
      recovery: the recovery's.
    """

    kept: Kept
    inner: Any
    recovery: Any = ()


def kind_of(plan: Plan, state: Any) -> Any:
    """Returns all that a check of a state looks at."""
    leaves, treedef = jax.tree.flatten(state)
    shapes = tuple((jnp.shape(x), getattr(x, "dtype", None)) for x in leaves)
    return plan, treedef, shapes


class Planner:
    """Makes plans for one bracket, each structure's once.

    Attributes:
      bracket: the bracket's slots.
      selection: which leaves are projected.
      stagger: whether the refreshes of different matrices are spread over the gap.
      seed: seed of the bracket's random numbers.
      structures: of the states that have been started.
      known: kinds of states that are this bracket's, see ``kind_of``.
    """

    def __init__(
        self, bracket: Bracket, selection: Selection, stagger: bool, seed: int
    ):
        self.bracket, self.selection = bracket, selection
        self.stagger, self.seed = stagger, seed
        self._plans: dict[Any, Plan] = {}
        self._states: dict[Any, LeafState] = {}
        self.structures: set[Any] = set()
        self.known: set[Any] = set()

    def plan(self, tree: Any, layers: int | None = None) -> Plan:
        """Decides from shapes alone what happens to every leaf of ``tree``.

        Args:
          tree: parameters or gradients, arrays or ShapeDtypeStructs, boxed or not.
          layers: how many layers the whole stacks have, of which the leaves are one.

        Raises:
          ValueError: if a leaf selected explicitly has too large a rank or no axes.
        """
        flat, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_box)
        arrays = [x if isinstance(x, jax.Array) else unbox(x) for _, x in flat]
        infos = tuple(_info(leaf, layers) for leaf in arrays)
        key = treedef, infos, layers
        if key not in self._plans:
            paths = [path_string(path) for path, _ in flat]
            boxes = any(is_box(leaf) for _, leaf in flat)
            plan = self._decide(tree, treedef, paths, infos, layers)
            self._plans[key] = dataclasses.replace(plan, has_boxes=boxes)
        return self._plans[key]

    def _decide(self, tree, treedef, paths, infos, layers) -> Plan:
        numbers = self.selection.numbers(tree, treedef)
        shardings = self.selection.shardings(treedef)
        chosen = self.selection.chosen(treedef)
        seen = self.selection.seen(paths, [info.shape for info in infos])
        leaves = tuple(
            dataclasses.replace(
                self._leaf(path, info, given, found, sharding, flag),
                kind=found.kind if jnp.issubdtype(info.dtype, jnp.floating) else "",
            )
            for path, info, given, found, sharding, flag in zip(
                paths, infos, numbers, seen, shardings, chosen, strict=True
            )
        )
        # Decided on whole stacks and cut afterwards: one layer alone could be too small
        # for a rule by size, and the plan has to be that of the plain step.
        early = shifts(leaves, self.bracket.projector.update_proj_gap, self.stagger)
        if layers is not None:
            if self.stagger:
                raise ValueError(
                    "stagger=True spreads refreshes over all matrices of a tree, and a "
                    "layer-wise step sees one layer of it at a time. Use stagger=False."
                )
            leaves = tuple(map(_of_one_layer, leaves))
            early = tuple(shift[: len(shift) // layers] for shift in early)
        return Plan(treedef, leaves, early, False)

    def _leaf(
        self,
        path: str,
        info: LeafInfo,
        numbers: Any,
        seen: Seen,
        sharding: Any,
        chosen: bool | None,
    ) -> LeafPlan:
        shape, selection = info.shape, self.selection
        plan = functools.partial(LeafPlan, path, shape, info.dtype)
        if 0 in shape:
            return plan(None, "no elements", 0)
        full_bytes = self.state_bytes(shape, info.dtype)
        reason = selection.why_full(path, info, numbers, seen, chosen)
        if reason is not None:
            return plan(None, reason, full_bytes)
        sharding = info.sharding if sharding is None else sharding
        matrix, parts, reason = self._matrix(path, info, numbers, seen, sharding)
        if matrix is None:
            return plan(None, reason, full_bytes)
        low_bytes = self.state_bytes(matrix, info.dtype)
        smaller = low_bytes < full_bytes or not self.bracket.projector.smaller
        if not smaller and not selection.explicit(numbers):
            reason = f"low rank would not save: {low_bytes} >= {full_bytes} bytes"
            return plan(None, reason, full_bytes, low_bytes)
        # A stack of layers on several devices. Elsewhere all layers at once are faster:
        # what is lifted need not be written out. If the axis of layers is cut itself,
        # a loop over it would gather the stack.
        in_turn = (
            matrix.batch == (0,)
            and numbers is None
            and selection.layer_axis is not None
            and parts not in (None, (1, 1))
            and axis_parts(sharding, info, (0,), ()) == (1, 1)
        )
        matrix = dataclasses.replace(matrix, in_turn=in_turn)
        return plan(matrix, reason, full_bytes, low_bytes, parts)

    def _matrix(
        self, path: str, info: LeafInfo, numbers: Any, seen: Seen, sharding: Any
    ) -> tuple[Matrix | None, Parts | None, str]:
        selection, projector = self.selection, self.bracket.projector
        batch, shared, rows, columns, reduction_is_rows = selection.axes(
            path, info, numbers, seen
        )
        draft = Matrix(
            path,
            info.shape,
            batch,
            rows,
            columns,
            "left",
            1,
            shared,
            reduction_is_rows,
        )
        parts = axis_parts(sharding, info, rows, columns)
        plain = dataclasses.replace(draft, shared=())  # one of the matrices that share
        m, n = plain.m, plain.n
        own = projector.side_of(plain, parts)
        # The default, "short", cannot be told from no choice, and gives way.
        if own is not None and selection.side != "short":
            raise ValueError(
                f"lro.{type(projector).__name__} works along an axis of its own; got "
                f"side={selection.side!r} besides. Say it as the projector's axis "
                "alone."
            )
        side = own or selection.resolve_side(m, n, reduction_is_rows, parts)
        plain = plain.seen_from(side)
        r, largest = projector.rank_of(plain), projector.largest_rank(plain)
        explicit = selection.explicit(numbers)
        if r > largest and not selection.clips:
            if not explicit:
                return None, parts, f"rank {r} exceeds min(m, n)={largest}"
            raise ValueError(
                f"Leaf {path!r} of shape {info.shape} is a {m} x {n} matrix and "
                f"was selected explicitly, but rank={r} exceeds min(m, n)={largest}. "
                "Lower the rank (a fraction such as rank=0.25 adapts to each leaf), "
                "leave the leaf out of the selection, or pass clip_rank=True to run it "
                "at r=min(m, n)."
            )
        chosen = "explicitly" if explicit else "by the default rule"
        matrix = dataclasses.replace(
            plain, rank=min(r, largest), shared=shared, block=projector.block_of(plain)
        )
        how = f": {seen.reason}" if seen.reason and numbers is None else ""
        return matrix, parts, f"selected {chosen}{how}"

    def state_bytes(self, leaf: Matrix | tuple[int, ...], dtype: Any) -> int:
        """Returns the state bytes of one projected matrix, or of one full leaf."""
        shapes = jax.tree.leaves(self.state_of(leaf, dtype))
        return sum(x.size * x.dtype.itemsize for x in shapes)

    def state_of(self, leaf: Matrix | tuple[int, ...], dtype: Any) -> LeafState:
        """Returns the state of one projected matrix, or of one full leaf."""
        path = leaf.path if isinstance(leaf, Matrix) else ""
        key = path, leaf, jnp.dtype(dtype)
        if key not in self._states:
            if isinstance(leaf, Matrix):
                start = functools.partial(self._start_low, leaf, dtype)
            else:
                start = functools.partial(self._start_full, leaf, dtype)
            with quiet():  # the inner transformation may be a bracket, too
                self._states[key] = jax.eval_shape(start)
        return self._states[key]

    def _start_low(self, matrix: Matrix, dtype: Any) -> LeafState:
        door = low_leaf(self.bracket, matrix, dtype)
        kept = door.start()
        zeros = self.low_zeros(door, kept.stored)
        inner = transformation(self.bracket.inner).init(zeros)
        recovery = door.start_recovery(jnp.zeros(matrix.shape))
        return LeafState(kept, self._stored(inner, dtype), recovery)

    def _start_full(self, shape: tuple[int, ...], dtype: Any) -> LeafState:
        tx = transformation(self.bracket.full or self.bracket.inner)
        inner = tx.init(jnp.zeros(shape, self.bracket.dtype))
        return LeafState(Kept(), self._stored(inner, dtype))

    def _stored(self, state: Any, dtype: Any) -> Any:
        return self.bracket.storage.first(state, jax.tree.structure(0), [dtype])

    def of(self, bracket: Bracket) -> "Planner":
        """Returns the planner of another bracket with the same choices."""
        return Planner(bracket, self.selection, self.stagger, self.seed)

    def low_zeros(self, door: LowLeaf, stored: Any) -> Array:
        """Returns zeros in the shape of a leaf's projection."""

        # Asked of the projector itself: bands, blocks and two sides are not all [r, n].
        def project(stored: Any) -> Array:
            at = door.at(Clock(jnp.int32(0), None, self.key_data(), 0))
            zeros = jnp.zeros(door.matrix.shape, door.dtype)
            basis = door.basis(at, stored)
            return door.down(at, stored, basis, door.matrix.operand(zeros))

        return jnp.zeros(jax.eval_shape(project, stored).shape, door.dtype)

    def key_data(self) -> Array:
        """Returns the key that a fresh bracket starts with."""
        return jax.random.key_data(jax.random.key(self.seed, impl=PRNG))


def _info(leaf: Any, layers: int | None) -> LeafInfo:
    shape = tuple(leaf.shape)
    if layers is not None and shape:
        shape = (layers, *shape[1:])
    return LeafInfo(shape, jnp.dtype(leaf.dtype), explicit_sharding(leaf))


def _of_one_layer(leaf: LeafPlan) -> LeafPlan:
    """Returns the plan of a stack's layer, which comes as a stack of one."""
    if not leaf.shape:
        return leaf
    shape, matrix = (1, *leaf.shape[1:]), leaf.matrix
    matrix = matrix and dataclasses.replace(matrix, shape=shape, in_turn=False)
    return dataclasses.replace(leaf, shape=shape, matrix=matrix)


def shifts(
    leaves: Sequence[LeafPlan], gap: int, stagger: bool
) -> tuple[tuple[int, ...], ...]:
    """Spreads the refreshes of all matrices evenly over the gap, or not at all."""
    # A matrix is due when count + shift is a multiple of the gap: the k-th of all waits
    # until step k gap / total.
    counts = [
        math.prod(leaf.matrix.batch_shape) if leaf.matrix else 0 for leaf in leaves
    ]
    total, starts = max(sum(counts), 1), np.cumsum([0, *counts])
    return tuple(
        tuple(
            -(int(start + i) * gap // total) % gap if stagger else 0
            for i in range(count)
        )
        for start, count in zip(starts, counts, strict=False)
    )
