"""``Plan``: what happens to every leaf of a tree, and the leaves' views of it."""

import dataclasses
import math
import zlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

from lowrank_optax.bracket.leaf import FullLeaf, LowLeaf
from lowrank_optax.bracket.state import Bracket, Kept, SubspaceState
from lowrank_optax.leaves.boxes import is_box, rebox, refill, refill_tree, unbox_tree
from lowrank_optax.leaves.matrix import Matrix, Parts
from lowrank_optax.projectors import two_sided


@dataclasses.dataclass(frozen=True)
class LeafPlan:
    """What happens to one leaf, and why.

    Attributes:
      path: the leaf's path.
      shape: its shape as stored.
      matrix: its matrix view if it is projected, else None.
      reason: why it is projected or full.
      full_bytes: state bytes of the inner optimizer at full size.
      low_bytes: state bytes of the bracket for this leaf (None if never considered).
      parts: into how many parts its rows and columns are sharded, None if not known.
      kind: what it is by structure: "vector", "matrix", "table" (an embedding or an
        output head), "long" (one by its length alone) or "unknown"; "" if its entries
        are no real numbers.
    """

    path: str
    shape: tuple[int, ...]
    dtype: Any
    matrix: Matrix | None
    reason: str
    full_bytes: int
    low_bytes: int | None = None
    parts: Parts | None = None
    kind: str = ""

    @property
    def empty(self) -> bool:
        """Whether the leaf has no elements (such leaves are hidden from the inner)."""
        return 0 in self.shape

    @property
    def in_turn(self) -> bool:
        """Whether its layers are worked on one after another."""
        return self.matrix is not None and self.matrix.in_turn


def _is_nothing(tree: Any) -> bool:
    return tree is None or (isinstance(tree, tuple) and not tree)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The tree's structure and, in its order, one ``LeafPlan`` per leaf.

    Attributes:
      treedef: the structure, boxes counting as leaves.
      leaves: the leaves' plans.
      shifts: by how many steps the matrices of each leaf refresh early.
      has_boxes: whether leaves stand in metadata boxes.
    """

    treedef: Any
    leaves: tuple[LeafPlan, ...]
    shifts: tuple[tuple[int, ...], ...]
    has_boxes: bool

    def matrices(self) -> list[tuple[int, Matrix]]:
        """Returns (position, matrix) of every projected leaf."""
        return [(i, leaf.matrix) for i, leaf in enumerate(self.leaves) if leaf.matrix]

    def flat(self, tree: Any) -> list[Any]:
        """Returns the tree's leaves by position.

        Where there is no tree, ``None`` or ``()``, every leaf has the same nothing.
        """
        if _is_nothing(tree):
            return [tree] * len(self.leaves)
        return self.treedef.flatten_up_to(tree)

    def arrays(self, tree: Any) -> list[Any]:
        """Returns the same out of their boxes."""
        if _is_nothing(tree):
            return [tree] * len(self.leaves)
        return [
            leaf if leaf is None or isinstance(leaf, jax.Array) else unbox_tree(leaf)
            for leaf in self.treedef.flatten_up_to(tree)
        ]

    def kept(self, bracket: Bracket, state: SubspaceState) -> list[Kept]:
        """Returns what the state has of every leaf, out of its boxes."""
        whole = bracket.recovery is not None and bracket.recovery.whole
        # A transformation of whole leaves was given boxes, and its state stays in them.
        recovery = (self.flat if whole else self.arrays)(state.recovery_state)
        basis, pending = self.arrays(state.basis), self.flat(state.pending)
        return list(map(Kept, basis, pending, recovery, self.flat(state.sample)))

    def with_kept(
        self, bracket: Bracket, state: SubspaceState, kept: list[Kept]
    ) -> SubspaceState:
        """Returns the state with this of every leaf, in boxes as it was."""
        recovery = [k.recovery for k in kept]
        if bracket.recovery is not None and bracket.recovery.whole:
            recovery = self.treedef.unflatten(recovery)
        else:
            recovery = self.boxed(state.recovery_state, recovery)
        return state._replace(
            basis=self.boxed(state.basis, [k.stored for k in kept]),
            pending=self.boxed(state.pending, [k.pending for k in kept]),
            recovery_state=recovery,
            sample=self.boxed(state.sample, [k.sample for k in kept]),
        )

    def boxed(self, like: Any, leaves: list[Any]) -> Any:
        """Returns the leaves as one tree, each in boxes like those of ``like``."""
        if _is_nothing(like):
            return like
        if self.has_boxes:
            leaves = list(map(refill_tree, self.flat(like), leaves))
        return self.treedef.unflatten(leaves)

    def inner_trees(self, bracket: Bracket, like: Any, low: list[Any]) -> Any:
        """Returns the trees of the inner transformation and of ``full``, in boxes.

        Leaves without elements are hidden from both.
        """
        if self.has_boxes:
            low = [
                rebox(box, x, leaf.matrix.batch_axes + leaf.matrix.low_axes)
                if leaf.matrix
                else refill(box, x)
                for leaf, box, x in zip(self.leaves, self.flat(like), low, strict=True)
            ]

        # An array without elements has no maximum, and a transformation may want one.
        def tree(shown: Callable[[LeafPlan], bool]) -> Any:
            return self.treedef.unflatten(
                x if shown(leaf) and not leaf.empty else optax.MaskedNode()
                for leaf, x in zip(self.leaves, low, strict=True)
            )

        if bracket.full is None:
            return tree(lambda leaf: True), ()
        return (
            tree(lambda leaf: leaf.matrix is not None),
            tree(lambda leaf: leaf.matrix is None),
        )

    def check(self, updates: Any) -> None:
        """Raises if the gradients are no tree like the parameters."""
        structure = jax.tree.structure(updates, is_leaf=is_box)
        if structure != self.treedef:
            raise ValueError(
                "Gradients and parameters must be trees of the same structure; got "
                f"gradients {structure} and parameters {self.treedef}."
            )
        for leaf, update in zip(self.leaves, self.arrays(updates), strict=True):
            if update.shape != leaf.shape:
                raise ValueError(
                    f"The gradient of leaf {leaf.path!r} has shape {update.shape}, its "
                    f"parameter {leaf.shape}; they must be the same."
                )

    def leaves_of(
        self, bracket: Bracket, gradients: list[Any]
    ) -> list[LowLeaf | FullLeaf]:
        """Returns what opens and closes every leaf."""
        full = FullLeaf(bracket.dtype)
        return [
            low_leaf(bracket, leaf.matrix, leaf.dtype, gradient.dtype, shift)
            if leaf.matrix
            else full
            for leaf, gradient, shift in zip(
                self.leaves, gradients, self.shifts, strict=True
            )
        ]


def low_leaf(
    bracket: Bracket,
    matrix: Matrix,
    dtype: Any,
    update_dtype: Any = None,
    shift: tuple[int, ...] = (),
) -> LowLeaf:
    """Returns a projected leaf, its parameter in ``dtype``.

    Without the last two, for shapes alone.
    """
    projector = bracket.projector
    if matrix.side == "both":
        projector = two_sided(projector)
    shift = shift or (0,) * math.prod(matrix.batch_shape)
    kept, recovery = bracket.storage.of(dtype), bracket.recovery
    return LowLeaf(
        matrix=matrix,
        projector=projector.for_leaf(matrix.path).stored_as(kept),
        transport=bracket.transport,
        # Both as arrays: a static number would give every leaf a trace of its own.
        # Python's own hash of a string differs from process to process.
        path=np.asarray(zlib.crc32(matrix.path.encode()), np.uint32),
        shift=np.asarray(shift, np.int32).reshape(matrix.batch_shape),
        recovery=None if recovery is None else recovery.stored_as(kept),
        scale=bracket.scale,
        match=bracket.match,
        dtype=bracket.dtype,
        update_dtype=update_dtype,
    )
