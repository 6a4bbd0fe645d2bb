"""``wanted`` and ``resized``: updates as long as AdamW's, which a sample tells.

How far AdamW would go in a matrix depends on how steady its entries are, and a subspace
does not show that: it was chosen for what is steady in it. So AdamW's own moments are
kept of a sample of entries, as many as one row or a few of the projection has.
"""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lowrank_optax.bracket.bases import Lifted
from lowrank_optax.leaves.matrix import Matrix
from lowrank_optax.linalg.products import Operand, has_square, kept_if, regram, wide
from lowrank_optax.recovery import LeafView, Recovered

CHOICES = ("adamw",)

# ``optax.adamw``'s defaults.
_B1, _B2, _EPS = 0.9, 0.999, 1e-8

# The root mean square of so many entries of noise is known to about 4 %.
_ENTRIES = 256

# At most this share of a matrix: beside 2 m n of Adam's the sample is a quarter of m n.
_SHARE = 8

_GOLDEN = (5**0.5 - 1) / 2


class Sample(NamedTuple):
    """AdamW's moments of some entries of every column, ``float32 [*batch, c, n]``.

    Not ``mu`` and ``nu``: those are the inner optimizer's, and found by their names.
    """

    first: Array
    second: Array


def start(matrix: Matrix) -> Sample:
    """Returns the moments before the first step."""
    shape = (*matrix.batch_shape, *_rows(matrix).shape)
    zeros = jnp.zeros(shape, jnp.float32)
    return Sample(zeros, zeros)


def wanted(
    leaf: Lifted, gradient: Operand, sample: Sample, count: Array
) -> tuple[Float[Array, "*batch"], Sample]:
    """Returns the root mean square of AdamW's next update, and the new moments.

    Args:
      leaf: the matrices.
      gradient: as it came, without what a recovery adds.
      sample: the moments so far.
      count: steps before this one.
    """
    one = functools.partial(_wanted, leaf.matrix, count=count)
    return leaf.lift(one, gradient, sample)


def _wanted(
    matrix: Matrix, gradient: Operand, sample: Sample, count: Array
) -> tuple[Float[Array, ""], Sample]:
    """Returns the same of one matrix."""
    rows = gradient.along(jnp.asarray(_rows(matrix)))
    # Where it is stored, so that no large matrix is transposed.
    picked = jnp.take_along_axis(gradient.stored, rows, gradient.axis)
    g = wide(gradient.along(picked)).astype(jnp.float32)
    g = kept_if(has_square(g), g)
    first = _B1 * sample.first + (1 - _B1) * g
    second = _B2 * sample.second + (1 - _B2) * jnp.square(g)
    steps = count.astype(jnp.float32) + 1.0
    mean, square = first / (1 - _B1**steps), second / (1 - _B2**steps)
    update = mean / (jnp.sqrt(square) + _EPS)
    return jnp.sqrt(jnp.mean(jnp.square(update))), Sample(first, second)


def length(view: LeafView, recovered: Recovered) -> Float[Array, ""] | None:
    """Returns ``|P low + G diag(phi)|``, None if only the sum itself would tell.

    ``|P low|^2 + 2 <low phi, P^T G> + |G phi|^2``, of which nothing is m x n.
    """
    low, phi = recovered.low, recovered.phi
    if recovered.addend is not None or recovered.outside is not None:
        return None
    if phi is not None and phi.shape[-2] != 1:
        return None
    square = jnp.zeros([], jnp.float32)
    if low is not None:
        low = wide(low)
        square += jnp.sum(low * (low if view.orthonormal else regram(view.basis, low)))
    if phi is not None:
        columns = view.gradient.map(lambda g: jnp.square(wide(g))).column_sums()
        # Numbers without a square take no step.
        columns = kept_if(has_square(jnp.sqrt(columns)), columns)
        square += jnp.sum(jnp.square(phi) * columns)
        if low is not None:
            square += 2.0 * jnp.sum(phi * low * wide(view.projected))
    # A difference of almost equal sums may come out negative.
    return jnp.sqrt(jnp.maximum(square, 0.0))


def resized(leaf: Lifted, update: Operand, size: Array, gain: Any = None) -> Operand:
    """Returns updates, each matrix with a root mean square of ``size``.

    Args:
      leaf: the matrices.
      update: theirs, with their learning rate.
      size: of every matrix, without it.
      gain: the negative learning rate, None if it is applied elsewhere.
    """
    return leaf.lift(functools.partial(resize, gain=gain), update, size)


def resize(update: Operand, size: Array, gain: Any = None) -> Operand:
    """Returns the same of one matrix."""
    if gain is not None:
        size = size * jnp.abs(gain)
    factor = ratio(size, jnp.sqrt(jnp.mean(jnp.square(wide(update.stored)))))
    return update.map(lambda x: x * factor.astype(x.dtype))


def ratio(wished: Array, size: Array) -> Array:
    """Returns the factor from one to the other, 0 for what has no size."""
    usable = (size > 0) & jnp.isfinite(size)
    return jnp.where(usable, wished / jnp.where(usable, size, 1.0), 0.0)


def _rows(matrix: Matrix) -> np.ndarray:
    """Returns which rows are looked at in every column, ``[c, n]``.

    As many of every row, and in no pattern: multiples of the golden ratio, modulo 1,
    leave no gaps.
    """
    m, n = matrix.m, matrix.n
    count = max(1, min(-(-_ENTRIES // n), m // _SHARE))
    spread = (np.arange(1, count * n + 1) * _GOLDEN) % 1.0
    return np.floor(spread * m).astype(np.int32).reshape(count, n)
