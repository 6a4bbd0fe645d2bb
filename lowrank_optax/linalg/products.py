"""``Operand``: a matrix as it is stored, and the products it takes part in.

The bracket sees every matrix with its basis on the left, so a stored matrix may be the
transpose of the one that is meant. XLA folds a transpose into the product it feeds or
follows, but a loop or a branch writes its operands out, and on a CPU a product of
row-major operands is faster than one of folded transposes. So the large matrix stays as
it is stored, and thin ones are transposed for real. No other file knows of this.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

HIGHEST = jax.lax.Precision.HIGHEST


def wide(x: Array) -> Array:
    """Returns ``x`` in float32, or in float64 if it is that already."""
    return x.astype(wider(jnp.float32, x.dtype))


def wider(*dtypes: Any) -> Any:
    """Returns the dtype that holds the numbers of all.

    Asked for by name, whatever ``jax_numpy_dtype_promotion`` refuses to conclude.
    """
    with jax.numpy_dtype_promotion("standard"):
        return functools.reduce(jnp.promote_types, dtypes)


def has_square(x: Any) -> Any:
    """Returns where a number's square, and any sum of such squares, is finite.

    Second moments hold squares and sums of them, and those of float32 end at 3e38: a
    gradient above 1.8e19 would leave an infinity that never decays. The limit leaves
    room for ``2**16`` such squares, so that no moment has to be looked at again:
    7.2e16 in float32. Anything but real floating-point numbers counts as sound.
    """
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return True
    x = wide(jnp.asarray(x))
    return jnp.abs(x) < float(jnp.finfo(x.dtype).max) ** 0.5 * 2.0**-8


def kept_if(flag: Any, x: Any) -> Any:
    """Returns x, and zeros where the flag does not hold."""
    return x if flag is True else jnp.where(flag, x, jnp.zeros_like(x))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Operand:
    """A matrix ``[m, n]``, or its transpose where that is stored.

    Attributes:
      stored: ``[*batch, m, n]``, or ``[*batch, n, m]`` if ``transposed``.
      transposed: whether the matrix is the transpose of ``stored``.
    """

    stored: Any
    transposed: bool = dataclasses.field(default=False, metadata={"static": True})

    @classmethod
    def of(cls, matrix: "Array | Operand", transposed: bool = False) -> "Operand":
        """Returns the matrix, if it is a plain array, as one stored in this order."""
        if isinstance(matrix, Operand):
            return matrix
        return cls(_swap(matrix) if transposed else matrix, transposed)

    @property
    def array(self) -> Any:
        """The matrix ``[*batch, m, n]`` itself."""
        return _swap(self.stored) if self.transposed else self.stored

    @property
    def axis(self) -> int:
        """Which axis of ``stored`` runs along the rows' index, m."""
        return -1 if self.transposed else -2

    @property
    def shape(self) -> tuple[int, ...]:
        """The matrix' shape, ``(*batch, m, n)``."""
        *batch, a, b = self.stored.shape
        return (*batch, b, a) if self.transposed else (*batch, a, b)

    @property
    def dtype(self) -> Any:
        """The entries' dtype."""
        return self.stored.dtype

    @property
    def peak(self) -> Array:
        """The largest absolute entry."""
        return jnp.max(jnp.abs(self.stored))

    def map(self, function: Callable[..., Array], *others: "Operand") -> "Operand":
        """Applies a function entry by entry, or one of a whole matrix and its order."""
        stored = function(self.stored, *(other.stored for other in others))
        return dataclasses.replace(self, stored=stored)

    def astype(self, dtype: Any) -> "Operand":
        """Casts the entries."""
        return self.map(lambda x: x.astype(dtype))

    def down(self, basis: Float[Array, "m r"], precision: Any = HIGHEST) -> Array:
        """Returns ``P^T G``, ``[r, n]``."""
        if self.transposed:
            return _turned(jnp.matmul(self.stored, basis, precision=precision))
        return jnp.matmul(_turn(basis), self.stored, precision=precision)

    def across(self, low: Float[Array, "r n"]) -> Array:
        """Returns ``G L^T``, ``[m, r]``, at the highest precision."""
        if self.transposed:
            # `low` may be a transpose, as `down` returns it: XLA would fold that one.
            low = jax.lax.optimization_barrier(low)
            return _turned(jnp.matmul(low, self.stored, precision=HIGHEST))
        return jnp.matmul(self.stored, _turn(low), precision=HIGHEST)

    def along(self, thin: Array) -> Array:
        """Returns what has a row or a column for each of the matrix', as stored."""
        return _swap(thin) if self.transposed else thin

    def column_sums(self) -> Array:
        """Returns the sums of the columns, ``[1, n]``."""
        return self.along(jnp.sum(self.stored, self.axis, keepdims=True))

    def column_peaks(self) -> Array:
        """Returns the largest absolute entries of the columns, ``[1, n]``."""
        return self.along(jnp.max(jnp.abs(self.stored), self.axis, keepdims=True))

    def times(self, factor: Array) -> "Operand":
        """Multiplies by a factor ``[1, 1]``, ``[1, n]``, ``[m, 1]`` or ``[m, n]``."""
        return self.map(lambda x: x * self.along(factor))


def up(
    basis: Float[Array, "m r"], low: Float[Array, "r n"], transposed: bool = False
) -> Operand:
    """Returns ``P N`` in the order in which the gradient is stored."""
    if transposed:
        return Operand(jnp.matmul(_turn(low), _turn(basis)), True)
    return Operand(jnp.matmul(basis, low))


def inner(x: Array, y: Array) -> Array:
    """Returns ``X^T Y`` of thin matrices at the highest precision."""
    return jnp.matmul(_turn(x), y, precision=HIGHEST)


def outer(x: Array, y: Array) -> Array:
    """Returns ``X Y^T`` of thin matrices at the highest precision."""
    return jnp.matmul(x, _turn(y), precision=HIGHEST)


def gram(columns: Float[Array, "*b m r"]) -> Float[Array, "*b r r"]:
    """Returns ``Y^T Y`` at the highest precision."""
    return inner(columns, columns)


def regram(basis: Any, low: Array) -> Array:
    """Returns ``(P^T P) R``, on both sides where there are two bases."""
    bases = [wide(b) for b in jax.tree.leaves(basis)]
    if not bases:  # an orthonormal transform that is computed and not stored
        return low
    left, *right = bases
    low = jnp.matmul(gram(left), low, precision=HIGHEST)
    return by_blocks(low, gram(right[0]), HIGHEST) if right else low


def by_blocks(low: Array, right: Array, precision: Any = None) -> Array:
    """Returns ``[X_1 Q, X_2 Q, ...]`` of blocks ``low = [X_1, X_2, ...]``."""
    blocks = low.reshape((*low.shape[:-1], -1, right.shape[-2]))
    out = jnp.einsum("...rkn,...ns->...rks", blocks, right, precision=precision)
    return out.reshape((*low.shape[:-1], -1))


def back_by_blocks(low: Array, right: Array, precision: Any = None) -> Array:
    """Returns ``[X_1 Q^T, X_2 Q^T, ...]`` of blocks ``low = [X_1, X_2, ...]``."""
    return by_blocks(low, _turn(right), precision)


def unit_peak(x: Float[Array, "*b m n"]) -> tuple[Array, Array]:
    """Splits every matrix into one whose largest element is near 1, and a factor.

    The factor is a power of two, so nothing is rounded. Dividing by the largest element
    would not do: a compiler multiplies by the reciprocal instead, and that of 1e38 is
    too small for a float32.

    Returns:
      ``(y, factor)`` with ``X = factor * Y``; max|Y| is in [0.5, 4), or 0 if X is zero.
    """
    peak = jnp.max(jnp.abs(x), (-2, -1), keepdims=True)
    # Both powers of two have to be normal numbers: a larger exponent overflows in one
    # of them, and a backend may flush the other to zero.
    most = jnp.finfo(x.dtype).maxexp - 2
    exponent = jnp.clip(jnp.frexp(peak)[1], -most, most)
    one = jnp.ones((), x.dtype)
    return x * jnp.ldexp(one, -exponent), jnp.ldexp(one, exponent)


def unit_norm(x: Float[Array, "*b m n"]) -> tuple[Array, Float[Array, "*b"]]:
    """Returns ``X / |X|`` and ``|X|`` of every matrix; zero is zero times zero."""
    x, factor = unit_peak(x)
    size = jnp.sqrt(jnp.sum(x * x, (-2, -1), keepdims=True))
    # The norm can exceed the largest number where no element does.
    norm = jnp.minimum(factor * size, jnp.finfo(x.dtype).max)
    return x / jnp.where(size == 0, 1.0, size), norm[..., 0, 0]


def _swap(x: Array) -> Array:
    return jnp.swapaxes(x, -1, -2)


def _turn(thin: Array) -> Array:
    # The barrier keeps XLA from folding the transpose into the product behind it.
    return jax.lax.optimization_barrier(_swap(thin))


def _turned(product: Array) -> Array:
    # Likewise for a product in front of it.
    return _swap(jax.lax.optimization_barrier(product))
