"""``Perturbed``: a parameter and a direction that is still to be added to it.

What is drawn follows from seeds that lie beside the parameter. A scan over stacked
layers cuts both, and so one layer at a time can be perturbed, where it is used.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lowrank_optax._meshes import explicit_like
from lowrank_optax.leaves.matrix import Matrix
from lowrank_optax.linalg.products import wide
from lowrank_optax.zeroth_order.directions import Directions
from lowrank_optax.zeroth_order.noise import normal, rounded


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Noise:
    """The direction Z of a leaf, or of slices of it along its first axis.

    Attributes:
      seed: of this step, ``uint32[2]``: the leaf's, or with the batch axes of its
        matrices before that, ``uint32[*batch, 2]``.
      epoch: likewise that of some steps; of matrices only, else None.
      kept: what the method keeps of every matrix.
      row: where slices begin to be cut: the index of each one along the first axis of
        a leaf without matrices; None for the whole leaf.
      method: draws the matrices.
      matrix: the matrices of the whole leaf, None for independent numbers.
      shape: of the whole leaf.
    """

    seed: Array
    epoch: Array | None
    kept: Any
    row: Array | None
    method: Directions = dataclasses.field(metadata={"static": True})
    matrix: Matrix | None = dataclasses.field(metadata={"static": True})
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    def sliced(self) -> "Noise":
        """Returns the same with its first axis on every array, ready to be cut."""
        if self.matrix is not None:
            return self
        layers = self.shape[0]
        return dataclasses.replace(
            self,
            seed=jnp.broadcast_to(self.seed[None], (layers, 2)),
            row=jnp.arange(layers, dtype=jnp.uint32),
        )

    def dense(self) -> Array:
        """Draws Z in float32."""
        if self.matrix is None:
            if self.row is None:
                return normal(self.seed, self.shape)
            shape = self.shape[1:]
            draw = functools.partial(_slice, shape)
            return (jax.vmap(draw) if self.row.ndim else draw)(self.seed, self.row)
        batch = self.seed.ndim - 1
        matrix = self.matrix if batch == len(self.matrix.batch) else _cut(self.matrix)

        def draw_one(seed: Array, epoch: Any, kept: Any) -> Array:
            sizes = (matrix.m, matrix.n, matrix.rank)
            return self.method.draw(seed, epoch, kept, *sizes).astype(jnp.float32)

        for _ in range(batch):
            draw_one = jax.vmap(draw_one)
        return matrix.undo(draw_one(self.seed, self.epoch, self.kept))


_NOT_ADDED = (
    "lro.zeroth_order: a leaf that `scanned` names is used before its direction is "
    "added. Call lro.materialize on the parameters that the scan gives to one layer, "
    "or leave the leaf out of `scanned`."
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Perturbed:
    """``W + c Z``, not yet added; stands in a tree of parameters in place of W.

    A leaf of the parameters that ``scanned=`` of ``lro.zeroth_order`` names. All arrays
    in it have the first axis of W, so that ``jax.lax.scan`` cuts it as it cuts W.
    ``lro.materialize`` adds the two.

    Attributes:
      weight: W.
      noise: what Z is drawn from.
      scale: c, one for every slice along the first axis.
    """

    weight: Any
    noise: Noise
    scale: Any

    def __jax_array__(self) -> Array:
        """Raises: what computes with it has not been given its sum."""
        raise TypeError(_NOT_ADDED)

    def __getitem__(self, index: Any) -> Any:
        """Raises likewise."""
        raise TypeError(_NOT_ADDED)

    def added(self) -> Array:
        """Returns ``W + c Z`` in the dtype of W."""

        def add(weight: Array, noise: Noise, scale: Array) -> Array:
            scale = scale.reshape(scale.shape + (1,) * (weight.ndim - scale.ndim))
            return _sum(weight, noise, scale).astype(weight.dtype)

        return explicit_like(self.weight, add, self.weight, self.noise, self.scale)


def materialize(tree: Any) -> Any:
    """Adds the directions to the perturbed leaves of a tree; other leaves stay.

    To be called on what one layer is given, inside the model's scan over layers, when
    ``scanned=`` of ``lro.zeroth_order`` names the stacks. Without perturbed leaves, as
    in training by gradients, it returns the tree as it is.

    Args:
      tree: parameters of a layer.

    Returns:
      The same tree of arrays.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> import lowrank_optax as lro
      >>> def loss(params, x):
      ...     def layer(x, p):
      ...         return jnp.tanh(x @ lro.materialize(p)["kernel"]), None
      ...     return jnp.mean(jax.lax.scan(layer, x, params["layers"])[0])
      >>> params = {"layers": {"kernel": jnp.ones((3, 8, 8)) / 8}}
      >>> zo = lro.zeroth_order(loss, lro.mezo(), scanned="layers")
      >>> state = zo.init(params, jax.random.key(0))
      >>> (value, grads), state = zo.value_and_grad(params, state, jnp.ones((2, 8)))
      >>> grads["layers"]["kernel"].shape
      (3, 8, 8)
    """
    return jax.tree.map(
        lambda leaf: leaf.added() if isinstance(leaf, Perturbed) else leaf,
        tree,
        is_leaf=lambda leaf: isinstance(leaf, Perturbed),
    )


def moved(
    weight: Array, noise: Noise, amount: Array, rounding: tuple[Any, ...]
) -> Array:
    """Returns ``W + c Z`` in the dtype of W, 16-bit numbers rounded at random.

    Args:
      weight: W, the whole leaf.
      noise: what Z is drawn from.
      amount: c, a scalar.
      rounding: numbers that the rounding's random bits follow from.
    """

    def add(weight: Array, noise: Noise, amount: Array, rounding: Any) -> Array:
        total = _sum(weight, noise, amount)
        return rounded(total, weight.dtype, rounding)

    def by_layers(weight: Array, noise: Noise, amount: Array, rounding: Any) -> Array:
        # Products are written out before they are added. What a loop carries is
        # changed in place, one layer at a time.
        def body(i: Array, weight: Array) -> Array:
            one, own = _at((weight, noise), i)
            new = add(one, own, amount, (*rounding, i))
            return jax.lax.dynamic_update_index_in_dim(weight, new, i, 0)

        return jax.lax.fori_loop(0, weight.shape[0], body, weight)

    stacked = noise.matrix is not None and noise.matrix.batch[:1] == (0,)
    how = by_layers if stacked else add
    return explicit_like(weight, how, weight, noise, amount, rounding)


def _slice(shape: tuple[int, ...], seed: Array, row: Array) -> Array:
    return normal(seed, shape, row)


def _sum(weight: Array, noise: Noise, scale: Array) -> Array:
    """Returns ``W + c Z`` in float32, or in float64 if W is that."""
    weight = wide(weight)
    return weight + scale.astype(weight.dtype) * noise.dense().astype(weight.dtype)


def _at(tree: Any, i: Array) -> Any:
    return jax.tree.map(
        lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), tree
    )


def _cut(matrix: Matrix) -> Matrix:
    """Returns the matrices of a slice along the first axis, which is one of batch."""

    def before(axes: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(axis - 1 for axis in axes if axis)

    fields = ("batch", "rows", "columns", "shared")
    cut = {field: before(getattr(matrix, field)) for field in fields}
    return dataclasses.replace(matrix, shape=matrix.shape[1:], **cut)
