"""``Tree``: parameters by leaf, and which direction is drawn for each."""

import math
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.sharding import NamedSharding
from jaxtyping import Array

from lowrank_optax.bracket.placement import Piece, places_of
from lowrank_optax.bracket.selection import Selection
from lowrank_optax.leaves.boxes import is_box, refill, unbox
from lowrank_optax.leaves.matrix import Axes, Matrix, path_string
from lowrank_optax.quantization import is_quantized
from lowrank_optax.zeroth_order.directions import Directions
from lowrank_optax.zeroth_order.noise import fold_in
from lowrank_optax.zeroth_order.perturbed import Noise, Perturbed

_REAL = (jnp.float32, jnp.float64, jnp.bfloat16, jnp.float16)


class Tree:
    """Parameters, taken apart; lists are in the order of the leaves.

    Attributes:
      arrays: the leaves out of their boxes.
      paths: their paths, which their seeds follow from, whatever their order.
      numbers: a number for each path.
      moves: whether a leaf is perturbed and updated.
      scanned: whether it stays unperturbed until a slice of it is used.
      matrices: its matrices, None where every entry is drawn by itself.
    """

    def __init__(self, params: Any, method: Directions, trainable: Any, scanned: Any):
        """Decides from shapes and paths alone.

        Raises:
          TypeError: if a leaf that moves is complex, quantized or has 8 bits.
          ValueError: if a choice matches nothing, or layers cannot be cut.
        """
        self._method = method
        self._flat, self._treedef = jax.tree_util.tree_flatten_with_path(
            params, is_leaf=lambda x: is_quantized(x) or is_box(x)
        )
        self.paths = [path_string(path) for path, _ in self._flat]
        leaves = [leaf for _, leaf in self._flat]
        for path, leaf in zip(self.paths, leaves, strict=True):
            if is_quantized(leaf):
                raise TypeError(
                    f"lro.zeroth_order: leaf {path!r} is a QuantizedArray, whose codes "
                    "cannot be perturbed. Pass lro.dequantize_weights(params)."
                )
        self.arrays = [jnp.asarray(unbox(leaf)) for leaf in leaves]
        # Python's own hash of a string differs from process to process.
        numbers = [zlib.crc32(path.encode()) for path in self.paths]
        self.numbers = np.asarray(numbers, np.uint32)
        chosen = self._chosen("trainable", trainable, True)
        self.moves = [
            flag and self._real(path, array)
            for flag, path, array in zip(chosen, self.paths, self.arrays, strict=True)
        ]
        self.scanned = self._chosen("scanned", scanned, False)
        self.matrices = self._matrices(params)
        for path, array, matrix, cut in zip(
            self.paths, self.arrays, self.matrices, self.scanned, strict=True
        ):
            if cut and (not array.ndim or (matrix and matrix.batch[:1] != (0,))):
                raise ValueError(
                    f"lro.zeroth_order: leaf {path!r} of shape {array.shape} is named "
                    "by `scanned`, but its first axis is not one that only counts "
                    "layers. Leave it out, or say so with layer_axis=0 or "
                    "weight_dimension_numbers of the method."
                )

    def seeds(self, seed: Array) -> list[Array]:
        """Returns the seed of every leaf, or those of its matrices.

        ``uint32[2]``, or ``uint32[*batch, 2]``, from the leaf's path and the matrix'
        place in it alone.
        """
        shapes = [matrix.batch_shape if matrix else () for matrix in self.matrices]
        counts = [math.prod(shape) for shape in shapes]
        if not counts:
            return []
        # All of them at once: one small program in place of one for every leaf.
        index = np.concatenate([np.arange(count, dtype=np.uint32) for count in counts])
        found = fold_in(seed, np.repeat(self.numbers, counts), index)
        parts = jnp.split(found, np.cumsum(counts)[:-1])
        return [
            part.reshape((*shape, 2)) for part, shape in zip(parts, shapes, strict=True)
        ]

    def noises(
        self, seeds: list[Array], epochs: list[Array], kept: Any
    ) -> list[Noise | None]:
        """Returns the direction of every leaf, None of those that do not move.

        Args:
          seeds: those of a step.
          epochs: those of some steps.
          kept: what the method keeps, a tree.
        """

        def noise(i: int, kept: Any) -> Noise | None:
            if not self.moves[i]:
                return None
            shape, matrix = self.arrays[i].shape, self.matrices[i]
            if matrix is None:
                return Noise(seeds[i], None, (), None, self._method, None, shape)
            return Noise(seeds[i], epochs[i], kept, None, self._method, matrix, shape)

        own = self._treedef.flatten_up_to(kept)
        return [noise(i, one) for i, one in enumerate(own)]

    def perturbed(self, noises: list[Noise | None], scale: Array) -> Any:
        """Returns the parameters moved along the directions, or what will be."""

        def near(array: Array, noise: Noise | None, scanned: bool) -> Any:
            if noise is None:
                return array
            if not scanned:
                return Perturbed(array, noise, scale).added()
            scales = jnp.broadcast_to(scale, array.shape[:1])
            return Perturbed(array, noise.sliced(), scales)

        return self.boxed(list(map(near, self.arrays, noises, self.scanned)))

    def keep(self, epoch: Array) -> Any:
        """Returns what the method keeps of every matrix."""

        def of(seed: Array, matrix: Matrix | None) -> Any:
            if matrix is None:
                return optax.MaskedNode()

            def one(seed: Array) -> Any:
                sizes = (matrix.m, matrix.n, matrix.rank)
                return self._method.keep(seed, *sizes)

            for _ in matrix.batch:
                one = jax.vmap(one)
            return one(seed)

        return self._treedef.unflatten(map(of, self.seeds(epoch), self.matrices))

    def placed(self, count: Array, key: Array, kept: Any) -> tuple[Array, Array, Any]:
        """Returns a fresh state where its parameters are, if they say so.

        As a step returns it, so that the second step is the program of the first.
        """
        places = [getattr(array, "sharding", None) for array in self.arrays]
        if any(isinstance(array, Tracer) for array in self.arrays):
            return count, key, kept
        known = [place for place in places if isinstance(place, NamedSharding)]
        if not known:
            return count, key, kept

        def put(x: Array, axes: Axes, shape: tuple[int, ...], like: Any) -> Array:
            return jax.device_put(x, places_of(Piece(x, None, axes), shape, like)[0])

        def of(i: int, arrays: Any) -> Any:
            matrix, place = self.matrices[i], places[i]
            if matrix is None or not isinstance(place, NamedSharding):
                return arrays
            meant = self._method.axes(matrix)
            return tuple(
                put(x, matrix.batch_axes + axes, matrix.shape, place)
                for x, axes in zip(arrays, meant, strict=True)
            )

        kept = map(of, range(len(places)), self._treedef.flatten_up_to(kept))
        count, key = (put(x, Axes(((),) * x.ndim), (), known[0]) for x in (count, key))
        return count, key, self._treedef.unflatten(kept)

    def boxed(self, leaves: Sequence[Any]) -> Any:
        """Returns leaves as one tree, in the boxes of the parameters."""
        boxes = [leaf for _, leaf in self._flat]
        return self._treedef.unflatten(map(refill, boxes, leaves))

    def check(self, state: Any) -> None:
        """Raises if the state is none of these parameters."""
        expected = jax.eval_shape(self.keep, jax.ShapeDtypeStruct((2,), jnp.uint32))
        found, wanted = (
            (jax.tree.structure(x), [y.shape for y in jax.tree.leaves(x)])
            for x in (state.kept, expected)
        )
        if found != wanted:
            raise ValueError(
                "lro.zeroth_order: the state is not one of these parameters and this "
                f"method: `kept` must have {wanted}, got {found}. Make it with "
                "init(params, key)."
            )

    def _real(self, path: str, array: Array) -> bool:
        if jnp.issubdtype(array.dtype, jnp.complexfloating) or (
            jnp.issubdtype(array.dtype, jnp.floating) and array.dtype not in _REAL
        ):
            raise TypeError(
                f"lro.zeroth_order: leaf {path!r} is {array.dtype}; only float16, "
                "bfloat16, float32 and float64 are perturbed. Leave it out of "
                "`trainable`."
            )
        return bool(array.size) and jnp.issubdtype(array.dtype, jnp.floating)

    def _chosen(self, name: str, select: Any, default: bool) -> list[bool]:
        if select is None:
            return [default] * len(self.paths)
        selection = Selection(select=select)
        flags = selection.chosen(self._treedef)
        chosen = [
            selection.finds(path, array) if flag is None else flag
            for path, array, flag in zip(self.paths, self.arrays, flags, strict=True)
        ]
        if self.paths and not any(chosen):
            raise ValueError(
                f"lro.zeroth_order: `{name}`={select!r} matches no leaf. The leaves "
                f"are {', '.join(self.paths)}."
            )
        return chosen

    def _matrices(self, params: Any) -> list[Matrix | None]:
        selection = self._method.selection
        if selection is None:
            return [None] * len(self.paths)
        numbers = selection.numbers(params, self._treedef)
        chosen = selection.chosen(self._treedef)
        seen = selection.seen(self.paths, [array.shape for array in self.arrays])

        def of(i: int) -> Matrix | None:
            path, array = self.paths[i], self.arrays[i]
            if not self.moves[i] or selection.why_full(
                path, array, numbers[i], seen[i], chosen[i]
            ):
                return None
            batch, shared, rows, columns, _ = selection.axes(
                path, array, numbers[i], seen[i]
            )
            draft = Matrix(path, array.shape, batch, rows, columns, "left", 1, shared)
            rank = self._method.rank_of(path, draft.m, draft.n)
            return Matrix(path, array.shape, batch, rows, columns, "left", rank, shared)

        found = [of(i) for i in range(len(self.paths))]
        if self.paths and selection.select is not None and not any(found):
            raise ValueError(
                f"lro.zeroth_order: `select`={selection.select!r} of the method "
                f"chooses no matrix. The leaves are {', '.join(self.paths)}."
            )
        return found
