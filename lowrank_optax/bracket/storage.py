"""``Storage``: the dtypes in which a bracket keeps what it has of every leaf.

Arithmetic is in float32. Between steps the moments of the inner optimizer and the bases
are in the dtype of the parameter, as Optax' own states are, or in one that was asked
for. What is rounded to bfloat16 between steps is rounded at random: 0.1 % of a second
moment, its decay in a step at b2 = 0.999, is less than half a unit in the last place,
so that rounded to nearest it would never decay.
"""

import dataclasses
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from lowrank_optax.leaves.boxes import is_box, refill, unbox
from lowrank_optax.leaves.matrix import path_string
from lowrank_optax.leaves.moments import HISTORY, find
from lowrank_optax.quantization import is_quantized
from lowrank_optax.quantization.rounding import dither, round_to_bfloat16


@dataclasses.dataclass(frozen=True)
class Storage:
    """What was asked for; None where nothing was.

    Attributes:
      state: dtype of all that follows.
      mu: of first moments, ``mu``, ``trace`` and ``ema``, and of a ``history``.
      nu: of second moments.
    """

    state: Any = None
    mu: Any = None
    nu: Any = None

    def of(self, parameter: Any) -> Any:
        """Returns the dtype of a leaf's state, given the parameter's."""
        return self.state if self.state is not None else narrowed(parameter)

    def moment(self, field: str, parameter: Any) -> Any:
        """Returns the dtype of one of its moments."""
        own = self.nu if field == "nu" else self.mu
        return own if own is not None else self.of(parameter)

    def first(self, state: Any, treedef: Any, parameters: list[Any]) -> Any:
        """Casts the moments of a fresh inner state; none becomes wider.

        Args:
          state: the inner optimizer's.
          treedef: structure of the trees that its moments are.
          parameters: the dtype of every leaf's parameter.
        """

        def stored(field: str, leaf: Any, parameter: Any) -> Any:
            dtype = self.moment(field, parameter)
            if not _is_float(leaf) or dtype.itemsize >= unbox(leaf).dtype.itemsize:
                return leaf
            return refill(leaf, unbox(leaf).astype(dtype))

        # Of a history one entry is written in a step, by whoever keeps it: it needs no
        # more than a narrow beginning.
        moments = find(state, HISTORY)
        groups = tuple(
            {
                field: treedef.unflatten(
                    stored(field, *pair)
                    for pair in zip(
                        treedef.flatten_up_to(tree), parameters, strict=True
                    )
                )
                for field, tree in group.items()
            }
            for group in moments.groups
        )
        return moments.rebuild(groups)


def narrowed(parameter: Any) -> Any:
    """Returns bfloat16 for parameters of two bytes or less, else float32.

    A float16 is too small for squares of gradients: it ends at 6e-8.
    """
    return jnp.dtype(jnp.bfloat16 if parameter.itemsize <= 2 else jnp.float32)


def load(state: Any, dtype: Any) -> Any:
    """Returns the state with its moments in the dtype of the arithmetic."""
    if not _is_narrow(state, dtype):
        return state
    moments = find(state)

    def wide(leaf: Any) -> Any:
        if not _is_float(leaf):
            return leaf
        return refill(leaf, unbox(leaf).astype(dtype))

    return moments.rebuild(jax.tree.map(wide, moments.groups, is_leaf=_is_whole))


def store(state: Any, before: Any, dtype: Any, key_data: Array, count: Any, layer: Any):
    """Returns the state with its moments in the dtypes that they had before.

    Args:
      state: the inner optimizer's, after its step.
      before: as it was stored.
      dtype: of the arithmetic.
      key_data: the bracket's key.
      count: the step.
      layer: which layer the first one of every stack is.
    """
    if not _is_narrow(before, dtype):
        return state
    moments, old = find(state), find(before)

    def stored(path: Any, leaf: Any, last: Any) -> Any:
        if not _is_float(leaf):
            return leaf
        x, kept = unbox(leaf), unbox(last).dtype
        if kept != jnp.bfloat16:
            return refill(leaf, x.astype(kept))
        # Every array is rounded by numbers of its own, and a layer by itself by those
        # that it has in its stack.
        name = zlib.crc32(path_string(path).encode())
        noise = dither((*key_data, count, name), x.shape, layer * x.size)
        return refill(leaf, round_to_bfloat16(x, noise))

    groups = jax.tree_util.tree_map_with_path(
        stored, moments.groups, old.groups, is_leaf=_is_whole
    )
    return moments.rebuild(groups)


def _is_whole(node: Any) -> bool:
    return is_box(node) or is_quantized(node)


def _is_float(leaf: Any) -> bool:
    """Whether a moment is an array of real floats, and not encoded or hidden."""
    if isinstance(leaf, optax.MaskedNode) or is_quantized(leaf):
        return False
    dtype = getattr(unbox(leaf), "dtype", None)  # a box may hold what is encoded
    return dtype is not None and jnp.issubdtype(dtype, jnp.floating)


def _is_narrow(state: Any, dtype: Any) -> bool:
    """Whether anything in the state is stored in fewer bits than computed in."""
    width = jnp.dtype(dtype).itemsize
    return any(
        jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype.itemsize < width
        for leaf in jax.tree.leaves(state)
    )
